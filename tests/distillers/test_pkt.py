"""Probabilistic knowledge transfer against its definition."""

import math

import pytest
import torch
from setups import features, network, outputs, set_up

from hfkd.distillers import PKT
from hfkd.functional import pkt_loss


def neighbours(rows: list[list[float]]) -> list[list[float]]:
    norms = [math.hypot(*row) for row in rows]
    kernel = [
        [
            (1 + sum(a * b for a, b in zip(one, other, strict=True)) / (n * m)) / 2
            for other, m in zip(rows, norms, strict=True)
        ]
        for one, n in zip(rows, norms, strict=True)
    ]
    return [[k / sum(row) for k in row] for row in kernel]


def test_the_loss_is_its_definition():
    student, teacher = features(5, 3, 2, 2), features(5, 7, seed=1)
    p, q = (neighbours(f.flatten(1).tolist()) for f in (teacher, student))
    expected = sum(p[i][j] * math.log((p[i][j] + 1e-7) / (q[i][j] + 1e-7)) for i in range(5) for j in range(5)) / 25
    assert pkt_loss(student, teacher).item() == pytest.approx(expected, rel=1e-10)


def test_golden_value():
    """Orthogonal samples give rows (2/3, 1/3), equal ones (1/2, 1/2)."""
    student, teacher = torch.eye(2, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)
    expected = 2 * 0.5 * (math.log(0.5 / (2 / 3)) + math.log(0.5 / (1 / 3))) / 4
    assert pkt_loss(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_rotations_and_scales_do_not_matter():
    student, teacher = features(5, 4), features(5, 6, seed=1)
    rotation, _ = torch.linalg.qr(features(6, 6, seed=2))
    scale = torch.arange(1.0, 6.0, dtype=torch.float64)[:, None]
    torch.testing.assert_close(pkt_loss(scale * student, teacher @ rotation / 5), pkt_loss(student, teacher))
    assert pkt_loss(teacher @ rotation, teacher).item() == pytest.approx(0.0, abs=1e-15)
    assert pkt_loss(student, teacher) > 0


def test_a_sample_of_zeros_stays_finite():
    student = features(3, 4)
    student[1] = 0
    student.requires_grad_()
    pkt_loss(student, features(3, 4, seed=1)).backward()
    assert student.grad.isfinite().all()


def test_gradcheck():
    teacher = features(4, 5, seed=1)
    assert torch.autograd.gradcheck(lambda f: pkt_loss(f, teacher), features(4, 3).requires_grad_())


def test_a_loss_per_sample_is_refused():
    with pytest.raises(ValueError, match="reduction must be \"mean\", got 'none'"):
        pkt_loss(features(4, 3), features(4, 3), reduction="none")


def test_the_classifiers_inputs_are_compared():
    distiller = PKT()
    assert (distiller.weight, distiller.batch_coupled) == (30000.0, True)
    where = set_up(distiller, "distilbert", "bert")
    assert distiller.student_layers == distiller.teacher_layers == ("classifier:input",)
    student, teacher, batch = outputs(where, distiller)
    expected = pkt_loss(student.features["classifier:input"], teacher.features["classifier:input"])
    torch.testing.assert_close(distiller(student, teacher, batch)["pkt"], 30000 * expected)
    set_up(PKT(), network("resnet8"), "vit")
