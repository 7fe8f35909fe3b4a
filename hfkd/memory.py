"""A bank of what a model says about every training sample, and the retrieval of neighbours from it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfkd.distillers.base import IGNORE_INDEX


MISSING = -1
INDEXES = ("exact", "faiss")
_BLOCK_BYTES = 2**28  # of similarities at a time
_LARGEST_FLAT = 2**18  # rows beyond which FAISS clusters instead of comparing with every row
_PROBED = 64  # of those clusters a query looks into
_SAMPLES_A_CLUSTER = 64  # from which FAISS finds the clusters; its own 256 take four times as long


@dataclass
class Neighbours:
    """For each of Q samples its K nearest of the same class and its M nearest of other classes, the nearest first.

    Attributes:
        rows: (Q,) whose neighbours they are.
        positives: (Q, K) of the same class; -1 where there are fewer.
        positive_similarities: (Q, K) cosines, -inf where there is none.
        negatives: (Q, M) of other classes.
        negative_similarities: (Q, M).
    """

    rows: Tensor
    positives: Tensor
    positive_similarities: Tensor
    negatives: Tensor
    negative_similarities: Tensor


def check_index(index: str) -> None:
    """Refuse an unknown way of retrieval, or one whose package is not there."""
    if index not in INDEXES:
        raise ValueError(f"index must be one of {', '.join(INDEXES)}, got {index!r}")
    if index == "faiss" and importlib.util.find_spec("faiss") is None:
        raise ValueError('index="faiss" needs FAISS: pip install "hfkd[retrieval]", or use index="exact"')


def find_neighbours(
    features: Tensor,
    labels: Tensor,
    *,
    positives: int = 8,
    negatives: int = 64,
    rows: Tensor | None = None,
    index: str = "exact",
    block_bytes: int = _BLOCK_BYTES,
) -> Neighbours:
    """Retrieve the nearest samples of the same class and of other classes, by cosine similarity.

    A sample is never its own neighbour. One without a label is nobody's neighbour and has none. Of equally similar
    samples those in lower rows come first. Similarities are computed block by block, on the features' device: N x N
    is never stored.

    Args:
        features: One vector a sample, of any length.
        labels: Class indices, -100 for none.
        positives: K, how many of the same class.
        negatives: M, how many of other classes.
        rows: Whose neighbours to find; of all samples by default.
        index: ``"exact"``, or ``"faiss"``: the same by FAISS on the CPU, exact up to 262,144 labelled samples (but for
            the order of ties) and beyond them approximate, by clusters.
        block_bytes: Memory for one block of similarities.

    Shapes:
        features (N, D), labels (N,), rows (Q,). The result has (Q, K) and (Q, M) row numbers and similarities.

    Raises:
        ValueError: If the index is unknown or FAISS is not installed.

    >>> features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]])
    >>> found = find_neighbours(features, torch.tensor([0, 0, 1, 2]), positives=1, negatives=2)
    >>> found.positives.tolist(), found.negatives.tolist()
    ([[1], [0], [-1], [-1]], [[2, 3], [2, 3], [1, 0], [2, 1]])
    """
    check_index(index)
    unit = F.normalize(features, dim=1)
    rows = torch.arange(len(unit), device=unit.device) if rows is None else rows
    found = Neighbours(rows, *_nothing(unit, len(rows), positives), *_nothing(unit, len(rows), negatives))
    candidates = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    bank = unit if len(candidates) == len(unit) else unit[candidates]  # no copy where all have labels
    question = _Question(unit, bank, labels, rows, candidates, positives, negatives)
    searched = _exact(question, block_bytes) if index == "exact" else _with_faiss(question)
    for places, same, other in searched:
        for (scores, neighbours), size, target, similarities in (
            (same, positives, found.positives, found.positive_similarities),
            (other, negatives, found.negatives, found.negative_similarities),
        ):
            width = min(size, scores.shape[1])
            similarities[places, :width] = scores[:, :width].to(similarities)
            target[places, :width] = neighbours[:, :width].masked_fill(scores[:, :width] == -torch.inf, MISSING)
    return found


def _nothing(features: Tensor, size: int, width: int) -> tuple[Tensor, Tensor]:
    rows = torch.full((size, width), MISSING, device=features.device)
    return rows, torch.full((size, width), -torch.inf, dtype=features.dtype, device=features.device)


# Scores and rows of the candidates that were found, the best first; -inf is none.
_Found = tuple[Tensor, Tensor]


@dataclass
class _Question:
    """Vectors of length 1 of all samples and of the ``candidates`` among them, and whose neighbours are wanted."""

    unit: Tensor
    bank: Tensor
    labels: Tensor
    rows: Tensor
    candidates: Tensor
    positives: int
    negatives: int

    def by_class(self) -> Iterator[tuple[Tensor, Tensor]]:
        """For each class the places of its samples in ``rows`` and those of its members in ``candidates``."""
        asked, members = self.labels[self.rows], self.labels[self.candidates]
        for label in asked[asked != IGNORE_INDEX].unique():
            yield (asked == label).nonzero().squeeze(1), (members == label).nonzero().squeeze(1)


def _exact(question: _Question, block_bytes: int) -> Iterator[tuple[Tensor, _Found, _Found]]:
    unit, bank, rows, candidates = question.unit, question.bank, question.rows, question.candidates
    block = max(1, block_bytes // max(1, len(bank) * bank.element_size()))
    for of_class, members in question.by_class():
        for places in of_class.split(block):
            scores = unit[rows[places]] @ bank.T
            same = scores[:, members].masked_fill_(candidates[members] == rows[places, None], -torch.inf)
            best, chosen = _largest(same, question.positives)
            scores.index_fill_(1, members, -torch.inf)
            others, rest = _largest(scores, question.negatives)
            yield places, (best, candidates[members][chosen]), (others, candidates[rest])


def _largest(scores: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The largest scores of each row and their columns; of equal ones the first columns, which topk leaves open."""
    size = min(size, scores.shape[1])
    best, columns = scores.topk(min(size + 1, scores.shape[1]))
    if best.shape[1] > size > 0:
        cut = ((best[:, -1] == best[:, -2]) & (best[:, -1] > -torch.inf)).nonzero().squeeze(1)
        best, columns = best[:, :size], columns[:, :size]
        if len(cut):  # the border runs through a tie
            tied, border = scores[cut], best[cut, -1:]
            above, equal = tied > border, tied == border
            chosen = above | (equal & (equal.cumsum(1) <= size - above.sum(1, keepdim=True)))
            columns[cut] = chosen.nonzero()[:, 1].view(-1, size)
            best[cut] = tied.gather(1, columns[cut])
    columns, order = columns.sort(dim=1)
    best, again = best.gather(1, order).sort(dim=1, descending=True, stable=True)
    return best, columns.gather(1, again)


