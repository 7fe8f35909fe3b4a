import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageClassification

from hfkd.models import MODEL_NAMES, CifarConfig, CifarForImageClassification


# On 100 classes: the networks of CRD (github.com/HobbitLong/RepDistiller), where the ResNets have shortcut B; the last
# two are those of github.com/weiaicunzai/pytorch-cifar100 too.
CIFAR100_PARAMETERS = {
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg13": 9_462_180,
    "mobilenetv2": 812_836,
    "shufflenetv1": 949_258,
    "shufflenetv2": 1_355_528,
    "resnet18": 11_220_132,
    "resnet50": 23_705_252,
}
# On 10 classes with shortcut A, github.com/akamaster/pytorch_resnet_cifar10: 0.27M, 0.46M, 0.66M, 0.85M, 1.7M.
CIFAR10_PARAMETERS = {
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
}


def make(architecture, **fields):
    return CifarForImageClassification(CifarConfig(architecture=architecture, **{"num_labels": 10, **fields}))


def count(architecture, **fields):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make(architecture, **fields).parameters())


@pytest.mark.parametrize(("name", "parameters"), CIFAR100_PARAMETERS.items())
def test_parameter_counts_are_the_published_ones(name, parameters):
    assert count(name, num_labels=100) == parameters


@pytest.mark.parametrize(("name", "parameters"), CIFAR10_PARAMETERS.items())
def test_parameter_counts_with_shortcut_a(name, parameters):
    assert count(name, shortcut="A") == parameters


@pytest.mark.parametrize("size", [8, 28, 64])
def test_other_image_sizes_and_channels(size):
    for name in ("resnet8", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2"):
        model = make(name, shortcut="A", image_size=size, num_channels=1).eval()
        assert model(torch.randn(2, 1, size, size)).logits.shape == (2, 10), name


def test_depth_and_width_are_free():
    assert count("resnet26") > count("resnet20")
    assert count("wrn_22_4") > count("wrn_16_4") > count("wrn_16_3")


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_one_step_lowers_the_loss_and_reaches_every_parameter(name):
    torch.manual_seed(0)
    model = make(name).train()
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 3, 9, -100])
    stages = [module for key, module in model.named_children() if key.startswith("layer")]
    seen = []
    hooks = [stage.register_forward_hook(lambda *call: seen.append(call[-1])) for stage in stages]
    output = model(pixel_values=images, labels=labels, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    assert output.logits.shape == (4, 10)
    assert all(hidden is stage for hidden, stage in zip(output.hidden_states, seen, strict=True))
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))
    output.loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key
    torch.optim.SGD(model.parameters(), lr=1e-4).step()
    assert model(images, labels=labels).loss < output.loss


@pytest.mark.parametrize(
    "name", ["resnet8", "resnet8x4", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2"]
)
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_channels_last_gives_the_same(name, shortcut):
    torch.manual_seed(0)
    model, images = make(name, shortcut="A").eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images).logits
        model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(images.to(memory_format=torch.channels_last)).logits, expected)


def test_shortcut_a_subsamples_and_pads_both_sides():
    block = make("resnet8", shortcut="A").layer2[0]
    images = torch.randn(1, 16, 4, 4)
    shortcut = block.shortcut(images)
    assert shortcut.shape == (1, 32, 2, 2)
    assert torch.equal(shortcut[:, 8:24], images[:, :, ::2, ::2])
    assert not shortcut[:, :8].any()
    assert not shortcut[:, 24:].any()


def test_resnet_keys_are_akamasters():
    keys = make("resnet8", shortcut="A").state_dict().keys()
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.weight", *(f"bn1.{n}" for n in norm), "linear.weight", "linear.bias"}
    for stage in (1, 2, 3):
        for i in (1, 2):
            expected |= {f"layer{stage}.0.conv{i}.weight", *(f"layer{stage}.0.bn{i}.{n}" for n in norm)}
    assert keys == expected


def test_captured_features_are_what_the_layer_returned():
    model, seen = make("resnet8").eval(), []
    hook = model.layer1[0].bn2.register_forward_hook(lambda _, inputs, output: seen.append((output, output.clone())))
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    hook.remove()
    assert torch.equal(*seen[0])
    assert (seen[0][0] < 0).any()


