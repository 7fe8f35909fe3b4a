"""Hints from a middle layer (FitNets, Romero et al. 2015)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from hfkd.distillers.base import reduce_batch
from hfkd.distillers.layers import BatchOnlyNorm, LayerDistiller, to_common_size
from hfkd.features import stage_paths


def hint_loss(student_features: Tensor, teacher_features: Tensor, *, reduction: str = "mean") -> Tensor:
    r"""Mean squared difference of two features of one shape.

    .. math:: \frac{1}{n} \left\| f^S - f^T \right\|^2

    with n the number of entries of a sample's feature.

    Args:
        student_features: The student's, projected to the teacher's shape.
        teacher_features: The teacher's.
        reduction: ``"mean"`` over the batch or ``"none"``.

    Shapes:
        Both features (B, …), alike. Returns a scalar, or (B,) for ``"none"``.

    Raises:
        ValueError: If the shapes differ, or the reduction is unknown.

    Source: Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", ICLR, arXiv 1412.6550, equation 3, with the mean
    over entries of github.com/HobbitLong/RepDistiller, which the usual weight of 100 belongs to.

    >>> import torch
    >>> hint_loss(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 2.0)).item()
    4.0
    """
    if student_features.shape != teacher_features.shape:
        raise ValueError(
            f"features of shapes {tuple(student_features.shape)} and {tuple(teacher_features.shape)} have no "
            "difference: project the student's first"
        )
    return reduce_batch((student_features - teacher_features).square().flatten(1).mean(1), reduction)


class FitNet(LayerDistiller):
    """Hints: a projection of the student's feature is to equal the teacher's: ``task + weight * fitnet``.

    The projection is learned: for maps a 1x1 convolution with BatchNorm and ReLU as in the CRD benchmark, whose weight
    of 100 would make a bare convolution diverge at its learning rate; for vectors a linear layer. BatchNorm mixes the
    samples of a batch. The larger of two maps is averaged down to the size of the smaller. Of several layers the terms
    are summed. All in one stage of training, as is usual now, not the paper's two.

    Args:
        weight: Weight of the term, not negative; 100 is the CRD benchmark's.
        student_layers: Module paths of the student; by default its middle stage (of two the first).
        teacher_layers: The same of the teacher.

    Raises:
        ValueError: If the weight is negative, or the numbers of layers differ; at setup if a feature is neither a map
            nor a vector.

    Source: arXiv 1412.6550; see :func:`hint_loss`.
    """

    batch_coupled = True
    dimensions = {2: "a vector (B, D)", 4: "a map (B, C, H, W)"}
    remedy = "HiddenStates() compares the tokens of a transformer, or name other layers"

    def __init__(
        self,
        weight: float = 100.0,
        student_layers: Sequence[str] | None = None,
        teacher_layers: Sequence[str] | None = None,
    ):
        super().__init__(weight, student_layers, teacher_layers)

    def propose(self, model):
        stages = stage_paths(model)
        return (stages[(len(stages) - 1) // 2],)

    def allocate(self, pairs):
        self.projectors = nn.ModuleList()
        for student, teacher in pairs:
            if student.ndim != teacher.ndim:
                raise ValueError(
                    f"FitNet cannot match a student feature {tuple(student.shape)} to a teacher feature "
                    f"{tuple(teacher.shape)}: name two maps or two vectors"
                )
            channels = student.shape[1], teacher.shape[1]
            projector = nn.Linear(*channels)
            if student.ndim == 4:
                projector = nn.Sequential(nn.Conv2d(*channels, 1), BatchOnlyNorm(channels[1]), nn.ReLU())
            self.projectors.append(projector.to(student.dtype))

    def forward(self, student, teacher, batch):
        losses = []
        for projector, (own, hint) in zip(self.projectors, self.pairs(student, teacher), strict=True):
            if own.ndim == 4:
                own, hint = to_common_size(own, hint)
            losses.append(hint_loss(projector(own), hint, reduction="none"))
        return {"task": self.task_loss(student, batch), "fitnet": self.weight * sum(losses)}
