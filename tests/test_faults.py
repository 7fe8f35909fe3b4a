"""Runs that are killed, asked to end, short of room, or fed with what is no number."""

import errno
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
import weakref
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers.trainer
from helpers import Rows, Weighted, assert_identical, make_trainer, rows, tiny, tiny_teacher, weights
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, TrainerCallback
from transformers.modeling_outputs import ImageClassifierOutput

import hfkd.distillers.kd_aif
import hfkd.memory
import hfkd.saving
from hfkd.checkpoints import (
    FILES_NAME,
    UNFINISHED_NAME,
    checkpoints_in,
    faults_of,
    last_whole_checkpoint,
    start_checkpoint,
)
from hfkd.distillers import KD, KDAIF, Combined, InContextKD
from hfkd.finite import FiniteLosses


class RowByRow(PreTrainedModel):
    """A teacher whose answer to a sample is the same to the last bit, whatever the others of its batch are."""

    config_class = PretrainedConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(config.num_labels, 3 * 16 * 16, generator=generator) / 10)
        self.classifier = nn.Linear(config.num_labels, config.num_labels)
        self.post_init()
        with torch.no_grad():
            self.classifier.weight.copy_(torch.eye(config.num_labels))
            self.classifier.bias.normal_(generator=generator)

    def forward(self, pixel_values, labels=None):
        pixels = pixel_values.flatten(1)
        features = torch.stack([(self.weight * row).sum(1) for row in pixels])
        return ImageClassifierOutput(logits=torch.stack([self.classifier(row) for row in features]))


STEPS = 12  # four an epoch, a checkpoint at every second one


def everything(folder, **arguments):
    """Influence weights, a bank of the student's own, BatchNorm, dropout's cousin shuffling, AdamW and a cache."""
    distiller = Combined(
        {
            "influence": KDAIF(warm_up=0.0),
            "context": InContextKD(mode="teacher_free", refresh=0.2, neighbours=2, negatives=4),
            "learned": Weighted(),
        },
        task_from="influence",
    )
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 1.0,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
        "teacher_cache": str(Path(folder) / "cache"),
    }
    teacher = RowByRow(PretrainedConfig(num_labels=5))
    return make_trainer(
        Path(folder) / "run",
        tiny("cifar"),
        teacher,
        distiller,
        rows("cifar", 16),
        trainer={"held_out_dataset": rows("cifar", 8, seed=1)},
        **{**settings, **arguments},
    )


def result(trainer):
    tables = sorted(Path(trainer.args.output_dir, "influence").glob("*.parquet"))
    return weights(trainer.model, trainer.distiller), [pq.read_table(table).to_pydict() for table in tables]


def go_on(folder, before=lambda trainer: None, **arguments):
    """Train, from the last whole checkpoint where there is one; leave the result when done."""
    torch.manual_seed(17)  # of no effect
    run = Path(folder) / "run"
    trainer = everything(folder, **arguments)
    before(trainer)
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(run) is not None)
    torch.save(result(trainer), Path(folder) / "result.pt")


def child(target, *arguments, **options):
    """Forked, so that it need not import anything."""
    process = multiprocessing.get_context("fork").Process(target=quietly, args=(target, *arguments), kwargs=options)
    process.start()
    return process


def quietly(target, *arguments, **options):
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        target(*arguments, **options)


def killed_in(owner, name, turn, *, after=False):
    """The process dies as a function is called for the ``turn``-th time, or as it returns."""
    original, turns = getattr(owner, name), itertools.count(1)

    def dying(*arguments, **options):
        is_turn = next(turns) == turn
        if is_turn and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        returned = original(*arguments, **options)
        if is_turn:
            os.kill(os.getpid(), signal.SIGKILL)
        return returned

    setattr(owner, name, dying)


