"""The galleries: the right samples in the right places, in words as well as in colours."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from matplotlib.figure import Figure
from PIL import Image as PILImage

from hfkd.memory import MISSING, Neighbours
from hfkd.report import OTHER, QUERY, SAME, Samples, influence_gallery, neighbour_gallery


NAMES = ["cat", "dog"]
LABELS = ClassLabel(names=NAMES)
NUMBERS = [50, 7, 21, 3]


def split(labels, features, **columns):
    """As the loaders make it: -100 is no name of a class."""
    rows = Dataset.from_dict(columns, features=Features(features))
    return rows.add_column("label", np.array(labels), feature=LABELS).add_column("index", np.array(NUMBERS))


def images():
    pictures = [PILImage.new("RGB", (4, 4), (60 * i, 0, 0)) for i in range(4)]
    return split([0, 0, 1, -100], {"image": Image()}, image=pictures)


def texts():
    columns = {"sentence1": ["It costs $5 and $6.", "b" * 400, "c", "d"], "sentence2": ["e", "f g " * 90, "h", "i"]}
    return split([0, 0, 1, 1], dict.fromkeys(columns, Value("string")), **columns)


def neighbours():
    return Neighbours(
        torch.tensor([50, 21]),
        torch.tensor([[7, MISSING], [MISSING, MISSING]]),
        torch.tensor([[0.875, -torch.inf], [-torch.inf, -torch.inf]]),
        torch.tensor([[21], [7]]),
        torch.tensor([[0.25], [-0.5]], dtype=torch.float16),
    )


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures, save = [], Figure.savefig

    def savefig(self, *arguments, **options):
        figures.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def test_rows_show_the_neighbours_with_class_and_similarity(tmp_path, drawn):
    path = neighbour_gallery(images(), neighbours(), tmp_path / "new" / "gallery.png")
    assert PILImage.open(path).format == "PNG"
    (figure,) = drawn
    shown = [axes for axes in figure.axes if axes.axison]
    assert len(figure.axes) == 8  # two rows of a sample, two of its class, one of another
    assert [axes.get_title() for axes in shown] == ["cat", "cat 0.88", "dog 0.25", "dog", "cat -0.50"]
    reds = [int(axes.images[0].get_array()[0, 0, 0]) for axes in shown]
    assert reds == [0, 60, 120, 120, 60]  # of 50, 7, 21; 21, 7
    styles = [(axes.spines["top"].get_edgecolor()[:3], axes.spines["top"].get_linestyle()) for axes in shown]
    kinds = [QUERY, SAME, OTHER, QUERY, OTHER]
    for (colour, dashes), (expected, _), axes in zip(styles, kinds, shown, strict=True):
        hexadecimal = "#" + "".join(f"{round(255 * part):02X}" for part in colour)
        assert hexadecimal == {"black": "#000000"}.get(expected, expected)
        assert (dashes in ("-", "solid")) == (axes not in (shown[2], shown[4]))  # not by colour alone
    headings = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert headings == ["sample", "same class", "other classes"]


def test_texts_are_cut_to_their_place(tmp_path, drawn):
    neighbour_gallery(texts(), neighbours(), tmp_path / "gallery.png", positives=1)
    (figure,) = drawn
    written = [[text.get_text() for text in axes.texts if text.get_fontsize() == 6] for axes in figure.axes]
    assert written[0] == ["– It costs $5 and $6.\n– e"]
    assert written[2] == ["– c\n– h"]
    (cut,) = written[1]
    assert [len(line) <= 34 for line in cut.split("\n")] == [True] * 6
    assert cut.count("…") == 2
    assert len(figure.axes) == 6


def test_fewer_may_be_asked_for(tmp_path, drawn):
    neighbour_gallery(images(), neighbours(), tmp_path / "a.png", negatives=0)
    neighbour_gallery(images(), neighbours(), tmp_path / "b.png", positives=0)
    headings = [[text.get_text() for axes in figure.axes for text in axes.texts] for figure in drawn]
    assert headings == [["sample", "same class"], ["sample", "other classes"]]


def test_a_sample_without_a_label_has_a_dash():
    assert Samples(images())[3][1] == "–"
    assert Samples(images().cast_column("label", Value("int64")))[21][1] == "1"


def test_a_split_with_nothing_to_show_is_refused():
    with pytest.raises(ValueError, match="nothing to show among label, index: .*before tokenize and ImageDataset"):
        Samples(images().remove_columns("image"))


@pytest.fixture
def table(tmp_path):
    """As KDAIF writes it, in order of the index; 21 was trained on as a cat."""
    columns = {
        "index": [3, 7, 21, 50],
        "label": [-100, 0, 0, 0],
        "influence": [0.1, -2.0, 3.0, -1.0],
        "weight": [1.0, 1.9, 0.1, 1.5],
    }
    path = tmp_path / "epoch-002.parquet"
    Dataset.from_dict(columns).to_parquet(path)
    return path


def test_the_most_helpful_are_left_and_the_most_harmful_right(tmp_path, drawn, table):
    influence_gallery(images(), table, tmp_path / "gallery.png", count=2)
    (figure,) = drawn
    shown = [axes for axes in figure.axes if axes.axison]
    assert len(figure.axes) == 5  # with a gap
    assert [axes.get_title() for axes in shown] == ["cat  × 1.90", "cat  × 1.50", "cat  × 0.10", "–  × 1.00"]
    assert [int(axes.images[0].get_array()[0, 0, 0]) for axes in shown] == [60, 0, 120, 180]
    assert [axes.spines["top"].get_linestyle() in ("-", "solid") for axes in shown] == [True, True, False, False]
    headings = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert headings == ["most helpful", "most harmful"]


def test_texts_have_a_gallery_of_influence_too(tmp_path, drawn, table):
    influence_gallery(texts(), table, tmp_path / "gallery.png", count=1)
    (figure,) = drawn
    written = [[text.get_text() for text in axes.texts if text.get_fontsize() == 6] for axes in figure.axes]
    assert written[2] == ["– c\n– h"]


@pytest.mark.parametrize("count", [0, 3])
def test_more_than_there_are_is_refused(tmp_path, table, count):
    with pytest.raises(ValueError, match=f"half of the 4 samples, got {count}"):
        influence_gallery(images(), table, tmp_path / "gallery.png", count=count)
