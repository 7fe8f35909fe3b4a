"""docs/methods.md says of every method what the code says, and its snippets run."""

import ast
import inspect
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import hfkd.distillers
from hfkd.distillers import TTM, WTTM, Combined, Distiller, Wrapper


ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### (\S+)\n(.*?)(?=^##|\Z)", TEXT, re.M | re.S))
PUBLIC = [getattr(hfkd.distillers, name) for name in hfkd.distillers.__all__]
METHODS = [cls for cls in PUBLIC if inspect.isclass(cls) and issubclass(cls, Distiller) and cls is not Distiller]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda cls: cls.__name__)


def line(method, name):
    """What a section's list says under a name."""
    found = re.findall(rf"^- \*\*{name}:?\*\*:? ?(.*?)(?=^- \*\*|^\n|\Z)", SECTIONS[method.__name__], re.M | re.S)
    assert len(found) == 1, name
    return re.sub(r"\s+", " ", found[0])


def test_every_section_is_about_a_method_and_has_the_same_parts():
    assert {method.__name__ for method in METHODS} == set(SECTIONS)
    for name, text in SECTIONS.items():
        parts = re.findall(r"^- \*\*([\w -]+?):?\*\*", text, re.M)
        expected = ["Needs", "Batch-coupled", "Own parameters", "Cost", "Use it", "Tested", "Source"]
        assert parts == expected, name
        assert "**Not**" in text, name


@every_method
def test_every_option_is_named_with_its_default(method):
    table = re.findall(r"^\| `(\w+)` \| (?:`(.+?)`|required) \|", SECTIONS[method.__name__], re.M)
    documented = [(name, eval(default) if default else inspect.Parameter.empty) for name, default in table]
    options = inspect.signature(method).parameters.values()
    named = [p for p in options if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]  # nn.Module's own, where none is
    assert documented == [(p.name, p.default) for p in named]


@every_method
def test_what_it_needs_and_couples_is_what_its_class_says(method):
    needs, coupled = line(method, "Needs"), line(method, "Batch-coupled").split()[0].strip(".,:;")
    # A wrapper that is not of its own is coupled where its base is, and a combination where a part is.
    depends = issubclass(method, (Wrapper, Combined))
    assert coupled == ("yes" if method.batch_coupled else "as" if depends else "no")
    assert "class indices" in needs or not method.needs_hard_labels
    assert ("column `index`" in needs) == ("index" in method.batch_columns)
    assert ("Also regression" in needs) == ("regression" in method.problem_types)
    rate = method.default_learning_rate
    assert rate is None or str(rate) in line(method, "Own parameters")


def test_the_defaults_are_a_row_of_the_papers_pairs():
    ttm, wttm = TTM(), WTTM()
    assert f"| ResNet-56 → ResNet-20 | {ttm.gamma:g}, {ttm.beta:g} | {wttm.gamma:g}, {wttm.beta:g} |" in TEXT


@pytest.mark.parametrize(
    ("page", "at_least"),
    [
        ("methods.md", 30),
        ("engines.md", 25),
        ("faults.md", 12),
        ("precision.md", 25),
        ("benchmarks.md", 0),
        ("comparing.md", 20),
        ("export.md", 5),
        ("hub.md", 8),
    ],
)
def test_the_tests_that_it_names_exist(page, at_least):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", text))
    assert len(named) > at_least
    files = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    missing = [(file, test) for file, test in named if test and f"\ndef {test}(" not in files.get(file, "")]
    assert not missing
    assert {file for file, _ in named} <= set(files)


def test_every_cell_of_the_engines_is_a_test_or_says_that_there_is_none():
    text = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    head, _, *table = re.findall(r"^\|(.+)\|$", text, re.M)
    engines, features = head.split("|")[1:], {row.split("|")[0].strip(): row.split("|")[1:] for row in table}
    assert len(engines) == 5
    assert len(features) > 10
    words = r"untested|refused|as losses|as on 4|by resuming|five of them|twelve of them"
    for feature, cells in features.items():
        assert len(cells) == len(engines), feature
        assert all(re.search(rf"`test_\w+\.py::test_\w+`|{words}", cell) for cell in cells), feature
    assert "(docs/engines.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_row_on_precision_and_adapters_names_its_test_or_says_that_there_is_none():
    text = (ROOT / "docs" / "precision.md").read_text(encoding="utf-8")
    rows = [row.split("|") for row in re.findall(r"^\|(.+)\|$", text, re.M) if "---" not in row and "Works" not in row]
    assert len(rows) > 25
    for row in rows:
        assert len(row) == 3, row
        assert re.search(r"`test_\w+\.py::test_\w+`|untested", row[2]), row
        assert ("untested" in row[2]) == ("not tried" in row[1]), row
    assert "(docs/precision.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_links_lead_somewhere_and_the_contents_are_whole():
    headings = re.findall(r"^#{2,3} (.+)$", TEXT, re.M)
    anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert len(anchors) == len(set(anchors))
    assert set(re.findall(r"\]\(#(.+?)\)", TEXT)) == set(anchors)
    assert re.findall(r"^ *- \[.+?\]\(#(.+?)\)$", TEXT, re.M) == anchors
    assert "(docs/methods.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_of_the_readme_links_lead_to_files_and_headings():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(((?!http)[^)#]+)(?:#([^)]+))?\)", readme)
    assert len(links) >= 6
    for path, anchor in links:
        headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(encoding="utf-8"), re.M)
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, (path, anchor)


def test_external_links_are_well_formed():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    links = [link for page in pages for link in re.findall(r"\]\((\w+:.*?)\)", page.read_text(encoding="utf-8"))]
    assert len(links) > 80
    for link in links:
        parts = urlsplit(link)
        assert parts.scheme == "https", link
        assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc), link
        assert re.fullmatch(r"[\w./-]+", parts.path), link


def messages():
    """Patterns of the texts in hfkd's code: what an f-string fills in may be anything."""
    for path in (ROOT / "hfkd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            literal = "".join(part.value for part in parts if isinstance(getattr(part, "value", None), str))
            if len(literal) >= 20 and isinstance(node, (ast.JoinedStr, ast.Constant)):
                yield "".join(re.escape(p.value) if isinstance(p, ast.Constant) else ".+" for p in parts)


def test_quoted_messages_are_those_of_the_code():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^ *```text\n *(.+?)\n *```$", text, re.M | re.S)
    assert len(quoted) > 20
    patterns = [re.compile(pattern) for pattern in messages()]
    assert not [message for message in quoted if not any(pattern.fullmatch(message) for pattern in patterns)]


def test_the_snippets_make_what_they_say():
    found = re.findall(r"```python\n(.+?)```", TEXT, re.S)
    assert len(found) == 2
    names = {}
    for snippet in found:
        exec(compile(snippet, "methods.md", "exec"), names)
    assert names["wttm_with_crd"].parts["crd"].weight == 0.8
    assert names["wttm_with_crd"].weights == {"wttm": 1.0, "crd": 1.0}
