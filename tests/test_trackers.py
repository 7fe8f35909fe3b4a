"""What TensorBoard and trackio are told: the same scalars, and the pictures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from helpers import make_trainer, rows, tiny


TESTS = Path(__file__).parent
TERMS = {"train/task", "train/kd", "train/alpha", "train/loss", "eval/accuracy", "eval/loss", "test/accuracy"}
FIGURES = {"figures/training_curves", "figures/reliability", "figures/confusion_difference"}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """The folder of a run under both, in a process of its own: trackio reads TRACKIO_DIR when it is imported."""
    folder = tmp_path_factory.mktemp("tracked")
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    environment = {**os.environ, "PYTHONPATH": paths, "TRACKIO_DIR": str(folder / "trackio"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, TESTS / "tracked_run.py"]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_tensorboard_has_scalars_and_pictures(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars, images = {}, {}
    for file in sorted((tracked / "run" / "runs").rglob("events*")):
        events = EventAccumulator(str(file)).Reload()
        scalars |= {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        images |= {tag: [(e.step, e.width) for e in events.Images(tag)] for tag in events.Tags()["images"]}
    assert set(scalars) >= TERMS
    assert set(images) == FIGURES
    logged = json.loads((tracked / "log.json").read_text())
    for name in ("task", "kd", "alpha"):
        expected = [(entry["step"], entry[name]) for entry in logged if name in entry]
        assert len(expected) == 3
        assert scalars[f"train/{name}"] == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]
    for name, shown in images.items():
        with PIL.Image.open(tracked / "run" / f"{name}.png") as picture:
            assert shown[-1] == (3, picture.width)


def test_trackio_has_scalars_and_pictures(tracked):
    found = json.loads((tracked / "trackio.json").read_text())
    assert {name for entry in found for name in entry} >= {*TERMS, *FIGURES}
    logged = json.loads((tracked / "log.json").read_text())
    for name in ("task", "kd", "alpha"):
        told = [entry[f"train/{name}"] for entry in found if f"train/{name}" in entry]
        assert told == [pytest.approx(entry[name]) for entry in logged if name in entry]
    for name in FIGURES:
        pictures = [entry[name] for entry in found if name in entry]
        assert {picture["_type"] for picture in pictures} == {"trackio.image"}
        kept = tracked / "trackio" / "media" / pictures[-1]["file_path"]
        with PIL.Image.open(kept) as copy, PIL.Image.open(tracked / "run" / f"{name}.png") as picture:
            np.testing.assert_array_equal(np.asarray(copy), np.asarray(picture))


def test_pictures_are_drawn_at_the_end_of_training_only_where_they_are_shown(tmp_path):
    trainer = make_trainer(tmp_path, tiny("bert"), None, None, rows("bert"), max_steps=1)
    trainer.train()
    assert not (tmp_path / "figures").exists()
