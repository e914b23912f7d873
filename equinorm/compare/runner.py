"""Measuring all cells of a comparison."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from equinorm.compare.cells import Cell
from equinorm.compare.environment import cores
from equinorm.compare.errors import InputError, Interrupted
from equinorm.compare.plan import Plan
from equinorm.compare.pool import Pool
from equinorm.compare.progress import Lines, Progress
from equinorm.compare.results import Comparison
from equinorm.compare.study import STORAGE_ERRORS, Study, first_line, shown, sqlite_url
from equinorm.compare.task import Task
from equinorm.compare.worker import BadTask, Job
from equinorm.kernels import cpu

POLL_S = 0.5
LOG = "output.log"


def compare(
    plan: Plan,
    out: str | Path,
    *,
    storage: str | None = None,
    study: str | None = None,
    workers: int = 1,
    stale_after: int = 30,
    retry_failed: bool = False,
    measure: bool = True,
    command: str = "",
    progress: Progress | None = None,
) -> Comparison:
    """Measure what is not measured yet, and return everything that is.

    Called again with the same arguments it goes on where it was stopped, and adds nothing if it was finished. A script that calls it needs
    the guard ``if __name__ == "__main__":``, since the cells run in processes of their own.

    Args:
        plan: what to compare.
        out: folder of the results; made if absent.
        storage: database URL; default: an SQLite file in ``out``. Commands with the same storage and study share the work.
        study: name in the database; default: the task's name.
        workers: cells measured side by side; torch's threads are divided among them.
        stale_after: seconds without a sign of life after which a cell that another command has claimed is measured again.
        retry_failed: measure again the cells that failed.
        measure: False only reads what the study holds.
        command: how to run it again, for the report.
        progress: where to report; default: lines on standard error.

    Raises:
        InputError: the storage cannot be used, or the task does not keep to the protocol.
        Interrupted: stopped by Ctrl-C; finished cells are kept.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder of the results cannot be made: {error}") from error
    storage = storage or sqlite_url(folder / "study.db")
    task, cells = Task(plan.task), plan.cells()
    queue = Study(storage, study or plan.task, plan.identity(), plan.direction, stale_after)
    if measure:
        log = folder / LOG
        job = Job(
            task=plan.task,
            arguments=plan.task_arguments(task),
            metric=plan.metric,
            choose_rate=len(plan.learning_rates) > 1,
            device=plan.device,
            threads=max(1, cores() // workers),
            log=str(log),
        )
        cpu.available()  # compiles the kernels before the first cell instead of in it
        try:
            queue.recover(cells)
            queue.enqueue(cells, retry_failed)
            pool = Pool(workers, job, [task.module.__name__])
            with progress or Lines(workers) as display:
                _measure(queue, cells, pool, plan.metric, display)
        except STORAGE_ERRORS as error:
            kept = "finished cells are kept, and the same command goes on from there"
            raise InputError(f"storage {shown(storage)} failed: {first_line(error)}; {kept}") from error
        if log.exists() and log.stat().st_size == 0:
            log.unlink()
    outcomes = queue.outcomes({cell.key for cell in cells})
    found = {cell: outcomes[cell.key] for cell in cells if cell.key in outcomes}
    return Comparison(plan, found, task.description, command, workers)


def _measure(queue: Study, cells: Sequence[Cell], pool: Pool, metric: str, progress: Progress) -> None:
    by_key = {cell.key: cell for cell in cells}
    left = queue.unfinished(by_key.keys())
    progress.begin(cells, [by_key[key] for key in left])
    if left:
        pool.prepare()
    beaten = recovered = time.monotonic()
    try:
        while left:
            while not pool.full and (claim := queue.claim(left)) is not None:
                pool.start(claim)
            for claim, outcome in pool.wait(POLL_S):
                if isinstance(outcome, BadTask):
                    queue.release(claim)
                    raise InputError(outcome.message)
                queue.finish(claim, outcome, metric)
                progress.finished(claim.cell, outcome)
            now = time.monotonic()
            if now - beaten >= queue.heartbeat_interval:
                queue.beat(pool.claims)
                beaten = now
            if now - recovered >= queue.stale_after / 2:
                queue.recover(cells)
                recovered = now
            left = queue.unfinished(by_key.keys())
            progress.update([by_key[key] for key in left], elsewhere=max(0, len(queue.running(left)) - len(pool.claims)))
    except KeyboardInterrupt:
        done = len(cells) - len(left)
        raise Interrupted(f"stopped; {done} of {len(cells)} cells are finished and kept, and the same command goes on from there") from None
    finally:
        for claim in pool.stop():
            queue.release(claim)
