"""In-context distillation: the two losses, and the three modes on a trainer against loops of their own."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    NUM_LABELS,
    assert_identical,
    batch_norms,
    freeze_batch_norm,
    largest_difference,
    logged,
    make_trainer,
    rows,
    tiny,
    tiny_teacher,
    weights,
)
from references import STUDENT, batch, kd, over_batch, probabilities
from torch.utils.data import Subset

from hfkd.distillers import DML, KD, KDAIF, Combined, InContextKD, ModelOutputs
from hfkd.features import dataset_features
from hfkd.functional import aggregate_context, kd_loss, nicd_loss, picd_loss
from hfkd.memory import MISSING, MemoryBank, find_neighbours
from hfkd.modelcard import describe


LOGITS = torch.tensor(
    [[2.0, 1.0, 0.0, -1.0], [1.5, 0.5, 0.2, -0.5], [0.0, 2.0, 0.5, -1.0], [-1.0, 0.0, 2.0, 1.0]], dtype=torch.float64
)
CONTEXT = aggregate_context(LOGITS[None, :2], torch.tensor([[1.0, 0.8]], dtype=torch.float64))
NEGATIVES = LOGITS[None, 2:]


def random_negatives(size=6, negatives=7, classes=5, *, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(size, negatives, classes, generator=generator, dtype=torch.float64)


# Positive context


def test_golden_picd():
    assert picd_loss(STUDENT, CONTEXT).item() == pytest.approx(0.2186803573, abs=1e-10)
    assert picd_loss(STUDENT, LOGITS[1:2]).item() == pytest.approx(0.0978356921, abs=1e-10)  # without itself


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_picd_is_its_definition(temperature):
    student, context, _ = batch()
    expected = torch.from_numpy(over_batch(kd, student, context, temperature=temperature))
    result = picd_loss(student, context, temperature=temperature, reduction="none")
    torch.testing.assert_close(result, expected)
    assert picd_loss(student, context, temperature=temperature).item() == pytest.approx(expected.mean().item())


def test_the_sample_itself_as_its_one_neighbour_is_distillation():
    student, teacher, _ = batch()
    context = aggregate_context(teacher[:, None], torch.ones(6, 1, dtype=torch.float64))
    torch.testing.assert_close(
        picd_loss(student, context, temperature=3.0), kd_loss(student, teacher, temperature=3.0)
    )


def test_picd_is_zero_at_the_context_alone():
    student, context, _ = batch()
    assert picd_loss(context + 3.0, context, reduction="none").abs().max() <= 1e-12
    assert picd_loss(student, context, reduction="none").min() > 1e-3


def test_at_temperature_one_it_smooths_the_labels():
    """(1 - α) CE + α PICD is cross-entropy with q' = (1 - α) y + α p̄, less the entropy of p̄: the same gradient."""
    student, context, labels = batch()
    student.requires_grad_()
    alpha = 0.3
    task = F.cross_entropy(student, labels, reduction="none")
    combined = (1 - alpha) * task + alpha * picd_loss(student, context, temperature=1.0, reduction="none")
    for i in range(len(labels)):
        p, smooth = probabilities(student[i].tolist()), probabilities(context[i].tolist())
        target = [(1 - alpha) * (c == labels[i].item()) + alpha * q for c, q in enumerate(smooth)]
        cross_entropy = -math.fsum(q * math.log(a) for q, a in zip(target, p, strict=True))
        entropy = -math.fsum(q * math.log(q) for q in smooth)
        assert combined[i].item() == pytest.approx(cross_entropy - alpha * entropy, abs=1e-10)
    (gradient,) = torch.autograd.grad(combined.sum(), student)
    target = (1 - alpha) * F.one_hot(labels, 5) + alpha * context.softmax(-1)
    torch.testing.assert_close(gradient, (student.softmax(-1) - target).detach())


# Negative context


def cosine(one, other):
    return math.fsum(a * b for a, b in zip(one, other, strict=True)) / math.hypot(*one) / math.hypot(*other)


def nicd(student, positive, negatives, temperature):
    own = math.exp(cosine(student, positive) / temperature)
    return -math.log(own / (own + math.fsum(math.exp(cosine(student, z) / temperature) for z in negatives)))


