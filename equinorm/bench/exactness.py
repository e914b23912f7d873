"""``equinorm bench --exactness``: errors on inputs that norms are known to get wrong, torch's layers beside ours.

The oracle is the formula in float64, of the input divided by a power of two (which is exact) with eps divided by its square: a norm of a
multiple of x is the norm of x. The error is the largest difference in units of the largest value: 1 where a layer returns zeros.
"""

from __future__ import annotations

import csv
import warnings
from argparse import Namespace
from collections.abc import Callable
from itertools import pairwise
from math import frexp, inf
from typing import NamedTuple

import torch
from torch import Tensor, nn

import equinorm
from equinorm.bench.grid import LAYOUTS, Layout
from equinorm.bench.measure import compilation
from equinorm.bench.table import show
from equinorm.compare.errors import InputError

BOUNDS = {torch.float32: (1e-6, 2e-6), torch.bfloat16: (4e-3, 4e-3), torch.float16: (6e-4, 6e-4)}  # of output and gradient
SHAPE, GROUPS, ROWS = (8, 16, 24, 24), 4, (512, 384)
LONG = (2, 16, 800, 800)


# The difficult inputs, by what is difficult about them.


def far(shape: tuple[int, ...], ratio: float) -> Tensor:
    """Standard deviation 1, far from zero: what is left of a rounded mean shows."""
    return torch.randn(shape) + ratio


def magnitude(shape: tuple[int, ...], std: float) -> Tensor:
    """An ordinary Gaussian in other units, without tails that leave the type's range: squares overflow or vanish."""
    return torch.randn(shape).clamp(-4, 4) * std


def one_sided(shape: tuple[int, ...]) -> Tensor:
    """What follows a ReLU, shifted: long naive sums lose digits."""
    return torch.randn(shape).relu() + 3


def outliers(shape: tuple[int, ...]) -> Tensor:
    """One value in a thousand is a thousand times the others."""
    x = torch.randn(shape)
    return torch.where(torch.rand(shape) < 1e-3, 1000 * x, x)


def ramp(shape: tuple[int, ...]) -> Tensor:
    """Values that grow along memory: a running mean moves all the way."""
    return torch.linspace(-1, 100, torch.Size(shape).numel()).reshape(shape) + 0.1 * torch.randn(shape)


class Kind(NamedTuple):
    """One kind of input.

    Attributes:
        name: what is difficult.
        make: the input of a shape, in float32.
        eps: of the norms.
        dtype: that they run in.
        layout: of the input; rows are contiguous.
        shape: for norms of channels; those of rows take the same number of values only when it is :data:`SHAPE`.
    """

    name: str
    make: Callable[[tuple[int, ...]], Tensor]
    eps: float = 1e-5
    dtype: torch.dtype = torch.float32
    layout: Layout = "contiguous"
    shape: tuple[int, ...] = SHAPE


def _kinds() -> tuple[Kind, ...]:
    bf16, fp16 = torch.bfloat16, torch.float16
    return (
        Kind("plain", lambda s: far(s, 0)),
        *(Kind(f"mean/std {ratio:.0e}", lambda s, ratio=ratio: far(s, ratio)) for ratio in (1e2, 1e3, 1e4, 1e5, 1e6)),
        Kind("mean 1, variance 1e-12, eps 1e-12", lambda s: 1 + 1e-6 * far(s, 0), eps=1e-12),
        Kind("std 1e-6, eps 1e-12", lambda s: magnitude(s, 1e-6), eps=1e-12),
        Kind("std 1e-18, eps 1e-30", lambda s: magnitude(s, 1e-18), eps=1e-30),
        Kind("std 1e-40 (subnormal), eps 1e-30", lambda s: magnitude(s, 1e-40), eps=1e-30),
        Kind("outliers", outliers),
        Kind("ramp", ramp),
        *(Kind(f"std {std:.0e}", lambda s, std=std: magnitude(s, std)) for std in (1e18, 1e19, 1e30)),
        Kind("std 5e+37 (near the largest)", lambda s: magnitude(s, 5e37)),
        *(
            Kind(f"a million a statistic, {layout}", one_sided, layout=layout, shape=LONG)  # type: ignore[arg-type]
            for layout in LAYOUTS
        ),
        Kind("bfloat16, plain", lambda s: far(s, 0), dtype=bf16),
        Kind("bfloat16, mean/std 30", lambda s: far(s, 30), dtype=bf16),
        Kind("bfloat16, std 1e+30", lambda s: magnitude(s, 1e30), dtype=bf16),
        Kind("float16, std 1e+04", lambda s: magnitude(s, 1e4), dtype=fp16),
        Kind("float16, std 1e-6, eps 1e-12", lambda s: magnitude(s, 1e-6), eps=1e-12, dtype=fp16),
    )


KINDS = _kinds()


class Norm(NamedTuple):
    """One kind of norm: ours, torch's, and what a statistic is over.

    Attributes:
        ours, torch: from eps to the layer.
        view: brings an input to a form in which a statistic is over the dimensions ``over``.
        over: those dimensions.
        centered: whether the mean is subtracted.
        rows: whether the input is (rows, D).
    """

    ours: Callable[[float], nn.Module]
    torch: Callable[[float], nn.Module]
    view: Callable[[Tensor], Tensor]
    over: tuple[int, ...]
    centered: bool = True
    rows: bool = False


