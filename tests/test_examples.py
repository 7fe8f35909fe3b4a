"""The example scripts, as a user runs them."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers import DATA
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
)

from hfkd.cli import parse_arguments
from hfkd.models import load_model
from hfkd.saving import SavingTrainer


ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data: neither HFKD_DATA_DIR nor {DATA}")
IMAGE = "--use_cpu --dataset digits --max_train_samples 64 --max_eval_samples 64 --max_steps 2 --student resnet8"


def start(script, *flags, launcher=(sys.executable,), check=True):
    words = [*launcher, str(EXAMPLES / script), *map(str, flags), "--disable_tqdm", "True"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("WORLD_SIZE", None)
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def results(folder):
    return json.loads((folder / "all_results.json").read_text())


@pytest.fixture(scope="module")
def image_teacher(tmp_path_factory):
    """A CIFAR net that took a few steps on digits: not good, but trained."""
    folder = tmp_path_factory.mktemp("teacher")
    start("run_image_kd.py", *IMAGE.split(), "--output_dir", folder)
    return folder


def test_image_student_alone_is_a_plain_model_with_card_and_scores(image_teacher):
    assert {"eval_accuracy", "test_accuracy", "world_size"} <= set(results(image_teacher))
    assert AutoModelForImageClassification.from_pretrained(image_teacher).config.num_labels == 10
    assert "trained without a teacher" in (image_teacher / "README.md").read_text()


def test_image_flags_come_from_a_file_and_override_it(image_teacher, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        "dataset: digits\nstudent: resnet8\nmax_train_samples: 64\nmax_eval_samples: 64\nuse_cpu: true\n"
        f"max_steps: 50\ndistiller: wttm\ndistiller_kwargs: {{gamma: 0.3}}\nteacher: {image_teacher}\n"
    )
    flags = ("--max_steps", "2", "--baseline", image_teacher)
    start("run_image_kd.py", config, *flags, "--output_dir", tmp_path / "out")
    found = results(tmp_path / "out")
    assert {"teacher_eval_accuracy", "teacher_test_accuracy"} <= set(found)
    assert found["epoch"] == 2  # 64 samples are one step an epoch: 2 steps, not 50
    card = (tmp_path / "out" / "README.md").read_text()
    assert "WTTM(gamma=0.3, beta=1.5)" in card
    assert f"| student alone | {results(image_teacher)['test_accuracy']:.4f} |" in card
    assert "--max_steps 2" in card  # the command, as it was started
    assert {path.name for path in (tmp_path / "out" / "figures").iterdir()} == {
        "confusion_difference.png",
        "reliability.png",
        "training_curves.png",
    }


def test_unknown_distiller_lists_the_names(image_teacher, tmp_path):
    done = start(
        "run_image_kd.py",
        *IMAGE.split(),
        "--teacher",
        image_teacher,
        "--distiller",
        "wtm",
        "--output_dir",
        tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: unknown distiller 'wtm': choose one of KD, ")
    assert "Traceback" not in done.stderr


def test_image_teacher_is_trained_first(tmp_path):
    start(
        "run_image_kd.py",
        *IMAGE.split(),
        "--teacher",
        "resnet8",
        "--train_teacher",
        "--teacher_epochs",
        "1",
        "--labels",
        "32",
        "--output_dir",
        tmp_path,
    )
    assert AutoModelForImageClassification.from_pretrained(f"{tmp_path}-teacher").config.num_labels == 10
    assert "teacher_test_accuracy" in results(tmp_path)


def launchers():
    def port():
        import socket

        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            return str(s.getsockname()[1])

    return {
        "torchrun": lambda: (
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--master_port",
            port(),
        ),
        "accelerate": lambda: (
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            port(),
        ),
    }


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_processes_run_as_two(image_teacher, tmp_path, launcher):
    start(
        "run_image_kd.py",
        *IMAGE.split(),
        "--teacher",
        image_teacher,
        "--output_dir",
        tmp_path,
        launcher=launchers()[launcher](),
    )
    assert results(tmp_path)["world_size"] == 2


def test_two_processes_say_once_what_is_wrong(tmp_path):
    words = [*IMAGE.split(), "--distiller", "wtm", "--output_dir", tmp_path]
    done = start("run_image_kd.py", *words, launcher=launchers()["torchrun"](), check=False)
    assert done.returncode != 0
    assert done.stderr.count("error: unknown distiller 'wtm'") == 1
    assert "in make_distiller" not in done.stderr  # the launcher's own traceback is all there is


@pytest.fixture(scope="module")
def text_teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"the a good bad film was is not very awful fine".split()]
    BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


TEXT = "--use_cpu --max_train_samples 64 --max_eval_samples 32 --num_train_epochs 1"


@needs_data
def test_glue_teacher_student_and_predictions(text_teacher, tmp_path):
    start(
        "run_glue_kd.py",
        *TEXT.split(),
        "--task",
        "rte",
        "--data_dir",
        DATA / "glue" / "rte",
        "--teacher",
        text_teacher,
        "--train_teacher",
        "--student_layers",
        "2",
        "--do_predict",
        "--output_dir",
        tmp_path,
    )
    assert {"eval_accuracy", "test_accuracy", "teacher_test_accuracy"} <= set(results(tmp_path))
    assert {"eval_entropy", "test_entropy", "eval_agreement", "test_agreement"} <= set(results(tmp_path))
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert student.config.num_hidden_layers == 2
    assert student.config.id2label == {0: "entailment", 1: "not_entailment"}
    lines = next(tmp_path.glob("*.tsv")).read_text().splitlines()
    assert len(lines) == 1 + 3000
    assert lines[1].split("\t")[1] in ("entailment", "not_entailment")


@needs_data
def test_glue_regression(text_teacher, tmp_path):
    start(
        "run_glue_kd.py",
        *TEXT.split(),
        "--task",
        "stsb",
        "--data_dir",
        DATA / "glue" / "stsb",
        "--teacher",
        text_teacher,
        "--train_teacher",
        "--output_dir",
        tmp_path,
    )
    assert {"test_pearson", "test_spearmanr"} <= set(results(tmp_path))


def test_own_text_files(text_teacher, tmp_path):
    rows = [("the film was good", "pos"), ("a very bad film", "neg")] * 20
    (tmp_path / "train.csv").write_text("sentence,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    start(
        "run_glue_kd.py",
        *TEXT.split(),
        "--task",
        "reviews",
        "--train_file",
        tmp_path / "train.csv",
        "--student",
        text_teacher,
        "--output_dir",
        tmp_path / "out",
    )
    assert "eval_accuracy" in results(tmp_path / "out")
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert set(student.config.id2label.values()) == {"pos", "neg"}


@pytest.fixture
def run_here(monkeypatch, tmp_path):
    """An example in this process, with a list of the teachers that were loaded."""
    monkeypatch.setenv("HFKD_CACHE", str(tmp_path / "caches"))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    loaded = []

    def load(name, **options):
        loaded.append(str(name))
        return load_model(name, **options)

    monkeypatch.setattr("hfkd.models.loading.load_model", load)  # by which load_teacher does, and no student

    def run(script, *flags):
        module = importlib.import_module(script)
        types = (module.ModelArguments, module.DataArguments, module.TrainingArguments)
        loaded.clear()
        words = [*map(str, flags), "--disable_tqdm", "true", "--report_to", "none"]
        return module.run(*parse_arguments(types, words)), list(loaded)

    yield run
    for name in ("run_image_kd", "run_glue_kd"):
        sys.modules.pop(name, None)


def assert_second_needs_no_teacher(run, teacher, folder, times=1, labelled=True):
    """Two runs of one command line: the same student and scores, and of the second's teacher no weights."""
    folders = [folder / "first", folder / "second"]
    (first, loaded), (second, then) = (run("--teacher_cache", "--output_dir", out) for out in folders)
    assert (loaded, then) == ([str(teacher)] * times, [str(teacher)] * (times - 1))
    assert first["teacher_cache_misses"] > 0 == second["teacher_cache_misses"]
    for name in (name for name in first if name.startswith(("eval_", "test_", "teacher_"))):
        if not name.endswith(("_runtime", "_per_second")) and not name.startswith("teacher_cache"):
            assert second[name] == pytest.approx(first[name], rel=1e-3), name
    assert ("teacher_eval_accuracy" in first) == labelled
    online, then = run("--output_dir", folder / "online")
    assert then == [str(teacher)]
    for name in ("teacher_eval_accuracy", "eval_loss") if labelled else ():
        assert second[name] == pytest.approx(online[name], rel=1e-2), name
    assert not any(name.startswith("teacher_cache") for name in online)


