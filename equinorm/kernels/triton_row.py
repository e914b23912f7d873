"""The row geometry in Triton: the statistic of a row and what it is applied to, with the row in registers.

A program holds one row, or several short ones: forward reads and writes each element once, backward reads x and dy and writes dx once. What
a row's program does never depends on the other rows. Rows that do not fit are shared out to many programs in several passes, so that a few
long ones fill the chip: layer norm by the kernels below whose names begin with "wide", groups of long channels by the channel geometry.

All of it is in float32 (float64 for float64 data). A row is scaled by a power of two, which is exact, chosen so that neither its squares
nor ``eps`` leave float32's range; then it is centred twice. Backward reads what forward found as two pairs of numbers per row: the centre
with its rounding error, and the reciprocal standard deviation with the power of two, all in the scaled units.

Gradients of parameters are summed over the rows of a program, written, and summed over programs by a second kernel in a fixed order.
"""

# Kernels look like Python and are another language: its tensors have other operations than their class declares.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportReturnType=false

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from equinorm.kernels.triton_channel import (
    LAUNCH,
    TILE_BYTES,
    add,
    bits,
    double,
    dtype,
    fake,
    jit,
    operator,
    power,
    ratio,
    run_moments,
    warps,
)

FORWARD_BYTES = 65536  # the most of a row, in the arithmetic's type, that one program holds: 32 float32 in each of 512 threads
BACKWARD_BYTES = 32768  # the same of x; as much of dy comes with it, of its weight, and of the sums of two gradients
STAGES = 3  # of a pipeline: where backward loops over rows it reads two tiles ahead, into shared memory
PROGRAMS = 264  # that loop over rows: two for each of an H200's 132 multiprocessors, up to four times as many where tiles are small
LEAST = 2.0**-126  # variance of a constant beside which eps vanishes: 0 times infinity is no number
LONGEST_CHAIN = 64  # tiles whose gradients one program adds up in float32


class Plan(NamedTuple):
    """A tile of ``a`` rows of ``k`` channels of ``s`` positions, each a power of two."""

    a: int
    k: int
    s: int
    warps: int