def hinge(student, positive, negatives, margin):
    own = cosine(student, positive)
    return math.fsum(max(0.0, margin + cosine(student, z) - own) for z in negatives) / len(negatives)


def test_golden_nicd():
    cosines = [cosine(STUDENT[0].tolist(), z.tolist()) for z in (CONTEXT[0], *NEGATIVES[0])]
    assert cosines == pytest.approx([0.83251185, 0.26726124, -0.66666667], abs=1e-8)
    assert nicd_loss(STUDENT, CONTEXT, NEGATIVES, temperature=0.1).item() == pytest.approx(0.0035028787, abs=1e-10)
    result = nicd_loss(STUDENT, CONTEXT, NEGATIVES, kind="hinge", margin=1.0)
    assert result.item() == pytest.approx((1 - 0.83251185 + 0.26726124) / 2, abs=1e-8)


@pytest.mark.parametrize("option", [0.1, 0.5, 2.0])
@pytest.mark.parametrize(
    ("kind", "name", "reference"), [("contrast", "temperature", nicd), ("hinge", "margin", hinge)]
)
def test_nicd_is_its_definition(option, kind, name, reference):
    student, positive, _ = batch()
    negatives = random_negatives()
    mask = torch.rand(6, 7, generator=torch.Generator().manual_seed(0)) < 0.6
    for used in (None, mask):
        result = nicd_loss(student, positive, negatives, kind=kind, mask=used, reduction="none", **{name: option})
        for i in range(6):
            there = [z.tolist() for k, z in enumerate(negatives[i]) if used is None or used[i, k]]
            expected = reference(student[i].tolist(), positive[i].tolist(), there, option)
            assert result[i].item() == pytest.approx(expected, abs=1e-12)
        mean = nicd_loss(student, positive, negatives, kind=kind, mask=used, **{name: option})
        assert mean.item() == pytest.approx(result.mean().item())


@pytest.mark.parametrize("kind", ["contrast", "hinge"])
def test_nicd_is_not_negative_and_zero_without_negatives(kind):
    student, positive, _ = batch()
    student.requires_grad_()
    negatives = random_negatives()
    assert nicd_loss(student, positive, negatives, kind=kind, reduction="none").min() > 0
    for none in (
        nicd_loss(student, positive, negatives[:, :0], kind=kind, reduction="none"),
        nicd_loss(student, positive, negatives, kind=kind, mask=torch.zeros(6, 7).bool(), reduction="none"),
    ):
        assert none.tolist() == [0.0] * 6
        (gradient,) = torch.autograd.grad(none.sum(), student, allow_unused=True)
        assert gradient is None or (gradient == 0).all()


@pytest.mark.parametrize("negatives", [1, 2, 9])
def test_equal_cosines_give_the_logarithm_of_their_number(negatives):
    student, positive, _ = batch()
    others = positive[:, None] * torch.arange(1.0, negatives + 1)[:, None]  # of any length
    result = nicd_loss(student, positive, others, reduction="none")
    assert result.tolist() == pytest.approx([math.log(1 + negatives)] * 6, abs=1e-12)


@pytest.mark.parametrize("kind", ["contrast", "hinge"])
def test_nicd_does_not_see_the_size_of_the_students_logits(kind):
    student, positive, _ = batch()
    negatives = random_negatives()
    result = nicd_loss(student, positive, negatives, kind=kind, reduction="none")
    torch.testing.assert_close(nicd_loss(37.0 * student, positive, negatives, kind=kind, reduction="none"), result)
    assert not torch.allclose(nicd_loss(student + 1.0, positive, negatives, kind=kind, reduction="none"), result)


def test_gradients():
    student, positive, _ = batch()
    negatives = random_negatives()
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: picd_loss(z, positive), student)
    for kind in ("contrast", "hinge"):
        assert torch.autograd.gradcheck(lambda z, k=kind: nicd_loss(z, positive, negatives, kind=k), student)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("kind", ["contrast", "hinge"])
