"""Knowledge review: the loss, the fusion, and where it takes its features."""

import math

import pytest
import torch
import torch.nn.functional as F
from setups import features, network, outputs, set_up

from hfkd.distillers import ReviewKD
from hfkd.functional import hierarchical_context_loss


def pooled(feature, size):
    """Mean over the cells of a size x size grid, for one (H, W) map that divides evenly."""
    cell = len(feature) // size
    return [
        sum(feature[y * cell + i][x * cell + j] for i in range(cell) for j in range(cell)) / cell**2
        for y in range(size)
        for x in range(size)
    ]


@pytest.mark.parametrize(("side", "sizes"), [(8, (8, 4, 2, 1)), (4, (4, 2, 1)), (2, (2, 1)), (1, (1,))])
def test_the_loss_is_its_definition(side, sizes):
    student, teacher = features(3, 2, side, side), features(3, 2, side, side, seed=1)
    per_sample = hierarchical_context_loss(student, teacher, reduction="none")
    for value, one, other in zip(per_sample.tolist(), student.tolist(), teacher.tolist(), strict=True):
        total = weights = 0.0
        for level, size in enumerate(sizes):
            squares = [
                (a - b) ** 2
                for channel, target in zip(one, other, strict=True)
                for a, b in zip(pooled(channel, size), pooled(target, size), strict=True)
            ]
            total += sum(squares) / len(squares) / 2**level
            weights += 1 / 2**level
        assert value == pytest.approx(total / weights, rel=1e-12)
    assert hierarchical_context_loss(student, teacher).item() == pytest.approx(per_sample.mean().item())


def test_golden_value():
    """A checkerboard of 1 and -1 against 0 vanishes at every coarser size: 1/(1 + 1/2)."""
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).view(1, 1, 2, 2)
    assert hierarchical_context_loss(board, torch.zeros_like(board)).item() == pytest.approx(1 / 1.5)


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="reduction must be"):
        hierarchical_context_loss(features(1, 1, 2, 2), features(1, 1, 2, 2), reduction="sum")


def normalised(x, norm):
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
    return (x - mean) / (variance + 1e-5).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def nearest(x, size):
    rows, columns = (
        [math.floor(i * have / want) for i in range(want)] for have, want in zip(x.shape[2:], size, strict=True)
    )
    return x[:, :, rows][:, :, :, columns]


def test_the_term_is_its_definition():
    """Deep to shallow, with one more ABF a stage, against the fusion written out."""
    distiller = ReviewKD(weight=2.0, warm_up=0.0)
    where = set_up(distiller, network("resnet8"), network("shufflenetv1", seed=1))
    student, teacher, batch = outputs(where, distiller)
    own, other = (
        [x if x.ndim == 4 else x[:, :, None, None] for x in side]
        for side in zip(*distiller.pairs(student, teacher), strict=True)
    )
    deeper, expected = None, 0
    for fusion, x, target in reversed(list(zip(distiller.fusions, own, other, strict=True))):
        x = normalised(torch.einsum("bchw,dc->bdhw", x, fusion.conv1[0].weight[:, :, 0, 0]), fusion.conv1[1])
        if deeper is not None:
            deeper = nearest(deeper, x.shape[2:])
            conv = fusion.attention[0]
            both = torch.cat([x, deeper], 1)
            shares = torch.einsum("bchw,dc->bdhw", both, conv.weight[:, :, 0, 0]) + conv.bias[:, None, None]
            shares = 1 / (1 + (-shares).exp())
            x = shares[:, :1] * x + shares[:, 1:] * deeper
        deeper = nearest(x, target.shape[2:])
        review = normalised(F.conv2d(deeper, fusion.conv2[0].weight, padding=1), fusion.conv2[1])
        expected = expected + hierarchical_context_loss(review, target, reduction="none")
    torch.testing.assert_close(distiller(student, teacher, batch)["reviewkd"], 2 * expected)


def test_layers_and_widths_are_the_sources():
    """Stages before their last ReLU and the pooled features; the fusion is as wide as the deepest, at most 512."""
    distiller = ReviewKD()
    set_up(distiller, network("resnet8"), network("wrn_16_2", seed=1))
    assert distiller.student_layers == (*(f"layer{i}.0.relu2:input" for i in (1, 2, 3)), "linear:input")
    assert distiller.teacher_layers == ("layer1", "layer2", "layer3", "linear:input")  # WRN stages end in a sum
    assert [fusion.conv1[0].weight.shape[:2] for fusion in distiller.fusions] == [
        (64, 16),
        (64, 32),
        (64, 64),
        (64, 64),
    ]
    assert [fusion.conv2[0].weight.shape[0] for fusion in distiller.fusions] == [32, 64, 128, 128]
    assert [fusion.attention is None for fusion in distiller.fusions] == [False, False, False, True]
    set_up(distiller, network("mobilenetv2"), network("vgg8", seed=1))
    assert distiller.fusions[0].conv1[0].weight.shape[0] == 512


def test_what_comes_before_the_relu_is_not_clipped():
    distiller = ReviewKD()
    where = set_up(distiller, network("resnet8"), network("resnet8", seed=1))
    student, _, _ = outputs(where, distiller)
    assert (student.features["layer1.0.relu2:input"] < 0).any()


def test_the_weight_rises_over_the_first_twelfth():
    distiller = ReviewKD()
    where = set_up(distiller, network("resnet8"), network("resnet8", seed=1))
    call = outputs(where, distiller)
    assert (distiller(*call)["reviewkd"] == 0).all()
    where.progress = 1 / 24
    distiller.on_step_end(where)
    half = distiller(*call)["reviewkd"]
    where.progress = 0.5
    distiller.on_epoch_begin(where)
    torch.testing.assert_close(distiller(*call)["reviewkd"], 2 * half)
    assert (half > 0).all()


def test_nothing_of_batch_norm_is_remembered():
    """Running averages would be each process's own."""
    distiller = ReviewKD()
    set_up(distiller, network("resnet8"), network("resnet8", seed=1))
    assert [name for name, _ in distiller.named_buffers()] == ["ramp.factor"]


def test_a_last_batch_of_one_works():
    distiller = ReviewKD(warm_up=0.0)
    where = set_up(distiller, network("resnet8"), network("resnet8", seed=1))
    term = distiller(*outputs(where, distiller, [0]))["reviewkd"]
    assert term.shape == (1,)
    assert term.isfinite().all()


def test_tokens_are_refused():
    with pytest.raises(ValueError, match=r"ReviewKD compares a vector \(B, D\) or a map .*HiddenStates"):
        set_up(ReviewKD(), "vit", "vit")
