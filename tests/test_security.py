"""What comes from elsewhere runs no code, reads and writes no file elsewhere, and what goes out tells no secret."""

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
import yaml
from helpers import Weighted, make_trainer, rows, tiny, tiny_teacher
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig

import hfkd.cli
from hfkd.cache import MANIFEST, TeacherCache
from hfkd.checkpoints import FILES_NAME
from hfkd.data import load_text_data
from hfkd.data.processors import processor_for
from hfkd.distillers import KD
from hfkd.modelcard import base_without_home
from hfkd.models import load_model, load_teacher
from hfkd.saving import DISTILLER_NAME


ROOT = Path(__file__).resolve().parents[1]

# The code itself

MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "subprocess", "pty"}
CALLS = {
    *("eval", "exec", "compile", "__import__", "import_module", "system", "popen", "mktemp", "load_module"),
    *("torch.load", "torch.save", "hub.load", "jit.load", "read_pickle", "to_pickle", "unsafe_load", "full_load"),
    *("execv", "execve", "execvp", "spawnl", "spawnv", "fork", "yaml.load_all", "Unpickler", "set_default_loader"),
}
KEYWORDS = {"allow_pickle": True, "weights_only": False, "trust_remote_code": True, "shell": True}
# A benchmark evaluates its own command line, whose author may run anything here anyway, and starts its opponents.
ALLOWED = {
    ("benchmarks/method_cost.py", "eval"),
    ("benchmarks/run.py", "subprocess"),
    ("benchmarks/measure.py", "subprocess"),
}


def forbidden(source: str) -> list[str]:
    """What a text of Python uses of what is listed above."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [name for alias in node.names if (name := alias.name.partition(".")[0]) in MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [name for name in [(node.module or "").partition(".")[0]] if name in MODULES]
            found += [alias.name for alias in node.names if f"{node.module}.{alias.name}" in CALLS]
        elif isinstance(node, ast.Call):
            parts = ast.unparse(node.func).split(".")
            name, last = ".".join(parts[-2:]), parts[-1]
            called = {name, last} & CALLS
            if isinstance(node.func, ast.Attribute):  # model.eval(), re.compile()
                called -= {"eval", "exec", "compile"}
            found += sorted(called)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            found += [key for key, value in KEYWORDS.items() if given.get(key) == str(value)]
            if name == "yaml.load" and given.get("Loader") != "_Loader":
                found.append("yaml.load")
            is_auto = len(parts) > 1 and parts[-2].startswith("Auto") or parts[0] == "auto_class"
            if is_auto and last in ("from_pretrained", "from_config") and not {"trust_remote_code", None} & {*given}:
                found.append("asks whether to run code")  # as transformers does where nothing is said
    return list(dict.fromkeys(found))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import pickle", "pickle"),
        ("from joblib import load", "joblib"),
        ("torch.load(path, weights_only=True)", "torch.load"),
        ("from torch import load", "load"),
        ("np.load(path, allow_pickle=True)", "allow_pickle"),
        ("yaml.load(text, Loader=yaml.Loader)", "yaml.load"),
        ("yaml.load(text, yaml.Loader)", "yaml.load"),
        ("eval(word)", "eval"),
        ("os.system(word)", "system"),
        ("run(word, shell=True)", "shell"),
        ("tempfile.mktemp()", "mktemp"),
        ("AutoModel.from_pretrained(name, trust_remote_code=True)", "trust_remote_code"),
        ("AutoTokenizer.from_pretrained(name)", "asks whether to run code"),
    ],
)
def test_what_is_forbidden_is_found(source, name):
    assert name in forbidden(source)
    assert not forbidden("model.eval()\nre.compile(word)\nload_file(path)\nyaml.load(text, Loader=_Loader)")


def test_nothing_here_can_run_what_it_reads():
    files = [path for folder in ("hfkd", "examples", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 50
    found = {(str(p.relative_to(ROOT)), name) for p in files for name in forbidden(p.read_text(encoding="utf-8"))}
    assert found == {("scripts/compare_distillers.py", "subprocess")}  # which starts its runs
    benchmarks = sorted((ROOT / "benchmarks").glob("*.py"))
    found = {(str(p.relative_to(ROOT)), name) for p in benchmarks for name in forbidden(p.read_text(encoding="utf-8"))}
    assert {entry for entry in found if entry[1] != "asks whether to run code"} == ALLOWED
    assert issubclass(hfkd.cli._Loader, yaml.SafeLoader)


# Pickles


class Payload:
    """Makes a folder where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def ran(tmp_path):
    """Where a payload would leave its mark; and that it would."""
    control = tmp_path / "control"
    pickle.loads(pickle.dumps(Payload(control)))
    torch.save(Payload(tmp_path / "again"), tmp_path / "control.pt")
    torch.load(tmp_path / "control.pt", weights_only=False)
    assert control.is_dir()
    assert (tmp_path / "again").is_dir()
    return tmp_path / "ran"


