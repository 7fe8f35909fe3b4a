"""Influence of training samples on the validation risk, against retraining and explicit gradients; weights from it."""

import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_identical, batch_norms, rows, tiny, tiny_teacher
from helpers import weights as state_of
from peft import LoraConfig, get_peft_model
from scipy.stats import spearmanr
from torch import nn
from torch.func import functional_call
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from hfkd.distillers.kd_aif import _log_weights
from hfkd.features import run_model, select_inputs
from hfkd.functional import influence_weights
from hfkd.influence import (
    directional_derivatives,
    ekfac_influence,
    forward_mode_ready,
    inverse_hessian_product,
    last_layer_gradient,
    last_layer_influence,
    last_layer_inverse_product,
    mean_gradient,
)


# L2-regularised logistic regression in double precision: what every definition can be checked on


SAMPLES, WIDTH, L2 = 60, 4, 0.02


def problem(n=SAMPLES, seed=0, shift=0.0):
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(n, WIDTH)) * [2.0, 1.0, 0.7, 0.5] + shift
    labels = (generator.random(n) < 1 / (1 + np.exp(-inputs @ [1.0, -2.0, 0.5, 0.0] - 0.3))).astype(float)
    return np.c_[inputs, np.ones(n)], labels


TRAIN = problem()
VALIDATION = problem(40, seed=1, shift=0.5)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def risk(theta, inputs, labels):
    z = inputs @ theta
    return np.mean(np.logaddexp(0, z) - labels * z)


def hessian(theta, sample_weight):
    inputs, _ = TRAIN
    p = sigmoid(inputs @ theta)
    return (inputs * (sample_weight * p * (1 - p))[:, None]).T @ inputs + L2 * np.eye(WIDTH + 1)


def fit(sample_weight):
    """The minimum of Σ w_i l_i + L2/2 |θ|², by Newton's method."""
    inputs, labels = TRAIN
    theta = np.zeros(WIDTH + 1)
    for _ in range(30):
        gradient = inputs.T @ (sample_weight * (sigmoid(inputs @ theta) - labels)) + L2 * theta
        theta = theta - np.linalg.solve(hessian(theta, sample_weight), gradient)
    assert np.abs(gradient).max() < 1e-13
    return theta


UNIFORM = np.full(SAMPLES, 1 / SAMPLES)


@pytest.fixture(scope="module")
def theta():
    return fit(UNIFORM)


def as_parameters(theta):
    return {"weight": torch.tensor(theta[:-1]), "bias": torch.tensor(theta[-1])}


def flat(vector):
    return np.append(vector["weight"].numpy(), vector["bias"].item())


def logistic_loss(parameters, batch):
    z = batch["inputs"][:, :-1] @ parameters["weight"] + parameters["bias"]
    return F.binary_cross_entropy_with_logits(z, batch["labels"], reduction="none")


def regularised_loss(parameters, batch):
    return logistic_loss(parameters, batch) + L2 / 2 * sum(p.square().sum() for p in parameters.values())


def logistic_batches(data, *sizes):
    tensors = [torch.tensor(column).split(list(sizes) or [len(column)]) for column in data]
    batches = [{"inputs": inputs, "labels": labels} for inputs, labels in zip(*tensors, strict=True)]
    return lambda: iter(batches)


def validation_gradient(theta):
    inputs, labels = VALIDATION
    return inputs.T @ (sigmoid(inputs @ theta) - labels) / len(labels)


def influence_of(theta, hessian_inverse):
    """What the library says, with any inverse Hessian."""
    parameters = as_parameters(theta)
    gradient = mean_gradient(logistic_loss, parameters, logistic_batches(VALIDATION, 16, 16, 8))
    direction = as_parameters(hessian_inverse @ flat(gradient))
    return -directional_derivatives(logistic_loss, parameters, logistic_batches(TRAIN, 25, 25, 10), direction).numpy()


def test_influence_is_the_change_of_the_validation_risk(theta):
    influence = influence_of(theta, np.linalg.inv(hessian(theta, UNIFORM)))
    step = 1e-5
    for i in range(SAMPLES):
        change = [risk(fit(UNIFORM + sign * step * np.eye(SAMPLES)[i]), *VALIDATION) for sign in (1, -1)]
        assert influence[i] == pytest.approx((change[0] - change[1]) / (2 * step), rel=1e-5, abs=1e-9)


def test_influence_ranks_samples_as_retraining_without_them(theta):
    """Leaving a sample out takes 1/N of weight from it."""
    influence = influence_of(theta, np.linalg.inv(hessian(theta, UNIFORM)))
    without = [risk(fit(UNIFORM * (np.arange(SAMPLES) != i)), *VALIDATION) for i in range(SAMPLES)]
    change = np.array(without) - risk(theta, *VALIDATION)
    assert spearmanr(-influence / SAMPLES, change).statistic > 0.95
    assert np.polyfit(-influence / SAMPLES, change, 1)[0] == pytest.approx(1, abs=0.15)


def test_the_mean_gradient_counts_every_sample_once(theta):
    gradient = mean_gradient(logistic_loss, as_parameters(theta), logistic_batches(VALIDATION, 3, 30, 7))
    np.testing.assert_allclose(flat(gradient), validation_gradient(theta), rtol=1e-12)
    assert not any(tensor.requires_grad for tensor in gradient.values())


def test_a_parameter_that_the_loss_does_not_use_has_no_gradient(theta):
    parameters = {**as_parameters(theta), "other": torch.ones(3, dtype=torch.float64)}
    gradient = mean_gradient(logistic_loss, parameters, logistic_batches(TRAIN))
    assert gradient["other"].tolist() == [0, 0, 0]
    product = inverse_hessian_product(
        regularised_loss, parameters, logistic_batches(TRAIN), gradient, damping=0.0, iterations=2000
    )
    assert product["other"].tolist() == [0, 0, 0]
    np.testing.assert_allclose(
        flat(product), np.linalg.solve(hessian(theta, UNIFORM), flat(gradient)), rtol=1e-4, atol=1e-8
    )


