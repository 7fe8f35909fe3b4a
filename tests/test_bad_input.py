"""What users get wrong, in one table: each mistake is refused before the first step, in a few lines, with the remedy.

A row is a name, how to make the mistake, the exception (or warning) and what its message must hold: what was wrong,
where, and the remedy. A row that returns a trainer is trained.
"""

import functools
import io
import re
import sys
import textwrap
import warnings
from pathlib import Path
from unittest.mock import patch

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from datasets.exceptions import DatasetNotFoundError
from helpers import as_datasets, make_trainer, named, rows, tiny, tiny_teacher, tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import (
    PreTrainedTokenizerFast,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TrainingArguments,
)

from hfkd import DistillationTrainer
from hfkd.cli import is_refusal, parse_arguments
from hfkd.data import ImageDataset, load_image_data, load_text_data, processor_for
from hfkd.distillers import (
    AT,
    CRD,
    DKD,
    KD,
    KDAIF,
    AttentionMaps,
    Combined,
    FitNet,
    HiddenStates,
    InContextKD,
    LabelSmoothing,
    SelfDistillation,
    StandardizedLogits,
    StudentAlone,
)


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import run_glue_kd
import run_image_kd


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


def swin():
    """A teacher of timm whose maps have their channels behind height and width."""
    sizes = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
    config = TimmWrapperConfig(architecture="swin_tiny_patch4_window7_224", num_labels=2, model_args=sizes)
    model = TimmWrapperForImageClassification(config)
    torch.nn.init.normal_(model.timm_model.head.fc.bias)
    return model


def spoilt(folder, name, content=None):
    """A folder with a BERT, one file of which is gone, or is something else."""
    where = bert(folder)
    for path in where.glob(name):
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
    return where


def conv_trainer(folder, distiller):
    images = [picture(size=(32, 32), seed=i) for i in range(4)]
    return image_trainer(folder, images, conv_head(2), tiny_teacher("cifar", num_labels=2), distiller)


def cnn_trainer(folder, distiller):
    images = [picture(size=(32, 32), seed=i) for i in range(4)]
    return image_trainer(folder, images, None, tiny_teacher("cifar", num_labels=2), distiller)


def taught_images(folder, *flags):
    return image(folder, "--teacher", digits_teacher(folder), *flags)


def method(folder, name, arguments):
    return image(folder, "--distiller", name, "--distiller_kwargs", arguments)


def pixels(folder, family, shape, teacher=None, dtype=torch.float32, **config):
    dataset = rows(family).with_columns(pixel_values=torch.zeros(16, *shape, dtype=dtype))
    return make_trainer(folder, tiny(family, **config), teacher, None, dataset)


def by_column(folder, distiller, **column):
    return trainer(folder, teacher=None, distiller=distiller, dataset=rows("bert").with_columns(**column))


def unlabelled(**more):
    return rows("bert").with_columns(labels=torch.full((16,), -100), **more)


def ones():
    """Texts of a word that :func:`other_tokenizer` reads otherwise."""
    return rows("bert").with_columns(input_ids=rows("bert").columns["attention_mask"])


def in_regression(folder, labels):
    return trainer(folder, tiny("bert", num_labels=1), teacher=None, dataset=labels)


def flat_images(folder, *flags):
    for i in range(20):
        (folder / f"{i}.png").write_bytes(encoded(picture(seed=i)))
    return run(run_image_kd, folder, "--dataset", "own", "--data_dir", folder, *flags)


def parquet(folder, split, name="train.parquet"):
    split.to_parquet(folder / name)
    return load_image_data("own", data_dir=folder)


def two_image_columns(split):
    column = [{"bytes": encoded(picture()), "path": None}] * len(split)
    return split.add_column("other", column).cast_column("other", datasets.Image())


