"""The contract of a distillation method: :class:`Distiller`, what it is given, and how its terms are reduced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn


if TYPE_CHECKING:
    from hfkd.context import DistillationContext

IGNORE_INDEX = -100


@dataclass
class ModelOutputs:
    """What one model said about a batch.

    Attributes:
        logits: (B, C) unnormalised scores: what methods match.
        task_logits: (B, C) scores that cross-entropy and evaluation use. The module sets them once, from the outermost
            distiller's :meth:`Distiller.task_logits`; wrappers leave them alone. Only a trained teacher has them.
        features: Captured module outputs by path, as named in ``student_layers`` and ``teacher_layers``.
    """

    logits: Tensor
    task_logits: Tensor | None = None
    features: dict[str, Tensor] = field(default_factory=dict)


def reduce_batch(per_sample: Tensor, reduction: str) -> Tensor:
    """Average a (B,) loss over the batch (``"mean"``) or leave it as it is (``"none"``).

    Raises:
        ValueError: For any other ``reduction``.
    """
    if reduction == "mean":
        return per_sample.mean()
    if reduction == "none":
        return per_sample
    raise ValueError(f'reduction must be "mean" (over the batch) or "none", got {reduction!r}')


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not positive and finite."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive, got {temperature}: use 1.0 for no softening")


def check_not_negative(**values: float) -> None:
    """Refuse a negative or infinite weight of a term, by its name."""
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must not be negative, got {value}: 0 leaves its term out")


class HardLabelLoss:
    """The loss on the labels, per sample: cross-entropy, or squared error for regression.

    Args:
        problem_type: ``"single_label"`` or ``"regression"``.
        label_smoothing: Share of probability spread evenly over all classes.
        scale: Factor on every sample's loss. On a data set with unlabelled samples the trainer sets N / N_labelled, so
            that the average over a batch keeps its meaning.

    Shapes:
        logits (B, C) and labels (B,) of class indices, or (B, C) of class probabilities; regression: logits (B, 1) and
        labels (B,). Returns (B,), in nats; a sample with label -100 contributes 0.
    """

    def __init__(self, problem_type: str = "single_label", label_smoothing: float = 0.0, scale: float = 1.0):
        self.problem_type, self.label_smoothing, self.scale = problem_type, label_smoothing, scale

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.problem_type == "regression":
            labels = labels.reshape(len(logits)).to(logits.dtype)
            per_sample = (logits.squeeze(-1) - labels).square().masked_fill(labels == IGNORE_INDEX, 0.0)
        else:
            target = labels.long() if labels.ndim == 1 else labels.to(logits.dtype)
            per_sample = F.cross_entropy(logits, target, reduction="none", label_smoothing=self.label_smoothing)
        return self.scale * per_sample


class Distiller(nn.Module):
    """A distillation method: named loss terms from student and teacher outputs.

    Subclasses write :meth:`forward` and set the class attributes that differ from the defaults. Everything learnable
    or remembered is a parameter or a buffer: it is trained, saved and resumed with the run, and never becomes part of
    the student. A learned scalar has shape (1,). A buffer must be written alike by every process
    (``context.gather`` first).

    Attributes:
        student_layers: Module paths of the student whose outputs ``student.features`` holds; ``"path:input"`` for the
            module's input.
        teacher_layers: The same for the teacher.
        batch_columns: Dataset columns that ``batch`` must hold besides the models' inputs, such as ``"index"``.
        needs_teacher: Whether the method compares with a teacher.
        trains_teacher: Whether the teacher learns too, from :meth:`teacher_terms`.
        needs_hard_labels: Whether labels must be class indices, so that Mixup and CutMix are refused.
        batch_coupled: Whether terms mix the samples of a batch.
        has_task_head: Whether :meth:`task_logits` adds trained layers to the student's logits. Then :meth:`folded`
            works them into the student, and :meth:`on_load` takes them out again.
        problem_types: What the method is defined for: ``"single_label"``, ``"regression"``.
        default_learning_rate: Learning rate of the method's own parameters where the arguments give none; None is the
            student's.
        teacher_learning_rate_ratio: Learning rate of a teacher that learns too, as a share of the student's, where the
            arguments give none.
        hard_label_loss: What :meth:`task_loss` computes; set by the trainer from the data and the arguments.
    """

    student_layers: tuple[str, ...] = ()
    teacher_layers: tuple[str, ...] = ()
    batch_columns: tuple[str, ...] = ()
    needs_teacher = True
    trains_teacher = False
    needs_hard_labels = False
    batch_coupled = False
    has_task_head = False
    problem_types: tuple[str, ...] = ("single_label",)
    default_learning_rate: float | None = None
    teacher_learning_rate_ratio = 1.0
    hard_label_loss = HardLabelLoss()
    _set_up_by: object = None  # a mark of the last trainer, which itself would be copied and pickled along

    def make_teacher(self, student: nn.Module) -> nn.Module | None:
        """Return a teacher (a PreTrainedModel) for a method that brings its own: a copy, an average, a peer."""
        return None

    def setup(self, context: DistillationContext) -> None:
        """Allocate parameters and buffers whose sizes depend on models or data. Called once, before the optimizer.

        Layers that depend on the models may be named here too.
        """

    def forward(
        self, student: ModelOutputs, teacher: ModelOutputs | None, batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the named, already weighted terms of the loss: (B,) wherever the method allows it, else a scalar.

        Runs in float32 with autocast off. The teacher's outputs carry no gradient.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(student, teacher, batch)")

    def teacher_terms(
        self, teacher: ModelOutputs, student: ModelOutputs, batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Terms that train the teacher where ``trains_teacher``; here it is the student that carries no gradient."""
        return {}

    def task_logits(self, student: ModelOutputs) -> Tensor:
        """The scores that cross-entropy and evaluation use; the student's logits unless the method adds a head."""
        return student.logits

    def task_loss(self, student: ModelOutputs, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss on the labels, (B,); see :class:`HardLabelLoss`."""
        return self.hard_label_loss(student.task_logits, batch["labels"])

    def logged_values(self) -> dict[str, Tensor]:
        """Figures of the latest forward that the log shows beside the terms, such as a learned weight.

        Tensors of any shape, without gradient and left on the device: the trainer averages them over their elements,
        the steps and the processes, as it does the terms.
        """
        return {}

    def on_train_begin(self, context: DistillationContext) -> None:
        """Called once before the first step, after a checkpoint is loaded: fill what it has not filled."""

    def on_epoch_begin(self, context: DistillationContext) -> None:
        """Called at each epoch's start, and again when a run resumes within one: remember the epoch in a buffer."""

    def on_step_end(self, context: DistillationContext) -> None:
        """Called after each optimizer step."""

    def on_train_end(self, context: DistillationContext) -> None:
        """Called once after the last step, the best model loaded: leave the student as it is to be used."""

    @contextmanager
    def folded(self, student: nn.Module) -> Iterator[None]:
        """While open, the student is what is to be saved; afterwards it is, to the bit, what it was before.

        The trainer opens it around every write of the student, and around the callbacks' ``on_epoch_end``,
        ``on_evaluate`` and ``on_save``, never twice at once. A method with a task head works it into the student,
        so that its plain logits are :meth:`task_logits`, and keeps in its buffers what it replaces: a checkpoint's
        distiller is written after its student.
        """
        yield

    def on_load(self, context: DistillationContext) -> None:
        """Called after a checkpoint is loaded, student and distiller: undo what :meth:`folded` did to the student."""


class Ramp(nn.Module):
    """A factor that rises in a straight line from 0 to 1 over the first part of training, then stays.

    The method's ``on_epoch_begin`` and ``on_step_end`` hand it ``context.progress``. It is a buffer, so that a run
    resumes where it stopped.

    Args:
        share: How long it rises, as a share of training; 0 is a factor of 1 throughout.

    Raises:
        ValueError: If the share is outside [0, 1].
    """

    def __init__(self, share: float):
        super().__init__()
        if not 0 <= share <= 1:
            raise ValueError(f"warm_up must lie in [0, 1], got {share}: it is a share of training, 0 is no warm-up")
        self.share = share
        self.register_buffer("factor", torch.tensor(0.0 if share else 1.0))

    def update(self, progress: float) -> None:
        """Move the factor to where it should be after this share of training."""
        self.factor.fill_(min(progress / self.share, 1.0) if self.share else 1.0)

    def forward(self, term: Tensor) -> Tensor:
        """Return the term times the factor."""
        return self.factor * term


class StudentAlone(Distiller):
    """No distillation: the student learns from the labels alone. The baseline of every comparison."""

    needs_teacher = False
    problem_types = ("single_label", "regression")

    def forward(self, student, teacher, batch):
        return {"task": self.task_loss(student, batch)}


class Wrapper(Distiller):
    """A distiller that changes one thing about another and leaves the rest to it.

    A subclass overrides what it is about, most often :meth:`~Distiller.forward`, which may replace ``logits`` on
    either side (``dataclasses.replace``) before handing over; ``task_logits`` stay as they are.

    Args:
        base: The method to change.
    """

    needs_teacher = False  # of its own: with a base that needs one, so does the whole

    def __init__(self, base: Distiller):
        super().__init__()
        if not isinstance(base, Distiller):
            raise TypeError(
                f"{type(self).__name__} wraps a Distiller, got {type(base).__name__}: pass KD() or another"
            )
        self.base = base
        self._join("student_layers", "teacher_layers", "batch_columns")
        for flag in ("needs_teacher", "trains_teacher", "needs_hard_labels", "batch_coupled", "has_task_head"):
            setattr(self, flag, getattr(type(self), flag) or getattr(base, flag))
        self.problem_types = tuple(kind for kind in base.problem_types if kind in type(self).problem_types)

    def _join(self, *flags: str) -> None:
        for flag in flags:
            setattr(self, flag, tuple(dict.fromkeys((*getattr(type(self), flag), *getattr(self.base, flag)))))

    def make_teacher(self, student):
        return self.base.make_teacher(student)

    def setup(self, context):
        self.base.setup(context)
        self._join("student_layers", "teacher_layers")

    def forward(self, student, teacher, batch):
        return self.base(student, teacher, batch)

    def teacher_terms(self, teacher, student, batch):
        return self.base.teacher_terms(teacher, student, batch)

    def task_logits(self, student):
        return self.base.task_logits(student)

    def logged_values(self):
        return self.base.logged_values()

    def on_train_begin(self, context):
        self.base.on_train_begin(context)

    def on_epoch_begin(self, context):
        self.base.on_epoch_begin(context)

    def on_step_end(self, context):
        self.base.on_step_end(context)

    def on_train_end(self, context):
        self.base.on_train_end(context)

    def folded(self, student):
        return self.base.folded(student)

    def on_load(self, context):
        self.base.on_load(context)


def weighted_mean(term: Tensor, name: str, sample_weight: Tensor | None) -> Tensor:
    """Reduce one term as ``(1/B) Σ w_i l_i``; never ``Σ w l / Σ w``, which breaks accumulation and cancels at B = 1.

    Raises:
        ValueError: If a scalar term meets sample weights, or its shape is neither () nor (B,).
    """
    if term.ndim == 0:
        if sample_weight is not None:
            raise ValueError(
                f"term {name!r} is one number for the whole batch, so it cannot be weighted by sample: "
                "drop the sample weights, or use a method whose terms are per sample"
            )
        return term
    if term.ndim != 1:
        raise ValueError(f"term {name!r} has shape {tuple(term.shape)}: return (B,), one loss a sample, or a scalar")
    return (term if sample_weight is None else term * sample_weight).mean()


def autocast_off(device: torch.device) -> torch.autocast:
    """A context in which losses keep float32, whatever the precision of the models."""
    return torch.autocast(device.type, enabled=False)
