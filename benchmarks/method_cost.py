"""What a method costs a training step, over plain KD and over the student alone.

    python benchmarks/method_cost.py
    python benchmarks/method_cost.py --methods "CAM()" --classes 10 100 1000
    python benchmarks/method_cost.py --methods "AEKT()" --over "DKD()" --classes 10 100 1000

A step is the trainer's own: teacher, student, loss, backward pass, clipping, optimizer and the method's hook at its
end; loading of data is left out. Images: ResNet-56 teaches ResNet-20 on 32 x 32 random pixels, batch 64, SGD. Text: a
BERT of MiniLM's width (384) and 6 layers teaches its layers 0 and 5, 16 sentences of 64 random tokens, AdamW. In each
round every method trains for a few steps, in random order, and is divided by what KD and the student alone took in the
same round; the table has the median over rounds and the quartiles. What is divided by runs twice a round ("again") and
its mean counts, so that its two rows show the noise. Times are CPU seconds of this process, which other jobs on the
machine stretch less than wall time; with one thread and an idle machine the two agree.

Reached on 2 shared cores (AMD EPYC) under a load of 3 to 8, one thread, 11 rounds, in 14 minutes: KD 1.8 times the
student alone; over KD, logit methods 0.96 to 1.01 (KD itself 1.00 and 1.00), CRD 1.34, ReviewKD 2.31; CAM at 1,000
classes 2.04. All of it: docs/methods.md.
"""

import argparse
import contextlib
import copy
import gc
import os
import shlex
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from cases import outspoken
from measure import interleave, machine, ratio, write
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, PrinterCallback, TrainerCallback
from transformers.utils import logging

import hfkd.distillers
from hfkd import DistillationTrainer, DistillationTrainingArguments
from hfkd.distillers import CRD, AttentionMaps, Distiller, HiddenStates
from hfkd.models import load_model, student_from_teacher


METHODS = [
    "TTM()",
    "WTTM()",
    "AKD()",
    "AKD('learned')",
    "AKD(cam=True)",
    "CAM()",
    "DKD()",
    "NKD()",
    "DIST()",
    "StandardizedLogits()",
    "LabelSmoothing()",
    "TfKD('virtual')",
    "SelfDistillation()",
    "DML()",
    "FitNet()",
    "AT()",
    "SP()",
    "RKD()",
    "PKT()",
    "VID()",
    "CRD()",
    "ReviewKD()",
    "AEKT()",
    "InContextKD()",
    "KDAIF()",
    "Combined({'wttm': WTTM(), 'crd': CRD()}, task_from='wttm')",
    "HiddenStates()",
    "HiddenStates('cosine')",
    "AttentionMaps()",
    "AttentionMaps('kl')",
]
ALONE, AGAIN = "StudentAlone()", "again"
RUNS = {"images": ("resnet56 to resnet20", 64), "text": ("BERT 6 to 2 layers", 16)}


def make(method: str) -> Distiller:
    return eval(method, {name: getattr(hfkd.distillers, name) for name in hfkd.distillers.__all__})


def kind_of(method: str) -> str:
    parts = make(method).modules()
    return "text" if any(isinstance(part, (HiddenStates, AttentionMaps)) for part in parts) else "images"


class RandomRows(Dataset):
    """Random inputs, 256 different ones, under as many row numbers as are wanted."""

    def __init__(self, kind: str, classes: int, size: int):
        generator = torch.Generator().manual_seed(0)
        if kind == "images":
            self.inputs = {"pixel_values": torch.randn(256, 3, 32, 32, generator=generator)}
        else:
            tokens = torch.randint(1000, 30000, (256, 64), generator=generator)
            self.inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        self.all_labels = torch.arange(size) % classes

    @property
    def labels(self):
        return self.all_labels.numpy()

    def __len__(self):
        return len(self.all_labels)

    def __getitem__(self, row):
        return {name: column[0] for name, column in self.__getitems__([row]).items()}

    def __getitems__(self, rows):
        rows = torch.tensor(rows)
        inputs = {name: column[rows % 256] for name, column in self.inputs.items()}
        return {**inputs, "labels": self.all_labels[rows], "index": rows}


def teacher_of(kind: str, classes: int):
    torch.manual_seed(0)
    if kind == "images":
        return outspoken(load_model("resnet56", num_labels=classes))
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=classes
    )
    return outspoken(BertForSequenceClassification(config).eval())


