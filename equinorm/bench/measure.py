"""Timing one input: peers are checked to compute the same, then all are timed in turns."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

import equinorm
from equinorm.bench.contenders import Contender
from equinorm.bench.grid import DTYPES, LAYOUTS, Entry
from equinorm.kernels.traffic import Pass, least

OURS, COPY, BATCH = "ours", "copy", "our batch norm"

# Relative errors by the largest value: in float64 two programs of the same formula differ by rounding alone; at full size and in the type
# that is timed, where peers may sum naively, what is asked is that nothing is broken.
SAME, SANE = 1e-6, 0.1
LEAST_ROUNDS = 5
SAMPLE = 1e-3  # seconds that one sample lasts at least, by repeating the call


class Disagreement(Exception):
    """A peer does not compute what ours computes."""


@dataclass(frozen=True)
class Timing:
    """What one of those side by side took.

    Attributes:
        entry: what was timed.
        who: :data:`OURS`, :data:`COPY`, :data:`BATCH` or the peer.
        seconds: the median of a call; None where there is no number, and ``note`` says why.
        copy: the median of copying a tensor of the input's size, measured in the same rounds.
        rounds: samples behind the medians.
        note: why there is no number.
    """

    entry: Entry
    who: str
    seconds: float | None
    copy: float
    rounds: int
    note: str = ""

    @property
    def passes(self) -> int:
        """The least reads and writes of a tensor of the input's size."""
        if self.who == COPY:
            return 2
        name = "batch" if self.who == BATCH else self.entry.norm
        return least(equinorm.find(name=name)[0], self.entry.of).passes

    @property
    def bandwidth(self) -> float | None:
        """Bytes of the least traffic per second."""
        return None if self.seconds is None else self.passes * self.entry.bytes / self.seconds

    @property
    def of_copy(self) -> float | None:
        """That as a fraction of the bandwidth of a copy: 1 at the limit, more where a cache holds part of the tensors."""
        return None if self.seconds is None else self.passes / 2 * self.copy / self.seconds


