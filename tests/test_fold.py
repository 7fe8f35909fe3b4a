"""Every student that is written is a plain one that predicts as the run does: its task head is folded into it."""

import copy

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import (
    FAMILIES,
    Rows,
    assert_identical,
    logged,
    make_trainer,
    rows,
    tiny,
    tiny_teacher,
    weights,
)
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from hfkd.distillers import AEKT, KD, Combined, StandardizedLogits, StudentAlone
from hfkd.distillers.aekt import fold
from hfkd.features import base_model, find_module, head_path, run_model
from hfkd.models import MODEL_NAMES, CifarConfig, CifarForImageClassification
from hfkd.saving import DISTILLER_NAME


STUDENTS = ["vit", "bert", "cifar", "peft"]


def student_of(kind, seed=0, dropout=0.0):
    if kind != "peft":
        return tiny(kind, seed=seed, dropout=dropout)
    base = tiny("bert", seed=seed, dropout=dropout)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], modules_to_save=["classifier"])
    return get_peft_model(base, config)


def family_of(kind):
    return "bert" if kind == "peft" else kind


def plainly_loaded(folder, kind):
    """What somebody without hfkd gets."""
    if kind == "peft":
        return PeftModel.from_pretrained(tiny("bert"), folder).eval()
    return type(tiny(kind)).from_pretrained(folder).eval()


def wide_batch(kind, n=8):
    """Rows without padding of their own length, as tensors."""
    return {k: v for k, v in rows(family_of(kind), n, seed=5).columns.items() if k not in ("labels", "index")}


@torch.no_grad()
def plain_logits(model, kind):
    return run_model(copy.deepcopy(model).eval(), wide_batch(kind)).logits


@torch.no_grad()
def predicted(trainer, kind):
    """What the run itself predicts, with its task head."""
    module = copy.deepcopy(trainer._module).eval()
    return module.predict(wide_batch(kind))


def randomize(head):
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))


def serial(order="distill_first", **options):
    """Mild, so that large steps may be taken."""
    return AEKT(beta=1.0, temperature=1.0, order=order, **options)


def learning(folder, kind, distiller, *, dropout=0.0, trainer=None, **arguments):
    """A trainer whose head moves far in a few steps."""
    family = family_of(kind)
    defaults = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.3}
    defaults["distiller_learning_rate"] = 0.3
    models = student_of(kind, dropout=dropout), tiny_teacher(family)
    return make_trainer(folder, *models, distiller, rows(family, 16), trainer=trainer, **{**defaults, **arguments})


class Each(TrainerCallback):
    """What the run predicts after each step, and its classifier then."""

    def __init__(self, kind):
        self.kind, self.predictions, self.classifiers = kind, {}, {}

    def watch(self, trainer):
        self.trainer = trainer
        trainer.add_callback(self)
        return trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.predictions[state.global_step] = predicted(self.trainer, self.kind)
        model = base_model(self.trainer.model)
        self.classifiers[state.global_step] = weights(find_module(model, head_path(model)))


def far_apart(one, other):
    return (one - other).abs().max() > 0.01


# Folding


def assert_folds(student, pixels_or_tokens, dtype=torch.float32):
    """A random head is folded, and the student afterwards what it was."""
    student = student.to(dtype).eval()
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in pixels_or_tokens.items()}
    classifier = find_module(base_model(student), head_path(student))
    method = AEKT()
    method.head = nn.Linear(5, 5, bias=classifier.bias is not None, dtype=dtype)
    randomize(method.head)
    method._set_up_folding(student, head_path(student))
    before = weights(student)
    with torch.no_grad():
        logits = run_model(student, batch)
        wanted = method.task_logits(logits)
        with method.folded(student):
            folded = run_model(student, batch).logits
        assert far_apart(folded, logits.logits)
        tolerance = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
        torch.testing.assert_close(folded, wanted, rtol=0, atol=tolerance * wanted.abs().max().item() * 10)
    assert_identical(weights(student), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_folding_is_exact_for_every_family(family, dtype):
    assert_folds(tiny(family), wide_batch(family), dtype)


@pytest.mark.parametrize("architecture", [name for name in MODEL_NAMES if "x4" not in name and "110" not in name])
def test_folding_is_exact_for_every_network_of_ours(architecture):
    torch.manual_seed(0)
    student = CifarForImageClassification(CifarConfig(architecture=architecture, num_labels=5))
    generator = torch.Generator().manual_seed(0)
    assert_folds(student, {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)})


