"""Compare methods: each with each seed, under one budget, behind one teacher's cache; and a leaderboard of them.

    python scripts/compare_distillers.py study.yaml --jobs 2

The file holds what is compared (docs/comparing.md tells of each line):

    example: image                       # or glue: which of examples/run_*_kd.py trains
    output: outputs/study
    flags: {dataset: cifar10, student: resnet20, teacher: TEACHER, num_train_epochs: 10, views: 16}
    methods:
      alone: {teacher: null}
      KD: {distiller: kd, distiller_kwargs: {alpha: 0.9}}
      WTTM: {distiller: wttm}
    seeds: [0, 1, 2]

The same command goes on where it was stopped, and redraws the leaderboard: output/leaderboard.md, .csv and .html, and
output/results.json with every run's scores, validation curve, time and memory. Scores are of the last epoch.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from filelock import FileLock
from scipy.stats import t as student_t


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "scripts")]
import run_glue_kd  # noqa: E402
import run_image_kd  # noqa: E402
from leaderboard import write_page  # noqa: E402

from hfkd import __version__  # noqa: E402
from hfkd.checkpoints import last_whole_checkpoint  # noqa: E402
from hfkd.cli import check_conflicts, explain_refusals, json_table, parse_arguments, read_table, words_of  # noqa: E402
from hfkd.distillers import Distiller, make_distiller  # noqa: E402
from hfkd.metrics import main_metric  # noqa: E402


EXAMPLES = {"image": run_image_kd, "glue": run_glue_kd}
KEYS = {"example", "output", "flags", "teachers", "methods", "seeds", "baseline", "metric", "title"}
OURS = ("seed", "output_dir", "resume_from_checkpoint")
SETTINGS, FINISHED = "settings.json", "run.json"
CONFIDENCE = 0.95
VARIABLE = re.compile(r"\$([A-Za-z_]\w*)")


@dataclass(frozen=True)
class Run:
    """One training: a method with a seed, or a teacher that the others ask."""

    name: str
    method: str
    seed: int
    folder: Path
    settings: dict  # what makes it what it is: the example, its flags, and those of a teacher of this study

    def state(self) -> str:
        """``"finished"``, ``"changed"`` (made, or begun, with other settings), ``"begun"`` or ``"new"``."""
        if not (self.folder / SETTINGS).is_file():
            return "new"
        if self.differences():
            return "changed"
        return "finished" if (self.folder / FINISHED).is_file() else "begun"

    def differences(self) -> list[str]:
        """What is set otherwise than in the run that is there."""
        before, now = flat(json.loads((self.folder / SETTINGS).read_text(encoding="utf-8"))), flat(self.settings)
        names = sorted(before.keys() | now.keys())
        return [
            f"{name} was {json.dumps(before.get(name))} and is {json.dumps(now.get(name))}"
            for name in names
            if before.get(name) != now.get(name)
        ]

    def words(self) -> list[str]:
        """The command line behind the example's name."""
        return [*expanded(words_of(self.settings["flags"])), "--output_dir", str(self.folder)]

    def command(self) -> str:
        """What trains it, as a line for a shell, which puts variables in place itself."""
        words = [quoted(word) for word in words_of(self.settings["flags"])]
        words += ["--output_dir", shlex.quote(str(self.folder))]
        return f"python examples/run_{self.settings['example']}_kd.py {' '.join(words)}"

    @property
    def log(self) -> Path:
        return self.folder.parent.parent / "logs" / f"{self.name}.log"

    def report(self) -> dict:
        return json.loads((self.folder / FINISHED).read_text(encoding="utf-8"))


def expanded(words: Sequence[str]) -> list[str]:
    """The words with $NAME replaced by what the environment holds; what is kept of a run has the name alone."""

    def value(match: re.Match) -> str:
        if not os.environ.get(match[1]):
            raise ValueError(f"{match.string} needs the variable {match[1]}: export {match[1]}=FOLDER first")
        return os.environ[match[1]]

    return [VARIABLE.sub(value, word) for word in words]


def quoted(word: str) -> str:
    """The word for a shell, which is to put variables in place."""
    return '"' + re.sub(r'([\\"`])', r"\\\1", word) + '"' if VARIABLE.search(word) else shlex.quote(word)


def flat(settings: dict) -> dict:
    """A setting a line: those of tables under their joint names."""
    lines = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            lines |= {f"{name}.{inner}": rest for inner, rest in flat(value).items()}
        elif value is not None:
            lines[name] = value
    return {name.removeprefix("flags."): value for name, value in lines.items()}


