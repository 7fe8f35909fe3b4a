"""How much each training sample moves the validation risk: last layer, forward mode, LiSSA, EK-FAC.

The sign is Koh & Liang's: φ_i = -g_val^T (H + δI)^{-1} g_i, the change of the validation risk per unit of weight that
sample i gains. **φ < 0 helps, φ > 0 harms.** With the identity for the inverse Hessian::

    with forward_mode_ready(model):
        direction = mean_gradient(validation_loss, parameters, validation_batches)
        influence = -directional_derivatives(train_loss, parameters, train_batches, direction)

and with ``direction = inverse_hessian_product(train_loss, parameters, train_batches, direction, ...)`` between the two
lines for the Hessian. Source: Koh & Liang 2017, "Understanding Black-box Predictions via Influence Functions", ICML,
arXiv 1703.04730.
"""

from __future__ import annotations

import copy
import itertools
import math
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from hfkd.distillers.base import autocast_off
from hfkd.features import base_model, run_model


Batch = Mapping[str, Tensor]
Batches = Callable[[], Iterable[Batch]]
"""Called anew for each pass over the data (this process's share), which it gives in the same batches each time."""
SampleLoss = Callable[[dict[str, Tensor], Batch], Tensor]
"""(parameters, batch) -> (B,) losses, functional in the parameters: ``torch.func.functional_call`` inside."""
Vector = dict[str, Tensor]
"""One tensor a parameter, by its name."""

CONVERGED = 0.01  # residual of LiSSA, relative to the vector


