"""The metric of each task, as ``evaluate.Metric`` objects that need no network."""

import warnings
from collections.abc import Callable

import evaluate
import numpy as np
import sklearn.metrics
import torch
from datasets import Features, Value
from scipy.special import log_softmax, softmax
from scipy.stats import ConstantInputWarning, pearsonr, spearmanr
from transformers import EvalPrediction

from hfkd.data.task_data import TaskData


class _Metric(evaluate.Metric):
    """What our metrics share: their inputs, and where their values come from."""

    inputs = "int64"
    description = ""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description="Args: predictions, references: one value a sample.",
            features=Features({"predictions": Value(self.inputs), "references": Value(self.inputs)}),
        )


class Accuracy(_Metric):
    """Share of correct classes."""

    description = "Share of correct classes."

    def _compute(self, predictions, references):
        return {"accuracy": float(sklearn.metrics.accuracy_score(references, predictions))}


class AccuracyAndF1(_Metric):
    """Accuracy, and F1 of class 1; F1 is 0 where no sample is or is called class 1."""

    description = "Accuracy, and F1 of class 1."

    def _compute(self, predictions, references):
        return {
            "accuracy": float(sklearn.metrics.accuracy_score(references, predictions)),
            "f1": float(sklearn.metrics.f1_score(references, predictions, zero_division=0)),
        }


class MatthewsCorrelation(_Metric):
    """Matthews' correlation coefficient; 0 for a constant prediction."""

    description = "Matthews' correlation coefficient."

    def _compute(self, predictions, references):
        return {"matthews_correlation": float(sklearn.metrics.matthews_corrcoef(references, predictions))}


class Correlation(_Metric):
    """Pearson and Spearman correlation and their mean; 0 for a constant prediction, NaN for one that holds NaN."""

    inputs = "float32"
    description = "Pearson and Spearman correlation and their mean."

    def _compute(self, predictions, references):
        predictions, references = np.asarray(predictions, np.float64), np.asarray(references, np.float64)
        if len(predictions) < 2 or np.ptp(predictions) == 0 or np.ptp(references) == 0:
            # Undefined; NaN would win or lose every comparison with the best checkpoint at random.
            pearson = spearman = 0.0
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConstantInputWarning)
                pearson = float(pearsonr(predictions, references)[0])
                spearman = float(spearmanr(predictions, references)[0])
        return {"pearson": pearson, "spearmanr": spearman, "combined_score": (pearson + spearman) / 2}


# The metrics that GLUE ranks by; a task that is not here has accuracy.
_METRICS: dict[str, tuple[type[_Metric], str]] = {
    "cola": (MatthewsCorrelation, "matthews_correlation"),
    "ax": (MatthewsCorrelation, "matthews_correlation"),
    "mrpc": (AccuracyAndF1, "f1"),
    "qqp": (AccuracyAndF1, "f1"),
    "stsb": (Correlation, "pearson"),
}


def _metric_of(task: str | TaskData) -> tuple[type[_Metric], str]:
    if isinstance(task, TaskData):
        task = "stsb" if task.is_regression else task.task
    return _METRICS.get(task, (Accuracy, "accuracy"))


def load_metric(task: str | TaskData) -> evaluate.Metric:
    """The metric of a task: ``evaluate.load`` without the network.

    Args:
        task: Name, or the data; regression of your own is known by the data alone and measured as STS-B.

    >>> load_metric("mrpc").compute(predictions=[1, 1, 0, 0], references=[1, 0, 0, 0])
    {'accuracy': 0.75, 'f1': 0.6666666666666666}
    """
    return _metric_of(task)[0](keep_in_memory=True)


def main_metric(task: str | TaskData) -> str:
    """The metric to choose by, such as for ``metric_for_best_model``.

    >>> main_metric("cola"), main_metric("cifar10")
    ('matthews_correlation', 'accuracy')
    """
    return _metric_of(task)[1]


