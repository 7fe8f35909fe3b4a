"""One test for each line of the design's trainer notes: what transformers does to a distillation trainer.

Each fails when its remedy is taken out. The traps of upstream that a remedy answers are pinned in test_upstream.py.
"""

import copy
import re
import weakref
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
import transformers
import two_processes as scenarios
from datasets import Dataset
from helpers import (
    FAMILIES,
    NUM_LABELS,
    VOCABULARY,
    Bank,
    Weighted,
    assert_identical,
    batch_norms,
    freeze_batch_norm,
    largest_difference,
    logged,
    make_trainer,
    rows,
    tiny,
    tiny_teacher,
    tokenizer,
    weights,
)
from packaging.version import Version
from transformers import PreTrainedTokenizerFast, TrainerCallback

from hfkd.checks import check_processes
from hfkd.data import DistillationCollator
from hfkd.distillers import AKD, CRD, DKD, KD, PKT, RKD, TTM, WTTM, Combined


def distance(one, other):
    return sum(((one[name] - other[name]).double() ** 2).sum().item() for name in one) ** 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_trap_01_accumulating_four_times_two_equals_one_times_eight(tmp_path, family):
    results = []
    for batch, steps in ((8, 1), (2, 4)):
        student = freeze_batch_norm(tiny(family)).double()
        start = weights(student)
        trainer = make_trainer(
            tmp_path,
            student,
            tiny_teacher(family).double(),
            KD(),
            rows(family).double(),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
        )
        trainer.train()
        assert distance(weights(student), start) > 0.05
        assert not trainer.model_accepts_loss_kwargs  # what transformers before 5.20 asks
        results.append((weights(student), logged(trainer, "loss"), logged(trainer, "kd")))
    (one, *one_logs), (other, *other_logs) = results
    assert largest_difference(one, other) <= 1e-9
    torch.testing.assert_close(one_logs, other_logs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "distilbert", "resnet"])
def test_trap_02_the_students_own_loss_is_never_taken(tmp_path, family, monkeypatch):
    """The baseline too: accumulation is right where the stock Trainer is four times off."""
    results = []
    for batch, steps in ((8, 1), (2, 4)):
        student = freeze_batch_norm(tiny(family)).double()
        given = []
        student.register_forward_pre_hook(lambda _, args, kwargs, given=given: given.extend(kwargs), with_kwargs=True)
        trainer = make_trainer(
            tmp_path,
            student,
            None,
            None,
            rows(family).double(),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
        )
        trainer.train()
        assert given
        assert "labels" not in given
        results.append(weights(student))
    assert largest_difference(*results) <= 1e-9


def test_trap_03_two_processes_average_their_gradients_once(two_processes, tmp_path):
    reference = scenarios.student_alone(tmp_path)["weights"]
    start = weights(tiny("bert"))
    update = distance(two_processes["student_alone"][0]["weights"], start) / distance(reference, start)
    assert update == pytest.approx(1.0, abs=1e-5)


def test_trap_04_processes_stay_identical(two_processes):
    for name in ("learnable_find_unused", "learnable_all_used", "student_alone", "mutual"):
        first, second = (result["weights"] for result in two_processes[name])
        assert_identical(first, second)


def test_trap_05_the_distillers_parameters_are_clipped_and_zeroed_with_the_students(tmp_path):
    gradients = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            gradients.extend(parameter.grad for parameter in distiller.parameters())

    student, distiller = tiny("bert"), Weighted()
    trainer = make_trainer(
        tmp_path,
        student,
        tiny_teacher("bert"),
        distiller,
        rows("bert"),
        max_steps=1,
        max_grad_norm=0.01,
        distiller_learning_rate=0.1,
        trainer={"callbacks": [Look()]},
    )
    start = weights(student, distiller)
    trainer.train()
    assert logged(trainer, "grad_norm")[0] > 0.1
    assert distance(weights(student, distiller), start) == pytest.approx(0.1 * 0.01, rel=1e-3)
    assert distance(weights(distiller), {"0." + n[2:]: t for n, t in start.items() if n.startswith("1.")}) > 1e-4
    assert gradients == [None, None]


def test_trap_06_the_student_gets_no_child(tmp_path):
    student = tiny("bert")
    before = [name for name, _ in student.named_modules()], student.state_dict().keys()
    trainer = make_trainer(tmp_path, student, tiny_teacher("bert"), Weighted(), rows("bert"), max_steps=1)
    trainer.train()
    assert trainer.model is student
    assert ([name for name, _ in student.named_modules()], student.state_dict().keys()) == before


