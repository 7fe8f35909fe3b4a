"""The demo, shortened: a few steps instead of 150."""

import importlib
import json
import sys
from pathlib import Path

from transformers import AutoModelForImageClassification
from transformers.utils import logging


ROOT = Path(__file__).resolve().parents[1]


def test_demo_prints_its_table_and_writes_student_card_and_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    demo = importlib.import_module("demo")
    monkeypatch.setattr(demo, "OUTPUT", tmp_path)
    monkeypatch.setattr(demo, "SEEDS", (0, 1))
    monkeypatch.setattr(demo, "TEACHER", ["--student", "resnet8", "--max_steps", "8"])
    monkeypatch.setattr(demo, "STUDENT", ["--student", "resnet8", "--max_steps", "2"])
    monkeypatch.setattr(demo, "COMMON", demo.COMMON + " --use_cpu")
    verbosity = logging.get_verbosity()
    try:
        demo.main()
    finally:
        logging.set_verbosity(verbosity)
        for name in ("demo", "run_image_kd"):
            sys.modules.pop(name, None)

    printed = capsys.readouterr().out
    scores = json.loads((tmp_path / "demo.json").read_text())
    assert {name: len(values) for name, values in scores.items()} == {
        "teacher, all labels": 1,
        "student alone, 100 labels": 2,
        "student taught, 100 labels": 2,
        "student alone, all labels": 2,
        "student taught, all labels": 2,
    }
    for name, values in scores.items():
        line = next(line for line in printed.splitlines() if line.startswith(name))
        assert f"{sum(values) / len(values):.3f}" in line
        assert "78,042" in line
    student = tmp_path / "taught-100-0"
    assert AutoModelForImageClassification.from_pretrained(student).num_parameters() == 78042
    assert "KD(alpha=0.9, temperature=4.0)" in (student / "README.md").read_text()
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
