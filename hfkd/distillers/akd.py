"""Knowledge distillation with an adaptive balance (AKD)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hfkd.distillers.base import Distiller, HardLabelLoss, check_temperature, reduce_batch
from hfkd.distillers.cam import ClassAttention
from hfkd.distillers.kd import kd_loss


GAPS = ("exp", "ratio", "ce")
LARGEST_LOG_ODDS = math.log(0.9 / 0.1)  # a learned alpha stays within [0.1, 0.9]


def _check_gap(gap: str, kappa: float) -> None:
    if gap not in GAPS:
        raise ValueError(f"gap must be one of {', '.join(GAPS)}, got {gap!r}")
    if not kappa > 0:
        raise ValueError(f"kappa must be positive, got {kappa}: 1 is the default, and larger values saturate earlier")


def _gap(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, gap: str) -> Tensor:
    if gap == "ce":
        if labels is None:
            raise ValueError('gap="ce" compares losses on the labels: pass labels, or use gap="exp"')
        loss = HardLabelLoss()
        return loss(student_logits, labels) - loss(teacher_logits, labels)
    return kd_loss(student_logits, teacher_logits, temperature=1.0, reduction="none").clamp(min=0)


def _alpha_of_gap(size: Tensor, gap: str, kappa: float) -> Tensor:
    if gap == "ce":
        return (kappa * size).sigmoid()
    return -torch.expm1(-kappa * size) if gap == "exp" else size / (1 + size)


@torch.no_grad()
def gap_alpha(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    gap: str = "exp",
    kappa: float = 1.0,
    reduction: str = "none",
) -> Tensor:
    r"""Weight of the distillation term from the gap between student and teacher. Our reading.

    .. math:: \alpha = 1 - e^{-\kappa g} \;(\text{exp}), \qquad \alpha = \frac{g}{1 + g} \;(\text{ratio}), \qquad
        \alpha = \sigma\!\left(\kappa \, (\mathrm{CE}^S - \mathrm{CE}^T)\right) \;(\text{ce})

    with :math:`g = \mathrm{KL}(p^T \| p^S)` at temperature 1. No gradient flows through it.

    Args:
        student_logits: Unnormalised scores.
        teacher_logits: Unnormalised scores over the same classes in the same order.
        labels: Class indices or probabilities, for ``"ce"`` only; a sample with -100 has no gap there: α = 1/2.
        gap: ``"exp"``, ``"ratio"`` or ``"ce"``.
        kappa: How fast α rises with the gap, positive; without meaning for ``"ratio"``.
        reduction: ``"none"``, an α a sample, or ``"mean"``, one for the batch from its mean gap.

    Shapes:
        logits: (B, C). Returns (B,), or a scalar for ``"mean"``: in [0, 1) for ``"exp"`` and ``"ratio"``, in (0, 1)
        for ``"ce"``.

    Raises:
        ValueError: If gap or reduction is unknown, kappa is not positive, or ``"ce"`` gets no labels.

    Source: Li 2025, "Context-Aware Knowledge Distillation with Adaptive Weighting for Image Classification",
    arXiv 2509.05319, which computes α from the gap by a formula that is not available to us; these three are our
    candidates.

    >>> import torch
    >>> z = torch.tensor([[2.0, 0.0]])
    >>> gap_alpha(z, z).item()
    0.0
    """
    _check_gap(gap, kappa)
    return _alpha_of_gap(reduce_batch(_gap(student_logits, teacher_logits, labels, gap), reduction), gap, kappa)


class AKD(Distiller):
    r"""Distillation with a balance that adapts: ``(1 - alpha) * task + alpha * kd``. Our reading.

    ``alpha="learned"``: α = σ(a) with one trained scalar a. Its gradient is α(1 - α)(K - CE), so that plain descent
    drifts to the smaller of the two losses; after each step a is put back to where α lies in [0.1, 0.9]. Its learning
    rate is 0.01 unless ``distiller_learning_rate`` is given, and it gets no weight decay.

    ``alpha="gap"``: α from the gap between student and teacher, sample by sample: see :func:`gap_alpha`.

    A number: fixed, as in :class:`~hfkd.distillers.KD`.

    α is logged as ``alpha`` (mean over samples) where it is not fixed.

    Args:
        alpha: ``"gap"``, ``"learned"`` or a number in [0, 1].
        alpha_on: What α weighs, ``"kd"`` (as above) or ``"ce"`` (then 1 - α is on the distillation term).
        temperature: See :func:`~hfkd.functional.kd_loss`.
        gap: Formula for ``alpha="gap"``: ``"exp"``, ``"ratio"`` or ``"ce"``.
        kappa: How fast α rises with the gap, positive.
        batch_mean: One α a batch, from its mean gap. Its terms then depend on the whole batch.
        ema: One α a step, from a moving average of the batches' mean gaps that keeps this share, in [0, 1): the gap of
            the steps before, at the first step that of the batch.
        cam: Reweight the teacher's logits by attention: the same as ``CAM(AKD(...))``, gap and all; see
            :class:`~hfkd.distillers.CAM`.

    Raises:
        ValueError: If an argument is out of range, or ``batch_mean`` or ``ema`` meets another alpha than ``"gap"``.

    Source: arXiv 2509.05319, which has a learned α, one computed from the gap, and CAM; it was not available to us in
    full.
    """

    default_learning_rate = 0.01

    def __init__(
        self,
        alpha: float | str = "gap",
        alpha_on: str = "kd",
        temperature: float = 4.0,
        gap: str = "exp",
        kappa: float = 1.0,
        batch_mean: bool = False,
        ema: float | None = None,
        cam: bool = False,
    ):
        super().__init__()
        if alpha not in ("gap", "learned") and not (isinstance(alpha, (int, float)) and 0 <= alpha <= 1):
            raise ValueError(f'alpha must be "gap", "learned" or a number in [0, 1], got {alpha!r}')
        if alpha_on not in ("kd", "ce"):
            raise ValueError(f'alpha_on must be "kd" or "ce", the term that alpha weighs, got {alpha_on!r}')
        check_temperature(temperature)
        _check_gap(gap, kappa)
        if (batch_mean or ema is not None) and alpha != "gap":
            raise ValueError(f'batch_mean and ema are about the gap, and alpha is {alpha!r}: use alpha="gap"')
        if ema is not None and not 0 <= ema < 1:
            raise ValueError(
                f"ema must lie in [0, 1), got {ema}: it is the share that a step keeps; None is no average"
            )
        self.alpha, self.alpha_on, self.temperature, self.gap, self.kappa = alpha, alpha_on, temperature, gap, kappa
        self.batch_mean, self.ema, self.cam = batch_mean, ema, cam
        self.batch_coupled = batch_mean or ema is not None
        if alpha == "learned":
            self.log_odds = nn.Parameter(torch.zeros(1))
        if ema is not None:
            self.register_buffer("average_gap", torch.tensor(torch.nan))  # NaN: none yet
            self._gaps: list[Tensor] = []  # of the micro-batches since the last step
        self.attention = ClassAttention() if cam else None
        self._figures: dict[str, Tensor] = {}

    def setup(self, context):
        if self.cam:
            self.attention.setup(context)

    def forward(self, student, teacher, batch):
        cam_terms = {}
        if self.cam:
            teacher = self.attention.reweigh(student, teacher)
            cam_terms = self.attention(student, teacher, batch)
        alpha = self._alpha(student.logits, teacher.logits, batch["labels"])
        on_kd = alpha if self.alpha_on == "kd" else 1 - alpha
        distillation = kd_loss(student.logits, teacher.logits, temperature=self.temperature, reduction="none")
        return {"task": (1 - on_kd) * self.task_loss(student, batch), "kd": on_kd * distillation, **cam_terms}

    def _alpha(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor | float:
        if self.alpha == "learned":
            alpha = self.log_odds.sigmoid()
        elif self.alpha == "gap":
            alpha = self._alpha_of_gap(student_logits.detach(), teacher_logits.detach(), labels)
        else:
            return self.alpha
        self._figures = {"alpha": alpha.detach()}
        return alpha

    def _alpha_of_gap(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        size = _gap(student_logits, teacher_logits, labels, self.gap)
        if self.batch_coupled:
            size = size.mean()
        if self.ema is not None:
            self._gaps.append(size)
            size = torch.where(self.average_gap.isnan(), size, self.average_gap)
        return _alpha_of_gap(size, self.gap, self.kappa)

    def on_train_begin(self, context):
        if self.ema is not None:
            self._gaps.clear()
            if not context.progress:  # a second run: that average was of the first one's student
                self.average_gap.fill_(torch.nan)

    @torch.no_grad()
    def on_step_end(self, context):
        if self.alpha == "learned":
            # A clamp within the loss would have no gradient outside the range, and hold alpha there for good.
            self.log_odds.clamp_(-LARGEST_LOG_ODDS, LARGEST_LOG_ODDS)
        if self.ema is not None:
            latest = context.gather(torch.stack(self._gaps).mean()[None]).mean().to(self.average_gap)
            average = self.average_gap.lerp(latest, 1 - self.ema)
            self.average_gap.copy_(torch.where(self.average_gap.isnan(), latest, average))
            self._gaps.clear()

    def logged_values(self):
        return {**self._figures, **(self.attention.logged_values() if self.cam else {})}
