"""Where teacher outputs come from, and whether teacher and student mean the same by class i."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from hfkd.distillers.base import ModelOutputs, autocast_off
from hfkd.features import run_model


class Teacher:
    """A frozen model that is asked at every step.

    It sees the columns ``teacher_…`` of a batch where there are any, in the precision of the surrounding autocast, or
    in its own ``dtype``.

    Args:
        model: A classifier; put into evaluation mode, its parameters frozen.
        layers: Module paths to capture.
        label_order: For each of the student's classes the teacher's index of it; None where the orders agree.
        dtype: Precision of its own, outside autocast; None follows the student.
        device: Where it runs.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Sequence[str] = (),
        label_order: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ):
        if dtype not in (None, next(model.parameters()).dtype):
            model = copy.deepcopy(model).to(dtype)  # the caller's stays as it is
        self.model = model.eval().requires_grad_(False).to(device)
        self.layers, self.dtype = tuple(layers), dtype
        self.label_order = None if label_order is None else torch.tensor(label_order, device=device)

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor]) -> ModelOutputs:
        """Teacher outputs for a batch, without gradient.

        Raises:
            RuntimeError: If somebody put the teacher into training mode or unfroze it.
        """
        training = any(module.training for module in self.model.modules())
        if training or any(parameter.requires_grad for parameter in self.model.parameters()):
            raise RuntimeError(
                "the teacher is in training mode or has trainable parameters: it must stay frozen. "
                "Keep it out of the student's modules, and use a distiller with trains_teacher=True to train it"
            )
        if self.dtype is not None:
            batch = {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in batch.items()}
        with nullcontext() if self.dtype is None else autocast_off(next(self.model.parameters()).device):
            outputs = run_model(self.model, batch, layers=self.layers, prefix="teacher_")
        if self.label_order is None:
            return outputs
        return replace(outputs, logits=outputs.logits[:, self.label_order])


def named_labels(config) -> list[str] | None:
    """The class names of a configuration, None where they are placeholders such as LABEL_0."""
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    return None if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names


def align_labels(own: Sequence[str] | None, other: Sequence[str] | None, *, whose: str) -> list[int] | None:
    """For each class of ``own`` its index in ``other``; None where the orders agree or one side has no names.

    Args:
        own: Names to follow (the student's).
        other: Names to reorder.
        whose: Whom ``other`` belongs to, for the message.

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
            f"the classes of {whose} are not the student's: only there {only[0]}, only in the student {only[1]}. "
            "Distil between models of the same classes, or set id2label on both to the same names"
        )
    return [other.index(name) for name in own]


def head_looks_new(model: nn.Module) -> bool:
    """Whether a classifier's last layer is as an initialiser leaves it.

    Recognised are transformers' (zero bias, normal weights of the configured spread) and PyTorch's (both uniform up
    to 1/sqrt(inputs)). Training moves every bias off zero and weights past that bound, so a false alarm is unlikely;
    loading a teacher through ``hfkd.models.load_model(..., refuse_new_head=True)`` is exact.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear or linear[-1].bias is None:
        return False
    weight, bias = linear[-1].weight.detach().float(), linear[-1].bias.detach().float()
    spread, count = weight.std().item(), weight.numel()
    configured = getattr(getattr(model, "config", None), "initializer_range", None)
    if configured is not None and (bias == 0).all():
        return abs(spread - configured) < 5 * configured / count**0.5
    bound = weight.shape[1] ** -0.5
    fills = 0.9 * bound < weight.abs().max() <= bound and bias.abs().max() <= bound
    return bool(fills) and abs(spread - bound / 3**0.5) < bound / count**0.5
