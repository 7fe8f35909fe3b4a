"""Deep mutual learning (Zhang et al. 2018)."""

from __future__ import annotations

import copy

import torch
from torch import nn

from hfkd.distillers.base import Distiller, check_not_negative
from hfkd.distillers.kd import kd_loss
from hfkd.features import base_model


def make_peer(method: str, student: nn.Module, given: tuple[nn.Module, ...], seed: int) -> nn.Module:
    """The second network of a method: the one that was given, or one of the student's configuration, fresh.

    Raises:
        ValueError: If the two networks would never differ, or a PEFT student was given no peer.
    """
    if given:
        peer = given[0]
    elif base_model(student) is not student:
        raise ValueError(
            f"{method} cannot make a peer for a PEFT student: pass {method}(peer=...), such as another PEFT model"
        )
    else:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            peer = type(student)(copy.deepcopy(student.config)).to(student.dtype)
    own = dict(student.named_parameters())
    if peer is not student and all(
        name in own and torch.equal(parameter.to(own[name]), own[name]) for name, parameter in peer.named_parameters()
    ):
        raise ValueError(
            "the peer starts from the student's very weights, so that the two would have nothing to teach each "
            f"other: choose another peer_seed than {seed}, or pass another peer"
        )
    return peer


class DML(Distiller):
    r"""Two networks that learn from the labels and from each other: each minimises ``task + weight * dml``.

    .. math:: \mathrm{CE}(p, y) + \mathrm{KL}\!\left(p^{\text{peer}} \,\|\, p\right)

    at temperature 1, the peer's answer without gradient; both networks take their step on the same batch at once. The
    student is trained, evaluated and saved as ever; the peer's terms are logged as ``peer_task`` and ``peer_dml``, it
    is saved in every checkpoint under ``teacher/``, and ``trainer.teacher_model`` holds it. ``max_grad_norm`` clips
    the gradients of both by their joint norm, as of all that a run trains. Costs twice the training of one.

    Args:
        weight: Weight of the divergence, not negative; the paper uses 1.
        peer: The other network. By default one of the student's configuration with fresh weights: pass one where the
            student starts from pretrained weights, or is a PEFT model.
        peer_seed: Seed of the fresh weights: another than the one that the student was made with.

    Raises:
        ValueError: If the weight is negative, or the peer is of other classes than the student or starts from its very
            weights, so that the two would never differ.

    Source: Zhang et al. 2018, "Deep Mutual Learning", CVPR, arXiv 1706.00384. The paper updates the
    networks in turn, each after a new forward pass; here they step together.
    """

    trains_teacher = True

    def __init__(self, weight: float = 1.0, peer: nn.Module | None = None, peer_seed: int = 1000):
        super().__init__()
        check_not_negative(weight=weight)
        self.weight, self.peer_seed = weight, peer_seed
        self.given_peers = () if peer is None else (peer,)  # in a tuple, which does not make it a part of the method

    def make_teacher(self, student):
        return make_peer("DML", student, self.given_peers, self.peer_seed)

    def forward(self, student, teacher, batch):
        dml = kd_loss(student.logits, teacher.logits, temperature=1.0, reduction="none")
        return {"task": self.task_loss(student, batch), "dml": self.weight * dml}

    def teacher_terms(self, teacher, student, batch):
        dml = kd_loss(teacher.logits, student.logits, temperature=1.0, reduction="none")
        return {"peer_task": self.task_loss(teacher, batch), "peer_dml": self.weight * dml}