SAVING = [
    (hfkd.saving, "start_checkpoint", 2, True),
    (hfkd.saving.Trainer, "_save", 2, True),
    (hfkd.saving.Trainer, "_save_optimizer_and_scheduler", 1, False),
    (hfkd.saving.safetensors.torch, "save_file", 2, True),
    (hfkd.saving, "list_files", 1, False),
    (hfkd.saving, "list_files", 2, True),
    (transformers.trainer, "rotate_checkpoints", 1, False),
    (transformers.trainer, "rotate_checkpoints", 1, True),
]
# The first refresh asks about all 16 samples, in two batches, of each the answers and behind them their checksums.
CACHE = [(os, "pwrite", *when) for when in ((1, False), (1, True), (2, False), (2, True), (1, True), (2, True))]
INFLUENCE = [
    (hfkd.distillers.kd_aif, "last_layer_influence", 1, False),
    (hfkd.distillers.kd_aif, "last_layer_influence", 2, True),
    (hfkd.distillers.kd_aif.pq, "write_table", 1, True),
    (hfkd.distillers.kd_aif.pq, "write_table", 1, False),
]
BANK = [
    (hfkd.memory, "find_neighbours", 1, False),
    (hfkd.memory, "find_neighbours", 2, True),
    (hfkd.memory.MemoryBank, "fill", 1, True),
    (hfkd.memory.MemoryBank, "fill", 3, True),
]
PLACES = {"saving": SAVING, "cache": CACHE, "influence": INFLUENCE, "bank": BANK}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    start = time.perf_counter()
    process = child(go_on, folder)
    process.join()
    assert process.exitcode == 0
    return torch.load(folder / "result.pt", weights_only=True), time.perf_counter() - start


def finish_and_compare(folder, uninterrupted):
    process = child(go_on, folder)
    process.join()
    assert process.exitcode == 0
    (state, tables), _ = uninterrupted
    own_state, own_tables = torch.load(folder / "result.pt", weights_only=True)
    assert_identical(own_state, state)
    assert own_tables == tables
    assert len(tables) == 3
    assert any("running_mean" in name for name in state)
    assert any("student_bank.positives" in name for name in state)
    assert [path.name for path in checkpoints_in(folder / "run")] == ["checkpoint-10", "checkpoint-12"]
    assert not any(faults_of(path) for path in checkpoints_in(folder / "run"))


def step_of(path):
    return 0 if path is None else int(path.name.rpartition("-")[2])


def note(what, folder, before):
    """What a kill left; nothing that was whole may be gone."""
    there = checkpoints_in(folder / "run") if (folder / "run").exists() else []
    last = step_of(last_whole_checkpoint(folder / "run")) if there else 0
    assert last >= before
    states = [f"{path.name.rpartition('-')[2]}{' torn' if faults_of(path) else ''}" for path in there]
    print(f"kill {what}: checkpoints {', '.join(states) or 'none'}; goes on from step {last}")
    return last


@pytest.mark.parametrize("place", PLACES)
def test_killed_there_and_resumed_it_is_the_run_that_was_not(tmp_path, uninterrupted, place):
    """``pytest -k killed -s`` tells of each kill."""
    before = 0
    for owner, name, turn, after in PLACES[place]:

        def attempt(owner=owner, name=name, turn=turn, after=after):
            go_on(tmp_path, lambda trainer: killed_in(owner, name, turn, after=after))

        process = child(attempt)
        process.join()
        assert process.exitcode == -signal.SIGKILL, (name, turn)
        before = note(f"in {place}: {'after' if after else 'before'} {name} {turn}", tmp_path, before)
    finish_and_compare(tmp_path, uninterrupted)


def test_killed_at_random_and_resumed_it_is_the_run_that_was_not(tmp_path, uninterrupted):
    """``HFKD_KILLS=100 pytest -k killed -s`` kills more, and tells of each."""
    generator = np.random.default_rng(0)
    before = done = 0
    for i in range(int(os.environ.get("HFKD_KILLS", 8))):
        process = child(go_on, tmp_path)
        time.sleep(generator.uniform(0.1, 1.0) * uninterrupted[1])
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        if process.exitcode == -signal.SIGKILL:
            before = note(f"{i} at random", tmp_path, before)
            continue
        done += 1
        assert process.exitcode == 0
        finish_and_compare(tmp_path, uninterrupted)
        shutil.rmtree(tmp_path / "run")
        shutil.rmtree(tmp_path / "cache")
        before = 0
    print(f"{i + 1 - done} kills at random, {done} runs that were done first")
    finish_and_compare(tmp_path, uninterrupted)


class At(TrainerCallback):
    """Does something as a step begins."""

    def __init__(self, step, what):
        self.step, self.what = step, what

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.what()


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("step", [0, 4, 6])
def test_sigterm_saves_and_the_run_goes_on_from_there(tmp_path, uninterrupted, step):
    process = child(go_on, tmp_path, lambda trainer: trainer.add_callback(At(step, terminate)))
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    assert not (tmp_path / "result.pt").exists()
    assert last_whole_checkpoint(tmp_path / "run").name == f"checkpoint-{step + 1}"
    finish_and_compare(tmp_path, uninterrupted)