@cache
def plan(k: int, s: int, each: int) -> Plan:
    """The tile for rows of k * s elements, with about ``each`` of them in a thread."""
    wide, long = triton.next_power_of_2(k), triton.next_power_of_2(s)
    a = max(1024 // (wide * long), 1)
    return Plan(a, wide, long, warps(a * wide * long, each))


# ---- rows in registers --------------------------------------------------------------------------------------------------------


@jit
def _row(r: tl.tensor, rows: tl.tensor, length: tl.tensor, k: tl.tensor, s: tl.tensor, K: tl.constexpr, S: tl.constexpr) -> tl.tensor:
    """Offsets and mask of a tile of rows (A, K, S), and each element's place within its row (1, K, S)."""
    j = tl.arange(0, K)[:, None]
    p = tl.arange(0, S)[None, :]
    inside = (j * s + p)[None, :, :]
    mask = (r < rows)[:, None, None] & ((j < k) & (p < s))[None, :, :]
    return r[:, None, None] * length + inside, mask, inside


@jit
def _parameter(
    pointer: tl.tensor, r: tl.tensor, groups: tl.tensor, k: tl.tensor, K: tl.constexpr, GROUPED: tl.constexpr, ACC: tl.constexpr
) -> tl.tensor:
    """One parameter per channel, (A | 1, K, 1)."""
    j = tl.arange(0, K)
    if GROUPED:
        at = (r % groups)[:, None] * k + j[None, :]
        return tl.load(pointer + at, mask=(j < k)[None, :], other=0.0).to(ACC)[:, :, None]
    else:
        return tl.load(pointer + j, mask=j < k, other=0.0).to(ACC)[None, :, None]


@jit
def _total(value: tl.tensor) -> tl.tensor:
    """Sums of the rows of a tile, (A,)."""
    return tl.sum(tl.sum(value, 2), 1)


@jit
def _inverse_root(value: tl.tensor, ACC: tl.constexpr) -> tl.tensor:
    if tl.float64 == ACC:
        return 1.0 / tl.sqrt(value)
    else:
        return tl.math.div_rn(1.0, tl.math.sqrt_rn(value))


@jit(do_not_specialize=["rows", "measured", "eps"])
def _row_forward(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    center: tl.tensor,
    rstd: tl.tensor,
    rows: tl.tensor,
    groups: tl.tensor,
    k: tl.tensor,
    s: tl.tensor,
    length: tl.tensor,
    measured: tl.tensor,
    eps: tl.tensor,
    root: tl.tensor,
    least: tl.tensor,
    CENTERED: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    GROUPED: tl.constexpr,
    ACC: tl.constexpr,
    A: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
) -> None:
    r = tl.program_id(0).to(tl.int64) * A + tl.arange(0, A)
    offset, mask, inside = _row(r, rows, length, k, s, K, S)
    values = tl.load(x + offset, mask=mask, other=0.0).to(ACC)
    known = mask & (inside < measured)
    largest = tl.max(tl.max(tl.abs(tl.where(known, values, 0.0)), 2), 1)
    scale = power(tl.maximum(largest, tl.cast(root, ACC)))
    values *= scale[:, None, None]
    n = tl.cast(measured, ACC)
    if CENTERED:
        mean = _total(tl.where(known, values, 0.0)) / n
        values = tl.where(mask, values - mean[:, None, None], 0.0)
        centred = tl.where(known, values, 0.0)
        total = _total(centred)
        rest = ratio(total, n, ACC)  # what rounding left of the mean
        squares = _total(centred * centred) - total * rest
        squares = tl.where(squares < 0, 0.0, squares)
    else:
        mean = tl.zeros([A], ACC)
        rest = tl.zeros([A], ACC)
        centred = tl.where(known, values, 0.0)
        squares = _total(centred * centred)
    wide = scale.to(tl.float64)
    var = squares / n + (double(eps) * wide * wide).to(ACC)
    var = tl.where(var == 0, tl.cast(least, ACC), var)
    inverse = _inverse_root(var, ACC)
    result = (values - rest[:, None, None]) * inverse[:, None, None]
    if WEIGHT:
        result *= _parameter(weight, r, groups, k, K, GROUPED, ACC)
    if BIAS:
        result += _parameter(bias, r, groups, k, K, GROUPED, ACC)
    tl.store(y + offset, result.to(y.dtype.element_ty), mask=mask)
    valid = r < rows
    tl.store(center + 2 * r, mean, mask=valid)
    tl.store(center + 2 * r + 1, rest, mask=valid)
    tl.store(rstd + 2 * r, inverse, mask=valid)
    tl.store(rstd + 2 * r + 1, scale, mask=valid)


@jit(do_not_specialize=["rows", "measured", "steps"])
def _row_backward(
    dy: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    center: tl.tensor,
    rstd: tl.tensor,
    dx: tl.tensor,
    dweight: tl.tensor,
    dbias: tl.tensor,
    rows: tl.tensor,
    groups: tl.tensor,
    k: tl.tensor,
    s: tl.tensor,
    length: tl.tensor,
    measured: tl.tensor,
    steps: tl.tensor,
    CENTERED: tl.constexpr,
    WEIGHT: tl.constexpr,
    WANTED: tl.constexpr,
    GROUPED: tl.constexpr,
    ACC: tl.constexpr,
    A: tl.constexpr,
    STAGES: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
) -> None:
    """``dx = rstd * (g - (sum(g) + h * sum(g h)) / measured)`` with ``h = (x - mean) * rstd`` and ``g = weight * dy``.

    The part in brackets flows through the statistic: it reaches the measured elements only, and without a mean has no sum(g).
    """
    pid = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, K)
    sum_weight = tl.zeros([A, K], ACC)
    sum_bias = tl.zeros([A, K], ACC)
    shared = tl.full([1, 1, 1], 1.0, ACC)
    if WEIGHT and not GROUPED:
        shared = _parameter(weight, j, groups, k, K, GROUPED, ACC)
    for step in tl.range(0, steps, num_stages=STAGES):
        r = (pid * steps + step) * A + tl.arange(0, A)
        offset, mask, inside = _row(r, rows, length, k, s, K, S)
        valid = r < rows
        mean = tl.load(center + 2 * r, mask=valid, other=0.0)[:, None, None]
        rest = tl.load(center + 2 * r + 1, mask=valid, other=0.0)[:, None, None]
        inverse = tl.load(rstd + 2 * r, mask=valid, other=0.0)[:, None, None]
        scale = tl.load(rstd + 2 * r + 1, mask=valid, other=0.0)[:, None, None]
        d = tl.load(dy + offset, mask=mask, other=0.0).to(ACC)
        values = tl.load(x + offset, mask=mask, other=0.0).to(ACC)
        h = tl.where(mask, ((values * scale - mean) - rest) * inverse, 0.0)
        g = d * scale  # where 1 / std is large the gradient is small, or dx could not be represented
        if WEIGHT and GROUPED:
            g *= _parameter(weight, r, groups, k, K, GROUPED, ACC)
        else:
            g *= shared
        n = tl.cast(measured, ACC)
        flow = h * (_total(g * h) / n)[:, None, None]
        if CENTERED:
            flow += (_total(g) / n)[:, None, None]
        result = inverse * (g - tl.where(inside < measured, flow, 0.0))
        tl.store(dx + offset, result.to(dx.dtype.element_ty), mask=mask)
        if WANTED:
            to_weight = tl.sum(d * h, 2)
            to_bias = tl.sum(d, 2)
            if GROUPED:
                at = r[:, None] * k + j[None, :]
                writes = valid[:, None] & (j < k)[None, :]
                tl.store(dweight + at, to_weight, mask=writes)
                tl.store(dbias + at, to_bias, mask=writes)
            else:
                sum_weight += to_weight
                sum_bias += to_bias
    if WANTED and not GROUPED:
        tl.store(dweight + pid * k + j, tl.sum(sum_weight, 0), mask=j < k)
        tl.store(dbias + pid * k + j, tl.sum(sum_bias, 0), mask=j < k)


