"""Where a student comes from: weights, data, papers, and the command that made it."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import datasets
from torch import nn
from torch.utils.data import Dataset

from hfkd.checks import innermost
from hfkd.data import ImageDataset
from hfkd.distillers.base import Distiller
from hfkd.features import base_model


def hub_origin(model: nn.Module) -> tuple[str, str] | None:
    """Hub id and commit of the weights that a model started from, where they came from there."""
    config = base_model(model).config
    name, commit = getattr(config, "name_or_path", ""), getattr(config, "_commit_hash", None)
    return (name, commit) if name and commit and not os.path.exists(name) else None


def data_origin(dataset: Dataset | None) -> dict[str, str | None] | None:
    """Hub id, revision, configuration and split of a data set that ``datasets`` downloaded from there."""
    source = innermost(dataset)
    source = source.split if isinstance(source, ImageDataset) else source
    if not isinstance(source, datasets.Dataset):
        return None
    for address in source.info.download_checksums or ():
        if match := re.match(r"hf://datasets/([^@]+)@([0-9a-f]+)/", address):
            split = None if source.split is None else str(source.split)
            return {"id": match[1], "revision": match[2], "config": source.info.config_name, "split": split}
    return None


_ARXIV = re.compile(r"\b\d{4}\.\d{4,5}\b")
_CITED = re.compile(
    r'([A-Z][\w-]+(?: et al\.| and [A-Z][\w-]+)?) (\d{4}),(?: "([^"]+)",)?(?: [^",;.]+,)? arXiv (\d{4}\.\d{4,5})'
)


def papers(distiller: Distiller) -> dict[str, tuple[str, str, str]]:
    """The papers that a method and what it is made of name as their source: arXiv number to authors, year and title.

    They are read where they stand, in the docstrings: a class names its papers under ``Source:``, and it or a function
    beside it says ``Author et al. 2022, "Title", arXiv 2203.08679``. What it does not say is empty.
    """
    found: dict[str, tuple[str, str, str]] = {}
    for part in distiller.modules():
        if not isinstance(part, Distiller):
            continue
        said = getattr(inspect.getmodule(type(part)), "__dict__", {}).values()
        texts = [" ".join((inspect.getdoc(item) or "").split()) for item in said if callable(item)]
        _, _, source = " ".join((type(part).__doc__ or "").split()).partition("Source:")
        for number in _ARXIV.findall(source.partition(">>>")[0]):
            cited = [match for text in texts for match in _CITED.findall(text) if match[3] == number]
            authors, year, title, _ = max(cited, key=lambda match: len(match[2]), default=("", "", "", number))
            found.setdefault(number, (authors, year, title))
    return found


def bibtex(number: str, authors: str, year: str, title: str) -> str:
    """A BibTeX entry of a paper on arXiv."""
    year = year or f"20{number[:2]}"
    names = authors.replace(" et al.", " and others")
    fields = {"title": title or f"arXiv:{number}", "author": names, "year": year, "eprint": number}
    fields |= {"archivePrefix": "arXiv", "url": f"https://arxiv.org/abs/{number}"}
    key = f"{names.split()[0].lower()}{year}" if names else f"arxiv{number}"
    lines = [f"  {name} = {{{value}}}" for name, value in fields.items() if value]
    return f"@misc{{{key},\n" + ",\n".join(lines) + "\n}"


def command_line(processes: int, secrets: Sequence[str | None] = ()) -> str | None:
    """The command that runs this script, for a shell; None where none runs, as in a notebook.

    Tokens are left out, and paths are given from the working folder or with ``~``.

    Args:
        processes: How many were started together.
        secrets: What must not be shown, wherever it stands.
    """
    main = sys.modules["__main__"]
    if getattr(main, "__file__", None) is None:
        return None
    words = ["python"] if processes == 1 else ["torchrun", "--nproc_per_node", str(processes)]
    if main.__spec__ is not None:
        words += ["-m", main.__spec__.name.removesuffix(".__main__")]
    else:
        script = Path(main.__file__).resolve()
        inside = script.is_relative_to(Path.cwd()) or script.is_relative_to(Path.home())
        words.append(str(script) if inside else script.name)
    hide_next = False
    for word in sys.argv[1:]:
        flag, equals, _ = word.partition("=")
        is_secret = re.fullmatch(r"--?[\w-]*(token|password|secret|api[_-]?key)", flag, re.IGNORECASE) is not None
        if hide_next and not word.startswith("--"):
            word = "TOKEN"
        elif is_secret and equals:
            word = f"{flag}=TOKEN"
        hide_next = is_secret and not equals
        words.append(word)
    quoted = (shlex.quote(word) for word in words)
    line = " ".join(f"\\\n    {word}" if word.startswith("--") else word for word in quoted)
    for secret in secrets:
        line = line.replace(secret, "TOKEN") if secret else line
    line = re.sub(r"\bhf_\w{8,}", "TOKEN", line)
    line = re.sub(r"(://)[^/\s@]+@", r"\1", line)
    return without_home(line.replace(f"{Path.cwd()}{os.sep}", ""))


def without_home(text: str) -> str:
    """A text with ``~`` for the home folder, wherever it is named in full or by a way up and down again."""
    for home in {str(Path.home()), os.path.realpath(Path.home())} - {os.sep}:
        text = re.sub(rf"(?<![\w.-])(?:/|(?:\.\./)+){re.escape(home.strip(os.sep))}(?![\w.-])", "~", text)
    return text
