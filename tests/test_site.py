"""The site builds with every warning an error, fetches nothing, and has a page or an anchor for all that is public."""

import functools
import html
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import griffe
import pytest
from filelock import FileLock

import hfkd
import hfkd.data
import hfkd.distillers
import hfkd.functional
import hfkd.models


ROOT = Path(__file__).resolve().parents[1]


def build(site, *flags, root=ROOT):
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site), *flags]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The built site, once for all workers."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "site"
    with FileLock(f"{folder}.lock"):
        if not (folder / "index.html").is_file():
            done = build(folder)
            assert done.returncode == 0, done.stdout + done.stderr
    return folder


def pages_of(site):
    return {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}


def test_every_page_is_there(site):
    built = pages_of(site)
    written = [path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")]
    assert len(written) > 20
    assert {"index.html" if page.name == "index" else f"{page}/index.html" for page in written} <= built.keys()
    assert not [path for path in site.rglob("*") if path.suffix in (".py", ".md")]


def test_every_public_name_has_an_anchor(site):
    anchors = {anchor for page in pages_of(site).values() for anchor in re.findall(r'id="([^"]+)"', page)}
    modules = (hfkd, hfkd.distillers, hfkd.functional, hfkd.data, hfkd.models)
    names = {name for module in modules for name in module.__all__} - {"GLUE_TASKS"}  # listed in load_text_data
    paths = {name: {f"{module.__name__}.{name}" for module in modules if name in module.__all__} for name in names}
    assert len(paths) > 60
    assert not [name for name in paths if not paths[name] & anchors]


def test_the_search_finds_every_method(site):
    index = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))
    titles = {(entry["location"].partition("#")[0], html.unescape(entry["title"])) for entry in index["docs"]}
    methods = {name for name in hfkd.distillers.__all__ if name not in ("Distiller", "ModelOutputs")}
    assert {("methods/", name) for name in methods} <= titles


def test_nothing_is_fetched_from_elsewhere(site):
    for name, page in pages_of(site).items():
        assert not re.findall(r"<(?:script|img|iframe|source)[^>]*src=\"?(?:https?:)?//", page), name
        assert not re.findall(r"<link(?![^>]*rel=\"?canonical)[^>]*href=\"?(?:https?:)?//", page), name
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_nothing_of_docstrings_and_formulas_is_left_as_it_was_written(site):
    for name, page in pages_of(site).items():
        text = re.sub(r"<(code|script)\b.*?</\1>", "", page, flags=re.S)
        left = r":(?:class|func|meth|math|data):|\.\. math::|&gt;&gt;&gt;|arithmatex|include:"
        assert not re.findall(left, text), name
    assert "<math" in (site / "methods/index.html").read_text(encoding="utf-8")


def test_what_is_included_is_there(site):
    pages = pages_of(site)
    assert "class ConfidentKD" in re.sub(r"<[^>]+>", "", pages["writing-a-method/index.html"])
    assert "Report a weakness in private" in pages["security/index.html"]
    assert "student alone" in pages["results/index.html"]


