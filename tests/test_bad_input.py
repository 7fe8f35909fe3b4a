"""What users get wrong, in one table: each mistake is refused before the first step, in a few lines, with the remedy.

A row is a name, how to make the mistake, the exception (or warning) and what its message must hold: what was wrong,
where, and the remedy. A row that returns a trainer is trained.
"""

import copy
import functools
import io
import os
import sys
import textwrap
import warnings
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from helpers import VOCABULARY, as_datasets, make_trainer, named, rows, tiny, tiny_teacher, tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, TimmWrapperConfig, TimmWrapperForImageClassification

from hfkd import DistillationTrainer, DistillationTrainingArguments
from hfkd.cli import is_refusal, parse_arguments
from hfkd.data import ImageDataset, load_image_data, load_text_data, processor_for, tokenize
from hfkd.distillers import *  # noqa: F403
from hfkd.models import load_model, student_from_teacher


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import run_glue_kd  # noqa: E402
import run_image_kd  # noqa: E402


NAMES = ["cat", "dog", "owl", "fox", "bee"]
SMALL = "--use_cpu --max_train_samples 64 --max_eval_samples 32 --max_steps 1 --report_to none --disable_tqdm True"


# How mistakes are made


def run(example, folder, *flags):
    """An example in this process, with flags or a file of them in front."""
    words = [str(flag) for flag in flags]
    first = [words.pop(0)] if words and words[0].endswith((".yaml", ".json")) else []
    types = (example.ModelArguments, example.DataArguments, example.TrainingArguments)
    words = [*first, *SMALL.split(), "--output_dir", str(folder / "out"), *words]
    return example.run(*parse_arguments(types, words))


def image(folder, *flags):
    return run(run_image_kd, folder, "--dataset", "digits", "--student", "resnet8", *flags)


def text(folder, *flags):
    return run(run_glue_kd, folder, *flags)


def config(folder, content, name="config.yaml"):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


def from_file(folder, content, *flags, name="config.yaml"):
    return run(run_image_kd, folder, config(folder, content, name), *flags)


@functools.cache
def digits_teacher_at(folder):
    model = tiny_teacher("cifar", num_labels=10)
    model.config.id2label = {i: str(i) for i in range(10)}
    model.config.label2id = {str(i): i for i in range(10)}
    model.save_pretrained(folder)
    return folder


def digits_teacher(folder):
    return digits_teacher_at(folder / "teacher")


def words():
    """The tokenizer of words that are numbers, which reads several of them in a text."""
    splitting = tokenizer()
    splitting.backend_tokenizer.pre_tokenizer = Whitespace()
    return splitting


def bert(folder, **config):
    """A folder with a tiny BERT of five layers of nothing and its tokenizer."""
    tiny_teacher("bert", **{"num_labels": 2, "max_position_embeddings": 16, **config}).save_pretrained(folder / "bert")
    words().save_pretrained(folder / "bert")
    return folder / "bert"


def csv(folder, content="text,label\n" + "1 2 3,pos\n4 5,neg\n" * 20, name="train.csv"):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


def own_text(folder, content=None, *flags):
    path = csv(folder) if content is None else csv(folder, content)
    return text(folder, "--train_file", path, "--student", bert(folder), *flags)


def load_csv(folder, content, **options):
    return load_text_data("own", train_file=csv(folder, content), **options)


def picture(mode="RGB", size=(8, 8), seed=0):
    channels = {"RGB": 3, "RGBA": 4, "CMYK": 4, "L": 1, "LA": 2}.get(mode)
    generator = np.random.default_rng(seed)
    if mode == "I;16":
        return PIL.Image.fromarray(generator.integers(0, 65536, size[::-1], dtype=np.uint16))
    if mode == "F":
        return PIL.Image.fromarray(generator.random(size[::-1], dtype=np.float32))
    array = generator.integers(0, 256, (*size[::-1], channels), dtype=np.uint8)
    return PIL.Image.fromarray(array.squeeze(-1) if channels == 1 else array, mode)


def encoded(image, format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def image_folder(folder, broken=None, name="1/07.png", size=(8, 8), count=12):
    """Pictures of two classes, one of which may be other bytes."""
    for label in (0, 1):
        for i in range(count):
            path = folder / "images" / "train" / str(label) / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(picture(size=size, seed=100 * label + i)))
    if broken is not None:
        (folder / "images" / "train" / name).write_bytes(broken)
    return folder / "images"


def own_images(folder, *flags, **options):
    where = image_folder(folder, **options)
    return run(run_image_kd, folder, "--dataset", "own", "--data_dir", where, "--student", "resnet8", *flags)


def image_split(images, labels=None, index=None):
    values = [{"bytes": encoded(picture) if isinstance(picture, PIL.Image.Image) else picture} for picture in images]
    columns = {"image": values, "label": labels or [i % 2 for i in range(len(images))]}
    columns["index"] = index or list(range(len(images)))
    split = datasets.Dataset.from_dict(columns)
    return split.cast_column("image", datasets.Image())


def image_trainer(folder, images, student=None, teacher=None, distiller=None, size=32, labels=None, **options):
    student = student or tiny("cifar", num_labels=2, image_size=size)
    trainer = options.pop("trainer", {})
    arguments = {name: options.pop(name) for name in list(options) if name in ("teacher_cache", "max_steps")}
    dataset = ImageDataset(image_split(images, labels), processor_for(student), **options)
    return make_trainer(folder, student, teacher, distiller, dataset, trainer=trainer, **arguments)


def trainer(folder, student=None, teacher=True, distiller=None, dataset=None, evaluation=None, more=None, **arguments):
    """A trainer of tiny BERTs, any part of which may be replaced."""
    student = student if student is not None else tiny("bert")
    teacher = tiny_teacher("bert") if teacher is True else teacher
    dataset = rows("bert") if dataset is None else dataset
    more = {**(more or {}), **({"eval_dataset": evaluation} if evaluation is not None else {})}
    return make_trainer(folder, student, teacher, distiller, dataset, trainer=more, **arguments)


def labelled(*labels, names=None):
    """Rows of text with given labels."""
    dataset = as_datasets(rows("bert", len(labels)).with_columns(labels=None))
    dataset = dataset.add_column("labels", list(labels))
    return dataset if names is None else dataset.cast_column("labels", datasets.ClassLabel(names=names))


def other_tokenizer(size=80):
    words = WordLevel({str(i): i for i in reversed(range(size))} | {"1": 2, "2": 1}, unk_token="1")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="0", unk_token="1")


def conv_head(num_labels=5):
    """A classifier whose scores come from a convolution."""

    model = tiny("timm", num_labels=num_labels)
    inner = model.timm_model
    inner.classifier = torch.nn.Sequential(
        torch.nn.Unflatten(1, (-1, 1, 1)), torch.nn.Conv2d(inner.num_features, num_labels, 1), torch.nn.Flatten()
    )
    model.config.pretrained_cfg = dict(inner.pretrained_cfg)
    return model


def frozen(model):
    return model.requires_grad_(False)


def column_of(dataset, **columns):
    return dataset.with_columns(**columns)
