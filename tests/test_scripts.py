"""The scripts' own arithmetic."""

import json
import re
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]


def result_table(*words):
    command = [sys.executable, str(ROOT / "scripts/result_table.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


def test_result_table_averages_over_seeds(tmp_path):
    for name, accuracy in {"alone-0": 0.5, "kd-0": 0.6, "kd-1": 0.7}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "all_results.json").write_text(json.dumps({"test_accuracy": accuracy}))
    lines = result_table(*sorted(tmp_path.iterdir())).stdout.splitlines()
    assert lines[2:] == ["| alone | 1 | 50.00 |", "| kd | 2 | 65.00 ± 7.07 |"]


def test_result_table_names_unfinished_runs(tmp_path):
    done = result_table(tmp_path)
    assert done.returncode == 2
    assert f"not finished: {tmp_path}" in re.sub(r"\s+", " ", done.stderr)
