"""hfkd against plain training, the loop of the literature, torchdistill and TextBrewer: ratios, each in one run.

    python benchmarks/run.py --output outputs/bench.json          # or make bench: under 30 minutes on 2 cores
    python benchmarks/run.py --quick --output outputs/bench.json  # under 3 minutes, and only shows that it runs

All sides of a ratio run in turn, in random order, a few rounds long; a ratio is taken in each round, and the table has
the median with the quartiles (of fewer than 7 rounds the range). A target is met or missed when the whole interval is
on one side. Everybody computes in
float32 with as many threads as there are cores; ``--bf16`` and ``--torch_compile`` are given to hfkd's trainer alone.
An epoch is the loop from its first batch to its last step, without making trainers and saving.

Writes the ratios as JSON, and beside it a figure. Sides that need torchdistill, TextBrewer or MiniLM (the extra
``bench``) are left out where these are missing, and said to be.
"""

import argparse
import contextlib
import copy
import gc
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cases
import numpy as np
import opponents
import torch
from cases import DATA, TEXT, Epochs, FixedBatches, image_models, image_set, images, text_models_and_data
from measure import interleave, machine, ratio, run_script, seconds_of, summary, table, verdict, write
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.utils import logging

from hfkd import DistillationTrainer, DistillationTrainingArguments
from hfkd.data import DistillationCollator
from hfkd.distillers import KD


HERE = Path(__file__).parent
RESNET, WRN = cases.PAIRS


@dataclass
class Size:
    """How much is run."""

    images: int = 2048
    wide_images: int = 2048
    sentences: int = 1024
    steps: int = 4
    step_rounds: int = 15
    rounds: int = 5
    slow_rounds: int = 3
    starts: int = 3


QUICK = Size(images=128, wide_images=64, sentences=32, steps=2, step_rounds=2, rounds=2, slow_rounds=1, starts=1)


