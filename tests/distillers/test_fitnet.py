"""Hints against their definition, and the projector between shapes."""

import numpy as np
import pytest
import torch
from setups import features, network, outputs, set_up
from torch import nn

from hfkd.distillers import FitNet, ModelOutputs
from hfkd.functional import hint_loss


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 5, 4)])
def test_the_loss_is_the_mean_squared_difference_of_a_sample(shape):
    student, teacher = features(*shape), features(*shape, seed=1)
    expected = []
    for one, other in zip(student.flatten(1).tolist(), teacher.flatten(1).tolist(), strict=True):
        expected.append(sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) / len(one))
    np.testing.assert_allclose(hint_loss(student, teacher, reduction="none").numpy(), expected, rtol=1e-12)
    assert hint_loss(student, teacher).item() == pytest.approx(np.mean(expected), rel=1e-12)


def test_golden_value():
    student, teacher = torch.tensor([[1.0, 0.0, -2.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    assert hint_loss(student, teacher).item() == pytest.approx(10 / 3)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"shapes \(2, 3\) and \(2, 4\) have no difference: project the student's"):
        hint_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="reduction must be"):
        hint_loss(torch.zeros(2, 3), torch.zeros(2, 3), reduction="sum")


def test_the_middle_stages_are_compared_through_convolution_norm_and_relu():
    distiller = FitNet(weight=100.0)
    where = set_up(distiller, network("resnet8"), network("resnet8x4", seed=1))
    assert (distiller.student_layers, distiller.teacher_layers) == (("layer2",), ("layer2",))
    ((projector, norm, _),) = distiller.projectors
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-0.5, 0.5)
    assert projector.weight.shape == (128, 32, 1, 1)
    assert projector.weight.dtype == torch.float64
    student, teacher, batch = outputs(where, distiller)
    terms = distiller(student, teacher, batch)
    own, hint = student.features["layer2"].detach().numpy(), teacher.features["layer2"].numpy()
    weight, bias = projector.weight[:, :, 0, 0].detach().numpy(), projector.bias.detach().numpy()
    projected = np.zeros_like(hint)
    for i in range(4):
        for y in range(own.shape[2]):
            for x in range(own.shape[3]):
                projected[i, :, y, x] = weight @ own[i, :, y, x] + bias
    gain, shift = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    for c in range(128):
        values = projected[:, c]
        projected[:, c] = gain[c] * (values - values.mean()) / np.sqrt(values.var() + 1e-5) + shift[c]
    for i in range(4):
        expected = 100 * ((projected[i].clip(0) - hint[i]) ** 2).mean()
        assert terms["fitnet"][i].item() == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(
        terms["task"], nn.functional.cross_entropy(student.logits, batch["labels"], reduction="none")
    )


def test_the_larger_map_is_averaged_down():
    distiller = FitNet(weight=1.0, student_layers="layer1", teacher_layers="layer3")
    where = set_up(distiller, network("resnet8"), network("resnet8", seed=1))
    student, teacher, batch = outputs(where, distiller)
    pooled = nn.functional.avg_pool2d(student.features["layer1"], 4)
    expected = hint_loss(distiller.projectors[0](pooled), teacher.features["layer3"], reduction="none")
    torch.testing.assert_close(distiller(student, teacher, batch)["fitnet"], expected)


def test_vectors_are_compared_through_a_linear_layer():
    distiller = FitNet(student_layers="linear:input", teacher_layers="linear:input")
    set_up(distiller, network("resnet8"), network("resnet8x4"))
    assert distiller.projectors[0].weight.shape == (256, 64)


def test_several_layers_add_up():
    distiller = FitNet(weight=1.0, student_layers=("a", "b"), teacher_layers=("a", "b"))
    distiller.projectors = nn.ModuleList([nn.Identity(), nn.Identity()])
    own, hints = {"a": features(2, 3), "b": features(2, 5)}, {"a": features(2, 3, seed=1), "b": features(2, 5, seed=1)}
    logits = features(2, 4)
    terms = distiller(
        ModelOutputs(logits, logits, own), ModelOutputs(logits, None, hints), {"labels": torch.tensor([0, 1])}
    )
    expected = sum(hint_loss(own[name], hints[name], reduction="none") for name in "ab")
    torch.testing.assert_close(terms["fitnet"], expected)


def test_what_has_no_map_is_refused():
    with pytest.raises(ValueError, match=r"'bert.encoder.layer.0' of the student gives \(2, 7, 16\): HiddenStates"):
        set_up(FitNet(), "bert", "bert")
    with pytest.raises(ValueError, match=r"student feature \(2, 64\) to a teacher feature \(2, 64, 4, 4\): name two"):
        set_up(FitNet(student_layers="linear:input", teacher_layers="layer3"), network("resnet8"), network("resnet8"))


def test_training_brings_the_features_together():
    distiller = FitNet(weight=1.0)
    where = set_up(distiller, network("resnet8"), network("resnet8x4", seed=1))
    call = outputs(where, distiller)
    optimizer = torch.optim.Adam(distiller.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        loss = distiller(*call)["fitnet"].mean()
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
