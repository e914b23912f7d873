"""The CPU kernels against loops in float64: every dtype and layout, ragged sizes, extreme values, fixed bits, refused arguments."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from equinorm.kernels import build, cpu
from tests.helpers import assert_close, assert_grads_close, poisoned_memory
from tests.references import kernels as reference
from tests.tolerances import relative_error

pytestmark = pytest.mark.skipif(bool(build.result().reason), reason=f"no CPU kernels: {build.result().reason}")

DTYPES = list(cpu.DTYPES)
LAYOUTS = ["ncs", "nsc"]
# 1, 2, primes, powers of two and their neighbours, in each place: below, at and beyond the vector width, the segment and the block.
SHAPES = [
    (1, 1),
    (1, 2, 1),
    (2, 1, 1, 1),
    (3, 5),
    (17, 8),
    (2, 13, 3),
    (4, 7, 5, 3),
    (2, 8, 8, 8),
    (2, 3, 15, 17),
    (3, 16, 3, 11),
    (2, 33, 2, 2, 2),
    (2, 257, 2, 1),
    (65, 3, 2, 2),
    (1, 2, 127),
    (2, 2, 128),
    (2, 1, 129),
    (1, 2, 4095),
    (2, 2, 4096),
    (1, 3, 4097),
    (1, 1, 64, 129),
]


def channels_last(x: Tensor) -> Tensor:
    """The same values with the channel as the fastest dimension in memory, for any number of dimensions."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def lay(x: Tensor, layout: str) -> Tensor:
    return channels_last(x) if layout == "nsc" else x.contiguous()


def data(shape: tuple[int, ...], dtype: torch.dtype, layout: str, mean: float = 1.5, std: float = 2.0) -> Tensor:
    return lay((torch.randn(shape, dtype=torch.float64) * std + mean).to(dtype), layout)


def small(rows: int, c: int) -> Tensor:
    return torch.randn(rows, c, dtype=torch.float64)


# Small results, relative to the size of what was summed. float32 data, and half types widened without loss, may be summed in float over
# chains of 16 terms, whose error is below 16 * 2^-24 = 9.5e-7; half of that is not reached by rounding errors of both signs.
SMALL = {dtype: 1e-12 if dtype == torch.float64 else 5e-7 for dtype in DTYPES}


