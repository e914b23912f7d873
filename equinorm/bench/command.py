"""``equinorm bench``: the norms beside their peers on this machine."""

from __future__ import annotations

import argparse
import json
import time
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import torch

import equinorm
from equinorm.bench import exactness
from equinorm.bench.contenders import BY_NAME, CONTENDERS
from equinorm.bench.goals import goals, side_by_side
from equinorm.bench.grid import DTYPES, LAYOUTS, PASSES, QUICK, Entry, Pages, entries, parsed
from equinorm.bench.measure import OURS, inputs, measure
from equinorm.bench.results import Results, busy
from equinorm.bench.table import HEAD, missed, row, show, summary
from equinorm.compare.errors import InputError
from equinorm.kernels import cpu

SILENCE = 20.0  # seconds between two lines about progress
ENTRY_SECONDS, QUICK_SECONDS = 3.0, 0.5


def add_arguments(parser: ArgumentParser) -> None:
    """The arguments of ``equinorm bench``."""
    parser.description = """Time norms beside torch's layers, torch.compile, timm where it is installed and published formulas, in turns
in one process; print medians, the bandwidth of the least traffic and its share of a copy's. A peer that does not compute the same gets no
number. A full run takes one to two hours on two cores; it can be stopped, and goes on in the same --csv FILE."""
    names = sorted(BY_NAME)
    parser.add_argument("--norms", nargs="+", choices=names, default=[c.name for c in CONTENDERS], metavar="NAME", help=", ".join(names))
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="SHAPE", help="as in 64x256x32x32, or 32768x768 for rows")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES), help="default: all")
    parser.add_argument("--layouts", nargs="+", choices=tuple(LAYOUTS), default=list(LAYOUTS), help="default: both")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES), help='default: all; "both" is forward and backward')
    parser.add_argument(
        "--pages",
        choices=(*get_args(Pages), "both"),
        default="both",
        help="memory for outputs: new as the allocator gives it, or reused as by equinorm.reuse_pages() (default: one after the other)",
    )
    parser.add_argument("--compile", choices=("none", "torch", "all"), help="peers to compile as well (default: those that are torch's)")
    parser.add_argument("--rounds", type=_positive(int), default=15, metavar="N", help="samples of each (default: %(default)s)")
    parser.add_argument("--threads", type=_positive(int), metavar="N", help=f"default: torch's, {torch.get_num_threads()}")
    parser.add_argument("--time-budget", type=_positive(float), metavar="MINUTES", help="stop in good order when they are spent")
    parser.add_argument("--quick", action="store_true", help="smaller shapes, pages reused, nothing compiled: a few minutes")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write numbers as they come; those already there are not measured again")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw shares of a copy's bandwidth and ratios (.svg or .png)")
    parser.add_argument("--exactness", action="store_true", help="errors on difficult inputs instead of times")


def run(arguments: Namespace) -> int:
    """Measure and print. Returns the exit code."""
    if arguments.plot is not None and arguments.plot.suffix not in (".svg", ".png"):
        raise InputError(f"--plot needs a file that ends in .svg or .png, got {arguments.plot}")
    if arguments.plot is not None and find_spec("matplotlib") is None:
        raise InputError('--plot needs matplotlib: pip install "equinorm[compare]"')
    threads = torch.get_num_threads()
    torch.set_num_threads(arguments.threads or threads)
    try:
        return exactness.run(arguments) if arguments.exactness else _times(arguments)
    finally:
        torch.set_num_threads(threads)


