"""``python -m equinorm.bench.cuda``: norms on a CUDA device, first checked, then timed beside torch, ``torch.compile`` and other packages.

Times are medians in ms. "cold" empties the second-level cache before every call; "warm" replays a CUDA graph, so that neither Python nor
launches count, over tensors that may lie in the cache. "of copy" is the least traffic (see :mod:`equinorm.kernels.traffic`) over the cold
time, as a fraction of the bandwidth of a copy measured in the same run, whatever an implementation moves beyond the least.
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib
import sys
from collections.abc import Callable, Iterator
from datetime import date
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import equinorm
from equinorm.bench.contenders import BY_NAME, Contender
from equinorm.bench.grid import DTYPES, Shape, parsed, written
from equinorm.bench.measure import BATCH, OURS, SANE, apart, compilation, perturbed, prepared
from equinorm.kernels import gpu
from equinorm.kernels.traffic import Pass, least

SHAPES: tuple[Shape, ...] = (
    *((64, 3, 224, 224), (64, 256, 32, 32), (8, 512, 64, 64), (32, 64, 8, 8), (64, 256, 128, 128)),
    *((32768, 768), (16384, 4096), (8192, 8192), (64, 128), (65536, 4096), (4096, 65536)),
)
LARGE = 256 << 20  # bytes of the input from which on the goals hold
GOAL: dict[Pass, float] = {"forward": 0.85, "backward": 0.80}
TOLERANCE = {"float32": (1e-6, 2e-6), "bfloat16": (4e-3, 4e-3)}  # output, input gradient; relative to the largest value
EXACT = ("batch", "instance", "group", "layer", "rms", "switch")  # for all values below
VALUES = ((0.5, 1.0), (1e4, 1.0), (1e6, 1.0), (0.5, 1e30), (0.5, 1e-18))  # mean / std, std

Timer = Callable[[Callable[[], object]], float]
Function = Callable[..., Tensor]


def main(argv: list[str] | None = None) -> int:
    """Check, then measure. Returns 1 where there is nothing to measure on, or where something is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m equinorm.bench.cuda", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = sorted(BY_NAME)
    parser.add_argument("--norms", nargs="+", choices=names, default=[*EXACT, "batch_channel"], metavar="NAME", help=", ".join(names))
    parser.add_argument("--shapes", nargs="+", type=parsed, default=list(SHAPES), metavar="SHAPE", help="as in 64x256x32x32, or 32768x768")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(TOLERANCE), default=list(TOLERANCE))
    parser.add_argument("--check-only", action="store_true", help="compare with float64, time nothing")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the numbers as well")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(
            f"this needs a CUDA device, and torch {torch.__version__} sees none; without one the tests run the kernels under Triton's "
            "interpreter, and `equinorm bench` measures the CPU's",
            file=sys.stderr,
        )
        return 1
    if not gpu.available():
        print("there are no GPU kernels to measure; see the warning above", file=sys.stderr)
        return 1
    contenders = [BY_NAME[name] for name in arguments.norms]
    print(machine(), flush=True)
    wrong = check(contenders, arguments.dtypes, "cuda")
    print("\n".join([f"{len(wrong)} comparisons with float64 failed", *wrong]), flush=True)
    if wrong or arguments.check_only:
        return int(bool(wrong))
    testing = importlib.import_module("triton.testing")
    timers: dict[str, Timer] = {
        "cold": lambda call: testing.do_bench(call, return_mode="median"),
        "warm": lambda call: testing.do_bench_cudagraph(call, return_mode="median"),
    }
    rows = table(contenders, arguments.shapes, arguments.dtypes, timers, "cuda")
    if arguments.csv is not None and rows:
        with arguments.csv.open("w", newline="") as file:
            file.write(f"# {machine()}\n")
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return 0


def machine() -> str:
    """What is measured on what, when."""
    device = torch.cuda.get_device_properties(0)
    return (
        f"equinorm {equinorm.__version__}, torch {torch.__version__}, triton {gpu.info()['triton']}, {device.name}, "
        f"{device.multi_processor_count} multiprocessors, CUDA {torch.version.cuda}, {date.today()}"
    )