@pytest.mark.parametrize("evaluate_first", [False, True])
def test_trap_07_autocast_reaches_student_and_teacher_and_the_losses_are_float32(tmp_path, evaluate_first):
    class Look(KD):
        def forward(self, student, teacher, batch):
            inside.append(torch.is_autocast_enabled("cpu"))
            outputs.extend((student.logits.dtype, student.task_logits.dtype, teacher.logits.dtype))
            terms = super().forward(student, teacher, batch)
            outputs.extend(term.dtype for term in terms.values())
            return terms

    seen, inside, outputs = {"student": set(), "teacher": set()}, [], []
    student, teacher = tiny("bert"), tiny_teacher("bert")
    for name, model in (("student", student), ("teacher", teacher)):
        model.bert.encoder.layer[0].output.dense.register_forward_hook(
            lambda _, args, output, name=name: seen[name].add(output.dtype)
        )
    dataset = rows("bert")
    trainer = make_trainer(
        tmp_path, student, teacher, Look(), dataset, bf16=True, max_steps=2, trainer={"eval_dataset": dataset}
    )
    if evaluate_first:
        trainer.evaluate()
        assert seen["student"] == {torch.bfloat16}
        seen["student"].clear()
    trainer.train()
    assert seen == {"student": {torch.bfloat16}, "teacher": {torch.bfloat16}}
    assert set(outputs) == {torch.float32}
    assert inside == [False, False]
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert trainer.predict(dataset).predictions.dtype == "float32"


def test_trap_08_the_teacher_never_trains(tmp_path):
    teacher = tiny_teacher("resnet")
    modes = []
    teacher.register_forward_hook(lambda module, *_: modes.extend(part.training for part in module.modules()))
    before = weights(teacher)
    assert batch_norms(teacher)
    trainer = make_trainer(tmp_path, tiny("resnet"), teacher, Weighted(), rows("resnet"), optim="adamw_torch")
    trainer.train()
    assert modes
    assert not any(modes)
    assert_identical(weights(teacher), before)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_trap_08_a_teacher_put_into_training_mode_is_refused(tmp_path):
    teacher = tiny_teacher("resnet")
    trainer = make_trainer(tmp_path, tiny("resnet"), teacher, KD(), rows("resnet"))
    teacher.train()
    with pytest.raises(RuntimeError, match="must stay frozen"):
        trainer.train()


def test_trap_09_a_vit_checkpoint_is_read_back_whole(tmp_path):
    dataset = rows("vit")
    trainer = make_trainer(
        tmp_path, tiny("vit"), None, None, dataset, save_strategy="steps", save_steps=2, max_steps=2
    )
    trainer.train()
    other = make_trainer(tmp_path, tiny("vit", seed=1), None, None, dataset)
    other._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    assert_identical(weights(other.model), weights(trainer.model))


def test_trap_09_the_best_vit_has_the_logged_metric(tmp_path):
    dataset = rows("vit", 24)
    trainer = make_trainer(
        tmp_path,
        tiny("vit"),
        tiny_teacher("vit"),
        Weighted(),
        dataset,
        max_steps=6,
        learning_rate=0.3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        trainer={"eval_dataset": rows("vit", 24, seed=3)},
    )
    trainer.train()
    losses = logged(trainer, "eval_loss")
    assert min(losses) == trainer.state.best_metric
    assert min(losses) < losses[-1] - 0.01  # else the last model would do
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


class Refresher(KD):
    """Refreshes something at each epoch's start, once."""

    def setup(self, context):
        self.register_buffer("refreshed_at", torch.tensor([-1]))
        self.register_buffer("refreshes", torch.tensor([0]))
        self.calls = []

    def on_epoch_begin(self, context):
        self.calls.append(context.epoch)
        if context.epoch > self.refreshed_at:
            self.refreshed_at.fill_(context.epoch)
            self.refreshes += 1


