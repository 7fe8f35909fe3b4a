"""How much of a difference between students may be the luck of the test set.

    python scripts/item_errors.py outputs/cifar10 outputs/glue-mrpc --output results/item_errors.json

Every finished student of a study answers the test set once more, in float32. Its items are then drawn anew with
replacement, the same for all students (the paired bootstrap: Efron and Tibshirani 1993), and the standard deviation of
a difference over the draws, each score being the mean over a method's seeds, is its standard error. That of the seeds
is no part of it: an interval for both has the half-width sqrt((t · error of the seeds)² + (1.96 · this)²).

FILE holds {study: {metric: {"METHOD - OTHER": standard error}}}, of scores between 0 and 1; studies that are not named
stay in it as they are.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DataCollatorWithPadding

from hfkd.cli import explain_refusals
from hfkd.data import load_text_data, load_tokenizer, tokenize
from hfkd.features import evaluating
from hfkd.models import load_model


sys.path.insert(0, str(Path(__file__).resolve().parent))
from compare_distillers import expanded, write_json  # noqa: E402
from study_answers import batches_of, of_data, runs_of  # noqa: E402


DRAWS = 2000


def batches_of_test_items(run: dict, folder: Path) -> Iterable[dict]:
    """The test set as the study's students were asked about it; of texts the short ones first."""
    flags = run["settings"]["flags"]
    if "task" not in flags:
        return list(batches_of(folder, of_data(run).test)[1])
    (data_dir,) = expanded([flags["data_dir"]])
    tokenizer = load_tokenizer(str(folder))
    raw = load_text_data(flags["task"], data_dir=data_dir)
    rows = tokenize(raw, tokenizer, max_length=flags.get("max_length", 128)).test
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    pad = DataCollatorWithPadding(tokenizer)
    names = ("input_ids", "attention_mask", "token_type_ids", "index", "labels")
    parts = (rows[start : start + 64] for start in range(0, len(rows), 64))
    return [pad([{name: row[name] for name in names if name in row} for row in part]) for part in parts]


def answers_of(student: nn.Module, batches: Iterable[dict]) -> tuple[np.ndarray, np.ndarray]:
    """What the student says of each test item, in their order (a class, or a regression's number), and the labels."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    with evaluating(student), torch.no_grad():
        for batch in batches:
            logits = student(**{k: v for k, v in batch.items() if k not in ("index", "labels")}).logits
            said = logits[:, 0] if logits.shape[1] == 1 else logits.argmax(-1)
            found.append((batch["index"], said, batch["labels"]))
    index, said, labels = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
    order = np.argsort(index)
    return said[order], labels[order]


def weighted_scores(weights: np.ndarray, said: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Each score of (N,) answers under each of (D, N) weights of the items: (D,) by the metric's name."""

    def mean(values: np.ndarray) -> np.ndarray:
        return weights @ values.astype(np.float64) / weights.sum(1)

    if not np.issubdtype(said.dtype, np.integer):
        x, y = said - said.mean(), labels - labels.mean()
        covariance = mean(x * y) - mean(x) * mean(y)
        return {"pearson": covariance / np.sqrt((mean(x * x) - mean(x) ** 2) * (mean(y * y) - mean(y) ** 2))}
    scores = {"accuracy": mean(said == labels)}
    if labels.max() == 1:
        both, yes, true = mean(said * labels), mean(said), mean(labels)
        scores["f1"] = 2 * both / (yes + true)
        spread = yes * (1 - yes) * true * (1 - true)
        scores["matthews_correlation"] = (both - yes * true) / np.sqrt(np.where(spread > 0, spread, np.inf))
    return scores


def errors_of(study: Path) -> dict[str, dict[str, float]]:
    """The standard error of every pair of methods, by each metric that the study's runs have."""
    drawn: dict[str, dict[str, list[np.ndarray]]] = {}
    batches, weights, difference = None, None, 0.0
    for run in runs_of(study):
        folder = study / "runs" / run["name"]
        batches = batches or batches_of_test_items(run, folder)
        kind = "text-classification" if "task" in run["settings"]["flags"] else "image-classification"
        said, labels = answers_of(load_model(str(folder), task=kind), batches)
        if weights is None:
            n = len(labels)
            weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(np.float32)
        scores = weighted_scores(weights, said, labels)
        once = weighted_scores(np.ones((1, len(labels))), said, labels)
        for metric in [metric for metric in scores if f"test_{metric}" in run["results"]]:
            difference = max(difference, abs(once[metric].item() - run["results"][f"test_{metric}"]))
            drawn.setdefault(f"test_{metric}", {}).setdefault(run["method"], []).append(scores[metric])
    print(f"{study.name}: {len(drawn)} metrics; scores differ from the study's own by at most {difference:.4f}")
    found: dict[str, dict[str, float]] = {}
    for metric, methods in drawn.items():
        means = {method: np.mean(of_seeds, axis=0) for method, of_seeds in methods.items()}
        found[metric] = {
            f"{one} - {other}": round(float(np.std(means[one] - means[other])), 6)
            for one, other in itertools.combinations(means, 2)
        }
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path, nargs="+", help="folders that compare_distillers left")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON file of the errors")
    args = parser.parse_args(argv)
    for study in args.studies:
        if not runs_of(study):
            raise ValueError(f"{study}/results.json names no finished run: run the study first")
    errors = json.loads(args.output.read_text(encoding="utf-8")) if args.output.is_file() else {}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for study in args.studies:
        errors[study.name] = errors_of(study)
        write_json(args.output, dict(sorted(errors.items())))


if __name__ == "__main__":
    with explain_refusals():
        main()
