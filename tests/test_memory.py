"""Retrieval against loops over all pairs, and a bank that is addressed by the samples' numbers."""

import math

import pytest
import torch

import hfkd.memory
from hfkd.memory import MISSING, MemoryBank, aggregate_context, find_neighbours


GOLDEN_FEATURES = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
GOLDEN_LOGITS = torch.tensor(
    [[2.0, 1.0, 0.0, -1.0], [1.5, 0.5, 0.2, -0.5], [0.0, 2.0, 0.5, -1.0], [-1.0, 0.0, 2.0, 1.0]], dtype=torch.float64
)
GOLDEN_LABELS = torch.tensor([0, 0, 1, 2])


def samples(size=60, width=5, classes=4, *, seed=0):
    """Vectors of any length with labels, some of them missing; the last class has a single member."""
    generator = torch.Generator().manual_seed(seed)
    features = 3 * torch.randn(size, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (size,), generator=generator)
    labels[::9] = -100
    labels[size // 2] = classes
    return features, labels


def cosine(one, other):
    dot = math.fsum(a * b for a, b in zip(one, other, strict=True))
    return dot / math.hypot(*one) / math.hypot(*other)


def brute_force(features, labels, positives, negatives):
    features, labels = features.tolist(), labels.tolist()
    found = []
    for i, label in enumerate(labels):
        others = [j for j in range(len(labels)) if j != i and labels[j] != -100 and label != -100]
        others.sort(key=lambda j: (-cosine(features[i], features[j]), j))
        same = [j for j in others if labels[j] == label][:positives]
        other = [j for j in others if labels[j] != label][:negatives]
        pad = lambda rows, size: rows + [MISSING] * (size - len(rows))  # noqa: E731
        found.append((pad(same, positives), pad(other, negatives)))
    return [list(side) for side in zip(*found, strict=True)]


def both(found):
    return [found.positives.tolist(), found.negatives.tolist()]


@pytest.mark.parametrize("index", ["exact", "faiss"])
@pytest.mark.parametrize("sizes", [(3, 6), (1, 1), (30, 70)])  # the last more than there are
def test_it_finds_what_a_loop_over_all_pairs_finds(index, sizes):
    features, labels = samples()
    positives, negatives = sizes
    found = find_neighbours(features, labels, positives=positives, negatives=negatives, index=index)
    assert both(found) == brute_force(features, labels, positives, negatives)
    for i in range(len(labels)):
        for rows, similarities in (
            (found.positives, found.positive_similarities),
            (found.negatives, found.negative_similarities),
        ):
            for row, similarity in zip(rows[i].tolist(), similarities[i].tolist(), strict=True):
                expected = -math.inf if row == MISSING else cosine(features[i].tolist(), features[row].tolist())
                assert similarity == pytest.approx(expected, abs=1e-12 if index == "exact" else 1e-6)


@pytest.mark.parametrize("block_bytes", [1, 1000, 10**6])
def test_blocks_of_any_size_find_the_same(block_bytes):
    features, labels = samples()
    sizes = {"positives": 4, "negatives": 9}
    assert both(find_neighbours(features, labels, block_bytes=block_bytes, **sizes)) == brute_force(
        features, labels, 4, 9
    )


def test_never_itself_never_the_wrong_class_never_an_unlabelled_sample():
    features, labels = samples(200)
    features[7] = features[8]  # a twin is no self
    found = find_neighbours(features, labels, positives=10, negatives=20)
    for i, (same, other) in enumerate(zip(*both(found), strict=True)):
        assert i not in same + other
        assert all(labels[j] == labels[i] for j in same if j != MISSING)
        assert all(labels[j] not in (labels[i], -100) for j in other if j != MISSING)
        assert (labels[i] == -100) == (other[0] == MISSING)
    assert (found.positives[labels == 4] == MISSING).all()  # the class with one member
    assert (found.negatives[labels == 4] != MISSING).all()


def test_some_rows_alone_find_what_they_find_among_all():
    features, labels = samples()
    whole, rows = find_neighbours(features, labels, positives=3, negatives=5), torch.tensor([41, 0, 30, 2, 17])
    some = find_neighbours(features, labels, positives=3, negatives=5, rows=rows)
    assert torch.equal(some.rows, rows)
    assert torch.equal(some.positives, whole.positives[rows])
    assert torch.equal(some.negatives, whole.negatives[rows])


def test_the_order_of_the_samples_does_not_matter():
    features, labels = samples()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    whole = find_neighbours(features, labels, positives=3, negatives=5)
    moved = find_neighbours(features[order], labels[order], positives=3, negatives=5)
    for name in ("positives", "negatives"):
        back = getattr(moved, name)
        back = torch.where(back == MISSING, MISSING, order[back.clamp(min=0)])
        assert torch.equal(back, getattr(whole, name)[order])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 7])
