"""Text classification and regression: GLUE, any Hub id, CSV and JSON files; and their tokenisation."""

import dataclasses
import warnings
from pathlib import Path
from typing import Literal

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from hfkd.data.glue import GLUE_TASKS, MNLI_EXTRAS
from hfkd.data.sources import existing_folder, load_files, load_from_hub, load_parquet_folder, usual_splits
from hfkd.data.splits import SplitOptions, find_label_column, make_task_data
from hfkd.data.task_data import TaskData, is_text


_GLUE_HUB_ID = "nyu-mll/glue"
# Only an empty field is a missing one: "null" and "NA" are words.
_CSV = {"keep_default_na": False, "na_values": [""]}
_NUMBERS_OF_ROWS = ("id", "idx", "index")
_READERS = {
    ".csv": ("csv", _CSV),
    ".tsv": ("csv", {**_CSV, "sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
}


def load_text_data(
    task: str,
    *,
    data_dir: str | Path | None = None,
    train_file: str | Path | None = None,
    validation_file: str | Path | None = None,
    test_file: str | Path | None = None,
    validation_fraction: float = 0.1,
    held_out_fraction: float = 0.0,
    labels: int | None = None,
    label_noise: float = 0.0,
    noise_type: Literal["symmetric", "pair"] = "symmetric",
    seed: int = 0,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    revision: str | None = None,
) -> TaskData:
    """Load a text set; every split has its text columns under their own names, ``label`` and ``index``.

    For GLUE ``test`` is the official validation set (MNLI: matched; mismatched is ``extra["mnli-mm"]``),
    ``validation`` is cut from train, and the hidden official test is ``extra["official_test"]``
    (``"official_test_mnli-mm"``), which has no labels, MRPC's included. For other sets the splits are as in
    :func:`hfkd.data.load_image_data`; ``validation_file`` is always the validation.

    Args:
        task: A GLUE task (cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb, wnli) or a Hub id. With ``train_file`` or
            ``data_dir`` any name.
        data_dir: Folder with ``train*.parquet`` and perhaps ``validation*`` and ``test*`` (also in its ``data`` or
            the task's subfolder).
        train_file: CSV, TSV, JSON or JSON lines with one text column or two, and ``label``: class names, class
            numbers from 0, or real numbers for regression. ``sentence1`` and ``sentence2`` win over other columns;
            ``id``, ``idx`` and ``index`` are no text. A file without labels holds the text alone.
        validation_file: Likewise; without it ``validation`` is cut from train.
        test_file: Likewise; without labels it becomes ``extra["predict"]``.
        validation_fraction: This and the following: see :class:`hfkd.data.splits.SplitOptions`.
        held_out_fraction: Idem.
        labels: Idem.
        label_noise: Idem.
        noise_type: Idem.
        seed: Idem.
        max_train_samples: Idem.
        max_eval_samples: Idem.
        revision: Branch, tag or commit on the Hub.

    Raises:
        ValueError: If the task is unknown or its columns or labels do not fit.
        FileNotFoundError: If a folder or file does not exist.
    """
    options = SplitOptions(
        validation_fraction=validation_fraction,
        held_out_fraction=held_out_fraction,
        labels=labels,
        label_noise=label_noise,
        noise_type=noise_type,
        seed=seed,
        max_train_samples=max_train_samples,
        max_eval_samples=max_eval_samples,
    )
    if task in MNLI_EXTRAS:
        raise ValueError(f"{task} is an extra split of mnli: use load_text_data('mnli').extra[{task!r}]")
    glue = GLUE_TASKS.get(task)
    files = {"train": train_file, "validation": validation_file, "test": test_file}
    files = {name: Path(path).expanduser() for name, path in files.items() if path is not None}
    if files:
        if data_dir is not None:
            raise ValueError("data_dir and train_file are two sources: pass one of them")
        splits = _load_text_files(files)
    elif data_dir is not None:
        folder = existing_folder(data_dir)
        splits = load_parquet_folder(folder, task)
        if not splits:
            raise FileNotFoundError(
                f"{folder.resolve()} holds no train*.parquet: use the Hub's parquet layout, or pass train_file"
            )
        if task == "mnli":
            # The folder may be the task's own or the one of all GLUE tasks.
            for place in (folder / "ax", folder.resolve().parent / "ax"):
                for path in sorted(place.glob("test*.parquet"))[:1]:
                    splits["ax"] = load_files("parquet", [str(path)])
    elif glue:
        splits = load_from_hub(_GLUE_HUB_ID, task, revision)
        if task == "mnli":
            splits["ax"] = load_from_hub(_GLUE_HUB_ID, "ax", revision)["test"]
    elif "/" in task:
        splits = load_from_hub(task, revision=revision)
    else:
        raise ValueError(
            f"unknown task {task!r}: use {', '.join(GLUE_TASKS)}, a Hub id such as 'stanfordnlp/imdb', a local folder "
            "as data_dir, or train_file"
        )

    hidden = ()
    if not files and glue:
        splits, hidden = _name_glue_splits(splits)
    elif not files:
        splits = usual_splits(splits)
    pair = list(glue.text_columns) if glue else ["sentence1", "sentence2"]
    _check_label_column(splits["train"], pair)
    columns = pair if glue else _find_text_columns(splits["train"])
    for name, split in splits.items():
        _check_text(name, split, columns)
    return make_task_data(
        task,
        splits,
        {column: column for column in columns},
        options,
        label_names=list(glue.label_names) if glue and glue.label_names else None,
        hidden=hidden,
        missing=-1.0 if task == "stsb" else None,
    )


def _load_text_files(files: dict[str, Path]) -> dict[str, Dataset]:
    if "train" not in files:
        raise ValueError("validation_file and test_file need a train_file beside them")
    for name, path in files.items():
        if not path.is_file():
            raise FileNotFoundError(f"no file {path.resolve()}: correct {name}_file")
        if path.suffix not in _READERS:
            raise ValueError(f"cannot read {path.name}: {name}_file must end in {', '.join(_READERS)}")
    readers = {name: (path, *_READERS[path.suffix]) for name, path in files.items()}
    return {name: load_files(kind, [str(path)], **options) for name, (path, kind, options) in readers.items()}


def _name_glue_splits(splits: dict[str, Dataset]) -> tuple[dict[str, Dataset], tuple[str, ...]]:
    """The splits under our names, and which of them have hidden labels."""
    names = {
        "train": "train",
        "validation": "test",
        "validation_matched": "test",
        "validation_mismatched": "mnli-mm",
        "test": "official_test",
        "test_matched": "official_test",
        "test_mismatched": "official_test_mnli-mm",
        "ax": "ax",
    }
    named = {names[name]: split for name, split in splits.items()}
    return named, tuple(name for name in named if name.startswith("official_test") or name == "ax")


def _check_label_column(train: Dataset, pair: list[str]) -> None:
    """Refuse a training set without one, unless it holds nothing but text: any other column may be meant as labels."""
    if find_label_column(train) is not None:
        return
    columns = [name for name in train.column_names if name.lower() not in _NUMBERS_OF_ROWS]
    if len(columns) > 1 and set(columns) != set(pair):
        raise ValueError(
            f"no column of the training set is called label, among {', '.join(columns)}: rename the one that holds "
            f"the labels, or, if none does, keep the text alone (one column, or {' and '.join(pair)})"
        )


def _find_text_columns(split: Dataset) -> list[str]:
    if {"sentence1", "sentence2"} <= set(split.column_names):
        return ["sentence1", "sentence2"]
    label = find_label_column(split)
    texts = [name for name, feature in split.features.items() if is_text(feature) and name != label]
    columns = [name for name in texts if name.lower() not in _NUMBERS_OF_ROWS]
    if not 1 <= len(columns) <= 2:
        raise ValueError(
            f"expected one text column or two, found {len(columns)} ({', '.join(columns)}) among "
            f"{split.column_names}: drop the others, or name a pair sentence1 and sentence2"
        )
    return columns


def _check_text(name: str, split: Dataset, columns: list[str]) -> None:
    lacking = [column for column in columns if column not in split.column_names]
    if lacking:
        raise ValueError(f"the {name} split lacks the columns {lacking}, it has {split.column_names}: rename them")
    for column in columns:
        nulls = split.data.column(column).null_count
        if nulls:
            raise ValueError(f"column {column!r} of {name} has {nulls} rows without text: fill or drop them")


def tokenize(
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int = 128,
) -> TaskData:
    """Tokenise every split, once for the student and, where it reads text otherwise, once for the teacher.

    Splits get the columns ``input_ids``, ``attention_mask``, ``token_type_ids``, ``labels`` and ``index``.
    ``token_type_ids`` are kept whenever the tokenizer can tell two segments apart, even where the student's model
    takes none (DistilBERT), since a BERT teacher needs them. ``teacher_`` twins of the three are added if the
    teacher's tokenizer gives anything else on any row. No padding: that is the collator's.

    Args:
        data: From :func:`load_text_data`.
        tokenizer: The student's.
        teacher_tokenizer: The teacher's; None if it is the same.
        max_length: Longest sequence in tokens, lowered to what a tokenizer's model can take.

    Raises:
        ValueError: If the data has no text columns.
    """
    if not data.text_columns:
        raise ValueError(f"no text among {data.train.column_names}: pass what load_text_data returned")
    special = tokenizer.num_special_tokens_to_add(pair=len(data.text_columns) == 2)
    if max_length <= special:
        raise ValueError(f"max_length={max_length} leaves no room beside {special} special tokens: 128 is the default")
    raw = data.splits()
    splits = _encode(raw, data.text_columns, data.text_columns, tokenizer, max_length)
    limit = min(max_length, tokenizer.model_max_length)
    cut = sum(length >= limit for length in map(len, splits["train"]["input_ids"]))
    if cut:
        warnings.warn(
            f"{cut} of {len(splits['train'])} training samples reach {limit} tokens, and what is behind is cut: raise "
            f"max_length ({max_length}), or take a tokenizer of a longer model ({tokenizer.model_max_length})",
            UserWarning,
            stacklevel=2,
        )
    if teacher_tokenizer is not None and teacher_tokenizer is not tokenizer:
        # Under their usual names, which `datasets` stores in small integers.
        twins = _encode(raw, data.text_columns, data.train.column_names, teacher_tokenizer, max_length)
        if tokenizer.padding_side != teacher_tokenizer.padding_side or not all(
            map(_agree, splits.values(), twins.values())
        ):
            for name, twin in twins.items():
                twin = twin.rename_columns({column: f"teacher_{column}" for column in twin.column_names})
                splits[name] = concatenate_datasets([splits[name], twin], axis=1)
    splits = {name: split.rename_column("label", "labels") for name, split in splits.items()}
    # `map` leaves an empty split without the new columns.
    splits = {name: splits.get(name, splits["train"].select([])) for name in raw}
    fields = {name: splits.get(name) for name in ("train", "validation", "test", "held_out")}
    return dataclasses.replace(data, **fields, extra={name: splits[name] for name in data.extra})


def _encode(
    splits: dict[str, Dataset], texts: list[str], drop: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, Dataset]:
    """Replace the columns ``drop`` of every split that has rows by what the tokenizer makes of ``texts``."""
    options = {"truncation": True, "max_length": min(max_length, tokenizer.model_max_length)}
    # Of tokenizers that do not give them of themselves DistilBERT's knows them, which a BERT as teacher wants.
    # RoBERTa's are all zero; GPT-2's are not, but it has no separator, and its model would add an embedding for them.
    segments = tokenizer("a", "b", return_token_type_ids=True)["token_type_ids"]
    knows_them = tokenizer.sep_token is not None and any(segments)
    options["return_token_type_ids"] = "token_type_ids" in tokenizer.model_input_names or knows_them

    def encode(rows):
        return dict(tokenizer(*(rows[column] for column in texts), **options))

    return {
        name: split.map(encode, batched=True, remove_columns=drop, desc=f"Tokenizing {name}")
        for name, split in splits.items()
        if len(split)
    }


def _agree(split: Dataset, twin: Dataset) -> bool:
    names = [name for name in split.column_names if name not in ("label", "index")]
    return set(names) == set(twin.column_names) and all(
        split.data.column(name).equals(twin.data.column(name)) for name in names
    )
