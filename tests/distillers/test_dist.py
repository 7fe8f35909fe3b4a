"""DIST against numpy's correlation."""

import pytest
import torch
from references import STUDENT, TEACHER, batch, dist

from hfkd.distillers import DIST, ModelOutputs, StandardizedLogits
from hfkd.functional import dist_loss


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("beta", "gamma"), [(1.0, 1.0), (2.0, 0.0), (0.0, 0.5)])
def test_dist_loss_is_its_definition(beta, gamma, temperature):
    student, teacher, _ = batch(scale=1.0)
    options = {"beta": beta, "gamma": gamma, "temperature": temperature}
    # The authors' 1e-8 in the denominator is all that differs: 1e-6 of a correlation of spreads of 1e-2.
    assert dist_loss(student, teacher, **options).item() == pytest.approx(dist(student, teacher, **options), rel=1e-5)


def test_golden():
    """Of two samples with mirrored probabilities, by hand: rows correlate at -1, and so do columns."""
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert dist_loss(logits, logits).item() == pytest.approx(0.0, abs=1e-6)
    assert dist_loss(logits, logits.flip(-1)).item() == pytest.approx(4.0, abs=1e-6)
    assert dist_loss(logits, logits.flip(-1), beta=3.0, gamma=0.5).item() == pytest.approx(7.0, abs=1e-6)
    assert DIST().batch_coupled


def test_it_depends_on_probabilities_up_to_shift_and_scale_of_a_sample():
    """The rows' part; the student's probabilities here are halfway between the teacher's and even ones."""
    _, teacher, _ = batch(scale=1.0)
    halfway = (0.5 * teacher.softmax(-1) + 0.5 / 5).log()
    assert dist_loss(halfway, teacher, gamma=0.0).item() == pytest.approx(0.0, abs=1e-6)
    assert dist_loss(halfway, teacher, beta=0.0).item() == pytest.approx(0.0, abs=1e-6)
    assert dist_loss(halfway + torch.randn(6, 5), teacher).item() > 0.01


def test_what_has_no_spread_counts_zero_and_stays_finite():
    even, teacher = torch.zeros(3, 4, requires_grad=True), torch.randn(3, 4)
    loss = dist_loss(even, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(2.0)
    assert even.grad.isfinite().all()
    one = torch.randn(1, 4, requires_grad=True)
    whole = dist_loss(one, teacher[:1], temperature=2.0)
    torch.testing.assert_close(whole, dist_loss(one, teacher[:1], gamma=0.0, temperature=2.0) + 4.0)
    whole.backward()
    assert one.grad.isfinite().all()


def test_extreme_logits_stay_finite():
    student = torch.tensor([[1000.0, 0.0, -1000.0], [0.0, 1.0, 2.0]], requires_grad=True)
    loss = dist_loss(student, torch.tensor([[-1000.0, 0.0, 1000.0], [3.0, 1.0, 2.0]]))
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_gradcheck():
    student, teacher, _ = batch(3, 4, scale=1.0)
    inputs = student.requires_grad_(), teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda z, t: dist_loss(z, t, temperature=2.0), inputs)


def test_what_is_refused():
    with pytest.raises(ValueError, match="got 'none': DIST correlates the samples of a batch.*no loss per sample"):
        dist_loss(STUDENT, TEACHER, reduction="none")
    with pytest.raises(ValueError, match="temperature must be positive"):
        dist_loss(STUDENT, TEACHER, temperature=0.0)


def test_the_distiller_adds_one_number_for_the_batch():
    student, teacher, labels = batch()
    arguments = ModelOutputs(student, student), ModelOutputs(teacher), {"labels": labels}
    terms = DIST(beta=2.0, gamma=0.5, temperature=4.0)(*arguments)
    assert list(terms) == ["task", "dist"]
    torch.testing.assert_close(terms["dist"], dist_loss(student, teacher, beta=2.0, gamma=0.5, temperature=4.0))
    assert StandardizedLogits(DIST()).batch_coupled
