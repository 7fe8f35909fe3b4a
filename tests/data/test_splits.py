import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hfkd.data.splits import SplitOptions, make_task_data, stratified_rows


def make(labels, options=None, label_type=None, **others):
    feature = label_type or ClassLabel(num_classes=int(max(labels)) + 1)

    def split(values):
        texts = [f"row {i}" for i in range(len(values))]
        return Dataset.from_dict(
            {"text": texts, "label": values}, features=Features({"text": Value("string"), "label": feature})
        )

    splits = {name: split(values) for name, values in {"train": labels, **others}.items()}
    return make_task_data("toy", splits, {"text": "text"}, SplitOptions(**(options or {})))


IMBALANCED = [0] * 60 + [1] * 30 + [2] * 10


def counts(split):
    return np.bincount([label for label in split["label"] if label >= 0], minlength=3).tolist()


def test_stratified_rows_take_each_class_in_proportion():
    labels = np.array(IMBALANCED)
    rows = stratified_rows(labels, np.arange(100), 20, np.random.default_rng(0))
    assert np.bincount(labels[rows]).tolist() == [12, 6, 2]
    assert np.array_equal(rows, np.unique(rows))


@pytest.mark.parametrize("count", [1, 7, 13, 50, 99, 100])
def test_stratified_rows_are_within_one_of_the_exact_share(count):
    labels = np.array(IMBALANCED)
    rows = stratified_rows(labels, np.arange(100), count, np.random.default_rng(0))
    assert len(rows) == count
    assert np.all(np.abs(np.bincount(labels[rows], minlength=3) - np.array([0.6, 0.3, 0.1]) * count) < 1)


def test_stratified_rows_respect_bounds():
    labels = np.array([0] * 97 + [1, 2, 2])
    rows = stratified_rows(labels, np.arange(100), 3, np.random.default_rng(0), at_least=1)
    assert np.bincount(labels[rows]).tolist() == [1, 1, 1]
    rows = stratified_rows(labels, np.arange(100), 97, np.random.default_rng(0), leave=1)
    assert np.bincount(labels[rows]).tolist() == [96, 0, 1]
    with pytest.raises(ValueError, match="use a number between 3 and 100"):
        stratified_rows(labels, np.arange(100), 2, np.random.default_rng(0), at_least=1)


def test_splits_are_stratified_disjoint_and_complete():
    data = make(IMBALANCED, {"validation_fraction": 0.2, "held_out_fraction": 0.1})
    assert counts(data.validation) == [12, 6, 2]
    assert counts(data.held_out) == [6, 3, 1]
    assert counts(data.train) == [42, 21, 7]
    indices = [set(split["index"]) for split in (data.train, data.validation, data.held_out)]
    assert set.union(*indices) == set(range(100))
    assert sum(map(len, indices)) == 100
    for split in (data.train, data.validation, data.held_out):
        assert split["text"][:] == [f"row {i}" for i in split["index"]]
        assert split["label"][:] == [IMBALANCED[i] for i in split["index"]]
        assert split.features["label"].dtype == split.features["index"].dtype == "int64"