def test_folding_is_exact_for_a_head_without_bias():
    student = tiny("cifar")
    student.linear = nn.Linear(student.linear.in_features, 5, bias=False)
    assert_folds(student, wide_batch("cifar"))


def test_a_fold_is_the_product_in_double_precision():
    torch.manual_seed(0)
    head, classifier = nn.Linear(5, 5), nn.Linear(7, 5)
    weight, bias, inner, inner_bias = (
        tensor.detach().double().numpy() for tensor in (head.weight, head.bias, classifier.weight, classifier.bias)
    )
    fold(head, classifier)
    np.testing.assert_array_equal(classifier.weight.detach().numpy(), (weight @ inner).astype(np.float32))
    np.testing.assert_array_equal(classifier.bias.detach().numpy(), (weight @ inner_bias + bias).astype(np.float32))


def test_a_failed_write_leaves_the_student_as_it_was(tmp_path, monkeypatch):
    trainer = learning(tmp_path, "bert", AEKT())
    randomize(trainer.distiller.head)
    before = weights(trainer.model)

    def disk_full(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(trainer.model, "save_pretrained", disk_full)
    with pytest.raises(OSError, match="disk full"):
        trainer.save_model(tmp_path / "student")
    assert_identical(weights(trainer.model), before)


# Checkpoints


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_checkpoint_is_a_plain_student_and_keeps_what_goes_on(tmp_path, kind):
    each = Each(kind)
    each.watch(learning(tmp_path, kind, serial())).train()
    checkpoint = tmp_path / "checkpoint-2"
    loaded = plainly_loaded(checkpoint, kind)
    torch.testing.assert_close(plain_logits(loaded, kind), each.predictions[2], rtol=1e-5, atol=1e-5)
    kept = safetensors.torch.load_file(checkpoint / DISTILLER_NAME)
    assert far_apart(kept["head.weight"], torch.eye(5))
    then = each.classifiers[2]
    assert torch.equal(kept["unfolded_weight"], then["0.weight"])
    assert torch.equal(kept["unfolded_bias"], then["0.bias"])
    classifier = find_module(base_model(loaded), head_path(loaded))
    head, inner = kept["head.weight"].double(), kept["unfolded_weight"].double()
    assert torch.equal(classifier.weight, (head @ inner).float())
    assert far_apart(classifier.weight, kept["unfolded_weight"])


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, kind):
    def make():
        return learning(
            tmp_path,
            kind,
            serial(warm_up=0.5),
            dropout=0.2,
            max_steps=8,
            save_steps=5,
            per_device_train_batch_size=4,
            optim="adamw_torch",
            learning_rate=1e-2,
            weight_decay=0.01,
            lr_scheduler_type="linear",
            max_grad_norm=1.0,
        )

    whole, resumed = Each(kind), Each(kind)
    one, other = whole.watch(make()), resumed.watch(make())
    one.train()
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    for step in (6, 7, 8):
        assert torch.equal(whole.predictions[step], resumed.predictions[step])
        assert_identical(whole.classifiers[step], resumed.classifiers[step])
    assert logged(one, "loss") == logged(other, "loss")
    assert_identical(weights(one.model, one.distiller.head), weights(other.model, other.distiller.head))


@pytest.mark.parametrize("kind", ["bert", "peft"])
def test_saving_changes_nothing_in_the_run(tmp_path, kind):
    often = learning(tmp_path / "often", kind, serial(), save_steps=1)
    never = learning(tmp_path / "never", kind, serial(), save_strategy="no")
    often.train()
    never.train()
    assert_identical(weights(often.model), weights(never.model))
    assert logged(often, "loss") == logged(never, "loss")