def test_output_is_a_tuple_on_request():
    model, images = make("resnet8").eval(), torch.zeros(1, 3, 32, 32)
    (logits,) = model(images, return_dict=False)
    loss, with_loss, hidden = model(images, torch.tensor([1]), output_hidden_states=True, return_dict=False)
    assert torch.equal(logits, with_loss)
    assert loss.ndim == 0
    assert len(hidden) == 3


def test_regression_uses_the_squared_error():
    model = make("resnet8", num_labels=1, problem_type="regression").eval()
    output = model(torch.randn(3, 3, 32, 32), labels=torch.tensor([0.0, 1.0, 2.0]))
    torch.testing.assert_close(output.loss, F.mse_loss(output.logits[:, 0], torch.tensor([0.0, 1.0, 2.0])))


def test_same_seed_same_weights_and_he_initialisation():
    torch.manual_seed(0)
    first = make("resnet20")
    torch.manual_seed(0)
    second = make("resnet20")
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())
    assert first.layer3[1].conv1.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)


def test_compiles_without_a_graph_break():
    for name in ("resnet8", "shufflenetv2"):
        model, images = make(name).eval(), torch.randn(2, 3, 32, 32)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(images).logits, model(images).logits)


@pytest.mark.parametrize(
    "name", ["resnet21", "resnet2", "resnet20x3", "wrn_17_2", "wrn_16_0", "vgg9", "mobilenetv3", "shufflenetv3", "net"]
)
def test_unknown_architecture_lists_the_names(name):
    with pytest.raises(ValueError, match=f"unknown architecture '{name}': use one of resnet8, .*shufflenetv2, or"):
        make(name)


def test_unknown_shortcut_names_both():
    with pytest.raises(ValueError, match="unknown shortcut 'C': use 'A' .* or 'B'"):
        make("resnet20", shortcut="C")


WITHOUT_HFKD = """
import sys

sys.modules["hfkd"] = None  # makes `import hfkd` fail
import torch
from transformers import AutoModelForImageClassification

folder = sys.argv[1]
try:
    AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=False)
except ValueError:
    pass
else:
    raise SystemExit("loaded without hfkd and without the remote code")
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
images, logits = torch.load(folder + "/expected.pt")
torch.testing.assert_close(model(images).logits, logits)
assert model.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
assert "num_batches_tracked" in str(list(model.state_dict()))
print("same logits from", type(model).__module__.split(".")[0])
"""


@pytest.mark.parametrize(("name", "shortcut"), [("resnet8", "A"), ("shufflenetv2", "B")])
def test_saved_model_loads_with_and_without_hfkd(tmp_path, name, shortcut):
    torch.manual_seed(0)
    labels = {0: "cat", 1: "dog", 2: "owl"}
    model = make(name, shortcut=shortcut, num_labels=3, id2label=labels, image_mean=(0.5, 0.5, 0.5))
    images = torch.randn(4, 3, 32, 32)
    model(images)  # moves the BatchNorm statistics from where they start
    model.eval().save_pretrained(tmp_path)
    assert (tmp_path / "modeling_cifar.py").exists()
    with torch.no_grad():
        logits = model(images).logits

    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is CifarForImageClassification
    assert loaded.config.image_mean == [0.5, 0.5, 0.5]
    torch.testing.assert_close(loaded(images).logits, logits)

    torch.save((images, logits), tmp_path / "expected.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WITHOUT_HFKD, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "same logits from transformers_modules" in run.stdout


def test_loading_draws_only_what_is_missing(tmp_path):
    model = make("resnet8")
    model.save_pretrained(tmp_path)
    loaded = CifarForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert loaded.linear.weight.shape == (7, 64)
    assert loaded.linear.weight.abs().max() <= 1 / 8  # PyTorch's default for 64 inputs
    assert torch.equal(loaded.conv1.weight, model.conv1.weight)
    assert torch.equal(loaded.layer3[0].conv2.weight, model.layer3[0].conv2.weight)
