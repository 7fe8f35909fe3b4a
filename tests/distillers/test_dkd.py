"""Decoupled knowledge distillation: its parts, their decomposition of KD, the warm-up."""

import numpy as np
import pytest
import torch
from helpers import Rows, logged, make_trainer, rows, tiny, tiny_teacher
from references import (
    STUDENT,
    TARGET,
    TEACHER,
    batch,
    dkd,
    nckd,
    over_labelled_batch,
    probabilities,
    tckd,
    without,
)

from hfkd.distillers import DKD, ModelOutputs
from hfkd.distillers.base import HardLabelLoss
from hfkd.functional import dkd_loss, kd_loss, nckd_loss, tckd_loss


TEMPERATURES = [0.5, 1.0, 4.0]
LOSSES = [
    (tckd_loss, tckd, {}),
    (nckd_loss, nckd, {}),
    (dkd_loss, dkd, {"alpha": 0.7, "beta": 3.0}),
]


def partly_labelled():
    student, teacher, labels = batch()
    labels[3] = -100
    return student, teacher, labels


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("loss", "reference", "weights"), LOSSES)
def test_the_losses_are_their_definitions(loss, reference, weights, temperature):
    student, teacher, labels = partly_labelled()
    options = {**weights, "temperature": temperature}
    expected = over_labelled_batch(reference, student, teacher, labels, **options)
    per_sample = loss(student, teacher, labels, **options, reduction="none")
    np.testing.assert_allclose(per_sample.numpy(), expected, rtol=1e-9, atol=1e-15)
    assert expected[3] == 0.0
    assert loss(student, teacher, labels, **options).item() == pytest.approx(expected.mean(), rel=1e-9)


@pytest.mark.parametrize(
    ("temperature", "target_part", "other_part"),
    [(1.0, 0.0720144455, 0.1376178464), (4.0, 0.0060968576, 0.0141225665)],
)
def test_golden_parts(temperature, target_part, other_part):
    arguments = STUDENT, TEACHER, TARGET
    assert tckd_loss(*arguments, temperature=temperature).item() == pytest.approx(target_part, abs=1e-10)
    assert nckd_loss(*arguments, temperature=temperature).item() == pytest.approx(other_part, abs=1e-10)


def test_golden_total():
    assert dkd_loss(STUDENT, TEACHER, TARGET).item() == pytest.approx(1.9052382275, abs=1e-9)
    total = dkd_loss(STUDENT, TEACHER, TARGET, alpha=1.0, beta=8.0, temperature=4.0)
    assert total.item() == pytest.approx(1.9052382275, abs=1e-9)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_parts_add_up_to_kd(temperature):
    student, teacher, labels = batch()
    options = {"temperature": temperature, "reduction": "none"}
    doubt = 1 - (teacher / temperature).softmax(-1).gather(-1, labels[:, None])[:, 0]
    parts = tckd_loss(student, teacher, labels, **options) + doubt * nckd_loss(student, teacher, labels, **options)
    torch.testing.assert_close(temperature**2 * parts, kd_loss(student, teacher, **options), rtol=1e-10, atol=0)
    # The same through the weights: alpha 1 and beta 1 - p^T_t, which differs from sample to sample.
    whole = dkd_loss(student, teacher, labels, alpha=1.0, beta=doubt, **options)
    torch.testing.assert_close(whole, kd_loss(student, teacher, **options), rtol=1e-10, atol=0)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_gradients_are_those_of_the_paper(temperature):
    student, teacher, labels = batch()
    student.requires_grad_()
    options = {"temperature": temperature, "reduction": "none"}
    on_target = torch.autograd.grad(tckd_loss(student, teacher, labels, **options).sum(), student)[0]
    on_others = torch.autograd.grad(nckd_loss(student, teacher, labels, **options).sum(), student)[0]
    for i, (z, t, target) in enumerate(zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True)):
        p, q = (probabilities(logits, temperature)[target] for logits in (z, t))
        p_hat, q_hat = (probabilities(without(logits, target), temperature) for logits in (z, t))
        expected = [(q - p) * a / temperature for a in p_hat]
        expected.insert(target, (p - q) / temperature)
        assert on_target[i].tolist() == pytest.approx(expected, abs=1e-12)
        expected = [(a - b) / temperature for a, b in zip(p_hat, q_hat, strict=True)]
        expected.insert(target, 0.0)
        assert on_others[i].tolist() == pytest.approx(expected, abs=1e-12)


