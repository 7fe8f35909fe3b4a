"""Tiny models, data sets and trainers that the tests share. Nothing here touches the network."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import datasets
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hfkd import DistillationTrainer, DistillationTrainingArguments
from hfkd.distillers import KD, Distiller, Wrapper
from hfkd.functional import kd_loss
from hfkd.models import CifarConfig, CifarForImageClassification


DATA = Path(os.environ.get("HFKD_DATA_DIR") or Path(__file__).resolve().parents[2] / "shared" / "data")
NUM_LABELS = 5
VOCABULARY = 60
FAMILIES = ("bert", "distilbert", "vit", "resnet", "timm", "cifar")
TEXT = ("bert", "distilbert")


def _bert(dropout, **config):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    chances = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **{**sizes, **chances, **config}))


def _distilbert(dropout, **config):
    sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
    chances = {"dropout": dropout, "attention_dropout": dropout, "seq_classif_dropout": dropout}
    return DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=VOCABULARY, **{**sizes, **chances, **config})
    )


def _vit(dropout, **config):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    chances = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **{**sizes, **chances, **config}))


def _resnet(dropout, **config):
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**{**sizes, **config}))


def _timm(dropout, initializer_range=None, **config):
    return TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_efficientnet", **config))


def _cifar(dropout, initializer_range=None, **config):
    return CifarForImageClassification(CifarConfig(architecture="resnet8", **config))


BUILDERS = {"bert": _bert, "distilbert": _distilbert, "vit": _vit, "resnet": _resnet, "timm": _timm, "cifar": _cifar}


def tiny(family: str, *, seed: int = 0, dropout: float = 0.0, **config) -> nn.Module:
    """A small random classifier whose weights are large enough for gradients to reach every layer."""
    torch.manual_seed(seed)
    return BUILDERS[family](dropout, **{"num_labels": NUM_LABELS, "initializer_range": 0.2, **config})


def tiny_teacher(family: str, *, seed: int = 100, **config) -> nn.Module:
    """The same with outspoken answers, BatchNorm statistics of its own and a bias that does not look initial."""
    model = tiny(family, seed=seed, **config)
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        head.weight.mul_(5)
        head.bias.normal_()
        for module in batch_norms(model):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.8, 1.2)
    return model


def batch_norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def freeze_batch_norm(model: nn.Module) -> nn.Module:
    """Keep BatchNorm in evaluation mode, whatever ``model.train()`` says: batches of any size then add up."""
    for module in batch_norms(model):
        module.__class__ = type(
            "Frozen", (type(module),), {"train": lambda self, mode=True: nn.Module.train(self, False)}
        )
        module.eval()
    return model


def tokenizer(**options) -> PreTrainedTokenizerFast:
    """Words are numbers below the vocabulary size; 0 pads."""
    words = Tokenizer(WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="1"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="0", unk_token="1", model_max_length=16, **options
    )


class Rows(Dataset):
    """A map-style data set that is no ``datasets.Dataset``; texts come without their padding."""

    def __init__(self, columns: dict[str, torch.Tensor]):
        self.columns = columns

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, i):
        row = {name: column[i] for name, column in self.columns.items()}
        if "attention_mask" in row:
            length = row["attention_mask"].sum()
            row |= {name: row[name][:length] for name in ("input_ids", "attention_mask", "token_type_ids")}
        return row

    def with_columns(self, **columns):
        kept = {name: column for name, column in {**self.columns, **columns}.items() if column is not None}
        return Rows(kept)

    def double(self):
        """Floats in double precision, where a ReLU's kink cannot turn rounding into a difference."""
        return Rows(
            {name: column.double() if column.is_floating_point() else column for name, column in self.columns.items()}
        )

    @property
    def labels(self):
        return self.columns["labels"].numpy() if "labels" in self.columns else None


def rows(family: str = "bert", n: int = 16, *, seed: int = 0, length: int = 7) -> Rows:
    """Random inputs, labels and row numbers for a family; texts end in padding of varying length."""
    generator = torch.Generator().manual_seed(seed)
    if family in TEXT:
        lengths = torch.randint(3, length + 1, (n, 1), generator=generator)
        mask = (torch.arange(length) < lengths).long()
        columns = {
            "input_ids": torch.randint(1, VOCABULARY, (n, length), generator=generator) * mask,
            "attention_mask": mask,
            "token_type_ids": torch.randint(0, 2, (n, length), generator=generator) * mask,
        }
    else:
        columns = {"pixel_values": torch.randn(n, 3, 16, 16, generator=generator)}
    columns["labels"] = torch.randint(0, NUM_LABELS, (n,), generator=generator)
    columns["index"] = torch.arange(n)
    return Rows(columns)


def named(model, names):
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    return model