def test_a_student_saved_in_mid_run_is_folded(tmp_path):
    """As a push does it, which uploads what save_model writes."""

    class Saves(Each):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            self.trainer.save_model(args.output_dir)

    saves = Saves("vit")
    saves.watch(learning(tmp_path, "vit", serial(), max_steps=3, save_strategy="no"))
    saves.trainer.add_callback(Stops())
    with pytest.raises(KeyboardInterrupt):
        saves.trainer.train()
    loaded = plainly_loaded(tmp_path, "vit")
    torch.testing.assert_close(plain_logits(loaded, "vit"), saves.predictions[2], rtol=1e-5, atol=1e-5)
    assert far_apart(plain_logits(saves.trainer.model, "vit"), saves.predictions[2])
    # Nor does an interrupted run lose anything when it is saved afterwards.
    saves.trainer.save_model(tmp_path / "after")
    loaded = plainly_loaded(tmp_path / "after", "vit")
    torch.testing.assert_close(plain_logits(loaded, "vit"), saves.predictions[2], rtol=1e-5, atol=1e-5)


class Stops(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["cifar", "peft"])
def test_a_checkpoint_of_the_student_alone_is_folded(tmp_path, kind):
    each = Each(kind)
    each.watch(learning(tmp_path, kind, serial(), save_only_model=True)).train()
    assert not (tmp_path / "checkpoint-2" / DISTILLER_NAME).exists()
    loaded = plainly_loaded(tmp_path / "checkpoint-2", kind)
    torch.testing.assert_close(plain_logits(loaded, kind), each.predictions[2], rtol=1e-5, atol=1e-5)


# The best checkpoint

RATES = {"peft": 3.0, "vit": 0.2}  # at which later steps do harm


def best(folder, kind, distiller, **arguments):
    """Evaluates and saves at each of 6 steps, the later ones too large to help."""
    return learning(
        folder,
        kind,
        distiller,
        max_steps=6,
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        trainer={"eval_dataset": rows(family_of(kind), 24, seed=3)},
        **{"learning_rate": 1.0, **arguments},
    )


@pytest.mark.parametrize("kind", STUDENTS)
def test_the_best_model_comes_with_its_head_and_is_folded_once(tmp_path, kind):
    each = Each(kind)
    trainer = each.watch(best(tmp_path, kind, serial(), learning_rate=RATES.get(kind, 1.0)))
    trainer.train()
    losses = logged(trainer, "eval_loss")
    step = losses.index(min(losses)) + 1
    assert min(losses) < losses[-1] - 0.01  # else the last model would do
    kept = safetensors.torch.load_file(tmp_path / f"checkpoint-{step}" / DISTILLER_NAME)
    assert (kept["head.weight"] - torch.eye(5)).abs().max() > 1e-3
    classifier = find_module(base_model(trainer.model), head_path(trainer.model))
    assert torch.equal(classifier.weight, (kept["head.weight"].double() @ kept["unfolded_weight"].double()).float())
    assert torch.equal(trainer.distiller.head.weight, torch.eye(5))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)
    torch.testing.assert_close(predicted(trainer, kind), each.predictions[step], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain_logits(trainer.model, kind), each.predictions[step], rtol=1e-5, atol=1e-5)


def test_the_best_model_without_its_head_is_refused(tmp_path):
    message = "AEKT has a task head, which save_only_model=True leaves out .* turn one of the two off"
    with pytest.raises(ValueError, match=message):
        best(tmp_path, "bert", serial(), save_only_model=True)
    with pytest.raises(ValueError, match="StandardizedLogits has a task head"):
        best(tmp_path, "bert", StandardizedLogits(serial()), save_only_model=True)
    for order in ("classify_first", None):
        best(tmp_path, "bert", serial(order), save_only_model=True)


# After training


