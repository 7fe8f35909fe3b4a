"""Decoupled knowledge distillation (Zhao et al. 2022)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hfkd.distillers.base import (
    IGNORE_INDEX,
    Distiller,
    Ramp,
    check_not_negative,
    check_temperature,
    reduce_batch,
)


def index_of_label(labels: Tensor) -> Tensor:
    """The labels as a column of class indices, (B, 1); where there is none, class 0: mask what comes of it."""
    return labels.clamp(min=0)[:, None]


def without_unlabelled(per_sample: Tensor, labels: Tensor) -> Tensor:
    """A (B,) loss with 0 for the samples that have no label."""
    return per_sample.masked_fill(labels == IGNORE_INDEX, 0.0)


def label_and_rest(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of the label and of all other classes together, (B, 2)."""
    index = index_of_label(labels)
    rest = logits.scatter(-1, index, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, index), rest], -1).log_softmax(-1)


def log_softmax_without_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-softmax over the classes other than the label, (B, C); 0 at the label, so that products with it vanish."""
    index = index_of_label(labels)
    return logits.scatter(-1, index, -torch.inf).log_softmax(-1).scatter(-1, index, 0.0)


def _divergence(student: Tensor, teacher: Tensor, labels: Tensor, reduction: str) -> Tensor:
    per_sample = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return reduce_batch(without_unlabelled(per_sample, labels), reduction)


def tckd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 4.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Target-class part of the distillation loss: how likely is the label against all else.

    .. math:: \mathrm{TCKD} = \mathrm{KL}\!\left([p^T_t, 1 - p^T_t] \,\|\, [p^S_t, 1 - p^S_t]\right)

    at temperature T and **without** the factor T², so that KL = TCKD + (1 - p^T_t) NCKD.

    Args:
        student_logits: Unnormalised scores.
        teacher_logits: Unnormalised scores over the same classes in the same order.
        labels: Class indices; a sample with -100 contributes 0.
        temperature: Softening of both distributions; 4 on CIFAR-100, 1 on ImageNet.
        reduction: ``"mean"`` over the batch or ``"none"``.

    Shapes:
        logits: (B, C), labels: (B,). Returns a scalar, or (B,) for ``"none"``, in nats.

    Raises:
        ValueError: If the temperature is not positive, or the reduction is unknown.

    Source: Zhao et al. 2022, "Decoupled Knowledge Distillation", CVPR, arXiv 2203.08679.

    >>> import torch
    >>> z = torch.tensor([[2.0, 0.0, 1.0]])
    >>> tckd_loss(z, z, torch.tensor([0])).item()
    0.0
    """
    check_temperature(temperature)
    student = label_and_rest(student_logits / temperature, labels)
    return _divergence(student, label_and_rest(teacher_logits / temperature, labels), labels, reduction)


def nckd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 4.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Non-target part of the distillation loss: how the classes other than the label compare.

    .. math:: \mathrm{NCKD} = \mathrm{KL}\!\left(\hat p^T \,\|\, \hat p^S\right), \qquad
        \hat p_i = \frac{e^{z_i/T}}{\sum_{j \ne t} e^{z_j/T}}, \quad i \ne t

    at temperature T and **without** the factor T². It does not see the label's own logits.

    Args:
        student_logits: Unnormalised scores.
        teacher_logits: Unnormalised scores over the same classes in the same order.
        labels: Class indices; a sample with -100 contributes 0.
        temperature: Softening of both distributions; 4 on CIFAR-100, 1 on ImageNet.
        reduction: ``"mean"`` over the batch or ``"none"``.

    Shapes:
        logits: (B, C), labels: (B,). Returns a scalar, or (B,) for ``"none"``, in nats.

    Raises:
        ValueError: If the temperature is not positive, or the reduction is unknown.

    Source: Zhao et al. 2022, arXiv 2203.08679.

    >>> import torch
    >>> z = torch.tensor([[2.0, 0.0, 1.0]])
    >>> nckd_loss(z, z - torch.tensor([5.0, 0.0, 0.0]), torch.tensor([0])).item()
    0.0
    """
    check_temperature(temperature)
    student = log_softmax_without_label(student_logits / temperature, labels)
    return _divergence(student, log_softmax_without_label(teacher_logits / temperature, labels), labels, reduction)


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    reduction: str = "mean",
) -> Tensor:
    r"""The two parts of the distillation loss, each with a weight of its own.

    .. math:: T^2 \left(\alpha \, \mathrm{TCKD} + \beta \, \mathrm{NCKD}\right)

    With α = 1 and β = 1 - p^T_t, sample by sample, it is :func:`~hfkd.functional.kd_loss`, which therefore hardly
    teaches the other classes where the teacher is sure.

    Args:
        student_logits: Unnormalised scores.
        teacher_logits: Unnormalised scores over the same classes in the same order.
        labels: Class indices; a sample with -100 contributes 0.
        alpha: Weight of the target-class part; the paper uses 1.
        beta: Weight of the non-target part; the paper uses 2 (ResNet-56 → 20, ResNet-110 → 32), 6 or 8 on CIFAR-100.
        temperature: Softening of both distributions; 4 on CIFAR-100, 1 on ImageNet.
        reduction: ``"mean"`` over the batch or ``"none"``.

    Shapes:
        logits: (B, C), labels: (B,). Returns a scalar, or (B,) for ``"none"``, in nats.

    Raises:
        ValueError: If the temperature is not positive, or the reduction is unknown.

    Source: Zhao et al. 2022, arXiv 2203.08679; github.com/megvii-research/mdistiller.

    >>> import torch
    >>> z = torch.tensor([[2.0, 0.0, 1.0]])
    >>> dkd_loss(z, z, torch.tensor([0])).item()
    0.0
    """
    options = {"temperature": temperature, "reduction": reduction}
    tckd = tckd_loss(student_logits, teacher_logits, labels, **options)
    nckd = nckd_loss(student_logits, teacher_logits, labels, **options)
    return temperature**2 * (alpha * tckd + beta * nckd)


class DKD(Distiller):
    """Decoupled knowledge distillation: ``task + min(progress / warm_up, 1) * dkd``.

    Without a label there is no target class: an unlabelled sample adds nothing, and the term is scaled up as the task
    term is, to keep its meaning on a data set with few labels.

    Args:
        alpha: Weight of the target-class part, not negative; see :func:`dkd_loss`.
        beta: Weight of the non-target part, not negative; the paper uses 2 for ResNet-56 → ResNet-20.
        temperature: Softening of both distributions.
        warm_up: Share of training during which the term's weight rises from 0; the paper's 20 of 240 epochs.

    Raises:
        ValueError: If an argument is out of range.

    Source: arXiv 2203.08679; see :func:`dkd_loss`.
    """

    needs_hard_labels = True

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, warm_up: float = 1 / 12):
        super().__init__()
        check_not_negative(alpha=alpha, beta=beta)
        check_temperature(temperature)
        self.alpha, self.beta, self.temperature, self.warm_up = alpha, beta, temperature, warm_up
        self.ramp = Ramp(warm_up)

    def forward(self, student, teacher, batch):
        weights = {"alpha": self.alpha, "beta": self.beta, "temperature": self.temperature}
        distillation = dkd_loss(student.logits, teacher.logits, batch["labels"], **weights, reduction="none")
        return {
            "task": self.task_loss(student, batch),
            "dkd": self.ramp(self.hard_label_loss.scale * distillation),
        }

    def on_epoch_begin(self, context):
        self.ramp.update(context.progress)

    def on_step_end(self, context):
        self.ramp.update(context.progress)
