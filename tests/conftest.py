"""What every test gets: the folder of ``helpers`` on the path, cheap garbage collection, two-process results."""

import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock


# No test asks the real Hub, and out of reach each try is slow.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
TESTS = Path(__file__).parent
collect_ignore = ["planted_token.py", "hub_stranger.py", "hub_faults.py", "tracked_run.py"]  # scripts
sys.path.insert(0, str(TESTS))
torch.set_num_threads(1)  # the models are tiny, and several workers share the cores


def pytest_collection_finish(session):
    # Every train() collects garbage; looking through what the imports left takes seven times as long as a tiny run.
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config):
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory):
    """Nothing is kept in the home of whoever runs the tests."""
    os.environ["HFKD_CACHE"] = str(tmp_path_factory.mktemp("caches"))


@pytest.fixture
def small_disk(tmp_path):
    """Of a size that the test says; needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def make(kilobytes):
        line = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        if subprocess.run(line, capture_output=True, check=False).returncode:
            pytest.skip("this user may not mount a small disk")
        mounted.append(folder)
        return folder

    yield make
    for disk in mounted:
        # Lazily: after a test that failed a file of it may still be open.
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture(scope="session")
def launch():
    """Run a module of torch or accelerate as a child, on the CPU and away from other workers' ports."""

    def run(*command: object, gpus: str = "") -> subprocess.CompletedProcess:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_", "PYTEST_"))}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": gpus, "HF_HUB_OFFLINE": "1"}
        line = [sys.executable, "-m", *map(str, command)]
        return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600, check=False)

    return run


@pytest.fixture(scope="session")
def two_processes(launch, tmp_path_factory):
    """Results of the scenarios of ``two_processes.py``: ``[name][rank]``; run once, whatever the number of workers."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "two_processes"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            done = launch(
                "torch.distributed.run",
                "--nproc_per_node=2",
                "--rdzv-backend=c10d",
                "--rdzv-endpoint=localhost:0",
                TESTS / "two_processes.py",
                folder,
                "--use_cpu",
            )
            folder.mkdir(exist_ok=True)
            (folder / "output.txt").write_text(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
    output = (folder / "output.txt").read_text()
    assert output.startswith("exit status 0\n"), output
    names = {file.stem.rpartition("-")[0] for file in folder.glob("*.pt")}
    return {name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)] for name in names}


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium, the system's: ``apt install chromium``, or its path in HFKD_CHROMIUM."""
    path = os.environ.get("HFKD_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no Chromium here: apt install chromium, or name one in HFKD_CHROMIUM")
    from playwright.sync_api import sync_playwright

    quiet = ["background-networking", "component-update", "sync", "gpu", "quic"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page of a new profile; the test fails on any error in its console or scripts."""
    context = browser.new_context()
    page, errors = context.new_page(), []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    # When its page is left, Gradio's own script now and then aborts the stream of events that it has open.
    errors = [error for error in errors if not (error.startswith("AbortError: signal") and "/assets/index-" in error)]
    assert not errors, errors
