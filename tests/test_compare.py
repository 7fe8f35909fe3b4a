"""scripts/compare_distillers.py: what is run, what is gone on with, what comes out, and the page that shows it."""

import csv
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import yaml
from helpers import tiny_teacher
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

import hfkd.trainer


ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "dataset": "digits",
    "student": "resnet8",
    "max_train_samples": 64,
    "max_eval_samples": 32,
    "num_train_epochs": 2,
    "views": 2,
    "use_cpu": True,
}
EVIL = "<script>document.title = 'owned'</script>"


@pytest.fixture(scope="module")
def compare():
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("compare_distillers")
    sys.path[:] = before
    for name in ("compare_distillers", "leaderboard", "run_image_kd", "run_glue_kd"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    tiny_teacher("cifar", num_labels=10).save_pretrained(folder)
    return str(folder)


def study(folder, **tables):
    """A file of a study, and where its runs go."""
    tables = {
        "example": "image",
        "output": str(folder / "out"),
        "flags": TINY,
        "methods": {"alone": {}},
        "seeds": [0],
        **tables,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(tables, sort_keys=False))
    return path, folder / "out"


def planned(compare, path, output):
    return compare.plan(compare.read_study(path), output)[1]


def finish(compare, run, score, *, resumed=False, seconds=10.0, curve=(0.5, 0.6), **results):
    """Make a run look finished, without training."""
    run.folder.mkdir(parents=True)
    compare.write_json(run.folder / compare.SETTINGS, run.settings)
    results = {"test_accuracy": score, "test_loss": 1 - score, "train_runtime": seconds, **results}
    validation = [{"epoch": i + 1.0, "step": i + 1, "eval_accuracy": value} for i, value in enumerate(curve)]
    machine = {"peak_memory_bytes": 2**30, "peak_gpu_memory_bytes": None}
    report = {"results": results, "validation": validation, "resumed": resumed, "command": run.command(), **machine}
    compare.write_json(run.folder / compare.FINISHED, report)


# Statistics


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_the_interval_is_the_paired_t_tests(compare, n):
    own, base = np.random.default_rng(n).normal([[0.7], [0.65]], 0.02, (2, n))
    expected = scipy.stats.ttest_rel(own, base).confidence_interval(0.95)
    found = compare.interval([a - b for a, b in zip(own.tolist(), base.tolist(), strict=True)])
    assert found == pytest.approx((expected.low, expected.high), rel=1e-12, abs=0)
    mean, std = compare.summarize(own.tolist())
    assert (mean, std) == pytest.approx((own.mean(), own.std(ddof=1)), rel=1e-12, abs=0)


def test_one_seed_has_neither_deviation_nor_interval(compare):
    assert compare.summarize([0.5]) == (0.5, None)
    assert compare.interval([0.5]) is None
    assert compare.interval([]) is None


SCORES = {"alone": {0: 0.6, 1: 0.62, 2: 0.61}, "KD": {0: 0.65, 1: 0.66, 2: 0.7}, "WTTM": {0: 0.7, 1: 0.75}}


@pytest.fixture
def scored(compare, tmp_path):
    """A study of which all but one run is finished."""
    methods = {"alone": {}, "KD": {"distiller": "kd"}, "WTTM": {"distiller": "wttm", "distiller_learning_rate": 0.1}}
    path, output = study(tmp_path, methods=methods, seeds=[0, 1, 2], flags={**TINY, "teacher": "T"})
    runs = planned(compare, path, output)
    for run in runs:
        if run.seed in SCORES[run.method]:
            teacher = {"teacher_test_accuracy": 0.75} if run.method == "KD" else {}
            score = SCORES[run.method][run.seed]
            finish(compare, run, score, resumed=run.name == "KD-2", seconds=10.0 + run.seed, **teacher)
    return path, output, runs


def test_the_leaderboard_pairs_what_shares_a_seed(compare, scored):
    _, _, runs = scored
    rows = compare.leaderboard(runs, "test_accuracy", "KD")
    assert [(row["method"], row["n"]) for row in rows] == [("WTTM", 2), ("KD", 3), ("alone", 3)]
    wttm, kd, alone = rows
    assert wttm["pairs"] == pytest.approx({0: 0.05, 1: 0.09})
    assert wttm["difference"] == pytest.approx(0.07)
    # By hand: t of one degree of freedom is 12.7062, the standard error 0.02.
    assert wttm["interval"] == pytest.approx((0.07 - 12.706205 * 0.02, 0.07 + 12.706205 * 0.02), rel=1e-6)
    assert len(alone["pairs"]) == 3
    assert (kd["pairs"], kd["difference"], kd["interval"]) == ({}, None, None)
    assert kd["seconds"] == 10.5  # without the one that was resumed
    assert kd["kept"] == pytest.approx(0.67 / 0.75)
    assert alone["kept"] is None
    assert kd["metrics"]["test_loss"][0] == pytest.approx(1 - 2.01 / 3)
    assert [row["method"] for row in compare.leaderboard(runs, "test_loss", "KD")] == ["WTTM", "KD", "alone"]


def test_nothing_is_kept_of_a_teacher_at_zero_or_of_a_loss(compare):
    results = [{"test_loss": 0.5, "teacher_test_loss": 0.4, "test_pearson": 0.1, "teacher_test_pearson": 0.0}]
    assert compare.share_kept(results, "test_loss") is None
    assert compare.share_kept(results, "test_pearson") is None


def test_the_files_say_the_same_and_name_what_was_not_run(compare, scored):
    path, output, _ = scored
    settings = compare.read_study(path)
    compare.publish(settings, compare.plan(settings, output)[1], output)
    lines = (output / "leaderboard.md").read_text().splitlines()
    assert "| WTTM | 2 | 72.50 ± 3.54 | +7.00 | -18.41 to +32.41 | 2 | – | 10.5 | 1024 |" in lines
    assert "| KD | 3 | 67.00 ± 2.65 | – | – | – | 89.3 | 10.5 | 1024 |" in lines
    assert "Not run, or not finished: WTTM-2." in lines
    with (output / "leaderboard.csv").open(newline="") as file:
        table = {row["method"]: row for row in csv.DictReader(file)}
    assert float(table["WTTM"]["mean"]) == pytest.approx(0.725)
    assert float(table["alone"]["test_loss_std"]) == pytest.approx(0.01)
    assert table["KD"]["difference"] == ""
    assert float(table["KD"]["kept"]) == pytest.approx(0.67 / 0.75)
    assert float(table["KD"]["seconds"]) == 10.5
    runs = json.loads((output / "results.json").read_text())["runs"]
    assert len(runs) == 8
    assert [row["eval_accuracy"] for row in runs[0]["validation"]] == [0.5, 0.6]
    assert runs[0]["settings"]["flags"]["teacher_cache"] is True


def test_a_metric_that_is_not_there_lists_those_that_are(compare, scored):
    with pytest.raises(ValueError, match="no run has test_f1: set metric: to one of test_accuracy, test_loss"):
        compare.leaderboard(scored[2], "test_f1", None)


# What is run


def test_flags_are_shared_and_a_methods_own_come_first(compare, tmp_path, teacher):
    methods = {
        "alone": {"teacher": None, "label_smoothing_factor": 0.1},
        "KD .9": {"distiller": "kd", "distiller_kwargs": {"alpha": 0.9}},
    }
    path, output = study(tmp_path, methods=methods, seeds=[3, 4], flags={**TINY, "teacher": teacher})
    runs = planned(compare, path, output)
    assert [run.name for run in runs] == ["alone-3", "KD_.9-3", "alone-4", "KD_.9-4"]
    alone, kd = runs[0].settings["flags"], runs[1].settings["flags"]
    assert "teacher" not in alone
    assert "teacher_cache" not in alone
    assert (alone["label_smoothing_factor"], alone["seed"], alone["views"]) == (0.1, 3, 2)
    assert (kd["teacher"], kd["teacher_cache"]) == (teacher, True)
    distiller = compare.check(runs[1])
    assert (type(distiller).__name__, distiller.alpha) == ("KD", 0.9)
    assert compare.check(runs[0]) is None


def test_a_teacher_of_the_study_is_trained_first_and_known_by_its_flags(compare, tmp_path):
    tables = {"teachers": {"big": {"student": "resnet20"}}, "methods": {"KD": {"distiller": "kd", "teacher": "big"}}}
    path, output = study(tmp_path, **tables)
    ((big,), (kd,)) = compare.plan(compare.read_study(path), output)
    assert kd.settings["flags"]["teacher"] == str(big.folder) == str(output / "teachers" / "big-0")
    assert "teacher" not in big.settings["flags"]
    finish(compare, kd, 0.5)
    tables["teachers"] = {"big": {"student": "resnet32"}}
    path, output = study(tmp_path, **tables)
    (kd,) = planned(compare, path, output)
    assert kd.differences() == ['the teacher\'s.student was "resnet20" and is "resnet32"']


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"example": "audio"}, "example is 'audio': choose image or glue"),
        ({"method": {}}, "has method: its tables are baseline, example"),
        ({"methods": {}}, "names no methods"),
        ({"methods": {"KD": "kd"}}, "methods, KD: write its flags as a table"),
        ({"methods": {"KD": {"seed": 1}}}, "seed is set for each run"),
        ({"seeds": [0, 0]}, r"seeds is \[0, 0\]: write a list of different whole numbers"),
        ({"seeds": 3}, "seeds is 3"),
        ({"methods": {"KD": {"teacher": "T", "train_teacher": True}}}, "name it under teachers: instead"),
        ({"methods": {"a b": {}, "a:b": {}}}, "'a b' and 'a:b' would share the name a_b-0"),
        ({"methods": {"big": {}}, "teachers": {"big": {}}}, "would share the name big-0"),
        ({"flags": {"dataset": "digits"}, "methods": {"KD": {"teacher": "T"}, "alone": {}}}, "set views under flags"),
        ({"baseline": "KD"}, "there is no method 'KD': the study has alone"),
        ({"methods": {"KD": {"teacher": "T", "distiller": "kdd"}}}, "KD-0: unknown distiller 'kdd'"),
        ({"methods": {"alone": {"learning_rat": 1}}}, "alone-0: no flag takes .*: did you mean --learning_rate"),
        (
            {"methods": {"KD": {"teacher": "T", "distiller": "kd", "distiller_kwargs": {"alpha": 2}}}},
            "KD-0: alpha must",
        ),
    ],
)
def test_a_study_that_cannot_work_is_refused_before_the_first_run(compare, tmp_path, tables, message):
    path, output = study(tmp_path, **tables)
    with pytest.raises(ValueError, match=message):
        compare.main([str(path)])
    assert not output.exists()


