"""The vocabulary of the tests: comparisons that say what failed and by how much, and process groups in one call."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from tests.tolerances import GRADIENT, OUTPUT, Tolerance


def assert_close(actual: Tensor, expected: Tensor, *, dtype: torch.dtype | None = None, label: str = "output") -> None:
    """Compare a result with its reference under the table's tolerance for outputs; see :mod:`tests.tolerances` for the measure.

    Args:
        actual: the result.
        expected: the reference, usually float64.
        dtype: the dtype that the result was computed in, if coarser than its own; default: ``actual.dtype``.
        label: what is compared, for the message.

    Raises:
        AssertionError: if shapes differ, if NaN or infinity are not where the reference has them, or if the error is too big.
    """
    __tracebackhide__ = True
    _compare(actual, expected, OUTPUT[dtype or actual.dtype], label)


def assert_grads_close(
    actual: Mapping[str, Tensor | None],
    expected: Mapping[str, Tensor | None],
    *,
    dtype: torch.dtype | None = None,
    label: str = "gradient of",
) -> None:
    """Compare named gradients, all of them, under the table's tolerance for gradients; every failure is reported, not only the first.

    Args:
        actual: gradient by name ("x", "weight"); ``None`` where nothing flowed.
        expected: the references, under the same names.
        dtype: the dtype that the gradients were computed in, if coarser than their own; default: each gradient's dtype.
        label: prefix of each name in the message.

    Raises:
        AssertionError: if the names differ, if a gradient is missing or superfluous, or if any comparison fails.
    """
    __tracebackhide__ = True
    assert actual.keys() == expected.keys(), f"{label}: have gradients for {sorted(actual)}, expected {sorted(expected)}"
    failures = []
    for name, reference in expected.items():
        result = actual[name]
        if result is None or reference is None:
            if result is not reference:
                failures.append(f"{label} {name}: is {'missing' if result is None else 'there but should be None'}")
            continue
        try:
            _compare(result, reference, GRADIENT[dtype or result.dtype], f"{label} {name}")
        except AssertionError as error:
            failures.append(str(error))
    assert not failures, "\n".join(failures)


def _compare(actual: Tensor, expected: Tensor, tolerance: Tolerance, label: str) -> None:
    __tracebackhide__ = True
    assert actual.shape == expected.shape, f"{label}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    got, want = actual.detach().double(), expected.detach().double()
    finite = want.isfinite()
    wrong = torch.where(finite, ~got.isfinite(), ~torch.isclose(got, want, rtol=0, atol=0, equal_nan=True))
    assert not wrong.any(), (
        f"{label}: {int(wrong.sum())} of {wrong.numel()} elements are NaN or infinite where they should not be, or not where they should; "
        f"first at {tuple(wrong.nonzero()[0].tolist())}: {got[wrong][0]:.6g}, expected {want[wrong][0]:.6g}"
    )
    error = torch.where(finite, (got - want).abs(), 0.0)
    scale = torch.where(finite, want.abs(), 0.0).max().item()
    bound = max(tolerance.atol, tolerance.rtol * scale)
    worst = error.max().item()
    if worst > bound:
        place = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        raise AssertionError(
            f"{label}: off by {worst:.3g} at {place} ({got[place]:.9g}, expected {want[place]:.9g}); max|expected| is {scale:.3g}, "
            f"so {bound:.3g} is allowed (rtol {tolerance.rtol:g}, atol {tolerance.atol:g}: {tolerance.reason})"
        )


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what ``torch.empty`` and its kin return with NaN (floats) or the largest value (integers): an unwritten element shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


class RankError(AssertionError):
    """One or more ranks of :func:`run_ranks` failed; the message holds each one's traceback."""


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Run ``fn(rank, *args)`` in ``world_size`` processes that form a gloo process group, and return their results in rank order.

    Args:
        world_size: number of processes.
        fn: a function of a test module (it is pickled by name). The default process group is ready when it starts.
        *args: further arguments, picklable.
        timeout: seconds until ranks that have not finished are ended and reported; also the timeout of their collectives.

    Returns:
        What each rank returned, in rank order. Tensors come back as copies.

    Raises:
        RankError: if a rank raised, died or did not finish in time; every such rank is named.
    """
    # Forked from a clean server that has imported torch once: a second or two cheaper per process than a spawned one.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "equinorm"])
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(rank, world_size, folder, timeout, fn, args), daemon=True) for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + timeout
        try:
            # A rank that failed leaves the others waiting in their collectives: the first failure ends the wait.
            while any(p.is_alive() for p in ranks) and not any(p.exitcode for p in ranks) and time.monotonic() < deadline:
                next((p for p in ranks if p.is_alive()), ranks[0]).join(0.05)
            if any(p.exitcode for p in ranks):
                for process in ranks:
                    process.join(1.0)  # whoever is about to fail by itself has more to say than that it was ended
            finished = [p.exitcode is not None for p in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.join()
        failures = []
        for rank, process in enumerate(ranks):
            error = Path(folder, f"error{rank}")
            if error.exists():
                failures.append(f"rank {rank} of {world_size}:\n{error.read_text()}")
            elif finished[rank] and process.exitcode != 0:
                failures.append(f"rank {rank} of {world_size} died with exit code {process.exitcode}")
        if not failures and not all(finished):
            waiting = [rank for rank, done in enumerate(finished) if not done]
            failures.append(f"ranks {waiting} of {world_size} had not finished after {timeout:g} s")
        if failures:
            raise RankError("\n".join(failures))
        return [torch.load(Path(folder, f"result{rank}"), weights_only=False) for rank in range(world_size)]


def _rank(rank: int, world_size: int, folder: str, timeout: float, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        if Path("/sys/class/net/lo").exists():
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the host's own name may not resolve in a container
        torch.set_num_threads(1)
        torch.manual_seed(rank)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
        )
        with poisoned_memory():
            result = fn(rank, *args)
        torch.save(result, Path(folder, f"result{rank}"))
        dist.barrier()  # nobody leaves while another still talks to it
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - whatever it is, the parent reports it
        Path(folder, f"error{rank}").write_text(traceback.format_exc())
        os._exit(1)
