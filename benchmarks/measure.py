"""How the benchmarks measure: rounds of everybody in random order, ratios within a round, medians and spread."""

import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch


def interleave(cases: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each case returned in each round, after a round that does not count."""
    for case in cases.values():
        case()
    measured = {name: [] for name in cases}
    for number in range(rounds):
        order = list(cases)
        random.Random(number).shuffle(order)
        for name in order:
            measured[name].append(cases[name]())
    return measured


def summary(values: Sequence[float], target: str | None = None) -> dict:
    """Median of what the rounds gave, their quartiles or, of fewer than 7, their range, and what they should be.

    A target is such as ``"<= 1.05"``.
    """
    low, value, high = min(values), statistics.median(values), max(values)
    if len(values) >= 7:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"value": value, "low": low, "high": high, "target": target, "runs": len(values)}


def ratio(one: Sequence[float], other: Sequence[float], target: str | None = None) -> dict:
    """The summary of the ratios, round by round."""
    return summary([a / b for a, b in zip(one, other, strict=True)], target)


def verdict(record: Mapping) -> str:
    """Whether a target is met or missed: by the whole interval, else it is undecided. Nothing where there is none."""
    if record["target"] is None:
        return ""
    sign, bound = record["target"].split()
    good, bad = (record["high"], record["low"]) if sign == "<=" else (-record["low"], -record["high"])
    bound = float(bound) if sign == "<=" else -float(bound)
    return "met" if good <= bound else "missed" if bad > bound else "undecided"


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object]) -> float:
    """Wall seconds."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


class PeakMemory:
    """Anonymous memory of this process, in bytes: at the start, and the most held since; a mapped file is not memory.

    >>> with PeakMemory() as memory:
    ...     _ = bytearray(1 << 24)
    >>> memory.peak - memory.start > 1 << 23
    True
    """

    def __enter__(self):
        self.start = self.peak = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, self._now())

    def _watch(self):
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status).group(1))


def run_script(script: Path, *words: str) -> str:
    """The last line that a script prints, run in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, str(script), *words], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{script.name} {' '.join(words)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout.splitlines()[-1]


def machine() -> str:
    """Processor, cores, accelerator and versions."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    processor = f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"
    return ", ".join([processor, *gpu, f"{torch.get_num_threads()} threads", f"torch {torch.__version__}"])


def table(ratios: Mapping[str, Mapping]) -> str:
    """The ratios as a table of the docs."""
    lines = ["| ratio | target | median (spread) | rounds | |", "|---|---|---|---|---|"]
    for name, record in ratios.items():
        value = "{value:.3g} ({low:.3g}–{high:.3g})".format(**record)
        lines.append(f"| {name} | {record['target'] or ''} | {value} | {record['runs']} | {verdict(record)} |")
    return "\n".join(lines)


def write(output: Path, **record: object) -> dict:
    """Write a record of this machine and its load as JSON; return it."""
    record = {"machine": machine(), "load": os.getloadavg()[0], **record}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")
    return record
