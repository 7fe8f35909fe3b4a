"""Relational knowledge distillation (Park et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from hfkd.distillers.base import check_not_negative
from hfkd.distillers.layers import LayerDistiller, check_coupled
from hfkd.features import head_path


def _distances_and_angles(features: Tensor) -> tuple[Tensor, Tensor]:
    """Distances of all pairs over their mean, (B, B), and cosines at corner i of all triples i, j, k, (B, B, B)."""
    features = features.flatten(1)
    differences = features - features[:, None]
    distances = differences.norm(dim=-1)
    distances = distances / (distances.sum() / (distances > 0).sum().clamp(min=1)).clamp(min=1e-12)
    directions = F.normalize(differences, dim=-1)
    return distances, directions @ directions.transpose(1, 2)


def rkd_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Difference of distances between samples, and of angles that three samples form.

    .. math:: \lambda_D \, \overline{\ell(\psi^S_{ij}, \psi^T_{ij})}
        + \lambda_A \, \overline{\ell(\phi^S_{ijk}, \phi^T_{ijk})}, \qquad
        \psi_{ij} = \frac{\|f_i - f_j\|}{\mu}, \quad \phi_{ijk} = \cos \angle(f_j - f_i, f_k - f_i)

    ℓ is the smooth L1 loss, μ the mean of the distances that are not 0, and the means go over all B² pairs and B³
    triples. It takes memory for B² D + B³ numbers a side.

    Args:
        student_features: The student's.
        teacher_features: The teacher's of the same samples, of any shape.
        distance_weight: λ_D; the paper uses 25 for classification.
        angle_weight: λ_A; 50 there.
        reduction: ``"mean"`` only: the samples of a batch are compared with each other.

    Shapes:
        (B, …), with a shape of its own on each side. Returns a scalar.

    Raises:
        ValueError: If the reduction is not ``"mean"``.

    Source: Park et al. 2019, "Relational Knowledge Distillation", CVPR, arXiv 1904.05068, section 3, with means
    for the sums as in the authors' code (github.com/lenscloth/RKD).

    >>> import torch
    >>> f = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    >>> round(rkd_loss(f, 5 * f.flip(1) + 1).item(), 6)
    0.0
    """
    check_coupled(reduction)
    (student_distances, student_angles), (teacher_distances, teacher_angles) = (
        _distances_and_angles(features) for features in (student_features, teacher_features)
    )
    distance = F.smooth_l1_loss(student_distances, teacher_distances)
    return distance_weight * distance + angle_weight * F.smooth_l1_loss(student_angles, teacher_angles)


class RKD(LayerDistiller):
    """Relational distillation: ``task + weight * rkd``, the sum of :func:`rkd_loss` over layers.

    Its term mixes the samples of a batch.

    Args:
        weight: Weight of the term, not negative; 1.
        distance_weight: Weight of distances within it, not negative; 25 for classification.
        angle_weight: Weight of angles, not negative; 50.
        student_layers: Module paths of the student; by default the input of its classifier.
        teacher_layers: The same of the teacher.

    Raises:
        ValueError: If a weight is negative, or the numbers of layers differ; at setup if a feature is neither a map
            nor a vector.

    Source: arXiv 1904.05068; see :func:`rkd_loss`.
    """

    batch_coupled = True
    dimensions = {2: "a vector (B, D)", 4: "a map (B, C, H, W)"}

    def __init__(
        self,
        weight: float = 1.0,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        student_layers: Sequence[str] | None = None,
        teacher_layers: Sequence[str] | None = None,
    ):
        super().__init__(weight, student_layers, teacher_layers)
        check_not_negative(distance_weight=distance_weight, angle_weight=angle_weight)
        self.distance_weight, self.angle_weight = distance_weight, angle_weight

    def propose(self, model):
        return (f"{head_path(model)}:input",)

    def forward(self, student, teacher, batch):
        options = {"distance_weight": self.distance_weight, "angle_weight": self.angle_weight}
        losses = (rkd_loss(*pair, **options) for pair in self.pairs(student, teacher))
        return {"task": self.task_loss(student, batch), "rkd": self.weight * sum(losses)}
