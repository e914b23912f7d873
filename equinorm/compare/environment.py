"""What the results were measured with: versions, machine, threads, kernels. Shown by ``equinorm info``, and kept with every cell."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
from argparse import ArgumentParser, Namespace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import equinorm
from equinorm.compare.errors import InputError
from equinorm.kernels import cpu, gpu

# Import name, distribution, the extra that brings it.
OPTIONAL = (
    ("optuna", "optuna", "compare"),
    ("sklearn", "scikit-learn", "compare"),
    ("rich", "rich", "compare"),
    ("matplotlib", "matplotlib", "compare"),
    ("jinja2", "Jinja2", "compare"),
    ("rich", "rich", "probe"),
    ("matplotlib", "matplotlib", "probe"),
    ("jinja2", "Jinja2", "probe"),
    ("pyarrow", "pyarrow", "parquet"),
    ("PIL", "pillow", "parquet"),
)


def require(extra: str) -> None:
    """Check that an extra is installed.

    Raises:
        InputError: naming what is missing and the command that installs it.
    """
    missing = [
        distribution for module, distribution, brought_by in OPTIONAL if brought_by == extra and not importlib.util.find_spec(module)
    ]
    if missing:
        raise InputError(f'{", ".join(missing)} not installed: pip install "equinorm[{extra}]"')


def machine(device: str = "cpu") -> dict[str, Any]:
    """Where and with what a cell is measured."""
    return {
        "equinorm": equinorm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else _processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
    }


def versions(*extras: str) -> dict[str, str | None]:
    """Installed versions of the dependencies that these extras bring; None for those that are not there."""
    return {distribution: _version(distribution) for _, distribution, extra in OPTIONAL if extra in extras}


def add_arguments(parser: ArgumentParser) -> None:
    """The arguments of ``equinorm info``."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: Namespace) -> int:
    """Print what this installation consists of."""
    found = {
        **machine(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "kernels": cpu.info(),
        "gpu kernels": gpu.info(),
        "optional": versions("compare", "parquet"),
    }
    if arguments.json:
        print(json.dumps(found, indent=2, default=str))
        return 0
    for name, value in found.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, entry in value.items():
                print(f"  {key:<16}{'not installed' if name == 'optional' and entry is None else entry}")
        else:
            print(f"{name:<18}{'none' if value is None else value}")
    return 0


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