def test_sigterm_to_all_of_a_job_saves_although_its_loaders_have_workers(tmp_path, uninterrupted):
    """As a cluster sends it, or ``timeout``. A worker takes one from its parent for a good end."""
    waits = tmp_path / "waits"

    def before(trainer):
        def wait():
            os.setpgid(0, 0)
            for worker in multiprocessing.active_children():
                os.setpgid(worker.pid, os.getpid())
            waits.touch()
            while not trainer._termination._asked:
                time.sleep(0.01)

        trainer.add_callback(At(5, wait))

    process = child(go_on, tmp_path, before, dataloader_num_workers=2)
    while not waits.exists() and process.is_alive():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    assert last_whole_checkpoint(tmp_path / "run").name == "checkpoint-6"
    finish_and_compare(tmp_path, uninterrupted)


def test_sigterm_while_a_checkpoint_is_written_writes_it_once(tmp_path, monkeypatch):
    """At the end of an epoch the trainer comes by twice."""

    class Late(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 4:
                terminate()

    started = []
    monkeypatch.setattr(
        hfkd.saving, "start_checkpoint", lambda folder: [started.append(folder.name), start_checkpoint(folder)]
    )
    trainer = everything(tmp_path)
    trainer.add_callback(Late())
    with pytest.raises(SystemExit):
        trainer.train()
    assert started == ["checkpoint-2", "checkpoint-4"]


def test_a_best_checkpoint_that_is_lost_is_told(tmp_path):
    data = rows("bert", 8, seed=1)
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"load_best_model_at_end": True, "max_steps": 2, "trainer": {"eval_dataset": data}}
    make_trainer(tmp_path / "run", tiny("bert"), None, None, rows("bert"), **settings).train()
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "other" / "checkpoint-2")
    path = tmp_path / "other" / "checkpoint-2" / "trainer_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "best_global_step": 1}))
    settings["max_steps"] = 3
    trainer = make_trainer(tmp_path / "other", tiny("bert"), None, None, rows("bert"), **settings)
    with pytest.warns(UserWarning, match="the best checkpoint so far, .*checkpoint-1, is not there: put it beside"):
        trainer.train(resume_from_checkpoint=True)


def test_sigterm_saves_whatever_the_strategy_and_only_in_train(tmp_path):
    for name, arguments in {
        "no": {"save_strategy": "no"},
        "best": {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "loss"},
    }.items():
        trainer = make_trainer(
            tmp_path / name,
            tiny("bert"),
            None,
            None,
            rows("bert"),
            max_steps=6,
            trainer={"eval_dataset": rows("bert", 8, seed=1)},
            **arguments,
        )
        trainer.add_callback(At(2, terminate))
        bystander = Bystander()
        trainer.add_callback(bystander)
        with pytest.raises(SystemExit) as stopped:
            trainer.train()
        assert stopped.value.code == 143
        assert bystander.ended == 0
        assert last_whole_checkpoint(tmp_path / name).name == "checkpoint-3"
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


class Bystander(TrainerCallback):
    """Whether a run is said to have ended, upon which others upload the student."""

    ended = 0

    def on_train_end(self, *args, **kwargs):
        self.ended += 1


def test_a_handler_of_the_user_is_left_alone(tmp_path):
    seen = []
    signal.signal(signal.SIGTERM, lambda *_: seen.append(True))
    try:
        trainer = make_trainer(tmp_path, tiny("bert"), None, None, rows("bert"))
        trainer.add_callback(At(1, terminate))
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert seen == [True]
    assert trainer.state.global_step == 3


# What is damaged in a checkpoint, how, and what is said about it.
DAMAGE = [
    ("optimizer.pt", 100, r"optimizer.pt has 100 of \d+ bytes"),
    ("model.safetensors", 1000, r"model.safetensors has 1000 of \d+ bytes"),
    ("distiller.safetensors", 0, r"distiller.safetensors has 0 of \d+ bytes"),
    ("model.safetensors", None, "model.safetensors is missing"),
    ("scheduler.pt", None, "scheduler.pt is missing"),
    ("rng_state.pth", None, "rng_state.pth is missing"),
    ("trainer_state.json", 200, "trainer_state.json, which is written last, is missing or cut short"),
    ("trainer_state.json", None, "trainer_state.json, which is written last, is missing or cut short"),
    (FILES_NAME, 20, "files.json is damaged"),
    ("model-00002-of-*.safetensors", None, r"model-00002-of-\d+.safetensors is missing"),
]


