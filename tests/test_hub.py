"""From the Hub to the Hub: unmodified clients pull data and teachers, push students, and pull those without hfkd."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from helpers import DATA, tiny
from local_hub import LocalHub, add_datasets
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast, ViTImageProcessor

from hfkd.data import load_tokenizer, processor_for
from hfkd.models import load_model


ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data: neither HFKD_DATA_DIR nor {DATA}")
TOKEN, HOME = "hf_PlantedPlantedPlantedPlanted", "somebodys-own-home"
FLAGS = "--use_cpu --max_train_samples 32 --max_eval_samples 16 --per_device_train_batch_size 16 --report_to none"
SAVE = "--save_strategy steps --eval_strategy steps --save_steps 1 --eval_steps 1 --save_total_limit 2"
IMAGE = f"run_image_kd.py --dataset cifar10 {FLAGS} {SAVE} --disable_tqdm True --augment none"
TEXT = f"run_glue_kd.py --task mrpc --max_length 32 {FLAGS} {SAVE} --disable_tqdm True"
PUSHES = {
    "teacher": f"{IMAGE} --student resnet8 --max_steps 2 --push_to_hub",
    "vit": f"{IMAGE} --teacher me/teacher --teacher_cache True --student other/tiny-vit --max_steps 2 --optim sgd "
    "--push_to_hub --hub_private_repo True --hub_always_push",
    "timm": f"{IMAGE} --teacher me/teacher --student test_efficientnet --student_pretrained False --max_steps 2 "
    "--push_to_hub --hub_strategy end",
    "cifar": f"{IMAGE} --teacher hf-hub:me/timm --student resnet8 --distiller crd --max_steps 4 --save_total_limit 1 "
    "--push_to_hub --hub_strategy checkpoint --hub_always_push",
    "again": f"{IMAGE} --teacher me/vit --student hf-hub:me/timm --max_steps 1 --push_to_hub --hub_strategy end",
    "mrpc": f"{TEXT} --teacher other/bert --student_layers 1 --max_steps 2 "
    "--push_to_hub --hub_strategy all_checkpoints --hub_always_push",
}
FILES = {
    "teacher": {"README.md", "config.json", "model.safetensors", "modeling_cifar.py", "preprocessor_config.json"},
    "vit": {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"},
    "timm": {"README.md", "config.json", "model.safetensors"},
    "again": {"README.md", "config.json", "model.safetensors"},
    "cifar": {"README.md", "config.json", "model.safetensors", "modeling_cifar.py", "preprocessor_config.json"},
    "mrpc": {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"},
}
TO_RESUME = {
    *("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "batch.json", "files.json"),
    *("config.json", "model.safetensors"),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with LocalHub() as hub:
        hub.add_user("me", TOKEN)
        add_datasets(hub, DATA)
        folder = tmp_path_factory.mktemp("others")
        tiny("vit", num_labels=3).save_pretrained(folder / "vit")
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
        vocabulary = DATA / "bert-base-uncased-vocab" / "vocab.txt"
        words = BertTokenizerFast(vocab=str(vocabulary), do_lower_case=True)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        torch.manual_seed(0)
        bert = BertForSequenceClassification(BertConfig(vocab_size=len(words), num_labels=2, **sizes))
        with torch.no_grad():  # as if trained
            bert.classifier.weight.mul_(50)
            bert.classifier.bias.normal_()
        bert.save_pretrained(folder / "bert")
        words.save_pretrained(folder / "bert")
        for name, repo in (("vit", "other/tiny-vit"), ("bert", "other/bert")):
            hub.add_repo("model", repo, folder / name)
        yield hub


def start(hub, home, script, asked):
    """Have a script do what a file asks for; its output, and what the last line says."""
    home.mkdir(parents=True, exist_ok=True)
    path = home / f"{Path(script).stem}.json"
    path.write_text(json.dumps(asked))
    environment = {**hub.environment(home / "hf", TOKEN), "HOME": str(home), "PYTHONPATH": str(ROOT)}
    environment["HFKD_CACHE"] = str(home / "caches")
    done = subprocess.run(
        [sys.executable, str(TESTS / script), str(path)],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr, json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory):
    """The folder of the runs, what they printed, and what they asked the Hub."""
    home = tmp_path_factory.mktemp("runs") / HOME
    commands = [
        [*line.split(), "--output_dir", str(home / name), "--hub_model_id", f"me/{name}", "--hub_token", TOKEN]
        for name, line in PUSHES.items()
    ]
    output, statuses = start(hub, home, "hub_examples.py", commands)
    assert statuses == [0] * len(commands), output
    return home, output, [request for request, status in hub.requests if status < 400]


def figures(hub, repo_id):
    card = hub.repos["model", repo_id].files["README.md"].decode()
    return {path for path in hub.pushed(repo_id) if path.endswith(".png") and path in card}


@pytest.mark.parametrize("name", PUSHES)
def test_a_push_sends_the_student_and_nothing_else(hub, pushed, name):
    sent = hub.pushed(f"me/{name}") - figures(hub, f"me/{name}")
    folders = {"cifar": {"last-checkpoint"}, "mrpc": {"checkpoint-1", "checkpoint-2"}}.get(name, set())
    inside = {path for path in sent if path.split("/")[0] in folders}
    assert sent - inside == FILES[name]
    for folder in folders:
        to_resume = TO_RESUME | FILES[name] - {"README.md"} | ({"distiller.safetensors"} if name == "cifar" else set())
        assert {path.partition("/")[2] for path in inside if path.startswith(f"{folder}/")} == to_resume
    assert (pushed[0] / name / "all_results.json").is_file()  # which stays here
    assert not list(pushed[0].rglob("_push-*"))


@pytest.mark.parametrize("secret", [TOKEN, HOME])
def test_no_push_tells_the_token_or_the_home(hub, pushed, secret):
    assert not hub.holding(secret.encode())
    assert not hub.leaks
    assert TOKEN not in pushed[1]


def test_the_commits_are_those_of_the_strategy(hub, pushed):
    titles = {name: [commit.title for commit in hub.repos["model", f"me/{name}"].commits[1:]] for name in PUSHES}
    steps = [f"Training in progress, step {step}" for step in (1, 2, 3, 4)]
    assert titles["vit"] == [*steps[:2], "End of training"]
    assert titles["timm"] == titles["again"] == ["End of training"]
    assert titles["cifar"] == [*steps, "End of training"]
    assert titles["mrpc"] == [*steps[:2], "End of training"]
    assert hub.repos["model", "me/vit"].private
    assert not hub.repos["model", "me/timm"].private


def test_the_card_that_is_pushed_is_the_one_that_the_run_wrote(hub, pushed):
    for name, task, data in (("vit", "image-classification", "cifar10"), ("mrpc", "text-classification", "mrpc")):
        card = hub.repos["model", f"me/{name}"].files["README.md"]
        assert card == (pushed[0] / name / "README.md").read_bytes()
        assert f"pipeline_tag: {task}" in card.decode()
        assert data in card.decode()
    assert "\n- timm\n" in hub.repos["model", "me/timm"].files["README.md"].decode()


def test_a_stranger_gets_the_answers_of_the_student_here(hub, pushed, tmp_path):
    image = tmp_path / "image.png"
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(image)
    sentences = ["The company posted a profit.", "A profit was posted by the firm."]
    students = {
        f"me/{name}": {
            "task": "text-classification" if name == "mrpc" else "image-classification",
            "code": name in ("teacher", "cifar"),
            "timm": name in ("timm", "again"),
        }
        for name in PUSHES
    }
    asked = {"image": str(image), "sentences": sentences, "students": students}
    _, found = start(hub, tmp_path / "stranger", "hub_stranger.py", asked)
    assert set(found) == set(students)
    for name in PUSHES:
        answers, folder = found[f"me/{name}"], pushed[0] / name
        student = load_model(folder, task=students[f"me/{name}"]["task"])
        if name == "mrpc":
            inputs = load_tokenizer(folder)(*sentences, return_tensors="pt")
        else:
            inputs = processor_for(student, folder)(PIL.Image.open(image), return_tensors="pt")
        with torch.no_grad():
            logits = student(**inputs).logits[0]
        torch.testing.assert_close(torch.tensor(answers["logits"]), logits)
        expected = dict(zip(student.config.id2label.values(), logits.softmax(-1).tolist(), strict=True))
        assert answers["pipeline"] == pytest.approx(expected, abs=1e-5)
        if name in ("timm", "again"):
            torch.testing.assert_close(torch.tensor(answers["timm"]), logits)


def test_a_run_resumes_from_the_checkpoint_that_was_pushed(hub, pushed, tmp_path):
    """Of step 2, as of a machine that was lost then: it ends with the weights of the run that was not."""
    commit = next(c for c in hub.repos["model", "me/cifar"].commits if c.title.endswith("step 2"))
    line = re.sub(r"--push_to_hub.*", "", PUSHES["cifar"]).split()
    checkpoint = tmp_path / "pulled" / "last-checkpoint"
    output, statuses = start(
        hub,
        tmp_path / "elsewhere",
        "hub_examples.py",
        [
            ["pull", "me/cifar", commit.oid, str(tmp_path / "pulled")],
            [*line, "--output_dir", str(tmp_path / "again"), "--resume_from_checkpoint", str(checkpoint)],
        ],
    )
    assert statuses == [0, 0], output
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert (tmp_path / "again" / "checkpoint-4").is_dir()
    assert not (tmp_path / "again" / "checkpoint-2").exists()
    one, other = (load_model(folder).state_dict() for folder in (pushed[0] / "cifar", tmp_path / "again"))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=0)


# Faults


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What hub_faults.py found, by scenario."""
    folder = tmp_path_factory.mktemp("faults")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, str(TESTS / "hub_faults.py"), str(folder), str(DATA)],
        env={**kept, "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)]), "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


UNKNOWN = "ValueError: cannot load '{}': .* and as a Hub id it could not be read: "
NO_REPO = r"there is no such repository, or it is private \({}\): correct the name, or log in .*`hf auth login`"
NO_DATA = (
    "FileNotFoundError: the Hub has no data set {} that can be read .*: correct its name, log in where it is private"
)
NO_TOKEN = r"the token is not accepted \(401\): log in again \(`hf auth login`, or HF_TOKEN\), or correct hub_token"
NO_RIGHT = r"the token may not do that \(403\): take one with that right \(hf.co/settings/tokens\)"
TOO_MANY = r"too many requests \(429\): wait some minutes, and log in"
TROUBLE = r"the Hub is in trouble \(503\): try again later"
BROKEN = "http://127.0.0.1:[0-9]+ cannot be reached, or breaks off: check the network, the proxy and HF_ENDPOINT"
DATA_SET = "cannot load other/public-data from the Hub .you may pass its folder as data_dir.: "
MESSAGES = {
    "model: wrong id": UNKNOWN.format("me/nothing") + NO_REPO.format(404),
    "model: wrong id, not logged in": UNKNOWN.format("me/nothing") + NO_REPO.format(401),
    "model: private": UNKNOWN.format("other/private") + NO_REPO.format(404),
    "model: gated": UNKNOWN.format("other/gated") + r"it is gated \(403\): ask for access on its page, and log in",
    "model: wrong token": UNKNOWN.format("other/public") + NO_TOKEN,
    "model: 403": UNKNOWN.format("other/public") + NO_RIGHT,
    "model: 429": UNKNOWN.format("other/public") + TOO_MANY,
    "model: 503": UNKNOWN.format("other/public") + TROUBLE,
    "model: breaks off": UNKNOWN.format("other/public") + BROKEN,
    "model: no such revision": UNKNOWN.format("other/public") + r"it has no such branch, tag or commit \(404\)",
    "model: no model": "ValueError: cannot load 'other/empty' for image-classification .*: name a model of that kind",
    "hub gone": UNKNOWN.format("other/public") + BROKEN,
    "tokenizer: 429": rf"ValueError: no tokenizer in 'other/public' \({TOO_MANY}",
    "data: wrong id": NO_DATA.format("me/nothing"),
    "data: wrong id, not logged in": NO_DATA.format("me/nothing"),
    "data: private": NO_DATA.format("other/private-data"),
    "data: gated": "FileNotFoundError: .*other/gated-data' is a gated dataset on the Hub. Visit .* to ask for access",
    "data: wrong token": f"PermissionError: {DATA_SET}{NO_TOKEN}",
    "data: 403": f"PermissionError: {DATA_SET}{NO_RIGHT}",
    "data: 429": f"ConnectionError: {DATA_SET}{TOO_MANY}",
    "data: 503": f"ConnectionError: {DATA_SET}{TROUBLE}",
    "data: breaks off": f"ConnectionError: {DATA_SET}{BROKEN}",
    "push: wrong token": f"PermissionError: cannot push to me/a: {NO_TOKEN}",
    "push: reader's token": f"PermissionError: cannot push to me/a: {NO_RIGHT}",
    "push: name of others": f"PermissionError: cannot push to other/a: {NO_RIGHT}",
    "push: 503 at the start": f"ConnectionError: cannot push to me/a: {TROUBLE}",
}


@pytest.mark.parametrize("scenario", MESSAGES)
def test_every_refusal_names_its_remedy(said, scenario):
    assert re.match(MESSAGES[scenario], said[scenario], re.S)


def test_slow_and_interrupted_downloads_are_tried_again(said):
    assert said["model: too slow"] == "ViTForImageClassification"
    assert said["model: breaks off once"] == "the weights are those that are there"
    assert said["data: too slow"] == said["data: breaks off once"] == "86"  # of 96 rows 10 are for validation


def test_a_push_that_fails_is_tried_again_or_reported_and_the_student_is_safe(said):
    safe = r"ConnectionError: the student is not pushed to me/push, and lies whole in .*run\d+: "
    for step in ("upload", "commit"):
        assert re.match(safe + TROUBLE, said[f"push: 503 at {step}"])
        assert said[f"saved at {step}"] is True
    # huggingface_hub tries an upload again; not a commit, which may have arrived.
    assert said["push: 503 once at upload"].startswith("http://127.0.0.1")
    assert said["waits at upload"] == 1
    assert re.match(safe + TROUBLE, said["push: 503 once at commit"])
    assert re.match(safe + TOO_MANY, said["push: 429"])
    assert re.match(safe + BROKEN, said["push: breaks off"])
    for later in ("push: after all", "push: in the background"):
        assert said[later].startswith("http://127.0.0.1")
    assert said["pushed after all"] is True


def test_a_push_that_fails_while_training_goes_on_is_a_warning(said):
    assert said["steps: 503"] == "3"
    assert said["checkpoints"] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert said["titles"] == ["Training in progress, step 3"]
    assert len(said["warned"]) == 2
    for text in said["warned"]:
        assert re.match(f"a push to me/steps failed .{TROUBLE}.; training goes on, the checkpoint is in", text)


def test_of_an_adapter_the_adapter_is_pushed(said):
    words = ["tokenizer.json", "tokenizer_config.json"]
    assert said["files of an adapter"] == ["README.md", "adapter_config.json", "adapter_model.safetensors", *words]


def test_no_checkpoint_is_pushed_while_a_push_is_under_way(said):
    assert said["steps: slow"] == "3"
    assert said["titles of busy"] == ["Training in progress, step 1"]


def test_data_teachers_and_students_are_pulled_by_their_ids(hub, pushed, said):
    """Private ones too, with the token, and timm's; SVHN in ``hub_faults.py``, between two faults."""
    asked = "\n".join(pushed[2])
    models = ("me/teacher", "me/vit", "me/timm", "other/tiny-vit", "other/bert")
    for place in ("datasets/uoft-cs/cifar10", "datasets/nyu-mll/glue", *models):
        assert f"GET /{place}/resolve" in asked or f"HEAD /{place}/resolve" in asked
    assert hub.repos["model", "me/vit"].private
    assert said["data: breaks off once"] == "86"
    for name, classes in (("teacher", "airplane"), ("mrpc", "not_equivalent")):
        config = json.loads(hub.repos["model", f"me/{name}"].files["config.json"])
        assert config["id2label"]["0"] == classes