def compute_metrics(task: str | TaskData) -> Callable[[EvalPrediction], dict[str, float]]:
    """A ``compute_metrics`` for a Trainer.

    Samples without a label (-100; for a bare name also GLUE's -1) are left out; if none has one, as in a split that
    is only predicted, the result is empty.

    Args:
        task: As for :func:`load_metric`.
    """
    metric = load_metric(task)
    # Our loaders leave only -100, so that -1 may be a value of a regression.
    unlabelled = [-100] if isinstance(task, TaskData) else [-100, -1]

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions
        logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits)
        labels = np.asarray(prediction.label_ids)
        if isinstance(metric, Correlation):
            predicted, labels = logits.reshape(len(logits)), labels.reshape(len(labels))
        else:
            predicted = logits.argmax(-1)
        labelled = ~np.isin(labels, unlabelled)
        if not labelled.any():
            return {}
        return metric.compute(predictions=predicted[labelled], references=labels[labelled])

    return compute


def compactness(features, labels) -> float:
    r"""How far the samples of a class lie from its centroid; small is compact.

    .. math:: \frac{1}{N} \sum_i \left(1 - \cos(f_i, \mu_{y_i})\right)

    with :math:`\mu_c` the mean of the l2-normalised features of class c.

    Args:
        features: (N, D), any array or tensor without gradient, such as from :func:`hfkd.features.dataset_features`.
        labels: (N,) class indices; samples with -100 are left out.

    Returns:
        A number in [0, 2].

    Raises:
        ValueError: If no sample has a label.

    >>> compactness([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]], [0, 0, 1])
    0.0
    """
    unit, classes, centroids = _classes(features, labels)
    return float(np.mean(1 - np.sum(unit * centroids[classes], axis=1)))


def separability(features, labels) -> float:
    r"""How far the classes lie from each other; large is separate.

    .. math:: \frac{2}{C (C - 1)} \sum_{c < d} \left(1 - \cos(\mu_c, \mu_d)\right)

    with :math:`\mu_c` as in :func:`compactness`. ``separability(…) / compactness(…)`` puts the distance between
    classes in units of the distance within them: a larger ratio is a clearer structure.

    Args:
        features: (N, D), any array or tensor without gradient.
        labels: (N,) class indices; samples with -100 are left out.

    Returns:
        A number in [0, 2].

    Raises:
        ValueError: If fewer than two classes have samples.

    >>> separability([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]], [0, 0, 1])
    1.0
    """
    _, _, centroids = _classes(features, labels)
    if len(centroids) < 2:
        raise ValueError("separability is about at least two classes, and the samples have one label")
    first, second = np.triu_indices(len(centroids), 1)
    return float(np.mean(1 - (centroids @ centroids.T)[first, second]))


def _classes(features, labels) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit features of the labelled samples, the place of each one's class among the centroids, and unit centroids."""
    features = torch.as_tensor(features, dtype=torch.float64, device="cpu").numpy()
    labels = torch.as_tensor(labels, device="cpu").numpy()
    labelled = labels != -100
    if not labelled.any():
        raise ValueError("no sample has a label: these figures compare classes")
    unit = _unit(features[labelled])
    names, classes = np.unique(labels[labelled], return_inverse=True)
    return unit, classes, _unit(np.stack([unit[classes == c].mean(0) for c in range(len(names))]))


def _unit(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)


