"""What a refresh of KD-AIF costs, in time and memory, over an evaluation pass and over per-sample gradients.

    python benchmarks/influence.py
    python benchmarks/influence.py --quick

Time. A refresh is the trainer's own, at the start of an epoch: gradient on the held-out samples (a tenth of all),
influence of the others, weights and table. An evaluation pass is ``trainer.evaluate()`` over the same samples. The
teacher's answers are a column of the data, as from a full cache. Images: ResNet-20 with its published weights on
CIFAR-10; text: MiniLM (6 layers, 384 wide) on pairs of MRPC; random pixels and tokens where those are not there. In
each round all cases run once, in random order; a ratio is taken within a round, and the record has the median over
rounds and the quartiles. Times are CPU seconds of this process, which has one thread: other jobs on the machine
stretch them less than wall time. Per-sample gradients: a plain backward pass a sample, and ``vmap(grad)`` at batch 64,
each multiplied with the direction that ``hfkd.influence.directional_derivatives`` takes, on the same images.

Memory. A child process trains for two epochs, with a refresh between them or without, and watches its anonymous
resident memory (a mapped file is not memory); what it had before the first step is taken off: interpreter, libraries,
models and data. One ratio is that of the peaks of the whole process, one that of what training adds.
"""

import argparse
import contextlib
import gc
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import cases
import datasets
import numpy as np
import torch
import torch.nn.functional as F
from cases import DATA
from measure import PeakMemory, interleave, ratio, run_script, table, write
from torch.func import functional_call, grad, vmap
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    TrainerCallback,
    default_data_collator,
)
from transformers.utils import logging

from hfkd import DistillationTrainer, DistillationTrainingArguments
from hfkd.data import DistillationCollator, ImageDataset, load_text_data, processor_for, tokenize
from hfkd.distillers import KDAIF
from hfkd.features import use_channels_last
from hfkd.influence import directional_derivatives, forward_mode_ready
from hfkd.models import load_model


WEIGHTS = DATA / "teachers" / "resnet20_cifar10.safetensors"
BATCH = {"images": 64, "text": 16}
NAMES = {"images": "ResNet-20", "text": "BERT"}
# One refresh of each kind: time over an evaluation pass, and memory of a run over one without.
REFRESHES = {
    "last layer": {"layers": "last"},
    "last layer, first order": {"layers": "last", "hessian": "identity"},
    "all parameters": {"layers": "all", "hessian": "identity"},
    "all parameters, LiSSA": {"layers": "all", "hessian": "lissa", "iterations": 4},
}
TIMED = {"last layer": "<= 1.3", "last layer, first order": "<= 1.3", "all parameters": "<= 4"}
MEMORY = "<= 1.3"


def with_answers(split: datasets.Dataset, classes: int) -> datasets.Dataset:
    answers = np.random.default_rng(0).normal(size=(len(split), classes)).astype(np.float32)
    return split.add_column("teacher_logits", list(answers))


def images(size: int):
    """ResNet-20, its images and how to collate them."""
    student = load_model(WEIGHTS) if WEIGHTS.is_file() else load_model("resnet20", num_labels=10)
    split = cases.images(size)
    return student, lambda rows: ImageDataset(with_answers(split.select(rows), 10), processor_for(student)), None


def text(size: int):
    """A 6-layer BERT, its sentences and how to collate them."""
    collate, folder = default_data_collator, cases.minilm()
    if folder is None:
        config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
        student = BertForSequenceClassification(config)
    else:
        student = load_model(folder, task="text-classification", num_labels=2)
    if folder is not None and (DATA / "glue" / "mrpc").is_dir():
        data = load_text_data("mrpc", data_dir=DATA / "glue" / "mrpc", max_train_samples=size)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        split, collate = tokenize(data, tokenizer).train, DistillationCollator(tokenizer)
    else:
        generator = np.random.default_rng(0)
        columns = {
            "input_ids": generator.integers(1000, 30000, (size, 64)),
            "attention_mask": np.ones((size, 64), dtype=np.int64),
            "labels": np.arange(size) % 2,
            "index": np.arange(size),
        }
        split = datasets.Dataset.from_dict(columns)
    return student, lambda rows: with_answers(split.select(rows), 2), collate