def test_of_equally_similar_samples_the_first_come_first(size):
    """Only four directions, so that the border always runs through a tie."""
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    features = directions[torch.randint(0, 4, (40,), generator=torch.Generator().manual_seed(2))]
    labels = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(3))
    found = find_neighbours(features, labels, positives=size, negatives=size)
    assert both(found) == brute_force(features, labels, size, size)


def test_beyond_a_size_faiss_looks_into_clusters(monkeypatch):
    monkeypatch.setattr(hfkd.memory, "_LARGEST_FLAT", 300)
    features, labels = samples(1000, 8)
    exact, clustered = (
        find_neighbours(features, labels, positives=5, negatives=10, index=index) for index in ("exact", "faiss")
    )
    labelled = labels != -100
    assert (exact.positives == clustered.positives)[labelled].float().mean() > 0.95
    shared = [
        len({*a} & {*b}) / 10 for a, b in zip(exact.negatives.tolist(), clustered.negatives.tolist(), strict=True)
    ]
    assert torch.tensor(shared)[labelled].mean() > 0.8
    everyone = clustered.negatives[labelled]
    assert (labels[everyone[everyone != MISSING]] != -100).all()
    assert (labels[everyone.clamp(min=0)] != labels[labelled, None])[everyone != MISSING].all()


def test_unknown_or_missing_ways_are_refused(monkeypatch):
    features, labels = samples()
    with pytest.raises(ValueError, match="index must be one of exact, faiss, got 'annoy'"):
        find_neighbours(features, labels, index="annoy")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "hfkd\[retrieval\]"'):
        find_neighbours(features, labels, index="faiss")


# Aggregation


def test_golden_weights_and_average():
    """The design's bank; here the query may find itself."""
    similarities = torch.tensor([[1.0, 0.8]], dtype=torch.float64)
    context = aggregate_context(GOLDEN_LOGITS[None, :2], similarities)
    assert context[0].tolist() == pytest.approx([1.94039854, 0.94039854, 0.02384058, -0.94039854], abs=1e-8)
    unit = torch.eye(2, dtype=torch.float64)[None]
    assert aggregate_context(unit, similarities)[0].tolist() == pytest.approx([0.88079708, 0.11920292], abs=1e-8)


def test_the_average_is_its_definition():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    similarities = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    similarities[1, 2] = similarities[2, :3] = -math.inf
    result = aggregate_context(logits, similarities, temperature=0.3)
    for i in range(3):
        exponents = [math.exp(s / 0.3) for s in similarities[i].tolist()]
        for c in range(5):
            expected = math.fsum(e * z for e, z in zip(exponents, logits[i, :, c].tolist(), strict=True))
            assert result[i, c].item() == pytest.approx(expected / math.fsum(exponents), abs=1e-12)


def test_a_cold_average_is_the_nearest_and_a_hot_one_the_mean():
    logits, similarities = GOLDEN_LOGITS[None, :3], torch.tensor([[0.4, 0.9, 0.7]], dtype=torch.float64)
    torch.testing.assert_close(aggregate_context(logits, similarities, temperature=1e-4), logits[:, 1])
    torch.testing.assert_close(
        aggregate_context(logits, similarities, temperature=1e9), logits.mean(1), rtol=0, atol=1e-8
    )


def test_nobody_to_average_is_zero():
    logits = torch.full((1, 2, 3), 1e4)
    assert aggregate_context(logits, torch.full((1, 2), -math.inf)).tolist() == [[0.0, 0.0, 0.0]]


# The bank


