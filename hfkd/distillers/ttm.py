"""Transformed teacher matching, plain (TTM) and sample-weighted (WTTM)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hfkd.distillers.base import Distiller, reduce_batch


def _check_gamma(gamma: float) -> None:
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma must lie in (0, 1], got {gamma}: it is 1/temperature, and 1 leaves the teacher as is")


def ttm_loss(student_logits: Tensor, teacher_logits: Tensor, *, gamma: float, reduction: str = "mean") -> Tensor:
    r"""Divergence of the student from the power-transformed teacher.

    .. math:: \mathrm{KL}\!\left(p^T_\gamma \,\|\, p^S\right), \qquad p^T_\gamma \propto (p^T)^\gamma

    The power transform is a temperature T = 1/γ on the teacher alone. No T² and no temperature on the student: the
    loss is :func:`~hfkd.functional.kd_loss` plus a Rényi entropy term, and it does not vanish at equal logits.

    Args:
        student_logits: Unnormalised scores.
        teacher_logits: Unnormalised scores over the same classes in the same order.
        gamma: Exponent in (0, 1].
        reduction: ``"mean"`` over the batch or ``"none"``.

    Shapes:
        ``student_logits`` and ``teacher_logits``: (B, C). Returns a scalar, or (B,) for ``"none"``, in nats.

    Raises:
        ValueError: If gamma is outside (0, 1], or the reduction is unknown.

    Source: Zheng and Yang 2024, "Knowledge Distillation Based on Transformed Teacher Matching", ICLR,
    arXiv 2402.11148, equation 15.

    >>> import torch
    >>> z = torch.tensor([[2.0, 0.0]])
    >>> ttm_loss(z, z, gamma=1.0).item()
    0.0
    """
    _check_gamma(gamma)
    student = F.log_softmax(student_logits, dim=-1)
    teacher = F.log_softmax(gamma * teacher_logits, dim=-1)
    return reduce_batch(F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1), reduction)


def wttm_loss(student_logits: Tensor, teacher_logits: Tensor, *, gamma: float, reduction: str = "mean") -> Tensor:
    r"""Transformed teacher matching, each sample weighted by the smoothness of the teacher's answer.

    .. math:: U \cdot \mathrm{KL}\!\left(p^T_\gamma \,\|\, p^S\right), \qquad U = \sum_j (p^T_j)^\gamma

    U is the power sum of the untempered teacher, between 1 (one-hot) and C^(1-γ) (uniform). It carries no gradient.

    Args:
        student_logits: Unnormalised scores.
        teacher_logits: Unnormalised scores over the same classes in the same order.
        gamma: Exponent in (0, 1].
        reduction: ``"mean"`` over the batch or ``"none"``.

    Shapes:
        ``student_logits`` and ``teacher_logits``: (B, C). Returns a scalar, or (B,) for ``"none"``, in nats.

    Raises:
        ValueError: If gamma is outside (0, 1], or the reduction is unknown.

    Source: Zheng and Yang 2024, arXiv 2402.11148, section 4 and equation 18.

    >>> import torch
    >>> z = torch.tensor([[2.0, 0.0]])
    >>> wttm_loss(z, z, gamma=1.0).item()
    0.0
    """
    per_sample = ttm_loss(student_logits, teacher_logits, gamma=gamma, reduction="none")
    power_sum = (gamma * F.log_softmax(teacher_logits, dim=-1)).exp().sum(-1).detach()
    return reduce_batch(power_sum * per_sample, reduction)


class TTM(Distiller):
    """Transformed teacher matching: ``task + beta * ttm``.

    Args:
        gamma: Exponent of the power transform, in (0, 1]. The default, with that of beta, is the paper's for
            ResNet-56 → ResNet-20 on CIFAR-100.
        beta: Weight of the distillation term, not negative.

    Raises:
        ValueError: If gamma or beta is out of range.

    Source: arXiv 2402.11148; see :func:`ttm_loss`.
    """

    loss = staticmethod(ttm_loss)
    term = "ttm"

    def __init__(self, gamma: float = 0.3, beta: float = 7.0):
        super().__init__()
        _check_gamma(gamma)
        if not 0 <= beta < float("inf"):
            raise ValueError(f"beta must not be negative, got {beta}: 0 is the labels alone")
        self.gamma, self.beta = gamma, beta

    def forward(self, student, teacher, batch):
        distillation = self.loss(student.logits, teacher.logits, gamma=self.gamma, reduction="none")
        return {"task": self.task_loss(student, batch), self.term: self.beta * distillation}


class WTTM(TTM):
    """Weighted transformed teacher matching: ``task + beta * wttm``.

    Args:
        gamma: Exponent of the power transform, in (0, 1]. The default, with that of beta, is the paper's for
            ResNet-56 → ResNet-20 on CIFAR-100.
        beta: Weight of the distillation term, not negative.

    Raises:
        ValueError: If gamma or beta is out of range.

    Source: arXiv 2402.11148; see :func:`wttm_loss`.
    """

    loss = staticmethod(wttm_loss)
    term = "wttm"

    def __init__(self, gamma: float = 0.3, beta: float = 1.5):
        super().__init__(gamma, beta)