def damage(path, length):
    if length is None:
        path.unlink()
    else:
        os.truncate(path, length)


def short(folder, **arguments):
    """Six steps, a checkpoint at every second one."""
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", **arguments}
    return make_trainer(folder, tiny("bert"), tiny_teacher("bert"), Weighted(), rows("bert"), **settings)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    trainer = short(folder)
    save = trainer.model.save_pretrained
    trainer.model.save_pretrained = lambda *args, **kwargs: save(*args, **{**kwargs, "max_shard_size": "10KB"})
    trainer.train()
    whole = short(folder / "plain")
    whole.train()
    return folder, weights(whole.model, whole.distiller)


@pytest.mark.parametrize(("name", "length", "message"), DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, saved, name, length, message):
    folder, whole = saved
    is_sharded = name.startswith("model-")
    for step in (2, 4):
        origin = folder / f"checkpoint-{step}" if is_sharded else folder / "plain" / f"checkpoint-{step}"
        shutil.copytree(origin, tmp_path / f"checkpoint-{step}")
    assert not faults_of(tmp_path / "checkpoint-4")
    (path,) = (tmp_path / "checkpoint-4").glob(name)
    damage(path, length)
    trainer = short(tmp_path)
    with pytest.raises(ValueError, match=rf"checkpoint-4 is no whole checkpoint: .*{message}.*: resume from .*-2, w"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    with pytest.warns(UserWarning, match=rf"checkpoint-4 is no whole checkpoint \(.*{message}.*resuming from .*-2"):
        trainer.train(resume_from_checkpoint=True)
    assert_identical(weights(trainer.model, trainer.distiller), whole)
    assert not faults_of(tmp_path / "checkpoint-4")


def test_the_word_is_as_good_and_no_checkpoint_at_all_is_said(tmp_path, saved):
    shutil.copytree(saved[0] / "plain" / "checkpoint-4", tmp_path / "checkpoint-4")
    trainer = short(tmp_path)
    trainer.train(resume_from_checkpoint="True")
    assert_identical(weights(trainer.model, trainer.distiller), saved[1])
    with pytest.raises(ValueError, match="no whole checkpoint to resume from: start a new run"):
        short(tmp_path / "empty").train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="checkpoint-3 is no whole checkpoint: there is no such folder: resume from"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_what_a_killed_run_left_does_not_count_towards_the_limit(tmp_path):
    for step, is_ours in ((1, True), (5, True), (7, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / (UNFINISHED_NAME if is_ours else "mine")).touch()
    short(tmp_path).train()
    assert [step_of(path) for path in checkpoints_in(tmp_path)] == [2, 4, 6, 7]


@pytest.mark.parametrize("removed", ["model.safetensors", "files.json", "*"])
def test_a_checkpoint_whose_removal_was_killed_is_still_the_oldest(tmp_path, saved, removed):
    """transformers goes by the times of the folders, and what removes a file makes its folder new."""
    for step, age in ((2, 200), (4, 100)):
        folder = shutil.copytree(saved[0] / "plain" / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
        for path in (*folder.iterdir(), folder):
            os.utime(path, (time.time() - age,) * 2)
    for path in (tmp_path / "checkpoint-2").glob(removed):
        path.unlink()
    trainer = short(tmp_path, save_total_limit=2)
    trainer.train(resume_from_checkpoint=True)
    assert [step_of(path) for path in checkpoints_in(tmp_path)] == [4, 6]


@pytest.mark.parametrize("extra", [4, 40, 80, 120])
def test_a_full_disk_is_named_and_the_checkpoint_before_is_whole(small_disk, saved, extra):
    """Wherever in the second one it is full."""
    whole = saved[0] / "plain" / "checkpoint-4"
    size = sum(-(-path.stat().st_size // 4096) * 4 for path in whole.iterdir())
    folder = small_disk(size + extra)
    assert extra < size
    with pytest.raises(OSError, match=r"checkpoint-4 could not be written .*-2, is whole: make room, and start again"):
        short(folder).train()
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]
    subprocess.run(["mount", "-o", f"remount,size={5 * size}k", str(folder)], check=True)
    trainer = short(folder)
    trainer.train(resume_from_checkpoint=True)
    assert_identical(weights(trainer.model, trainer.distiller), saved[1])


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (hfkd.saving.safetensors.torch, "save_file", OSError(errno.ENOSPC, "No space left on device")),
        (torch, "save", RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")),
        (hfkd.saving, "list_files", PermissionError(errno.EACCES, "Permission denied")),
    ],
)
def test_what_fails_in_saving_is_named_and_the_checkpoint_before_is_whole(tmp_path, monkeypatch, owner, name, error):
    def fail(*args, **kwargs):
        raise error

    trainer = short(tmp_path)
    trainer.add_callback(At(3, lambda: monkeypatch.setattr(owner, name, fail)))
    with pytest.raises(OSError, match=r"checkpoint-4 could not be written \(.+\); the one before, .*-2, is whole"):
        trainer.train()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-2"]
    assert not faults_of(tmp_path / "checkpoint-2")


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write to .*file/run \(.+\): name another output_dir"):
        short(tmp_path / "file" / "run")
    with pytest.raises(OSError, match=r"cannot write to .*file \(.+\): name another folder in teacher_cache="):
        short(tmp_path / "run", teacher_cache=str(tmp_path / "file"))


@pytest.mark.parametrize("goes_in", [None, 3], ids=["refused", "cut"])
def test_a_disk_that_fills_up_under_the_cache_is_named(tmp_path, monkeypatch, goes_in):
    trainer = short(tmp_path / "run", teacher_cache=str(tmp_path / "cache"))
    write = os.pwrite

    def full(file, content, offset):
        if goes_in is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, content[:1], offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match=r"cannot write to .*logits \(.+\): make room and start again, what is there is"):
        trainer.train()
    monkeypatch.undo()
    again = short(tmp_path / "again", teacher_cache=str(tmp_path / "cache"))
    again.train()
    other = short(tmp_path / "other", teacher_cache=str(tmp_path / "other_cache"))
    other.train()
    assert_identical(weights(again.model), weights(other.model))


class Vanishing(Rows):
    """Reads its samples from files."""

    def __init__(self, source, folder):
        super().__init__(source.columns)
        self.folder = folder
        folder.mkdir(exist_ok=True)
        for i in range(len(source)):
            torch.save(source[i], folder / f"{i}.pt")

    def __getitem__(self, i):
        return torch.load(self.folder / f"{i}.pt", weights_only=True)


def test_a_vanished_file_of_the_data_is_named_and_the_run_goes_on_when_it_is_back(tmp_path):
    def trainer(folder, *callbacks):
        data = Vanishing(rows("bert"), tmp_path / "data")
        return make_trainer(
            folder,
            tiny("bert", dropout=0.1),
            tiny_teacher("bert"),
            Weighted(),
            data,
            max_steps=6,
            save_strategy="steps",
            save_steps=3,
            trainer={"callbacks": list(callbacks)},
        )

    whole = trainer(tmp_path / "whole")
    whole.train()
    broken = trainer(tmp_path / "run", At(3, (tmp_path / "data" / "5.pt").unlink))
    with pytest.raises(FileNotFoundError, match="data/5.pt"):
        broken.train()
    resumed = trainer(tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    assert_identical(weights(resumed.model, resumed.distiller), weights(whole.model, whole.distiller))


def poison(model, value, chosen):
    """The logits of samples that begin with these words."""

    def hook(module, args, kwargs, output):
        first = kwargs["input_ids"][:, 0]
        output.logits[torch.isin(first, chosen)] = value
        return output

    model.register_forward_hook(hook, with_kwargs=True)


def finite_run(folder, side, value, *, index=True, deferred=False, **arguments):
    data = rows("bert")
    words = torch.arange(20, 36)
    data.columns["input_ids"][:, 0] = words
    models = {"student": tiny("bert"), "teacher": tiny_teacher("bert")}
    trainer = make_trainer(
        folder,
        models["student"],
        models["teacher"],
        KD(),
        data if index else data.with_columns(index=None),
        train_sampling_strategy="sequential",
        per_device_train_batch_size=4,
        max_steps=4,
        **arguments,
    )
    if side in models:
        poison(models[side], value, words[[9, 11]])  # of the third step
    if deferred:
        trainer._finite_losses.is_at_hand = False
        trainer._finite_losses._to_host = lambda flag: (flag, Mock())
    before = {}
    trainer.add_callback(At(2, lambda: before.update(weights(trainer.model))))
    return trainer, before


@pytest.mark.parametrize("deferred", [False, True], ids=["cpu", "accelerator"])
@pytest.mark.parametrize(
    ("side", "value", "lines"),
    [
        ("teacher", float("nan"), ["the teacher's logits: NaN for 2 of 4 samples (index 9, 11)", "at the teacher"]),
        ("teacher", float("inf"), ["the teacher's logits: infinite for 2 of 4 samples (index 9, 11)", "'kd'"]),
        ("student", float("nan"), ["the student's logits: NaN for 2 of 4 samples (index 9, 11)", "has diverged"]),
    ],
)
def test_what_is_no_number_is_named_and_the_step_not_taken(tmp_path, side, value, lines, deferred):
    trainer, before = finite_run(tmp_path, side, value, deferred=deferred)
    with pytest.raises(FloatingPointError, match="the loss of step 3 is not finite, and the step was not taken") as e:
        trainer.train()
    message = str(e.value)
    assert all(line in message for line in lines), message
    assert len(message.splitlines()) <= 5
    assert "the term 'kd': NaN" in message
    assert trainer.state.global_step == 2
    assert_identical(weights(trainer.model), before)


def test_without_numbers_of_their_own_samples_are_told_by_their_rows(tmp_path):
    trainer, _ = finite_run(tmp_path, "teacher", float("nan"), index=False)
    with pytest.raises(FloatingPointError, match=r"2 of 4 rows \(number 1, 3\)"):
        trainer.train()


def test_under_accumulation_nothing_of_the_step_is_taken(tmp_path):
    trainer, _ = finite_run(tmp_path, "teacher", float("nan"), gradient_accumulation_steps=2)
    start = weights(trainer.model)
    trainer.add_callback(At(1, lambda: start.update(weights(trainer.model))))
    with pytest.raises(FloatingPointError, match="the loss of step 2 is not finite"):
        trainer.train()
    assert_identical(weights(trainer.model), start)


def test_a_weight_that_is_no_number_is_named(tmp_path):
    data = rows("bert", 8)
    data.columns["sample_weight"] = torch.ones(8).index_fill_(0, torch.tensor([6]), float("nan"))
    trainer = make_trainer(tmp_path, tiny("bert"), tiny_teacher("bert"), KD(), data)
    with pytest.raises(FloatingPointError, match=r"the weights of the samples: NaN for 1 of 8 samples \(index 6\)"):
        trainer.train()


def test_parts_with_other_rows_than_samples_are_named():
    feature = torch.zeros(8, 3)
    feature[5] = float("nan")
    with pytest.raises(FloatingPointError, match=r"the teacher's layer: NaN for 1 of 8 rows \(number 5\)"):
        FiniteLosses(torch.device("cpu")).watch(
            torch.tensor(float("nan")), {"the teacher's layer": feature}, {"index": torch.arange(4)}, 1
        )


def test_on_an_accelerator_one_micro_batch_at_most_is_kept(monkeypatch):
    losses = FiniteLosses(torch.device("cuda"))
    monkeypatch.setattr(losses, "_to_host", lambda flag: (flag, Mock()))
    kept = []
    for _ in range(4):
        part = torch.zeros(3)
        kept.append(weakref.ref(part))
        losses.watch(torch.tensor(1.0), {"part": part}, {}, 1)
        del part
    assert [reference() is None for reference in kept] == [True, True, True, False]
    losses.forget()
    assert kept[-1]() is None


def test_a_scalar_term_is_named():
    parts = {"the term 'sp'": torch.tensor(float("inf"))}
    with pytest.raises(FloatingPointError, match="the term 'sp': infinite for the whole batch\nlook at"):
        FiniteLosses(torch.device("cpu")).watch(torch.tensor(float("inf")), parts, {}, 1)


def test_the_cache_keeps_no_answer_that_is_no_number(tmp_path):
    trainer, _ = finite_run(tmp_path / "run", "teacher", float("nan"), teacher_cache=str(tmp_path / "cache"))
    with pytest.raises(FloatingPointError, match=r"logits: NaN or infinite for 2 of 4 samples \(index 9, 11\)"):
        trainer.train()
    assert trainer.cache.missing(0).tolist() == list(range(8, 16))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_step_is_not_taken_either(tmp_path):
    trainer, before = finite_run(tmp_path, "teacher", float("nan"), use_cpu=False)
    with pytest.raises(FloatingPointError, match=r"the teacher's logits: NaN for 2 of 4 samples \(index 9, 11\)"):
        trainer.train()
    assert_identical(weights(trainer.model), before)