def test_a_dry_run_prints_commands_and_leaves_nothing(compare, tmp_path, capsys):
    methods = {"alone": {}, "smooth": {"distiller": "labelsmoothing", "distiller_kwargs": {"epsilon": 0.2}}}
    path, output = study(tmp_path, methods=methods)
    assert compare.main([str(path), "--dry_run", "--seeds", "5", "6", "--only", "smooth"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("#")] == ["# smooth-5: new", "# smooth-6: new"]
    assert lines[1].startswith("python examples/run_image_kd.py --disable_tqdm True --dataset digits")
    assert """--distiller_kwargs '{"epsilon": 0.2}' --seed 5 --output_dir""" in lines[1]
    assert not output.exists()


def test_variables_are_put_in_place_and_what_is_kept_has_their_names(compare, tmp_path, monkeypatch, capsys):
    methods = {"KD": {"teacher": "$HFKD_DATA_DIR/teachers/big", "student": "$SMALL", "distiller": "kd"}}
    path, output = study(tmp_path, methods=methods)
    monkeypatch.setenv("HFKD_DATA_DIR", "/a folder")
    monkeypatch.delenv("SMALL", raising=False)
    with pytest.raises(ValueError, match=r"KD-0: \$SMALL needs the variable SMALL: export SMALL="):
        compare.main([str(path), "--dry_run"])
    monkeypatch.setenv("SMALL", "resnet8")
    (run,) = planned(compare, path, output)
    words = run.words()
    assert words[words.index("--teacher") + 1] == "/a folder/teachers/big"
    assert words[words.index("--student") + 1] == "resnet8"
    assert run.settings["flags"]["teacher"] == "$HFKD_DATA_DIR/teachers/big"
    assert '--teacher "$HFKD_DATA_DIR/teachers/big"' in run.command()
    # A shell makes the same words of the command.
    shell = subprocess.run(
        f"printf '%s\\n' {run.command()}", shell=True, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert shell.stdout.splitlines()[2:] == words


# What is there already


def test_a_run_with_other_settings_is_refused_with_the_difference(compare, tmp_path, capsys):
    path, output = study(tmp_path, flags={**TINY, "learning_rate": 0.05})
    (run,) = planned(compare, path, output)
    finish(compare, run, 0.5)
    assert run.state() == "finished"
    path, output = study(tmp_path, flags={**TINY, "learning_rate": 0.1, "augment": "none"})
    with pytest.raises(ValueError, match="1 runs in .* were made with other settings .*--rerun_changed"):
        compare.main([str(path)])
    assert (
        'alone-0 was made with other settings: augment was null and is "none"; learning_rate was 0.05 and is 0.1'
        in capsys.readouterr().out
    )
    assert json.loads((run.folder / compare.SETTINGS).read_text())["flags"]["learning_rate"] == 0.05


def test_an_interrupted_run_goes_on_from_its_checkpoint_and_a_finished_one_is_left(compare, tmp_path, monkeypatch):
    path, output = study(tmp_path, seeds=[0], methods={"whole": {}, "cut": {}})
    whole, cut = planned(compare, path, output)
    compare.train(whole.folder, whole.settings, whole.name)
    begin = hfkd.trainer._Hooks.on_epoch_begin

    def interrupted(self, args, state, control, **kwargs):
        if state.epoch and state.epoch >= 1:
            raise KeyboardInterrupt
        begin(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(hfkd.trainer._Hooks, "on_epoch_begin", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare.train(cut.folder, cut.settings, cut.name)
    assert cut.state() == "begun"
    assert [path.name for path in cut.folder.glob("checkpoint-*")] == ["checkpoint-1"]
    compare.train(cut.folder, cut.settings, cut.name)
    one, other = whole.report(), cut.report()
    assert (one["resumed"], other["resumed"]) == (False, True)
    for name in ("test_accuracy", "test_loss", "eval_loss"):
        assert one["results"][name] == other["results"][name]
    assert [row["epoch"] for row in other["validation"]] == [1.0, 2.0]
    assert [row["eval_loss"] for row in one["validation"]] == [row["eval_loss"] for row in other["validation"]]
    assert not list(cut.folder.glob("checkpoint-*"))
    assert (cut.folder / "model.safetensors").is_file()
    assert cut.state() == "finished"
    before = (cut.folder / compare.FINISHED).stat().st_mtime_ns
    compare.train(cut.folder, cut.settings, cut.name)
    assert (cut.folder / compare.FINISHED).stat().st_mtime_ns == before


def test_a_run_without_a_whole_checkpoint_starts_again(compare, tmp_path):
    path, output = study(tmp_path, flags={**TINY, "num_train_epochs": 1})
    (run,) = planned(compare, path, output)
    (run.folder / "checkpoint-1").mkdir(parents=True)
    compare.write_json(run.folder / compare.SETTINGS, run.settings)
    assert run.state() == "begun"
    compare.train(run.folder, run.settings, run.name)
    report = run.report()
    assert report["resumed"] is False
    assert report["peak_memory_bytes"] > 2**26
    assert report["results"]["train_runtime"] > 0


def test_a_teacher_that_learns_too_is_not_scored(compare, tmp_path, teacher):
    update = {"distiller": "kdaif", "distiller_kwargs": {"teacher_update": "weighted"}, "teacher_cache": False}
    flags = {**TINY, "teacher": teacher, "held_out_fraction": 0.1}
    path, output = study(tmp_path, flags=flags, methods={"KD": {"distiller": "kd"}, "update": update})
    for run in planned(compare, path, output):
        compare.train(run.folder, run.settings, run.name)
        results = run.report()["results"]
        assert "test_entropy" in results
        for name in ("teacher_test_accuracy", "test_agreement"):
            assert (name in results) == (run.method == "KD")


def test_from_the_command_line_a_failed_run_is_reported_and_the_others_go_on(tmp_path, teacher):
    methods = {"broken": {"teacher": None, "student": "no-such-net"}, "KD": {"distiller": "kd"}}
    path, output = study(tmp_path, methods=methods, flags={**TINY, "teacher": teacher, "num_train_epochs": 1})
    command = [sys.executable, str(ROOT / "scripts/compare_distillers.py"), str(path), "--jobs", "2"]
    environment = {**os.environ, "HFKD_CACHE": str(tmp_path / "caches"), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 1, done.stderr
    assert re.search(r"^broken-0: FAILED, exit status \d+: .*no-such-net.*logs/broken-0.log\)$", done.stdout, re.M)
    assert "failed: broken-0" in done.stderr
    report = json.loads((output / "runs/KD-0/run.json").read_text())
    assert report["threads"] == 1
    # Both views of the 58 images were asked about before it started.
    assert report["results"]["teacher_cache_misses"] == 0
    assert report["results"]["teacher_cache_hits"] > 0
    assert (
        report["results"]["test_accuracy"]
        == json.loads((output / "runs/KD-0/all_results.json").read_text())["test_accuracy"]
    )
    assert "Not run, or not finished: broken-0." in (output / "leaderboard.md").read_text()
    for name in ("broken-0", "KD-0", "warm-KD-0"):
        assert (output / "logs" / f"{name}.log").is_file()


def test_a_study_of_texts_cuts_its_students_out_of_its_teacher(compare, tmp_path, monkeypatch):
    monkeypatch.setenv("HFKD_CACHE", str(tmp_path / "caches"))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"the film was good bad".split()]
    BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(tmp_path / "bert")
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    BertForSequenceClassification(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path / "bert")
    lines = [f"the film was {'good' if i % 2 else 'bad'},{i % 2}" for i in range(40)]
    (tmp_path / "train.csv").write_text("\n".join(["sentence,label", *lines]) + "\n")
    table = str(tmp_path / "train.csv")
    flags = {"train_file": table, "test_file": table, "num_train_epochs": 1, "use_cpu": True}
    tables = {
        "example": "glue",
        "flags": flags,
        "teachers": {"big": {"student": str(tmp_path / "bert")}},
        "methods": {
            "alone": {"teacher": "big", "distiller": "studentalone", "student_layers": 2},
            "KD": {"teacher": "big", "distiller": "kd", "student_layers": 2},
        },
    }
    path, output = study(tmp_path, **tables)
    teachers, runs = compare.plan(compare.read_study(path), output)
    for run in [*teachers, *runs]:
        compare.check(run)
        compare.train(run.folder, run.settings, run.name)
    assert [path.name for path in compare.publish(compare.read_study(path), runs, output)] == [
        "leaderboard.md",
        "leaderboard.csv",
        "leaderboard.html",
    ]
    assert runs[1].report()["results"]["teacher_cache_misses"] > 0


def test_the_spread_is_of_the_last_third(compare):
    curve = [
        {"epoch": i, "step": i, "eval_accuracy": a, "eval_runtime": 1.0 * i} for i, a in enumerate([0, 0, 0.9, 0.5])
    ]
    assert compare.spreads(curve) == pytest.approx({"eval_accuracy_spread": 0.4 / 2**0.5}, rel=1e-12)
    longer = [{"eval_loss": loss} for loss in (9, 9, 9, 9, 4, 2, 6)]
    assert compare.spreads(longer) == {"eval_loss_spread": 2.0}
    assert compare.spreads(curve[:1]) == compare.spreads([]) == {}


def test_another_metric_or_baseline_draws_anew(compare, tmp_path):
    path, output = study(tmp_path, methods={"KD": {"distiller": "kd"}, "TTM": {"distiller": "ttm"}}, seeds=[0, 1])
    for i, run in enumerate(planned(compare, path, output)):
        finish(compare, run, 0.5, test_entropy=0.1 * 2**i, **({"test_agreement": 0.5} if i == 1 else {}))
    assert compare.main([str(path)]) == 0
    assert json.loads((output / "results.json").read_text())["metric"] == "test_accuracy"
    assert compare.main([str(path), "--metric", "test_entropy", "--baseline", "TTM"]) == 0
    assert json.loads((output / "results.json").read_text())["baseline"] == "TTM"
    (line,) = [line for line in (output / "leaderboard.md").read_text().splitlines() if line.startswith("| KD")]
    assert "0.25 ± 0.21" in line  # 0.1 and 0.4
    assert "-0.25" in line  # 0.2 and 0.8
    assert compare.main([str(path), "--metric", "test_agreement"]) == 0
    board = (output / "leaderboard.md").read_text()
    assert r"Finished, but without test agreement: KD-0, KD-1, TTM-1." in board
    assert not re.search("^. KD", board, re.M)
    with pytest.raises(ValueError, match="there is no method 'DKD'"):
        compare.main([str(path), "--baseline", "DKD"])


def test_the_metric_and_the_baseline_are_the_tasks_and_kd(compare):
    glue = {"example": "glue", "flags": {"task": "mrpc"}, "methods": {"WTTM": {}, "a": {"distiller": "KD"}}}
    assert (compare.default_metric(glue), compare.default_baseline(glue)) == ("test_f1", "a")
    image = {"example": "image", "flags": {}, "methods": {"a": {"distiller": "kd"}, "Kd": {}}}
    assert (compare.default_metric(image), compare.default_baseline(image)) == ("test_accuracy", "Kd")
    assert compare.default_baseline({"methods": {"alone": {}}}) is None


# The page


@pytest.fixture
def board(compare, tmp_path):
    """The page of ten methods, one with a name that would be a script."""
    methods = {f"method {i}": {"distiller": "kd", "distiller_kwargs": {"alpha": i / 10}} for i in range(9)}
    methods = {"KD": {"distiller": "kd"}, **methods, EVIL: {"distiller": "wttm"}}
    path, output = study(tmp_path, methods=methods, seeds=[0, 1, 2], flags={**TINY, "teacher": "T"}, title=EVIL)
    runs = planned(compare, path, output)
    random = np.random.default_rng(0)
    for i, run in enumerate(runs):
        if run.name != "method_3-2":
            noise = random.normal(0, 0.02, 2).tolist()
            curve = [0.3 + noise[0], 0.5, 0.6 + noise[1]]
            finish(compare, run, 0.6 + 0.01 * (i % 10) + noise[0], seconds=10.0 + i % 10, curve=curve)
    settings = compare.read_study(path)
    compare.publish(settings, runs, output)
    return output / "leaderboard.html"


def column(page, number):
    return page.locator(f"tbody tr > :nth-child({number})").all_inner_texts()


def test_the_page_sorts_by_click_and_by_key(page, board):
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(board.as_uri())
    scores = [float(text.split()[0]) for text in column(page, 3)]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 11
    head = page.locator("thead th")
    assert [head.nth(i).get_attribute("aria-sort") for i in range(9)] == ["none"] * 9
    page.get_by_role("button", name="training (s)").click()
    seconds = [float(text) for text in column(page, 8)]
    assert seconds == sorted(seconds, reverse=True) != sorted(seconds)
    page.get_by_role("button", name="method").focus()
    page.keyboard.press("Enter")
    assert head.nth(0).get_attribute("aria-sort") == "ascending"
    assert head.nth(7).get_attribute("aria-sort") == "none"
    names = page.evaluate("[...document.querySelectorAll('tbody tr')].map(row => row.cells[0].dataset.value)")
    assert names == page.evaluate("names => [...names].sort((a, b) => a.localeCompare(b))", names)
    page.keyboard.press("Space")
    assert head.nth(0).get_attribute("aria-sort") == "descending"
    # The baseline has no difference: it is last either way.
    for order in ("descending", "ascending"):
        page.get_by_role("button", name="difference to KD").click()
        assert head.nth(3).get_attribute("aria-sort") == order
        assert column(page, 1)[-1] == "KD"
    assert requests == [board.as_uri()]


def test_the_page_shows_four_plots_with_all_runs(page, board):
    page.goto(board.as_uri())
    plots = page.locator("figure svg.plot")
    assert plots.count() == 4
    for i in range(4):
        box = plots.nth(i).bounding_box()
        assert box["width"] > 250
        assert box["height"] > 150
    marks = [plots.nth(i).locator("use").count() for i in range(4)]
    assert marks == [32, 29, 11, 33]  # runs; pairs, of which one run of method 3 and all of KD are none; means; epochs
    # Nothing is drawn outside of its plot.
    outside = page.evaluate(
        """[...document.querySelectorAll('svg.plot')].flatMap(plot => {
            const frame = plot.getBoundingClientRect();
            return [...plot.querySelectorAll("path, line, text, use")].filter(part => {
                const box = part.getBoundingClientRect();
                return box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1;
            }).map(part => part.outerHTML);
        })"""
    )
    assert not outside


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone(page, board, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 360, "height": 740})
    page.goto(board.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    box = page.locator(".box")
    assert box.evaluate("box => box.scrollWidth > box.clientWidth")  # the table scrolls inside
    page.locator("summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    paper, ink = page.evaluate("(style => [style.backgroundColor, style.color])(getComputedStyle(document.body))")
    assert (sum(map(int, re.findall(r"\d+", paper))) > 400) == (scheme == "light")
    assert (sum(map(int, re.findall(r"\d+", ink))) < 400) == (scheme == "light")


def test_names_are_text(page, board):
    page.goto(board.as_uri())
    assert page.title() == EVIL
    assert page.locator("h1").inner_text() == EVIL
    assert page.locator("script").count() == 1
    assert EVIL in column(page, 1)
    assert EVIL not in board.read_text()
    assert EVIL not in board.with_suffix(".md").read_text()


def test_the_page_is_one_small_file(board):
    content = board.read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#m\d)|@import|url\(""", content)
    assert board.stat().st_size < 60_000


def test_methods_differ_in_colour_and_shape(compare):
    leaderboard = sys.modules["leaderboard"]
    shapes = [re.sub('id="m[0-9]+"', "", leaderboard.shape(i)) for i in range(56)]
    assert len(set(shapes)) == 56
    assert {"#0072b2", "#d55e00", "#009e73", "#e69f00", "#56b4e9", "#cc79a7", "#f0e442"} < set(leaderboard.COLOURS)


@pytest.mark.parametrize("number", [1, 2])
def test_a_page_of_one_run_is_drawn_too(compare, tmp_path, number):
    path, output = study(tmp_path, seeds=list(range(number)))
    runs = planned(compare, path, output)
    for run in runs:
        finish(compare, run, 0.5, curve=())
    settings = compare.read_study(path)
    compare.publish(settings, runs, output)
    content = (output / "leaderboard.html").read_text()
    assert content.count("<figure>") == 2  # no baseline, no validation
    assert not re.search(r"\bnan\b", content, re.I)


def test_the_study_of_the_docs_is_one(compare, tmp_path, capsys):
    (text,) = re.findall(r"```yaml\n(.+?)```", (ROOT / "docs" / "comparing.md").read_text(encoding="utf-8"), re.S)
    path = tmp_path / "study.yaml"
    path.write_text(text)
    assert compare.main([str(path), "--dry_run"]) == 0
    found = re.findall(r"^# (\S+): new$", capsys.readouterr().out, re.M)
    assert found == ["big-0", "alone-0", "KD-0", "WTTM-0", "alone-1", "KD-1", "WTTM-1"]