def layouts(shape: Shape) -> tuple[str, ...]:
    """Those in which an input of this shape is measured."""
    return ("contiguous", "channels_last") if len(shape) == 4 else ("contiguous",)


def tensors(shape: Shape, dtype: str, layout: str, device: str, ratio: float = 0.5, std: float = 1.0) -> tuple[Tensor, Tensor]:
    """An input and an incoming gradient, the same each time."""
    generator = torch.Generator(device).manual_seed(0)
    order = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    made = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
    x, dy = (
        (values * scale + shift).to(DTYPES[dtype], memory_format=order)
        for values, scale, shift in zip(made, (std, 1), (ratio * std, 0), strict=True)
    )
    return x.requires_grad_(), dy


# ---- right --------------------------------------------------------------------------------------------------------------------


def check(contenders: list[Contender], dtypes: list[str], device: str) -> list[str]:
    """Compare output and input gradient with the plain path in float64: a line for each that is too far off."""
    wrong = []
    for contender in contenders:
        shape = (4, 64, 23, 17) if contender.geometry == "channel" else (37, 777)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            own = perturbed(contender.ours(shape[1])).to(device)
        for dtype in dtypes:
            for layout in layouts(shape):
                for ratio, std in VALUES if contender.name in EXACT and dtype == "float32" else VALUES[:1]:
                    x, dy = tensors(shape, dtype, layout, device, ratio, std)
                    got = results(copy.deepcopy(own), contender, x, dy)
                    with equinorm.plain():
                        want = results(copy.deepcopy(own).double(), contender, x.detach().double().requires_grad_(), dy.double())
                    for name, bound, a, b in zip(("output", "gradient"), TOLERANCE[dtype], got, want, strict=True):
                        if not (error := apart(a.double(), b)) <= bound:
                            where = f"{contender.name}, {dtype}, {layout}, mean/std {ratio:g}, std {std:g}"
                            wrong.append(f"{where}: {name} off by {error:.1e} of the largest value, allowed are {bound:g}")
    return wrong