def _with_faiss(question: _Question) -> Iterator[tuple[Tensor, _Found, _Found]]:
    import faiss

    unit, rows, candidates = question.unit, question.rows, question.candidates

    def build(vectors):
        size, width = vectors.shape
        flat = faiss.IndexFlatIP(width)
        if size <= _LARGEST_FLAT:
            flat.add(vectors)
            return flat, faiss.SearchParameters
        clusters = int(4 * size**0.5)
        inverted = faiss.IndexIVFFlat(flat, width, clusters, faiss.METRIC_INNER_PRODUCT)
        inverted.cp.max_points_per_centroid = _SAMPLES_A_CLUSTER
        inverted.train(vectors)
        inverted.add(vectors)
        return inverted, lambda **options: faiss.SearchParametersIVF(nprobe=min(_PROBED, clusters), **options)

    vectors, bank = (tensor.float().cpu().numpy() for tensor in (unit, question.bank))
    everything, parameters = build(bank)

    def search(index, queries, size, **options):
        scores, found = (torch.from_numpy(part) for part in index.search(queries, size, **options))
        return scores.masked_fill(found < 0, -torch.inf).to(unit), found.clamp(min=0).to(rows)

    for places, members in question.by_class():
        queries = vectors[rows[places].cpu().numpy()]
        class_index, class_parameters = build(bank[members.cpu().numpy()])
        width = min(question.positives + 1, len(members))
        same, found = search(class_index, queries, width, params=class_parameters())
        found = candidates[members][found]
        same = same.masked_fill(found == rows[places, None], -torch.inf)
        order = same.argsort(dim=1, descending=True, stable=True)
        own = faiss.IDSelectorBatch(members.cpu().numpy())
        options = {"params": parameters(sel=faiss.IDSelectorNot(own))}
        others, rest = search(everything, queries, question.negatives, **options)
        yield places, (same.gather(1, order), found.gather(1, order)), (others, candidates[rest])


