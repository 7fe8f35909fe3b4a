"""Relational distillation against its definition."""

import math

import pytest
import torch
from setups import features, network, outputs, set_up

from hfkd.distillers import RKD
from hfkd.functional import rkd_loss


def smooth_l1(a: float, b: float) -> float:
    gap = abs(a - b)
    return 0.5 * gap**2 if gap < 1 else gap - 0.5


def relations(rows: list[list[float]]) -> tuple[list, list]:
    n = len(rows)
    distances = [[math.dist(one, other) for other in rows] for one in rows]
    positive = [d for row in distances for d in row if d > 0]
    mean = sum(positive) / len(positive)
    angles = []
    for i in range(n):
        for j in range(n):
            for k in range(n):
                cosine = 0.0
                if distances[i][j] and distances[i][k]:
                    product = sum((b - a) * (c - a) for a, b, c in zip(rows[i], rows[j], rows[k], strict=True))
                    cosine = product / (distances[i][j] * distances[i][k])
                angles.append(cosine)
    return [d / mean for row in distances for d in row], angles


@pytest.mark.parametrize(("distance_weight", "angle_weight"), [(25.0, 50.0), (1.0, 0.0), (0.0, 2.0)])
def test_the_loss_is_its_definition(distance_weight, angle_weight):
    student, teacher = features(5, 3, 2, 2), 9 * features(5, 7, seed=1)
    (d, a), (e, b) = (relations(f.flatten(1).tolist()) for f in (student, teacher))
    expected = distance_weight * sum(map(smooth_l1, d, e)) / 25 + angle_weight * sum(map(smooth_l1, a, b)) / 125
    value = rkd_loss(student, teacher, distance_weight=distance_weight, angle_weight=angle_weight)
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_golden_value():
    """Three points on a line, evenly and with one in the first third."""
    even, uneven = (torch.tensor(x, dtype=torch.float64)[:, None] for x in ([0.0, 1.0, 2.0], [0.0, 1.0, 3.0]))
    # Over their means, 4/3 and 2: distances (.75, 1.5, .75) and (.5, 1.5, 1), each twice; angles agree.
    assert rkd_loss(even, uneven).item() == pytest.approx(25 * 2 * (0.5 * 0.25**2 + 0.5 * 0.25**2) / 9, rel=1e-12)


def test_moved_turned_and_scaled_features_are_the_same():
    student, teacher = features(6, 4), features(6, 5, seed=1)
    rotation, _ = torch.linalg.qr(features(5, 5, seed=2))
    moved = 3 * teacher @ rotation + 7
    torch.testing.assert_close(rkd_loss(student, moved), rkd_loss(student, teacher))
    assert rkd_loss(moved, teacher).item() == pytest.approx(0.0, abs=1e-20)


def test_samples_that_coincide_and_a_batch_of_one_stay_finite():
    student, teacher = features(4, 3), features(4, 3, seed=1)
    student[1], teacher[1] = student[0], teacher[0]
    student.requires_grad_()
    loss = rkd_loss(student, teacher)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.abs().max() < 1e3
    one = features(1, 3).requires_grad_()
    loss = rkd_loss(one, features(1, 3))
    loss.backward()
    assert loss.item() == 0.0
    assert one.grad.abs().max() == 0.0


def test_gradcheck():
    teacher = features(4, 5, seed=1)
    assert torch.autograd.gradcheck(lambda f: rkd_loss(f, teacher), features(4, 3).requires_grad_())


def test_a_loss_per_sample_is_refused():
    with pytest.raises(ValueError, match="reduction must be \"mean\", got 'none'"):
        rkd_loss(features(4, 3), features(4, 3), reduction="none")


def test_the_classifiers_inputs_are_compared():
    distiller = RKD(weight=2.0, angle_weight=1.0)
    where = set_up(distiller, network("resnet8"), network("resnet8x4", seed=1))
    assert distiller.student_layers == distiller.teacher_layers == ("linear:input",)
    student, teacher, batch = outputs(where, distiller)
    expected = rkd_loss(student.features["linear:input"], teacher.features["linear:input"], angle_weight=1.0)
    torch.testing.assert_close(distiller(student, teacher, batch)["rkd"], 2 * expected)
    assert (RKD().weight, RKD().distance_weight, RKD().angle_weight) == (1.0, 25.0, 50.0)