def results(norm: nn.Module, contender: Contender, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient to the input."""
    y = norm(x, *further(contender, x))
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def further(contender: Contender, x: Tensor) -> tuple[Any, ...]:
    """What the norm takes beside x, on its device."""
    return tuple(t.to(x.device) if isinstance(t, Tensor) else t for t in contender.extra(x))


# ---- fast ---------------------------------------------------------------------------------------------------------------------


def installed(name: str, features: int, dtype: torch.dtype, device: str) -> dict[str, tuple[Function, list[Tensor]]]:
    """The layer in other packages, those that are there: functions and their parameters."""
    modules = {
        "rms": {"apex": ("apex.normalization", "FusedRMSNorm"), "liger": ("liger_kernel.transformers", "LigerRMSNorm")},
        "layer": {"apex": ("apex.normalization", "FusedLayerNorm"), "liger": ("liger_kernel.transformers", "LigerLayerNorm")},
    }
    found: dict[str, tuple[Function, list[Tensor]]] = {}
    for package, (module, kind) in modules.get(name, {}).items():
        try:
            layer = getattr(importlib.import_module(module), kind)(features).to(device, dtype)
        except ImportError:
            continue
        found[package] = layer, list(layer.parameters())
    if name == "rms":
        try:
            quack = importlib.import_module("quack")
        except ImportError:
            return found
        weight = torch.ones(features, dtype=torch.float32, device=device, requires_grad=True)
        found["quack"] = lambda x: quack.rmsnorm(x, weight), [weight]
    return found


def bandwidth(timer: Timer, device: str) -> float:
    """Of a copy, in GB/s."""
    source = torch.empty(1 << 30 if device == "cuda" else 1 << 10, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / timer(lambda: target.copy_(source)) / 1e6


def table(
    contenders: list[Contender], shapes: list[Shape], dtypes: list[str], timers: dict[str, Timer], device: str
) -> list[dict[str, Any]]:
    """Measure every contender and its peers, and print a line for each: one dictionary per line."""
    copied = bandwidth(timers["cold"], device)
    print(f"copy: {copied:.0f} GB/s")
    print(f"{'shape':<18}{'dtype':<10}{'layout':<15}{'norm':<22}{'pass':<10}{'who':<28}{'cold':>9}{'warm':>9}{'of copy':>9}")
    rows = []
    for contender in contenders:
        for shape in filter(contender.fits, shapes):
            for dtype in dtypes:
                for layout in layouts(shape):
                    for line in compared(contender, shape, dtype, layout, timers, device):
                        of, who, size = line["pass"], line["who"], prod(shape) * DTYPES[dtype].itemsize
                        passes = least(equinorm.find(name=contender.name)[0], of).passes
                        line["of copy"] = passes * size / line["cold"] / 1e6 / copied
                        line["below goal"] = who == OURS and size >= LARGE and line["of copy"] < GOAL[of]
                        rows.append({"shape": written(shape), "dtype": dtype, "layout": layout, "norm": contender.name} | line)
                        print(
                            f"{written(shape):<18}{dtype:<10}{layout:<15}{contender.name:<22}{of:<10}{who:<28}{line['cold']:>9.4f}"
                            f"{line['warm']:>9.4f}{line['of copy']:>9.2f}{'  below goal' if line['below goal'] else ''}",
                            flush=True,
                        )
    return rows


def compared(
    contender: Contender, shape: Shape, dtype: str, layout: str, timers: dict[str, Timer], device: str
) -> Iterator[dict[str, Any]]:
    """Times of forward and of backward: ours, the peers', those compiled, and those of other packages. A peer that is wrong is left out."""
    x, dy = tensors(shape, dtype, layout, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modules, _ = prepared(contender, shape[1], DTYPES[dtype], compiled=False)
    modules = {who: module.to(device) for who, module in modules.items() if who != BATCH}
    functions: dict[str, tuple[Function, list[Tensor]]] = {who: (m, list(m.parameters())) for who, m in modules.items()}
    for peer in contender.peers.keys() & modules.keys():
        functions[f"{peer}, compiled"] = compilation(modules[peer]), functions[peer][1]
    functions |= installed(contender.name, shape[1], DTYPES[dtype], device)
    extra, expected = further(contender, x), None
    for who, (function, parameters) in functions.items():
        given = extra if who in modules or who.endswith(", compiled") else ()
        y = function(x, *given)
        if who in contender.peers:
            expected = modules[OURS](x, *extra) if expected is None else expected
            if not apart(y, expected) <= SANE:
                print(f"{who} of {contender.name} on {written(shape)} is wrong and left out")
                continue
        sources = [x, *parameters]

        def forward(function: Function = function, given: tuple[Any, ...] = given) -> Tensor:
            return function(x, *given)

        def backward(y: Tensor = y, sources: list[Tensor] = sources) -> object:
            return torch.autograd.grad(y, sources, dy, retain_graph=True, allow_unused=True)

        def both(forward: Function = forward, sources: list[Tensor] = sources) -> object:
            return torch.autograd.grad(forward(), sources, dy, allow_unused=True)

        warm = captured(timers["warm"], forward)
        yield {"pass": "forward", "who": who, "cold": timers["cold"](forward), "warm": warm}
        # A backward pass runs on the stream of its forward pass, so a graph holds both or none.
        yield {"pass": "backward", "who": who, "cold": timers["cold"](backward), "warm": captured(timers["warm"], both) - warm}


def captured(timer: Timer, call: Callable[[], object]) -> float:
    """The time of a graph of the call; no number where it cannot be captured."""
    try:
        return timer(call)
    except RuntimeError as error:
        print(f"no graph: {str(error).strip().splitlines()[0][:120]}")
        return float("nan")


if __name__ == "__main__":
    sys.exit(main())
