"""``./dev bench``: ours and the peers in one process, interleaved; medians and their ratios.

Big outputs are newly mapped by the allocator on every call, and the system zeroes each page at first touch, which can cost more than the
norm itself. So everything is measured twice: with the allocator as it comes, and with pages that are reused (glibc's mallopt).
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import equinorm
from benchmarks.peers import CONTENDERS, SMALL, Contender, same
from equinorm.kernels import cpu

SHAPES = ((64, 256, 32, 32), (16, 256, 32, 32), (32, 64, 8, 8))
ROWS = {(64, 256, 32, 32): (32768, 512), (16, 256, 32, 32): (8192, 512), (32, 64, 8, 8): (2048, 64)}  # as many values
TINY = 1 << 18  # elements below which the call itself is what costs


def main() -> int:
    """Measure, print the table, and write it where asked."""
    parser = argparse.ArgumentParser(prog="./dev bench", description=__doc__)
    parser.add_argument("--norms", nargs="+", default=sorted({c.name for c in CONTENDERS}), help="catalogue names")
    parser.add_argument("--rounds", type=int, default=15, help="how often each is timed; the median counts (default 15)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pages", choices=("fresh", "reused", "both"), default="both", help="how the allocator serves outputs")
    parser.add_argument("--csv", type=Path, help="write the numbers to this file")
    arguments = parser.parse_args()
    if unknown := set(arguments.norms) - {c.name for c in CONTENDERS}:
        parser.error(f"no benchmark for {sorted(unknown)}; there is one for {sorted({c.name for c in CONTENDERS})}")
    torch.set_num_threads(arguments.threads)
    print(machine(), flush=True)
    if not cpu.available():
        print(f"the kernels are not available: {cpu.info()['reason']}")
    rows: list[dict[str, Any]] = []
    for pages in ("fresh", "reused") if arguments.pages == "both" else (arguments.pages,):
        if pages == "reused" and not reuse_pages():
            print("\npages reused: needs glibc's mallopt, not measured")
            continue
        rows += table(pages, [c for c in CONTENDERS if c.name in arguments.norms], arguments.rounds)
    below = [row for row in rows if row["ratio"] < row["goal"]]
    print(f"\n{len(rows) - len(below)} of {len(rows)} entries reach their goal" + ("; below it:" if below else ""))
    for row in below:
        entry = f"{row['norm']} {row['shape']} {row['pass']}, pages {row['pages']}"
        print(f"  {entry}: {row['ratio']:.2f} of {row['goal']:g} against {row['peer']}")
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            file.write(f"# {machine()}\n")
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return 0


def machine() -> str:
    """What was measured on what, when."""
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor())  # noqa: SIM115
    return (
        f"equinorm {equinorm.__version__}, torch {torch.__version__}, {model}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads, {date.today()}"
    )


def table(pages: str, contenders: list[Contender], rounds: int) -> list[dict[str, Any]]:
    """Measure every contender on every shape and print a line for each."""
    print(f"\npages {pages}; times in ms, medians; ratio = peer / ours, more is faster; x copy = ours / time to copy the input")
    print(f"{'shape':<18}{'norm':<15}{'peer':<19}{'pass':<10}{'ours':>8}{'peer':>9}{'ratio':>7}{'goal':>6}{'x copy':>8}")
    rows = []
    for shape in SHAPES:
        for contender in contenders:
            size = shape if contender.geometry == "channel" else ROWS[shape]
            for measured in measure(contender, size, rounds):
                row = {"pages": pages, "shape": "x".join(map(str, size)), "norm": contender.name, "peer": contender.peer, **measured}
                rows.append(row)
                print(
                    f"{row['shape']:<18}{row['norm']:<15}{row['peer']:<19}{row['pass']:<10}{row['ours']:>8.2f}{row['theirs']:>9.2f}"
                    f"{row['ratio']:>7.2f}{row['goal'] or '-':>6}{row['copies']:>8.1f}",
                    flush=True,
                )
    return rows


def measure(contender: Contender, shape: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """Forward, and forward with backward, of one contender on one shape."""
    torch.manual_seed(0)
    x = (torch.randn(shape) * 2 + 1).requires_grad_()
    dy = torch.randn(shape)
    own, peer, parameters = contender.build(shape[1] if contender.geometry == "channel" else shape[-1])
    same(own, peer, x)
    target = torch.empty(shape)
    small = x.numel() < TINY
    rounds = rounds * 20 if small else rounds

    def backward(run: Callable[[Tensor], Tensor], tensors: list[Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(run(x), [x, *tensors], dy)

    passes = {
        "forward": (lambda: own(x), lambda: peer(x), contender.forward),
        "both": (backward(own, list(own.parameters())), backward(peer, parameters), contender.both),
    }
    results = []
    for name, (ours, theirs, goal) in passes.items():
        times = interleaved({"ours": ours, "theirs": theirs, "copy": lambda: target.copy_(x.detach())}, rounds)
        if small:  # there the goal is set where torch has the layer
            goal = SMALL if contender.peer == "torch" else 0.0
        results.append(
            {
                "pass": name,
                "ours": times["ours"] * 1e3,
                "theirs": times["theirs"] * 1e3,
                "ratio": times["theirs"] / times["ours"],
                "goal": goal,
                "copies": times["ours"] / times["copy"],
            }
        )
    return results


def interleaved(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each function, timed in turns so that a busy moment of the machine hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        for _ in range(3):
            function()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, function in functions.items():
                begin = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - begin)
    finally:
        gc.enable()
    return {name: statistics.median(values) for name, values in times.items()}


def reuse_pages() -> bool:
    """Make the allocator keep freed memory instead of giving it back to the system. Returns whether it can."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL("libc.so.6")
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    return bool(libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, 2**31 - 1))


if __name__ == "__main__":
    sys.exit(main())