def measure(entries: list[Entry], rounds: int, seconds: float, compiled: bool) -> list[Timing]:
    """Time entries that differ in the pass alone.

    Args:
        entries: at least one.
        rounds: samples of each.
        seconds: after which an entry is content with fewer samples, though not with fewer than five.
        compiled: whether peers are timed through torch.compile as well.
    """
    first = entries[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modules, notes = prepared(first.contender, first.shape[1], DTYPES[first.dtype], compiled)
        x = (torch.randn(first.shape) * 2 + 1).to(DTYPES[first.dtype]).to(memory_format=_format(first)).requires_grad_()
        dy = torch.randn(first.shape).to(DTYPES[first.dtype]).to(memory_format=_format(first))
    extra = first.contender.extra(x)
    found = []
    for entry in sorted(entries, key=lambda e: e.of != "eval"):  # before training moves the estimates of some and not of others
        for module in modules.values():
            module.train(entry.of != "eval")
        notes |= broken(modules, x, extra, entry.of)
        calls = {who: call(module, x, () if who == BATCH else extra, dy, entry.of) for who, module in modules.items() if who not in notes}
        calls[COPY] = lambda: x.detach().clone()
        notes |= failing(calls)
        calls = {who: function for who, function in calls.items() if who not in notes}
        times, taken = interleaved(calls, rounds, seconds)
        found += [Timing(entry, who, times[who], times[COPY], taken) for who in calls]
        found += [Timing(entry, who, None, times[COPY], 0, note) for who, note in notes.items()]
    if compiled:
        torch.compiler.reset()
    gc.collect()
    return found


def prepared(contender: Contender, size: int, dtype: torch.dtype, compiled: bool) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Ours and the peers with the same parameters and estimates, in ``dtype``; and for peers that are left out, why."""
    own = perturbed(contender.ours(size))
    modules, notes = {OURS: own}, {}
    for name, build in contender.installed().items():
        try:
            peer = build(own, size)
            agree(contender, own, peer, size)
        except Disagreement as difference:
            notes[name] = str(difference)
            continue
        except Exception as error:  # noqa: BLE001 - a library that is there need not work: the reason stands where the number would
            notes[name] = f"cannot be built: {_reason(error)}"
            continue
        modules[name] = peer
    if contender.channel_rule:
        modules[BATCH] = equinorm.BatchNorm(size)
    modules = {name: module.to(dtype) for name, module in modules.items()}
    if compiled:
        modules |= {f"{name}, compiled": compilation(modules[name]) for name in contender.peers if name in modules}
    return modules, notes


def compilation(module: nn.Module) -> nn.Module:
    """``module`` as torch.compile makes it for inputs of one shape; the parameters stay shared."""
    return cast("nn.Module", torch.compile(module, dynamic=False))


@torch.no_grad()
def perturbed(module: nn.Module) -> nn.Module:
    """``module`` with parameters and running estimates that are nothing special, so that a peer that ignores one is found out."""
    for parameter in module.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    for name, buffer in module.named_buffers():
        if "mean" in name:
            buffer.normal_(std=0.3)
        elif name.endswith(("running_var", "running_std")):
            buffer.uniform_(0.5, 1.5)
        elif name.endswith("running_projection"):
            buffer.add_(0.1 * torch.randn_like(buffer))
    return module


def agree(contender: Contender, own: nn.Module, peer: nn.Module, size: int) -> None:
    """Compare ours and a peer in float64 on a small input: outputs in training and evaluation, and the gradient of the input.

    Raises:
        Disagreement: naming what differs and by how much.
    """
    x = torch.randn((12, size) if contender.geometry == "row" else (8, size, 7, 6), dtype=torch.float64)
    dy = torch.randn_like(x)
    results: list[dict[str, Tensor]] = []
    for module in (own, peer):
        module, a = copy.deepcopy(module).double(), x.clone().requires_grad_()
        extra = contender.extra(a)
        with torch.no_grad():
            evaluated = module.eval()(a, *extra)
        y = module.train()(a, *extra)
        results.append({"evaluation": evaluated, "training": y, "gradient": torch.autograd.grad(y, a, dy)[0]})
    for what, expected in results[0].items():
        if not (error := apart(results[1][what], expected)) <= SAME:
            raise Disagreement(f"computes something else: in float64 its {what} differs by {error:.1e} of the largest value")


def broken(modules: dict[str, nn.Module], x: Tensor, extra: tuple[Any, ...], of: Pass) -> dict[str, str]:
    """Peers that do not run on this input, or whose output is far from ours, with the reason. Compiles what is to be compiled."""
    notes, expected = {}, None
    for who, module in modules.items():
        if who == BATCH:
            continue
        with torch.set_grad_enabled(of != "eval"):
            try:
                y = module(x, *extra).detach()
            except Exception as error:
                if who == OURS:
                    raise
                notes[who] = f"does not run: {_reason(error)}"
                continue
        if expected is None:
            expected = y
        elif not (error := apart(y, expected)) <= SANE:
            notes[who] = f"is wrong here: its output differs by {error:.1e} of the largest value"
    return notes


def failing(calls: dict[str, Callable[[], object]]) -> dict[str, str]:
    """Peers whose call raises, in backward for instance, with the reason."""
    notes = {}
    for who, function in calls.items():
        try:
            function()
        except Exception as error:
            if who in (OURS, COPY, BATCH):
                raise
            notes[who] = f"does not run: {_reason(error)}"
    return notes


def _reason(error: Exception) -> str:
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first[:100]}"


def apart(actual: Tensor, expected: Tensor) -> float:
    """The largest difference in units of the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def call(module: nn.Module, x: Tensor, extra: tuple[Any, ...], dy: Tensor, of: Pass) -> Callable[[], object]:
    """What is timed."""
    if of == "eval":
        return lambda: _evaluate(module, x, extra)
    if of == "forward":
        return lambda: module(x, *extra)
    sources = [x, *(p for p in module.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(module(x, *extra), sources, dy, allow_unused=True)


@torch.no_grad()
def _evaluate(module: nn.Module, x: Tensor, extra: tuple[Any, ...]) -> object:
    return module(x, *extra)


def interleaved(functions: dict[str, Callable[[], object]], rounds: int, seconds: float) -> tuple[dict[str, float], int]:
    """Median seconds of each function, timed in turns so that a busy moment of the machine hits all of them; and the number of rounds."""
    repeats = {}
    for name, function in functions.items():
        function()
        repeats[name] = max(1, min(200, round(SAMPLE / _timed(function, 1))))
    times: dict[str, list[float]] = {name: [] for name in functions}
    began, taken = time.perf_counter(), 0
    gc.disable()
    try:
        while taken < rounds and (taken < LEAST_ROUNDS or time.perf_counter() - began < seconds):
            for name, function in functions.items():
                times[name].append(_timed(function, repeats[name]))
            taken += 1
    finally:
        gc.enable()
    return {name: statistics.median(values) for name, values in times.items()}, taken


def _timed(function: Callable[[], object], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - begin) / repeats


def inputs(entries: Iterable[Entry]) -> list[list[Entry]]:
    """Entries in lists of those that differ in the pass alone, in their order."""
    groups: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry[:5], []).append(entry)
    return list(groups.values())


def _format(entry: Entry) -> torch.memory_format:
    return LAYOUTS[entry.layout]
