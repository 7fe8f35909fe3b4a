"""The trainer as a whole: against a loop written by hand, what it saves, logs, weighs and evaluates."""

import copy
import json
import os
import subprocess
import sys

import datasets
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from helpers import (
    FAMILIES,
    NUM_LABELS,
    Around,
    Bank,
    MovingAverage,
    Mutual,
    Rows,
    Weighted,
    assert_identical,
    freeze_batch_norm,
    hub_rows,
    largest_difference,
    logged,
    make_trainer,
    rows,
    tiny,
    tiny_teacher,
    tokenizer,
    weights,
    widths,
)
from torch import nn
from torch.utils.data import ConcatDataset, Subset
from transformers import AutoModelForSequenceClassification, HfArgumentParser, TrainerCallback

from hfkd import DistillationTrainer, DistillationTrainingArguments
from hfkd.data import DistillationCollator
from hfkd.distillers import CRD, KD, Combined, Distiller, StandardizedLogits, StudentAlone, Wrapper


INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def whole_batch(dataset):
    return DistillationCollator(tokenizer())([dataset[i] for i in range(len(dataset))])


def logits_of(model, batch):
    return model(**{name: batch[name] for name in INPUTS}).logits


# Against plain PyTorch


@pytest.mark.parametrize("with_teacher", [False, True])
def test_training_is_the_loop_one_would_write(tmp_path, with_teacher):
    """SGD with weight decay and clipping, all samples in one batch; nothing of hfkd in the reference."""
    dataset, student = rows("bert", 8), tiny("bert")
    teacher = tiny_teacher("bert").eval() if with_teacher else None
    reference, batch = copy.deepcopy(student).train(), whole_batch(rows("bert", 8))
    no_decay = [p for n, p in reference.named_parameters() if "bias" in n or "LayerNorm" in n]
    decay = [p for n, p in reference.named_parameters() if not ("bias" in n or "LayerNorm" in n)]
    optimizer = torch.optim.SGD([{"params": decay, "weight_decay": 0.1}, {"params": no_decay}], 0.1)
    losses = []
    for _ in range(4):
        logits = logits_of(reference, batch)
        loss = F.cross_entropy(logits, batch["labels"])
        if with_teacher:
            with torch.no_grad():
                target = (logits_of(teacher, batch) / 3.0).softmax(-1)
            divergence = (target * (target.log() - (logits / 3.0).log_softmax(-1))).sum(-1).mean()
            loss = 0.4 * loss + 0.6 * 9.0 * divergence
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    trainer = make_trainer(
        tmp_path,
        student,
        teacher,
        KD(alpha=0.6, temperature=3.0) if with_teacher else None,
        dataset,
        max_steps=4,
        weight_decay=0.1,
        max_grad_norm=1.0,
    )
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx(losses, rel=1e-5)
    assert largest_difference(weights(student), weights(reference)) <= 1e-6


def test_a_second_train_goes_on_where_the_first_ended(tmp_path):
    """And its first log holds its own steps only: the first run ends between two logs."""

    def trainer(student, distiller):
        return make_trainer(
            tmp_path, student, tiny_teacher("vit"), distiller, rows("vit"), max_steps=3, logging_steps=2
        )

    twice = trainer(tiny("vit"), Weighted())
    twice.train()
    twice.train()
    first = trainer(tiny("vit"), Weighted())
    first.train()
    second = trainer(first.model, Weighted())
    second.distiller.load_state_dict(first.distiller.state_dict())
    second.train()
    assert_identical(weights(twice.model, twice.distiller), weights(second.model, second.distiller))
    for name in ("loss", "task", "kd"):
        assert logged(twice, name) == logged(second, name)


def test_a_second_train_works_in_half_precision(tmp_path):
    student, distiller = tiny("bert"), Weighted()
    trainer = make_trainer(tmp_path, student, tiny_teacher("bert"), distiller, rows("bert"), bf16=True, max_steps=20)
    trainer.train()
    middle = weights(student, distiller)
    first = logged(trainer, "loss")
    trainer.train()
    assert np.mean(logged(trainer, "loss")) < np.mean(first)
    assert not torch.equal(weights(student, distiller)["1.log_factor"], middle["1.log_factor"])


# Files


def test_the_students_files_hold_the_student_and_nothing_else(tmp_path):
    distiller = Combined({"weighted": Weighted(), "bank": Bank()}, task_from="weighted")
    student = tiny("bert")
    names = student.state_dict().keys()
    trainer = make_trainer(
        tmp_path, student, tiny_teacher("bert"), distiller, rows("bert"), save_strategy="steps", save_steps=3
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "student"))
    for folder in (tmp_path / "student", tmp_path / "checkpoint-3"):
        assert safetensors.torch.load_file(folder / "model.safetensors").keys() == names
        assert "hfkd" not in (folder / "config.json").read_text()
        loaded = AutoModelForSequenceClassification.from_pretrained(folder)
        assert_identical(weights(loaded), weights(student))
    assert not (tmp_path / "student" / "distiller.safetensors").exists()


LOAD_ALONE = """
import json, sys
sys.modules["hfkd"] = None  # import hfkd raises
import torch
from transformers import AutoModelForImageClassification
answers = {}
for name in ("vit", "resnet", "timm"):
    model = AutoModelForImageClassification.from_pretrained(f"{sys.argv[1]}/{name}").eval()
    with torch.no_grad():
        answers[name] = model(torch.load(f"{sys.argv[1]}/pixels.pt")).logits.tolist()
try:
    import hfkd
except ImportError:
    print(json.dumps(answers))
"""