# What is to be run


def read_study(path: Path) -> dict:
    """The file of a study, checked."""
    study = read_table(path)
    if unknown := set(study) - KEYS:
        raise ValueError(f"{path} has {', '.join(sorted(unknown))}: its tables are {', '.join(sorted(KEYS))}")
    if study.get("example") not in EXAMPLES:
        raise ValueError(f"{path}: example is {study.get('example')!r}: choose image or glue")
    for name in ("flags", "teachers", "methods"):
        table = study.setdefault(name, {}) or {}
        if not isinstance(table, dict):
            raise ValueError(f"{path}: {name} is no table: write one name and what it stands for a line")
        study[name] = table
    for kind in ("teachers", "methods"):
        for name, flags in study[kind].items():
            if not isinstance(name, str) or not isinstance(flags, dict):
                raise ValueError(f"{path}: {kind}, {name}: write its flags as a table, such as {{distiller: kd}}")
    if not study["methods"]:
        raise ValueError(f"{path} names no methods: add a table such as `methods: {{KD: {{distiller: kd}}}}`")
    study["seeds"] = study.get("seeds", [0])
    check_seeds(study["seeds"])
    for flags in (study["flags"], *study["teachers"].values(), *study["methods"].values()):
        if taken := [name for name in OURS if name in flags]:
            raise ValueError(f"{path}: {taken[0]} is set for each run: leave it out (there are seeds: and output:)")
    return study


def check_seeds(seeds: object) -> None:
    whole = isinstance(seeds, list) and all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds is {seeds!r}: write a list of different whole numbers, such as [0, 1, 2]")


def plan(study: dict, output: Path) -> tuple[list[Run], list[Run]]:
    """The runs of a study: its teachers, and each method with each seed, the seeds outermost."""
    teachers = {name: make_run(study, output, "teachers", name, 0, {}) for name in study["teachers"]}
    runs = [
        make_run(study, output, "runs", method, seed, teachers)
        for seed in study["seeds"]
        for method in study["methods"]
    ]
    names: dict[str, Run] = {}
    for run in [*teachers.values(), *runs]:
        other = names.setdefault(run.name.lower(), run)
        if other is not run:
            raise ValueError(f"{other.method!r} and {run.method!r} would share the name {run.name}: rename one")
    check_views(study, runs)
    return list(teachers.values()), runs


def make_run(study: dict, output: Path, kind: str, method: str, seed: int, teachers: dict[str, Run]) -> Run:
    own = study[kind if kind == "teachers" else "methods"][method]
    flags = {**study["flags"], **({"teacher": None} if kind == "teachers" else {}), **own}
    settings = {"example": study["example"]}
    mixes = flags.get("mixup_alpha") or flags.get("cutmix_alpha")
    if flags.get("train_teacher"):
        raise ValueError(f"{method}: train_teacher would train one for each run: name it under teachers: instead")
    if flags.get("teacher") is None:
        flags.pop("teacher_cache", None)
    elif not mixes:
        flags.setdefault("teacher_cache", True)
    if flags.get("teacher") in teachers:
        teacher = teachers[flags["teacher"]]
        flags["teacher"] = str(teacher.folder)
        settings["the teacher's"] = teacher.settings["flags"]
    flags = {"disable_tqdm": True, **{name: value for name, value in flags.items() if value is not None}, "seed": seed}
    name = re.sub(r"[^\w.+=-]+", "_", f"{method}-{seed}")
    return Run(name, method, seed, output / kind / name, {**settings, "flags": flags})


def check_views(study: dict, runs: list[Run]) -> None:
    """Refuse a comparison in which some runs see fewer augmentations than others."""
    all_flags = [run.settings["flags"] for run in runs]
    free = [flags for flags in all_flags if not (flags.get("mixup_alpha") or flags.get("cutmix_alpha"))]
    cached = {bool(flags.get("teacher_cache")) for flags in free}
    endless = [flags for flags in free if flags.get("augment") != "none" and "views" not in flags]
    if study["example"] == "image" and len(cached) > 1 and endless:
        raise ValueError(
            "some runs read a teacher's cache, which shows 16 views of an image, and others would see all there are: "
            "set views under flags: for all alike (16; crops of digits have 9), or teacher_cache: false"
        )


