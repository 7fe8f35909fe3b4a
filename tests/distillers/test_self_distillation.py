"""Self-distillation: the average is that of the student's past, on one process and two, and resumes."""

import pytest
import torch
from helpers import (
    assert_identical,
    largest_difference,
    logged,
    make_trainer,
    rows,
    tiny,
    weights,
)
from references import STUDENT, TARGET, TEACHER, batch
from transformers import TrainerCallback

from hfkd.distillers import ModelOutputs, SelfDistillation
from hfkd.functional import kd_loss


@pytest.mark.parametrize("family", ["bert", "resnet"])
def test_the_teacher_is_the_average_of_the_past_with_its_statistics(tmp_path, family):
    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            past.append(weights(student))

    student, past = tiny(family), []
    expected = weights(student)
    trainer = make_trainer(
        tmp_path, student, None, SelfDistillation(decay=0.7, warm_up=0.0), rows(family),
        trainer={"callbacks": [Look()]},
    )  # fmt: skip
    trainer.train()
    assert len(past) == 3
    for step in past:
        expected = {
            name: 0.7 * tensor + 0.3 * step[name] if tensor.is_floating_point() else tensor
            for name, tensor in expected.items()
        }
    assert largest_difference(weights(trainer.teacher_model), expected) <= 1e-6
    assert trainer.teacher_model is not student
    assert not trainer.teacher_model.training
    if family == "bert":  # with BatchNorm the copy, in evaluation mode, answers otherwise from the start
        assert logged(trainer, "self_kd")[0] == pytest.approx(0.0, abs=1e-6)
    assert logged(trainer, "self_kd")[2] > 1e-5


def test_golden_term():
    arguments = ModelOutputs(STUDENT, STUDENT), ModelOutputs(TEACHER), {"labels": TARGET}
    terms = SelfDistillation(weight=3.0, warm_up=0.0)(*arguments)
    assert terms["self_kd"].item() == pytest.approx(3.0 * 0.244439775684, abs=1e-10)
    assert terms["task"].item() == pytest.approx(0.7873386717, abs=1e-9)
    assert SelfDistillation()(*arguments)["self_kd"] == 0.0  # before the warm-up


def test_the_term_is_kd_times_the_ramp():
    student, teacher, labels = batch()
    method = SelfDistillation(weight=2.0, temperature=3.0, warm_up=0.5)
    method.ramp.update(0.125)
    terms = method(ModelOutputs(student, student), ModelOutputs(teacher), {"labels": labels})
    expected = kd_loss(student, teacher, temperature=3.0, reduction="none")
    torch.testing.assert_close(terms["self_kd"], 0.25 * 2.0 * expected)


def test_batch_norm_and_ramp_resume_bit_for_bit(tmp_path):
    def make():
        return make_trainer(
            tmp_path,
            tiny("resnet"),
            None,
            SelfDistillation(decay=0.5, warm_up=1.0),
            rows("resnet"),
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
        )

    whole, resumed = make(), make()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    one, other = (weights(t.model, t.teacher_model, t.distiller) for t in (whole, resumed))
    assert_identical(one, other)
    assert logged(whole, "self_kd") == logged(resumed, "self_kd")
    assert whole.distiller.ramp.factor == 1.0  # after the last of two steps an epoch


def test_two_processes_keep_one_average(two_processes):
    """BatchNorm's statistics differ between processes after a step; the average must not."""
    ranks = two_processes["averages"]
    assert_identical(ranks[0]["teacher"], ranks[1]["teacher"])
    assert_identical(ranks[0]["distiller"], ranks[1]["distiller"])
    assert ranks[0]["moved"]


def test_an_average_in_half_precision_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be kept in torch.bfloat16 .* Leave out teacher_dtype"):
        make_trainer(tmp_path, tiny("bert"), None, SelfDistillation(), rows("bert"), teacher_dtype="bfloat16")
