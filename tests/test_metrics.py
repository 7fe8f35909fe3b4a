import itertools
import math

import evaluate
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from datasets import Dataset
from transformers import EvalPrediction

from hfkd.data import TaskData
from hfkd.evaluations import Answers, Evaluations
from hfkd.metrics import (
    agreement,
    compactness,
    compute_metrics,
    expected_calibration_error,
    load_metric,
    main_metric,
    mean_entropy,
    reliability,
    separability,
)


def confusion(predicted, labels):
    pairs = list(zip(predicted.tolist(), labels.tolist(), strict=True))
    return [pairs.count(pair) for pair in ((1, 1), (1, 0), (0, 1), (0, 0))]


@pytest.fixture
def binary():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    return rng.normal(size=(200, 2)) + 1.5 * np.eye(2)[labels], labels


@pytest.mark.parametrize(
    ("task", "names", "main"),
    [
        ("cola", {"matthews_correlation"}, "matthews_correlation"),
        ("mrpc", {"accuracy", "f1"}, "f1"),
        ("qqp", {"accuracy", "f1"}, "f1"),
        ("ax", {"matthews_correlation"}, "matthews_correlation"),
        *((task, {"accuracy"}, "accuracy") for task in ("sst2", "mnli", "mnli-mm", "qnli", "rte", "wnli", "cifar10")),
    ],
)
def test_classification(task, names, main, binary):
    logits, labels = binary
    result = compute_metrics(task)(EvalPrediction(logits, labels))
    assert set(result) == names
    assert main_metric(task) == main
    assert main in names
    predicted = logits.argmax(1)
    tp, fp, fn, tn = confusion(predicted, labels)
    reference = {
        "accuracy": (tp + tn) / 200,
        "f1": 2 * tp / (2 * tp + fp + fn),
        "matthews_correlation": (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)),
    }
    assert result == pytest.approx({name: reference[name] for name in names})
    if main == "matthews_correlation":
        assert result[main] == pytest.approx(sklearn.metrics.matthews_corrcoef(labels, predicted))


def test_regression():
    rng = np.random.default_rng(0)
    labels = rng.uniform(0, 5, 100).astype(np.float32)
    scores = (labels + rng.normal(size=100)).astype(np.float32)
    result = compute_metrics("stsb")(EvalPrediction(scores[:, None], labels))
    pearson, spearman = scipy.stats.pearsonr(scores, labels)[0], scipy.stats.spearmanr(scores, labels)[0]
    expected = {"pearson": pearson, "spearmanr": spearman, "combined_score": (pearson + spearman) / 2}
    assert result == pytest.approx(expected, abs=1e-6)
    assert main_metric("stsb") == "pearson"
    assert np.corrcoef(scores, labels)[0, 1] == pytest.approx(result["pearson"], abs=1e-6)


def test_metrics_are_evaluates_and_need_no_network(monkeypatch, binary):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("went to the network"))
    metric = load_metric("mrpc")
    assert isinstance(metric, evaluate.Metric)
    logits, labels = binary
    whole = metric.compute(predictions=logits.argmax(1), references=labels)
    # In batches, as evaluate's users do; the object serves again and again.
    for start in range(0, 200, 50):
        metric.add_batch(predictions=logits[start : start + 50].argmax(1), references=labels[start : start + 50])
    assert metric.compute() == whole
    combined = evaluate.combine([load_metric("sst2"), load_metric("cola")])
    assert set(combined.compute(predictions=[0, 1], references=[0, 1])) == {"accuracy", "matthews_correlation"}


@pytest.mark.parametrize("missing", [-100, -1])
def test_samples_without_a_label_are_left_out(missing, binary):
    logits, labels = binary
    expected = compute_metrics("mrpc")(EvalPrediction(logits[50:], labels[50:]))
    labels[:50] = missing
    assert compute_metrics("mrpc")(EvalPrediction(logits, labels)) == expected
    assert compute_metrics("mrpc")(EvalPrediction((logits, "hidden states"), labels)) == expected
    assert compute_metrics("mrpc")(EvalPrediction(logits, np.full(200, missing))) == {}


def test_constant_predictions_score_zero_not_nan(recwarn):
    labels = np.array([0, 1, 1, 0])
    constant = np.tile([1.0, 0.0], (4, 1))
    assert compute_metrics("cola")(EvalPrediction(constant, labels)) == {"matthews_correlation": 0.0}
    assert compute_metrics("mrpc")(EvalPrediction(constant, labels)) == {"accuracy": 0.5, "f1": 0.0}
    zero = {"pearson": 0.0, "spearmanr": 0.0, "combined_score": 0.0}
    scores = np.arange(4, dtype=np.float32)
    assert compute_metrics("stsb")(EvalPrediction(np.full((4, 1), 2.5), scores)) == zero
    assert compute_metrics("stsb")(EvalPrediction(scores[:, None], np.full(4, 2.5))) == zero
    assert not [warning for warning in recwarn if "constant" in str(warning.message)]


