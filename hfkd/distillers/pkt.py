"""Probabilistic knowledge transfer (Passalis and Tefas 2018)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from hfkd.distillers.layers import LayerDistiller, check_coupled
from hfkd.features import head_path


_EPSILON = 1e-7


def pkt_loss(student_features: Tensor, teacher_features: Tensor, *, reduction: str = "mean") -> Tensor:
    r"""Divergence of how likely the samples of the batch are neighbours.

    .. math:: \frac{1}{B^2} \sum_{ij} p^T_{j|i} \log \frac{p^T_{j|i} + \epsilon}{p^S_{j|i} + \epsilon}, \qquad
        p_{j|i} = \frac{k_{ij}}{\sum_l k_{il}}, \quad k_{ij} = \frac{1 + \cos(f_i, f_j)}{2}

    with ε = 1e-7.

    Args:
        student_features: The student's.
        teacher_features: The teacher's of the same samples, of any shape.
        reduction: ``"mean"`` only: the samples of a batch are compared with each other.

    Shapes:
        (B, …), with a shape of its own on each side. Returns a scalar, in nats over B.

    Raises:
        ValueError: If the reduction is not ``"mean"``.

    Source: Passalis and Tefas 2018, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV,
    arXiv 1803.10837, section 3, as in the authors' code (github.com/passalis/probabilistic_kt).

    >>> import torch
    >>> f = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    >>> round(pkt_loss(f, 5 * f.flip(1)).item(), 6)
    0.0
    """
    check_coupled(reduction)
    flat = (features.flatten(1) for features in (student_features, teacher_features))
    directions = (F.normalize(rows, dim=1, eps=_EPSILON) for rows in flat)
    kernels = ((1 + rows @ rows.T) / 2 for rows in directions)
    student, teacher = (kernel / kernel.sum(1, keepdim=True) for kernel in kernels)
    return (teacher * ((teacher + _EPSILON) / (student + _EPSILON)).log()).mean()


class PKT(LayerDistiller):
    """Probabilistic knowledge transfer: ``task + weight * pkt``, the sum of :func:`pkt_loss` over layers.

    Its term mixes the samples of a batch.

    Args:
        weight: Weight of the term, not negative; 30000 is the CRD benchmark's.
        student_layers: Module paths of the student; by default the input of its classifier.
        teacher_layers: The same of the teacher.

    Raises:
        ValueError: If the weight is negative, or the numbers of layers differ; at setup if a feature is neither a map
            nor a vector.

    Source: arXiv 1803.10837; see :func:`pkt_loss`.
    """

    batch_coupled = True
    dimensions = {2: "a vector (B, D)", 4: "a map (B, C, H, W)"}

    def __init__(
        self,
        weight: float = 30000.0,
        student_layers: Sequence[str] | None = None,
        teacher_layers: Sequence[str] | None = None,
    ):
        super().__init__(weight, student_layers, teacher_layers)

    def propose(self, model):
        return (f"{head_path(model)}:input",)

    def forward(self, student, teacher, batch):
        losses = (pkt_loss(*pair) for pair in self.pairs(student, teacher))
        return {"task": self.task_loss(student, batch), "pkt": self.weight * sum(losses)}
