"""Teacher-free distillation: the virtual teacher, and the student's own trained network."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import make_trainer, rows, tiny, tiny_teacher
from references import STUDENT, TARGET, batch, divergence, over_labelled_batch, probabilities, virtual_kd

from hfkd.distillers import KD, ModelOutputs, TfKD
from hfkd.distillers.base import HardLabelLoss
from hfkd.functional import label_smoothing_loss, virtual_kd_loss


@pytest.mark.parametrize("temperature", [1.0, 20.0])
@pytest.mark.parametrize("confidence", [0.3, 0.99])
def test_the_virtual_loss_is_its_definition(confidence, temperature):
    student, _, labels = batch()
    labels[1] = -100
    options = {"temperature": temperature, "confidence": confidence}
    expected = over_labelled_batch(virtual_kd, student, labels, **options)
    per_sample = virtual_kd_loss(student, labels, **options, reduction="none")
    np.testing.assert_allclose(per_sample.numpy(), expected, rtol=1e-9)
    assert virtual_kd_loss(student, labels, **options).item() == pytest.approx(expected.mean(), rel=1e-9)


def test_golden():
    """At temperature 1, from the design's p^S: KL([.99, .01/3, .01/3, .01/3] || p^S)."""
    expected = divergence([0.99] + [0.01 / 3] * 3, probabilities([1.0, 0.5, -0.5, 0.0]))
    assert virtual_kd_loss(STUDENT, TARGET, temperature=1.0).item() == pytest.approx(expected, abs=1e-12)
    assert expected == pytest.approx(0.7303510, abs=1e-7)


def test_at_temperature_one_it_has_the_gradient_of_smoothed_labels():
    """Confidence a over C classes is label smoothing with ε = (1 - a) C / (C - 1)."""
    student, _, labels = batch()
    student.requires_grad_()
    losses = (
        virtual_kd_loss(student, labels, temperature=1.0, confidence=0.9),
        label_smoothing_loss(student, labels, epsilon=0.1 * 5 / 4),
    )
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in losses))


def test_what_the_virtual_loss_refuses():
    for confidence in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"confidence must lie in \(0, 1\), got .*has no second-best to teach"):
            virtual_kd_loss(STUDENT, TARGET, confidence=confidence)
    with pytest.raises(ValueError, match="temperature must be positive"):
        virtual_kd_loss(STUDENT, TARGET, temperature=0.0)
    with pytest.raises(ValueError, match="reduction must be \"mean\".*got 'sum'"):
        virtual_kd_loss(STUDENT, TARGET, reduction="sum")


def test_the_virtual_method():
    student, _, labels = batch()
    labels[0] = -100
    method = TfKD("virtual")
    assert (method.needs_teacher, method.needs_hard_labels) == (False, True)
    assert (method.alpha, method.temperature, method.confidence) == (0.1, 20.0, 0.99)
    method.hard_label_loss = HardLabelLoss(scale=6 / 5)
    terms = method(ModelOutputs(student, student), None, {"labels": labels})
    cross_entropy = F.cross_entropy(student, labels, reduction="none")
    torch.testing.assert_close(terms["task"], 0.9 * 6 / 5 * cross_entropy)
    torch.testing.assert_close(terms["tf_kd"], 0.1 * 6 / 5 * virtual_kd_loss(student, labels, reduction="none"))


def test_self_is_kd_from_the_trained_copy():
    student, teacher, labels = batch()
    method = TfKD()
    assert (method.needs_teacher, method.needs_hard_labels) == (True, False)
    arguments = ModelOutputs(student, student), ModelOutputs(teacher), {"labels": labels}
    terms, kd = method(*arguments), KD(alpha=0.95, temperature=20.0)(*arguments)
    torch.testing.assert_close(terms["task"], kd["task"])
    torch.testing.assert_close(terms["tf_kd"], kd["kd"])


def test_a_student_may_learn_from_a_copy_of_itself(tmp_path):
    trained = tiny_teacher("bert")
    make_trainer(tmp_path, trained, copy.deepcopy(trained), TfKD(), rows("bert")).train()


@pytest.mark.parametrize("wrong", ["distilbert", "wider"])
def test_another_architecture_is_refused(tmp_path, wrong):
    teacher = tiny_teacher("bert", intermediate_size=48) if wrong == "wider" else tiny_teacher(wrong)
    with pytest.raises(ValueError, match=r"not of the student's architecture: .*or use KD\(\) with any teacher"):
        make_trainer(tmp_path, tiny("bert"), teacher, TfKD(), rows("bert"))


def test_what_cannot_teach_is_refused(tmp_path):
    """A copy of a network that has learned nothing, the student itself, and nobody."""
    student = tiny("bert")
    with pytest.raises(ValueError, match="freshly initialised: it would teach noise"):
        make_trainer(tmp_path, student, copy.deepcopy(student), TfKD(), rows("bert"))
    with pytest.raises(ValueError, match="same object"):
        make_trainer(tmp_path, student, student, TfKD(), rows("bert"))
    with pytest.raises(ValueError, match="TfKD needs a teacher: pass teacher_model="):
        make_trainer(tmp_path, student, None, TfKD(), rows("bert"))
    with pytest.raises(ValueError, match="TfKD uses no teacher: leave out teacher_model"):
        make_trainer(tmp_path, student, tiny_teacher("bert"), TfKD("virtual"), rows("bert"))