def _identity(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def forward_mode_ready(model: nn.Module) -> Iterator[None]:
    """Let forward-mode differentiation, and second derivatives, work on a model, and let nothing move.

    Evaluation mode everywhere (no dropout, BatchNorm statistics as they are), and attention in plain operations: the
    fused kernels have neither forward mode nor second derivatives. All is as before when the context closes.

    Args:
        model: The model that the losses run.
    """
    training = {module: module.training for module in model.modules()}
    inner = base_model(model)
    attention = inner.config._attn_implementation if isinstance(inner, PreTrainedModel) else None
    fused = attention not in (None, "eager", "sdpa")
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        if fused:
            inner.set_attn_implementation("eager")
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        if fused:
            inner.set_attn_implementation(attention)
        for module, mode in training.items():
            module.training = mode


@contextmanager
def _explained() -> Iterator[None]:
    """Say which module lacks a derivative, and what to do."""
    try:
        yield
    except RuntimeError as error:
        message = str(error)
        if not any(phrase in message for phrase in ("forward AD", "forward mode AD", "functorch", "derivative for")):
            raise
        modules = [
            frame.f_locals["self"]
            for frame, _ in traceback.walk_tb(error.__traceback__)
            if isinstance(frame.f_locals.get("self"), nn.Module)
        ]
        where = f"{type(modules[-1]).__name__}: " if modules else ""
        raise NotImplementedError(
            f"{where}{message.splitlines()[0]} Attention runs in plain operations inside forward_mode_ready(model); "
            'for an operation of another kind use the influence of the last layer alone (layers="last")'
        ) from error


def _losses(loss: SampleLoss, parameters: Vector, batch: Batch) -> Tensor:
    losses = loss(parameters, batch)
    if losses.ndim != 1:
        raise ValueError(f"the loss has shape {tuple(losses.shape)}: return (B,), one loss a sample")
    return losses


def _leaves(parameters: Vector) -> Vector:
    return {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}


def _device(parameters: Vector) -> torch.device:
    return next(iter(parameters.values())).device


def _zeros(parameters: Vector) -> Vector:
    return {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}


def _norm(vector: Vector) -> float:
    return math.sqrt(sum(tensor.square().sum().item() for tensor in vector.values()))


def _distance(one: Vector, other: Vector) -> float:
    return math.sqrt(sum((tensor - other[name]).square().sum().item() for name, tensor in one.items()))


def mean_gradient(
    loss: SampleLoss, parameters: Vector, batches: Batches, *, reduce: Callable[[Tensor], Tensor] = _identity
) -> Vector:
    """The gradient of the mean loss over all samples of all batches.

    Every sample counts the same, however many its batch or process has; one whose loss is always 0, such as an
    unlabelled one, counts too.

    Args:
        loss: Losses of a batch, one a sample.
        parameters: What to differentiate by; other parameters of the model stay as they are.
        batches: This process's share of the data, which may be empty.
        reduce: Sums a tensor over the processes.

    Returns:
        The gradient by parameter, alike on all processes.

    Raises:
        ValueError: If there is no sample, the losses are not (B,), or they do not depend on the parameters.
    """
    parameters = _leaves(parameters)
    total = _zeros(parameters)
    count = torch.zeros((), dtype=torch.long, device=_device(parameters))
    for batch in batches():
        with torch.enable_grad(), autocast_off(count.device):
            losses = _losses(loss, parameters, batch)
            if not losses.requires_grad:
                raise ValueError(
                    "the losses do not depend on the parameters: run the model by "
                    "torch.func.functional_call(model, parameters, ...)"
                )
            gradients = torch.autograd.grad(losses.sum(), parameters.values(), materialize_grads=True)
        for name, gradient in zip(total, gradients, strict=True):
            total[name] += gradient
        count += len(losses)
    count = reduce(count).item()
    if not count:
        raise ValueError("there is no sample to take the gradient of: the batches are empty on all processes")
    return {name: reduce(gradient) / count for name, gradient in total.items()}


class _FastBatchNorm(TorchFunctionMode):
    """Batch normalisation in evaluation mode: two passes over the tangent, of which PyTorch's formula makes seven."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        function = self._batch_norm if function is F.batch_norm else function
        return function(*args, **(kwargs or {}))

    @staticmethod
    def _batch_norm(
        input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
    ) -> Tensor:
        duals = [forward_ad.unpack_dual(tensor) for tensor in (input, weight, bias) if tensor is not None]
        if training or len(duals) < 3 or any(dual.tangent is None for dual in duals):
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        (values, along), (weight, slope), (bias, shift) = duals
        slope = slope * (running_var + eps).rsqrt()
        normalised = F.batch_norm(values, running_mean, running_var, weight, bias, eps=eps)
        # scale · x' + (slope · x + shift - slope · mean), all but the product with x by the fused kernel.
        shift = shift - slope * running_mean
        tangent = F.batch_norm(along, torch.zeros_like(running_mean), running_var, weight, shift, eps=eps)
        tangent.addcmul_(values, slope.view(-1, *[1] * (values.ndim - 2)))
        return forward_ad.make_dual(normalised, tangent)


@torch.no_grad()
def directional_derivatives(loss: SampleLoss, parameters: Vector, batches: Batches, direction: Vector) -> Tensor:
    """How each sample's loss changes along a direction: ⟨g_i, direction⟩, by one forward-mode pass.

    No per-sample gradient is stored and no graph is kept: the memory is that of a forward pass on two batches. Run it
    inside :func:`forward_mode_ready`.

    Args:
        loss: Losses of a batch, one a sample.
        parameters: Where the derivatives are taken.
        batches: This process's share of the data, which may be empty.
        direction: A tensor for each parameter; zero where a parameter stays.

    Shapes:
        Returns (N,), in the order of the batches.

    Raises:
        ValueError: If the losses are not (B,).
        NotImplementedError: If an operation has no forward mode; names it and its module.
    """
    parameters = {name: parameter.detach() for name, parameter in parameters.items()}
    direction = {name: direction[name].to(parameter) for name, parameter in parameters.items()}
    first = next(iter(parameters.values()))
    derivatives = [first.new_zeros(0)]
    for batch in batches():
        with autocast_off(first.device), _explained(), forward_ad.dual_level(), _FastBatchNorm():
            duals = {name: forward_ad.make_dual(parameters[name], direction[name]) for name in parameters}
            losses, along = forward_ad.unpack_dual(_losses(loss, duals, batch))
        derivatives.append(torch.zeros_like(losses) if along is None else along)
    return torch.cat(derivatives)


class _MiniBatches:
    """Mini-batch after mini-batch without end, each of all processes together.

    A mini-batch is ``group`` batches of each process. Processes that have no more batches than others sit out the rest
    of a pass.
    """

    def __init__(
        self,
        loss: SampleLoss,
        parameters: Vector,
        batches: Batches,
        reduce: Callable[[Tensor], Tensor],
        group: int,
    ):
        self.loss, self.parameters, self.batches = loss, _leaves(parameters), batches
        self.reduce, self.group = reduce, group
        self.device = _device(parameters)
        self.remaining: Iterator[Batch] = iter(())

    def advance(self) -> bool:
        """Go to the next mini-batch; returns whether it is the first of a pass over the data."""
        if self._next():
            return False
        self.remaining = iter(self.batches())
        if not self._next():
            raise ValueError("there is no sample to take the Hessian of: the batches are empty on all processes")
        return True

    def _next(self) -> int:
        self.members = list(itertools.islice(self.remaining, self.group))
        return self.reduce(torch.tensor(len(self.members), device=self.device)).item()

    def hessian_times(self, vector: Vector) -> tuple[Vector, int]:
        """The product with the Hessian of the mini-batch's mean loss, and the number of its samples."""
        product, size = _zeros(vector), 0
        for batch in self.members:
            size += self._add_product(product, vector, batch)
        size = self.reduce(torch.tensor(size, device=self.device)).item()
        return {name: self.reduce(tensor).div_(size) for name, tensor in product.items()}, size

    def _add_product(self, total: Vector, vector: Vector, batch: Batch) -> int:
        # Twice in reverse: more operations have it than forward mode over reverse, and on a CPU it is faster.
        with torch.enable_grad(), autocast_off(self.device), _explained():
            leaves = tuple(self.parameters.values())
            losses = _losses(self.loss, self.parameters, batch)
            gradients = torch.autograd.grad(losses.sum(), leaves, create_graph=True, materialize_grads=True)
            along = sum((gradient * vector[name]).sum() for name, gradient in zip(vector, gradients, strict=True))
            del gradients  # as large as the model
            if along.requires_grad:  # not so where a loss is linear in the parameters
                products = torch.autograd.grad(along, leaves, materialize_grads=True)
                for name, product in zip(vector, products, strict=True):
                    total[name] += product
        return len(losses)


def _largest_curvature(mini_batches: _MiniBatches, vector: Vector, iterations: int = 20) -> float:
    """The largest eigenvalue met by power iterations through the mini-batches."""
    generator = torch.Generator().manual_seed(0)  # the same start on every process
    vector = {name: torch.randn(tensor.shape, generator=generator).to(tensor) for name, tensor in vector.items()}
    largest = 0.0
    for _ in range(iterations):
        norm = _norm(vector)
        if not norm:
            break
        mini_batches.advance()
        vector, _ = mini_batches.hessian_times({name: tensor / norm for name, tensor in vector.items()})
        largest = max(largest, _norm(vector))
    return largest


@torch.no_grad()
def inverse_hessian_product(
    loss: SampleLoss,
    parameters: Vector,
    batches: Batches,
    vector: Vector,
    *,
    damping: float,
    scale: float | None = None,
    iterations: int,
    group: int = 1,
    reduce: Callable[[Tensor], Tensor] = _identity,
) -> Vector:
    r"""(H + δI)⁻¹ v with H the Hessian of the mean loss, by LiSSA: one Hessian-vector product a mini-batch.

    .. math:: u \leftarrow u + \tfrac{1}{s}\left(v - (H_b + \delta I) u\right)

    over the mini-batches b in turn, from u = 0. A smaller batch takes a step in proportion to its size, so that each
    sample counts the same. With one batch the limit is exact; with several the mean of u over the last complete pass
    is returned, which is off by an error in proportion to 1/s. Run it inside :func:`forward_mode_ready`.

    A step keeps up to three times as much for its backward passes as a training step on the same batch, and some six
    vectors as long as the parameters; small batches in groups bound the former.

    Args:
        loss: Losses of a batch, one a sample.
        parameters: Where the Hessian is taken.
        batches: This process's share of the data, in the same batches at every pass.
        vector: What to multiply, alike on all processes.
        damping: δ, not negative. A network's Hessian has negative eigenvalues, which it must outweigh.
        scale: s; the steps contract where it exceeds half the largest eigenvalue of every H_b + δI. None is 1.5 times
            the largest that 20 power iterations meet.
        iterations: How many mini-batches at most: a last pass that they would not complete is left out. The error
            falls as exp(-iterations · λ/s) along an eigenvalue λ of H + δI.
        group: How many batches of each process make a mini-batch. Only one is in work at a time.
        reduce: Sums a tensor over the processes.

    Returns:
        The product by parameter, alike on all processes.

    Raises:
        ValueError: If an argument is out of range, there is no sample, or the losses are not (B,).
        RuntimeError: If it diverges.

    Warns:
        RuntimeWarning: If it has not converged: the residual of the last pass exceeds 1 % of the vector.

    Source: Agarwal et al. 2017, "Second-Order Stochastic Optimization for Machine Learning in Linear Time", JMLR,
    arXiv 1602.03943, as Koh & Liang use it.
    """
    if not 0 <= damping < math.inf:
        raise ValueError(f"damping must not be negative, got {damping}: 0 inverts the Hessian as it is")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive, got {scale}: None chooses one by power iterations")
    for name, number in (("iterations", iterations), ("group", group)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    vector = {name: vector[name].to(parameter) for name, parameter in parameters.items()}
    if scale is None:
        scale = (
            1.5 * (_largest_curvature(_MiniBatches(loss, parameters, batches, reduce, group), vector) + damping) or 1.0
        )
    norm = _norm(vector)
    if not norm:
        return vector

    mini_batches = _MiniBatches(loss, parameters, batches, reduce, group)
    estimate, start, mean = _zeros(vector), _zeros(vector), _zeros(vector)
    passes, steps_per_pass, largest, weight, residual = 0, 0, 0, 0.0, 1.0
    for step in range(iterations + 1):
        complete = mini_batches.advance() and step > 0
        if complete or (step == iterations and not passes):
            # The steps of a pass sum to its residual. While every step contracts, it cannot grow from pass to pass.
            moved = _distance(estimate, start)
            last, residual = residual, scale * moved / (weight * norm)
            if not residual <= 1.01 * max(last, CONVERGED):
                raise RuntimeError(
                    f"LiSSA diverges: its residual went from {last:.3g} to {residual:.3g} by iteration {step}, as "
                    "some eigenvalue of a mini-batch's Hessian exceeds twice the scale or is below minus the damping. "
                    f"Raise scale (now {scale:.3g}) or damping (now {damping:.3g})"
                )
            passes += complete
            steps_per_pass = steps_per_pass or step
            if step + steps_per_pass > iterations:
                break
            for name, tensor in start.items():
                tensor.copy_(estimate[name])
            weight = 0.0
        product, size = mini_batches.hessian_times(estimate)
        largest = max(largest, size)
        share = size / largest
        weight += share
        for name, tensor in product.items():
            tensor.add_(estimate[name], alpha=damping).sub_(vector[name])
            estimate[name].sub_(tensor, alpha=share / scale)
            mean[name].lerp_(estimate[name], share / weight)
        del product, tensor  # as large as the model, and so is the next one
    if residual > CONVERGED:
        warnings.warn(
            f"LiSSA has not converged: {residual:.1%} of the vector is left after {iterations} iterations. "
            f"Raise iterations, or damping (now {damping:.3g})",
            RuntimeWarning,
            stacklevel=3,
        )
    return mean if passes > 1 else estimate


def _with_one(features: Tensor) -> Tensor:
    return torch.cat([features, features.new_ones(len(features), 1)], dim=1)


def last_layer_gradient(residuals: Tensor, features: Tensor, *, bias: bool = True) -> Tensor:
    r"""The gradient of the mean loss by a linear last layer: the mean of :math:`g_i = r_i \otimes [h_i, 1]`.

    Over several batches: add up ``len(features)`` times each, over the processes too, and divide by all samples.

    Args:
        residuals: :math:`r_i = \partial \ell_i / \partial z_i`, by the layer's outputs; p - y for cross-entropy.
        features: :math:`h_i`, the layer's inputs.
        bias: Whether the layer has one: the last column.

    Shapes:
        ``residuals``: (N, C), ``features``: (N, D). Returns (C, D + 1), or (C, D) without bias.

    >>> last_layer_gradient(torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [4.0]]))
    tensor([[7., 2.]])
    """
    return residuals.mT @ (_with_one(features) if bias else features) / len(features)


def last_layer_influence(residuals: Tensor, features: Tensor, direction: Tensor) -> Tensor:
    r"""First-order influence by a linear last layer alone, in closed form.

    .. math:: \varphi_i = -\langle G, r_i \otimes [h_i, 1] \rangle = -r_i^\top G \, [h_i, 1]

    No sample's gradient is formed.

    Args:
        residuals: :math:`r_i = \partial \ell_i / \partial z_i` of the training samples.
        features: :math:`h_i`, the inputs of the layer.
        direction: G, the validation gradient of :func:`last_layer_gradient`, with a last column for the bias or
            without.

    Shapes:
        ``residuals``: (N, C), ``features``: (N, D), ``direction``: (C, D + 1) or (C, D). Returns (N,): negative helps.

    Raises:
        ValueError: If the shapes do not fit.

    >>> last_layer_influence(torch.tensor([[1.0]]), torch.tensor([[2.0]]), torch.tensor([[3.0, 4.0]]))
    tensor([-10.])
    """
    (_, classes), (_, width) = residuals.shape, features.shape
    if direction.shape not in ((classes, width), (classes, width + 1)):
        raise ValueError(
            f"the direction has shape {tuple(direction.shape)}, and residuals of {classes} classes with features of "
            f"{width} columns need ({classes}, {width + 1}), or ({classes}, {width}) for a layer without bias"
        )
    along = ((residuals @ direction[:, :width]) * features).sum(1)
    return -along if direction.shape[1] == width else -along - residuals @ direction[:, width]


def last_layer_inverse_product(
    logits: Tensor,
    features: Tensor,
    gradient: Tensor,
    *,
    damping: float | None = None,
    tolerance: float = 1e-10,
    reduce: Callable[[Tensor], Tensor] = _identity,
) -> Tensor:
    r"""(H + δI)⁻¹ G for a linear last layer under cross-entropy, by conjugate gradients on its stored inputs.

    .. math:: H V = \frac{1}{N} \sum_i \left(\operatorname{diag} p_i - p_i p_i^\top\right) V [h_i, 1] [h_i, 1]^\top

    This is the exact Hessian of the mean cross-entropy by that layer, whatever the labels. The network does not run.

    Args:
        logits: The layer's outputs on this process's share of the training samples.
        features: :math:`h_i`, its inputs.
        gradient: G, as of :func:`last_layer_gradient`, with a last column for the bias or without.
        damping: δ, positive; None is a tenth of the mean eigenvalue of H.
        tolerance: Where to stop: the residual's size, relative to G's.
        reduce: Sums a tensor over the processes.

    Shapes:
        ``logits``: (N, C), ``features``: (N, D), ``gradient``: (C, D + 1) or (C, D). Returns the shape of G.

    Raises:
        ValueError: If the damping is not positive.
        RuntimeError: If it does not converge.
    """
    if damping is not None and not 0 < damping < math.inf:
        raise ValueError(f"damping must be positive, got {damping}: None is a tenth of the mean eigenvalue")
    inputs = features if gradient.shape[1] == features.shape[1] else _with_one(features)
    inputs, probabilities = inputs.double(), logits.double().softmax(-1)
    total, size = gradient.double(), reduce(torch.tensor(len(inputs), device=inputs.device)).item()
    surest = probabilities.argmax(1, keepdim=True)  # of which 1 - p, and differences of products with p, would cancel
    if damping is None:
        others = probabilities.scatter(1, surest, 0.0).sum(1, keepdim=True)
        spread = probabilities * (1 - probabilities).scatter(1, surest, others)  # the diagonal of each sample's block
        trace = reduce((spread.sum(1) * inputs.square().sum(1)).sum()).item() / size
        damping = 0.1 * trace / total.numel() or 1.0

    def product(direction: Tensor) -> Tensor:
        along = inputs @ direction.T
        along = along - along.gather(1, surest)
        along = probabilities * (along - (probabilities * along).sum(1, keepdim=True))
        return reduce(along.T @ inputs) / size + damping * direction

    solution, residual = torch.zeros_like(total), total
    direction, remaining = residual, residual.square().sum()
    goal = tolerance**2 * remaining
    for _ in range(10 * total.numel()):
        if remaining <= goal:
            return solution.to(gradient)
        moved = product(direction)
        step = remaining / (direction * moved).sum()
        solution, residual = solution + step * direction, residual - step * moved
        before, remaining = remaining, residual.square().sum()
        direction = residual + remaining / before * direction
    raise RuntimeError(f"conjugate gradients do not converge with damping {damping:.3g}: raise it")


class _AsDataset(Dataset):
    """Batches as the rows of a data set that is read in order."""

    def __init__(self, batches: Batches):
        self.batches = batches
        self.length = sum(1 for _ in batches())

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Batch:
        if i == 0:
            self.remaining = iter(self.batches())
        return next(self.remaining)


def _is_covered(module: nn.Module) -> bool:
    plain = type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1)
    return plain and module.weight.requires_grad


def ekfac_influence(
    model: nn.Module,
    train_loss: Callable[[nn.Module, Batch], Tensor],
    validation_loss: Callable[[nn.Module, Batch], Tensor],
    train_batches: Batches,
    validation_batches: Batches,
    *,
    damping: float | None = None,
) -> Tensor:
    r"""Influence with an eigenvalue-corrected Kronecker approximation of the curvature (EK-FAC), by Kronfluence.

    .. math:: \varphi_i = -g_{val}^\top (F + \delta I)^{-1} g_i

    F, block by block for each layer, approximates the Fisher matrix: the mean outer product of cross-entropy
    gradients with labels drawn from the student's own predictions (the draws are seeded). It is the Gauss-Newton
    matrix of cross-entropy, and of distillation at temperature 1.

    Covered are the trainable ``nn.Linear`` and ``nn.Conv2d`` modules, bias included. Left out, as if frozen, are all
    others: normalisation layers, embeddings, class tokens, subclasses of the two, and grouped convolutions, for which
    Kronfluence averages the groups' inputs. Works on a copy of the model, in float32, and in a temporary folder.

    Args:
        model: The student.
        train_loss: (model, batch) -> (B,) losses of the training samples, by running the model that it is given.
        validation_loss: The same for the validation risk.
        train_batches: All training data; a mapping of tensors a batch.
        validation_batches: All validation data.
        damping: δ; None is a tenth of the mean eigenvalue, layer by layer.

    Shapes:
        Returns (N,), in the order of the batches: negative helps.

    Raises:
        ImportError: If Kronfluence is not installed.
        RuntimeError: If there are several processes.
        ValueError: If no layer is covered, damping is negative, or the student has one output.

    Source: Grosse et al. 2023, "Studying Large Language Model Generalization with Influence Functions", arXiv
    2308.03296; github.com/pomonam/kronfluence.
    """
    try:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
        from kronfluence.task import Task
        from kronfluence.utils.dataset import DataLoaderKwargs
    except ImportError as error:
        raise ImportError('EK-FAC works by Kronfluence: pip install "hfkd[influence]"') from error
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if torch.distributed.get_world_size() > 1:
            raise RuntimeError('EK-FAC runs in one process: launch one, or use LiSSA (hessian="lissa")')
    if damping is not None and not 0 <= damping < math.inf:
        raise ValueError(f"damping must not be negative, got {damping}: None chooses it layer by layer")
    covered = [name for name, module in model.named_modules() if _is_covered(module)]
    if not covered:
        raise ValueError(
            f"{type(model).__name__} has no trainable nn.Linear or nn.Conv2d module, which is all that EK-FAC covers"
        )

    class Influence(Task):
        validated = 0

        def compute_train_loss(self, batch, model, sample=False):
            if not sample:
                return train_loss(model, batch).sum()
            logits = run_model(model, batch).logits
            if logits.shape[-1] == 1:
                raise ValueError("EK-FAC draws labels from the student's predictions, and it has one output")
            drawn = logits.detach().softmax(-1).multinomial(1)[:, 0]
            return F.cross_entropy(logits, drawn, reduction="sum")

        def compute_measurement(self, batch, model):
            losses = validation_loss(model, batch)
            self.validated += len(losses)
            return losses.sum()

        def get_influence_tracked_modules(self):
            return covered

        def get_attention_mask(self, batch):
            return batch.get("attention_mask")

    device, task = next(model.parameters()).device, Influence()
    train, validation = _AsDataset(train_batches), _AsDataset(validation_batches)
    loading = DataLoaderKwargs(collate_fn=lambda rows: rows[0])  # a row of theirs is a whole batch
    with (
        tempfile.TemporaryDirectory() as folder,
        torch.enable_grad(),
        torch.random.fork_rng(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", FutureWarning)  # Kronfluence's GradScaler
        torch.manual_seed(0)
        prepared = prepare_model(copy.deepcopy(model).float(), task)
        analyzer = Analyzer(
            "influence", prepared, task, cpu=device.type == "cpu", disable_tqdm=True, output_dir=folder
        )
        analyzer.fit_all_factors(
            "ekfac",
            train,
            per_device_batch_size=1,
            dataloader_kwargs=loading,
            factor_args=FactorArguments(covariance_max_examples=None, lambda_max_examples=None),
        )
        analyzer.compute_pairwise_scores(
            "scores",
            "ekfac",
            validation,
            train,
            per_device_query_batch_size=1,
            per_device_train_batch_size=1,
            dataloader_kwargs=loading,
            score_args=ScoreArguments(damping_factor=damping, aggregate_query_gradients=True),
        )
        scores = analyzer.load_pairwise_scores("scores")
    return -scores["all_modules"][0].to(device) / task.validated
