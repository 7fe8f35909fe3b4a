"""Running models on their share of a batch, and capturing inner outputs by path."""

import pytest
import torch
from helpers import (
    FAMILIES,
    NUM_LABELS,
    TEXT,
    Rows,
    assert_identical,
    freeze_batch_norm,
    make_trainer,
    rows,
    tiny,
    tiny_teacher,
    tokenizer,
    weights,
)
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from hfkd.data import DistillationCollator
from hfkd.distillers import KD, Combined, Distiller, ModelOutputs, Wrapper
from hfkd.features import (
    Capture,
    dataset_features,
    detached,
    find_module,
    head_path,
    in_float32,
    input_names,
    probe,
    run_model,
    select_inputs,
    stage_paths,
)
from hfkd.models import CifarConfig, CifarForImageClassification


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
    with pytest.raises(RuntimeError, match="boom"), Capture(model, ("classifier", "classifier:input")):
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
    with Capture(model, ("inner", "")) as capture:
        model(torch.zeros(2))
        assert capture.features["inner"].tolist() == capture.features[""].tolist() == [1.0, 1.0]


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
    assert chosen == {"input_ids": 3, "attention_mask": 1}  # the segments are of other tokens
    del batch["teacher_input_ids"]
    chosen = select_inputs(teacher, batch, prefix="teacher_")
    assert chosen == {"input_ids": 0, "attention_mask": 1, "token_type_ids": 2}


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


# Stages


STAGES = {
    "bert": ("bert.encoder.layer.0", "bert.encoder.layer.1"),
    "distilbert": ("distilbert.transformer.layer.0", "distilbert.transformer.layer.1"),
    "vit": ("vit.layers.0", "vit.layers.1"),
    "resnet": ("resnet.encoder.stages.0", "resnet.encoder.stages.1"),
    "timm": tuple(f"timm_model.blocks.{i}" for i in range(5)),
    "cifar": ("layer1", "layer2", "layer3"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_and_heads_are_found(family):
    model, batch = tiny(family).eval(), batch_of(family)
    assert stage_paths(model) == STAGES[family]
    assert head_path(model) == HEAD[family]
    features = run_model(model, batch, layers=stage_paths(model)).features
    if family in ("resnet", "timm", "cifar"):
        sides = [feature.shape[-1] for feature in features.values()]
        assert sorted(sides, reverse=True) == sides


@pytest.mark.parametrize(
    ("architecture", "stages"),
    [
        ("resnet56", (1, 2, 3)),
        ("resnet32x4", (1, 2, 3)),
        ("wrn_40_2", (1, 2, 3)),
        ("resnet18", (1, 2, 3, 4)),
        ("resnet50", (1, 2, 3, 4)),
        ("vgg8", (1, 2, 3, 5)),
        ("vgg13", (1, 2, 3, 5)),
        ("mobilenetv2", (2, 3, 5, 7)),
        ("shufflenetv1", (1, 2, 3)),
        ("shufflenetv2", (1, 2, 3)),
    ],
)
def test_a_stage_of_a_cifar_network_ends_where_the_next_resolution_starts(architecture, stages):
    model = CifarForImageClassification(CifarConfig(architecture=architecture, num_labels=5)).eval()
    assert stage_paths(model) == tuple(f"layer{i}" for i in stages)
    layers = [name for name in model.layer_names if name.startswith("layer")]
    features = run_model(model, {"pixel_values": torch.zeros(1, 3, 32, 32)}, layers=layers).features
    last_of_side = {feature.shape[-1]: name for name, feature in features.items()}
    assert stage_paths(model) == tuple(last_of_side.values())


@pytest.mark.parametrize(
    ("architecture", "stages"),
    [
        ("test_resnet", [f"layer{i}" for i in (1, 2, 3, 4)]),
        ("test_vit", [f"blocks.{i}" for i in range(6)]),
        ("mobilenetv3_small_050", [f"blocks.{i}" for i in (0, 1, 3, 5)]),
        ("regnety_002", [f"s{i}" for i in (1, 2, 3, 4)]),
        ("vgg11", [f"features.{i}" for i in (1, 4, 9, 14, 19, 20)]),
    ],
)
def test_timm_names_its_stages_itself(architecture, stages):
    model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture=architecture, num_labels=5))
    assert stage_paths(model) == tuple(f"timm_model.{name}" for name in stages)


def test_a_model_without_stages_or_head_is_refused():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = tiny("bert").config
            self.linear = nn.Linear(3, 2)

    with pytest.raises(ValueError, match="Plain shows no stages: name layers yourself, with student_layers="):
        stage_paths(Plain())
    with pytest.raises(ValueError, match="Plain ends in no linear layer with 5 outputs: name the layer yourself"):
        head_path(Plain())


def test_stages_are_found_inside_peft():
    model = get_peft_model(tiny("bert"), LoraConfig(target_modules=["query"], modules_to_save=["classifier"]))
    assert stage_paths(model) == STAGES["bert"]
    assert head_path(model) == "classifier.modules_to_save.default"
    outputs = run_model(model.eval(), batch_of("bert"), layers=(f"{head_path(model)}:input",))
    assert outputs.features[f"{head_path(model)}:input"].shape == (4, 16)


