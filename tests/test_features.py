"""Running models on their share of a batch, and capturing inner outputs by path."""

import pytest
import torch
from helpers import FAMILIES, TEXT, freeze_batch_norm, make_trainer, rows, tiny, tiny_teacher, tokenizer
from torch import nn

from hfkd.data import DistillationCollator
from hfkd.distillers import KD, Combined, Distiller, ModelOutputs
from hfkd.features import capture, detached, find_module, in_float32, input_names, run_model, select_inputs


# An inner module of each family and what it gives for 4 samples.
INNER = {
    "bert": ("bert.encoder.layer.0", (4, None, 16)),
    "distilbert": ("distilbert.transformer.layer.1", (4, None, 16)),
    "vit": ("vit.layers.0", (4, 5, 16)),
    "resnet": ("resnet.encoder.stages.0", (4, 8, 4, 4)),
    "timm": ("timm_model.blocks.1", (4, 24, 4, 4)),
    "cifar": ("layer2", (4, 32, 8, 8)),
}
HEAD = {
    "bert": "classifier",
    "distilbert": "classifier",
    "vit": "classifier",
    "resnet": "classifier.1",
    "timm": "timm_model.classifier",
    "cifar": "linear",
}


def batch_of(family, n=4):
    dataset = rows(family, n)
    return DistillationCollator(tokenizer() if family in TEXT else None)([dataset[i] for i in range(n)])


@pytest.mark.parametrize("family", FAMILIES)
def test_inner_outputs_are_captured(family):
    model, batch = tiny(family).eval(), batch_of(family)
    path, shape = INNER[family]
    outputs = run_model(model, batch, layers=(path, f"{HEAD[family]}:input"))
    assert outputs.logits.shape == (4, 5)
    assert list(outputs.features) == [path, f"{HEAD[family]}:input"]
    inner = outputs.features[path]
    assert len(inner.shape) == len(shape)
    assert all(want in (None, have) for want, have in zip(shape, inner.shape, strict=True))
    # What goes into the head, through the head, is what comes out.
    head = model.get_submodule(HEAD[family])
    torch.testing.assert_close(head(outputs.features[f"{HEAD[family]}:input"]), outputs.logits)
    assert inner.requires_grad
    torch.testing.assert_close(run_model(model, batch).logits, outputs.logits)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in (model, head))


def test_hooks_go_when_the_model_fails():
    model = tiny("bert")
    with pytest.raises(RuntimeError, match="boom"), capture(model, ("classifier", "classifier:input")):
        raise RuntimeError("boom")
    assert not model.classifier._forward_hooks
    assert not model.classifier._forward_pre_hooks


def test_the_first_tensor_of_a_tuple_or_mapping_is_kept():
    class Inner(nn.Module):
        def forward(self, x):
            return {"hidden": (x + 1, x + 2), "other": x}

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(x)

    model = Outer()
    with capture(model, ("inner", "")) as features:
        model(torch.zeros(2))
    assert features["inner"].tolist() == features[""].tolist() == [1.0, 1.0]


def test_a_wrong_path_names_what_is_near():
    with pytest.raises(
        ValueError, match=r"no module 'bert.encoder.layers.0'; near it are bert.encoder.layer.0.*named_m"
    ):
        find_module(tiny("bert"), "bert.encoder.layers.0")
    with pytest.raises(ValueError, match="near it are none"):
        find_module(nn.Linear(1, 1), "§§§")


def test_inputs_are_chosen_by_name_and_prefix():
    student, teacher = tiny("distilbert"), tiny("bert")
    assert {"input_ids", "attention_mask"} <= set(input_names(student))
    assert "token_type_ids" not in input_names(student)
    assert not {"labels", "return_dict", "kwargs", "self"} & set(input_names(teacher))
    batch = {
        name: torch.tensor([i])
        for i, name in enumerate(
            ("input_ids", "attention_mask", "token_type_ids", "teacher_input_ids", "labels", "index")
        )
    }
    assert select_inputs(student, batch) == {"input_ids": 0, "attention_mask": 1}
    chosen = select_inputs(teacher, batch, prefix="teacher_")
    assert chosen == {"input_ids": 3, "attention_mask": 1, "token_type_ids": 2}


def test_half_precision_is_widened_and_gradients_are_cut():
    logits = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    feature = torch.ones(2, dtype=torch.float16, requires_grad=True)
    outputs = ModelOutputs(logits, logits.float(), {"a": feature, "b": torch.ones(2, dtype=torch.float64)})
    wide = in_float32(outputs)
    assert (wide.logits.dtype, wide.features["a"].dtype, wide.features["b"].dtype) == (
        torch.float32,
        torch.float32,
        torch.float64,
    )
    assert wide.features["a"].requires_grad
    cut = detached(outputs)
    assert not any(tensor.requires_grad for tensor in (cut.logits, cut.task_logits, cut.features["a"]))
    assert detached(ModelOutputs(logits)).task_logits is None


class Hint(Distiller):
    """A projected middle layer (the smallest feature method)."""

    student_layers = ("resnet.encoder.stages.0",)
    teacher_layers = ("layer2", "linear:input")

    def setup(self, context):
        self.projector = nn.Conv2d(8, 32, 1)

    def forward(self, student, teacher, batch):
        assert set(student.features) >= {"resnet.encoder.stages.0"}
        mapped = nn.functional.interpolate(self.projector(student.features["resnet.encoder.stages.0"]), size=8)
        return {"hint": (mapped - teacher.features["layer2"]).square().flatten(1).mean(1)}


def test_a_feature_method_trains_between_architectures(tmp_path):
    student, teacher = freeze_batch_norm(tiny("resnet")), tiny_teacher("cifar")
    distiller = Combined({"kd": KD(), "hint": Hint()}, task_from="kd")
    assert distiller.student_layers == Hint.student_layers
    trainer = make_trainer(tmp_path, student, teacher, distiller, rows("resnet"), max_steps=20, learning_rate=0.05)
    start = distiller.parts["hint"].projector.weight.detach().clone()
    trainer.train()
    hints = [entry["hint/hint"] for entry in trainer.state.log_history if "hint/hint" in entry]
    assert hints[-1] < 0.8 * hints[0]
    assert not torch.equal(start, distiller.parts["hint"].projector.weight)
