"""The wheel is pure Python, holds the C++ sources, and works where it is unpacked."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import equinorm

PACKAGE = Path(equinorm.__file__).parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder]
    subprocess.run(command, cwd=PACKAGE.parent, check=True, capture_output=True)
    (path,) = folder.iterdir()
    return path


def test_wheel_is_pure_python_and_complete(wheel):
    assert wheel.name == f"equinorm-{equinorm.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(path.relative_to(PACKAGE.parent)) for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert {name for name in names if not name.startswith("equinorm-")} == sources
    assert "equinorm/py.typed" in names
    assert any(name.startswith("equinorm/kernels/csrc/") for name in names)


def test_wheel_asks_for_torch_alone(wheel):
    metadata = Parser().parsestr(zipfile.ZipFile(wheel).read(f"equinorm-{equinorm.__version__}.dist-info/METADATA").decode())
    assert [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line] == ["torch>=2.10"]
    assert metadata["License-Expression"] == "Apache-2.0"


def test_wheel_runs_where_it_is_unpacked(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import equinorm, torch; print(equinorm.__file__); print(equinorm.BatchNorm(3)(torch.randn(2, 3, 4, 4)).shape)"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [str(tmp_path / "equinorm" / "__init__.py"), "torch.Size([2, 3, 4, 4])"]
