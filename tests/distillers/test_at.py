"""Attention transfer against its definition."""

import math

import pytest
import torch
from setups import features, network, outputs, set_up
from torch import nn

from hfkd.distillers import AT
from hfkd.functional import attention_transfer_loss


def attention(feature: list) -> list[float]:
    """The flattened, normalised activity of one (C, H, W) map."""
    height, width = len(feature[0]), len(feature[0][0])
    where = [sum(c[y][x] ** 2 for c in feature) / len(feature) for y in range(height) for x in range(width)]
    norm = math.sqrt(sum(a * a for a in where))
    return [a / norm for a in where]


def test_the_loss_is_its_definition():
    student, teacher = features(3, 2, 4, 5), features(3, 6, 4, 5, seed=1)
    per_sample = attention_transfer_loss(student, teacher, reduction="none")
    for value, one, other in zip(per_sample.tolist(), student.tolist(), teacher.tolist(), strict=True):
        a, b = attention(one), attention(other)
        assert value == pytest.approx(sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / 20, rel=1e-12)
    assert attention_transfer_loss(student, teacher).item() == pytest.approx(per_sample.mean().item())


def test_golden_value():
    """Two pixels, activities (1, 0) and (0.6, 0.8): ((0.4)² + (0.8)²)/2."""
    student = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    teacher = torch.tensor([3.0, 4.0]).sqrt().view(1, 1, 1, 2)
    assert attention_transfer_loss(student, teacher).item() == pytest.approx((0.16 + 0.64) / 2, rel=1e-6)


def test_size_sign_and_number_of_channels_do_not_matter():
    student, teacher = features(3, 2, 4, 4), features(3, 6, 4, 4, seed=1)
    expected = attention_transfer_loss(student, teacher)
    torch.testing.assert_close(attention_transfer_loss(-7 * student, teacher.repeat(1, 3, 1, 1)), expected)
    assert attention_transfer_loss(student, student.flip(1)).item() == pytest.approx(0.0, abs=1e-20)


@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_the_larger_map_is_averaged_down(larger):
    small, large = features(2, 3, 4, 4), features(2, 3, 8, 8, seed=1)
    pooled = nn.functional.avg_pool2d(large, 2)
    pair = (large, small) if larger == "student" else (small, large)
    expected = (pooled, small) if larger == "student" else (small, pooled)
    torch.testing.assert_close(attention_transfer_loss(*pair), attention_transfer_loss(*expected))


def test_gradcheck():
    teacher = features(2, 3, 3, 3, seed=1)
    loss = lambda f: attention_transfer_loss(f, teacher)  # noqa: E731
    assert torch.autograd.gradcheck(loss, features(2, 2, 3, 3).requires_grad_())


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="reduction must be"):
        attention_transfer_loss(features(2, 2, 3, 3), features(2, 2, 3, 3), reduction="sum")


def test_the_term_is_the_sum_over_stages():
    distiller = AT()
    assert distiller.weight == 1000.0
    where = set_up(distiller, network("resnet8"), network("wrn_16_2", seed=1))
    assert distiller.student_layers == distiller.teacher_layers == ("layer1", "layer2", "layer3")
    student, teacher, batch = outputs(where, distiller)
    terms = distiller(student, teacher, batch)
    expected = sum(
        attention_transfer_loss(student.features[name], teacher.features[name], reduction="none")
        for name in distiller.student_layers
    )
    torch.testing.assert_close(terms["at"], 1000 * expected)
    assert terms["at"].shape == (4,)


def test_other_numbers_of_stages_are_refused():
    with pytest.raises(ValueError, match=r"3 of the student \(layer1, layer2, layer3\) and 4 of the teacher \(layer1"):
        set_up(AT(), network("resnet8"), network("resnet18"))
    set_up(AT(teacher_layers=("layer1", "layer2", "layer4")), network("resnet8"), network("resnet18"))


def test_tokens_are_no_map():
    with pytest.raises(ValueError, match=r"AT compares a map \(B, C, H, W\), and 'vit.layers.0' of the student gives"):
        set_up(AT(), "vit", "vit")