def aggregate_context(neighbour_logits: Tensor, similarities: Tensor, *, temperature: float = 0.1) -> Tensor:
    r"""Average the logits of neighbours, the more similar ones counting more.

    .. math:: \bar z_i = \sum_j a_j z_j, \qquad a = \mathrm{softmax}(s / \tau_r)

    Args:
        neighbour_logits: Unnormalised scores of each sample's neighbours.
        similarities: Cosines of their features with the sample's; -inf where there is no neighbour.
        temperature: τ_r; towards 0 the nearest neighbour counts alone, towards infinity all alike.

    Shapes:
        ``neighbour_logits``: (B, K, C), similarities: (B, K). Returns (B, C); 0 for a sample without neighbours.

    >>> aggregate_context(torch.tensor([[[2.0, 0.0], [0.0, 4.0]]]), torch.zeros(1, 2)).tolist()
    [[1.0, 2.0]]
    """
    weights = (similarities / temperature).softmax(-1).nan_to_num(0.0)  # NaN: nobody to weigh
    return torch.einsum("bk,bkc->bc", weights, neighbour_logits)


@dataclass
class Context:
    """What a bank knows about the samples of a batch.

    Attributes:
        positive_logits: (B, C) average of the neighbours of the same class.
        has_positives: (B,) whether there is any.
        negative_logits: (B, M, C) of the neighbours of other classes.
        has_negatives: (B, M) which of them there are.
    """

    positive_logits: Tensor
    has_positives: Tensor
    negative_logits: Tensor
    has_negatives: Tensor