def test_behind_a_full_cache_an_image_teacher_is_never_loaded(image_teacher, tmp_path, run_here):
    def run(*flags):
        return run_here("run_image_kd", *IMAGE.split(), "--augment", "none", "--teacher", image_teacher, *flags)

    assert_second_needs_no_teacher(run, image_teacher, tmp_path)


@needs_data
@pytest.mark.parametrize("labelled", [True, False])
def test_behind_a_full_cache_a_weights_file_is_never_loaded(tmp_path, run_here, labelled):
    """Also on images without labels, whose classes are the teacher's."""
    teacher = DATA / "teachers" / "resnet20_cifar10.safetensors"
    data = DATA / "cifar10"
    if not labelled:
        data = tmp_path / "data"
        images = datasets.Dataset.from_parquet(str(DATA / "cifar10" / "test.parquet"), split="train")
        images.select_columns("img").rename_column("img", "image").to_parquet(data / "train.parquet")
    flags = ["--dataset", "cifar10" if labelled else "own", "--data_dir", data, "--teacher", teacher]

    def run(*more):
        words = IMAGE.replace("--dataset digits", "--augment none").split()
        return run_here("run_image_kd", *words, *flags, *more)

    assert_second_needs_no_teacher(run, teacher, tmp_path, labelled=labelled)
    student = AutoModelForImageClassification.from_pretrained(tmp_path / "second")
    assert student.config.id2label[0] == "airplane"


