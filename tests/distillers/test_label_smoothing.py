"""Label smoothing against its definition, and against the trainer's own."""

import math

import numpy as np
import pytest
import torch
from helpers import assert_identical, make_trainer, rows, tiny, weights
from references import STUDENT, TARGET, batch, over_labelled_batch, probabilities

from hfkd.distillers import LabelSmoothing, ModelOutputs, StudentAlone
from hfkd.functional import label_smoothing_loss


def smoothed(student, target, epsilon):
    log_p = [math.log(p) for p in probabilities(student)]
    return -math.fsum(((1 - epsilon) * (c == target) + epsilon / len(log_p)) * v for c, v in enumerate(log_p))


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0])
def test_the_loss_is_its_definition(epsilon):
    student, _, labels = batch()
    labels[4] = -100
    expected = over_labelled_batch(smoothed, student, labels, epsilon=epsilon)
    np.testing.assert_allclose(
        label_smoothing_loss(student, labels, epsilon=epsilon, reduction="none").numpy(), expected, rtol=1e-10
    )
    assert label_smoothing_loss(student, labels, epsilon=epsilon).item() == pytest.approx(expected.mean())


def test_golden():
    """0.9 of the design's cross-entropy .7873386717 and 0.1 of the mean over classes, .75 above it."""
    assert label_smoothing_loss(STUDENT, TARGET).item() == pytest.approx(0.7873386717 + 0.1 * 0.75, abs=1e-9)


def test_it_is_a_kd_from_an_even_teacher():
    """(1 - ε) CE + ε KL(uniform || p) up to a constant: the gradients agree."""
    student, _, labels = batch()
    student.requires_grad_()
    even = torch.full_like(student, 1 / 5)
    divergence = (even * (even.log() - student.log_softmax(-1))).sum(-1).mean()
    parts = 0.7 * torch.nn.functional.cross_entropy(student, labels) + 0.3 * divergence
    gradients = [
        torch.autograd.grad(loss, student)[0] for loss in (label_smoothing_loss(student, labels, epsilon=0.3), parts)
    ]
    torch.testing.assert_close(*gradients)


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"epsilon must lie in \[0, 1\], got -0.1"):
        label_smoothing_loss(STUDENT, TARGET, epsilon=-0.1)
    with pytest.raises(ValueError, match="reduction must be \"mean\".*got 'sum'"):
        label_smoothing_loss(STUDENT, TARGET, reduction="sum")
    with pytest.raises(ValueError, match=r"smoothed twice: leave out label_smoothing_factor, or take StudentAlone"):
        make_trainer(tmp_path, tiny("bert"), None, LabelSmoothing(), rows("bert"), label_smoothing_factor=0.2)


def test_a_run_is_that_of_the_training_argument(tmp_path):
    """On a data set with few labels too: the scale is in both."""
    dataset = rows("bert")
    dataset.columns["labels"][:4] = -100
    trained = []
    for distiller, factor in ((LabelSmoothing(0.2), 0.0), (StudentAlone(), 0.2)):
        student = tiny("bert")
        make_trainer(tmp_path, student, None, distiller, dataset, label_smoothing_factor=factor).train()
        trained.append(weights(student))
    assert_identical(*trained)


def test_soft_labels_are_smoothed_too():
    student, other, _ = batch()
    target = other.softmax(-1)
    terms = LabelSmoothing(0.3)(ModelOutputs(student, student), None, {"labels": target})
    expected = -((0.7 * target + 0.3 / 5) * student.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(terms["task"], expected)
