"""The contract's own pieces: reduction, the loss on labels, wrappers, combinations."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from references import STUDENT, TEACHER, batch
from torch import nn

from hfkd.distillers import KD, TTM, WTTM, Combined, Distiller, ModelOutputs, StudentAlone, Wrapper
from hfkd.distillers.base import HardLabelLoss, Ramp, reduce_batch, weighted_mean


def outputs(logits):
    return ModelOutputs(logits, task_logits=logits)


# The loss on labels


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_the_loss_on_labels_is_cross_entropy_sample_by_sample(smoothing):
    logits, _, labels = batch()
    labels[2] = -100
    per_sample = HardLabelLoss(label_smoothing=smoothing)(logits, labels)
    for i, label in enumerate(labels.tolist()):
        log_p = (logits[i] - logits[i].exp().sum().log()).tolist()
        spread = -smoothing * sum(log_p) / 5
        expected = 0.0 if label == -100 else (1 - smoothing) * -log_p[label] + spread
        assert per_sample[i].item() == pytest.approx(expected, rel=1e-10)


def test_the_loss_on_labels_is_scaled_where_some_are_missing():
    logits, _, labels = batch()
    torch.testing.assert_close(HardLabelLoss(scale=4.0)(logits, labels), 4.0 * HardLabelLoss()(logits, labels))


def test_an_unlabelled_sample_sends_no_gradient():
    logits, _, labels = batch()
    labels[1] = -100
    logits.requires_grad_()
    HardLabelLoss(label_smoothing=0.1)(logits, labels).sum().backward()
    assert (logits.grad[1] == 0).all()
    assert (logits.grad[0] != 0).any()


def test_regression_is_the_squared_error():
    logits = torch.tensor([[1.0], [2.0], [5.0]], requires_grad=True)
    loss = HardLabelLoss("regression", scale=2.0)(logits, torch.tensor([3, -100, 4]))
    assert loss.tolist() == [8.0, 0.0, 2.0]
    loss.sum().backward()
    assert logits.grad.tolist() == [[-8.0], [0.0], [4.0]]


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_soft_labels_are_probabilities(smoothing):
    logits, other, _ = batch()
    target = other.softmax(-1)
    smooth = (1 - smoothing) * target + smoothing / 5
    expected = -(smooth * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(
        HardLabelLoss(label_smoothing=smoothing)(logits, target.float()), expected, rtol=1e-6, atol=0
    )


# Reduction


def test_reductions():
    values = torch.tensor([1.0, 2.0, 6.0])
    assert reduce_batch(values, "mean") == 3.0
    assert reduce_batch(values, "none") is values
    with pytest.raises(ValueError, match='reduction must be "mean"'):
        reduce_batch(values, "sum")


def test_weights_are_never_normalised():
    values, weight = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([2.0, 0.0, 4.0])
    assert weighted_mean(values, "x", weight) == pytest.approx((2.0 + 24.0) / 3)
    assert weighted_mean(values[:1], "x", weight[:1]) == 2.0  # a single sample keeps its weight
    assert weighted_mean(values, "x", None) == 3.0
    scalar = torch.tensor(5.0)
    assert weighted_mean(scalar, "x", None) is scalar


def test_what_cannot_be_weighed_is_refused():
    with pytest.raises(ValueError, match="term 'gram' is one number for the whole batch.*drop the sample weights"):
        weighted_mean(torch.tensor(1.0), "gram", torch.ones(2))
    with pytest.raises(ValueError, match=r"term 'x' has shape \(2, 3\): return \(B,\)"):
        weighted_mean(torch.ones(2, 3), "x", None)


# Ramp


def test_a_ramp_rises_in_a_straight_line_and_stays():
    ramp = Ramp(0.25)
    assert ramp(torch.tensor(4.0)) == 0.0
    for progress, factor in [
        (0.0, 0.0),
        (0.125, 0.5),
        (0.25, 1.0),
        (1.0, 1.0),
        (0.0, 0.0),
    ]:  # the last: a second train()
        ramp.update(progress)
        assert ramp(torch.tensor(4.0)) == pytest.approx(4.0 * factor)
    assert list(ramp.state_dict()) == ["factor"]


def test_no_ramp_is_a_factor_of_one():
    ramp = Ramp(0)
    assert ramp(torch.tensor(4.0)) == 4.0
    ramp.update(0.0)
    assert ramp(torch.tensor(4.0)) == 4.0


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_ramp_longer_than_training_is_refused(share):
    with pytest.raises(ValueError, match=r"warm_up must lie in \[0, 1\], got .*: it is a share of training"):
        Ramp(share)


# Distiller


def test_a_distiller_must_say_what_it_does():
    class Nothing(Distiller):
        pass

    with pytest.raises(NotImplementedError, match=r"Nothing must define forward\(student, teacher, batch\)"):
        Nothing()(outputs(STUDENT), ModelOutputs(TEACHER), {})


def test_the_student_alone_has_the_task_term_only():
    logits, _, labels = batch()
    terms = StudentAlone()(outputs(logits), None, {"labels": labels})
    assert list(terms) == ["task"]
    torch.testing.assert_close(terms["task"], F.cross_entropy(logits, labels, reduction="none"))


def test_the_task_loss_reads_task_logits_only():
    logits, other, labels = batch()
    student = ModelOutputs(logits, task_logits=other)
    torch.testing.assert_close(
        KD(alpha=0.0)(student, ModelOutputs(logits), {"labels": labels})["task"],
        F.cross_entropy(other, labels, reduction="none"),
    )


# Wrapper


class Doubled(Wrapper):
    """Twice the student's logits for matching; the labels go on seeing the raw ones."""

    student_layers = ("own", "shared")
    batch_columns = ("index",)

    def forward(self, student, teacher, batch):
        return super().forward(dataclasses.replace(student, logits=2 * student.logits), teacher, batch)


