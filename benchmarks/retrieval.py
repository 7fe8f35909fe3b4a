"""What IC-KD's memory bank costs: filling it, the step that reads it, and time and memory as it grows.

    python benchmarks/retrieval.py
    python benchmarks/retrieval.py --quick
    python benchmarks/retrieval.py --curve 10000 30000 100000 300000 1000000

Bank: :meth:`hfkd.memory.MemoryBank.fill` of 50,000 rows, 256 wide, of 100 classes, with the defaults of
``InContextKD()``: 8 neighbours of the same class and 64 of others. Step: ``benchmarks/method_cost.py``, ResNet-56 to
ResNet-20. Each bank is filled in a child process with one thread; seconds are its CPU seconds, so that an idle machine
takes no longer on one core and less on two. Memory is the peak of its anonymous resident memory (a mapped file is not
memory) above what the libraries take: the rows themselves are in it.

Curve: ``find_neighbours`` for some of the rows as queries, from all rows; the time of all rows is extrapolated from
them: what does not depend on the queries (normalising, FAISS's clusters) once, and the rest in proportion. Below each
other are the exact search and FAISS, which beyond 262,144 rows is approximate; ``found`` is the share of the exact
neighbours that it finds. Features are random around their class's centre, which is hard on clusters.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import measure
import method_cost
import torch
from transformers.utils import logging

from hfkd.memory import MemoryBank, find_neighbours


WIDTH, CLASSES = 256, 100
ROWS = (10_000, 30_000, 100_000, 300_000, 1_000_000)


def rows_of(size: int) -> dict[str, torch.Tensor]:
    """Random features around a centre for each class, as a teacher's are."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(size) % CLASSES
    features = torch.randn(size, WIDTH, generator=generator)
    features += torch.randn(CLASSES, WIDTH, generator=generator)[labels]
    logits = torch.randn(size, CLASSES, generator=generator)
    return {"index": torch.arange(size), "features": features, "logits": logits, "labels": labels}


def measured(what: str, size: int, queries: int) -> dict:
    """In a process of its own: CPU seconds and peak anonymous memory of a bank, or of a search for some rows."""
    torch.set_num_threads(1)
    with measure.PeakMemory() as memory:
        rows = rows_of(size)
        start = time.thread_time()  # without the watch's own, which runs all the time
        if what == "bank":
            MemoryBank(size, CLASSES, 8, 64).fill(rows)
            seconds = [time.thread_time() - start]
        else:
            # Twice, with many queries and with half of them: the difference is what queries cost.
            seconds = []
            for number in (queries // 2, queries):
                places = torch.arange(number) * (size // number)
                start = time.thread_time()
                found = find_neighbours(rows["features"], rows["labels"], rows=places, index=what)
                seconds.append(time.thread_time() - start)
    result = {"seconds": seconds, "bytes": memory.peak - memory.start}
    if what == "faiss":
        exact = find_neighbours(rows["features"], rows["labels"], rows=places[:100])
        pairs = zip(found.negatives[:100].tolist(), exact.negatives.tolist(), strict=True)
        result["found"] = sum(len(set(one) & set(other)) for one, other in pairs) / exact.negatives.numel()
    return result


def in_a_child(*words: object) -> dict:
    return json.loads(measure.run_script(Path(__file__), "--child", *map(str, words)))


def for_all(seconds: list[float], queries: int, size: int) -> float:
    """Seconds for all rows as queries, from those for half of the queries and for all of them."""
    half, whole = seconds
    each = (whole - half) / (queries - queries // 2)
    return whole + each * (size - queries)


def curve(sizes: list[int], queries: int) -> list[dict]:
    rows = []
    for size in sizes:
        for index in ("exact", "faiss"):
            asked = min(queries, size)
            found = in_a_child(index, size, asked)
            seconds = for_all(found["seconds"], asked, size)
            rows.append({"rows": size, "index": index, "queries": asked, "all_seconds": seconds, **found})
    return rows


def table(rows: list[dict]) -> str:
    """A curve as a table of the docs."""
    lines = [
        "| rows | index | queries timed | ms a query | CPU time of all (extrapolated) | peak memory (MiB) | found |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        half, whole = row["seconds"]
        each = 1000 * (whole - half) / (row["queries"] - row["queries"] // 2)
        total = row["all_seconds"]
        time_ = (
            f"{total:.0f} s" if total < 600 else f"{total / 60:.0f} min" if total < 36_000 else f"{total / 3600:.0f} h"
        )
        found = f"{row['found']:.1%}" if "found" in row else "all"
        cells = [f"{row['rows']:,}", row["index"], f"{row['queries']:,}", f"{each:.2f}", time_]
        lines.append(f"| {' | '.join(cells)} | {row['bytes'] / 2**20:,.0f} | {found} |")
    return "\n".join(lines)


def banks(size: int, rounds: int) -> dict[str, dict]:
    found = [in_a_child("bank", size, 0) for _ in range(rounds)]
    what = f"bank and neighbours of {size:,} x {WIDTH}"
    return {
        f"{what}, CPU seconds": measure.summary([row["seconds"][0] for row in found], "<= 60"),
        f"{what}, GiB": measure.summary([row["bytes"] / 2**30 for row in found], "<= 2"),
    }


def step(rounds: int, steps: int) -> dict[str, dict]:
    rows = method_cost.run("images", 100, ["InContextKD()"], "KD()", rounds, steps)
    (row,) = [row for row in rows if row["method"] == "InContextKD()"]
    return {"InContextKD step / KD step, resnet56 to resnet20": {**row["ratio"], "target": "<= 1.05"}}


def ratios(quick: bool = False) -> dict[str, dict]:
    """All targets of retrieval, with what was reached."""
    return banks(50_000, 1 if quick else 3) | step(3 if quick else 9, 1 if quick else 2)


def main(words: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, in about two minutes")
    parser.add_argument("--curve", nargs="*", type=int, metavar="ROWS", help=f"the curve instead, at {ROWS}")
    parser.add_argument("--queries", type=int, default=2000, help="of each point of the curve")
    parser.add_argument("--output", type=Path, default=Path("outputs/retrieval.json"))
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of children
    logging.set_verbosity_error()
    if args.curve is None:
        found = ratios(args.quick)
        print(measure.table(found))
        return measure.write(args.output, ratios=found)
    rows = curve(args.curve or list(ROWS), args.queries)
    print(table(rows))
    return measure.write(args.output, curve=rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        what, *sizes = sys.argv[2:]
        print(json.dumps(measured(what, *map(int, sizes))))
    else:
        main()
