"""Contrastive distillation: the loss, the draws, and two memories that are written once a step."""

import math

import numpy as np
import pytest
import torch
from helpers import freeze_batch_norm, make_trainer, rows, tiny, tiny_teacher
from setups import features, network, outputs, set_up

from hfkd.distillers import CRD, WTTM, Combined
from hfkd.functional import crd_loss


def test_the_loss_is_its_definition():
    positive, negatives, samples = features(3), features(3, 7, seed=1), 50
    noise = 7 / samples
    expected = 0.0
    for s, others in zip(positive.tolist(), negatives.tolist(), strict=True):
        expected -= math.log(math.exp(s) / (math.exp(s) + noise))
        expected -= sum(math.log(noise / (math.exp(k) + noise)) for k in others)
    assert crd_loss(positive, negatives, num_samples=samples).item() == pytest.approx(expected / 3, rel=1e-12)


def test_golden_value():
    """All densities equal to the noise: every pair is as likely as not."""
    log_noise = math.log(4 / 10)
    value = crd_loss(torch.full((2,), log_noise), torch.full((2, 4), log_noise), num_samples=10)
    assert value.item() == pytest.approx(5 * math.log(2), rel=1e-6)


def test_extreme_scores_stay_finite():
    positive, negatives = torch.tensor([-1e4], requires_grad=True), torch.full((1, 3), 1e4, requires_grad=True)
    loss = crd_loss(positive, negatives, num_samples=3)
    loss.backward()
    assert loss.isfinite()
    assert positive.grad.isfinite().all()
    assert negatives.grad.isfinite().all()


def test_gradcheck():
    loss = lambda s, k: crd_loss(s, k, num_samples=20)  # noqa: E731
    assert torch.autograd.gradcheck(loss, (features(3).requires_grad_(), features(3, 4, seed=1).requires_grad_()))


def test_a_loss_per_sample_is_refused():
    with pytest.raises(ValueError, match="reduction must be \"mean\", got 'none'"):
        crd_loss(features(3), features(3, 4), num_samples=4, reduction="none")


def small(**options):
    return CRD(**{"embedding_size": 8, "negatives": 5, **options})


def ready(dataset=None, **options):
    distiller = small(**options)
    return distiller, set_up(distiller, network("resnet8"), network("resnet8x4", seed=1), dataset)


def test_the_defaults_are_the_papers():
    distiller = CRD()
    options = (
        distiller.weight,
        distiller.embedding_size,
        distiller.negatives,
        distiller.temperature,
        distiller.momentum,
    )
    assert options == (0.8, 128, 16384, 0.07, 0.5)


def test_the_term_is_its_definition():
    """Both directions, the positive from the sample's own row, scores normalised by Z."""
    distiller, where = ready()
    drawn = torch.randint(0, 16, (4, 5), generator=torch.Generator().manual_seed(3))
    distiller.draw_negatives = lambda rows: drawn
    student, teacher, batch = outputs(where, distiller, [3, 0, 9, 7])

    def embed(linear, vectors):
        vectors = vectors.detach().numpy() @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    sides = (
        (embed(distiller.student_embedding, student.features["linear:input"]), distiller.teacher_memory.numpy()),
        (embed(distiller.teacher_embedding, teacher.features["linear:input"]), distiller.student_memory.numpy()),
    )
    z, noise, expected = math.exp(distiller.log_z), 5 / 16, 0.0
    for anchors, memory in sides:
        for i, row in enumerate((3, 0, 9, 7)):
            positive = math.exp(anchors[i] @ memory[row] / 0.07) / z
            expected -= math.log(positive / (positive + noise))
            for k in drawn[i].tolist():
                expected -= math.log(noise / (math.exp(anchors[i] @ memory[k] / 0.07) / z + noise))
    assert distiller(student, teacher, batch)["crd"].item() == pytest.approx(0.8 * expected / 4, rel=1e-9)


def test_z_is_what_random_embeddings_give():
    """In 128 dimensions the cosine of random directions is nearly normal: E exp(cos/τ) = exp(1/(2·128·τ²))."""
    distiller = CRD(negatives=5)
    set_up(distiller, "distilbert", "bert", rows("bert", 400))
    assert distiller.log_z.item() == pytest.approx(math.log(400) + 1 / (2 * 128 * 0.07**2), abs=0.05)
    assert distiller.student_memory.norm(dim=1).tolist() == pytest.approx([1.0] * 400)


# Negatives


def test_negatives_are_all_samples_of_other_classes_alike():
    dataset = rows("cifar", 12)
    labels = torch.tensor([0, 1, 1, 2, 0, -100, 3, 3, -100, 1, 4, 4])
    distiller, _ = ready(dataset.with_columns(labels=labels), negatives=20000)
    drawn = distiller.draw_negatives(torch.arange(12))
    for row in range(12):
        allowed = [k for k in range(12) if k != row and (labels[row] == -100 or labels[k] != labels[row])]
        counts = torch.bincount(drawn[row], minlength=12)
        assert counts[[k for k in range(12) if k not in allowed]].sum() == 0
        expected = 20000 / len(allowed)
        assert (counts[allowed] - expected).abs().max() < 6 * math.sqrt(expected)


def test_draws_differ_between_samples_and_steps_and_follow_the_seed():
    distiller, _ = ready(rows("cifar", 16), negatives=30)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(distiller.draw_negatives(torch.arange(16)))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    same = torch.where(distiller.members == distiller.members[0])[0][:2]
    assert not torch.equal(draws[0][same[0]], draws[0][same[1]])