def against(folder, student, teacher, of, pick):
    """Evaluation labels are what one of the two models finds most, or least, likely."""
    evaluation = rows("bert", 32, seed=5)
    inputs = {name: evaluation.columns[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        logits = of.eval()(**inputs).logits
    return trainer(folder, student, teacher, evaluation=evaluation.with_columns(labels=pick(logits, -1)))


def with_vocabulary(size):
    teacher = tiny_teacher("bert")
    teacher.resize_token_embeddings(size)
    return teacher


def not_on_the_hub(folder):
    with patch("datasets.load_dataset", side_effect=DatasetNotFoundError("it doesn't exist")):
        return image(folder, "--dataset", "nobody/nothing")


def long_text(folder, *flags):
    """Texts of 12 words, for a BERT of 8 positions whose tokenizer knows no limit."""
    where = bert(folder, max_position_embeddings=8)
    unlimited = words()
    unlimited.model_max_length = int(1e30)
    unlimited.save_pretrained(where)
    return text(folder, "--train_file", csv(folder, LONG), "--student", where, *flags)


POS_NEG = "text,label\n" + "1 2 3,pos\n4 5,neg\n" * 20
LONG = "text,label\n" + "1 2 3 4 5 6 7 8 9 10 11 12,pos\n4 5,neg\n" * 20
JPEG = encoded(picture(size=(96, 96)), "JPEG")
PNG = encoded(picture())
CHECKPOINTING = next(name for name in vars(TrainingArguments()) if name.endswith("_checkpointing_kwargs"))
# fmt: off
CASES = [
    # Paths and names
    ("no data folder", lambda f: image(f, "--data_dir", f / "none"),
     FileNotFoundError, ["no folder", "none", "correct data_dir"]),
    ("nothing in the image folder", lambda f: image(f, "--data_dir", f),
     FileNotFoundError, ["neither train*.parquet nor images", "train/<class>/*.png"]),
    ("nothing in the text folder", lambda f: load_text_data("own", data_dir=f),
     FileNotFoundError, ["no train*.parquet", "or pass train_file"]),
    ("only a test split", lambda f: parquet(f, image_split([PNG] * 4), "test.parquet"),
     FileNotFoundError, ["neither train*.parquet nor images", "use the Hub's parquet layout"]),
    ("unknown image set", lambda f: image(f, "--dataset", "cifar11"),
     ValueError, ["unknown data set 'cifar11'", "cifar10, cifar100", "data_dir"]),
    ("unknown text task", lambda f: text(f, "--task", "mrcp", "--student", "x"),
     ValueError, ["unknown task 'mrcp'", "mrpc", "train_file"]),
    ("Hub set out of reach", lambda f: image(f, "--dataset", "nobody/nothing"),
     ConnectionError, ["cannot load nobody/nothing", "pass its folder as data_dir"]),
    ("Hub set that is not there", not_on_the_hub,
     FileNotFoundError, ["the Hub has no data set nobody/nothing", "correct its name"]),
    ("no train file", lambda f: text(f, "--train_file", f / "none.csv", "--student", "x"),
     FileNotFoundError, ["no file", "none.csv", "correct train_file"]),
    ("train file of another kind", lambda f: load_text_data("own", train_file=csv(f, name="train.xlsx")),
     ValueError, ["train.xlsx", "must end in .csv"]),
    ("validation file alone", lambda f: text(f, "--task", "own", "--validation_file", csv(f), "--student", "x"),
     ValueError, ["validation_file", "need a train_file"]),
    ("unknown student", lambda f: image(f, "--student", "resnet21"),
     ValueError, ["cannot load 'resnet21'", "resnet20"]),
    ("unknown student of text", lambda f: text(f, "--train_file", csv(f), "--student", "bert-bas"),
     ValueError, ["no tokenizer in 'bert-bas'", "name a Hub id or a folder"]),
    ("student folder empty", lambda f: image(f, "--student", f),
     ValueError, ["cannot load", "model_type", "as save_pretrained wrote it"]),
    ("teacher without weights", lambda f: text(f, "--train_file", csv(f), "--teacher", spoilt(f, "*.safetensors")),
     OSError, ["cannot load", "model.safetensors", "save_pretrained"]),
    ("teacher cut short", lambda f: text(f, "--train_file", csv(f), "--teacher", spoilt(f, "*.safetensors",
         b"x" * 99)),
     ValueError, ["cannot load", "header", "whose folder is whole"]),
    ("teacher with a broken config", lambda f: text(f, "--train_file", csv(f), "--teacher", spoilt(f, "config.json",
         b"{")),
     (OSError, ValueError), ["config", "JSON"]),
    ("broken teacher behind a cache", lambda f: trainer(f / "o", teacher=str(spoilt(f, "*.safetensors", b"x" * 99)),
         teacher_cache=str(f / "c")),
     ValueError, ["cannot load", "header"]),
    ("model without tokenizer", lambda f: text(f, "--train_file", csv(f), "--student", spoilt(f, "tokenizer*")),
     ValueError, ["tokenizer in", "save"]),
    ("no weights file", lambda f: image(f, "--teacher", f / "none.safetensors"),
     FileNotFoundError, ["no weights file", "none.safetensors", "correct its name"]),
    ("weights file of rubbish", lambda f: image(f, "--teacher", config(f, b"rubbish" * 9, "a.safetensors")),
     ValueError, ["a.safetensors is damaged", "copy or download it again"]),
    ("teacher that was never trained", lambda f: image(f, "--teacher", "resnet20"),
     ValueError, ["'resnet20' would start from random weights", "--train_teacher"]),
    ("teacher of text for images", lambda f: image(f, "--teacher", bert(f)),
     ValueError, ["cannot load", "for image-classification", "name a model of that kind"]),
    ("student of images for text", lambda f: text(f, "--train_file", csv(f), "--student", digits_teacher(f)),
     ValueError, ["no tokenizer in", "of a text model"]),
    ("output_dir is a file", lambda f: (config(f, "", "out"), image(f)),
     FileExistsError, ["output_dir", "is a file", "name a folder"]),
    ("resume from nowhere", lambda f: image(f, "--resume_from_checkpoint", f / "checkpoint-9"),
     ValueError, ["checkpoint-9 is no whole checkpoint: there is no such folder", "start a new run"]),
    ("resume where nothing is", lambda f: image(f, "--resume_from_checkpoint", "True"),
     ValueError, ["has no whole checkpoint", "start a new run, without resume_from_checkpoint"]),
    # Files of flags
    ("no file of flags", lambda f: run(run_image_kd, f, f / "none.yaml"),
     FileNotFoundError, ["no file", "none.yaml", "correct the first argument"]),
    ("tab in YAML", lambda f: from_file(f, "dataset: digits\n\tstudent: resnet8\n"),
     ValueError, ["config.yaml", "'\\t'", "line 2, column 1", "Correct it"]),
    ("key twice", lambda f: from_file(f, "seed: 1\nstudent: resnet8\nseed: 2\n"),
     ValueError, ["config.yaml", "'seed' is there twice", "line 3", "Correct it"]),
    ("unknown key", lambda f: from_file(f, "learing_rate: 0.1\n"),
     ValueError, ["--learing_rate", "did you mean --learning_rate?"]),
    ("list of flags", lambda f: from_file(f, "- dataset\n"),
     ValueError, ["config.yaml must hold a table", "one flag a line"]),
    ("empty file of flags", lambda f: from_file(f, ""),
     ValueError, ["config.yaml must hold a table", "one flag a line"]),
    ("bracket left open", lambda f: from_file(f, "seed: [\n"),
     ValueError, ["config.yaml is neither YAML nor JSON", "line 2", "Correct it"]),
    ("JSON left open", lambda f: from_file(f, '{"seed": 1', name="c.json"),
     ValueError, ["c.json is neither YAML nor JSON", "line 1", "Correct it"]),
    ("file of flags in bytes", lambda f: from_file(f, b"\xff\xfe\x00a"),
     ValueError, ["config.yaml is no text in UTF-8", "save it as such"]),
    ("table within the table", lambda f: from_file(f, "model:\n  student: resnet8\n"),
     ValueError, ["no flag takes '--model", "did you mean"]),
    ("several values for a flag of one", lambda f: from_file(f, "dataset: [digits, cifar10]\n"),
     ValueError, ["cifar10", "see --help"]),
    ("word for a number", lambda f: from_file(f, "seed: one\n"),
     ValueError, ["--seed", "invalid int value: 'one'", "see --help"]),
    # Flags
    ("unknown flag", lambda f: image(f, "--max_step", "3"), ValueError, ["--max_step 3", "did you mean --max_steps?"]),
    ("file behind the flags", lambda f: image(f, config(f, "seed: 2\n")),
     ValueError, ["config.yaml", "a file of flags comes first"]),
    ("flag without its value", lambda f: image(f, "--seed"),
     ValueError, ["--seed", "expected one argument", "see --help"]),
    ("flag with another choice", lambda f: image(f, "--teacher_cache_dtype", "int8"),
     ValueError, ["--teacher_cache_dtype", "'int8'", "'float16'"]),
    ("unknown strategy", lambda f: image(f, "--eval_strategy", "now"),
     ValueError, ["now is not a valid IntervalStrategy", "'epoch'"]),
    ("fp16 and bf16", lambda f: image(f, "--fp16", "--bf16"), ValueError, ["fp16 and bf16", "not both"]),
    ("best model of no evaluation", lambda f: image(f, "--load_best_model_at_end", "--eval_strategy", "no"),
     ValueError, ["load_best_model_at_end", "to match"]),
    ("evaluation on nothing", lambda f: image(f, "--validation_fraction", "0"),
     ValueError, ['eval_strategy is "epoch"', "no eval_dataset", "--validation_fraction 0.1"]),
    ("metric that is not there", lambda f: image(f, "--metric_for_best_model", "f1", "--load_best_model_at_end"),
     ValueError, ["metric_for_best_model is 'f1'", "gives accuracy", "choose one of these"]),
    ("teacher to train, but none", lambda f: image(f, "--train_teacher"),
     ValueError, ["--train_teacher", "name one with --teacher"]),
    ("teacher to train, but none, of text", lambda f: text(f, "--train_file", csv(f), "--student", "x",
         "--train_teacher"),
     ValueError, ["--train_teacher", "name one with --teacher"]),
    ("cache of no teacher", lambda f: image(f, "--teacher_cache", f / "cache"),
     ValueError, ["--teacher_cache", "name one with --teacher"]),
    ("precision of no teacher", lambda f: image(f, "--teacher_dtype", "bfloat16"),
     ValueError, ["--teacher_dtype is about a teacher", "--teacher"]),
    ("epochs of no teacher's training", lambda f: image(f, "--teacher", "x", "--teacher_epochs", "2"),
     ValueError, ["--teacher_epochs", "--train_teacher", "add it"]),
    ("student alone of no run", lambda f: image(f, "--baseline", f / "nowhere"),
     ValueError, ["--baseline", "nowhere has no README.md", "a run without --teacher"]),
    ("arguments of no method", lambda f: image(f, "--teacher", "x", "--distiller_kwargs", '{"alpha": 1}'),
     ValueError, ["--distiller_kwargs", "add --distiller"]),
    ("nothing unlabelled to drop", lambda f: image(f, "--drop_unlabelled"),
     ValueError, ["every training sample of digits has a label", "set a budget with labels"]),
    ("cache of mixtures", lambda f: taught_images(f, "--teacher_cache", f / "cache", "--mixup_alpha", "0.2"),
     ValueError, ["Mixup and CutMix make samples that never come again", "leave out teacher_cache"]),
    ("views of nothing", lambda f: image(f, "--views", "4", "--augment", "none"),
     ValueError, ["views=4", "set augment, or leave views out"]),
    ("views of mixtures", lambda f: image(f, "--views", "4", "--mixup_alpha", "0.2"),
     ValueError, ["Mixup and CutMix", "leave views out"]),
    ("more views than there are", lambda f: image(f, "--views", "400"),
     ValueError, ["9 outcomes", "views=400", "lower it"]),
    ("Mixup for hard labels", lambda f: taught_images(f, "--distiller", "dkd", "--mixup_alpha", "0.2"),
     ValueError, ["DKD needs class indices", "turn Mixup and CutMix off"]),
    ("Mixup of the unlabelled", lambda f: image(f, "--labels", "20", "--mixup_alpha", "0.2"),
     ValueError, ["44 samples have no label to mix", "mixup_alpha"]),
    ("unknown augmentation", lambda f: image(f, "--augment", "zoom"),
     ValueError, ["unknown augment 'zoom'", "crop_flip"]),
    ("unknown RandAugment", lambda f: image(f, "--rand_augment", "lots"),
     ValueError, ["rand_augment='lots'", "rand-m9-mstd0.5"]),
    ("neither student nor teacher", lambda f: text(f, "--train_file", csv(f)),
     ValueError, ["name a --student, or a --teacher"]),
    ("neither task nor file", lambda f: text(f, "--student", "x"), ValueError, ["name a --task", "--train_file"]),
    ("two sources", lambda f: text(f, "--task", "own", "--train_file", csv(f), "--data_dir", f, "--student", "x"),
     ValueError, ["data_dir and train_file", "pass one of them"]),
    # Sizes
    ("no steps", lambda f: image(f, "--max_steps", "0"),
     ValueError, ["max_steps must be positive, got 0", "-1 trains for num_train_epochs"]),
    ("evaluation casts the student", lambda f: image(f, "--bf16_full_eval"),
     ValueError, ["bf16_full_eval turns the student itself into half precision", "drop it", "bf16=True"]),
    ("no epochs", lambda f: image(f, "--max_steps", "-1", "--num_train_epochs", "0"),
     ValueError, ["num_train_epochs must be positive, got 0", "set max_steps"]),
    ("no batch", lambda f: image(f, "--per_device_train_batch_size", "0"),
     ValueError, ["per_device_train_batch_size must be at least 1, got 0"]),
    ("no evaluation batch", lambda f: image(f, "--per_device_eval_batch_size", "0"),
     ValueError, ["per_device_eval_batch_size must be at least 1, got 0"]),
    ("no accumulation", lambda f: image(f, "--gradient_accumulation_steps", "0"),
     ValueError, ["gradient_accumulation_steps must be at least 1, got 0"]),
    ("negative learning rate", lambda f: image(f, "--learning_rate", "-0.1"),
     ValueError, ["learning_rate must not be negative, got -0.1", "5e-5"]),
    ("learning rate of no number", lambda f: image(f, "--learning_rate", "nan"),
     ValueError, ["learning_rate", "got nan", "5e-5"]),
    ("method's learning rate of 0", lambda f: image(f, "--distiller_learning_rate", "0"),
     ValueError, ["distiller_learning_rate must be positive", "leave it out"]),
    ("smoothing beyond 1", lambda f: image(f, "--label_smoothing_factor", "1.5"),
     ValueError, ["label_smoothing_factor must lie in [0, 1), got 1.5", "0 smooths nothing"]),
    ("negative seed", lambda f: image(f, "--seed", "-1"), ValueError, ["seed must lie in [0, 2**32), got -1"]),
    ("negative seed of data", lambda f: image(f, "--data_seed", "-1"),
     ValueError, ["data_seed must lie in [0, 2**32), got -1"]),
    ("fraction beyond 1", lambda f: image(f, "--validation_fraction", "1.2"),
     ValueError, ["validation_fraction must lie in [0, 1), got 1.2"]),
    ("fewer labels than classes", lambda f: image(f, "--labels", "3"),
     ValueError, ["labels=3 is fewer than the 10 classes", "raise it"]),
    ("more labels than samples", lambda f: image(f, "--labels", "65"),
     ValueError, ["labels=65 exceeds the 64", "lower it"]),
    ("no room for a token", lambda f: own_text(f, None, "--max_length", "0"),
     ValueError, ["max_length=0 leaves no room", "128 is the default"]),
    ("more layers than the teacher's", lambda f: text(f, "--train_file", csv(f), "--teacher", bert(f),
         "--student_layers", "9"),
     ValueError, ["num_layers must lie between 1 and the teacher's 2, got 9"]),
    # Methods
    ("unknown method", lambda f: image(f, "--distiller", "wtm"), ValueError, ["unknown distiller 'wtm'", "WTTM"]),
    ("arguments that are no JSON", lambda f: method(f, "kd", "temperature=2"),
     ValueError, ["--distiller_kwargs 'temperature=2' is not JSON", '\'{"temperature": 2}\'']),
    ("arguments that are no table", lambda f: method(f, "kd", "[2]"),
     ValueError, ["--distiller_kwargs '[2]' is no table", '\'{"temperature": 2}\'']),
    ("argument that the method lacks", lambda f: method(f, "kd", '{"temp": 2}'),
     ValueError, ["KD(alpha", "unexpected keyword argument 'temp'"]),
    ("argument of another type", lambda f: method(f, "kd", '{"temperature": "hot"}'),
     ValueError, ["KD(alpha", "temperature: 'float'", "cannot be made so"]),
    ("argument of no number", lambda f: method(f, "kd", '{"temperature": NaN}'),
     ValueError, ["temperature must be positive, got nan", "1.0 for no softening"]),
    ("argument out of range", lambda f: method(f, "kd", '{"alpha": 2}'),
     ValueError, ["alpha must lie in [0, 1], got 2", "0 is the labels alone"]),
    ("method by name", lambda f: trainer(f, distiller="kd"),
     TypeError, ["distiller must be a Distiller, got str", "pass KD()"]),
    ("method that is a class", lambda f: trainer(f, distiller=KD),
     TypeError, ["distiller must be a Distiller, got type", "pass KD()"]),
    ("method without its teacher", lambda f: image(f, "--distiller", "kd"),
     ValueError, ["KD needs a teacher", "pass teacher_model="]),
    ("teacher without its method", lambda f: trainer(f, distiller=StudentAlone()),
     ValueError, ["StudentAlone uses no teacher", "leave out teacher_model"]),
    ("influence on nothing", lambda f: trainer(f, distiller=KDAIF()),
     ValueError, ["held-out samples", "--held_out_fraction 0.1"]),
    ("influence on an empty set", lambda f: trainer(f, distiller=KDAIF(), more={"held_out_dataset": rows("bert", 0)}),
     ValueError, ["held-out set is a stream or empty", "some rows"]),
    ("influence without linear layer", lambda f: conv_trainer(f, CRD()),
     ValueError, ["ends in no linear layer with 2 outputs", "name the layer yourself"]),
    ("features of an ensemble", lambda f: trainer(f, teacher=[tiny_teacher("bert"), tiny_teacher("bert", seed=7)],
         distiller=HiddenStates()),
     ValueError, ["HiddenStates looks inside", "an ensemble has only logits", "KD()"]),
    ("features of a column", lambda f: by_column(f, HiddenStates(), teacher_logits=torch.randn(16, 5)),
     ValueError, ["HiddenStates looks inside", "a column holds only", "pass teacher_model="]),
    ("features of a cache", lambda f: trainer(f / "o", distiller=HiddenStates(), dataset=as_datasets(rows("bert")),
         teacher_cache=str(f / "c")),
     ValueError, ["HiddenStates looks at", "the cache keeps logits and vectors", "leave out teacher_cache"]),
    ("cache of a teacher that moves", lambda f: trainer(f, teacher=None, distiller=SelfDistillation(),
         teacher_cache="true"),
     ValueError, ["teacher of SelfDistillation changes", "leave out teacher_cache"]),
    ("column of another width", lambda f: by_column(f, KD(), teacher_logits=torch.randn(16, 4)),
     ValueError, ["teacher_logits has 4 numbers", "5 classes", "one for each class"]),
    ("column of no probabilities", lambda f: by_column(f, KD(), teacher_probabilities=torch.ones(16, 5)),
     ValueError, ["teacher_probabilities of row 0", "add up to 1", "teacher_logits"]),
    ("attention of a convolution", lambda f: cnn_trainer(f, AttentionMaps()),
     ValueError, ["no number of attention heads", "HiddenStates()"]),
    ("hidden states of a convolution", lambda f: cnn_trainer(f, HiddenStates()),
     ValueError, ["CifarForImageClassification has no 'cifar.embeddings'", "FitNet()"]),
    ("maps of a transformer", lambda f: trainer(f, distiller=AT()),
     ValueError, ["AT compares a map", "AttentionMaps() is for transformers"]),
    ("layer that is not there", lambda f: trainer(f, distiller=FitNet(student_layers="bert.layer.9",
         teacher_layers="bert.pooler")),
     ValueError, ["no module 'bert.layer.9'", "near it are"]),
    ("classes' method for numbers", lambda f: trainer(f, tiny("bert", num_labels=1), tiny_teacher("bert",
         num_labels=1), DKD(), rows("bert").with_columns(labels=torch.randn(16))),
     ValueError, ["DKD is not defined for regression", "use KD()"]),
    ("no column index", lambda f: trainer(f, distiller=CRD(), dataset=rows("bert").with_columns(index=None)),
     ValueError, ["no column index, which CRD needs", "add_column"]),
    ("numbers that come twice", lambda f: trainer(f, distiller=CRD(),
         dataset=as_datasets(rows("bert").with_columns(index=torch.arange(16) // 2))),
     ValueError, ["2 training samples have the number 0", "CRD", "a number of its own"]),
    ("numbers that do not show", lambda f: trainer(f, distiller=CRD(),
         dataset=rows("bert").with_columns(index=torch.zeros(16).long())),
     ValueError, ["column index", "give it an `index` attribute"]),
    # Types
    ("student by name", lambda f: DistillationTrainer("resnet20"),
     TypeError, ["student must be a PreTrainedModel, got str", "load_model"]),
    ("no student", lambda f: DistillationTrainer(None),
     TypeError, ["student must be a PreTrainedModel, got NoneType", "load_model"]),
    ("student without config", lambda f: DistillationTrainer(torch.nn.Linear(2, 2)),
     TypeError, ["student must be a PreTrainedModel, got Linear", "load_model"]),
    ("teacher without config", lambda f: trainer(f, teacher=torch.nn.Linear(2, 2)),
     ValueError, ["the teacher (Linear) has no config", "wrap it"]),
    ("teacher of another type", lambda f: trainer(f, teacher={"a": 1}),
     TypeError, ["the teacher must be a PreTrainedModel", "got dict", "load_model"]),
    ("arguments of another type", lambda f: DistillationTrainer(tiny("bert"), args={"output_dir": "x"}),
     TypeError, ["got dict", "pass DistillationTrainingArguments"]),
    ("all splits at once", lambda f: trainer(f, dataset=datasets.DatasetDict(train=as_datasets(rows("bert")))),
     TypeError, ["the train set is a DatasetDict", "pass one split"]),
    ("all of load_text_data", lambda f: trainer(f, dataset=load_csv(f, POS_NEG)),
     TypeError, ["the train set is a TaskData", "pass one split"]),
    ("data by path", lambda f: trainer(f, dataset="train.csv"),
     TypeError, ["the train set is a str", "pass one split"]),
    ("text that is not tokenised", lambda f: trainer(f, tiny("bert", num_labels=2), None, dataset=load_csv(f,
         POS_NEG).train),
     ValueError, ["the student takes input_ids", "has text, label, index", "hfkd.data.tokenize"]),
    ("images that are not processed", lambda f: make_trainer(f, tiny("cifar", num_labels=2), None, None,
         image_split([PNG] * 4)),
     ValueError, ["the student takes pixel_values", "has image, label, index", "hfkd.data.ImageDataset"]),
    ("text for a student of images", lambda f: trainer(f, tiny("cifar"), None),
     ValueError, ["the student takes pixel_values", "has input_ids", "ImageDataset"]),
    ("tokens without tokenizer", lambda f: trainer(f, more={"processing_class": None}),
     ValueError, ["the samples have input_ids", "processing_class"]),
    ("student that is frozen", lambda f: trainer(f, tiny("bert").requires_grad_(False)),
     ValueError, ["all parameters of the student are frozen", "requires_grad_(True)"]),
    # Classes and labels
    ("teacher of other classes", lambda f: trainer(f, named(tiny("bert"), NAMES), named(tiny_teacher("bert"), ["ant",
         *NAMES[1:]])),
     ValueError, ["classes of the teacher are not the student's", "'ant'", "id2label"]),
    ("teacher of more classes", lambda f: trainer(f, teacher=tiny_teacher("bert", num_labels=7)),
     ValueError, ["the teacher has 7 classes and the student 5", "num_labels="]),
    ("teacher with a fresh head", lambda f: trainer(f, teacher=tiny("bert", seed=3)),
     ValueError, ["freshly initialised", "Fine-tune it first"]),
    ("labels from 1", lambda f: trainer(f, dataset=labelled(1, 2, 3, 4, 5, 1)),
     ValueError, ["labels of the train set hold [5]", "0 to 4", "num_labels=6"]),
    ("labels of -1", lambda f: trainer(f, dataset=labelled(0, 2, 3, -1, 4)),
     ValueError, ["labels of the train set hold [-1]", "-100 marks"]),
    ("labels of words", lambda f: trainer(f, dataset=labelled("cat", "dog")),
     ValueError, ["labels of the train set", "not numbers", "class indices"]),
    ("labels with gaps", lambda f: trainer(f, dataset=labelled(0, None, 1, 2)),
     ValueError, ["labels of the train set have empty cells", "-100"]),
    ("labels in halves", lambda f: trainer(f, dataset=labelled(0.5, 1.0, 1.5)),
     ValueError, ["labels of the train set hold [0.5, 1.5]", "correct the labels"]),
    ("several labels a sample", lambda f: trainer(f, dataset=labelled([0, 1], [1], [2])),
     ValueError, ["labels of the train set", "class indices"]),
    ("probabilities of fewer classes", lambda f: trainer(f, dataset=labelled([0.0, 1.0, 0.0], [1.0, 0.0, 0.0])),
     ValueError, ["3 numbers a sample", "5 classes", "one class index a sample"]),
    ("classes in another order", lambda f: trainer(f, named(tiny("bert"), NAMES), None, dataset=labelled(0, 1, 2, 3, 4,
         names=NAMES[::-1])),
     ValueError, ["the train set numbers the classes as ['bee'", "id2label"]),
    ("classes in another order in evaluation", lambda f: trainer(f, named(tiny("bert"), NAMES), None,
         evaluation=labelled(0, 1, names=NAMES[::-1])),
     ValueError, ["the evaluation set numbers the classes", "id2label"]),
    ("labels out of range in evaluation", lambda f: trainer(f, evaluation=labelled(0, 1, 9)),
     ValueError, ["labels of the evaluation set hold [9]", "num_labels=10"]),
    ("no label column", lambda f: trainer(f, teacher=None, dataset=as_datasets(rows("bert")).rename_column("labels",
         "target")),
     ValueError, ["no training sample has a label", "pass a teacher"]),
    ("all of -100, alone", lambda f: trainer(f, teacher=None, dataset=unlabelled()),
     ValueError, ["no training sample has a label", "pass a teacher"]),
    ("all of -100, with a method of labels", lambda f: trainer(f, distiller=DKD(), dataset=unlabelled()),
     ValueError, ["no training sample has a label", "DKD learns from labels", "KD()"]),
    ("all of -100, smoothed", lambda f: trainer(f, teacher=None, distiller=LabelSmoothing(), dataset=unlabelled()),
     ValueError, ["LabelSmoothing learns from labels", "KD()"]),
    ("one class", lambda f: trainer(f, dataset=labelled(*[2] * 8)),
     ValueError, ["all 8 labels of the train set are 2", "shuffling", "-100"]),
    ("one number", lambda f: in_regression(f, labelled(*[0.5] * 8)),
     ValueError, ["all 8 labels of the train set are 0.5", "-100"]),
    ("no number", lambda f: in_regression(f, labelled(0.5, float("nan"), 1.0)),
     ValueError, ["NaN or infinity", "remove those rows"]),
    ("classes for one output", lambda f: in_regression(f, labelled(0, 1, 1, names=["no", "yes"])),
     ValueError, ["the train set has classes (['no', 'yes'])", "regression", "num_labels=2"]),
    ("several classes at once", lambda f: trainer(f, tiny("bert", problem_type="multi_label_classification"), None),
     ValueError, ["multi-label models are not supported", "one class"]),
    ("one class in the file", lambda f: load_csv(f, "text,label\n" + "1 2,pos\n" * 20),
     ValueError, ["all training labels are 'pos'", "two classes or more"]),
    ("one number in the file", lambda f: load_csv(f, "text,label\n" + "1 2,0\n" * 20),
     ValueError, ["all training labels are '0'", "two classes or more"]),
    ("classes from 1 in the file", lambda f: load_csv(f, "text,label\n" + "1 2,1\n3 4,2\n" * 20),
     ValueError, ["training labels [1, 2] are not 0, 1, 2", "from 0"]),
    ("labels under another name in the file", lambda f: load_csv(f, "text,category\n" + "1 2,pos\n3 4,neg\n" * 20),
     ValueError, ["no column of the training set is called label, among text, category", "rename", "text alone"]),
    ("two columns of labels", lambda f: trainer(f, dataset=as_datasets(rows("bert")).add_column("label", [0] * 16)),
     ValueError, ["the columns labels and label may both be the labels", "drop or rename one", "label_names=["]),
    ("no labels in the file", lambda f: own_text(f, "text\n" + "1 2 3\n" * 20),
     ValueError, ["no labels to count classes from", "add a column label"]),
    ("no class folders", lambda f: flat_images(f), ValueError, ["own has no labels", "train/<class>/"]),
    ("labels that train does not know", lambda f: own_text(f, None, "--validation_file", csv(f,
         "text,label\n1,other\n", "dev.csv")),
     ValueError, ["validation has labels ['other']", "['neg', 'pos']", "correct them"]),
    ("class of one sample", lambda f: load_csv(f, "text,label\n1,rare\n" + "1 2,pos\n3 4,neg\n" * 20),
     ValueError, ["class 'rare' has a single training sample", "validation_fraction=0"]),
    # Files and splits
    ("empty file", lambda f: load_csv(f, ""), ValueError, ["train.csv", "No columns", "rows and a header"]),
    ("header alone", lambda f: load_csv(f, "text,label\n"), ValueError, ["train.csv", "rows and a header"]),
    ("ragged rows", lambda f: load_csv(f, "text,label\n1 2,pos\n1,2,3,4\n"),
     ValueError, ["train.csv", "line 3", "rows and a header"]),
    ("file of bytes", lambda f: load_csv(f, b"\xff\xfe\x00\x01,\n"), ValueError, ["train.csv", "utf-8"]),
    ("broken parquet", lambda f: (config(f, b"PAR1rubbish", "train.parquet"), load_image_data("own", data_dir=f)),
     ValueError, ["train.parquet", "not a parquet file"]),
    ("no text", lambda f: load_csv(f, "value,label\n" + "1,pos\n2,neg\n" * 20),
     ValueError, ["one text column or two, found 0", "['value', 'label']"]),
    ("too many texts", lambda f: load_csv(f, "a,b,c,label\n" + "w,x y,z,pos\nu,v,w,neg\n" * 20),
     ValueError, ["found 3 (a, b, c)", "drop the others"]),
    ("rows without text", lambda f: load_csv(f, "text,label\n" + "1 2 3,pos\n,neg\n" * 20),
     ValueError, ["'text' of train has 20 rows without text", "fill or drop them"]),
    ("validation of other columns", lambda f: own_text(f, None, "--validation_file", csv(f, "words,label\n1,pos\n",
         "dev.csv")),
     ValueError, ["validation split lacks the columns ['text']", "rename them"]),
    ("two images a row", lambda f: parquet(f, two_image_columns(image_split([PNG] * 4))),
     ValueError, ["2 image columns", "keep exactly one"]),
    ("empty training set", lambda f: trainer(f, dataset=as_datasets(rows("bert")).select([])),
     ValueError, ["the train set is empty", "check what was filtered"]),
    ("empty evaluation set", lambda f: trainer(f, evaluation=as_datasets(rows("bert")).select([])),
     ValueError, ["the evaluation set is empty", "or pass None"]),
    ("nothing left to train on", lambda f: flat_images(f, "--drop_unlabelled"),
     ValueError, ["no training sample of own has a label", "leave it out"]),
    ("split without numbers", lambda f: ImageDataset(image_split([PNG]).remove_columns("index"),
         processor_for(tiny("cifar"))),
     ValueError, ["lacks ['index']", "load_image_data"]),
    # Images
    ("16 bits", lambda f: image_trainer(f, [picture("I;16", (32, 32))] * 4),
     ValueError, ["row 0", "I;16", "more than 8 bits", "0..255"]),
    ("16 bits, one of them", lambda f: image_trainer(f, [PNG] * 3 + [picture("I;16")]),
     ValueError, ["row 3", "I;16", "0..255"]),
    ("16 bits, large", lambda f: image_trainer(f, [picture("I;16", (96, 96))] * 4),
     ValueError, ["row 0", "I;16", "0..255"]),
    ("floats", lambda f: image_trainer(f, [encoded(picture("F"), "TIFF")] * 4),
     ValueError, ["row 0", "its mode is F", "0..255"]),
    ("cut short", lambda f: own_images(f, broken=PNG[:80]),
     ValueError, ["07.png", "truncated", "replace it or drop the row"]),
    ("no image", lambda f: own_images(f, broken=b"hello"), ValueError, ["07.png", "cannot identify", "drop the row"]),
    ("file without bytes", lambda f: own_images(f, broken=b""), ValueError, ["07.png", "drop the row"]),
    ("first one no image", lambda f: image_trainer(f, [b"hello", PNG]),
     ValueError, ["row 0", "cannot be used", "drop the row"]),
    ("missing image", lambda f: image_trainer(f, [PNG, None]),
     ValueError, ["row 1, index 1", "cannot be used", "drop the row"]),
    ("JPEG cut short, large", lambda f: image_trainer(f, [JPEG] * 3 + [JPEG[:900]]),
     ValueError, ["row 3, index 3", "truncated", "drop the row"]),
    ("mixtures of several sizes", lambda f: image_trainer(f, [picture(), picture(size=(9, 9))], mixup_alpha=0.2,
         num_labels=2),
     ValueError, ["images of one size", "crop_flip"]),
    ("pixels of another size", lambda f: pixels(f, "vit", (3, 24, 24)),
     ValueError, ["the student", "(2, 3, 24, 24)", "doesn't match", "image processor"]),
    ("one channel for three", lambda f: pixels(f, "cifar", (1, 32, 32)),
     ValueError, ["the student", "(2, 1, 32, 32)", "image processor"]),
    ("one channel for the teacher's three", lambda f: pixels(f, "cifar", (1, 32, 32), tiny_teacher("cifar"),
         num_channels=1, image_mean=[0.5], image_std=[0.2]),
     ValueError, ["the teacher", "(2, 1, 32, 32)", "image processor"]),
    ("pixels that are bytes", lambda f: pixels(f, "cifar", (3, 32, 32), dtype=torch.uint8),
     ValueError, ["the student", "torch.uint8", "image processor"]),
    # Text
    ("text too long", lambda f: trainer(f, tiny("bert", max_position_embeddings=4)),
     ValueError, ["the student", "(2, 7)", "tokenizer"]),
    ("text too long, late", lambda f: trainer(f, tiny("bert", max_position_embeddings=8),
         dataset=datasets.concatenate_datasets([as_datasets(rows("bert", 90, length=6)), as_datasets(rows("bert", 4,
         length=12))])),
     ValueError, ["a text of the train set has 12 tokens", "the student has room for 8", "max_length=8"]),
    ("text too long, evaluation", lambda f: trainer(f, tiny("bert", max_position_embeddings=8),
         dataset=as_datasets(rows("bert")), evaluation=as_datasets(rows("bert", length=12))),
     ValueError, ["a text of the evaluation set", "max_length=8"]),
    ("text too long for the teacher", lambda f: trainer(f, teacher=tiny_teacher("bert", max_position_embeddings=8),
         dataset=as_datasets(rows("bert", length=12))),
     ValueError, ["the teacher has room for 8", "max_length=8"]),
    ("text too long in the example", long_text,
     ValueError, ["a text of the train set has", "room for 8", "max_length=8"]),
    ("tokens beyond the vocabulary", lambda f: trainer(f,
         dataset=as_datasets(rows("bert").with_columns(input_ids=torch.full((16, 7), 77)))),
     ValueError, ["input_ids of the train set go up to 77", "tokens 0 to 59", "own tokenizer"]),
    ("tokens beyond the teacher's", lambda f: trainer(f, teacher=with_vocabulary(30),
         dataset=as_datasets(rows("bert"))),
     ValueError, ["the teacher knows tokens 0 to 29", "teacher_tokenizer="]),
    ("tokenizers that differ", lambda f: trainer(f, dataset=as_datasets(rows("bert")),
         more={"teacher_processing_class": other_tokenizer()}),
     ValueError, ["the tokenizers differ", "to the teacher's", "no teacher_input_ids", "teacher_tokenizer="]),
    # What is warned of
    ("vocabularies that differ", lambda f: trainer(f, teacher=with_vocabulary(90), dataset=as_datasets(rows("bert"))),
     UserWarning, ["the student knows 60 tokens and the teacher 90", "teacher_tokenizer="]),
    ("text that is cut", lambda f: own_text(f, LONG, "--max_length", "5"),
     UserWarning, ["reach 5 tokens", "raise max_length"]),
    ("labels under another name", lambda f: trainer(f, dataset=as_datasets(rows("bert")).rename_column("labels",
         "target")),
     UserWarning, ["no column labels", "target", "rename it to labels"]),
    ("teacher smaller than the student", lambda f: trainer(f, tiny("bert", num_hidden_layers=3)),
     UserWarning, ["the teacher has", "and the student", "are they swapped"]),
    ("teacher worse than a guess", lambda f: (lambda t: against(f, tiny("bert"), t, t,
         torch.argmin))(tiny_teacher("bert")),
     UserWarning, ["the teacher is right on 0.0%, and a guess on 20.0%", "id2label"]),
    ("teacher worse than the student", lambda f: (lambda s: against(f, s, tiny_teacher("bert"), s,
         torch.argmax))(tiny_teacher("bert", seed=3)),
     UserWarning, ["the teacher is right on", "and the student already on 100.0%", "id2label"]),
    # Silently another run than was meant
    ("several classes a sample", lambda f: trainer(f, dataset=rows("bert").with_columns(labels=torch.ones(16, 5))),
     ValueError, ["labels of the train set", "row 0 ([1.0,", "(nor are 15 more)", "several classes a sample"]),
    ("several classes a sample in a stream", lambda f: trainer(f, max_steps=1, dataset=as_datasets(
         rows("bert").with_columns(labels=torch.ones(16, 5))).to_iterable_dataset()),
     ValueError, ["labels of the first batch", "several classes a sample"]),
    ("no label among soft ones", lambda f: trainer(f, dataset=rows("bert").with_columns(
         labels=torch.cat([torch.eye(5), torch.full((11, 5), -100.0)]))),
     ValueError, ["those of row 5 ([-100.0,", "give class indices, of which -100"]),
    ("teacher of several classes a sample", lambda f: trainer(f, teacher=tiny_teacher("bert",
         problem_type="multi_label_classification")),
     ValueError, ["the teacher is a multi-label model", "take a teacher of single-label classification"]),
    ("unlabelled samples of a stream", lambda f: trainer(f, max_steps=1, dataset=as_datasets(unlabelled()
         ).to_iterable_dataset()),
     UserWarning, ["labels of the first batch are -100", "N / N_labelled", "an attribute labels"]),
    ("other tokenizer of a torch data set", lambda f: trainer(f, dataset=ones(), more={"processing_class": tokenizer(),
         "teacher_processing_class": other_tokenizer()}),
     ValueError, ["the tokenizers differ", "teacher_tokenizer=..."]),
    ("other tokenizer of a stream", lambda f: trainer(f, dataset=as_datasets(ones()).to_iterable_dataset(),
         more={"processing_class": tokenizer(), "teacher_processing_class": other_tokenizer()}, max_steps=1),
     ValueError, ["the tokenizers differ", "teacher_tokenizer=..."]),
    ("evaluation without the teacher's tokens", lambda f: trainer(f, dataset=as_datasets(rows("bert").with_columns(
         teacher_input_ids=rows("bert").columns["input_ids"])), evaluation=as_datasets(rows("bert")),
         more={"processing_class": tokenizer(), "teacher_processing_class": tokenizer()}),
     ValueError, ["the evaluation set lacks teacher_input_ids", "hfkd.data.tokenize"]),
    ("teacher's image processor alone", lambda f: image_trainer(f, [PNG] * 4, teacher=tiny_teacher("cifar",
         num_labels=2), trainer={"teacher_processing_class": processor_for(tiny("cifar", image_mean=(0.5,) * 3))}),
     ValueError, ["teacher_processing_class makes other images", "ImageDataset(..., teacher_processor=...)"]),
    ("best by no set", lambda f: trainer(f, evaluation={"one": rows("bert"), "two": rows("bert")},
         load_best_model_at_end=True, eval_strategy="epoch", save_strategy="epoch"),
     ValueError, ["metric_for_best_model is 'loss'", "eval_one_loss"]),
    ("label smoothing of numbers", lambda f: trainer(f, tiny("bert", num_labels=1), None, dataset=rows("bert"
         ).with_columns(labels=torch.randn(16)), label_smoothing_factor=0.1),
     ValueError, ["label_smoothing_factor is about classes", "set it to 0"]),
    ("student in half precision", lambda f: trainer(f, tiny("bert").bfloat16()),
     UserWarning, ["the student's weights are torch.bfloat16", "dtype=torch.float32"]),
    ("maps with the channels last", lambda f: image_trainer(f, [PNG] * 4, teacher=swin(), distiller=FitNet(
         student_layers="layer1", teacher_layers="timm_model.layers.0")),
     ValueError, ["FitNet compares a map", "the teacher's are NHWC (SwinTransformer)", "logits"]),
    ("attention to what comes before", lambda f: trainer(f, tiny("bert", is_decoder=True), distiller=AttentionMaps()),
     ValueError, ["BertForSequenceClassification attends to what comes before alone", "HiddenStates()"]),
    ("reentrant checkpointing", lambda f: trainer(f, distiller=HiddenStates(), **{CHECKPOINTING: {"use_reentrant":
         True}}),
     ValueError, ["HiddenStates learns from the student's inner layers", "leave use_reentrant out"]),
    ("influence behind z-scores", lambda f: StandardizedLogits(Combined({"one": KDAIF()}, task_from="one")),
     ValueError, ["KDAIF would measure influence on raw logits", "KDAIF(StandardizedLogits(...))"]),
    ("a bank behind z-scores", lambda f: StandardizedLogits(InContextKD()),
     ValueError, ["InContextKD compares z-scores with raw logits", "without wrapper"]),
    ("weights of another batch", lambda f: trainer(f, distiller=KDAIF(teacher_update="meta"), dataset=rows("bert"
         ).with_columns(sample_weight=torch.ones(16)), more={"held_out_dataset": rows("bert", 8, seed=1)}),
     ValueError, ['teacher_update="meta"', "drop the column sample_weight"]),
]
# fmt: on


@pytest.fixture
def no_step(monkeypatch, tmp_path):
    """Lets no optimizer take a step, keeps caches here and the Hub away, and is the example that runs."""

    def step(*arguments):
        raise AssertionError("it took a step")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HFKD_CACHE", str(tmp_path / "caches"))
    monkeypatch.setattr(sys.modules["__main__"], "__file__", run_glue_kd.__file__, raising=False)
    hook = register_optimizer_step_pre_hook(step)
    yield
    hook.remove()


def go(made):
    if isinstance(made, DistillationTrainer):
        made.train()


@pytest.mark.parametrize(("make", "error", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_mistakes_are_refused_before_the_first_step(tmp_path, no_step, make, error, words):
    with warnings.catch_warnings():
        if error is UserWarning:
            warnings.filterwarnings("error", f"(?s).*{re.escape(words[0])}", UserWarning)
        with pytest.raises(error) as caught:
            go(make(tmp_path))
    message = str(caught.value.args[0])
    assert [word for word in words if word not in message] == []
    assert sum(len(textwrap.wrap(line, 120)) for line in message.splitlines()) <= 5, message
    assert error is UserWarning or is_refusal(caught.value)


# What is no mistake


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK"])
@pytest.mark.parametrize("size", [32, 96])
def test_other_channels_are_made_into_the_models(mode, size):
    format = "JPEG" if mode == "CMYK" else "PNG"
    pictures = [picture(mode, (size, size), seed=i) for i in range(2)]
    dataset = ImageDataset(image_split([encoded(one, format) for one in pictures]), processor_for(tiny("cifar")))
    assert dataset.pixels is None or dataset.pixels.dtype == np.uint8
    pixels = dataset.__getitems__([0, 1])["pixel_values"]
    assert pixels.shape == (2, 3, 32, 32)
    assert pixels.isfinite().all()
    assert not torch.equal(pixels[0], pixels[1])


def test_evaluation_may_lack_classes_and_labels_may_be_soft(tmp_path, no_step):
    trainer(tmp_path, evaluation=labelled(2, 2, 2))
    trainer(tmp_path, dataset=labelled(*torch.eye(5).tolist()))


@pytest.mark.parametrize("family", ["classes", "numbers"])
def test_evaluation_labels_may_have_two_dimensions(tmp_path, family):
    classes, of_one = (
        (5, torch.eye(5)[rows("bert").columns["labels"]]) if family == "classes" else (1, torch.randn(16, 1))
    )
    found = []
    for labels in (of_one, of_one.argmax(1) if family == "classes" else of_one.flatten()):
        dataset = rows("bert").with_columns(labels=labels)
        models = tiny("bert", num_labels=classes), tiny_teacher("bert", num_labels=classes)
        made = trainer(tmp_path, *models, dataset=dataset, evaluation=dataset, max_steps=1)
        made.train()
        found.append({**made.evaluate_teacher(), "loss": made.evaluate()["eval_loss"]})
    assert found[0] == pytest.approx(found[1])
    assert {"loss", "accuracy" if family == "classes" else "mse"} == set(found[0])


def test_one_labelled_sample_is_no_class_of_its_own(tmp_path, no_step):
    trainer(tmp_path, dataset=labelled(*[-100] * 7, 3))


def test_tokenizers_that_agree_on_what_was_read_may_differ(tmp_path, no_step):
    larger = tokenizer()
    larger.add_tokens(["more"])
    trainer(tmp_path, dataset=as_datasets(rows("bert")), more={"teacher_processing_class": larger})


def test_a_teacher_that_is_good_is_no_matter(tmp_path, recwarn):
    teacher = tiny_teacher("bert")
    against(tmp_path, tiny("bert"), teacher, teacher, torch.argmax).train()
    assert not [warning for warning in recwarn if "the teacher" in str(warning.message)]