def test_a_student_loads_in_a_process_that_has_no_hfkd(tmp_path):
    pixels = rows("vit", 3).columns["pixel_values"]
    torch.save(pixels, tmp_path / "pixels.pt")
    expected = {}
    for family in ("vit", "resnet", "timm"):
        student = tiny(family)
        trainer = make_trainer(tmp_path / "run", student, tiny_teacher(family), Weighted(), rows(family))
        trainer.train()
        trainer.save_model(str(tmp_path / family))
        with torch.no_grad():
            expected[family] = student.eval()(pixels).logits
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD_ALONE, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    for family, logits in expected.items():
        torch.testing.assert_close(torch.tensor(answers[family]), logits, rtol=1e-5, atol=1e-6)


# The distiller's parameters


def test_the_distillers_parameters_have_groups_of_their_own(tmp_path):
    distiller = Combined({"a": Weighted(), "b": Bank()}, task_from="a")
    student = tiny("bert")
    trainer = make_trainer(tmp_path, student, tiny_teacher("bert"), distiller, rows("bert"), weight_decay=0.1)
    trainer.create_optimizer()
    group_of = {id(p): group for group in trainer.optimizer.param_groups for p in group["params"]}
    part = distiller.parts["a"]
    matrix, vector = group_of[id(part.mixing)], group_of[id(part.log_factor)]
    assert (matrix["lr"], matrix["weight_decay"]) == (Weighted.default_learning_rate, 0.1)
    assert (vector["lr"], vector["weight_decay"]) == (Weighted.default_learning_rate, 0.0)
    own = {id(p) for p in student.parameters()}
    assert all(group_of[i]["lr"] == 0.1 for i in own)
    assert len(group_of) == len(own) + 2
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(group_of)


def test_the_arguments_learning_rate_goes_before_the_methods(tmp_path):
    distiller = Weighted()
    trainer = make_trainer(
        tmp_path, tiny("bert"), tiny_teacher("bert"), distiller, rows("bert"), distiller_learning_rate=0.02
    )
    trainer.create_optimizer()
    assert {g["lr"] for g in trainer.optimizer.param_groups for p in g["params"] if p is distiller.mixing} == {0.02}


def test_parts_keep_their_own_default_learning_rates(tmp_path):
    class Slow(Weighted):
        default_learning_rate = 1e-5

    class Like(Weighted):
        default_learning_rate = None  # the student's

    parts = {"fast": Weighted(), "slow": Slow(), "like": Like()}
    distiller = Combined(parts, task_from="fast")
    trainer = make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), distiller, rows("bert"))
    trainer.create_optimizer()
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert [rates[id(part.mixing)] for part in parts.values()] == [0.05, 1e-5, 0.1]


def test_an_optimizer_that_is_given_gets_the_distillers_parameters(tmp_path):
    student, distiller = tiny("bert"), Weighted()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.3)
    trainer = make_trainer(
        tmp_path, student, tiny_teacher("bert"), distiller, rows("bert"), trainer={"optimizers": (optimizer, None)}
    )
    trainer.train()
    assert distiller.log_factor.abs() > 1e-3
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.05]


def test_setup_is_seeded_and_leaves_the_random_numbers_alone(tmp_path):
    draws, mixings = [], []
    for distiller in (KD(), Weighted(), Weighted()):
        torch.manual_seed(11)
        make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), distiller, rows("bert"))
        draws.append(torch.rand(1).item())
        mixings.append(distiller.state_dict().get("mixing"))
    assert draws[0] == draws[1] == draws[2]
    assert torch.equal(mixings[1], mixings[2])


# Teachers that learn


def test_a_moving_average_teacher_is_the_average_of_the_past(tmp_path):
    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            past.append(weights(student))

    student, distiller, past = tiny("bert"), MovingAverage(decay=0.7), []
    expected = weights(student)
    trainer = make_trainer(tmp_path, student, None, distiller, rows("bert"), trainer={"callbacks": [Look()]})
    assert trainer.teacher_model is not student
    trainer.train()
    assert len(past) == 3
    for step in past:
        expected = {name: 0.7 * tensor + 0.3 * step[name] for name, tensor in expected.items()}
    assert largest_difference(weights(trainer.teacher_model), expected) <= 1e-6
    assert logged(trainer, "kd")[0] == pytest.approx(0.0, abs=1e-6)  # a copy agrees with its original
    assert logged(trainer, "kd")[2] > 1e-4


def test_mutual_learning_is_two_networks_each_with_the_other_as_teacher(tmp_path):
    """Against a loop by hand; neither gradient crosses over to the other network."""
    student, peer, batch = tiny("bert"), tiny("bert", seed=9), whole_batch(rows("bert", 8))
    one, other = copy.deepcopy(student), copy.deepcopy(peer)
    optimizer = torch.optim.SGD([*one.parameters(), *other.parameters()], lr=0.1)
    for _ in range(3):
        logits = logits_of(one, batch), logits_of(other, batch)
        loss = 0.0
        for own, their in (logits, logits[::-1]):
            target = their.detach().log_softmax(-1)
            loss = loss + F.cross_entropy(own, batch["labels"])
            loss = loss + F.kl_div(own.log_softmax(-1), target, log_target=True, reduction="batchmean")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trainer = make_trainer(tmp_path, student, peer, Mutual(), rows("bert", 8))
    trainer.train()
    assert largest_difference(weights(student, peer), weights(one, other)) <= 1e-6
    assert logged(trainer, "teacher_accuracy") == []
    assert set(trainer.state.log_history[0]) >= {"task", "kd", "teacher_task", "teacher_kd"}


def test_the_teacher_may_have_a_precision_of_its_own(tmp_path):
    teacher, seen = tiny_teacher("bert"), []
    teacher.register_forward_hook(lambda *arguments: seen.append(arguments[-1].logits.dtype))
    student = tiny("bert")
    trainer = make_trainer(tmp_path, student, teacher, KD(), rows("bert"), teacher_dtype="bfloat16")
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    assert next(student.parameters()).dtype == torch.float32