def test_splits_depend_on_the_seed_alone():
    first, again, other = (make(IMBALANCED, {"seed": seed}).validation["index"][:] for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_held_out_does_not_move_validation():
    assert (
        make(IMBALANCED).validation["index"][:]
        == make(IMBALANCED, {"held_out_fraction": 0.3, "label_noise": 0.5, "labels": 9}).validation["index"][:]
    )


def test_given_validation_is_kept():
    data = make(IMBALANCED, {"held_out_fraction": 0.1}, validation=[0, 1, 2], test=[2, 1])
    assert len(data.train) == 90
    assert data.validation["label"][:] == [0, 1, 2]
    assert data.test["label"][:] == [2, 1]
    assert data.test["index"][:] == [0, 1]


def test_given_held_out_is_kept():
    data = make(IMBALANCED, {"max_eval_samples": 2, "label_noise": 0.5}, held_out=[2, 1, 0, 0])
    assert data.held_out["label"][:] == [2, 1, 0, 0]
    assert len(data.train) == 90
    with pytest.raises(ValueError, match="brings a held_out split of its own: leave out held_out_fraction"):
        make(IMBALANCED, {"held_out_fraction": 0.1}, held_out=[2, 1, 0])


def test_no_validation():
    data = make(IMBALANCED, {"validation_fraction": 0.0})
    assert len(data.train) == 100
    assert len(data.validation) == 0
    assert data.validation.column_names == data.train.column_names
    assert data.held_out is None


@pytest.mark.parametrize("noise_type", ["symmetric", "pair"])
def test_noise_changes_an_exact_share_of_train_alone(noise_type):
    options = {"held_out_fraction": 0.1, "seed": 3}
    labels = [i % 5 for i in range(5000)]
    clean = make(labels, options, test=labels)
    noisy = make(labels, {**options, "label_noise": 0.4, "noise_type": noise_type}, test=labels)
    for name in ("validation", "held_out", "test"):
        assert noisy.splits()[name][:] == clean.splits()[name][:]
    # Loading twice tells what was flipped.
    assert noisy.train["index"][:] == clean.train["index"][:]
    before, after = np.array(clean.train["label"]), np.array(noisy.train["label"])
    assert before.tolist() == [labels[i] for i in clean.train["index"]]
    assert (before != after).sum() == 0.4 * 4000
    shift = np.bincount((after - before) % 5, minlength=5)
    if noise_type == "pair":
        assert shift.tolist() == [2400, 1600, 0, 0, 0]
    else:
        assert np.all(np.abs(shift[1:] - 400) < 5 * np.sqrt(300))
    flipped_by_class = np.bincount(before[before != after])
    assert np.all(np.abs(flipped_by_class - 320) < 5 * np.sqrt(192))
    again = make(labels, {**options, "label_noise": 0.4, "noise_type": noise_type})
    assert again.train["label"][:] == after.tolist()


def test_budget_is_stratified_and_the_others_stay():
    full, data = make(IMBALANCED), make(IMBALANCED, {"labels": 18})
    assert data.train["index"][:] == full.train["index"][:]
    assert counts(data.train) == [11, 5, 2]
    kept = [(a, b) for a, b in zip(data.train["label"], full.train["label"], strict=True) if a != -100]
    assert all(a == b for a, b in kept)
    assert counts(data.validation) == [6, 3, 1]
    assert counts(make(IMBALANCED, {"labels": 3}).train) == [1, 1, 1]


def test_noise_under_a_budget_touches_labelled_samples():
    options = {"labels": 50, "validation_fraction": 0.0}
    clean, noisy = make(IMBALANCED, options), make(IMBALANCED, {**options, "label_noise": 0.5})
    before, after = np.array(clean.train["label"]), np.array(noisy.train["label"])
    assert np.array_equal(before == -100, after == -100)
    assert (before != after).sum() == 25


def test_sample_limits_are_stratified():
    data = make(IMBALANCED * 2, {"max_train_samples": 50, "max_eval_samples": 10}, test=IMBALANCED)
    assert (counts(data.train), counts(data.validation), counts(data.test)) == ([30, 15, 5], [6, 3, 1], [6, 3, 1])
    other = make(IMBALANCED * 2, {"max_eval_samples": 10, "seed": 1}, test=IMBALANCED)
    assert data.test["index"][:] == other.test["index"][:]
    assert len(make(IMBALANCED, {"max_train_samples": 1000}).train) == 90


def test_partly_unlabelled_train_cuts_validation_from_the_labelled():
    data = make([0, 1] * 50 + [-1] * 50, {"validation_fraction": 0.2})
    assert counts(data.validation)[:2] == [10, 10]
    assert len(data.train) == 130
    assert data.train["label"][:].count(-100) == 50


def test_test_without_labels_is_only_predicted():
    data = make(IMBALANCED, {"max_eval_samples": 2}, test=[-1, -1, -1])
    assert data.test is None
    assert data.extra["predict"]["label"][:] == [-100, -100, -100]


def test_regression():
    values = [i / 7 for i in range(100)]
    data = make(values, {"validation_fraction": 0.2, "labels": 30, "max_eval_samples": 15}, Value("float32"))
    assert data.is_regression
    assert data.num_labels == 1
    assert data.label_names is None
    assert len(data.validation) == 15
    labelled = [label for label in data.train["label"] if label != -100]
    assert len(labelled) == 30
    assert data.train.features["label"].dtype == "float32"
    with pytest.raises(ValueError, match="label_noise needs labels of two classes"):
        make(values, {"label_noise": 0.1}, Value("float32"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 1.0}, r"validation_fraction must lie in \[0, 1\)"),
        ({"validation_fraction": -0.1}, r"validation_fraction must lie in \[0, 1\)"),
        ({"held_out_fraction": 1.5}, r"held_out_fraction must lie in \[0, 1\)"),
        ({"validation_fraction": 0.5, "held_out_fraction": 0.5}, "their sum must be below 1"),
        ({"label_noise": 1.0}, r"label_noise must lie in \[0, 1\)"),
        ({"noise_type": "asymmetric"}, "use one of symmetric, pair"),
        ({"labels": 0}, "labels must be at least 1"),
        ({"max_train_samples": -1}, "max_train_samples must be at least 1"),
        ({"seed": -1}, "seed must not be negative"),
        ({"labels": 91}, "labels=91 exceeds the 90 labelled training samples"),
        ({"labels": 2}, "labels=2 is fewer than the 3 classes"),
        ({"validation_fraction": 0.001}, "of 100 samples is none: raise it"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(IMBALANCED, options)


def test_a_class_of_one_is_refused():
    with pytest.raises(ValueError, match="class '1' has a single training sample.*drop or merge"):
        make([0] * 20 + [1])
    assert len(make([0] * 20 + [1], {"validation_fraction": 0}).train) == 21


def test_an_empty_split_is_refused():
    with pytest.raises(ValueError, match="the test split of toy is empty"):
        make(IMBALANCED, test=[])


@pytest.mark.parametrize("label_type", [Value("int64"), Value("int8"), Value("string"), Value("bool")])
def test_labels_without_names(label_type):
    values = {"string": ["no", "yes"], "bool": [False, True]}.get(label_type.dtype, [0, 1])
    data = make(values * 10, label_type=label_type)
    assert data.label_names == (["no", "yes"] if label_type.dtype == "string" else ["0", "1"])
    assert set(data.train["label"]) == {0, 1}
    named = ClassLabel(names=["no", "yes"]) if label_type.dtype == "string" else Value("int64")
    assert data.train.features["label"] == data.validation.features["label"] == named


def test_numbers_that_are_names_stay_names():
    digits = ClassLabel(names=["0", "1"])
    assert make([0, 1] * 10, label_type=digits).train.features["label"] == digits


def test_whole_numbers_with_gaps_between_rows_are_classes():
    data = make([0.0, 1.0, None] * 10, label_type=Value("float64"))
    assert data.label_names == ["0", "1"]
    assert data.train["label"][:].count(-100) == 10


@pytest.mark.parametrize(
    ("labels", "others", "label_type", "message"),
    [
        ([1, 2] * 10, {}, Value("int64"), "number the classes without gaps from 0"),
        ([0, 1] * 10, {"test": [0, 2]}, Value("int64"), r"test has labels \[2\] outside 0..1"),
        ([0, 1, -7] * 10, {}, Value("int64"), r"train has labels \[-7\] outside 0..1"),
        (["a", "b"] * 10, {"validation": ["c"]}, Value("string"), r"validation has labels \['c'\]"),
        ([[0], [1]] * 10, {}, [Value("int64")], "one class or one number a row"),
    ],
)
def test_wrong_labels_are_refused(labels, others, label_type, message):
    with pytest.raises(ValueError, match=message):
        make(labels, label_type=label_type, **others)


@pytest.mark.parametrize("train_type", [ClassLabel(names=["ant", "bee", "cat"]), Value("string")])
def test_a_split_that_numbers_the_classes_otherwise_is_read_by_name(train_type):
    """As each file was encoded by itself, with the classes it happens to hold."""

    def split(labels, feature):
        columns = {"text": [f"{label} {i}" for i, label in enumerate(labels)], "label": labels}
        return Dataset.from_dict(columns, features=Features({"text": Value("string"), "label": feature}))

    raw = {
        "train": split(["ant", "bee", "cat"] * 10, train_type),
        "validation": split(["cat", "bee", "ant"], ClassLabel(names=["cat", "bee", "ant"])),
        "ax": split(["cat", "bee", "ant"], ClassLabel(names=["ant", "bee", "cat"])),
        "test": split(["bee", "cat", -1, None], ClassLabel(names=["bee", "cat", "never used"])),
        "held_out": split(["cat", "bee"], Value("string")),
    }
    data = make_task_data("toy", raw, {"text": "text"}, SplitOptions())
    assert data.validation["label"][:] == [2, 1, 0]
    assert data.extra["ax"]["label"][:] == [2, 1, 0]
    assert data.test["label"][:] == [1, 2, -100, -100]
    assert data.held_out["label"][:] == [2, 1]
    assert all(split.features["label"].names == ["ant", "bee", "cat"] for split in data.splits().values())
    wasps = split(["ant", "wasp"], ClassLabel(names=["ant", "wasp"]))
    message = r"test has labels \['wasp'\] that are not among the classes \['ant', 'bee', 'cat'\]: correct them"
    with pytest.raises(ValueError, match=message):
        make_task_data("toy", {**raw, "test": wasps}, {"text": "text"}, SplitOptions())


def test_num_labels_of_unlabelled_data():
    data = make([-1] * 20, label_type=ClassLabel(names=["a", "b"]))
    assert data.num_labels == 2
    data.label_names = None
    with pytest.raises(ValueError, match="set data.label_names"):
        _ = data.num_labels