# LiSSA


def relative_error(product, exact):
    return np.linalg.norm(flat(product) - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("scale", [None, 2.0])
def test_lissa_reaches_the_dense_solve(theta, damping, scale):
    parameters, vector = as_parameters(theta), as_parameters(validation_gradient(theta))
    exact = np.linalg.solve(hessian(theta, UNIFORM) + damping * np.eye(WIDTH + 1), validation_gradient(theta))
    product = inverse_hessian_product(
        regularised_loss,
        parameters,
        logistic_batches(TRAIN),
        vector,
        damping=damping,
        scale=scale,
        iterations=1500,
    )
    assert relative_error(product, exact) < 1e-4
    assert relative_error(product, np.linalg.solve(hessian(theta, UNIFORM) + 0.05, exact)) > 0.01


def test_lissa_on_mini_batches_of_unequal_size_errs_by_the_inverse_of_the_scale(theta):
    parameters, vector = as_parameters(theta), as_parameters(validation_gradient(theta))
    exact = np.linalg.solve(hessian(theta, UNIFORM) + 0.2 * np.eye(WIDTH + 1), validation_gradient(theta))
    errors = []
    for scale in (2.0, 8.0):
        product = inverse_hessian_product(
            regularised_loss,
            parameters,
            logistic_batches(TRAIN, 28, 28, 4),
            vector,
            damping=0.2,
            scale=scale,
            iterations=int(90 * scale),
        )
        errors.append(relative_error(product, exact))
    assert errors[0] < 0.01  # the last step of a pass is off by 0.02
    assert errors[1] < 0.3 * errors[0]


@pytest.mark.parametrize("scale", [None, 2.0])
def test_batches_in_groups_are_larger_mini_batches(theta, scale):
    options = {"damping": 0.2, "scale": scale, "iterations": 60}
    whole = lissa(theta, batches=logistic_batches(TRAIN, 24, 24, 12), **options)
    grouped = lissa(theta, batches=logistic_batches(TRAIN, 9, 9, 6, 9, 9, 6, 9, 3), group=3, **options)
    np.testing.assert_allclose(flat(grouped), flat(whole), rtol=1e-10)
    apart = lissa(theta, batches=logistic_batches(TRAIN, 9, 9, 6, 9, 9, 6, 9, 3), **options)
    assert not np.allclose(flat(apart), flat(whole), rtol=1e-4)


@pytest.mark.parametrize("passes", [1, 4])
def test_a_pass_that_the_iterations_do_not_complete_is_left_out(theta, passes):
    given = []

    def batches():
        for batch in logistic_batches(TRAIN, 20, 20, 20)():
            given.append(batch)
            yield batch

    options = {"damping": 0.2, "scale": 2.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # so short a run has not converged
        complete = lissa(theta, batches=logistic_batches(TRAIN, 20, 20, 20), iterations=3 * passes, **options)
        longer = lissa(theta, batches=batches, iterations=3 * passes + 2, **options)
    np.testing.assert_array_equal(flat(longer), flat(complete))
    assert len(given) == 3 * passes + 1  # the last one tells that a pass is over


def test_the_scale_that_lissa_finds_itself_suits_mini_batches(theta):
    product = inverse_hessian_product(
        regularised_loss,
        as_parameters(theta),
        logistic_batches(TRAIN, 16, 16, 16, 12),
        as_parameters(validation_gradient(theta)),
        damping=0.0,
        iterations=2000,
    )
    exact = np.linalg.solve(hessian(theta, UNIFORM), validation_gradient(theta))
    assert relative_error(product, exact) < 0.1


def test_the_product_of_nothing_is_nothing(theta):
    zero = as_parameters(np.zeros(WIDTH + 1))
    product = inverse_hessian_product(
        regularised_loss, as_parameters(theta), logistic_batches(TRAIN), zero, damping=0.0, iterations=5
    )
    assert flat(product).tolist() == [0.0] * (WIDTH + 1)


def test_a_loss_without_curvature_leaves_the_damping():
    parameters, vector = {"weight": torch.ones(WIDTH + 1, dtype=torch.float64)}, random_like({"weight": torch.ones(5)})
    product = inverse_hessian_product(
        lambda p, batch: batch["inputs"] @ p["weight"],
        parameters,
        logistic_batches(TRAIN),
        vector,
        damping=0.5,
        iterations=40,
    )
    torch.testing.assert_close(product["weight"], 2 * vector["weight"].double())


def lissa(theta, loss=regularised_loss, batches=None, **options):
    return inverse_hessian_product(
        loss,
        as_parameters(theta),
        batches or logistic_batches(TRAIN, 30, 30),
        as_parameters(validation_gradient(theta)),
        **{"damping": 0.0, "iterations": 200, **options},
    )


def test_a_recursion_that_diverges_is_refused(theta):
    largest = np.linalg.eigvalsh(hessian(theta, UNIFORM))[-1]
    with pytest.raises(RuntimeError, match=r"LiSSA diverges: .*Raise scale \(now .*\) or damping \(now 0\)"):
        lissa(theta, scale=0.4 * largest)
    with pytest.raises(RuntimeError, match="LiSSA diverges"):
        lissa(theta, loss=lambda p, batch: -regularised_loss(p, batch), scale=10 * largest)
    with pytest.raises(RuntimeError, match="its residual went from 1 to nan"):
        lissa(theta, loss=lambda p, batch: regularised_loss(p, batch) * torch.nan, scale=1.0)
    # Negative curvature is fine once the damping outweighs it.
    product = lissa(
        theta,
        loss=lambda p, batch: -regularised_loss(p, batch),
        batches=logistic_batches(TRAIN),
        damping=3 * largest,
        scale=4 * largest,
    )
    exact = np.linalg.solve(3 * largest * np.eye(WIDTH + 1) - hessian(theta, UNIFORM), validation_gradient(theta))
    assert relative_error(product, exact) < 1e-6


def test_lissa_says_when_it_has_not_converged(theta):
    with pytest.warns(RuntimeWarning, match=r"LiSSA has not converged: .*% of the vector is left after 6 iterations"):
        lissa(theta, scale=50.0, iterations=6)


def test_what_lissa_cannot_work_with_is_refused(theta):
    with pytest.raises(ValueError, match="damping must not be negative, got -0.1"):
        lissa(theta, damping=-0.1)
    with pytest.raises(ValueError, match="scale must be positive, got 0"):
        lissa(theta, scale=0.0)
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        lissa(theta, iterations=0)
    with pytest.raises(ValueError, match="no sample to take the Hessian of"):
        lissa(theta, batches=lambda: [], scale=1.0)
    with pytest.raises(ValueError, match=r"the loss has shape \(\): return \(B,\)"):
        lissa(theta, loss=lambda p, batch: regularised_loss(p, batch).mean())


def test_losses_that_no_gradient_can_be_taken_of_are_refused(theta):
    parameters = as_parameters(theta)
    with pytest.raises(ValueError, match="no sample to take the gradient of"):
        mean_gradient(logistic_loss, parameters, lambda: [])
    with pytest.raises(ValueError, match="do not depend on the parameters: run the model by torch.func"):
        mean_gradient(lambda p, batch: batch["labels"], parameters, logistic_batches(TRAIN))
    for run in (mean_gradient, lambda *a: directional_derivatives(*a, parameters)):
        with pytest.raises(ValueError, match=r"the loss has shape \(\): return \(B,\)"):
            run(lambda p, batch: logistic_loss(p, batch).mean(), parameters, logistic_batches(TRAIN))


# Several processes


def on_two_processes(run):
    """``run(rank, reduce)`` on two threads that wait for each other in ``reduce``."""
    barrier, parts = threading.Barrier(2, timeout=20), [None, None]

    def work(rank):
        def reduce(tensor):
            parts[rank] = tensor
            barrier.wait()
            total = parts[0] + parts[1]
            barrier.wait()
            return total

        try:
            return run(rank, reduce)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(work, range(2)))


def parts_of(data, *slices):
    batches = [{"inputs": torch.tensor(data[0][s]), "labels": torch.tensor(data[1][s])} for s in slices]
    return lambda: iter(batches)


@pytest.mark.parametrize("cuts", [[slice(0, 11), slice(11, 40)], [slice(0, 40)]])
def test_processes_with_unequal_shares_give_the_gradient_of_the_whole(theta, cuts):
    shares = [parts_of(VALIDATION, *cuts[:1]), parts_of(VALIDATION, *cuts[1:])]
    gradients = on_two_processes(
        lambda rank, reduce: mean_gradient(logistic_loss, as_parameters(theta), shares[rank], reduce=reduce)
    )
    for gradient in gradients:
        np.testing.assert_allclose(flat(gradient), validation_gradient(theta), rtol=1e-12)


@pytest.mark.filterwarnings("ignore:LiSSA has not converged")
@pytest.mark.parametrize("scale", [None, 3.0])
def test_two_processes_take_the_steps_of_one_with_their_batches_together(theta, scale):
    """The first has three batches a pass, the second one."""
    shares = [
        parts_of(TRAIN, slice(0, 15), slice(15, 30), slice(30, 45)),
        parts_of(TRAIN, slice(45, 60)),
    ]
    together = parts_of(TRAIN, [*range(15), *range(45, 60)], slice(15, 30), slice(30, 45))
    options = {"scale": scale, "iterations": 31, "damping": 0.2}
    vector = as_parameters(validation_gradient(theta))
    products = on_two_processes(
        lambda rank, reduce: inverse_hessian_product(
            regularised_loss, as_parameters(theta), shares[rank], vector, reduce=reduce, **options
        )
    )
    expected = inverse_hessian_product(regularised_loss, as_parameters(theta), together, vector, **options)
    for product in products:
        np.testing.assert_allclose(flat(product), flat(expected), rtol=1e-12)


def test_a_process_without_samples_has_no_derivatives(theta):
    parameters = as_parameters(theta)
    nothing = directional_derivatives(logistic_loss, parameters, lambda: [], parameters)
    assert (nothing.shape, nothing.dtype) == ((0,), torch.float64)


# Forward mode on models


def timm_vit(dropout):
    config = TimmWrapperConfig(architecture="test_vit", num_labels=5, model_args={"img_size": 16, "patch_size": 8})
    return TimmWrapperForImageClassification(config)


def lora_bert(dropout):
    config = LoraConfig(target_modules=["query", "value"], modules_to_save=["classifier"], lora_dropout=dropout)
    model = get_peft_model(tiny("bert", dropout=dropout), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()  # zero at first, so that lora_A would have no gradient
    return model


MODELS = {
    **{family: lambda dropout, f=family: tiny(f, dropout=dropout) for family in ("bert", "distilbert", "vit")},
    "bert-eager": lambda dropout: tiny("bert", dropout=dropout, attn_implementation="eager"),
    "resnet8": lambda dropout: tiny_teacher("cifar"),
    "resnet": lambda dropout: tiny_teacher("resnet"),
    "timm": lambda dropout: tiny_teacher("timm"),
    "timm-vit": timm_vit,
    "lora-bert": lora_bert,
}


def model_and_batches(name):
    """A model in double precision and training mode, and seven samples in ragged batches."""
    torch.manual_seed(0)
    model = MODELS[name](0.5).double().train()
    columns = rows("bert" if "bert" in name else "cifar", 7).double().columns
    batches = [{key: column[chosen] for key, column in columns.items()} for chosen in torch.arange(7).split(3)]
    return model, lambda: iter(batches)


def trainable(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def random_like(parameters, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in parameters.items()}


def loss_of(model):
    def loss(parameters, batch):
        logits = functional_call(model, parameters, (), select_inputs(model, batch)).logits
        return F.cross_entropy(logits, batch["labels"], reduction="none")

    return loss


def per_sample_gradients(model, batches):
    """One sample at a time through the model as it is, in evaluation mode."""
    gradients = []
    modes = [module.training for module in model.modules()]
    model.eval()
    for batch in batches():
        for i in range(len(batch["labels"])):
            model.zero_grad()
            sample = {name: column[i : i + 1] for name, column in batch.items()}
            logits = model(**select_inputs(model, sample)).logits
            F.cross_entropy(logits, sample["labels"]).backward()
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    return gradients


def along(gradients, direction):
    return np.array([sum((g[n] * direction[n]).sum().item() for n in g) for g in gradients])


@pytest.mark.parametrize("name", MODELS)
def test_one_pass_gives_what_explicit_gradients_give(name):
    model, batches = model_and_batches(name)
    gradients = per_sample_gradients(model, batches)
    parameters, loss = trainable(model), loss_of(model)
    direction = random_like(parameters)
    with forward_mode_ready(model):
        derivatives = directional_derivatives(loss, parameters, batches, direction)
        mean = mean_gradient(loss, parameters, batches)
    expected = along(gradients, direction)
    np.testing.assert_allclose(derivatives.numpy(), expected, rtol=1e-6, atol=1e-9 * np.abs(expected).max())
    for parameter, tensor in mean.items():
        reference = sum(gradient[parameter] for gradient in gradients if parameter in gradient) / 7
        torch.testing.assert_close(tensor, torch.as_tensor(reference + torch.zeros_like(tensor)))
    if "lora" in name:
        assert all("lora" in parameter or "classifier" in parameter for parameter in parameters)


class Normalised(nn.Module):
    """Batch normalisation of all kinds: over images and vectors, with and without weights, and by the batch itself."""

    def __init__(self):
        super().__init__()
        self.convolution, self.images = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)
        self.linear, self.vectors = nn.Linear(12, 4), nn.BatchNorm1d(4, eps=0.1)
        self.plain, self.by_batch = nn.BatchNorm1d(4, affine=False), nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, inputs):
        hidden = self.linear(self.images(self.convolution(inputs)).relu().flatten(1))
        return self.by_batch(self.plain(self.vectors(hidden)).sigmoid())


@pytest.mark.parametrize("frozen", [(), ("images.weight", "vectors.bias"), ("convolution",), ("images", "vectors")])
def test_batch_normalisation_has_its_own_derivative(frozen):
    torch.manual_seed(0)
    model = Normalised().double().requires_grad_(True)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                if tensor is not None:
                    nn.init.uniform_(tensor, 0.5, 2.0)
    model.eval()
    batch = {"inputs": torch.randn(5, 2, 4, 4).double()}
    parameters = {name: p.detach() for name, p in model.named_parameters() if not name.startswith(frozen or "-")}
    direction = random_like(parameters)

    def loss(parameters, batch):
        return functional_call(model, parameters, (batch["inputs"],)).square().sum(1)

    with forward_mode_ready(model):
        found = directional_derivatives(loss, parameters, lambda: [batch], direction)
    leaves = {name: parameter.clone().requires_grad_() for name, parameter in parameters.items()}
    gradients = [torch.autograd.grad(each, leaves.values(), retain_graph=True) for each in loss(leaves, batch)]
    expected = [sum((g * d).sum() for g, d in zip(each, direction.values(), strict=True)) for each in gradients]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:LiSSA has not converged")
@pytest.mark.parametrize("name", MODELS)
def test_the_hessian_is_the_derivative_of_the_gradient(name):
    """Two steps of LiSSA from 0 are u = (2v - Hv/s)/s, which shows Hv."""
    model, batches = model_and_batches(name)
    whole = [{key: torch.cat([batch[key] for batch in batches()]) for key in next(batches())}]
    parameters, loss, scale = trainable(model), loss_of(model), 1e6
    direction = random_like(parameters)
    options = {"damping": 0.0, "scale": scale, "iterations": 2}
    with forward_mode_ready(model):
        product = inverse_hessian_product(loss, parameters, lambda: whole, direction, **options)
    step = 1e-8  # so small that no ReLU changes sides
    with forward_mode_ready(model):
        ahead, behind = (
            mean_gradient(loss, {n: p + sign * step * direction[n] for n, p in parameters.items()}, lambda: whole)
            for sign in (1, -1)
        )
    largest = max(((ahead[n] - behind[n]) / (2 * step)).abs().max().item() for n in parameters)
    for parameter, tensor in product.items():
        hessian_vector = scale * (2 * direction[parameter] - scale * tensor)
        expected = (ahead[parameter] - behind[parameter]) / (2 * step)
        torch.testing.assert_close(hessian_vector, expected, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_stays_as_it_was(name):
    model, batches = model_and_batches(name)
    parameters, loss = trainable(model), loss_of(model)
    if norms := batch_norms(model):
        norms[0].eval()
    state, random = state_of(model), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    implementation = model.config._attn_implementation
    with forward_mode_ready(model):
        assert not any(module.training for module in model.modules())
        gradient = mean_gradient(loss, parameters, batches)
        directional_derivatives(loss, parameters, batches, gradient)
    assert_identical(state_of(model), state)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == implementation
    assert all(p.grad is None for p in model.parameters())
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_the_model_is_restored_when_something_fails():
    model = tiny("bert", attn_implementation="flex_attention").train()
    with pytest.raises(AttributeError, match="no attribute `logits`"), forward_mode_ready(model):
        model.get_submodule("logits")
    assert model.config._attn_implementation == "flex_attention"
    assert all(module.training for module in model.modules())
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


def test_another_attention_is_replaced_inside_peft_too():
    model, batches = model_and_batches("lora-bert")
    direction = random_like(trainable(model))
    expected = along(per_sample_gradients(model, batches), direction)
    model.base_model.model.set_attn_implementation("flex_attention")
    with forward_mode_ready(model):
        derivatives = directional_derivatives(loss_of(model), trainable(model), batches, direction)
    np.testing.assert_allclose(derivatives.numpy(), expected, rtol=1e-6)
    assert model.config._attn_implementation == "flex_attention"


def test_no_graph_is_kept():
    """Though parameters that are not differentiated by ask for gradients."""
    model, batches = model_and_batches("bert")
    parameters = {name: p for name, p in model.named_parameters() if "classifier" in name or "embeddings" in name}
    saved = []
    with forward_mode_ready(model), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        derivatives = directional_derivatives(loss_of(model), parameters, batches, random_like(parameters))
    assert not saved
    assert not derivatives.requires_grad


@pytest.mark.filterwarnings("ignore:LiSSA has not converged")
def test_autocast_is_off():
    model, batches = model_and_batches("resnet8")
    model = model.float()
    batches = [{**batch, "pixel_values": batch["pixel_values"].float()} for batch in batches()]
    parameters = trainable(model)
    results = []
    for enabled in (False, True):
        with forward_mode_ready(model), torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            gradient = mean_gradient(loss_of(model), parameters, lambda: batches)
            derivatives = directional_derivatives(loss_of(model), parameters, lambda: batches, gradient)
            product = inverse_hessian_product(
                loss_of(model), parameters, lambda: batches, gradient, damping=100.0, iterations=8
            )
        results.append({**{f"g {n}": t for n, t in gradient.items()}, **product, "derivatives": derivatives})
    assert_identical(*results)


class Distances(nn.Module):
    def forward(self, x):
        return torch.cdist(x, x)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Custom(nn.Module):
    def forward(self, x):
        return Doubled.apply(x)


@pytest.mark.parametrize(
    ("module", "operation"), [(Distances(), "_cdist_forward"), (Custom(), "must implement the jvp function")]
)
def test_an_operation_without_forward_mode_is_named(module, operation):
    model = nn.Sequential(nn.Linear(3, 2), module)
    batches = lambda: [{"x": torch.randn(4, 3)}]  # noqa: E731
    loss = lambda p, batch: functional_call(model, p, (batch["x"],)).sum(1)  # noqa: E731
    parameters = dict(model.named_parameters())
    expected = rf'{type(module).__name__}: .*{operation}.*use the influence of the last layer alone \(layers="last"\)'
    with forward_mode_ready(model), pytest.raises(NotImplementedError, match=expected):
        directional_derivatives(loss, parameters, batches, parameters)


def test_fused_attention_is_named_with_its_remedy():
    model, batches = model_and_batches("bert")
    parameters = trainable(model)
    with pytest.raises(NotImplementedError, match=r"BertSelfAttention: .*flash.* inside forward_mode_ready\(model\)"):
        directional_derivatives(loss_of(model.eval()), parameters, batches, parameters)
    with pytest.raises(NotImplementedError, match=r"flash.* inside forward_mode_ready\(model\)"):
        inverse_hessian_product(loss_of(model), parameters, batches, parameters, damping=1.0, iterations=1)


def test_other_errors_come_through_as_they_are(theta):
    def loss(parameters, batch):
        raise RuntimeError("the tokenizer is out of words")

    with pytest.raises(RuntimeError, match="^the tokenizer is out of words$"):
        directional_derivatives(loss, as_parameters(theta), logistic_batches(TRAIN), as_parameters(theta))


def test_torchs_own_encoder_has_forward_mode():
    """Its fast path in evaluation mode has none."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double()
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    direction = random_like(parameters)
    loss = lambda p, batch: functional_call(model, p, (batch["x"],)).square().sum((1, 2))  # noqa: E731
    with forward_mode_ready(model):
        derivatives = directional_derivatives(loss, parameters, lambda: [{"x": x}], direction)
    losses = model.eval()(x).square().sum((1, 2))
    for i, value in enumerate(losses):
        gradients = torch.autograd.grad(value, tuple(model.parameters()), retain_graph=True)
        expected = sum((g * d).sum().item() for g, d in zip(gradients, direction.values(), strict=True))
        assert derivatives[i].item() == pytest.approx(expected)


# The last layer alone


def last_layer(model, batches):
    """Residuals and inputs of the last layer, batch by batch."""
    model.eval()
    for batch in batches():
        with torch.no_grad():
            outputs = run_model(model, batch, layers=("linear:input",))
        one_hot = F.one_hot(batch["labels"], 5)
        yield outputs.logits.softmax(-1) - one_hot, outputs.features["linear:input"]


@pytest.mark.parametrize("bias", [True, False])
def test_the_last_layer_in_closed_form(bias):
    model, batches = model_and_batches("resnet8")
    pairs = list(last_layer(model, batches))
    gradient = (
        sum(len(features) * last_layer_gradient(*pair, bias=bias) for pair in pairs for features in pair[1:]) / 7
    )
    assert gradient.shape == (5, 65 if bias else 64)
    influence = torch.cat([last_layer_influence(*pair, gradient) for pair in pairs])

    explicit = per_sample_gradients(model, batches)
    names = ["linear.weight", "linear.bias"][: 1 + bias]
    mean = {name: sum(g[name] for g in explicit) / 7 for name in names}
    torch.testing.assert_close(gradient[:, :64], mean["linear.weight"])
    if bias:
        torch.testing.assert_close(gradient[:, 64], mean["linear.bias"])
    expected = [-sum((g[name] * mean[name]).sum().item() for name in names) for g in explicit]
    np.testing.assert_allclose(influence.numpy(), expected, rtol=1e-9)

    parameters = trainable(model)
    direction = {name: mean.get(name, torch.zeros_like(p)) for name, p in parameters.items()}
    with forward_mode_ready(model):
        derivatives = directional_derivatives(loss_of(model), parameters, batches, direction)
    torch.testing.assert_close(influence, -derivatives)


def explicit_hessian(logits, features):
    """Of the mean cross-entropy by a last layer's weight (and bias), by autograd on labels that do not matter."""
    classes, width = logits.shape[1], features.shape[1]
    labels = torch.arange(len(features)) % classes

    def risk(change):  # of the layer, on top of the logits
        return F.cross_entropy(logits + features @ change.reshape(classes, width).T, labels)

    return torch.autograd.functional.hessian(risk, torch.zeros(classes * width, dtype=logits.dtype))


def last_layer_problem(n=30, classes=4, width=3):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits, torch.rand(n, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("damping", [1e-3, 0.5, None])
def test_the_last_layer_solves_with_its_exact_hessian(bias, damping):
    logits, features = last_layer_problem()
    inputs = torch.cat([features, torch.ones(30, 1)], 1) if bias else features
    hessian = explicit_hessian(logits, inputs)
    gradient = torch.randn(4, inputs.shape[1], dtype=torch.float64)
    added = 0.1 * hessian.trace() / len(hessian) if damping is None else damping
    expected = torch.linalg.solve(
        hessian + added * torch.eye(len(hessian), dtype=torch.float64), gradient.flatten()
    ).view_as(gradient)
    product = last_layer_inverse_product(logits, features, gradient, damping=damping, tolerance=1e-13)
    torch.testing.assert_close(product, expected, rtol=1e-7, atol=1e-9)


def test_the_last_layer_of_a_student_without_doubts_is_solved_as_well():
    """Where every 1 - p is below the rounding of p. Reference: the Hessian as a sum over pairs of classes."""
    logits, features = last_layer_problem()
    logits, (n, width) = logits + 50 * F.one_hot(torch.arange(30) % 4), features.shape
    probabilities = logits.softmax(1)
    assert (probabilities.max(1).values == 1).all()
    hessian = torch.zeros(4 * width, 4 * width, dtype=torch.float64)
    for p, h in zip(probabilities, features, strict=True):
        for one in range(4):
            for other in range(one):
                difference = torch.zeros(4, dtype=torch.float64)
                difference[one], difference[other] = 1, -1
                row = (difference[:, None] * h).flatten()
                hessian += p[one] * p[other] * torch.outer(row, row) / n
    gradient = torch.randn(4, width, dtype=torch.float64)
    added = 0.1 * hessian.trace() / len(hessian)
    assert 0 < added < 1e-18
    expected = torch.linalg.solve(hessian / added + torch.eye(len(hessian)), gradient.flatten() / added)
    product = last_layer_inverse_product(logits, features, gradient, tolerance=1e-13)
    torch.testing.assert_close(product, expected.view_as(gradient), rtol=1e-7, atol=1e-9 * expected.abs().max().item())


def test_the_last_layer_of_two_processes_solves_as_that_of_one():
    logits, features = last_layer_problem()
    gradient = torch.randn(4, 4, dtype=torch.float64)
    shares = [slice(0, 7), slice(7, 30)]
    products = on_two_processes(
        lambda rank, reduce: last_layer_inverse_product(
            logits[shares[rank]], features[shares[rank]], gradient, tolerance=1e-13, reduce=reduce
        )
    )
    expected = last_layer_inverse_product(logits, features, gradient, tolerance=1e-13)
    for product in products:
        torch.testing.assert_close(product, expected, rtol=1e-8, atol=1e-10)


def test_a_last_layer_without_damping_is_refused():
    with pytest.raises(ValueError, match="None is a tenth of the mean eigenvalue"):
        last_layer_inverse_product(*last_layer_problem(), torch.ones(4, 3), damping=0.0)


def test_a_direction_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \(3, 6\), and residuals of 3 classes .* need \(3, 5\), or \(3, 4\)"):
        last_layer_influence(torch.ones(2, 3), torch.ones(2, 4), torch.ones(3, 6))


# EK-FAC


class Perceptron(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
        self.layers = nn.ModuleList(layers)

    def forward(self, inputs):
        hidden = inputs
        for layer in self.layers[:-1]:
            hidden = layer(hidden).tanh()
        return SimpleNamespace(logits=self.layers[-1](hidden))


def classification(n, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 4, generator=generator) * torch.tensor([2.0, 1.0, 0.5, 0.2])
    teacher = 0.4 * torch.randn(4, classes, generator=torch.Generator().manual_seed(9))
    labels = (inputs @ teacher).softmax(-1).multinomial(1, generator=generator)[:, 0]
    batches = [
        {"inputs": x, "labels": y} for x, y in zip(inputs.split(16), labels.split(16), strict=True)
    ]  # the last one smaller
    return lambda: iter(batches)


def cross_entropy_of(model, batch):
    return F.cross_entropy(model(**select_inputs(model, batch)).logits, batch["labels"], reduction="none")


def numpy_layers(model, batch, labels):
    """Inputs with a one behind them and gradients of cross-entropy by the outputs of each layer, a row a sample."""
    activations = [batch["inputs"].double().numpy()]
    parameters = [(m.weight.detach().double().numpy(), m.bias.detach().double().numpy()) for m in model.layers]
    for weight, bias in parameters[:-1]:
        activations.append(np.tanh(activations[-1] @ weight.T + bias))
    logits = activations[-1] @ parameters[-1][0].T + parameters[-1][1]
    p = np.exp(logits - logits.max(1, keepdims=True))
    gradients = [p / p.sum(1, keepdims=True) - np.eye(p.shape[1])[labels]]
    for (weight, _), activation in zip(parameters[:0:-1], activations[:0:-1], strict=True):
        gradients.insert(0, gradients[0] @ weight * (1 - activation**2))
    ones = np.ones((len(labels), 1))
    return [(np.hstack([a, ones]), g) for a, g in zip(activations, gradients, strict=True)]


def numpy_ekfac(model, train, validation, damping, draws):
    """The definition, layer by layer; ``draws`` holds the labels drawn for the two factors and for the eigenvalues."""
    train, validation = list(train()), list(validation())

    def passed(batches, labels):
        layers = [numpy_layers(model, batch, y) for batch, y in zip(batches, labels, strict=True)]
        return [tuple(map(np.concatenate, zip(*layer, strict=True))) for layer in zip(*layers, strict=True)]

    own = passed(train, [b["labels"].numpy() for b in train])
    queries = passed(validation, [b["labels"].numpy() for b in validation])
    factors, corrected = passed(train, draws[: len(train)]), passed(train, draws[len(train) :])
    influence = 0.0
    for (a, g), (a_query, g_query), (a_one, g_one), (a_two, g_two) in zip(
        own, queries, factors, corrected, strict=True
    ):
        _, left = np.linalg.eigh(g_one.T @ g_one / len(g_one))
        _, right = np.linalg.eigh(a_one.T @ a_one / len(a_one))
        eigenvalues = np.mean(np.einsum("ni,nj->nij", g_two @ left, a_two @ right) ** 2, axis=0)
        mean = left.T @ (g_query.T @ a_query / len(g_query)) @ right
        solved = left @ (mean / (eigenvalues + damping)) @ right.T
        influence = influence - np.einsum("ni,ij,nj->n", g, solved, a)
    return influence


def test_ekfac_is_its_definition(monkeypatch):
    torch.manual_seed(3)
    model = Perceptron(4, 5, 3)
    train, validation = classification(40, 3, seed=1), classification(24, 3, seed=2)
    draws, draw = [], torch.Tensor.multinomial

    def recorded(self, *args, **kwargs):
        draws.append(draw(self, *args, **kwargs))
        return draws[-1]

    monkeypatch.setattr(torch.Tensor, "multinomial", recorded)
    state, random = state_of(model), torch.get_rng_state()
    influence = ekfac_influence(model, cross_entropy_of, cross_entropy_of, train, validation, damping=1e-3)
    assert_identical(state_of(model), state)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(layer.weight.requires_grad and type(layer) is nn.Linear for layer in model.layers)
    assert len(draws) == 6  # twice through the three batches
    expected = numpy_ekfac(model, train, validation, 1e-3, [labels[:, 0].numpy() for labels in draws])
    np.testing.assert_allclose(influence.numpy(), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_ekfac_ranks_samples_as_the_exact_hessian_does():
    """Softmax regression, whose Gauss-Newton matrix is its Hessian."""
    train, validation = classification(400, 3, seed=1), classification(200, 3, seed=2)
    model = Perceptron(4, 3)
    optimizer = torch.optim.LBFGS(model.layers.parameters(), lr=1.0, max_iter=100)
    data, held_out = (
        {k: torch.cat([b[k] for b in batches()]) for k in next(batches())} for batches in (train, validation)
    )

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy_of(model, data).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    influence = ekfac_influence(model, cross_entropy_of, cross_entropy_of, train, validation, damping=0.01)

    inputs = torch.cat([data["inputs"], torch.ones(400, 1)], 1).double()
    p = model(data["inputs"]).logits.detach().double().softmax(-1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    exact = torch.einsum("nab,ni,nj->aibj", curvature, inputs, inputs).reshape(15, 15) / 400 + 0.01 * torch.eye(15)
    gradients = []
    for source in (data, held_out):
        q = model(source["inputs"]).logits.detach().double().softmax(-1) - F.one_hot(source["labels"], 3)
        x = torch.cat([source["inputs"], torch.ones(len(q), 1)], 1).double()
        gradients.append(torch.einsum("na,ni->nai", q, x).flatten(1))
    expected = -gradients[0] @ torch.linalg.solve(exact, gradients[1].mean(0))
    first_order = -gradients[0] @ gradients[1].mean(0)
    assert spearmanr(influence, expected).statistic > 0.9 > spearmanr(first_order, expected).statistic


@pytest.mark.parametrize("name", ["bert", "resnet8", "lora-bert", "timm-vit"])
def test_ekfac_with_a_large_damping_is_first_order(name):
    """Then the inverse is 1/damping; covered are the plain linear and convolution layers that train."""
    model, batches = model_and_batches(name)
    model = model.float()
    batches = [{k: v.float() if v.is_floating_point() else v for k, v in batch.items()} for batch in batches()]
    modes = [module.training for module in model.modules()]
    requires = [p.requires_grad for p in model.parameters()]
    damping = 1e8
    influence = ekfac_influence(
        model, cross_entropy_of, cross_entropy_of, lambda: batches, lambda: batches[::2], damping=damping
    )
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == requires
    covered = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if type(module) in (nn.Linear, nn.Conv2d)
        for name, _ in module.named_parameters()
    }
    parameters = {n: p for n, p in trainable(model).items() if n in covered}
    assert 0 < len(parameters) < len(list(model.parameters()))
    with forward_mode_ready(model):
        gradient = mean_gradient(loss_of(model), parameters, lambda: batches[::2])
        first_order = -directional_derivatives(loss_of(model), parameters, lambda: batches, gradient)
    torch.testing.assert_close(influence * damping, first_order, rtol=1e-3, atol=1e-3 * first_order.abs().max().item())


def test_ekfac_does_not_see_padding():
    model, columns = tiny("bert"), rows("bert", 96).columns
    padded = {name: column if column.ndim == 1 else F.pad(column, (0, 5)) for name, column in columns.items()}
    one, other = (
        ekfac_influence(model, cross_entropy_of, cross_entropy_of, lambda b=b: [b], lambda b=b: [b], damping=1e-2)
        for b in (columns, padded)
    )
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * one.abs().max().item())


def test_what_ekfac_cannot_work_with_is_refused(monkeypatch):
    batches = classification(4, 3, seed=1)
    arguments = cross_entropy_of, cross_entropy_of, batches, batches
    with pytest.raises(ValueError, match="damping must not be negative, got -1"):
        ekfac_influence(Perceptron(4, 3), *arguments, damping=-1.0)
    with pytest.raises(ValueError, match="Perceptron has no trainable nn.Linear or nn.Conv2d module"):
        ekfac_influence(Perceptron(4, 3).requires_grad_(False), *arguments)
    one = Perceptron(4, 1)
    with pytest.raises(ValueError, match="draws labels .*, and it has one output"):
        ekfac_influence(one, lambda m, b: m(b["inputs"]).logits[:, 0].square(), *arguments[1:])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="EK-FAC runs in one process: launch one, or use LiSSA"):
        ekfac_influence(Perceptron(4, 3), *arguments)


def test_without_kronfluence_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "kronfluence.analyzer", None)
    batches = classification(4, 3, seed=1)
    with pytest.raises(ImportError, match=r'pip install "hfkd\[influence\]"'):
        ekfac_influence(Perceptron(4, 3), cross_entropy_of, cross_entropy_of, batches, batches)


# Weights


GOLDEN = torch.tensor([-2.0, -0.5, 0.0, 1.0, 3.0], dtype=torch.float64)
GOLDEN_SIGMOID = [0.98201379, 0.73105858, 0.5, 0.11920292, 0.00247262]
GOLDEN_EXP = [2.71828183, 1.49182470, 1.22140276, 0.81873075, 0.36787944]
WEIGHTINGS = ("sigmoid", "exp_minmax")


def many(n=1000, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_golden_weights():
    assert _log_weights(GOLDEN, "sigmoid", 10.0).exp().tolist() == pytest.approx(GOLDEN_SIGMOID, abs=1e-8)
    sigmoid_weights = influence_weights(GOLDEN, clip=0.0)
    assert sigmoid_weights.tolist() == pytest.approx(GOLDEN_SIGMOID / np.mean(GOLDEN_SIGMOID), abs=1e-7)
    assert influence_weights(GOLDEN, weighting="exp_minmax", clip=0.0).tolist() == pytest.approx(GOLDEN_EXP, abs=1e-8)


def test_sigmoid_weights_by_their_definition():
    influence = many()
    low, high = np.quantile(influence.numpy(), [0.005, 0.995])
    clipped = np.clip(influence.numpy(), low, high)
    expected = 1 / (1 + np.exp(10 * clipped / (high - low)))
    np.testing.assert_allclose(influence_weights(influence).numpy(), expected / expected.mean(), rtol=1e-12)
    assert influence_weights(influence).mean().item() == pytest.approx(1)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_more_weight_for_those_that_help(weighting):
    influence = many().sort().values
    assert (influence_weights(influence, weighting=weighting, clip=0.0).diff() < 0).all()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("factor", [1e-12, 0.3, 1e9])
def test_weights_do_not_depend_on_the_unit(weighting, factor):
    one, other = (influence_weights(phi, weighting=weighting) for phi in (many(), factor * many()))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=0)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("value", [0.0, -3.0, 1e-30])
def test_equal_influence_weighs_one(weighting, value):
    assert influence_weights(torch.full((5,), value), weighting=weighting).tolist() == [1.0] * 5
    assert influence_weights(torch.tensor([value]), weighting=weighting).tolist() == [1.0]


def test_sharpness_goes_from_uniform_to_a_choice():
    assert influence_weights(many(), sharpness=0.0).tolist() == pytest.approx([1.0] * 1000)
    spread = [influence_weights(many(), sharpness=k).std().item() for k in (0.01, 1.0, 10.0)]
    assert spread[0] < 1e-2 < spread[1] < spread[2]
    chosen = influence_weights(many(), sharpness=1e6)
    assert (chosen[many() > 1e-3] == 0).all()
    assert chosen.isfinite().all()


def test_outliers_do_not_set_the_range():
    influence = many()
    influence[7], influence[8] = 1e6, -1e6
    weights_of_others = [torch.cat([w[:7], w[9:]]) for w in (influence_weights(influence), influence_weights(many()))]
    assert (weights_of_others[0] - weights_of_others[1]).abs().max() < 0.1
    assert influence_weights(influence, clip=0.0)[:7].std() < 1e-4


def test_influence_far_from_zero_has_finite_weights():
    """Every sigmoid underflows; their ratios do not."""
    found = influence_weights(torch.linspace(1e4, 1e4 + 1, 5, dtype=torch.float64), clip=0.0)
    expected = torch.exp(-10 * torch.linspace(0, 1, 5, dtype=torch.float64))
    torch.testing.assert_close(found, 5 * expected / expected.sum(), rtol=1e-6, atol=0)


def test_weights_keep_dtype_and_shape():
    assert influence_weights(many().float()).dtype == torch.float32
    assert influence_weights(many()).shape == (1000,)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_influence_that_is_not_finite_is_refused(value):
    influence = many()
    influence[3] = value
    with pytest.raises(ValueError, match="1 of 1000 influences are not finite: .*lower its learning rate"):
        influence_weights(influence)


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="sharpness must not be negative, got -1"):
        influence_weights(many(), sharpness=-1.0)
    with pytest.raises(ValueError, match=r"clip must lie in \[0, 0.5\), got 0.5"):
        influence_weights(many(), clip=0.5)
    with pytest.raises(ValueError, match="weighting must be one of sigmoid, exp_minmax, got 'softmax'"):
        influence_weights(many(), weighting="softmax")
