"""Transformed teacher matching: the proofs that the design lists, in float64."""

import math

import numpy as np
import pytest
import torch
from references import (
    STUDENT,
    TARGET,
    TEACHER,
    batch,
    divergence,
    entropy,
    over_batch,
    power_transform,
    probabilities,
    renyi_entropy,
    ttm,
    wttm,
)
from torch import nn

from hfkd.distillers import TTM, WTTM, ModelOutputs
from hfkd.functional import kd_loss, ttm_loss, wttm_loss


TEMPERATURES = [1.0, 2.0, 4.0, 10.0]
LOSSES = [(ttm_loss, ttm), (wttm_loss, wttm)]


@pytest.mark.parametrize("gamma", [0.1, 0.25, 0.7, 1.0])
@pytest.mark.parametrize(("loss", "reference"), LOSSES)
def test_the_losses_are_their_definitions(loss, reference, gamma):
    student, teacher, _ = batch()
    expected = over_batch(reference, student, teacher, gamma=gamma)
    np.testing.assert_allclose(loss(student, teacher, gamma=gamma, reduction="none").numpy(), expected, rtol=1e-10)
    assert loss(student, teacher, gamma=gamma).item() == pytest.approx(expected.mean(), rel=1e-10)


def test_golden_values():
    assert ttm_loss(STUDENT, TEACHER, gamma=0.25).item() == pytest.approx(0.059022634545, abs=1e-12)
    assert wttm_loss(STUDENT, TEACHER, gamma=0.25).item() == pytest.approx(0.151092160657, abs=1e-12)
    weight = wttm_loss(STUDENT, TEACHER, gamma=0.25) / ttm_loss(STUDENT, TEACHER, gamma=0.25)
    assert weight.item() == pytest.approx(2.5599020074, abs=1e-10)
    assert renyi_entropy(probabilities(STUDENT[0].tolist()), 0.25) == pytest.approx(1.348938383029, abs=1e-12)
    assert entropy(power_transform(probabilities(TEACHER[0].tolist()), 0.25)) == pytest.approx(
        1.348242613237, abs=1e-12
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_power_transform_is_a_tempered_softmax(temperature):
    _, teacher, _ = batch()
    for logits in teacher.tolist():
        transformed = power_transform(probabilities(logits), 1 / temperature)
        assert transformed == pytest.approx(probabilities(logits, temperature), rel=1e-12)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_renyi_identity(temperature):
    """TTM is KD at its temperature, less a Rényi entropy of the student, plus a constant of the teacher."""
    student, teacher, _ = batch()
    loss = ttm_loss(student, teacher, gamma=1 / temperature, reduction="none").tolist()
    softened = (kd_loss(student, teacher, temperature=temperature, reduction="none") / temperature**2).tolist()
    for value, kl, z, t in zip(loss, softened, student.tolist(), teacher.tolist(), strict=True):
        constant = (temperature - 1) * entropy(probabilities(t, temperature))
        bonus = 0.0 if temperature == 1 else (temperature - 1) * renyi_entropy(probabilities(z), 1 / temperature)
        assert value == pytest.approx(temperature * kl - bonus + constant, abs=1e-10)


@pytest.mark.parametrize("temperature", [2.0, 4.0])
def test_ttm_is_kd_with_a_renyi_regulariser(temperature):
    """With beta = λT/(1-λ): L_TTM = [L_KD - λT(T-1) H(p^S)]/(1-λ) + a constant of the teacher, so gradients agree."""
    share = 0.6
    student, teacher, labels = batch()
    student.requires_grad_()
    cross_entropy = nn.functional.cross_entropy(student, labels)
    order = 1 / temperature
    renyi = (order * student.log_softmax(-1)).logsumexp(-1).mean() / (1 - order)
    kd = (1 - share) * cross_entropy + share * kd_loss(student, teacher, temperature=temperature)
    reference = (kd - share * temperature * (temperature - 1) * renyi) / (1 - share)
    beta = share * temperature / (1 - share)
    ours = cross_entropy + beta * ttm_loss(student, teacher, gamma=1 / temperature)
    gradients = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (ours, reference)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0])
def test_the_gradient_is_the_difference_of_probabilities(gamma):
    student, teacher, _ = batch()
    student.requires_grad_()
    ttm_loss(student, teacher, gamma=gamma, reduction="none").sum().backward()
    for gradient, z, t in zip(student.grad.tolist(), student.tolist(), teacher.tolist(), strict=True):
        pairs = zip(probabilities(z), probabilities(t, 1 / gamma), strict=True)
        assert gradient == pytest.approx([p - q for p, q in pairs], abs=1e-12)


def test_without_a_transform_they_are_kd():
    student, teacher, _ = batch()
    expected = kd_loss(student, teacher, temperature=1.0, reduction="none")
    for loss in (ttm_loss, wttm_loss):  # the power sum of a distribution to the power 1 is 1
        torch.testing.assert_close(loss(student, teacher, gamma=1.0, reduction="none"), expected)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.9])