def test_indices_of_a_subset_find_their_rows():
    """A training set that a validation set was cut from has gaps in its indices, and any order."""
    dataset = rows("cifar", 8)
    index = torch.tensor([40, 7, 33, 2, 90, 11, 5, 60])
    dataset = dataset.with_columns(index=index)
    dataset.index = index.numpy()
    distiller, where = ready(dataset)
    student, teacher, batch = outputs(where, distiller, [0, 3])
    distiller(student, teacher, batch)
    ((rows_seen, _, _),) = distiller._seen
    assert rows_seen.tolist() == [5, 0]  # ranks of 40 and 2
    labels = dataset.columns["labels"][index.argsort()]
    drawn = distiller.draw_negatives(torch.arange(8))
    assert (labels[drawn] != labels[:, None]).all()


# Memories


def moved(old, new, momentum=0.5):
    mixed = [momentum * a + (1 - momentum) * b for a, b in zip(old, new, strict=True)]
    return [m / math.hypot(*mixed) for m in mixed]


def test_a_step_moves_the_rows_of_its_samples():
    distiller, where = ready()
    before = distiller.student_memory.tolist(), distiller.teacher_memory.tolist()
    for chosen in ([1, 5], [8, 2]):  # two micro-batches
        distiller(*outputs(where, distiller, chosen))
    seen = [
        (row, own, other)
        for part in distiller._seen
        for row, own, other in zip(*(p.tolist() for p in part), strict=True)
    ]
    assert distiller.student_memory.tolist() == before[0]  # not before the step ends
    distiller.on_step_end(where)
    assert [row for row, _, _ in seen] == [1, 5, 8, 2]
    expected = [list(memory) for memory in before]
    for row, own, other in seen:
        expected[0][row], expected[1][row] = moved(before[0][row], own), moved(before[1][row], other)
    np.testing.assert_allclose(distiller.student_memory.numpy(), expected[0], rtol=1e-12)
    np.testing.assert_allclose(distiller.teacher_memory.numpy(), expected[1], rtol=1e-12)
    assert not distiller._seen


def test_a_sample_that_comes_twice_is_written_as_it_came_last():
    distiller, where = ready()
    before = distiller.student_memory[4].tolist()
    distiller._seen = [(torch.tensor([4, 4, 6]), features(3, 8), features(3, 8, seed=1))]
    last = features(3, 8)[1].tolist()
    distiller.on_step_end(where)
    assert distiller.student_memory[4].tolist() == pytest.approx(moved(before, last))


def test_evaluation_writes_nothing():
    distiller, where = ready()
    distiller.eval()
    distiller(*outputs(where, distiller))
    assert not distiller._seen


def test_what_a_run_left_in_mid_step_is_forgotten():
    distiller, where = ready()
    distiller(*outputs(where, distiller))
    distiller.on_train_begin(where)
    assert not distiller._seen


def test_only_the_memories_are_saved():
    distiller, _ = ready()
    assert set(distiller.state_dict()) == {
        *(f"{side}_embedding.{name}" for side in ("student", "teacher") for name in ("weight", "bias")),
        "student_memory",
        "teacher_memory",
        "log_z",
    }


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_epoch_visits_every_row_whatever_the_accumulation(tmp_path, accumulation):
    distiller = small()
    trainer = make_trainer(
        tmp_path,
        freeze_batch_norm(tiny("cifar")),
        tiny_teacher("cifar"),
        distiller,
        rows("cifar", 16),
        max_steps=2,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    before = distiller.student_memory.clone(), distiller.teacher_memory.clone()
    trainer.train()
    for old, memory in zip(before, (distiller.student_memory, distiller.teacher_memory), strict=True):
        assert ((memory - old).norm(dim=1) > 1e-3).all()
        torch.testing.assert_close(memory.norm(dim=1), torch.ones(16))


def test_what_it_cannot_work_with_is_refused():
    dataset = rows("cifar", 8)
    with pytest.raises(ValueError, match=r"compares a vector \(B, D\), and 'layer3' of the student gives"):
        ready(student_layers="layer3")
    with pytest.raises(ValueError, match="the training set has only one"):
        ready(dataset.with_columns(labels=torch.zeros(8, dtype=torch.long)))
    with pytest.raises(ValueError, match="column index of the training set is not 0, 1, …, .*`index` attribute"):
        ready(dataset.with_columns(index=torch.arange(8) + 100))
    with pytest.raises(ValueError, match="cannot read the labels of the training set: give it a `labels` attribute"):
        ready(dataset.with_columns(labels=None))


@pytest.mark.parametrize(
    ("crd", "weights"), [({}, None), ({"weight": 1.0}, {"crd": 0.8})], ids=["its own weight", "the combination's"]
)
def test_wttm_and_crd_are_the_sum_of_both_with_the_papers_factor_once(tmp_path, crd, weights):
    """The first step of the combination against those of two runs of one method each."""

    def first_step(distiller):
        trainer = make_trainer(tmp_path, tiny("cifar"), tiny_teacher("cifar"), distiller, rows("cifar"), max_steps=1)
        trainer.train()
        return trainer.state.log_history[0]

    wttm = first_step(WTTM(gamma=0.1, beta=4.0))
    alone = first_step(small(weight=1.0))
    both = first_step(
        Combined({"wttm": WTTM(gamma=0.1, beta=4.0), "crd": small(**crd)}, weights=weights, task_from="wttm")
    )
    assert both["crd/crd"] == pytest.approx(0.8 * alone["crd"], rel=1e-5)
    assert both["loss"] == pytest.approx(wttm["loss"] + 0.8 * alone["crd"], rel=1e-4)
    assert (both["task"], both["wttm"]) == pytest.approx((wttm["task"], wttm["wttm"]), rel=1e-5)
