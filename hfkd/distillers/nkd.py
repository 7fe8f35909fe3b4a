"""Normalised knowledge distillation (Yang et al. 2023)."""

from __future__ import annotations

from torch import Tensor

from hfkd.distillers.base import Distiller, check_not_negative, check_temperature, reduce_batch
from hfkd.distillers.dkd import index_of_label, log_softmax_without_label, without_unlabelled


def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Cross-entropy on the label with the teacher's confidence, and on the other classes after normalising them.

    .. math:: -p^T_t \log p^S_t - \gamma \, T^2 \sum_{i \ne t} \hat p^T_i \log \hat p^S_i

    where p is untempered, and p̂ the softmax at temperature T over the classes other than the label. A cross-entropy:
    at equal logits its gradient vanishes in the second term only, and its value in neither.

    Args:
        student_logits: Unnormalised scores.
        teacher_logits: Unnormalised scores over the same classes in the same order.
        labels: Class indices; a sample with -100 contributes 0.
        gamma: Weight of the non-target part; the paper uses 1.5.
        temperature: Softening of the non-target part; the paper uses 1.
        reduction: ``"mean"`` over the batch or ``"none"``.

    Shapes:
        logits: (B, C), labels: (B,). Returns a scalar, or (B,) for ``"none"``, in nats.

    Raises:
        ValueError: If the temperature is not positive, or the reduction is unknown.

    Source: Yang et al. 2023, "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
    Normalized Loss and Customized Soft Labels", ICCV, arXiv 2303.13005; github.com/yzd-v/cls_KD.

    >>> import torch
    >>> z = torch.zeros(1, 2)
    >>> round(nkd_loss(z, z, torch.tensor([0])).item(), 4)  # log(2)/2: with two classes there is one other
    0.3466
    """
    check_temperature(temperature)
    index = index_of_label(labels)
    confidence = teacher_logits.softmax(-1).gather(-1, index)
    target = (confidence * student_logits.log_softmax(-1).gather(-1, index)).squeeze(-1)
    teacher = log_softmax_without_label(teacher_logits / temperature, labels).exp()
    others = (teacher * log_softmax_without_label(student_logits / temperature, labels)).sum(-1)
    return reduce_batch(without_unlabelled(-target - gamma * temperature**2 * others, labels), reduction)


class NKD(Distiller):
    """Normalised knowledge distillation: ``task + weight * nkd``.

    Without a label there is no target class: an unlabelled sample adds nothing, and the term is scaled up as the task
    term is, to keep its meaning on a data set with few labels.

    Args:
        gamma: Weight of the non-target part, not negative; see :func:`nkd_loss`.
        temperature: Softening of the non-target part.
        weight: Weight of the whole term, not negative; the paper uses 1.

    Raises:
        ValueError: If an argument is out of range.

    Source: arXiv 2303.13005; see :func:`nkd_loss`.
    """

    needs_hard_labels = True

    def __init__(self, gamma: float = 1.5, temperature: float = 1.0, weight: float = 1.0):
        super().__init__()
        check_not_negative(gamma=gamma, weight=weight)
        check_temperature(temperature)
        self.gamma, self.temperature, self.weight = gamma, temperature, weight

    def forward(self, student, teacher, batch):
        options = {"gamma": self.gamma, "temperature": self.temperature, "reduction": "none"}
        distillation = nkd_loss(student.logits, teacher.logits, batch["labels"], **options)
        return {
            "task": self.task_loss(student, batch),
            "nkd": self.weight * self.hard_label_loss.scale * distillation,
        }
