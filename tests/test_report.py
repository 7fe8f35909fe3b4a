"""Pictures: the right samples and numbers in the right places, in words and dashes as well as in colours."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from matplotlib.figure import Figure
from PIL import Image as PILImage

from hfkd.memory import MISSING, Neighbours
from hfkd.metrics import expected_calibration_error, reliability
from hfkd.report import (
    OTHER,
    QUERY,
    SAME,
    Samples,
    accuracy_against_latency,
    confusion_difference,
    influence_gallery,
    neighbour_gallery,
    reliability_diagram,
    training_curves,
)


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


# Curves and diagrams


def is_drawn(path):
    """A PNG with something on it."""
    with PILImage.open(path) as picture:
        assert picture.format == "PNG"
        return len(np.unique(np.asarray(picture.convert("L")))) > 20


LOG = [
    {"step": 0, "teacher_accuracy": 0.9, "epoch": 0},
    *(
        {"step": s, "loss": 3 / s, "task": 1 / s, "kd": 2 / s, "alpha": s / 10, "learning_rate": 0.1, "grad_norm": 9.0}
        for s in (1, 2, 3, 4)
    ),
    {"step": 2, "eval_loss": 1.5, "eval_accuracy": 0.5, "eval_runtime": 3.0},
    {"step": 4, "eval_loss": 1.2, "eval_accuracy": 0.7, "eval_samples_per_second": 8.0},
    {"step": 4, "train_loss": 0.4, "train_runtime": 2.0},
    {"step": 4, "eval_loss": 1.1, "eval_accuracy": 0.75},
]


def test_curves_show_terms_scores_and_weights(tmp_path, drawn):
    assert is_drawn(training_curves(LOG, tmp_path / "new" / "curves.png", weights=["alpha"]))
    (figure,) = drawn
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert [axes.get_xlabel() for axes in figure.axes] == ["step"] * 3
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "score", "value"]
    lines = {
        title: {
            line.get_label(): line.get_xydata().tolist() for line in axes.lines if "teacher" not in line.get_label()
        }
        for title, axes in panels.items()
    }
    assert lines == {
        "loss and its terms": {
            "loss": [[s, 3 / s] for s in (1, 2, 3, 4)],
            "task": [[s, 1 / s] for s in (1, 2, 3, 4)],
            "kd": [[s, 2 / s] for s in (1, 2, 3, 4)],
            "eval_loss": [[2, 1.5], [4, 1.1]],  # of step 4 the last
        },
        "scores": {"eval_accuracy": [[2, 0.5], [4, 0.75]]},
        "weights": {"alpha": [[s, s / 10] for s in (1, 2, 3, 4)]},
    }
    (teacher,) = (line for line in panels["scores"].lines if line.get_label() == "teacher_accuracy")
    assert set(teacher.get_ydata()) == {0.9}
    legends = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes]
    assert legends[1] == ["eval_accuracy", "teacher_accuracy"]


def test_curves_differ_without_their_colours_and_without_their_dashes(tmp_path, drawn):
    log = [{"step": step, "loss": 1.0, **{f"term{i}": float(i) for i in range(20)}} for step in (1, 2)]
    training_curves(log, tmp_path / "curves.png")
    (axes,) = drawn[0].axes
    looks = [(line.get_color(), line.get_marker(), str(line._unscaled_dash_pattern)) for line in axes.lines]
    assert len(looks) == len(set(looks)) == 21
    assert len({(marker, dashes) for _, marker, dashes in looks}) == 21  # in grey


@pytest.mark.parametrize("log", [[], [{"step": 1, "train_loss": 0.5}], [{"step": 1, "loss": float("nan")}]])
def test_curves_of_nothing_are_refused(tmp_path, log):
    with pytest.raises(ValueError, match="the log has no loss"):
        training_curves(log, tmp_path / "curves.png")


@pytest.fixture
def answers():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 200)
    student, teacher = (rng.normal(size=(200, 4)) + strength * np.eye(4)[labels] for strength in (1.0, 3.0))
    labels[:5] = -100
    return student, teacher, labels


def test_reliability_has_the_bins_of_the_metric(tmp_path, drawn, answers):
    student, teacher, labels = answers
    models = {"teacher": (teacher, labels), "student": (student, labels)}
    assert is_drawn(reliability_diagram(models, tmp_path / "reliability.png", bins=5))
    (figure,) = drawn
    for column, (name, (logits, _)) in enumerate(models.items()):
        upper, lower = figure.axes[column], figure.axes[2 + column]
        samples, confidence, accuracy = reliability(logits, labels, bins=5)
        error = expected_calibration_error(logits, labels, bins=5)
        assert upper.get_title() == f"{name}: ECE {error:.3f}"
        bars, gaps = upper.containers
        filled = samples > 0
        np.testing.assert_allclose([bar.get_height() for bar in bars], accuracy[filled])
        np.testing.assert_allclose([bar.get_y() + bar.get_height() for bar in gaps], confidence[filled])
        assert {bar.get_hatch() for bar in gaps} == {"////"}
        np.testing.assert_allclose([bar.get_height() for bar in lower.containers[0]], samples / 195)
        assert lower.get_xlabel() == "confidence (195 samples)"


def test_reliability_of_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one model"):
        reliability_diagram({}, tmp_path / "reliability.png")


def confusion_by_loop(logits, labels):
    table = np.zeros((logits.shape[1],) * 2)
    for row, label in zip(logits, labels, strict=True):
        if label != -100:
            table[label, max(range(len(row)), key=lambda c: row[c])] += 1
    return np.array([row / row.sum() if row.sum() else row for row in table])


def test_the_difference_of_confusions_has_signs_and_hatches(tmp_path, drawn, answers):
    student, teacher, labels = answers
    labels[labels == 3] = 2  # a class without samples
    path = confusion_difference(student, teacher, labels, tmp_path / "a.png", label_names=["a", "b", "c", "$d"])
    assert is_drawn(path)
    axes = drawn[0].axes[0]
    expected = 100 * (confusion_by_loop(student, labels) - confusion_by_loop(teacher, labels))
    np.testing.assert_allclose(axes.images[0].get_array(), expected, atol=1e-12)
    assert not expected[3].any()
    written = {text.get_position(): text.get_text() for text in axes.texts}
    cells = {(c, r): f"{value:+.0f}" for (r, c), value in np.ndenumerate(expected) if abs(value) >= 0.5}
    assert written == cells
    hatched = {(patch.get_x() + 0.5, patch.get_y() + 0.5) for patch in axes.patches if patch.get_hatch()}
    assert hatched == {place for place, text in cells.items() if text.startswith("-")}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c", "$d"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("answer", "true class")
    assert axes.images[0].norm.vmin == -axes.images[0].norm.vmax  # white is no difference


def test_of_many_classes_those_that_differ_most_are_shown(tmp_path, drawn):
    labels = np.repeat(np.arange(30), 4)
    teacher = np.eye(30)[labels]
    student = teacher.copy()
    for wrong, answer in ((7, 21), (25, 7)):
        student[labels == wrong] = np.eye(30)[answer]
    confusion_difference(student, teacher, labels, tmp_path / "a.png", most=3)
    axes = drawn[0].axes[0]
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert {"7", "25"} < set(shown)
    assert len(shown) == 3
    assert "the 3 of 30 classes that differ most" in axes.get_title()


@pytest.mark.parametrize(
    ("shape", "labels", "options", "message"),
    [
        ((2, 3), [0, 1, 2], {}, r"got \(2, 3\), \(2, 3\) and \(3,\)"),
        ((2, 3), [-100, -100], {}, "no sample has a label"),
        ((2, 3), [0, 3], {}, r"labels 0\.\.3 are not among 3 classes"),
        ((2, 3), [0, 2], {"label_names": ["a"]}, "1 label_names for 3 classes"),
    ],
)
def test_confusions_that_do_not_fit_are_refused(tmp_path, shape, labels, options, message):
    with pytest.raises(ValueError, match=message):
        confusion_difference(np.zeros(shape), np.zeros(shape), labels, tmp_path / "a.png", **options)


def test_accuracy_against_latency(tmp_path, drawn):
    students = {"slow": (8.0, 0.9), "beaten": (9.0, 0.8), "fast": (1.0, 0.6), "like fast": (1.0, 0.5)}
    assert is_drawn(accuracy_against_latency(students, tmp_path / "a.png", score="F1"))
    (axes,) = drawn[0].axes
    front, *points = axes.lines
    assert front.get_xydata().tolist() == [[1.0, 0.6], [8.0, 0.9]]
    assert {point.get_label(): tuple(point.get_xydata()[0]) for point in points} == students
    assert len({point.get_marker() for point in points}) == 4
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("latency, batch 1 (ms)", "F1")


@pytest.mark.parametrize(
    ("students", "message"),
    [
        ({}, "nothing to compare"),
        ({"a": (0.0, 0.5)}, "a takes 0.0 ms"),
        ({"b": (1.0, float("nan"))}, "b takes 1.0 ms and has accuracy nan"),
    ],
)
def test_what_was_not_measured_is_refused(tmp_path, students, message):
    with pytest.raises(ValueError, match=message):
        accuracy_against_latency(students, tmp_path / "a.png")