def check(run: Run) -> Distiller | None:
    """Parse the run's flags and make its method, if one is named, as its training will."""
    example = EXAMPLES[run.settings["example"]]
    model_args, _, args = parse_arguments(types_of(example), run.words())
    check_conflicts(model_args, args)
    if model_args.distiller is None:
        return None
    return make_distiller(model_args.distiller, **json_table(model_args.distiller_kwargs, "distiller_kwargs"))


def types_of(example) -> tuple[type, type, type]:
    return example.ModelArguments, example.DataArguments, example.TrainingArguments


# One run, in a process of its own


def train(folder: Path, settings: dict, name: str) -> None:
    """Train one run, from its last whole checkpoint where there is one; its report is written last of all."""
    run = Run(name, name, settings["flags"]["seed"], folder, settings)
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(run.log.with_suffix(".lock")):  # who lost the process that started it may still be at it
        state = run.state()
        if state == "finished":
            return
        resumes = state == "begun" and last_whole_checkpoint(folder) is not None
        if not resumes:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_json(folder / SETTINGS, settings)
        words = [*run.words(), *(["--resume_from_checkpoint", "true"] if resumes else [])]
        example = EXAMPLES[settings["example"]]
        results = example.run(*parse_arguments(types_of(example), words))
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        curve = validation_curve(state["log_history"])
        report = {
            "results": {**results, **spreads(curve)},
            "validation": curve,
            "resumed": resumes,
            "command": run.command(),
            **machine(),
        }
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        write_json(folder / FINISHED, report)


def validation_curve(log_history: list[dict]) -> list[dict]:
    """The evaluations during training, one a step; the one behind it says the same again."""
    curve: dict[int, dict] = {}
    for row in log_history:
        found = {name: value for name, value in row.items() if name.startswith("eval_") or name in ("epoch", "step")}
        if len(found) > 2:
            curve.setdefault(row["step"], found)
    return list(curve.values())


def spreads(curve: list[dict]) -> dict[str, float]:
    """How much each score still moves in the last third of its curve: the sample standard deviation there."""
    last = curve[-max(2, math.ceil(len(curve) / 3)) :]
    names = [] if len(last) < 2 else [name for name in last[-1] if name.startswith("eval_")]
    return {
        f"{name}_spread": statistics.stdev(row[name] for row in last)
        for name in names
        if not name.endswith(("_runtime", "_per_second")) and all(name in row for row in last)
    }


