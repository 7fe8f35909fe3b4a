"""Attention of transformers, head by head (TinyBERT, MiniLM)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfkd.distillers.base import reduce_batch
from hfkd.distillers.hidden_states import masked_mean, uniform_layers
from hfkd.distillers.layers import LayerDistiller
from hfkd.features import base_model, find_module, stage_paths


LOSSES = ("mse", "kl")
# What transformers calls the projections of queries, keys and values.
_PROJECTIONS = (("query", "q_lin", "q_proj"), ("key", "k_lin", "k_proj"), ("value", "v_lin", "v_proj"))
_REMEDY = "AttentionMaps() is for models such as BERT, DistilBERT, RoBERTa and ViT; take HiddenStates() for others"
# What it calls positions that enter the scores behind those projections.
_POSITIONS = re.compile(r"relative|rotary|rope|distance_embedding")


def _check_heads(student_scores: Tensor, teacher_scores: Tensor) -> None:
    if student_scores.shape != teacher_scores.shape:
        raise ValueError(
            f"attention scores of shapes {tuple(student_scores.shape)} and {tuple(teacher_scores.shape)} cannot be "
            "compared: student and teacher must have as many heads and the same tokens"
        )


def attention_score_loss(
    student_scores: Tensor, teacher_scores: Tensor, *, mask: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    r"""Mean squared difference of attention scores before the softmax.

    .. math:: \frac{1}{H n^2} \sum_{h} \sum_{l, m} \left(s^S_{hlm} - s^T_{hlm}\right)^2, \qquad s = q k^\top / \sqrt{d}

    over the n tokens of a sample that are no padding. (TinyBERT's code sets the scores of padding to 0 and averages
    over all L².)

    Args:
        student_scores: The student's.
        teacher_scores: The teacher's for the same tokens and as many heads.
        mask: 0 marks padding; None counts all tokens.
        reduction: ``"mean"`` over the batch or ``"none"``.

    Shapes:
        Scores (B, H, L, L), mask (B, L). Returns a scalar, or (B,) for ``"none"``.

    Raises:
        ValueError: If the shapes differ, or the reduction is unknown.

    Source: Jiao et al. 2020, "TinyBERT", arXiv 1909.10351, equation 7.

    >>> import torch
    >>> attention_score_loss(torch.zeros(1, 2, 3, 3), torch.full((1, 2, 3, 3), 2.0)).item()
    4.0
    """
    _check_heads(student_scores, teacher_scores)
    per_pair = (student_scores - teacher_scores).square().mean(1)
    pairs = None if mask is None else (mask[:, :, None] * mask[:, None]).flatten(1)
    return reduce_batch(masked_mean(per_pair.flatten(1), pairs), reduction)


def attention_relation_loss(
    student_scores: Tensor, teacher_scores: Tensor, *, mask: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    r"""Divergence of attention distributions.

    .. math:: \frac{1}{H n} \sum_h \sum_l \mathrm{KL}\!\left(\operatorname{softmax}(s^T_{hl}) \,\|\,
        \operatorname{softmax}(s^S_{hl})\right)

    over the n tokens l of a sample that are no padding, each over those tokens. MiniLM takes it of queries and keys,
    :math:`s = q k^\top / \sqrt{d}`, and of values among each other, :math:`s = v v^\top / \sqrt{d}`.

    Args:
        student_scores: The student's, before the softmax.
        teacher_scores: The teacher's for the same tokens and as many heads.
        mask: 0 marks padding; None counts all tokens.
        reduction: ``"mean"`` over the batch or ``"none"``.

    Shapes:
        Scores (B, H, L, L), mask (B, L). Returns a scalar, or (B,) for ``"none"``, in nats.

    Raises:
        ValueError: If the shapes differ, or the reduction is unknown.

    Source: Wang et al. 2020, "MiniLM", NeurIPS, arXiv 2002.10957, sections 3.1 and 3.2.

    >>> import torch
    >>> s = torch.eye(3)[None, None]
    >>> attention_relation_loss(s, s + 5).item()
    0.0
    """
    _check_heads(student_scores, teacher_scores)
    if mask is not None:
        padding = mask[:, None, None] == 0
        lowest = torch.finfo(student_scores.dtype).min
        student_scores, teacher_scores = (s.masked_fill(padding, lowest) for s in (student_scores, teacher_scores))
    student, teacher = F.log_softmax(student_scores, dim=-1), F.log_softmax(teacher_scores, dim=-1)
    per_token = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1).mean(1)
    return reduce_batch(masked_mean(per_token, mask), reduction)


def _projections(model: nn.Module, layers: Sequence[str]) -> tuple[str, ...]:
    """Paths of the projections to queries, keys and values inside some layers, three a layer."""
    model = base_model(model)
    for name, _ in (*model.named_modules(), *model.named_parameters()):
        if _POSITIONS.search(name):
            raise ValueError(
                f"the attention scores of {type(model).__name__} are more than products of queries and keys ({name}): "
                f"{_REMEDY}"
            )
    if any(getattr(module, "is_causal", False) or getattr(module, "is_decoder", False) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} attends to what comes before alone: {_REMEDY}")
    paths = []
    for layer in layers:
        inside = [f"{layer}.{name}" for name, _ in find_module(model, layer).named_modules()]
        found = [path for kinds in _PROJECTIONS for path in inside if path.rpartition(".")[2] in kinds]
        if len(found) != 3:
            raise ValueError(
                f"{layer!r} of {type(model).__name__} has {len(found)} projections to queries, keys or values, not "
                f"one of each (query, q_lin or q_proj and so on): {_REMEDY}"
            )
        paths += found
    return tuple(paths)


def _scores(one: Tensor, other: Tensor, heads: int) -> Tensor:
    """Scaled products of all tokens, (B, H, L, L), from projections (B, L, H d)."""
    one, other = (states.unflatten(-1, (heads, -1)).transpose(1, 2) for states in (one, other))
    return one @ other.transpose(-1, -2) / one.shape[-1] ** 0.5


class AttentionMaps(LayerDistiller):
    """Matches the attention of transformers, head by head, whose number must be the same.

    ``"mse"`` is TinyBERT's, ``task + weight * attention``: squared differences of scores, summed over layers.
    ``"kl"`` is MiniLM's, ``task + weight * (attention + value_relation)``: divergences in the last layer, also of how
    values relate to each other. Widths may differ. Scores come from the outputs of the projections to queries, keys
    and values, so that models keep their fast attention. Models whose positions enter behind these (relative, rotary),
    and causal ones, are refused.

    Args:
        loss: ``"mse"`` (TinyBERT) or ``"kl"`` (MiniLM).
        weight: Weight of the terms, not negative; 1 in both papers.
        student_layers: Paths of the student's layers that each hold one attention; by default all for ``"mse"``, the
            last for ``"kl"``.
        teacher_layers: The same of the teacher; by default the layers as deep as the student's, layer ⌊mN/M⌋ of N for
            layer m of M.

    Raises:
        ValueError: If an argument is out of range, or the numbers of layers differ; at setup if a model shows no
            projections of its attention, or student and teacher differ in heads or tokens.

    Source: arXiv 1909.10351 and 2002.10957; see :func:`attention_score_loss` and :func:`attention_relation_loss`.
    """

    dimensions = {3: "projections (B, L, D)"}
    by_token = True

    def __init__(
        self,
        loss: str = "mse",
        weight: float = 1.0,
        student_layers: Sequence[str] | None = None,
        teacher_layers: Sequence[str] | None = None,
    ):
        super().__init__(weight, student_layers, teacher_layers)
        if loss not in LOSSES:
            raise ValueError(f'loss must be "mse" (TinyBERT) or "kl" (MiniLM), got {loss!r}')
        self.loss = loss

    def propose(self, model):
        return stage_paths(model) if self.loss == "mse" else stage_paths(model)[-1:]

    def choose_layers(self, student, teacher):
        own, other = super().choose_layers(student, teacher)
        if not any(self.named_layers):
            other = uniform_layers(own, other)
        return _projections(student, own), _projections(teacher, other)

    def setup(self, context):
        models = base_model(context.student), base_model(context.teacher_model)
        heads = [getattr(model.config, "num_attention_heads", None) for model in models]
        if None in heads:
            raise ValueError(
                f"{type(models[heads.index(None)]).__name__} tells no number of attention heads: {_REMEDY}"
            )
        if heads[0] != heads[1]:
            raise ValueError(
                f"AttentionMaps compares head by head, and the student has {heads[0]} and the teacher {heads[1]}: "
                f"give the student num_attention_heads={heads[1]}, or take HiddenStates()"
            )
        self.heads = heads[0]
        super().setup(context)

    def forward(self, student, teacher, batch):
        pairs, options = self.pairs(student, teacher), {"mask": batch.get("attention_mask"), "reduction": "none"}
        attention, value_relation = [], []
        for queries, keys, values in zip(pairs[::3], pairs[1::3], pairs[2::3], strict=True):
            scores = [_scores(query, key, self.heads) for query, key in zip(queries, keys, strict=True)]
            if self.loss == "mse":
                attention.append(attention_score_loss(*scores, **options))
            else:
                relations = [_scores(value, value, self.heads) for value in values]
                attention.append(attention_relation_loss(*scores, **options))
                value_relation.append(attention_relation_loss(*relations, **options))
        terms = {"task": self.task_loss(student, batch), "attention": self.weight * sum(attention)}
        return {**terms, "value_relation": self.weight * sum(value_relation)} if value_relation else terms
