"""The leaderboard of compare_distillers.py as one page that needs nothing else: no network, no other file."""

from __future__ import annotations

import html
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path


TEMPLATE = Path(__file__).with_suffix(".html")
# Okabe and Ito's; the last but one is the ink of the page, and yellow, which is weak on white, has an outline.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#e69f00", "#56b4e9", "#cc79a7", "var(--ink)", "#f0e442")
# As many as no divisor of 8, so that 56 methods have a colour and a shape of their own.
SHAPES = (
    "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0z",
    "M-4.5,-4.5h9v9h-9z",
    "M0,-6L5.5,4.5H-5.5z",
    "M0,-6.5L6,0L0,6.5L-6,0z",
    "M0,6L5.5,-4.5H-5.5z",
    "M-2,-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
    "M0,-6.5L6,-1.5L4,5.5H-4L-6,-1.5z",
)
DASHES = ("none", "7 3", "2 3", "9 3 2 3", "4 2 1 2")
WIDTH, LEFT, RIGHT = 420, 46, 12


def text(value: object) -> str:
    return html.escape(str(value), quote=True)


def shape(number: int) -> str:
    """What the marks of a method point to, once in a page."""
    return f'<path id="m{number}" class="c{number % 8}" d="{SHAPES[number % 7]}"/>'


def mark(number: int, x: float = 0, y: float = 0, size: float = 1.0, title: str = "") -> str:
    """The shape of a method in its colour; with a word, where it is pointed at."""
    named = f"<title>{text(title)}</title>" if title else ""
    place = f"translate({x:.1f} {y:.1f})" + (f" scale({size})" if size != 1 else "")
    return f'<use href="#m{number}" transform="{place}">{named}</use>'


def swatch(number: int) -> str:
    return f'<svg class="mark" viewBox="-8 -8 16 16" aria-hidden="true">{mark(number)}</svg>'


def legend(names: Sequence[str], numbers: Mapping[str, int]) -> str:
    items = "".join(f"<li>{swatch(numbers[name])}{text(name)}</li>" for name in names)
    return f'<ul class="legend">{items}</ul>'


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers between two."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def padded(values: Sequence[float], share: float = 0.08) -> tuple[float, float]:
    """A range with some room on both sides; one value has some around it."""
    low, high = min(values), max(values)
    room = share * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def scale(domain: tuple[float, float], start: float, stop: float):
    (low, high) = domain
    return lambda value: start + (min(max(value, low), high) - low) / (high - low) * (stop - start)


def plot(height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{text(label)}">'
        f"{''.join(parts)}</svg>"
    )


def line(x1: float, y1: float, x2: float, y2: float, kind: str, width: float = 1) -> str:
    place = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line class="{kind}" {place} stroke-width="{width}"/>'


