"""One way to name a model: ours, timm's, a weights file, a folder, a Hub id."""

import contextlib
import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import timm
import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)
from transformers.conversion_mapping import get_model_conversion_mapping

from hfkd.hub import remedy_for
from hfkd.labels import align_labels, named_labels
from hfkd.models.cut import reorder_head
from hfkd.models.modeling_cifar import MODEL_NAMES, CifarConfig, CifarForImageClassification, find_architecture


BATCH_COUNT = "num_batches_tracked"  # of BatchNorm: no answer depends on it, and older files lack it
HUB_PREFIX = "hf-hub:"  # timm's, for a Hub id
CIFAR10_LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def load_model(
    name_or_path: str | Path,
    *,
    task: str = "image-classification",
    label_names: Sequence[str] | None = None,
    num_labels: int | None = None,
    pretrained: bool = True,
    refuse_new_head: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **config_overrides,
) -> PreTrainedModel:
    """Load or make a classifier, in evaluation mode and float32.

    For images a name is looked up in this order: a ``.safetensors`` file with a CIFAR ResNet in akamaster's naming,
    one of our own networks (:data:`~hfkd.models.MODEL_NAMES`, always with fresh weights), a timm model, a local
    folder, a Hub id. ``timm/NAME`` or ``timm:NAME`` asks for timm where both have the name, ``./NAME`` for a folder,
    timm's ``hf-hub:OWNER/NAME`` for a Hub id.

    Args:
        name_or_path: What to load.
        task: ``"image-classification"`` or ``"text-classification"``.
        label_names: Class names in label order. Where they are the checkpoint's own in another order, its head follows
            them; otherwise they replace its own, so leave them out for a teacher that has some. A weights file with
            10 classes has CIFAR-10's.
        num_labels: Number of outputs if there are no names; 1 is regression.
        pretrained: Load weights; otherwise start timm and transformers models from random ones.
        refuse_new_head: Accept no randomly initialised weight: what a teacher needs.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Run the modelling code that lies beside the weights.
        **config_overrides: Fields of the model's configuration, such as ``shortcut="A"``; also ``dtype`` for weights
            of transformers and pretrained timm models.

    Returns:
        A plain transformers model: saved, it loads with `AutoModelFor*.from_pretrained` and no hfkd.

    Raises:
        ValueError: If nothing has that name, the labels contradict each other or the file, the weights are damaged or
            no safetensors, or weights would be random although ``refuse_new_head`` is set.

    >>> load_model("resnet20", num_labels=100).num_parameters()
    278324
    """
    auto_classes = {
        "image-classification": AutoModelForImageClassification,
        "text-classification": AutoModelForSequenceClassification,
    }
    if task not in auto_classes:
        raise ValueError(f"unknown task {task!r}: use one of {', '.join(auto_classes)}")
    name = str(name_or_path).removeprefix(HUB_PREFIX)
    is_image = task == "image-classification" and name == str(name_or_path)  # else a Hub id
    is_file = is_image and name.endswith(".safetensors")
    is_ours = is_image and find_architecture(name) is not None
    timm_name = _timm_name(name)
    is_timm = is_image and not is_file and not is_ours and timm.is_model(timm_name)

    if refuse_new_head and (is_ours or not pretrained):
        raise ValueError(
            f"{name!r} would start from random weights: train it first (--train_teacher), "
            "or name a folder, a weights file or a Hub id that has trained ones"
        )
    fields = {**_label_fields(label_names, num_labels), **config_overrides}
    if (is_ours or (is_timm and not pretrained)) and "num_labels" not in fields:
        raise ValueError(f"{name!r} has no classes of its own: pass label_names or num_labels")

    if is_file:
        return _load_cifar_resnet(Path(name), fields, pretrained).eval()
    if is_ours:
        return CifarForImageClassification(CifarConfig(architecture=name, **fields)).eval()
    if is_timm and not pretrained:
        return _make_timm(timm_name, fields).eval()
    if is_timm:
        pretrained_cfg = timm.get_pretrained_cfg(timm_name)
        if pretrained_cfg is None or not pretrained_cfg.hf_hub_id:
            raise ValueError(f"timm has no weights for {timm_name!r} on the Hub: pass pretrained=False to train it")
        name = pretrained_cfg.hf_hub_id

    auto_class = auto_classes[task]
    options = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    # Without dtype transformers keeps the file's, and a student in half precision does not train.
    fields = {"dtype": torch.float32, **fields}
    nowhere = (
        f"cannot load {name_or_path!r}: it is no network of ours ({', '.join(MODEL_NAMES)}), no timm name, "
        "no .safetensors file of a CIFAR ResNet and no local folder, and as a Hub id it could not be read"
    )
    if Path(name).is_dir():
        check_weight_files(name, needed=pretrained)
    else:
        try:
            check_hub_id(name, revision)
        except HFValidationError as error:
            raise ValueError(nowhere) from error
    try:
        if not pretrained:
            config = AutoConfig.from_pretrained(name, **options, **fields)
            model = auto_class.from_config(config, trust_remote_code=trust_remote_code, dtype=config.dtype).eval()
            model.config._commit_hash = None  # a model card takes weights with one for that commit's
            return model
        own_names = None if label_names is None else _own_names(name, options)
        model, info = auto_class.from_pretrained(
            name,
            **options,
            **fields,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:
        remedy = None if Path(name).is_dir() else remedy_for(error)
        if remedy is None and not isinstance(error, (OSError, ValueError, SafetensorError)):
            raise
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{name!r} comes with code of its own, which is not run: pass trust_remote_code=True "
                "(--trust_remote_code) if you trust it"
            ) from error
        if remedy is None and (Path(name).is_dir() or not isinstance(error, OSError)):
            refusal = OSError if isinstance(error, OSError) else ValueError
            raise refusal(
                f"cannot load {name!r} for {task} ({_shortened(error)}): name a model of that kind, whose folder is "
                "whole, as save_pretrained wrote it"
            ) from error
        if is_timm:
            raise ValueError(
                f"the weights of timm's {timm_name!r} could not be downloaded ({remedy or _shortened(error)}): pass "
                "pretrained=False for random ones"
            ) from error
        raise ValueError(f"{nowhere}: {remedy or _shortened(error)}") from error

    fresh = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if refuse_new_head and fresh:
        raise ValueError(
            f"{name!r} has no trained weights of the right shape for {', '.join(fresh)}: "
            "fine-tune it on this task first (--train_teacher)"
        )
    order = None
    with contextlib.suppress(ValueError):  # other classes: the head learns them
        order = align_labels(label_names, own_names, whose=name)
    if order is not None:
        reorder_head(model, order)
    if isinstance(model.config, TimmWrapperConfig) and model.config.model_args is None:
        model.config.model_args = {}  # timm itself reads what is saved, and no null there
    return model