_C, _D = SHAPE[1], ROWS[1]
NORMS = {
    "batch": Norm(lambda eps: equinorm.BatchNorm(_C, eps), lambda eps: nn.BatchNorm2d(_C, eps), lambda x: x, (0, 2, 3)),
    "layer": Norm(lambda eps: equinorm.LayerNorm(_D, eps), lambda eps: nn.LayerNorm(_D, eps), lambda x: x, (1,), rows=True),
    "group": Norm(
        lambda eps: equinorm.GroupNorm(GROUPS, _C, eps),
        lambda eps: nn.GroupNorm(GROUPS, _C, eps),
        lambda x: x.reshape(len(x), GROUPS, -1, *x.shape[2:]),
        (2, 3, 4),
    ),
    "instance": Norm(
        lambda eps: equinorm.InstanceNorm(_C, eps, affine=True),
        lambda eps: nn.InstanceNorm2d(_C, eps, affine=True),
        lambda x: x,
        (2, 3),
    ),
    "rms": Norm(lambda eps: equinorm.RMSNorm(_D, eps), lambda eps: nn.RMSNorm(_D, eps), lambda x: x, (1,), centered=False, rows=True),
}


class Errors(NamedTuple):
    """Of the output and of the input's gradient; infinite where either is not finite."""

    output: float
    gradient: float

    def __str__(self) -> str:
        return " / ".join("nan" if error == inf else f"{error:.0e}" for error in self)

    def within(self, dtype: torch.dtype) -> bool:
        """Whether both are as small as the type allows."""
        return all(error <= bound for error, bound in zip(self, BOUNDS[dtype], strict=True))


def compared(kind: Kind, norm: Norm, compiled: bool) -> dict[str, Errors]:
    """The errors of torch's layer, compiled as well where asked for, and of ours, on one kind of input."""
    x = kind.make(ROWS if norm.rows else kind.shape).to(kind.dtype)
    x = x if norm.rows else x.to(memory_format=LAYOUTS[kind.layout])
    weight = (1 + 0.2 * torch.randn(x.shape[1])).to(kind.dtype)  # no bias: it would hide the error of what is small beside it
    largest, deviation = x.double().abs().max().item(), (x.double().var() + kind.eps).sqrt().item()
    dy = (torch.randn(x.shape) * size_of_gradient(deviation, torch.finfo(kind.dtype))).to(x)
    exact = oracle(x, weight, dy, kind.eps, norm, 2.0 ** frexp(largest)[1])
    layers = {"torch": norm.torch(kind.eps), "ours": norm.ours(kind.eps)}
    if compiled:
        layers |= {"torch, compiled": compilation(norm.torch(kind.eps))}
    found = {}
    for who, module in layers.items():
        module.to(kind.dtype)
        module.get_parameter("weight").data.copy_(weight)
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = module(leaf)
        found[who] = Errors(*map(_error, (y, torch.autograd.grad(y, leaf, dy)[0]), exact))
    if compiled:
        torch.compiler.reset()
    return found


def size_of_gradient(deviation: float, info: torch.finfo) -> float:
    """An incoming gradient with which the outgoing one, ``deviation`` times smaller, keeps its digits in the type; 1 wherever it does."""
    return min(max(1.0, deviation * info.tiny / info.eps), deviation * info.max / 100)


def oracle(x: Tensor, weight: Tensor, dy: Tensor, eps: float, norm: Norm, unit: float) -> tuple[Tensor, Tensor]:
    """Output and gradient of the input in float64, measured in ``unit``, a power of two."""
    leaf = (x.double() / unit).requires_grad_()
    data = norm.view(leaf)
    if norm.centered:
        data = data - data.mean(norm.over, keepdim=True)
    y = (data / (data.square().mean(norm.over, keepdim=True) + eps / unit / unit).sqrt()).reshape(x.shape)
    y = y * weight.double().view(1, -1, *[1] * (x.ndim - 2))
    return y.detach(), torch.autograd.grad(y, leaf, dy.double())[0] / unit


def _error(actual: Tensor, expected: Tensor) -> float:
    error = ((actual.detach().double() - expected).abs().max() / expected.abs().max()).item()
    return error if error < inf else inf


def run(arguments: Namespace) -> int:
    """Print the table; write it where asked. Returns 1 if an error of ours is larger than the type allows."""
    compiled = arguments.compile not in (None, "none")
    who = ["torch", *["torch, compiled"] * compiled, "ours"]
    names = [name for name in NORMS if name in arguments.norms]
    if not names:
        raise InputError(f"--exactness knows {', '.join(NORMS)}; got {', '.join(arguments.norms)}")
    lines, beyond = [], []
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(0)
        warnings.simplefilter("ignore")  # of torch's compiler, about itself
        for kind in KINDS:
            for name in names:
                if NORMS[name].rows and kind.shape != SHAPE:
                    continue
                found = compared(kind, NORMS[name], compiled)
                lines.append([kind.name, name, str(kind.dtype).removeprefix("torch."), *(str(found[one]) for one in who)])
                beyond += [] if found["ours"].within(kind.dtype) else [f"{kind.name}, {name}: {found['ours']}"]
    head = ["input", "norm", "type", *who]
    # The name of an input stands on its first line.
    shown = [[*lines[0]], *([("" if one[0] == before[0] else one[0]), *one[1:]] for before, one in pairwise(lines))]
    print("relative errors of the output / of the input's gradient; 1: zeros; nan: not finite")
    show(head, shown)
    print(f"\nours: {len(lines) - len(beyond)} of {len(lines)} within what the type allows" + ("; beyond it:" if beyond else ""))
    print("".join(f"  {line}\n" for line in beyond), end="")
    if arguments.csv is not None:
        with arguments.csv.open("w", newline="") as file:
            csv.writer(file).writerows([head, *lines])
    return int(bool(beyond))
