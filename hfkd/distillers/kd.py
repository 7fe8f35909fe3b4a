"""Knowledge distillation (Hinton et al. 2015)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hfkd.distillers.base import Distiller, check_temperature, reduce_batch


def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 4.0, reduction: str = "mean"
) -> Tensor:
    r"""Kullback-Leibler divergence between softened class distributions.

    .. math:: T^2 \, \mathrm{KL}\!\left(\mathrm{softmax}(z^T/T) \,\|\, \mathrm{softmax}(z^S/T)\right)

    The factor T² keeps the gradient's size independent of the temperature.

    Args:
        student_logits: Unnormalised scores.
        teacher_logits: Unnormalised scores over the same classes in the same order.
        temperature: Softening of both distributions; 4 is usual on CIFAR-100, 1 on ImageNet.
        reduction: ``"mean"`` over the batch or ``"none"``.

    Shapes:
        ``student_logits`` and ``teacher_logits``: (B, C). Returns a scalar, or (B,) for ``"none"``, in nats.

    Raises:
        ValueError: If the temperature is not positive, or the reduction is unknown.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2.

    >>> import torch
    >>> z = torch.tensor([[2.0, 0.0]])
    >>> kd_loss(z, z).item()
    0.0
    """
    check_temperature(temperature)
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    per_sample = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1) * temperature**2
    return reduce_batch(per_sample, reduction)


class KD(Distiller):
    """Knowledge distillation with a fixed balance: ``(1 - alpha) * task + alpha * kd``.

    For regression (one output) the distillation term is the squared difference of the two outputs.

    Args:
        alpha: Share of the distillation term, in [0, 1]; 0.9 is usual on CIFAR-100, 0.5 on ImageNet.
        temperature: See :func:`kd_loss`; without meaning for regression.

    Raises:
        ValueError: If alpha is outside [0, 1] or the temperature is not positive.

    Source: arXiv 1503.02531; see :func:`kd_loss`.
    """

    problem_types = ("single_label", "regression")

    def __init__(self, alpha: float = 0.9, temperature: float = 4.0):
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], got {alpha}: 0 is the labels alone, 1 the teacher alone")
        check_temperature(temperature)
        self.alpha, self.temperature = alpha, temperature

    def forward(self, student, teacher, batch):
        if student.logits.shape[-1] == 1:
            distillation = (student.logits - teacher.logits).square().squeeze(-1)
        else:
            distillation = kd_loss(student.logits, teacher.logits, temperature=self.temperature, reduction="none")
        return {"task": (1 - self.alpha) * self.task_loss(student, batch), "kd": self.alpha * distillation}
