"""scripts/study_answers.py, item_errors.py and shifted_copy.py: what they say of studies whose answers are known."""

import importlib
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset
from scipy.stats import pearsonr, ttest_rel
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from hfkd.data import ImageDataset, load_image_data, processor_for
from hfkd.models import load_model


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def scripts():
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module
    sys.path[:] = before
    for name in (
        "study_answers",
        "item_errors",
        "shifted_copy",
        "compare_distillers",
        "leaderboard",
        "run_image_kd",
        "run_glue_kd",
    ):
        sys.modules.pop(name, None)


@pytest.fixture
def answers(scripts):
    return scripts("study_answers")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Digits as files, in the layout that data_dir reads."""
    folder = tmp_path_factory.mktemp("digits")
    data = load_image_data("digits", validation_fraction=0)
    for name in ("train", "test"):
        getattr(data, name).select(range(200)).remove_columns("index").to_parquet(folder / f"{name}.parquet")
    return folder


def finish(folder, runs):
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"runs": runs}))


def test_differences_are_paired_and_have_the_t_tests_interval(answers, tmp_path, capsys):
    first, second = [0.61, 0.64, 0.60, 0.70], [0.60, 0.61, 0.62, 0.65]
    runs = [
        {"method": method, "seed": seed, "name": f"{method}-{seed}", "results": {"test_agreement": value}}
        for method, values in (("DKD", second), ("AEKT", first))
        for seed, value in reversed(list(enumerate(values)))
    ]
    unpaired = {"method": "AEKT", "seed": 9, "name": "AEKT-9", "results": {"test_agreement": 0.0}}
    finish(tmp_path / "cifar10", [*runs, unpaired])
    answers.main([str(tmp_path), "--only", "differences", "--output", str(tmp_path / "results" / "answers.json")])
    (found,) = json.loads((tmp_path / "results" / "answers.json").read_text())
    expected = ttest_rel(first, second).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert (found["what"], found["n"]) == ("AEKT − DKD", 4)
    printed = capsys.readouterr().out
    assert f"{np.mean(first) - np.mean(second):+.4f} ({expected.low:+.4f} to {expected.high:+.4f})" in printed
    assert "open: Does AEKT's student agree more with the teacher than DKD's? cifar10-jpeg" in printed


def test_what_the_file_says_of_studies_that_are_not_there_stays(answers, tmp_path, capsys):
    """In the order of the questions; a question that is asked no more goes."""

    def runs(of_aekt):
        scores = {"DKD": 0.5, "AEKT": of_aekt}
        return [
            {
                "method": method,
                "seed": seed,
                "name": f"{method}-{seed}",
                "results": {"test_agreement": score + seed / 9},
            }
            for method, score in scores.items()
            for seed in range(2)
        ]

    output = tmp_path / "answers.json"
    output.write_text(json.dumps([{"question": "Is it green?", "study": "cifar10", "what": "AEKT", "mean": 1.0}]))
    for folder, study, score in (("a", "cifar10-jpeg", 0.6), ("b", "cifar10", 0.7), ("c", "cifar10-jpeg", 0.8)):
        finish(tmp_path / folder / study, runs(score))
        answers.main([str(tmp_path / folder), "--only", "differences", "--output", str(output)])
    found = {answer["study"]: answer["mean"] for answer in json.loads(output.read_text())}
    assert list(found) == ["cifar10", "cifar10-jpeg"]
    assert found == pytest.approx({"cifar10": 0.2, "cifar10-jpeg": 0.3})


def test_wrong_labels_are_found_by_what_ranks_them_highest(answers, images, tmp_path):
    """The student's own losses are read from its logits; the influence from the last of the tables."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    flags = {"dataset": "digits", "data_dir": str(images), "label_noise": 0.3, "validation_fraction": 0}
    run = {"method": "KD-AIF", "seed": 0, "name": "KD-AIF-0", "settings": {"flags": flags}, "results": {}}
    folder = tmp_path / "noise-40"
    finish(folder, [run])
    student = load_model("resnet8", num_labels=10)
    student.save_pretrained(folder / "runs" / "KD-AIF-0")
    data, clean = (load_image_data(**{**flags, "label_noise": noise}).train for noise in (0.3, 0.0))
    wrong = np.array(data["label"]) != np.array(clean["label"])
    assert wrong.sum() == 60
    (folder / "runs" / "KD-AIF-0" / "influence").mkdir()
    for epoch, influence in ((8, 1 - wrong), (9, wrong + 0.25 * np.eye(1, 200, np.argmin(wrong))[0])):
        table = pa.table({"index": data["index"][::-1], "influence": influence[::-1].astype(float)})
        pq.write_table(table, folder / "runs" / "KD-AIF-0" / "influence" / f"epoch-{epoch:03d}.parquet")
    answers.main([str(tmp_path), "--output", str(tmp_path / "answers.json")])
    by_influence, by_loss = json.loads((tmp_path / "answers.json").read_text())
    assert by_influence["mean"] == 1.0
    assert 0.3 < by_loss["mean"] < 0.7  # it has learned nothing
    assert by_loss["low"] is None


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_scores_under_weights_are_those_of_items_repeated(scripts, kind):
    random = np.random.default_rng(0)
    weights = random.integers(0, 3, (2, 50))
    if kind == "classes":
        said, labels = random.integers(0, 2, (2, 50))
        scores = {"accuracy": accuracy_score, "f1": f1_score, "matthews_correlation": matthews_corrcoef}
    else:
        said, labels = random.normal(size=(2, 50))
        scores = {"pearson": lambda labels, said: pearsonr(labels, said).statistic}
    found = scripts("item_errors").weighted_scores(weights.astype(np.float32), said, labels)
    assert list(found) == list(scores)
    for name, score in scores.items():
        expected = [score(np.repeat(labels, times), np.repeat(said, times)) for times in weights]
        np.testing.assert_allclose(found[name], expected, rtol=1e-5)