# Weights and labels of samples


class PerBatch(KD):
    """A term that is one number for the whole batch."""

    batch_coupled = True

    def forward(self, student, teacher, batch):
        gram = student.logits @ student.logits.T
        return {**super().forward(student, teacher, batch), "gram": gram.square().mean()}


def test_sample_weights_are_a_plain_mean_of_weighted_losses(tmp_path):
    sample_weight = torch.tensor([0.0, 3.0, 0.5, 1.0, 2.0, 0.1, 0.0, 0.4])
    dataset = rows("bert", 8).with_columns(sample_weight=sample_weight)
    student, teacher, batch = tiny("bert"), tiny_teacher("bert").eval(), whole_batch(dataset)
    with torch.no_grad():
        per_sample = F.cross_entropy(logits_of(student, batch), batch["labels"], reduction="none")
        target = logits_of(teacher, batch).softmax(-1)
        divergence = (target * (target.log() - logits_of(student, batch).log_softmax(-1))).sum(-1)
    trainer = make_trainer(tmp_path, student, teacher, KD(alpha=0.5, temperature=1.0), dataset, max_steps=1)
    trainer.train()
    assert logged(trainer, "task")[0] == pytest.approx(0.5 * (sample_weight * per_sample).sum().item() / 8, rel=1e-5)
    assert logged(trainer, "kd")[0] == pytest.approx(0.5 * (sample_weight * divergence).sum().item() / 8, rel=1e-4)


def test_sample_weights_survive_accumulation(tmp_path):
    dataset = rows("bert").with_columns(sample_weight=torch.rand(16, generator=torch.Generator().manual_seed(0)) * 3)
    trained = []
    for batch, steps in ((8, 1), (1, 8)):
        student = tiny("bert")
        make_trainer(
            tmp_path,
            student,
            tiny_teacher("bert"),
            KD(),
            dataset,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
        ).train()
        trained.append(weights(student))
    assert largest_difference(*trained) <= 1e-6


def test_terms_of_whole_batches_are_refused_under_sample_weights(tmp_path):
    dataset = rows("bert").with_columns(sample_weight=torch.ones(16))
    trainer = make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), PerBatch(), dataset)
    with pytest.raises(ValueError, match="term 'gram' is one number for the whole batch.*drop the sample weights"):
        trainer.train()
    dataset = dataset.with_columns(sample_weight=None)
    trainer = make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), PerBatch(), dataset)
    trainer.train()
    assert len(logged(trainer, "gram")) == 3


def test_a_term_of_another_shape_is_refused(tmp_path):
    class Wrong(KD):
        def forward(self, student, teacher, batch):
            return {"wrong": student.logits.square()}

    trainer = make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), Wrong(), rows("bert"))
    with pytest.raises(ValueError, match=r"term 'wrong' has shape \(8, 5\): return \(B,\), one loss a sample"):
        trainer.train()


def test_unlabelled_samples_count_nothing_and_the_others_more(tmp_path):
    """12 of 16 samples unlabelled: the others' cross-entropy is four times as heavy, distillation as ever."""
    dataset = rows("bert")
    dataset.columns["labels"][torch.arange(16) % 4 != 1] = -100
    student, batch = tiny("bert"), whole_batch(dataset)
    with torch.no_grad():
        known = batch["labels"] != -100
        mean_of_labelled = F.cross_entropy(logits_of(student, batch)[known], batch["labels"][known]).item()
    logs = {}
    for name, data in (("some", dataset), ("all", rows("bert"))):
        trainer = make_trainer(
            tmp_path,
            tiny("bert"),
            tiny_teacher("bert"),
            KD(alpha=0.5),
            data,
            max_steps=1,
            per_device_train_batch_size=16,
        )
        trainer.train()
        logs[name] = trainer
    assert logged(logs["some"], "label_scale") == [4.0]
    assert logs["some"].state.log_history[0]["step"] == 0
    assert logged(logs["all"], "label_scale") == []
    assert logged(logs["some"], "task")[0] == pytest.approx(0.5 * mean_of_labelled, rel=1e-5)
    assert logged(logs["some"], "kd")[0] == pytest.approx(logged(logs["all"], "kd")[0], rel=1e-6)


def test_the_label_scale_reaches_wrapped_and_combined_methods(tmp_path):
    dataset = rows("bert")
    dataset.columns["labels"][:8] = -100
    distiller = Combined({"a": Weighted(Wrapper(KD())), "b": Bank()}, task_from="a")
    make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), distiller, dataset, label_smoothing_factor=0.1)
    losses = [part.hard_label_loss for part in distiller.modules() if isinstance(part, Distiller)]
    assert len(losses) == 5
    assert {(loss.scale, loss.label_smoothing) for loss in losses} == {(2.0, 0.1)}
    assert Distiller.hard_label_loss.scale == 1.0


def alone(method):
    return Combined({"a": method}, task_from="a")


@pytest.mark.parametrize("wrap", [lambda method: method, StandardizedLogits, alone])
def test_a_method_that_another_trainer_has_set_up_is_refused(tmp_path, wrap):
    """Its label scale, memories and layers are the other's by then; once the first has trained it may go on."""
    some, method = rows("bert"), KD()
    some.columns["labels"][:8] = -100

    def trainer(dataset, method):
        return make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), method, dataset, max_steps=1)

    first = trainer(some, wrap(method))
    second = trainer(rows("bert"), method)
    with pytest.raises(ValueError, match="another trainer was made with this KD before .* a method of its own"):
        first.train()
    second.train()
    third = trainer(some, copy.deepcopy(method))
    trainer(rows("bert"), method)
    third.train()
    assert third.distiller.hard_label_loss.scale == 2


