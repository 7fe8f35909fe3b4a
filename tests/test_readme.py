"""Every snippet of the README works, in order, in one folder."""

import re
import shlex
from pathlib import Path

import pytest

from hfkd.data import load_image_data
from hfkd.models import load_model


ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def snippets(language):
    return re.findall(rf"```{language}\n(.+?)```", README, re.S)


def test_python_snippets_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # The demo's teacher takes a minute to train; one whose head was moved stands in for it.
    teacher = load_model("resnet20", label_names=load_image_data("digits").label_names)
    teacher.linear.weight.data.mul_(3)
    teacher.save_pretrained("outputs/demo/teacher")
    found = snippets("python")
    assert len(found) == 3
    names = {}
    for snippet in found:
        shortened = snippet.replace("num_train_epochs=5", "max_steps=2, use_cpu=True")
        exec(compile(shortened, "README.md", "exec"), names)
    assert (tmp_path / "outputs/student/model.safetensors").is_file()
    assert (type(names["trainer"].distiller).__name__, names["trainer"].state.global_step) == ("Combined", 2)
    assert names["ConfidentKD"]().temperature == 4.0


def test_own_method_is_the_example():
    example = (ROOT / "examples/custom_distiller.py").read_text()
    method = next(snippet for snippet in snippets("python") if "class ConfidentKD" in snippet)
    assert method[method.index("class ConfidentKD") :].strip() in example


def test_commands_name_what_exists():
    commands = [
        shlex.split(line, comments=True)
        for block in snippets("bash")
        for line in block.replace("\\\n", "").splitlines()
    ]
    makefile = (ROOT / "Makefile").read_text()
    for words in filter(None, commands):
        if words[0] == "make":
            assert f"\n{words[1]}:" in makefile
        for word in words:
            if word.endswith(".py"):
                assert (ROOT / word).is_file()


@pytest.mark.parametrize("script", ["run_image_kd", "run_glue_kd"])
def test_flags_in_the_readme_exist(script, monkeypatch):
    import importlib
    import sys

    from transformers import HfArgumentParser

    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    module = importlib.import_module(script)
    parser = HfArgumentParser((module.ModelArguments, module.DataArguments, module.TrainingArguments))
    for block in snippets("bash"):
        for line in block.replace("\\\n", "").splitlines():
            words = shlex.split(line, comments=True)
            if any(script in word for word in words):
                flags = words[[i for i, word in enumerate(words) if script in word][0] + 1 :]
                parser.parse_args_into_dataclasses(args=flags)
    sys.modules.pop(script)
