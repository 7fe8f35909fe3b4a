"""Precision of teacher and losses, quantised and placed teachers, and batches and class counts at the borders.

In bfloat16 every method is tried in ``test_under_conditions.py``. Tests named ``gpu`` run where there is one:
``pytest tests/test_precision.py -k gpu``.
"""

import copy
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import disk_offload
from helpers import (
    Mutual,
    Weighted,
    largest_difference,
    logged,
    make_trainer,
    rows,
    tiny,
    tiny_teacher,
    weights,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from two_processes import with_idle_parts

from hfkd.distillers import CAM, DML, KD, PKT, RKD, SP, HiddenStates, ModelOutputs
from hfkd.features import in_float32, probe
from hfkd.functional import kd_loss
from hfkd.teacher import Teacher


sys.path.append(str(Path(__file__).parent / "distillers"))
from test_contract import build, every_method  # found by the line above


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


# Losses


def said(distiller, trainer, student, teacher, classes):
    """What the method is given where models in half precision say this about a batch."""
    size = len(student)
    generator = torch.Generator().manual_seed(0)

    def features(model, layers):
        shapes = {name: feature.shape for name, feature in probe(model, trainer.context.sample(), layers).items()}
        return {name: torch.randn(size, *shape[1:], generator=generator) for name, shape in shapes.items()}

    own = in_float32(ModelOutputs(student, features=features(trainer.model, distiller.student_layers)))
    own = replace(own, task_logits=distiller.task_logits(own))
    batch = {"labels": torch.arange(size) % classes, "index": torch.arange(size)}
    if not distiller.needs_teacher:
        return own, None, batch
    teachers = features(trainer.teacher_model, distiller.teacher_layers)
    return own, in_float32(ModelOutputs(teacher, features=teachers)), batch


def assert_finite(distiller, student, terms):
    assert terms
    for name, term in terms.items():
        assert term.dtype == torch.float32
        assert term.isfinite().all(), name
    distiller.zero_grad()
    sum(term.mean() for term in terms.values()).backward()
    assert student.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in distiller.parameters())


@every_method
def test_losses_are_finite_at_extreme_logits(tmp_path, method, arguments):
    """Sure of one class by 20,000: both models alike, opposed, and one alone."""
    distiller, trainer = build(tmp_path, method, arguments)
    sure = torch.full((4, 5), -1e4).scatter(1, torch.tensor([[0], [2], [2], [4]]), 1e4)
    pairs = [(sure, sure), (-sure, sure), (sure, torch.zeros(4, 5))]
    # At equal logits the slope of a z-score is 1e7, which float16 cannot hold: its scaler leaves out such a step.
    cases = [(torch.float16, pairs), (torch.bfloat16, [*pairs, (torch.zeros(4, 5), sure)])]
    for dtype, chosen in cases:
        for student, teacher in chosen:
            student = student.to(dtype, copy=True).requires_grad_()
            call = said(distiller, trainer, student, teacher.to(dtype), 5)
            assert_finite(distiller, student, distiller(*call))


@pytest.mark.parametrize("classes", [2, 1000])
@every_method
def test_losses_are_finite_for_two_classes_and_a_thousand(tmp_path, method, arguments, classes):
    make = partial(
        build,
        tmp_path,
        method,
        arguments,
        student=lambda family: tiny(family, num_labels=classes),
        teacher=lambda family: tiny_teacher(family, num_labels=classes),
        data=lambda *args, **kwargs: (
            lambda dataset: dataset.with_columns(labels=dataset.columns["labels"] % classes)
        )(rows(*args, **kwargs)),
    )
    if classes == 2 and (method is CAM or "cam" in arguments):
        with pytest.raises(ValueError, match="CAM cannot act on two classes: .*Use the method without it"):
            make()
        return
    distiller, trainer = make()
    generator = torch.Generator().manual_seed(1)
    student, teacher = (3 * torch.randn(2, 4, classes, generator=generator)).half()
    student = student.clone().requires_grad_()
    assert_finite(distiller, student, distiller(*said(distiller, trainer, student, teacher, classes)))
    assert student.grad.abs().max() > 0


# Batches


@every_method
def test_an_epoch_may_end_in_a_batch_of_one(tmp_path, method, arguments):
    """Nine rows in batches of eight. Where samples are only compared with each other, there is nothing to learn."""
    _, trainer = build(
        tmp_path, method, arguments, data=lambda family, n=9, **options: rows(family, n, **options), max_steps=2
    )
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        assert all(torch.isfinite(torch.tensor(value)) for value in entry.values())
    if method in (SP, RKD, PKT):
        name = method.__name__.lower()
        assert entries[0][name] > 0
        assert entries[1][name] == 0