def test_rows_without_a_label_column_teach_by_distillation_alone(tmp_path):
    dataset = rows("bert").with_columns(labels=None)
    trainer = make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), KD(), dataset)
    trainer.train()
    assert logged(trainer, "task") == [0.0, 0.0, 0.0]
    assert min(logged(trainer, "kd")) > 0.01


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_soft_labels_are_class_probabilities(tmp_path, smoothing):
    soft = torch.rand(8, NUM_LABELS, generator=torch.Generator().manual_seed(1)).softmax(-1)
    dataset = rows("bert", 8).with_columns(labels=soft)
    student, batch = tiny("bert"), whole_batch(dataset)
    with torch.no_grad():
        target = (1 - smoothing) * soft + smoothing / NUM_LABELS
        expected = -(target * logits_of(student, batch).log_softmax(-1)).sum(-1).mean().item()
    trainer = make_trainer(tmp_path, student, None, None, dataset, max_steps=1, label_smoothing_factor=smoothing)
    trainer.train()
    assert logged(trainer, "task") == pytest.approx([expected], rel=1e-5)


# Logs


def test_logged_terms_are_means_over_the_steps_and_add_up_to_the_loss(tmp_path):
    """At learning rate 0 the terms of an epoch can be computed apart: 4 micro-batches, 2 a step, 2 steps a log."""
    student, teacher, dataset = tiny("bert"), tiny_teacher("bert").eval(), rows("bert", 16)
    batch = whole_batch(dataset)
    with torch.no_grad():
        task = 0.5 * F.cross_entropy(logits_of(student, batch), batch["labels"]).item()
        target = logits_of(teacher, batch).softmax(-1)
        kd = 0.5 * (target * (target.log() - logits_of(student, batch).log_softmax(-1))).sum(-1).mean().item()
    trainer = make_trainer(
        tmp_path,
        student,
        teacher,
        KD(alpha=0.5, temperature=1.0),
        dataset,
        max_steps=4,
        logging_steps=2,
        learning_rate=0.0,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    assert logged(trainer, "task") == pytest.approx([task, task], rel=1e-5)
    assert logged(trainer, "kd") == pytest.approx([kd, kd], rel=1e-4)
    assert logged(trainer, "loss") == pytest.approx([task + kd] * 2, rel=1e-4)


def test_the_teachers_accuracy_is_logged_before_the_first_step(tmp_path):
    dataset = rows("bert", 40)
    dataset.columns["labels"][5] = -100
    teacher, batch = tiny_teacher("bert").eval(), whole_batch(dataset)
    with torch.no_grad():
        known = batch["labels"] != -100
        accuracy = (logits_of(teacher, batch).argmax(-1) == batch["labels"])[known].float().mean().item()
    trainer = make_trainer(
        tmp_path,
        tiny("bert"),
        teacher,
        KD(),
        rows("bert"),
        trainer={"eval_dataset": {"first": dataset, "other": rows()}},
    )
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["step"] == 0
    assert first["teacher_accuracy"] == pytest.approx(accuracy)
    assert len(logged(trainer, "teacher_accuracy")) == 1


def test_the_teacher_is_scored_as_the_student_is(tmp_path):
    def metrics(prediction):
        assert prediction.predictions.ndim == 1  # classes, as the preprocessing leaves them
        return {
            "agreement": float((prediction.predictions == prediction.label_ids).mean()),
            "n": len(prediction.label_ids),
        }

    dataset = rows("bert", 30)
    teacher = tiny_teacher("bert").eval()
    with torch.no_grad():
        right = (logits_of(teacher, whole_batch(dataset)).argmax(-1) == dataset.columns["labels"]).float()
    more = {
        "eval_dataset": dataset,
        "compute_metrics": metrics,
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
    }
    trainer = make_trainer(tmp_path, tiny("bert"), teacher, KD(), rows("bert"), trainer=more)
    assert trainer.evaluate_teacher() == {"agreement": pytest.approx(right.mean().item()), "n": 30}
    few = trainer.evaluate_teacher(max_samples=3)
    assert few == {"agreement": pytest.approx(right[[0, 14, 29]].mean().item()), "n": 3}
    trainer.train()
    assert logged(trainer, "teacher_agreement") == [pytest.approx(right.mean().item())]
    assert "eval_agreement" in trainer.evaluate()


def test_metrics_that_are_computed_in_batches_are_for_the_student_alone(tmp_path):
    def metrics(prediction, compute_result):
        seen.append(len(prediction.label_ids))
        return {"n": sum(seen)} if compute_result else {}

    seen, dataset = [], rows("bert", 12)
    more = {"eval_dataset": dataset, "compute_metrics": metrics}
    trainer = make_trainer(
        tmp_path, tiny("bert"), tiny_teacher("bert"), KD(), dataset, batch_eval_metrics=True, trainer=more
    )
    # Such metrics want tensors and keep a state of their own: the teacher is scored without them.
    assert set(trainer.evaluate_teacher()) == {"accuracy"}
    assert trainer.evaluate()["eval_n"] == 12
    assert seen == [8, 4]


def test_a_teacher_of_numbers_is_scored_by_its_squared_error(tmp_path):
    dataset = rows("bert", 8).with_columns(labels=torch.randn(8, generator=torch.Generator().manual_seed(2)))
    teacher = tiny_teacher("bert", num_labels=1).eval()
    with torch.no_grad():
        expected = (logits_of(teacher, whole_batch(dataset))[:, 0] - dataset.columns["labels"]).square().mean().item()
    trainer = make_trainer(
        tmp_path, tiny("bert", num_labels=1), teacher, KD(), dataset, trainer={"eval_dataset": dataset}
    )
    assert trainer.evaluate_teacher() == {"mse": pytest.approx(expected, rel=1e-5)}


def test_evaluating_a_teacher_needs_one_and_a_data_set(tmp_path):
    with pytest.raises(ValueError, match="there is no frozen teacher to evaluate"):
        make_trainer(tmp_path, tiny("bert"), None, None, rows("bert")).evaluate_teacher()
    with pytest.raises(ValueError, match="pass a dataset: the trainer has no eval_dataset"):
        make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), KD(), rows("bert")).evaluate_teacher()


