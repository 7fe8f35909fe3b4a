"""What every loader returns: splits with the same columns, class names, and the task's name."""

from dataclasses import dataclass, field

from datasets import Dataset, Value


UNLABELLED = -100
TEACHER_COLUMNS = ("teacher_logits", "teacher_probabilities")  # answers of a teacher that is not here


def is_text(feature) -> bool:
    """Whether a column holds strings."""
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


@dataclass
class TaskData:
    """The splits of one task.

    Every split has the columns of the content (``image``, or the text columns under their own names), ``label`` and
    ``index``. ``label`` is int64 (a ``ClassLabel`` where names are known), or float32 for regression; -100 means that
    the sample has none. ``index`` is the
    row's position in the file it comes from: unique within the training file, so that ``train``, ``validation`` and
    ``held_out``, all cut from it, never share one.

    Args:
        train: Training samples; label noise and a label budget touch these alone.
        validation: For choosing and stopping. Empty when ``validation_fraction=0`` and the set brings none.
        test: Labelled, for the final figure; None when the set has no such split.
        task: Name by which ``hfkd.metrics`` finds the metric.
        label_names: Class names in the order of the labels; None for regression and for data without labels.
        held_out: Clean samples for influence methods, disjoint from the others.
        extra: Splits by name that are not used in training: MNLI's ``"mnli-mm"`` and ``"ax"``, GLUE's hidden
            ``"official_test"``, ``"predict"`` for any other test split without labels.
    """

    train: Dataset
    validation: Dataset
    test: Dataset | None
    task: str
    label_names: list[str] | None
    held_out: Dataset | None = None
    extra: dict[str, Dataset] = field(default_factory=dict)

    @property
    def is_regression(self) -> bool:
        """Whether the labels are real numbers."""
        features = self.train.features
        return features["label" if "label" in features else "labels"].dtype == "float32"

    @property
    def num_labels(self) -> int:
        """Number of classes, 1 for regression."""
        if self.is_regression:
            return 1
        if self.label_names is None:
            raise ValueError(
                f"{self.task} has no labels to count classes from: add a column label (images: folders "
                "train/<class>/), name a --teacher that has class names, or set data.label_names = [...] first"
            )
        return len(self.label_names)

    @property
    def text_columns(self) -> list[str]:
        """Names of the text columns in order: one, or two for a pair; none for images or after ``tokenize``."""
        return [name for name, feature in self.train.features.items() if is_text(feature)]

    def drop_unlabelled(self) -> None:
        """Leave only the labelled samples in ``train``.

        Raises:
            ValueError: If all of them are labelled, or none.
        """
        kept = self.train.filter(lambda label: label != UNLABELLED, input_columns="label")
        if len(kept) in (0, len(self.train)):
            which = "no" if len(kept) == 0 else "every"
            raise ValueError(
                f"{which} training sample of {self.task} has a label, so that drop_unlabelled would leave "
                f"{len(kept)} of {len(self.train)}: leave it out, or set a budget with labels"
            )
        self.train = kept

    def splits(self) -> dict[str, Dataset]:
        """Every split by name, those in ``extra`` included."""
        named = {"train": self.train, "validation": self.validation, "test": self.test, "held_out": self.held_out}
        return {name: split for name, split in {**named, **self.extra}.items() if split is not None}
