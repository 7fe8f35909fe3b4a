"""Variational information distillation against its definition."""

import math

import pytest
import torch
from setups import features, network, outputs, set_up
from torch import nn

from hfkd.distillers import VID
from hfkd.functional import vid_loss


def test_the_loss_is_its_definition():
    mean, teacher, variance = features(3, 2, 4, 5), features(3, 2, 4, 5, seed=1), [0.5, 3.0]
    per_sample = vid_loss(mean, torch.tensor(variance, dtype=torch.float64), teacher, reduction="none")
    for value, one, other in zip(per_sample.tolist(), mean.tolist(), teacher.tolist(), strict=True):
        total = 0.0
        for v, own, target in zip(variance, one, other, strict=True):
            for row, target_row in zip(own, target, strict=True):
                for m, t in zip(row, target_row, strict=True):
                    total += (t - m) ** 2 / (2 * v) + math.log(v) / 2
        assert value == pytest.approx(total / 40, rel=1e-12)
    assert vid_loss(mean, torch.ones(2).double(), teacher).shape == ()


def test_it_is_torchs_gaussian_likelihood():
    mean, teacher, variance = features(3, 2, 4, 5), features(3, 2, 4, 5, seed=1), features(2).exp()
    expected = nn.functional.gaussian_nll_loss(mean, teacher, variance.view(1, 2, 1, 1).expand_as(mean))
    torch.testing.assert_close(vid_loss(mean, variance, teacher), expected)


def test_the_best_variance_is_the_mean_squared_error():
    """There the gradient vanishes: what the student cannot predict is called noise."""
    mean, teacher = features(3, 2, 4, 5), features(3, 2, 4, 5, seed=1)
    variance = (mean - teacher).square().mean((0, 2, 3)).requires_grad_()
    vid_loss(mean, variance, teacher).backward()
    assert variance.grad.abs().max() < 1e-15


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="reduction must be"):
        vid_loss(features(2, 2, 3, 3), torch.ones(2), features(2, 2, 3, 3), reduction="sum")


def test_each_stage_has_a_regressor_as_wide_as_the_teacher():
    distiller = VID()
    where = set_up(distiller, network("resnet8"), network("resnet8x4", seed=1))
    assert [tuple(layer.weight.shape[:2]) for layer in distiller.regressors[1].mean[::2]] == [
        (128, 32),
        (128, 128),
        (128, 128),
    ]
    student, teacher, batch = outputs(where, distiller)
    expected = 0
    for regressor, name in zip(distiller.regressors, ("layer1", "layer2", "layer3"), strict=True):
        mean, variance = regressor(student.features[name])
        torch.testing.assert_close(variance, torch.full_like(variance, 5.0))  # the start
        expected = expected + vid_loss(mean, variance, teacher.features[name], reduction="none")
    torch.testing.assert_close(distiller(student, teacher, batch)["vid"], expected)


def test_the_variance_stays_above_zero():
    distiller = VID()
    set_up(distiller, network("resnet8"), network("resnet8", seed=1))
    regressor = distiller.regressors[0]
    regressor.scale.data.fill_(-1e4)
    _, variance = regressor(features(2, 16, 4, 4))
    torch.testing.assert_close(variance, torch.full_like(variance, 1e-5))


def test_maps_of_other_sizes_are_averaged_down():
    distiller = VID(student_layers=("layer1",), teacher_layers=("layer3",))
    where = set_up(distiller, network("resnet8"), network("resnet8", seed=1))
    student, teacher, batch = outputs(where, distiller)
    mean, variance = distiller.regressors[0](nn.functional.avg_pool2d(student.features["layer1"], 4))
    expected = vid_loss(mean, variance, teacher.features["layer3"], reduction="none")
    torch.testing.assert_close(distiller(student, teacher, batch)["vid"], expected)


def test_tokens_are_no_map():
    with pytest.raises(ValueError, match=r"VID compares a map \(B, C, H, W\).*name other layers"):
        set_up(VID(), "vit", "vit")