def test_extreme_logits_stay_finite(classes, kind):
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0])[:classes]
    student = (1e4 * signs[None]).requires_grad_()
    positive, negatives = -1e4 * signs[None], 1e4 * signs.expand(1, 3, classes)
    loss = picd_loss(student, positive) + nicd_loss(student, positive, negatives, temperature=0.05, kind=kind)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_logits_of_zero_have_no_direction_and_no_gradient():
    student = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    loss = nicd_loss(student, CONTEXT, NEGATIVES)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(3))
    assert (student.grad == 0).all()


def test_what_the_losses_refuse():
    with pytest.raises(ValueError, match="use 1.0 for no softening"):
        nicd_loss(STUDENT, CONTEXT, NEGATIVES, temperature=0.0)
    with pytest.raises(ValueError, match="must be one of contrast, hinge, got 'kl'"):
        nicd_loss(STUDENT, CONTEXT, NEGATIVES, kind="kl")
    for loss in (
        lambda **o: picd_loss(STUDENT, CONTEXT, **o),
        lambda **o: nicd_loss(STUDENT, CONTEXT, NEGATIVES, **o),
    ):
        with pytest.raises(ValueError, match="reduction must be"):
            loss(reduction="sum")


# The class


def small(mode="offline", **options):
    options = {"neighbours": 2, "negatives": 4, **options}
    return InContextKD(mode, **options)


def ready(tmp_path, family="bert", mode="offline", *, dataset=None, distiller=None, **arguments):
    """A trainer in one of the modes."""
    distiller = distiller or small(mode)
    student = tiny(family)
    teacher = tiny_teacher(family) if mode == "offline" else None
    return make_trainer(
        tmp_path, student, teacher, distiller, rows(family) if dataset is None else dataset, **arguments
    )


def passed(model, dataset):
    """Features and logits of a data set, one sample at a time."""
    model = copy.deepcopy(model).eval()
    head = model.linear if hasattr(model, "linear") else model.classifier
    seen, logits = [], []
    head.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].detach()[0].tolist()))
    for i in range(len(dataset)):
        row = {k: v[None] for k, v in dataset[i].items() if k not in ("labels", "index")}
        with torch.no_grad():
            logits.append(model(**row).logits[0].tolist())
    return seen, logits


def bank_by_hand(model, dataset, neighbours, negatives, temperature):
    """For each row the average of its neighbours' logits (None without), the negatives, and who they are."""
    features, logits = passed(model, dataset)
    labels, context = [int(dataset[i]["labels"]) for i in range(len(dataset))], []
    for i, label in enumerate(labels):
        others = [j for j in range(len(labels)) if j != i and labels[j] != -100 and label != -100]
        similar = {j: cosine(features[i], features[j]) for j in others}
        others.sort(key=lambda j: -similar[j])
        same = [j for j in others if labels[j] == label][:neighbours]
        other = [j for j in others if labels[j] != label][:negatives]
        exponents = [math.exp(similar[j] / temperature) for j in same]
        average = [
            math.fsum(e * logits[j][c] for e, j in zip(exponents, same, strict=True)) / math.fsum(exponents)
            for c in range(NUM_LABELS)
        ] if same else None  # fmt: skip
        context.append((average, [logits[j] for j in other], same, other))
    return context


def assert_bank(bank, model, dataset):
    expected = bank_by_hand(model, dataset, 2, 4, 0.1)
    index = torch.tensor([int(dataset[i]["index"]) for i in range(len(dataset))])
    known, shown = bank.context(index, temperature=0.1), bank.retrieved(index)
    for i, (average, negatives, same, other) in enumerate(expected):
        assert [j for j in shown.positives[i].tolist() if j != MISSING] == index[same].tolist()
        assert [j for j in shown.negatives[i].tolist() if j != MISSING] == index[other].tolist()
        assert known.has_positives[i].item() == (average is not None)
        if average is not None:
            torch.testing.assert_close(known.positive_logits[i], torch.tensor(average), rtol=1e-4, atol=1e-4)
        assert known.has_negatives[i].sum() == len(negatives)
        for k, logits in enumerate(negatives):
            torch.testing.assert_close(known.negative_logits[i, k], torch.tensor(logits), rtol=1e-4, atol=1e-5)


