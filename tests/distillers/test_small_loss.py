"""Small-loss selection: which samples stay, what they weigh, and that noise is what goes."""

import numpy as np
import pytest
import torch
from helpers import assert_identical, make_trainer, rows, tiny, tiny_teacher, weights
from references import batch

from hfkd.distillers import DML, KD, KDAIF, ModelOutputs, SmallLoss, StudentAlone
from hfkd.functional import small_loss_weights


def by_hand(losses, labels, dropped):
    """Sample by sample: the k smallest labelled ones share what all labelled ones weighed."""
    labelled = [i for i, label in enumerate(labels) if label != -100]
    kept = sorted(labelled, key=lambda i: losses[i])[: len(labelled) - int(dropped * len(labelled))]
    return [1.0 if i not in labelled else len(labelled) / len(kept) * (i in kept) for i in range(len(losses))]


@pytest.mark.parametrize("dropped", [0.0, 0.2, 0.5, 0.99])
@pytest.mark.parametrize("unlabelled", [0, 2, 7])
def test_the_weights_are_their_definition(dropped, unlabelled):
    generator = torch.Generator().manual_seed(unlabelled)
    losses = torch.rand(7, generator=generator, dtype=torch.float64)
    labels = torch.arange(7)
    labels[torch.randperm(7, generator=generator)[:unlabelled]] = -100
    found = small_loss_weights(losses, labels, dropped)
    np.testing.assert_allclose(found.numpy(), by_hand(losses.tolist(), labels.tolist(), dropped), rtol=1e-12)
    assert found.mean() == pytest.approx(1.0)  # so that the learning rate keeps its meaning


def test_all_terms_of_what_is_left_out_go():
    student, teacher, labels = batch()
    labels[2] = -100
    method, base = SmallLoss(KD(0.5), noise_rate=0.4, warm_up=0.0), KD(0.5)
    call = ModelOutputs(student, student), ModelOutputs(teacher), {"labels": labels}
    losses = base.task_loss(call[0], call[2])
    expected = torch.tensor(by_hand(losses.tolist(), labels.tolist(), 0.4), dtype=student.dtype)
    assert (expected == 0).sum() == 2
    for name, term in base(*call).items():
        torch.testing.assert_close(method(*call)[name], expected * term)


def test_the_share_rises_with_training():
    method = SmallLoss(noise_rate=0.5, warm_up=0.5)
    student, teacher, labels = batch()
    call = ModelOutputs(student, student), ModelOutputs(teacher), {"labels": labels}
    left_out = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        method.ramp.update(progress)
        left_out.append((method(*call)["kd"] == 0).sum().item())
    assert len(labels) == 6
    assert left_out == [0, 1, 3, 3]


def test_without_wrong_labels_it_is_its_base(tmp_path):
    trained = []
    for name, method in (("base", KD(0.5)), ("wrapped", SmallLoss(KD(0.5), noise_rate=0.0))):
        student = tiny("bert")
        make_trainer(tmp_path / name, student, tiny_teacher("bert"), method, rows("bert")).train()
        trained.append(weights(student))
    assert_identical(*trained)


def test_a_peer_leaves_the_same_samples_out():
    student, teacher, labels = batch()
    method = SmallLoss(DML(), noise_rate=0.5, warm_up=0.0)
    sides = ModelOutputs(student, student), ModelOutputs(teacher, teacher)
    of_student = method(*sides, {"labels": labels})["task"] == 0
    (of_peer, *_) = (term == 0 for term in method.teacher_terms(*sides[::-1], {"labels": labels}).values())
    assert of_student.sum() == 3
    assert torch.equal(of_student, of_peer)


def test_influence_cannot_weigh_what_is_selected():
    with pytest.raises(ValueError, match="KDAIF weighs samples, and SmallLoss mixes the samples of a batch"):
        KDAIF(SmallLoss())


def test_flipped_labels_go_first(tmp_path):
    """A token tells the class; of the samples that are left out, late in training, most have a wrong label."""
    generator = torch.Generator().manual_seed(0)
    data = rows("bert", 64)
    classes = data.columns["labels"] % 2
    data.columns["input_ids"][:, 1] = 3 + classes
    flipped = torch.rand(64, generator=generator) < 0.2
    data.columns["labels"] = torch.where(flipped, 1 - classes, classes)
    left_out = []

    class Watched(SmallLoss):
        def forward(self, student, teacher, batch):
            terms = super().forward(student, teacher, batch)
            left_out.extend(batch["index"][terms["task"] == 0].tolist())
            return terms

    method = Watched(StudentAlone(), noise_rate=0.2, warm_up=0.2)
    method.batch_columns = ("index",)
    make_trainer(
        tmp_path,
        tiny("bert"),
        None,
        method,
        data,
        num_train_epochs=6,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
    ).train()
    late = left_out[-24:]
    assert flipped[late].float().mean() > 0.6 > 0.2 >= flipped.float().mean() - 0.05