@pytest.mark.parametrize("family", ["cifar", "bert", "timm"])
def test_a_probe_leaves_no_trace(family):
    model, batch = tiny(family, dropout=0.5).train(), batch_of(family)
    next(module for module in model.modules() if isinstance(module, (nn.BatchNorm2d, nn.Dropout))).eval()
    modes = [module.training for module in model.modules()]
    state, random = weights(model), torch.get_rng_state()
    features = probe(model, batch, stage_paths(model))
    assert list(features) == list(stage_paths(model))
    assert not any(feature.requires_grad for feature in features.values())
    assert_identical(weights(model), state)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["bert", "cifar"])
def test_features_of_a_data_set_are_those_of_its_samples(tmp_path, family):
    """In evaluation mode, in order, and without a trace: neither in the model nor in the random numbers."""
    model, dataset = tiny(family, dropout=0.5).train(), rows(family, 11)
    trainer = make_trainer(tmp_path, model, tiny_teacher(family), KD(), dataset)
    before = weights(model)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    features, labels = dataset_features(model, trainer.context.batches(dataset))
    assert torch.equal(torch.rand(2), expected)
    assert_identical(weights(model), before)
    assert model.training
    assert torch.equal(labels, dataset.columns["labels"])
    model.eval()
    for i in (0, 9, 10):
        row = {name: column[None] for name, column in dataset[i].items()}
        alone = probe(model, row, (f"{head_path(model)}:input",))
        torch.testing.assert_close(features[i : i + 1], next(iter(alone.values())))
    named, _ = dataset_features(model, trainer.context.batches(dataset), head_path(model))
    assert named.shape == (11, NUM_LABELS)


def test_a_teachers_features_are_of_its_own_columns():
    model, columns = tiny("cifar"), rows("cifar", 4).columns
    other = rows("cifar", 4, seed=1).columns["pixel_values"]
    features, _ = dataset_features(model, [{**columns, "teacher_pixel_values": other}], prefix="teacher_")
    expected, _ = dataset_features(model, [{**columns, "pixel_values": other}])
    assert torch.equal(features, expected)
    assert not torch.equal(features, dataset_features(model, [columns])[0])


def test_a_probe_restores_the_mode_when_the_model_fails():
    model = tiny("bert").train()
    with pytest.raises(ValueError, match="no module 'layer1'"):
        probe(model, batch_of("bert"), ("layer1",))
    assert model.training


def test_a_probe_runs_in_the_precision_of_the_model():
    assert probe(tiny("cifar").double(), batch_of("cifar"), ("layer1",))["layer1"].dtype == torch.float64
    assert probe(tiny("cifar").bfloat16(), batch_of("cifar"), ("layer1",))["layer1"].dtype == torch.float32


# Layers that setup chooses


class Chosen(KD):
    """Compares nothing, but asks for layers once it knows the models."""

    def setup(self, context):
        models = context.student, context.teacher_model
        self.student_layers, self.teacher_layers = (stage_paths(model)[:1] for model in models)

    def forward(self, student, teacher, batch):
        self.captured = {*student.features}, {*teacher.features}
        return super().forward(student, teacher, batch)


@pytest.mark.parametrize("wrap", [lambda d: d, Wrapper, lambda d: Combined({"kd": KD(), "chosen": d}, task_from="kd")])
def test_setup_may_choose_the_layers(tmp_path, wrap):
    chosen = Chosen()
    distiller = wrap(chosen)
    trainer = make_trainer(tmp_path, tiny("resnet"), tiny_teacher("cifar"), distiller, rows("resnet"), max_steps=1)
    assert (distiller.student_layers, distiller.teacher_layers) == (("resnet.encoder.stages.0",), ("layer1",))
    trainer.train()
    assert chosen.captured == ({"resnet.encoder.stages.0"}, {"layer1"})


def test_a_layer_that_setup_chooses_and_the_model_lacks_is_refused(tmp_path):
    class Wrong(KD):
        def setup(self, context):
            self.teacher_layers = ("layer9",)

    with pytest.raises(ValueError, match="CifarForImageClassification has no module 'layer9'"):
        make_trainer(tmp_path, tiny("resnet"), tiny_teacher("cifar"), Wrong(), rows("resnet"))


def test_a_sample_for_setup_is_unaugmented_and_moves_no_state(tmp_path):
    class Augmented(Rows):
        def __getitem__(self, i):
            return {**super().__getitem__(i), "pixel_values": torch.rand(3, 16, 16)}

        def without_augmentation(self):
            return Rows(self.columns)

    dataset = Augmented(rows("cifar").columns)
    trainer = make_trainer(tmp_path, tiny("cifar"), tiny_teacher("cifar"), KD(), dataset)
    sample = trainer.context.sample()
    assert torch.equal(sample["pixel_values"], dataset.columns["pixel_values"][:2])
    assert sample["index"].tolist() == [0, 1]
    trainer = make_trainer(tmp_path, tiny("cifar"), tiny_teacher("cifar"))
    with pytest.raises(ValueError, match="measures features on training samples: pass train_dataset="):
        trainer.context.sample()