def with_gaps(dataset):
    """Numbers with gaps in no order, two unlabelled samples, and a class with a single member."""
    labels = dataset.columns["labels"] % (NUM_LABELS - 1)
    labels[3] = labels[8] = -100
    labels[5] = NUM_LABELS - 1
    index = (7 * torch.arange(len(labels)) + 3) % 41 * 10
    return dataset.with_columns(labels=labels, index=index)


@pytest.mark.parametrize("family", ["bert", "cifar"])
def test_the_teachers_bank_is_an_independent_computation(tmp_path, family):
    dataset = with_gaps(rows(family, 20))
    trainer = ready(tmp_path, family, dataset=dataset, max_steps=1)
    trainer.train()
    assert_bank(trainer.distiller.teacher_bank, trainer.teacher_model, dataset)
    assert trainer.distiller.student_bank is None


@pytest.mark.parametrize("family", ["bert", "cifar"])
@pytest.mark.parametrize("mode", ["online", "teacher_free"])
def test_other_banks_are_of_the_latest_refresh(tmp_path, family, mode):
    """Refreshed after steps 2 of 4 and 4 of 4 would be; the last is left out, since nobody learns from it."""
    dataset, past = with_gaps(rows(family, 20)), []
    distiller = small(mode, refresh=0.5)
    trainer = ready(tmp_path, family, mode, dataset=dataset, distiller=distiller, max_steps=4)
    fill = distiller._fill

    def noted(context, whose, run):
        past.append((context.progress, whose, copy.deepcopy(distiller._model(context, whose))))
        fill(context, whose, run)

    distiller._fill = noted
    trainer.train()
    assert [moment[:2] for moment in past] == [
        (0.5, whose) for whose in (("student", "teacher") if mode == "online" else ("student",))
    ]
    for _, whose, model in past:
        assert_bank(getattr(distiller, f"{whose}_bank"), model, dataset)
        now = trainer.model if whose == "student" else trainer.teacher_model
        assert largest_difference(weights(now), weights(model)) > 1e-3


def outputs_of(seed):
    student = torch.randn(4, NUM_LABELS, generator=torch.Generator().manual_seed(seed))
    return ModelOutputs(student, student)


@pytest.mark.parametrize("mode", ["offline", "online", "teacher_free"])
def test_terms_are_their_definitions(tmp_path, mode):
    """One sample without a label, one alone in its class; the peer is taught from the student's bank."""
    dataset = with_gaps(rows("bert", 20))
    options = {} if mode == "offline" else {"refresh": 0.3}
    share = {} if mode == "teacher_free" else {"alpha": 0.7}
    method = small(mode, temperature=3.0, picd_weight=2.0, nicd_weight=0.5, **options, **share)
    trainer = ready(tmp_path, "bert", mode, dataset=dataset, distiller=method)
    trainer.train()
    some = [0, 3, 5, 11]
    columns = {name: dataset.columns[name][some] for name in ("labels", "index")}
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 4, NUM_LABELS, generator=generator)
    outputs = ModelOutputs(one, one), ModelOutputs(other, other)
    sides = [("", method(*outputs, columns), one, other, method.teacher_bank or method.student_bank)]
    if mode == "online":
        sides.append(("peer_", method.teacher_terms(*outputs[::-1], columns), other, one, method.student_bank))
    scale = 20 / 18
    for prefix, terms, own, their, bank in sides:
        names = ["task", "kd", "picd", "nicd"] if mode != "teacher_free" else ["task", "picd", "nicd"]
        assert list(terms) == [prefix + name for name in names]
        assert method.hard_label_loss.scale == pytest.approx(scale)
        known = bank.context(columns["index"], temperature=0.1)
        for i, row in enumerate(some):
            p, label = own[i].tolist(), int(columns["labels"][i])
            task = 0.0 if label == -100 else -scale * math.log(probabilities(p)[label])
            expected = {"task": (0.3 if mode != "teacher_free" else 1.0) * task, "picd": 0.0, "nicd": 0.0}
            expected["kd"] = 0.7 * kd(p, their[i].tolist(), 3.0)
            if row not in (3, 5):
                average = known.positive_logits[i].tolist()
                expected["picd"] = scale * 2.0 * kd(p, average, 3.0)
                negatives = known.negative_logits[i][known.has_negatives[i]].tolist()
                expected["nicd"] = scale * 0.5 * nicd(p, average, negatives, 0.5)
                assert expected["picd"] > 1e-3
                assert expected["nicd"] > 1e-3
            for name in names:
                assert terms[prefix + name][i].item() == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


