"""CAM: what the weights are, what they start as, who gets a gradient, what is logged."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_identical, logged, make_trainer, rows, tiny, tiny_teacher, weights
from references import batch, five_classes, probabilities
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hfkd.distillers import AKD, CAM, DKD, KD, TTM, WTTM, ModelOutputs
from hfkd.distillers.base import HardLabelLoss


def ready(base=None, *, trained=True, **options):
    """A CAM in float64 whose last layer is still zero, or as if it had learned something."""
    torch.manual_seed(0)
    method = CAM(base, **options)
    method.setup(five_classes())
    if trained:
        nn.init.normal_(method.attention.score.weight)
    return method.double()


def call(student, teacher, labels):
    return ModelOutputs(student, student), ModelOutputs(teacher), {"labels": labels}


def by_hand(attention, student, teacher):
    """The weights of one sample's classes in numpy, class by class."""
    state = {name: tensor.numpy() for name, tensor in attention.state_dict().items()}
    p, q = probabilities(student), probabilities(teacher)
    tokens = [np.array([b, a, abs(b - a)]) for a, b in zip(p, q, strict=True)]
    embedded = [state["embedding.weight"] @ token + state["embedding.bias"] for token in tokens]
    width = len(embedded[0])
    query, key, value = ([w @ e for e in embedded] for w in np.split(state["query_key_value.weight"], 3))
    scores = []
    for c, hidden in enumerate(embedded):
        attended = np.array([np.exp(query[c] @ k / width**0.5) for k in key])
        attended /= attended.sum()
        hidden = hidden + sum(a * v for a, v in zip(attended, value, strict=True))
        inner = state["hidden.weight"] @ hidden + state["hidden.bias"]
        inner = F.gelu(torch.from_numpy(inner)).numpy()
        scores.append((state["score.weight"] @ inner)[0])
    exponents = np.exp(scores)
    return len(scores) * exponents / exponents.sum()


def test_the_weights_are_their_definition():
    student, teacher, _ = batch()
    method = ready()
    found = method.attention.weights(student, teacher)
    expected = [by_hand(method.attention, z, t) for z, t in zip(student.tolist(), teacher.tolist(), strict=True)]
    np.testing.assert_allclose(found.detach().numpy(), np.array(expected), rtol=1e-9)
    assert found.std() > 0.01
    torch.testing.assert_close(found.mean(-1), torch.ones(6, dtype=torch.float64))
    assert (found > 0).all()


def test_the_teacher_is_centred_then_reweighted():
    student, teacher, _ = batch()
    method = ready()
    one, other, _ = call(student, teacher, None)
    expected = method.attention.weights(student, teacher) * (teacher - teacher.mean(-1, keepdim=True))
    torch.testing.assert_close(method.attention.reweigh(one, other).logits, expected)


@pytest.mark.parametrize("base", [KD(), TTM(), WTTM(), DKD(warm_up=0.0), AKD()])
def test_it_starts_as_the_wrapped_method_alone(base):
    student, teacher, labels = batch()
    student.requires_grad_()
    wrapped = ready(copy.deepcopy(base), trained=False)(*call(student, teacher, labels))
    plain = base(*call(student, teacher, labels))
    cam = wrapped.pop("cam")
    assert wrapped.keys() == plain.keys()
    for name, term in plain.items():
        torch.testing.assert_close(wrapped[name], term)
    gradients = [torch.autograd.grad(sum(t.sum() for t in terms.values()), student)[0] for terms in (wrapped, plain)]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(cam, 16.0 * F.cross_entropy(teacher, labels, reduction="none"))