def load_teacher(
    name_or_path: str | Path, *, task: str, may_wait: bool = False, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a trained classifier that is to teach.

    Args:
        name_or_path: As for :func:`load_model`.
        task: Likewise.
        may_wait: Whether an outline will do, on the device ``meta``: of a local folder or weights file
            :class:`~hfkd.DistillationTrainer` loads the weights when somebody asks the teacher; not of an adapter.
        trust_remote_code: As for :func:`load_model`; such a model does not wait.

    Raises:
        ValueError: As :func:`load_model`, which takes no freshly initialised head here.
    """
    name, is_image = str(name_or_path), task == "image-classification"
    is_file = is_image and name.endswith(".safetensors")
    is_network = is_image and not is_file and (find_architecture(name) is not None or timm.is_model(_timm_name(name)))
    lies_here = Path(name).is_file() if is_file else Path(name).is_dir() and not is_network
    is_adapter = Path(name, "adapter_config.json").is_file()  # whose tensors are elsewhere, but for a few
    if may_wait and lies_here and not is_adapter and not trust_remote_code:
        outline = load_outline(name, task=task)
        if outline is not None:
            return outline
    return load_model(name_or_path, task=task, refuse_new_head=True, trust_remote_code=trust_remote_code)


def load_outline(path: str | Path, *, task: str) -> PreTrainedModel | None:
    """A model that lies here without its weights, which have shapes and types but no values.

    Args:
        path: A folder with a ``config.json`` and safetensors files, or the file of a CIFAR ResNet.
        task: As for :func:`load_model`.

    Returns:
        The model on the device ``meta``, or None where :func:`load_model` would not read the same tensors as they are
        in the files: they have other names there, another precision, or one is missing.
    """
    auto_class = {
        "image-classification": AutoModelForImageClassification,
        "text-classification": AutoModelForSequenceClassification,
    }[task]
    try:
        with torch.device("meta"):
            if Path(path).is_file():
                model = CifarForImageClassification(_config_of_cifar_resnet(Path(path), {}))
            else:
                check_weight_files(path)
                # Said, since by default transformers asks on the terminal whether to run the code beside the weights.
                config = AutoConfig.from_pretrained(path, trust_remote_code=False)
                model = auto_class.from_config(config, dtype=torch.float32, trust_remote_code=False)
        own, stored = (
            {name: (tuple(t.shape), t.dtype) for name, t in tensors if not name.endswith(BATCH_COUNT)}
            for tensors in (model.state_dict().items(), stored_tensors(path))
        )
    except (OSError, ValueError, SafetensorError):
        return None  # load_model says what is wrong
    return model.eval() if own == stored else None


def _shortened(error: Exception) -> str:
    """What an error says, in at most two lines: some list all classes of a library."""
    return textwrap.shorten(str(error), 240, placeholder=" …")


def stored_tensors(path: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in a safetensors file, or in those of a folder, one at a time, by name."""
    paths = {}
    for part in [path] if Path(path).is_file() else Path(path).glob("*.safetensors"):
        with _opened(part) as file:
            paths.update(dict.fromkeys(file.keys(), part))
    for name in sorted(paths):
        with _opened(paths[name]) as file:
            yield name, file.get_tensor(name)


def _opened(path: str | Path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): copy or download it again") from error


def check_weight_files(folder: str | Path, *, needed: bool = True) -> None:
    """Refuse a folder whose weights are no safetensors, or whose index names files outside of it.

    Args:
        folder: Of a model or an adapter.
        needed: Whether weights are read at all.
    """
    folder = Path(folder)
    pickles = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl") for path in folder.glob(kind))
    for name in pickles if needed else ():
        kind = next((kind for kind in ("adapter_model", "pytorch_model", "model") if name.startswith(kind)), None)
        if kind and not any(folder.glob(f"{kind.removeprefix('pytorch_')}*.safetensors")):
            raise ValueError(
                f"{folder} holds its weights as a pickle alone ({name}), which can run code when it is read: ask for "
                "safetensors, or convert it where nothing is at stake (from_pretrained, then save_pretrained)"
            )
    for index in folder.glob("*.safetensors.index.json"):
        try:
            names = [*json.loads(index.read_bytes())["weight_map"].values()]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index} is damaged ({type(error).__name__}): copy or download it again") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(
                    f"{index} names {str(name)[:80]!r}, and may only name .safetensors files beside it: do not use it"
                )