def test_options_reach_the_losses(tmp_path):
    method = small(negative_loss="hinge", margin=1.5, retrieval_temperature=0.7)
    trainer = ready(tmp_path, distiller=method)
    trainer.train()
    columns, outputs = {"labels": torch.zeros(4).long(), "index": torch.arange(4)}, outputs_of(0)
    terms = method(outputs, outputs_of(1), columns)
    known = method.teacher_bank.context(columns["index"], temperature=0.7)
    expected = 0.1 * nicd_loss(
        outputs.logits,
        known.positive_logits,
        known.negative_logits,
        kind="hinge",
        margin=1.5,
        mask=known.has_negatives,
        reduction="none",
    ).masked_fill(~known.has_positives, 0.0)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(terms["nicd"], expected)


@pytest.mark.parametrize("family", ["bert", "cifar"])
def test_without_context_it_is_distillation(tmp_path, family):
    runs = []
    for distiller in (KD(), small(picd_weight=0.0, nicd_weight=0.0), small()):
        trainer = ready(tmp_path, family, distiller=distiller)
        trainer.train()
        runs.append(weights(trainer.model))
    assert_identical(runs[0], runs[1])
    assert largest_difference(runs[0], runs[2]) > 1e-3


def test_two_peers_without_context_are_mutual_learning():
    student, peer, labels = batch()
    one, other, columns = ModelOutputs(student, student), ModelOutputs(peer, peer), {"labels": labels}
    method = small("online", temperature=1.0, picd_weight=0.0, nicd_weight=0.0)
    method.student_bank = method.teacher_bank = MemoryBank(6, 5, 2, 4, torch.float64)
    columns["index"] = torch.arange(6)
    mutual = DML()
    for ours, theirs in (
        (method(one, other, columns), mutual(one, other, columns)),
        (method.teacher_terms(other, one, columns), mutual.teacher_terms(other, one, columns)),
    ):
        total = sum(ours.values())
        torch.testing.assert_close(2 * total, sum(theirs.values()))


def test_a_run_offline_is_the_loop_by_hand(tmp_path):
    dataset = rows("bert", 8)
    student, teacher = tiny("bert"), tiny_teacher("bert")
    own = copy.deepcopy(student)
    bank = bank_by_hand(teacher, dataset, 2, 4, 0.1)
    inputs = {k: v for k, v in dataset.columns.items() if k not in ("labels", "index")}
    with torch.no_grad():
        answers = copy.deepcopy(teacher).eval()(**inputs).logits
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    for _ in range(3):
        logits = own(**inputs).logits
        loss = 0.1 * F.cross_entropy(logits, dataset.columns["labels"])
        loss = loss + 0.9 * kd_loss(logits, answers, temperature=4.0)
        for z, (average, negatives, _, _) in zip(logits, bank, strict=True):
            if average is not None:
                average, negatives = torch.tensor(average), torch.tensor(negatives)
                target = (average / 4).softmax(-1)
                loss = loss + 16 * (target * (target.log() - (z / 4).log_softmax(-1))).sum() / 8
                cosines = F.cosine_similarity(z, torch.cat([average[None], negatives]), dim=-1)
                loss = loss - 0.1 * (cosines / 0.5).log_softmax(0)[0] / 8
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    start = weights(student)
    trainer = make_trainer(tmp_path, student, teacher, small(), dataset)
    trainer.train()
    assert largest_difference(weights(student), weights(own)) <= 1e-5
    assert largest_difference(weights(student), start) > 1e-2
    assert logged(trainer, "picd")[0] > 0.1


def test_before_the_first_refresh_there_is_no_context(tmp_path):
    trainer = ready(tmp_path, "bert", "teacher_free", distiller=small("teacher_free", refresh=0.5), max_steps=4)
    trainer.train()
    picd = logged(trainer, "picd")
    assert picd[:2] == [0.0, 0.0]
    assert min(picd[2:]) > 0.0


