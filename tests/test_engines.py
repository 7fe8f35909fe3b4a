"""DDP on several nodes and FSDP do what one process does: real launches against the same scenario in this process."""

import json
import os
import re
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import engines as scenarios
import pytest
import safetensors.torch
import torch
from filelock import FileLock
from helpers import assert_identical, largest_difference
from packaging.version import Version
from transformers import AutoModelForImageClassification

from hfkd.saving import DISTILLER_NAME


# Scenarios by launch; for the nodes four processes, two on each.
LAUNCHES = {
    "nodes": ("ddp", 2, ["on_nodes", "resume", "from_others", "batch_norm"]),
    "fsdp": ("fsdp", 2, ["methods", "refused", "resume", "from_others", "more", "half", "batch_norm"]),
    "fsdp_alone": ("fsdp", 1, ["from_others"]),
    "gpu": ("fsdp", 1, ["methods", "resume", "more", "half"]),
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The result of a scenario in this process, which is all there is."""
    done = {}

    def run(name):
        if name not in done:
            done[name] = scenarios.SCENARIOS[name](tmp_path_factory.mktemp(name) / name)
        return done[name]

    return run


def checkpoint_of_others(name, folder, run) -> None:
    """Put a checkpoint that other processes wrote where a launch goes on from it."""
    if name == "fsdp_alone":
        shutil.copytree(run("fsdp") / "resume" / "checkpoint-3", folder / "written" / "checkpoint-3")
    else:
        scenarios.resumable(folder / "written").train()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def launched(launch, tmp_path_factory):
    """The folder of a launch, made once, whatever the number of workers."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def run(name) -> Path:
        if name.startswith("fsdp") and Version(torch.__version__) < Version("2.15"):
            pytest.skip("with torch 2.11 gloo's collectives do not match in saving a sharded checkpoint")
        engine, processes, wanted = LAUNCHES[name]
        folder = root / f"engines-{name}"
        agents = [["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]]
        if name == "nodes":
            meeting = ["--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
            agents = [[*meeting, f"--node-rank={node}"] for node in (0, 1)]
        script = [scenarios.__file__, engine, folder, *wanted]
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0") if name == "gpu" else ""

        def start(agent):
            return launch("torch.distributed.run", f"--nproc-per-node={processes}", *agent, *script, gpus=gpus)

        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                checkpoint_of_others(name, folder, run)
                with ThreadPoolExecutor() as pool:
                    done = list(pool.map(start, agents))
                said = "\n".join(f"exit status {d.returncode}\n{d.stdout}\n{d.stderr}" for d in done)
                (folder / "output.txt").write_text(said)
        said = (folder / "output.txt").read_text()
        assert said.count("exit status 0\n") == len(agents), said
        return folder

    return run


@pytest.fixture(scope="session")
def results(launched):
    """What the processes of a launch made of a scenario, by rank."""

    def load(name, scenario):
        files = sorted(launched(name).glob(f"{scenario}-*.pt"))
        return [torch.load(file, weights_only=True, map_location="cpu") for file in files]

    return load


NODES = [("nodes", "on_nodes", name) for name in scenarios.ON_NODES]
SHARDED = [("fsdp", "methods", name) for name in scenarios.METHODS]
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: FSDP by Accelerate as it comes")
ON_A_GPU = [pytest.param("gpu", "methods", name, marks=on_a_gpu) for name in scenarios.METHODS]
ENGINES = {"nodes": ("MULTI_CPU", 4, False), "fsdp": ("FSDP", 2, True), "gpu": ("FSDP", 1, True)}


@pytest.mark.parametrize(("name", "scenario", "method"), [*NODES, *SHARDED, *ON_A_GPU])
def test_losses_parameters_banks_and_influence_equal_one_process(results, one_process, name, scenario, method):
    """In double precision; what is logged, and influence, is float32."""
    expected = one_process("methods")[method]
    ranks = [result[method] for result in results(name, scenario)]
    engine, processes, is_sharded = ENGINES[name]
    assert len(ranks) == processes
    for result in ranks:
        assert (result["type"], result["processes"], result["sharded"]) == (engine, processes, is_sharded)
        assert_identical(result["state"], ranks[0]["state"])
        assert largest_difference(result["state"], expected["state"]) <= 1e-7
        assert result["logs"].keys() == expected["logs"].keys()
        for key, values in expected["logs"].items():
            assert result["logs"][key] == pytest.approx(values, rel=1e-5, abs=1e-6), key
        assert len(result["influence"]) == len(expected["influence"]) == (2 if method == "KDAIF" else 0)
        for own, other in zip(result["influence"], expected["influence"], strict=True):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-7)


def test_the_equivalence_has_something_to_compare(one_process):
    for name, result in one_process("methods").items():
        assert len(result["logs"]["loss"]) == 3, name
        assert len({round(loss, 3) for loss in result["logs"]["loss"]}) == 3, name
        assert max(result["logs"]["grad_norm"]) > 1, name  # so that clipping has a part in it
    assert one_process("methods")["KDAIF"]["influence"][1].abs().max() > 1e-2


@pytest.mark.parametrize("name", ["nodes", "fsdp", pytest.param("gpu", marks=on_a_gpu)])
def test_resuming_in_mid_epoch_changes_nothing(results, one_process, name):
    expected = one_process("resume")
    for result in results(name, "resume"):
        assert_identical(result["state"], result["resumed"])
        assert result["losses"][0] == result["losses"][1]
        assert largest_difference(result["state"], expected["state"]) <= 1e-7
        assert result["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    assert len({round(loss, 3) for loss in expected["eval_loss"]}) == 2


@pytest.mark.parametrize("name", ["nodes", "fsdp"])
def test_the_student_is_saved_whole_and_under_its_own_names(results, launched, name):
    state = results(name, "resume")[0]["state"]
    folder = launched(name) / "resume"
    for where in (folder, folder / "checkpoint-6"):
        student, info = AutoModelForImageClassification.from_pretrained(
            where, output_loading_info=True, dtype=torch.float64
        )
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert student.config.architectures == ["ViTForImageClassification"]
        own = {f"0.{key}": tensor for key, tensor in student.state_dict().items()}
        assert_identical(own, {key: tensor for key, tensor in state.items() if key.startswith("0.")})
    assert "\nViTForImageClassification with" in (folder / "README.md").read_text(encoding="utf-8")
    saved = safetensors.torch.load_file(folder / "checkpoint-6" / DISTILLER_NAME)
    assert_identical(saved, {key[2:]: tensor for key, tensor in state.items() if key.startswith("1.")})
    assert not [file for file in folder.rglob("*") if "fsdp" in file.name or file.name == "training_args.bin"]


def test_four_processes_go_on_where_one_stopped(results, one_process):
    for result in results("nodes", "from_others"):
        assert largest_difference(result["state"], one_process("resume")["state"]) <= 1e-7
        (warning,) = result["warned"]
        assert "was written by 1 processes, and 4 go on" in warning


def test_one_process_goes_on_where_four_stopped(launched, one_process, tmp_path):
    trainer = scenarios.resumable(tmp_path)
    with pytest.warns(UserWarning, match="was written by 4 processes, and 1 go on.*random draws"):
        trainer.train(resume_from_checkpoint=str(launched("nodes") / "resume" / "checkpoint-3"))
    assert largest_difference(scenarios.state_of(trainer), one_process("resume")["state"]) <= 1e-7


def test_fsdp_goes_on_with_another_number_of_processes(results, one_process):
    (result,) = results("fsdp_alone", "from_others")
    assert largest_difference(result["state"], one_process("resume")["state"]) <= 1e-7
    (warning,) = result["warned"]
    assert "was written by 2 processes, and 1 go on" in warning


def test_plain_data_parallelism_does_not_go_on_from_fsdp(launched, tmp_path):
    checkpoint = str(launched("fsdp") / "resume" / "checkpoint-3")
    with pytest.raises(ValueError, match="is of FSDP, whose optimizer plain data parallelism cannot read"):
        scenarios.resumable(tmp_path).train(resume_from_checkpoint=checkpoint)


def test_fsdp_does_not_go_on_from_plain_data_parallelism(results):
    for result in results("fsdp", "from_others"):
        assert "is of plain data parallelism, whose optimizer FSDP cannot read: resume under" in result["refused"]


def test_another_batch_is_refused_on_resume(tmp_path):
    scenarios.resumable(tmp_path, max_steps=3).train()
    assert json.loads((tmp_path / "checkpoint-3" / "batch.json").read_text()) == {
        "processes": 1,
        "samples_per_step": 8,
    }
    halved = {"per_device_train_batch_size": 4}
    with pytest.raises(ValueError, match="took 8 samples a step, and the 1 here take 4.*gradient_accumulation_steps"):
        scenarios.resumable(tmp_path, **halved).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    both = {**halved, "gradient_accumulation_steps": 2}
    scenarios.resumable(tmp_path, **both).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("name", ["fsdp", pytest.param("gpu", marks=on_a_gpu)])
def test_accumulation_the_cache_and_the_best_model_under_fsdp(results, one_process, name):
    expected, ranks = one_process("more"), results(name, "more")
    for result in ranks:
        assert largest_difference(result["state"], expected["state"]) <= 1e-7
        assert re.search(r"FSDP cannot train\(\) a model again: .* make a new trainer", result["again"])
    assert sum(result["answers"] for result in ranks) == expected["answers"]


@pytest.mark.parametrize("name", ["fsdp", pytest.param("gpu", marks=on_a_gpu)])
def test_bfloat16_is_autocast_under_fsdp(results, one_process, name):
    """Not FSDP's own policy, which would round losses: to 3 digits, where the other losses agree to 5."""
    for result in results(name, "half"):
        assert result["dtypes"] == ["torch.float32"]
        assert result["loss"] == pytest.approx(one_process("half")["loss"], rel=1e-4 if name == "fsdp" else 0.03)


@pytest.mark.parametrize("name", ["nodes", "fsdp"])
def test_all_evaluate_with_the_batch_norm_of_the_first_process(results, name):
    first, *others = results(name, "batch_norm")
    assert_identical(first["after"], first["before"])
    for other in others:
        assert_identical(other["after"], first["before"])
        assert largest_difference(other["before"], first["before"]) > 1e-3


REMEDIES = {
    "AEKT": 'use order="classify_first" or order=None, or plain data parallelism',
    "KDAIF": 'use layers="last", or plain data parallelism',
    "SelfDistillation": "use plain data parallelism",
}


@pytest.mark.parametrize("method", scenarios.REFUSED)
def test_methods_that_need_the_weights_whole_are_refused_under_fsdp(results, method):
    for result in results("fsdp", "refused"):
        assert "FSDP spreads" in result[method]
        assert result[method].endswith(REMEDIES[method])
