"""The row kernels against loops in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from equinorm.kernels import gpu
from tests.helpers import assert_close, assert_grads_close
from tests.kernels.test_cpu import GRADIENT, OUTPUT, TORTURE, data, expect_rows
from tests.tolerances import relative_error

DTYPES = list(gpu.DTYPES)
# rows, groups, k, s, measured. In one program forward and backward; in one forward only; shared out to several.
ROWS = [
    (1, 1, 1, 1, 1),
    (5, 1, 37, 1, 37),
    (5, 1, 37, 1, 11),
    (150, 1, 64, 1, 64),
    (3, 1, 127, 1, 127),
    (3, 1, 257, 1, 257),
    (5, 1, 300, 1, 131),
    (4, 2, 129, 1, 129),
    (6, 2, 3, 7, 21),
    (6, 2, 3, 7, 10),
    (4, 2, 2, 16, 32),
    (2, 1, 3, 33, 99),
    (4, 2, 3, 67, 201),
    (15, 5, 1, 9, 9),
    (99, 3, 4, 1, 4),
]
CASES = [(sizes, dtype) for dtype in DTYPES for sizes in (ROWS if dtype == torch.float32 else ROWS[2:14:4])]


def run_rows(x: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor, eps: float, **shape: Any) -> dict[str, Tensor | None]:
    y, center, rstd = gpu.row_forward(x, weight, bias, eps=eps, **shape)
    dx, dweight, dbias = gpu.row_backward(dy, x, weight, center, rstd, wanted=(True, weight is not None, bias is not None), **shape)
    return {"y": y, "x": dx, "weight": dweight, "bias": dbias}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("centered", "parameters"), [(True, "both"), (False, "weight"), (True, "bias"), (False, "none")])
@pytest.mark.parametrize(("sizes", "dtype"), CASES, ids=str)
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
            assert got[name].dtype == torch.float64
            # Of the result, not of what was summed: terms of either sign cancel, by a digit or more in these few rows.
            assert relative_error(got[name], want[name]) <= (1e-11 if dtype == torch.float64 else 4e-6)
    assert_grads_close({"x": got["x"]}, {"x": want["x"]})


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("sizes", [(2, 1, 1030, 1, 1030), (4, 2, 3, 100, 300), (40, 1, 64, 1, 64)], ids=str)
def test_tiles_of_the_size_that_runs(sizes: tuple[int, ...], centered: bool) -> None:
    rows, groups, k, s, measured = sizes
    shape = {"rows": rows, "groups": groups, "k": k, "s": s, "measured": measured, "centered": centered}
    x, dy = data((rows, k * s), torch.float32, "ncs"), data((rows, k * s), torch.float32, "ncs")
    weight, bias = torch.rand(2, groups * k) + 0.5
    got, want = (run(x, weight, bias, dy, 1e-5, **shape) for run in (run_rows, expect_rows))
    assert_close(got["y"], want["y"])
    assert_grads_close({"x": got["x"]}, {"x": want["x"]})


def test_parameters_may_have_another_type_and_stride() -> None:
    x, dy, shape = torch.randn(4, 6), torch.randn(4, 6), {"rows": 4, "groups": 1, "k": 6, "s": 1, "measured": 6, "centered": True}
    weight, bias = torch.randn(12, dtype=torch.float64)[::2], torch.randn(6, dtype=torch.float16)
    got, want = (run(x, weight, bias, dy, 1e-5, **shape) for run in (run_rows, expect_rows))
    assert_close(got["y"], want["y"])


def torture(case: str, sizes: tuple[int, ...], centered: bool) -> None:
    ratio, std, eps, dtype = TORTURE[case]
    rows, groups, k, s, measured = sizes
    shape = {"rows": rows, "groups": groups, "k": k, "s": s, "measured": measured, "centered": centered}
    x = data((rows, k * s), dtype, "ncs", mean=ratio * std, std=std)
    dy = data((rows, k * s), dtype, "ncs", mean=0, std=min(1, (std**2 + eps) ** 0.5))  # so that dx can be represented
    weight, bias = torch.rand(2, groups * k) + 0.5
    got, want = (run(x, weight, bias, dy, eps, **shape) for run in (run_rows, expect_rows))
    assert relative_error(got["y"], want["y"], over=(1,)).max() <= OUTPUT[dtype]
    assert relative_error(got["x"], want["x"], over=(1,)).max() <= GRADIENT[dtype]


@pytest.mark.parametrize(
    ("sizes", "centered"),
    [((4, 1, 300, 1, 300), True), ((4, 2, 3, 100, 300), True), ((4, 1, 300, 1, 300), False), ((4, 1, 300, 1, 77), False)],
    ids=str,
)
@pytest.mark.parametrize("case", TORTURE)
def test_rows_in_one_program_are_exact_on_extreme_values(case: str, sizes: tuple[int, ...], centered: bool) -> None:
    torture(case, sizes, centered)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("sizes", [(4, 1, 300, 1, 300), (4, 2, 3, 100, 300)], ids=str)
@pytest.mark.parametrize("case", TORTURE)
def test_rows_that_are_shared_out_are_exact_on_extreme_values(case: str, sizes: tuple[int, ...]) -> None:
    torture(case, sizes, centered=True)


@pytest.mark.parametrize("tiles", ["small", "usual"])
def test_small_values_beside_a_large_eps(tiles: str, request: pytest.FixtureRequest) -> None:
    if tiles == "small":
        request.getfixturevalue("small_tiles")
    shape = {"rows": 2, "groups": 1, "k": 300, "s": 1, "measured": 300, "centered": True}
    x, dy = torch.randn(2, 300) * 1e-17, torch.randn(2, 300)
    got, want = (run(x, None, None, dy, 1e-5, **shape) for run in (run_rows, expect_rows))
    assert relative_error(got["y"], want["y"]) <= OUTPUT[torch.float32]
    assert relative_error(got["x"], want["x"]) <= GRADIENT[torch.float32]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("value", [3.3, -1e-40, 1e20, 1e38])
@pytest.mark.parametrize("length", [50, 100, 300])
def test_a_constant_row_is_exactly_its_mean(value: float, length: int) -> None:
    shape = {"rows": 3, "groups": 1, "k": length, "s": 1, "measured": length, "centered": True}
    result = run_rows(torch.full((3, length), value), None, None, torch.randn(3, length), 1e-40, **shape)
    assert (result["y"] == 0).all()
    assert result["x"].isfinite().all()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("sizes", [(6, 1, 50, 1, 50), (6, 1, 300, 1, 300), (6, 2, 3, 67, 201)], ids=str)
def test_one_bad_value_stays_in_its_row(sizes: tuple[int, ...], value: float) -> None:
    rows, groups, k, s, measured = sizes
    x, dy = data((rows, k * s), torch.float32, "ncs"), data((rows, k * s), torch.float32, "ncs")
    x[4, 7] = value
    result = run_rows(x, None, None, dy, 1e-5, rows=rows, groups=groups, k=k, s=s, measured=measured, centered=True)
    for part in ("y", "x"):
        assert result[part].isfinite().all(1).logical_not().nonzero().tolist() == [[4]]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("sizes", [(8, 1, 37, 1, 37), (4, 1, 300, 1, 300), (4, 2, 3, 67, 201), (8, 2, 3, 7, 21)], ids=str)
def test_a_row_has_the_same_bits_in_any_batch(sizes: tuple[int, ...]) -> None:
    rows, groups, k, s, measured = sizes
    shape = {"rows": rows, "groups": groups, "k": k, "s": s, "measured": measured, "centered": True}
    x, dy = data((rows, k * s), torch.float32, "ncs"), data((rows, k * s), torch.float32, "ncs")
    x[0] *= 1e30
    weight, bias = torch.randn(2, groups * k)
    whole = run_rows(x, weight, bias, dy, 1e-5, **shape)
    for first, last in [(0, groups), (groups, rows)]:
        part = run_rows(x[first:last], weight, bias, dy[first:last], 1e-5, **(shape | {"rows": last - first}))
        assert torch.equal(part["y"], whole["y"][first:last])
        assert torch.equal(part["x"], whole["x"][first:last])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("sizes", [(4, 1, 37, 1, 37), (4, 1, 300, 1, 300), (4, 2, 3, 67, 201)], ids=str)
def test_the_operators_are_registered_as_torch_wants_them(sizes: tuple[int, ...]) -> None:
    rows, groups, k, s, measured = sizes
    x, dy, weight = torch.randn(rows, k * s), torch.randn(rows, k * s), torch.randn(groups * k)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    forward, backward = torch.ops.equinorm.triton_row_forward.default, torch.ops.equinorm.triton_row_backward.default
    torch.library.opcheck(forward, (x, weight, None, rows, groups, k, s, measured, 1e-5, True), test_utils=tests)
    _, center, rstd = forward(x, weight, None, rows, groups, k, s, measured, 1e-5, True)
    for wanted in (True, False):
        torch.library.opcheck(backward, (dy, x, weight, center, rstd, wanted, rows, groups, k, s, measured, True), test_utils=tests)