def test_trap_10_a_refresh_is_not_repeated_when_a_run_resumes_in_mid_epoch(tmp_path):
    def trainer():
        return make_trainer(
            tmp_path,
            tiny("bert"),
            tiny_teacher("bert"),
            Refresher(),
            rows("bert"),
            max_steps=6,
            save_strategy="steps",
            save_steps=3,
        )

    whole = trainer()
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert whole.distiller.calls == [0, 1, 2]
    assert resumed.distiller.calls == [1, 2]  # the event did fire again, in the middle of epoch 1
    assert whole.distiller.refreshes == resumed.distiller.refreshes == 3


def test_trap_11_every_process_keeps_its_buffers_and_the_bank_is_complete(two_processes, tmp_path):
    first, second = (result["bank"] for result in two_processes["bank"])
    # Nothing but the distiller writes a bank: not even DDP, from process 0.
    assert (first.pop("0.own").item(), second.pop("0.own").item()) == (0.0, 1.0)
    assert_identical(first, second)
    assert (first["0.visits"] == 2).all()
    alone = scenarios.bank(tmp_path)["bank"]
    torch.testing.assert_close(first["0.answers"], alone["0.answers"])


@pytest.mark.parametrize("kind", ["datasets", "map-style"])
def test_trap_12_columns_that_only_teacher_or_distiller_take_survive(tmp_path, kind):
    class Look(Bank):
        def forward(self, student, teacher, batch):
            columns.update(batch)
            return super().forward(student, teacher, batch)

    columns, student_saw, teacher_saw = set(), set(), []
    dataset = rows("bert")
    segments = dict(enumerate(dataset.columns["token_type_ids"]))
    if kind == "datasets":
        texts = {name: [row[name].tolist() for row in dataset] for name in dataset.columns}
        dataset = Dataset.from_dict({**texts, "sentence": ["a"] * len(dataset)})
    student, teacher = tiny("distilbert"), tiny_teacher("bert")
    student.register_forward_pre_hook(lambda _, args, kwargs: student_saw.update(kwargs), with_kwargs=True)
    teacher.register_forward_pre_hook(lambda _, args, kwargs: teacher_saw.append(kwargs), with_kwargs=True)
    trainer = make_trainer(tmp_path, student, teacher, Look(), dataset, max_steps=2)
    teacher_saw.clear()  # the first two samples, to try it out
    trainer.train()
    assert {"index", "token_type_ids", "labels"} <= columns
    assert "sentence" not in columns
    assert student_saw == {"input_ids", "attention_mask"}
    # Every segment id of every sample has reached the teacher, and they are not all zero.
    assert all(kwargs.keys() == {"input_ids", "attention_mask", "token_type_ids"} for kwargs in teacher_saw)
    seen = sum(kwargs["token_type_ids"].sum().item() for kwargs in teacher_saw)
    assert seen == sum(row.sum().item() for row in segments.values()) > 0
    assert (trainer.distiller.visits == 1).all()


def test_trap_13_evaluation_gathers_logits_only(tmp_path):
    student = tiny("bert", output_hidden_states=True, output_attentions=True, attn_implementation="eager")
    dataset = rows("bert", 11)
    trainer = make_trainer(tmp_path, student, tiny_teacher("bert"), KD(), dataset)
    predictions = trainer.predict(dataset).predictions
    assert predictions.shape == (11, NUM_LABELS)
    batch = DistillationCollator(tokenizer())([dataset[i] for i in range(3)])
    loss, logits, labels = trainer.prediction_step(trainer._module, batch, prediction_loss_only=False)
    assert (loss.shape, logits.shape, labels.shape) == ((), (3, NUM_LABELS), (3,))


@pytest.mark.parametrize(
    "make", [lambda: None, lambda: KD(alpha=0.25), lambda: WTTM(), lambda: Weighted(KD(alpha=0.0))]
)
def test_trap_14_label_smoothing_is_that_of_torch(tmp_path, make):
    student, dataset, distiller = tiny("bert"), rows("bert", 8), make()
    batch = DistillationCollator(tokenizer())([dataset[i] for i in range(8)])
    share = {KD: 0.75, Weighted: 1.0, WTTM: 1.0, type(None): 1.0}[type(distiller)]
    with torch.no_grad():
        logits = student(**{name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}).logits
    expected = share * F.cross_entropy(logits, batch["labels"], label_smoothing=0.3).item()
    teacher = None if distiller is None else tiny_teacher("bert")
    trainer = make_trainer(
        tmp_path,
        student,
        teacher,
        distiller,
        dataset,
        max_steps=1,
        label_smoothing_factor=0.3,
        trainer={"eval_dataset": dataset},
    )
    plain = trainer.evaluate()["eval_loss"]
    assert plain == pytest.approx(F.cross_entropy(logits, batch["labels"]).item(), rel=1e-5)
    trainer.train()
    assert logged(trainer, "task") == pytest.approx([expected], rel=1e-5)
    assert expected != pytest.approx(share * plain, rel=1e-3)


