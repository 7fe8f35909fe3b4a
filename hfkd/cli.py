"""Command lines of the examples: flags, or a YAML or JSON file with flags that override it; and how they end."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser


PACKAGE = Path(__file__).parent


def is_refusal(error: BaseException) -> bool:
    """Whether a ``raise`` of hfkd, or of the script that runs, is where an exception comes from.

    That is how input is refused. What comes out of another library, or out of an expression, is a bug somewhere.
    """
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    script = Path(getattr(sys.modules["__main__"], "__file__", None) or PACKAGE)
    place, beside = Path(innermost.filename).resolve(), script.parent.resolve()
    ours = place.is_relative_to(PACKAGE.resolve()) or (
        place.is_relative_to(beside) and "site-packages" not in place.relative_to(beside).parts
    )
    return ours and (innermost.line or "").startswith("raise ")


@contextmanager
def explain_refusals() -> Iterator[None]:
    """End the script with a message and exit status 2, and no traceback, where its input is refused.

    Everything else keeps its traceback; so do refusals with ``HFKD_TRACEBACK=1`` in the environment. A script that is
    done leaves its process group: gloo's threads may abort an interpreter that ends while they live
    (https://github.com/pytorch/pytorch/pull/179291).
    """
    try:
        yield
    except Exception as error:
        if os.environ.get("HFKD_TRACEBACK") or not is_refusal(error):
            raise
        if int(os.environ.get("RANK", 0)):
            # Most often all processes refuse alike, and the launcher ends the others as soon as the first one ended,
            # which may have started later; who is alone with an error speaks up.
            time.sleep(60)
        print(f"error: {error.args[0] if error.args else error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class _Parser(HfArgumentParser):
    """Whose errors are exceptions, and take a line instead of all flags there are."""

    def error(self, message):
        raise ValueError(f"{message}: see --help")


def parse_arguments(dataclass_types: Sequence[type], argv: Sequence[str] | None = None) -> tuple:
    """Fill dataclasses from a command line.

    Args:
        dataclass_types: What ``HfArgumentParser`` takes.
        argv: The words after the script's name; those of this process by default. A first word that ends in .yaml,
            .yml or .json is a file of flags, and the flags behind it override it.

    Returns:
        One instance a dataclass, in order.

    Raises:
        ValueError: If the file is not a flat table of flags, a flag is unknown (names the nearest), or a value is not
            one that the flag takes.
        FileNotFoundError: If there is no such file.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0].endswith((".yaml", ".yml", ".json")):
        words = [*words_of(read_table(Path(words[0]))), *words[1:]]
    parser = _Parser(dataclass_types, allow_abbrev=False)
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(args=words, return_remaining_strings=True)
    except ValueError as error:
        raise ValueError(str(error)) from error  # of transformers too: about flags all the same
    if unknown:
        flags = [name for action in parser._actions for name in action.option_strings]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1)
        remedy = f"did you mean {near[0]}?" if near else "see --help (a file of flags comes first)"
        raise ValueError(f"no flag takes {' '.join(unknown[:5])!r}: {remedy}")
    return tuple(parsed)


def check_conflicts(model_args, args) -> None:
    """Refuse flags of an example that would be without effect.

    Args:
        model_args: The example's ``ModelArguments``.
        args: Its ``TrainingArguments``.

    Raises:
        ValueError: If there is one.
    """
    if model_args.teacher is None:
        for flag, value in {
            "train_teacher": model_args.train_teacher,
            "teacher_cache": args.teacher_cache,
            "teacher_dtype": args.teacher_dtype,
        }.items():
            if value:
                raise ValueError(f"--{flag} is about a teacher, and there is none: name one with --teacher")
    if model_args.teacher_epochs is not None and not model_args.train_teacher:
        raise ValueError("--teacher_epochs is about --train_teacher, which is not there: add it, or leave that out")
    if model_args.baseline is not None and not Path(model_args.baseline, "README.md").is_file():
        raise ValueError(
            f"--baseline {model_args.baseline} has no README.md: name the --output_dir of a run without --teacher"
        )
    if model_args.distiller is None and json_table(model_args.distiller_kwargs, "distiller_kwargs"):
        raise ValueError("--distiller_kwargs are a method's, and none is named: add --distiller, such as kd")


def json_table(text: str, flag: str) -> dict:
    """The table that a flag gives as JSON.

    Raises:
        ValueError: If it is none.
    """
    try:
        table = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--{flag} {text!r} is not JSON ({error}): write it as '{{\"temperature\": 2}}'") from error
    if not isinstance(table, dict):
        raise ValueError(f"--{flag} {text!r} is no table: write it as '{{\"temperature\": 2}}'")
    return table


_DEEPEST = 20  # a table of flags is 3


class _Loader(yaml.SafeLoader):
    """YAML in which only true and false are booleans, so that ``eval_strategy: no`` is a word; no key twice."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    depth = 0

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent, index):
        # Aliases of aliases are how a small file becomes a huge value.
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(problem="anchors and aliases are not read: write the value out")
        self.depth += 1
        if self.depth > _DEEPEST:
            raise yaml.constructor.ConstructorError(problem=f"nested more than {_DEEPEST} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|True|false|False)$"), list("tTfF"))


def read_table(path: Path) -> dict:
    """The table that a YAML or JSON file holds.

    Raises:
        ValueError: If it holds none.
        FileNotFoundError: If there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path.resolve()}: correct the first argument, which names a file of flags")
    try:
        table = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error.reason}): save it as such") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        raise ValueError(f"{path} is neither YAML nor JSON: {error.problem}{where}. Correct it there") from error
    except OSError:
        raise
    except Exception as error:  # what a value that is none makes of PyYAML: IndexError, KeyError, RecursionError, …
        raise ValueError(f"{path} is neither YAML nor JSON: {error}") from error
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table):
        raise ValueError(f"{path} must hold a table such as `student: resnet20`, one flag a line")
    return table


def words_of(table: Mapping[str, object]) -> list[str]:
    """The words of a command line that give each flag its value; one of None is left out."""
    words = []
    for name, value in table.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return words
