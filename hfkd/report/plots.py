"""Curves and diagrams of a run, from plain numbers.

Series differ in colour (Okabe and Ito's), dashes and markers, areas in colour and hatching: any one of them is enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from hfkd.metrics import expected_calibration_error, reliability


BLUE, ORANGE = "#0072B2", "#D55E00"
COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# What transformers logs beside the loss at a step.
_NOT_TERMS = {"step", "epoch", "grad_norm", "learning_rate", "num_input_tokens_seen"}
_SPEED = ("_runtime", "_per_second", "_time")

Series = dict[str, tuple[list[float], list[float]]]


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own, in inches, which no window and no global state knows of."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, with the folders on the way, and return the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def curves_of(log_history: Sequence[Mapping], weights: Sequence[str] = ()) -> tuple[Series, Series, Series]:
    """What a log holds over time: losses, scores, and the given weights; name to steps and values.

    The losses are the total, its terms, and the loss on evaluation sets. Of a name that was logged twice at a step, as
    an evaluation after the last step is, the last value counts.

    Args:
        log_history: ``trainer.state.log_history``.
        weights: Names of what a method logs beside its terms: the keys of ``distiller.logged_values()``.
    """
    found: tuple[dict, dict, dict] = ({}, {}, {})
    losses, scores, chosen = found
    for entry in log_history:
        is_step = "loss" in entry
        for name, value in entry.items():
            if not isinstance(value, (int, float)) or not math.isfinite(value) or "step" not in entry:
                continue
            where = None
            if name in weights:
                where = chosen
            elif is_step and name not in _NOT_TERMS:
                where = losses
            elif name.startswith(("eval_", "test_")) and not name.endswith(_SPEED):
                where = losses if name.endswith("_loss") else scores
            if where is not None:
                where.setdefault(name, {})[entry["step"]] = value
    return tuple({name: (list(values), list(values.values())) for name, values in panel.items()} for panel in found)


def training_curves(log_history: Sequence[Mapping], path: str | Path, *, weights: Sequence[str] = ()) -> Path:
    """Draw losses, scores and learned weights over time, a panel each; one with nothing to show is left out.

    The score of the teacher, where it was logged, is a grey line across that of the student.

    Args:
        log_history: ``trainer.state.log_history``: one table a log line, with the key ``step``.
        path: Where to save the picture, as PNG.
        weights: Which of the names are weights, such as a learned ``alpha``: ``[*distiller.logged_values()]``.

    Returns:
        The path.

    Raises:
        ValueError: If there is nothing to draw.
    """
    log_history = list(log_history)
    kinds = (("loss and its terms", "loss"), ("scores", "score"), ("weights", "value"))
    found = zip(kinds, curves_of(log_history, weights), strict=True)
    panels = [(title, unit, series) for (title, unit), series in found if series]
    if not panels:
        raise ValueError(
            "the log has no loss, no score and no weight at any step: train first, with logging_steps= no larger than "
            "the number of steps"
        )
    columns, lines = min(2, len(panels)), math.ceil(len(panels) / 2)  # what a page's width keeps readable
    figure = new_figure(4.2 * columns, 3.0 * lines)
    for place, (title, unit, series) in enumerate(panels, 1):
        axes = figure.add_subplot(lines, columns, place)
        _draw_series(axes, series)
        axes.set(title=title, xlabel="step", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if unit == "score":
            scores = {name.partition("_")[2] for name in series}
            logged = {name: value for entry in log_history for name, value in entry.items()}
            for name in sorted(scores):
                if isinstance(value := logged.get(f"teacher_{name}"), (int, float)):
                    axes.axhline(value, color="0.45", linestyle=(0, (8, 3)), linewidth=1.2, label=f"teacher_{name}")
        axes.legend(fontsize=7, framealpha=0.7)
    return save(figure, path)


def _draw_series(axes: Axes, series: Series) -> None:
    for place, (name, (steps, values)) in enumerate(series.items()):
        axes.plot(
            steps,
            values,
            color=COLOURS[place % len(COLOURS)],
            linestyle=DASHES[place % len(DASHES)],
            marker=MARKERS[place % len(MARKERS)],
            markersize=4,
            markevery=max(1, len(steps) // 8),
            linewidth=1.4,
            label=name,
        )
    axes.grid(color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def reliability_diagram(
    models: Mapping[str, tuple[np.ndarray, np.ndarray]], path: str | Path, *, bins: int = 15
) -> Path:
    """Draw how often models are right against how sure they are, a column of panels each.

    On the diagonal a model is calibrated. Hatched is the gap: below the diagonal the model is too sure of itself. The
    lower panel has the share of samples in each bin.

    Args:
        models: Name to logits (N, C) and labels (N,); samples with -100 are left out.
        path: Where to save the picture, as PNG.
        bins: Of confidence, of equal width.

    Returns:
        The path.

    Raises:
        ValueError: If there is no model, or as :func:`hfkd.metrics.reliability`.
    """
    if not models:
        raise ValueError("a reliability diagram is of at least one model: pass {name: (logits, labels)}")
    figure = new_figure(3.4 * len(models), 4.0)
    grid = figure.subplots(2, len(models), squeeze=False, sharex=True, height_ratios=(3, 1))
    middles, width = (np.arange(bins) + 0.5) / bins, 1 / bins
    for (upper, lower), (name, (logits, labels)) in zip(grid.T, models.items(), strict=True):
        samples, confidence, accuracy = reliability(logits, labels, bins=bins)
        error = expected_calibration_error(logits, labels, bins=bins)
        filled = samples > 0
        gap = (confidence - accuracy)[filled]
        upper.bar(middles[filled], accuracy[filled], width, color=BLUE, edgecolor="white", label="accuracy")
        upper.bar(
            middles[filled], gap, width, accuracy[filled], fill=False, edgecolor=ORANGE, hatch="////", label="gap"
        )
        upper.plot([0, 1], [0, 1], color="black", linestyle=(0, (5, 2)), linewidth=1, label="calibrated")
        upper.set(title=f"{name}: ECE {error:.3f}", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        upper.legend(fontsize=7, loc="upper left")
        lower.bar(middles, samples / samples.sum(), width, color="0.55", edgecolor="white")
        lower.set(xlabel=f"confidence ({samples.sum():,} samples)", ylabel="share", ylim=(0, 1))
    return save(figure, path)


def confusions(logits, labels) -> np.ndarray:
    """Of the samples of each class the share that a model gives to each class.

    Args:
        logits: (N, C) unnormalised scores.
        labels: (N,) class indices.

    Returns:
        (C, C), true class by answer; rows sum to 1, or to 0 for a class without samples.
    """
    classes = np.shape(logits)[1]
    answers = np.bincount(np.asarray(labels) * classes + np.argmax(logits, 1), minlength=classes**2)
    counts = answers.reshape(classes, classes)
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def confusion_difference(
    student_logits,
    teacher_logits,
    labels,
    path: str | Path,
    *,
    label_names: Sequence[str] | None = None,
    most: int = 20,
) -> Path:
    """Draw what the student confuses otherwise than its teacher: its confusion matrix less the teacher's.

    In percentage points of the samples of the true class (rows). Plus is what the student answers more often, minus,
    which is hatched too, less often. Of more than ``most`` classes the ones whose rows differ most are shown.

    Args:
        student_logits: (N, C) unnormalised scores.
        teacher_logits: (N, C), of the same samples and classes.
        labels: (N,) class indices; samples with -100 are left out.
        path: Where to save the picture, as PNG.
        label_names: Names of the C classes; their numbers by default.
        most: How many classes are shown at most.

    Returns:
        The path.

    Raises:
        ValueError: If the shapes do not fit, a label is no class, or no sample has a label.
    """
    student, teacher, labels = np.asarray(student_logits), np.asarray(teacher_logits), np.asarray(labels)
    if student.ndim != 2 or student.shape != teacher.shape or labels.shape != student.shape[:1]:
        raise ValueError(
            f"a difference of confusions is of two logits (N, C) and labels (N,) of the same samples, got "
            f"{student.shape}, {teacher.shape} and {labels.shape}"
        )
    classes, labelled = student.shape[1], labels != -100
    if not labelled.any():
        raise ValueError("no sample has a label: pass a labelled split")
    if not 0 <= labels[labelled].min() <= labels[labelled].max() < classes:
        raise ValueError(f"labels {labels[labelled].min()}..{labels[labelled].max()} are not among {classes} classes")
    if label_names is not None and len(label_names) != classes:
        raise ValueError(f"{len(label_names)} label_names for {classes} classes: pass as many, or none")
    names = [str(name) for name in (range(classes) if label_names is None else label_names)]
    student, teacher = (confusions(logits[labelled], labels[labelled]) for logits in (student, teacher))
    points = 100 * (student - teacher)
    shown = np.sort(np.argsort(-np.abs(points).sum(1), kind="stable")[:most])
    points, names = points[np.ix_(shown, shown)], [names[place] for place in shown]

    side = max(3.2, 0.42 * len(shown) + 1.6)
    figure = new_figure(side + 0.8, side)
    axes, limit = figure.subplots(), max(np.abs(points).max(), 1.0)
    # Seen by the colour-blind, but with one grey for plus and minus: hence signs and hatches.
    image = axes.imshow(points, cmap="PuOr", vmin=-limit, vmax=limit)
    for (row, column), value in np.ndenumerate(points):
        if abs(value) < 0.5:
            continue
        if value < 0:
            cell = (column - 0.5, row - 0.5), 1, 1
            axes.add_patch(Rectangle(*cell, fill=False, edgecolor="0.55", hatch="///", linewidth=0))
        colour = image.cmap(image.norm(value))
        ink = "white" if np.dot(colour[:3], (0.2126, 0.7152, 0.0722)) < 0.45 else "black"
        plate = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
        axes.text(column, row, f"{value:+.0f}", color=ink, ha="center", va="center", fontsize=7, bbox=plate)
    axes.set_xticks(range(len(shown)), names, rotation=90, fontsize=7, parse_math=False)
    axes.set_yticks(range(len(shown)), names, fontsize=7, parse_math=False)
    which = f"\nthe {len(shown)} of {classes} classes that differ most" if len(shown) < classes else ""
    axes.set(xlabel="answer", ylabel="true class")
    axes.set_title(f"student − teacher: + the student answers this more often, − less often{which}", fontsize=9)
    figure.colorbar(image, ax=axes, label="percentage points of the true class", shrink=0.8)
    return save(figure, path)


def accuracy_against_latency(
    students: Mapping[str, tuple[float, float]], path: str | Path, *, score: str = "accuracy"
) -> Path:
    """Draw what several models reach against how long they take; a line joins those that no other one beats at both.

    Args:
        students: Name to latency in milliseconds and score (larger is better).
        path: Where to save the picture, as PNG.
        score: What the score is called.

    Returns:
        The path.

    Raises:
        ValueError: If there is none, a latency is not positive, or a number is not finite.
    """
    if not students:
        raise ValueError("there is nothing to compare: pass {name: (milliseconds, score)}")
    for name, (latency, value) in students.items():
        if not (0 < latency < math.inf and math.isfinite(value)):
            raise ValueError(f"{name} takes {latency} ms and has {score} {value}: leave out what was not measured")
    best, front = -math.inf, []
    for latency, value in sorted(students.values(), key=lambda pair: (pair[0], -pair[1])):
        if value > best:
            front.append((latency, value))
            best = value
    figure = new_figure(4.8, 3.6)
    axes = figure.subplots()
    axes.plot(*zip(*front, strict=True), color="0.5", linestyle=DASHES[1], linewidth=1, zorder=1, label="none better")
    for place, (name, (latency, value)) in enumerate(students.items()):
        colour, marker = COLOURS[(place + place // 7) % 7], MARKERS[place % 7]
        axes.plot([latency], [value], color=colour, marker=marker, linestyle="none", markersize=7, label=name)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="latency, batch 1 (ms)", ylabel=score)
    axes.grid(color="0.9", linewidth=0.6, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7)
    return save(figure, path)
