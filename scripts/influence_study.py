"""What influence weights see: flipped labels (AUROC), and how steady, fair and dear they are (SAFE).

    python scripts/influence_study.py noise --data_dir DATA/cifar10 --teacher TEACHER --label_noise 0.2
    python scripts/influence_study.py safe --data_dir DATA/cifar10 --teacher TEACHER

``noise`` flips labels of the training split only, never of the held-out split, teaches ResNet-20 with KDAIF and ranks
the training samples at each refresh: by influence weight under several base losses, beside the usual rankings by the
student's loss and by the teacher's loss. A teacher that was trained on the clean labels of these very images knows the
answer; pass one that was trained on the same noisy labels (examples/run_image_kd.py with the same --label_noise and
--held_out_fraction) for a figure that counts.

``safe`` compares the weights of one run with those of the same run when a tenth of the training images is perturbed
(noise of 25 grey levels) or replaced by uniform noise (outliers), with other seeds as the yardstick, and gives gaps
between classes, time and energy, each by seed and with a 95 % interval. Rank graduation robustness: Babaei, Giudici
and Raffinetti 2025; our reading. A finished run is kept (safe-….json) and read again: --seeds 0 and --seeds 1 in two
shells, then --seeds 0 1 for both.

Everything goes to noise-….json and safe.json in --output_dir. Takes about 3 minutes a run on one core.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from transformers import set_seed


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "scripts")]
import run_image_kd  # noqa: E402
from compare_distillers import interval, write_json  # noqa: E402

from hfkd import DistillationTrainer  # noqa: E402
from hfkd.data import ImageDataset, load_image_data, processor_for  # noqa: E402
from hfkd.distillers import KD, KDAIF, StudentAlone  # noqa: E402
from hfkd.features import run_model  # noqa: E402
from hfkd.metrics import compute_metrics  # noqa: E402
from hfkd.models import load_model  # noqa: E402


class Rankings(KDAIF):
    """KDAIF that also keeps, at each refresh, what else could rank the samples."""

    def __init__(self, *args, others: dict[str, KDAIF], **kwargs):
        super().__init__(*args, **kwargs)
        self.others = torch.nn.ModuleDict(others)
        self.history: list[dict] = []

    def setup(self, context):
        super().setup(context)
        for other in self.others.values():
            other.setup(context)

    def state_dict(self, *args, **kwargs):
        return {}

    def refresh(self, context):
        super().refresh(context)
        rankings = {"KD 50 %, last layer (the weights in use)": self.influence.cpu().numpy().copy()}
        seconds = {}
        for name, other in self.others.items():
            start = time.perf_counter()
            index, _, influence = other._measure(context)
            seconds[name] = time.perf_counter() - start
            rankings[name] = influence[index.argsort()].cpu().numpy()
        losses = {"student loss": [], "teacher loss": []}
        index = []
        student = context.student.eval()
        start = time.perf_counter()
        with torch.no_grad():
            for batch in context.batches(context.train_dataset):
                index.append(batch["index"])
                for name, logits in (
                    ("student loss", run_model(student, batch).logits),
                    ("teacher loss", context.teacher(batch).logits),
                ):
                    losses[name].append(F.cross_entropy(logits.float(), batch["labels"], reduction="none"))
        seconds["one evaluation pass of both"] = time.perf_counter() - start
        student.train()
        order = torch.cat(index).argsort()
        rankings.update({name: torch.cat(parts)[order].cpu().numpy() for name, parts in losses.items()})
        self.history.append({"epoch": context.epoch, "rankings": rankings, "seconds": seconds})


def rank_graduation(reference: np.ndarray, other: np.ndarray) -> float:
    """Agreement of two rankings in [0, 1]: ½(cov(x, rank y) / cov(x, rank x) + 1), x in [0, 1]."""
    ranks = [values.argsort().argsort() for values in (other, reference)]
    shares = [np.cov(reference, rank)[0, 1] for rank in ranks]
    return float((shares[0] / shares[1] + 1) / 2)


def energy(folder: str = "/sys/class/powercap") -> float | None:
    """Joules that the processor packages have counted so far; None where the machine does not count."""
    counters = list(Path(folder).glob("intel-rapl:?/energy_uj"))
    try:
        return sum(int(path.read_text()) for path in counters) / 1e6 if counters else None
    except PermissionError:
        return None


def teach(args, distiller, name: str, *, seed: int = 0, label_noise: float = 0.0, change=None) -> dict:
    """Teach a ResNet-20 as examples/run_image_kd.py would; ``change`` may alter the training set."""
    options = run_image_kd.TrainingArguments(
        str(Path(args.output_dir) / name),
        num_train_epochs=args.epochs,
        eval_strategy="no",
        save_strategy="no",
        seed=seed,
        bf16=args.bf16,
        use_cpu=args.bf16 and not torch.accelerator.is_available(),
        disable_tqdm=True,
        report_to="none",
    )
    data = load_image_data(
        "cifar10",
        data_dir=args.data_dir,
        validation_fraction=0,
        held_out_fraction=0.1,
        label_noise=label_noise,
        max_train_samples=args.max_train_samples,
        max_eval_samples=args.max_train_samples,
    )
    set_seed(seed)
    teacher = load_model(args.teacher, refuse_new_head=True)
    student = load_model("resnet20", label_names=data.label_names)
    processor = processor_for(student)
    train = ImageDataset(data.train, processor, augment="crop_flip")
    if change is not None:
        change(train)
    trainer = DistillationTrainer(
        student,
        teacher,
        distiller,
        options,
        train_dataset=train,
        held_out_dataset=ImageDataset(data.held_out, processor),
        processing_class=processor,
        compute_metrics=compute_metrics("cifar10"),
    )
    wall, joules = time.perf_counter(), energy()
    trainer.train()
    result = {"seconds": time.perf_counter() - wall, "joules": None if joules is None else energy() - joules}
    output = trainer.predict(ImageDataset(data.test, processor))
    right = output.predictions.argmax(-1) == output.label_ids
    result["test_accuracy"] = float(right.mean())
    result["accuracy_by_class"] = [float(right[output.label_ids == c].mean()) for c in range(data.num_labels)]
    if isinstance(distiller, KDAIF):
        weights = distiller.weights.cpu().numpy()
        labels = train.labels[train.index.argsort()]
        result["weights"] = weights.tolist()
        result["weight_by_class"] = [float(weights[labels == c].mean()) for c in range(data.num_labels)]
    return result


def shown(args) -> dict[str, str]:
    """The arguments for a report, without the folders of this machine."""
    return {name: Path(value).name if os.path.isabs(str(value)) else str(value) for name, value in vars(args).items()}


def noise(args) -> None:
    others = {
        "labels alone, last layer": KDAIF(StudentAlone()),
        "labels alone, last layer, first order": KDAIF(StudentAlone(), hessian="identity"),
        "KD 90 %, last layer": KDAIF(KD(0.9)),
        "KD 50 %, last layer, first order": KDAIF(KD(0.5), hessian="identity"),
        "KD 50 %, all layers, first order": KDAIF(KD(0.5), layers="all", hessian="identity"),
    }
    distiller = Rankings(KD(alpha=0.5), warm_up=args.warm_up, refresh_epochs=args.refresh_epochs, others=others)
    result = teach(args, distiller, "noise", label_noise=args.label_noise)
    shared = {"data_dir": args.data_dir, "validation_fraction": 0, "held_out_fraction": 0.1}
    shared["max_train_samples"] = args.max_train_samples
    splits = [load_image_data("cifar10", label_noise=share, **shared).train for share in (args.label_noise, 0.0)]
    assert splits[0]["index"][:] == splits[1]["index"][:]
    order = np.argsort(splits[0]["index"][:])
    flipped = (np.array(splits[0]["label"][:]) != np.array(splits[1]["label"][:]))[order]
    report = {
        "arguments": shown(args),
        "flipped": int(flipped.sum()),
        "samples": len(flipped),
        "test_accuracy": result["test_accuracy"],
        "refreshes": [
            {
                "epoch": entry["epoch"],
                "auroc": {name: roc_auc_score(flipped, values) for name, values in entry["rankings"].items()},
                "seconds": entry["seconds"],
            }
            for entry in distiller.history
        ],
    }
    path = Path(args.output_dir) / f"noise-{args.label_noise}-{Path(args.teacher).stem}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{report['flipped']} of {report['samples']} labels flipped; test accuracy {report['test_accuracy']:.4f}")
    for entry in report["refreshes"]:
        print(f"epoch {entry['epoch']}: " + ", ".join(f"{n} {v:.3f}" for n, v in entry["auroc"].items()))
    print(f"seconds of the last: {report['refreshes'][-1]['seconds']}")


def altered_rows(size: int) -> np.ndarray:
    return np.random.default_rng(1).choice(size, size // 10, replace=False)


def perturb(train: ImageDataset) -> None:
    """Add noise of 25 grey levels to the altered rows."""
    change(train, lambda rng, pixels: rng.normal(pixels, 25))


def replace_by_noise(train: ImageDataset) -> None:
    change(train, lambda rng, pixels: rng.uniform(0, 256, pixels.shape))


def change(train: ImageDataset, new: Callable[[np.random.Generator, np.ndarray], np.ndarray]) -> None:
    rows = altered_rows(len(train.pixels))
    pixels = train.pixels[rows].astype(np.float64)
    train.pixels = train.pixels.copy()
    train.pixels[rows] = new(np.random.default_rng(2), pixels).clip(0, 255).astype(np.uint8)


ALTERATIONS = {"perturbed": perturb, "outliers": replace_by_noise}


def summary(values: list[float], independent: bool = True) -> dict:
    """The numbers, their mean, and its 95 % interval where they are several and of different runs."""
    return {
        "values": values,
        "mean": statistics.fmean(values),
        "interval": interval(values) if independent else None,
    }


def safe(args) -> None:
    splits = {"data_dir": args.data_dir, "validation_fraction": 0, "held_out_fraction": 0.1}
    train = load_image_data("cifar10", **splits, max_train_samples=args.max_train_samples).train
    place = np.argsort(np.argsort(train["index"][:]))  # of a training row among the weights

    def run(name: str, seed: int) -> dict:
        """A run's result; that of an earlier call with the same arguments, where there is one."""
        path = Path(args.output_dir) / f"safe-{name}-seed-{seed}.json"
        asked = {**shown(args), "seeds": seed}
        if path.is_file() and (stored := json.loads(path.read_text()))["arguments"] == asked:
            return stored["result"]
        distiller = KD() if name == "KD" else KDAIF(warm_up=args.warm_up, refresh_epochs=args.refresh_epochs)
        result = teach(args, distiller, path.stem, seed=seed, change=ALTERATIONS.get(name))
        for key in [key for key in result if key.endswith("_by_class")]:
            result[f"{key}_gap"] = max(result[key]) - min(result[key])
        write_json(path, {"arguments": asked, "result": result})
        return result

    runs = {name: {seed: run(name, seed) for seed in args.seeds} for name in ("KD", "KDAIF", *ALTERATIONS)}
    weights = {
        name: {seed: np.array(result.pop("weights")) for seed, result in runs[name].items()} for name in list(runs)[1:]
    }
    pairs = {name: [(weights["KDAIF"][seed], weights[name][seed]) for seed in args.seeds] for name in ALTERATIONS}
    pairs["another seed"] = list(itertools.combinations(weights["KDAIF"].values(), 2))
    report = {"arguments": shown(args), "stability": {}, "runs": {}}
    for name in [name for name, both in pairs.items() if both]:
        touched = np.zeros(len(place), dtype=bool)
        if name in ALTERATIONS:
            touched[place[altered_rows(len(place))]] = True
        kept = [(reference[~touched], other[~touched]) for reference, other in pairs[name]]
        independent = name in ALTERATIONS  # a run is in several of the pairs of seeds
        report["stability"][name] = {
            "spearman": summary([float(spearmanr(*pair).statistic) for pair in kept], independent),
            "rank_graduation": summary([rank_graduation(*pair) for pair in kept], independent),
        }
        if touched.any():
            report["stability"][name]["weight_of_altered"] = summary(
                [float(w[touched].mean()) for _, w in pairs[name]]
            )
    for name, results in runs.items():
        first, *_ = results.values()
        numbers = [key for key, value in first.items() if isinstance(value, float)]
        report["runs"][name] = {key: summary([result[key] for result in results.values()]) for key in numbers}
    write_json(Path(args.output_dir) / "safe.json", report)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["noise", "safe"])
    parser.add_argument("--data_dir", required=True, help="CIFAR-10 as parquet")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--output_dir", default="outputs/influence")
    parser.add_argument("--label_noise", type=float, default=0.2)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--warm_up", type=float, default=0.3)
    parser.add_argument("--refresh_epochs", type=int, default=3)
    parser.add_argument("--max_train_samples", type=int, default=None, help="and as many test samples")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of safe; noise is of seed 0")
    parser.add_argument("--bf16", action="store_true", help="Train in bfloat16; influence is measured in float32.")
    arguments = parser.parse_args()
    Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)
    {"noise": noise, "safe": safe}[arguments.study](arguments)