@pytest.fixture(scope="module")
def reviews(text_teacher, tmp_path_factory):
    """Flags of a text run, and a teacher for it that looks trained."""
    folder = tmp_path_factory.mktemp("reviews")
    texts = [("the film was good", "pos"), ("a very bad film", "neg"), ("not a bad film", "pos"), ("awful", "neg")]
    (folder / "train.csv").write_text("sentence,label\n" + "".join(f"{text},{name}\n" for text, name in texts * 10))
    names = {0: "neg", 1: "pos"}
    teacher = BertForSequenceClassification.from_pretrained(
        text_teacher, id2label=names, label2id={name: number for number, name in names.items()}
    )
    teacher.classifier.bias.data[:] = torch.tensor([0.3, -0.2])
    teacher.save_pretrained(folder / "teacher")
    AutoTokenizer.from_pretrained(text_teacher).save_pretrained(folder / "teacher")
    flags = ["--task", "reviews", "--train_file", folder / "train.csv", "--teacher", folder / "teacher"]
    return [*TEXT.split(), *flags], folder / "teacher"


@pytest.mark.parametrize("student", ["named", "cut out"])
def test_behind_a_full_cache_a_text_teacher_is_never_loaded(reviews, tmp_path, run_here, student):
    """But to cut a student out of it."""
    flags, teacher = reviews
    if student == "named":
        BertForSequenceClassification.from_pretrained(teacher).save_pretrained(tmp_path / "student")
        AutoTokenizer.from_pretrained(teacher).save_pretrained(tmp_path / "student")
        flags = [*flags, "--student", tmp_path / "student"]
    times = 1 if student == "named" else 2
    assert_second_needs_no_teacher(lambda *more: run_here("run_glue_kd", *flags, *more), teacher, tmp_path, times)


@pytest.mark.parametrize("student", ["named", "cut out"])
def test_numbers_in_a_file_are_the_teachers_classes(reviews, tmp_path, run_here, student):
    flags, teacher = reviews
    rows = "the film was good,1\na very bad film,0\nnot a bad film,1\nawful,0\n"
    (tmp_path / "train.csv").write_text("sentence,label\n" + rows * 10)
    flags = [*flags, "--train_file", tmp_path / "train.csv", "--output_dir", tmp_path / "out"]
    run_here("run_glue_kd", *flags, *(["--student", teacher] if student == "named" else []))
    trained = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert trained.config.id2label == {0: "neg", 1: "pos"}