def word(x: float, y: float, content: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{text(content)}</text>'


def x_axis(domain: tuple[float, float], place, top: float, bottom: float, label: str) -> list[str]:
    parts = []
    for value in ticks(*domain):
        x = place(value)
        parts += [line(x, top, x, bottom, "grid"), word(x, bottom + 15, f"{value:g}", "middle", "soft")]
    return [*parts, word(WIDTH / 2, bottom + 33, label, "middle", "soft")]


def dots(rows: Sequence[tuple[str, Sequence[float], float, tuple[float, float] | None]], numbers, label, zero=False):
    """A line a method: a mark a seed, a stroke at their mean, the interval as a bar, or an arrow where it goes on."""
    # Of two seeds the interval is thirteen times as wide as their standard error: the seeds set the range.
    seen = [value for _, values, _, _ in rows for value in values] + ([0.0] if zero else [])
    near = [end for _, values, _, ends in rows if ends and len(values) > 2 for end in ends]
    domain = padded([*seen, *near], 0.06)
    place, row_height, top = scale(domain, 12, WIDTH - 12), 38, 6
    bottom = top + row_height * len(rows)
    parts = x_axis(domain, place, top, bottom, label)
    if zero:
        parts.append(line(place(0), top, place(0), bottom, "zero", 1.5))
    for i, (name, values, mean, ends) in enumerate(rows):
        y, colour = top + row_height * i + 26, f"s{numbers[name] % 8}"
        short = name if len(name) < 44 else name[:42] + "…"
        parts.append(word(12, y - 12, short))
        if ends:
            low, high = (place(end) for end in ends)
            parts.append(line(low, y, high, y, colour, 3))
            for end, x, way in zip(ends, (low, high), (-1, 1), strict=True):
                if domain[0] <= end <= domain[1]:
                    parts.append(line(x, y - 5, x, y + 5, colour, 2))
                else:  # an arrow: it goes on
                    parts += [line(x + 7 * way, y, x, y + side, colour, 2) for side in (-5, 5)]
        parts += [mark(numbers[name], place(value), y, 0.8, f"{name}: {value:.4g}") for value in values]
        parts.append(line(place(mean), y - 9, place(mean), y + 9, "ink", 2.5))
    return plot(bottom + 40, label, parts)


def axes(xs: tuple[float, float], ys: tuple[float, float], labels: tuple[str, str], height: float):
    top, bottom = 22, height - 42
    across, up = scale(xs, LEFT, WIDTH - RIGHT), scale(ys, bottom, top)
    parts = x_axis(xs, across, top, bottom, labels[0])
    for value in ticks(*ys):
        parts += [line(LEFT, up(value), WIDTH - RIGHT, up(value), "grid")]
        parts += [word(LEFT - 6, up(value) + 4, f"{value:g}", "end", "soft")]
    return across, up, [*parts, word(4, 12, labels[1], "start", "soft")]


def against_time(rows: Sequence[tuple[str, float, float, float | None]], numbers, label: str) -> str:
    """Mean score and standard deviation over mean training time."""
    ys = [value for _, _, mean, std in rows for value in (mean - (std or 0), mean + (std or 0))]
    times = [seconds for _, seconds, _, _ in rows]
    across, up, parts = axes(padded(times, 0.1), padded(ys, 0.1), ("training (s)", label), 300)
    for name, seconds, mean, std in rows:
        if std is not None:
            x = across(seconds)
            parts.append(line(x, up(mean - std), x, up(mean + std), f"s{numbers[name] % 8}", 2))
        parts.append(mark(numbers[name], across(seconds), up(mean), 1, f"{name}: {mean:.4g}, {seconds:.4g} s"))
    return plot(300, f"{label} against training time", parts)


def curves(rows: Sequence[tuple[str, Sequence[tuple[float, float]]]], numbers, label: str) -> str:
    """The mean over the seeds after each epoch."""
    points = [point for _, curve in rows for point in curve]
    xs, ys = padded([x for x, _ in points], 0.03), padded([y for _, y in points])
    across, up, parts = axes(xs, ys, ("epoch", label), 300)
    for name, curve in rows:
        number = numbers[name]
        path = "L".join(f"{across(x):.1f},{up(y):.1f}" for x, y in curve)
        style = f'fill="none" stroke-width="2" stroke-dasharray="{DASHES[number % 5]}"'
        parts.append(f'<path class="s{number % 8}" d="M{path}" {style}><title>{text(name)}</title></path>')
        # Marks on every point of a long curve would hide it.
        every = max(1, len(curve) // 6)
        parts += [mark(number, across(x), up(y), 0.8) for x, y in [*curve[:-1:every], curve[-1]]]
    return plot(300, f"{label} over the epochs", parts)


def mean_curve(by_seed: Mapping[int, Sequence[dict]], metric: str, factor: float) -> list[tuple[float, float]]:
    """What all seeds have in common, averaged over them."""
    values: dict[float, list[float]] = {}
    for evaluations in by_seed.values():
        for row in evaluations:
            if metric in row:
                values.setdefault(row["epoch"], []).append(factor * row[metric])
    return [(epoch, statistics.fmean(v)) for epoch, v in sorted(values.items()) if len(v) == len(by_seed)]


def figure(title: str, explanation: str, drawing: str, below: str = "") -> str:
    return f"<figure><h2>{text(title)}</h2><p>{text(explanation)}</p>{drawing}{below}</figure>"


def write_page(
    path: Path,
    title: str,
    columns: Mapping[str, str],
    table: Sequence[tuple[dict, dict[str, str]]],
    notes: Sequence[str],
    metric: str,
    unit: tuple[float, str],
    baseline: str | None,
) -> None:
    """Write the page.

    Args:
        path: Where to.
        title: Its heading.
        columns: Headings by column.
        table: Each method's figures, and the same as text by column, in the order to begin with.
        notes: What a reader must know.
        metric: The score's name.
        unit: By what scores are multiplied, and the unit they then have.
        baseline: What differences are to.
    """
    factor, symbol = unit
    label = metric.replace("_", " ") + (f" ({symbol})" if symbol else "")
    rows = [row for row, _ in table]
    numbers = {name: i for i, name in enumerate(sorted(row["method"] for row in rows))}

    def scaled(ends):
        return None if ends is None else (factor * ends[0], factor * ends[1])

    figures = [
        figure(
            "Scores",
            "A mark a seed, a stroke their mean, a bar its 95 % interval (Student's t), with an arrow where "
            "it is wider than the plot.",
            dots(
                [
                    (
                        row["method"],
                        [factor * score for score in row["scores"].values()],
                        factor * row["mean"],
                        scaled(row["mean_interval"]),
                    )
                    for row in rows
                ],
                numbers,
                label,
            ),
        )
    ]
    paired = [row for row in rows if row["pairs"]]
    if paired:
        paired.sort(key=lambda row: -row["difference"])
        points = "points" if symbol == "%" else label
        figures.append(
            figure(
                f"Difference to {baseline} at the same seeds",
                "As above; a bar that leaves the dashed line out is a difference at 95 % confidence.",
                dots(
                    [
                        (
                            row["method"],
                            [factor * value for value in row["pairs"].values()],
                            factor * row["difference"],
                            scaled(row["interval"]),
                        )
                        for row in paired
                    ],
                    numbers,
                    f"difference ({points})",
                    zero=True,
                ),
            )
        )
    timed = [row for row in rows if row["seconds"] is not None]
    if timed:
        points = [
            (row["method"], row["seconds"], factor * row["mean"], None if row["std"] is None else factor * row["std"])
            for row in timed
        ]
        figures.append(
            figure(
                "Score against training time",
                "Means over the seeds; bars are standard deviations.",
                against_time(points, numbers, label),
                legend([row["method"] for row in timed], numbers),
            )
        )
    validation = re.sub("^test_", "eval_", metric)
    drawn = [(row["method"], mean_curve(row["curves"], validation, factor)) for row in rows]
    drawn = [(name, curve) for name, curve in drawn if curve]
    if drawn:
        figures.append(
            figure(
                "Validation during training",
                "Means over the seeds.",
                curves(drawn, numbers, label.replace("test ", "validation ")),
                legend([name for name, _ in drawn], numbers),
            )
        )
    values = {
        "method": lambda row: row["method"],
        "n": lambda row: row["n"],
        "score": lambda row: row["mean"],
        "difference": lambda row: row["difference"],
        "interval": lambda row: row["interval"] and row["interval"][0],
        "pairs": lambda row: len(row["pairs"]) or None,
        "kept": lambda row: row["kept"],
        "seconds": lambda row: row["seconds"],
        "memory": lambda row: row["memory"],
    }
    head = "".join(
        f'<th scope="col" aria-sort="none" data-kind="{"text" if name == "method" else "number"}">'
        f'<button type="button">{text(heading)}</button></th>'
        for name, heading in columns.items()
    )
    body = []
    for row, words in table:
        line_of = []
        for name in columns:
            value = values[name](row)
            shown = swatch(numbers[row["method"]]) + text(words[name]) if name == "method" else text(words[name])
            tag = 'th scope="row"' if name == "method" else "td"
            line_of.append(f'<{tag} data-value="{"" if value is None else text(value)}">{shown}</{tag[:2]}>')
        body.append(f"<tr>{''.join(line_of)}</tr>")
    colours = [
        f".c{i} {{ fill: {colour}; stroke: var(--{'ink' if i == 7 else 'paper'}); stroke-width: .8 }} "
        f".s{i} {{ stroke: {colour} }}"
        for i, colour in enumerate(COLOURS)
    ]
    flags = [
        f"<h3>{text(row['method'])}</h3><pre>{text(json.dumps(row['flags'], indent=1, ensure_ascii=False))}</pre>"
        for row in rows
    ]
    parts = {
        "title": text(title),
        "shapes": "".join(shape(number) for number in numbers.values()),
        "colours": "\n".join([*colours, "svg .ink { stroke: var(--ink) }"]),
        "head": head,
        "rows": "\n".join(body),
        "notes": "\n".join(f"<p>{text(note)}</p>" for note in notes),
        "figures": "\n".join(figures),
        "flags": "\n".join(flags),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    # In one pass, so that what is filled in is not searched again.
    path.write_text(re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template), encoding="utf-8")