def parts(module: torch.nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


class Timer(TrainerCallback):
    """CPU seconds of each step, from before the teacher to behind the method's hook."""

    def __init__(self):
        self.steps = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(time.process_time() - self.start)


class Case:
    """One method with a student of its own, ready to train for a few steps again and again."""

    def __init__(self, method: str, kind: str, classes: int, teacher, folder: str):
        distiller = make(method)
        if kind == "images":
            student = load_model("resnet20", num_labels=classes)
        else:
            student = student_from_teacher(teacher, num_layers=2)
        if distiller.trains_teacher:
            teacher = copy.deepcopy(teacher)  # the other cases' stays as it is
        takes_teacher = distiller.needs_teacher and distiller.make_teacher(student) is None
        optimizer = {"optim": "sgd", "optim_args": "momentum=0.9"} if kind == "images" else {}
        arguments = DistillationTrainingArguments(
            folder,
            per_device_train_batch_size=RUNS[kind][1],
            learning_rate=1e-3,
            weight_decay=5e-4,
            lr_scheduler_type="constant",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **optimizer,
        )
        # The memories of CRD are as long as the training set; nothing else in a step depends on it.
        size = 50_000 if any(isinstance(part, CRD) for part in distiller.modules()) else 1024
        self.timer = Timer()
        self.trainer = DistillationTrainer(
            student,
            teacher if takes_teacher else None,
            distiller,
            arguments,
            train_dataset=RandomRows(kind, classes, size),
            held_out_dataset=RandomRows(kind, classes, 256),
        )
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.add_callback(self.timer)  # behind the hooks of the method
        made = () if takes_teacher or self.trainer.teacher_model is None else parts(self.trainer.teacher_model)
        tensors = [*parts(distiller), *made]
        self.parameters = sum(parameter.numel() for parameter in distiller.parameters())
        self.megabytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6
        self.kept = self._kept()

    def _kept(self) -> float:
        """Megabytes that a step keeps for its backward pass, parameters aside; its time does not count."""
        sizes = {}
        own = {tensor.data_ptr() for model in (self.trainer.model, self.trainer.distiller) for tensor in parts(model)}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self._train(1)
        return sum(sizes.values()) / 1e6

    def _train(self, steps: int) -> list[float]:
        self.timer.steps.clear()
        self.trainer.args.max_steps = steps
        with contextlib.redirect_stdout(sys.stderr):
            self.trainer.train()
        return list(self.timer.steps)

    def seconds(self, steps: int) -> float:
        return statistics.median(self._train(steps))


def run(kind: str, classes: int, methods: list[str], over: str, rounds: int, steps: int) -> list[dict]:
    teacher = teacher_of(kind, classes)
    names = {ALONE: ALONE, over: over, AGAIN: over, **{method: method for method in methods}}
    with tempfile.TemporaryDirectory() as folder:
        cases = {name: Case(method, kind, classes, teacher, folder) for name, method in names.items()}
        seconds = interleave({name: partial(case.seconds, steps) for name, case in cases.items()}, rounds)
    base = [(one + other) / 2 for one, other in zip(seconds[over], seconds[AGAIN], strict=True)]
    rows = []
    for name, case in cases.items():
        row = {"run": kind, "classes": classes, "method": name, "over": over}
        row["step_ms"] = 1000 * statistics.median(seconds[name])
        row["ratio"] = ratio(seconds[name], base)
        row["ratio_alone"] = ratio(seconds[name], seconds[ALONE])
        row["parameters"], row["state_mb"] = case.parameters, case.megabytes
        row["kept_mb"] = case.kept - cases[over].kept
        rows.append({**row, "seconds": seconds[name]})
    return rows


def table(rows: list[dict], over: str) -> str:
    lines = [
        f"| method | classes | step (ms) | over `{over}` | over `{ALONE}` | own parameters | own state (MB) "
        f"| kept for backward, over `{over}` (MB) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"`{row['over']}` again" if row["method"] == AGAIN else f"`{row['method']}`"
        ratios = ("{value:.2f} ({low:.2f}–{high:.2f})".format(**row[key]) for key in ("ratio", "ratio_alone"))
        cells = [name, row["classes"], f"{row['step_ms']:.0f}", *ratios, f"{row['parameters']:,}"]
        lines.append(f"| {' | '.join(map(str, cells))} | {row['state_mb']:.2f} | {row['kept_mb']:+.2f} |")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS, help="as one writes them, such as \"AKD('learned')\"")
    parser.add_argument("--over", default="KD()", help="what they are divided by")
    parser.add_argument("--classes", nargs="+", type=int, default=[100])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps of each method in a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("outputs/method_cost.json"))
    args = parser.parse_args(words)
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    load = [os.getloadavg()[0]]
    methods = [method for method in args.methods if method not in (ALONE, args.over)]
    rows = []
    for kind in RUNS:
        chosen = [method for method in methods if kind_of(method) == kind]
        if chosen or (kind == "images" and not methods):
            for classes in args.classes:
                rows += run(kind, classes, chosen, args.over, args.rounds, args.steps)
    load.append(os.getloadavg()[0])
    how = f"load {load[0]:.1f} to {load[1]:.1f}; {args.rounds} rounds of {args.steps} steps, median (quartiles)"
    for kind, (models, batch) in RUNS.items():
        if own := [row for row in rows if row["run"] == kind]:
            print(f"\n{models}, batch {batch}; {machine()}, {how}\n\n{table(own, args.over)}", flush=True)
    command = shlex.join(["python", "benchmarks/method_cost.py", *(sys.argv[1:] if words is None else words)])
    write(args.output, command=command, load=load, rows=rows)
    return rows


if __name__ == "__main__":
    gc.freeze()  # every train() collects garbage, and would look through all that was imported
    main()
    gc.unfreeze()
