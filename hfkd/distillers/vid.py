"""Variational information distillation (Ahn et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfkd.distillers.base import reduce_batch
from hfkd.distillers.layers import LayerDistiller, to_common_size


_SMALLEST_VARIANCE = 1e-5
_FIRST_VARIANCE = 5.0


def vid_loss(mean: Tensor, variance: Tensor, teacher_features: Tensor, *, reduction: str = "mean") -> Tensor:
    r"""Negative log-likelihood of the teacher's map under Gaussians that the student predicts, up to a constant.

    .. math:: \frac{1}{CHW} \sum_{c,h,w} \left[\frac{(f^T_{chw} - \mu_{chw})^2}{2 \sigma_c^2}
        + \frac12 \log \sigma_c^2\right]

    Its negative bounds the mutual information of the two features from below, up to a constant.

    Args:
        mean: What the student predicts, μ.
        variance: The variance σ² of each of the teacher's channels, positive.
        teacher_features: The teacher's map.
        reduction: ``"mean"`` over the batch or ``"none"``.

    Shapes:
        ``mean`` and ``teacher_features``: (B, C, H, W), ``variance``: (C,). Returns a scalar, or (B,) for ``"none"``,
        in nats; it may be negative.

    Raises:
        ValueError: If the reduction is unknown.

    Source: Ahn et al. 2019, "Variational Information Distillation for Knowledge Transfer", CVPR, arXiv 1904.05835,
    as in the authors' code in github.com/HobbitLong/RepDistiller.

    >>> import torch
    >>> f = torch.ones(2, 3, 4, 4)
    >>> vid_loss(f, torch.ones(3), f).item()
    0.0
    """
    variance = variance[:, None, None]
    per_entry = (mean - teacher_features).square() / (2 * variance) + variance.log() / 2
    return reduce_batch(per_entry.flatten(1).mean(1), reduction)


class _Regressor(nn.Module):
    """Mean, from three 1x1 convolutions, and variance of the teacher's channels."""

    def __init__(self, student_channels: int, teacher_channels: int):
        super().__init__()
        self.mean = nn.Sequential(
            nn.Conv2d(student_channels, teacher_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
        )
        inverse_softplus = math.log(math.expm1(_FIRST_VARIANCE - _SMALLEST_VARIANCE))
        self.scale = nn.Parameter(torch.full((teacher_channels,), inverse_softplus))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(features), F.softplus(self.scale) + _SMALLEST_VARIANCE


class VID(LayerDistiller):
    """Variational information distillation: ``task + weight * vid``, the sum of :func:`vid_loss` over stages.

    A stage has three 1x1 convolutions, as wide as the teacher, and one variance a channel, 5 at first. The larger of
    two maps is averaged down to the size of the smaller.

    Args:
        weight: Weight of the term, not negative; 1 is the CRD benchmark's.
        student_layers: Module paths of the student that give maps; by default the ends of its stages.
        teacher_layers: The same of the teacher.

    Raises:
        ValueError: If the weight is negative, or the numbers of layers differ; at setup if a feature is no map.

    Source: arXiv 1904.05835; see :func:`vid_loss`.
    """

    def __init__(
        self,
        weight: float = 1.0,
        student_layers: Sequence[str] | None = None,
        teacher_layers: Sequence[str] | None = None,
    ):
        super().__init__(weight, student_layers, teacher_layers)

    def allocate(self, pairs):
        self.regressors = nn.ModuleList(
            _Regressor(student.shape[1], teacher.shape[1]).to(student.dtype) for student, teacher in pairs
        )

    def forward(self, student, teacher, batch):
        losses = []
        for regressor, pair in zip(self.regressors, self.pairs(student, teacher), strict=True):
            own, target = to_common_size(*pair)
            losses.append(vid_loss(*regressor(own), target, reduction="none"))
        return {"task": self.task_loss(student, batch), "vid": self.weight * sum(losses)}
