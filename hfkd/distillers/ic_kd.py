"""In-context knowledge distillation (IC-KD): what the teacher says about a sample's neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfkd.distillers.base import Distiller, check_not_negative, check_temperature, reduce_batch
from hfkd.distillers.dml import make_peer
from hfkd.distillers.kd import kd_loss
from hfkd.distillers.layers import to_paths
from hfkd.features import collect, evaluating, head_path, probe, run_model
from hfkd.memory import MemoryBank, Neighbours, check_index


MODES = ("offline", "online", "teacher_free")
NEGATIVE_LOSSES = ("contrast", "hinge")


def picd_loss(
    student_logits: Tensor, context_logits: Tensor, *, temperature: float = 4.0, reduction: str = "mean"
) -> Tensor:
    r"""Positive in-context distillation: be close to what is said about samples of the same class. Our reading.

    .. math:: T^2 \, \mathrm{KL}\!\left(\mathrm{softmax}(\bar z/T) \,\|\, \mathrm{softmax}(z^S/T)\right)

    with the aggregated logits of :func:`hfkd.memory.aggregate_context`. With one neighbour, the sample itself, it is
    :func:`~hfkd.functional.kd_loss`. At T = 1, ``(1 - α) CE + α PICD`` is, up to a constant, cross-entropy with the
    smoothed label ``(1 - α) y + α softmax(z̄)``.

    Args:
        student_logits: Unnormalised scores.
        context_logits: Unnormalised scores, aggregated over neighbours of the same class.
        temperature: Softening of both distributions.
        reduction: ``"mean"`` over the batch or ``"none"``.

    Shapes:
        Both logits (B, C). Returns a scalar, or (B,) for ``"none"``, in nats.

    Raises:
        ValueError: If the temperature is not positive, or the reduction is unknown.

    Source: Zhu et al. 2025, "Rethinking Knowledge in Distillation: An In-context Sample Retrieval Perspective",
    arXiv 2501.07040, whose equations were not available to us.

    >>> import torch
    >>> z = torch.tensor([[2.0, 0.0]])
    >>> picd_loss(z, z).item()
    0.0
    """
    return kd_loss(student_logits, context_logits, temperature=temperature, reduction=reduction)


def _check_negative_loss(kind: str) -> None:
    if kind not in NEGATIVE_LOSSES:
        raise ValueError(f"the loss on negatives must be one of {', '.join(NEGATIVE_LOSSES)}, got {kind!r}")


def _directions(logits: Tensor) -> Tensor:
    length = logits.norm(dim=-1, keepdim=True)
    return logits / length.masked_fill(length == 0, torch.inf)  # all 0 has no direction, and no gradient


def nicd_loss(
    student_logits: Tensor,
    positive_logits: Tensor,
    negative_logits: Tensor,
    *,
    temperature: float = 0.5,
    kind: str = "contrast",
    margin: float = 0.5,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Negative in-context distillation: be further from samples of other classes than from the own one. Our reading.

    .. math:: -\log \frac{e^{c(z^S, \bar z)/\tau}}{e^{c(z^S, \bar z)/\tau} + \sum_k e^{c(z^S, z_k)/\tau}}
        \;(\text{contrast}), \qquad
        \frac{1}{M} \sum_k \max\!\left(0,\, m + c(z^S, z_k) - c(z^S, \bar z)\right) \;(\text{hinge})

    with c the cosine, which does not see the size of the logits. Both are at least 0, and 0 without negatives.

    Args:
        student_logits: Unnormalised scores.
        positive_logits: Unnormalised scores, aggregated over neighbours of the same class.
        negative_logits: Unnormalised scores of M neighbours of other classes.
        temperature: τ, for ``"contrast"``.
        kind: ``"contrast"`` or ``"hinge"``.
        margin: m, for ``"hinge"``.
        mask: Which negatives there are; all by default.
        reduction: ``"mean"`` over the batch or ``"none"``.

    Shapes:
        ``student_logits`` and ``positive_logits``: (B, C), ``negative_logits``: (B, M, C), mask: (B, M). Returns a
        scalar, or (B,) for ``"none"``.

    Raises:
        ValueError: If the temperature is not positive, or kind or reduction is unknown.

    Source: arXiv 2501.07040, whose equations were not available to us. A divergence with a minus sign would have no
    lower bound.

    >>> import torch
    >>> z = torch.tensor([[2.0, 0.0]])
    >>> round(nicd_loss(z, z, z[:, None]).item(), 4)  # log 2: the one negative is as close
    0.6931
    """
    check_temperature(temperature)
    _check_negative_loss(kind)
    student = _directions(student_logits)
    positive = (student * _directions(positive_logits)).sum(-1)
    negatives = torch.einsum("bc,bmc->bm", student, _directions(negative_logits))
    excess = negatives - positive[:, None]
    there = torch.ones_like(excess, dtype=torch.bool) if mask is None else mask
    if kind == "hinge":
        losses = (margin + excess).clamp(min=0).masked_fill(~there, 0.0)
        per_sample = losses.sum(1) / there.sum(1).clamp(min=1)
    else:
        scores = (excess / temperature).masked_fill(~there, -torch.inf)
        per_sample = F.pad(scores, (1, 0)).logsumexp(1)
    return reduce_batch(per_sample, reduction)


