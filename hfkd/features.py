"""Running a model on its share of a batch, and capturing inner outputs by module path."""

from __future__ import annotations

import difflib
import functools
import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TimmWrapperForImageClassification

from hfkd.distillers.base import ModelOutputs


# What is said of each token, and so of no other tokens.
OF_TOKENS = ("token_type_ids", "position_ids")


def base_model(model: nn.Module) -> nn.Module:
    """The model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def use_channels_last(model: nn.Module) -> nn.Module:
    """Lay out convolution weights channels last, which convolutions then keep to: 1.3 to 1.5 times faster on a CPU."""
    is_placed = hasattr(model, "hf_device_map")  # by Accelerate, which lets nobody move what is offloaded
    if not is_placed and any(isinstance(module, nn.Conv2d) for module in model.modules()):
        model.to(memory_format=torch.channels_last)
    return model


@functools.cache
def _forward_parameters(model_class: type[nn.Module]) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(model_class.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in kinds and p.name not in ("self", "labels", "return_dict"))


def input_names(model: nn.Module) -> tuple[str, ...]:
    """The inputs that a model's forward names, without labels."""
    return _forward_parameters(type(base_model(model)))


def select_inputs(model: nn.Module, batch: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The part of a batch that a model takes; a column ``prefix + name`` goes before ``name``.

    The student's segments and positions are not those of tokens with the prefix.
    """
    return _select(input_names(model), batch, prefix)


def _select(names: Sequence[str], batch: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    others = OF_TOKENS if prefix and f"{prefix}input_ids" in batch else ()
    inputs = {}
    for name in names:
        if prefix and prefix + name in batch:
            inputs[name] = batch[prefix + name]
        elif name in batch and name not in others:
            inputs[name] = batch[name]
    return inputs


def find_module(model: nn.Module, path: str) -> nn.Module:
    """The submodule at a path.

    Raises:
        ValueError: If there is none; names the nearest paths.
    """
    modules = dict(model.named_modules())
    if path not in modules:
        near = difflib.get_close_matches(path, modules, n=5, cutoff=0.3)
        raise ValueError(
            f"{type(model).__name__} has no module {path!r}; near it are {', '.join(near) or 'none'}. "
            "All paths: [name for name, _ in model.named_modules()]"
        )
    return modules[path]


def linear_heads(model: nn.Module) -> tuple[str, ...]:
    """Paths of the linear layers that have an output for each class, in the order of the modules."""
    model = base_model(model)
    sizes = {name: module.out_features for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return tuple(name for name, size in sizes.items() if size == model.config.num_labels)


def head_path(model: nn.Module) -> str:
    """The path of the linear layer that gives the logits; with ``":input"`` behind it, the penultimate features.

    Raises:
        ValueError: If no linear layer has as many outputs as there are classes.
    """
    heads = linear_heads(model)
    if not heads:
        model = base_model(model)
        raise ValueError(
            f"{type(model).__name__} ends in no linear layer with {model.config.num_labels} outputs: "
            'name the layer yourself, as in student_layers=("head:input",)'
        )
    return heads[-1]


def _is_stem(path: str, module: nn.Module) -> bool:
    """Whether a module is the start of a network, or a normalisation or activation at its end."""
    return path.endswith("stem") or not any(isinstance(part, (nn.Conv2d, nn.Linear)) for part in module.modules())


def _shrinks(module: nn.Module) -> bool:
    kinds = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
    return any(isinstance(part, kinds) and part.stride not in (1, (1, 1)) for part in module.modules())


def stage_paths(model: nn.Module) -> tuple[str, ...]:
    """The ends of a model's stages, first to last: a proposal for methods that compare inner features.

    They are the layers of a transformer encoder; in a convolutional network the last module at each resolution, so
    that VGG-13, MobileNetV2 and ResNet-50 on CIFAR all have four. For timm models it is timm's own choice
    (``feature_info``), without the stem.

    Args:
        model: One of our CIFAR networks, a timm classifier, or a transformers model whose layers or stages are in one
            ``ModuleList``.

    Returns:
        Module paths, whose outputs are the features.

    Raises:
        ValueError: If the model shows no stages.

    >>> from hfkd.models import load_model
    >>> stage_paths(load_model("vgg13", num_labels=10))
    ('layer1', 'layer2', 'layer3', 'layer5')
    """
    model = base_model(model)
    if isinstance(model, TimmWrapperForImageClassification) and getattr(model.timm_model, "feature_info", None):
        paths = [f"timm_model.{info['module']}" for info in model.timm_model.feature_info]
        after_stem = itertools.dropwhile(lambda path: _is_stem(path, model.get_submodule(path)), paths)
        return tuple(after_stem) or tuple(paths)
    paths = [name for name, _ in model.named_children() if re.fullmatch(r"layer\d+", name)]
    if not paths:
        lists = {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
        outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
        if not outer:
            raise ValueError(
                f"{type(model).__name__} shows no stages: name layers yourself, with student_layers= and "
                "teacher_layers=. All paths: [name for name, _ in model.named_modules()]"
            )
        longest = max(outer, key=lists.get)
        paths = [f"{longest}.{i}" for i in range(lists[longest])]
    starts = [_shrinks(model.get_submodule(path)) for path in paths]
    if not any(starts[1:]):
        return tuple(paths)
    return tuple(path for path, next_starts in zip(paths, [*starts[1:], True], strict=True) if next_starts)


def _first_tensor(output) -> Tensor:
    if isinstance(output, Mapping):
        output = tuple(output.values())
    return _first_tensor(output[0]) if isinstance(output, (tuple, list)) else output


class Capture:
    """A model and what passes through some of its modules, collected while the context is open.

    It may be opened again and again. The hooks stay the same ones, since torch.compile, which does not look for new
    ones, must meet at every step those that it has compiled; and it cannot compile putting them there.

    Args:
        model: The model that is run inside the context.
        paths: Module paths; ``"path:input"`` for the module's first input instead of its (first) output.

    Attributes:
        features: What the latest forward pass gave, keyed as in ``paths``.

    Raises:
        ValueError: If a path names no module.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]):
        self.model, self.names = model, input_names(model)
        self.features: dict[str, Tensor] = {}
        self._hooks = [(key, *self._hook(key)) for key in paths]
        self._handles: list[RemovableHandle] = []

    def _hook(self, key: str) -> tuple[nn.Module, Callable]:
        path, _, side = key.partition(":")

        def keep_input(module, args, kwargs):
            self.features[key] = _first_tensor(args or tuple(kwargs.values()))

        def keep_output(module, args, output):
            self.features[key] = _first_tensor(output)

        return find_module(base_model(self.model), path), keep_input if side == "input" else keep_output

    def __enter__(self) -> Capture:
        for key, module, hook in self._hooks:
            if key.endswith(":input"):
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(hook))
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.features.clear()

    def run(self, batch: Mapping[str, Tensor], prefix: str = "") -> ModelOutputs:
        """Run the model on its columns of a batch, inside the context; see :func:`run_model`."""
        logits = self.model(**_select(self.names, batch, prefix)).logits
        return ModelOutputs(logits, features=dict(self.features))


