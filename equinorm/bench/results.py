"""The numbers as a file: a line that says what was measured with what, then one line per entry and contender, written as they come."""

from __future__ import annotations

import csv
import json
import os
import subprocess
from collections.abc import Iterable, Mapping
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from equinorm.bench.grid import DTYPES, LAYOUTS, Entry, Pages, parsed, written
from equinorm.bench.measure import Timing
from equinorm.compare.environment import machine
from equinorm.compare.errors import InputError
from equinorm.kernels.traffic import Pass

COLUMNS = ("pages", "norm", "shape", "dtype", "layout", "pass", "who", "ms", "copy_ms", "gb_per_s", "of_copy", "rounds", "note")
BUSY = 0.25  # load per core
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def circumstances() -> dict[str, Any]:
    """What decides about the numbers: versions, commit, machine, threads, the size of the last cache in bytes; the date, and the load."""
    return {
        **machine(),
        "timm": version("timm") if find_spec("timm") else None,
        "last level cache": last_level_cache(),
        "commit": commit(),
        "date": date.today().isoformat(),
        "load": round(os.getloadavg()[0], 2),
    }


def busy(found: Mapping[str, Any]) -> bool:
    """Whether other processes were at work when a measurement began, enough to show in its numbers."""
    return found["load"] > BUSY * found["cores"]


def last_level_cache() -> int:
    """Its size in bytes, as Linux states it; 32 MiB where nothing is known."""
    sizes = [(path / "size").read_text().strip() for path in CACHES.glob("index*") if (path / "size").exists()]
    return max((int(size[:-1]) * {"K": 1 << 10, "M": 1 << 20}[size[-1]] for size in sizes), default=32 << 20)


def commit() -> str | None:
    """The commit of a checkout, with "+" when the package has changes of its own; None for an installed package."""
    folder = Path(__file__).parents[1]
    try:
        known = _git("-C", str(folder), "ls-files", "--error-unmatch", "__init__.py")
        return _git("-C", str(folder), "rev-parse", "--short", "HEAD") + "+" * bool(known and _git("-C", str(folder), "status", "-s", "."))
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()


class Results:
    """A file of timings that grows, or with ``path`` None a list that does.

    Attributes:
        timings: those of the file, and what was added.
        circumstances: of the file, or of this machine.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.timings: list[Timing] = []
        self.circumstances = circumstances()
        if path is None:
            return
        if path.exists() and path.stat().st_size:
            there, self.timings = read(path)
            ignored = ("date", "load", "cores")
            if differing := [key for key in self.circumstances if key not in ignored and there.get(key) != self.circumstances[key]]:
                raise InputError(
                    f"{path} was measured under other circumstances ({', '.join(differing)} differ); go on in another file, or remove it"
                )
            self.circumstances = there
        else:
            path.write_text(f"# {json.dumps(self.circumstances)}\n{','.join(COLUMNS)}\n")

    @property
    def measured(self) -> set[Entry]:
        """Entries that have their numbers."""
        return {timing.entry for timing in self.timings}

    def add(self, timings: Iterable[Timing]) -> None:
        """Keep timings, in the file at once."""
        timings = list(timings)
        self.timings += timings
        if self.path is not None:
            with self.path.open("a", newline="") as file:
                csv.writer(file).writerows(line(timing).values() for timing in timings)


def line(timing: Timing) -> dict[str, Any]:
    """A timing as a line of the file."""
    entry, bandwidth, of_copy = timing.entry, timing.bandwidth, timing.of_copy
    return {
        "pages": entry.pages,
        "norm": entry.norm,
        "shape": written(entry.shape),
        "dtype": entry.dtype,
        "layout": entry.layout,
        "pass": entry.of,
        "who": timing.who,
        "ms": "" if timing.seconds is None else f"{timing.seconds * 1e3:.5g}",
        "copy_ms": f"{timing.copy * 1e3:.5g}",
        "gb_per_s": "" if bandwidth is None else f"{bandwidth / 1e9:.3g}",
        "of_copy": "" if of_copy is None else f"{of_copy:.3g}",
        "rounds": timing.rounds,
        "note": timing.note,
    }


def read(path: Path) -> tuple[dict[str, Any], list[Timing]]:
    """The circumstances and the timings of a file.

    Raises:
        InputError: the file cannot be read, or is none of these.
    """
    try:
        head, *rest = path.read_text().splitlines()
        found = json.loads(head.removeprefix("# "))
        return found, [_timing(row) for row in csv.DictReader(rest)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no file of equinorm bench: {type(error).__name__}: {error}") from None


def _timing(row: dict[str, str]) -> Timing:
    pages, of = _one_of(row["pages"], get_args(Pages)), _one_of(row["pass"], get_args(Pass))
    entry = Entry(pages, row["norm"], parsed(row["shape"]), _one_of(row["dtype"], DTYPES), _one_of(row["layout"], LAYOUTS), of)
    seconds = float(row["ms"]) / 1e3 if row["ms"] else None
    return Timing(entry, row["who"], seconds, float(row["copy_ms"]) / 1e3, int(row["rounds"]), row["note"])


def _one_of(text: str, allowed: Iterable[str]) -> Any:
    if text not in allowed:
        raise ValueError(f"expected one of {', '.join(allowed)}, got {text!r}")
    return text
