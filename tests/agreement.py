"""``./dev agreement``: the worst error of every method against its naive float64 reference, in every floating type.

Activation norms come from the table in cases.py, in all their variants, over two training steps and in evaluation; what acts on weights,
on residual sums or in adversarial training comes from the table at the end of this file. Parameters and inputs are rounded to the type
first, so that the reference sees what the method sees. An error is max|actual - expected| / max|expected| over a tensor. The tolerances
are those of tolerances.py, by which the tests pass or fail. Those of the half types allow one rounding of a result that was computed in
float32. Two kinds of entries go beyond them and are marked: what rounds more than once by its nature (convolutions and recurrences in the
half type, a gradient that is the sum of two, ``cast_before_weight``), and gradients where a value lies within a rounding of a kink (clamps,
thresholds, maxima), which falls on one side here and on the other there. The exit code is 1 when float64 is beyond its tolerance.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import equinorm
from equinorm import catalogue
from tests.cases import CASES, Case
from tests.references import gan, residual
from tests.references import weight as reference
from tests.test_catalogue import build, cast, data, extras, gradients, state
from tests.tolerances import GRADIENT, OUTPUT, Tolerance

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NOTHING = -1.0  # no comparison: the quantity does not exist (the input gradient of a method whose output is flat)


@dataclass
class Worst:
    """The largest error of a quantity, and whether one was beyond its tolerance."""

    error: float = NOTHING
    exceeds: bool = False

    def see(self, actual: Tensor, expected: Tensor, tolerance: Tolerance) -> None:
        """Take one more comparison into account. Where the reference is not a number, the result must not be one either."""
        got, want = actual.detach().double(), expected.detach().double()
        if got.shape != want.shape:
            raise ValueError(f"agreement: shapes must be equal, got {tuple(got.shape)} and {tuple(want.shape)}")
        off, scale = (got - want).abs().max().item(), want.abs().max().item()
        if math.isnan(off) or off > max(tolerance.atol, tolerance.rtol * scale):
            self.exceeds = True
        if scale > tolerance.atol / tolerance.rtol or off > tolerance.atol:  # what is zero but for rounding has no relative error
            self.error = max(self.error, off / scale if scale and not math.isnan(off) else math.inf)
        else:
            self.error = max(self.error, 0.0)


@dataclass
class Row:
    """One method in one type."""

    name: str
    dtype: str
    output: Worst = field(default_factory=Worst)
    gradient: Worst = field(default_factory=Worst)

    @property
    def exceeds(self) -> bool:
        """Whether anything was beyond its tolerance."""
        return self.output.exceeds or self.gradient.exceeds


def activation_norm(case: Case, row: Row) -> None:
    """Compare all variants of a case in one type, and remember the worst."""
    dtype = DTYPES[row.dtype]
    for variant in range(len(case.options)):
        module = build(case, variant, dtype)
        for training in (True, True, False):
            module.train(training)
            x = data(case, dtype=dtype)
            more = cast(extras(case, x.double()), dtype)
            p = {name: value.double().detach() if value.is_floating_point() else value for name, value in state(module).items()}
            x_ref, x_own = x.double().requires_grad_(), x.clone().requires_grad_()
            want, _ = case.reference(x_ref, p, *cast(more, torch.float64), training=training, mask=None, **case.options[variant])
            try:
                got = module(x_own, *more)
            except ValueError as refusal:
                if str(dtype) in str(refusal):  # a variant that has no form in this type, and says so
                    break
                raise
            dy = torch.randn_like(want).to(dtype)
            row.output.see(got, want, OUTPUT[dtype])
            row.gradient.see(gradients(got, dy, {"x": x_own})["x"], gradients(want, dy.double(), {"x": x_ref})["x"], GRADIENT[dtype])


# What is no norm of activations: (method, reference) as functions of the same tensors, of which the first is differentiated.

Pair = tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]


def parametrized(method: Callable[..., nn.Module], **options: object) -> Callable[..., Tensor]:
    """What a parametrization makes of the stored tensors of a weight (5, 3, 3, 3), or (5, 27) where it needs a matrix."""

    def run(*stored: Tensor) -> Tensor:
        layer = nn.Linear(27, 5, bias=False) if stored[-1].ndim == 2 else nn.Conv2d(3, 5, 3, bias=False)
        step = method(layer, **options).parametrizations.weight[0]  # type: ignore[union-attr, index]
        return step.to(stored[0].dtype)(*stored)

    return run


def per_unit(rule: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A rule on the weights of one output unit, for all."""
    return lambda weight: reference.per_unit(weight, rule)