# ---- rows that are shared out: one parameter per element (s = 1) -----------------------------------------------------------------


@jit
def _wide_forward(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    center: tl.tensor,
    rstd: tl.tensor,
    groups: tl.tensor,
    k: tl.tensor,
    parts: tl.tensor,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ACC: tl.constexpr,
    B: tl.constexpr,
) -> None:
    """One part of one row. Tiles are taken from the last one on; see the channel geometry."""
    pid = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    r = pid // parts
    j = pid % parts * B + tl.arange(0, B)
    mask = j < k
    values = tl.load(x + r * k + j, mask=mask, other=0.0).to(ACC)
    scale = tl.load(rstd + 2 * r + 1)
    result = ((values * scale - tl.load(center + 2 * r)) - tl.load(center + 2 * r + 1)) * tl.load(rstd + 2 * r)
    at = r % groups * k + j
    if WEIGHT:
        result *= tl.load(weight + at, mask=mask, other=0.0).to(ACC)
    if BIAS:
        result += tl.load(bias + at, mask=mask, other=0.0).to(ACC)
    tl.store(y + r * k + j, result.to(y.dtype.element_ty), mask=mask)


@jit
def _wide_sums(
    dy: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    center: tl.tensor,
    rstd: tl.tensor,
    sum_g: tl.tensor,
    sum_gh: tl.tensor,
    groups: tl.tensor,
    k: tl.tensor,
    parts: tl.tensor,
    WEIGHT: tl.constexpr,
    ACC: tl.constexpr,
    B: tl.constexpr,
) -> None:
    """Sums of g and of g h over one part of one row, in the units of ``_row_backward``."""
    pid = tl.program_id(0).to(tl.int64)
    r = pid // parts
    j = pid % parts * B + tl.arange(0, B)
    mask = j < k
    values = tl.load(x + r * k + j, mask=mask, other=0.0).to(ACC)
    scale = tl.load(rstd + 2 * r + 1)
    h = ((values * scale - tl.load(center + 2 * r)) - tl.load(center + 2 * r + 1)) * tl.load(rstd + 2 * r)
    g = tl.load(dy + r * k + j, mask=mask, other=0.0).to(ACC) * scale
    if WEIGHT:
        g *= tl.load(weight + r % groups * k + j, mask=mask, other=0.0).to(ACC)
    tl.store(sum_g + pid, tl.sum(g, 0))
    tl.store(sum_gh + pid, tl.sum(tl.where(mask, g * h, 0.0), 0))