def check_hub_id(name: str, revision: str | None = None) -> None:
    """Refuse what is no Hub id (a `HFValidationError`, which is a ValueError) and what could leave the Hub's cache."""
    if "://" in name:  # not repeated, as it may hold a password or a token
        raise ValueError("a URL is no Hub id: pass owner/name, or download it and pass the folder")
    if revision is not None and (".." in revision or revision.startswith("/") or "\\" in revision):
        raise ValueError(f"revision must be a branch, tag or commit, got {revision!r}")
    validate_repo_id(name)


def _timm_name(name: str) -> str:
    return name.removeprefix("timm/").removeprefix("timm:")


def _own_names(name: str, options: dict) -> list[str] | None:
    """A checkpoint's class names; None where it has none."""
    try:
        return named_labels(AutoConfig.from_pretrained(name, **options))
    except (OSError, KeyError):  # an adapter has no configuration, and some have names for other numbers
        return None


def _label_fields(label_names: Sequence[str] | None, num_labels: int | None) -> dict:
    if label_names is not None:
        if num_labels not in (None, len(label_names)):
            raise ValueError(f"num_labels={num_labels} but {len(label_names)} label_names: pass one of the two")
        if len(set(label_names)) < len(label_names):
            raise ValueError(f"label_names has a name twice: {list(label_names)}")
        num_labels = len(label_names)
    if num_labels is None:
        return {}
    fields = {"num_labels": num_labels}
    if num_labels == 1:
        fields["problem_type"] = "regression"
    if label_names is not None:
        fields["id2label"] = dict(enumerate(label_names))
        fields["label2id"] = {name: index for index, name in enumerate(label_names)}
    return fields


