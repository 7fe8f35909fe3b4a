"""A run that is interrupted and resumed is the run that is not, bit for bit."""

import shutil

import pytest
import safetensors.torch
import torch
from helpers import (
    Bank,
    MovingAverage,
    Mutual,
    Weighted,
    assert_identical,
    logged,
    make_trainer,
    rows,
    tiny,
    tiny_teacher,
    weights,
)

from hfkd.checkpoints import FILES_NAME
from hfkd.distillers import KD, Combined
from hfkd.saving import DISTILLER_NAME, load_weights


def learning(tmp_path, family, distiller, teacher, *, accumulation=1, **arguments):
    """AdamW with a schedule, shuffling, dropout; 4 steps an epoch, a checkpoint after step 6 of 8."""
    return make_trainer(
        tmp_path,
        tiny(family, dropout=0.2),
        teacher,
        distiller,
        rows(family, 16),
        max_steps=8,
        optim="adamw_torch",
        learning_rate=1e-3,
        weight_decay=0.01,
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        save_strategy="steps",
        save_steps=6,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        **arguments,
    )


def assert_resumes(make, tmp_path, *, teacher=False):
    whole = make()
    whole.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    modules = ["model", "distiller", *(["teacher_model"] if teacher else [])]
    one, other = (weights(*(getattr(trainer, name) for name in modules)) for trainer in (whole, resumed))
    assert_identical(one, other)
    assert logged(whole, "loss") == logged(resumed, "loss")
    assert whole.state.epoch == 2.0
    return whole, resumed


@pytest.mark.parametrize("family", ["vit", "bert", "timm", "cifar"])
def test_resuming_in_mid_epoch_changes_nothing(tmp_path, family):
    def make():
        distiller = Combined({"weighted": Weighted(), "bank": Bank()}, {"bank": 0.5}, task_from="weighted")
        return learning(tmp_path, family, distiller, tiny_teacher(family))

    whole, resumed = assert_resumes(make, tmp_path)
    learned = resumed.distiller.parts["weighted"]
    assert learned.log_factor.abs() > 1e-3
    assert not torch.equal(learned.mixing, make().distiller.parts["weighted"].mixing)


def test_resuming_in_mid_epoch_under_accumulation_changes_nothing(tmp_path):
    assert_resumes(lambda: learning(tmp_path, "vit", Weighted(), tiny_teacher("vit"), accumulation=2), tmp_path)


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance", "sequential"])
def test_resuming_knows_the_batches_of_every_order(tmp_path, strategy):
    def make():
        return learning(tmp_path, "bert", KD(), tiny_teacher("bert"), train_sampling_strategy=strategy)

    assert_resumes(make, tmp_path)


def test_a_moving_average_resumes(tmp_path):
    whole, _ = assert_resumes(lambda: learning(tmp_path, "vit", MovingAverage(), None), tmp_path, teacher=True)
    assert (tmp_path / "checkpoint-6" / "teacher" / "model.safetensors").is_file()
    assert whole.teacher_model is not whole.model


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_a_trained_teacher_resumes(tmp_path, family):
    def make():
        return learning(tmp_path, family, Mutual(), tiny(family, seed=9, dropout=0.2))

    whole, _ = assert_resumes(make, tmp_path, teacher=True)
    start = weights(tiny(family, seed=9))
    assert not torch.equal(weights(whole.teacher_model)["0.classifier.weight"], start["0.classifier.weight"])


def test_a_frozen_teacher_is_in_no_checkpoint(tmp_path):
    learning(tmp_path, "vit", Weighted(), tiny_teacher("vit")).train()
    checkpoint = tmp_path / "checkpoint-6"
    assert not (checkpoint / "teacher").exists()
    names = set(safetensors.torch.load_file(checkpoint / "model.safetensors"))
    assert not [name for name in names if "teacher" in name or "distiller" in name]
    assert set(safetensors.torch.load_file(checkpoint / DISTILLER_NAME)) == {"log_factor", "mixing"}


def test_a_method_without_state_leaves_no_file(tmp_path):
    learning(tmp_path, "bert", KD(), tiny_teacher("bert")).train()
    assert not (tmp_path / "checkpoint-6" / DISTILLER_NAME).exists()


def test_a_checkpoint_without_the_distillers_state_is_refused(tmp_path):
    learning(tmp_path, "bert", KD(), tiny_teacher("bert")).train()
    other = learning(tmp_path, "bert", Weighted(), tiny_teacher("bert"))
    with pytest.raises(FileNotFoundError, match="Weighted has state to restore: .* from another method"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_the_distillers_file_missing_is_named(tmp_path):
    trainer = learning(tmp_path, "bert", Weighted(), tiny_teacher("bert"))
    trainer.train()
    (tmp_path / "checkpoint-6" / DISTILLER_NAME).unlink()
    (tmp_path / "checkpoint-6" / FILES_NAME).unlink()  # else that is who says so
    with pytest.raises(FileNotFoundError, match="distiller.safetensors is missing, and Weighted has state to restore"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_loading_weights_is_strict(tmp_path):
    model = tiny("vit")
    model.save_pretrained(tmp_path / "whole")
    state = safetensors.torch.load_file(tmp_path / "whole" / "model.safetensors")
    shutil.copytree(tmp_path / "whole", tmp_path / "torn")
    state.pop("classifier.weight")
    safetensors.torch.save_file(state, tmp_path / "torn" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks 1 tensors of ViTForImageClassification, such as \['classifier.weight'\]"
    ):
        load_weights(tiny("vit", seed=1), str(tmp_path / "torn"))
    other = tiny("vit", seed=1)
    load_weights(other, str(tmp_path / "whole"))
    assert_identical(weights(other), weights(model))