@jit(do_not_specialize=["samples", "measured", "steps"])
def _wide_backward(
    dy: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    center: tl.tensor,
    rstd: tl.tensor,
    sums_g: tl.tensor,
    sums_gh: tl.tensor,
    dx: tl.tensor,
    dweight: tl.tensor,
    dbias: tl.tensor,
    samples: tl.tensor,
    groups: tl.tensor,
    k: tl.tensor,
    measured: tl.tensor,
    parts: tl.tensor,
    steps: tl.tensor,
    CENTERED: tl.constexpr,
    WEIGHT: tl.constexpr,
    WANTED: tl.constexpr,
    ACC: tl.constexpr,
    STAGES: tl.constexpr,
    B: tl.constexpr,
) -> None:
    """Dx in the same part of ``steps`` samples' rows of one group, and the sums of its parameters' gradients."""
    pid = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    j = pid % parts * B + tl.arange(0, B)
    group = pid // parts % groups
    block = pid // parts // groups
    mask = j < k
    w = tl.zeros([B], ACC) + 1.0
    if WEIGHT:
        w = tl.load(weight + group * k + j, mask=mask, other=0.0).to(ACC)
    sum_weight = tl.zeros([B], ACC)
    sum_bias = tl.zeros([B], ACC)
    for step in tl.range(0, steps, num_stages=STAGES):
        sample = block * steps + step
        r = sample * groups + group
        here = sample < samples
        read = j < tl.where(here, k, 0)
        scale = tl.load(rstd + 2 * r + 1, mask=here, other=0.0)
        inverse = tl.load(rstd + 2 * r, mask=here, other=0.0)
        mean = tl.load(center + 2 * r, mask=here, other=0.0)
        rest = tl.load(center + 2 * r + 1, mask=here, other=0.0)
        values = tl.load(x + r * k + j, mask=read, other=0.0).to(ACC)
        d = tl.load(dy + r * k + j, mask=read, other=0.0).to(ACC)
        h = ((values * scale - mean) - rest) * inverse
        flow = h * (tl.load(sums_gh + r, mask=here, other=0.0) / measured).to(ACC)
        if CENTERED:
            flow += (tl.load(sums_g + r, mask=here, other=0.0) / measured).to(ACC)
        result = inverse * (d * scale * w - tl.where(j < measured, flow, 0.0))
        tl.store(dx + r * k + j, result.to(dx.dtype.element_ty), mask=read)
        sum_weight += d * h
        sum_bias += d
    if WANTED:
        at = (block * groups + group) * k + j
        tl.store(dweight + at, sum_weight, mask=mask)
        tl.store(dbias + at, sum_bias, mask=mask)


# ---- operators ----------------------------------------------------------------------------------------------------------------