def test_numbers_in_a_file_are_the_image_teachers_classes(image_teacher, tmp_path, run_here):
    teacher = load_model(image_teacher, label_names=[f"digit {i}" for i in range(10)])
    teacher.save_pretrained(tmp_path / "teacher")
    columns = {"image": [np.full((8, 8), i, dtype=np.uint8) for i in range(40)], "label": [i % 10 for i in range(40)]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "train.parquet")
    flags = [*IMAGE.split(), "--dataset", "own", "--data_dir", tmp_path, "--teacher", tmp_path / "teacher"]
    run_here("run_image_kd", *flags, "--output_dir", tmp_path / "out")
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.id2label[7] == "digit 7"


def test_two_processes_fill_the_cache_of_a_text_run_ahead(reviews, tmp_path, run_here):
    """Together, keeping the larger logit; the run that follows has nothing to ask."""
    flags = [*reviews[0], "--per_device_train_batch_size", "18", "--teacher_cache_top_k", "1"]
    words = [ROOT / "scripts/warm_teacher_cache.py", "run_glue_kd", *flags, "--output_dir", tmp_path / "out"]
    done = subprocess.run([*launchers()["torchrun"](), *map(str, words)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (report,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert report["answers"] == 36
    (folder,) = (tmp_path / "caches").iterdir()
    asked = json.loads((folder / "manifest.json").read_text())["asked"]
    assert asked["answers"] == 36
    assert report["fill_seconds"] == pytest.approx(asked["seconds"])
    assert report["seconds_per_answer"] == pytest.approx(asked["seconds"] / 36)
    assert not (tmp_path / "out" / "all_results.json").exists()  # nothing was trained
    found, _ = run_here("run_glue_kd", *flags, "--teacher_cache", "--output_dir", tmp_path / "out")
    assert (found["teacher_cache_hits"], found["teacher_cache_misses"]) == (36, 0)
    assert found["teacher_cache_fill_seconds"] == pytest.approx(asked["seconds"])


@pytest.mark.parametrize("script", ["run_image_kd", "run_glue_kd"])
def test_a_run_that_trains_its_teacher_goes_on_wherever_it_was_stopped(
    text_teacher, tmp_path, run_here, monkeypatch, script
):
    flags = [*IMAGE.split(), "--teacher", "resnet8"]
    if script == "run_glue_kd":
        texts = "".join(f"{text},{name}\n" for text, name in (("the film was good", "pos"), ("awful", "neg")) * 20)
        (tmp_path / "train.csv").write_text("sentence,label\n" + texts)
        flags = [*TEXT.split(), "--num_train_epochs", "2", "--train_file", tmp_path / "train.csv"]
        flags += ["--teacher", text_teacher]
    written, stop_before, save = [], None, SavingTrainer._save_checkpoint

    def save_or_stop(trainer, *args):
        if len(written) == stop_before:
            raise KeyboardInterrupt
        written.append(f"{trainer.args.output_dir[-7:]} {trainer.state.global_step}")
        save(trainer, *args)

    monkeypatch.setattr(SavingTrainer, "_save_checkpoint", save_or_stop)

    def run(folder, *more):
        written.clear()
        run_here(script, *flags, "--train_teacher", "--output_dir", folder, *more)
        return [*written], load_file(folder / "model.safetensors")

    whole, student = run(tmp_path / "whole" / "student")
    assert len(whole) == 4  # two of the teacher, two of the student
    for stop_before in range(4):
        folder = tmp_path / str(stop_before) / "student"
        with pytest.raises(KeyboardInterrupt):
            run(folder)
        done, stop_before = stop_before, None
        rest, resumed = run(folder, "--resume_from_checkpoint", "true")
        assert rest == whole[done:]
        assert all(torch.equal(resumed[name], student[name]) for name in student)
    shutil.rmtree(tmp_path / "whole" / "student-teacher")
    with pytest.raises(ValueError, match="student-teacher"):  # not: another teacher, trained anew
        run(tmp_path / "whole" / "student", "--resume_from_checkpoint", "true")


def test_custom_distiller(image_teacher, tmp_path):
    start("custom_distiller.py", *IMAGE.split(), "--teacher", image_teacher, "--output_dir", tmp_path)
    assert "ConfidentKD(temperature=4.0)" in (tmp_path / "README.md").read_text()
