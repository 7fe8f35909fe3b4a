"""docs/results.md: the tables that name their source say what results/ holds."""

import itertools
import json
import math
import re
import statistics
from functools import cache
from pathlib import Path

import pytest
import scipy.stats


ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
KD = "KD"  # the student alone asks no teacher, and all have the same
# <!-- results: STUDY:METRIC | STUDY:METRIC - BASELINE --> above a table, one source a column behind the first; the
# first column is the method's name in the study, or <!-- rows: NAME | NAME --> says which it is.
TABLES = re.findall(r"<!-- results: (.+?) -->\n(?:<!-- rows: (.+?) -->\n)?\n(\|.+?)\n\n", PAGE, re.DOTALL)
# <!-- answers: STUDY | STUDY --> above <!-- rows: QUESTION: METHOD | … -->, one study a column behind the first.
ANSWERS = re.findall(r"<!-- answers: (.+?) -->\n<!-- rows: (.+?) -->\n\n(\|.+?)\n\n", PAGE, re.DOTALL)


@cache
def runs_of(study: str) -> list[dict]:
    return json.loads((ROOT / "results" / study / "results.json").read_text(encoding="utf-8"))["runs"]


@cache
def item_errors() -> dict:
    return json.loads((ROOT / "results" / "item_errors.json").read_text(encoding="utf-8"))


@cache
def answers() -> list[dict]:
    return json.loads((ROOT / "results" / "answers.json").read_text(encoding="utf-8"))


@cache
def steadiness() -> set[tuple[str, ...]]:
    """What influence_study.py found of weights, as the page may round it: means with their intervals or ranges."""
    report = json.loads((ROOT / "results" / "influence" / "safe.json").read_text(encoding="utf-8"))
    found = set()
    for numbers in itertools.chain(report["stability"].values(), report["runs"].values()):
        for summary in numbers.values():
            ends = summary["interval"] or (min(summary["values"]), max(summary["values"]))
            for factor, digits in itertools.product((1, 100), (0, 1, 2)):
                found.add(tuple(f"{factor * value:.{digits}f}" for value in (summary["mean"], *ends)))
    return found


def scores_of(study: str, method: str, metric: str) -> dict[int, float]:
    """Per seed, in percent where it is a share."""
    factor = 1 if metric.endswith(("loss", "entropy")) else 100
    return {run["seed"]: factor * run["results"][metric] for run in runs_of(study) if run["method"] == method}


def expected(source: str, method: str) -> str:
    study, metric, baseline = re.fullmatch(r"([\w-]+):(\w+)(?: - (.+))?", source).groups()
    if metric == "seeds":
        return str(len(scores_of(study, method, "train_runtime")))
    if metric == "kept":
        metric = baseline
        own, teacher = scores_of(study, method, metric), scores_of(study, KD, f"teacher_{metric}")
        return f"{statistics.fmean(100 * own[seed] / teacher[seed] for seed in own):.1f}" if own else "–"
    digits = 2 if metric.endswith(("loss", "entropy")) else 1
    own = scores_of(study, method, metric)
    if not own:
        return "–"
    if baseline is None:
        return f"{statistics.fmean(own.values()):.{digits}f} ± {statistics.stdev(own.values()):.{digits}f}"
    if method == baseline:
        return "–"
    base = scores_of(study, baseline, metric)
    pairs = [own[seed] - base[seed] for seed in own if seed in base]
    mean = statistics.fmean(pairs)
    of_seeds = scipy.stats.t.ppf(0.975, len(pairs) - 1) * scipy.stats.sem(pairs)
    errors = item_errors()[study][metric]
    (of_items,) = (errors[pair] for pair in (f"{method} - {baseline}", f"{baseline} - {method}") if pair in errors)
    half = math.hypot(of_seeds, scipy.stats.norm.ppf(0.975) * 100 * of_items)
    return f"{mean:+.{digits}f} ({mean - half:+.{digits}f} to {mean + half:+.{digits}f})"


@pytest.mark.parametrize(("studies", "rows", "table"), ANSWERS, ids=[studies for studies, _, _ in ANSWERS])
def test_a_table_says_what_was_answered(studies, rows, table):
    """Its rows are questions (a part of their words) and methods."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    for row, (_, *cells) in zip(rows.split("|"), lines, strict=True):
        question, method = row.split(":")
        for study, cell in zip(studies.split("|"), cells, strict=True):
            (found,) = (
                answer
                for answer in answers()
                if (answer["study"], answer["what"]) == (study.strip(), method.strip())
                and question.strip() in answer["question"]
            )
            assert cell == f"{found['mean']:.2f} ({found['low']:.2f} to {found['high']:.2f})", row


def test_every_table_with_a_source_is_found():
    assert len(TABLES) == len(re.findall(r"<!--\s*results", PAGE)) > 4
    assert len(ANSWERS) == len(re.findall(r"<!--\s*answers", PAGE)) > 0


@pytest.mark.parametrize(("sources", "rows", "table"), TABLES, ids=[sources for sources, _, _ in TABLES])
def test_a_table_says_what_its_study_found(sources, rows, table):
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    names = [name.strip() for name in rows.split("|")] if rows else [cells[0] for cells in lines]
    columns = [source.strip() for source in sources.split("|")]
    known = {source.split(":")[0].strip() for source in columns}
    methods = {run["method"] for study in known for run in runs_of(study)}
    assert set(names) <= methods
    for name, (_, *cells) in zip(names, lines, strict=True):
        assert cells == [expected(source, name) for source in columns], name


def test_most_studies_have_such_a_table():
    shown = {source.split(":")[0].strip() for sources, _, _ in TABLES for source in sources.split("|")}
    studies = {path.parent.name for path in (ROOT / "results").glob("*/results.json")}
    assert shown == studies - {"cifar10-recipe"}  # whose columns are methods


def test_the_papers_claims_are_answered_by_what_was_found():
    found = set(steadiness())
    for answer in answers():
        for factor, digits, sign in itertools.product((1, 100), (1, 2, 3), ("", "+")):
            found.add(tuple(f"{factor * answer[key]:{sign}.{digits}f}" for key in ("mean", "low", "high")))
    section = PAGE.split("## The papers' claims")[1].split("\n## ")[0].replace("−", "-")
    number = r"([+-]?\d+\.\d+)"
    claims = re.findall(rf"{number}(?: [a-z]+| %)? \({number} to {number}\)", section)
    assert len(claims) > 15
    assert [claim for claim in claims if claim not in found] == []


def test_the_steadiness_of_weights_is_what_was_found():
    section = PAGE.split("## Influence weights")[1].split("\n## ")[0].replace("−", "-")
    number = r"(-?[\d.]+)"
    told = re.findall(rf"{number} \({number} to {number}\)", section)
    assert len(told) > 10
    assert [numbers for numbers in told if numbers not in steadiness()] == []