def plant(path, mark, *, raw=False):
    path.write_bytes(pickle.dumps(Payload(mark))) if raw else torch.save(Payload(mark), path)


def student_of(kind):
    student = tiny("bert")
    if kind == "adapter":
        student = get_peft_model(student, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    return student


def training(folder, kind="whole"):
    return make_trainer(
        folder,
        student_of(kind),
        tiny_teacher("bert"),
        Weighted(),
        rows("bert"),
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
    )


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    for kind in ("whole", "adapter"):
        training(folder / kind, kind).train()
    return folder


@pytest.mark.parametrize("raw", [False, True], ids=["torch", "raw"])
@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("optimizer.pt", "Weights only"),
        ("scheduler.pt", "Weights only"),
        ("rng_state.pth", "Weights only"),
        (DISTILLER_NAME, "is damaged, or of another method"),
        ("model.safetensors", "header|[Ss]afetensor"),
        ("training_args.bin", None),
        ("pytorch_model.bin", None),
        ("pytorch_model_fsdp.bin", None),
        ("only pytorch_model.bin", "holds its weights as a pickle alone"),
    ],
)
def test_a_pickle_in_a_checkpoint_does_not_run(tmp_path, checkpoints, ran, name, error, raw):
    checkpoint = tmp_path / "checkpoint-1"
    shutil.copytree(checkpoints / "whole" / "checkpoint-1", checkpoint)
    (checkpoint / FILES_NAME).unlink()  # by which a file of another size is known
    if name.startswith("only"):
        (checkpoint / "model.safetensors").unlink()
    plant(checkpoint / name.removeprefix("only "), ran, raw=raw)
    trainer = training(tmp_path / "out")
    if error is None:
        trainer.train(resume_from_checkpoint=str(checkpoint))  # which nobody reads
    else:
        with pytest.raises(Exception, match=error):  # torch's own for what transformers reads
            trainer.train(resume_from_checkpoint=str(checkpoint))
    assert not ran.exists()


def test_a_pickle_in_an_adapters_checkpoint_does_not_run(tmp_path, checkpoints, ran):
    checkpoint = tmp_path / "checkpoint-1"
    shutil.copytree(checkpoints / "adapter" / "checkpoint-1", checkpoint)
    (checkpoint / FILES_NAME).unlink()
    (checkpoint / "adapter_model.safetensors").unlink()
    plant(checkpoint / "adapter_model.bin", ran)
    with pytest.raises(ValueError, match="as a pickle alone .adapter_model.bin.*ask for safetensors"):
        training(tmp_path / "out", "adapter").train(resume_from_checkpoint=str(checkpoint))
    assert not ran.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("may_wait", [False, True])
def test_a_pickle_for_a_teacher_does_not_run(tmp_path, ran, name, may_wait):
    folder = tmp_path / "teacher"
    tiny_teacher("bert").save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    plant(folder / name, ran)
    with pytest.raises(ValueError, match="as a pickle alone|cannot load .*header"):
        load_teacher(folder, task="text-classification", may_wait=may_wait)
    assert not ran.exists()
    with pytest.raises(ValueError, match="as a pickle alone|cannot load .*header"):
        make_trainer(tmp_path / "out", tiny("bert"), str(folder), KD(), rows("bert"))


# Code beside the weights


