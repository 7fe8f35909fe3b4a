"""Which column holds the labels, whether two models mean the same by class i, and whether a head was trained."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from torch import nn

from hfkd.sharding import whole


LABEL_COLUMNS = ("labels", "label", "label_ids")


def label_column(columns: Collection[str], label_names: Sequence[str] = ()) -> str | None:
    """The column that holds the labels, None where there is none.

    Args:
        columns: The names of all columns, of a data set or a batch.
        label_names: Of the training arguments: the first of them that is there holds the labels. Without one it is
            the column ``labels``, ``label`` or ``label_ids``.

    Raises:
        ValueError: If several of these three are there.
    """
    for name in label_names:
        if name in columns:
            return name
    found = [name for name in LABEL_COLUMNS if name in columns]
    if len(found) > 1:
        raise ValueError(
            f"the columns {' and '.join(found)} may both be the labels: drop or rename one, or say which it is in "
            "label_names=[...] (of the training arguments, and of a DistillationCollator of your own)"
        )
    return found[0] if found else None


def named_labels(config) -> list[str] | None:
    """The class names of a configuration, None where they are placeholders such as LABEL_0."""
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    return None if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names


def align_labels(
    own: Sequence[str] | None, other: Sequence[str] | None, *, whose: str, to: str = "the student"
) -> list[int] | None:
    """For each class of ``own`` its index in ``other``; None where the orders agree or one side has no names.

    Args:
        own: Names to follow.
        other: Names to reorder.
        whose: Whom ``other`` belongs to, for the message.
        to: Whom ``own`` belongs to, likewise.

    Raises:
        ValueError: If the names are not the same set.
    """
    if own is None or other is None:
        return None
    own, other = ([name.strip().lower() for name in names] for names in (own, other))
    if own == other:
        return None
    if sorted(own) != sorted(other) or len(set(own)) < len(own):
        only = sorted(set(other) - set(own))[:5], sorted(set(own) - set(other))[:5]
        raise ValueError(
            f"the classes of {whose} are not {to}'s: only there {only[0]}, only in {to} {only[1]}. Take models and "
            "data of the same classes, or set id2label on both to the same names (of data: a ClassLabel's)"
        )
    return [other.index(name) for name in own]


def head_looks_new(model: nn.Module) -> bool:
    """Whether a classifier's last layer is as an initialiser leaves it.

    Recognised are transformers' (zero bias, normal weights of the configured spread) and PyTorch's (both uniform up
    to 1/sqrt(inputs)). Training moves every bias off zero and weights past that bound, so a false alarm is unlikely;
    loading a teacher through ``hfkd.models.load_model(..., refuse_new_head=True)`` is exact.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear or linear[-1].bias is None or linear[-1].bias.is_meta:
        return False
    # Of float32 weights themselves, of quantised ones what they stand for.
    weight, bias = whole(linear[-1].weight.detach()).dequantize(), whole(linear[-1].bias.detach()).float()
    spread, count = weight.std().item(), weight.numel()
    configured = getattr(getattr(model, "config", None), "initializer_range", None)
    if configured is not None and (bias == 0).all():
        return abs(spread - configured) < 5 * configured / count**0.5
    bound = weight.shape[1] ** -0.5
    fills = 0.9 * bound < weight.abs().max() <= bound and bias.abs().max() <= bound
    return bool(fills) and abs(spread - bound / 3**0.5) < bound / count**0.5
