"""Feature methods set up without a trainer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from helpers import TEXT, Rows, rows, tiny, tiny_teacher, tokenizer
from torch import nn

from hfkd.checks import dataset_labels
from hfkd.context import DistillationContext
from hfkd.data import DistillationCollator
from hfkd.distillers import Distiller, ModelOutputs
from hfkd.features import run_model
from hfkd.models import CifarConfig, CifarForImageClassification


def network(architecture: str, seed: int = 0) -> nn.Module:
    """A CIFAR network with 5 classes, in double precision and evaluation mode."""
    torch.manual_seed(seed)
    return CifarForImageClassification(CifarConfig(architecture=architecture, num_labels=5)).double().eval()


@dataclass
class Context:
    """What a distiller's setup and hooks see of a trainer."""

    student: nn.Module
    teacher_model: nn.Module
    train_dataset: Rows
    progress: float = 0.0
    is_sharded = False

    sample_index = DistillationContext.sample_index

    def sample(self, size: int = 2) -> dict[str, torch.Tensor]:
        return collated(self.train_dataset, range(size))

    def labels(self, dataset: Rows):
        return dataset_labels(dataset)

    def take(self, dataset: Rows, rows) -> dict[str, torch.Tensor]:
        return collated(dataset, rows)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def collated(dataset: Rows, chosen) -> dict[str, torch.Tensor]:
    return DistillationCollator(tokenizer(), tokenizer())([dataset[i] for i in chosen])


def context(student: nn.Module | str, teacher: nn.Module | str, dataset: Rows | None = None) -> Context:
    """Models as they are, or by the family of ``helpers``; random rows for the student."""
    family = student if isinstance(student, str) else student.config.model_type
    if dataset is None:
        dataset = rows(family if family in TEXT else "cifar")
    student = tiny(student).eval() if isinstance(student, str) else student
    teacher = tiny_teacher(teacher).eval() if isinstance(teacher, str) else teacher
    return Context(student, teacher, dataset)


def set_up(distiller: Distiller, student, teacher, dataset: Rows | None = None) -> Context:
    where = context(student, teacher, dataset)
    torch.manual_seed(0)
    distiller.setup(where)
    return where


def outputs(where: Context, distiller: Distiller, chosen=range(4)) -> tuple[ModelOutputs, ModelOutputs, dict]:
    """What the models say about some rows: the arguments of ``forward``."""
    dtype = next(where.student.parameters()).dtype
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in collated(where.train_dataset, chosen).items()}
    student = run_model(where.student, batch, layers=distiller.student_layers)
    student.task_logits = student.logits
    with torch.no_grad():
        teacher = run_model(where.teacher_model, batch, layers=distiller.teacher_layers)
    return student, teacher, batch


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