# Evaluation


def test_evaluation_is_plain_cross_entropy_over_the_labelled_samples(tmp_path):
    """Whatever the method, and though one batch has no label at all."""
    dataset = rows("bert", 20, seed=6)
    dataset.columns["labels"][:8] = -100
    dataset.columns["labels"][[9, 19]] = -100
    student, batch = tiny("bert").eval(), whole_batch(dataset)
    with torch.no_grad():
        known = batch["labels"] != -100
        expected = F.cross_entropy(logits_of(student, batch)[known], batch["labels"][known]).item()
    for teacher, distiller in ((None, None), (tiny_teacher("bert"), KD()), (tiny_teacher("bert"), Weighted())):
        trainer = make_trainer(tmp_path, student, teacher, distiller, rows("bert"), trainer={"eval_dataset": dataset})
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
        assert trainer.predict(dataset).metrics["test_loss"] == pytest.approx(expected, rel=1e-5)


def test_evaluation_goes_through_the_task_head_of_the_method(tmp_path):
    class Head(Wrapper):
        def setup(self, context):
            super().setup(context)
            self.head = nn.Linear(NUM_LABELS, NUM_LABELS)

        def task_logits(self, student):
            return self.head(student.logits)

    dataset, distiller, student = rows("bert", 8), Head(KD(alpha=0.5)), tiny("bert")
    batch = whole_batch(dataset)
    trainer = make_trainer(tmp_path, student, tiny_teacher("bert"), distiller, dataset, max_steps=1)
    with torch.no_grad():
        answers = distiller.head(logits_of(student.eval(), batch))
    torch.testing.assert_close(torch.from_numpy(trainer.predict(dataset).predictions), answers)
    trainer.train()
    assert logged(trainer, "task") == pytest.approx([0.5 * F.cross_entropy(answers, batch["labels"]).item()], rel=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [{"train_sampling_strategy": "group_by_length"}, {"dataloader_drop_last": True}],
    ids=lambda flags: [*flags][0],
)
def test_predictions_are_those_of_the_rows(tmp_path, arguments):
    """However training samples: all of them, in their order."""
    student, dataset = tiny("bert").eval(), rows("bert", 14)
    trainer = make_trainer(tmp_path, student, None, None, dataset, per_device_eval_batch_size=4, **arguments)
    with torch.no_grad():
        expected = logits_of(student, whole_batch(dataset)).numpy()
    np.testing.assert_allclose(trainer.predict(dataset).predictions, expected, rtol=1e-4, atol=1e-5)
    assert trainer.evaluate(dataset)["eval_loss"] == pytest.approx(trainer.predict(dataset).metrics["test_loss"])
    assert len(trainer.get_train_dataloader()) == (1 if "dataloader_drop_last" in arguments else 2)


