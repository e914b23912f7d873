"""The channel kernels against the definition in float64."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from equinorm.kernels import gpu, reference, triton_channel
from tests.helpers import assert_close
from tests.kernels.test_cpu import GRADIENT, LAYOUTS, OUTPUT, TORTURE, data, lay, small
from tests.references import kernels as loops
from tests.tolerances import relative_error

DTYPES = list(gpu.DTYPES)
# 1, primes, powers of two and their neighbours, around the tile of 256 elements and the smaller ones of the other kernels.
SHAPES = [
    (1, 1),
    (17, 8),
    (2, 13, 3),
    (4, 7, 5, 3),
    (2, 33, 2, 2, 2),
    (9, 3, 2, 2),
    (1, 257, 2, 1),
    (1, 16, 8, 8),
    (1, 2, 255),
    (1, 2, 256),
    (2, 2, 257),
    (1, 1, 1, 1031),
]
# Every shape in float32, and in the other types one of partial tiles and one of several.
CASES = [(shape, dtype) for dtype in DTYPES for shape in (SHAPES if dtype == torch.float32 else [(4, 7, 5, 3), (1, 2, 257)])]
# Sums of float32 terms: the interpreter adds a tile's rows one after the other, where the chip adds in a tree.
SMALL = {dtype: 1e-12 if dtype == torch.float64 else 2e-6 for dtype in DTYPES}


def exactly(x: Tensor, per: str) -> tuple[Tensor, Tensor]:
    runs = x.double().flatten(2) if x.ndim > 2 else x.double().unsqueeze(2)
    runs = runs if per == "sample" else runs.transpose(0, 1).flatten(1).unsqueeze(0)
    return runs.mean(2), runs.var(2, correction=0)


def assert_moments_close(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    assert ((got[0] - want[0]).abs() <= SMALL[dtype] * want[1].sqrt() + 1e-14 * want[0].abs()).all()
    assert ((got[1] - want[1]).abs() <= SMALL[dtype] * want[1] + 1e-28 * want[0].square()).all()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_channel_kernels_equal_the_definition(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    x, dy = data(shape, dtype, layout), data(shape, dtype, layout, mean=0.3)
    n, c = shape[:2]
    for per in ("sample", "batch"):
        assert_moments_close(gpu.moments(x, per), exactly(x, per), dtype)
    for per, finer in (("sample", n), ("batch", 1), ("batch", n)):
        center = small(finer, c)
        centered = x.double() - center.view(finer, c, *[1] * (x.ndim - 2))
        zero = torch.zeros(1, 1)
        for got, terms in zip(gpu.reduce(dy, x, center, per), (dy.double(), dy.double() * centered), strict=True):
            values = x.numel() / got.numel()
            want, size = (exactly(t, per)[0] * values for t in (terms, terms.abs()))
            assert ((got - want).abs() <= SMALL[dtype] * size).all()
    tensors = [small(n, c), small(1, c), small(n, 1), zero]
    y = gpu.affine(x, *tensors[:3])
    assert y.dtype == dtype
    assert y.stride() == x.stride()
    wide = [t.view(*t.shape, *[1] * (x.ndim - 2)) for t in tensors]
    assert_close(y, (x.double() - wide[0]) * wide[1] + wide[2])
    assert_close(gpu.backward(dy, x, *tensors), wide[1] * dy.double() + wide[2] * (x.double() - wide[0]) + wide[3], label="dx")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5, 4, 3), (2, 64, 8, 9)], ids=str)
def test_tiles_of_the_size_that_runs(shape: tuple[int, ...], layout: str) -> None:
    x, dy = data(shape, torch.float32, layout), data(shape, torch.float32, layout, mean=0.3)
    for per in ("sample", "batch"):
        mean, var = gpu.moments(x, per)
        assert_moments_close((mean, var), exactly(x, per), torch.float32)
        assert_close(gpu.affine(x, mean, (var + 1).rsqrt(), mean), loops.affine(x, mean, (var + 1).rsqrt(), mean))
        assert_close(gpu.backward(dy, x, mean, var, mean, var), loops.backward(dy, x, mean, var, mean, var))


def test_small_tensors_of_any_float_type_and_stride_are_taken() -> None:
    x = torch.randn(3, 4, 5)
    center, scale, shift = torch.randn(4, 3).T, torch.randn(1, 4, dtype=torch.bfloat16), torch.randn(1, 8, dtype=torch.float64)[:, ::2]
    assert_close(gpu.affine(x, center, scale, shift), loops.affine(x, center, scale, shift))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", TORTURE)
def test_channel_kernels_are_exact_on_extreme_values(case: str, layout: str) -> None:
    ratio, std, eps, dtype = TORTURE[case]
    x = data((2, 3, 20, 15), dtype, layout, mean=ratio * std, std=std)
    dy = data((2, 3, 20, 15), dtype, layout, mean=0, std=min(1, (std**2 + eps) ** 0.5))  # so that dx can be represented
    exact = x.double().requires_grad_()
    mean, var = exact.mean((0, 2, 3), keepdim=True), exact.var((0, 2, 3), correction=0, keepdim=True)
    want = (exact - mean) / (var + eps).sqrt()
    (want_dx,) = torch.autograd.grad(want, exact, dy.double())

    mean, var = gpu.moments(x, "batch")
    rstd = (var + eps).rsqrt()
    assert relative_error(gpu.affine(x, mean, rstd, torch.zeros(1, 1)), want, over=(0, 2, 3)).max() <= OUTPUT[dtype]
    sum_dy, sum_dy_x = gpu.reduce(dy, x, mean, "batch")
    count = x.numel() / 3
    dx = gpu.backward(dy, x, mean, rstd, -(rstd**3) * sum_dy_x / count, -rstd * sum_dy / count)
    assert relative_error(dx, want_dx, over=(0, 2, 3)).max() <= GRADIENT[dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_constant_has_exactly_no_variance(layout: str) -> None:
    values = torch.cat([torch.tensor([3.3, -1e-40, 1e38]), torch.rand(13) + 1])  # of means in float32, some are off by a digit
    x = lay(values.view(1, 16, 1, 1).expand(2, 16, 11, 29), layout)
    for per in ("sample", "batch"):
        mean, var = gpu.moments(x, per)
        assert (var == 0).all()
        assert (mean == values.double()).all()
        assert (gpu.affine(x, mean, (var + 1e-30).rsqrt(), torch.zeros(1, 1)) == 0).all()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # numpy's opinion on the largest of several NaN
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_one_bad_value_stays_in_its_channel(value: float, layout: str) -> None:
    x, dy = data((3, 5, 9, 11), torch.float32, layout), data((3, 5, 9, 11), torch.float32, layout)
    x[1, 2, 3, 4] = value
    for per in ("sample", "batch"):
        hit = torch.zeros(3 if per == "sample" else 1, 5, dtype=torch.bool)
        hit[1 if per == "sample" else 0, 2] = True
        mean, var = gpu.moments(x, per)
        assert (var.isfinite() == ~hit).all()
        assert (mean.isfinite() == ~hit).all()
        assert (gpu.reduce(dy, x, mean, per)[1].isfinite() == ~hit).all()
        y = gpu.affine(x, mean, (var + 1e-5).rsqrt(), torch.zeros(1, 1))
        assert (y.isnan().all(-1).all(-1) == hit.expand(3, 5)).all()
        assert (y.isfinite().all(-1).all(-1) == ~hit.expand(3, 5)).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_shift_that_cancels_the_product_costs_no_digits(layout: str) -> None:
    x = data((2, 5, 20, 15), torch.float32, layout, mean=1e4, std=1.0)
    center, scale, shift = torch.zeros(1, 5), small(1, 5), torch.full((1, 5), -1e4, dtype=torch.float64)
    shift[0, 2] = 0.5  # a channel that float32 serves, in the same tile
    assert_close(gpu.affine(x, center, scale, shift * scale), loops.affine(x, center, scale, shift * scale))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 2, 9, 19), (4, 17, 3, 3), (4, 3, 7, 1)], ids=str)
def test_a_sample_has_the_same_bits_in_any_batch(shape: tuple[int, ...], layout: str) -> None:
    def everything(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        mean, var = gpu.moments(x, "sample")
        results = gpu.affine(x, mean, (var + 1).rsqrt(), mean), gpu.backward(dy, x, mean, var, mean, var)
        return mean, var, *gpu.reduce(dy, x, mean, "sample"), *results

    x, dy = data(shape, torch.float32, layout), data(shape, torch.float32, layout)
    x[0] *= 1e30  # what forces another arithmetic on one sample must not change its neighbours
    whole = everything(x, dy)
    for first, last in [(0, 1), (1, 3)]:
        for got, want in zip(everything(lay(x[first:last], layout), lay(dy[first:last], layout)), whole, strict=True):
            assert torch.equal(got, want[first:last])


@triton.jit
def _placed(out: Any, first: Any, rows: Any, c: Any, s: Any, pitch: Any, parts: Any, fold: Any, blocks: Any, COLUMNS: tl.constexpr) -> None:
    place = triton_channel.place
    offset, mask, *_ = place(tl.program_id(0) + first, rows, c, s, pitch, parts, 16, fold, blocks, COLUMNS, 16, 16)
    tl.store(out + tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :], tl.where(mask, offset, -1))


@pytest.mark.parametrize("columns", [True, False])
def test_offsets_beyond_32_bits(columns: bool) -> None:
    out = torch.empty(16, 16, dtype=torch.int64)
    if columns:  # the last tile of 3 samples of 2^27 positions and 16 channels
        positions, parts = 2**27, 2**23
        _placed[(1,)](out, 3 * parts - 1, 48, 16, positions, positions * 16, parts, 1, 1, COLUMNS=True)
        want = 3 * positions * 16 - 256 + torch.arange(256).view(16, 16)
    else:  # the last run of 2^28 + 1 runs of 16
        rows = 2**28 + 1
        _placed[(1,)](out, (rows - 1) // 16, rows, 1, 16, 16, 1, 1, 1, COLUMNS=False)
        want = torch.full((16, 16), -1)
        want[0] = (rows - 1) * 16 + torch.arange(16)
    assert torch.equal(out, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_running_estimates_move_where_they_stay_finite(dtype: torch.dtype) -> None:
    mean, var = torch.randn(300, dtype=torch.float64), torch.rand(300, dtype=torch.float64)
    mean[1], var[2], var[3] = torch.nan, torch.inf, 1e300
    running_mean, running_var = torch.randn(300, dtype=dtype), torch.rand(300, dtype=dtype)
    before = running_mean.to(torch.float64, copy=True), running_var.to(torch.float64, copy=True)
    gpu.running_update(running_mean, running_var, mean, var, 0.3, 1.25)
    moves = torch.ones(300, dtype=torch.bool)
    moves[1:4] = torch.tensor([False, False, dtype == torch.float64])
    for got, was, batch in ((running_mean, before[0], mean), (running_var, before[1], var * 1.25)):
        assert torch.equal(got[~moves].double(), was[~moves])
        assert_close(got[moves], (was + 0.3 * (batch - was))[moves])


def arguments(layout: str) -> dict[str, tuple[Any, ...]]:
    """Of each operator of the channel geometry."""
    x, dy = data((2, 5, 3, 4), torch.float32, layout), data((2, 5, 3, 4), torch.float32, layout)
    return {
        "triton_moments": (x, True),
        "triton_reduce": (dy, x, small(1, 5), False),
        "triton_affine": (x, small(2, 5), small(1, 5), small(1, 1)),
        "triton_backward": (dy, x, small(1, 5), small(1, 5), small(2, 5), small(1, 5)),
        "triton_running_update": (torch.randn(5), torch.rand(5), small(1, 5), small(1, 5).abs(), 0.1, 1.5),
    }


@pytest.mark.parametrize(("layout", "name"), list(product(LAYOUTS, arguments("ncs"))))
def test_the_operators_are_registered_as_torch_wants_them(layout: str, name: str) -> None:
    torch.library.opcheck(
        getattr(torch.ops.equinorm, name).default,
        arguments(layout)[name],
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_a_compiled_graph_holds_the_operators() -> None:
    def standardized(x: Tensor) -> Tensor:
        mean, var = torch.ops.equinorm.triton_moments(x, False)
        return torch.ops.equinorm.triton_affine(x, mean, (var + 1e-5).rsqrt(), mean * 0)

    x = torch.randn(4, 3, 5)
    compiled = torch.compile(standardized, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), standardized(x).double())
    mean, var, _ = reference.moments(x.double(), (0, 2))
    assert_close(compiled(x), (x.double() - mean) * (var + 1e-5).rsqrt())
