"""``./dev`` runs on a bare Python, and installs what pyproject.toml asks for at the versions that constraints.txt names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILD_TOOLS = {"hatchling", "editables"}  # of the editable install, which runs without isolation


def dev(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ./dev with no site-packages in sight (-I -S), as on a bare machine."""
    return subprocess.run([sys.executable, "-I", "-S", "dev", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def direct() -> dict[str, Requirement]:
    """Every requirement of the package, its extras and its build, the package's own extras left out."""
    wanted = [*PROJECT["build-system"]["requires"], *PROJECT["project"]["dependencies"]]
    wanted += [line for extra in PROJECT["project"]["optional-dependencies"].values() for line in extra]
    requirements = {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, wanted)}
    del requirements["equinorm"]
    return requirements


def test_help_needs_no_package_and_names_every_command():
    result = dev("--help")
    assert result.returncode == 0, result.stderr
    every = ("setup", "demo", "test", "lint", "format", "types", "docs", "bench", "torture", "agreement", "trains", "diagnose", "ci")
    for command in every:
        assert re.search(rf"^  {command} +\w", result.stdout, re.MULTILINE), f"no help for {command}:\n{result.stdout}"
    assert dev().stdout == result.stdout


def test_an_unknown_command_is_refused_with_the_known_ones():
    result = dev("tset")
    assert result.returncode == 2
    assert "no command 'tset'; there are setup, " in result.stderr


@pytest.mark.parametrize("command", ["setup", "ci"])
def test_superfluous_arguments_are_refused(command):
    result = dev(command, "--fast")
    assert result.returncode == 2
    assert f"./dev {command} takes no arguments, got --fast" in result.stderr


def test_every_direct_dependency_is_pinned_and_nothing_else_is():
    assert pins().keys() == direct().keys() | BUILD_TOOLS


def test_pins_are_what_pyproject_allows_and_what_is_installed():
    allowed = {name: requirement.specifier for name, requirement in direct().items()}
    for name, pinned in pins().items():
        assert name not in allowed or allowed[name].contains(pinned), f"{name}=={pinned} is not within {allowed[name]}"
        assert version(name).partition("+")[0] == pinned, f"{name} {version(name)} is installed, {pinned} is pinned; run ./dev setup"


# Imported only where the user's own program or PyTorch has brought them, and to serve them.
USERS = {
    "lightning": "the callback for its Trainer",
    "pytorch_lightning": "the same under its older name",
    "transformers": "the callback for its Trainer",
    "triton": "kernels for CUDA; builds of PyTorch for CUDA bring it",
}


def test_every_package_that_the_code_imports_is_declared():
    """A package that is there only because another one needs it may be gone with that one's next release."""
    extras = PROJECT["project"]["optional-dependencies"]
    lines = PROJECT["project"]["dependencies"] + [line for extra in extras.keys() - {"dev", "docs"} for line in extras[extra]]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    brought_by = packages_distributions()
    for path in (ROOT / "equinorm").rglob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
        for top in {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"equinorm", *USERS}:
            owners = {canonicalize_name(owner) for owner in brought_by.get(top, [top])}
            assert owners & declared, (
                f"{path.relative_to(ROOT)} imports {top} ({', '.join(sorted(owners))}), which pyproject.toml does not declare"
            )


def test_users_need_torch_alone():
    assert [Requirement(line).name for line in PROJECT["project"]["dependencies"]] == ["torch"]
