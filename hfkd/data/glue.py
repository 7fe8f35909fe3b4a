"""What the GLUE tasks are called, and the files that the GLUE server takes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np


_ENTAILMENT = ("entailment", "not_entailment")
_INFERENCE = ("entailment", "neutral", "contradiction")


@dataclass(frozen=True)
class GlueTask:
    """Text columns, class names in the Hub's order (None for regression), and whether the server wants the names."""

    text_columns: tuple[str, ...]
    label_names: tuple[str, ...] | None
    server_wants_names: bool = False


GLUE_TASKS = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable")),
    "mnli": GlueTask(("premise", "hypothesis"), _INFERENCE, server_wants_names=True),
    "mrpc": GlueTask(("sentence1", "sentence2"), ("not_equivalent", "equivalent")),
    "qnli": GlueTask(("question", "sentence"), _ENTAILMENT, server_wants_names=True),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate")),
    "rte": GlueTask(("sentence1", "sentence2"), _ENTAILMENT, server_wants_names=True),
    "sst2": GlueTask(("sentence",), ("negative", "positive")),
    "stsb": GlueTask(("sentence1", "sentence2"), None),
    "wnli": GlueTask(("sentence1", "sentence2"), ("not_entailment", "entailment")),
}
# Extra test sets of MNLI: never trained on, so not tasks of their own.
MNLI_EXTRAS = ("mnli-mm", "ax")


def write_predictions(
    path: str | Path, task: str, predictions: np.ndarray, label_names: list[str] | None = None
) -> Path:
    """Write predictions in GLUE's format: a header ``index<TAB>prediction``, then a row a sample.

    The server wants class names for MNLI, AX, QNLI and RTE, 0 or 1 for the other tasks, and scores in [0, 5] for
    STS-B.

    Args:
        path: The file, or a folder to write ``predictions_<task>.tsv`` in.
        task: A GLUE task, ``"mnli-mm"``, ``"ax"``, or the name of a task of your own.
        predictions: Logits, class numbers, or scores for ``"stsb"``, in the order of the split.
        label_names: Class names for a task of your own; without them class numbers are written.

    Shapes:
        ``predictions``: (N, C), (N, 1) or (N,).

    Returns:
        The path of the file.

    Raises:
        ValueError: If the predictions do not fit the task.
    """
    path = Path(path)
    if path.is_dir():
        path = path / f"predictions_{task.replace('/', '_')}.tsv"
    predictions = np.asarray(predictions)
    if predictions.ndim not in (1, 2):
        raise ValueError(f"predictions must be (N,), (N, 1) or (N, C), got {predictions.shape}: pass the logits alone")
    glue = GLUE_TASKS.get("mnli" if task in MNLI_EXTRAS else task)
    if predictions.ndim == 2:
        predictions = predictions[:, 0] if predictions.shape[1] == 1 else predictions.argmax(1)
    if task == "stsb":
        rows = [f"{score:.3f}" for score in np.clip(predictions, 0, 5)]
    elif glue is None and label_names is None:
        rows = [f"{value:g}" for value in predictions]
    else:
        names = label_names if glue is None else glue.label_names
        wrong = np.setdiff1d(predictions, np.arange(len(names)))
        if len(wrong):
            raise ValueError(f"{task} has {len(names)} classes, got {wrong[:5].tolist()}: pass logits or classes")
        named = glue is None or glue.server_wants_names
        rows = [names[int(number)] if named else str(int(number)) for number in predictions]
    path.write_text("index\tprediction\n" + "".join(f"{i}\t{row}\n" for i, row in enumerate(rows)), encoding="utf-8")
    return path
