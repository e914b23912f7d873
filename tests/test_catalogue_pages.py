"""The catalogue's pages: what they quote, and what happens when a docstring does not say what a page needs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from equinorm import catalogue
from equinorm.facts import FAMILIES

pytest.importorskip("sphinx")
from sphinx.errors import ExtensionError

EXTENSION = Path(__file__).parent.parent / "docs" / "_ext" / "catalogue_pages.py"


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("catalogue_pages", EXTENSION)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", catalogue.methods())
def test_every_page_quotes_what_is_computed(name, pages):
    quoted = pages.rule(catalogue.methods()[name])
    compile(quoted, name, "exec")
    assert len(quoted.splitlines()) >= 2
    assert '"""' not in quoted
    assert "raise TypeError" not in quoted.splitlines()[1:3], "a check of arguments is no rule"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("batch", "    return normalize(pooled, weight, bias, eps), pooled"),
        ("sync_batch", "def forward("),  # its own; the rule is batch norm's
        ("dynamic_tanh", "    return torch.tanh(alpha * x) * weight + bias"),
        ("decorrelated_batch", "def zca("),
        ("weight_standardization", "def standardized("),
        ("mp_sum", "def mp_sum("),
    ],
)
def test_the_quoted_rule_is_the_method(name, line, pages):
    assert line in pages.rule(catalogue.methods()[name])


def test_text_is_put_together_as_it_was_meant(pages):
    full = "x" * 120
    assert pages.unwrapped(f"y = x\nwhere {full}\nends.\n\n  set in") == f"y = x\nwhere {full} ends.\n\n  set in"
    assert pages.entries("x: (N, C), or\n(C).\ny: same\n    shape.\nz: none\nw: some") == [
        "x: (N, C), or (C).",
        "y: same shape.",
        "z: none",
        "w: some",
    ]


def test_a_page_for_every_method_and_a_line_in_the_comparison(pages, tmp_path):
    pages.write(tmp_path / "catalogue")
    index = (tmp_path / "catalogue" / "index.md").read_text()
    for name, method in catalogue.methods().items():
        assert f"]({name}.md)" in index
        assert (tmp_path / "catalogue" / f"{name}.svg").exists() == bool(method.facts.pools)
    assert all(f"## {family.capitalize()}" in index for family in FAMILIES)


def test_a_docstring_without_a_section_is_named(pages, tmp_path, monkeypatch):
    batch = catalogue.methods()["batch"]
    assert batch.__doc__ is not None
    incomplete = type("Forgetful", (batch,), {"__doc__": batch.__doc__.replace("Not when:", "Never:"), "__module__": "somewhere"})
    monkeypatch.setattr(catalogue, "methods", lambda: {"batch": incomplete})
    with pytest.raises(ExtensionError, match=r'the docstring of somewhere.Forgetful lacks "Not when:"$'):
        pages.write(tmp_path)
    incomplete.__doc__ = None
    with pytest.raises(ExtensionError, match='Forgetful lacks a first sentence, "Formula:", "Use it when:"'):
        pages.write(tmp_path)
