"""examples/space/app.py, started as a Space starts it and clicked through in Chromium."""

import importlib.util
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import gradio
import huggingface_hub
import numpy as np
import PIL.Image
import pytest
import torch
from helpers import named, tiny, tiny_teacher, tokenizer
from transformers import AutoTokenizer, ViTImageProcessor


ROOT = Path(__file__).resolve().parents[1]
SPACE = ROOT / "examples" / "space"
NAMES = ["ant", "bee", "cat", "dog", "<b>elk</b>"]
SHUFFLED = ["cat", "dog", "<b>elk</b>", "ant", "bee"]
FLAGS = "TEACHER", "STUDENT", "PAIR", "TRUST_REMOTE_CODE"


def command(**variables):
    """The app without hfkd on its path, and with nothing to reach."""
    environment = {name: value for name, value in os.environ.items() if name not in FLAGS}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **variables}
    return {"args": [sys.executable, str(SPACE / "app.py")], "env": environment, "cwd": SPACE, "text": True}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Start the app with these variables; its address."""
    running = []

    def go(**variables):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        scratch = tmp_path_factory.mktemp("app")
        folders = {"GRADIO_TEMP_DIR": str(scratch / "uploads"), "HF_MODULES_CACHE": str(scratch / "modules")}
        log = open(scratch / "log.txt", "w+")
        process = subprocess.Popen(
            **command(GRADIO_SERVER_PORT=str(port), **folders, **variables), stdout=log, stderr=subprocess.STDOUT
        )
        running.append((process, log))
        for _ in range(600):
            assert process.poll() is None, Path(log.name).read_text()
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.2)
        return f"http://127.0.0.1:{port}", Path(log.name)

    yield go
    for process, log in running:
        process.terminate()
        process.wait(timeout=30)
        log.close()


@pytest.fixture(scope="module")
def images(tmp_path_factory, start):
    """A ViT teaches a CIFAR net, which brings its own code and has the classes in another order."""
    folder = tmp_path_factory.mktemp("images")
    teacher, student = named(tiny_teacher("vit"), NAMES), named(tiny("cifar"), SHUFFLED)
    processors = {
        "teacher": ViTImageProcessor(size={"height": 16, "width": 16}),
        "student": ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.4] * 3),
    }
    for name, model in {"teacher": teacher, "student": student}.items():
        model.save_pretrained(folder / name)
        processors[name].save_pretrained(folder / name)
    picture = folder / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 4), np.uint8)
    PIL.Image.fromarray(pixels, "RGBA").save(picture)
    variables = {name.upper(): str(folder / name) for name in processors}
    address, log = start(TRUST_REMOTE_CODE="1", **variables)
    return {"address": address, "log": log, "folder": folder, "picture": picture} | {
        name: (model.eval(), processors[name]) for name, model in (("teacher", teacher), ("student", student))
    }


def probabilities(model, inputs):
    with torch.no_grad():
        return dict(zip(model.config.id2label.values(), model(**inputs).logits.softmax(-1)[0].tolist(), strict=True))


def shown(page):
    """Class to the two percentages on the page."""
    rows = page.locator("#comparison table").nth(1).locator("tbody tr")
    texts = [[cell.inner_text() for cell in row.locator("th, td").all()] for row in rows.all()]
    return {name: (float(one.split()[0]), float(other.split()[0])) for name, one, other in texts}


def facts(page):
    rows = page.locator("#comparison table").nth(0).locator("tbody tr").all()
    return {row.locator("th").inner_text(): [cell.inner_text() for cell in row.locator("td").all()] for row in rows}


def check(page, teacher, student):
    """The page says of two distributions what they are."""
    page.locator("#comparison .verdict").wait_for()
    found = shown(page)
    assert set(found) == set(teacher)
    for name, (one, other) in found.items():
        assert one == pytest.approx(100 * teacher[name], abs=0.06)
        assert other == pytest.approx(100 * student[name], abs=0.06)
    assert [one for one, _ in found.values()] == sorted((one for one, _ in found.values()), reverse=True)
    answers = [max(scores, key=scores.get) for scores in (teacher, student)]
    assert facts(page)["Answer"] == answers
    verdict = "✓ Same answer" if answers[0] == answers[1] else "✗ Different answers"
    assert page.locator("#comparison .verdict").inner_text() == verdict
    distance = sum(abs(teacher[name] - student[name]) for name in teacher) / 2
    note = page.locator("#comparison .note").first.inner_text()
    assert float(re.search(r"total variation distance ([\d.]+);", note)[1]) == pytest.approx(distance, abs=6e-4)
    assert float(re.match(r"([\d.]+) %", note)[1]) == pytest.approx(100 * distance, abs=0.06)
    return answers


def screenshots(page, name):
    """Kept where HFKD_SCREENSHOTS says."""
    folder = os.environ.get("HFKD_SCREENSHOTS")
    for width in (1200, 390):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        if folder:
            page.screenshot(path=f"{folder}/{name}-{width}.png", full_page=True)


def test_an_image_is_answered_by_both_and_compared(images, page):
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(images["address"])
    page.get_by_role("button", name="Compare").wait_for()
    screenshots(page, "image-before")
    page.locator("input[type=file]").set_input_files(images["picture"])
    page.locator("img[src*=picture]").wait_for()
    page.get_by_role("button", name="Compare").click()
    content = PIL.Image.open(images["picture"]).convert("RGB")
    expected = []
    for name in ("teacher", "student"):
        model, processor = images[name]
        expected.append(probabilities(model, processor(content, return_tensors="pt")))
    check(page, *expected)
    counts = [sum(p.numel() for p in images[name][0].parameters()) for name in ("teacher", "student")]
    one, other = facts(page)["Parameters"]
    assert one == f"{counts[0]:,}"
    assert other == f"{counts[1]:,}\n{counts[1] / counts[0]:.1f} times more"
    latency = facts(page)["Latency"]
    assert all(re.match(r"[\d.]+ ms", text) for text in latency)
    assert "median of 5 in turn, on the CPU (threads: 1)" in page.locator("#comparison .note").last.inner_text()
    screenshots(page, "image")
    elsewhere = [url for url in requests if not url.startswith((images["address"], "data:", "blob:"))]
    assert not elsewhere


def test_bad_images_get_a_message_and_the_app_goes_on(images, page):
    page.goto(images["address"])
    message = page.get_by_role("alert").and_(page.locator("#comparison .refused"))
    button = page.get_by_role("button", name="Compare")
    button.click()
    message.filter(has_text="No image yet: choose one above.").wait_for()

    folder = images["folder"]
    (folder / "text.png").write_text("not an image")
    (folder / "cut.png").write_bytes(images["picture"].read_bytes()[:1000])
    PIL.Image.new("1", (9000, 9000)).save(folder / "huge.png")
    PIL.Image.new("1", (20000, 20000)).save(folder / "bomb.png")
    expected = {
        "text.png": "This file is not an image",
        "cut.png": "This image is damaged or cut off",
        "huge.png": "This image has 9000 × 9000 pixels, and at most 50 million are read",
        "bomb.png": "far too many pixels",
    }
    for name, text in expected.items():
        page.goto(images["address"])
        page.locator("input[type=file]").set_input_files(folder / name)
        page.locator(f"img[src*={name.partition('.')[0]}]").wait_for(state="attached")
        button.click()
        message.filter(has_text=text).wait_for()
    screenshots(page, "image-refused")
    page.goto(images["address"])
    page.locator("input[type=file]").set_input_files(images["picture"])
    page.locator("img[src*=picture]").wait_for()
    button.click()
    page.locator("#comparison .verdict").wait_for()
    assert "Traceback" not in images["log"].read_text()


def test_two_sentences_are_answered_as_a_pair(start, page, tmp_path):
    models = {"teacher": named(tiny_teacher("bert"), NAMES), "student": named(tiny("distilbert", seed=1), NAMES)}
    for name, model in models.items():
        model.eval().save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    address, log = start(PAIR="1", TEACHER=str(tmp_path / "teacher"), STUDENT=str(tmp_path / "student"))
    page.goto(address)
    button = page.get_by_role("button", name="Compare")
    page.get_by_label("First sentence").fill("4 8 25 36")
    button.click()
    message = page.locator("#comparison .refused")
    message.filter(has_text="The second sentence is empty: type something first.").wait_for()
    page.get_by_label("Second sentence").fill("23 42 57")
    button.click()
    texts = AutoTokenizer.from_pretrained(tmp_path / "teacher")("4 8 25 36", "23 42 57", return_tensors="pt")
    inputs = [dict(texts), {name: texts[name] for name in ("input_ids", "attention_mask")}]
    check(page, *(probabilities(model, content) for model, content in zip(models.values(), inputs, strict=True)))
    screenshots(page, "text")
    for length, text in ((10_001, "This text has 10,001 characters, and at most 10,000 are read"), (400, None)):
        page.get_by_label("Second sentence").fill("7 " * (length // 2) + "7" * (length % 2))
        button.click()
        if text:
            message.filter(has_text=text).wait_for()
        else:
            page.locator("#comparison .verdict").wait_for()
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def app():
    specification = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_models_that_cannot_be_shown_are_refused_at_the_start(app, images, tmp_path, monkeypatch, capsys):
    def refuse(match, *flags):
        monkeypatch.setattr(sys, "argv", ["app.py", *map(str, flags)])
        with pytest.raises(SystemExit) as ended:
            app.main()
        said = f"{ended.value} {capsys.readouterr().err}"
        assert match in " ".join(said.split())

    for name in FLAGS:
        monkeypatch.delenv(name, raising=False)
    teacher = images["folder"] / "teacher"
    refuse("name two models: TEACHER and STUDENT")
    refuse("name a Hub id, or a folder that save_pretrained wrote", "--teacher", tmp_path, "--student", teacher)
    named(tiny("bert"), NAMES).save_pretrained(tmp_path / "text")
    tokenizer().save_pretrained(tmp_path / "text")
    refuse("the teacher reads images and the student texts", "--teacher", teacher, "--student", tmp_path / "text")
    named(tiny("vit"), [*NAMES[:4], "fly"]).save_pretrained(tmp_path / "other")
    images["teacher"][1].save_pretrained(tmp_path / "other")
    refuse("do not have the same classes", "--teacher", teacher, "--student", tmp_path / "other")


def test_code_that_comes_with_a_model_is_not_run_unasked(images):
    folder = images["folder"]
    words = command(TEACHER=str(folder / "teacher"), STUDENT=str(folder / "student"))
    done = subprocess.run(**words, capture_output=True, timeout=120)
    assert done.returncode == 1
    assert "it comes with code of its own, which is not run): set TRUST_REMOTE_CODE=1" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_space_is_described_as_the_hub_wants_it():
    card = huggingface_hub.RepoCard.load(SPACE / "README.md", repo_type="space").data.to_dict()
    assert {"title", "emoji", "colorFrom", "colorTo", "short_description"} <= set(card)
    assert card["sdk"] == "gradio"
    assert (SPACE / card["app_file"]).is_file()
    assert card["sdk_version"].partition(".")[0] == gradio.__version__.partition(".")[0]
    assert len(card["short_description"]) <= 60
    text = (SPACE / "README.md").read_text()
    assert set(re.findall(r"^\| `([A-Z_]+)` \|", text, re.M)) == set(FLAGS)
    source = (SPACE / "app.py").read_text()
    assert all(f'variable("{name}")' in source for name in FLAGS)
    used = set(re.findall(r"^(?:import|from) (torch|transformers|PIL|gradio|hfkd)", source, re.M))
    assert used == {"torch", "transformers", "PIL", "gradio"}