def test_texts_are_scored_longest_first_and_told_in_the_order_of_the_rows(tmp_path):
    dataset, told = hub_rows(14, length=12), []

    def compute_metrics(found):
        told.append((found.predictions, found.label_ids))
        return {"first": float(found.predictions[0, 0])}

    def apart(model):
        batches = [DistillationCollator(tokenizer())([row]) for row in dataset]
        with torch.no_grad():
            return torch.cat([logits_of(model.eval(), batch) for batch in batches]).numpy()

    student, teacher = tiny("bert"), tiny_teacher("bert")
    settings = {"eval_dataset": dataset, "compute_metrics": compute_metrics}
    trainer = make_trainer(
        tmp_path, student, teacher, None, hub_rows(), trainer=settings, per_device_eval_batch_size=3
    )
    own, the_teachers = apart(student), apart(teacher)
    seen, asked = widths(student), widths(trainer.teacher_model)
    metrics, output = trainer.evaluate(), trainer.predict(dataset)
    score = trainer.evaluate_teacher()
    assert trainer.evaluate_teacher(max_samples=5)["first"] == pytest.approx(the_teachers[0, 0], rel=1e-4)
    counts = sorted((len(row["input_ids"]) for row in dataset), reverse=True)
    assert len({*counts}) > 5
    assert seen == [*counts[::3], *counts[::3]]
    assert asked[: len(counts[::3])] == counts[::3]
    assert metrics["eval_first"] == output.metrics["test_first"] == pytest.approx(own[0, 0], rel=1e-4)
    assert score["first"] == pytest.approx(the_teachers[0, 0], rel=1e-4)
    for (predictions, labels), expected in zip(told, (own, own, the_teachers), strict=False):
        np.testing.assert_allclose(predictions, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(labels, dataset["labels"][:])
    np.testing.assert_allclose(output.predictions, own, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(output.label_ids, dataset["labels"][:])
    assert trainer.compute_metrics is compute_metrics


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ({"batch_eval_metrics": True}, {"compute_metrics": lambda found, compute_result: {}}),
        ({"include_for_metrics": ["inputs"]}, {"compute_metrics": lambda found: {}}),
        ({"eval_do_concat_batches": False}, {"compute_metrics": lambda found: {}}),
        ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, {}),
        ({}, {"preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)}),
    ],
    ids=["by batch", "inputs", "apart", "kept loaders", "preprocessed"],
)
def test_who_looks_at_batches_has_them_in_the_order_of_the_rows(tmp_path, arguments, settings):
    dataset, student = hub_rows(6), tiny("bert")
    trainer = make_trainer(
        tmp_path, student, None, None, dataset, trainer=settings, per_device_eval_batch_size=1, **arguments
    )
    seen = widths(student)
    trainer.evaluate(dataset)
    assert seen == [len(row["input_ids"]) for row in dataset]


def test_loaders_that_others_read_have_the_order_of_the_rows(tmp_path):
    """Before, after and within an evaluation, and in a subclass that makes its own of them."""
    dataset, student, found = hub_rows(9, length=12), tiny("bert"), []

    def order():
        (batch,) = trainer.get_test_dataloader(dataset)
        found.append(batch["index"].tolist())

    class Look(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            order()

    def compute_metrics(given):
        order()
        np.testing.assert_array_equal(given.label_ids, dataset["labels"][:])
        return {}

    settings = {
        "eval_dataset": {"a": dataset, "b": dataset},
        "compute_metrics": compute_metrics,
        "callbacks": [Look()],
    }
    trainer = make_trainer(tmp_path, student, None, None, dataset, trainer=settings, per_device_eval_batch_size=9)
    order()
    trainer.evaluate()
    trainer.predict(dataset)
    order()
    assert found == [list(range(100, 109))] * len(found)
    assert len(found) == 7

    class Own(DistillationTrainer):
        def get_test_dataloader(self, test_dataset):
            return [*super().get_test_dataloader(test_dataset)]

    own = Own(student, args=trainer.args, processing_class=tokenizer())
    np.testing.assert_array_equal(own.predict(dataset).label_ids, dataset["labels"][:])


def test_metrics_that_predict_again_have_their_own_rows(tmp_path):
    one, other = hub_rows(9, length=12), hub_rows(7, seed=3, length=12)

    def compute_metrics(given):
        dataset = one if len(given.label_ids) == 9 else other
        np.testing.assert_array_equal(given.label_ids, dataset["labels"][:])
        if dataset is other:
            return {"again": 1.0}
        return {**trainer.evaluate_teacher(other), **trainer.predict(other).metrics}

    settings = {"compute_metrics": compute_metrics}
    trainer = make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), None, one, trainer=settings)
    assert trainer.predict(one).metrics["test_again"] == 1.0
    assert trainer.compute_metrics is compute_metrics


def test_texts_behind_a_transform_come_in_the_order_of_the_rows(tmp_path):
    """Their tokens would have to be made to be counted."""
    student = tiny("bert")
    dataset = hub_rows(6).with_transform(lambda rows: {**rows, "input_ids": [[1] * 4 for _ in rows["index"]]})
    trainer = make_trainer(tmp_path, student, None, None, hub_rows(), per_device_eval_batch_size=6)
    batch = next(iter(trainer.get_eval_dataloader(dataset.remove_columns(["attention_mask", "token_type_ids"]))))
    assert batch["index"].tolist() == list(range(100, 106))


def test_batches_by_length_are_others_in_every_epoch_and_seed(tmp_path):
    def order(seed, epoch):
        strategy = {"train_sampling_strategy": "group_by_length", "seed": seed}
        trainer = make_trainer(tmp_path, tiny("bert"), None, None, rows("bert", 32), **strategy)
        trainer.state.epoch = epoch
        return tuple(trainer._get_train_sampler())

    orders = {(seed, epoch): order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)}
    assert len({*orders.values()}) == 4
    assert {*map(len, orders.values())} == {32} == {len({*found}) for found in orders.values()}
    assert order(1, 1) == orders[1, 1]


