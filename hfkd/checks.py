"""What is checked before a run starts, so that a mistake costs a message and not an afternoon."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, StateDictType
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset
from transformers import (
    BaseImageProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN

from hfkd.data import ImageDataset
from hfkd.data.task_data import TEACHER_COLUMNS, TaskData
from hfkd.distillers.base import IGNORE_INDEX, Distiller
from hfkd.features import at_model, base_model, input_names, select_inputs, try_out
from hfkd.labels import LABEL_COLUMNS, align_labels, head_looks_new, label_column, named_labels
from hfkd.teacher import TeacherEnsemble, members_of


def check_student(model: nn.Module) -> None:
    """Refuse a student of another type."""
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise TypeError(
            f"the student must be a PreTrainedModel, got {type(model).__name__}: pass model=load_model(name, "
            "label_names=...)"
        )
    half = {p.dtype for p in model.parameters() if p.requires_grad} & {torch.float16, torch.bfloat16}
    if half:
        warnings.warn(
            f"the student's weights are {', '.join(map(str, half))}, which small steps do not move: load it with "
            "dtype=torch.float32, and for speed pass bf16=True",
            UserWarning,
            stacklevel=3,
        )


def check_method(distiller: Distiller, teacher: nn.Module | str | os.PathLike | None) -> None:
    """Refuse what is no method, and a teacher that the method would not ask."""
    if not isinstance(distiller, Distiller):
        raise TypeError(f"distiller must be a Distiller, got {type(distiller).__name__}: pass KD(), not its name")
    if teacher is not None and not distiller.needs_teacher:
        raise ValueError(f"{type(distiller).__name__} uses no teacher: leave out teacher_model, or choose KD()")


def check_arguments(args: TrainingArguments, eval_dataset: Dataset | Mapping | None) -> None:
    """Refuse arguments of another type, and what transformers would stumble over later."""
    if not isinstance(args, TrainingArguments):
        raise TypeError(
            f"args must be DistillationTrainingArguments, got {type(args).__name__}: pass "
            "DistillationTrainingArguments(output_dir, ...)"
        )
    if eval_dataset is None and args.eval_strategy != "no":
        raise ValueError(
            f'eval_strategy is "{args.eval_strategy.value}", and there is no eval_dataset: pass one (in the examples: '
            '--validation_fraction 0.1), or set eval_strategy to "no"'
        )
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name):
            raise ValueError(
                f"{name} turns the student itself into half precision, as which it would then be saved: drop it, and "
                f"evaluation has the precision of training ({name[:4]}=True: half, with weights in float32)"
            )
    if os.path.isfile(args.output_dir):
        raise FileExistsError(f"output_dir {args.output_dir} is a file: name a folder, which may be a new one")


def check_dataset(dataset: Dataset | None, which: str) -> None:
    """Refuse what is no data set, and one without rows."""
    if isinstance(dataset, (str, os.PathLike, Mapping, TaskData)):
        raise TypeError(
            f"the {which} set is a {type(dataset).__name__}: pass one split of a data set, such as "
            'load_dataset(...)["train"] or load_image_data(...).train'
        )
    if dataset is not None and not isinstance(dataset, IterableDataset) and not len(dataset):
        raise ValueError(f"the {which} set is empty: check what was filtered or cut off, or pass None")


def check_inputs(
    model: nn.Module, batch: Mapping[str, Tensor], dataset: Dataset, whose: str, prefix: str = ""
) -> None:
    """Refuse a training set that a model cannot read, by showing it the first samples."""
    inputs = at_model(model, select_inputs(model, batch, prefix))
    if not inputs:
        columns = columns_of(innermost(dataset))
        raise ValueError(
            f"{whose} takes {', '.join(input_names(model)[:4])}, …, and the training set has {', '.join(columns)}: "
            "pass it through hfkd.data.tokenize or hfkd.data.ImageDataset"
        )
    try:
        try_out(model, inputs)
    except Exception as error:
        shapes = ", ".join(f"{name} {tuple(column.shape)} {column.dtype}" for name, column in inputs.items())
        raise ValueError(
            f"{whose} ({type(base_model(model)).__name__}) cannot read the first training samples ({shapes}): "
            f"{error}. Make them with its own tokenizer or image processor"
        ) from error


def check_tokens(dataset: Dataset | None, which: str, model: nn.Module, whose: str, prefix: str = "") -> None:
    """Refuse token ids beyond a model's vocabulary and sequences beyond its positions, in whichever row they are."""
    inner = innermost(dataset)
    if not isinstance(inner, datasets.Dataset) or "input_ids" not in input_names(model):
        return
    column = next((name for name in (f"{prefix}input_ids", "input_ids") if name in inner.column_names), None)
    if column is None or not len(inner):
        return
    tokens = inner.with_format("arrow", columns=[column])[:].column(column)
    highest = pyarrow.compute.max(pyarrow.compute.list_flatten(tokens)).as_py()
    words = base_model(model).get_input_embeddings().num_embeddings
    if highest is not None and highest >= words:
        raise ValueError(
            f"{column} of the {which} set go up to {highest}, and {whose} knows tokens 0 to {words - 1}: tokenise "
            "with its own tokenizer (two of them: hfkd.data.tokenize(data, tokenizer, teacher_tokenizer=...))"
        )
    longest = pyarrow.compute.max(pyarrow.compute.list_value_length(tokens)).as_py()
    for name, module in model.named_modules():
        if name.endswith(".position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa's positions start behind its padding.
            room = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
            if longest > room:
                raise ValueError(
                    f"a text of the {which} set has {longest} tokens, and {whose} has room for {room}: tokenise with "
                    f"max_length={room}"
                )


def first_tokens(dataset: Dataset | None) -> Mapping[str, Sequence]:
    """The tokens of the first rows of a ``datasets.Dataset``; nothing of others."""
    inner = innermost(dataset)
    names = inner.column_names if isinstance(inner, datasets.Dataset) else []
    names = [name for name in ("input_ids", "teacher_input_ids") if name in names]
    return inner.select_columns(names)[:1000] if names else {}


def check_tokenizers(
    rows: Mapping[str, Any], student: object, teacher: object, student_model: nn.Module, teacher_model: nn.Module
) -> None:
    """Refuse a teacher that would read another tokenizer's numbers for its own; warn where nobody can tell.

    Args:
        rows: Some of the training set, by column.
        student: The student's tokenizer; of anything else nothing is known.
        teacher: Likewise.
        student_model: The student.
        teacher_model: The teacher.
    """
    if "input_ids" not in rows or "teacher_input_ids" in rows or "input_ids" not in input_names(teacher_model):
        return
    if isinstance(student, PreTrainedTokenizerBase) and isinstance(teacher, PreTrainedTokenizerBase):
        seen = sorted({int(token) for row in rows["input_ids"] for token in row})
        words = zip(*(tokenizer.convert_ids_to_tokens(seen) for tokenizer in (student, teacher)), strict=True)
        for token, (own, other) in zip(seen, words, strict=True):
            if own != other:
                raise ValueError(
                    f"the tokenizers differ (token {token} is {own!r} to the student's, {other!r} to the teacher's) "
                    "and the training set has no teacher_input_ids: make them with hfkd.data.tokenize(data, "
                    "tokenizer, teacher_tokenizer=...)"
                )
        return
    own, other = (base_model(model).get_input_embeddings().num_embeddings for model in (student_model, teacher_model))
    if own != other:
        warnings.warn(
            f"the student knows {own} tokens and the teacher {other}, and both read input_ids: where they have "
            "tokenizers of their own, pass hfkd.data.tokenize(data, tokenizer, teacher_tokenizer=...)",
            UserWarning,
            stacklevel=2,
        )


def check_teacher_columns(dataset: Dataset | None, others: Mapping[str, Dataset | None]) -> None:
    """Refuse an evaluation set without the teacher's tokens, where the training set has them."""
    inner = innermost(dataset)
    if not isinstance(inner, datasets.Dataset) or "teacher_input_ids" not in inner.column_names:
        return
    for which, other in others.items():
        other = innermost(other)
        if isinstance(other, datasets.Dataset) and "teacher_input_ids" not in other.column_names:
            raise ValueError(
                f"the {which} set lacks teacher_input_ids, which the train set has, so that the teacher would read "
                "the student's tokens there: make both by hfkd.data.tokenize(data, tokenizer, teacher_tokenizer=...)"
            )


def check_image_processor(dataset: Dataset | None, processor: object) -> None:
    """Refuse a teacher's image processor by which its images are not made."""
    inner = innermost(dataset)
    if isinstance(processor, BaseImageProcessor) and isinstance(inner, ImageDataset) and not inner.suits(processor):
        raise ValueError(
            "teacher_processing_class makes other images than the teacher gets from the train set: pass it as "
            "ImageDataset(..., teacher_processor=...), for the evaluation set too"
        )


def problem_type_of(model: nn.Module) -> str:
    """``"single_label"`` or ``"regression"``, from the student's configuration.

    Raises:
        ValueError: For multi-label models and for regression with several outputs, which no method is defined for.
    """
    if model.config.problem_type == "multi_label_classification":
        raise ValueError("multi-label models are not supported: a sample has one class, or one number")
    if model.config.problem_type == "regression" and model.config.num_labels > 1:
        raise ValueError("regression with several outputs is not supported: give the student num_labels=1")
    return "regression" if model.config.num_labels == 1 else "single_label"


def dataset_labels(dataset: Dataset | None, label_names: Sequence[str] = ()) -> np.ndarray | None:
    """The labels of a data set without running its transforms, or None where they cannot be had so.

    Of a ``datasets.Dataset`` they are a column, of any other an attribute of the column's name.

    Args:
        dataset: Of any kind.
        label_names: See :func:`hfkd.labels.label_column`.
    """
    if isinstance(dataset, datasets.Dataset):
        name = label_column(dataset.column_names, label_names)
        return None if name is None else np.asarray(dataset.with_format("numpy")[name][:])
    if isinstance(dataset, Subset):
        labels = dataset_labels(dataset.dataset, label_names)
        return None if labels is None else labels[list(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        parts = [dataset_labels(part, label_names) for part in dataset.datasets]
        return None if any(part is None for part in parts) else np.concatenate(parts)
    name = None
    if label_names and dataset is not None and not isinstance(dataset, IterableDataset):
        name = label_column(columns_of(dataset), label_names)
    labels = getattr(dataset, name or "labels", None)
    return None if labels is None else np.asarray(labels)


def longest_first(dataset: Dataset) -> np.ndarray | None:
    """The rows of a set of texts, those of most tokens first, so that batches hold little padding.

    None where that cannot be had without running transforms, or the rows are no lists of tokens.
    """
    if isinstance(dataset, Subset):
        if (order := longest_first(dataset.dataset)) is None:
            return None
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        return np.argsort(place[list(dataset.indices)])
    if not isinstance(dataset, datasets.Dataset) or dataset.format["type"] == "custom":
        return None
    if not isinstance(dataset.features.get("input_ids"), (datasets.List, datasets.LargeList)):
        return None
    tables = dataset.select_columns("input_ids").with_format("arrow").iter(batch_size=10_000)
    counts = [table["input_ids"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False) for table in tables]
    return np.argsort(-np.concatenate(counts), kind="stable") if counts else None


def innermost(dataset: Dataset | None) -> Dataset | None:
    """The data set that subsets are of."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


def set_epoch(dataset: Dataset | None, epoch: int) -> None:
    """Tell a data set and those that it is made of, subsets, wrappers and concatenations through, what epoch it is."""
    for part in dataset.datasets if isinstance(dataset, ConcatDataset) else [getattr(dataset, "dataset", None)]:
        if part is not None:
            set_epoch(part, epoch)
    # Last: a wrapper may count the epochs of what it wraps in its own way.
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(epoch)


def columns_of(dataset: Dataset) -> list[str]:
    """The names of a data set's columns; where it does not tell them, those of its first sample."""
    names = getattr(dataset, "column_names", None)
    return names if isinstance(names, list) else list(dataset[0])


def dataset_index(dataset: Dataset, start: int = 0) -> np.ndarray:
    """The column ``index`` of a data set without running its transforms; start, … where it does not show one."""
    if isinstance(dataset, datasets.Dataset):
        return np.asarray(dataset.with_format("numpy")["index"][:], np.int64)  # as a batch will hold it
    if isinstance(dataset, Subset):
        return dataset_index(dataset.dataset)[list(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        starts = [start, *(start + size for size in dataset.cumulative_sizes[:-1])]
        return np.concatenate([dataset_index(*part) for part in zip(dataset.datasets, starts, strict=True)])
    return np.asarray(getattr(dataset, "index", np.arange(start, start + len(dataset))))


def class_names(dataset: Dataset | None, label_names: Sequence[str] = ()) -> list[str] | None:
    """The names of a data set's classes in the order of its labels, or None where it tells none.

    Raises:
        ValueError: If the parts of a concatenated set do not agree.
    """
    dataset = innermost(dataset)
    if isinstance(dataset, ConcatDataset):
        named = [names for part in dataset.datasets if (names := class_names(part, label_names))]
        if any(names != named[0] for names in named):
            raise ValueError(
                f"the parts of a concatenated set number the classes otherwise ({named}): cast their label columns to "
                "one ClassLabel"
            )
        return named[0] if named else None
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        return getattr(dataset, "label_names", None)
    features = dataset.features or {}  # a stream may not know them
    feature = features.get(label_column(features, label_names))
    return feature.names if isinstance(feature, datasets.ClassLabel) else None


def check_label_names(dataset: Dataset | None, which: str, label_names: Sequence[str] | None) -> None:
    """Refuse ``label_names`` of the arguments that name no column, where another one would be taken for the labels."""
    inner = innermost(dataset)
    if not label_names or {*label_names} & {*LABEL_COLUMNS} or inner is None or isinstance(inner, IterableDataset):
        return
    columns = columns_of(inner)
    if label_column(columns) and not {*label_names} & {*columns}:
        raise ValueError(
            f"label_names={label_names}, and the {which} set has no such column, only {', '.join(columns)}: correct "
            "it, or rename the column that holds the labels"
        )


def check_labels(
    dataset: Dataset, which: str, config: PretrainedConfig, problem_type: str, label_names: Sequence[str] = ()
) -> None:
    """Refuse labels that are no class of the student, or are its classes in another order.

    -100 (unlabelled) is fine everywhere, and -1 (the hidden labels of a benchmark's test set) off training.
    """
    labels = dataset_labels(dataset, label_names)
    if labels is None:
        return
    num_labels = config.num_labels
    if labels.dtype.kind not in "biuf":
        raise ValueError(f"labels of the {which} set are {labels.dtype}, not numbers: map them to class indices first")
    if labels.ndim > 1:
        if labels[0].size != num_labels:
            raise ValueError(
                f"labels of the {which} set are {labels[0].size} numbers a sample, and the student has {num_labels} "
                "classes: give one class index a sample, or one probability a class"
            )
        if problem_type != "regression":
            check_probabilities(labels, f"labels of the {which} set")
        return
    labels = labels[labels != IGNORE_INDEX]
    if which == "train" and len(labels) > 1 and (labels == labels[0]).all():
        raise ValueError(
            f"all {len(labels)} labels of the train set are {labels[0]}, from which nothing is learnt: look at how it "
            "was filtered or cut (a sorted file needs shuffling first), or set them to -100"
        )
    if problem_type == "regression":
        if names := class_names(dataset, label_names):
            raise ValueError(
                f"the {which} set has classes ({names[:5]}), and the student has one output, which is regression: "
                f"give it num_labels={len(names)}"
            )
        if not np.isfinite(labels.astype(np.float64)).all():
            raise ValueError(f"labels of the {which} set hold NaN or infinity: remove those rows or set them to -100")
        return
    if which != "train":
        labels = labels[labels != -1]
    if np.isnan(labels.astype(np.float64)).any():
        raise ValueError(f"labels of the {which} set have empty cells: set them to -100 for unlabelled samples")
    wrong = np.unique(labels[(labels < 0) | (labels >= num_labels) | (labels % 1 != 0)])
    if len(wrong):
        raise ValueError(
            f"labels of the {which} set hold {wrong[:5].tolist()}, but the student has {num_labels} classes, 0 to "
            f"{num_labels - 1}: give the student num_labels={int(max(wrong.max() + 1, num_labels))}, or correct the "
            "labels (-100 marks an unlabelled sample)"
        )
    names = class_names(dataset, label_names)
    if align_labels(named_labels(config), names, whose=f"the {which} set") is not None:
        raise ValueError(
            f"the {which} set numbers the classes as {names[:5]}…, and the student as {named_labels(config)[:5]}…: "
            "build the student with id2label in the data set's order"
        )


def check_probabilities(labels: np.ndarray, whose: str) -> None:
    """Refuse soft labels (N, C) that are no distributions over the classes, such as those of a multi-label problem."""
    labels = labels.astype(np.float64)
    wrong = np.flatnonzero(~((labels >= 0).all(1) & (np.abs(labels.sum(1) - 1) <= 0.01)))
    if len(wrong):
        raise ValueError(
            f"{whose} have a number for each class, and those of row {wrong[0]} ({labels[wrong[0]].tolist()[:5]}) are "
            f"no probabilities that add up to 1 (nor are {len(wrong) - 1} more): several classes a sample are not "
            "supported; where some have no label, give class indices, of which -100 means that"
        )


def check_columns(dataset: Dataset | None, distiller: Distiller) -> None:
    """Refuse a training set that lacks a column the distiller asks for."""
    if dataset is None or not distiller.batch_columns:
        return
    name = type(distiller).__name__
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"{name} looks samples up by {', '.join(distiller.batch_columns)}, and an IterableDataset has no fixed "
            "rows: use a map-style dataset"
        )
    columns = columns_of(dataset)
    if "index" in columns and "index" in distiller.batch_columns:
        index, counts = np.unique(dataset_index(dataset), return_counts=True)
        if len(counts) and counts.max() > 1:
            raise ValueError(
                f"{counts.max()} training samples have the number {index[counts.argmax()]} in the column index, by "
                f"which {name} tells them apart: give every row a number of its own"
            )
    if missing := [column for column in distiller.batch_columns if column not in columns]:
        remedy = 'add it with dataset.add_column("index", list(range(len(dataset))))' if "index" in missing else ""
        raise ValueError(
            f"the training set has no column {', '.join(missing)}, which {name} needs: {remedy or 'add it'}"
        )


def check_teacher(
    teacher: nn.Module,
    student: nn.Module,
    distiller: Distiller,
    whose: str = "the teacher",
    data_names: Sequence[str] | None = None,
) -> list[int] | None:
    """Refuse a teacher of other classes or with a fresh head; ``whose`` names it in the message.

    A student whose classes have no names has those of its data, ``data_names``.

    Returns:
        For each of the student's classes the teacher's index of it; None where the orders agree.
    """
    if teacher is student:
        raise ValueError(f"{whose} and the student are the same object: pass copy.deepcopy(student) as the teacher")
    own = {id(parameter) for parameter in student.parameters()}
    if not isinstance(teacher, nn.Module):
        raise TypeError(
            f"{whose} must be a PreTrainedModel, or its name, got {type(teacher).__name__}: pass load_model(name)"
        )
    if any(id(parameter) in own for parameter in teacher.parameters()):
        raise ValueError(
            f"{whose} and the student share weights, which cannot be both frozen and trained: pass a deep copy"
        )
    if not hasattr(teacher, "config"):
        raise ValueError(f"{whose} ({type(teacher).__name__}) has no config: wrap it as a PreTrainedModel")
    if teacher.config.num_labels != student.config.num_labels:
        raise ValueError(
            f"{whose} has {teacher.config.num_labels} classes and the student {student.config.num_labels}: "
            "distil between models of the same classes (num_labels=, id2label=)"
        )
    if getattr(teacher.config, "problem_type", None) == "multi_label_classification":
        raise ValueError(
            f"{whose} is a multi-label model, whose logits are of one class against none each, where the student's "
            "are of one class among others: take a teacher of single-label classification"
        )
    if not distiller.trains_teacher:
        check_head(teacher, whose)
    if teacher.config.num_labels == 1:
        return None
    own, to = named_labels(student.config), "the student"
    if own is None:
        own, to = data_names, "the data set"
    return align_labels(own, named_labels(teacher.config), whose=whose, to=to)


def check_head(teacher: nn.Module, whose: str = "the teacher") -> None:
    """Refuse a teacher whose classifier nobody trained, where it has its weights."""
    if head_looks_new(teacher):
        raise ValueError(
            f"the classifier of {whose} ({type(teacher).__name__}) is freshly initialised: it would teach noise. "
            "Fine-tune it first (in the examples: --train_teacher), or load a checkpoint with its head"
        )


def check_adapter(model: nn.Module, whose: str = "the student") -> None:
    """Refuse to train an adapted model whose BatchNorm would learn statistics that no adapter holds."""
    if base_model(model) is model:
        return
    modes = {module: module.training for module in model.modules()}
    model.train()  # as the trainer does; layers that stay in evaluation mode learn nothing
    moving = [
        name.split(".")
        for name, module in base_model(model).named_modules()
        if isinstance(module, _BatchNorm) and module.training and module.running_mean is not None
    ]
    for module, mode in modes.items():
        module.training = mode
    moving = [parts for parts in moving if not {"modules_to_save", "original_module"} & {*parts}]
    if moving:
        names = sorted({".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:]) for parts in moving})
        raise ValueError(
            f"the adapter of {whose} leaves out the running statistics of its {len(moving)} BatchNorm layers, which "
            "training moves: what is saved would predict otherwise. Add them to its PEFT configuration: "
            f"modules_to_save=[..., {', '.join(map(repr, names))}]"
        )


def check_reload(student: nn.Module) -> None:
    """Refuse to load the best student at the end where its class and configuration do not make what is saved of it."""
    if not isinstance(student, PreTrainedModel):
        return
    try:
        with torch.random.fork_rng(), torch.device("meta"):
            made = type(student)(copy.deepcopy(student.config)).state_dict()
    except Exception:  # a class of one's own that is made otherwise, or from numbers: not judged
        return
    own = student.state_dict()
    wrong = [name for name, tensor in own.items() if name not in made or made[name].shape != tensor.shape]
    if wrong:
        name = type(student).__name__
        raise ValueError(
            f"load_best_model_at_end could not load the student again: a {name} of its configuration has no such "
            f"{', '.join(wrong[:3])} (was a part replaced by hand?). Replace it in the __init__ of a subclass, or "
            "turn load_best_model_at_end off"
        )


def check_ensemble(ensemble: TeacherEnsemble, problem_type: str, distiller: Distiller) -> None:
    """Refuse several teachers where one would have to be trained, or where there are no probabilities to average."""
    if distiller.trains_teacher:
        raise ValueError(
            f"{type(distiller).__name__} trains its teacher, and an ensemble stays as it is: pass one teacher_model"
        )
    if problem_type == "regression" and (ensemble.average, ensemble.weighting) != ("logits", "equal"):
        raise ValueError(
            "teachers of numbers have no probabilities to average, nor a cross-entropy: pass "
            'teacher_model=TeacherEnsemble([...], average="logits")'
        )


def teacher_column(dataset: Dataset | None, config: PretrainedConfig) -> str | None:
    """The column of a training set that holds a teacher's answers, after a look at them; None where there is none.

    Raises:
        ValueError: If there are two, or the answers do not fit the student's classes.
    """
    inner = innermost(dataset)
    if inner is None or isinstance(inner, IterableDataset):
        return None
    columns = columns_of(inner)
    found = [name for name in TEACHER_COLUMNS if name in columns]
    if len(found) > 1:
        raise ValueError(f"the training set has {' and '.join(found)}: drop one, the student learns from the other")
    if not found:
        return None
    (name,) = found
    if isinstance(inner, datasets.Dataset):
        answers = inner.with_format("numpy")[name][:]
    else:
        answers = inner.answers[name] if isinstance(inner, ImageDataset) else [row[name] for row in inner]
    try:
        answers = np.stack([np.asarray(answer, dtype=np.float64).reshape(-1) for answer in answers])
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must hold {config.num_labels} numbers for every sample: {error}") from error
    if answers.shape[1] != config.num_labels:
        raise ValueError(
            f"{name} has {answers.shape[1]} numbers a sample, and the student {config.num_labels} classes: give one "
            "for each class, in the student's order"
        )
    wrong = ~np.isfinite(answers).all(1)
    if name == "teacher_probabilities":
        if config.num_labels == 1:
            raise ValueError("regression has no probabilities: name the column teacher_logits")
        wrong |= (answers < 0).any(1) | (np.abs(answers.sum(1) - 1) > 0.01)
    if wrong.any():
        remedy = "" if name == "teacher_logits" else ", or call them teacher_logits if that is what they are"
        row = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"{name} of row {row} is {answers[row].round(3).tolist()[:5]} (and {wrong.sum() - 1} more are wrong): it "
            f"takes finite numbers, and of probabilities that they add up to 1{remedy}. Drop rows without an answer"
        )
    return name


def check_cache(args: TrainingArguments, dataset: Dataset | None, teacher: nn.Module) -> None:
    """Refuse a teacher's cache where its answers would not be the teacher's, or would be published.

    A data set that hides a random augmentation of its own is recognised when its inputs are read.
    """
    remedy = "or leave out teacher_cache"
    if isinstance(teacher, TeacherEnsemble) and teacher.weighting != "equal":
        raise ValueError(
            f'the weights of an ensemble with weighting="cross_entropy" depend on the labels: use "equal", {remedy}'
        )
    if dataset is None or isinstance(dataset, IterableDataset):
        raise ValueError(f"the teacher's answers are kept by sample: pass a map-style train_dataset, {remedy}")
    inner = innermost(dataset)
    if getattr(inner, "soft_labels", False):
        raise ValueError(f"Mixup and CutMix make samples that never come again: turn them off, {remedy}")
    if isinstance(inner, datasets.Dataset) and inner.format["type"] == "custom":
        raise ValueError(
            "the training set has a transform, which may give other inputs each time: store what it makes with "
            f"dataset.map, or use hfkd.data.ImageDataset, {remedy}"
        )
    if "index" not in columns_of(inner):
        raise ValueError(
            "the teacher's answers are kept by the column index, which the training set lacks: add it with "
            f'dataset.add_column("index", list(range(len(dataset)))), {remedy}'
        )
    if isinstance(args.teacher_cache, str):
        folder, output = (Path(path).expanduser().resolve() for path in (args.teacher_cache, args.output_dir))
        if folder.is_relative_to(output):
            raise ValueError(f"{args.output_dir} goes with the student: put teacher_cache= elsewhere, {remedy}")


def check_collator(take: Callable[[], Mapping[str, Tensor]], dataset: Dataset, teacher: nn.Module) -> list[Tensor]:
    """Refuse a collator that makes what the teacher reads of other columns, or anew each time: no cache could tell.

    Args:
        take: Gives the same few samples as a batch at each call.
        dataset: That they are of.
        teacher: A classifier, or an ensemble.

    Returns:
        What the teacher reads of them.

    Raises:
        ValueError: If it is made of other columns, or differs from call to call.
    """
    inner = innermost(dataset)
    columns = columns_of(inner)
    batches = [take() for _ in range(8)]  # a collator may flip a coin for all of a batch
    seen = []
    for name in sorted({name for member in members_of(teacher) for name in input_names(member)}):
        column = next((column for column in (f"teacher_{name}", name) if column in batches[0]), None)
        if column is None:
            continue
        if column not in columns:
            raise ValueError(
                f"the teacher reads {column}, which the data collator makes and the training set does not have: store "
                "it there with hfkd.data.tokenize or dataset.map, or leave out teacher_cache"
            )
        first, *others = (batch[column] for batch in batches)
        if not all(torch.equal(first, other) for other in others):
            raise ValueError(
                f"the data collator makes other {column} of the same samples each time, which the teacher reads: "
                "augment with hfkd.data.ImageDataset(..., views=V), or leave out teacher_cache"
            )
        seen.append(first)
    return seen


def check_processes(args: TrainingArguments, accelerator: Accelerator) -> None:
    """Refuse to run when what was asked for of Accelerate is not what is active."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1 and accelerator.num_processes == 1:
        raise RuntimeError(
            f"{world_size} processes were launched, but each would train alone and write the same folder: "
            "on a machine without GPU add --use_cpu to the script's own flags"
        )
    if args.save_on_each_node and world_size > int(os.environ.get("LOCAL_WORLD_SIZE", world_size)):
        raise ValueError(
            "save_on_each_node=True leaves the student out on all nodes but the first (save_pretrained writes on the "
            "first process alone): drop it, and give output_dir on a disk that all nodes share"
        )
    engines = {
        DistributedType.FSDP: bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1"),
        DistributedType.DEEPSPEED: bool(args.deepspeed)
        or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("true", "1"),
    }
    for engine, wanted in engines.items():
        if wanted and accelerator.distributed_type != engine:
            raise RuntimeError(
                f"{engine.value} was asked for, but {accelerator.distributed_type.value} is active: it needs a GPU. "
                "Drop its options to run on this machine"
            )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise RuntimeError(
            "DEEPSPEED is not supported: shard with FSDP2 (--fsdp), or use plain data parallelism "
            "(accelerate launch --multi_gpu)"
        )


def check_sharding(plugin: FullyShardedDataParallelPlugin, student: nn.Module) -> None:
    """Refuse the settings of FSDP under which a student could not be trained or saved whole; warn of the others."""
    if not isinstance(student, PreTrainedModel):
        raise ValueError(
            f"FSDP shards a PreTrainedModel alone, and the student is a {type(student).__name__}: train adapters "
            "under plain data parallelism (accelerate launch --multi_gpu)"
        )
    for is_wrong, what, remedy in (
        (plugin.fsdp_version != 2, "FSDP1", '"version": 2 in fsdp_config (fsdp_version: 2 of accelerate config)'),
        (
            plugin.state_dict_type != StateDictType.FULL_STATE_DICT,
            "a state dict in shards",
            '"state_dict_type": "FULL_STATE_DICT"',
        ),
        (plugin.cpu_ram_efficient_loading, "cpu_ram_efficient_loading", '"cpu_ram_efficient_loading": false'),
        (isinstance(plugin.cpu_offload, CPUOffloadPolicy), "offloading to the CPU", '"cpu_offload": false'),
        (plugin.activation_checkpointing, "FSDP's activation_checkpointing", '"activation_checkpointing": false'),
    ):
        if is_wrong:
            raise ValueError(f"{what} is not supported under FSDP: set {remedy}")
    warnings.warn(
        "FSDP is tested on CPUs alone, where it equals one process (docs/engines.md): on GPUs compare the first "
        "losses with those of a run without it",
        UserWarning,
        stacklevel=2,
    )


def check_resume(checkpoint: str, name: str, batch: Mapping[str, int], *, is_sharded: bool) -> None:
    """Refuse to go on from a checkpoint where the run would not be the one that was interrupted.

    Args:
        checkpoint: Its folder.
        name: The file in it that says what ``batch`` was.
        batch: How many ``processes`` there are now, and how many ``samples_per_step`` they take together.
        is_sharded: Whether FSDP is active.
    """
    written_by_fsdp = Path(checkpoint, OPTIMIZER_NAME_BIN).is_file()
    if written_by_fsdp != is_sharded and (written_by_fsdp or Path(checkpoint, OPTIMIZER_NAME).is_file()):
        engines = ("FSDP", "plain data parallelism")
        theirs, own = engines if written_by_fsdp else engines[::-1]
        raise ValueError(
            f"{checkpoint} is of {theirs}, whose optimizer {own} cannot read: resume under {theirs}, or start a new "
            "run from its student (from_pretrained)"
        )
    path = Path(checkpoint, name)
    if not path.is_file():  # saved before there was one
        return
    try:
        written = {key: int(value) for key, value in json.loads(path.read_bytes()).items()}
        written = {key: written[key] for key in batch}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: resume from another checkpoint") from error
    if written["samples_per_step"] != batch["samples_per_step"]:
        raise ValueError(
            f"{checkpoint} was written by {written['processes']} processes that took {written['samples_per_step']} "
            f"samples a step, and the {batch['processes']} here take {batch['samples_per_step']}, so that samples "
            "would be skipped and repeated: set per_device_train_batch_size or gradient_accumulation_steps"
        )
    if written["processes"] != batch["processes"]:
        warnings.warn(
            f"{checkpoint} was written by {written['processes']} processes, and {batch['processes']} go on: with the "
            "same samples, but random draws (dropout, augmentation) are each process's own and go another way",
            UserWarning,
            stacklevel=2,
        )
