"""scripts/studies/: every file is a study that compare_distillers takes, flags and methods and all."""

import re
import sys
from pathlib import Path

import pytest

from hfkd.distillers import KDAIF, Distiller, HiddenStates


ROOT = Path(__file__).resolve().parents[1]
STUDIES = ROOT / "scripts" / "studies"
FILES = sorted(STUDIES.rglob("*.yaml"))
README = (STUDIES / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def compare():
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "scripts"))
    import compare_distillers

    yield compare_distillers
    sys.path[:] = before
    for name in ("compare_distillers", "leaderboard", "run_image_kd", "run_glue_kd"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def studies(compare):
    return {path: compare.read_study(path) for path in FILES}


@pytest.fixture(autouse=True)
def folders(monkeypatch, tmp_path):
    """Whether data and models are there or not, no study is run here."""
    monkeypatch.setenv("HFKD_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("MINILM", str(tmp_path / "minilm"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_study_can_be_run_and_its_methods_fit_its_flags(compare, path, capsys, monkeypatch):
    study, checked, check = compare.read_study(path), [], compare.check
    monkeypatch.setattr(compare, "check", lambda run: checked.append((run, check(run))))
    assert compare.main([str(path), "--dry_run", "--seeds", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("# ") for line in lines) == len(study["methods"]) + len(study["teachers"])
    assert not Path(study["output"]).exists()
    methods = [(run.settings["flags"], method) for run, method in checked if run.folder.parent.name == "runs"]
    assert len(methods) == len(study["methods"])
    for flags, method in methods:
        if method is None:
            assert "teacher" not in flags
            continue
        parts = getattr(method, "parts", {"": method}).values()
        has_held_out = flags.get("held_out_fraction", 0) > 0 or "shifted-cifar10" in flags.get("data_dir", "")
        assert has_held_out or KDAIF not in map(type, parts)
        for part in parts:
            if isinstance(part, KDAIF):  # or it never weighs, and is KD
                epochs = flags.get("num_train_epochs", 3)
                assert "max_steps" in flags or (epochs - 1) / epochs >= part.warm_up
        if flags.get("task") == "stsb":
            assert "regression" in method.problem_types
        if method.needs_teacher and type(method).make_teacher is Distiller.make_teacher:
            assert "teacher" in flags
        if flags.get("teacher_cache"):
            assert not method.trains_teacher
            assert HiddenStates not in map(type, parts)  # as many as there are tokens


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_study_has_a_baseline_seeds_and_a_folder_of_its_own(compare, studies, path):
    study = studies[path]
    assert (study.get("baseline") or compare.default_baseline(study)) in study["methods"]
    assert len(study["seeds"]) >= (1 if path.stem.startswith("imagenet") else 3)
    others = {other["output"] for file, other in studies.items() if file != path}
    assert study["output"] not in others or path.stem in ("cifar10", "cifar10-all")
    assert not re.search(r": /", path.read_text(encoding="utf-8"))  # of one machine


def test_the_whole_study_of_cifar10_goes_on_from_the_first(compare, tmp_path):
    first, whole = (compare.read_study(STUDIES / f"{name}.yaml") for name in ("cifar10", "cifar10-all"))
    settings = {run.name: run.settings for run in compare.plan(whole, tmp_path)[1]}
    assert first["output"] == whole["output"]
    for run in compare.plan(first, tmp_path)[1]:
        assert settings[run.name] == run.settings


def test_every_study_is_in_the_readme():
    for path in FILES:
        assert f"`{path.relative_to(STUDIES)}`" in README or path.stem.startswith("cifar100-")
    assert len([path for path in FILES if path.stem.startswith("cifar100-")]) == 13
    for name in re.findall(r"`([\w/-]+\.yaml)\b", README):
        assert (STUDIES / name).is_file() or name == "published/cifar100-TEACHER-STUDENT.yaml"
