"""Hidden states of transformers, token by token (DistilBERT, TinyBERT)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from hfkd.distillers.base import reduce_batch
from hfkd.distillers.layers import LayerDistiller
from hfkd.features import base_model, stage_paths


LOSSES = ("mse", "cosine")


def masked_mean(per_token: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of (B, L) over a sample's own tokens, those with a mask other than 0; (B,)."""
    if mask is None:
        return per_token.mean(1)
    mask = mask.to(per_token.dtype)
    return (per_token * mask).sum(1) / mask.sum(1).clamp(min=1)


def hidden_state_loss(
    student_states: Tensor,
    teacher_states: Tensor,
    *,
    loss: str = "mse",
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Difference of hidden states, averaged over the tokens of a sample.

    .. math:: \frac{1}{D} \| h^S_l - h^T_l \|^2 \quad\text{or}\quad 1 - \cos(h^S_l, h^T_l)

    for a token l. The mean goes over a sample's own tokens, so that neither padding nor the rest of the batch counts;
    TinyBERT's code averages over padding too, DistilBERT's over all tokens of the batch.

    Args:
        student_states: The student's, projected to the teacher's width.
        teacher_states: The teacher's for the same tokens.
        loss: ``"mse"`` (TinyBERT) or ``"cosine"`` (DistilBERT).
        mask: 0 marks padding; None counts all tokens.
        reduction: ``"mean"`` over the batch or ``"none"``.

    Shapes:
        States (B, L, D), mask (B, L). Returns a scalar, or (B,) for ``"none"``.

    Raises:
        ValueError: If the loss or the reduction is unknown, or the shapes differ.

    Source: Jiao et al. 2020, "TinyBERT", arXiv 1909.10351, equation 8; Sanh et al. 2019, "DistilBERT",
    arXiv 1910.01108, section 2.

    >>> import torch
    >>> h = torch.ones(1, 2, 4)
    >>> hidden_state_loss(h, -h).item(), hidden_state_loss(h, -h, loss="cosine").item()
    (4.0, 2.0)
    """
    _check_loss(loss)
    if student_states.shape != teacher_states.shape:
        raise ValueError(
            f"hidden states of shapes {tuple(student_states.shape)} and {tuple(teacher_states.shape)} cannot be "
            "compared token by token: student and teacher must see the same tokens, and the student's be projected"
        )
    if loss == "cosine":
        per_token = 1 - F.cosine_similarity(student_states, teacher_states, dim=-1)
    else:
        per_token = (student_states - teacher_states).square().mean(-1)
    return reduce_batch(masked_mean(per_token, mask), reduction)


def _check_loss(loss: str) -> None:
    if loss not in LOSSES:
        raise ValueError(f'loss must be "mse" (TinyBERT) or "cosine" (DistilBERT), got {loss!r}')


def uniform_layers(student_layers: Sequence[str], teacher_layers: Sequence[str]) -> tuple[str, ...]:
    """For each layer of M the teacher's among N that is as deep: layer m of the student is given layer ⌊mN/M⌋."""
    few, many = len(student_layers), len(teacher_layers)
    if few > many:
        raise ValueError(
            f"the student has {few} layers and the teacher {many}, so there is no uniform map: name student_layers= "
            "and teacher_layers="
        )
    return tuple(teacher_layers[m * many // few - 1] for m in range(1, few + 1))


class HiddenStates(LayerDistiller):
    """Matches hidden states of transformers: ``task + weight * hidden``, summed over layers.

    DistilBERT is ``Combined({"kd": KD(alpha=…, temperature=2.0), "hidden": HiddenStates("cosine")}, task_from="kd")``
    with weights 5, 2 and 1 of KL, labels and cosine; TinyBERT adds :class:`AttentionMaps` to ``HiddenStates("mse")``.
    Where the student is narrower or wider, each layer gets a linear projection without bias, which learns with it.

    Args:
        loss: ``"mse"`` (TinyBERT) or ``"cosine"`` (DistilBERT).
        weight: Weight of the term, not negative; 1 in both papers.
        student_layers: Module paths of the student; by default for ``"mse"`` its embeddings and all its layers, for
            ``"cosine"`` the last layer.
        teacher_layers: The same of the teacher; by default the layers as deep as the student's, layer ⌊mN/M⌋ of N for
            layer m of M.

    Raises:
        ValueError: If an argument is out of range, or the numbers of layers differ; at setup if a feature is no
            sequence of tokens, or the teacher has other tokens.

    Source: arXiv 1909.10351 and 1910.01108; see :func:`hidden_state_loss`.
    """

    dimensions = {3: "hidden states (B, L, D)"}
    remedy = "name layers of a transformer, or take FitNet() for maps and vectors"
    by_token = True

    def __init__(
        self,
        loss: str = "mse",
        weight: float = 1.0,
        student_layers: Sequence[str] | None = None,
        teacher_layers: Sequence[str] | None = None,
    ):
        super().__init__(weight, student_layers, teacher_layers)
        _check_loss(loss)
        self.loss = loss

    def propose(self, model):
        if self.loss == "cosine":
            return stage_paths(model)[-1:]
        embeddings = f"{base_model(model).base_model_prefix}.embeddings"
        if embeddings not in dict(base_model(model).named_modules()):
            raise ValueError(f"{type(base_model(model)).__name__} has no {embeddings!r}: {self.remedy}")
        return (embeddings, *stage_paths(model))

    def choose_layers(self, student, teacher):
        own, other = super().choose_layers(student, teacher)
        if not any(self.named_layers) and self.loss == "mse":
            other = (other[0], *uniform_layers(own[1:], other[1:]))
        return own, other

    def allocate(self, pairs):
        self.projectors = nn.ModuleList()
        for student, teacher in pairs:
            widths = student.shape[-1], teacher.shape[-1]
            same = nn.Identity() if widths[0] == widths[1] else nn.Linear(*widths, bias=False).to(student.dtype)
            self.projectors.append(same)

    def forward(self, student, teacher, batch):
        mask = batch.get("attention_mask")
        losses = (
            hidden_state_loss(projector(own), other, loss=self.loss, mask=mask, reduction="none")
            for projector, (own, other) in zip(self.projectors, self.pairs(student, teacher), strict=True)
        )
        return {"task": self.task_loss(student, batch), "hidden": self.weight * sum(losses)}