class InContextKD(Distiller):
    r"""In-context distillation: ``(1 - alpha) * task + alpha * kd + picd_weight * picd + nicd_weight * nicd``.

    A bank holds what the teacher says about every training sample, un-augmented (see
    :meth:`DistillationContext.batches <hfkd.context.DistillationContext.batches>`), and for each sample its nearest
    neighbours by the teacher's penultimate features: K of the same class, aggregated for :func:`picd_loss`, and M of
    other classes for :func:`nicd_loss`. With both weights 0 it is :class:`~hfkd.distillers.KD`.

    ``mode="offline"``: the teacher is frozen, so its bank is filled once, by one pass over the training set before the
    first step; a resumed run finds it in its checkpoint.

    ``mode="online"``: two networks teach each other as in :class:`~hfkd.distillers.DML`, each from the other's answer
    (the ``kd`` term) and from the other's bank. The peer's terms are logged as ``peer_…``.

    ``mode="teacher_free"``: the bank is the student's own, of an earlier state of it; there is no ``kd`` term, and the
    task term has weight 1.

    Online and teacher-free the banks are filled at each ``refresh`` share of training, by a pass over the training set
    in evaluation mode; before the first one there is no context.

    Without a label there is no context: an unlabelled sample has the ``kd`` term alone, and the context terms are
    scaled up as the task term is, to keep their meaning on a data set with few labels. A class with fewer than K + 1
    samples has fewer neighbours, and one with a single sample none. A bank takes N (4 C + 8 K + 6 M + 8) bytes (online
    there are two), in each checkpoint too: see :class:`hfkd.memory.MemoryBank`. :meth:`retrieved` gives the
    neighbours, and :func:`hfkd.report.neighbour_gallery` draws them.

    Args:
        mode: ``"offline"``, ``"online"`` or ``"teacher_free"``.
        alpha: Share of the ``kd`` term against the labels, in [0, 1]; None is 0.9 offline, and 0.5 online, where the
            peer knows no more than the student.
        temperature: Softening of both sides in ``kd`` and ``picd``.
        picd_weight: Weight of the positive context, not negative.
        nicd_weight: Weight of the negative context, not negative.
        neighbours: K.
        negatives: M.
        retrieval_temperature: How fast the weight of a neighbour falls with its similarity; see
            :func:`hfkd.memory.aggregate_context`.
        negative_temperature: See :func:`nicd_loss`.
        negative_loss: ``"contrast"`` or ``"hinge"``.
        margin: Of the hinge.
        refresh: Share of training between two fillings, in (0, 1), for online and teacher-free; 0.1 if None.
        index: ``"exact"`` or ``"faiss"``; see :func:`hfkd.memory.find_neighbours`.
        student_layers: Module path of the student that gives the features of its bank; the input of its classifier by
            default.
        teacher_layers: The same of the teacher or peer.
        peer: For online, see :class:`~hfkd.distillers.DML`.
        peer_seed: Idem.

    Raises:
        ValueError: If an argument is out of range or has no meaning in this mode; at setup if a feature is no vector;
            when the bank is filled if the column ``index`` repeats itself or no class has two samples.

    Source: arXiv 2501.07040. Certain are the bank, retrieval, aggregation and the three modes; the forms of the two
    losses are our reading.
    """

    batch_columns = ("index",)
    needs_hard_labels = True

    def __init__(
        self,
        mode: str = "offline",
        alpha: float | None = None,
        temperature: float = 4.0,
        picd_weight: float = 1.0,
        nicd_weight: float = 0.1,
        neighbours: int = 8,
        negatives: int = 64,
        retrieval_temperature: float = 0.1,
        negative_temperature: float = 0.5,
        negative_loss: str = "contrast",
        margin: float = 0.5,
        refresh: float | None = None,
        index: str = "exact",
        student_layers: Sequence[str] | None = None,
        teacher_layers: Sequence[str] | None = None,
        peer: nn.Module | None = None,
        peer_seed: int = 1000,
    ):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        meaningless = {
            "offline": {"refresh": refresh, "student_layers": student_layers, "peer": peer},
            "online": {},
            "teacher_free": {"alpha": alpha, "teacher_layers": teacher_layers, "peer": peer},
        }[mode]
        if given := [name for name, value in meaningless.items() if value not in (None, ())]:
            raise ValueError(f"{', '.join(given)} has no meaning with mode={mode!r}: leave it out")
        if alpha is not None and not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], got {alpha}: 0 is the labels alone, 1 the teacher alone")
        for value in (temperature, retrieval_temperature, negative_temperature):
            check_temperature(value)
        check_not_negative(picd_weight=picd_weight, nicd_weight=nicd_weight)
        if neighbours < 1 or negatives < 1:
            raise ValueError(
                f"neighbours and negatives must be at least 1, got {neighbours} and {negatives}: picd_weight=0 and "
                "nicd_weight=0 leave their terms out"
            )
        _check_negative_loss(negative_loss)
        check_not_negative(margin=margin)
        refresh = 0.1 if refresh is None and mode != "offline" else refresh
        if refresh is not None and not 0 < refresh < 1:
            raise ValueError(f"refresh must lie in (0, 1), got {refresh}: it is a share of training")
        check_index(index)
        self.mode = mode
        self.alpha = {"offline": 0.9, "online": 0.5, "teacher_free": None}[mode] if alpha is None else alpha
        self.temperature, self.picd_weight, self.nicd_weight = temperature, picd_weight, nicd_weight
        self.neighbours, self.negatives, self.index = neighbours, negatives, index
        self.retrieval_temperature, self.negative_temperature = retrieval_temperature, negative_temperature
        self.negative_loss, self.margin, self.refresh = negative_loss, margin, refresh
        self.named_layers = {"student": to_paths(student_layers), "teacher": to_paths(teacher_layers)}
        if max(map(len, self.named_layers.values())) > 1:
            raise ValueError("InContextKD retrieves by one layer of a model: name one")
        if mode == "offline":  # whose teacher is outside, and answers with the layer at each step
            self.teacher_layers = self.named_layers["teacher"]
        self.peer_seed = peer_seed
        self.given_peers = () if peer is None else (peer,)  # in a tuple, which does not make it a part of the method
        self.needs_teacher, self.trains_teacher = mode != "teacher_free", mode == "online"
        self.student_bank = self.teacher_bank = None
        self._refreshed = 0

    def make_teacher(self, student):
        if self.mode == "online":
            return make_peer("InContextKD", student, self.given_peers, self.peer_seed)
        return None

    def setup(self, context):
        if self.mode == "offline" and context.teacher is None:
            raise ValueError(
                'InContextKD(mode="offline") fills its bank once, and another method trains the teacher here: leave '
                "it frozen, or combine other methods"
            )
        self.student_bank = self._make_bank(context, "student") if self.mode != "offline" else None
        self.teacher_bank = self._make_bank(context, "teacher") if self.mode != "teacher_free" else None
        if self.mode == "offline":
            self.teacher_layers = (self._layer(context, "teacher"),)

    def _model(self, context, whose: str) -> nn.Module:
        return context.student if whose == "student" else context.teacher_model

    def _layer(self, context, whose: str) -> str:
        named = self.named_layers[whose]
        return named[0] if named else f"{head_path(self._model(context, whose))}:input"

    def _make_bank(self, context, whose: str) -> MemoryBank:
        layer, prefix = self._layer(context, whose), "teacher_" if whose == "teacher" else ""
        (feature,) = probe(self._model(context, whose), context.sample(), (layer,), prefix).values()
        if feature.ndim != 2:
            raise ValueError(
                f"InContextKD retrieves by vectors (B, D), and {layer!r} of the {whose} gives {tuple(feature.shape)}: "
                f'name a layer that gives vectors, such as a classifier\'s input ({whose}_layers="classifier:input")'
            )
        size, classes = len(context.train_dataset), context.student.config.num_labels
        return MemoryBank(size, classes, self.neighbours, self.negatives, feature.dtype)

    def forward(self, student, teacher, batch):
        bank = self.student_bank if self.mode == "teacher_free" else self.teacher_bank
        return self._terms(student, teacher, batch, bank)

    def teacher_terms(self, teacher, student, batch):
        terms = self._terms(teacher, student, batch, self.student_bank)
        return {f"peer_{name}": term for name, term in terms.items()}

    def _terms(self, own, other, batch, bank: MemoryBank) -> dict[str, Tensor]:
        terms = {"task": self.task_loss(own, batch)}
        if self.mode != "teacher_free":
            distillation = kd_loss(own.logits, other.logits, temperature=self.temperature, reduction="none")
            terms = {"task": (1 - self.alpha) * terms["task"], "kd": self.alpha * distillation}
        known = bank.context(batch["index"], temperature=self.retrieval_temperature)
        picd = picd_loss(own.logits, known.positive_logits, temperature=self.temperature, reduction="none")
        nicd = nicd_loss(
            own.logits,
            known.positive_logits,
            known.negative_logits,
            temperature=self.negative_temperature,
            kind=self.negative_loss,
            margin=self.margin,
            mask=known.has_negatives,
            reduction="none",
        )
        for name, weight, term in (("picd", self.picd_weight, picd), ("nicd", self.nicd_weight, nicd)):
            terms[name] = weight * self.hard_label_loss.scale * term.masked_fill(~known.has_positives, 0.0)
        return terms

    def retrieved(self, index: Tensor) -> Neighbours:
        """The neighbours that the student learns from, of the training samples with these numbers in ``index``."""
        return (self.student_bank if self.mode == "teacher_free" else self.teacher_bank).retrieved(index)

    def on_load(self, context):
        for bank in (self.student_bank, self.teacher_bank):
            if bank is not None:
                bank.check(context.sample_index())

    def on_train_begin(self, context):
        if self.mode != "offline":
            self._refreshed = self._due(context)
            for bank in (self.student_bank, self.teacher_bank):
                if bank is not None and not context.progress:  # a second run: that bank is of the first one's end
                    bank.clear()
        elif not self.teacher_bank.is_filled:
            self._fill(context, "teacher", context.teacher)

    def on_step_end(self, context):
        if self.mode == "offline" or self._due(context) <= self._refreshed or context.progress >= 1:
            return
        self._refreshed = self._due(context)
        for whose, bank in (("student", self.student_bank), ("teacher", self.teacher_bank)):
            if bank is not None:
                layers, prefix = (self._layer(context, whose),), "teacher_" if whose == "teacher" else ""
                model = self._model(context, whose)
                self._fill(context, whose, partial(run_model, model, layers=layers, prefix=prefix))

    def _due(self, context) -> int:
        return int(context.progress / self.refresh + 1e-6)  # 0.3 / 0.1 is below 3

    def _fill(self, context, whose: str, run) -> None:
        bank = self.student_bank if whose == "student" else self.teacher_bank
        context.align_buffers(self._model(context, whose))
        with evaluating(self._model(context, whose)), context.autocast():
            samples = collect(run, context.batches(context.train_dataset, by_length=True), self._layer(context, whose))
        bank.fill(samples, index=self.index, gather=context.gather)
