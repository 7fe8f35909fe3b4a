"""The benchmarks run, and their arithmetic is right; what they measured is in the docs."""

import copy
import importlib
import json
import mmap
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import hub_rows, largest_difference, tiny, tokenizer
from transformers.utils import logging

from hfkd.distillers import KD


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def benchmark(monkeypatch):
    """The module of that name, forgotten again with all that it imported."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    verbosity, threads = logging.get_verbosity(), torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    before = set(sys.modules)
    yield importlib.import_module
    logging.set_verbosity(verbosity)
    torch.set_num_threads(threads)
    for name in {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - before:
        sys.modules.pop(name, None)


@pytest.fixture
def method_cost(benchmark):
    return benchmark("method_cost")


@pytest.fixture
def influence(benchmark):
    return benchmark("influence")


@pytest.fixture
def retrieval(benchmark):
    return benchmark("retrieval")


def test_what_methods_cost_is_measured_against_kd_and_the_student_alone(method_cost, tmp_path, capsys):
    output = tmp_path / "cost.json"
    words = ["--methods", "CAM()", "TfKD('virtual')", "--classes", "10", "--rounds", "1", "--steps", "1"]
    rows = {row["method"]: row for row in method_cost.main([*words, "--output", str(output)])}
    assert list(rows) == ["StudentAlone()", "KD()", "again", "CAM()", "TfKD('virtual')"]
    assert [row["parameters"] for row in rows.values()] == [0, 0, 0, 1408, 0]
    assert rows["CAM()"]["state_mb"] == pytest.approx(1408 * 4 / 1e6)
    assert rows["CAM()"]["kept_mb"] > rows["again"]["kept_mb"] == rows["KD()"]["kept_mb"] == 0
    assert rows["StudentAlone()"]["ratio_alone"]["value"] == 1.0
    assert rows["KD()"]["ratio"]["value"] + rows["again"]["ratio"]["value"] == pytest.approx(2.0)
    assert json.loads(output.read_text())["rows"] == list(rows.values())
    printed = capsys.readouterr().out
    assert f"| `CAM()` | 10 | {rows['CAM()']['step_ms']:.0f} |" in printed


def test_what_compares_tokens_is_measured_on_text(method_cost):
    kinds = {method: method_cost.kind_of(method) for method in method_cost.METHODS}
    text = {method for method, kind in kinds.items() if kind == "text"}
    assert text == {"HiddenStates()", "HiddenStates('cosine')", "AttentionMaps()", "AttentionMaps('kl')"}


def test_a_round_has_everybody_and_ratios_have_quartiles(benchmark):
    measure = benchmark("measure")
    calls = []
    seconds = measure.interleave({name: lambda name=name: calls.append(name) or len(calls) for name in "abc"}, 4)
    assert calls[:3] == list("abc")  # the round that does not count
    assert all(sorted(calls[3 * i : 3 * i + 3]) == list("abc") for i in range(5))
    assert sorted(number for numbers in seconds.values() for number in numbers) == list(range(4, 16))
    record = measure.ratio([2.0, 40.0, 6.0, 1.0, 10.0], [1.0, 10.0, 1.0, 1.0, 2.0], ">= 2.5")
    assert record == {"value": 4.0, "low": 1.0, "high": 6.0, "target": ">= 2.5", "runs": 5}


@pytest.mark.parametrize(
    ("low", "high", "target", "verdict"),
    [
        (1.0, 1.05, "<= 1.05", "met"),
        (1.04, 1.2, "<= 1.05", "undecided"),
        (1.06, 1.2, "<= 1.05", "missed"),
        (2.5, 2.6, ">= 2.5", "met"),
        (2.0, 2.6, ">= 2.5", "undecided"),
        (2, 2.4, ">= 2.5", "missed"),
        (2, 2.4, None, ""),
    ],
)
def test_a_target_is_met_or_missed_by_the_whole_interval(benchmark, low, high, target, verdict):
    assert benchmark("measure").verdict({"low": low, "high": high, "target": target}) == verdict


def test_peak_memory_is_that_of_arrays_and_not_of_mapped_files(benchmark, tmp_path):
    measure, size = benchmark("measure"), 2**26
    (tmp_path / "file").write_bytes(bytes(size))
    with measure.PeakMemory() as memory:
        assert np.memmap(tmp_path / "file", np.uint8).sum() == 0
    assert memory.peak - memory.start < size / 2
    with measure.PeakMemory() as memory:
        # An array may get memory that another test has freed, and which the process still holds.
        held = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        np.frombuffer(held, np.uint8)[:: mmap.PAGESIZE] = 1
        time.sleep(0.2)  # the thread that watches may have to wait for a core
        held.close()
    assert size / 2 < memory.peak - memory.start < 2 * size


def test_the_reference_loop_and_the_trainer_compute_the_same(benchmark, tmp_path, monkeypatch):
    """Their times are compared, so they must do the same work: equal weights after an epoch of the same batches."""
    cases, opponents = benchmark("cases"), benchmark("opponents")
    monkeypatch.setitem(cases.PAIRS, "tiny", ("resnet14", "resnet8"))
    monkeypatch.setattr(opponents, "DataLoader", lambda batches, *_, **__: batches)
    teacher, student = (model.double() for model in cases.image_models("tiny"))
    generator = torch.Generator().manual_seed(0)
    batches = [
        {
            "pixel_values": torch.randn(8, 3, 32, 32, generator=generator, dtype=torch.float64),
            "labels": torch.randint(10, (8,), generator=generator),
            "index": torch.arange(8) + 8 * step,
        }
        for step in range(3)
    ]
    theirs = copy.deepcopy(student)
    kd = KD(alpha=opponents.ALPHA, temperature=opponents.TEMPERATURE)
    fixed = cases.FixedBatches(batches)
    epoch = cases.Epochs(student, teacher, fixed, tmp_path, batch_size=8, distiller=kd)
    fixed.given = -1  # the trainer has looked at some, to see whether they fit
    epoch()
    opponents.reference_loop(teacher, theirs, [(batch["pixel_values"], batch["labels"]) for batch in batches], 8)()
    different = largest_difference(student.state_dict(), theirs.state_dict())
    assert different < 1e-5  # our losses are in float32


def test_the_benchmark_has_its_format_and_leaves_out_what_is_missing(benchmark, tmp_path, monkeypatch, capsys):
    run = benchmark("run")
    monkeypatch.setattr(
        run, "QUICK", run.Size(images=8, wide_images=8, steps=1, step_rounds=1, rounds=1, slow_rounds=1, starts=1)
    )
    monkeypatch.setattr(run, "RESNET", "tiny")
    monkeypatch.setitem(run.cases.PAIRS, "tiny", ("resnet14", "resnet8"))
    monkeypatch.setitem(sys.modules, "torchdistill.core.distillation", None)
    monkeypatch.setattr(run, "text_models_and_data", missing)
    monkeypatch.setattr(run, "WRN", "tiny")
    output = tmp_path / "bench.json"
    parts = ["steps", "images", "text", "evaluation", "input", "logging"]
    run.main(["--quick", "--threads", "1", "--output", str(output), "--only", *parts])
    record = json.loads(output.read_text())
    assert record["machine"]
    assert list(record["ratios"]) == [
        "online KD step / (student step + teacher forward), tiny",
        "cached KD step / student-only step, tiny",
        "epoch against the reference loop, tiny, online",
        "epoch against the reference loop, tiny, cached",
        "images/s of the input pipeline / per-sample torchvision, batch 64",
        "logging on / off, 10 terms",
    ]
    for ratio in record["ratios"].values():
        assert {"value", "low", "high", "target", "runs"} <= set(ratio)
        assert 0 < ratio["low"] <= ratio["value"] <= ratio["high"]
    cached = record["ratios"]["epoch against the reference loop, tiny, cached"]
    assert cached["bytes"] > 0
    assert cached["fill_seconds"] > 0
    assert set(record["skipped"]) == {"torchdistill", run.TEXT, f"steps, {run.TEXT}", f"evaluation, {run.TEXT}"}
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "left out: torchdistill" in capsys.readouterr().out


def test_sides_are_divided_as_they_are_named(benchmark, tmp_path, monkeypatch):
    run = benchmark("run")
    seconds = {"reference": [8.0], "torchdistill": [12.0], "alone": [1.0], "online": [4.0], "cached": [2.0]}
    seen = {}

    def interleave(sides, rounds):
        seen.update(sides)
        return {name: seconds[name] for name in sides}

    monkeypatch.setattr(run, "interleave", interleave)
    monkeypatch.setattr(run.opponents, "torchdistill_box", lambda *_, **__: None)
    monkeypatch.setitem(run.cases.PAIRS, run.RESNET, ("resnet14", "resnet8"))
    monkeypatch.setattr(run, "WRN", run.RESNET)
    found = run.Benchmark(run.Size(images=8, wide_images=8), tmp_path, {})
    found.measure_images()
    values = {name.removeprefix("epoch against "): record["value"] for name, record in found.ratios.items()}
    pair = run.RESNET
    assert values == {
        f"cached KD step / student-only step, {pair}": 2.0,
        f"the reference loop, {pair}, online": 2.0,
        f"the reference loop, {pair}, cached": 4.0,
        f"torchdistill, {pair}, online": 3.0,
        f"torchdistill, {pair}, cached": 6.0,
    }
    asked = []
    for side in ("online", "alone", "cached"):
        trainer = seen[side].trainer
        counted = (
            None
            if trainer.teacher is None
            else trainer.teacher_model.register_forward_hook(lambda *_: asked.append(1))
        )
        asked.clear()
        seen[side]()
        assert len(asked) == (1 if side == "online" else 0)
        if counted is not None:
            counted.remove()


def test_evaluation_is_of_the_same_texts_on_both_sides(benchmark, tmp_path, monkeypatch):
    run, losses = benchmark("run"), []
    monkeypatch.setattr(run, "seconds_of", lambda evaluate: losses.append(evaluate()["eval_loss"]) or len(losses))
    monkeypatch.setattr(
        run, "text_models_and_data", lambda number: (None, tiny("bert"), hub_rows(number), tokenizer())
    )
    monkeypatch.setattr(run, "interleave", lambda sides, rounds: {name: [sides[name]()] for name in sides})
    found = run.Benchmark(run.Size(), tmp_path, {})
    found.measure_evaluation()
    ((name, record),) = found.ratios.items()
    assert losses == pytest.approx([losses[0]] * 2, rel=1e-4)
    assert "transformers' Trainer / ours" in name
    assert record["value"] == 1 / 2


def missing(*_):
    raise FileNotFoundError("not here")


def test_epochs_stand_beside_the_floor(benchmark, tmp_path, monkeypatch):
    epochs = benchmark("epochs")
    student = epochs.cases.image_models(epochs.PAIR)[1]
    operations, numbers = epochs.work_of(student, torch.bfloat16, trained=True)
    assert operations == pytest.approx(3 * 2 * 40.8e6, rel=0.01)  # He et al. count 41 million multiplications
    wide, middle, narrow = 16 * 32**2, 32 * 16**2, 64 * 8**2
    first = 3 * 32**2 + wide + 6 * (wide + wide)
    later = [2 * (before + after) + 5 * (after + after) for before, after in ((wide, middle), (middle, narrow))]
    assert numbers == 3 * 2 * (first + sum(later))
    monkeypatch.setattr(epochs, "rates", lambda dtype: (1e9, 1e9))
    monkeypatch.setitem(epochs.cases.PAIRS, epochs.PAIR, ("resnet14", "resnet8"))
    words = ["--images", "16", "--rounds", "1", "--batch_sizes", "8", "--output", str(tmp_path / "epochs.json")]
    record = epochs.main(words)["epochs"]
    assert len(record) == 4
    online, alone = record["online, batch 8"], record["student alone, batch 8"]
    assert online["floor_seconds"] > alone["floor_seconds"] > 0
    assert online["minutes_for_240"] == pytest.approx(4 * online["seconds"])


def test_refreshes_are_measured_against_an_evaluation_pass(influence):
    found = influence.refreshes_over_evaluation("images", 30, 1)
    layers = ("last layer", "last layer, first order", "all parameters")
    assert list(found) == [f"KDAIF refresh, {name} / evaluation pass, ResNet-20" for name in layers]
    assert [row["target"] for row in found.values()] == ["<= 1.3", "<= 1.3", "<= 4"]
    for row in found.values():
        assert row["runs"] == 1
        assert row["value"] == row["low"] == row["high"] > 0


def test_an_evaluation_pass_is_over_all_that_a_refresh_looks_at(influence, tmp_path):
    case = influence.Refresh("images", 30, str(tmp_path), {"layers": "last"})
    seen = []
    case.trainer.model.register_forward_hook(lambda module, inputs, output: seen.append(len(output.logits)))
    case.evaluate()
    assert sum(seen) == 30


def test_per_sample_gradients_are_the_same_all_ways(influence):
    """The benchmark compares what they find before it measures."""
    found = influence.with_per_sample_gradients(6, 1)
    assert {name: row["target"] for name, row in found.items()} == {
        "per-sample backward loop / forward-mode pass, ResNet-20": ">= 4",
        "vmap(grad) at batch 64 / forward-mode pass, ResNet-20": ">= 2",
        "vmap(grad) on the trainer's channels-last weights / forward-mode pass, ResNet-20": None,
    }


def test_a_run_is_watched_from_its_first_step(influence, monkeypatch):
    found = influence.watched_run("images", "all parameters", 4, 4, 12)
    assert 0 < found["base"] <= found["peak"]
    held = []

    class Holding(influence.Watch):
        def on_step_end(self, *args, **kwargs):
            held.append(np.ones(2**26, np.uint8))

    monkeypatch.setattr(influence, "Watch", Holding)
    more = influence.watched_run("images", "all parameters", 4, 4, 12)
    assert more["peak"] - more["base"] > len(held) * 2**25 > 0  # memory that was freed meanwhile is taken again


def test_memory_is_compared_round_by_round(influence, monkeypatch):
    peaks = iter(range(1, 100))

    def run_script(script, child, kind, refresh, *sizes):
        assert (child, kind, sizes) == ("--child", "images", ("4", "8", "24"))
        return json.dumps({"base": 100, "peak": 100 + (50 if refresh == "none" else 50 * next(peaks))})

    monkeypatch.setattr(influence, "run_script", run_script)
    found = influence.memory_of_refreshes("images", 4, 8, 1)
    grown = sorted(row["value"] for name, row in found.items() if name.startswith("its growth"))
    whole = sorted(row["value"] for name, row in found.items() if name.startswith("peak memory"))
    assert grown == [1, 2, 3, 4]
    assert whole == pytest.approx([1, 200 / 150, 250 / 150, 300 / 150])


def test_a_summary_has_median_and_range_or_quartiles(benchmark):
    measure = benchmark("measure")
    expected = {"value": 3.0, "low": 1.0, "high": 5.0, "target": ">= 2", "runs": 5}
    assert measure.summary([5.0, 1.0, 3.0, 2.0, 4.0], ">= 2") == expected
    assert measure.summary([*range(9)], ">= 2") == {"value": 4, "low": 2, "high": 6, "target": ">= 2", "runs": 9}
    assert measure.summary([7.0]) == {"value": 7.0, "low": 7.0, "high": 7.0, "target": None, "runs": 1}


def test_influence_writes_its_record(influence, tmp_path, monkeypatch, capsys):
    row = {"a / b": {"value": 0.5, "low": 0.5, "high": 0.5, "target": "<= 1", "runs": 1}}
    monkeypatch.setattr(influence, "ratios", lambda quick: row if quick else {})
    written = influence.main(["--quick", "--output", str(tmp_path / "made" / "record.json")])
    assert json.loads((tmp_path / "made" / "record.json").read_text()) == written
    assert written["ratios"] == row
    assert "torch" in written["machine"]
    assert "| a / b | <= 1 | 0.5 (0.5–0.5) | 1 | met |" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["bank", "exact", "faiss"])
def test_retrieval_is_measured(retrieval, what):
    found = retrieval.measured(what, 300, 100)
    assert len(found["seconds"]) == (1 if what == "bank" else 2)
    assert min(found["seconds"]) > 0
    if what == "faiss":
        assert found["found"] == 1  # so few rows are searched exactly


def test_the_time_of_all_rows_is_extrapolated_from_some(retrieval):
    assert retrieval.for_all([3.0, 4.0], 10, 100) == pytest.approx(22.0)  # 2 for the whole, and 0.2 for each of 100


def test_the_curve_is_a_table(retrieval, monkeypatch, tmp_path, capsys):
    exact, faiss = {"seconds": [3.0, 4.0], "bytes": 2**30}, {"seconds": [0.5, 0.6], "bytes": 2**20, "found": 0.975}
    monkeypatch.setattr(retrieval, "in_a_child", lambda index, *sizes: exact if index == "exact" else faiss)
    words = ["--curve", "5000", "--queries", "10", "--output", str(tmp_path / "curve.json")]
    rows = retrieval.main(words)["curve"]
    assert [row["all_seconds"] for row in rows] == pytest.approx([1002.0, 100.4])
    printed = capsys.readouterr().out
    assert "| 5,000 | exact | 10 | 200.00 | 17 min | 1,024 | all |" in printed
    assert "| 5,000 | faiss | 10 | 20.00 | 100 s | 1 | 97.5% |" in printed


def test_banks_and_steps_have_targets(retrieval, monkeypatch):
    monkeypatch.setattr(retrieval, "in_a_child", lambda *words: {"seconds": [20.0], "bytes": 2**29})
    monkeypatch.setattr(
        retrieval.method_cost,
        "run",
        lambda *_: [{"method": "InContextKD()", "ratio": {"low": 0.9, "value": 1.0}}, {"method": ""}],
    )
    found = retrieval.ratios()
    assert {name: (row["value"], row["target"]) for name, row in found.items()} == {
        "bank and neighbours of 50,000 x 256, CPU seconds": (20.0, "<= 60"),
        "bank and neighbours of 50,000 x 256, GiB": (0.5, "<= 2"),
        "InContextKD step / KD step, resnet56 to resnet20": (1.0, "<= 1.05"),
    }
    assert found["InContextKD step / KD step, resnet56 to resnet20"]["low"] == 0.9
