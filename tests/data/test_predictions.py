import numpy as np
import pytest

from hfkd.data import GLUE_TASKS, write_predictions


LOGITS = np.array([[0.1, 0.9, 0.0], [2.0, 1.0, 0.0], [0.0, 0.1, 0.2]])


@pytest.mark.parametrize(
    ("task", "written"),
    [
        ("cola", ["1", "0", "1"]),
        ("mnli", ["neutral", "entailment", "contradiction"]),
        ("mnli-mm", ["neutral", "entailment", "contradiction"]),
        ("ax", ["neutral", "entailment", "contradiction"]),
        ("mrpc", ["1", "0", "1"]),
        ("qnli", ["not_entailment", "entailment", "not_entailment"]),
        ("qqp", ["1", "0", "1"]),
        ("rte", ["not_entailment", "entailment", "not_entailment"]),
        ("sst2", ["1", "0", "1"]),
        ("wnli", ["1", "0", "1"]),
    ],
)
def test_what_the_glue_server_takes(tmp_path, task, written):
    logits = LOGITS if "neutral" in written else LOGITS[:, :2]
    path = write_predictions(tmp_path, task, logits)
    assert path == tmp_path / f"predictions_{task}.tsv"
    assert path.read_text() == "index\tprediction\n" + "".join(f"{i}\t{row}\n" for i, row in enumerate(written))
    classes = write_predictions(tmp_path / "classes.tsv", task, logits.argmax(1))
    assert classes.read_text() == path.read_text()


def test_every_task_is_covered_above():
    assert set(GLUE_TASKS) == {"cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli"}


def test_scores(tmp_path):
    path = write_predictions(tmp_path, "stsb", np.array([[2.34567], [-0.5], [5.7]]))
    assert path.read_text() == "index\tprediction\n0\t2.346\n1\t0.000\n2\t5.000\n"


def test_own_tasks(tmp_path):
    assert write_predictions(tmp_path / "a", "mine", LOGITS).read_text().splitlines()[1:] == ["0\t1", "1\t0", "2\t2"]
    named = write_predictions(tmp_path / "b", "mine", LOGITS, ["x", "y", "z"]).read_text()
    assert named.splitlines()[1:] == ["0\ty", "1\tx", "2\tz"]
    assert write_predictions(tmp_path / "c", "mine", np.array([0.25])).read_text().splitlines()[1:] == ["0\t0.25"]


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"rte has 2 classes, got \[2\]"):
        write_predictions(tmp_path, "rte", LOGITS)
    with pytest.raises(ValueError, match="pass the logits alone"):
        write_predictions(tmp_path, "rte", LOGITS[None])
