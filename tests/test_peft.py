"""Adapted (PEFT) students and teachers: saved as adapters, merged, resumed, hashed, loaded by name.

Every method meets an adapted student in ``test_under_conditions.py``, a folded one in ``test_fold.py``, influence in
``test_influence.py``, two processes in ``test_ddp.py``.
"""

import pytest
import torch
import transformers
from helpers import (
    Mutual,
    assert_identical,
    freeze_batch_norm,
    largest_difference,
    logged,
    make_trainer,
    rows,
    tiny,
    tiny_teacher,
    weights,
)
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model

from hfkd.distillers import AT, KD, HiddenStates
from hfkd.features import run_model


# What is adapted, what is trained whole, and where BatchNorm is.
LAYERS = {
    "bert": (["query", "value"], ["classifier"], []),
    "vit": (["q_proj", "v_proj"], ["classifier"], []),
    "timm": (["conv_pw", "conv_pwl", "conv_head"], ["classifier"], ["bn1", "bn2", "bn3"]),
    "cifar": (["conv1", "conv2"], ["linear"], ["bn1", "bn2", "shortcut.1"]),
}
every_family = pytest.mark.parametrize("family", LAYERS)


def adapted(model, family, *, batch_norm=True, **options):
    """With an adapter that is not zero."""
    targets, heads, statistics = LAYERS[family]
    torch.manual_seed(3)
    saved = heads + (statistics if batch_norm else [])
    return get_peft_model(
        model, LoraConfig(r=2, target_modules=targets, modules_to_save=saved, init_lora_weights=False, **options)
    )


@torch.no_grad()
def answers(model, family):
    columns = {k: v for k, v in rows(family, 8, seed=5).columns.items() if k not in ("labels", "index")}
    return run_model(model.eval(), columns).logits


def learning(folder, family, student, **arguments):
    """AdamW, 4 steps an epoch, a checkpoint after step 3 of 6."""
    defaults = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch"}
    defaults |= {"learning_rate": 1e-2, "per_device_train_batch_size": 4}
    return make_trainer(folder, student, tiny_teacher(family), KD(), rows(family), **{**defaults, **arguments})


# Students


@every_family
def test_an_adapter_is_saved_as_one_merges_and_resumes(tmp_path, family):
    """BatchNorm in training mode: its statistics are in the adapter."""

    def make():
        return learning(tmp_path, family, adapted(tiny(family, dropout=0.1), family))

    whole, resumed = make(), make()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_identical(weights(whole.model), weights(resumed.model))
    assert logged(whole, "loss") == logged(resumed, "loss")
    checkpoint = tmp_path / "checkpoint-6"
    assert not (checkpoint / "model.safetensors").exists()
    learned = answers(whole.model, family)
    assert (learned - answers(make().model, family)).abs().max() > 0.01
    loaded = PeftModel.from_pretrained(tiny(family), checkpoint)
    torch.testing.assert_close(answers(loaded, family), learned, rtol=1e-5, atol=1e-5)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(answers(merged, family), learned, rtol=1e-5, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    plain = type(tiny(family)).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(answers(plain, family), learned, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "names"), [("cifar", "'bn1', 'bn2', 'shortcut.1'"), ("timm", "'bn1', 'bn2', 'bn3'")]
)
def test_statistics_that_no_adapter_holds_are_refused(tmp_path, family, names):
    message = rf"the adapter of the student leaves out .*modules_to_save=\[..., {names}\]"
    with pytest.raises(ValueError, match=message):
        learning(tmp_path, family, adapted(tiny(family), family, batch_norm=False))
    learning(tmp_path, family, adapted(freeze_batch_norm(tiny(family)), family, batch_norm=False))
    peer = adapted(tiny("cifar", seed=7), "cifar", batch_norm=False)
    with pytest.raises(ValueError, match="the adapter of the teacher leaves out"):
        make_trainer(tmp_path, tiny("cifar"), peer, Mutual(), rows("cifar"))


@pytest.mark.parametrize("family", ["bert", "cifar"])
def test_the_best_adapter_is_loaded_at_the_end(tmp_path, family):
    """The later steps are too large to help."""
    trainer = learning(
        tmp_path,
        family,
        adapted(tiny(family), family),
        optim="sgd",
        learning_rate={"bert": 3.0, "cifar": 1.0}[family],
        max_steps=4,
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        trainer={"eval_dataset": rows(family, 24, seed=3)},
    )
    trainer.train()
    losses = logged(trainer, "eval_loss")
    assert min(losses) < losses[-1] - 0.01  # else the last would do
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.parametrize(("family", "distiller"), [("bert", HiddenStates), ("vit", HiddenStates), ("timm", AT)])
def test_in_bfloat16_an_adapter_learns_in_float32(tmp_path, family, distiller):
    losses = []
    for bf16 in (False, True):
        student = adapted(freeze_batch_norm(tiny(family)), family)
        trainer = make_trainer(
            tmp_path, student, tiny_teacher(family), distiller(), rows(family), bf16=bf16, max_steps=2
        )
        start = weights(student)
        trainer.train()
        assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
        learns = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
        assert all(not torch.equal(start[f"0.{name}"], weights(student)[f"0.{name}"]) for name in learns)
        losses.append(logged(trainer, "loss")[0])
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert losses[1] != losses[0]