def filled(index, order=None, **options):
    """A bank of the golden samples under these numbers, written in this order."""
    columns = {"index": torch.tensor(index), "features": GOLDEN_FEATURES, "logits": GOLDEN_LOGITS}
    columns["labels"] = GOLDEN_LABELS
    order = torch.arange(4) if order is None else torch.tensor(order)
    bank = MemoryBank(4, 4, 2, 3, torch.float64)
    bank.fill({name: column[order] for name, column in columns.items()}, **options)
    return bank


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]])
@pytest.mark.parametrize("index", [[0, 1, 2, 3], [70, 5, 33, 9]])
def test_a_bank_answers_by_number_whatever_the_order(order, index):
    bank = filled(index, order)
    known = bank.context(torch.tensor([index[0], index[2]]), temperature=0.1)
    assert known.has_positives.tolist() == [True, False]
    torch.testing.assert_close(known.positive_logits[0], GOLDEN_LOGITS[1])
    assert known.has_negatives.tolist() == [[True, True, False], [True, True, True]]
    torch.testing.assert_close(known.negative_logits[0, :2], GOLDEN_LOGITS[[2, 3]])
    second = min(0, 3, key=lambda row: index[row])  # both at a right angle: the lower number
    torch.testing.assert_close(known.negative_logits[1, :2], GOLDEN_LOGITS[[1, second]])
    shown = bank.retrieved(torch.tensor([index[1], index[3]]))
    assert shown.rows.tolist() == [index[1], index[3]]
    assert shown.positives.tolist() == [[index[0], MISSING], [MISSING, MISSING]]
    assert shown.negatives[0].tolist() == [index[2], index[3], MISSING]
    assert shown.positive_similarities[0, 0].item() == pytest.approx(0.8)
    assert shown.negative_similarities[0, :2].tolist() == pytest.approx([0.6, -0.8], abs=1e-3)


def test_the_bank_does_not_depend_on_the_order_of_writing():
    one, other = filled([70, 5, 33, 9]), filled([70, 5, 33, 9], [3, 1, 0, 2])
    for name, buffer in one.state_dict().items():
        assert torch.equal(buffer, other.state_dict()[name]), name


def test_before_it_is_filled_nobody_has_neighbours():
    bank = MemoryBank(4, 3, 2, 3)
    known = bank.context(torch.arange(4), temperature=0.1)
    assert not bank.is_filled
    assert filled([0, 1, 2, 3]).is_filled
    assert not known.has_positives.any()
    assert not known.has_negatives.any()
    assert known.positive_logits.abs().sum() == 0
    known = bank.context(torch.tensor([1000, 2]), temperature=0.1)  # its numbers are not known yet
    assert not known.has_positives.any()


def test_a_sample_that_is_not_in_the_bank_has_no_context():
    bank = filled([70, 5, 33, 9])
    known = bank.context(torch.tensor([6, 71, 70]), temperature=0.1)
    assert known.has_positives.tolist() == [False, False, True]
    assert known.has_negatives.any(1).tolist() == [False, False, True]
    with pytest.raises(
        ValueError, match=r"the bank has no sample \[6, 71\]: pass numbers of the training set's column"
    ):
        bank.retrieved(torch.tensor([6, 70, 71]))


def test_it_takes_the_bytes_that_its_docstring_says():
    size, classes, neighbours, negatives = 50, 10, 8, 64
    bank = MemoryBank(size, classes, neighbours, negatives)
    taken = sum(buffer.numel() * buffer.element_size() for buffer in bank.state_dict().values())
    assert taken == size * (4 * classes + 8 * neighbours + 6 * negatives + 8)


def test_numbers_that_repeat_and_classes_of_one_are_refused():
    with pytest.raises(ValueError, match=r"3 different numbers in its column index and has 4 rows: give every row"):
        filled([0, 1, 1, 2])
    bank = MemoryBank(3, 4, 2, 3, torch.float64)
    columns = {"index": torch.arange(3), "features": GOLDEN_FEATURES[1:], "logits": GOLDEN_LOGITS[1:]}
    for labels in (GOLDEN_LABELS[1:], torch.full((3,), -100)):
        with pytest.raises(ValueError, match="no training sample has another one of its class.*Use KD"):
            bank.fill({**columns, "labels": labels})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("positives", 4, "positives that are none of its 4 rows"),
        ("negatives", -2, "negatives that are none of its 4 rows"),
        ("logits", torch.inf, "no numbers"),
        ("positive_similarities", torch.nan, "no numbers"),
    ],
)
def test_a_bank_that_is_none_is_refused(name, value, message):
    bank = MemoryBank(4, 3, 2, 2)
    bank.check(torch.arange(4))
    getattr(bank, name)[1, 1] = value
    with pytest.raises(ValueError, match=message):
        bank.check(torch.arange(4))


def test_a_bank_of_other_samples_is_refused():
    bank = MemoryBank(4, 4, 2, 2, torch.float64)
    bank.check(torch.arange(4) + 7)  # nothing is in it yet
    index = torch.tensor([9, 7, 8, 3])
    bank.fill({"index": index, "features": GOLDEN_FEATURES, "logits": GOLDEN_LOGITS, "labels": GOLDEN_LABELS})
    bank.check(index.flip(0))
    with pytest.raises(ValueError, match="samples of another index"):
        bank.check(torch.arange(4))