def _arithmetic(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _nothing(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.float64, device=x.device)


def _fits(x: Tensor, k: int, s: int, limit: int) -> bool:
    return triton.next_power_of_2(k) * triton.next_power_of_2(s) * _arithmetic(x).itemsize <= limit


def _pairs(x: Tensor, mean: Tensor, var: Tensor, eps: float, centered: bool) -> tuple[Tensor, Tensor]:
    """Moments in float64 as the pairs that the kernels read: (rows, 2) each."""
    if not centered:
        mean, var = torch.zeros_like(mean), var + mean.square()
    rstd = (var + eps).rsqrt()
    scale = torch.where((rstd < 2.0**-50) | (mean.abs() > 2.0**50), 2.0**-80, torch.where(rstd > 2.0**50, 2.0**100, 1.0)).double()
    mean, rstd = mean * scale, rstd / scale
    rstd = rstd.clamp(max=LEAST**-0.5) if eps > 0 else rstd
    kind = _arithmetic(x)
    held = mean.to(kind)
    rest = (mean - held).to(kind)
    return torch.stack((held, rest), -1), torch.stack((rstd.to(kind), scale.to(kind)), -1)


def _moments_of(center: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the reciprocal standard deviation of each row, from the pairs."""
    scale = rstd[:, 1].double()
    return center.double().sum(1) / scale, rstd[:, 0].double() * scale


@operator(
    "triton_row_forward(Tensor x, Tensor? weight, Tensor? bias, int rows, int groups, int k, int s, int measured, float eps,"
    " bool centered) -> (Tensor, Tensor, Tensor)"
)
def _row_forward_op(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: int,
    groups: int,
    k: int,
    s: int,
    measured: int,
    eps: float,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = (t if t is None else t.contiguous() for t in (weight, bias))
    present = {"WEIGHT": weight is not None, "BIAS": bias is not None, "ACC": dtype(x)}
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        if _fits(x, k, s, FORWARD_BYTES):
            center, rstd = (torch.empty(rows, 2, dtype=_arithmetic(x), device=x.device) for _ in range(2))
            tile = plan(k, s, 32)
            _row_forward[(triton.cdiv(rows, tile.a),)](
                x,
                weight,
                bias,
                y,
                center,
                rstd,
                rows,
                groups,
                k,
                s,
                k * s,
                measured,
                bits(eps),
                eps**0.5,
                LEAST if eps > 0 else 0.0,
                CENTERED=centered,
                GROUPED=groups > 1,
                **present,
                A=tile.a,
                K=tile.k,
                S=tile.s,
                num_warps=tile.warps,
                **LAUNCH,
            )
            return y, center, rstd
        mean, var = run_moments(x, 1, rows, measured, False, True, k * s)  # (1, rows)
        center, rstd = _pairs(x, mean[0], var[0], eps, centered)
        if s == 1:
            tile = TILE_BYTES // 2 // x.element_size()
            parts = triton.cdiv(k, tile)
            sizes = (groups, k, parts)
            _wide_forward[(rows * parts,)](x, weight, bias, y, center, rstd, *sizes, **present, B=tile, num_warps=warps(tile, 16), **LAUNCH)
            return y, center, rstd
    mean, scale = (t.view(-1, groups).repeat_interleave(k, 1) for t in _moments_of(center, rstd))  # (N, C)
    shift = mean.new_zeros(1, 1) if bias is None else bias.double().unsqueeze(0)
    scale = scale if weight is None else scale * weight
    return torch.ops.equinorm.triton_affine(x.view(-1, groups * k, s), mean, scale, shift).view_as(x), center, rstd


@operator(
    "triton_row_backward(Tensor dy, Tensor x, Tensor? weight, Tensor center, Tensor rstd, bool wanted, int rows, int groups, int k, int s,"
    " int measured, bool centered) -> (Tensor, Tensor, Tensor)"
)
def _row_backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    center: Tensor,
    rstd: Tensor,
    wanted: bool,
    rows: int,
    groups: int,
    k: int,
    s: int,
    measured: int,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    weight = weight if weight is None else weight.contiguous()
    samples, parameters = rows // groups, groups * k if wanted else 0
    fits = _fits(x, k, s, BACKWARD_BYTES)
    if not fits and s > 1:
        return _long_backward(dy, x, weight, center, rstd, wanted, groups, k, s, centered)
    dx = torch.empty_like(x)
    tile = plan(k, s, 16)
    width = TILE_BYTES // 2 // x.element_size()
    parts = triton.cdiv(k, width)
    # What a program loops over: enough programs to fill the chip, few enough that partial gradients cost little, no chain too long.
    blocks, programs = samples, max(PROGRAMS // (groups * parts), 1)
    if fits:
        blocks, programs = triton.cdiv(rows, tile.a), PROGRAMS * min(max(8192 // (tile.a * tile.k * tile.s), 1), 4)
    steps = 1 if fits and groups > 1 else min(triton.cdiv(blocks, programs), LONGEST_CHAIN)
    count = samples if fits and groups > 1 else triton.cdiv(blocks, steps)
    partial = [torch.empty(1, count, parameters, dtype=_arithmetic(x), device=x.device) for _ in range(2)]
    options = {"CENTERED": centered, "WEIGHT": weight is not None, "WANTED": wanted, "ACC": dtype(x), **LAUNCH}
    with torch.cuda.device_of(x):
        if fits:
            _row_backward[(triton.cdiv(blocks, steps),)](
                dy,
                x,
                weight,
                center,
                rstd,
                dx,
                *partial,
                rows,
                groups,
                k,
                s,
                k * s,
                measured,
                steps,
                GROUPED=groups > 1,
                STAGES=STAGES if steps > 1 else 1,
                A=tile.a,
                K=tile.k,
                S=tile.s,
                num_warps=tile.warps,
                **options,
            )
        else:
            sums = [torch.empty(rows, parts, 1, dtype=_arithmetic(x), device=x.device) for _ in range(2)]
            read = {"WEIGHT": weight is not None, "ACC": dtype(x), "B": width, "num_warps": warps(width, 16), **LAUNCH}
            _wide_sums[(rows * parts,)](dy, x, weight, center, rstd, *sums, groups, k, parts, **read)
            _wide_backward[(count * groups * parts,)](
                dy,
                x,
                weight,
                center,
                rstd,
                *add(*sums),
                dx,
                *partial,
                samples,
                groups,
                k,
                measured,
                parts,
                steps,
                STAGES=STAGES if steps > 1 else 1,
                B=width,
                num_warps=warps(width, 16),
                **options,
            )
        if not wanted:
            return dx, _nothing(x), _nothing(x)
        dweight, dbias = add(*partial)
    return dx, dweight[0], dbias[0]


def _long_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    center: Tensor,
    rstd: Tensor,
    wanted: bool,
    groups: int,
    k: int,
    s: int,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of long channels, by the channel geometry: a reducing and a writing pass."""
    mean, scale = (t.view(-1, groups).repeat_interleave(k, 1) for t in _moments_of(center, rstd))  # (N, C)
    sum_dy, sum_dy_x = torch.ops.equinorm.triton_reduce(*(t.view(-1, groups * k, s) for t in (dy, x)), mean, True)
    sum_dy_h = sum_dy_x * scale
    w = scale.new_ones(1) if weight is None else weight.double()
    to_mean, slope = ((part * w).view(-1, groups, k).mean(2).div(s).repeat_interleave(k, 1) for part in (sum_dy, sum_dy_h))
    offset = -scale * to_mean if centered else scale.new_zeros(1, 1)
    small = (mean, scale * w, -scale.square() * slope, offset)
    dx = torch.ops.equinorm.triton_backward(*(t.view(-1, groups * k, s) for t in (dy, x)), *small).view_as(x)
    if not wanted:
        return dx, _nothing(x), _nothing(x)
    return dx, sum_dy_h.sum(0), sum_dy.sum(0)


@fake("triton_row_forward")
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: int,
    groups: int,
    k: int,
    s: int,
    measured: int,
    eps: float,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(rows, 2, dtype=_arithmetic(x)), x.new_empty(rows, 2, dtype=_arithmetic(x))


@fake("triton_row_backward")
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    center: Tensor,
    rstd: Tensor,
    wanted: bool,
    rows: int,
    groups: int,
    k: int,
    s: int,
    measured: int,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    parameters = groups * k if wanted else 0
    return torch.empty_like(x), x.new_empty(parameters, dtype=torch.float64), x.new_empty(parameters, dtype=torch.float64)
