"""The README tells the truth: its commands exist and run as written. (Its Python examples are collected from README.md itself.)"""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from equinorm import catalogue

ROOT = Path(__file__).parent.parent
GENERATED = ROOT / "docs" / "catalogue"  # written by every build of the documentation, and not there before the first
WRITTEN = [page for page in sorted((ROOT / "docs").rglob("*.md")) if not page.is_relative_to(GENERATED)]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *WRITTEN]


def commands(page: Path) -> list[list[str]]:
    """Return what a page types after "$" in its console blocks, as argument lists without comments."""
    blocks = re.findall(r"^```console\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [shlex.split(line[2:], comments=True) for block in blocks for line in block.splitlines() if line.startswith("$ ")]


README = commands(ROOT / "README.md")
OURS = [command for command in README if command[0] == "equinorm"]


def test_the_two_commands_of_a_newcomer_are_there():
    assert ["./dev", "demo"] in README
    assert ["./dev", "test"] in README
    assert ["pip", "install", "equinorm"] in README
    assert OURS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_named_exists(page):
    known = subprocess.run([sys.executable, "dev", "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for program, *arguments in commands(page):
        if program == "./dev":
            assert re.search(rf"^  {arguments[0]} ", known, re.MULTILINE), f"{page.name} names ./dev {arguments[0]}, which does not exist"
        elif program == "pip":
            assert arguments[0] == "install"
            package, _, extra = arguments[1].rstrip("]").partition("[")
            assert package == "equinorm"
            assert not extra or extra in extras, f"{page.name} names the extra {extra!r}; there are {sorted(extras)}"
        elif program == "python":
            assert arguments[0] == "-m"
            assert importlib.util.find_spec(arguments[1]), f"{page.name} names the module {arguments[1]}, which does not exist"
        else:
            assert program == "equinorm", f"{page.name} names {program!r}; teach this test to check it"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        path = page.parent / target
        there = path.stem in catalogue.methods() if path.parent == GENERATED else path.exists()
        assert target.startswith("http") or there, f"{page.name} links to {target}, which does not exist"


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / command[0]
    return subprocess.run([program, *command[1:]], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", OURS, ids=shlex.join)
def test_every_console_command_runs(command, tmp_path):
    result = run(command, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`(equinorm (?:list|show|info)[^`]*)`", (ROOT / "README.md").read_text()))))
def test_every_short_command_of_the_prose_runs(command, tmp_path):
    result = run(shlex.split(command), tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
