"""What is to be compared: everything asked for, checked before any work starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

import equinorm
from equinorm.compare.cells import Cell, grid
from equinorm.compare.errors import InputError
from equinorm.compare.metrics import DIRECTIONS, direction_of
from equinorm.compare.norms import NormSpec
from equinorm.compare.task import Task


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A comparison. Making one reads and checks all of it.

    Attributes:
        task: a built-in task, ``file.py:function`` or ``module:function``.
        norms: specifications, see :class:`~equinorm.compare.norms.NormSpec`; kept in canonical text.
        batch_sizes: samples per optimizer step.
        seeds: each gives initial weights and an order of the data.
        learning_rates: grid to choose from by validation; one value is simply used; none leaves the task's own.
        metric: what is compared; empty takes the task's own statement, else "accuracy".
        direction: "maximize" or "minimize"; empty takes the task's own statement, else what the metric's name says.
        epochs: passed to the task; None leaves the task's own number.
        data: folder with the task's data, passed to the task.
        device: passed to the task if it takes one.
        options: further keyword arguments for the task.

    Raises:
        InputError: naming what was expected and what came.
    """

    task: str = "digits-mlp"
    norms: Sequence[str] = ("none", "batch", "layer", "group")
    batch_sizes: Sequence[int] = (2, 4, 16, 64)
    seeds: Sequence[int] = (0, 1, 2)
    learning_rates: Sequence[float] = ()
    metric: str = ""
    direction: str = ""
    epochs: int | None = None
    data: str | None = None
    device: str = "cpu"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        set_ = object.__setattr__  # the way of frozen dataclasses to normalize what they were given
        set_(self, "norms", _distinct("norms", [str(NormSpec.parse(norm)) for norm in self.norms]))
        set_(self, "batch_sizes", _distinct("batch sizes", [_positive("batch sizes", n, int) for n in self.batch_sizes]))
        set_(self, "seeds", _distinct("seeds", [_seed(seed) for seed in self.seeds]))
        if self.learning_rates:
            rates = [_positive("learning rates", float(lr), float) for lr in self.learning_rates]
            set_(self, "learning_rates", _distinct("learning rates", rates))
        if self.epochs is not None:
            _positive("epochs", self.epochs, int)
        _check_device(self.device)
        task = Task(self.task)
        task.check_options(self._asked_for())
        set_(self, "metric", self.metric or task.stated("metric") or "accuracy")
        set_(self, "direction", self.direction or task.stated("direction") or direction_of(self.metric))
        if self.direction not in DIRECTIONS:
            raise InputError(f"direction must be one of {', '.join(DIRECTIONS)}, got {self.direction!r}")
        task.check_input(self.batch_sizes, self.task_arguments(task))

    def cells(self) -> list[Cell]:
        """Everything to measure, in order."""
        return grid(self.norms, self.batch_sizes, self.seeds, self.learning_rates)

    def task_arguments(self, task: Task) -> dict[str, Any]:
        """The keyword arguments that are the same in every cell."""
        given = {"epochs": self.epochs, "data": self.data, **self.options}
        if task.accepts("device"):
            given["device"] = self.device
        return {key: value for key, value in given.items() if value is not None}

    def identity(self) -> dict[str, Any]:
        """What all cells of one study must have in common for their results to be comparable. The data's folder may differ by machine."""
        task = Task(self.task)
        arguments = {key: value for key, value in self.task_arguments(task).items() if key not in ("data", "device")}
        return {
            "task": self.task,
            "task source": task.source_hash,
            "task arguments": json.loads(json.dumps(arguments, default=repr)),
            "metric": self.metric,
            "direction": self.direction,
            "device": torch.device(self.device).type,
            "equinorm": equinorm.__version__,
        }

    def to_json(self) -> dict[str, Any]:
        """All fields, for results and for worker processes."""
        return {f.name: list(value) if isinstance(value := getattr(self, f.name), tuple) else value for f in fields(self)}

    def _asked_for(self) -> dict[str, str]:
        asked = {key: f"--option {key}={value}" for key, value in self.options.items()}
        if self.learning_rates:
            asked["lr"] = "--lr"
        if self.epochs is not None:
            asked["epochs"] = "--epochs"
        if self.data is not None:
            asked["data"] = "--data"
        if self.device != "cpu":
            asked["device"] = f"--device {self.device}"
        with_weights = [norm for norm in self.norms if NormSpec.parse(norm).weight]
        if with_weights:
            asked["weight_layer"] = f"norm {with_weights[0]}"
        return asked


def fingerprint(identity: dict[str, Any]) -> str:
    """A short name for an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _distinct(what: str, values: list[Any]) -> tuple[Any, ...]:
    if not values:
        raise InputError(f"{what} must not be empty: give at least one")
    return tuple(dict.fromkeys(values))


def _positive(what: str, value: Any, kind: Callable[[Any], Any]) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole if kind is int else isinstance(value, (int, float))) or not 0 < value < float("inf"):
        raise InputError(f"{what} must be positive {'whole ' if kind is int else ''}numbers, got {value!r}")
    return kind(value)


def _seed(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32:
        raise InputError(f"seeds must be whole numbers from 0 to 2^32 - 1, got {value!r}")
    return value


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # an unknown name, or one that this machine does not have
        raise InputError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