def test_diverged_scores_are_nan():
    scores = np.array([[np.nan], [1.0], [2.0]])
    assert np.isnan(compute_metrics("stsb")(EvalPrediction(scores, np.array([1.0, 2.0, 3.0])))["pearson"])


def test_own_regression_is_known_by_its_data():
    split = Dataset.from_dict({"label": np.array([-1.0, 0.0, 1.0], dtype=np.float32)})
    data = TaskData(train=split, validation=split, test=None, task="mine", label_names=None)
    assert main_metric(data) == "pearson"
    scores, labels = np.array([[-2.0], [0.1], [0.3]]), np.array([-1.0, 0.0, 1.0])
    result = compute_metrics(data)(EvalPrediction(scores, labels))
    # -1 is a value here.
    assert result["pearson"] == pytest.approx(scipy.stats.pearsonr(scores[:, 0], labels)[0])


def geometry(features, labels):
    """Loops over samples, classes and coordinates."""
    rows = [[value / math.hypot(*row) for value in row] for row, y in zip(features, labels, strict=True) if y != -100]
    labels = [y for y in labels if y != -100]
    centroids = {}
    for c in sorted(set(labels)):
        members = [row for row, y in zip(rows, labels, strict=True) if y == c]
        centroid = [math.fsum(column) / len(members) for column in zip(*members, strict=True)]
        centroids[c] = [value / math.hypot(*centroid) for value in centroid]
    cosine = lambda a, b: math.fsum(x * y for x, y in zip(a, b, strict=True))  # noqa: E731
    within = [1 - cosine(row, centroids[y]) for row, y in zip(rows, labels, strict=True)]
    between = [1 - cosine(a, b) for a, b in itertools.combinations(centroids.values(), 2)]
    return math.fsum(within) / len(within), math.fsum(between) / len(between)


@pytest.mark.parametrize("as_tensor", [True, False])
def test_compactness_and_separability_are_their_definitions(as_tensor):
    generator = np.random.default_rng(0)
    features, labels = generator.normal(size=(30, 4)) * 5, generator.integers(0, 4, 30)
    labels[::7] = -100
    expected = geometry(features.tolist(), labels.tolist())
    if as_tensor:
        features, labels = torch.from_numpy(features), torch.from_numpy(labels)
    assert compactness(features, labels) == pytest.approx(expected[0], abs=1e-12)
    assert separability(features, labels) == pytest.approx(expected[1], abs=1e-12)


def test_tight_and_opposite_classes_are_compact_and_separate():
    features = [[1.0, 0.0], [5.0, 0.0], [-2.0, 0.0]]
    assert compactness(features, [0, 0, 1]) == 0.0
    assert separability(features, [0, 0, 1]) == 2.0
    assert compactness(features, [0, 1, 0]) > 0.5
    assert compactness([[0.0, 0.0], [1.0, 0.0]], [0, 0]) == 0.5  # no direction is a distance of 1


def test_geometry_needs_classes():
    with pytest.raises(ValueError, match="no sample has a label"):
        compactness([[1.0]], [-100])
    with pytest.raises(ValueError, match="at least two classes"):
        separability([[1.0], [2.0]], [3, 3])


def test_compactness_takes_what_lies_on_an_accelerator():
    class Elsewhere(torch.Tensor):
        """On a device without numbers, which refuses numpy as a GPU does; a copy to the CPU has them."""

        @staticmethod
        def __new__(cls, here):
            return torch.Tensor._make_wrapper_subclass(cls, here.shape, dtype=here.dtype, device="meta")

        def __init__(self, here):
            self.here = here

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            return function(args[0].here, *args[1:], **(kwargs or {}))

    features = Elsewhere(torch.tensor([[1.0, 0.0], [2.0, 0.0], [-3.0, 0.0]]))
    labels = Elsewhere(torch.tensor([0, 0, 1]))
    assert compactness(features, labels) == 0.0
    assert separability(features, labels) == 2.0


def bins_by_loop(logits, labels, bins):
    """Confidence, correctness and bin of every sample, one at a time and by the definition of a bin."""
    found = [[] for _ in range(bins)]
    for row, label in zip(logits, labels, strict=True):
        if label == -100:
            continue
        powers = [math.exp(value - max(row)) for value in row]
        confidence = max(powers) / sum(powers)
        (place,) = (b for b in range(bins) if b / bins < confidence <= (b + 1) / bins)
        found[place].append((confidence, float(np.argmax(row) == label)))
    return found


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_calibration_by_loops(bins):
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(scale=2, size=(300, 5)), rng.integers(0, 5, 300)
    labels[::7] = -100
    expected = bins_by_loop(logits, labels, bins)
    samples, confidence, accuracy = reliability(logits, labels, bins=bins)
    assert samples.tolist() == [len(found) for found in expected]
    means = [
        [sum(column) / len(column) for column in zip(*found, strict=True)] if found else [0, 0] for found in expected
    ]
    np.testing.assert_allclose(np.stack([confidence, accuracy], 1), means, rtol=1e-12, atol=1e-15)
    total = sum(map(len, expected))
    error = sum(abs(sum(right - sure for sure, right in found)) for found in expected) / total
    assert expected_calibration_error(logits, labels, bins=bins) == pytest.approx(error, rel=1e-12)


