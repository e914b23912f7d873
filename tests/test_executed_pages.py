"""Pages whose code runs while they are built: what was printed and drawn stands in the page, and code that fails fails the build."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

application = pytest.importorskip("sphinx.application")
from sphinx.errors import ExtensionError  # noqa: E402 - behind the check that Sphinx is there

EXTENSIONS = Path(__file__).parents[1] / "docs" / "_ext"


@pytest.fixture
def build(tmp_path, monkeypatch):
    """A function that builds one page and returns its HTML."""
    monkeypatch.syspath_prepend(EXTENSIONS)
    source = tmp_path / "source"
    source.mkdir()

    def build(text):
        (source / "index.md").write_text(text)
        settings = {"extensions": ["myst_parser", "executed"], "html_theme": "basic", "keep_warnings": False}
        target = tmp_path / "html"
        app = application.Sphinx(source, None, target, target / ".doctrees", "html", settings, status=None, warningiserror=True)
        app.build()
        return (target / "index.html").read_text()

    return build


def test_blocks_share_a_namespace_and_show_what_they_print(build):
    html = build("# Page\n\n```{run}\nseven = 3 + 4\n```\n\n```{run}\nprint('it is', seven * 6)\n```\n")
    assert re.search(r"highlight-text.*?it is 42", html, re.DOTALL)
    assert html.count("highlight-text") == 1, "a block that prints nothing shows nothing"


def test_a_drawing_takes_the_colours_of_the_page(build):
    html = build("# Page\n\n```{run}\nvalues = [1, 2]\n```\n\n```{drawing} What is seen\naxes.plot(values, color=series(3))\n```\n")
    assert '<svg role="img" aria-label="What is seen"' in html
    assert "var(--series-3)" in html
    assert "axes.plot" not in html


@pytest.mark.parametrize("block", ["{run}", "{drawing} Nothing"])
def test_code_that_fails_names_page_and_line(build, block):
    with pytest.raises(ExtensionError, match=r'(?s)index\.md: a block of code failed.*index\.md", line 5.*ZeroDivisionError'):
        build(f"# Page\n\n```{block}\none = 1\none / 0\n```\n")