class Timed(KDAIF):
    """Knows how long its latest refresh took."""

    def refresh(self, context):
        start = time.process_time()
        super().refresh(context)
        self.seconds = time.process_time() - start


def make_trainer(
    kind: str, size: int, held_out: int, folder: str, distiller: KDAIF, **arguments
) -> DistillationTrainer:
    """A trainer on ``size`` rows, of which ``held_out`` are held out."""
    torch.manual_seed(0)
    student, part, collate = {"images": images, "text": text}[kind](size)
    optimizer = {"optim": "sgd", "optim_args": "momentum=0.9"} if kind == "images" else {}
    settings = {"per_device_train_batch_size": BATCH[kind], "per_device_eval_batch_size": BATCH[kind], **arguments}
    trainer = DistillationTrainer(
        student,
        None,
        distiller,
        DistillationTrainingArguments(
            folder,
            learning_rate=1e-5,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **optimizer,
            **settings,
        ),
        data_collator=collate,
        train_dataset=part(range(held_out, size)),
        held_out_dataset=part(range(held_out)),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


# Time


class Refresh:
    """One way to refresh, ready to run again and again."""

    def __init__(self, kind: str, size: int, folder: str, options: dict):
        self.distiller = Timed(warm_up=0.0, **options)
        self.trainer = make_trainer(kind, size, size // 10, folder, self.distiller, max_steps=1)

    def refresh(self) -> float:
        with contextlib.redirect_stdout(sys.stderr):
            self.trainer.train()
        return self.distiller.seconds

    def evaluate(self) -> float:
        start = time.process_time()
        for dataset in (self.trainer.train_dataset, self.trainer.held_out_dataset):
            self.trainer.evaluate(dataset)
        return time.process_time() - start


def refreshes_over_evaluation(kind: str, size: int, rounds: int) -> dict[str, dict]:
    with tempfile.TemporaryDirectory() as folder:
        made = {name: Refresh(kind, size, folder, REFRESHES[name]) for name in TIMED}
        cases = {name: case.refresh for name, case in made.items()}
        seconds = interleave({**cases, "evaluation": next(iter(made.values())).evaluate}, rounds)
    return {
        f"KDAIF refresh, {name} / evaluation pass, {NAMES[kind]}": ratio(seconds[name], seconds["evaluation"], target)
        for name, target in TIMED.items()
    }


def with_per_sample_gradients(size: int, rounds: int) -> dict[str, dict]:
    """How much faster one forward-mode pass is than gradients sample by sample, on ResNet-20."""
    student, part, _ = images(size)
    use_channels_last(student).eval()
    columns = part(range(size)).__getitems__(list(range(size)))
    batches = [
        {name: column[start : start + 64] for name, column in columns.items() if name in ("pixel_values", "labels")}
        for start in range(0, size, 64)
    ]
    parameters = {name: parameter.detach() for name, parameter in student.named_parameters()}
    plain = {name: parameter.contiguous() for name, parameter in parameters.items()}  # vmap is faster with these
    direction = {name: torch.randn_like(parameter) for name, parameter in parameters.items()}

    def losses(parameters, batch):
        logits = functional_call(student, parameters, (batch["pixel_values"],)).logits
        return F.cross_entropy(logits, batch["labels"], reduction="none")

    def along(gradients):
        return sum((gradients[name] * direction[name]).sum() for name in direction)

    def forward_mode():
        with forward_mode_ready(student):
            return directional_derivatives(losses, parameters, lambda: batches, direction)

    def loop():
        found = []
        for batch in batches:
            for pixels, label in zip(batch["pixel_values"], batch["labels"], strict=True):
                loss = F.cross_entropy(student(pixel_values=pixels[None]).logits, label[None])
                gradients = torch.autograd.grad(loss, list(student.parameters()))
                found.append(along(dict(zip(direction, gradients, strict=True))))
        return torch.stack(found)

    def vectorised(parameters):
        def loss(parameters, pixels, label):
            return losses(parameters, {"pixel_values": pixels[None], "labels": label[None]})[0]

        of_samples = vmap(lambda *sample: along(grad(loss)(parameters, *sample)))
        return torch.cat([of_samples(batch["pixel_values"], batch["labels"]) for batch in batches])

    def timed(way):
        def run():
            start = time.process_time()
            way()
            return time.process_time() - start

        return run

    ways = {
        "forward mode": forward_mode,
        "loop": loop,
        "vmap": lambda: vectorised(plain),
        "vmap as laid out": lambda: vectorised(parameters),
    }
    answers = {name: way() for name, way in ways.items()}
    for name, answer in answers.items():
        torch.testing.assert_close(answer, answers["loop"], rtol=1e-3, atol=1e-3 * answer.abs().max().item(), msg=name)
    seconds = interleave({name: timed(way) for name, way in ways.items()}, rounds)
    names = {
        "loop": ("per-sample backward loop / forward-mode pass, ResNet-20", ">= 4"),
        "vmap": ("vmap(grad) at batch 64 / forward-mode pass, ResNet-20", ">= 2"),
        "vmap as laid out": ("vmap(grad) on the trainer's channels-last weights / forward-mode pass, ResNet-20", None),
    }
    return {name: ratio(seconds[way], seconds["forward mode"], target) for way, (name, target) in names.items()}


# Memory


class Watch(TrainerCallback):
    """Memory from before the first step on."""

    def __init__(self):
        self.memory = PeakMemory()

    def on_epoch_begin(self, args, state, control, **kwargs):
        if not state.global_step:
            gc.collect()
            self.memory.__enter__()

    def on_train_end(self, args, state, control, **kwargs):
        self.memory.__exit__()


def watched_run(kind: str, refresh: str, batch: int, evaluation_batch: int, size: int) -> dict[str, int]:
    """In a process of its own: a run of two epochs, a refresh between them; ``"none"`` is without."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warm_up = {"refresh_epochs": 9, "warm_up": 0.99} if refresh == "none" else {"warm_up": 0.5}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        trainer = make_trainer(
            kind,
            size,
            size // 3,
            folder,
            KDAIF(**warm_up, **REFRESHES.get(refresh, {})),
            num_train_epochs=2,
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=evaluation_batch,
        )
        watch = Watch()
        trainer.callback_handler.callbacks.insert(0, watch)  # before the hooks of the method
        trainer.train()
    return {"base": watch.memory.start, "peak": watch.memory.peak}


def memory_of_refreshes(kind: str, batch: int, evaluation_batch: int, rounds: int) -> dict[str, dict]:
    size = 3 * max(batch, evaluation_batch)
    found = {name: [] for name in ("none", *REFRESHES)}
    for number in range(rounds):
        for name in random.Random(number).sample(list(found), len(found)):
            words = map(str, ("--child", kind, name, batch, evaluation_batch, size))
            found[name].append(json.loads(run_script(Path(__file__), *words)))
    where = f"{NAMES[kind]}, batch {batch}, evaluation batch {evaluation_batch}"
    peaks = {name: [run["peak"] for run in runs] for name, runs in found.items()}
    grown = {name: [run["peak"] - run["base"] for run in runs] for name, runs in found.items()}
    return {
        f"{what}, refresh ({name}) / none, {where}": ratio(sizes[name], sizes["none"], MEMORY)
        for what, sizes in {"peak memory of a run": peaks, "its growth in training": grown}.items()
        for name in REFRESHES
    }


def ratios(quick: bool = False) -> dict[str, dict]:
    """All targets of influence, with what was reached."""
    rounds = 3 if quick else 5
    return {
        **refreshes_over_evaluation("images", 256 if quick else 2048, rounds),
        **refreshes_over_evaluation("text", 32 if quick else 256, rounds),
        **with_per_sample_gradients(128 if quick else 256, rounds if quick else 9),
        **memory_of_refreshes("images", 64, 64 if quick else 512, 1 if quick else 3),
        **({} if quick else memory_of_refreshes("text", 16, 64, 3)),
    }


def main(words: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few samples and rounds, in about two minutes")
    parser.add_argument("--output", type=Path, default=Path("outputs/influence.json"))
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of children
    logging.set_verbosity_error()
    found = ratios(args.quick)
    print(table(found))
    return write(args.output, ratios=found)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        kind, refresh, *sizes = sys.argv[2:]
        print(json.dumps(watched_run(kind, refresh, *map(int, sizes))))
    else:
        gc.freeze()  # every train() collects garbage, and would look through all that was imported
        main()
        gc.unfreeze()