def run_model(
    model: nn.Module, batch: Mapping[str, Tensor], *, layers: Sequence[str] = (), prefix: str = ""
) -> ModelOutputs:
    """Run a model on its columns of a batch.

    Args:
        model: Any model with ``logits`` in its output.
        batch: Columns by name; those the model does not take are left aside.
        layers: Module paths to capture.
        prefix: Columns with this prefix go before those without.

    Returns:
        Logits and features, in the precision of the model.
    """
    with Capture(model, layers) as capture:
        return capture.run(batch, prefix)


def _full_precision(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def in_float32(outputs: ModelOutputs) -> ModelOutputs:
    """The same outputs, half precision widened to float32."""
    features = {name: _full_precision(feature) for name, feature in outputs.features.items()}
    return replace(outputs, logits=_full_precision(outputs.logits), features=features)


def is_outline(model: nn.Module) -> bool:
    """Whether a model has no weights yet. One that Accelerate offloaded has them, and brings them when it is asked."""
    return next(model.parameters()).is_meta and not hasattr(model, "_hf_hook")


def at_model(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch on the device of a model's weights."""
    device = next(model.parameters()).device
    if device.type == "meta":  # offloaded: Accelerate moves weights and inputs alike
        return dict(batch)
    return {name: column.to(device) if isinstance(column, Tensor) else column for name, column in batch.items()}


def in_precision_of(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch with its floats in the precision of a model's parameters, to run it without autocast."""
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return {name: column.to(dtype) if column.is_floating_point() else column for name, column in batch.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode without gradient, and leave it and the random numbers as they were.

    A loader draws from torch's global generator even where it does not shuffle; its draws count as these here.
    """
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), torch.random.fork_rng():
            model.eval()
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def probe(model: nn.Module, batch: Mapping[str, Tensor], layers: Sequence[str], prefix: str = "") -> dict[str, Tensor]:
    """Features of a batch by path, as a run would capture them, to learn their shapes; see :func:`try_out`."""
    return try_out(model, batch, layers=layers, prefix=prefix).features


def try_out(
    model: nn.Module, batch: Mapping[str, Tensor], *, layers: Sequence[str] = (), prefix: str = ""
) -> ModelOutputs:
    """Outputs for a batch as a run would see them.

    The model runs in evaluation mode and is left as it was: no statistics move and no random numbers are drawn.

    Args:
        model: What to run.
        batch: A few samples.
        layers: Module paths to capture.
        prefix: Columns with this prefix go before those without.

    Returns:
        Logits and features, float32 where the model is in half precision.
    """
    with evaluating(model):
        inputs = in_precision_of(model, at_model(model, select_inputs(model, batch, prefix)))
        return in_float32(run_model(model, inputs, layers=layers, prefix=prefix))


def collect(
    run: Callable[[Mapping[str, Tensor]], ModelOutputs], batches: Iterable[Mapping[str, Tensor]], layer: str
) -> dict[str, Tensor]:
    """What a model says about all samples of some batches, one after the other.

    Args:
        run: Gives outputs of a batch, with the layer captured.
        batches: With a column ``labels`` and perhaps ``index``.
        layer: Whose features to keep.

    Returns:
        ``features`` (N, …), ``logits`` (N, C), ``labels`` (N,), and ``index`` (N,) where there is one.
    """
    parts = []
    for batch in batches:
        outputs = in_float32(run(batch))
        columns = {name: batch[name] for name in ("labels", "index") if name in batch}
        parts.append({"features": outputs.features[layer], "logits": outputs.logits, **columns})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def dataset_features(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], layer: str | None = None, prefix: str = ""
) -> tuple[Tensor, Tensor]:
    """Features and labels of a whole data set, such as for :func:`hfkd.metrics.compactness`.

    Args:
        model: Runs in evaluation mode, and is left as it was.
        batches: On the model's device, such as ``trainer.context.batches(dataset)`` or a loader with a
            :class:`~hfkd.data.DistillationCollator`.
        layer: Module path, ``"path:input"`` for a module's input; by default the input of the classifier.
        prefix: Columns with this prefix go before those without: ``"teacher_"`` for a teacher.

    Returns:
        (N, …) and (N,).
    """
    layer = layer or f"{head_path(model)}:input"
    with evaluating(model):
        columns = collect(lambda batch: run_model(model, batch, layers=(layer,), prefix=prefix), batches, layer)
    return columns["features"], columns["labels"]


def detached(outputs: ModelOutputs) -> ModelOutputs:
    """The same outputs without gradient."""
    task_logits = None if outputs.task_logits is None else outputs.task_logits.detach()
    features = {name: feature.detach() for name, feature in outputs.features.items()}
    return ModelOutputs(outputs.logits.detach(), task_logits, features)
