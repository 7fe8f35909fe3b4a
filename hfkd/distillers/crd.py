"""Contrastive representation distillation (CRD, Tian et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfkd.distillers.base import IGNORE_INDEX, check_temperature
from hfkd.distillers.layers import LayerDistiller, check_coupled
from hfkd.features import head_path


def crd_loss(positive: Tensor, negatives: Tensor, *, num_samples: int, reduction: str = "mean") -> Tensor:
    r"""Noise-contrastive estimation: tell the pair of one sample from K pairs of different samples.

    .. math:: -\log h(s_0) - \sum_{k=1}^K \log\left(1 - h(s_k)\right), \qquad h(s) = \frac{e^s}{e^s + K/N}

    Args:
        positive: Log-density :math:`s_0 = \cos(g^S, g^T)/\tau - \log Z` of the pair of one sample.
        negatives: The same of K pairs of different samples.
        num_samples: N, how many samples the negatives are drawn from.
        reduction: ``"mean"`` only: the samples of a batch are contrasted with others.

    Shapes:
        ``positive``: (B,), ``negatives``: (B, K). Returns a scalar, in nats.

    Raises:
        ValueError: If the reduction is not ``"mean"``.

    Source: Tian et al. 2020, "Contrastive Representation Distillation", ICLR, arXiv 1910.10699, equation 18, as in
    github.com/HobbitLong/RepDistiller (without its 1e-7 in the denominator).

    >>> import torch
    >>> round(crd_loss(torch.zeros(2), torch.full((2, 3), -100.0), num_samples=3).item(), 4)  # log 2
    0.6931
    """
    check_coupled(reduction)
    log_noise = math.log(negatives.shape[1] / num_samples)
    return (F.softplus(log_noise - positive) + F.softplus(negatives - log_noise).sum(1)).mean()


class CRD(LayerDistiller):
    r"""Contrastive distillation: ``task + weight * crd``.

    Student and teacher features are embedded by a linear layer each, on the unit sphere. Two memories keep the latest
    embeddings of every training sample. :func:`crd_loss` is taken twice: of the student's embedding against the
    teacher's memory, and the other way round; the positive is the sample's own row, negatives are drawn, with
    replacement, among the samples of other classes (an unlabelled sample is its own class). Z is the mean of
    :math:`e^{\cos/\tau}` over the memories as they start, times N; the authors' code measures it on the first batch.

    After each optimizer step the rows of its samples move to their new embeddings, gathered over all processes, so
    that every process holds the same memories. They take N · 128 · 8 bytes, in each checkpoint too. Scores are
    computed against all N rows and K of them used, which takes less memory than fetching K rows for each sample.

    Args:
        weight: Weight of the term, not negative; 0.8 in the paper's benchmark.
        embedding_size: Width of the embeddings; 128.
        negatives: K, how many negatives a sample has; 16,384.
        temperature: τ; 0.07.
        momentum: Share of the old row that stays in a memory; 0.5.
        student_layers: Module path of the student that gives a vector; by default the input of its classifier.
        teacher_layers: The same of the teacher.

    Raises:
        ValueError: If an argument is out of range; at setup if a feature is no vector, or the training set does not
            show its labels or has one class only.

    Source: arXiv 1910.10699; see :func:`crd_loss`.
    """

    batch_columns = ("index",)
    needs_hard_labels = True
    batch_coupled = True
    problem_types = ("single_label",)
    dimensions = {2: "a vector (B, D)"}
    remedy = 'name one layer that gives vectors, such as a classifier\'s input (student_layers=("classifier:input",))'

    def __init__(
        self,
        weight: float = 0.8,
        embedding_size: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        student_layers: Sequence[str] | None = None,
        teacher_layers: Sequence[str] | None = None,
    ):
        super().__init__(weight, student_layers, teacher_layers)
        check_temperature(temperature)
        if embedding_size < 1 or negatives < 1:
            raise ValueError(f"embedding_size and negatives must be at least 1, got {embedding_size} and {negatives}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum}: 0 keeps nothing of the old embedding")
        if max(map(len, self.named_layers)) > 1:
            raise ValueError("CRD compares one layer of each model: combine several CRD() to compare several")
        self.embedding_size, self.negatives = embedding_size, negatives
        self.temperature, self.momentum = temperature, momentum
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []  # of the step under way

    def propose(self, model):
        return (f"{head_path(model)}:input",)

    def allocate(self, pairs):
        ((student, teacher),) = pairs
        self.student_embedding = nn.Linear(student.shape[1], self.embedding_size, dtype=student.dtype)
        self.teacher_embedding = nn.Linear(teacher.shape[1], self.embedding_size, dtype=student.dtype)

    def setup(self, context):
        super().setup(context)
        labels = context.labels(context.train_dataset)
        if labels is None:
            raise ValueError(
                "CRD draws negatives from other classes and cannot read the labels of the training set: give it a "
                "`labels` attribute, an array with one class index a row"
            )
        index, order = context.sample_index().sort()
        self.register_buffer("sample_index", index, persistent=False)
        self._keep_classes(torch.from_numpy(labels)[order])
        shape, dtype = (len(index), self.embedding_size), self.student_embedding.weight.dtype
        for name in ("student_memory", "teacher_memory"):
            self.register_buffer(name, F.normalize(torch.randn(shape, dtype=dtype), dim=1))
        scores = (self.student_memory[:1000] @ self.teacher_memory[:1000].T).flatten() / self.temperature
        self.register_buffer("log_z", scores.logsumexp(0) + math.log(len(index) / len(scores)))

    def _keep_classes(self, labels: Tensor) -> None:
        """Rows sorted by class, and for each row where its class starts there and how many members it has."""
        by_class = labels.argsort(stable=True)
        sorted_labels = labels[by_class]
        first = torch.searchsorted(sorted_labels, labels)
        members = torch.searchsorted(sorted_labels, labels, right=True) - first
        unlabelled = labels == IGNORE_INDEX
        first[unlabelled], members[unlabelled] = by_class.argsort()[unlabelled], 1
        if (members == len(labels)).any():
            raise ValueError("CRD draws negatives from other classes, and the training set has only one: use KD()")
        for name, buffer in (("by_class", by_class), ("first", first), ("members", members)):
            self.register_buffer(name, buffer, persistent=False)

    def draw_negatives(self, rows: Tensor) -> Tensor:
        """For each row (B,) of the memories K rows of other classes, (B, K)."""
        first, members = self.first[rows, None], self.members[rows, None]
        # One draw for all, shifted by row: cheap, and the same however a batch is spread over processes.
        draws = torch.randint(2**40, (self.negatives,), device=rows.device)
        places = (draws + 7919 * rows[:, None]) % (len(self.by_class) - members)
        return self.by_class[places + members * (places >= first)]

    def forward(self, student, teacher, batch):
        ((own, other),) = self.pairs(student, teacher)
        own = F.normalize(self.student_embedding(own), dim=1)
        other = F.normalize(self.teacher_embedding(other), dim=1)
        rows = torch.searchsorted(self.sample_index, batch["index"])
        negatives, losses = self.draw_negatives(rows), []
        for anchor, memory in ((own, self.teacher_memory), (other, self.student_memory)):
            scores = anchor @ memory.T / self.temperature - self.log_z
            positive = scores.gather(1, rows[:, None]).squeeze(1)
            losses.append(crd_loss(positive, scores.gather(1, negatives), num_samples=len(memory)))
        if self.training:
            self._seen.append((rows, own.detach(), other.detach()))
        return {"task": self.task_loss(student, batch), "crd": self.weight * sum(losses)}

    def on_train_begin(self, context):
        self._seen.clear()

    @torch.no_grad()
    def on_step_end(self, context):
        rows, own, other = (context.gather(torch.cat(part)) for part in zip(*self._seen, strict=True))
        self._seen.clear()
        # A sample that came twice is written twice: both times as it came last, since the order is not defined.
        last = ((rows[:, None] == rows) * torch.arange(len(rows), device=rows.device)).amax(1)
        for memory, new in ((self.student_memory, own), (self.teacher_memory, other)):
            memory[rows] = F.normalize(self.momentum * memory[rows] + (1 - self.momentum) * new[last], dim=1)
