"""Deep mutual learning: two networks, each with the other as teacher."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_identical, largest_difference, logged, make_trainer, rows, tiny, weights
from peft import LoraConfig, get_peft_model
from references import STUDENT, TARGET, TEACHER, batch, kd, over_batch

from hfkd.distillers import DML, KD, Combined, ModelOutputs


def test_both_sides_are_cross_entropy_and_divergence_from_the_other():
    student, peer, labels = batch()
    one, other, rows_ = ModelOutputs(student, student), ModelOutputs(peer, peer), {"labels": labels}
    method = DML(weight=2.0)
    terms = {**method(one, other, rows_), **method.teacher_terms(other, one, rows_)}
    assert list(terms) == ["task", "dml", "peer_task", "peer_dml"]
    torch.testing.assert_close(terms["task"], F.cross_entropy(student, labels, reduction="none"))
    torch.testing.assert_close(terms["peer_task"], F.cross_entropy(peer, labels, reduction="none"))
    for name, own, their in (("dml", student, peer), ("peer_dml", peer, student)):
        expected = 2.0 * torch.from_numpy(over_batch(kd, own, their, temperature=1.0))
        torch.testing.assert_close(terms[name], expected)


def test_golden():
    """The gap of the design's AKD section is this divergence."""
    one, other = ModelOutputs(STUDENT, STUDENT), ModelOutputs(TEACHER, TEACHER)
    assert DML()(one, other, {"labels": TARGET})["dml"].item() == pytest.approx(0.1210181982, abs=1e-10)


def logits_of(model, batch):
    return model(**{k: v for k, v in batch.items() if k not in ("labels", "index")}).logits


def test_a_run_is_the_loop_by_hand(tmp_path):
    """Neither gradient crosses over to the other network."""
    student, peer, data = tiny("bert"), tiny("bert", seed=9), rows("bert", 8)
    one, other = copy.deepcopy(student), copy.deepcopy(peer)
    optimizer = torch.optim.SGD([*one.parameters(), *other.parameters()], lr=0.1)
    for _ in range(3):
        logits = logits_of(one, data.columns), logits_of(other, data.columns)
        loss = 0.0
        for own, their in (logits, logits[::-1]):
            target = their.detach().log_softmax(-1)
            loss = loss + F.cross_entropy(own, data.columns["labels"])
            loss = loss + 0.5 * F.kl_div(own.log_softmax(-1), target, log_target=True, reduction="batchmean")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trainer = make_trainer(tmp_path, student, None, DML(weight=0.5, peer=peer), data)
    assert trainer.teacher_model is peer
    assert list(trainer.distiller.parameters()) == []  # the peer is no part of the method, and saved apart
    trainer.train()
    assert largest_difference(weights(student, peer), weights(one, other)) <= 1e-6
    assert len(logged(trainer, "peer_dml")) == 3


@pytest.mark.parametrize("family", ["bert", "cifar", "timm"])
def test_the_peer_is_fresh_seeded_and_leaves_the_random_numbers_alone(tmp_path, family):
    student = tiny(family)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    peer = DML().make_teacher(student)
    assert torch.equal(torch.rand(3), expected)
    assert_identical(weights(peer), weights(DML().make_teacher(student)))
    assert type(peer) is type(student)
    assert peer.config is not student.config
    assert largest_difference(weights(peer), weights(student)) > 0.01
    assert largest_difference(weights(peer), weights(DML(peer_seed=2).make_teacher(student))) > 0.01
    trainer = make_trainer(tmp_path, student, None, DML(), rows(family), save_strategy="steps", save_steps=3)
    start = weights(trainer.teacher_model)
    trainer.train()
    assert largest_difference(weights(trainer.teacher_model), start) > 1e-4
    assert (tmp_path / "checkpoint-3" / "teacher" / "model.safetensors").is_file()


def test_peers_that_cannot_teach_are_refused(tmp_path):
    student = tiny("bert")
    for peer, message in (
        (copy.deepcopy(student), "starts from the student's very weights.*choose another peer_seed"),
        (student, "same object"),
        (tiny("bert", num_labels=7), "teacher has 7 classes and the student 5"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, student, None, DML(peer=peer), rows("bert"))
    torch.manual_seed(1)
    same = type(student)(student.config)  # made under the peer's seed
    with pytest.raises(ValueError, match="choose another peer_seed than 1,"):
        make_trainer(tmp_path, same, None, DML(peer_seed=1), rows("bert"))
    make_trainer(tmp_path, same, None, DML(), rows("bert"))
    with pytest.raises(ValueError, match="DML brings its own teacher: leave out teacher_model"):
        make_trainer(tmp_path, student, tiny("bert", seed=1), DML(), rows("bert"))


def test_an_adapted_student_learns_with_a_peer_that_is_given(tmp_path):
    def adapted(seed):
        model = tiny("bert", seed=seed)
        return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))

    trainer = make_trainer(tmp_path, adapted(0), None, DML(peer=adapted(1)), rows("bert"))
    start = weights(trainer.teacher_model)
    trainer.train()
    assert largest_difference(weights(trainer.teacher_model), start) > 1e-4


def test_in_a_combination_the_peer_teaches_and_learns(tmp_path):
    both = Combined({"dml": DML(), "kd": KD(alpha=1.0)}, {"kd": 0.5}, task_from="dml")
    trainer = make_trainer(tmp_path, tiny("bert"), None, both, rows("bert"))
    trainer.train()
    assert set(trainer.state.log_history[0]) >= {"task", "dml", "kd/kd", "peer_task", "peer_dml"}