def test_trap_15_data_parallel_is_refused(tmp_path):
    from hfkd import DistillationTrainer, DistillationTrainingArguments

    args = DistillationTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    assert args.n_gpu <= 1
    args._n_gpu = 2
    with pytest.raises(ValueError, match="nn.DataParallel.*accelerate launch.*CUDA_VISIBLE_DEVICES=0"):
        DistillationTrainer(tiny("bert"), tiny_teacher("bert"), KD(), args, train_dataset=rows("bert"))


def test_trap_16_with_one_output_kd_is_the_squared_error(tmp_path):
    student, teacher = tiny("bert", num_labels=1), tiny_teacher("bert", num_labels=1)
    dataset = rows("bert", 8).with_columns(labels=torch.randn(8))
    batch = DistillationCollator(tokenizer())([dataset[i] for i in range(8)])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        answers, wanted = student(**inputs).logits[:, 0], teacher.eval()(**inputs).logits[:, 0]
    trainer = make_trainer(tmp_path, student, teacher, KD(alpha=0.25), dataset, max_steps=1)
    trainer.train()
    assert logged(trainer, "kd") == pytest.approx([0.25 * ((answers - wanted) ** 2).mean().item()], rel=1e-4)
    assert logged(trainer, "task") == pytest.approx(
        [0.75 * ((answers - batch["labels"]) ** 2).mean().item()], rel=1e-4
    )
    assert logged(trainer, "kd")[0] > 0.01


@pytest.mark.parametrize(
    "distiller", [TTM(), WTTM(), Combined({"kd": KD(), "ttm": TTM()}, task_from="kd"), Weighted(TTM())]
)
def test_trap_16_methods_of_the_softmax_are_refused_with_one_output(tmp_path, distiller):
    dataset = rows("bert").with_columns(labels=torch.randn(16))
    with pytest.raises(ValueError, match=r"not defined for regression problems .*: use KD\(\)"):
        make_trainer(tmp_path, tiny("bert", num_labels=1), tiny_teacher("bert", num_labels=1), distiller, dataset)


def test_trap_17_no_value_leaves_the_device_between_logs(tmp_path, monkeypatch):
    reads = []
    counting = weakref.WeakSet()
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"):
        original = getattr(torch.Tensor, name)

        def read(tensor, *args, _name=name, _original=original, **kwargs):
            if counting and not isinstance(tensor, torch.nn.Parameter):
                reads.append(_name)
            return _original(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, read)

    class Watch(TrainerCallback):
        """From the end of step 1 to the end of step 5; the log comes after step 6, the shuffling before step 1."""

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                counting.add(self)
            if state.global_step == 5:
                counting.discard(self)

    # Images, so that no collator or attention mask looks at the values of a batch.
    adaptive = {"c": AKD(alpha="learned", cam=True), "d": AKD(ema=0.5), "e": DKD()}
    coupled = {"f": CRD(negatives=8), "g": RKD(), "h": PKT()}
    distiller = Combined({"a": Weighted(), "b": WTTM(), **adaptive, **coupled}, task_from="a")
    trainer = make_trainer(
        tmp_path,
        tiny("resnet"),
        tiny_teacher("resnet"),
        distiller,
        rows("resnet", 48),
        max_steps=6,
        logging_steps=6,
        max_grad_norm=1.0,
        trainer={"callbacks": [Watch()], "data_collator": torch.utils.data.default_collate},
    )
    assert trainer.args.logging_nan_inf_filter is False
    # As on a GPU, where reading waits for an event: test_faults.py. What is read then is on the host already.
    losses = trainer._finite_losses
    losses.is_at_hand = False
    monkeypatch.setattr(losses, "check", losses._waiting.clear)
    monkeypatch.setattr(losses, "_to_host", lambda flag: (flag, Mock()))
    trainer.train()
    assert reads == []
    assert len(logged(trainer, "b/wttm")) == 1


