"""Galleries: which samples a method made use of."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.axes import Axes

from hfkd.data.task_data import UNLABELLED, is_text
from hfkd.memory import MISSING, Neighbours
from hfkd.report.plots import BLUE, ORANGE, new_figure, save


# Colour and line style say the same.
QUERY, SAME, OTHER = ("black", "-"), (BLUE, "-"), (ORANGE, (0, (3, 2)))
_WIDE = 34  # characters of a line of text
_LINES = 6


@dataclass
class Sample:
    """One thing to show: an image, or the texts of a sample, and what is written above it."""

    content: PIL.Image.Image | list[str]
    title: str
    style: tuple[str, Any] = QUERY


def class_name(label: int, label_names: Sequence[str] | None) -> str:
    """The name of a class, its number where there are no names, and a dash without a label."""
    if label == UNLABELLED:
        return "–"
    return str(label) if label_names is None else label_names[label]


class Samples:
    """The images or texts of a split, by their numbers in the column ``index``.

    Args:
        split: With the columns ``image`` or text, ``label`` and ``index``: of ``load_image_data`` or
            ``load_text_data``, before any tokenisation.

    Raises:
        ValueError: If the split has neither images nor text.
    """

    def __init__(self, split: datasets.Dataset):
        self.split = split
        self.places = {int(number): place for place, number in enumerate(split.with_format("numpy")["index"][:])}
        feature = split.features["label"]
        self.label_names = feature.names if isinstance(feature, datasets.ClassLabel) else None
        self.columns = [name for name, feature in split.features.items() if name == "image" or is_text(feature)]
        if not self.columns:
            raise ValueError(
                f"nothing to show among {', '.join(split.column_names)}: pass the split as load_image_data or "
                "load_text_data gave it, before tokenize and ImageDataset"
            )

    def __getitem__(self, number: int) -> tuple[PIL.Image.Image | list[str], str]:
        """What a sample shows, and the name of its class."""
        row = self.split[self.places[int(number)]]
        content = row["image"] if self.columns == ["image"] else [row[name] for name in self.columns]
        return content, class_name(row["label"], self.label_names)


def draw_sample(axes: Axes, sample: Sample) -> None:
    """Draw one image or text with its title and frame."""
    colour, dashes = sample.style
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set(color=colour, linestyle=dashes, linewidth=1.8)
    axes.set_title(sample.title, fontsize=7, pad=3, parse_math=False)
    if isinstance(sample.content, list):
        each = {"width": _WIDE, "max_lines": _LINES // len(sample.content), "placeholder": " …"}
        lines = [line for text in sample.content for line in textwrap.wrap(text, initial_indent="– ", **each)]
        place = {"va": "center", "transform": axes.transAxes, "parse_math": False}
        axes.text(0.03, 0.5, "\n".join(lines), fontsize=6, **place)
        return
    grey = sample.content.mode in ("1", "L")
    axes.imshow(np.asarray(sample.content), cmap="gray" if grey else None, interpolation="nearest", aspect="equal")


def draw_rows(rows: Sequence[Sequence[Sample | None]], headings: Sequence[tuple[int, str]], path: str | Path) -> Path:
    """Draw rows of samples, a None left empty, and save them as PNG.

    Args:
        rows: All of the same length.
        headings: What to write above a column, by its number; the text starts there.
        path: Where to, ending in ``.png``.

    Returns:
        The path.
    """
    width, height = (
        (2.0, 0.85) if any(s and isinstance(s.content, list) for row in rows for s in row) else (0.95, 1.15)
    )
    columns = len(rows[0])
    figure = new_figure(width * columns + 0.2, height * len(rows) + 0.5)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes, sample in zip(grid.flat, (sample for row in rows for sample in row), strict=True):
        axes.set_axis_off()
        if sample is not None:
            axes.set_axis_on()
            draw_sample(axes, sample)
    for column, heading in headings:
        grid[0, column].annotate(
            heading, (0, 1), (0, 18), xycoords="axes fraction", textcoords="offset points", fontsize=8, weight="bold"
        )
    return save(figure, path)


def neighbour_gallery(
    split: datasets.Dataset, neighbours: Neighbours, path: str | Path, *, positives: int = 4, negatives: int = 3
) -> Path:
    """Show samples with what was retrieved for them: a row each, the nearest first, with cosine similarities.

    Samples of the same class have a solid blue frame, those of other classes a dashed orange one.

    Args:
        split: The training split that the neighbours are from; see :class:`Samples`.
        neighbours: By the samples' ``index``: ``trainer.distiller.retrieved(torch.tensor([0, 7, 9]))`` of
            :class:`~hfkd.distillers.InContextKD`.
        path: Where to save the picture, as PNG.
        positives: How many of the same class to show.
        negatives: How many of other classes to show.

    Returns:
        The path.
    """
    samples = Samples(split)
    sides = (
        (neighbours.positives, neighbours.positive_similarities, positives, SAME),
        (neighbours.negatives, neighbours.negative_similarities, negatives, OTHER),
    )
    rows = []
    for place, number in enumerate(neighbours.rows.tolist()):
        row: list[Sample | None] = [Sample(*samples[number])]
        for found, similarities, count, style in sides:
            nearest = zip(found[place, :count].tolist(), similarities[place, :count].tolist(), strict=True)
            for other, similarity in nearest:
                if other == MISSING:
                    row.append(None)
                    continue
                content, name = samples[other]
                row.append(Sample(content, f"{name} {similarity:.2f}", style))
        rows.append(row)
    same, other = min(positives, neighbours.positives.shape[1]), min(negatives, neighbours.negatives.shape[1])
    headings = [(0, 1, "sample"), (1, same, "same class"), (1 + same, other, "other classes")]
    return draw_rows(rows, [(column, text) for column, width, text in headings if width], path)


def _influence_of(path: str | Path, samples: Samples) -> dict[str, np.ndarray]:
    """The columns of an influence table, of which nothing is read that could be more than numbers of this split."""
    wrong = f"{path} is no influence table of this split: pass influence/epoch-NNN.parquet of the run on it"
    types = {"index": np.int64, "label": np.int64, "influence": np.float32, "weight": np.float32}
    try:
        with pq.ParquetFile(path) as file:
            there = {field.name: field.type for field in file.schema_arrow}
            if file.metadata.num_rows > len(samples.places) or not all(
                name in there and (pa.types.is_integer(there[name]) or pa.types.is_floating(there[name]))
                for name in types
            ):
                raise ValueError("other rows or columns")
            columns = file.read(columns=[*types])
        measured = {name: columns[name].to_numpy().astype(dtype, casting="same_kind") for name, dtype in types.items()}
    except FileNotFoundError:
        raise
    except (ValueError, TypeError, KeyError, OSError, NotImplementedError, pa.ArrowException) as error:
        raise ValueError(f"{wrong} ({str(error)[:200]})") from error
    names = samples.label_names
    strange = [number for number in measured["index"].tolist() if number not in samples.places]
    labels = measured["label"]
    if strange or (names is not None and ((labels != UNLABELLED) & ((labels < 0) | (labels >= len(names)))).any()):
        raise ValueError(f"{wrong} (it has {strange[:3] if strange else 'labels'} that the split has not)")
    return measured


def influence_gallery(split: datasets.Dataset, table: str | Path, path: str | Path, *, count: int = 16) -> Path:
    """Show the training samples that help the held-out risk most, and those that harm it most, by their influence.

    Above each is the label that it was trained on and its weight. Helpful samples have a solid blue frame, harmful
    ones a dashed orange one.

    Args:
        split: The training split; see :class:`Samples`.
        table: What :class:`~hfkd.distillers.KDAIF` wrote at a refresh: ``influence/epoch-NNN.parquet`` in the output
            folder.
        path: Where to save the picture, as PNG.
        count: How many of each.

    Returns:
        The path.

    Raises:
        ValueError: If count is not positive or there are fewer samples than 2 count, or the table is damaged or of
            another split.
    """
    samples = Samples(split)
    measured = _influence_of(table, samples)
    by_influence = np.argsort(measured["influence"], kind="stable")
    if not 0 < 2 * count <= len(by_influence):
        raise ValueError(f"count must lie between 1 and half of the {len(by_influence)} samples, got {count}")

    def sample(place: int, style: tuple[str, Any]) -> Sample:
        content, _ = samples[measured["index"][place]]
        label = class_name(measured["label"][place], samples.label_names)
        return Sample(content, f"{label}  × {measured['weight'][place]:.2f}", style)

    helpful = [sample(place, SAME) for place in by_influence[:count]]
    harmful = [sample(place, OTHER) for place in by_influence[::-1][:count]]
    width = min(4 if samples.columns == ["image"] else 2, count)
    starts = range(0, count, width)
    empty = [None] * (-count % width)
    helpful, harmful = helpful + empty, harmful + empty
    rows = [[*helpful[i : i + width], None, *harmful[i : i + width]] for i in starts]
    return draw_rows(rows, [(0, "most helpful"), (width + 1, "most harmful")], path)
