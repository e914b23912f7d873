"""The process that measures one cell.

Each cell has its own: peak memory starts from the same point, nothing is left from the cell before, and a process that runs out of memory
or crashes takes only its own cell with it.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from typing import Any

import torch

from equinorm.compare.cells import Cell
from equinorm.compare.environment import machine
from equinorm.compare.errors import InputError
from equinorm.compare.memory import PeakMemory
from equinorm.compare.metrics import choosing_key, not_finite, numbers_of, reported_key
from equinorm.compare.norms import NormSpec
from equinorm.compare.outcomes import Failed, Measured, Outcome
from equinorm.compare.task import Task

LAST_LINES, LONGEST_REASON = 30, 2000


@dataclass(frozen=True)
class Job:
    """What the cells of a comparison have in common, for a worker.

    Attributes:
        task: its name.
        arguments: keyword arguments that are the same in every cell.
        metric: what is compared.
        choose_rate: whether validation must choose among learning rates.
        device: where the task computes.
        threads: of torch's operators.
        log: file that takes what cells print.
    """

    task: str
    arguments: Mapping[str, Any]
    metric: str
    choose_rate: bool
    device: str
    threads: int
    log: str


@dataclass(frozen=True)
class BadTask:
    """In place of an outcome: the task does not keep to the protocol, so no cell of it can be measured."""

    message: str


def main(job: Job, cell: Cell, pipe: connection.Connection) -> None:
    """Measure a cell and send its outcome through ``pipe``."""
    for sent in (signal.SIGINT, signal.SIGTERM):  # they reach every process of a terminal or a job; the command decides what they mean
        signal.signal(sent, signal.SIG_IGN)
    _print_to(job.log)
    warnings.filterwarnings("ignore", "equinorm runs without its CPU kernels")  # the command has said so, once
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(job.threads)
    try:
        pipe.send(measure(job, cell))
    except InputError as error:
        pipe.send(BadTask(str(error)))


def measure(job: Job, cell: Cell) -> Outcome:
    """Train one cell to its end.

    Raises:
        InputError: the task does not keep to the protocol, so that no cell of it can be measured.
    """
    where = machine(job.device)
    history: list[dict[str, float]] = []
    epoch_seconds: list[float] = []
    spec, task = NormSpec.parse(cell.norm), Task(job.task)
    try:
        arguments = {**job.arguments, "norm_layer": spec.norm_layer, "batch_size": cell.batch_size, "seed": cell.seed}
        if cell.lr is not None:
            arguments["lr"] = cell.lr
        if spec.weight:
            arguments["weight_layer"] = spec.weight_layer
        _seed(cell.seed)
        memory = PeakMemory(job.device)
        begin = last = time.perf_counter()
        for yielded in task.start(**arguments):
            now = time.perf_counter()
            epoch_seconds.append(now - last)
            metrics = numbers_of(yielded)
            if not history:
                reported_key(metrics, job.metric)
                if job.choose_rate:
                    choosing_key(metrics, job.metric)
            if bad := not_finite(metrics):
                what = ", ".join(f"{name} is {value}" for name, value in bad.items())
                return Failed("diverged", f"{what} after epoch {len(history) + 1}", len(history), machine=where)
            history.append(metrics)
            last = time.perf_counter()
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a task raises is the result of its cell
        return _failed(error, spec, len(history), where)
    if not history:
        raise InputError(f"task {job.task!r} yielded nothing: it must yield a dict of metrics per epoch, such as {{'accuracy': 0.9}}")
    columns = {name: [metrics.get(name) for metrics in history] for name in dict.fromkeys(name for metrics in history for name in metrics)}
    return Measured(columns, time.perf_counter() - begin, statistics.median(epoch_seconds), memory.bytes(), where)


def _failed(error: Exception, spec: NormSpec, epoch: int, where: dict[str, Any]) -> Failed:
    summary = f"{type(error).__name__}: {error}".strip().rstrip(":")[:LONGEST_REASON]
    details = "".join(traceback.format_exception(error)).splitlines()[-LAST_LINES:]
    refused = isinstance(error, (ValueError, TypeError)) and any(spec.made(frame) for frame, _ in traceback.walk_tb(error.__traceback__))
    return Failed("refused" if refused else "error", summary, epoch, "\n".join(details), where)


def _print_to(log: str) -> None:
    """Send what the task and its libraries print to a file: neither into the command's results nor across its progress bar."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    os.close(file)


def _seed(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    try:
        import numpy as np
    except ModuleNotFoundError:
        return
    np.random.seed(seed)  # noqa: NPY002 - tasks that still draw from the global generator must be repeatable too


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
