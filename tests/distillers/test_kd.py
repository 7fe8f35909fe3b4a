"""Knowledge distillation against its definition."""

import numpy as np
import pytest
import torch
from references import STUDENT, TARGET, TEACHER, batch, kd, over_batch, probabilities
from torch import nn

from hfkd.distillers import KD, ModelOutputs
from hfkd.functional import kd_loss


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_kd_loss_is_its_definition(temperature):
    student, teacher, _ = batch()
    expected = over_batch(kd, student, teacher, temperature=temperature)
    per_sample = kd_loss(student, teacher, temperature=temperature, reduction="none")
    np.testing.assert_allclose(per_sample.numpy(), expected, rtol=1e-10)
    assert kd_loss(student, teacher, temperature=temperature).item() == pytest.approx(expected.mean(), rel=1e-10)


def test_kd_loss_golden():
    assert kd_loss(STUDENT, TEACHER, temperature=4.0).item() == pytest.approx(0.244439775684, abs=1e-11)
    assert kd_loss(STUDENT, TEACHER).item() == pytest.approx(0.244439775684, abs=1e-11)  # 4 is the default


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gradient_is_the_difference_of_softened_probabilities(temperature):
    student, teacher, _ = batch()
    student.requires_grad_()
    kd_loss(student, teacher, temperature=temperature, reduction="none").sum().backward()
    for gradient, z, t in zip(student.grad.tolist(), student.tolist(), teacher.tolist(), strict=True):
        pairs = zip(probabilities(z, temperature), probabilities(t, temperature), strict=True)
        assert gradient == pytest.approx([temperature * (p - q) for p, q in pairs], abs=1e-12)


def test_a_hot_temperature_matches_centred_logits():
    """As T grows, T² KL tends to half the mean squared difference of centred logits (Hinton et al., section 2.1)."""
    student, teacher, _ = batch()
    centred = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    limit = centred.square().mean(1) / 2
    torch.testing.assert_close(kd_loss(student, teacher, temperature=1e4, reduction="none"), limit, rtol=1e-3, atol=0)


def test_it_is_zero_at_equal_logits_and_ignores_shifts():
    student, teacher, _ = batch()
    assert kd_loss(teacher, teacher).item() == pytest.approx(0.0, abs=1e-15)
    torch.testing.assert_close(kd_loss(student + 7.0, teacher - 3.0), kd_loss(student, teacher))
    assert (kd_loss(student, teacher, reduction="none") > 0).all()


def test_extreme_logits_stay_finite():
    student = torch.tensor([[1000.0, 0.0, -1000.0]], requires_grad=True)
    loss = kd_loss(student, torch.tensor([[-1000.0, 0.0, 1000.0]]), temperature=1.0)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_gradcheck():
    """With respect to the teacher too: a method may transform its logits with trainable weights."""
    student, teacher, _ = batch(3, 4)
    inputs = student.requires_grad_(), teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda z, t: kd_loss(z, t, temperature=3.0), inputs)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    for call in (lambda: kd_loss(STUDENT, TEACHER, temperature=temperature), lambda: KD(temperature=temperature)):
        with pytest.raises(ValueError, match="temperature must be positive, got .*: use 1.0 for no softening"):
            call()


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match=r'reduction must be "mean" \(over the batch\) or "none", got \'sum\''):
        kd_loss(STUDENT, TEACHER, reduction="sum")


def outputs(logits):
    return ModelOutputs(logits, task_logits=logits)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
def test_the_two_terms_are_weighed_by_alpha(alpha):
    student, teacher, labels = batch()
    terms = KD(alpha=alpha, temperature=2.0)(outputs(student), ModelOutputs(teacher), {"labels": labels})
    cross_entropy = nn.functional.cross_entropy(student, labels, reduction="none")
    torch.testing.assert_close(terms["task"], (1 - alpha) * cross_entropy)
    torch.testing.assert_close(terms["kd"], alpha * kd_loss(student, teacher, temperature=2.0, reduction="none"))
    assert list(terms) == ["task", "kd"]


def test_golden_total():
    """(1 - alpha) CE + alpha K at the golden input, with the figures of the design's AKD section."""
    terms = KD(alpha=0.5)(outputs(STUDENT), ModelOutputs(TEACHER), {"labels": TARGET})
    assert sum(terms.values()).item() == pytest.approx(0.5 * 0.7873386717 + 0.5 * 0.2444397757, abs=1e-9)


def test_for_one_number_it_is_the_squared_difference():
    student, teacher = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.5], [4.0]])
    distiller = KD(alpha=0.25)
    distiller.hard_label_loss = type(distiller.hard_label_loss)("regression")
    terms = distiller(outputs(student), ModelOutputs(teacher), {"labels": torch.tensor([1.0, -1.0])})
    assert terms["kd"].tolist() == [0.25 * 0.25, 0.25 * 4.0]
    assert terms["task"].tolist() == [0.0, 0.75 * 9.0]


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got .*: 0 is the labels alone, 1 the teacher"):
        KD(alpha=alpha)