def reliability(logits, labels, *, bins: int = 15) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How often a model is right where it is so sure of its answer: what a reliability diagram shows.

    Confidence is the largest probability. Bin b of M holds the samples whose confidence lies in ((b - 1) / M, b / M].

    Args:
        logits: (N, C) unnormalised scores, C at least 2.
        labels: (N,) class indices; samples with -100 are left out.
        bins: How many, of equal width.

    Returns:
        Samples, mean confidence and accuracy of each bin, (M,) each; an empty bin has 0 of all three.

    Raises:
        ValueError: If the shapes do not fit, a score is not finite, no sample has a label, or there is no bin.

    >>> samples, confidence, accuracy = reliability([[0.0, 0.0], [9.0, 0.0]], [1, 0], bins=2)
    >>> samples.tolist(), accuracy.tolist()
    ([1, 1], [0.0, 1.0])
    """
    if bins < 1:
        raise ValueError(f"bins must be positive, got {bins}: 15 is usual")
    logits, labels = _scores(logits), np.asarray(labels)
    if logits.ndim != 2 or logits.shape[1] < 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"calibration is about logits (N, C) of at least 2 classes and labels (N,), got {logits.shape} and "
            f"{labels.shape}: a regression has no confidence"
        )
    labelled = labels != -100
    if not labelled.any():
        raise ValueError("no sample has a label: pass a labelled split")
    confidence = softmax(logits[labelled], axis=1).max(1)
    right = logits[labelled].argmax(1) == labels[labelled]
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    samples = np.bincount(which, minlength=bins)
    means = (np.bincount(which, column, bins) / np.maximum(samples, 1) for column in (confidence, right))
    return samples, *means


def expected_calibration_error(logits, labels, *, bins: int = 15) -> float:
    r"""How far confidence and accuracy lie apart, on average over the samples; 0 is calibrated.

    .. math:: \sum_{b=1}^{M} \frac{n_b}{N} \, \left| \mathrm{acc}_b - \mathrm{conf}_b \right|

    Args:
        logits: (N, C) unnormalised scores; see :func:`reliability`, whose bins these are.
        labels: (N,) class indices; samples with -100 are left out.
        bins: M.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: As :func:`reliability`.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", ICML, arXiv 1706.04599, equation 3.

    >>> expected_calibration_error([[0.0, 0.0], [0.0, 0.0]], [1, 1])
    0.5
    """
    samples, confidence, accuracy = reliability(logits, labels, bins=bins)
    return float(np.sum(samples * np.abs(accuracy - confidence)) / samples.sum())


def mean_entropy(logits) -> float:
    r"""How unsure a model is: the entropy of its answers, on average over the samples, in nats.

    .. math:: -\frac{1}{N} \sum_i \sum_c p_{ic} \log p_{ic}

    Args:
        logits: (N, C) unnormalised scores, C at least 2.

    Returns:
        A number in [0, log C].

    Raises:
        ValueError: If there is no sample or only one class, or a score is not finite.

    >>> round(mean_entropy([[0.0, 0.0], [99.0, 0.0]]), 4)  # half of log 2
    0.3466
    """
    logits = _scores(logits)
    if logits.ndim != 2 or logits.shape[1] < 2 or not len(logits):
        raise ValueError(
            f"entropy is about logits (N, C) of at least 2 classes, got {logits.shape}: a regression has none"
        )
    return float(-np.sum(softmax(logits, axis=1) * log_softmax(logits, axis=1), axis=1).mean())


def agreement(first, second) -> float:
    """How alike two models answer: the share of samples with the same class first, or Pearson's r of a regression.

    Args:
        first: (N, C) scores of one model; (N, 1) is a regression.
        second: The other's, of the same samples.

    Returns:
        A number in [0, 1]; of a regression in [-1, 1], and 0 where a model always says the same.

    Raises:
        ValueError: If the shapes differ, there is no sample, or a score is not finite.

    >>> agreement([[2.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [3.0, 2.0]])
    0.5
    """
    first, second = _scores(first), _scores(second)
    if first.ndim != 2 or first.shape != second.shape or not first.size:
        raise ValueError(f"agreement is about scores (N, C) of the same samples, got {first.shape} and {second.shape}")
    if first.shape[1] == 1:
        return float(Correlation()._compute(first[:, 0], second[:, 0])["pearson"])
    return float(np.mean(first.argmax(1) == second.argmax(1)))


def _scores(values) -> np.ndarray:
    scores = np.asarray(values, np.float64)
    if not np.isfinite(scores).all():
        raise ValueError("a score is NaN or infinite: the model has diverged")
    return scores