def assert_moments_close(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    """The mean within a fraction of the spread (and the last digits of a double), the variance within a fraction of itself."""
    assert ((got[0] - want[0]).abs() <= SMALL[dtype] * want[1].sqrt() + 1e-14 * want[0].abs()).all()
    assert ((got[1] - want[1]).abs() <= SMALL[dtype] * want[1] + 1e-28 * want[0].square()).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_channel_kernels_equal_the_loops(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    x, dy = data(shape, dtype, layout), data(shape, dtype, layout, mean=0.3)
    n, c = shape[:2]
    for per in ("sample", "batch"):
        assert_moments_close(cpu.moments(x, per), reference.moments(x, per), dtype)
        for finer in {1, n}:
            center = small(finer, c)
            spread = (x.double() - center.view(finer, c, *[1] * (x.ndim - 2))).abs()
            sizes = reference.reduce(dy.abs(), spread, torch.zeros(1, 1), per)
            for got, want, size in zip(cpu.reduce(dy, x, center, per), reference.reduce(dy, x, center, per), sizes, strict=True):
                assert ((got - want).abs() <= SMALL[dtype] * size).all()
    y = cpu.affine(x, small(n, c), small(1, c), small(n, 1))
    assert y.dtype == dtype
    assert y.stride() == x.stride()
    for sizes in product({1, n}, {1, c}):
        tensors = [small(*sizes), small(1, c), small(n, c), small(n, 1)]
        assert_close(cpu.affine(x, *tensors[:3]), reference.affine(x, *tensors[:3]))
        assert_close(cpu.backward(dy, x, *tensors), reference.backward(dy, x, *tensors), label="dx")


def test_small_tensors_of_any_float_type_and_stride_are_taken() -> None:
    x = torch.randn(3, 4, 5)
    center, scale, shift = torch.randn(4, 3).T, torch.randn(1, 4, dtype=torch.bfloat16), torch.randn(1, 8, dtype=torch.float64)[:, ::2]
    assert_close(cpu.affine(x, center, scale, shift), reference.affine(x, center, scale, shift))


def test_layout_names_the_order_of_memory() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert cpu.layout(x) == "ncs"
    assert cpu.layout(x.to(memory_format=torch.channels_last)) == "nsc"
    assert cpu.layout(channels_last(x[..., 0])) == "nsc"
    assert cpu.layout(channels_last(torch.randn(2, 3, 4, 5, 6))) == "nsc"
    assert cpu.layout(x.transpose(2, 3)) is None
    assert cpu.layout(x[:, ::2]) is None
    assert cpu.layout(x[:, :, 0, 0]) is None
    assert cpu.layout(x[:, :1]) is None


# rows, groups, k, s, measured: layer and RMS norm (partial, ragged, long), group norm, instance norm, group norm on features.
ROWS = [
    (1, 1, 1, 1, 1),
    (5, 1, 37, 1, 37),
    (5, 1, 37, 1, 11),
    (70, 1, 64, 1, 64),
    (2, 1, 4095, 1, 4095),
    (3, 1, 8195, 1, 8195),
    (2, 1, 8195, 1, 4100),
    (6, 2, 3, 7, 21),
    (6, 2, 3, 7, 10),
    (4, 2, 2, 16, 32),
    (2, 1, 3, 4097, 3 * 4097),
    (2, 1, 3, 4097, 5000),
    (15, 5, 1, 9, 9),
    (99, 3, 4, 1, 4),
]


def run_rows(x: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor, eps: float, **shape: Any) -> dict[str, Tensor | None]:
    y, mean, rstd = cpu.row_forward(x, weight, bias, eps=eps, **shape)
    dx, dweight, dbias = cpu.row_backward(dy, x, weight, mean, rstd, wanted=(True, weight is not None, bias is not None), **shape)
    return {"y": y, "x": dx, "weight": dweight, "bias": dbias}


def expect_rows(x: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor, eps: float, **shape: Any) -> dict[str, Tensor | None]:
    del shape["rows"]
    leaves = [t if t is None else t.double().requires_grad_() for t in (x.detach().clone(), weight, bias)]
    y = reference.rows(*leaves, eps=eps, **shape)
    grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dy.double()))
    named = {name: None if leaf is None else next(grads) for name, leaf in zip(("x", "weight", "bias"), leaves, strict=True)}
    return {"y": y.detach()} | named


@pytest.mark.parametrize("parameters", ["none", "weight", "bias", "both"])
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", ROWS, ids=str)
def test_row_kernels_equal_the_loops(sizes: tuple[int, ...], dtype: torch.dtype, centered: bool, parameters: str) -> None:
    rows, groups, k, s, measured = sizes
    shape = {"rows": rows, "groups": groups, "k": k, "s": s, "measured": measured, "centered": centered}
    x, dy = data((rows, k * s), dtype, "ncs"), data((rows, k * s), dtype, "ncs", mean=0.3)
    weight = torch.randn(groups * k, dtype=dtype) if parameters in ("weight", "both") else None
    bias = torch.randn(groups * k, dtype=dtype) if parameters in ("bias", "both") else None
    got, want = (run(x, weight, bias, dy, 1e-3, **shape) for run in (run_rows, expect_rows))
    assert_close(got.pop("y"), want.pop("y"))
    for name in ("weight", "bias"):
        assert (got[name] is None) == (want[name] is None)
        if got[name] is not None:
            rounded = torch.float64 if weight is None else dtype
            assert got[name].dtype == rounded
            error = relative_error(got[name].double(), want[name])
            assert error <= 2 * SMALL[dtype] + torch.finfo(rounded).eps  # of the result, not of what was summed: terms cancel
    assert_grads_close({"x": got["x"]}, {"x": want["x"]})