class MemoryBank(nn.Module):
    """Logits of every training sample, and who is whose neighbour.

    Rows are in the order of the samples' ``index``, whatever the order in which they came. Until it is filled nobody
    has neighbours. Features are not kept: a step needs logits and row numbers alone, so it gathers K + M rows of
    logits for each sample of the batch. The averages of neighbours are not kept either, since they would take as much
    as the logits themselves (5 GB each for ImageNet) to save K of those K + M rows. That makes N (4 C + 8 K + 6 M + 8)
    bytes, here and in each checkpoint: 25 MB for 50,000 samples of 10 classes with K = 8 and M = 64.
    They must fit in the memory of the device.

    Args:
        size: N, number of training samples.
        classes: C.
        neighbours: K, how many of the same class.
        negatives: M, how many of other classes.
        dtype: Of the logits.
    """

    def __init__(self, size: int, classes: int, neighbours: int, negatives: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.register_buffer("sample_index", torch.arange(size))
        self.register_buffer("logits", torch.zeros(size, classes, dtype=dtype))
        self.register_buffer("positives", torch.full((size, neighbours), MISSING, dtype=torch.int32))
        self.register_buffer("positive_similarities", torch.full((size, neighbours), -torch.inf, dtype=dtype))
        self.register_buffer("negatives", torch.full((size, negatives), MISSING, dtype=torch.int32))
        # To be shown, not to be computed with.
        self.register_buffer("negative_similarities", torch.full((size, negatives), -torch.inf, dtype=torch.float16))

    @property
    def is_filled(self) -> bool:
        """Whether somebody has neighbours."""
        return bool((self.positives != MISSING).any())

    def check(self, sample_index: Tensor) -> None:
        """Refuse the content of a file that is no bank of these samples.

        Args:
            sample_index: Their ``index``, of shape (N,), in any order.

        Raises:
            ValueError: If it is about other samples, names rows that there are not, or holds what is no number.
        """
        if self.is_filled and not torch.equal(self.sample_index, sample_index.sort().values.to(self.sample_index)):
            raise ValueError("its bank is about samples of another index")
        for name in ("positives", "negatives"):
            rows = getattr(self, name)
            if ((rows < MISSING) | (rows >= len(self.logits))).any():
                raise ValueError(f"its bank has {name} that are none of its {len(self.logits)} rows")
        if not self.logits.isfinite().all() or self.positive_similarities.isnan().any():
            raise ValueError("its bank has logits or similarities that are no numbers")

    def clear(self) -> None:
        """Forget all neighbours."""
        self.positives.fill_(MISSING)
        self.negatives.fill_(MISSING)

    def fill(
        self,
        samples: dict[str, Tensor],
        *,
        index: str = "exact",
        gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        """Write logits and find neighbours anew.

        Each process finds those of its own samples; all then write the same.

        Args:
            samples: ``index``, ``features``, ``logits`` and ``labels`` of this process's samples.
            index: See :func:`find_neighbours`.
            gather: Puts together what all processes have.

        Raises:
            ValueError: If the samples are not N different ones, or none has a neighbour.
        """
        own = samples["index"]
        samples = {name: gather(column) for name, column in samples.items()}
        sample_index, order = samples["index"].sort()
        if len(sample_index) != len(self.sample_index) or (sample_index[1:] == sample_index[:-1]).any():
            raise ValueError(
                f"the training set shows {len(sample_index.unique())} different numbers in its column index and has "
                f"{len(self.sample_index)} rows: give every row a number of its own"
            )
        found = find_neighbours(
            samples["features"][order],
            samples["labels"][order],
            positives=self.positives.shape[1],
            negatives=self.negatives.shape[1],
            rows=torch.searchsorted(sample_index, own),
            index=index,
        )
        rows = gather(found.rows)
        self.sample_index.copy_(sample_index)
        self.logits.copy_(samples["logits"][order])
        for name in ("positives", "positive_similarities", "negatives", "negative_similarities"):
            buffer = getattr(self, name)
            buffer[rows] = gather(getattr(found, name)).to(buffer.dtype)
        if not self.is_filled:
            raise ValueError(
                "no training sample has another one of its class: context needs labels, at least two samples a "
                "class. Use KD(), which needs none"
            )

    def context(self, index: Tensor, *, temperature: float) -> Context:
        """What the bank knows about samples, by their ``index``; see :func:`aggregate_context`."""
        rows, known = self._rows(index)
        positives, negatives = self.positives[rows].long(), self.negatives[rows].long()
        similarities = self.positive_similarities[rows]
        neighbour_logits = self.logits[positives.clamp(min=0)]
        return Context(
            aggregate_context(neighbour_logits, similarities, temperature=temperature),
            (positives != MISSING).any(1) & known,
            self.logits[negatives.clamp(min=0)],
            (negatives != MISSING) & known[:, None],
        )

    def _rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of samples, and which of them the bank knows: none before it is filled."""
        rows = torch.searchsorted(self.sample_index, index).clamp(max=len(self.sample_index) - 1)
        return rows, self.sample_index[rows] == index

    def retrieved(self, index: Tensor) -> Neighbours:
        """The neighbours of samples; these and those by their ``index``, to be shown.

        Raises:
            ValueError: If one of them is no training sample.
        """
        rows, known = self._rows(index)
        if not known.all():
            raise ValueError(
                f"the bank has no sample {index[~known].tolist()[:5]}: pass numbers of the training set's column index"
            )
        neighbours = {
            name: torch.where(found == MISSING, MISSING, self.sample_index[found.clamp(min=0)])
            for name in ("positives", "negatives")
            for found in [getattr(self, name)[rows].long()]
        }
        similarities = {
            f"{side}_similarities": getattr(self, f"{side}_similarities")[rows] for side in ("positive", "negative")
        }
        return Neighbours(index, **neighbours, **similarities)
