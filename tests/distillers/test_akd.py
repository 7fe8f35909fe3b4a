"""The adaptive balance: fixed, learned, from the gap; each by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import DATA, logged, make_trainer, rows, tiny, tiny_teacher
from references import STUDENT, TARGET, TEACHER, batch, divergence, five_classes, probabilities
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from hfkd.data import load_text_data, tokenize
from hfkd.distillers import AKD, CAM, KD, WTTM, Combined, ModelOutputs, StudentAlone
from hfkd.functional import gap_alpha, kd_loss


FORMULAS = {
    "exp": lambda kl, ce: 1 - math.exp(-kl),
    "ratio": lambda kl, ce: kl / (1 + kl),
    "ce": lambda kl, ce: 1 / (1 + math.exp(-ce)),
}


def gaps(student, teacher, labels):
    """KL(p^T || p^S) and CE_S - CE_T of each sample."""
    for z, t, label in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        p, q = probabilities(z), probabilities(t)
        yield divergence(q, p), 0.0 if label == -100 else math.log(q[label]) - math.log(p[label])


def call(student, teacher, labels):
    return ModelOutputs(student, student), ModelOutputs(teacher), {"labels": labels}


def losses(student, teacher, labels, temperature=4.0):
    cross_entropy = F.cross_entropy(student, labels, reduction="none")
    return cross_entropy, kd_loss(student, teacher, temperature=temperature, reduction="none")


# The formulas


@pytest.mark.parametrize("gap", list(FORMULAS))
def test_gap_alpha_is_its_definition(gap):
    student, teacher, labels = batch()
    labels[2] = -100
    expected = [FORMULAS[gap](*sizes) for sizes in gaps(student, teacher, labels)]
    alpha = gap_alpha(student, teacher, labels, gap=gap)
    np.testing.assert_allclose(alpha.numpy(), expected, rtol=1e-9)
    assert ((alpha > 0) & (alpha < 1)).all()
    kl, ce = np.mean(list(gaps(student, teacher, labels)), 0)
    assert gap_alpha(student, teacher, labels, gap=gap, reduction="mean").item() == pytest.approx(
        FORMULAS[gap](kl, ce)
    )


@pytest.mark.parametrize(("gap", "golden"), [("exp", 0.1139821644), ("ratio", 0.1079538212), ("ce", 0.5859260420)])
def test_golden_alpha(gap, golden):
    assert gap_alpha(STUDENT, TEACHER, TARGET, gap=gap).item() == pytest.approx(golden, abs=1e-10)
    kl, _ = next(gaps(STUDENT, TEACHER, TARGET))
    assert kl == pytest.approx(0.1210181982, abs=1e-10)


@pytest.mark.parametrize(("gap", "at_zero"), [("exp", 0.0), ("ratio", 0.0), ("ce", 0.5)])
def test_alpha_starts_at_equal_logits_and_increases_with_the_gap(gap, at_zero):
    _, teacher, labels = batch()
    far = teacher.scatter_add(-1, labels[:, None], torch.full((6, 1), -9.0, dtype=torch.float64))
    path = [gap_alpha(teacher.lerp(far, step), teacher, labels, gap=gap) for step in np.linspace(0, 1, 9)]
    torch.testing.assert_close(path[0], torch.full((6,), at_zero, dtype=torch.float64), rtol=0, atol=1e-12)
    for before, after in zip(path[:-1], path[1:], strict=True):
        assert (after > before).all()
    assert (path[-1] < 1).all()


def test_kappa_scales_the_gap():
    student, teacher, labels = batch()
    for gap, formula in (("exp", FORMULAS["exp"]), ("ce", FORMULAS["ce"])):
        expected = [formula(3 * kl, 3 * ce) for kl, ce in gaps(student, teacher, labels)]
        np.testing.assert_allclose(
            gap_alpha(student, teacher, labels, gap=gap, kappa=3.0).numpy(), expected, rtol=1e-9
        )


def test_soft_labels_have_a_gap():
    student, teacher, _ = batch()
    target = torch.randn(6, 5, dtype=torch.float64).softmax(-1)
    expected = (target * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1).sigmoid()
    torch.testing.assert_close(gap_alpha(student, teacher, target, gap="ce"), expected)


def test_no_gradient_flows_through_alpha():
    student, teacher, labels = batch()
    inputs = student.requires_grad_(), teacher.requires_grad_()
    for gap in FORMULAS:
        assert not gap_alpha(*inputs, labels, gap=gap).requires_grad
        terms = AKD(gap=gap, temperature=2.0)(*call(*inputs, labels))
        alpha = gap_alpha(*inputs, labels, gap=gap)
        cross_entropy, kd = losses(*inputs, labels, 2.0)
        expected = torch.autograd.grad(((1 - alpha) * cross_entropy + alpha * kd).sum(), inputs)
        ours = torch.autograd.grad(sum(term.sum() for term in terms.values()), inputs)
        torch.testing.assert_close(ours, expected)


def test_what_gap_alpha_refuses():
    for arguments, message in (
        ({"gap": "l2"}, "gap must be one of exp, ratio, ce, got 'l2'"),
        ({"kappa": 0.0}, "kappa must be positive, got 0.0"),
        ({"gap": "ce"}, 'gap="ce" compares losses on the labels: pass labels, or use gap="exp"'),
        ({"reduction": "sum"}, "reduction must be \"mean\".*got 'sum'"),
    ):
        with pytest.raises(ValueError, match=message):
            gap_alpha(STUDENT, TEACHER, **arguments)


# The distiller


@pytest.mark.parametrize(("alpha", "on_kd"), [(0.0, 0.0), (0.3, 0.3), (1, 1.0)])
@pytest.mark.parametrize("alpha_on", ["kd", "ce"])
def test_a_fixed_alpha_is_kd(alpha, on_kd, alpha_on):
    """0 is the labels alone and 1 the teacher alone; the other way about where it weighs the labels."""
    arguments = call(*batch())
    terms = AKD(alpha, alpha_on=alpha_on)(*arguments)
    expected = KD(on_kd if alpha_on == "kd" else 1 - on_kd)(*arguments)
    for name in ("task", "kd"):
        torch.testing.assert_close(terms[name], expected[name])
    cross_entropy, kd = losses(*batch())
    if alpha == 0.0 and alpha_on == "kd":
        torch.testing.assert_close(terms["task"], cross_entropy)
    if alpha == 1 and alpha_on == "kd":
        torch.testing.assert_close(terms["kd"], kd)
    assert AKD(alpha).logged_values() == {}


def test_the_default_is_the_gap():
    method = AKD()
    assert (method.alpha, method.alpha_on, method.gap, method.kappa, method.temperature) == (
        "gap",
        "kd",
        "exp",
        1.0,
        4.0,
    )
    assert (method.batch_coupled, method.cam, list(method.parameters())) == (False, False, [])
    assert method.default_learning_rate == 0.01


@pytest.mark.parametrize("alpha_on", ["kd", "ce"])
def test_the_gradient_of_the_learned_alpha(alpha_on):
    """dL/da = alpha (1 - alpha) (K - CE); golden at a = 0 and T = 4."""
    method = AKD("learned", alpha_on=alpha_on).double()
    assert method.log_odds.shape == (1,)
    terms = method(*call(STUDENT, TEACHER, TARGET))
    sum(term.mean() for term in terms.values()).backward()
    sign = 1 if alpha_on == "kd" else -1
    assert method.log_odds.grad.item() == pytest.approx(sign * -0.1357247240, abs=1e-9)
    student, teacher, labels = batch()
    with torch.no_grad():
        method.log_odds.fill_(0.7)
    method.zero_grad()
    sum(term.mean() for term in method(*call(student, teacher, labels)).values()).backward()
    alpha = 1 / (1 + math.exp(-0.7))
    cross_entropy, kd = (loss.mean().item() for loss in losses(student, teacher, labels))
    assert method.log_odds.grad.item() == pytest.approx(sign * alpha * (1 - alpha) * (kd - cross_entropy), rel=1e-10)


def test_a_learned_alpha_is_put_back_into_its_range_and_does_not_stick():
    """Plain descent drifts to the smaller loss; where the losses change places, alpha comes back at once."""
    student, teacher, labels = batch()
    method = AKD("learned").double()
    optimizer = torch.optim.SGD(method.parameters(), lr=50.0)

    def step(arguments):
        optimizer.zero_grad()
        sum(term.mean() for term in method(*arguments).values()).backward()
        optimizer.step()
        method.on_step_end(None)
        return method.log_odds.sigmoid().item()

    towards_kd = call(teacher, teacher, labels)  # K is 0
    assert [round(step(towards_kd), 6) for _ in range(3)][1:] == [0.9, 0.9]
    wrong = 20 * F.one_hot(labels, 5).double()
    towards_labels = call(wrong, -wrong, labels)  # the cross-entropy is 0, and the teacher says the opposite
    assert step(towards_labels) == pytest.approx(0.1)


def test_the_mean_gap_of_the_batch_couples_its_samples():
    student, teacher, labels = batch()
    method = AKD(batch_mean=True)
    assert method.batch_coupled
    terms = method(*call(student, teacher, labels))
    alpha = 1 - math.exp(-np.mean([kl for kl, _ in gaps(student, teacher, labels)]))
    cross_entropy, kd = losses(student, teacher, labels)
    torch.testing.assert_close(terms["task"], (1 - alpha) * cross_entropy)
    torch.testing.assert_close(terms["kd"], alpha * kd)


class Alone:
    """A context of one process."""

    progress = 0.0

    def gather(self, tensor):
        return tensor


def test_the_average_gap_is_that_of_the_steps_before():
    method = AKD(ema=0.75, gap="ratio")
    average = None
    for seed in range(4):
        micro_batches = [batch(seed=2 * seed + i) for i in (0, 1)]
        latest = [np.mean([kl for kl, _ in gaps(*arguments)]) for arguments in micro_batches]
        for arguments, own in zip(micro_batches, latest, strict=True):
            size = own if average is None else average
            terms = method(*call(*arguments))
            torch.testing.assert_close(
                terms["kd"], size / (1 + size) * losses(*arguments)[1], rtol=1e-5, atol=1e-8, check_dtype=False
            )
        method.on_step_end(Alone())
        step = np.mean(latest)
        average = step if average is None else 0.75 * average + 0.25 * step
        assert method.average_gap.item() == pytest.approx(average, rel=1e-6)


def test_a_second_run_starts_without_an_average():
    method, going_on = AKD(ema=0.75, gap="ratio"), Alone()
    method(*call(*batch()))
    method.on_step_end(Alone())
    assert method.average_gap.isfinite()
    going_on.progress = 0.5
    method.on_train_begin(going_on)
    assert method.average_gap.isfinite()
    method.on_train_begin(Alone())
    assert method.average_gap.isnan()


def test_with_cam_it_is_cam_over_it():
    arguments = call(*batch())
    inside, outside = AKD("learned", cam=True).double(), CAM(AKD("learned")).double()
    for method in (inside, outside):
        torch.manual_seed(0)
        method.setup(five_classes())
        torch.nn.init.normal_(method.attention.score.weight)
        method.double()
    one, other = inside(*arguments), outside(*arguments)
    assert one.keys() == other.keys() == {"task", "kd", "cam"}
    for name, term in one.items():
        torch.testing.assert_close(term, other[name])
    assert inside.logged_values().keys() == outside.logged_values().keys()


# Runs


def test_alpha_is_logged_as_the_mean_over_the_steps(tmp_path):
    """At learning rate 0 the mean over an epoch can be computed apart; in a combination it has its part's name."""
    student, teacher, data = tiny("bert"), tiny_teacher("bert").eval(), rows("bert", 16)
    inputs = {k: v for k, v in data.columns.items() if k not in ("labels", "index")}
    with torch.no_grad():
        alpha = gap_alpha(student(**inputs).logits, teacher(**inputs).logits).mean().item()
    method = Combined({"wttm": WTTM(), "akd": AKD()}, task_from="wttm")
    trainer = make_trainer(
        tmp_path, student, teacher, method, data, max_steps=4, logging_steps=2, learning_rate=0.0,
        per_device_train_batch_size=4, gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.train()
    assert logged(trainer, "akd/alpha") == pytest.approx([alpha, alpha], rel=1e-5)
    terms = sum(np.array(logged(trainer, name)) for name in ("task", "wttm", "akd/kd"))
    assert logged(trainer, "loss") == pytest.approx(terms.tolist(), rel=1e-4)  # alpha is no part of the loss


def test_the_learned_alpha_has_a_group_of_its_own_without_decay(tmp_path):
    method = AKD("learned", cam=True)
    trainer = make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), method, rows("bert"), weight_decay=0.1)
    trainer.create_optimizer()
    group_of = {id(p): group for group in trainer.optimizer.param_groups for p in group["params"]}
    alpha, attention = group_of[id(method.log_odds)], group_of[id(method.attention.embedding.weight)]
    assert (alpha["lr"], alpha["weight_decay"]) == (0.01, 0.0)
    assert (attention["lr"], attention["weight_decay"]) == (0.001, 0.1)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data: neither HFKD_DATA_DIR nor {DATA}")
