"""Seconds of an epoch of ResNet-56 → ResNet-20 on 50,000 images, and of 240 of them, beside the floor.

    python benchmarks/epochs.py --bf16 --torch_compile --output outputs/epochs.json      # meant for a GPU
    python benchmarks/epochs.py --images 512 --rounds 1 --output outputs/epochs.json     # shows that it runs

Sides: the reference loop in float32, hfkd with the teacher at every step, from a full cache of 4 views, and the
student alone. The floor is what arithmetic and memory cannot go below: the operations of the student's step, and of
the teacher's forward pass where it is asked, at the rate of a large matrix product, or the bytes that their
convolutions read and write at the rate of a large copy, whichever takes longer. Both rates are measured here.
"""

import argparse
import copy
import shlex
import sys
import tempfile
from pathlib import Path

import cases
import datasets
import numpy as np
import opponents
import torch
from measure import interleave, seconds_of, write
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hfkd.data import load_image_data


PAIR, VIEWS, EPOCHS = "resnet56 to resnet20", 4, 240


def many_images(number: int) -> datasets.Dataset:
    """The 50,000 of ``cifar10_jpeg``, or, without the data, noise of that size."""
    folder = cases.DATA / "cifar10_jpeg"
    if not folder.is_dir():
        return cases.images(number)
    return load_image_data("cifar10", data_dir=folder, validation_fraction=0.0, max_train_samples=number).train


def rates(dtype: torch.dtype) -> tuple[float, float]:
    """Operations a second of a large matrix product, and bytes a second of a large copy."""
    size = 8192 if cases.device().type == "cuda" else 1024
    one, other = torch.randn(2, size, size, device=cases.device()).to(dtype).unbind()
    long = torch.empty(2**26 if cases.device().type == "cuda" else 2**24, device=cases.device())
    product = interleave({"": lambda: seconds_of(lambda: one @ other)}, 20)[""]
    copying = interleave({"": lambda: seconds_of(long.clone)}, 20)[""]
    return 2 * size**3 / min(product), 2 * long.nbytes / min(copying)


def work_of(model: nn.Module, dtype: torch.dtype, trained: bool) -> tuple[float, float]:
    """Operations and bytes for one image; a backward pass is two forward ones."""
    numbers = []
    hooks = [
        module.register_forward_hook(lambda _, inputs, output: numbers.append(inputs[0].numel() + output.numel()))
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    ]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    passes = 3 if trained else 1
    return passes * counter.get_total_flops(), passes * sum(numbers) * dtype.itemsize


def main(words: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--torch_compile", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("outputs/epochs.json"))
    args = parser.parse_args(words)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    split = many_images(args.images)
    pictures = opponents.Pictures(np.stack([np.asarray(image) for image in split["image"]]), split["label"])
    teacher, student = cases.image_models(PAIR)
    operations, bandwidth = rates(dtype)
    work = {"student": work_of(student, dtype, True), "teacher": work_of(teacher, dtype, False)}
    epochs = {}
    for batch_size in args.batch_sizes:
        with tempfile.TemporaryDirectory() as folder:
            sides = _sides(split, pictures, teacher, student, batch_size, Path(folder), args)
            seconds = interleave(sides, args.rounds)
        for side, times in seconds.items():
            models = ["student", "teacher"] if side in ("reference loop", "online") else ["student"]
            floor = max(
                sum(work[model][i] for model in models) / rate for i, rate in enumerate((operations, bandwidth))
            )
            epoch = float(np.median(times))
            epochs[f"{side}, batch {batch_size}"] = {
                "seconds": epoch,
                "low": min(times),
                "high": max(times),
                f"minutes_for_{EPOCHS}": EPOCHS * epoch / 60,
                "floor_seconds": floor * len(split),
            }
    command = shlex.join(["python", "benchmarks/epochs.py", *(sys.argv[1:] if words is None else words)])
    measured = {"images": len(split), "operations_per_second": operations, "bytes_per_second": bandwidth}
    record = write(args.output, command=command, **measured, epochs=epochs)
    print(f"{record['machine']}, {len(split)} images\n\n{table(epochs)}")
    return record


def _sides(split, pictures, teacher, student, batch_size, folder, args) -> dict:
    def trainer(name, teacher, views, **options):
        learner = copy.deepcopy(student)
        train = cases.image_set(split, learner, views)
        options |= {"batch_size": batch_size, "bf16": args.bf16, "torch_compile": args.torch_compile}
        return cases.Epochs(learner, copy.deepcopy(teacher), train, folder / name, **options)

    models = (copy.deepcopy(model).to(cases.device()) for model in (teacher, student))
    loop = opponents.reference_loop(*models, pictures, batch_size)
    cached = trainer("cached", teacher, VIEWS, teacher_cache=str(folder / "cache"))
    cached.fill()
    return {
        "reference loop": lambda: seconds_of(loop),
        "online": trainer("online", teacher, None),
        "cached": cached,
        "student alone": trainer("alone", None, None),
    }


def table(epochs: dict) -> str:
    lines = [f"| | seconds an epoch (range) | floor | minutes for {EPOCHS} |", "|---|---|---|---|"]
    for side, record in epochs.items():
        times = "{seconds:.2f} ({low:.2f}–{high:.2f}) | {floor_seconds:.2f}".format(**record)
        lines.append(f"| {side} | {times} | {record[f'minutes_for_{EPOCHS}']:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
