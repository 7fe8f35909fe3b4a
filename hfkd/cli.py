"""Command lines of the examples: flags, or a YAML or JSON file with flags that override it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from transformers import HfArgumentParser


def parse_arguments(dataclass_types: Sequence[type], argv: Sequence[str] | None = None) -> tuple:
    """Fill dataclasses from a command line.

    Args:
        dataclass_types: What ``HfArgumentParser`` takes.
        argv: The words after the script's name; those of this process by default. A first word that ends in .yaml,
            .yml or .json is a file of flags, and the flags behind it override it.

    Returns:
        One instance a dataclass, in order.

    Raises:
        ValueError: If the file is not a flat table of flags.
        FileNotFoundError: If there is no such file.
        SystemExit: For an unknown flag, as argparse does.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0].endswith((".yaml", ".yml", ".json")):
        words = [*_words_of_file(Path(words[0])), *words[1:]]
    return HfArgumentParser(dataclass_types).parse_args_into_dataclasses(args=words)


_DEEPEST = 20  # a table of flags is 3


class _Loader(yaml.SafeLoader):
    """YAML in which only true and false are booleans, so that ``eval_strategy: no`` is a word."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    depth = 0

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


def _words_of_file(path: Path) -> list[str]:
    try:
        table = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506, a SafeLoader; JSON is YAML
    except OSError:
        raise
    except Exception as error:  # what a value that is none makes of PyYAML: IndexError, KeyError, RecursionError, …
        raise ValueError(f"{path} is neither YAML nor JSON: {error}") from error
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table):
        raise ValueError(f"{path} must hold a table such as `student: resnet20`, one flag a line")
    words = []
    for name, value in table.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return words
