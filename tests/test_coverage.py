"""No method is forgotten: each has its line in a table of tests, a reference, facts, a page of text, and its place in the files."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import equinorm
from equinorm import catalogue
from equinorm.facts import FAMILIES
from tests.cases import CASES

TESTS = Path(__file__).parent
SOURCES = {path: path.read_text() for path in TESTS.rglob("test_*.py")}
METHODS = catalogue.methods()
LAYERS = ("weight", "residual", "bounded", "gan")  # families whose members are not norms over activations: tests of their own kind


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.facts.family not in LAYERS])
def test_every_activation_norm_is_in_the_table(name):
    lines = [case for case in CASES if issubclass(case.cls, METHODS[name])]
    assert lines, f"{METHODS[name].__name__} has no line in tests/cases.py"
    where = inspect.getsourcefile(lines[0].reference)
    assert where is not None
    assert "import equinorm" not in Path(where).read_text() or where.endswith("cases.py"), f"the reference in {where} imports the package"


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.facts.family in LAYERS])
def test_every_other_method_has_tests(name):
    call = re.compile(rf"\b{METHODS[name].__name__}\b")
    files = [path for path, source in SOURCES.items() if call.search(source) and path.parent.name != "tests"]
    assert files, f"no file in tests/weight, tests/residual or tests/gan names {METHODS[name].__name__}"


def test_every_module_of_the_package_that_defines_facts_is_exported():
    """A file with `facts` whose class is not in the table of contents is a forgotten export."""
    folder = Path(equinorm.__file__).parent
    exported = {m.facts.name for m in METHODS.values()}
    written = set()
    for path in [p for kind in ("norms", "conditional", "weight", "residual") for p in (folder / kind).glob("*.py")]:
        written |= set(re.findall(r'Facts\(\s*name="([a-z0-9_]+)"', path.read_text()))
    assert written <= exported, f"not exported in equinorm/__init__.py: {sorted(written - exported)}"


def test_every_family_has_members():
    present = {m.facts.family for m in METHODS.values()}
    assert present == set(FAMILIES)


def test_references_import_nothing_of_ours():
    for path in (TESTS / "references").glob("*.py"):
        assert not re.search(r"^\s*(import|from) equinorm", path.read_text(), re.MULTILINE), path.name


@pytest.mark.parametrize("name", METHODS)
def test_options_are_written_down(name):
    """Every parameter of a method is described under Args, or the docstring hides an option."""
    method = METHODS[name]
    described = catalogue.prose(method).get("Args", "")
    # "device, dtype: of the parameters" describes two at once
    names = {part.strip().lstrip("*") for line in re.findall(r"^([\w*, ]+):", described, re.MULTILINE) for part in line.split(",")}
    for parameter in inspect.signature(method).parameters:
        assert parameter in names, f"{method.__name__}: {parameter} is not described under Args (described: {sorted(names)})"
