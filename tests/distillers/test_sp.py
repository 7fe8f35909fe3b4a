"""Similarity-preserving distillation against its definition."""

import math

import pytest
import torch
from setups import features, network, outputs, set_up

from hfkd.distillers import SP
from hfkd.functional import sp_loss


def similarities(rows: list[list[float]]) -> list[list[float]]:
    gram = [[sum(a * b for a, b in zip(one, other, strict=True)) for other in rows] for one in rows]
    return [[g / math.sqrt(sum(h * h for h in row)) for g in row] for row in gram]


def test_the_loss_is_its_definition():
    student, teacher = features(5, 3, 2, 2), features(5, 7, seed=1)
    own, other = (similarities(f.flatten(1).tolist()) for f in (student, teacher))
    expected = sum((own[i][j] - other[i][j]) ** 2 for i in range(5) for j in range(5)) / 25
    assert sp_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_golden_value():
    """Orthogonal samples against equal ones: rows (1, 0) and (1, 1)/√2."""
    student, teacher = torch.eye(2, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)
    a = 1 / math.sqrt(2)
    assert sp_loss(student, teacher).item() == pytest.approx(2 * ((1 - a) ** 2 + a**2) / 4, rel=1e-12)


def test_rotations_and_scales_do_not_matter():
    student, teacher = features(5, 4), features(5, 6, seed=1)
    rotation, _ = torch.linalg.qr(features(6, 6, seed=2))
    torch.testing.assert_close(sp_loss(3 * student, teacher @ rotation / 5), sp_loss(student, teacher))
    assert sp_loss(teacher @ rotation, teacher).item() == pytest.approx(0.0, abs=1e-25)


def test_a_batch_of_one_has_nothing_to_compare():
    assert sp_loss(features(1, 4), features(1, 6)).item() == 0.0


def test_gradcheck():
    teacher = features(4, 5, seed=1)
    assert torch.autograd.gradcheck(lambda f: sp_loss(f, teacher), features(4, 3).requires_grad_())


def test_a_loss_per_sample_is_refused():
    with pytest.raises(
        ValueError, match="reduction must be \"mean\", got 'none': the samples of a batch are compared"
    ):
        sp_loss(features(4, 3), features(4, 3), reduction="none")


def test_the_last_stages_are_compared():
    distiller = SP()
    assert (distiller.weight, distiller.batch_coupled) == (3000.0, True)
    where = set_up(distiller, network("resnet8"), network("vgg8", seed=1))
    assert (distiller.student_layers, distiller.teacher_layers) == (("layer3",), ("layer5",))
    student, teacher, batch = outputs(where, distiller)
    term = distiller(student, teacher, batch)["sp"]
    expected = 3000 * sp_loss(student.features["layer3"], teacher.features["layer5"])
    torch.testing.assert_close(term, expected)
    assert term.shape == ()


def test_tokens_are_refused_and_a_classifiers_input_is_not():
    with pytest.raises(ValueError, match=r"gives \(2, 7, 16\): name a layer without tokens, such as a classifier's"):
        set_up(SP(), "bert", "bert")
    distiller = SP(student_layers="classifier:input", teacher_layers="classifier:input")
    where = set_up(distiller, "distilbert", "bert")
    assert distiller(*outputs(where, distiller))["sp"].isfinite()
