"""The arguments of a distillation run."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments


@dataclass
class DistillationTrainingArguments(TrainingArguments):
    """``transformers.TrainingArguments`` with what distillation adds; works with ``HfArgumentParser``.

    ``logging_nan_inf_filter`` is off here: it costs a device synchronisation a step and hides a diverging loss.
    Memory is pinned only where there is an accelerator to copy to.

    Raises:
        ValueError: If a value is out of range.
    """

    distiller_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the distiller's own parameters; each method states its default."},
    )
    teacher_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Precision of the teacher, apart from the student's autocast.",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    teacher_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of a teacher that learns too; the student's by default."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave NaN and Inf out of the logged loss; synchronises at every step."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        defaults = {"distiller_learning_rate": "the method's default", "teacher_learning_rate": "the student's"}
        for name, default in defaults.items():
            rate = getattr(self, name)
            if rate is not None and not rate > 0:
                raise ValueError(f"{name} must be positive, got {rate}: leave it out for {default}")
        if self.teacher_dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"teacher_dtype must be float32, bfloat16 or float16, got {self.teacher_dtype!r}")
