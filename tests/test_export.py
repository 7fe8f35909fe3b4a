"""scripts/export_student.py: what it writes answers as PyTorch does, or is not there."""

import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from helpers import NUM_LABELS, VOCABULARY, named, rows, tiny_teacher, tokenizer
from transformers import AutoImageProcessor, AutoTokenizer, ViTImageProcessor

from hfkd.cli import parse_arguments
from hfkd.models import CifarForImageClassification, load_model


ROOT = Path(__file__).resolve().parents[1]
NAMES = ["ant", "bee", "cat", "dog", "elk"]
INPUTS = {
    "bert": ["input_ids", "attention_mask", "token_type_ids"],
    "distilbert": ["input_ids", "attention_mask"],
}
QUICK = {"rounds": 1, "max_length": 16}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield importlib.import_module("export_student")
    sys.modules.pop("export_student")


def saved(family, folder, **config):
    """A trained-looking model with class names, beside its processor or tokenizer."""
    if family == "timm":  # initialised as timm does: the wrapper's own weights give every image the same answer
        model = load_model("test_efficientnet", label_names=NAMES, pretrained=False)
    else:
        model = named(tiny_teacher(family, **config), NAMES)
    if family in ("bert", "distilbert"):
        tokenizer(model_input_names=INPUTS[family]).save_pretrained(folder)
    elif family == "vit":
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    model.save_pretrained(folder)
    return model.eval()


def answers(folder, inputs, file="model.onnx"):
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / file, providers=["CPUExecutionProvider"])
    return session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]


def names_in(folder):
    config = json.loads((folder / "config.json").read_text())
    return config.get("label_names") or [config["id2label"][str(i)] for i in range(NUM_LABELS)]  # the former: timm


@pytest.mark.parametrize("family", ["cifar", "vit", "timm"])
def test_an_image_student_answers_alike_in_batches_of_any_size(script, tmp_path, family):
    student = saved(family, tmp_path / "student")
    report = script.run(script.ExportArguments(str(tmp_path / "student"), str(tmp_path / "onnx"), **QUICK))
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "onnx")
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    for batch in (1, 5, 64):
        inputs = {"pixel_values": pixels + torch.randn(batch, *pixels.shape[1:])}
        with torch.no_grad():
            expected = student(**inputs).logits.numpy()
        np.testing.assert_allclose(answers(tmp_path / "onnx", inputs), expected, rtol=0, atol=1e-4)
        assert batch == 1 or np.ptp(expected, axis=0).max() > 0.01  # so the comparison could fail
    assert names_in(tmp_path / "onnx") == NAMES
    assert list(report) == ["PyTorch float32", "ONNX float32"]
    assert report["ONNX float32"]["same answer, %"] == 100
    assert report["ONNX float32"]["MB"] == pytest.approx((tmp_path / "onnx/model.onnx").stat().st_size / 1e6)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_a_text_student_answers_alike_at_any_length_under_padding(script, tmp_path, family):
    student = saved(family, tmp_path / "student")
    script.run(script.ExportArguments(str(tmp_path / "student"), str(tmp_path / "onnx"), **QUICK))
    accepted = INPUTS[family]
    for batch, length in ((1, 3), (1, 30), (5, 12), (40, 7)):
        columns = rows("bert", batch, length=length, seed=length).columns
        inputs = {name: columns[name] for name in accepted}
        with torch.no_grad():
            expected = student(**inputs).logits.numpy()
        np.testing.assert_allclose(answers(tmp_path / "onnx", inputs), expected, rtol=0, atol=1e-4)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "onnx")) == VOCABULARY
    assert names_in(tmp_path / "onnx") == NAMES