def _config_of_cifar_resnet(path: Path, fields: dict) -> CifarConfig:
    if path.with_name("config.json").exists():
        raise ValueError(f"{path} has a config.json beside it: name the folder, so that it is read too")
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path.resolve()}: correct its name")
    with _opened(path) as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    convolutions = [name for name in shapes if re.fullmatch(r"layer\d\.\d+\.conv\d\.weight", name)]
    if not convolutions or not {"conv1.weight", "linear.weight"} <= shapes.keys():
        raise ValueError(
            f"{path} is no CIFAR ResNet in akamaster's naming (conv1, bn1, layer1.0.conv1, ..., linear): "
            "name a folder with a config.json for any other model"
        )
    if len(shapes["linear.weight"]) != 2 or len(shapes["conv1.weight"]) != 4 or 0 in shapes["linear.weight"]:
        raise ValueError(f"{path} has weights of shapes that no CIFAR ResNet has: copy or download it again")
    classes = shapes["linear.weight"][0]
    if fields.get("num_labels", classes) != classes:
        raise ValueError(f"{path} has {classes} classes, not {fields['num_labels']}: leave the labels out, or retrain")
    if "id2label" not in fields:
        fields = _label_fields(CIFAR10_LABELS if classes == 10 else None, classes) | fields

    config = CifarConfig(
        **{
            "architecture": f"resnet{len(convolutions) + 2}" + ("x4" if shapes["conv1.weight"][0] == 32 else ""),
            "shortcut": "B" if any(".shortcut." in name for name in shapes) else "A",
            "image_mean": (0.485, 0.456, 0.406),
            "image_std": (0.229, 0.224, 0.225),
            **fields,
        }
    )
    config.name_or_path = str(path)
    return config


def _load_cifar_resnet(path: Path, fields: dict, pretrained: bool) -> CifarForImageClassification:
    config = _config_of_cifar_resnet(path, fields)
    try:
        with _opened(path) as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        with torch.device("meta"):  # a file of a few bytes can name any number of classes and layers
            expected = CifarForImageClassification(config).state_dict()
        for name, tensor in expected.items():
            if not name.endswith(BATCH_COUNT) and shapes.get(name) != tuple(tensor.shape):
                raise ValueError(f"{name} is {shapes.get(name)} there, and {tuple(tensor.shape)} in such a net")
        model = CifarForImageClassification(config)
        if pretrained:
            model.load_state_dict(load_file(path))
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} looks like a {config.architecture} but does not fit one: {error}") from error
    return model


def _make_timm(name: str, fields: dict) -> TimmWrapperForImageClassification:
    config = TimmWrapperConfig(architecture=name, **{"model_args": {}, **fields})
    network = timm.create_model(name, num_classes=config.num_labels, **config.model_args)
    # AutoImageProcessor reads size and normalisation of a timm model there.
    config.pretrained_cfg = dict(network.pretrained_cfg)
    model = TimmWrapperForImageClassification(config)
    # The wrapper draws every convolution from N(0, 0.02), as transformers does; the literature starts as timm does.
    model.timm_model = network
    # Saved under timm's names, as one that was downloaded is, so that timm can load it too.
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    return model
