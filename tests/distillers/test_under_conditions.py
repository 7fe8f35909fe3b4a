"""Every method on the contract's table under what a run may ask for: a new row there is tested here too.

Accumulation, two processes, bfloat16, an interruption, an adapted (PEFT) student and torch.compile must not change
what a method learns. BatchNorm is frozen where batches of different sizes are compared.
"""

import copy
import traceback
from dataclasses import replace
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import two_processes as scenarios
from helpers import (
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
from peft import LoraConfig, get_peft_model
from test_contract import METHODS, NAMES, build, build_double
from torch.overrides import TorchFunctionMode
from transformers import TrainerCallback

from hfkd.distillers import KD, HiddenStates
from hfkd.features import base_model, run_model
from hfkd.saving import DISTILLER_NAME


def methods(wanted=lambda distiller: True):
    """The table's rows, or some of them, as parameters of a test."""
    chosen = [
        pytest.param(*row, id=name) for row, name in zip(METHODS, NAMES, strict=True) if wanted(row[0](**row[1]))
    ]
    return pytest.mark.parametrize(("method", "arguments"), chosen)


every_method = methods()


def everything(trainer):
    """Whatever training may change."""
    return weights(trainer.model, trainer.distiller, *([trainer.teacher_model] if trainer._saves_teacher else []))


# Accumulation


class Recorder:
    """Notes each micro-batch, and the state of the random numbers when the method meets it."""

    def __init__(self, module):
        self.calls = []
        module.register_forward_pre_hook(lambda _, args: self.calls.append((args[0], torch.get_rng_state())))


@methods(lambda distiller: not distiller.batch_coupled)
def test_accumulation_changes_nothing(tmp_path, method, arguments):
    """Two micro-batches of four are a batch of eight; for methods that couple samples, see the next test."""
    trained = []
    for batch, steps in ((8, 1), (4, 2)):
        _, trainer = build_double(
            tmp_path,
            method,
            arguments,
            max_steps=2,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
        )
        trainer.train()
        trained.append(everything(trainer))
    assert largest_difference(*trained) <= 1e-9


@methods(lambda distiller: distiller.batch_coupled)
def test_an_accumulated_step_is_the_mean_of_the_micro_batches_losses(tmp_path, method, arguments):
    """One step of the trainer against the same step written out."""
    distiller, trainer = build_double(
        tmp_path,
        method,
        arguments,
        max_steps=1,
        learning_rate=0.01,
        distiller_learning_rate=0.01,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    recorder = Recorder(trainer._module)
    own, twin = copy.deepcopy(trainer.model).train(), copy.deepcopy(distiller).train()
    trainer.train()
    assert len(recorder.calls) == 2
    losses = []
    for batch, random_state in recorder.calls:
        outputs = run_model(own, batch, layers=twin.student_layers)
        outputs = replace(outputs, task_logits=twin.task_logits(outputs))
        with torch.no_grad():
            answers = run_model(trainer.teacher_model.eval(), batch, layers=twin.teacher_layers)
        torch.set_rng_state(random_state)
        losses.append(sum(term.mean() for term in twin(outputs, answers, batch).values()))
    (sum(losses) / 2).backward()
    with torch.no_grad():
        for parameter in (*own.parameters(), *twin.parameters()):
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
    twin.on_step_end(trainer.context)
    assert largest_difference(weights(trainer.model, distiller), weights(own, twin)) <= 1e-12
    assert logged(trainer, "loss") == pytest.approx([sum(losses).item() / 2], abs=1e-4)


# Two processes


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return scenarios.every_method(tmp_path_factory.mktemp("one_process"))


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_are_one(two_processes, one_process, name):
    """Of two micro-batches for methods that couple samples; parameters, memories and averages alike."""
    first, second = (results[name] for results in two_processes["every_method"])
    assert_identical(first, second)
    assert largest_difference(first, one_process[name]) <= 1e-9


# Precision


class Look(TrainerCallback):
    """Notes the precision of what a method is given and gives, and whether its parameters get gradients."""

    def __init__(self):
        self.given, self.terms, self.gradients = set(), set(), {}

    def watch(self, distiller):
        distiller.register_forward_pre_hook(self.before)
        distiller.register_forward_hook(lambda _, args, terms: self.terms.update(t.dtype for t in terms.values()))
        self.distiller = distiller

    def before(self, _, args):
        for outputs in args[:2]:
            if outputs is not None:
                self.given.update(t.dtype for t in (outputs.logits, *outputs.features.values()))
        self.given.add(args[0].task_logits.dtype)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.gradients = {name: parameter.grad for name, parameter in self.distiller.named_parameters()}


@every_method
def test_in_bfloat16_losses_are_float32_and_near(tmp_path, method, arguments):
    """Within 3 % at the first step: bfloat16 has 8 bits, and the tiny models' logits are large."""
    losses = []
    for bf16 in (False, True):
        look = Look()
        distiller, trainer = build(
            tmp_path,
            method,
            arguments,
            student=lambda family: freeze_batch_norm(tiny(family)),
            max_steps=1,
            bf16=bf16,
            trainer={"callbacks": [look]},
        )
        look.watch(distiller)
        trainer.train()
        assert look.given == look.terms == {torch.float32}
        assert look.gradients.keys() == dict(distiller.named_parameters()).keys()
        for name, gradient in look.gradients.items():
            assert gradient is not None, name
            assert gradient.dtype == torch.float32
            assert gradient.isfinite().all(), name
        losses += logged(trainer, "loss")
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert losses[1] != losses[0]


# Interruption


def interrupted(folder, method, arguments, **options):
    """AdamW with a schedule and dropout; 4 steps an epoch, a checkpoint after step 3 of 6."""
    return build(
        folder,
        method,
        arguments,
        **{"student": lambda family: tiny(family, dropout=0.2), **options},
        max_steps=6,
        optim="adamw_torch",
        learning_rate=1e-3,
        weight_decay=0.01,
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        save_strategy="steps",
        save_steps=3,
        per_device_train_batch_size=4,
    )[1]


def steps(trainer):
    """What was logged at each step: the loss, its terms and a method's own figures."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_resumes(make, folder):
    whole = make()
    whole.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert_identical(everything(whole), everything(resumed))
    assert steps(whole) == steps(resumed)
    assert len(steps(whole)) == 6
    return whole


@every_method
def test_an_interrupted_run_is_the_uninterrupted_one(tmp_path, method, arguments):
    assert_resumes(lambda: interrupted(tmp_path, method, arguments), tmp_path)


# Adapted students


def adapted(family):
    """BatchNorm's statistics are in no adapter: it stays as it is."""
    torch.manual_seed(3)
    student = freeze_batch_norm(tiny(family, dropout=0.1))
    if family == "cifar":
        config = LoraConfig(r=2, target_modules=["conv1", "conv2"], modules_to_save=["linear"])
    else:
        config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    return get_peft_model(student, config)


@every_method
def test_an_adapted_student_learns_and_resumes(tmp_path, method, arguments):
    """Only its adapter and head; a method that makes a second network like it asks for that one instead."""
    distiller = method(**arguments)
    if distiller.trains_teacher and distiller.make_teacher(tiny("bert")) is not None:
        with pytest.raises(ValueError, match=rf"{method.__name__} .*PEFT.*: pass"):
            interrupted(tmp_path, method, arguments, student=adapted)
        return
    trainer = interrupted(tmp_path, method, arguments, student=adapted)
    learns = {f"0.{name}" for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    start = weights(trainer.model)
    whole = assert_resumes(lambda: interrupted(tmp_path, method, arguments, student=adapted), tmp_path)
    end = weights(whole.model)
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved == learns
    assert any("lora_A" in name for name in learns)
    assert any("modules_to_save" in name for name in learns)
    assert not (tmp_path / "checkpoint-3" / "model.safetensors").exists()
    saved = safetensors.torch.load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    assert len(saved) == len(learns)
    assert base_model(whole.model) is not whole.model


# Waiting for the device


class Waits(TorchFunctionMode):
    """Notes what would wait for a device, if there were one, where our code asks for it.

    Upstream's is not ours to avoid: transformers looks whether a mask is all ones unless it is compiled.
    """

    METHODS = "item tolist cpu numpy nonzero unique masked_select __bool__ __int__ __float__ __index__ equal allclose"

    def __init__(self):
        super().__init__()
        self.seen, self.calls = [], 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        name = getattr(func, "__name__", "")
        index = args[1] if name in ("__getitem__", "__setitem__") else ()
        masks = [part for part in (index if isinstance(index, tuple) else (index,)) if isinstance(part, torch.Tensor)]
        if name in self.METHODS.split() or any(mask.dtype == torch.bool for mask in masks):
            stack = [frame for frame in traceback.extract_stack()[:-1] if "/torch/" not in frame.filename]
            if not any(f"/{package}/" in stack[-1].filename for package in ("transformers", "accelerate", "timm")):
                self.seen.append(f"{name} at {stack[-1].filename}:{stack[-1].lineno}")
        return func(*args, **(kwargs or {}))


def waits_in_two_steps(trainer):
    """Of forward and backward, and of what the method does at their end; of a long run, where nothing is due then."""
    waits = Waits()
    # As on a device, where whether the loss is finite is asked before the optimizer's step.
    trainer._finite_losses.is_at_hand = False
    trainer._finite_losses._to_host = lambda flag: (flag, SimpleNamespace(synchronize=lambda: None))
    training_step, on_step_end = trainer.training_step, trainer.distiller.on_step_end

    def watched(function):
        def run(*args, **kwargs):
            with waits:
                return function(*args, **kwargs)

        return run

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    trainer.training_step, trainer.distiller.on_step_end = watched(training_step), watched(on_step_end)
    trainer.add_callback(Stop())
    trainer.train()
    assert trainer.state.global_step == 2
    assert waits.calls > 100
    return waits.seen


@every_method
def test_no_step_waits_for_the_device(tmp_path, method, arguments):
    _, trainer = build(tmp_path, method, arguments, max_steps=100, logging_steps=100)
    assert waits_in_two_steps(trainer) == []


@pytest.mark.parametrize("family", ["bert", "cifar"])
def test_no_step_waits_for_the_device_to_read_the_cache(tmp_path, family):
    trainer = make_trainer(
        tmp_path / "run",
        tiny(family),
        tiny_teacher(family),
        KD(),
        rows(family),
        max_steps=100,
        logging_steps=100,
        teacher_cache=str(tmp_path / "cache"),
    )
    trainer.warm_teacher_cache()
    asked = trainer.cache.misses
    assert waits_in_two_steps(trainer) == []
    assert (trainer.cache.hits, trainer.cache.misses) == (16, asked)


def test_what_would_wait_is_noticed(tmp_path):
    class Curious(KD):
        def forward(self, student, teacher, batch):
            some = student.logits[batch["labels"] > 1].mean()
            return {**super().forward(student, teacher, batch), "some": some if some.isfinite() else 0 * some}

        def on_step_end(self, context):
            self.rows = context.gather(torch.ones(2)).cpu()

    trainer = make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), Curious(), rows("bert"), max_steps=100)
    waits = waits_in_two_steps(trainer)
    assert [wait.split()[0] for wait in waits] == 2 * ["__getitem__", "__bool__", "cpu"]
    assert all(wait.partition(":")[0].endswith("test_under_conditions.py") for wait in waits)


# torch.compile


@every_method
def test_compiled_it_learns_the_same_and_its_checkpoint_is_anybodys(tmp_path, method, arguments):
    """Through the trainer, without the cost of a code generator; resumed from without compiling."""
    torch._dynamo.reset()

    def make(**options):
        return build(
            tmp_path,
            method,
            arguments,
            student=lambda family: freeze_batch_norm(tiny(family)),
            max_steps=2,
            learning_rate=0.01,
            save_strategy="steps",
            save_steps=1,
            **options,
        )[1]

    plain = make()
    plain.train()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = make(torch_compile=True, torch_compile_backend="aot_eager")
    compiled.train()
    frozen_teacher = compiled.teacher is not None
    assert counters["stats"]["unique_graphs"] == (2 if frozen_teacher else 1)
    assert not counters["graph_break"]
    assert logged(compiled, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-5)
    for part in (compiled.model, compiled.distiller):
        assert not [name for name in part.state_dict() if "_orig_mod" in name]
    checkpoint = tmp_path / "checkpoint-1"
    for file in ("model.safetensors", DISTILLER_NAME):
        if (checkpoint / file).exists():
            assert not [name for name in safetensors.torch.load_file(checkpoint / file) if "_orig_mod" in name]
    resumed = make()
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert largest_difference(everything(resumed), everything(compiled)) <= 1e-5


def lengths(n, *, longest):
    """Texts in an order in which each batch of four has another length, the last one being ragged too."""
    dataset = rows("bert", n, length=longest)
    start = torch.arange(n) // 4 + 3
    mask = (torch.arange(longest) < start[:, None]).long()
    columns = ("input_ids", "attention_mask", "token_type_ids")
    full = dict(dataset.columns, input_ids=torch.randint(1, 60, (n, longest)))
    return dataset.with_columns(**{name: full[name] * mask for name in columns[:1] + columns[2:]}, attention_mask=mask)


@pytest.mark.parametrize("ensemble", [False, True])
def test_other_lengths_and_a_ragged_batch_are_compiled_for_once(tmp_path, ensemble):
    """A first shape, then one graph for any other: of the step, and of each teacher, also where it is scored."""
    torch._dynamo.reset()
    dataset = lengths(30, longest=12)
    teachers = [tiny_teacher("bert", seed=seed) for seed in ((1, 2, 3) if ensemble else (1,))]
    counters = torch._dynamo.utils.counters
    counters.clear()
    trainer = make_trainer(
        tmp_path,
        tiny("bert"),
        teachers if ensemble else teachers[0],
        HiddenStates() if not ensemble else KD(),
        dataset,
        max_steps=24,
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",
        torch_compile=True,
        torch_compile_backend="aot_eager",
    )
    trainer.train()
    # A length, then any length, then any number of samples too.
    assert counters["stats"]["unique_graphs"] <= 3 * (1 + len(teachers))
    assert not counters["graph_break"]
    compiled = dict(counters["stats"])
    trainer.evaluate_teacher(lengths(22, longest=12))
    assert counters["stats"]["unique_graphs"] == compiled["unique_graphs"]