def test_the_non_target_part_sees_neither_logit_of_the_label():
    student, teacher, labels = batch()
    other = [logits.scatter(-1, labels[:, None], value) for logits, value in ((student, 50.0), (teacher, -7.0))]
    assert torch.equal(nckd_loss(*other, labels), nckd_loss(student, teacher, labels))
    assert not torch.equal(tckd_loss(*other, labels), tckd_loss(student, teacher, labels))


def test_with_two_classes_there_is_no_non_target_part():
    student, teacher, labels = batch(classes=2)
    assert torch.equal(nckd_loss(student, teacher, labels, reduction="none"), torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(16 * tckd_loss(student, teacher, labels), kd_loss(student, teacher))


@pytest.mark.parametrize("loss", [tckd_loss, nckd_loss, dkd_loss])
def test_equal_logits_are_an_optimum_and_shifts_change_nothing(loss):
    student, teacher, labels = batch()
    assert loss(teacher, teacher, labels).item() == pytest.approx(0.0, abs=1e-15)
    torch.testing.assert_close(loss(student + 7.0, teacher - 3.0, labels), loss(student, teacher, labels))


@pytest.mark.parametrize("loss", [tckd_loss, nckd_loss, dkd_loss])
def test_extreme_logits_and_missing_labels_stay_finite(loss):
    student = torch.tensor([[1000.0, 0.0, -1000.0]] * 4, requires_grad=True)
    labels = torch.tensor([0, 1, 2, -100])
    value = loss(student, torch.tensor([[-1000.0, 0.0, 1000.0]] * 4), labels, temperature=1.0, reduction="none")
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad.isfinite().all()
    assert value[3] == 0.0
    assert (student.grad[3] == 0).all()


@pytest.mark.parametrize("loss", [tckd_loss, nckd_loss, dkd_loss])
def test_gradcheck(loss):
    """With respect to the teacher too: a method may transform its logits with trainable weights."""
    student, teacher, labels = batch(3, 4)
    labels[1] = -100
    inputs = student.requires_grad_(), teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda z, t: loss(z, t, labels, temperature=2.0), inputs)


@pytest.mark.parametrize("loss", [tckd_loss, nckd_loss, dkd_loss])
def test_what_is_refused(loss):
    with pytest.raises(ValueError, match="temperature must be positive, got 0.0: use 1.0 for no softening"):
        loss(STUDENT, TEACHER, TARGET, temperature=0.0)
    with pytest.raises(ValueError, match="reduction must be \"mean\".*got 'sum'"):
        loss(STUDENT, TEACHER, TARGET, reduction="sum")


def test_the_defaults_are_the_papers():
    method = DKD()
    assert (method.alpha, method.beta, method.temperature, method.warm_up) == (1.0, 8.0, 4.0, 1 / 12)
    assert method.needs_hard_labels


def test_the_term_has_its_weights_and_the_scale_of_the_labels():
    student, teacher, labels = partly_labelled()
    method = DKD(alpha=0.5, beta=2.0, temperature=2.0, warm_up=0.0)
    method.hard_label_loss = HardLabelLoss(scale=6 / 5)
    terms = method(ModelOutputs(student, student), ModelOutputs(teacher), {"labels": labels})
    expected = over_labelled_batch(dkd, student, teacher, labels, alpha=0.5, beta=2.0, temperature=2.0)
    np.testing.assert_allclose(terms["dkd"].numpy(), 6 / 5 * expected, rtol=1e-10)
    # Per labelled sample, on average, what the labelled samples alone would give.
    assert terms["dkd"].mean().item() == pytest.approx(expected.sum() / 5)


def test_the_weight_warms_up_and_a_resumed_run_goes_on(tmp_path):
    """At learning rate 0, all rows alike, the term is the ramp times a constant: 12 steps, 4 an epoch, 6 rise."""

    class Alike(Rows):
        labels = None  # one class alone is refused where it shows

    alike = Alike({name: column.expand(32, *column.shape[1:]) for name, column in rows("bert", 1).columns.items()})

    def make():
        return make_trainer(
            tmp_path,
            tiny("bert"),
            tiny_teacher("bert"),
            DKD(warm_up=0.5),
            alike,
            max_steps=12,
            learning_rate=0.0,
            save_strategy="steps",
            save_steps=5,
        )

    whole, resumed = make(), make()
    whole.train()
    term = logged(whole, "dkd")
    assert term == pytest.approx([term[-1] * min(step / 6, 1.0) for step in range(12)], rel=1e-5)
    assert term[-1] > 0.01
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert logged(resumed, "dkd") == term
    whole.train()
    assert logged(whole, "dkd")[-12:] == term  # a second run warms up again
