"""The benchmarks run, and their arithmetic is right; what they measured is in the docs."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from transformers.utils import logging


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def method_cost(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    verbosity = logging.get_verbosity()
    yield importlib.import_module("method_cost")
    logging.set_verbosity(verbosity)
    sys.modules.pop("method_cost", None)


def test_what_methods_cost_is_measured_against_kd_and_the_student_alone(method_cost, tmp_path, capsys):
    output = tmp_path / "cost.json"
    words = ["--methods", "CAM()", "TfKD('virtual')", "--classes", "10", "--rounds", "1", "--steps", "1"]
    rows = {row["method"]: row for row in method_cost.main([*words, "--output", str(output)])}
    assert list(rows) == ["StudentAlone()", "KD()", "again", "CAM()", "TfKD('virtual')"]
    assert [row["parameters"] for row in rows.values()] == [0, 0, 0, 1408, 0]
    assert rows["CAM()"]["state_mb"] == pytest.approx(1408 * 4 / 1e6)
    assert rows["CAM()"]["kept_mb"] > rows["again"]["kept_mb"] == rows["KD()"]["kept_mb"] == 0
    assert rows["StudentAlone()"]["ratio_alone"] == [1.0, 1.0, 1.0]
    assert rows["KD()"]["ratio"][1] + rows["again"]["ratio"][1] == pytest.approx(2.0)
    assert json.loads(output.read_text())["rows"] == list(rows.values())
    printed = capsys.readouterr().out
    assert f"| `CAM()` | 10 | {rows['CAM()']['step_ms']:.0f} |" in printed


def test_ratios_are_taken_round_by_round(method_cost):
    assert method_cost.ratio([2.0, 40.0, 6.0], [1.0, 10.0, 1.0]) == [3.0, 4.0, 5.0]


def test_what_compares_tokens_is_measured_on_text(method_cost):
    kinds = {method: method_cost.kind_of(method) for method in method_cost.METHODS}
    text = {method for method, kind in kinds.items() if kind == "text"}
    assert text == {"HiddenStates()", "HiddenStates('cosine')", "AttentionMaps()", "AttentionMaps('kl')"}
