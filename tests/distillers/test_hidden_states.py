"""Hidden states against their definition, without padding, and the map of layers."""

import math

import pytest
import torch
from helpers import logged, make_trainer, rows, tiny, tiny_teacher
from setups import features, network, outputs, set_up
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from hfkd.distillers import KD, Combined, HiddenStates
from hfkd.distillers.hidden_states import uniform_layers
from hfkd.functional import hidden_state_loss


MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])


def squares(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)


def cosine_distance(a, b):
    return 1 - sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


@pytest.mark.parametrize(("loss", "reference"), [("mse", squares), ("cosine", cosine_distance)])
def test_the_loss_is_its_definition(loss, reference):
    student, teacher = features(3, 4, 5), features(3, 4, 5, seed=1)
    for mask in (None, MASK):
        per_sample = hidden_state_loss(student, teacher, loss=loss, mask=mask, reduction="none")
        for i, value in enumerate(per_sample.tolist()):
            tokens = [t for t in range(4) if mask is None or mask[i, t]]
            expected = [reference(student[i, t].tolist(), teacher[i, t].tolist()) for t in tokens]
            assert value == pytest.approx(sum(expected) / len(tokens), rel=1e-10)
        assert hidden_state_loss(student, teacher, loss=loss, mask=mask).item() == pytest.approx(
            per_sample.mean().item()
        )


def test_golden_value():
    student, teacher = torch.tensor([[[1.0, 0.0], [9.0, 9.0]]]), torch.tensor([[[0.6, 0.8], [0.0, 0.0]]])
    mask = torch.tensor([[1, 0]])
    assert hidden_state_loss(student, teacher, mask=mask).item() == pytest.approx((0.4**2 + 0.8**2) / 2)
    assert hidden_state_loss(student, teacher, loss="cosine", mask=mask).item() == pytest.approx(1 - 0.6)


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_padding_and_the_rest_of_the_batch_do_not_count(loss):
    student, teacher = features(3, 4, 5).requires_grad_(), features(3, 4, 5, seed=1)
    whole = hidden_state_loss(student, teacher, loss=loss, mask=MASK, reduction="none")
    alone = hidden_state_loss(student[1:2, :2], teacher[1:2, :2], loss=loss, reduction="none")
    torch.testing.assert_close(whole[1:2], alone)
    whole.sum().backward()
    assert (student.grad[MASK == 0] == 0).all()
    assert (student.grad[MASK == 1] != 0).any(-1).all()


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match=r'loss must be "mse" \(TinyBERT\) or "cosine" \(DistilBERT\), got \'l1\''):
        hidden_state_loss(features(1, 2, 3), features(1, 2, 3), loss="l1")
    with pytest.raises(ValueError, match=r"\(1, 2, 3\) and \(1, 5, 3\) cannot be compared token by token"):
        hidden_state_loss(features(1, 2, 3), features(1, 5, 3))
    with pytest.raises(ValueError, match="reduction must be"):
        hidden_state_loss(features(1, 2, 3), features(1, 2, 3), reduction="sum")


@pytest.mark.parametrize(
    ("few", "many", "expected"),
    [
        (4, 12, [2, 5, 8, 11]),
        (6, 12, [1, 3, 5, 7, 9, 11]),
        (3, 3, [0, 1, 2]),
        (5, 12, [1, 3, 6, 8, 11]),
        (1, 12, [11]),
    ],
)
def test_the_map_is_uniform_and_ends_at_the_last_layer(few, many, expected):
    """TinyBERT: layer m of 4 is given layer 3m of 12, here counted from 0."""
    assert uniform_layers([str(i) for i in range(few)], [str(i) for i in range(many)]) == tuple(map(str, expected))


def test_a_deeper_student_has_no_uniform_map():
    with pytest.raises(ValueError, match="the student has 3 layers and the teacher 2, so there is no uniform map"):
        set_up(HiddenStates(), tiny("bert", num_hidden_layers=3), "bert")
    # Its last layer alone has.
    set_up(HiddenStates("cosine"), tiny("bert", num_hidden_layers=3), "bert")