@pytest.fixture
def with_code(tmp_path, monkeypatch):
    """A model folder whose modelling code makes a folder when it is imported."""

    def ask(*_):
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder, mark = tmp_path / "model", tmp_path / "ran"
    tiny_teacher("bert").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    maps = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": maps}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"auto_map": {"AutoImageProcessor": "evil.P"}}))
    (folder / "evil.py").write_text(
        f"import os\nos.mkdir({str(mark)!r})\nfrom transformers import BertConfig\n"
        "class Config(BertConfig):\n    model_type = 'evil'\nP = Model = Config\n"
    )
    return folder, mark


@pytest.mark.parametrize(
    "load",
    [
        lambda folder: load_model(folder, task="text-classification"),
        lambda folder: load_teacher(folder, task="text-classification"),
        lambda folder: load_teacher(folder, task="text-classification", may_wait=True),
        lambda folder: processor_for(tiny("vit"), folder),
    ],
)
def test_code_beside_the_weights_does_not_run(with_code, load):
    folder, mark = with_code
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(folder)
    assert not mark.exists()


def test_code_beside_the_weights_runs_where_it_is_trusted(with_code):
    folder, mark = with_code
    AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert mark.is_dir()


# Names and paths


@pytest.mark.parametrize(
    "name", ["../../nowhere", "/etc/nowhere", "a/b/c", "a//b", "nowhere/..", "me/model\n", "me/a--b"]
)
def test_what_is_no_hub_id_is_refused(name):
    with pytest.raises(ValueError, match="cannot load .*no local folder, and as a Hub id it could not be read"):
        load_model(name, task="text-classification")
    with pytest.raises(ValueError, match="(?i)repo.id|unknown task"):
        load_text_data(name)


@pytest.mark.parametrize("revision", ["../../x", "/etc", "a/../../b"])
def test_a_revision_stays_in_the_hubs_cache(revision):
    with pytest.raises(ValueError, match="must be a branch, tag or commit"):
        load_model("someone/something", task="text-classification", revision=revision)


def test_a_url_is_refused_without_what_it_holds():
    for load in (lambda name: load_model(name, num_labels=2), load_text_data):
        with pytest.raises(ValueError, match="a URL is no Hub id") as error:
            load("https://me:hf_secret@huggingface.co/me/model")
        assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "named", ["../outside/model.safetensors", "/etc/x.safetensors", "../../outside", 7, "pytorch_model.bin", "a/../b"]
)
def test_an_index_of_shards_names_files_beside_it(tmp_path, named):
    """safetensors elsewhere, too, are none of this folder's business."""
    folder, outside = tmp_path / "teacher", tmp_path / "outside"
    for path in (folder, outside):
        tiny_teacher("bert").save_pretrained(path, max_shard_size="5KB")
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    load_teacher(folder, task="text-classification")
    table["weight_map"]["classifier.weight"] = named
    index.write_text(json.dumps(table))
    for may_wait in (False, True):
        with pytest.raises(ValueError, match="may only name .safetensors files beside it"):
            load_teacher(folder, task="text-classification", may_wait=may_wait)


def cache(folder, **options):
    arguments = {"classes": 3, "folder": folder, **options}
    return TeacherCache(None, np.arange(4), {"precision": "float32", "dtype": "float32"}, **arguments)


@pytest.mark.parametrize("name", ["logits", "logits.checksums", MANIFEST, f"{MANIFEST}.part"])
@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder"])
def test_a_caches_files_are_plain_files(tmp_path, name, kind):
    """A link would have us write to a file elsewhere, and a pipe wait for ever."""
    folder, victim = tmp_path / "cache", tmp_path / "victim"
    cache(folder)
    if name.endswith(".part"):
        (folder / MANIFEST).unlink()
        (folder / "logits").unlink()
    else:
        (folder / name).unlink()
    if kind == "link":
        victim.write_text("mine")
    if kind in ("link", "dangling"):
        (folder / name).symlink_to(victim)
    else:
        os.mkfifo(folder / name) if kind == "pipe" else (folder / name).mkdir()
    with pytest.raises(ValueError, match="is a link, a folder or a device, and a cache has plain files: delete"):
        cache(folder)
    assert victim.read_text() == "mine" if kind == "link" else not victim.exists()