def test_calibration_of_who_knows_and_who_boasts():
    right, sure = np.array([0, 1, 2]), 50 * np.eye(3)
    assert expected_calibration_error(sure, right) < 1e-12
    assert expected_calibration_error(sure, [1, 2, 0]) == pytest.approx(1)
    # Three samples of four right at 3/4 each: one bin, calibrated; single precision must not lose it.
    logits = np.tile(np.log(np.array([[0.75, 0.25]])), (4, 1)).astype(np.float32)
    assert expected_calibration_error(logits, [0, 0, 0, 1]) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(
    ("logits", "labels", "options", "message"),
    [
        (np.zeros((3, 1)), np.zeros(3), {}, r"at least 2 classes .* got \(3, 1\) and \(3,\)"),
        (np.zeros((3, 2)), np.zeros(4), {}, r"got \(3, 2\) and \(4,\)"),
        (np.full((1, 2), np.nan), [0], {}, "NaN or infinite"),
        (np.zeros((1, 2)), [-100], {}, "no sample has a label"),
        (np.zeros((1, 2)), [0], {"bins": 0}, "bins must be positive, got 0"),
    ],
)
def test_calibration_that_cannot_be_measured_is_refused(logits, labels, options, message):
    with pytest.raises(ValueError, match=message):
        expected_calibration_error(logits, labels, **options)


def test_entropy():
    logits = np.random.default_rng(3).normal(size=(40, 5)) * 3
    total = 0.0
    for row in logits.tolist():
        odds = [math.exp(value) for value in row]
        total -= sum(o / sum(odds) * math.log(o / sum(odds)) for o in odds)
    assert mean_entropy(logits) == pytest.approx(total / 40, rel=1e-12, abs=0)
    assert mean_entropy(logits) == pytest.approx(scipy.stats.entropy(np.exp(logits), axis=1).mean(), rel=1e-12, abs=0)
    assert mean_entropy(logits + 700) == pytest.approx(total / 40, rel=1e-9, abs=0)
    assert mean_entropy(np.ones((3, 7))) == pytest.approx(math.log(7), rel=1e-12, abs=0)
    assert mean_entropy([[2000.0, 0.0]]) == 0


@pytest.mark.parametrize(
    ("logits", "message"),
    [(np.zeros((2, 1)), "a regression has none"), (np.zeros((0, 2)), "got"), ([[np.nan, 0.0]], "diverged")],
)
def test_entropy_that_cannot_be_measured_is_refused(logits, message):
    with pytest.raises(ValueError, match=message):
        mean_entropy(logits)


def test_figures_of_answers_are_about_the_samples_that_both_models_saw():
    dataset, labels = [0, 1, 2, 3], np.array([0, 0, 1, 1])
    student, teacher = np.random.default_rng(4).normal(size=(2, 4, 3))
    kept = Evaluations()
    assert kept.figures("test") == {}
    kept.student["test"] = Answers(dataset, None, student, labels)
    assert kept.figures("test") == {"test_entropy": mean_entropy(student)}
    assert kept.figures("eval") == {}
    kept.keep_teacher(Answers(dataset, [1, 3], teacher[[1, 3]], labels[[1, 3]]))
    assert kept.figures("test")["test_agreement"] == agreement(student[[1, 3]], teacher[[1, 3]])
    kept.keep_teacher(Answers(dataset, None, teacher, labels))
    both = {"test_entropy": mean_entropy(student), "test_agreement": agreement(student, teacher)}
    assert kept.figures("test") == both
    kept.student["test"] = Answers(dataset, None, student[:, :1], labels)
    kept.keep_teacher(Answers(dataset, None, teacher[:, :1], labels))
    assert kept.figures("test") == {"test_agreement": agreement(student[:, :1], teacher[:, :1])}
    kept.student["test"] = Answers(dataset, None, np.full((4, 3), np.nan), labels)
    assert kept.figures("test") == {}


def test_agreement():
    rng = np.random.default_rng(2)
    first, second = rng.normal(size=(2, 50, 4))
    same = [
        max(range(4), key=lambda c: a[c]) == max(range(4), key=lambda c: b[c])
        for a, b in zip(first, second, strict=True)
    ]
    assert agreement(first, second) == sum(same) / 50
    assert agreement(first, 3 * first - 1) == 1
    numbers = rng.normal(size=(2, 20, 1))
    assert agreement(*numbers) == pytest.approx(np.corrcoef(numbers[..., 0])[0, 1], rel=1e-12)
    assert agreement(numbers[0], np.ones((20, 1))) == 0


@pytest.mark.parametrize(
    ("second", "message"), [(np.zeros((2, 3)), r"got \(2, 2\) and \(2, 3\)"), (np.full((2, 2), np.inf), "infinite")]
)
def test_agreement_that_cannot_be_measured_is_refused(second, message):
    with pytest.raises(ValueError, match=message):
        agreement(np.zeros((2, 2)), second)
