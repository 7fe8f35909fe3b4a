"""Answer the questions of scripts/studies/README.md from the studies that are finished, each by a number.

    python scripts/study_answers.py outputs --output results/answers.json

OUTPUTS holds the studies' folders as compare_distillers.py left them. Differences between methods are paired by seed
and have the 95 % interval of Student's t, as on its leaderboards; they need results.json alone, so that
--only differences can be repeated from results/. The rest looks at each run's student and tables again: how well a
ranking tells wrong labels from right ones (noise-…), how compact and how separate the classes of the test images are
(unit vectors before the classifier), and how often the teacher is right behind CAM's weights. What has not been run is
named as open; what FILE says of studies that are not in OUTPUTS stays in it.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader

from hfkd.cli import explain_refusals
from hfkd.data import ImageDataset, load_image_data, processor_for
from hfkd.features import dataset_features, evaluating
from hfkd.metrics import compactness, separability
from hfkd.models import load_model


sys.path.insert(0, str(Path(__file__).resolve().parent))
from compare_distillers import expanded, interval, write_json  # noqa: E402


# What is asked, of which studies, and the two methods whose difference answers it.
ON_IMAGES = ("cifar10", "cifar10-jpeg")
ON_TEXT = tuple(f"glue-{task}" for task in ("mrpc", "rte", "cola", "sst2", "wnli", "qnli", "qqp", "mnli"))
NOISE = ("noise-00", "noise-20", "noise-40", "noise-60")
DIFFERENCES = [
    ("Is WTTM's student less sure than TTM's? (entropy, nats)", ON_IMAGES, "test_entropy", "WTTM", "TTM"),
    ("Is WTTM's student less sure than KD's? (entropy, nats)", ON_IMAGES, "test_entropy", "WTTM", "KD 0.9"),
    ("Is WTTM's student less sure than KD's, of texts? (entropy, nats)", ON_TEXT, "test_entropy", "WTTM", "KD"),
    ("Does α by the gap waver less than 0.9?", ON_IMAGES, "eval_accuracy_spread", "AKD gap", "KD 0.9"),
    ("Does α by the gap waver less than 0.5?", ON_IMAGES, "eval_accuracy_spread", "AKD gap", "KD 0.5"),
    ("Does AEKT's student agree more with the teacher than DKD's?", ON_IMAGES, "test_agreement", "AEKT", "DKD"),
    ("… with a ratio of at most 2?", ON_IMAGES, "test_agreement", "AEKT ratio 2", "DKD"),
    (
        "Do weights by influence on a shifted split help there, over a clean split?",
        ("shifted",),
        "test_accuracy",
        "KD-AIF, shifted split",
        "KD-AIF, clean split",
    ),
    ("… and over no weights?", ("shifted",), "test_accuracy", "KD-AIF, shifted split", "KD"),
    ("Do weights by influence help against wrong labels?", NOISE, "test_accuracy", "KD-AIF sigmoid", "KD"),
    ("Does small-loss selection?", NOISE, "test_accuracy", "small loss", "KD"),
]
Scores = dict[str, dict[int, float]]  # of each method, by seed


def runs_of(folder: Path) -> list[dict]:
    """The finished runs of a study; none where it was not begun."""
    path = folder / "results.json"
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []


def collect(folder: Path, measure: Callable[[dict, Path], float | None], methods: Sequence[str] = ()) -> Scores:
    """What ``measure`` says of each run, where it says something; of all methods where none is named."""
    scores: Scores = {}
    for run in runs_of(folder):
        if methods and run["method"] not in methods:
            continue
        if (value := measure(run, folder / "runs" / run["name"])) is not None:
            scores.setdefault(run["method"], {})[run["seed"]] = value
    return scores


def summary(values: list[float]) -> dict:
    low, high = interval(values) or (None, None)
    return {"mean": float(np.mean(values)), "low": low, "high": high, "n": len(values)}


def difference(scores: Scores, method: str, other: str) -> dict | None:
    """Of the seeds that both have; None where there are none."""
    own, base = scores.get(method, {}), scores.get(other, {})
    pairs = [own[seed] - base[seed] for seed in own if seed in base]
    return summary(pairs) if pairs else None


def of_data(run: dict, **changed):
    """The data that a run of examples/run_image_kd.py saw."""
    flags = {**run["settings"]["flags"], **changed}
    (folder,) = expanded([flags["data_dir"]])
    names = ("validation_fraction", "held_out_fraction", "max_train_samples", "labels", "label_noise", "noise_type")
    options = {name: flags[name] for name in names if name in flags}
    return load_image_data(flags["dataset"], data_dir=folder, seed=flags.get("split_seed", 0), **options)


def batches_of(folder: Path, split) -> tuple[torch.nn.Module, DataLoader]:
    student = load_model(str(folder))
    images = ImageDataset(split, processor_for(student, str(folder)))
    return student, DataLoader(images, batch_size=256, collate_fn=lambda batch: batch)


def is_wrong(run: dict) -> tuple[np.ndarray, np.ndarray]:
    """Index of every training sample, and whether its label was changed."""
    noisy, clean = of_data(run).train, of_data(run, label_noise=0.0).train
    assert noisy["index"][:] == clean["index"][:]
    return np.array(noisy["index"]), np.array(noisy["label"]) != np.array(clean["label"])


def found_by_influence(run: dict, folder: Path) -> float | None:
    """AUROC of the influence at the last refresh."""
    tables = sorted(folder.glob("influence/epoch-*.parquet"))
    index, wrong = is_wrong(run)
    if not tables or not wrong.any():
        return None
    table = pq.read_table(tables[-1])
    influence = dict(zip(table["index"].to_pylist(), table["influence"].to_pylist(), strict=True))
    return float(roc_auc_score(wrong, [influence[i] for i in index]))


def found_by_loss(run: dict, folder: Path) -> float | None:
    """AUROC of the student's loss on the labels that it was trained with, at the end."""
    index, wrong = is_wrong(run)
    if not wrong.any():
        return None
    student, batches = batches_of(folder, of_data(run).train)
    losses = {}
    with evaluating(student), torch.no_grad():
        for batch in batches:
            logits = student(pixel_values=batch["pixel_values"]).logits
            loss = F.cross_entropy(logits, batch["labels"], reduction="none")
            losses.update(zip(batch["index"].tolist(), loss.tolist(), strict=True))
    return float(roc_auc_score(wrong, [losses[i] for i in index]))