def test_a_layers_name_is_no_path(tmp_path):
    layers = ["../../x", "/etc/x", "a/b:input", "layer.0:input", "layer.0.input"]
    cache(tmp_path / "cache", features=dict.fromkeys(layers, 2))
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}
    assert (tmp_path / "cache" / "features.layer.0%3Ainput").is_file()
    assert len(list((tmp_path / "cache").glob("features.*"))) == 2 * len(layers)


def test_the_best_checkpoint_lies_beside_the_one_that_is_resumed(tmp_path, checkpoints):
    """Whatever path its state names."""
    shutil.copytree(checkpoints / "whole", tmp_path / "run")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(checkpoints / "whole" / "checkpoint-1", elsewhere)
    path = tmp_path / "run" / "checkpoint-1" / "trainer_state.json"
    assert json.loads(path.read_text())["best_model_checkpoint"] is None
    for step, expected in ((1, str(tmp_path / "run" / "checkpoint-1")), (None, None), ("../../elsewhere", None)):
        state = {**json.loads(path.read_text()), "best_model_checkpoint": str(elsewhere), "best_global_step": step}
        path.write_text(json.dumps(state))
        trainer = training(tmp_path / "run")
        trainer.args.max_steps, trainer.args.save_strategy = 1, transformers.trainer_utils.SaveStrategy.NO
        trainer.train(resume_from_checkpoint=str(path.parent))
        assert trainer.state.best_model_checkpoint == expected


# Secrets


def test_neither_a_token_nor_the_home_is_written_or_logged(tmp_path):
    token, home = "hf_PlantedPlantedPlantedPlanted", tmp_path / "somebodys-own-home"
    (home / "work").mkdir(parents=True)
    place = home / ".cache" / "huggingface" / "token"
    place.parent.mkdir(parents=True)
    place.write_text(token)
    environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    environment |= {"HOME": str(home), "HF_TOKEN": token, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "planted_token.py"],
        env=environment,
        cwd=home / "work",
        capture_output=True,
        text=True,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "refused: a URL is no Hub id" in output
    assert "Saving model checkpoint to verbose" in output  # what transformers logs at INFO was logged
    place.unlink()
    written = {path.relative_to(home): path.read_bytes() for path in home.rglob("*") if path.is_file()}
    names = {path.name for path in written}
    expected = {"README.md", "all_results.json", "trainer_state.json", "config.json", "adapter_config.json", MANIFEST}
    assert {*expected, DISTILLER_NAME, "optimizer.pt", "tokenizer_config.json", "epoch-000.parquet"} <= names
    for secret in (token, home.name):
        assert not [path for path, content in written.items() if secret.encode() in content]
        assert secret not in output, secret
    config = json.loads(written[Path("work/quiet/adapter/adapter_config.json")])
    assert config["base_model_name_or_path"] == "quiet/start"  # from the working folder it loads as before


@pytest.mark.parametrize(
    ("home", "working", "saved"),
    [
        ("/root", "{folder}", "outputs/groot-base"),
        ("/", "{folder}", "outputs/groot-base"),
        ("{folder}", "/", "groot-base"),
        ("{folder}/out", "/", "{folder}/outputs/groot-base"),
    ],
)
def test_an_adapters_base_keeps_its_path_where_that_tells_no_home(tmp_path, monkeypatch, home, working, saved):
    home, working, saved = (path.format(folder=tmp_path) for path in (home, working, saved))
    tiny("bert").save_pretrained(tmp_path / "outputs" / "groot-base")
    base = type(tiny("bert")).from_pretrained(tmp_path / "outputs" / "groot-base")
    student = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    monkeypatch.setenv("HOME", home)
    monkeypatch.chdir(working)
    with base_without_home(student):
        assert student.peft_config["default"].base_model_name_or_path == saved.removeprefix("/")


def test_the_safetensors_of_a_checkpoint_are_all_there_is_of_models(checkpoints):
    """The pickles that remain are transformers' own, which it reads with weights_only=True (SECURITY.md)."""
    for kind in ("whole", "adapter"):
        names = {path.name for path in (checkpoints / kind / "checkpoint-1").iterdir()}
        rest = {name for name in names if not name.endswith((".safetensors", ".json", ".md", ".jinja", ".txt"))}
        assert rest == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
        safetensors.torch.load_file(checkpoints / kind / "checkpoint-1" / DISTILLER_NAME)