def with_weight(layer: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """A layer as a function of its weight and its input."""
    return lambda weight, x: torch.func.functional_call(layer.to(weight.dtype), {"weight": weight}, (x,))


def others() -> Iterator[tuple[str, Pair]]:
    """The methods with a reference, by catalogue name; several lines of a name are variants."""
    w, x = torch.randn(5, 3, 3, 3) + 0.5, torch.randn(2, 3, 4, 5)

    for unbiased, mode in ((False, "inside"), (True, "inside"), (False, "outside"), (False, "clamp"), (False, "relative")):
        ours = parametrized(equinorm.weight_standardization, eps=1e-3, unbiased=unbiased, eps_mode=mode)
        rule = per_unit(lambda unit, u=unbiased, m=mode: reference.standardize(unit, 1e-3, u, m))
        yield "weight_standardization", (ours, rule, (w,))
    for mode in ("clamp", "inside"):
        ours = parametrized(equinorm.scaled_weight_standardization, gamma=1.7, eps=1e-3, eps_mode=mode)
        rule = per_unit(lambda unit, m=mode: reference.scaled_standardize(unit, 1.0, 1.7, 1e-3, m))
        yield "scaled_weight_standardization", (ours, rule, (w,))
    ours = parametrized(equinorm.centered_weight_norm, scale=1.4, eps=1e-3)
    yield "centered_weight", (ours, per_unit(lambda unit: reference.centered_weight(unit, 1.4, 1e-3)), (w,))
    ours = parametrized(equinorm.forced_weight_norm, gain=1.3, eps=1e-3)
    yield "forced_weight", (ours, per_unit(lambda unit: reference.forced_weight(unit, 1.3, 1e-3)), (w,))
    yield (
        "weight",
        (
            parametrized(equinorm.weight_norm),
            lambda g, v: torch.stack([reference.weight_norm(u.flatten(), h.squeeze()).view(3, 3, 3) for u, h in zip(v, g, strict=True)]),
            (torch.randn(5, 1, 1, 1), w),
        ),
    )
    ours = parametrized(equinorm.bjorck_orthonormal, n_iter=4, scaling="norm")
    yield "bjorck", (ours, lambda w: reference.bjorck(w / (w.abs().sum(0).max() * w.abs().sum(1).max()).sqrt(), 4), (w.flatten(1),))
    for centered in (False, True):
        linear = equinorm.CosineLinear(7, 5, centered=centered, eps=0.01)
        yield (
            "cosine",
            (
                with_weight(linear),
                lambda weight, x, c=centered: torch.stack([reference.cosine(v, u, c, 0.01) for v in x for u in weight]).view(4, 5),
                (torch.randn(5, 7), torch.randn(4, 7)),
            ),
        )
        conv = equinorm.CosineConv2d(3, 5, 3, centered=centered, eps=0.01)
        yield "cosine", (with_weight(conv), lambda weight, x, c=centered: reference.cosine_conv2d(x, weight, 1, 1, 1, c, 0.01), (w, x))
    for demodulate in (False, True):
        yield (
            "modulated",
            (
                lambda x, w, s, d=demodulate: equinorm.modulated_conv2d(x, w, s, demodulate=d, eps=1e-8),
                lambda x, w, s, d=demodulate: reference.modulated_conv2d(x, w, s, d, 1e-8),
                (x, w, torch.randn(2, 3) + 1),
            ),
        )
    yield (
        "minibatch_std",
        (equinorm.MinibatchStdDev(2, 3), lambda x: gan.minibatch_std(x, 2, 3, 1e-8), (torch.randn(4, 6, 3, 2),)),
    )
    block = equinorm.DiscriminatorBlock(3, 5)
    names = dict(block.named_parameters())
    yield (
        "discriminator_block",
        (
            lambda x, *p: torch.func.functional_call(block.to(x.dtype), dict(zip(names, p, strict=True)), (x,)),
            lambda x, *p: gan.discriminator_block(x, dict(zip(names, p, strict=True)), (1, 3, 3, 1)),
            (torch.randn(2, 3, 6, 8), *(p.detach() for p in names.values())),
        ),
    )


def gradient_clip(row: Row) -> None:
    """Adaptive gradient clipping, which has no gradient of its own."""
    dtype = DTYPES[row.dtype]
    weight = nn.Parameter(torch.randn(5, 7, dtype=dtype))
    before = weight.grad = torch.randn(5, 7, dtype=dtype)
    want = torch.stack([residual.adaptive_clip(w, g, 0.05, 1e-3, 2.0) for w, g in zip(weight.double(), before.double(), strict=True)])
    equinorm.adaptive_clip_grad_(weight, 0.05, 1e-3)
    assert weight.grad is not None
    row.output.see(weight.grad, want, OUTPUT[dtype])


def other_method(pair: Pair, row: Row) -> None:
    """Compare a method with its reference in one type."""
    dtype = DTYPES[row.dtype]
    method, rule, tensors = pair
    inputs = [t.to(dtype) for t in tensors]
    own, ref = inputs[0].clone().requires_grad_(), inputs[0].double().requires_grad_()
    got, want = method(own, *inputs[1:]), rule(ref, *(t.double() for t in inputs[1:]))
    dy = torch.randn_like(want).to(dtype)
    row.output.see(got, want, OUTPUT[dtype])
    (dx,), (dx_want,) = torch.autograd.grad(got, own, dy), torch.autograd.grad(want, ref, dy.double())
    row.gradient.see(dx, dx_want, GRADIENT[dtype])


def measure(names: set[str]) -> Iterator[Row]:
    """The rows of the methods in ``names``, in the catalogue's order."""
    cases: dict[str, list[Case]] = {}
    for case in CASES:
        cases.setdefault(case.name, []).append(case)
    pairs: dict[str, list[Pair]] = {}
    for name, pair in others():
        pairs.setdefault(name, []).append(pair)
    for name in catalogue.methods():
        for dtype in DTYPES if name in names else ():
            torch.manual_seed(0)
            row = Row(name, dtype)
            for case in cases.get(name, ()):
                activation_norm(case, row)
            for pair in pairs.get(name, ()):
                other_method(pair, row)
            if name == "adaptive_gradient_clip":
                gradient_clip(row)
            if row.output.error != NOTHING:
                yield row


def main() -> int:
    """Print the table. Exit code 1 when float64 is beyond its tolerance: rounding does not explain that."""
    parser = argparse.ArgumentParser(prog="./dev agreement", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="catalogue names (default: every method)")
    parser.add_argument("--csv", type=Path, help="write the numbers to this file")
    arguments = parser.parse_args()
    try:
        names = {catalogue.resolve(name).facts.name for name in arguments.names} or set(catalogue.methods())  # type: ignore[union-attr]
    except ValueError as error:
        parser.error(str(error))
    began = time.monotonic()
    print(
        "worst error against the naive float64 reference, relative to the largest value: output / gradient of the input; ! beyond tolerance"
    )
    print(f"{'':<30}" + "".join(f"{dtype:>18} " for dtype in DTYPES))
    bounds = "".join(f"{f'{OUTPUT[dtype].rtol:.1e} / {GRADIENT[dtype].rtol:.1e}':>18} " for dtype in DTYPES.values())
    print(f"{'tolerance':<30}{bounds}", flush=True)
    rows: list[Row] = []
    for row in measure(names):
        if row.dtype == next(iter(DTYPES)):
            print(f"{row.name:<30}", end="")
        print(f"{shown(row.output):>8} / {shown(row.gradient):>7}{'!' if row.exceeds else ' '}", end="", flush=True)
        if row.dtype == list(DTYPES)[-1]:
            print(flush=True)
        rows.append(row)
    compared = {row.name for row in rows}
    print(f"\n{len(compared)} methods in {len(DTYPES)} types, {time.monotonic() - began:.0f} s")
    if without := [name for name in catalogue.methods() if name in names - compared]:
        print(f"No naive reference; their tests compare with other definitions and identities: {', '.join(without)}")
    beyond = [row for row in rows if row.exceeds]
    print(f"{len(rows) - len(beyond)} of {len(rows)} entries are within their tolerance" + ("; beyond it:" if beyond else ""))
    for row in beyond:
        print(f"  {row.name} {row.dtype}: output {shown(row.output)}, gradient {shown(row.gradient)}")
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["method", "dtype", "output", "gradient", "exceeds"])
            writer.writerows([row.name, row.dtype, shown(row.output), shown(row.gradient), row.exceeds] for row in rows)
    return int(any(row.dtype == "float64" for row in beyond))


def shown(worst: Worst) -> str:
    """An error with two digits; a dash where there is nothing to compare."""
    return "-" if worst.error == NOTHING else "0" if worst.error == 0 else f"{worst.error:.1e}"


if __name__ == "__main__":
    sys.exit(main())