# Teachers


@every_family
def test_an_adapted_teacher_is_the_merged_one(tmp_path, family):
    students = []
    for merge in (False, True):
        teacher = adapted(tiny_teacher(family), family)
        teacher = teacher.merge_and_unload() if merge else teacher
        start = weights(teacher)
        student = tiny(family)
        make_trainer(tmp_path, student, teacher, KD(), rows(family), learning_rate=0.01).train()
        assert_identical(weights(teacher), start)
        students.append(weights(student))
    without = tiny(family)
    make_trainer(tmp_path, without, tiny_teacher(family), KD(), rows(family), learning_rate=0.01).train()
    assert largest_difference(*students) <= 1e-5
    assert largest_difference(students[0], weights(without)) > 1e-4


def test_features_of_an_adapted_teacher_are_the_merged_ones(tmp_path):
    teachers = adapted(tiny_teacher("bert"), "bert"), adapted(tiny_teacher("bert"), "bert").merge_and_unload()
    runs = [make_trainer(tmp_path, tiny("bert"), teacher, HiddenStates(), rows("bert")) for teacher in teachers]
    for run in runs:
        run.train()
    assert logged(runs[0], "loss") == pytest.approx(logged(runs[1], "loss"), rel=1e-5)


def cached(folder, teacher, name="cache"):
    cache = str(folder / name)
    return make_trainer(folder / "out", tiny("bert"), teacher, KD(), rows("bert"), teacher_cache=cache, max_steps=2)


def moved(teacher):
    with torch.no_grad():
        next(p for name, p in teacher.named_parameters() if "lora_B" in name).add_(0.1)


OTHERS = {
    "weights": ({}, moved),
    "scale": ({"lora_alpha": 64}, lambda teacher: None),
    "disabled": ({}, lambda teacher: teacher.base_model.disable_adapter_layers()),
    "none": ({}, lambda teacher: teacher.unload()),
}


@pytest.mark.parametrize(("options", "change"), OTHERS.values(), ids=OTHERS)
def test_the_cache_knows_an_adapter_from_another(tmp_path, options, change):
    cached(tmp_path, adapted(tiny_teacher("bert"), "bert")).train()
    again = cached(tmp_path, adapted(tiny_teacher("bert"), "bert"))
    again.train()
    assert (again.cache.hits, again.cache.misses) == (16, 0)
    other = adapted(tiny_teacher("bert"), "bert", **options)
    before = answers(other, "bert")
    change(other)
    assert options or not torch.equal(answers(other, "bert"), before)
    with pytest.raises(ValueError, match="is another one: teacher is"):
        cached(tmp_path, other)


def test_an_adapter_saved_and_loaded_has_the_same_cache(tmp_path):
    teacher = adapted(tiny_teacher("bert"), "bert")
    cached(tmp_path, teacher).train()
    teacher.save_pretrained(tmp_path / "adapter")
    loaded = cached(tmp_path, PeftModel.from_pretrained(tiny_teacher("bert"), tmp_path / "adapter"))
    loaded.train()
    assert (loaded.cache.hits, loaded.cache.misses) == (16, 0)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"), reason="transformers 5.17 does not find an adapter's head"
)
@pytest.mark.parametrize("family", ["bert", "vit"])
@pytest.mark.parametrize("cache", [False, True])
def test_an_adapters_folder_is_a_teachers_name(tmp_path, family, cache):
    tiny_teacher(family).save_pretrained(tmp_path / "base")
    teacher = adapted(type(tiny(family)).from_pretrained(tmp_path / "base"), family)
    teacher.save_pretrained(tmp_path / "adapter")
    options = {"teacher_cache": str(tmp_path / "cache")} if cache else {}
    trainer = make_trainer(tmp_path / "out", tiny(family), tmp_path / "adapter", KD(), rows(family), **options)
    torch.testing.assert_close(answers(trainer.teacher_model, family), answers(teacher, family), rtol=0, atol=1e-6)
    trainer.train()
