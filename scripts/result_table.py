"""A markdown table of finished runs: mean ± standard deviation over seeds.

    python scripts/result_table.py outputs/cifar10/*/ --metric test_accuracy

Runs whose folders differ only in a trailing -SEED are one row, in the order of first appearance.
"""

import argparse
import json
import re
import statistics
from pathlib import Path


def table(folders: list[Path], metrics: list[str]) -> str:
    rows: dict[str, list[dict]] = {}
    for folder in folders:
        results = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
        rows.setdefault(re.sub(r"-\d+$", "", folder.name), []).append(results)
    lines = [f"| run | seeds | {' | '.join(metrics)} |", "|---|---|" + "---|" * len(metrics)]
    for name, runs in rows.items():
        cells = []
        for metric in metrics:
            values = [100 * run[metric] for run in runs if metric in run]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}" if values else "–")
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="Output folders with an all_results.json.")
    parser.add_argument("--metric", nargs="+", default=["test_accuracy"], help="Which results, in percent.")
    arguments = parser.parse_args()
    unfinished = [str(folder) for folder in arguments.folders if not (folder / "all_results.json").is_file()]
    if unfinished:
        parser.error(f"no all_results.json, so not finished: {', '.join(unfinished)}")
    print(table(arguments.folders, arguments.metric))