def test_it_is_kd_from_the_reweighted_teacher_and_a_term_on_the_labels():
    student, teacher, labels = batch()
    labels[1] = -100
    method = ready(KD(0.5), label_weight=0.3)
    terms = method(*call(student, teacher, labels))
    reweighted = method.attention.reweigh(ModelOutputs(student), ModelOutputs(teacher)).logits
    expected = KD(0.5)(*call(student, reweighted, labels))
    torch.testing.assert_close(terms["kd"], expected["kd"])
    torch.testing.assert_close(terms["task"], expected["task"])
    torch.testing.assert_close(terms["cam"], 0.3 * F.cross_entropy(reweighted, labels, reduction="none"))
    assert terms["cam"][1] == 0.0


@pytest.mark.parametrize(("label_weight", "hides"), [(0.1, True), (16.0, False)])
def test_the_term_on_the_labels_keeps_the_teacher_right(label_weight, hides):
    """Distillation alone is easiest when the teacher says nothing: the network learns to hide the right class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (256,), generator=generator)
    student = 0.5 * torch.randn(256, 5, generator=generator)
    second = (labels + 1) % 5
    teacher = 8.0 * F.one_hot(labels, 5) + 5.0 * F.one_hot(second, 5) + torch.randn(256, 5, generator=generator)
    method = ready(KD(), trained=False, label_weight=label_weight)
    optimizer = torch.optim.Adam(method.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        terms = method(*call(student, teacher, labels))
        sum(term.mean() for term in terms.values()).backward()
        optimizer.step()
    assert (method.logged_values()["cam_accuracy"].mean() < 0.2) == hides


def test_a_permutation_of_the_classes_permutes_the_weights():
    student, teacher, _ = batch()
    method, order = ready(), torch.tensor([3, 0, 4, 1, 2])
    permuted = method.attention.weights(student[:, order], teacher[:, order])
    torch.testing.assert_close(permuted, method.attention.weights(student, teacher)[:, order])


@pytest.mark.parametrize("base", [KD(1.0), WTTM(), AKD("learned")])
def test_every_parameter_gets_a_gradient_from_the_second_step_on_and_the_inputs_get_none(base):
    student, teacher, labels = batch()
    method = ready(base, trained=False, label_weight=0.0)  # so that it is the base's term alone that trains it
    student.requires_grad_()
    teacher.requires_grad_()
    optimizer = torch.optim.SGD(method.parameters(), lr=1.0)
    for step in range(2):
        optimizer.zero_grad()
        frozen = ModelOutputs(teacher.detach())
        sum(t.mean() for t in method(ModelOutputs(student, student), frozen, {"labels": labels}).values()).backward()
        moved = {name for name, p in method.attention.named_parameters() if p.grad.abs().max() > 0}
        assert moved == ({"score.weight"} if step == 0 else {name for name, _ in method.attention.named_parameters()})
        optimizer.step()
    assert teacher.grad is None
    # The student learns from the base's terms alone, not by way of the weights.
    weight = method.attention.weights(student, teacher.detach())
    assert torch.autograd.grad(weight.square().sum(), student, allow_unused=True)[0] is None


def test_gradcheck_of_the_network():
    student, teacher, labels = batch(2, 3)
    method = ready(KD(1.0), width=4)
    parameters = dict(method.named_parameters())

    def loss(*values):
        named = dict(zip(parameters, values, strict=True))
        terms = torch.func.functional_call(method, named, call(student, teacher, labels))
        return sum(term.mean() for term in terms.values())

    assert torch.autograd.gradcheck(loss, tuple(parameters.values()))


def test_what_is_logged():
    student, teacher, labels = batch()
    labels[:3] = teacher[:3].argmax(-1)
    labels[4] = -100
    method = ready(AKD())
    method.attention.hard_label_loss = HardLabelLoss(scale=6 / 5)
    method(*call(student, teacher, labels))
    found = {name: value.mean().item() for name, value in method.logged_values().items()}
    weight = method.attention.weights(student, teacher)
    reweighted = method.attention.reweigh(ModelOutputs(student), ModelOutputs(teacher)).logits
    right = sum(reweighted[i].argmax() == labels[i] for i in range(6)).item()
    assert found.pop("alpha") > 0
    assert 2 <= right < 5
    assert found == {
        "cam_weight_min": pytest.approx(weight.amin(-1).mean().item()),
        "cam_weight_max": pytest.approx(weight.amax(-1).mean().item()),
        "cam_accuracy": pytest.approx(right / 5, rel=1e-6),  # of the labelled ones
    }


def test_soft_labels_have_an_accuracy():
    student, teacher, labels = batch()
    method = ready(KD())
    method(ModelOutputs(student, student), ModelOutputs(teacher), {"labels": F.one_hot(labels, 5).double()})
    soft = method.logged_values()["cam_accuracy"].clone()
    method(*call(student, teacher, labels))
    assert torch.equal(soft, method.logged_values()["cam_accuracy"])


@pytest.mark.parametrize(("classes", "flop"), [(10, 33_600), (100, 912_000), (1000, 66_720_000)])
def test_the_cost_is_what_the_docstring_says(classes, flop):
    attention = CAM(width=16).attention
    attention.setup(five_classes())
    assert sum(parameter.numel() for parameter in attention.parameters()) == 1408
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # not all torches count the others
        attention.weights(torch.randn(2, classes), torch.randn(2, classes))
    assert counter.get_total_flops() == 2 * flop


def test_it_is_seeded_by_the_run_and_not_by_its_maker(tmp_path):
    started = []
    for ambient in (1, 2):
        torch.manual_seed(ambient)
        method = CAM()
        make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), method, rows("bert"), seed=7)
        started.append(weights(method))
    assert_identical(*started)


def test_the_accuracy_at_the_start_is_the_teachers(tmp_path):
    data, teacher = rows("bert", 16), tiny_teacher("bert")
    more = {"eval_dataset": data}
    trainer = make_trainer(
        tmp_path, tiny("bert"), teacher, CAM(), data, max_steps=4, logging_steps=2, learning_rate=0.0,
        distiller_learning_rate=1e-9, trainer=more,
    )  # fmt: skip
    trainer.train()
    expected = logged(trainer, "teacher_accuracy")[0]
    assert logged(trainer, "cam_accuracy") == pytest.approx([expected, expected])
    assert logged(trainer, "cam_weight_max") == pytest.approx([1.0, 1.0], abs=1e-6)


def test_two_classes_are_refused(tmp_path):
    """Their weights 1 + d and 1 - d leave the difference of the centred logits, ±z, at 2z."""
    student, teacher, labels = batch(classes=2)
    method = ready(KD(1.0))
    assert method.attention.weights(student, teacher).std() > 0.01
    torch.testing.assert_close(
        method(*call(student, teacher, labels))["kd"], KD(1.0)(*call(student, teacher, labels))["kd"]
    )
    for useless in (CAM(), AKD(cam=True)):
        with pytest.raises(ValueError, match="CAM cannot act on two classes: .*Use the method without it"):
            make_trainer(
                tmp_path, tiny("bert", num_labels=2), tiny_teacher("bert", num_labels=2), useless, rows("bert", 1)
            )


def test_the_teacher_stays_as_it_is_while_cam_learns(tmp_path):
    teacher, method = tiny_teacher("bert"), CAM(WTTM())
    before = weights(teacher)
    trainer = make_trainer(
        tmp_path, tiny("bert"), teacher, method, rows("bert"), max_steps=6, optim="adamw_torch", learning_rate=1e-3,
        distiller_learning_rate=0.05,
    )  # fmt: skip
    start = weights(method)
    trainer.train()
    assert_identical(weights(teacher), before)
    assert not any(torch.equal(tensor, start[name]) for name, tensor in weights(method).items())
    spread = np.array(logged(trainer, "cam_weight_max")) - np.array(logged(trainer, "cam_weight_min"))
    assert spread[0] == pytest.approx(0.0, abs=1e-6)
    assert spread[-1] > 0.01
