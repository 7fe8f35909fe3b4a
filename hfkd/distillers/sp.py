"""Similarity-preserving distillation (Tung and Mori 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from hfkd.distillers.layers import LayerDistiller, check_coupled
from hfkd.features import stage_paths


def sp_loss(student_features: Tensor, teacher_features: Tensor, *, reduction: str = "mean") -> Tensor:
    r"""Difference of which samples of the batch are alike.

    .. math:: \frac{1}{B^2} \left\| \hat G^S - \hat G^T \right\|_F^2, \qquad
        G = F F^\top, \quad \hat G_{i,:} = G_{i,:} / \|G_{i,:}\|

    with a row of F the flattened feature of a sample.

    Args:
        student_features: The student's.
        teacher_features: The teacher's of the same samples, of any shape.
        reduction: ``"mean"`` only: the samples of a batch are compared with each other.

    Shapes:
        (B, …), with a shape of its own on each side. Returns a scalar.

    Raises:
        ValueError: If the reduction is not ``"mean"``.

    Source: Tung and Mori 2019, "Similarity-Preserving Knowledge Distillation", ICCV, arXiv 1907.09682, section 3.

    >>> import torch
    >>> f = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    >>> round(sp_loss(f, 5 * f.flip(1)).item(), 6)
    0.0
    """
    check_coupled(reduction)
    flat = student_features.flatten(1), teacher_features.flatten(1)
    student, teacher = (F.normalize(rows @ rows.T, dim=1) for rows in flat)
    return (student - teacher).square().mean()


class SP(LayerDistiller):
    """Similarity-preserving distillation: ``task + weight * sp``, the sum of :func:`sp_loss` over layers.

    Its term mixes the samples of a batch.

    Args:
        weight: Weight of the term, not negative; 3000 is the paper's and the CRD benchmark's.
        student_layers: Module paths of the student; by default the end of its last stage.
        teacher_layers: The same of the teacher.

    Raises:
        ValueError: If the weight is negative, or the numbers of layers differ; at setup if a feature is neither a map
            nor a vector.

    Source: arXiv 1907.09682; see :func:`sp_loss`.
    """

    batch_coupled = True
    dimensions = {2: "a vector (B, D)", 4: "a map (B, C, H, W)"}
    remedy = 'name a layer without tokens, such as a classifier\'s input (student_layers=("classifier:input",))'

    def __init__(
        self,
        weight: float = 3000.0,
        student_layers: Sequence[str] | None = None,
        teacher_layers: Sequence[str] | None = None,
    ):
        super().__init__(weight, student_layers, teacher_layers)

    def propose(self, model):
        return stage_paths(model)[-1:]

    def forward(self, student, teacher, batch):
        losses = (sp_loss(*pair) for pair in self.pairs(student, teacher))
        return {"task": self.task_loss(student, batch), "sp": self.weight * sum(losses)}
