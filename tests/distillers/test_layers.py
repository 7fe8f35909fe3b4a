"""What methods that compare inner features have in common."""

import pytest
import torch
from helpers import (
    assert_identical,
    make_trainer,
    rows,
    tiny,
    tiny_teacher,
    weights,
)
from setups import network, set_up

from hfkd.distillers import AT, CRD, PKT, RKD, SP, VID, AttentionMaps, Combined, FitNet, HiddenStates, ReviewKD
from hfkd.distillers.layers import to_common_size, to_paths


def test_paths_come_as_a_tuple():
    assert to_paths("layer1") == ("layer1",)
    assert to_paths(["layer1", "layer2"]) == ("layer1", "layer2")
    assert to_paths(None) == ()


def test_maps_meet_at_the_smaller_height_and_width():
    tall, wide = torch.randn(2, 3, 8, 4), torch.randn(2, 5, 4, 8)
    one, other = to_common_size(tall, wide)
    torch.testing.assert_close(one, (tall[:, :, ::2] + tall[:, :, 1::2]) / 2)
    torch.testing.assert_close(other, (wide[..., ::2] + wide[..., 1::2]) / 2)
    assert all(map is tall for map in to_common_size(tall, tall))


def test_a_wrong_path_names_what_is_near():
    with pytest.raises(ValueError, match="has no module 'layer33'; near it are layer3"):
        set_up(FitNet(student_layers="layer33"), network("resnet8"), network("resnet8"))


def test_a_second_setup_starts_from_what_the_user_named():
    distiller = SP()
    set_up(distiller, network("resnet8"), network("resnet8"))
    set_up(distiller, network("vgg8"), network("resnet18"))
    assert (distiller.student_layers, distiller.teacher_layers) == (("layer5",), ("layer4",))


METHODS = {
    "fitnet": (lambda: FitNet(weight=1.0), "cifar"),
    "at": (lambda: AT(weight=10.0), "cifar"),
    "sp": (lambda: SP(weight=10.0), "cifar"),
    "rkd": (lambda: RKD(weight=0.1), "cifar"),
    "pkt": (lambda: PKT(weight=100.0), "cifar"),
    "vid": (VID, "cifar"),
    "crd": (lambda: CRD(embedding_size=8, negatives=5), "cifar"),
    "reviewkd": (lambda: ReviewKD(warm_up=0.0), "cifar"),
    "hidden": (HiddenStates, "bert"),
    "tinybert": (AttentionMaps, "bert"),
    "minilm": (lambda: AttentionMaps("kl"), "bert"),
}


@pytest.mark.parametrize("name", METHODS)
def test_setup_is_deterministic_and_leaves_the_models_alone(tmp_path, name):
    make, family = METHODS[name]
    states = []
    for seed in (1, 2):
        student, teacher = tiny(family, dropout=0.0).train(), tiny_teacher(family)
        before = weights(student, teacher)
        torch.manual_seed(seed)  # whatever came before
        trainer = make_trainer(tmp_path, student, teacher, make(), rows(family))
        assert_identical(weights(student, teacher), before)
        assert student.training
        states.append(weights(trainer.distiller))
    assert_identical(*states)


def test_features_of_half_precision_are_compared_in_float32(tmp_path):
    distiller = Combined({"fitnet": FitNet(weight=1.0), "rkd": RKD()}, task_from="fitnet")
    trainer = make_trainer(
        tmp_path,
        tiny("cifar"),
        tiny_teacher("cifar"),
        distiller,
        rows("cifar"),
        bf16=True,
        teacher_dtype="bfloat16",
        max_steps=2,
        learning_rate=0.001,
    )
    assert distiller.parts["fitnet"].projectors[0][0].weight.dtype == torch.float32
    trainer.train()
    assert all(entry["rkd/rkd"] > 0 for entry in trainer.state.log_history if "rkd/rkd" in entry)