def machine() -> dict:
    """What the figures of time and memory are about."""
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    has_gpu = torch.cuda.is_available()
    return {
        "peak_memory_bytes": kibibytes * (1 if sys.platform == "darwin" else 1024),
        "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated() if has_gpu else None,
        "device": torch.cuda.get_device_name() if has_gpu else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"hfkd": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def write_json(path: Path, content: object) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


# All runs


def execute(runs: Sequence[Run], jobs: int) -> list[Run]:
    """Train each in a process of its own, so many at a time; return those that failed."""
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs hear of it
    threads = int(os.environ.get("OMP_NUM_THREADS") or available_cores())
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, threads // jobs))}
    waiting, running, failed = list(runs), {}, []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                print(f"{run.name}: {'goes on' if run.state() == 'begun' else 'starts'}", flush=True)
                order = json.dumps({"folder": str(run.folder), "settings": run.settings, "name": run.name})
                running[start([__file__, "--one", order], run.log, environment)] = run, time.monotonic()
            time.sleep(0.1)
            for process in [process for process in running if process.poll() is not None]:
                run, since = running.pop(process)
                if process.returncode or run.state() != "finished":
                    failed.append(run)
                    print(f"{run.name}: FAILED, {why(run.log, process.returncode)}", flush=True)
                else:
                    print(f"{run.name}: finished in {time.monotonic() - since:.0f} s", flush=True)
    finally:
        for process in running:
            process.terminate()  # which has them write a checkpoint
        for process in running:
            process.wait()
        signal.signal(signal.SIGTERM, handler)
    return failed


def start(words: Sequence[str], log: Path, environment: dict) -> subprocess.Popen:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        return subprocess.Popen([sys.executable, *words], stdout=file, stderr=file, env=environment)


def why(log: Path, status: int) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"exit status {status}: {lines[-1] if lines else 'no output'} ({log})"


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def warm(runs: Sequence[Run]) -> None:
    """Fill the cache of the teacher before the first run that reads it, so that no run's time is its filling's."""
    known = set()
    for run in runs:
        flags = run.settings["flags"]
        # A method may look inside its teacher, and then another store holds what it asked.
        same = {name: value for name, value in flags.items() if name not in ("seed", "distiller_kwargs")}
        if not flags.get("teacher_cache") or (key := json.dumps(same, sort_keys=True)) in known:
            continue
        known.add(key)
        if (method := check(run)) is not None and not method.needs_teacher:
            continue
        log = run.log.with_name(f"warm-{run.name}.log")
        script = ROOT / "scripts" / "warm_teacher_cache.py"
        folder = run.folder.parent.parent / "logs" / "nothing"
        words = [*expanded(words_of(flags)), "--output_dir", str(folder)]
        process = start([str(script), f"run_{run.settings['example']}_kd", *words], log, dict(os.environ))
        try:
            status = process.wait()
        finally:
            process.terminate()
        shutil.rmtree(folder, ignore_errors=True)
        if status:
            print(f"{run.name}: its teacher's cache was not filled, {why(log, status)}", flush=True)


# What came out


def summarize(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation, which one value does not have."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Where the mean lies with 95 % confidence, by Student's t; one value tells nothing."""
    if len(values) < 2:
        return None
    mean, std = summarize(values)
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * std / math.sqrt(len(values))
    return mean - half, mean + half


def default_metric(study: dict) -> str:
    if study["example"] == "image":
        return "test_accuracy"
    return f"test_{main_metric(study['flags'].get('task', ''))}"


def is_lower_better(metric: str) -> bool:
    return metric.endswith(("loss", "mse", "ece", "spread"))


def default_baseline(study: dict) -> str | None:
    """The method called KD, else the first that is ``distiller: kd``."""
    methods = study["methods"]
    return next(
        (name for name in methods if name.lower() == "kd"),
        next((name for name, flags in methods.items() if str(flags.get("distiller")).lower() == "kd"), None),
    )


def share_kept(results: Sequence[dict], metric: str) -> float | None:
    """The mean score as a share of the teacher's, where runs report the teacher's and more is better."""
    pairs = [(r[metric], r[f"teacher_{metric}"]) for r in results if f"teacher_{metric}" in r]
    if not pairs or is_lower_better(metric) or min(teacher for _, teacher in pairs) <= 0:
        return None
    return statistics.fmean(own / teacher for own, teacher in pairs)


def leaderboard(runs: Sequence[Run], metric: str, baseline: str | None) -> list[dict]:
    """A row for each method that has finished runs, the best first."""
    reports: dict[str, dict[int, dict]] = {}
    known = {}
    for run in runs:
        if run.state() == "finished":
            report = run.report()
            known |= {name: None for name in report["results"] if name.startswith(("eval_", "test_"))}
            if metric in report["results"]:
                reports.setdefault(run.method, {})[run.seed] = report
    if known and not reports:
        raise ValueError(f"no run has {metric}: set metric: to one of {', '.join(known)}")
    scores = {name: {seed: r["results"][metric] for seed, r in found.items()} for name, found in reports.items()}
    flags = {run.method: run.settings["flags"] for run in runs}
    rows = []
    for method, found in reports.items():
        own, base = scores[method], scores.get(baseline, {})
        pairs = {} if method == baseline else {seed: own[seed] - base[seed] for seed in own if seed in base}
        # Of a resumed run only the last part was timed.
        timed = [r["results"]["train_runtime"] for r in found.values() if not r["resumed"]]
        gpu = [r["peak_gpu_memory_bytes"] for r in found.values() if r["peak_gpu_memory_bytes"] is not None]
        memory = gpu or [r["peak_memory_bytes"] for r in found.values()]
        names = [name for name in next(iter(found.values()))["results"] if name.startswith(("eval_", "test_"))]
        values = {name: [r["results"][name] for r in found.values() if name in r["results"]] for name in names}
        rows.append(
            {
                "method": method,
                "n": len(own),
                "scores": own,
                "mean": summarize(list(own.values()))[0],
                "std": summarize(list(own.values()))[1],
                "mean_interval": interval(list(own.values())),
                "pairs": pairs,
                "difference": statistics.fmean(pairs.values()) if pairs else None,
                "interval": interval(list(pairs.values())),
                "kept": share_kept([r["results"] for r in found.values()], metric),
                "seconds": statistics.fmean(timed) if timed else None,
                "memory": max(memory),
                "memory_of": "GPU" if gpu else "process",
                "metrics": {name: summarize(v) for name, v in values.items() if isinstance(v[0], (int, float))},
                "curves": {seed: r["validation"] for seed, r in found.items()},
                "flags": {name: value for name, value in flags[method].items() if name != "seed"},
            }
        )
    return sorted(rows, key=lambda row: row["mean"] if is_lower_better(metric) else -row["mean"])


def number(value: float | None, scale: float = 1.0, form: str = ".2f") -> str:
    return "–" if value is None else format(scale * value, form)


def scale_of(metric: str) -> tuple[float, str]:
    """By what a score is multiplied where people read it, and its unit."""
    plain = ("entropy", "loss", "mse", "ece", "loss_spread", "mse_spread")
    return (1.0, "") if metric.endswith(plain) else (100.0, "%")


def cells(row: dict, metric: str) -> dict[str, str]:
    """A row of the leaderboard as text, by column; those without a word have no value."""
    scale, _ = scale_of(metric)
    spread = "" if row["std"] is None else f" ± {number(row['std'], scale)}"
    low, high = row["interval"] or (None, None)
    return {
        "method": row["method"],
        "n": str(row["n"]),
        "score": number(row["mean"], scale) + spread,
        "difference": number(row["difference"], scale, "+.2f"),
        "interval": "–" if low is None else f"{number(low, scale, '+.2f')} to {number(high, scale, '+.2f')}",
        "pairs": str(len(row["pairs"])) if row["pairs"] else "–",
        "kept": number(row["kept"], 100, ".1f"),
        "seconds": number(row["seconds"], form=".1f"),
        "memory": number(row["memory"], 2**-20, ".0f"),
    }


def headings(metric: str, baseline: str | None) -> dict[str, str]:
    _, unit = scale_of(metric)
    score = metric.replace("_", " ") + (f" ({unit})" if unit else "")
    return {
        "method": "method",
        "n": "seeds",
        "score": score,
        "difference": f"difference to {baseline}" if baseline else "difference",
        "interval": "95 % interval",
        "pairs": "pairs",
        "kept": "of the teacher's (%)",
        "seconds": "training (s)",
        "memory": "peak memory (MiB)",
    }


def markdown(rows: list[dict], metric: str, baseline: str | None, notes: Sequence[str], title: str) -> str:
    def plain(word):
        return re.sub(r"([\\|<>`*_\[\]])", r"\\\1", word)

    def line(words):
        return "| " + " | ".join(map(plain, words)) + " |"

    columns = headings(metric, baseline)
    table = [line(columns.values()), "|---|" + "---:|" * (len(columns) - 1)]
    table += [line(cells(row, metric).values()) for row in rows]
    return "\n".join([f"# {plain(title)}", "", *table, "", *map(plain, notes), ""])


def write_csv(path: Path, rows: list[dict], baseline: str | None) -> None:
    """Every metric that the example returned, raw, for other programs."""
    metrics = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    spread = [f"{name}_{what}" for name in metrics for what in ("mean", "std")]
    head = ["method", "n", "mean", "std", "baseline", "difference", "low", "high", "pairs", "kept"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*head, "seconds", "memory_bytes", "memory_of", *spread])
        for row in rows:
            low, high = row["interval"] or (None, None)
            figures = [row["n"], row["mean"], row["std"], baseline, row["difference"], low, high, len(row["pairs"])]
            others = [value for name in metrics for value in row["metrics"].get(name, (None, None))]
            costs = [row["seconds"], row["memory"], row["memory_of"]]
            writer.writerow([row["method"], *figures, row["kept"], *costs, *others])


def notes_on(rows: list[dict], runs: Sequence[Run], metric: str, baseline: str | None) -> list[str]:
    """What a reader must know of the figures."""
    unfinished = [run.name for run in runs if run.state() != "finished"]
    shown = {(row["method"], seed) for row in rows for seed in row["scores"]}
    lacking = [run.name for run in runs if run.name not in unfinished and (run.method, run.seed) not in shown]
    memory = ", ".join(sorted({row["memory_of"] for row in rows}))
    notes = [
        f"{metric.replace('_', ' ')} at the last epoch: mean ± sample standard deviation over the seeds.",
        f"Differences are to {baseline} at the same seeds, with the 95 % interval of Student's t over the pairs; one "
        "pair has none, none knows the luck of the test items, and of many some miss by chance."
        if baseline
        else "No method was named as baseline: no differences.",
        f"Time is the wall clock of training, without runs that were resumed; memory the largest peak of any run "
        f"({memory}).",
    ]
    if lacking:
        notes.append(f"Finished, but without {metric.replace('_', ' ')}: {', '.join(lacking)}.")
    if unfinished:
        notes.append(f"Not run, or not finished: {', '.join(unfinished)}.")
    return notes


def publish(study: dict, runs: Sequence[Run], output: Path) -> list[Path]:
    """Write the leaderboard of what is finished."""
    metric, baseline = study.get("metric") or default_metric(study), study.get("baseline") or default_baseline(study)
    rows = leaderboard(runs, metric, baseline)
    if not rows:
        return []
    title = str(study.get("title") or output.name)
    notes = notes_on(rows, runs, metric, baseline)
    finished = [
        {"name": run.name, "method": run.method, "seed": run.seed, "settings": run.settings, **run.report()}
        for run in runs
        if run.state() == "finished"
    ]
    write_json(output / "results.json", {"title": title, "metric": metric, "baseline": baseline, "runs": finished})
    (output / "leaderboard.md").write_text(markdown(rows, metric, baseline, notes, title), encoding="utf-8")
    write_csv(output / "leaderboard.csv", rows, baseline)
    columns = headings(metric, baseline)
    table = [(row, cells(row, metric)) for row in rows]
    write_page(output / "leaderboard.html", title, columns, table, notes, metric, scale_of(metric), baseline)
    return [output / f"leaderboard.{kind}" for kind in ("md", "csv", "html")]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, nargs="?", help="The YAML file.")
    parser.add_argument("--output", type=Path, help="Folder of the runs and the leaderboard, in place of the file's.")
    parser.add_argument("--seeds", type=int, nargs="+", help="In place of the file's.")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="Run these alone; the leaderboard shows all.")
    parser.add_argument("--metric", help="What the leaderboard ranks by, in place of the file's.")
    parser.add_argument("--baseline", metavar="METHOD", help="Whom differences are to, in place of the file's.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs at a time; they share the threads.")
    parser.add_argument("--dry_run", action="store_true", help="Check all flags and print the commands.")
    parser.add_argument("--rerun_changed", action="store_true", help="Make runs anew whose settings have changed.")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one:
        order = json.loads(arguments.one)
        train(Path(order["folder"]), order["settings"], order["name"])
        return 0
    if arguments.study is None:
        raise ValueError("name the file of a study: scripts/compare_distillers.py study.yaml")
    if arguments.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {arguments.jobs}")
    study = read_study(arguments.study)
    if arguments.seeds:
        check_seeds(arguments.seeds)
        study["seeds"] = arguments.seeds
    study |= {name: value for name in ("metric", "baseline") if (value := getattr(arguments, name)) is not None}
    output = arguments.output or Path(study.get("output") or f"outputs/{arguments.study.stem}")
    for name in (*(arguments.only or ()), *filter(None, [study.get("baseline")])):
        if name not in study["methods"]:
            raise ValueError(f"there is no method {name!r}: the study has {', '.join(study['methods'])}")
    teachers, runs = plan(study, output)
    chosen = [run for run in runs if not arguments.only or run.method in arguments.only]
    for run in [*teachers, *chosen]:
        try:
            check(run)
        except ValueError as error:
            raise ValueError(f"{run.name}: {error}") from error
    changed = [run for run in [*teachers, *chosen] if run.state() == "changed"]
    for run in changed:
        print(f"{run.name} was made with other settings: {'; '.join(run.differences())}", flush=True)
    if arguments.dry_run:
        for run in [*teachers, *chosen]:
            print(f"# {run.name}: {run.state()}\n{run.command()}")
        return 0
    if changed and not arguments.rerun_changed:
        raise ValueError(
            f"{len(changed)} runs in {output} were made with other settings (above): name another --output, set them "
            "back, or make these anew with --rerun_changed"
        )
    failed = execute([run for run in teachers if run.state() != "finished"], arguments.jobs)
    if not failed:
        waiting = [run for run in chosen if run.state() != "finished"]
        warm(waiting)
        failed = execute(waiting, arguments.jobs)
    for path in publish(study, runs, output):
        print(f"{path} ({path.stat().st_size:,} bytes)")
    if failed:
        print(f"failed: {', '.join(run.name for run in failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    with explain_refusals():
        sys.exit(main())