@pytest.mark.parametrize("family", ["bert", "cifar"])
@pytest.mark.parametrize("mode", ["offline", "online", "teacher_free"])
def test_a_pass_leaves_models_and_random_numbers_as_they_were(tmp_path, family, mode):
    options = {} if mode == "offline" else {"refresh": 0.3}
    trainer = ready(tmp_path, family, mode, distiller=small(mode, **options))
    models = [model for model in (trainer.model, trainer.teacher_model) if model is not None]
    trainer.model.train()
    before, modes = weights(*models), [[m.training for m in model.modules()] for model in models]
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    trainer.state.max_steps, trainer.state.global_step = 10, 0
    trainer.distiller.on_train_begin(trainer.context)
    trainer.state.global_step = 5
    trainer.distiller.on_step_end(trainer.context)
    assert (trainer.distiller.teacher_bank or trainer.distiller.student_bank).is_filled
    assert torch.equal(torch.rand(2), expected)
    assert_identical(weights(*models), before)
    assert [[m.training for m in model.modules()] for model in models] == modes
    assert family != "cifar" or batch_norms(trainer.model)


def test_a_second_run_starts_without_context(tmp_path):
    distiller = InContextKD("teacher_free", neighbours=2, negatives=4, refresh=0.5)
    trainer = make_trainer(tmp_path, tiny("bert"), None, distiller, rows("bert"), max_steps=4)
    for _ in range(2):
        trainer.train()
        assert distiller.student_bank.is_filled
    assert [picd > 0 for picd in logged(trainer, "picd")] == [False, False, True, True]


def test_a_subset_and_a_budget_of_labels_work(tmp_path):
    dataset = rows("bert", 30)
    dataset.columns["labels"][::4] = -100
    trainer = ready(tmp_path, dataset=Subset(dataset, range(3, 30, 2)))
    trainer.train()
    assert trainer.distiller.teacher_bank.sample_index.tolist() == list(range(3, 30, 2))
    shown = trainer.distiller.retrieved(torch.tensor([5, 8 + 3]))
    assert set(shown.positives.flatten().tolist()) <= {*range(3, 30, 2), MISSING}


def test_named_layers_are_the_ones_that_are_used(tmp_path):
    trainer = ready(tmp_path, distiller=small(teacher_layers="bert.pooler.dense"))
    assert trainer.teacher.layers == ("bert.pooler.dense",)
    trainer.train()
    features, labels = dataset_features(
        trainer.teacher_model, trainer.context.batches(trainer.train_dataset), "bert.pooler.dense", "teacher_"
    )
    expected = find_neighbours(features, labels, positives=2, negatives=4)
    assert torch.equal(trainer.distiller.retrieved(torch.arange(16)).positives, expected.positives)


def test_what_it_cannot_work_with_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"retrieves by vectors \(B, D\), and 'bert.encoder' of the teacher gives"):
        ready(tmp_path, distiller=small(teacher_layers="bert.encoder"))
    with pytest.raises(ValueError, match=r"'layer3' of the student gives .*student_layers=\"classifier:input\""):
        ready(tmp_path, "cifar", "online", distiller=small("online", student_layers="layer3"))
    with pytest.raises(ValueError, match="the training set has no column index, which InContextKD needs"):
        ready(tmp_path, dataset=rows("bert").with_columns(index=None))
    trainer = ready(tmp_path, dataset=rows("bert", 8).with_columns(index=torch.zeros(8).long()))
    with pytest.raises(ValueError, match="give every row a number of its own"):
        trainer.train()
    with pytest.raises(ValueError, match="InContextKD brings its own teacher: leave out teacher_model"):
        make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), small("online"), rows("bert"))
    with pytest.raises(ValueError, match="InContextKD uses no teacher: leave out teacher_model"):
        make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), small("teacher_free"), rows("bert"))
    with pytest.raises(ValueError, match="another method trains the teacher here: leave it frozen"):
        make_trainer(
            tmp_path,
            tiny("bert"),
            tiny_teacher("bert"),
            KDAIF(small(), teacher_update="weighted"),
            rows("bert"),
            trainer={"held_out_dataset": rows("bert", 7, seed=9)},
        )
    for mode, option in (("offline", {"refresh": 0.5}), ("offline", {"peer": tiny("bert")}),
                         ("offline", {"student_layers": "a"}), ("teacher_free", {"teacher_layers": "a"})):  # fmt: skip
        with pytest.raises(ValueError, match=f"{next(iter(option))} has no meaning with mode='{mode}': leave it out"):
            InContextKD(mode, **option)