def test_alpha_and_cam_move_on_a_glue_run(tmp_path):
    """MNLI, a tiny BERT, AdamW at the method's own learning rates; the teacher learns the samples first."""
    tokenizer = AutoTokenizer.from_pretrained(DATA / "bert-base-uncased-vocab")
    raw = load_text_data("mnli", data_dir=DATA / "glue" / "mnli", max_train_samples=64)
    data = tokenize(raw, tokenizer, max_length=32)

    def model(seed):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        return BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), num_labels=3, **sizes))

    def train(student, teacher, distiller, learning_rate):
        trainer = make_trainer(
            tmp_path, student, teacher, distiller, data.train, max_steps=40, optim="adamw_torch",
            learning_rate=learning_rate,
            per_device_train_batch_size=32, logging_steps=10, trainer={"processing_class": tokenizer},
        )  # fmt: skip
        trainer.train()
        return trainer

    teacher = model(0)
    train(teacher, None, StudentAlone(), 1e-2)
    trainer = train(model(1), teacher, AKD("learned", cam=True), 1e-3)
    alpha, lowest, highest = (np.array(logged(trainer, n)) for n in ("alpha", "cam_weight_min", "cam_weight_max"))
    assert len(alpha) == 4
    assert (np.abs(np.diff(alpha)) > 0.005).all()
    assert highest[-1] - lowest[-1] > 2 * (highest[0] - lowest[0]) > 0
    assert 0.5 < logged(trainer, "cam_accuracy")[-1] <= 1.0