def of_classes(measure: Callable) -> Callable[[dict, Path], float]:
    def of_run(run: dict, folder: Path) -> float:
        student, batches = batches_of(folder, of_data(run).test)
        return measure(*dataset_features(student, batches))

    return of_run


def behind_cam(run: dict, folder: Path) -> float | None:
    """How often the reweighted teacher is right on the augmented training images, in the last logged steps."""
    log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    values = [row["cam_accuracy"] for row in log if "cam_accuracy" in row]
    return values[-1] if values else None


# What is looked at again: the studies, the measure, and the methods, where it is not all.
OF_ICKD = ("KD 0.9", "IC-KD", "IC-KD PICD only", "IC-KD NICD only")
MEASURES = {
    "Wrong labels found by influence at the last refresh (AUROC)": (NOISE, found_by_influence, ()),
    "Wrong labels found by the student's loss at the end (AUROC)": (NOISE, found_by_loss, ()),
    "Compactness of the classes (small is compact)": (("cifar10",), of_classes(compactness), OF_ICKD),
    "Separability of the classes (large is separate)": (("cifar10",), of_classes(separability), OF_ICKD),
    "Accuracy of the teacher behind CAM's weights": (ON_IMAGES, behind_cam, ()),
}


def with_earlier(answers: list[dict], path: Path) -> list[dict]:
    """The answers, and those in the file to what is not answered now, in the order of the questions."""
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    answered = {(answer["question"], answer["study"]) for answer in answers}
    kept = [answer for answer in earlier if (answer["question"], answer["study"]) not in answered]
    asked = [(question, study) for question, studies, *_ in DIFFERENCES for study in studies]
    asked += [(question, study) for question, (studies, *_) in MEASURES.items() for study in studies]
    rank = {pair: place for place, pair in enumerate(asked)}
    both = [answer for answer in kept + answers if (answer["question"], answer["study"]) in rank]
    return sorted(both, key=lambda answer: rank[answer["question"], answer["study"]])


def shown(found: dict, form: str) -> str:
    """Mean and interval as text."""
    if found["low"] is None:
        return f"{found['mean']:{form}} (one seed)"
    return f"{found['mean']:{form}} ({found['low']:{form}} to {found['high']:{form}})"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outputs", type=Path, help="folder of the studies' folders")
    parser.add_argument("--output", type=Path, help="JSON file of the answers")
    parser.add_argument("--only", choices=("differences",), help="leave out what needs the runs' own files")
    args = parser.parse_args(argv)
    if not args.outputs.is_dir():
        raise ValueError(f"no folder {os.path.abspath(args.outputs)}: run a study first, or name where they are")
    answers, open_questions = [], []
    for question, studies, metric, method, other in DIFFERENCES:
        for study in studies:
            scores = collect(args.outputs / study, lambda run, _, metric=metric: run["results"].get(metric))
            if (found := difference(scores, method, other)) is None:
                open_questions.append(f"{question} {study}: {method} or {other} was not run")
            else:
                answers.append({"question": question, "study": study, "what": f"{method} − {other}", **found})
    for question, (studies, measure, methods) in {} if args.only else MEASURES.items():
        for study in studies:
            scores = collect(args.outputs / study, measure, methods)
            if not scores:
                open_questions.append(f"{question} {study}: not run")
            for method, values in scores.items():
                found = summary(list(values.values()))
                answers.append({"question": question, "study": study, "what": method, **found})
    signed = {question for question, *_ in DIFFERENCES}
    print("| question | study | what | mean (95 % interval) | seeds |\n|---|---|---|---|---|")
    for answer in answers:
        value = shown(answer, "+.4f" if answer["question"] in signed else ".4f")
        print(f"| {answer['question']} | {answer['study']} | {answer['what']} | {value} | {answer['n']} |")
    for line in open_questions:
        print(f"open: {line}")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, with_earlier(answers, args.output))


if __name__ == "__main__":
    with explain_refusals():
        main()