def test_a_wrapper_changes_what_it_is_about_and_nothing_else():
    logits, teacher, labels = batch()
    wrapped = Doubled(WTTM(gamma=0.5))(outputs(logits), ModelOutputs(teacher), {"labels": labels})
    plain = WTTM(gamma=0.5)(outputs(logits), ModelOutputs(teacher), {"labels": labels})
    twice = WTTM(gamma=0.5)(outputs(2 * logits), ModelOutputs(teacher), {"labels": labels})
    torch.testing.assert_close(wrapped["task"], plain["task"])
    torch.testing.assert_close(wrapped["wttm"], twice["wttm"])
    assert not torch.allclose(wrapped["wttm"], plain["wttm"])


class Everything(Distiller):
    """Sets every flag, and notes every call."""

    student_layers = ("shared", "base")
    teacher_layers = ("t",)
    batch_columns = ("index", "extra")
    needs_teacher = False
    trains_teacher = needs_hard_labels = batch_coupled = True
    problem_types = ("single_label", "regression")

    def __init__(self):
        super().__init__()
        self.calls = []

    def make_teacher(self, student):
        self.calls.append("make_teacher")
        return nn.Linear(1, 1)

    def setup(self, context):
        self.calls.append("setup")

    def forward(self, student, teacher, batch):
        return {"task": torch.zeros(2), "own": torch.ones(2)}

    def teacher_terms(self, teacher, student, batch):
        self.calls.append("teacher_terms")
        return {"task": torch.ones(2), "teacher": torch.ones(2)}

    def task_logits(self, student):
        return student.logits + 1

    def logged_values(self):
        return {"figure": torch.ones(2)}

    def on_train_begin(self, context):
        self.calls.append("on_train_begin")

    def on_epoch_begin(self, context):
        self.calls.append("on_epoch_begin")

    def on_step_end(self, context):
        self.calls.append("on_step_end")

    def on_train_end(self, context):
        self.calls.append("on_train_end")


EVENTS = ("setup", "on_train_begin", "on_epoch_begin", "on_step_end", "on_train_end")


@pytest.mark.parametrize("wrap", [Doubled, lambda base: Combined({"a": base, "b": KD()}, task_from="a")])
def test_wrappers_and_combinations_hand_everything_on(wrap):
    base = Everything()
    outer = wrap(base)
    for event in EVENTS:
        getattr(outer, event)(None)
    assert outer.make_teacher(None) is not None
    assert "teacher" in outer.teacher_terms(None, None, {})
    assert base.calls == [*EVENTS, "make_teacher", "teacher_terms"]
    assert outer.task_logits(outputs(STUDENT)).tolist() == (STUDENT + 1).tolist()
    assert list(outer.logged_values()) == ["figure"]
    assert (outer.trains_teacher, outer.needs_hard_labels, outer.batch_coupled) == (True, True, True)
    assert outer.teacher_layers == ("t",)