def test_a_callback_may_evaluate_when_evaluation_ends(tmp_path):
    class Again(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            if not found:
                found.append(None)
                found[:] = [trainer.evaluate(other, metric_key_prefix="other"), trainer.predict(other).metrics]

    own, other, found = rows("bert", 6, seed=1), rows("bert", 9, seed=2), []
    settings = {"eval_dataset": own, "compute_metrics": lambda prediction: {}}
    trainer = make_trainer(tmp_path, tiny("bert"), None, None, rows("bert"), trainer=settings)
    trainer.add_callback(Again())
    trainer.evaluate()
    assert found[0]["other_loss"] == pytest.approx(found[1]["test_loss"])
    sizes = {name: len(answers.logits) for name, answers in trainer.evaluations.student.items()}
    assert sizes == {"eval": 6, "other": 9}


def test_workers_that_persist_do_not_make_one_set_of_two(tmp_path):
    """transformers keeps one loader for all sets without a name."""
    own, other = rows("bert", 6, seed=1), rows("bert", 9, seed=2)
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = make_trainer(tmp_path, tiny("bert"), None, None, rows("bert"), trainer={"eval_dataset": own}, **workers)
    sizes = [len(trainer.get_eval_dataloader(each).dataset) for each in (own, other, own)]
    assert sizes == [6, 9, 6]
    assert trainer.get_eval_dataloader() is trainer.get_eval_dataloader(own)


def test_scores_may_be_numbers_of_numpy(tmp_path):
    """As transformers lets them; the teacher's are written into the checkpoint's log, too."""
    dataset = rows("bert")
    trainer = make_trainer(
        tmp_path / "run",
        tiny("bert"),
        tiny_teacher("bert"),
        KD(),
        dataset,
        max_steps=1,
        save_strategy="steps",
        save_steps=1,
        teacher_cache=str(tmp_path / "cache"),
        trainer={"eval_dataset": dataset, "compute_metrics": lambda prediction: {"one": np.float32(1)}},
    )
    trainer.train()
    assert (tmp_path / "run" / "checkpoint-1" / "trainer_state.json").is_file()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_from_its_teacher(tmp_path, family):
    trainer = make_trainer(
        tmp_path,
        freeze_batch_norm(tiny(family)),
        tiny_teacher(family),
        KD(alpha=1.0, temperature=2.0),
        rows(family),
        max_steps=30,
        learning_rate=0.05,
    )
    trainer.train()
    losses = logged(trainer, "kd")
    assert np.mean(losses[-4:]) < 0.75 * np.mean(losses[:4])


# What hooks and setup may use


class Diary(StudentAlone):
    def __init__(self):
        super().__init__()
        self.entries = []

    def note(self, event, context):
        self.entries.append((event, context.epoch, round(context.progress, 3)))

    def setup(self, context):
        self.context = context
        assert context.device == torch.device("cpu")
        assert context.is_main_process

    def on_train_begin(self, context):
        self.note("train", context)

    def on_epoch_begin(self, context):
        self.note("epoch", context)

    def on_step_end(self, context):
        self.note("step", context)

    def on_train_end(self, context):
        self.note("end", context)


@pytest.mark.parametrize("wrap", [lambda diary: diary, Wrapper, lambda diary: Combined({"a": diary}, task_from="a")])
def test_hooks_come_in_order_with_epoch_and_progress(tmp_path, wrap):
    diary = Diary()
    make_trainer(tmp_path, tiny("bert"), None, wrap(diary), rows("bert"), max_steps=4).train()
    assert diary.entries == [
        ("train", 0, 0.0), ("epoch", 0, 0.0), ("step", 0, 0.25), ("step", 1, 0.5),
        ("epoch", 1, 0.5), ("step", 1, 0.75), ("step", 2, 1.0), ("end", 2, 1.0),
    ]  # fmt: skip


def test_the_context_gives_models_data_and_batches(tmp_path):
    class Plain(type(rows())):
        def without_augmentation(self):
            return rows("bert", 11)

    dataset, held_out = Plain(rows("bert", 16).columns), rows("bert", 5, seed=8)
    diary = Diary()
    trainer = make_trainer(tmp_path, tiny("bert"), None, diary, dataset, trainer={"held_out_dataset": held_out})
    context = diary.context
    assert context.student is trainer.model
    assert context.teacher is context.teacher_model is None
    assert context.train_dataset is dataset
    assert context.held_out_dataset is held_out
    batches = list(context.batches(held_out))
    assert [len(batch["labels"]) for batch in batches] == [5]
    assert torch.equal(batches[0]["index"], torch.arange(5))
    seen = context.gather(torch.cat([batch["index"] for batch in context.batches(dataset)]))
    assert seen.tolist() == list(range(11))  # in order, of the un-augmented view
    texts = hub_rows(11)
    counts = [len(row["input_ids"]) for row in texts]
    by_length = [batch["index"] for batch in context.batches(texts, 3, by_length=True)]
    assert [len(index) for index in by_length] == [3, 3, 3, 2]
    assert torch.cat(by_length).tolist() == sorted(range(100, 111), key=lambda index: -counts[index - 100])
    assert torch.cat([batch["index"] for batch in context.batches(texts, 3)]).tolist() == list(range(100, 111))
    part = Subset(Subset(Plain(rows("bert", 16, seed=4).columns), range(1, 10)), [4, 2])
    (batch,) = context.batches(part)
    plain = rows("bert", 11)
    assert torch.equal(batch["labels"], plain.columns["labels"][[5, 3]])  # seed 4 has others
    assert torch.equal(context.take(part, [1])["index"], torch.tensor([3]))


def test_the_context_knows_the_numbers_of_the_samples(tmp_path):
    columns = {name: column.tolist() for name, column in rows("bert", 3).columns.items()}
    dataset = datasets.Dataset.from_dict({**columns, "index": [4, 2, 9]})
    for train_dataset, numbers in ((dataset, [4, 2, 9]), (rows("bert", 3), [0, 1, 2])):
        trainer = make_trainer(tmp_path, tiny("bert"), None, Diary(), train_dataset)
        assert trainer.context.sample_index().tolist() == numbers


def test_the_context_gives_the_teacher_to_ask(tmp_path):
    class Ask(KD):
        def on_train_begin(self, context):
            batch = next(context.batches(context.train_dataset))
            self.answer, self.batch = context.teacher(batch).logits, batch

    distiller, teacher = Ask(), tiny_teacher("bert")
    trainer = make_trainer(tmp_path, tiny("bert"), teacher, distiller, rows("bert"))
    trainer.train()
    assert trainer.context.teacher_model is teacher
    assert not distiller.answer.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(distiller.answer, logits_of(teacher, distiller.batch))


def test_finished_batches_pass_through(tmp_path):
    """A data set that makes whole batches itself, as hfkd.data.ImageDataset does."""

    class Whole(type(rows())):
        def __getitems__(self, indices):
            asked.append(len(indices))
            return {name: column[indices] for name, column in self.columns.items()}

    asked, trained = [], []
    for kind in (Whole, type(rows())):
        student = freeze_batch_norm(tiny("cifar"))
        make_trainer(tmp_path, student, tiny_teacher("cifar"), Bank(), kind(rows("cifar").columns)).train()
        trained.append(weights(student))
    assert set(asked) == {2, 8}  # the first two are for trying the models out
    assert_identical(*trained)


# Arguments


def test_the_arguments_come_from_a_command_line():
    (args,) = HfArgumentParser(DistillationTrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", "out", "--distiller_learning_rate", "0.01", "--teacher_dtype", "bfloat16", "--use_cpu"]
    )
    assert (args.distiller_learning_rate, args.teacher_dtype) == (0.01, "bfloat16")
    (args,) = HfArgumentParser(DistillationTrainingArguments).parse_args_into_dataclasses(["--output_dir", "out"])
    assert (args.distiller_learning_rate, args.teacher_dtype, args.logging_nan_inf_filter) == (None, None, False)


def test_a_given_optimizer_trains_the_teacher_too(tmp_path):
    student, teacher = tiny("bert"), tiny_teacher("bert")
    before = weights(teacher)
    given = {"optimizers": (torch.optim.SGD(student.parameters(), lr=0.1), None)}
    make_trainer(tmp_path, student, teacher, Mutual(), rows("bert"), trainer=given).train()
    assert not torch.equal(weights(teacher)["0.classifier.weight"], before["0.classifier.weight"])


def test_a_teacher_of_its_own_precision_leaves_the_callers_as_it_is(tmp_path):
    teacher = tiny_teacher("bert")
    before = weights(teacher)
    trainer = make_trainer(tmp_path, tiny("bert"), teacher, KD(), rows("bert"), teacher_dtype="bfloat16")
    trainer.train()
    assert next(trainer.teacher.model.parameters()).dtype == torch.bfloat16
    assert_identical(weights(teacher), before)


def test_a_part_of_the_teacher_in_training_mode_is_noticed(tmp_path):
    teacher = tiny_teacher("resnet")
    trainer = make_trainer(tmp_path, tiny("resnet"), teacher, KD(), rows("resnet"))
    teacher.resnet.train()
    with pytest.raises(RuntimeError, match="must stay frozen"):
        trainer.train()


def test_a_subset_is_augmented_and_scaled_as_its_whole(tmp_path):
    from hfkd.data import ImageDataset, load_image_data, processor_for

    student = tiny("cifar", num_labels=10)
    data = load_image_data("digits", labels=20, max_train_samples=40)
    whole = ImageDataset(data.train, processor_for(student), augment="crop")
    part = torch.utils.data.Subset(whole, range(0, 40, 2))
    trainer = make_trainer(tmp_path, student, None, None, part, num_train_epochs=2, max_steps=-1)
    known = (whole.labels[::2] != -100).sum()
    assert trainer.label_scale == 20 / known
    trainer.train()
    assert int(whole._epoch) == 1


class HalfAsFast(Around):
    """Counts the epochs of what is inside in its own way."""

    def set_epoch(self, epoch):
        self.dataset.set_epoch(epoch // 2)


def test_every_part_of_a_training_set_learns_what_epoch_it_is(tmp_path):
    from hfkd.data import ImageDataset, load_image_data, processor_for

    student = tiny("cifar", num_labels=10)
    split = load_image_data("digits", max_train_samples=40).train
    parts = [
        ImageDataset(split.select(range(start, start + 10)), processor_for(student), augment="crop")
        for start in range(0, 40, 10)
    ]
    dataset = ConcatDataset([parts[0], Subset(parts[1], [1, 2]), Around(parts[2]), HalfAsFast(parts[3])])
    make_trainer(tmp_path, student, None, None, dataset, num_train_epochs=3, max_steps=-1).train()
    assert [int(part._epoch) for part in parts] == [2, 2, 2, 1]


def test_data_sets_in_a_row_are_scaled_and_looked_up_as_one(tmp_path):
    one, other = rows("bert"), rows("bert", seed=1).with_columns(index=torch.arange(50, 66))
    one.columns["labels"][:8] = -100
    with pytest.raises(ValueError, match="is not 0, 1, …, and the set does not show it"):
        make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), CRD(), ConcatDataset([one, other]))
    whole = Rows({name: torch.cat([column, other.columns[name]]) for name, column in one.columns.items()})
    for dataset in (one, other, whole):
        dataset.index = dataset.columns["index"].numpy()
    runs = {}
    for name, dataset in (("parts", ConcatDataset([one, other])), ("whole", whole)):
        distiller = CRD(negatives=4)
        trainer = make_trainer(tmp_path / name, tiny("bert"), tiny_teacher("bert"), distiller, dataset)
        assert trainer.label_scale == 32 / 24
        trainer.train()
        runs[name] = weights(trainer.model, trainer.distiller)
    assert_identical(runs["parts"], runs["whole"])


