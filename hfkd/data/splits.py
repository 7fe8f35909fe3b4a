"""From raw splits to a TaskData: labels read and checked, validation and held-out cut, label budget, label noise."""

from dataclasses import dataclass

import numpy as np
from datasets import ClassLabel, Dataset, Value

from hfkd.data.task_data import UNLABELLED, TaskData, is_text
from hfkd.labels import label_column


NOISE_TYPES = ("symmetric", "pair")


@dataclass(frozen=True)
class SplitOptions:
    """The options that ``load_image_data`` and ``load_text_data`` share.

    Each kind of draw has a generator of its own, so that one option never changes what another one draws: with the
    same seed, a run with noise and one without have the same rows in the same order and the same labelled samples.

    Args:
        validation_fraction: Share of the labelled training samples cut off as validation, stratified by label;
            without effect on a set that brings validation and test files. 0 keeps all for training and leaves
            ``validation`` empty.
        held_out_fraction: Share of the labelled training samples cut off as ``held_out``, likewise; 0 for a set that
            brings a file of them.
        labels: Label budget: this many training samples, in proportion to the classes and at least one of each, keep
            their label; the others stay as unlabelled.
        label_noise: Share of the labelled training samples whose label is changed (an exact count).
        noise_type: ``"symmetric"`` to another class drawn uniformly, ``"pair"`` to the next class.
        seed: Of all draws.
        max_train_samples: Draw at most so many training samples, stratified, after the cuts.
        max_eval_samples: Likewise for validation, test and labelled extra splits; the rows of test and extra splits
            do not depend on the seed.

    Raises:
        ValueError: If an option is out of its range.
    """

    validation_fraction: float = 0.1
    held_out_fraction: float = 0.0
    labels: int | None = None
    label_noise: float = 0.0
    noise_type: str = "symmetric"
    seed: int = 0
    max_train_samples: int | None = None
    max_eval_samples: int | None = None

    def __post_init__(self):
        for name in ("validation_fraction", "held_out_fraction", "label_noise"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if self.validation_fraction + self.held_out_fraction >= 1:
            raise ValueError(
                f"validation_fraction {self.validation_fraction} and held_out_fraction {self.held_out_fraction} leave "
                "nothing to train on: their sum must be below 1"
            )
        if self.noise_type not in NOISE_TYPES:
            raise ValueError(f"unknown noise_type {self.noise_type!r}: use one of {', '.join(NOISE_TYPES)}")
        for name in ("labels", "max_train_samples", "max_eval_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}: use None for no limit")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")


def stratified_rows(
    strata: np.ndarray, rows: np.ndarray, count: int, rng: np.random.Generator, *, at_least: int = 0, leave: int = 0
) -> np.ndarray:
    """Draw ``count`` of ``rows``, each stratum in proportion to its size, rounded by largest remainder.

    Args:
        strata: Stratum of every row of the file.
        rows: The rows to draw from.
        count: How many to draw.
        rng: Source of randomness.
        at_least: Drawn from every stratum, whatever its share.
        leave: Never drawn from any stratum.

    Shapes:
        ``strata``: (N,), ``rows``: (M,). Returns (count,), in ascending order.

    Raises:
        ValueError: If the bounds cannot be met.
    """
    groups, members = np.unique(strata[rows], return_counts=True)
    lower, upper = np.minimum(at_least, members), members - leave
    if not lower.sum() <= count <= upper.sum():
        raise ValueError(
            f"cannot draw {count} of {len(rows)} samples in {len(groups)} classes: at least {at_least} of each class "
            f"must be drawn and {leave} of each left; use a number between {lower.sum()} and {upper.sum()}"
        )
    share = members * (count / len(rows))
    take = np.clip(np.floor(share).astype(int), lower, upper)
    while take.sum() < count:
        take[np.argmax(np.where(take < upper, share - take, -np.inf))] += 1
    while take.sum() > count:
        take[np.argmax(np.where(take > lower, take - share, -np.inf))] -= 1
    drawn = [rng.permutation(rows[strata[rows] == group])[:number] for group, number in zip(groups, take, strict=True)]
    return np.sort(np.concatenate(drawn))


def find_label_column(split: Dataset) -> str | None:
    """Name of the label column: ``label``, ``labels``, ``label_ids`` or ``fine_label``, or the only one of classes."""
    name = label_column(split.column_names)
    if name is not None:
        return name
    if "fine_label" in split.column_names:
        return "fine_label"
    classes = [name for name, feature in split.features.items() if isinstance(feature, ClassLabel)]
    if len(classes) > 1:
        raise ValueError(f"several columns of classes ({', '.join(classes)}): rename the one you mean to 'label'")
    return classes[0] if classes else None


def _read_labels(
    splits: dict[str, Dataset], label_names: list[str] | None, missing: float | None
) -> tuple[dict[str, np.ndarray], list[str] | None]:
    """Labels of every split as int64, or float32 for regression, -100 for none; and train's class names."""
    columns = {name: find_label_column(split) for name, split in splits.items()}
    column = columns["train"]
    if column is None:
        labelled = [name for name in splits if columns[name] is not None]
        if labelled:
            raise ValueError(
                f"train has no label column, but {labelled[0]} has {columns[labelled[0]]!r}: add one to train, with "
                "-1 for 'no label'"
            )
        return {name: np.full(len(split), UNLABELLED, dtype=np.int64) for name, split in splits.items()}, label_names
    values = {
        # One column alone: no image is decoded for it.
        name: split.select_columns([columns[name]])[:][columns[name]] if columns[name] else [None] * len(split)
        for name, split in splits.items()
    }
    feature = splits["train"].features[column]
    if isinstance(feature, ClassLabel):
        if label_names is not None and list(label_names) != feature.names:
            raise ValueError(
                f"the file numbers its classes as {feature.names}, this task as {list(label_names)}: "
                "reorder them with dataset.align_labels_with_mapping, or load it under a name of its own"
            )
        label_names = feature.names
    elif not isinstance(feature, Value):
        raise ValueError(f"column {column!r} is {feature}: labels must be one class or one number a row")

    known = [value for value in values["train"] if value is not None]
    if feature.dtype.startswith("float"):
        # Readers turn whole-numbered classes into floats where some are missing.
        whole = len(known) < len(values["train"]) and all(float(value).is_integer() for value in known)
        if not whole:
            arrays = {name: np.array(v, dtype=np.float32) for name, v in values.items()}
            for array in arrays.values():
                array[np.isnan(array) | (array == missing)] = UNLABELLED
            return arrays, None
    if is_text(feature):
        label_names = label_names or sorted(set(known))
    if label_names is not None:
        number = {name: i for i, name in enumerate(label_names)}
        for name, split in splits.items():
            own = split.features[columns[name]] if columns[name] else None
            if isinstance(own, ClassLabel) and own != feature:  # what counts is the name, not its number there
                named = {**dict(enumerate(own.names)), -1: None, UNLABELLED: None}
                values[name] = [named.get(value, value) for value in values[name]]
            used = {value for value in values[name] if value is not None}
            unknown = {value for value in used if is_text(feature) or isinstance(value, str)} - set(number)
            if unknown:
                raise ValueError(
                    f"{name} has labels {sorted(unknown, key=str)} that are not among the classes {label_names}: "
                    "correct them, or leave them empty for 'no label'"
                )
            values[name] = [number.get(value, value) for value in values[name]]
    arrays = {name: np.array([-1 if v is None else v for v in vs], dtype=np.int64) for name, vs in values.items()}
    if label_names is None:
        classes = np.unique(arrays["train"][arrays["train"] >= 0])
        if not np.array_equal(classes, np.arange(len(classes))):
            raise ValueError(
                f"the training labels {classes[:20].tolist()} are not 0, 1, 2, …: number the classes without gaps "
                "from 0, or write them as text"
            )
        label_names = [str(i) for i in classes]
    if len(label_names) < 2:
        raise ValueError(
            f"all training labels are {label_names[0]!r}: a classifier needs samples of two classes or more"
            if label_names
            else "no training sample has a label in the label column: fill it, or drop it to train on a teacher alone"
        )
    for name, array in arrays.items():
        array[array == -1] = UNLABELLED
        wrong = array[(array != UNLABELLED) & ((array < 0) | (array >= len(label_names)))]
        if len(wrong):
            raise ValueError(
                f"{name} has labels {np.unique(wrong)[:10].tolist()} outside 0..{len(label_names) - 1}: correct them; "
                "-1 or -100 means 'no label'"
            )
    return arrays, label_names


def make_task_data(
    task: str,
    splits: dict[str, Dataset],
    content: dict[str, str],
    options: SplitOptions,
    *,
    label_names: list[str] | None = None,
    hidden: tuple[str, ...] = (),
    missing: float | None = None,
) -> TaskData:
    """Read the labels, cut validation and held-out from train, apply the budget, then the noise.

    Args:
        task: Name of the task.
        splits: Raw splits: ``"train"``, perhaps ``"validation"`` and ``"held_out"`` (which are cut from it otherwise)
            and ``"test"``; others are extra.
        content: The columns to keep and their new names.
        options: See :class:`SplitOptions`.
        label_names: Class names that the data must agree with, where they are known beforehand.
        hidden: Splits whose labels must not be seen.
        missing: A number that means "no label" in a regression task.

    Raises:
        ValueError: If a split is empty, or the labels cannot meet the options.
    """
    for name, split in splits.items():
        if len(split) == 0:
            raise ValueError(f"the {name} split of {task} is empty: check its files")
    if "held_out" in splits and options.held_out_fraction:
        raise ValueError(f"{task} brings a held_out split of its own: leave out held_out_fraction, or that split")
    labels, label_names = _read_labels(splits, label_names, missing)
    for name in hidden:
        labels[name][:] = UNLABELLED
    if "test" in splits and not (labels["test"] != UNLABELLED).any():
        splits, labels = ({("predict" if n == "test" else n): v for n, v in d.items()} for d in (splits, labels))

    rows = {name: np.arange(len(split)) for name, split in splits.items()}
    rows |= _cut_train(labels["train"], options, label_names, cut_validation="validation" not in splits)
    origin = {"validation": "train", "held_out": "train", **{name: name for name in splits}}
    for name in rows:
        own = labels[origin[name]]
        # A split without labels is only predicted, and whoever asks for its predictions wants all of them.
        if name not in ("train", "held_out") and options.max_eval_samples is not None and (own != UNLABELLED).any():
            rng = np.random.default_rng([options.seed if origin[name] == "train" else 0, 5])
            rows[name] = _at_most(options.max_eval_samples, own, rows[name], rng)
    trained = _budget_and_noise(labels["train"], rows["train"], options, label_names)
    feature = None
    if label_names is not None and not _are_numbers(label_names, splits["train"]):
        feature = ClassLabel(names=list(label_names))

    def finish(name: str) -> Dataset:
        split = splits[origin[name]].select_columns(list(content)).rename_columns(content)
        own = trained if name == "train" else labels[origin[name]]
        split = split.add_column("label", own, feature=feature)
        return split.add_column("index", np.arange(len(split))).select(rows[name])

    finished = {name: finish(name) for name in rows}
    named = {name: finished.pop(name, None) for name in ("train", "validation", "test", "held_out")}
    return TaskData(**named, task=task, label_names=label_names, extra=finished)


def _are_numbers(label_names: list[str], train: Dataset) -> bool:
    """Whether the classes are numbers in the file: no names that a model's would have to agree with."""
    column = find_label_column(train)
    is_named = column is not None and isinstance(train.features[column], ClassLabel)
    return not is_named and list(label_names) == [str(i) for i in range(len(label_names))]


def _generator(options: SplitOptions, purpose: int) -> np.random.Generator:
    return np.random.default_rng([options.seed, purpose])


def _strata(labels: np.ndarray) -> np.ndarray:
    return np.zeros(len(labels), dtype=np.int64) if labels.dtype == np.float32 else labels


def _at_most(count: int, labels: np.ndarray, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rows if count >= len(rows) else stratified_rows(_strata(labels), rows, count, rng)


def _cut_train(
    labels: np.ndarray, options: SplitOptions, label_names: list[str] | None, *, cut_validation: bool
) -> dict[str, np.ndarray]:
    """Rows of train, and of validation and held-out where they are cut from it."""
    labelled = np.flatnonzero(labels != UNLABELLED)
    pool = labelled if len(labelled) else np.arange(len(labels))
    rest, cuts = pool, {}
    if cut_validation:
        cuts["validation"] = np.array([], dtype=np.int64)
    fractions = {"validation": options.validation_fraction, "held_out": options.held_out_fraction}
    for purpose, (name, fraction) in enumerate(fractions.items()):
        if not fraction or (name == "validation" and not cut_validation):
            continue
        count = round(fraction * len(pool))
        if not count:
            raise ValueError(f"{name}_fraction={fraction} of {len(pool)} samples is none: raise it, or use 0")
        _check_class_sizes(_strata(labels)[pool], label_names, name)
        cuts[name] = stratified_rows(_strata(labels), rest, count, _generator(options, purpose), leave=1)
        rest = np.setdiff1d(rest, cuts[name])
    train = np.setdiff1d(np.arange(len(labels)), np.setdiff1d(pool, rest))
    if options.max_train_samples is not None:
        train = _at_most(options.max_train_samples, labels, train, _generator(options, 2))
    return {"train": train, **cuts}


def _budget_and_noise(
    labels: np.ndarray, train: np.ndarray, options: SplitOptions, label_names: list[str] | None
) -> np.ndarray:
    """The labels that training sees, in all rows of the file."""
    seen = labels.copy()
    labelled = train[labels[train] != UNLABELLED]
    if options.labels is not None:
        _check_budget(options.labels, _strata(labels)[labelled])
        rng = _generator(options, 3)
        labelled = stratified_rows(_strata(labels), labelled, options.labels, rng, at_least=1)
        seen[np.setdiff1d(train, labelled)] = UNLABELLED
    if options.label_noise:
        if label_names is None or len(label_names) < 2 or not len(labelled):
            raise ValueError("label_noise needs labels of two classes or more, which this set has not: set it to 0")
        rng = _generator(options, 4)
        flipped = rng.choice(labelled, round(options.label_noise * len(labelled)), replace=False)
        offset = 1 if options.noise_type == "pair" else rng.integers(1, len(label_names), len(flipped))
        seen[flipped] = (labels[flipped] + offset) % len(label_names)
    return seen


def _check_class_sizes(labels: np.ndarray, label_names: list[str] | None, cut: str) -> None:
    groups, members = np.unique(labels, return_counts=True)
    if members.min() < 2:
        group = groups[members.argmin()]
        name = group if label_names is None else label_names[group]
        raise ValueError(
            f"class {name!r} has a single training sample, which a stratified {cut} split cannot share: drop or merge "
            f"the class, or set {cut}_fraction=0"
        )


def _check_budget(budget: int, labels: np.ndarray) -> None:
    if budget > len(labels):
        raise ValueError(f"labels={budget} exceeds the {len(labels)} labelled training samples: lower it")
    classes = len(np.unique(labels))
    if budget < classes:
        raise ValueError(f"labels={budget} is fewer than the {classes} classes: raise it to at least one a class")