def test_a_wrapper_joins_its_layers_and_columns_with_its_bases():
    outer = Doubled(Everything())
    assert outer.student_layers == ("own", "shared", "base")
    assert outer.batch_columns == ("index", "extra")
    assert outer.needs_teacher is False
    assert Doubled(KD()).needs_teacher is True
    assert outer.problem_types == ("single_label",)


def test_a_wrapper_of_no_distiller_is_refused():
    with pytest.raises(TypeError, match=r"Doubled wraps a Distiller, got str: pass KD\(\) or another"):
        Doubled("kd")


# Combined


def test_a_combination_is_the_weighted_sum_with_the_task_once():
    logits, teacher, labels = batch()
    arguments = outputs(logits), ModelOutputs(teacher), {"labels": labels}
    combined = Combined({"wttm": WTTM(), "kd": KD(alpha=0.5), "ttm": TTM()}, {"kd": 0.8, "ttm": 2.0}, task_from="wttm")
    terms = combined(*arguments)
    assert list(terms) == ["task", "wttm", "kd/kd", "ttm/ttm"]
    torch.testing.assert_close(terms["task"], WTTM()(*arguments)["task"])
    torch.testing.assert_close(terms["wttm"], WTTM()(*arguments)["wttm"])
    torch.testing.assert_close(terms["kd/kd"], 0.8 * KD(alpha=0.5)(*arguments)["kd"])
    torch.testing.assert_close(terms["ttm/ttm"], 2.0 * TTM()(*arguments)["ttm"])


def test_the_weight_of_the_part_with_the_task_weighs_the_task_too():
    logits, teacher, labels = batch()
    arguments = outputs(logits), ModelOutputs(teacher), {"labels": labels}
    terms = Combined({"kd": KD()}, {"kd": 3.0}, task_from="kd")(*arguments)
    torch.testing.assert_close(terms["task"], 3.0 * KD()(*arguments)["task"])


def test_teacher_terms_are_named_like_the_others():
    both = Combined({"a": Everything(), "b": Everything()}, {"b": 0.5}, task_from="a")
    terms = both.teacher_terms(None, None, {})
    assert {name: term.tolist() for name, term in terms.items()} == {
        "task": [1.0, 1.0],
        "teacher": [1.0, 1.0],
        "b/teacher": [0.5, 0.5],
    }


def test_figures_are_named_like_the_terms_and_not_weighted():
    both = Combined({"a": Everything(), "b": Everything()}, {"b": 0.5}, task_from="a")
    values = both.logged_values()
    assert {name: value.tolist() for name, value in values.items()} == {"figure": [1.0, 1.0], "b/figure": [1.0, 1.0]}


def test_problem_types_are_those_of_all_parts():
    assert Combined({"kd": KD(), "alone": StudentAlone()}, task_from="kd").problem_types == (
        "regression",
        "single_label",
    )
    assert Combined({"kd": KD(), "ttm": TTM()}, task_from="kd").problem_types == ("single_label",)


def test_two_made_teachers_are_refused():
    with pytest.raises(ValueError, match="two of the combined distillers bring a teacher.*combine at most one"):
        Combined({"a": Everything(), "b": Everything()}, task_from="a").make_teacher(None)
    assert Combined({"a": KD(), "b": TTM()}, task_from="a").make_teacher(None) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"distillers": {}, "task_from": "a"}, "at least one distiller"),
        ({"distillers": {"a": KD()}, "task_from": "b"}, "task_from='b' is not among the distillers: a"),
        (
            {"distillers": {"a": KD()}, "weights": {"c": 1.0}, "task_from": "a"},
            r"weights for \['c'\], which are not among",
        ),
        (
            {"distillers": {"a": KD()}, "weights": {"a": -1.0}, "task_from": "a"},
            r"weights must not be negative: \['a'\]",
        ),
        (
            {"distillers": {"a": KD()}, "weights": {"a": float("nan")}, "task_from": "a"},
            "weights must not be negative",
        ),
    ],
)
def test_combinations_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Combined(**arguments)
