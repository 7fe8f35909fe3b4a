"""Where teacher outputs come from."""

from __future__ import annotations

import copy
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