def as_datasets(dataset, **columns):
    features = {name: [row[name].tolist() for row in dataset] for name in dataset.columns}
    return datasets.Dataset.from_dict({**features, **columns})


def hub_rows(n: int = 16, *, seed: int = 0, length: int = 7, **columns):
    """The texts of :func:`rows` as a tokenizer leaves them, without padding, in a ``datasets.Dataset``."""
    texts = rows("bert", n, seed=seed, length=length).columns
    lengths = texts["attention_mask"].sum(1).tolist()
    names = ("input_ids", "attention_mask", "token_type_ids")
    lists = {name: [row[:k] for row, k in zip(texts[name].tolist(), lengths, strict=True)] for name in names}
    return datasets.Dataset.from_dict(
        {**lists, "labels": texts["labels"].tolist(), "index": list(range(100, 100 + n)), **columns}
    )


def widths(model: nn.Module) -> list[int]:
    """How many tokens wide the batches are that a model of texts gets from now on."""
    seen: list[int] = []
    model.register_forward_hook(
        lambda _, given, named, out: seen.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    return seen


def make_trainer(folder, student, teacher=None, distiller=None, dataset=None, *, trainer=None, **arguments):
    """A trainer on the CPU with plain SGD, no clipping and a log a step; ``trainer=`` holds its other arguments."""
    defaults = {
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    if student is not None and student.config.model_type in TEXT:
        trainer = {"processing_class": tokenizer(), **(trainer or {})}
    args = DistillationTrainingArguments(os.fspath(folder), **{**defaults, **arguments})
    return DistillationTrainer(
        model=student, teacher_model=teacher, distiller=distiller, args=args, train_dataset=dataset, **(trainer or {})
    )


def weights(*modules: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all parameters and buffers."""
    return {
        f"{i}.{name}": tensor.detach().clone()
        for i, module in enumerate(modules)
        for name, tensor in module.state_dict().items()
    }


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def assert_identical(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def logged(trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


class Weighted(Wrapper):
    """Learned balance of another method's terms: a factor of shape (1,) and a matrix over the classes."""

    default_learning_rate = 0.05

    def __init__(self, base=None):
        super().__init__(base if base is not None else KD(alpha=0.5, temperature=2.0))
        self.log_factor = nn.Parameter(torch.zeros(1))

    def setup(self, context):
        super().setup(context)
        classes = context.student.config.num_labels
        mixing = torch.eye(classes) + 0.1 * torch.randn(classes, classes)
        self.mixing = nn.Parameter(mixing.to(next(context.student.parameters()).dtype))

    def forward(self, student, teacher, batch):
        moved = type(teacher)(teacher.logits @ self.mixing, features=teacher.features)
        terms = super().forward(student, moved, batch)
        return {name: term * self.log_factor.exp() for name, term in terms.items()}


class MovingAverage(Wrapper):
    """Teaches the student by the average of its own past: a made teacher that on_step_end moves."""

    def __init__(self, base=None, decay: float = 0.5):
        super().__init__(base if base is not None else KD(alpha=0.5, temperature=2.0))
        self.decay = decay

    def make_teacher(self, student):
        return copy.deepcopy(student)

    @torch.no_grad()
    def on_step_end(self, context):
        super().on_step_end(context)
        student = context.student.state_dict()
        for name, tensor in context.teacher_model.state_dict().items():
            if tensor.is_floating_point():
                tensor.lerp_(student[name], 1 - self.decay)


class Mutual(Distiller):
    """Two networks that learn from the labels and from each other."""

    trains_teacher = True

    def forward(self, student, teacher, batch):
        kd = kd_loss(student.logits, teacher.logits, temperature=1.0, reduction="none")
        return {"task": self.task_loss(student, batch), "kd": kd}

    def teacher_terms(self, teacher, student, batch):
        kd = kd_loss(teacher.logits, student.logits, temperature=1.0, reduction="none")
        return {"teacher_task": self.hard_label_loss(teacher.logits, batch["labels"]), "teacher_kd": kd}


class Bank(KD):
    """Keeps the teacher's latest answer to every sample, alike on all processes."""

    batch_columns = ("index",)

    def setup(self, context):
        self.register_buffer("answers", torch.zeros(len(context.train_dataset), context.student.config.num_labels))
        self.register_buffer("visits", torch.zeros(len(context.train_dataset), dtype=torch.long))

    def forward(self, student, teacher, batch):
        self.seen = batch["index"], teacher.logits
        return super().forward(student, teacher, batch)

    def on_step_end(self, context):
        index, logits = (context.gather(tensor) for tensor in self.seen)
        self.answers[index] = logits
        self.visits[index] += 1


class Around(Dataset):
    """A data set around another that knows nothing of epochs."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        return self.dataset[i]
