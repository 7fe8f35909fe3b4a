"""What we lean on in transformers: signatures we override, and bugs we work around.

A canary fails when upstream mends what it pins: then the workaround it names can go, for those versions.
"""

import inspect
import re
from pathlib import Path

import pytest
import torch
from helpers import assert_identical, freeze_batch_norm, rows, tiny, tokenizer, weights
from packaging.version import Version
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from hfkd import DistillationTrainer
from hfkd.saving import SavingTrainer


# What transformers calls, and with which arguments in which order; None: any, we hand them on as they come.
OVERRIDDEN = {
    "train": ["resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "hyperparameter_search": None,
    "_hp_search_setup": ["trial"],
    "_wrap_model": ["model", "training", "dataloader"],
    "_prepare_for_training": ["max_steps", "train_dataloader", "resume_from_checkpoint"],
    "autocast_smart_context_manager": ["cache_enabled"],
    "create_optimizer": ["model"],
    "_set_signature_columns_if_needed": [],
    "_get_collator_with_removed_columns": ["data_collator", "description"],
    "_get_dataloader": None,
    "get_train_dataloader": [],
    "get_eval_dataloader": ["eval_dataset"],
    "_get_train_sampler": ["train_dataset"],
    "_get_eval_sampler": ["eval_dataset"],
    "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
    "prediction_step": ["model", "inputs", "prediction_loss_only", "ignore_keys"],
    "evaluation_loop": ["dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix"],
    "evaluate": ["eval_dataset", "ignore_keys", "metric_key_prefix"],
    "predict": ["test_dataset", "ignore_keys", "metric_key_prefix"],
    "log": ["logs", "start_time"],
    "_maybe_log_save_evaluate": None,
    "_save_checkpoint": ["model", "trial"],
    "_save_rng_state": ["output_dir"],
    "_save": ["output_dir", "state_dict"],
    "init_hf_repo": None,
    "push_to_hub": ["commit_message", "blocking", "token", "revision", "private", "kwargs"],
    "_push_from_checkpoint": ["checkpoint_folder"],
    "_finish_current_push": [],
    "save_state": [],
    "_save_optimizer_and_scheduler": ["output_dir"],
    "_load_optimizer_and_scheduler": ["checkpoint"],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_load_best_model": [],
    "create_model_card": None,
}


FROM_5_23 = {"private"}  # no argument before


def test_every_override_is_listed():
    own = {**vars(SavingTrainer), **vars(DistillationTrainer)}
    ours = {name for name, value in own.items() if callable(value) and hasattr(Trainer, name)}
    assert ours - {"__init__"} == set(OVERRIDDEN)


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_the_methods_we_override_have_the_signatures_we_know(name):
    upstream = list(inspect.signature(getattr(Trainer, name)).parameters)[1:]
    if OVERRIDDEN[name] is not None:
        assert {*OVERRIDDEN[name]} - {*upstream} <= FROM_5_23
        assert upstream == [one for one in OVERRIDDEN[name] if one in upstream]
        ours = list(inspect.signature(getattr(DistillationTrainer, name)).parameters)[1:]
        assert ours == OVERRIDDEN[name]


def test_the_oldest_versions_that_are_tried_are_those_that_an_installation_allows():
    root = Path(__file__).parent.parent
    required = re.search(r"install_requires=\[(.+?)\]", (root / "setup.py").read_text(), re.DOTALL)[1]
    lowest = {name: Version(version) for name, version in re.findall(r'"([\w-]+)>=([\d.]+)', required)}
    tried = dict(line.split("==") for line in (root / ".github/oldest.txt").read_text().splitlines())
    assert len(lowest) == required.count('"') / 2
    assert {name: Version(version) for name, version in tried.items()} == lowest


def test_callbacks_are_called_as_we_know():
    """We stand before it, to fold a task head around some events."""
    assert [*inspect.signature(CallbackHandler.call_event).parameters][:2] == ["self", "event"]
    assert "self.call_event(" in inspect.getsource(CallbackHandler.on_evaluate)


def stock(folder, model, dataset, trainer=Trainer, **arguments):
    args = TrainingArguments(
        str(folder),
        max_steps=1,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **{"save_strategy": "no", **arguments},
    )
    tokens = tokenizer() if "input_ids" in dataset[0] else None
    return trainer(model=model, args=args, train_dataset=dataset, processing_class=tokens)


class BatchMean(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


def update(folder, family, trainer, batch, accumulation):
    model = freeze_batch_norm(tiny(family))
    before = torch.cat([tensor.flatten() for tensor in model.state_dict().values()])
    steps = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    stock(folder, model, rows(family).with_columns(index=None), trainer, **steps).train()
    return (torch.cat([tensor.flatten() for tensor in model.state_dict().values()]) - before).norm().item()


@pytest.mark.parametrize("family", ["bert", "distilbert", "vit", "resnet"])
def test_canary_01_a_batch_mean_is_still_scaled_wrongly_under_accumulation(tmp_path, family):
    """Workaround: ``loss_is_scaled_for_ga`` and ``model_accepts_loss_kwargs`` of DistillationTrainer."""
    one, accumulated = update(tmp_path, family, BatchMean, 8, 1), update(tmp_path, family, BatchMean, 2, 4)
    assert accumulated / one == pytest.approx(4.0, rel=1e-3)


@pytest.mark.parametrize("family", ["bert", "distilbert", "resnet"])
def test_canary_02_the_stock_trainer_is_still_off_under_accumulation(tmp_path, family):
    """transformers #47688. Workaround: the baseline runs through DistillationTrainer, with its own cross-entropy."""
    one, accumulated = update(tmp_path, family, Trainer, 8, 1), update(tmp_path, family, Trainer, 2, 4)
    assert accumulated / one == pytest.approx(4.0, rel=1e-3)


@pytest.mark.parametrize("reload", ["resume", "best"])
def test_canary_09_a_vit_checkpoint_still_loses_tensors(tmp_path, reload):
    """transformers #43701, #48805. Workaround: ``load_weights``, behind both reloads."""
    dataset = rows("vit").with_columns(index=None)
    trainer = stock(tmp_path, tiny("vit"), dataset, save_strategy="steps", save_steps=1)
    trainer.train()
    other = stock(tmp_path, tiny("vit", seed=1), dataset)
    checkpoint = str(tmp_path / "checkpoint-1")
    if reload == "resume":
        other._load_from_checkpoint(checkpoint)
    else:
        other.state.best_model_checkpoint = checkpoint
        other._load_best_model()
    with pytest.raises(AssertionError):
        assert_identical(weights(other.model), weights(trainer.model))


def test_canary_21_the_stock_collator_still_crashes_on_a_teachers_columns():
    """Workaround: DistillationCollator."""
    samples = [{"input_ids": [2] * n, "teacher_input_ids": [3] * (n + 1), "label": 0} for n in (2, 4)]
    with pytest.raises(ValueError, match="teacher_input_ids"):
        DataCollatorWithPadding(tokenizer())(samples)


def test_canary_22_a_student_is_still_saved_by_the_first_process_alone(monkeypatch):
    """Whatever ``save_on_each_node`` says. Workaround: ``check_processes`` refuses it on several nodes."""
    for name, value in (("_is_torch_distributed_initialized", True), ("_get_torch_distributed_rank", 2)):
        monkeypatch.setattr(f"transformers.distributed.mixin.{name}", lambda value=value: value)
    assert tiny("bert").should_save_on_this_rank(is_main_process=True) is False
