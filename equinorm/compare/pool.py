"""Worker processes, one per cell in flight."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess

from equinorm.compare.outcomes import Failed, Outcome
from equinorm.compare.study import Claim
from equinorm.compare.worker import BadTask, Job, main

# The first step of torch's optimizers imports torch._dynamo: two seconds and 90 MB, in every cell if it were not here.
PRELOAD = ("equinorm.compare.worker", "torch._dynamo")


@dataclass(frozen=True)
class Worker:
    """A process and the cell it measures."""

    claim: Claim
    process: BaseProcess
    pipe: connection.Connection


class Pool:
    """Runs claimed cells, at most ``size`` at a time.

    Args:
        size: number of processes.
        job: what they have in common.
        preload: modules to import once, before the first cell.
    """

    def __init__(self, size: int, job: Job, preload: list[str]) -> None:
        self._size, self._job = size, job
        self._workers: list[Worker] = []
        if "forkserver" in multiprocessing.get_all_start_methods():
            # Forked from a clean server that has imported torch once: the imports cost nothing per cell, and memory starts from one point.
            self._context = multiprocessing.get_context("forkserver")
            self._context.set_forkserver_preload([*PRELOAD, *preload])
        else:
            self._context = multiprocessing.get_context("spawn")

    def prepare(self) -> None:
        """Wait until processes start quickly: a cell claimed before would give no sign of life for as long as the imports take."""
        process = self._context.Process(target=_nothing)
        process.start()
        process.join()

    @property
    def full(self) -> bool:
        """Whether all processes are busy."""
        return len(self._workers) >= self._size

    @property
    def claims(self) -> list[Claim]:
        """The cells in flight."""
        return [worker.claim for worker in self._workers]

    def start(self, claim: Claim) -> None:
        """Measure a cell in a new process."""
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=main, args=(self._job, claim.cell, theirs), daemon=True)
        process.start()
        theirs.close()
        self._workers.append(Worker(claim, process, ours))

    def wait(self, timeout: float) -> Iterator[tuple[Claim, Outcome | BadTask]]:
        """The cells that end, as soon as one does, for at most ``timeout`` seconds."""
        ready = connection.wait([worker.pipe for worker in self._workers], timeout)
        for worker in [worker for worker in self._workers if worker.pipe in ready]:
            self._workers.remove(worker)
            yield worker.claim, _outcome(worker)

    def stop(self) -> list[Claim]:
        """End all processes; returns the cells that they did not finish."""
        claims = self.claims
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()
        self._workers.clear()
        return claims


def _nothing() -> None:
    """What a process does that is started to see the server ready."""


def _outcome(worker: Worker) -> Outcome | BadTask:
    try:
        outcome = worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        outcome = None
    worker.pipe.close()
    worker.process.join()
    return outcome or Failed("died", _cause_of_death(worker.process.exitcode or 0))


def _cause_of_death(exitcode: int) -> str:
    if exitcode >= 0:
        return f"the process ended with exit code {exitcode} before it had a result"
    name = str(-exitcode)
    with suppress(ValueError):
        name = signal.Signals(-exitcode).name
    hint = " (the system does this when memory runs out)" if -exitcode == 9 else ""
    return f"the process was ended by signal {name}{hint} before it had a result; its last words may be in output.log"