class Benchmark:
    """What is run and what came out; each ``measure_…`` adds its ratios."""

    def __init__(self, size: Size, folder: Path, options: dict):
        self.size, self.folder, self.options = size, folder, options
        self.ratios, self.skipped = {}, {}
        self.trainers = 0

    def trainer(self, student, teacher, train, **kwargs) -> Epochs:
        self.trainers += 1
        return Epochs(student, teacher, train, self.folder / f"run-{self.trainers}", **{**self.options, **kwargs})

    def measure_steps(self) -> None:
        """A step of ours with the teacher, and the same tensors through a bare loop."""
        for name, models, batches, batch_size in self._step_cases():
            (teacher, student), (bare_teacher, bare_student) = models(), models()
            online = self.trainer(student, teacher, FixedBatches(batches), batch_size=batch_size)
            bare = _bare_loop(bare_teacher, bare_student, batches)
            measured = interleave(
                {"online": online, "bare": lambda bare=bare: seconds_of(bare)}, self.size.step_rounds
            )
            name = f"online KD step / (student step + teacher forward), {name}"
            self.ratios[name] = ratio(measured["online"], measured["bare"], "<= 1.05")

    def _step_cases(self) -> Iterator:
        generator = torch.Generator().manual_seed(0)
        pictures = [
            {
                "pixel_values": torch.randn(64, 3, 32, 32, generator=generator),
                "labels": torch.arange(64) % 10,
                "index": torch.arange(64) + 64 * step,
            }
            for step in range(self.size.steps)
        ]
        yield RESNET, lambda: image_models(RESNET), pictures, 64
        with self._unless_missing(f"steps, {TEXT}"):
            *_, train, tokenizer = text_models_and_data(32 * max(1, self.size.steps // 2))
            sentences = list(DataLoader(train, 32, collate_fn=DistillationCollator(tokenizer)))
            yield TEXT, lambda: text_models_and_data(1)[:2], sentences, 32

    def measure_images(self) -> None:
        """Epochs of both pairs of networks."""
        for pair, number, rounds in (
            (RESNET, self.size.images, self.size.rounds),
            (WRN, self.size.wide_images, self.size.slow_rounds),
        ):
            split = images(number)
            pictures = opponents.Pictures(np.stack([np.asarray(image) for image in split["image"]]), split["label"])
            teacher, student = image_models(pair)
            loop = opponents.reference_loop(
                *(model.to(cases.device()) for model in image_models(pair)), pictures, batch_size=64
            )
            sides = {"reference": lambda loop=loop: seconds_of(loop)}
            if pair == RESNET:
                with self._unless_missing("torchdistill"):
                    box = opponents.torchdistill_box(pictures, batch_size=64)
                    sides["torchdistill"] = lambda box=box: seconds_of(box)
            self._epochs(
                pair, sides, teacher, student, lambda views, s=split, m=student: image_set(s, m, views), rounds
            )
            gold = {"online": 1.4, "cached": 2.5} if pair == RESNET else {"online": 1.1, "cached": 2.2}
            for side in sides:
                name = "the reference loop" if side == "reference" else side
                for ours, factor in gold.items():
                    self._against(f"epoch against {name}, {pair}, {ours}", side, ours, f">= {factor}")

    def measure_text(self) -> None:
        """Epochs of MiniLM's layers."""
        found = None
        with self._unless_missing(TEXT):
            found = text_models_and_data(self.size.sentences)
        if found is None:
            return
        teacher, student, train, tokenizer = found
        collator = DistillationCollator(tokenizer)
        sides = {}
        with self._unless_missing("TextBrewer"):
            columns = train.remove_columns("index")
            loader = DataLoader(columns, 32, shuffle=True, collate_fn=collator)
            theirs = opponents.textbrewer_distiller(copy.deepcopy(teacher), copy.deepcopy(student), loader)
            sides["TextBrewer"] = lambda: seconds_of(theirs)
        options = {"batch_size": 32, "tokenizer": tokenizer}
        self._epochs(TEXT, sides, teacher, student, lambda views: train, self.size.slow_rounds, **options)
        for side in sides:
            for ours, factor in {"online": 1.3, "cached": 2}.items():
                self._against(f"epoch against {side}, {TEXT} on MRPC, {ours}", side, ours, f">= {factor}")

    def measure_evaluation(self) -> None:
        """A pass over texts of different lengths, by transformers' Trainer and by ours."""
        found = None
        with self._unless_missing(f"evaluation, {TEXT}"):
            found = text_models_and_data(self.size.sentences)
        if found is None:
            return
        _, student, texts, tokenizer = found
        options = {"bf16": self.options.get("bf16", False), "use_cpu": cases.device().type == "cpu"}
        given = {"model": student, "eval_dataset": texts, "processing_class": tokenizer}
        sides = {}
        for side, trainer, arguments in (
            ("transformers", Trainer, TrainingArguments),
            ("hfkd", DistillationTrainer, DistillationTrainingArguments),
        ):
            args = arguments(str(self.folder / side), disable_tqdm=True, per_device_eval_batch_size=64, **options)
            sides[side] = trainer(args=args, **given)
            sides[side].remove_callback(PrinterCallback)
        seconds = interleave({side: partial(seconds_of, it.evaluate) for side, it in sides.items()}, self.size.rounds)
        name = f"evaluation by transformers' Trainer / ours, 2 layers of MiniLM on {len(texts):,} pairs of MRPC"
        self.ratios[name] = ratio(seconds["transformers"], seconds["hfkd"], ">= 1.3")

    def _epochs(self, pair, sides, teacher, student, data, rounds, **options) -> None:
        """Time an epoch of every side, of the student alone, and of ours online and from a full cache."""
        students = [copy.deepcopy(student) for _ in range(3)]
        alone = self.trainer(students[0], None, data(None), **options)
        online = self.trainer(students[1], copy.deepcopy(teacher), data(None), **options)
        folder = self.folder / f"cache-{len(self.ratios)}"
        cached = self.trainer(students[2], teacher, data(2), teacher_cache=str(folder), **options)
        cost = cached.fill()
        self.seconds = interleave({**sides, "alone": alone, "online": online, "cached": cached}, rounds)
        saved = float(np.median(np.subtract(self.seconds["online"], self.seconds["cached"])))
        self.cost = {
            "fill_seconds": cost["fill_seconds"],
            "bytes": cost["bytes"],
            "break_even_epochs": cost["fill_seconds"] / saved if saved > 0 else None,
        }
        self._against(f"cached KD step / student-only step, {pair}", "cached", "alone", "<= 1.05")

    def _against(self, name: str, one: str, other: str, target: str) -> None:
        self.ratios[name] = ratio(self.seconds[one], self.seconds[other], target)
        if "cached" in (one, other):
            self.ratios[name].update(self.cost)

    def measure_input(self) -> None:
        """Batches of 64 in one process: ours, and image by image through torchvision."""
        split = images(self.size.images)
        ours = image_set(split, image_models(RESNET)[1])
        pictures = opponents.Pictures(np.stack([np.asarray(image) for image in split["image"]]), split["label"])
        rows = torch.randperm(len(split)).tolist()
        theirs = DataLoader(pictures, 64, sampler=rows)

        def batches():
            for start in range(0, len(rows), 64):
                ours.__getitems__(rows[start : start + 64])

        sides = {"ours": batches, "torchvision": lambda: list(theirs)}
        seconds = interleave({name: lambda work=work: seconds_of(work) for name, work in sides.items()}, 5)
        name = "images/s of the input pipeline / per-sample torchvision, batch 64"
        self.ratios[name] = ratio(seconds["torchvision"], seconds["ours"], ">= 10")

    def measure_start(self) -> None:
        """Seconds from the command to the first logged step, once its data has been read before."""
        if not (DATA / "cifar10_jpeg").is_dir():
            self.skipped["time to first step"] = "cifar10_jpeg (HFKD_DATA_DIR) is missing"
            return
        script = HERE.parent / "examples/run_image_kd.py"
        words = [
            "--dataset",
            "cifar10",
            "--data_dir",
            DATA / "cifar10_jpeg",
            "--student",
            "resnet20",
            "--disable_tqdm",
            "True",
        ]
        words += ["--teacher", DATA / "teachers/resnet56_cifar10_jpeg.safetensors", "--logging_steps", "1"]
        command = [sys.executable, "-u", script, *words, "--output_dir", self.folder / "start"]
        starts = []
        for _ in range(self.size.starts + 1):
            begin = time.perf_counter()
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
                line = next((line for line in process.stdout if "'loss'" in line), None)
                starts.append(time.perf_counter() - begin)
                process.kill()
            if line is None:
                raise RuntimeError(f"{shlex.join(map(str, command))} ended before its first step")
        name = "seconds to the first step, examples/run_image_kd.py on 50,000 images, second start"
        self.ratios[name] = summary(starts[1:], "<= 15")

    def measure_memory(self) -> None:
        """Peak anonymous memory of training from a full cache, and of the student alone."""
        teacher, cache = self.folder / "teacher", self.folder / "cache-memory"
        image_models(RESNET)[0].save_pretrained(teacher)
        words = [str(self.size.images), str(self.folder / "memory"), str(teacher), str(cache)]
        run_script(HERE / "memory.py", "fill", *words)
        found = {
            side: [json.loads(run_script(HERE / "memory.py", side, *words)) for _ in range(self.size.slow_rounds)]
            for side in ("cached", "alone")
        }
        for what, number in {"peak memory": "peak", "what training adds to memory": "added"}.items():
            sides = [[run[number] for run in found[side]] for side in ("cached", "alone")]
            self.ratios[f"{what}, full cache / student-only training"] = ratio(*sides, "<= 1.05")

    def measure_logging(self) -> None:
        """Ten terms, logged every tenth step and not at all."""
        split = images(64 * 5 * self.size.steps)
        sides = {}
        for side, options in {"on": {"logging_steps": 10}, "off": {"logging_strategy": "no"}}.items():
            teacher, student = image_models(RESNET)
            sides[side] = self.trainer(student, None, image_set(split, student), distiller=TenTerms(), **options)
        seconds = interleave(sides, self.size.step_rounds)
        self.ratios["logging on / off, 10 terms"] = ratio(seconds["on"], seconds["off"], "<= 1.01")

    def measure_influence(self) -> None:
        """Refreshes of KD-AIF's weights; in CPU seconds of one thread."""
        self._with_script("influence.py")

    def measure_retrieval(self) -> None:
        """IC-KD's bank and neighbours; likewise."""
        self._with_script("retrieval.py")

    def _with_script(self, script: str) -> None:
        if self.size is QUICK:
            self.skipped[script] = f"takes minutes by itself: python benchmarks/{script} --quick"
            return
        output = self.folder / "script.json"
        run_script(HERE / script, "--quick", "--output", str(output))
        found = json.loads(output.read_text())["ratios"]
        self.ratios.update({name: record for name, record in found.items() if record["target"]})

    @contextlib.contextmanager
    def _unless_missing(self, what: str):
        try:
            yield
        except (ImportError, FileNotFoundError) as error:
            self.skipped[what] = str(error)


class TenTerms(KD):
    """The labels' loss as ten terms."""

    needs_teacher = False

    def forward(self, student, teacher, batch):
        task = self.hard_label_loss(student.task_logits, batch["labels"])
        return {f"term_{i}": task / 10 for i in range(10)}


def _bare_loop(teacher, student, batches):
    """A teacher's forward pass and a student's step on cross-entropy, with hfkd's layout and optimizer."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    if "input_ids" in batches[0]:
        optimizer = torch.optim.AdamW(student.parameters(), lr=5e-5, fused=True)
    else:
        teacher.to(memory_format=torch.channels_last)
        student.to(memory_format=torch.channels_last)
    teacher.to(cases.device()).eval()
    student.to(cases.device()).train()

    def epoch():
        for batch in batches:
            inputs = {name: column.to(cases.device()) for name, column in batch.items() if name != "index"}
            labels = inputs.pop("labels")
            with torch.no_grad():
                teacher(**inputs)
            loss = cross_entropy(student(**inputs).logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def draw(ratios: dict, path: Path) -> None:
    """Each ratio over its target, with its quartiles; what is met lies on the shaded side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.32 * len(ratios) + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(0.01, 1, color="0.93")
    for row, record in enumerate(reversed(ratios.values())):
        sign, bound = record["target"].split()
        parts = [record[key] / float(bound) for key in ("low", "value", "high")]
        # The same side is good for all: how many times the target a cost is, or a speed-up falls short of it.
        low, value, high = parts if sign == "<=" else [1 / part for part in reversed(parts)]
        axes.plot([low, high], [row, row], color="#0072B2", linewidth=3, solid_capstyle="butt")
        axes.plot(value, row, "X" if verdict(record) == "missed" else "o", color="black")
    axes.set(xscale="log", xlabel="cost over target (left of 1: met)", xlim=(0.01, None))
    ticks = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.set_yticks(range(len(ratios)), list(reversed(ratios)), fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    figure.savefig(path, dpi=150)


def main(words: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = [name.removeprefix("measure_") for name in vars(Benchmark) if name.startswith("measure_")]
    parser.add_argument("--quick", action="store_true", help="so little that the numbers only show that it runs")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench.json"))
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="measure these parts alone")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--bf16", action="store_true", help="hfkd's trainers in bfloat16")
    parser.add_argument("--torch_compile", action="store_true", help="hfkd's trainers compiled")
    args = parser.parse_args(words)
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    logging.set_verbosity_error()
    start, load = time.perf_counter(), [os.getloadavg()[0]]
    command = shlex.join(["python", "benchmarks/run.py", *(sys.argv[1:] if words is None else words)])
    with tempfile.TemporaryDirectory() as folder:
        options = {"bf16": args.bf16, "torch_compile": args.torch_compile}
        benchmark = Benchmark(QUICK if args.quick else Size(), Path(folder), options)
        for part in args.only:
            begin = time.perf_counter()
            getattr(benchmark, f"measure_{part}")()
            print(f"{part}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
            load.append(os.getloadavg()[0])
            seconds = time.perf_counter() - start
            found = {"ratios": benchmark.ratios, "skipped": benchmark.skipped}
            record = write(args.output, command=command, load=load, seconds=seconds, **found)  # nothing is lost
    draw(benchmark.ratios, args.output.with_suffix(".png"))
    print(
        f"{command}: {machine()}, load {min(load):.1f} to {max(load):.1f}, {record['seconds']:.0f} s\n\n"
        f"{table(benchmark.ratios)}"
    )
    for what, why in benchmark.skipped.items():
        print(f"left out: {what}: {why}")
    return record


if __name__ == "__main__":
    gc.freeze()  # every train() collects garbage, and would look through all that was imported
    main()
    gc.unfreeze()
