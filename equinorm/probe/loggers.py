"""Where a callback writes: three methods, and two that write to a file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from equinorm.probe.findings import Finding
from equinorm.probe.record import plain


class Logger(Protocol):
    """What receives the numbers of a training run; any object with these three methods."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one step, by name ("signal/layer1.conv", "findings/severe")."""
        ...

    def finding(self, step: int, finding: Finding) -> None:
        """A finding that was not there at the sample before."""
        ...

    def close(self) -> None:
        """Nothing more comes."""
        ...


class JsonLines:
    r"""A line of JSON per sample and per finding: ``{"step": 100, "scalars": {...}}`` and ``{"step": 100, "finding": {...}}``.

    Every line is written at once, so that the file can be read while training goes on. Numbers that are not finite become null.

    Args:
        path: of the file, which is added to.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "run.jsonl"
        >>> log = JsonLines(path)
        >>> log.scalars(0, {"signal/0": 1.5})
        >>> log.close()
        >>> path.read_text()
        '{"step": 0, "scalars": {"signal/0": 1.5}}\n'
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: TextIO = self.path.open("a", encoding="utf-8")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write a line with the numbers."""
        self._write({"step": step, "scalars": plain(values)})

    def finding(self, step: int, finding: Finding) -> None:
        """Write a line with the finding."""
        self._write({"step": step, "finding": plain(finding)})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()


class TensorBoard:
    """TensorBoard: numbers as scalars, findings as text.

    Args:
        target: a folder, or a ``SummaryWriter`` that is already there (which stays open).

    Raises:
        ImportError: a folder is given and tensorboard is not installed.
    """

    def __init__(self, target: Any) -> None:
        self._own = isinstance(target, (str, Path))
        if self._own:
            from torch.utils.tensorboard import SummaryWriter

            target = SummaryWriter(str(target))
        self.writer = target

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar per number."""
        for name, value in values.items():
            if math.isfinite(value):
                self.writer.add_scalar(name, value, step)

    def finding(self, step: int, finding: Finding) -> None:
        """One text per finding, under its kind."""
        self.writer.add_text(f"findings/{finding.kind}", f"**{finding.severity}** {finding.sentence}", step)

    def close(self) -> None:
        """Close the writer, unless it was handed over."""
        self.writer.flush()
        if self._own:
            self.writer.close()


class Tracker:
    """Accelerate's trackers, whichever are in use.

    Args:
        accelerator: with ``log(values, step=...)``, after ``init_trackers``.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Hand the numbers on."""
        self.accelerator.log(dict(values), step=step)

    def finding(self, step: int, finding: Finding) -> None:
        """Print the finding on the main process; trackers take numbers alone."""
        self.accelerator.print(f"step {step}: {finding.severity}: {finding.sentence}")

    def close(self) -> None:
        """Nothing: the accelerator ends its trackers itself."""