@pytest.mark.parametrize(("batch", "accumulation", "shares"), [(8, 1, [[8], [1]]), (4, 2, [[4, 4], [1]])])
def test_a_short_batch_counts_as_a_whole_one(tmp_path, batch, accumulation, shares):
    """A step is the mean over its micro-batches of their own means, however few samples or micro-batches there are."""
    student, teacher, dataset = tiny("vit"), tiny_teacher("vit"), rows("vit", 9)
    trainer = make_trainer(
        tmp_path,
        student,
        teacher,
        KD(alpha=1.0),
        dataset,
        max_steps=2,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        dataloader_num_workers=0,
        train_sampling_strategy="sequential",
    )
    pixels = dataset.columns["pixel_values"]
    own, start, expected = tiny("vit"), 0, []
    for sizes in shares:
        loss = 0.0
        for size in sizes:
            part = pixels[start : start + size]
            with torch.no_grad():
                target = teacher.eval()(part).logits
            loss = loss + kd_loss(own(part).logits, target) / len(sizes)
            start += size
        own.zero_grad()
        loss.backward()
        expected.append(loss.item())
        with torch.no_grad():
            for parameter in own.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx(expected, rel=1e-4)
    assert largest_difference(weights(student), weights(own)) <= 1e-5


# Frozen and unused parameters


def test_frozen_and_unused_parameters_stay_as_they_are(tmp_path):
    student = with_idle_parts(unused=True)
    trainer = make_trainer(tmp_path, student, tiny_teacher("bert"), Weighted(HiddenStates()), rows("bert"))
    start = weights(student)
    trainer.train()
    end = weights(student)
    idle = [name for name in start if "embeddings" in name or "layer.0" in name or "unused" in name]
    assert all(torch.equal(start[name], end[name]) for name in idle)
    assert not torch.equal(start["0.classifier.weight"], end["0.classifier.weight"])


@pytest.mark.parametrize("family", ["bert", "cifar"])
def test_evaluation_leaves_the_student_its_precision(tmp_path, family):
    """What transformers has for evaluation in half precision casts it in place, and images no longer fit it."""

    def evaluated(**arguments):
        data = {"eval_dataset": rows(family)}
        trainer = make_trainer(tmp_path, tiny(family), None, None, rows(family), trainer=data, **arguments)
        trainer.evaluate()
        return trainer.model

    for name in ("bf16", "fp16"):
        with pytest.raises(ValueError, match=f"{name}_full_eval turns the student .* drop it, .*{name}=True"):
            evaluated(**{f"{name}_full_eval": True})
    model = evaluated(bf16=True)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}


# The teacher's own precision


@pytest.mark.parametrize("distiller", [Mutual(), DML()])
def test_a_teacher_that_learns_has_the_students_precision(tmp_path, distiller):
    peer = tiny("bert", seed=7) if isinstance(distiller, Mutual) else None
    with pytest.raises(ValueError, match=r"trains the teacher, .*leave out teacher_dtype \(bf16=True is for both\)"):
        make_trainer(tmp_path, tiny("bert"), peer, distiller, rows("bert"), teacher_dtype="bfloat16")


# Quantised teachers


def by_torch(path):
    return torch.ao.quantization.quantize_dynamic(tiny_teacher("bert").eval(), {torch.nn.Linear})


def by_bitsandbytes(path, **options):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(**(options or {"load_in_8bit": True}))
    return type(tiny("bert")).from_pretrained(path, quantization_config=config, device_map="cpu")


