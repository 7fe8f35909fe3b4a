"""The main job on scikit-learn's digits: a teacher, the student alone, and the student taught by it.

    make demo        (or: python scripts/demo.py)

Every run goes through examples/run_image_kd.py. Three seeds; alone and taught start alike and take the same number of
steps, alone on the labelled images and taught on all of them. Writes outputs/demo/: the taught student with its model
card, demo.json and demo.png.
"""

import contextlib
import io
import json
import statistics
import sys
import time
from pathlib import Path

import datasets
import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from transformers.utils import logging


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import run_image_kd  # noqa: E402

from hfkd.cli import parse_arguments  # noqa: E402
from hfkd.models import load_model  # noqa: E402


OUTPUT = ROOT / "outputs" / "demo"
SEEDS = (0, 1, 2)
LABELS = 100
COMMON = (
    "--dataset digits --augment crop --save_strategy no --eval_strategy no --disable_tqdm True --logging_steps 10000"
)
TEACHER = ["--student", "resnet20", "--max_steps", "150"]
STUDENT = ["--student", "resnet8", "--max_steps", "150"]


def run(name: str, *flags: str) -> dict[str, float]:
    start = time.perf_counter()
    words = [*COMMON.split(), "--output_dir", str(OUTPUT / name), *flags]
    types = (run_image_kd.ModelArguments, run_image_kd.DataArguments, run_image_kd.TrainingArguments)
    with contextlib.redirect_stdout(io.StringIO()):
        results = run_image_kd.run(*parse_arguments(types, words))
    print(
        f"{name:28} test accuracy {results['test_accuracy']:.3f}   ({time.perf_counter() - start:.0f} s)", flush=True
    )
    return results


def latency(folder: Path, batch: int) -> float:
    """Median milliseconds of a forward pass."""
    model = load_model(folder).eval()
    pixels = torch.randn(batch, 3, model.config.image_size, model.config.image_size)
    times = []
    with torch.inference_mode():
        for _ in range(3 + (50 if batch == 1 else 5)):
            start = time.perf_counter()
            model(pixels)
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[3:])


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    start = time.perf_counter()
    scores: dict[str, list[float]] = {}
    scores["teacher, all labels"] = [run("teacher", *TEACHER, "--seed", "0")["test_accuracy"]]
    teacher = ["--teacher", str(OUTPUT / "teacher"), "--distiller", "kd"]
    for budget, flags in ((f"{LABELS} labels", ["--labels", str(LABELS)]), ("all labels", [])):
        for seed in SEEDS:
            for who, extra in (("alone", ["--drop_unlabelled"] if flags else []), ("taught", teacher)):
                name = f"{who}-{budget.split()[0]}-{seed}"
                result = run(name, *STUDENT, *flags, *extra, "--seed", str(seed))
                scores.setdefault(f"student {who}, {budget}", []).append(result["test_accuracy"])

    folders = {"teacher": OUTPUT / "teacher", "student": OUTPUT / f"taught-{LABELS}-{SEEDS[0]}"}
    print(f"\n{'':30}  accuracy (test)   parameters    disk   latency at batch 1 / 256")
    for name, values in scores.items():
        folder = folders[name.split()[0].rstrip(",")]
        size = (folder / "model.safetensors").stat().st_size / 1e6
        parameters = sum(p.numel() for p in load_model(folder).parameters())
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else " " * 8
        milliseconds = f"{latency(folder, 1):6.1f} / {latency(folder, 256):.0f} ms"
        print(f"{name:30}  {statistics.mean(values):.3f}{spread}  {parameters:12,}  {size:4.1f} MB  {milliseconds}")
    few, many = (
        statistics.mean(scores[f"student taught, {b}"]) - statistics.mean(scores[f"student alone, {b}"])
        for b in (f"{LABELS} labels", "all labels")
    )
    print(
        f"\nWith {LABELS} labels, a teacher that saw all adds {100 * few:+.1f} points: it labels the other images."
        f"\nWith all labels it adds {100 * many:+.1f}: there digits leave such a student little or nothing to gain."
    )

    (OUTPUT / "demo.json").write_text(json.dumps(scores, indent=1) + "\n")
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    names = list(scores)[::-1]
    axes.barh(
        names,
        [statistics.mean(scores[n]) for n in names],
        color=["0.75" if "alone" in n else "#0072B2" for n in names],
    )
    for row, name in enumerate(names):
        axes.plot(scores[name], [row] * len(scores[name]), "k|", markersize=10)
    axes.set(xlim=(0.5, 1), xlabel="accuracy on test (bars: mean, ticks: seeds)", title="scikit-learn digits")
    figure.savefig(OUTPUT / "demo.png", dpi=150)
    seconds = time.perf_counter() - start
    print(f"\nStudent, card and plot: {folders['student']}, {OUTPUT / 'demo.png'}   ({seconds:.0f} s)")


if __name__ == "__main__":
    main()
