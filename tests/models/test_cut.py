import copy

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hfkd.models import student_from_teacher
from hfkd.models.cut import reorder_head


SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 6, "num_labels": 3}
TEXT = {**SMALL, "vocab_size": 50}
IMAGE = {**SMALL, "image_size": 16, "patch_size": 8}
DISTILBERT = {"dim": 16, "n_heads": 2, "hidden_dim": 24, "n_layers": 6, "num_labels": 3, "vocab_size": 50}
TEACHERS = {
    "bert": (BertForSequenceClassification, BertConfig(**TEXT)),
    "bert-mlm": (BertForMaskedLM, BertConfig(**TEXT)),
    "distilbert": (DistilBertForSequenceClassification, DistilBertConfig(**DISTILBERT)),
    "roberta": (RobertaForSequenceClassification, RobertaConfig(**TEXT)),
    "vit": (ViTForImageClassification, ViTConfig(**IMAGE)),
    "deit": (DeiTForImageClassification, DeiTConfig(**IMAGE)),
    "deit-distilled": (DeiTForImageClassificationWithTeacher, DeiTConfig(**IMAGE)),
}


def make(name):
    torch.manual_seed(0)
    model_class, config = TEACHERS[name]
    return model_class(copy.deepcopy(config)).eval()


@pytest.fixture(params=TEACHERS)
def teacher(request):
    return make(request.param)


def logits(model):
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        return model(torch.randn(2, 3, 16, 16, generator=generator)).logits
    return model(torch.randint(3, 50, (2, 7), generator=generator)).logits


def layer_of(key):
    """The number in a key such as `bert.encoder.layer.3.output.dense.weight`."""
    return next((int(part) for part in key.split(".") if part.isdigit()), None)


def test_all_layers_give_the_same_output(teacher):
    torch.testing.assert_close(logits(student_from_teacher(teacher, num_layers=6)), logits(teacher))
    torch.testing.assert_close(logits(student_from_teacher(teacher, layers=range(6))), logits(teacher))


def test_weights_are_copied_and_not_shared(teacher):
    layers = [0, 2, 5]
    student = student_from_teacher(teacher, layers=layers)
    theirs, pointers = teacher.state_dict(), {p.data_ptr() for p in teacher.parameters()}
    for key, value in student.state_dict().items():
        number = layer_of(key)
        if number is not None:
            key = key.replace(f".{number}.", f".{layers[number]}.", 1)
        assert torch.equal(value, theirs[key]), key
    assert not pointers & {p.data_ptr() for p in student.parameters()}
    assert {layer_of(key) for key in student.state_dict()} == {None, 0, 1, 2}


def test_student_loads_as_a_plain_transformers_model(teacher, tmp_path):
    student = student_from_teacher(teacher, num_layers=2)
    assert type(student) is type(teacher)
    assert student.config.num_hidden_layers == 2
    assert teacher.config.num_hidden_layers == 6
    assert student.config.id2label == teacher.config.id2label
    student.save_pretrained(tmp_path)
    loaded, info = type(teacher).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(logits(loaded), logits(student))


@pytest.mark.parametrize("name", ["vit", "deit", "deit-distilled"])
def test_cutting_layers_is_skipping_them(name):
    """A layer whose weights are zero passes its input on, in networks that normalise before they add."""
    teacher = make(name)
    student = student_from_teacher(teacher, layers=[1, 4])
    with torch.no_grad():
        for key, parameter in teacher.named_parameters():
            if layer_of(key) in (0, 2, 3, 5):
                parameter.zero_()
    torch.testing.assert_close(logits(teacher), logits(student))


@pytest.mark.parametrize(
    ("depth", "num_layers", "expected"),
    [
        (12, 6, [0, 2, 4, 6, 8, 11]),
        (12, 3, [0, 5, 11]),
        (6, 2, [0, 5]),
        (6, 4, [0, 1, 3, 5]),
        (6, 1, [0]),
        (1, 1, [0]),
    ],
)
def test_layers_are_evenly_spaced_with_both_ends(depth, num_layers, expected):
    teacher = BertForSequenceClassification(BertConfig(**{**TEXT, "num_hidden_layers": depth}))
    with torch.no_grad():
        for key, parameter in teacher.named_parameters():
            if layer_of(key) is not None:
                parameter.fill_(layer_of(key))
    student = student_from_teacher(teacher, num_layers=num_layers)
    assert [layer.output.dense.bias[0].item() for layer in student.bert.encoder.layer] == expected


