"""Checkpoints that are whole: how one is told from what a killed run left, and which is the last."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
import warnings
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


FILES_NAME = "files.json"
UNFINISHED_NAME = "unfinished"


def check_writable(folder: str | Path, remedy: str) -> None:
    """Make a folder and try to write there, rather than find out hours later.

    Raises:
        OSError: If that fails, of the class that fits, with the remedy.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise type(error)(f"cannot write to {folder} ({error.strerror}): {remedy}") from error


def start_checkpoint(folder: Path) -> None:
    """Make an empty folder that says it is unfinished, and remove those that runs which died left beside it.

    transformers removes the folders that were changed longest ago, and a run that died while it did so has just
    changed the oldest. So each gets the time of its latest file.
    """
    for other in checkpoints_in(folder.parent):
        if (other / UNFINISHED_NAME).exists() and faults_of(other):
            shutil.rmtree(other)
            continue
        latest = max((path.stat().st_mtime_ns for path in other.rglob("*") if path.is_file()), default=0)
        with contextlib.suppress(OSError):  # some mounts keep no times, and transformers sees that
            os.utime(other, ns=(latest, latest))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / UNFINISHED_NAME).touch()


def list_files(folder: Path) -> None:
    """Write down which files a checkpoint has and how long they are. Only the state of the trainer comes later."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != UNFINISHED_NAME]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    (folder / FILES_NAME).write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")


def faults_of(folder: Path) -> list[str]:
    """Why a checkpoint is not whole; nothing where it is, or (of one by another trainer) where it may be."""
    if not folder.is_dir():
        return ["there is no such folder"]
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return [f"{TRAINER_STATE_NAME}, which is written last, is missing or cut short"]
    if not (folder / FILES_NAME).is_file():
        return []
    try:
        sizes = dict(json.loads((folder / FILES_NAME).read_text(encoding="utf-8")))
    except (TypeError, ValueError):
        return [f"{FILES_NAME} is damaged"]
    faults = []
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif path.stat().st_size < size:
            faults.append(f"{name} has {path.stat().st_size} of {size} bytes")
    return faults


def checkpoints_in(folder: Path) -> list[Path]:
    """All of a run, by their steps."""
    numbered = {}
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (found := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)) and path.is_dir():
            numbered[int(found[1])] = path
    return [numbered[step] for step in sorted(numbered)]


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The latest of a run that is whole."""
    return next((path for path in reversed(checkpoints_in(folder)) if not faults_of(path)), None)


def checkpoint_to_resume(asked: str | Path | bool, output_dir: str) -> str:
    """The checkpoint that a run goes on from.

    Args:
        asked: Its folder; True, or the word, is the last whole one of ``output_dir``: later ones are named in a
            warning and left.
        output_dir: The run's folder.

    Raises:
        ValueError: If the folder is no whole checkpoint, or there is none.
    """
    if str(asked).lower() != "true":
        folder = Path(asked)
        if faults := faults_of(folder):
            other = last_whole_checkpoint(folder.parent)
            remedy = "start a new run" if other is None else f"resume from {other}, which is whole"
            raise ValueError(f"{folder} is no whole checkpoint: {'; '.join(faults)}: {remedy}")
        return str(asked)
    last = last_whole_checkpoint(Path(output_dir))
    if last is None:
        raise ValueError(
            f"{output_dir} has no whole checkpoint to resume from: start a new run, without resume_from_checkpoint"
        )
    for folder in reversed(checkpoints_in(Path(output_dir))):
        if folder == last:
            break
        warnings.warn(
            f"{folder} is no whole checkpoint ({'; '.join(faults_of(folder))}): resuming from {last}",
            UserWarning,
            stacklevel=3,
        )
    return str(last)


def where_both_resume(
    asked: str | Path | bool, output_dir: str, teacher_folder: str
) -> tuple[str | Path | bool | None, bool, Path | None]:
    """Where a run that first trains its teacher, in a folder of its own, goes on.

    Args:
        asked: As for :func:`checkpoint_to_resume`.
        output_dir: The student's folder.
        teacher_folder: The teacher's.

    Returns:
        What the student resumes from (None: the run was stopped before it had a checkpoint), whether the teacher is
        finished, and what the teacher resumes from where it is not (None: it starts).
    """
    if str(asked).lower() == "true" and not checkpoints_in(Path(output_dir)):
        asked = None
    is_finished = bool(asked) or Path(teacher_folder, "config.json").is_file()
    return asked, is_finished, None if is_finished else last_whole_checkpoint(Path(teacher_folder))
