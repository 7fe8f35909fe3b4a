"""The arguments of a distillation run."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments


@dataclass
class DistillationTrainingArguments(TrainingArguments):
    """``transformers.TrainingArguments`` with what distillation adds; works with ``HfArgumentParser``.

    ``logging_nan_inf_filter`` is off here: it costs a device synchronisation a step and hides a diverging loss.
    Memory is pinned only where there is an accelerator to copy to, and then a step does not wait for the copy.

    ``teacher_cache=True`` keeps what the teacher says on disk (:class:`hfkd.cache.TeacherCache`), in ``HFKD_CACHE`` or
    ``~/.cache/hfkd``; a string is the folder to keep it in. An augmented :class:`~hfkd.data.ImageDataset`
    then shows 16 views of a sample unless it was made with another number of them. ``teacher_cache_top_k`` is for many
    classes; what it leaves out is said there.

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
        default=None, metadata={"help": "Learning rate of a teacher that learns too; each method states its default."}
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "Ask the teacher once and keep its answers: true, as is the flag alone, or the folder for them.",
            "nargs": "?",
            "const": "true",
        },
    )
    teacher_cache_dtype: str | None = field(
        default=None,
        metadata={
            "help": "In which answers are kept; by default logits of classes in float16, numbers in float32.",
            "choices": ["float16", "float32"],
        },
    )
    teacher_cache_top_k: int | None = field(
        default=None,
        metadata={
            "help": "Keep so many of a sample's logits, the largest, and the mass of the others; by default all."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave NaN and Inf out of the logged loss; synchronises at every step."}
    )

    def __post_init__(self):
        super().__post_init__()
        if str(self.resume_from_checkpoint).lower() in ("true", "false"):  # from a command line
            self.resume_from_checkpoint = str(self.resume_from_checkpoint).lower() == "true"
        self._check_numbers()
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        self.accelerator_config.non_blocking |= self.dataloader_pin_memory
        for name in ("distiller_learning_rate", "teacher_learning_rate"):
            rate = getattr(self, name)
            if rate is not None and not rate > 0:
                raise ValueError(f"{name} must be positive, got {rate}: leave it out for the method's default")
        if str(self.teacher_cache).lower() in ("true", "false"):  # the word, or Python's
            self.teacher_cache = True if str(self.teacher_cache).lower() == "true" else None
        if self.teacher_cache_dtype not in (None, "float16", "float32"):
            raise ValueError(f"teacher_cache_dtype must be float16 or float32, got {self.teacher_cache_dtype!r}")
        if self.teacher_cache_top_k is not None and self.teacher_cache_top_k < 1:
            raise ValueError(
                f"teacher_cache_top_k must be at least 1, got {self.teacher_cache_top_k}: leave it out to keep all "
                "logits"
            )
        if self.teacher_dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"teacher_dtype must be float32, bfloat16 or float16, got {self.teacher_dtype!r}")

    def _check_numbers(self) -> None:
        """Refuse numbers that would stop the run later, or that transformers takes for others."""
        batches = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        for name in batches:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"max_steps must be positive, got {self.max_steps}: -1 trains for num_train_epochs")
        if self.max_steps == -1 and not self.num_train_epochs > 0:
            raise ValueError(f"num_train_epochs must be positive, got {self.num_train_epochs}: or set max_steps")
        if not 0 <= self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must not be negative, got {self.learning_rate}: 5e-5 is usual for Adam")
        if not 0 <= self.label_smoothing_factor < 1:
            raise ValueError(
                f"label_smoothing_factor must lie in [0, 1), got {self.label_smoothing_factor}: 0 smooths nothing"
            )
        for name in ("seed", "data_seed"):
            if not 0 <= (getattr(self, name) or 0) < 2**32:
                raise ValueError(f"{name} must lie in [0, 2**32), got {getattr(self, name)}: 0 is as good as any")