def test_state_is_that_of_from_pretrained():
    teacher = BertForSequenceClassification(BertConfig(**TEXT)).train().requires_grad_(False).bfloat16()
    student = student_from_teacher(teacher, num_layers=2)
    assert not student.training
    assert student.dtype == torch.bfloat16
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_other_architectures_are_refused_by_name():
    teacher = ElectraForSequenceClassification(ElectraConfig(**TEXT, embedding_size=16))
    with pytest.raises(ValueError, match="out of a 'electra' teacher, only of bert, distilbert, roberta, vit, deit"):
        student_from_teacher(teacher, num_layers=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "pass either num_layers or layers"),
        ({"num_layers": 2, "layers": [0, 1]}, "pass either num_layers or layers"),
        ({"num_layers": 7}, "num_layers must lie between 1 and the teacher's 6, got 7"),
        ({"num_layers": 0}, "num_layers must lie between 1 and the teacher's 6, got 0"),
        ({"layers": []}, "layers must be rising numbers from 0 to 5"),
        ({"layers": [0, 6]}, r"layers must be rising numbers from 0 to 5, each once, got \[0, 6\]"),
        ({"layers": [-1]}, "layers must be rising numbers from 0 to 5"),
        ({"layers": [3, 1]}, "layers must be rising numbers from 0 to 5"),
        ({"layers": [1, 1]}, "layers must be rising numbers from 0 to 5"),
    ],
)
def test_wrong_layers_are_refused(arguments, message):
    teacher = BertForSequenceClassification(BertConfig(**TEXT))
    with pytest.raises(ValueError, match=message):
        student_from_teacher(teacher, **arguments)


def test_the_head_follows_the_data_sets_order():
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        id2label={0: "no", 1: "yes", 2: "maybe"}, label2id={"no": 0, "yes": 1, "maybe": 2},
    )  # fmt: skip
    teacher = BertForSequenceClassification(config).eval()
    student = student_from_teacher(teacher, num_layers=2, label_names=["yes", "maybe", "no"])
    tokens = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(student(tokens).logits, teacher(tokens).logits[:, [1, 2, 0]])
    assert student.config.id2label == {0: "yes", 1: "maybe", 2: "no"}
    numbered = student_from_teacher(teacher, num_layers=2, label_names=["0", "1", "2"])
    torch.testing.assert_close(numbered(tokens).logits, teacher(tokens).logits)
    assert numbered.config.id2label == teacher.config.id2label
    with pytest.raises(ValueError, match="classes of the teacher are not the student's"):
        student_from_teacher(teacher, num_layers=1, label_names=["a", "b", "c"])
    with pytest.raises(ValueError, match="the teacher has 3 classes, the data 2"):
        student_from_teacher(teacher, num_layers=1, label_names=["no", "yes"])


def test_both_heads_of_a_distilled_model_follow():
    teacher = make("deit-distilled")
    teacher.config.id2label = {0: "no", 1: "yes", 2: "maybe"}
    student = student_from_teacher(teacher, num_layers=6, label_names=["yes", "maybe", "no"])
    torch.testing.assert_close(logits(student), logits(teacher)[:, [1, 2, 0]])


@pytest.mark.parametrize("name", ["distilbert", "roberta"])
def test_a_layer_before_the_head_as_wide_as_it_stays(name):
    model_class, config = TEACHERS[name]
    config = copy.deepcopy(config)
    config.id2label = {i: chr(97 + i) for i in range(16)}  # as many as the hidden states have
    teacher = model_class(config).eval()
    student = student_from_teacher(teacher, num_layers=6, label_names=[chr(112 - i) for i in range(16)])
    torch.testing.assert_close(logits(student), logits(teacher).flip(1))


def test_a_head_that_is_not_found_is_not_guessed():
    with pytest.raises(ValueError, match="no layer of BertForSequenceClassification has 7 outputs"):
        reorder_head(make("bert"), [*range(7)])
