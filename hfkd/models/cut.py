"""Students cut out of a transformer teacher."""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from hfkd.labels import align_labels, named_labels


MODEL_TYPES = ("bert", "distilbert", "roberta", "vit", "deit")


def student_from_teacher(
    teacher: PreTrainedModel,
    *,
    num_layers: int | None = None,
    layers: Sequence[int] | None = None,
    label_names: Sequence[str] | None = None,
) -> PreTrainedModel:
    r"""Make a student of the teacher's class from some of its layers.

    Embeddings, pooler and head are copied whole, layers one by one. Of :math:`L` teacher layers, ``num_layers`` takes
    :math:`n` evenly spaced ones that include the first and the last (one layer is the first):

    .. math:: l_i = \lfloor i \, (L - 1) / (n - 1) \rfloor, \quad i = 0, \dots, n - 1

    Args:
        teacher: A BERT, DistilBERT, RoBERTa, ViT or DeiT model with any head.
        num_layers: How many layers the student has.
        layers: Which teacher layers they are, counted from 0 and rising, instead of ``num_layers``.
        label_names: Class names in the order of the student's data; the head is reordered where the teacher's differs.
            Numbers from 0, in that order, leave the teacher's names.

    Returns:
        A model with weights of its own, on the CPU, in evaluation mode and the teacher's dtype.

    Raises:
        ValueError: If the architecture is another, the layers are not the teacher's, or the classes are others.

    Source: Sanh et al. 2019, "DistilBERT", arXiv 1910.01108, section 3 (every second layer of the teacher).

    >>> from transformers import BertConfig, BertModel
    >>> config = BertConfig(hidden_size=8, num_attention_heads=2, intermediate_size=8, num_hidden_layers=6)
    >>> student = student_from_teacher(BertModel(config), num_layers=2)  # the layers 0 and 5
    >>> student.config.num_hidden_layers
    2
    """
    config = copy.deepcopy(teacher.config)
    if config.model_type not in MODEL_TYPES:
        raise ValueError(
            f"no student can be cut out of a {config.model_type!r} teacher, only of {', '.join(MODEL_TYPES)}: "
            "name a smaller model instead"
        )
    depth = config.num_hidden_layers
    if (num_layers is None) == (layers is None):
        raise ValueError("pass either num_layers or layers")
    if layers is None:
        if not 1 <= num_layers <= depth:
            raise ValueError(f"num_layers must lie between 1 and the teacher's {depth}, got {num_layers}")
        layers = [i * (depth - 1) // max(num_layers - 1, 1) for i in range(num_layers)]
    layers = list(layers)
    if not layers or layers != sorted({*layers} & {*range(depth)}):
        raise ValueError(f"layers must be rising numbers from 0 to {depth - 1}, each once, got {layers}")

    # Found by its length: transformers moves this list between versions.
    (path,) = (
        name for name, module in teacher.named_modules() if isinstance(module, nn.ModuleList) and len(module) == depth
    )
    prefix = f"{path}."
    state = {}
    for key, tensor in teacher.state_dict().items():
        if not key.startswith(prefix):
            state[key] = tensor
            continue
        index, rest = key.removeprefix(prefix).split(".", 1)
        if int(index) in layers:
            state[f"{prefix}{layers.index(int(index))}.{rest}"] = tensor

    config.num_hidden_layers = len(layers)
    student = type(teacher)(config).to(teacher.dtype)
    student.load_state_dict(state)
    if label_names is not None:
        _name_classes(student, label_names)
    return student.eval()


def _name_classes(student: PreTrainedModel, label_names: Sequence[str]) -> None:
    if len(label_names) != student.config.num_labels:
        raise ValueError(f"the teacher has {student.config.num_labels} classes, the data {len(label_names)}")
    names, numbers = named_labels(student.config), [str(i) for i in range(len(label_names))]
    if list(label_names) == numbers and names is not None and {*names} != {*numbers}:
        return  # a file has numbers where the teacher has names
    order = align_labels(label_names, names, whose="the teacher")
    if order is not None:
        reorder_head(student, order)
    student.config.id2label = dict(enumerate(label_names))
    student.config.label2id = {name: i for i, name in enumerate(label_names)}


def reorder_head(model: PreTrainedModel, order: Sequence[int]) -> None:
    """Let output i of a classifier be what its output ``order[i]`` was.

    Raises:
        ValueError: If no layer has so many outputs.
    """
    layers = [
        (name.count("."), module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and len(module.weight) == len(order)
    ]
    if not layers:
        raise ValueError(
            f"no layer of {type(model).__name__} has {len(order)} outputs, so that its head cannot be reordered: name "
            "the classes in its own order"
        )
    depth, last = layers[-1]
    shape = last.weight.shape
    for level, layer in layers:
        # A distilled DeiT or LeViT has two heads; a square layer beside the head is one before it.
        if layer is last or (level == depth and layer.weight.shape == shape and shape[0] != shape[1]):
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.copy_(parameter[order])
