"""What student and teacher said about evaluation sets, kept for the model card and its pictures."""

from __future__ import annotations

import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, Subset

from hfkd.distillers.base import autocast_off
from hfkd.features import at_model, evaluating, is_outline, run_model
from hfkd.metrics import agreement, mean_entropy
from hfkd.teacher import Teachers


if TYPE_CHECKING:
    from hfkd.trainer import DistillationTrainer

_FORWARDS = 7  # of which latency is the median; two more come before


@dataclass
class Answers:
    """What a model said about an evaluation set.

    Attributes:
        dataset: The whole set.
        rows: Which of its rows the model was asked about; None is all.
        logits: (N, C) of these rows, in order.
        labels: (N,) class indices, -100 for none; numbers of a regression; or (N, C) of soft labels.
    """

    dataset: Dataset
    rows: list[int] | None
    logits: np.ndarray
    labels: np.ndarray

    @property
    def classes(self) -> np.ndarray:
        """The labels as class indices."""
        classes = self.labels if self.labels.ndim == 1 else self.labels.argmax(-1)
        return np.where(classes < 0, -100, classes).astype(np.int64)

    def at(self, other: Answers) -> Answers | None:
        """These answers where the other model was asked too; None if that cannot be told."""
        if other.dataset is not self.dataset or self.rows is not None or len(self.logits) != len(self.dataset):
            return None
        rows = slice(None) if other.rows is None else other.rows
        mine = Answers(self.dataset, other.rows, self.logits[rows], self.labels[rows])
        # Unlike where a sampler of one's own gave the rows in another order.
        return mine if np.array_equal(mine.labels, other.labels) else None


class Evaluations:
    """The latest answers to every set: the student's by the prefix of its metrics, the teacher's by the set."""

    def __init__(self):
        self.student: dict[str, Answers] = {}
        self._teacher: dict[int, Answers] = {}

    def keep_teacher(self, answers: Answers) -> None:
        """Remember what the teacher said; a part does not replace the whole."""
        known = self._teacher.get(id(answers.dataset))
        if known is None or known.rows is not None or answers.rows is None:
            self._teacher[id(answers.dataset)] = answers

    def teacher(self, student: Answers) -> Answers | None:
        """What the teacher said about the set that these answers are about, or about a part of it."""
        return self._teacher.get(id(student.dataset))

    def figures(self, prefix: str) -> dict[str, float]:
        """What no label is needed for: how unsure the student is, and how often it answers as its teacher.

        Args:
            prefix: Of the metrics, such as ``"test"``.

        Returns:
            ``test_entropy``, not for a regression, and ``test_agreement``, where both models were asked about the same
            samples; nothing where an answer is not finite.
        """
        figures, student = {}, self.student.get(prefix)
        if student is None or not np.isfinite(student.logits).all():
            return figures
        if student.logits.shape[1] > 1:
            figures[f"{prefix}_entropy"] = mean_entropy(student.logits)
        teacher = self.teacher(student)
        if teacher is not None and np.isfinite(teacher.logits).all() and (common := student.at(teacher)) is not None:
            figures[f"{prefix}_agreement"] = agreement(common.logits, teacher.logits)
        return figures


def last_scores(log_history: Sequence[Mapping]) -> dict[str, float]:
    """The scores that a log holds of evaluations, student's and teacher's: the last of each."""
    scores: dict[str, float] = {}
    for entry in log_history:
        scores.update(
            {name: value for name, value in entry.items() if name.startswith(("eval_", "test_", "teacher_"))}
        )
    skipped = ("_runtime", "_per_second", "_time")
    return {
        name: value
        for name, value in scores.items()
        if isinstance(value, (int, float)) and not name.endswith(skipped) and not name.startswith("teacher_cache_")
    }


def compared(trainer: DistillationTrainer) -> tuple[str, Answers | None, Answers | None, Answers | None]:
    """The prefix of the split that the card is about, and what was said about it.

    Returns:
        ``"test"`` where there is such a score, else ``"eval"``; the student's answers, the teacher's, and the
        student's on the rows that the teacher was asked about.
    """
    names = last_scores(trainer.state.log_history)
    split = "test" if any(name.startswith("test_") for name in names) else "eval"
    student = trainer.evaluations.student.get(split)
    if student is None or not np.isfinite(student.logits).all():
        return split, None, None, None
    teacher = trainer.evaluations.teacher(student)
    if teacher is None or not np.isfinite(teacher.logits).all():
        return split, student, None, None
    return split, student, teacher, student.at(teacher)


def bytes_of(model: nn.Module, *, only_trained: bool = False) -> int:
    """What a model's weights take on a disk: parameters, each once, and the buffers that are saved."""
    saved = model.state_dict().keys()
    tensors = [parameter for parameter in model.parameters() if parameter.requires_grad or not only_trained]
    if not only_trained:
        tensors += [buffer for name, buffer in model.named_buffers() if name in saved]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def machine_of(device: torch.device) -> str:
    """What to call the machine that a latency was measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    about = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", about.read_text(), re.MULTILINE) if about.is_file() else None
    name = named[1].strip() if named else platform.processor() or platform.machine()
    return f"{name}, {threads} thread{'s' * (threads > 1)}"


def latencies(trainer: DistillationTrainer) -> tuple[float | None, float | None]:
    """Milliseconds of a forward pass of student and teacher with one sample, each the median of seven.

    Neither is compiled. None where there is no such model here, its weights were never loaded, or there is no sample;
    under FSDP, where one process alone cannot run a model, too.
    """
    dataset = next(iter(trainer._eval_datasets().values()), trainer.train_dataset)
    if trainer.is_fsdp_enabled or isinstance(dataset, IterableDataset) or not dataset:
        return None, None
    # Not the context's take(), which wants labels; an evaluation set may have none.
    batch = trainer._prepare_inputs(next(iter(trainer.context.loader(Subset(dataset, [0]), 1))))
    batch = {name: column for name, column in batch.items() if name not in (*trainer.label_names, "labels")}
    device = trainer.args.device

    def milliseconds(run: Callable[[], object]) -> float:
        times = []
        for _ in range(_FORWARDS + 2):
            start = time.perf_counter()
            run()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            times.append(1000 * (time.perf_counter() - start))
        return statistics.median(times[2:])

    def ask(model: nn.Module, dtype: torch.dtype | None) -> None:
        inputs = at_model(model, batch)
        if dtype is not None:
            inputs = {name: v.to(dtype) if v.is_floating_point() else v for name, v in inputs.items()}
        with nullcontext() if dtype is None else autocast_off(device):
            run_model(model, inputs, prefix="teacher_")

    with trainer.compute_loss_context_manager():
        with evaluating(trainer.model):
            student = milliseconds(lambda: run_model(trainer.model, batch))
        teacher_model, teacher = trainer.teacher_model, None
        if teacher_model is not None and not is_outline(teacher_model):
            sources = trainer.teacher.members if isinstance(trainer.teacher, Teachers) else [trainer.teacher]
            members = [(teacher_model, None) if source is None else (source.model, source.dtype) for source in sources]
            with evaluating(teacher_model):
                teacher = milliseconds(lambda: [ask(*member) for member in members])
    return student, teacher