def test_trap_18_both_settings_of_find_unused_parameters_are_right(two_processes, tmp_path):
    for name, find_unused in (("learnable_find_unused", True), ("learnable_all_used", False)):
        reference = scenarios.SCENARIOS[name](tmp_path)["weights"]
        for result in two_processes[name]:
            assert (result["is_ddp"], result["find_unused"]) == (True, find_unused)
            assert largest_difference(result["weights"], reference) <= 1e-6


def test_trap_19_torchrun_and_accelerate_launch_link_two_processes(two_processes, launch, tmp_path):
    for result in two_processes["learnable_all_used"]:
        assert (result["processes"], result["type"]) == (2, "MULTI_CPU")
    done = launch(
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes=2",
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
        "--main_process_port=0",
        scenarios.__file__,
        tmp_path,
        "learnable_all_used",
        "--use_cpu",
    )
    assert done.returncode == 0, done.stderr
    for rank, expected in enumerate(two_processes["learnable_all_used"]):
        result = torch.load(tmp_path / f"learnable_all_used-{rank}.pt", weights_only=True)
        assert (result["processes"], result["type"]) == (2, "MULTI_CPU")
        assert_identical(result["weights"], expected["weights"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs the two processes are linked")
@pytest.mark.skipif(Version(transformers.__version__) < Version("5.18"), reason="transformers 5.17 links them")
def test_trap_19_two_processes_that_do_not_know_each_other_are_refused(launch, tmp_path):
    done = launch(
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
        scenarios.__file__,
        tmp_path,
        "student_alone",
    )
    assert done.returncode != 0
    assert re.search(r"2 processes were launched, but each would train alone .* add --use_cpu", done.stderr)
    assert not list(tmp_path.glob("*.pt"))


def test_trap_20_an_engine_that_is_not_active_is_refused_on_two_processes(two_processes):
    for result in two_processes["fully_sharded"]:
        assert re.search("FSDP was asked for, but MULTI_CPU is active.*Drop its options", result["message"])


def test_trap_20_an_engine_asked_for_by_the_launcher_and_not_active_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RuntimeError, match="FSDP was asked for, but NO is active.*Drop its options"):
        make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), KD(), rows("bert"))


@pytest.mark.parametrize("how", ["environment", "arguments"])
def test_trap_20_deepspeed_that_is_not_active_is_refused(tmp_path, monkeypatch, how):
    # Where deepspeed is not installed, transformers' own arguments refuse it: so the check alone.
    trainer = make_trainer(tmp_path, tiny("bert"), None, None, rows("bert"))
    check_processes(trainer.args, trainer.accelerator)
    if how == "environment":
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    else:
        trainer.args.deepspeed = {"zero_optimization": {"stage": 2}}
    with pytest.raises(RuntimeError, match="DEEPSPEED was asked for, but NO is active.*Drop its options"):
        check_processes(trainer.args, trainer.accelerator)


def test_trap_21_two_tokenizers_are_padded_each_on_its_own(tmp_path):
    """Lengths differ between student and teacher, and between samples."""
    generator = torch.Generator().manual_seed(0)

    def texts(shortest, longest):
        lengths = torch.randint(shortest, longest + 1, (16,), generator=generator).tolist()
        return [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]

    student_texts, teacher_texts = texts(3, 6), texts(5, 12)
    dataset = Dataset.from_dict(
        {
            "input_ids": student_texts,
            "attention_mask": [[1] * len(text) for text in student_texts],
            "teacher_input_ids": teacher_texts,
            "teacher_attention_mask": [[1] * len(text) for text in teacher_texts],
            "label": torch.randint(0, NUM_LABELS, (16,), generator=generator).tolist(),
            "index": list(range(16)),
        }
    )
    teacher = tiny_teacher("bert")
    with torch.no_grad():
        expected = torch.cat([teacher.eval()(torch.tensor([text])).logits for text in teacher_texts])
    own = copy.deepcopy(tokenizer())
    own.pad_token = "59"
    assert isinstance(own, PreTrainedTokenizerFast)
    trainer = make_trainer(
        tmp_path,
        tiny("bert"),
        teacher,
        Bank(),
        dataset,
        max_steps=2,
        trainer={"processing_class": tokenizer(), "teacher_processing_class": own},
    )
    trainer.train()
    torch.testing.assert_close(trainer.distiller.answers, expected, rtol=1e-4, atol=1e-5)
