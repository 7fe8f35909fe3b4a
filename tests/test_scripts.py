"""The scripts' own arithmetic."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from helpers import tiny_teacher


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


def test_warm_teacher_cache_fills_what_the_run_would_ask(tmp_path):
    tiny_teacher("cifar", num_labels=10).save_pretrained(tmp_path / "teacher")
    flags = "--use_cpu --dataset digits --max_train_samples 32 --max_eval_samples 8 --student resnet8"
    words = [*flags.split(), "--views", "2", "--teacher", tmp_path / "teacher", "--output_dir", tmp_path / "out"]
    command = [sys.executable, ROOT / "scripts/warm_teacher_cache.py", "run_image_kd", *words]
    environment = {**os.environ, "HFKD_CACHE": str(tmp_path / "caches"), "OMP_NUM_THREADS": "1"}
    for answers in (64, 0):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["answers"] == answers
    assert not list((tmp_path / "out").glob("*"))  # nothing was trained