def test_what_leads_nowhere_fails_the_build(tmp_path):
    """A copy of the sources with some faults."""
    for name in ("docs", "hfkd"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "SECURITY.md", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    faults = {
        ("docs/index.md", "(results.md)"): "(result.md)",
        ("docs/index.md", "(precision.md)"): "(precision.md#nowhere)",
        ("hfkd/distillers/kd.py", ":func:`kd_loss`"): ":func:`check_temperature`",  # which no page shows
        ("hfkd/distillers/kd.py", "        alpha: Share"): "        alhpa: Share",
    }
    for (path, old), new in faults.items():
        text = (tmp_path / path).read_text(encoding="utf-8")
        assert old in text
        (tmp_path / path).write_text(text.replace(old, new), encoding="utf-8")
    (tmp_path / "docs/lost.md").write_text("# On no list\n")
    done = build(tmp_path / "site", root=tmp_path)
    assert done.returncode == 1
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert re.search(r'WARNING.+ are not included in the "nav" configuration:\n *- lost\.md', done.stderr)
    for complaint in ("result.md", "#nowhere", "check_temperature", "alhpa"):
        assert [line for line in warnings if complaint in line], (complaint, done.stderr)


@pytest.fixture(scope="module")
def hooks():
    specification = importlib.util.spec_from_file_location("hooks", ROOT / "docs/hooks.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_parts_of_other_files_are_included_without_their_title(hooks):
    contributing = hooks.on_page_markdown("<!-- include: CONTRIBUTING.md -->")
    assert "A new method" in contributing
    assert "# Contributing\n" not in contributing
    method = hooks.on_page_markdown("before\n<!-- include: CONTRIBUTING.md#A new method -->")
    assert method.startswith("before\nThree files and a README row:")
    assert "House rules" not in method
    assert "(benchmarks.md)" in hooks.on_page_markdown("<!-- include: README.md#Results -->")
    with pytest.raises(hooks.PluginError, match=r"README\.md has no heading 'Nowhere' to include"):
        hooks.on_page_markdown("<!-- include: README.md#Nowhere -->")


def test_formulas_become_mathml_or_an_error(hooks):
    converted = hooks.on_page_content(r'a <span class="arithmatex">\(p &lt; \frac12\)</span> b')
    assert converted.startswith('a <span class="formula"><math')
    assert "&#x0003C;" in converted or "&lt;" in converted
    assert 'display="block"' in hooks.on_page_content(r'<div class="arithmatex">\[x\]</div>')
    with pytest.raises(hooks.PluginError, match=r"does not know: \\odott x"):
        hooks.on_page_content(r'<span class="arithmatex">\(\odott x\)</span>')


SOURCE = '''
from dataclasses import dataclass, field

def near(x):
    r"""A :class:`~written.Thing`, :func:`near`, :meth:`Thing.go`, :meth:`going <written.Thing.go>` of :math:`a_b`::

        literal

    .. math:: a + b
        + c

    Shapes:
        (B,). Returns
        a scalar.

    >>> near(1)
    2

    End.
    """

@dataclass
class Thing:
    rate: float = field(default=1.0, metadata={"help": "How fast."})

    def go(self):
        """Uses :func:`near`."""
'''


def test_docstrings_become_markdown(hooks, tmp_path):
    (tmp_path / "written.py").write_text(SOURCE)
    options = {"search_paths": [tmp_path], "extensions": griffe.load_extensions(hooks.RestructuredText())}
    module = griffe.load("written", **options)
    assert module["near"].docstring.value == (
        "A [`Thing`][written.Thing], [`near`][written.near], [`Thing.go`][written.Thing.go], "
        "[`going`][written.Thing.go] of $a_b$:\n\n    literal\n\n"
        "$$\na + b + c\n$$\n\n**Shapes:** (B,). Returns a scalar.\n\n```pycon\n>>> near(1)\n2\n```\n\nEnd."
    )
    assert (module["Thing.rate"].value, module["Thing.rate"].docstring.value) == ("1.0", "How fast.")
    assert module["Thing.go"].docstring.value == "Uses [`near`][written.near]."
    (tmp_path / "written.py").write_text(SOURCE.replace(":func:`near`", ":func:`far`"))
    with pytest.raises(griffe.NameResolutionError, match="far"):
        griffe.load("written", **options)


@pytest.fixture
def address(site):
    """Where the site is served."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=site)
    handler.log_message = lambda *args: None
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("name", ["", "methods/", "engines/", "troubleshooting/", "api/distillers/"])
def test_pages_fit_a_desk_and_a_phone(address, page, name, width):
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(f"{address}/{name}", wait_until="load")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert all(url.startswith(address) or url.startswith("data:") for url in asked), asked
