"""Command lines: flags from a file."""

import runpy
import sys
from dataclasses import dataclass, field

import pytest
import torch.distributed as dist

from hfkd import DistillationTrainingArguments, cli
from hfkd.cli import explain_refusals, parse_arguments
from hfkd.distillers import CRD, Combined, make_distiller


@dataclass
class Options:
    strategy: str = field(default="epoch")
    flag: bool = field(default=False)
    rate: float = field(default=1.0)
    kwargs: str = field(default="{}")


def parse(tmp_path, text, *words, name="config.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return parse_arguments([Options], [str(path), *words])[0]


def test_words_that_yaml_takes_for_booleans_stay_words(tmp_path):
    assert parse(tmp_path, "strategy: no\nflag: true\nrate: 1e-3\n") == Options("no", True, 1e-3)


def test_json_tables_and_overriding_flags(tmp_path):
    options = parse(tmp_path, '{"rate": 2, "kwargs": {"gamma": 0.3}, "strategy": null}', "--rate", "3", name="c.json")
    assert options == Options(rate=3.0, kwargs='{"gamma": 0.3}')


@pytest.mark.parametrize(("text", "message"), [("- a\n", "must hold a table"), ("a: [", "neither YAML nor JSON")])
def test_other_files_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        parse(tmp_path, text)


def test_unknown_flags_are_refused(tmp_path):
    with pytest.raises(ValueError, match="ratio"):
        parse(tmp_path, "ratio: 1\n")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.yaml"):
        parse_arguments([Options], [str(tmp_path / "none.yaml")])


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ("--teacher_cache", True),
        ("--teacher_cache --use_cpu", True),
        ("--teacher_cache true", True),
        ("--teacher_cache false", None),
        ("--teacher_cache folder --teacher_cache_top_k 5", "folder"),
        ("", None),
    ],
)
def test_the_teachers_cache_is_a_flag_a_word_or_a_folder(words, kept):
    (args,) = parse_arguments([DistillationTrainingArguments], ["--output_dir", "out", *words.split()])
    assert args.teacher_cache == kept
    assert args.teacher_cache_top_k == (5 if "top_k" in words else None)


@pytest.mark.parametrize(
    ("value", "kept"), [("true", True), ("false", None), ("null", None), ("a/folder", "a/folder")]
)
def test_the_teachers_cache_in_a_file(tmp_path, value, kept):
    (tmp_path / "config.yaml").write_text(f"output_dir: out\nteacher_cache: {value}\nteacher_cache_top_k: 5\n")
    (args,) = parse_arguments([DistillationTrainingArguments], [str(tmp_path / "config.yaml")])
    assert (args.teacher_cache, args.teacher_cache_top_k) == (kept, 5)


def test_a_distiller_is_found_in_any_case_and_its_arguments_are_checked():
    assert make_distiller("WtTm", gamma=0.2).gamma == 0.2
    with pytest.raises(ValueError, match="unknown distiller 'wtm': choose one of KD, "):
        make_distiller("wtm")
    with pytest.raises(ValueError, match=r"KD\(alpha.*cannot be made so.*gamma"):
        make_distiller("kd", gamma=1)


def test_methods_with_a_plus_between_them_are_combined():
    both = make_distiller("WTTM+crd", wttm={"gamma": 0.2})
    assert (type(both), list(both.parts), both.task_from) == (Combined, ["wttm", "crd"], "wttm")
    assert (both.parts["wttm"].gamma, both.parts["crd"].weight) == (0.2, CRD().weight)
    with pytest.raises(ValueError, match="unknown distiller 'crt'"):
        make_distiller("wttm+crt")
    with pytest.raises(ValueError, match=r"gamma: .* a table for each of wttm, crd"):
        make_distiller("wttm+crd", gamma=0.2)
    with pytest.raises(ValueError, match="dkd: .* a table for each of wttm, crd"):
        make_distiller("wttm+crd", dkd={})
    with pytest.raises(ValueError, match="names a method twice"):
        make_distiller("kd+KD")
    with pytest.raises(ValueError, match=r"WTTM\(gamma.*cannot be made so"):
        make_distiller("wttm+crd", wttm={"alpha": 0.2})


def exit_of(capsys, work):
    with pytest.raises(SystemExit) as caught, explain_refusals():
        work()
    return caught.value.code, capsys.readouterr().err


def test_a_refusal_ends_with_its_message_alone(capsys):
    assert exit_of(capsys, lambda: make_distiller("kd", alpha=2)) == (
        2,
        "error: alpha must lie in [0, 1], got 2: 0 is the labels alone, 1 the teacher alone\n",
    )


def test_a_bug_keeps_its_traceback():
    with pytest.raises(AttributeError), explain_refusals():
        make_distiller(None)  # comes out of an expression in hfkd
    with pytest.raises(ValueError, match="invalid literal"), explain_refusals():
        int("x")  # comes out of another library


def test_who_is_done_leaves_the_process_group_and_who_failed_waits_for_nobody(tmp_path, capsys):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert exit_of(capsys, lambda: make_distiller("kd", alpha=2))[0] == 2
        assert dist.is_initialized()
        with explain_refusals():
            pass
        assert not dist.is_initialized()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_a_library_beside_the_script_is_no_part_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "train.py"), raising=False)
    caught = {}
    for name in ("helper.py", ".venv/lib/site-packages/library.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise RuntimeError(__file__)")
        with pytest.raises((RuntimeError, SystemExit)) as error, explain_refusals():
            runpy.run_path(str(path))
        caught[path.name] = error.type
    assert caught == {"helper.py": SystemExit, "library.py": RuntimeError}


def test_a_refusal_keeps_its_traceback_on_request(monkeypatch):
    monkeypatch.setenv("HFKD_TRACEBACK", "1")
    with pytest.raises(ValueError, match="alpha must lie"), explain_refusals():
        make_distiller("kd", alpha=2)


def test_other_processes_leave_the_message_to_the_first(monkeypatch, capsys):
    waits = []
    monkeypatch.setattr(cli.time, "sleep", waits.append)
    monkeypatch.setenv("RANK", "1")
    code, message = exit_of(capsys, lambda: make_distiller("kd", alpha=2))
    assert (code, len(waits)) == (2, 1)
    assert message.startswith("error: alpha")  # where no launcher ended it meanwhile
    monkeypatch.setenv("RANK", "0")
    exit_of(capsys, lambda: make_distiller("kd", alpha=2))
    assert len(waits) == 1


def test_flags_are_not_guessed_from_their_beginning():
    with pytest.raises(ValueError, match="no flag takes '--strat epoch': did you mean --strategy"):
        parse_arguments([Options], ["--strat", "epoch"])
