"""Knowledge review: deep stages of the student learn beside shallow ones (ReviewKD, Chen et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfkd.distillers.base import Ramp, reduce_batch
from hfkd.distillers.layers import BatchOnlyNorm, LayerDistiller
from hfkd.features import base_model, head_path, stage_paths


def hierarchical_context_loss(
    student_features: Tensor, teacher_features: Tensor, *, reduction: str = "mean"
) -> Tensor:
    r"""Mean squared difference of two maps at several sizes.

    .. math:: \frac{\sum_{s} w_s \overline{(P_s f^S - P_s f^T)^2}}{\sum_s w_s}

    P_s averages a map down to s x s. The full map has weight 1; then follow those of the sizes 4, 2 and 1 that are
    smaller than it, with weights ½, ¼, ⅛ in the order in which they come.

    Args:
        student_features: The student's, fused and in the teacher's shape.
        teacher_features: The teacher's.
        reduction: ``"mean"`` over the batch or ``"none"``.

    Shapes:
        (B, C, H, W), alike. Returns a scalar, or (B,) for ``"none"``.

    Raises:
        ValueError: If the reduction is unknown.

    Source: Chen et al. 2021, "Distilling Knowledge via Knowledge Review", CVPR, arXiv 2104.09044, section 3.4, as in
    github.com/dvlab-research/ReviewKD.

    >>> import torch
    >>> hierarchical_context_loss(torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), 2.0)).item()
    4.0
    """
    difference = student_features - teacher_features
    loss, weight, total = difference.square().flatten(1).mean(1), 1.0, 1.0
    for size in (4, 2, 1):
        if size < difference.shape[2]:
            weight /= 2
            loss = loss + weight * F.adaptive_avg_pool2d(difference, size).square().flatten(1).mean(1)
            total += weight
    return reduce_batch(loss / total, reduction)


class _Fusion(nn.Module):
    """Attention-based fusion of a stage with what came from the deeper ones."""

    def __init__(self, student: Tensor, teacher: Tensor, width: int, *, deepest: bool):
        super().__init__()
        self.student_size, self.teacher_size = student.shape[2:], teacher.shape[2:]
        self.conv1 = nn.Sequential(nn.Conv2d(student.shape[1], width, 1, bias=False), BatchOnlyNorm(width))
        self.attention = None if deepest else nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid())
        channels = teacher.shape[1]
        self.conv2 = nn.Sequential(nn.Conv2d(width, channels, 3, padding=1, bias=False), BatchOnlyNorm(channels))
        for conv in (self.conv1[0], self.conv2[0]):
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(self, features: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what is compared with the teacher, and what the next shallower stage fuses."""
        fused = self.conv1(features)
        if self.attention is not None:
            deeper = F.interpolate(deeper, self.student_size)
            own_share, deeper_share = self.attention(torch.cat([fused, deeper], 1)).split(1, dim=1)
            fused = fused * own_share + deeper * deeper_share
        fused = F.interpolate(fused, self.teacher_size)
        return self.conv2(fused), fused


def _before_relu(model: nn.Module, path: str) -> str:
    """The input of the ReLU that a stage ends in, or the stage itself."""
    last, module = path, base_model(model).get_submodule(path)
    while children := list(module.named_children()):
        name, module = children[-1]
        last = f"{last}.{name}"
    return f"{last}:input" if isinstance(module, nn.ReLU) and not module.inplace else path


def _as_map(features: Tensor) -> Tensor:
    return features[:, :, None, None] if features.ndim == 2 else features


class ReviewKD(LayerDistiller):
    """Knowledge review: ``task + min(progress / warm_up, 1) * weight * reviewkd``.

    From the deepest stage to the shallowest, each is fused with what the deeper ones gave, by learned attention, and
    compared with the teacher's stage by :func:`hierarchical_context_loss`; the term is the sum over stages. A vector,
    such as the input of the classifier, is a map of 1 x 1. The fusions contain BatchNorm, so the term mixes the
    samples of a batch.

    Args:
        weight: Weight of the term, not negative; the paper uses 1 to 8 by pair on CIFAR-100.
        warm_up: Share of training during which the term's weight rises from 0; the paper's 20 of 240 epochs.
        student_layers: Module paths of the student, shallow to deep; by default the ends of its stages, before their
            last ReLU, and the input of the classifier.
        teacher_layers: The same of the teacher.

    Raises:
        ValueError: If an argument is out of range, or the numbers of layers differ; at setup if a feature is neither a
            map nor a vector.

    Source: arXiv 2104.09044; see :func:`hierarchical_context_loss`.
    """

    batch_coupled = True
    dimensions = {2: "a vector (B, D)", 4: "a map (B, C, H, W)"}
    remedy = "HiddenStates() compares the tokens of a transformer, or name other layers"

    def __init__(
        self,
        weight: float = 1.0,
        warm_up: float = 20 / 240,
        student_layers: Sequence[str] | None = None,
        teacher_layers: Sequence[str] | None = None,
    ):
        super().__init__(weight, student_layers, teacher_layers)
        self.ramp = Ramp(warm_up)

    def propose(self, model):
        return (*(_before_relu(model, path) for path in stage_paths(model)), f"{head_path(model)}:input")

    def allocate(self, pairs):
        width = min(512, pairs[-1][0].shape[1])
        self.fusions = nn.ModuleList(
            _Fusion(_as_map(student), _as_map(teacher), width, deepest=i == len(pairs) - 1).to(student.dtype)
            for i, (student, teacher) in enumerate(pairs)
        )

    def forward(self, student, teacher, batch):
        losses, deeper = [], None
        for fusion, (own, other) in zip(reversed(self.fusions), reversed(self.pairs(student, teacher)), strict=True):
            review, deeper = fusion(_as_map(own), deeper)
            losses.append(hierarchical_context_loss(review, _as_map(other), reduction="none"))
        return {"task": self.task_loss(student, batch), "reviewkd": self.ramp(self.weight * sum(losses))}

    def on_epoch_begin(self, context):
        self.ramp.update(context.progress)

    def on_step_end(self, context):
        self.ramp.update(context.progress)
