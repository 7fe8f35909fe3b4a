"""What the site needs beyond Markdown: parts of other files, formulas as MathML, docstrings in reStructuredText."""

import html
import re
from collections.abc import Iterator
from pathlib import Path

import griffe
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError


ROOT = Path(__file__).resolve().parents[1]


def on_page_markdown(markdown: str, **kwargs) -> str:
    """Replace ``<!-- include: FILE.md#Heading -->`` by what is under that heading, without one by the whole file.

    On a page that is read in the repository the comment shows nothing, so the sentence before it must name the file.
    """
    return re.sub(r"<!-- include: ([^#\s]+)(?:#(.+?))? -->", lambda found: _included(*found.groups()), markdown)


def _included(path: str, heading: str | None) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    text = re.sub(r"\A# .+\n", "", text)  # the page has a title of its own
    if heading is not None:
        found = re.search(rf"^(#+) {re.escape(heading)}\n(.*?)(?=^\1 |\Z)", text, re.M | re.S)
        if found is None:
            raise PluginError(f"{path} has no heading {heading!r} to include")
        text = found.group(2)
    return text.replace("](docs/", "](")


def on_page_content(html: str, **kwargs) -> str:
    """Replace formulas by MathML, which browsers show with no script and no font from elsewhere."""
    pattern = r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>'
    return re.sub(pattern, _formula, html, flags=re.S)


def _formula(found: re.Match) -> str:
    tag, source = found.group(1), html.unescape(found.group(2)).strip()
    formula = convert(source, display="inline" if tag == "span" else "block")
    if "\\" in formula:
        raise PluginError(f"a formula has a command that latex2mathml does not know: {source}")
    return f'<{tag} class="formula">{formula}</{tag}>'


class RestructuredText(griffe.Extension):
    """Makes Markdown of the reStructuredText in docstrings, and docstrings of the help texts of arguments.

    A role becomes a link to the page of the API that shows its target; where none does, the build fails.
    """

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        """Go through all that a package defines."""
        for thing in _defined_in(pkg):
            if thing.is_attribute and thing.parent.is_class and thing.docstring is None:
                found = re.fullmatch(
                    r"""field\(default=(.+), metadata=\{'help': (['"])(.+?)\2.*""", str(thing.value or "")
                )
                if found:
                    thing.value = found.group(1)
                    thing.docstring = griffe.Docstring(found.group(3), parent=thing)
            elif thing.docstring is not None:
                thing.docstring.value = _as_markdown(thing.docstring.value, thing)


def _defined_in(thing: griffe.Object) -> Iterator[griffe.Object]:
    yield thing
    for member in thing.members.values():
        if not member.is_alias:
            yield from _defined_in(member)


def _as_markdown(text: str, scope: griffe.Object) -> str:
    text = re.sub(
        r"^( *)\.\. math:: (.+(?:\n\1 +\S.*)*)",
        lambda m: f"{m[1]}$$\n{m[1]}{' '.join(m[2].split())}\n{m[1]}$$",
        text,
        flags=re.M,
    )
    text = re.sub(r"^>>> (?:.+\n?)+", lambda m: f"```pycon\n{m[0].rstrip()}\n```\n", text, flags=re.M)
    text = re.sub(r"::\n\n(?= )", ":\n\n", text)
    text = re.sub(r"^Shapes:\n((?: .+\n?)+)", lambda m: f"**Shapes:** {' '.join(m[1].split())}\n", text, flags=re.M)
    text = re.sub(r":math:`(.+?)`", r"$\1$", text)
    return re.sub(r":\w+:`(.+?)`", lambda m: _as_link(m[1], scope), text)


def _as_link(text: str, scope: griffe.Object) -> str:
    title, _, target = text.rstrip(">").rpartition(" <")
    path = target.lstrip("~")
    title = title or (path.rpartition(".")[2] if target.startswith("~") else path)
    package = scope.package
    if not path.startswith(f"{package.name}."):
        first, dot, rest = path.partition(".")
        path = scope.resolve(first) + dot + rest
    return f"[`{title}`][{package[path.removeprefix(f'{package.name}.')].canonical_path}]"
