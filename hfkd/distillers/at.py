"""Attention transfer (Zagoruyko and Komodakis 2017)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from hfkd.distillers.base import reduce_batch
from hfkd.distillers.layers import LayerDistiller, to_common_size


def attention_transfer_loss(student_features: Tensor, teacher_features: Tensor, *, reduction: str = "mean") -> Tensor:
    r"""Difference of where two maps are active, whatever their channels.

    .. math:: \frac{1}{HW} \left\| \hat a^S - \hat a^T \right\|^2, \qquad
        a = \operatorname{vec}\Big(\frac1C \sum_c f_c^2\Big), \quad \hat a = a / \|a\|

    The larger map is averaged down to the size of the smaller one first.

    Args:
        student_features: The student's map.
        teacher_features: The teacher's map of the same images, with any number of channels.
        reduction: ``"mean"`` over the batch or ``"none"``.

    Shapes:
        (B, C, H, W), with C, H and W of its own on each side. Returns a scalar, or (B,) for ``"none"``.

    Raises:
        ValueError: If the reduction is unknown.

    Source: Zagoruyko and Komodakis 2017, "Paying More Attention to Attention", ICLR, arXiv 1612.03928, section 3.1
    with p = 2, squared and averaged as in the authors' code (github.com/szagoruyko/attention-transfer).

    >>> import torch
    >>> f = torch.arange(1.0, 17.0).view(1, 1, 4, 4)
    >>> round(attention_transfer_loss(-3 * f, f.repeat(1, 5, 1, 1)).item(), 6)
    0.0
    """
    maps = to_common_size(student_features, teacher_features)
    student, teacher = (F.normalize(feature.square().mean(1).flatten(1), dim=1) for feature in maps)
    return reduce_batch((student - teacher).square().mean(1), reduction)


class AT(LayerDistiller):
    """Attention transfer: ``task + weight * at``, the sum of :func:`attention_transfer_loss` over stages.

    Args:
        weight: Weight of the term, not negative; 1000 is the usual one on CIFAR.
        student_layers: Module paths of the student that give maps; by default the ends of its stages.
        teacher_layers: The same of the teacher.

    Raises:
        ValueError: If the weight is negative, or the numbers of layers differ; at setup if a feature is no map.

    Source: arXiv 1612.03928; see :func:`attention_transfer_loss`.
    """

    remedy = "AttentionMaps() is for transformers, or name layers that give maps"

    def __init__(
        self,
        weight: float = 1000.0,
        student_layers: Sequence[str] | None = None,
        teacher_layers: Sequence[str] | None = None,
    ):
        super().__init__(weight, student_layers, teacher_layers)

    def forward(self, student, teacher, batch):
        losses = (attention_transfer_loss(*pair, reduction="none") for pair in self.pairs(student, teacher))
        return {"task": self.task_loss(student, batch), "at": self.weight * sum(losses)}