@pytest.mark.parametrize("mode", ["offline", "online", "teacher_free"])
def test_passes_run_in_the_precision_of_the_steps(tmp_path, mode):
    """A teacher in bfloat16 answers to float inputs under autocast alone."""
    distiller = small(mode, **({} if mode == "offline" else {"refresh": 0.3}))
    teacher = tiny_teacher("cifar").bfloat16() if mode == "offline" else None
    trainer = make_trainer(tmp_path, tiny("cifar"), teacher, distiller, rows("cifar"), bf16=True)
    trainer.train()
    bank = distiller.teacher_bank or distiller.student_bank
    assert bank.logits.dtype == torch.float32
    assert torch.equal(bank.logits, bank.logits.bfloat16().float())
    assert logged(trainer, "picd")[-1] > 0


@pytest.mark.parametrize("mode", ["offline", "online", "teacher_free"])
def test_accumulated_steps_are_whole_ones(tmp_path, mode):
    runs = []
    for accumulation in (1, 4):
        distiller = small(mode, **({} if mode == "offline" else {"refresh": 0.3}))
        student = freeze_batch_norm(tiny("cifar")).double()
        teacher = tiny_teacher("cifar").double() if mode == "offline" else None
        trainer = make_trainer(
            tmp_path,
            student,
            teacher,
            distiller,
            rows("cifar").double(),
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
        )
        if mode == "online":
            freeze_batch_norm(trainer.teacher_model)
        trainer.train()
        runs.append(weights(student, distiller))
    assert largest_difference(*runs) <= 1e-6


def learning(tmp_path, family, mode):
    """Dropout, shuffling; refreshed after steps 3, 5 and 7 of 8; a checkpoint after step 6, in mid-epoch."""
    return make_trainer(
        tmp_path,
        tiny(family, dropout=0.2),
        tiny_teacher(family) if mode == "offline" else None,
        small(mode, **({} if mode == "offline" else {"refresh": 0.29})),
        rows(family, 16),
        max_steps=8,
        optim="adamw_torch",
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=6,
        per_device_train_batch_size=4,
    )


@pytest.mark.parametrize(
    ("family", "mode"), [("vit", "offline"), ("bert", "online"), ("cifar", "online"), ("cifar", "teacher_free")]
)
def test_it_resumes_bit_for_bit(tmp_path, family, mode, monkeypatch):
    def parts(trainer):
        return weights(*filter(None, (trainer.model, trainer.distiller, trainer.teacher_model)))

    whole, resumed = learning(tmp_path, family, mode), learning(tmp_path, family, mode)
    whole.train()
    fills = []
    fill = InContextKD._fill

    def noted(self, context, whose, run):
        fills.append((round(8 * context.progress), whose))
        fill(self, context, whose, run)

    monkeypatch.setattr(InContextKD, "_fill", noted)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    expected = {"offline": [], "online": [(7, "student"), (7, "teacher")], "teacher_free": [(7, "student")]}
    assert fills == expected[mode]
    assert_identical(parts(whole), parts(resumed))
    assert logged(whole, "picd") == logged(resumed, "picd")
    assert logged(whole, "picd")[-1] > 0


@pytest.mark.parametrize("mode", ["offline", "online", "teacher_free"])
def test_the_model_card_shows_a_call_that_makes_it(tmp_path, mode):
    distiller = ready(tmp_path, mode=mode, distiller=small(mode, picd_weight=0.3)).distiller
    again = eval(describe(distiller), {"InContextKD": InContextKD})
    assert describe(again) == describe(distiller)
    assert (again.mode, again.picd_weight, again.negatives) == (mode, 0.3, 4)


def test_in_a_combination_the_bank_is_filled(tmp_path):
    both = Combined({"kd": KD(), "context": small()}, {"context": 0.5}, task_from="kd")
    trainer = ready(tmp_path, distiller=both)
    trainer.train()
    assert min(logged(trainer, "context/picd")) > 0.01