def by_torchao(path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    config = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    return type(tiny("bert")).from_pretrained(path, quantization_config=config, device_map="cpu")


QUANTISED = [by_torch, by_bitsandbytes, by_torchao]
quantised = pytest.mark.parametrize("quantise", QUANTISED)
old_torch = pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*:DeprecationWarning")


@pytest.fixture
def saved(tmp_path):
    tiny_teacher("bert").save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def taught(folder, teacher, distiller=None, **arguments):
    trainer = make_trainer(
        folder / "out", tiny("bert"), teacher, distiller or KD(), rows("bert"), **{"learning_rate": 0.01, **arguments}
    )
    trainer.train()
    return trainer


@old_torch
@quantised
def test_a_quantised_teacher_teaches_nearly_as_a_whole_one(tmp_path, saved, quantise):
    for distiller in (KD, HiddenStates):
        whole = logged(taught(tmp_path, tiny_teacher("bert"), distiller()), "loss")
        for options in ({}, {"bf16": True}):
            losses = logged(taught(tmp_path, quantise(saved), distiller(), **options), "loss")
            assert losses == pytest.approx(whole, rel=0.05)
            assert losses != whole


@old_torch
@quantised
def test_a_quantised_teachers_answers_are_kept(tmp_path, saved, quantise):
    first, second = (taught(tmp_path, quantise(saved), teacher_cache=str(tmp_path / "cache")) for _ in range(2))
    assert (first.cache.misses, second.cache.misses) == (16, 0)
    assert largest_difference(weights(first.model), weights(second.model)) <= 1e-6
    other = tiny_teacher("bert")
    with torch.no_grad():
        other.bert.encoder.layer[1].output.dense.weight.neg_()
    other.save_pretrained(saved)
    if quantise is by_torch:
        other = torch.ao.quantization.quantize_dynamic(other.eval(), {torch.nn.Linear})
    else:
        other = quantise(saved)
    for teacher in (other, tiny_teacher("bert")):
        with pytest.raises(ValueError, match="is another one: teacher is"):
            taught(tmp_path, teacher, teacher_cache=str(tmp_path / "cache"))


@old_torch
@pytest.mark.parametrize("quantise", [by_torch, by_bitsandbytes])
def test_a_quantised_teacher_keeps_its_precision(tmp_path, saved, quantise):
    with pytest.raises(ValueError, match="a quantised teacher cannot be turned into torch.bfloat16: leave out"):
        taught(tmp_path, quantise(saved), teacher_dtype="bfloat16")


# Where the teacher is


class Placed(type(tiny("bert"))):
    """Was put where it is, and may not be moved."""

    def to(self, *args, **kwargs):
        raise RuntimeError("moved")


def test_a_placed_teacher_is_not_moved(tmp_path):
    teacher = tiny_teacher("bert")
    teacher.__class__, teacher.hf_device_map = Placed, {"": "cpu"}
    losses = logged(taught(tmp_path, teacher), "loss")
    assert losses == logged(taught(tmp_path, tiny_teacher("bert")), "loss")
    del teacher.hf_device_map
    with pytest.raises(RuntimeError, match="moved"):
        taught(tmp_path, teacher)


def test_an_offloaded_teacher_keeps_its_weights_where_they_are(tmp_path):
    """They lie on the device meta as those of a teacher that waits behind its cache do, and are not the file's."""
    teacher = tiny_teacher("bert")
    expected = logged(taught(tmp_path, copy.deepcopy(teacher)), "loss")
    teacher.name_or_path = str(tmp_path / "nowhere")
    teacher = disk_offload(teacher, tmp_path / "offloaded")
    assert logged(taught(tmp_path, teacher), "loss") == expected
    with pytest.raises(ValueError, match="weights are offloaded.*leave out teacher_cache"):
        taught(tmp_path, teacher, teacher_cache=str(tmp_path / "cache"))


def test_a_column_that_is_no_tensor_is_none_of_the_teachers_business():
    teacher = Teacher(tiny_teacher("bert"), dtype=torch.bfloat16)
    batch = {**rows("bert", 4).columns, "text": ["a", "b", "c", "d"]}
    assert teacher(batch).logits.dtype == torch.bfloat16


def test_a_placed_teacher_answers_where_it_was_asked():
    """With tensors that only pretend to be on a GPU; they refuse to be mixed."""
    with FakeTensorMode():
        with torch.device("cuda:1"):
            model = tiny("bert")
        model.hf_device_map = {"": "cuda:1"}
        teacher = Teacher(model, layers=("classifier:input",), label_order=[1, 0, 2, 3, 4], device=torch.device("cpu"))
        batch = {k: torch.ones_like(v) for k, v in rows("bert", 4).columns.items()}
        outputs = teacher(batch)
        assert {parameter.device for parameter in model.parameters()} == {torch.device("cuda:1")}
    assert outputs.logits.device == outputs.features["classifier:input"].device == torch.device("cpu")


# On a GPU


@on_a_gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("distiller", [Weighted, HiddenStates])
def test_on_a_gpu_half_precision_learns_as_float32_does(tmp_path, precision, distiller):
    losses = []
    for options in ({}, {precision: True}):
        method = distiller()
        trainer = taught(tmp_path, tiny_teacher("bert"), method, use_cpu=False, max_steps=10, **options)
        assert (trainer.accelerator.scaler is not None) == ("fp16" in options)
        assert {parameter.dtype for parameter in (*trainer.model.parameters(), *method.parameters())} == {
            torch.float32
        }
        losses.append(logged(trainer, "loss"))
    assert losses[1][0] == pytest.approx(losses[0][0], rel=0.03)
    assert losses[1] != losses[0]
    assert losses[1][-1] < losses[1][0]


@on_a_gpu
def test_on_a_gpu_a_placed_teacher_answers_from_where_it_is(tmp_path, saved):
    teacher = type(tiny("bert")).from_pretrained(saved, device_map="cpu")
    placed = taught(tmp_path, teacher, HiddenStates(), use_cpu=False)
    assert {parameter.device.type for parameter in teacher.parameters()} == {"cpu"}
    beside = taught(tmp_path, tiny_teacher("bert"), HiddenStates(), use_cpu=False)
    assert logged(placed, "loss") == pytest.approx(logged(beside, "loss"), rel=1e-3)


@on_a_gpu
@pytest.mark.parametrize("options", [{"load_in_8bit": True}, {"load_in_4bit": True}])
def test_on_a_gpu_a_quantised_teacher_teaches(tmp_path, options):
    bits = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    tiny_teacher("bert", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "teacher")
    teacher = type(tiny("bert")).from_pretrained(
        tmp_path / "teacher", quantization_config=BitsAndBytesConfig(**options), device_map="cuda:0"
    )
    assert any(isinstance(module, (bits.nn.Linear8bitLt, bits.nn.Linear4bit)) for module in teacher.modules())
    losses = logged(taught(tmp_path, teacher, use_cpu=False), "loss")
    assert losses[-1] < losses[0]
