"""Teacher-free knowledge distillation (Yuan et al. 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hfkd.distillers.base import Distiller, check_temperature, reduce_batch
from hfkd.distillers.dkd import index_of_label, without_unlabelled
from hfkd.distillers.kd import kd_loss
from hfkd.features import base_model


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(
            f"confidence must lie in (0, 1), got {confidence}: a teacher that is certain has no second-best to teach"
        )


def virtual_kd_loss(
    student_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 20.0,
    confidence: float = 0.99,
    reduction: str = "mean",
) -> Tensor:
    r"""Divergence from a teacher made by hand: always right, and indifferent among the other classes.

    .. math:: T^2 \, \mathrm{KL}\!\left(p^d_T \,\|\, p^S_T\right), \qquad
        p^d_t = a, \quad p^d_i = \frac{1 - a}{C - 1} \ (i \ne t)

    with the label t, the confidence a, and both sides at temperature T: :math:`p^d_T \propto (p^d)^{1/T}`. This is the
    paper's equation as we read it, with the usual factor T². The authors' code differs from it: there the student is
    not softened, the teacher is the softmax of p^d/T, and a factor on the term is tuned.

    Args:
        student_logits: Unnormalised scores.
        labels: Class indices; a sample with -100 contributes 0.
        temperature: Softening of both distributions; the paper uses 20 and more.
        confidence: Probability of the label, in (0, 1); the paper uses 0.99.
        reduction: ``"mean"`` over the batch or ``"none"``.

    Shapes:
        ``student_logits``: (B, C), labels: (B,). Returns a scalar, or (B,) for ``"none"``, in nats.

    Raises:
        ValueError: If the temperature is not positive, the confidence is outside (0, 1), or the reduction is unknown.

    Source: Yuan et al. 2020, "Revisiting Knowledge Distillation via Label Smoothing Regularization", CVPR,
    arXiv 1909.11723; github.com/yuanli2333/Teacher-free-Knowledge-Distillation.

    >>> import torch
    >>> z = torch.tensor([[0.99, 0.005, 0.005]]).log()
    >>> abs(round(virtual_kd_loss(z, torch.tensor([0])).item(), 4))
    0.0
    """
    check_temperature(temperature)
    _check_confidence(confidence)
    log_rest = math.log((1 - confidence) / (student_logits.shape[-1] - 1))
    teacher = torch.full_like(student_logits, log_rest).scatter(-1, index_of_label(labels), math.log(confidence))
    per_sample = kd_loss(student_logits, teacher, temperature=temperature, reduction="none")
    return reduce_batch(without_unlabelled(per_sample, labels), reduction)


class TfKD(Distiller):
    """Teacher-free knowledge distillation: ``(1 - alpha) * task + alpha * tf_kd``.

    ``mode="self"``: the teacher is the student's own network, trained before without one, and the student starts from
    fresh weights. Train the network with ``StudentAlone()``, then pass it as ``teacher_model``; another architecture
    is refused. (A student that is trained already can go on under ``teacher_model=copy.deepcopy(student)``.) The term
    is then :func:`~hfkd.functional.kd_loss`.

    ``mode="virtual"``: no network teaches, but :func:`virtual_kd_loss`. It needs labels: an unlabelled sample adds
    nothing, and the term is scaled up as the task term is, to keep its meaning on a data set with few labels.

    Args:
        mode: ``"self"`` or ``"virtual"``.
        alpha: Share of the distillation term, in [0, 1]; None is the paper's: 0.95 for self, 0.1 for virtual.
        temperature: Softening of both distributions; the paper uses 20, or 6 for self, by network.
        confidence: For virtual, the teacher's probability of the label, in (0, 1).

    Raises:
        ValueError: If an argument is out of range, or the teacher is not of the student's architecture.

    Source: arXiv 1909.11723; see :func:`virtual_kd_loss`.
    """

    def __init__(
        self, mode: str = "self", alpha: float | None = None, temperature: float = 20.0, confidence: float = 0.99
    ):
        super().__init__()
        if mode not in ("self", "virtual"):
            raise ValueError(
                f'mode must be "self" (a trained copy of the student teaches) or "virtual" (nobody does), got {mode!r}'
            )
        alpha = {"self": 0.95, "virtual": 0.1}[mode] if alpha is None else alpha
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], got {alpha}: 0 is the labels alone, 1 the teacher alone")
        check_temperature(temperature)
        _check_confidence(confidence)
        self.mode, self.alpha, self.temperature, self.confidence = mode, alpha, temperature, confidence
        self.needs_teacher = mode == "self"
        self.needs_hard_labels = mode == "virtual"

    def setup(self, context):
        if self.mode == "virtual":
            return
        student, teacher = base_model(context.student), base_model(context.teacher_model)
        plain = student is context.student  # an adapter's weights have no counterpart
        if type(student) is not type(teacher) or (plain and _shapes(student) != _shapes(teacher)):
            raise ValueError(
                'TfKD(mode="self") teaches a network by a trained copy of itself, and the teacher '
                f"({type(teacher).__name__}) is not of the student's architecture: pass the student's own network, "
                "trained, as teacher_model, or use KD() with any teacher"
            )

    def forward(self, student, teacher, batch):
        if self.mode == "self":
            distillation = kd_loss(student.logits, teacher.logits, temperature=self.temperature, reduction="none")
        else:
            options = {"temperature": self.temperature, "confidence": self.confidence, "reduction": "none"}
            distillation = virtual_kd_loss(student.logits, batch["labels"], **options) * self.hard_label_loss.scale
        return {"task": (1 - self.alpha) * self.task_loss(student, batch), "tf_kd": self.alpha * distillation}


def _shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}