def test_the_weight_lies_between_one_and_its_bound(gamma):
    classes = 7
    student, teacher, _ = batch(64, classes)
    uniform, certain = torch.zeros(1, classes, dtype=torch.float64), torch.zeros(1, classes, dtype=torch.float64)
    certain[0, 2] = 1e4
    teacher = torch.cat([teacher, uniform, certain])
    student = torch.cat([student, student[:2]])
    weight = wttm_loss(student, teacher, gamma=gamma, reduction="none") / ttm_loss(
        student, teacher, gamma=gamma, reduction="none"
    )
    bound = classes ** (1 - gamma)
    assert (weight >= 1 - 1e-12).all()
    assert (weight <= bound + 1e-9).all()
    assert weight[-2].item() == pytest.approx(bound, rel=1e-10)
    assert weight[-1].item() == pytest.approx(1.0, rel=1e-10)
    # log U is (1 - gamma) times the Rényi entropy of order gamma.
    for value, t in zip(weight[:5].tolist(), teacher[:5].tolist(), strict=True):
        assert math.log(value) == pytest.approx((1 - gamma) * renyi_entropy(probabilities(t), gamma), rel=1e-9)


def test_a_teacher_that_is_certain_is_a_label():
    student, _, labels = batch()
    certain = 1e5 * nn.functional.one_hot(labels, 5).double()
    expected = nn.functional.cross_entropy(student, labels, reduction="none")
    torch.testing.assert_close(wttm_loss(student, certain, gamma=0.3, reduction="none"), expected)


@pytest.mark.parametrize("loss", [ttm_loss, wttm_loss])
def test_shifted_logits_change_nothing(loss):
    student, teacher, _ = batch()
    shift = torch.arange(6, dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        loss(student + shift, teacher - 2 * shift, gamma=0.3, reduction="none"),
        loss(student, teacher, gamma=0.3, reduction="none"),
    )


def test_the_weight_carries_no_gradient():
    """A teacher with trainable weights before its logits is not paid for being uncertain."""
    student, teacher, _ = batch()
    teacher.requires_grad_()
    weights = [math.fsum(p**0.3 for p in probabilities(t)) for t in teacher.tolist()]
    wttm_loss(student, teacher, gamma=0.3, reduction="none").sum().backward()
    frozen = teacher.detach().clone().requires_grad_()
    (torch.tensor(weights) * ttm_loss(student, frozen, gamma=0.3, reduction="none")).sum().backward()
    torch.testing.assert_close(teacher.grad, frozen.grad)
    assert teacher.grad.abs().max() > 0.01


@pytest.mark.parametrize("temperature", [2.0, 4.0])
def test_equal_logits_are_no_optimum(temperature):
    _, teacher, _ = batch()
    gamma = 1 / temperature
    assert (ttm_loss(teacher, teacher, gamma=gamma, reduction="none") > 0.05).all()
    assert ttm_loss(gamma * teacher, teacher, gamma=gamma).item() == pytest.approx(0.0, abs=1e-14)


@pytest.mark.parametrize("loss", [ttm_loss, wttm_loss])
def test_gradcheck(loss):
    student, teacher, _ = batch(3, 4)
    assert torch.autograd.gradcheck(lambda z: loss(z, teacher, gamma=0.3), student.requires_grad_())


@pytest.mark.parametrize("loss", [ttm_loss, wttm_loss])
def test_extreme_logits_stay_finite(loss):
    student = torch.tensor([[1000.0, 0.0, -1000.0]], requires_grad=True)
    value = loss(student, torch.tensor([[-1000.0, 0.0, 1000.0]]), gamma=0.1)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("gamma", [0.0, -0.5, 1.5, float("nan")])
def test_gamma_outside_its_range_is_refused(gamma):
    for call in (
        lambda: ttm_loss(STUDENT, TEACHER, gamma=gamma),
        lambda: wttm_loss(STUDENT, TEACHER, gamma=gamma),
        lambda: TTM(gamma=gamma),
        lambda: WTTM(gamma=gamma),
    ):
        with pytest.raises(ValueError, match=r"gamma must lie in \(0, 1\], got .*: it is 1/temperature"):
            call()


@pytest.mark.parametrize("method", [TTM, WTTM])
def test_beta_outside_its_range_is_refused(method):
    with pytest.raises(ValueError, match="beta must not be negative, got -1: 0 is the labels alone"):
        method(beta=-1)


@pytest.mark.parametrize("loss", [ttm_loss, wttm_loss])
def test_an_unknown_reduction_is_refused(loss):
    with pytest.raises(ValueError, match="reduction must be \"mean\".*got 'batchmean'"):
        loss(STUDENT, TEACHER, gamma=0.5, reduction="batchmean")


@pytest.mark.parametrize(("method", "term", "golden"), [(TTM, "ttm", 0.059022634545), (WTTM, "wttm", 0.151092160657)])
def test_the_distillers_add_beta_times_the_loss_to_the_whole_cross_entropy(method, term, golden):
    student = ModelOutputs(STUDENT, task_logits=STUDENT)
    terms = method(gamma=0.25, beta=3.0)(student, ModelOutputs(TEACHER), {"labels": TARGET})
    assert list(terms) == ["task", term]
    cross_entropy = -math.log(probabilities(STUDENT[0].tolist())[0])
    assert terms["task"].item() == pytest.approx(cross_entropy, abs=1e-12)
    assert terms[term].item() == pytest.approx(3.0 * golden, abs=1e-11)


def test_the_defaults_are_the_papers_for_resnet56_to_resnet20():
    assert (TTM().gamma, TTM().beta) == (0.3, 7.0)
    assert (WTTM().gamma, WTTM().beta) == (0.3, 1.5)


def test_references_agree_with_each_other():
    assert divergence([0.5, 0.5], [0.25, 0.75]) == pytest.approx(0.5 * math.log(4 / 3))
