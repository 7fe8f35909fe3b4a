"""AEKT: the term and its gradients, the order of the two tasks, which students it takes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import make_trainer, rows, tiny, tiny_teacher
from peft import LoraConfig, get_peft_model
from references import STUDENT, TARGET, TEACHER, aekt, batch, over_labelled_batch, probabilities, without
from setups import set_up
from torch import nn
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher
from transformers.modeling_outputs import ImageClassifierOutput

from hfkd.distillers import AEKT, CAM, KD, Combined, ModelOutputs, StandardizedLogits
from hfkd.distillers.base import HardLabelLoss
from hfkd.functional import aekt_loss, dkd_loss, kd_loss, nckd_loss, tckd_loss


TEMPERATURES = [0.5, 1.0, 4.0]
EXPLICIT = ["tckd", "nll", "confidence"]
every_kind = pytest.mark.parametrize("explicit", EXPLICIT)
every_temperature = pytest.mark.parametrize("temperature", TEMPERATURES)


def partly_labelled():
    student, teacher, labels = batch()
    labels[3] = -100
    return student, teacher, labels


def ratios(student, teacher, labels, temperature):
    pairs = zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True)
    return [probabilities(t, temperature)[y] / probabilities(s, temperature)[y] for s, t, y in pairs]


# The term


@every_temperature
@every_kind
@pytest.mark.parametrize("adaptive", [True, False])
def test_the_loss_is_its_definition(explicit, temperature, adaptive):
    student, teacher, labels = partly_labelled()
    options = {"alpha": 0.7, "beta": 3.0, "temperature": temperature, "explicit": explicit, "adaptive": adaptive}
    options["max_ratio"] = 1.05
    expected = over_labelled_batch(aekt, student, teacher, labels, **options)
    per_sample = aekt_loss(student, teacher, labels, **options, reduction="none")
    np.testing.assert_allclose(per_sample.numpy(), expected, rtol=1e-9)
    assert expected[3] == 0.0
    assert aekt_loss(student, teacher, labels, **options).item() == pytest.approx(expected.mean(), rel=1e-9)
    sizes = ratios(*batch(), temperature)
    assert min(sizes) < 1.0 < 1.05 < max(sizes)  # some are cut off and some are not


@pytest.mark.parametrize(
    ("temperature", "ratio", "expected"),
    [
        (1.0, 1.4150275108, {"tckd": 0.1019024215, "nll": 1.1141058807, "confidence": 0.7173886636}),
        (4.0, 1.1717777630, {"tckd": 0.0071441621, "nll": 1.4161384875, "confidence": 0.4955521856}),
    ],
)
def test_golden_values(temperature, ratio, expected):
    arguments, factor = (STUDENT, TEACHER, TARGET), temperature**2
    for explicit, value in expected.items():
        options = {"temperature": temperature, "explicit": explicit}
        assert aekt_loss(*arguments, beta=0.0, **options).item() / factor == pytest.approx(value, abs=1e-10)
        without_ratio = aekt_loss(*arguments, beta=0.0, adaptive=False, **options).item() / factor
        assert value / without_ratio == pytest.approx(ratio, rel=1e-7)
    implicit = aekt_loss(*arguments, alpha=0.0, beta=1.0, temperature=temperature).item() / factor
    assert implicit == pytest.approx({1.0: 0.1376178464, 4.0: 0.0141225665}[temperature], abs=1e-10)


def test_golden_total():
    total = aekt_loss(STUDENT, TEACHER, TARGET).item()
    assert total == pytest.approx(16 * (0.0071441621 + 8 * 0.0141225665), abs=2e-8)
    assert aekt_loss(STUDENT, TEACHER, TARGET, adaptive=False).item() == pytest.approx(1.9052382275, abs=1e-9)


@every_temperature
def test_kd_is_the_explicit_part_and_the_doubtful_share_of_the_implicit_one(temperature):
    student, teacher, labels = batch()
    options = {"temperature": temperature, "reduction": "none"}
    doubt = 1 - (teacher / temperature).softmax(-1).gather(-1, labels[:, None])[:, 0]
    whole = aekt_loss(student, teacher, labels, alpha=1.0, beta=doubt, adaptive=False, **options)
    torch.testing.assert_close(whole, kd_loss(student, teacher, **options), rtol=1e-10, atol=0)


@every_temperature
def test_where_both_are_equally_sure_of_the_label_it_is_dkd(temperature):
    _, teacher, labels = batch()
    student = teacher.clone()
    for row, target in zip(student, labels.tolist(), strict=True):  # the other classes in reverse order
        others = [i for i in range(5) if i != target]
        row[others] = row[others[::-1]].clone()
    options = {"alpha": 0.7, "beta": 3.0, "temperature": temperature, "reduction": "none"}
    expected = dkd_loss(student, teacher, labels, **options)
    assert expected.min() > 1e-3
    torch.testing.assert_close(aekt_loss(student, teacher, labels, **options), expected, rtol=1e-10, atol=0)
    # So it is without the ratio, and not with it, elsewhere.
    student, teacher, labels = batch()
    expected = dkd_loss(student, teacher, labels, **options)
    without_ratio = aekt_loss(student, teacher, labels, adaptive=False, **options)
    torch.testing.assert_close(without_ratio, expected, rtol=1e-10, atol=0)
    assert not torch.allclose(aekt_loss(student, teacher, labels, **options), expected)


@every_temperature
def test_the_gradients_are_those_of_the_analysis(temperature):
    student, teacher, labels = batch()
    student.requires_grad_()
    options = {"temperature": temperature, "max_ratio": 2.0, "reduction": "none"}
    on_target = aekt_loss(student, teacher, labels, alpha=1.0, beta=0.0, **options)
    on_others = aekt_loss(student, teacher, labels, alpha=0.0, beta=1.0, **options)
    on_target, on_others = (torch.autograd.grad(term.sum(), student)[0] for term in (on_target, on_others))
    for i, (z, t, target) in enumerate(zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True)):
        p, q = (probabilities(logits, temperature)[target] for logits in (z, t))
        p_hat, q_hat = (probabilities(without(logits, target), temperature) for logits in (z, t))
        ratio = min(q / p, 2.0)
        expected = [temperature * ratio * (q - p) * a for a in p_hat]
        expected.insert(target, temperature * ratio * (p - q))
        assert on_target[i].tolist() == pytest.approx(expected, abs=1e-12)
        expected = [temperature * (a - b) for a, b in zip(p_hat, q_hat, strict=True)]
        expected.insert(target, 0.0)
        assert on_others[i].tolist() == pytest.approx(expected, abs=1e-12)


@every_temperature
def test_nll_has_the_gradient_of_the_ratio_and_confidence_the_teachers_share_of_it(temperature):
    student, teacher, labels = batch()
    student.requires_grad_()

    def of_label(logits):
        return (logits / temperature).softmax(-1).gather(-1, labels[:, None])[:, 0]

    sure = of_label(teacher)
    options = {"beta": 0.0, "temperature": temperature, "max_ratio": 1e9, "reduction": "none"}
    for explicit, factor in (("nll", 1.0), ("confidence", sure)):
        term = aekt_loss(student, teacher, labels, explicit=explicit, **options).sum()
        ratio = (temperature**2 * factor * sure / of_label(student)).sum()
        expected, got = (torch.autograd.grad(value, student)[0] for value in (ratio, term))
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_no_gradient_flows_through_the_ratio():
    student, teacher, labels = batch()
    sizes = torch.tensor(ratios(student, teacher, labels, 4.0), dtype=torch.float64)[:, None]
    student.requires_grad_()
    teacher.requires_grad_()
    for explicit, leaves in (("tckd", (student, teacher)), ("nll", (student,)), ("confidence", (student, teacher))):
        options = {"beta": 0.0, "explicit": explicit, "max_ratio": 10.0, "reduction": "none"}
        plain, weighted = (
            torch.autograd.grad(aekt_loss(student, teacher, labels, adaptive=adaptive, **options).sum(), leaves)
            for adaptive in (False, True)
        )
        for one, other in zip(plain, weighted, strict=True):
            torch.testing.assert_close(other, sizes * one, rtol=1e-9, atol=1e-14)


def test_the_teacher_is_in_nll_through_the_ratio_only():
    student, teacher, labels = batch()
    student.requires_grad_()
    teacher.requires_grad_()
    aekt_loss(student, teacher, labels, beta=0.0, explicit="nll").backward()
    assert teacher.grad is None or not teacher.grad.any()
    assert student.grad.abs().max() > 1e-3


def test_the_implicit_part_sees_neither_logit_of_the_label():
    student, teacher, labels = batch()
    other = [logits.scatter(-1, labels[:, None], value) for logits, value in ((student, 50.0), (teacher, -7.0))]
    options = {"alpha": 0.0, "beta": 2.0, "temperature": 2.0}
    assert torch.equal(aekt_loss(*other, labels, **options), aekt_loss(student, teacher, labels, **options))
    expected = 8 * nckd_loss(student, teacher, labels, temperature=2.0)
    torch.testing.assert_close(aekt_loss(student, teacher, labels, **options), expected)


def test_only_tckd_has_its_optimum_at_the_teachers_logits():
    _, teacher, labels = batch()
    student = (teacher + 7.0).requires_grad_()
    value = aekt_loss(student, teacher, labels)
    assert value.item() == pytest.approx(0.0, abs=1e-13)
    assert torch.autograd.grad(value, student)[0].abs().max() < 1e-13
    for explicit in ("nll", "confidence"):
        value = aekt_loss(student, teacher, labels, explicit=explicit)
        assert value > 0.1
        assert torch.autograd.grad(value, student)[0].abs().max() > 0.01


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_and_missing_labels_stay_finite(explicit, dtype):
    student = torch.tensor([[1e4, 0.0, -1e4]] * 4 + [[-1e4, 0.0, 1e4]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 0.0, 1e4]] * 4 + [[-1e4, 0.0, 1e4]], dtype=dtype)
    labels = torch.tensor([0, 1, 2, -100, 0])
    value = aekt_loss(student, teacher, labels, temperature=1.0, explicit=explicit, reduction="none")
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad.isfinite().all()
    assert value[3] == 0.0
    assert (student.grad[3] == 0).all()
    # Where both give the label a probability below any number, r is still their ratio, here 1.
    plain = aekt_loss(student, teacher, labels, temperature=1.0, explicit=explicit, adaptive=False, reduction="none")
    assert value[4] == plain[4]
    capped = aekt_loss(student, teacher, labels, temperature=1.0, explicit=explicit, beta=0.0, reduction="none")
    plain = aekt_loss(
        student, teacher, labels, temperature=1.0, explicit=explicit, beta=0.0, adaptive=False, reduction="none"
    )
    assert plain[2] > 0
    torch.testing.assert_close(capped[2], 2 * plain[2])


@every_kind
def test_gradcheck(explicit):
    """With respect to the teacher too; without the ratio, whose gradient is stopped."""
    student, teacher, labels = batch(3, 4)
    labels[1] = -100
    inputs = student.requires_grad_(), teacher.requires_grad_()
    options = {"temperature": 2.0, "explicit": explicit, "adaptive": False}
    assert torch.autograd.gradcheck(lambda z, t: aekt_loss(z, t, labels, **options), inputs)


def test_with_two_classes_there_is_no_implicit_part():
    student, teacher, labels = batch(classes=2)
    expected = 16 * tckd_loss(student, teacher, labels)
    torch.testing.assert_close(aekt_loss(student, teacher, labels, adaptive=False), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive, got 0.0: use 1.0 for no softening"),
        ({"explicit": "kl"}, "explicit must be one of tckd, nll, confidence, got 'kl'"),
        ({"max_ratio": 0.9}, "max_ratio must be at least 1 and finite, got 0.9"),
        ({"reduction": "sum"}, "reduction must be \"mean\".*got 'sum'"),
    ],
)
def test_what_the_loss_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        aekt_loss(STUDENT, TEACHER, TARGET, **options)


# The method


def ready(order, *, seed=None, dtype=torch.float64, **arguments):
    """A method set up for a student with 5 classes; with a seed its head is a random one."""
    method = AEKT(order=order, **{"warm_up": 0.0, **arguments})
    set_up(method, tiny("bert").to(dtype).eval(), tiny_teacher("bert").eval())
    if seed is not None and order is not None:
        torch.manual_seed(seed)
        for parameter in method.head.parameters():
            nn.init.normal_(parameter)
    return method


def outputs_of(method, logits):
    outputs = ModelOutputs(logits)
    outputs.task_logits = method.task_logits(outputs)
    return outputs


def test_the_defaults_are_those_of_dkd():
    method = AEKT()
    assert (method.alpha, method.beta, method.temperature, method.warm_up) == (1.0, 8.0, 4.0, 1 / 12)
    assert (method.explicit, method.adaptive, method.max_ratio) == ("tckd", True, 2.0)
    assert method.order == "distill_first"
    assert method.needs_hard_labels


@every_kind
def test_the_term_has_its_weights_and_the_scale_of_the_labels(explicit):
    student, teacher, labels = partly_labelled()
    options = {"alpha": 0.5, "beta": 2.0, "temperature": 2.0, "explicit": explicit, "max_ratio": 1.5}
    method = AEKT(**options, adaptive=explicit != "nll", order=None, warm_up=0.0)
    method.hard_label_loss = HardLabelLoss(scale=6 / 5)
    terms = method(ModelOutputs(student, student), ModelOutputs(teacher), {"labels": labels})
    expected = over_labelled_batch(aekt, student, teacher, labels, **options, adaptive=explicit != "nll")
    np.testing.assert_allclose(terms["aekt"].numpy(), 6 / 5 * expected, rtol=1e-10)


def test_the_weight_of_the_term_warms_up():
    student, teacher, labels = batch()
    method = AEKT(order=None)
    arguments = ModelOutputs(student, student), ModelOutputs(teacher), {"labels": labels}
    terms = {}
    for hook in (method.on_epoch_begin, method.on_step_end):
        for progress in (0.0, 1 / 24, 1 / 12, 0.5):
            hook(SimpleNamespace(progress=progress))
            terms[progress] = method(*arguments)
        expected = aekt_loss(student, teacher, labels, reduction="none")
        for progress, factor in ((0.0, 0.0), (1 / 24, 0.5), (1 / 12, 1.0), (0.5, 1.0)):
            torch.testing.assert_close(terms[progress]["aekt"], factor * expected, rtol=1e-6, atol=0)
            assert torch.equal(terms[progress]["task"], terms[0.0]["task"])


@pytest.mark.parametrize("order", ["distill_first", "classify_first"])
def test_it_starts_as_without_the_layer(order):
    student, teacher, labels = batch()
    results = []
    for method in (ready(order), ready(None)):
        leaf = student.clone().requires_grad_()
        terms = method(outputs_of(method, leaf), ModelOutputs(teacher), {"labels": labels})
        sum(term.mean() for term in terms.values()).backward()
        results.append((terms["task"], terms["aekt"], leaf.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-15)


def test_each_task_has_its_logits():
    student, teacher, labels = batch()
    for order in ("distill_first", "classify_first"):
        method = ready(order, seed=1)
        weight, bias = method.head.weight.detach().numpy(), method.head.bias.detach().numpy()
        serialized = torch.from_numpy(student.numpy() @ weight.T + bias)
        terms = method(outputs_of(method, student), ModelOutputs(teacher), {"labels": labels})
        on_task, on_teacher = (serialized, student) if order == "distill_first" else (student, serialized)
        torch.testing.assert_close(method.task_logits(ModelOutputs(student)), on_task)
        torch.testing.assert_close(terms["task"], nn.functional.cross_entropy(on_task, labels, reduction="none"))
        torch.testing.assert_close(terms["aekt"], aekt_loss(on_teacher, teacher, labels, reduction="none"))


def test_the_layer_learns_from_the_task_that_comes_after_it():
    student, teacher, labels = batch()
    for order, term, other in (("distill_first", "task", "aekt"), ("classify_first", "aekt", "task")):
        method = ready(order, seed=1)
        terms = method(outputs_of(method, student), ModelOutputs(teacher), {"labels": labels})
        assert terms[term].requires_grad
        assert not terms[other].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("order", ["distill_first", "classify_first"])
def test_the_layer_has_the_students_precision_and_logits_keep_theirs(order, dtype):
    method = ready(order, dtype=dtype)
    assert method.head.weight.dtype == method.head.bias.dtype == dtype
    logits = torch.randn(3, 5)
    assert method.head.weight.tolist() == torch.eye(5).tolist()
    assert method.head.bias.tolist() == [0.0] * 5
    assert torch.equal(method._serialized(logits), logits)  # not rounded to half precision


class Headless(nn.Module):
    """A classifier whose last layer is a convolution, or a linear one without bias, or one of two."""

    def __init__(self, kind):
        super().__init__()
        self.config = tiny("resnet").config
        self.body = nn.Conv2d(3, 8, 3)
        self.head = nn.Conv2d(8, 5, 1) if kind == "conv" else nn.Linear(8, 5, bias=kind != "no bias")
        self.other = nn.Linear(8, 5) if kind == "two" else None
        self.kind = kind

    def forward(self, pixel_values):
        maps = self.body(pixel_values)
        if self.kind == "conv":
            return ImageClassifierOutput(logits=self.head(maps).mean((2, 3)))
        features = maps.mean((2, 3))
        logits = self.head(features)
        return ImageClassifierOutput(logits=(logits + self.other(features)) / 2 if self.kind == "two" else logits)


@pytest.mark.parametrize("order", ["distill_first", "classify_first"])
def test_without_a_bias_in_the_head_the_layer_has_none(order):
    method = AEKT(order=order)
    set_up(method, Headless("no bias"), tiny_teacher("resnet"), rows("resnet"))
    assert method.head.bias is None
    assert torch.equal(method._serialized(torch.ones(2, 5)), torch.ones(2, 5))


def distilled_deit():
    torch.manual_seed(0)
    config = DeiTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        num_labels=5,
    )
    return DeiTForImageClassificationWithTeacher(config)


REMEDY = 'use order=None or order="classify_first"'


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            distilled_deit,
            "logits of DeiTForImageClassificationWithTeacher are not the outputs of 'distillation_classifier' alone "
            r"\(linear layers with an output for each class: cls_classifier, distillation_classifier; distilled DeiTs "
            rf"have two\): {REMEDY}",
        ),
        (lambda: Headless("two"), rf"Headless are not the outputs of 'other' alone .* head, other; .*: {REMEDY}"),
        (lambda: Headless("conv"), rf"Headless come from no linear layer .*each class: none; .*: {REMEDY}"),
    ],
)
def test_students_that_do_not_end_in_one_linear_layer_are_refused(make, message):
    student = make()
    state = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        set_up(AEKT(), student, tiny_teacher("vit"), rows("vit"))
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, state[name])
    for order in ("classify_first", None):  # the remedies
        set_up(AEKT(order=order), make(), tiny_teacher("vit"), rows("vit"))


def test_a_second_head_of_zeros_is_found_too():
    student = Headless("two")
    for head in (student.head, student.other):
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    with pytest.raises(ValueError, match="are not the outputs of 'other' alone"):
        set_up(AEKT(), student, tiny_teacher("vit"), rows("vit"))


def lora(targets, **options):
    return get_peft_model(tiny("bert"), LoraConfig(r=2, target_modules=targets, **options))


def frozen():
    student = tiny("bert")
    student.classifier.requires_grad_(False)
    return student


def unfrozen_beside_an_adapter():
    student = lora(["query"])
    student.get_base_model().classifier.requires_grad_(True)
    return student


@pytest.mark.parametrize(
    "make",
    [
        lambda: lora(["query", "classifier"]),
        lambda: lora(["query"]),
        unfrozen_beside_an_adapter,  # trained, but no adapter file would hold it
        frozen,
    ],
)
def test_a_frozen_or_adapted_classifier_is_refused(make):
    message = r"'classifier' is frozen or only adapted: train it whole \(with PEFT: modules_to_save=\['classifier'\]\)"
    with pytest.raises(ValueError, match=message):
        set_up(AEKT(), make(), tiny_teacher("bert"), rows("bert"))
    for order in ("classify_first", None):
        set_up(AEKT(order=order), make(), tiny_teacher("bert"), rows("bert"))


def test_a_classifier_that_the_adapter_saves_whole_is_taken():
    method = AEKT()
    set_up(method, lora(["query"], modules_to_save=["classifier"]), tiny_teacher("bert"), rows("bert"))
    assert method.classifier_path == "classifier.modules_to_save.default"


@pytest.mark.parametrize("wrap", [lambda method: method, StandardizedLogits, CAM])
def test_a_task_head_that_is_not_the_tasks_is_refused_in_a_combination(wrap):
    parts = {"kd": KD(), "serial": wrap(AEKT())}
    message = (
        r"serial would train a task head that task_from='kd' leaves out: name it in task_from, or make it without"
    )
    with pytest.raises(ValueError, match=message):
        Combined(parts, task_from="kd")
    assert Combined(parts, task_from="serial").has_task_head
    for order in ("classify_first", None):
        assert not Combined({"kd": KD(), "serial": wrap(AEKT(order=order))}, task_from="kd").has_task_head


@pytest.mark.parametrize(("order", "rate"), [("classify_first", 1e-3), ("distill_first", 0.1)])
def test_the_layer_has_a_learning_rate_for_its_place(tmp_path, order, rate):
    distiller = AEKT(order=order)
    trainer = make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), distiller, rows("bert"), max_steps=1)
    trainer.train()
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert [rates[id(parameter)] for parameter in distiller.head.parameters()] == [rate, rate]