def test_quantised_text_is_smaller_and_its_agreement_and_scores_are_counted(script, tmp_path, capsys):
    student = saved("bert", tmp_path / "student", hidden_size=128, intermediate_size=256)
    data = tmp_path / "data"
    data.mkdir()
    generator = np.random.default_rng(0)
    lines = [
        {"sentence": " ".join(map(str, generator.integers(2, VOCABULARY, 6))), "label": NAMES[i % NUM_LABELS]}
        for i in range(80)
    ]
    import pandas

    for split in ("train", "test"):
        pandas.DataFrame(lines).to_parquet(data / f"{split}.parquet")
    report = script.run(
        script.ExportArguments(
            str(tmp_path / "student"), str(tmp_path / "onnx"), int8=True, data="own", data_dir=str(data), **QUICK
        )
    )
    texts = tokenizer(model_input_names=INPUTS["bert"])(
        [line["sentence"] for line in lines], padding=True, return_tensors="pt"
    )
    inputs = dict(texts)
    with torch.no_grad():
        exact = student(**inputs).logits.numpy()
    # Activations are quantised by the range that a batch has, so answers depend on which texts come together.
    batches = [{name: column[i : i + 32] for name, column in inputs.items()} for i in (0, 32, 64)]
    quantised = np.concatenate([answers(tmp_path / "onnx", batch, "model_int8.onnx") for batch in batches])
    labels = np.array([NAMES.index(line["label"]) for line in lines])
    assert 0 < np.abs(quantised - exact).max() < 0.5 * np.ptp(exact)
    row = report["ONNX int8"]
    assert row["same answer, %"] == pytest.approx(100 * (quantised.argmax(1) == exact.argmax(1)).mean())
    assert row["accuracy"] == pytest.approx((quantised.argmax(1) == labels).mean())
    assert report["PyTorch float32"]["accuracy"] == pytest.approx((exact.argmax(1) == labels).mean())
    assert row["largest difference"] == pytest.approx(np.abs(quantised - exact).max(), rel=1e-3)
    assert row["MB"] < 0.5 * report["ONNX float32"]["MB"]

    printed = capsys.readouterr().out
    head = next(line for line in printed.splitlines() if "batch 32" in line)
    assert head == "||MB|ms at batch 1|ms at batch 32|largest difference|same answer, %|accuracy|"
    assert f"threads: {torch.get_num_threads()} (OMP_NUM_THREADS)" in printed
    assert "80 samples of own" in printed


@pytest.fixture
def student(tmp_path):
    saved("cifar", tmp_path / "student")
    return str(tmp_path / "student")


def test_a_model_that_answers_otherwise_is_refused_and_nothing_is_left(script, student, tmp_path, monkeypatch):
    forward = CifarForImageClassification.forward

    def other_when_alone(self, pixel_values, **kwargs):
        return forward(self, pixel_values if pixel_values.shape[0] > 1 else pixel_values * 1.01, **kwargs)

    monkeypatch.setattr(CifarForImageClassification, "forward", other_when_alone)
    with pytest.raises(ValueError, match=r"off on inputs of 1×3×32×32, and may be 0\.0001: nothing was written"):
        script.run(script.ExportArguments(student, str(tmp_path / "onnx"), **QUICK))
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_the_commands_of_the_docs_parse_and_their_snippet_names_the_class(script, tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    commands = [line.split() for block in re.findall(r"```bash\n(.+?)```", text, re.S) for line in block.splitlines()]
    assert len(commands) >= 2
    for words in commands:
        assert words[:2] == ["python", "scripts/export_student.py"]
        parse_arguments((script.ExportArguments,), words[2:])

    monkeypatch.chdir(tmp_path)
    student = saved("vit", tmp_path / "student")
    script.run(script.ExportArguments("student", "outputs/onnx", **QUICK))
    photo = PIL.Image.fromarray(np.random.default_rng(1).integers(0, 255, (30, 20, 3), np.uint8))
    photo.save("photo.png")
    capsys.readouterr()
    (snippet,) = re.findall(r"```python\n(.+?)```", text, re.S)
    exec(compile(snippet, "export.md", "exec"), {})
    with torch.no_grad():
        logits = student(**AutoImageProcessor.from_pretrained("student")(photo, return_tensors="pt")).logits
    assert capsys.readouterr().out == NAMES[logits.argmax()] + "\n"


def test_not_a_number_is_no_agreement(script):
    def engine(value):
        return lambda inputs: np.full((1, 2), value, np.float32)

    with pytest.raises(ValueError, match="nan off"):
        script.check_answers(engine(0.0), engine(np.nan), [{"x": torch.zeros(1, 1)}])
    assert script.check_answers(engine(0.0), engine(9e-5), [{"x": torch.zeros(1, 1)}]) == pytest.approx(9e-5)
    with pytest.raises(ValueError, match="0.00011 off"):
        script.check_answers(engine(0.0), engine(1.1e-4), [{"x": torch.zeros(1, 1)}])


def test_bad_input_is_refused_with_a_remedy(script, student, tmp_path, monkeypatch):
    def refuse(match, student=student, **arguments):
        with pytest.raises(ValueError, match=match):
            script.run(script.ExportArguments(student, **{"output_dir": str(tmp_path / "onnx"), **arguments}))

    refuse("is there and not empty: name a new folder", output_dir=student)
    refuse("leave it out for images", int8=True)
    refuse("1 or more", rounds=0)
    refuse("name a folder that save_model wrote, or a Hub id", student=str(tmp_path / "nowhere"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refuse(re.escape('exporting works by onnxruntime: pip install "hfkd[export]"'))
    assert not (tmp_path / "onnx").exists()
