"""Every snippet and every command of the README and of the pages in docs/ works, in order, in one folder a page."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from helpers import tiny_teacher, tokenizer
from transformers import HfArgumentParser

from hfkd.data import load_image_data
from hfkd.models import load_model


ROOT = Path(__file__).resolve().parents[1]
PATHS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS}
every_page = pytest.mark.parametrize("page", PAGES)
OF_LAUNCHERS = {"--nproc_per_node", "--num_processes", "--multi_gpu", "--signal"}
# By test_hyperparameter_search.py and test_export.py; what hub.md shows, by hub_stranger.py.
RUN_ELSEWHERE = {"docs/comparing.md", "docs/export.md", "docs/hub.md"}


def flags_in(source):
    """The flags that a script of argparse, or of dataclasses, adds."""
    fields = re.findall(r"^    (\w+): .+ = field\(", source, re.M)
    return {*re.findall(r'add_argument\("(--\w+)"', source), *(f"--{name}" for name in fields)}


OF_SCRIPTS = {
    flag
    for folder in ("benchmarks", "scripts")
    for path in (ROOT / folder).glob("*.py")
    for flag in flags_in(path.read_text(encoding="utf-8"))
}


def snippets(language, page="README.md"):
    return re.findall(rf"```{language}\n(.+?)```", PAGES[page], re.S)


def commands(page):
    """The lines of its blocks as words; an ellipsis is left out, and a variable of the shell is a number."""
    for block in snippets("bash", page):
        for line in block.replace("\\\n", "").splitlines():
            words = shlex.split(re.sub(r"\$\w+", "1", line).replace("…", ""), comments=True)
            if words:
                yield words


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a page's snippets run: with a teacher of the digits, and with reviews and a teacher of those."""
    monkeypatch.chdir(tmp_path)
    # The demo's teacher takes a minute to train; one whose head was moved stands in for it.
    teacher = load_model("resnet20", label_names=load_image_data("digits").label_names)
    teacher.linear.weight.data.mul_(3)
    for name in ("demo/teacher", "teacher"):
        teacher.save_pretrained(tmp_path / "outputs" / name)
    names = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    tiny_teacher("bert", num_labels=2, **names).save_pretrained("outputs/reviews-teacher")
    tokenizer().save_pretrained("outputs/reviews-teacher")
    Path("reviews.csv").write_text("text,label\n" + "1 2 3,good\n4 5,bad\n" * 20)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if snippets("python", page) and page not in RUN_ELSEWHERE])
def test_python_snippets_run(page, folder):
    names = {}
    for snippet in snippets("python", page):
        shortened = re.sub(r"num_train_epochs=\d+", "max_steps=2, use_cpu=True", snippet)
        exec(compile(shortened, page, "exec"), names)
    trained = names.get("trainer")
    assert trained is None or trained.state.global_step == 2
    if page == "README.md":
        assert (folder / "outputs/student/model.safetensors").is_file()
        assert type(trained.distiller).__name__ == "Combined"
        assert names["ConfidentKD"]().temperature == 4.0
    if page == "docs/quickstart-vision.md":
        assert (folder / "outputs/taught/model.safetensors").is_file()
    if page == "docs/quickstart-text.md":
        assert (folder / "outputs/reviews/model.safetensors").is_file()


def test_pages_with_snippets_are_these():
    pages = {page.removeprefix("docs/").removesuffix(".md") for page in PAGES if snippets("python", page)}
    starts = {"README", "index", "quickstart-vision", "quickstart-text"}
    assert pages >= {*starts, "choosing", "labels", "methods", "writing-a-method"}


def test_own_method_is_the_example():
    example = (ROOT / "examples/custom_distiller.py").read_text()
    method = next(snippet for snippet in snippets("python") if "class ConfidentKD" in snippet)
    assert method[method.index("class ConfidentKD") :].strip() in example


@every_page
def test_commands_and_paths_name_what_exists(page):
    makefile = (ROOT / "Makefile").read_text()
    for words in commands(page):
        if words[0] == "make":
            assert f"\n{words[1]}:" in makefile
        for word in words:
            if word.endswith(".py"):
                assert (ROOT / word).is_file()
    for path in re.findall(r"`((?:benchmarks|docs|examples|hfkd|scripts|tests|\.github)/[\w./-]*)`", PAGES[page]):
        assert (ROOT / path).exists(), path


@pytest.fixture(scope="module")
def parsers():
    """The parsers of the examples' flags by script."""
    sys.path.insert(0, str(ROOT / "examples"))
    found = {}
    for script in ("run_image_kd", "run_glue_kd"):
        module = importlib.import_module(script)
        types = (module.ModelArguments, module.DataArguments, module.TrainingArguments)
        found[script] = HfArgumentParser(types, allow_abbrev=False)
        sys.modules.pop(script)
    sys.path.remove(str(ROOT / "examples"))
    return found


@every_page
def test_flags_exist(page, parsers):
    known = {flag for parser in parsers.values() for action in parser._actions for flag in action.option_strings}
    for words in commands(page):
        scripts = [word for word in words if word.endswith(".py")]
        if not scripts:
            continue
        flags = words[words.index(scripts[0]) + 1 :]
        if Path(scripts[0]).stem in parsers:
            parsers[Path(scripts[0]).stem].parse_args_into_dataclasses(args=[*flags, "--use_cpu"])
        else:
            source = (ROOT / scripts[0]).read_text(encoding="utf-8")
            unknown = {flag for flag in flags if flag.startswith("--")} - flags_in(source)
            assert not unknown or ("run_image_kd" in source and known.issuperset(unknown)), unknown
    prose = re.sub(r"```.*?```", "", PAGES[page], flags=re.S)
    named = {flag for code in re.findall(r"`([^`]+)`", prose) for flag in re.findall(r"(?<!\S)--\w+", code)}
    assert named <= known | OF_LAUNCHERS | OF_SCRIPTS
