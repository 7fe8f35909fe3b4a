"""The scripts' own arithmetic."""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import DATA, tiny_teacher


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


@pytest.fixture
def influence_study(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    yield importlib.import_module("influence_study")
    for name in ("influence_study", "run_image_kd"):
        sys.modules.pop(name, None)


def test_rank_graduation_is_one_for_the_same_order_and_zero_for_the_reverse(influence_study):
    weights = np.array([0.3, 2.0, 0.7, 1.1])
    assert influence_study.rank_graduation(weights, weights**3) == pytest.approx(1)
    assert influence_study.rank_graduation(weights, -weights) == pytest.approx(0)
    # Ranks 0 3 1 2 against 1 3 0 2: covariances by hand from weights about their mean of 1.025.
    centred = weights - 1.025
    expected = (centred @ [1, 3, 0, 2]) / (centred @ [0, 3, 1, 2])
    assert influence_study.rank_graduation(weights, np.array([0.5, 2.0, 0.1, 1.1])) == pytest.approx(
        (expected + 1) / 2
    )


def test_energy_is_the_sum_of_the_packages_or_unknown(influence_study, tmp_path):
    assert influence_study.energy(tmp_path) is None
    for package, microjoules in enumerate((1_500_000, 250_000)):
        folder = tmp_path / f"intel-rapl:{package}"
        folder.mkdir()
        (folder / "energy_uj").write_text(f"{microjoules}\n")
    assert influence_study.energy(tmp_path) == pytest.approx(1.75)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data: neither HFKD_DATA_DIR nor {DATA}")
@pytest.mark.parametrize("study", ["noise", "safe"])
def test_the_influence_study_reports_what_it_ranked(influence_study, tmp_path, study):
    arguments = argparse.Namespace(
        data_dir=DATA / "cifar10",
        teacher=str(DATA / "teachers" / "resnet20_cifar10.safetensors"),
        output_dir=tmp_path,
        label_noise=0.25,
        epochs=2,
        warm_up=0.5,
        refresh_epochs=1,
        max_train_samples=80,
        seeds=[0, 1],
        bf16=False,
    )
    getattr(influence_study, study)(arguments)
    report = json.loads(
        (tmp_path / ("safe.json" if study == "safe" else "noise-0.25-resnet20_cifar10.json")).read_text()
    )
    if study == "noise":
        assert (report["flipped"], report["samples"]) == (20, 80)
        (refresh,) = report["refreshes"]
        assert refresh["epoch"] == 1
        assert len(refresh["auroc"]) == 8
        assert refresh["auroc"]["teacher loss"] > 0.9  # it saw the clean labels of these images
    else:
        assert set(report["stability"]) == {"another seed", "perturbed", "outliers"}
        for name, pairs in (("another seed", 1), ("perturbed", 2), ("outliers", 2)):
            assert len(report["stability"][name]["spearman"]["values"]) == pairs
            assert all(-1 <= value < 0.9999 for value in report["stability"][name]["spearman"]["values"])
            assert (report["stability"][name]["spearman"]["interval"] is None) == (name == "another seed")
        assert set(report["runs"]) == {"KD", "KDAIF", "perturbed", "outliers"}
        assert min(report["runs"]["KDAIF"]["weight_by_class_gap"]["values"]) > 0
        seconds = report["runs"]["KD"]["seconds"]
        assert seconds["interval"][0] < seconds["mean"] < seconds["interval"][1]
        influence_study.safe(arguments)  # reads its runs again, and trains none
        assert json.loads((tmp_path / "safe.json").read_text()) == report


def test_the_influence_study_alters_a_tenth_of_the_images_as_it_says(influence_study):
    before = np.full((50, 8, 8, 3), 128, dtype=np.uint8)
    rows = influence_study.altered_rows(50)
    assert len(set(rows)) == 5
    for name, spread in (("perturbed", 25), ("outliers", 256 / 12**0.5)):
        train = argparse.Namespace(pixels=before)
        influence_study.ALTERATIONS[name](train)
        assert (before == 128).all()
        assert sorted(np.flatnonzero((train.pixels != 128).any((1, 2, 3)))) == sorted(rows)
        assert train.pixels[rows].std() == pytest.approx(spread, rel=0.1)