def _times(arguments: Namespace) -> int:
    if not cpu.available():
        print(f"the kernels are not there, ours runs in plain PyTorch operations: {cpu.info()['reason']}")
    results = Results(arguments.csv)
    print(json.dumps(results.circumstances))
    if busy(results.circumstances):
        load = results.circumstances["load"]
        print(f"other processes are at work (load {load}): read ratios, and those of more than one thread with care")
    wanted = _entries(arguments)
    if not wanted:
        raise InputError("nothing to measure: no norm of --norms takes a shape of --shapes")
    seconds = QUICK_SECONDS if arguments.quick else ENTRY_SECONDS
    compiled = arguments.compile or ("none" if arguments.quick else "torch")
    to_do = [group for group in inputs(wanted) if not results.measured.issuperset(group)]
    progress = _Progress(to_do, arguments.time_budget)
    mode, failed = None, []
    for group in to_do:
        if progress.spent:
            print(f"\nthe time budget is spent: {len(to_do) - progress.done} of {len(to_do)} inputs were not measured")
            break
        if group[0].pages != mode:
            mode = group[0].pages
            if mode == "reused" and not equinorm.reuse_pages():
                break
            print(f"\npages {mode}\n{HEAD}", flush=True)
        missing = [entry for entry in group if entry not in results.measured]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of peers, about themselves
                timings = measure(missing, arguments.rounds, seconds, _compiled(compiled, missing[0]))
        except Exception as error:  # noqa: BLE001 - the other inputs have their numbers all the same
            failed.append(f"{missing[0]}: {type(error).__name__}: {error}")
            print(f"failed: {failed[-1]}", flush=True)
            continue
        results.add(timings)
        for one in side_by_side(timings):
            print(row(one, [t for t in timings if t.entry == one.entry and t.note]))
        progress.step(group)
    for failure in failed:
        print(f"failed: {failure}")
    chosen = [timing for timing in results.timings if timing.entry in set(wanted)]
    if not any(timing.who == OURS for timing in chosen):
        return int(bool(failed))
    print(f"\nwithout small tensors:\n{'':-<22}")
    show(*summary(side_by_side(chosen)))
    print("\n".join(["", *missed(goals(chosen, results.circumstances["last level cache"]))]))
    if arguments.plot is not None:
        from equinorm.bench.chart import draw

        draw(side_by_side(chosen), results.circumstances, arguments.plot)
    return int(bool(failed))


def _entries(arguments: Namespace) -> list[Entry]:
    """What is asked for; default pages first, as reusing them cannot be undone."""
    pages = get_args(Pages) if arguments.pages == "both" else (arguments.pages,)
    shapes = arguments.shapes
    if arguments.quick:
        pages = ("reused",) if arguments.pages == "both" else pages
        shapes = shapes or QUICK
    return [
        entry for mode in pages for entry in entries(mode, arguments.norms, shapes, arguments.dtypes, arguments.layouts, arguments.passes)
    ]


def _compiled(which: str, entry: Entry) -> bool:
    return which == "all" or (which == "torch" and entry.contender.torch)


class _Progress:
    """How far it is, and how long it may take, from the bytes of what is left."""

    def __init__(self, groups: list[list[Entry]], minutes: float | None) -> None:
        self.said, self.done, self.began, self.limit = 0.0, 0, time.monotonic(), None if minutes is None else 60 * minutes
        self.count, self.left = len(groups), sum(map(_work, groups))
        self.whole = self.left

    @property
    def spent(self) -> bool:
        """Whether the time budget is."""
        return self.limit is not None and time.monotonic() - self.began > self.limit

    def step(self, group: list[Entry]) -> None:
        """Note that a group is done, and say now and then how far it is."""
        self.done += 1
        self.left -= _work(group)
        gone = time.monotonic() - self.began
        if gone - self.said < SILENCE and self.done < self.count:
            return
        self.said = gone
        ahead = gone * self.left / max(self.whole - self.left, 1)
        print(f"[{self.done} of {self.count} inputs, {gone / 60:.1f} min; about {ahead / 60:.0f} min left]", flush=True)


def _work(group: list[Entry]) -> int:
    """A number in proportion to the time that a group takes: its bytes, and what it takes at least."""
    return len(group) * (group[0].bytes + (20 << 20))


def _shape(text: str) -> tuple[int, ...]:
    try:
        return parsed(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            number = kind(text)
        except ValueError:
            number = 0
        if not number > 0:
            raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
        return number

    return parse