# Groups, channels of each, positions: rows narrower and wider than a vector, folded or not, of several blocks, of one position.
@pytest.mark.parametrize(("groups", "k", "s"), [(2, 3, 7), (4, 24, 33), (1, 300, 5), (16, 2, 5000), (3, 40, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_interleaved_rows_equal_the_loops(groups: int, k: int, s: int, dtype: torch.dtype, affine: bool) -> None:
    shape = {"rows": 2 * groups, "groups": groups, "k": k, "s": s, "measured": k * s, "centered": True}
    x, dy = data((2 * groups, k * s), dtype, "ncs"), data((2 * groups, k * s), dtype, "ncs", mean=0.3)
    weight, bias = (torch.randn(groups * k, dtype=dtype) if affine else None for _ in range(2))
    want = expect_rows(x, weight, bias, dy, 1e-3, **shape)
    # The same values with the channels innermost: strides of a permuted tensor.
    x, dy = (t.reshape(2, groups * k, s).transpose(1, 2).contiguous().transpose(1, 2) for t in (x, dy))
    with poisoned_memory():
        y, mean, rstd = cpu.row_forward(x, weight, bias, **shape, eps=1e-3, channels_last=True)
        wanted = (True, affine, affine)
        dx, *grads = cpu.row_backward(dy, x, weight, mean, rstd, **shape, wanted=wanted, channels_last=True)
    assert_close(y.reshape(want["y"].shape), want["y"])
    assert_grads_close({"x": dx.reshape(want["x"].shape)}, {"x": want["x"]})
    for got, name in zip(grads, ("weight", "bias"), strict=True):
        if affine:
            assert relative_error(got.double(), want[name]) <= 2 * SMALL[dtype] + torch.finfo(dtype).eps


def test_parameters_may_have_another_type_and_stride() -> None:
    x, dy, shape = torch.randn(4, 6), torch.randn(4, 6), {"rows": 4, "groups": 1, "k": 6, "s": 1, "measured": 6, "centered": True}
    weight, bias = torch.randn(12, dtype=torch.float64)[::2], torch.randn(6, dtype=torch.float16)
    got, want = (run(x, weight, bias, dy, 1e-5, **shape) for run in (run_rows, expect_rows))
    assert_close(got["y"], want["y"])


# mean / std, std, eps, dtype: what loses digits, overflows or underflows in arithmetic of the data's own type.
TORTURE = {
    "mean/std 1e4": (1e4, 1.0, 1e-5, torch.float32),
    "mean/std 1e6": (1e6, 1.0, 1e-5, torch.float32),
    "variance far below eps": (1e3, 1e-4, 1e-5, torch.float32),
    "variance 1e-12": (1e6, 1e-6, 1e-12, torch.float32),
    "std 1e-18": (0.5, 1e-18, 1e-40, torch.float32),
    "denormal": (0.5, 1e-40, 1e-30, torch.float32),
    "denormal against its own eps": (0.0, 1e-40, 1e-80, torch.float32),
    "std 1e18": (0.5, 1e18, 1e-5, torch.float32),
    "std 1e30": (3.0, 1e30, 1e-5, torch.float32),
    "near the largest float32": (0.5, 5e37, 1e-5, torch.float32),
    "bfloat16, mean/std 30": (30.0, 1.0, 1e-5, torch.bfloat16),
    "bfloat16, std 1e30": (0.5, 1e30, 1e-5, torch.bfloat16),
    "float16, std 1e4": (0.5, 1e4, 1e-5, torch.float16),
    "float16, std 1e-6": (0.5, 1e-6, 1e-12, torch.float16),
    "float64, mean/std 1e3": (1e3, 1.0, 1e-5, torch.float64),
}
# float64 data with a large mean keep fewer digits of the spread: 1e-16 * 1e3.
OUTPUT = {torch.float32: 1e-6, torch.float64: 2e-12, torch.bfloat16: 4e-3, torch.float16: 6e-4}
GRADIENT = {torch.float32: 2e-6, torch.float64: 2e-12, torch.bfloat16: 4e-3, torch.float16: 6e-4}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", TORTURE)
def test_channel_kernels_are_exact_on_extreme_values(case: str, layout: str) -> None:
    ratio, std, eps, dtype = TORTURE[case]
    x = data((2, 3, 40, 30), dtype, layout, mean=ratio * std, std=std)
    dy = data((2, 3, 40, 30), dtype, layout, mean=0, std=min(1, math.hypot(std, eps**0.5)))  # so that dx can be represented
    exact = x.double().requires_grad_()
    mean, var = exact.mean((0, 2, 3), keepdim=True), exact.var((0, 2, 3), correction=0, keepdim=True)
    want = (exact - mean) / (var + eps).sqrt()
    (want_dx,) = torch.autograd.grad(want, exact, dy.double())

    mean, var = cpu.moments(x, "batch")
    rstd = (var + eps).rsqrt()
    assert relative_error(cpu.affine(x, mean, rstd, torch.zeros(1, 1)), want, over=(0, 2, 3)).max() <= OUTPUT[dtype]
    sum_dy, sum_dy_x = cpu.reduce(dy, x, mean, "batch")
    count = x.numel() / 3
    dx = cpu.backward(dy, x, mean, rstd, -(rstd**3) * sum_dy_x / count, -rstd * sum_dy / count)
    assert relative_error(dx, want_dx, over=(0, 2, 3)).max() <= GRADIENT[dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("where", ["ends", "quarters", "ramp"])
def test_moments_are_exact_whatever_the_first_guess_of_the_mean(where: str, layout: str) -> None:
    x = torch.randn(2, 5, 1200)
    if where == "ramp":
        x += torch.linspace(-1e4, 1e4, 1200)
    else:
        x[..., [0, 1, 2, 3, 1196, 1197, 1198, 1199] if where == "ends" else [0, 150, 300, 450, 600, 899, 900, 1199]] = 1e5
    x = lay(x, layout)
    assert_moments_close(cpu.moments(x, "sample"), reference.moments(x, "sample"), torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_shift_that_cancels_the_product_costs_no_digits(layout: str) -> None:
    x = data((2, 5, 40, 30), torch.float32, layout, mean=1e4, std=1.0)
    center, scale, shift = torch.zeros(1, 5), small(1, 5), torch.full((1, 5), -1e4, dtype=torch.float64)
    assert_close(cpu.affine(x, center, scale, shift * scale), reference.affine(x, center, scale, shift * scale))


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("sizes", [(6, 1, 300, 1, 300), (6, 2, 3, 100, 300), (6, 1, 300, 1, 77)], ids=str)
@pytest.mark.parametrize("case", TORTURE)
def test_row_kernels_are_exact_on_extreme_values(case: str, sizes: tuple[int, ...], centered: bool) -> None:
    ratio, std, eps, dtype = TORTURE[case]
    rows, groups, k, s, measured = sizes
    shape = {"rows": rows, "groups": groups, "k": k, "s": s, "measured": measured, "centered": centered}
    x = data((rows, k * s), dtype, "ncs", mean=ratio * std, std=std)
    dy = data((rows, k * s), dtype, "ncs", mean=0, std=min(1, math.hypot(std, eps**0.5)))  # so that dx can be represented
    weight, bias = torch.rand(2, groups * k) + 0.5
    got, want = (run(x, weight, bias, dy, eps, **shape) for run in (run_rows, expect_rows))
    assert relative_error(got["y"], want["y"], over=(1,)).max() <= OUTPUT[dtype]
    assert relative_error(got["x"], want["x"], over=(1,)).max() <= GRADIENT[dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [0.0, 3.3, -1e-40, 1e38])
def test_a_constant_has_exactly_no_variance(value: float, layout: str) -> None:
    x = lay(torch.full((3, 5, 41, 103), value), layout)
    for per in ("sample", "batch"):
        mean, var = cpu.moments(x, per)
        assert (var == 0).all()
        assert (mean == torch.tensor(value).double()).all()
        assert (cpu.affine(x, mean, (var + 1e-30).rsqrt(), torch.zeros(1, 1)) == 0).all()
    rows = x.contiguous()
    y, _, _ = cpu.row_forward(rows, None, None, rows=15, groups=5, k=1, s=41 * 103, measured=41 * 103, eps=1e-30, centered=True)
    assert (y == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (1, 2, 3, 4), (1, 4, 8, 10)])
def test_one_bad_value_stays_in_its_group(place: tuple[int, int, int, int], value: float, layout: str) -> None:
    x, dy = data((3, 5, 9, 11), torch.float32, layout), data((3, 5, 9, 11), torch.float32, layout)
    x[place] = value
    for per in ("sample", "batch"):
        hit = torch.zeros(3 if per == "sample" else 1, 5, dtype=torch.bool)
        hit[place[0] if per == "sample" else 0, place[1]] = True
        mean, var = cpu.moments(x, per)
        assert (var.isfinite() == ~hit).all()
        assert (mean.isfinite() == ~hit).all()
        for total in cpu.reduce(dy, x, mean, per)[1:]:
            assert (total.isfinite() == ~hit).all()
        y = cpu.affine(x, mean, (var + 1e-5).rsqrt(), torch.zeros(1, 1))
        assert (y.isnan().all(-1).all(-1) == hit.expand(3, 5)).all()
        assert (y.isfinite().all(-1).all(-1) == ~hit.expand(3, 5)).all()
    shape = {"rows": 15, "groups": 5, "k": 1, "s": 99, "measured": 99, "centered": True}
    x, dy = x.contiguous(), dy.contiguous()
    y, mean, rstd = cpu.row_forward(x, None, None, eps=1e-5, **shape)
    dx, _, _ = cpu.row_backward(dy, x, None, mean, rstd, wanted=(True, False, False), **shape)
    row = place[0] * 5 + place[1]
    for result in (y, dx):
        assert result.view(15, 99).isfinite().all(1).logical_not().nonzero().tolist() == [[row]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_million_values_per_channel(dtype: torch.dtype, layout: str) -> None:
    x = lay((torch.rand(2, 3, 800, 800) + 10).to(dtype), layout)
    exact = x.double()
    mean, var = cpu.moments(x, "batch")
    assert_moments_close((mean, var), (exact.mean((0, 2, 3))[None], exact.var((0, 2, 3), correction=0)[None]), dtype)
    terms = exact * (exact - exact.mean((0, 2, 3), keepdim=True))
    for got, want in zip(cpu.reduce(x, x, mean, "batch"), (exact, terms), strict=True):
        assert ((got - want.sum((0, 2, 3))).abs() <= SMALL[dtype] * want.abs().sum((0, 2, 3))).all()


def everything(x: Tensor, dy: Tensor, per: str) -> dict[str, Tensor]:
    """One result of every channel kernel."""
    mean, var = cpu.moments(x, per)
    sum_dy, sum_dy_x = cpu.reduce(dy, x, mean, per)
    return {
        "mean": mean,
        "var": var,
        "sum_dy": sum_dy,
        "sum_dy_x": sum_dy_x,
        "y": cpu.affine(x, mean, (var + 1).rsqrt(), mean),
        "dx": cpu.backward(dy, x, mean, var, mean, var),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(7, 5, 130, 131), (40, 65, 9, 9), (3, 2, 300, 301), (5000, 33)], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(shape: tuple[int, ...], layout: str, threads: Any) -> None:
    x, dy = data(shape, torch.float32, layout), data(shape, torch.float32, layout)
    for per in ("sample", "batch"):
        threads(1)
        alone = everything(x, dy, per)
        for count in (2, 3):
            threads(count)
            for name, got in everything(x, dy, per).items():
                assert torch.equal(got, alone[name]), f"{name} per {per} with {count} threads"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 5, 90, 91), (9, 65, 5, 5), (5, 3, 7, 1)], ids=str)
def test_a_sample_has_the_same_bits_in_any_batch(shape: tuple[int, ...], layout: str) -> None:
    x, dy = data(shape, torch.float32, layout), data(shape, torch.float32, layout)
    whole = everything(x, dy, "sample")
    for first, last in [(0, 1), (2, 3), (1, 4), (2, shape[0])]:
        part = everything(lay(x[first:last], layout), lay(dy[first:last], layout), "sample")
        for name, got in part.items():
            assert torch.equal(got, whole[name][first:last]), f"{name} of samples {first} to {last}"


@pytest.mark.parametrize(
    "sizes", [(4, 1, 30000, 1, 30000), (2, 1, 30001, 1, 9000), (2, 2, 4, 9000, 36000), (3000, 1, 100, 1, 100)], ids=str
)
def test_row_bits_depend_neither_on_threads_nor_on_other_rows(sizes: tuple[int, ...], threads: Any) -> None:
    rows, groups, k, s, measured = sizes
    shape = {"rows": rows, "groups": groups, "k": k, "s": s, "measured": measured, "centered": True}
    x, dy = data((rows, k * s), torch.float32, "ncs"), data((rows, k * s), torch.float32, "ncs")
    weight, bias = torch.randn(2, groups * k)
    threads(1)
    alone = run_rows(x, weight, bias, dy, 1e-5, **shape)
    for count in (2, 3):
        threads(count)
        for name, got in run_rows(x, weight, bias, dy, 1e-5, **shape).items():
            assert torch.equal(got, alone[name]), f"{name} with {count} threads"
    head = run_rows(x[:groups], weight, bias, dy[:groups], 1e-5, **(shape | {"rows": groups}))
    assert torch.equal(head["y"], alone["y"][:groups])
    assert torch.equal(head["x"], alone["x"][:groups])


def channel_arguments() -> dict[str, Any]:
    x = torch.randn(2, 3, 4)
    return {"x": x, "center": small(1, 3), "scale": small(2, 3), "shift": small(1, 3), "y": torch.empty_like(x), "sizes": (2, 3, 4, False)}


BAD_CHANNEL = {
    "float64 small tensor": ({"center": torch.randn(1, 3)}, "center must be a contiguous float64 tensor"),
    "small tensor on meta": ({"scale": torch.empty(1, 3, dtype=torch.float64, device="meta")}, "Meta"),
    "small tensor's size": ({"scale": small(1, 4)}, r"scale must have 3 \(per channel\) or 6 \(per sample and channel\) elements, got 4"),
    "sizes against x": ({"sizes": (2, 3, 5, False)}, "x must have 30 elements"),
    "negative sizes": ({"sizes": (-2, -3, 4, False)}, "sizes must be positive, got n=-2"),
    "output's type": ({"y": torch.empty(2, 3, 4, dtype=torch.float64)}, "y must have the element type of x"),
    "output's layout": ({"y": channels_last(torch.empty(2, 3, 4))}, "y must be dense in contiguous order"),
    "input's layout": ({"x": torch.randn(2, 3, 8)[..., ::2]}, "x must be dense in contiguous order"),
    "integers": ({"x": torch.ones(2, 3, 4, dtype=torch.long), "y": torch.ones(2, 3, 4, dtype=torch.long)}, "expected float32, float64"),
}


@pytest.mark.parametrize("case", BAD_CHANNEL)
def test_the_channel_operators_refuse_what_they_would_read_out_of_bounds(case: str) -> None:
    change, message = BAD_CHANNEL[case]
    *tensors, sizes = (channel_arguments() | change).values()
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        torch.ops.equinorm.channel_affine.default(*tensors, *sizes)


def test_outputs_of_one_operator_have_one_granularity() -> None:
    with pytest.raises(RuntimeError, match="mean and var must have the same number of elements, got 6 and 3"):
        torch.ops.equinorm.channel_moments.default(torch.randn(2, 3, 4), small(2, 3), small(1, 3), 2, 3, 4, False)


BAD_ROWS = {
    "rows": ({"rows": 5, "groups": 2}, "rows must be a multiple of groups, got 5 and 2"),
    "measured": ({"measured": 9}, "measured must be within 1 and the row's length 8, got 9"),
    "length": ({"k": 9}, "x must have 54 elements"),
    "weight": ({"weight": torch.randn(9)}, r"weight must have groups \* k = 8 elements, got 9"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_the_row_operators_refuse_what_they_would_read_out_of_bounds(case: str) -> None:
    change, message = BAD_ROWS[case]
    arguments = {"weight": None, "rows": 6, "groups": 1, "k": 8, "s": 1, "measured": 8, "eps": 1e-5, "centered": True} | change
    with pytest.raises(RuntimeError, match=message):
        cpu.row_forward(torch.randn(6, 8), bias=None, **arguments)


def test_inputs_are_left_alone() -> None:
    x, dy, weight = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(3)
    before = [t.clone() for t in (x, dy, weight)]
    everything(x, dy, "sample")
    run_rows(x, weight, weight, dy, 1e-5, rows=6, groups=3, k=1, s=4, measured=4, centered=True)
    assert all(torch.equal(now, then) for now, then in zip((x, dy, weight), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_running_estimates_move_where_they_stay_finite(dtype):
    mean, var = torch.randn(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    mean[1], var[2], var[3] = torch.nan, torch.inf, 1e300
    running_mean, running_var = torch.randn(5, dtype=dtype), torch.rand(5, dtype=dtype)
    before = running_mean.to(torch.float64, copy=True), running_var.to(torch.float64, copy=True)
    cpu.running_update(running_mean, running_var, mean, var, 0.3, 1.25)
    moves = torch.tensor([True, False, False, dtype == torch.float64, True])
    for got, was, batch in ((running_mean, before[0], mean), (running_var, before[1], var * 1.25)):
        assert torch.equal(got[~moves].double(), was[~moves])
        assert_close(got[moves], (was + 0.3 * (batch - was))[moves])


def test_running_estimates_of_another_size_are_refused():
    with pytest.raises(RuntimeError, match="mean and var must have 5 elements, got 4 and 5"):
        cpu.running_update(*torch.rand(2, 5), torch.rand(4, dtype=torch.float64), torch.rand(5, dtype=torch.float64), 0.1, 1.0)
