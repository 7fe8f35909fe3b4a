"""Self-distillation from the moving average of the student's own past."""

from __future__ import annotations

import copy

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from hfkd.distillers.base import Distiller, Ramp, check_not_negative, check_temperature
from hfkd.distillers.kd import kd_loss


class SelfDistillation(Distiller):
    r"""The student learns from an average of its own past: ``task + weight * min(progress / warm_up, 1) * self_kd``.

    .. math:: \theta^T \leftarrow d \, \theta^T + (1 - d) \, \theta^S \quad \text{after each step}

    No teacher is passed: the average starts as a copy of the student, predicts in evaluation mode, and is saved in
    every checkpoint under ``teacher/``; ``trainer.teacher_model`` holds it. Its BatchNorm statistics are averaged
    alike. The term is :func:`~hfkd.functional.kd_loss`; its weight rises because the average knows nothing at first.
    Costs one more forward pass a step and a second copy of the weights.

    Args:
        weight: Weight of the term after the warm-up, not negative.
        temperature: Softening of both distributions.
        decay: Share of the average that a step keeps, in [0, 1): it remembers about 1/(1 - decay) steps, so lower it
            where training has only a few times as many.
        warm_up: Share of training during which the weight rises from 0; our choice.

    Raises:
        ValueError: If an argument is out of range, ``teacher_dtype`` asks for another precision than the student's,
            or FSDP is active.

    Source: Tarvainen and Valpola 2017, "Mean teachers are better role models", NeurIPS, arXiv 1703.01780, for average
    and ramp; there the distance is a squared error of probabilities.
    """

    def __init__(self, weight: float = 1.0, temperature: float = 4.0, decay: float = 0.999, warm_up: float = 0.25):
        super().__init__()
        check_not_negative(weight=weight)
        check_temperature(temperature)
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}: at 1 the average would never learn, 0 is a copy")
        self.weight, self.temperature, self.decay, self.warm_up = weight, temperature, decay, warm_up
        self.ramp = Ramp(warm_up)

    def make_teacher(self, student):
        return copy.deepcopy(student)

    def setup(self, context):
        if context.is_sharded:
            raise ValueError(
                "SelfDistillation averages the student's weights, and FSDP spreads them over processes: use plain "
                "data parallelism"
            )
        own, average = (next(model.parameters()).dtype for model in (context.student, context.teacher_model))
        if average != own:
            raise ValueError(
                f"the average of the student cannot be kept in {average} when the student is in {own}: small steps "
                "would be lost. Leave out teacher_dtype"
            )

    def forward(self, student, teacher, batch):
        distillation = kd_loss(student.logits, teacher.logits, temperature=self.temperature, reduction="none")
        return {"task": self.task_loss(student, batch), "self_kd": self.ramp(self.weight * distillation)}

    def on_epoch_begin(self, context):
        self.ramp.update(context.progress)

    @torch.no_grad()
    def on_step_end(self, context):
        self.ramp.update(context.progress)
        teacher, student = context.teacher_model, context.student
        average = get_ema_multi_avg_fn(self.decay)
        average(list(teacher.parameters()), list(student.parameters()), None)
        kept = [buffer for buffer in teacher.buffers() if buffer.is_floating_point()]
        if kept:
            # BatchNorm's statistics differ between processes until the next forward: all take those of the first.
            own = torch.cat([buffer.flatten() for buffer in student.buffers() if buffer.is_floating_point()])
            first = context.gather(own[None])[0].split([buffer.numel() for buffer in kept])
            average(kept, [part.view_as(buffer) for buffer, part in zip(kept, first, strict=True)], None)