def test_the_error_of_the_items_is_that_of_their_mean(scripts, images, tmp_path, capsys):
    """Of accuracies it has a closed form: the paired items' standard deviation over the root of their number."""
    flags = {"dataset": "digits", "data_dir": str(images)}
    runs, right = [], {"one": [], "other": []}
    for method, seed in itertools.product(right, range(2)):
        torch.manual_seed(len(runs))
        student, name = load_model("resnet8", num_labels=10).eval(), f"{method}-{seed}"
        student.save_pretrained(tmp_path / "study" / "runs" / name)
        split = load_image_data("digits", data_dir=images).test
        dataset = ImageDataset(split, processor_for(student))
        pixels = torch.stack([dataset[i]["pixel_values"] for i in range(len(dataset))])
        with torch.no_grad():
            said = student(pixel_values=pixels).logits.argmax(-1)
        right[method].append((said.numpy() == split["label"][:]).astype(float))
        results = {"test_accuracy": right[method][-1].mean()}
        runs.append({"method": method, "seed": seed, "name": name, "settings": {"flags": flags}, "results": results})
    (tmp_path / "study" / "results.json").write_text(json.dumps({"runs": runs}))
    file = tmp_path / "errors.json"
    file.write_text('{"another": 1}')
    scripts("item_errors").main([str(tmp_path / "study"), "--output", str(file)])
    difference = np.mean(right["one"], axis=0) - np.mean(right["other"], axis=0)
    assert difference.std() > 0.1
    expected = {"one - other": pytest.approx(difference.std() / len(difference) ** 0.5, rel=0.08)}
    assert json.loads(file.read_text()) == {"another": 1, "study": {"test_accuracy": expected}}
    assert "by at most 0.0000" in capsys.readouterr().out


def test_copies_differ_in_the_noise_alone(scripts, images, tmp_path):
    scripts("shifted_copy").main([str(images), str(tmp_path), "--sigma", "30"])
    clean, shifted = (load_image_data("digits", data_dir=tmp_path / name) for name in ("clean", "shifted"))

    def pixels(split):
        return np.array([np.asarray(image) for image in split["image"]], dtype=float)

    for name in ("train", "test", "validation"):
        assert np.array_equal(pixels(getattr(clean, name)), pixels(getattr(shifted, name)))
    assert len(clean.held_out) == len(shifted.held_out) == 20
    assert clean.held_out["label"][:] == shifted.held_out["label"][:]
    inner = (pixels(clean.held_out) > 90) & (pixels(clean.held_out) < 165)  # where nothing is cut off
    moved = (pixels(shifted.held_out) - pixels(clean.held_out))[inner]
    assert moved.std() == pytest.approx(30, rel=0.15)
    originals = load_dataset("parquet", data_files=str(images / "test.parquet"), split="train")
    assert originals["label"][:] == clean.test["label"][:]
    assert (pixels(originals) != pixels(clean.test)).mean() > 0.3
    held_out = {np.asarray(image).tobytes() for image in clean.held_out["image"]}
    assert not held_out & {np.asarray(image).tobytes() for image in clean.train["image"]}


def test_copies_need_a_test_split(scripts, images, tmp_path):
    (tmp_path / "train.parquet").write_bytes((images / "train.parquet").read_bytes())
    with pytest.raises(SystemExit, match="has no test split"):
        scripts("shifted_copy").main([str(tmp_path), str(tmp_path / "out")])