def test_tinybert_projects_embeddings_and_layers_to_the_teachers_width():
    distiller = HiddenStates()
    where = set_up(distiller, tiny("distilbert"), tiny_teacher("bert", hidden_size=24, num_hidden_layers=4).eval())
    assert distiller.student_layers == (
        "distilbert.embeddings",
        *(f"distilbert.transformer.layer.{i}" for i in (0, 1)),
    )
    assert distiller.teacher_layers == ("bert.embeddings", "bert.encoder.layer.1", "bert.encoder.layer.3")
    assert [projector.weight.shape for projector in distiller.projectors] == [(24, 16)] * 3
    assert all(projector.bias is None for projector in distiller.projectors)
    student, teacher, batch = outputs(where, distiller)
    expected = 0
    for projector, one, other in zip(
        distiller.projectors, distiller.student_layers, distiller.teacher_layers, strict=True
    ):
        states = student.features[one] @ projector.weight.T
        expected = expected + hidden_state_loss(
            states, teacher.features[other], mask=batch["attention_mask"], reduction="none"
        )
    torch.testing.assert_close(distiller(student, teacher, batch)["hidden"], expected)


def test_distilbert_compares_the_last_layers_as_they_are():
    distiller = HiddenStates("cosine", weight=3.0)
    where = set_up(distiller, "distilbert", "bert")
    assert (distiller.student_layers, distiller.teacher_layers) == (
        ("distilbert.transformer.layer.1",),
        ("bert.encoder.layer.1",),
    )
    assert isinstance(distiller.projectors[0], nn.Identity)
    student, teacher, batch = outputs(where, distiller)
    states = student.features[distiller.student_layers[0]], teacher.features[distiller.teacher_layers[0]]
    expected = 3 * hidden_state_loss(*states, loss="cosine", mask=batch["attention_mask"], reduction="none")
    torch.testing.assert_close(distiller(student, teacher, batch)["hidden"], expected)


def test_hidden_states_are_those_that_the_model_reports():
    distiller = HiddenStates()
    where = set_up(distiller, "bert", "bert")
    student, _, batch = outputs(where, distiller)
    names = ("input_ids", "attention_mask", "token_type_ids")
    reported = where.student(**{name: batch[name] for name in names}, output_hidden_states=True).hidden_states
    for path, states in zip(distiller.student_layers, reported, strict=True):
        torch.testing.assert_close(student.features[path], states)


def test_images_have_tokens_without_padding():
    distiller = HiddenStates()
    where = set_up(distiller, "vit", "vit")
    assert distiller.student_layers == ("vit.embeddings", "vit.layers.0", "vit.layers.1")
    assert distiller(*outputs(where, distiller))["hidden"].shape == (4,)


def test_other_layers_may_be_named():
    distiller = HiddenStates(student_layers=["bert.encoder.layer.0"], teacher_layers=["bert.embeddings"])
    set_up(distiller, "bert", "bert")
    assert distiller.student_layers == ("bert.encoder.layer.0",)


def test_other_tokens_are_refused():
    dataset = rows("bert")
    dataset = dataset.with_columns(
        teacher_input_ids=dataset.columns["input_ids"], teacher_attention_mask=dataset.columns["attention_mask"]
    )
    with pytest.raises(
        ValueError, match="HiddenStates compares token by token, and the teacher has a tokenizer of its own"
    ):
        set_up(HiddenStates(), "distilbert", "bert", dataset)


def test_other_patches_are_refused():
    sizes = {"image_size": 16, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    with pytest.raises(ValueError, match="the student has 5 and the teacher 17: choose models that cut"):
        set_up(HiddenStates(), "vit", ViTForImageClassification(ViTConfig(patch_size=4, **sizes)))


def test_maps_are_refused():
    with pytest.raises(ValueError, match=r"HiddenStates compares hidden states \(B, L, D\).*take FitNet"):
        set_up(HiddenStates("cosine"), network("resnet8"), network("resnet8"))


def test_distilberts_recipe_trains(tmp_path):
    distiller = Combined(
        {"kd": KD(alpha=5 / 7, temperature=2.0), "hidden": HiddenStates("cosine")}, {"kd": 7.0}, task_from="kd"
    )
    trainer = make_trainer(
        tmp_path, tiny("distilbert"), tiny_teacher("bert"), distiller, rows("bert"), max_steps=12, learning_rate=0.02
    )
    trainer.train()
    hidden = logged(trainer, "hidden/hidden")
    assert hidden[-1] < hidden[0]
    assert distiller.teacher_layers == ("bert.encoder.layer.1",)