@pytest.mark.parametrize("kind", STUDENTS)
def test_after_training_the_student_alone_is_what_was_evaluated(tmp_path, kind):
    evaluation = {"eval_dataset": rows(family_of(kind), 24, seed=3)}
    trainer = learning(tmp_path, kind, serial(), eval_strategy="steps", eval_steps=4, trainer=evaluation)
    each = Each(kind)
    each.watch(trainer).train()
    before = logged(trainer, "eval_loss")[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-5)
    assert torch.equal(trainer.distiller.head.weight, torch.eye(5))
    assert torch.equal(trainer.distiller.head.bias, torch.zeros(5))
    classifier = find_module(base_model(trainer.model), head_path(trainer.model))
    assert far_apart(classifier.weight, each.classifiers[4]["0.weight"])
    trainer.save_model(tmp_path / "student")
    loaded = plainly_loaded(tmp_path / "student", kind)
    torch.testing.assert_close(plain_logits(loaded, kind), each.predictions[4], rtol=1e-5, atol=1e-5)
    assert_identical(weights(loaded), weights(trainer.model))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-5)


def test_a_second_run_goes_on_from_the_folded_student(tmp_path):
    trainer = learning(tmp_path, "bert", serial(), save_strategy="no")
    each = Each("bert")
    each.watch(trainer)
    trainer.train()
    first = predicted(trainer, "bert")
    torch.testing.assert_close(first, each.predictions[4], rtol=1e-5, atol=1e-5)
    trainer.train()
    assert far_apart(each.predictions[4], first)
    torch.testing.assert_close(plain_logits(trainer.model, "bert"), each.predictions[4], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(predicted(trainer, "bert"), each.predictions[4], rtol=1e-5, atol=1e-5)


def test_callbacks_find_the_student_folded_at_the_end(tmp_path):
    """Some of transformers' own upload it then, with a trainer of their own."""

    class Uploads(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            self.logits = plain_logits(model, "bert")

    uploads, each = Uploads(), Each("bert")
    trainer = learning(tmp_path, "bert", serial(), trainer={"callbacks": [uploads]})
    each.watch(trainer).train()
    torch.testing.assert_close(uploads.logits, each.predictions[4], rtol=1e-5, atol=1e-5)
    assert far_apart(each.predictions[4], each.predictions[3])


class Uses(Each):
    """Saves, scores and lets the trainer save and score the model that it is given."""

    def __init__(self, kind, folder):
        super().__init__(kind)
        self.folder, self.seen, self.nested = folder, [], False

    def use(self, event, step, model):
        if self.nested:
            return
        self.nested = True
        trainer, folder = self.trainer, self.folder / f"{event}-{step}"
        model.save_pretrained(folder / "model")
        trainer.save_model(folder / "trainer")
        loaded = [plain_logits(plainly_loaded(folder / name, self.kind), self.kind) for name in ("model", "trainer")]
        for logits in (plain_logits(model, self.kind), *loaded, predicted(trainer, self.kind)):
            torch.testing.assert_close(logits, self.predictions[step], rtol=1e-5, atol=1e-5)
        if event != "evaluation":
            trainer.evaluate(metric_key_prefix=event)
        self.seen.append((event, step))
        self.nested = False

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        self.use("epoch", state.global_step, model)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.use("evaluation", state.global_step, model)

    def on_save(self, args, state, control, model=None, **kwargs):
        self.use("save", state.global_step, model)


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_callback_is_given_the_student_that_was_scored(tmp_path, kind):
    def run(name, each):
        evaluation = {"eval_dataset": rows(family_of(kind), 24, seed=3)}
        times = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 3}
        trainer = each.watch(learning(tmp_path / name, kind, serial(), trainer=evaluation, **times))
        trainer.train()
        return trainer

    uses = Uses(kind, tmp_path / "students")
    trainer = run("used", uses)
    assert [step for event, step in uses.seen if event == "evaluation"] == [1, 2, 3, 4]
    assert ("epoch", 2) in uses.seen
    assert ("save", 3) in uses.seen
    scored = logged(trainer, "eval_loss")
    assert logged(trainer, "epoch_loss") == pytest.approx([scored[1], scored[3]], rel=1e-5)
    assert logged(trainer, "save_loss") == pytest.approx([scored[2], scored[3]], rel=1e-5)
    plain = run("plain", Each(kind))
    assert_identical(weights(trainer.model, trainer.distiller), weights(plain.model, plain.distiller))
    files = [tmp_path / name / "checkpoint-3" / DISTILLER_NAME for name in ("used", "plain")]
    assert_identical(*map(safetensors.torch.load_file, files))


# Other orders, and inside of other methods


@pytest.mark.parametrize("order", ["classify_first", None])
def test_where_the_task_is_on_the_students_logits_nothing_is_folded(tmp_path, order):
    each = Each("bert")
    trainer = each.watch(learning(tmp_path, "bert", serial(order, warm_up=0.0)))
    trainer.train()
    for step in (2, 4):
        loaded = plainly_loaded(tmp_path / f"checkpoint-{step}", "bert")
        classifier = weights(find_module(loaded, head_path(loaded)))
        assert_identical(classifier, each.classifiers[step])
        torch.testing.assert_close(plain_logits(loaded, "bert"), each.predictions[step])
    kept = safetensors.torch.load_file(tmp_path / "checkpoint-2" / DISTILLER_NAME)
    assert set(kept) == {"ramp.factor", *(["head.weight", "head.bias"] if order else [])}
    if order:
        assert far_apart(kept["head.weight"], torch.eye(5))


@pytest.mark.parametrize(
    "wrap",
    [
        StandardizedLogits,
        lambda method: Combined({"kd": KD(), "aekt": method}, task_from="aekt"),
        lambda method: Combined({"serial": StandardizedLogits(method), "kd": KD()}, task_from="serial"),
    ],
)
def test_inside_another_method_it_is_folded_too(tmp_path, wrap):
    def make():
        return learning(tmp_path, "bert", wrap(serial()))

    whole, resumed = Each("bert"), Each("bert")
    one, other = whole.watch(make()), resumed.watch(make())
    one.train()
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for step in (3, 4):
        assert torch.equal(whole.predictions[step], resumed.predictions[step])
    loaded = plainly_loaded(tmp_path / "checkpoint-2", "bert")
    torch.testing.assert_close(plain_logits(loaded, "bert"), whole.predictions[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain_logits(one.model, "bert"), whole.predictions[4], rtol=1e-5, atol=1e-5)
    assert far_apart(whole.predictions[2], whole.predictions[4])


def test_a_method_without_a_head_folds_nothing(tmp_path):
    student = tiny("bert")
    before = weights(student)
    with StudentAlone().folded(student):
        assert_identical(weights(student), before)


class Stream(IterableDataset):
    def __init__(self, dataset: Rows):
        self.dataset = dataset

    def __iter__(self):
        return iter([self.dataset[i] for i in range(len(self.dataset))])


def test_a_stream_is_sampled_from_its_start(tmp_path):
    dataset = rows("cifar", 16)
    trainer = make_trainer(tmp_path, tiny("cifar"), tiny_teacher("cifar"), AEKT(), Stream(dataset), max_steps=1)
    assert torch.equal(trainer.context.sample()["pixel_values"], dataset.columns["pixel_values"][:2])
    trainer.train()


def test_in_half_precision_the_fold_rounds_as_the_classifier_does(tmp_path):
    student = tiny("cifar").bfloat16()
    method = AEKT()
    trainer = make_trainer(tmp_path, student, tiny_teacher("cifar"), method, rows("cifar"))
    randomize(method.head)
    batch = {"pixel_values": wide_batch("cifar")["pixel_values"].bfloat16()}
    trainer.model.eval()
    wanted = trainer._module.predict(batch)
    with method.folded(student):
        folded = trainer.model(**batch).logits.float()
    assert method.head.weight.dtype == torch.bfloat16
    assert (folded - wanted).abs().max() < 0.03 * wanted.abs().max()
