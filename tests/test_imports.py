"""Who imports whom, read from the source; and what ``import equinorm`` costs and loads, measured in a fresh process."""

from __future__ import annotations

import ast
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import equinorm

PACKAGE = Path(equinorm.__file__).parent

# What each part may import of the others; facts, which know nothing, are free to all.
#     kernels <- core <- norms, conditional, residual <- surgery <- compare <- recipes <- cli
MAY_IMPORT: dict[str, set[str]] = {
    "facts": set(),
    "kernels": set(),
    "core": {"kernels"},
    "norms": {"core", "kernels"},
    "conditional": {"core", "kernels"},
    "residual": {"core", "kernels", "weight"},
    "weight": {"kernels.activations"},  # the table of gains
    "gan": {"core", "kernels", "weight", "residual"},
    # The probe measures with torch alone. The methods of its Report that show it, and that change models, load what they need when called:
    # checkup, which stands above it. Nothing else of the probe may.
    "probe": {"kernels.activations", "checkup"},
    "init": {"kernels.activations"},
}
_METHODS = {"core", "kernels", "norms", "conditional", "residual", "weight", "gan"}
MAY_IMPORT |= {
    "catalogue": {"equinorm"},  # "equinorm" is the table of contents in __init__.py
    "catalogue_list": {"catalogue"},
    "catalogue_show": {"catalogue", "catalogue_list"},
    "surgery": _METHODS | {"catalogue", "equinorm"},
    "page": set(),  # style and figures of HTML reports
    "compare": _METHODS | {"catalogue", "surgery", "init", "page", "equinorm"},
}
MAY_IMPORT |= {"checkup": {"probe", "init", "surgery", "compare", "page", "kernels.activations"}}
MAY_IMPORT |= {"trains": {"compare", "catalogue", "equinorm"}, "bench": _METHODS | {"compare", "catalogue", "equinorm"}}
MAY_IMPORT |= {"recipes": set(MAY_IMPORT) | {"equinorm"}, "cli": set(MAY_IMPORT) | {"recipes", "equinorm"}, "__main__": {"cli"}}

# The parts that a model imports; they load torch and nothing else from outside.
LIGHT = ["facts", "kernels", "core", "norms", "conditional", "residual", "weight", "gan", "init", "catalogue", "surgery"]


def part(path: Path) -> str:
    """Return the part of the package that a file belongs to: equinorm/core/moments.py -> "core"."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(source: str, path: Path) -> list[tuple[int, str]]:
    """Return (line, dotted name) of everything that a file imports, at whatever depth, relative imports resolved."""
    package = ["equinorm", *path.relative_to(PACKAGE).parent.parts]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            # "from equinorm.core import moments" names a module where one is there, else an object of the package
            for alias in node.names:
                as_module = PACKAGE.parent.joinpath(*module.split("."), alias.name)
                is_module = as_module.with_suffix(".py").exists() or as_module.is_dir()
                found.append((node.lineno, f"{module}.{alias.name}" if is_module else module))
    return found


def violations(source: str, path: Path) -> list[str]:
    """Return one line for each import in a file that its floor does not allow."""
    own = part(path)
    wrong = []
    for line, name in imports(source, path):
        top, _, inner = name.partition(".")
        if top in ("tests", "benchmarks", "examples", "docs"):
            wrong.append(f"{path.name}:{line}: imports {name}, which is not part of the package")
        if top == "equinorm":
            inner = inner or "equinorm"
            allowed = MAY_IMPORT[own] | {own, "facts"}
            if not any(inner == floor or inner.startswith(f"{floor}.") for floor in allowed):
                wrong.append(f"{path.name}:{line}: {own} imports {name}; it may import {', '.join(sorted(allowed))}")
        elif own in LIGHT and top not in sys.stdlib_module_names and top not in ("torch", "triton"):
            wrong.append(f"{path.name}:{line}: {own} imports {name}; a model's parts need torch alone")
    return wrong


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_file_stays_on_its_floor(path):
    if path != PACKAGE / "__init__.py":
        assert part(path) in MAY_IMPORT, f"{path}: say in MAY_IMPORT what this new part of the package may import"
        assert violations(path.read_text(), path) == []


def test_the_package_itself_imports_only_light_parts_at_once():
    top = PACKAGE / "__init__.py"
    source = top.read_text().partition("\nif TYPE_CHECKING:")[0]  # what follows is for type checkers, or loaded when first used
    parts = {name.split(".")[1] for _, name in imports(source, top) if name.startswith("equinorm.")}
    assert parts <= set(LIGHT)


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("core/x.py", "from equinorm.norms.batch import BatchNorm", "core imports equinorm.norms.batch"),
        ("core/x.py", "from ..norms import batch", "core imports equinorm.norms"),
        ("core/x.py", "from equinorm import norms", "core imports equinorm.norms"),
        ("kernels/x.py", "def f():\n    import equinorm.core.moments", "kernels imports equinorm.core.moments"),
        ("weight/x.py", "from equinorm.core.moments import Moments", "weight imports equinorm.core.moments"),
        ("norms/x.py", "from equinorm import BatchNorm", "norms imports equinorm"),
        ("norms/x.py", "import numpy as np", "a model's parts need torch alone"),
        ("probe/x.py", "from equinorm.kernels import reference", "probe imports equinorm.kernels"),
        ("compare/x.py", "from tests.helpers import assert_close", "not part of the package"),
    ],
)
def test_the_check_sees_a_wrong_import(file, source, message):
    assert message in "\n".join(violations(source, PACKAGE / file))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("core/x.py", "import torch\nfrom . import moments\nfrom ..kernels import reference\nfrom equinorm.facts import Facts"),
        ("probe/x.py", "from equinorm.kernels.activations import TABLE"),
        ("compare/x.py", "import optuna\nfrom equinorm import BatchNorm"),
    ],
)
def test_the_check_allows_what_is_right(file, source):
    assert violations(source, PACKAGE / file) == []


MEASURE = """
import json, sys, time
import torch
before, start = set(sys.modules), time.process_time()
import equinorm
print(json.dumps([time.process_time() - start, sorted({name.partition(".")[0] for name in set(sys.modules) - before})]))
"""


def test_import_is_light():
    # Processor time, after torch is loaded: the wall clock of a busy machine measures the neighbours.
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True).stdout) for _ in range(5)
    ]
    loaded = set(runs[0][1]) - set(sys.stdlib_module_names)
    assert loaded <= {"equinorm", "torch"}, f"import equinorm loads {sorted(loaded)}: import optional dependencies where they are used"
    cost = statistics.median(seconds for seconds, _ in runs)
    assert cost <= 0.15, f"import equinorm takes {cost:.3f} s more than import torch, at most 0.15 s is allowed"