def test_nothing_pickled_and_no_token_is_left_beside_the_student(tmp_path):
    trainer = make_trainer(tmp_path, tiny("bert"), None, None, rows("bert"), hub_token="hf_planted")
    trainer.save_model(tmp_path / "student")
    trainer.create_model_card()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert "training_args.bin" not in [path.name for path in written]
    for path in written:
        assert b"hf_planted" not in path.read_bytes()
        assert str(tmp_path).encode() not in path.read_bytes()


def test_a_model_card_takes_what_transformers_takes(tmp_path):
    trainer = make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), KD(), rows("bert"), max_steps=1)
    trainer.train()
    trainer.log({"eval_curve": [1, 2], "eval_accuracy": 0.5})
    trainer.create_model_card("en", "mit", dataset="toy", tasks="text-classification")
    card = (tmp_path / "README.md").read_text()
    assert "language: en" in card
    assert "| eval_accuracy | 0.5000 |" in card
    assert "eval_curve" not in card
    assert "| max_steps | 1 |" in card
    assert "num_train_epochs" not in card


@pytest.mark.parametrize("there", [False, True])
def test_batches_travel_from_pinned_memory_without_a_wait(tmp_path, monkeypatch, there):
    """Where there is an accelerator; a copy that is waited for waits for all that runs before it."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
    args = DistillationTrainingArguments(str(tmp_path))
    assert args.dataloader_pin_memory is args.accelerator_config.non_blocking is there
    unpinned = DistillationTrainingArguments(str(tmp_path), dataloader_pin_memory=False)
    assert not unpinned.accelerator_config.non_blocking
