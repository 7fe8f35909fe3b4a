"""Normalised knowledge distillation against its definition."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from references import STUDENT, TARGET, TEACHER, batch, nkd, over_labelled_batch, probabilities, without

from hfkd.distillers import NKD, ModelOutputs
from hfkd.distillers.base import HardLabelLoss
from hfkd.functional import nkd_loss


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("gamma", [0.0, 1.5])
def test_nkd_loss_is_its_definition(gamma, temperature):
    student, teacher, labels = batch()
    labels[2] = -100
    options = {"gamma": gamma, "temperature": temperature}
    expected = over_labelled_batch(nkd, student, teacher, labels, **options)
    per_sample = nkd_loss(student, teacher, labels, **options, reduction="none")
    np.testing.assert_allclose(per_sample.numpy(), expected, rtol=1e-10)
    assert nkd_loss(student, teacher, labels, **options).item() == pytest.approx(expected.mean(), rel=1e-10)


def test_golden():
    """-p^T_t log p^S_t by hand, and gamma 1.5 times the cross-entropy over the classes 1, 2 and 3."""
    p_target = math.exp(2) / (math.exp(2) + math.e + 1 + math.exp(-1))
    on_target = p_target * 0.7873386717  # the design's cross-entropy at the golden input
    q = probabilities([1.0, 0.0, -1.0])
    log_p = [z - math.log(math.exp(0.5) + math.exp(-0.5) + 1) for z in (0.5, -0.5, 0.0)]
    expected = on_target - 1.5 * sum(a * b for a, b in zip(q, log_p, strict=True))
    assert nkd_loss(STUDENT, TEACHER, TARGET).item() == pytest.approx(expected, abs=1e-9)
    assert expected == pytest.approx(1.96199874, abs=1e-8)


def test_a_teacher_that_is_certain_is_a_label_and_the_others_an_even_choice():
    student, _, labels = batch()
    certain = 1e5 * F.one_hot(labels, 5).double()
    cross_entropy = F.cross_entropy(student, labels, reduction="none")
    torch.testing.assert_close(nkd_loss(student, certain, labels, gamma=0.0, reduction="none"), cross_entropy)
    even = [
        -np.mean(np.log(probabilities(without(z, t)))) for z, t in zip(student.tolist(), labels.tolist(), strict=True)
    ]
    both = nkd_loss(student, certain, labels, gamma=2.0, reduction="none") - cross_entropy
    np.testing.assert_allclose(both.numpy(), 2.0 * np.array(even), rtol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_gradient(temperature):
    """p^T_t (p^S - y) on all classes, and gamma T (p̂^S - p̂^T) on those other than the label."""
    student, teacher, labels = batch()
    student.requires_grad_()
    nkd_loss(student, teacher, labels, gamma=2.0, temperature=temperature, reduction="none").sum().backward()
    for i, (z, t, target) in enumerate(zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True)):
        confidence, p = probabilities(t)[target], probabilities(z)
        p_hat, q_hat = (probabilities(without(logits, target), temperature) for logits in (z, t))
        others = [2.0 * temperature * (a - b) for a, b in zip(p_hat, q_hat, strict=True)]
        others.insert(target, 0.0)
        expected = [confidence * (p[c] - (c == target)) + others[c] for c in range(5)]
        assert student.grad[i].tolist() == pytest.approx(expected, abs=1e-12)


def test_extreme_logits_and_missing_labels_stay_finite():
    student = torch.tensor([[1000.0, 0.0, -1000.0]] * 4, requires_grad=True)
    teacher = torch.tensor([[-1000.0, 0.0, 1000.0]] * 4)
    value = nkd_loss(student, teacher, torch.tensor([0, 1, 2, -100]), reduction="none")
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad.isfinite().all()
    assert value[3] == 0.0
    assert (student.grad[3] == 0).all()


def test_gradcheck():
    student, teacher, labels = batch(3, 4)
    inputs = student.requires_grad_(), teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda z, t: nkd_loss(z, t, labels, temperature=2.0), inputs)


def test_what_is_refused():
    with pytest.raises(ValueError, match="temperature must be positive, got -1: use 1.0 for no softening"):
        nkd_loss(STUDENT, TEACHER, TARGET, temperature=-1)
    with pytest.raises(ValueError, match="reduction must be \"mean\".*got 'sum'"):
        nkd_loss(STUDENT, TEACHER, TARGET, reduction="sum")


def test_the_term_has_its_weight_and_the_scale_of_the_labels():
    student, teacher, labels = batch()
    labels[0] = -100
    method = NKD(gamma=0.5, temperature=2.0, weight=3.0)
    method.hard_label_loss = HardLabelLoss(scale=6 / 5)
    terms = method(ModelOutputs(student, student), ModelOutputs(teacher), {"labels": labels})
    expected = over_labelled_batch(nkd, student, teacher, labels, gamma=0.5, temperature=2.0)
    np.testing.assert_allclose(terms["nkd"].numpy(), 3.0 * 6 / 5 * expected, rtol=1e-10)
    assert list(terms) == ["task", "nkd"]
    assert (NKD().gamma, NKD().temperature, NKD().weight, NKD().needs_hard_labels) == (1.5, 1.0, 1.0, True)
