"""The channel geometry in Triton: one statistic and one affine map per (sample, channel) or per channel.

Memory is cut into tiles that fit the registers of one program, so that everything a tile needs is read once: contiguous memory into tiles
of whole or partial runs of one channel, channels_last memory into tiles of neighbouring channels. A tile's moments are centred twice and
leave as float64; a second small kernel pools them, "variance of a union = mean of the variances + variance of the means". There are no
atomics: the bits of a result depend on the shape and the values only, and those of a sample on nothing but that sample.

Arithmetic on tiles is in float32 (float64 for float64 data). What float32 cannot hold is kept out of it: each run is first scaled by a
power of two, which is exact, so that squares neither overflow nor vanish; and what a centre loses when it is cut to float32 joins the
constant in float64. Only a map whose coefficients are extreme, or whose constant may cancel the product, is repeated in float64.
"""

# Kernels look like Python and are another language: its tensors have other operations than their class declares.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportReturnType=false

from __future__ import annotations

import struct
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from equinorm.kernels.cpu import small

jit: Any = triton.jit  # its own types know neither grids nor launch options
LAUNCH = {"enable_fp_fusion": True}  # a fused multiply-add rounds once; nothing here relies on rounding twice
TILE_BYTES = 32768  # of x, where nothing else is read: 32 elements in a thread leave room for their centred copies in registers
_LARGEST, _SMALLEST = tl.constexpr(2.0**100), tl.constexpr(2.0**-100)
_CANCELS = tl.constexpr(8.0)  # a larger constant may cancel digits of the product, which only float64 has to spare


class Plan(NamedTuple):
    """How memory is cut into tiles. It depends on the shape of a sample and the element size, never on the number of samples.

    Attributes:
        columns: whether the statistic runs down the columns of a tile (channels_last) or along its rows.
        a: rows of a tile.
        b: columns of a tile.
        parts: tiles behind one statistic.
        chunk: positions in each of them.
        fold: rows of channels that one row of a tile holds, where channels are few.
        blocks: tiles beside each other.
        warps: per program.
    """

    columns: bool
    a: int
    b: int
    parts: int
    chunk: int
    fold: int
    blocks: int
    warps: int


def warps(elements: int, each: int) -> int:
    """Warps for a tile of so many elements, ``each`` of them per thread."""
    return min(max(elements // (32 * each), 4), 16)


@cache
def plan(c: int, s: int, itemsize: int, columns: bool, each: int) -> Plan:
    """The tiles for runs of ``s`` contiguous positions, or for ``s`` rows of ``c`` channels, with ``each`` elements in a thread."""
    tile = TILE_BYTES // itemsize * each // 32
    if not columns:
        parts = -(-s // tile)
        chunk = s if parts == 1 else -(-s // (16 * parts)) * 16  # equal shares, aligned for loads of 16 bytes
        b = triton.next_power_of_2(chunk)
        a = max(tile // 4 // b, 1)
        return Plan(False, a, b, parts, chunk, 1, 1, warps(a * b, each))
    # Tile rows that begin at multiples of 16 elements, for loads of 16 bytes.
    fold = max(256 // c, 1) if c % 16 == 0 else 16 * max(16 // c, 1)
    if s < 8 * fold:
        fold = 1
    width, height = c * fold, -(-s // fold)
    b = min(triton.next_power_of_2(width), 128 // itemsize)  # one cache line
    a = min(tile // b, triton.next_power_of_2(height))
    b = min(triton.next_power_of_2(width), max(tile // 4 // a, b))
    return Plan(True, a, b, -(-height // a), a, fold, -(-width // b), warps(a * b, each))


# ---- kernels ------------------------------------------------------------------------------------------------------------------


@jit
def double(number: tl.tensor) -> tl.tensor:
    """A float64 from its bits: arguments of a kernel that are Python floats arrive as float32."""
    return tl.cast(tl.cast(number, tl.int64), tl.float64, bitcast=True)


@jit
def power(largest: tl.tensor) -> tl.tensor:
    """A power of two that brings values of this magnitude to where squares, and sums of them, are far from both ends of float32."""
    return tl.where(largest > 2.0**50, 2.0**-80, tl.where(largest < 2.0**-50, 2.0**100, 1.0)).to(largest.dtype)


@jit
def ratio(a: tl.tensor, b: tl.tensor, ACC: tl.constexpr) -> tl.tensor:
    """Rounded to nearest, as the chip's usual division is not: a constant then has exactly no variance."""
    if tl.float64 == ACC:
        return a / b
    else:
        return tl.math.div_rn(a, b)


@jit
def across(value: tl.tensor, COLUMNS: tl.constexpr) -> tl.tensor:
    """One value per statistic, to be broadcast over the tile."""
    if COLUMNS:
        return value[None, :]
    else:
        return value[:, None]


@jit
def place(
    pid: tl.tensor,
    rows: tl.tensor,
    c: tl.tensor,
    s: tl.tensor,
    pitch: tl.tensor,
    parts: tl.tensor,
    chunk: tl.tensor,
    fold: tl.tensor,
    blocks: tl.tensor,
    COLUMNS: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
) -> tl.tensor:
    """Where a tile lies: offsets, mask (A, B); per statistic its sample, channel, number of values, place in the result, presence."""
    pid = pid.to(tl.int64)
    if COLUMNS:
        width = tl.cast(c * fold, tl.int64)
        part = pid // blocks % parts
        sample = pid // blocks // parts
        i = part * A + tl.arange(0, A)
        j = pid % blocks * B + tl.arange(0, B)
        inside = i[:, None] * width + j[None, :]
        mask = (j < width)[None, :] & (inside < pitch)
        height = (pitch - j + width - 1) // width  # rows that reach this column: the last one may be shorter
        count = tl.maximum(tl.minimum(part * A + A, height) - part * A, 0)
        samples = tl.zeros([B], tl.int64) + sample
        return sample * pitch + inside, mask, samples, j % c, count, (sample * parts + part) * width + j, j < width
    else:
        part = pid % parts
        r = pid // parts * A + tl.arange(0, A)
        j = part * chunk + tl.arange(0, B)
        end = tl.minimum((part + 1) * chunk, s)
        mask = (r < rows)[:, None] & (j < end)[None, :]
        count = tl.zeros([A], tl.int64) + (end - part * chunk)
        return r[:, None] * pitch + j[None, :], mask, r // c, r % c, count, (r // c * parts + part) * c + r % c, r < rows


@jit(do_not_specialize=["rows"])
def _moments(
    x: tl.tensor,
    means: tl.tensor,
    squares: tl.tensor,
    rows: tl.tensor,
    c: tl.tensor,
    s: tl.tensor,
    pitch: tl.tensor,
    parts: tl.tensor,
    chunk: tl.tensor,
    fold: tl.tensor,
    blocks: tl.tensor,
    FINAL: tl.constexpr,
    ACC: tl.constexpr,
    COLUMNS: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
) -> None:
    """Mean and squared deviations of each statistic's part in one tile; the variance where that is all of it (FINAL)."""
    AXIS: tl.constexpr = 0 if COLUMNS else 1
    offset, mask, _, _, count, out, valid = place(tl.program_id(0), rows, c, s, pitch, parts, chunk, fold, blocks, COLUMNS, A, B)
    values = tl.load(x + offset, mask=mask, other=0.0).to(ACC)
    scale = power(tl.max(tl.abs(values), AXIS))
    values *= across(scale, COLUMNS)
    n = tl.maximum(count, 1).to(ACC)
    mean = tl.sum(values, AXIS) / n
    centred = tl.where(mask, values - across(mean, COLUMNS), 0.0)
    total = tl.sum(centred, AXIS)
    rest = ratio(total, n, ACC)  # what rounding left of the mean
    deviations = tl.sum(centred * centred, AXIS) - total * rest
    deviations = tl.where(deviations < 0, 0.0, deviations)
    wide = scale.to(tl.float64)
    result = deviations.to(tl.float64) / (wide * wide)
    if FINAL:
        result /= n.to(tl.float64)
    tl.store(means + out, (mean.to(tl.float64) + rest.to(tl.float64)) / wide, mask=valid)
    tl.store(squares + out, result, mask=valid)


@jit
def _partial(
    begin: tl.tensor, count: tl.tensor, s: tl.tensor, parts: tl.tensor, chunk: tl.tensor, fold: tl.tensor, Q: tl.constexpr
) -> tl.tensor:
    """Q partial results from ``begin`` on: their places, and how many values are behind each (0 beyond the last)."""
    q = (begin + tl.arange(0, Q)).to(tl.int64)
    at = q // fold % parts * chunk
    held = tl.minimum(at + chunk, tl.cdiv(s - q % fold, fold)) - at
    return q, tl.where((q < count) & (held > 0), held, 0).to(tl.float64)


@jit
def _pool(
    means: tl.tensor,
    squares: tl.tensor,
    mean: tl.tensor,
    var: tl.tensor,
    c: tl.tensor,
    s: tl.tensor,
    count: tl.tensor,
    parts: tl.tensor,
    chunk: tl.tensor,
    fold: tl.tensor,
    Q: tl.constexpr,
    B: tl.constexpr,
) -> None:
    """Mean and variance from ``count`` partial ones of each channel, which lie (group, count, c) in memory."""
    blocks = tl.cdiv(c, B)
    pid = tl.program_id(0).to(tl.int64)
    group = pid // blocks
    j = pid % blocks * B + tl.arange(0, B)
    start = group * count * c + j
    first = tl.load(means + start, mask=j < c, other=0.0)
    values = tl.zeros([Q], tl.float64)
    moved = tl.zeros([Q, B], tl.float64)
    for begin in range(0, count, Q):
        q, weight = _partial(begin, count, s, parts, chunk, fold, Q)
        mask = (weight > 0)[:, None] & (j < c)[None, :]
        part = tl.load(means + start[None, :] + q[:, None] * c, mask=mask, other=0.0)
        values += weight
        moved += tl.where(mask, weight[:, None] * (part - first[None, :]), 0.0)
    n = tl.sum(values, 0)
    center = first + tl.sum(moved, 0) / n
    sums = tl.zeros([Q, B], tl.float64)
    for begin in range(0, count, Q):
        q, weight = _partial(begin, count, s, parts, chunk, fold, Q)
        mask = (weight > 0)[:, None] & (j < c)[None, :]
        offset = start[None, :] + q[:, None] * c
        apart = tl.load(means + offset, mask=mask, other=0.0) - center[None, :]
        sums += tl.where(mask, tl.load(squares + offset, mask=mask, other=0.0) + weight[:, None] * apart * apart, 0.0)
    tl.store(mean + group * c + j, center, mask=j < c)
    tl.store(var + group * c + j, tl.sum(sums, 0) / n, mask=j < c)


@jit(do_not_specialize=["rows"])
def _reduce(
    dy: tl.tensor,
    x: tl.tensor,
    center: tl.tensor,
    sums_dy: tl.tensor,
    sums_dy_x: tl.tensor,
    center_step: tl.tensor,
    rows: tl.tensor,
    c: tl.tensor,
    s: tl.tensor,
    pitch: tl.tensor,
    parts: tl.tensor,
    chunk: tl.tensor,
    fold: tl.tensor,
    blocks: tl.tensor,
    ACC: tl.constexpr,
    COLUMNS: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
) -> None:
    """Sums of ``dy`` and of ``dy * (x - center)`` in one tile."""
    AXIS: tl.constexpr = 0 if COLUMNS else 1
    offset, mask, sample, channel, _, out, valid = place(tl.program_id(0), rows, c, s, pitch, parts, chunk, fold, blocks, COLUMNS, A, B)
    exact = tl.load(center + sample * center_step + channel, mask=valid, other=0.0)
    held = exact.to(ACC)
    g = tl.load(dy + offset, mask=mask, other=0.0).to(ACC)
    d = tl.where(mask, tl.load(x + offset, mask=mask, other=0.0).to(ACC) - across(held, COLUMNS), 0.0)
    scale_g = power(tl.max(tl.abs(g), AXIS))
    scale_d = power(tl.max(tl.abs(d), AXIS))
    g *= across(scale_g, COLUMNS)
    first = tl.sum(g, AXIS).to(tl.float64) / scale_g.to(tl.float64)
    second = tl.sum(g * (d * across(scale_d, COLUMNS)), AXIS).to(tl.float64) / (scale_g.to(tl.float64) * scale_d.to(tl.float64))
    cut = held.to(tl.float64) - exact
    tl.store(sums_dy + out, first, mask=valid)
    tl.store(sums_dy_x + out, second + tl.where(cut == 0, 0.0, cut * first), mask=valid)


@jit
def _add(
    first: tl.tensor,
    second: tl.tensor,
    sum_first: tl.tensor,
    sum_second: tl.tensor,
    c: tl.tensor,
    count: tl.tensor,
    Q: tl.constexpr,
    B: tl.constexpr,
) -> None:
    """Sums of ``count`` partial ones of each channel, for two quantities which lie (group, count, c) in memory."""
    blocks = tl.cdiv(c, B)
    pid = tl.program_id(0).to(tl.int64)
    group = pid // blocks
    j = pid % blocks * B + tl.arange(0, B)
    start = group * count * c + j
    a = tl.zeros([Q, B], tl.float64)
    b = tl.zeros([Q, B], tl.float64)
    for begin in range(0, count, Q):
        q = begin + tl.arange(0, Q)
        mask = (q < count)[:, None] & (j < c)[None, :]
        offset = start[None, :] + q[:, None].to(tl.int64) * c
        a += tl.load(first + offset, mask=mask, other=0.0).to(tl.float64)
        b += tl.load(second + offset, mask=mask, other=0.0).to(tl.float64)
    tl.store(sum_first + group * c + j, tl.sum(a, 0), mask=j < c)
    tl.store(sum_second + group * c + j, tl.sum(b, 0), mask=j < c)


@jit
def _moderate(value: tl.tensor) -> tl.tensor:
    return (value == 0) | ((tl.abs(value) >= _SMALLEST) & (tl.abs(value) <= _LARGEST))


@jit(do_not_specialize=["rows"])
def _map(
    dy: tl.tensor,
    x: tl.tensor,
    center: tl.tensor,
    scale: tl.tensor,
    slope: tl.tensor,
    constant: tl.tensor,
    y: tl.tensor,
    center_step: tl.tensor,
    scale_step: tl.tensor,
    slope_step: tl.tensor,
    constant_step: tl.tensor,
    rows: tl.tensor,
    c: tl.tensor,
    s: tl.tensor,
    pitch: tl.tensor,
    parts: tl.tensor,
    chunk: tl.tensor,
    fold: tl.tensor,
    blocks: tl.tensor,
    GRADIENT: tl.constexpr,
    ACC: tl.constexpr,
    COLUMNS: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
) -> None:
    """``slope * (x - center) + constant``, with GRADIENT ``+ scale * dy``. Tiles are taken from the last one on.

    The pass before went from the first one on: what it read last may still be in the second-level cache.
    """
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    offset, mask, sample, channel, _, _, valid = place(pid, rows, c, s, pitch, parts, chunk, fold, blocks, COLUMNS, A, B)
    m = tl.load(center + sample * center_step + channel, mask=valid, other=0.0)
    k = tl.load(slope + sample * slope_step + channel, mask=valid, other=0.0)
    b = tl.load(constant + sample * constant_step + channel, mask=valid, other=0.0)
    values = tl.load(x + offset, mask=mask, other=0.0)
    if GRADIENT:
        f = tl.load(scale + sample * scale_step + channel, mask=valid, other=0.0)
        g = tl.load(dy + offset, mask=mask, other=0.0)
    if tl.float64 == ACC:
        result = (values - across(m, COLUMNS)) * across(k, COLUMNS) + across(b, COLUMNS)
        if GRADIENT:
            result += across(f, COLUMNS) * g
    else:
        held = m.to(tl.float32)
        cut = held.to(tl.float64) - m
        rest = tl.where(cut == 0, b, b + cut * k)
        fits = (tl.abs(m) <= _LARGEST) & _moderate(k)
        result = (values.to(tl.float32) - across(held, COLUMNS)) * across(k.to(tl.float32), COLUMNS) + across(rest.to(tl.float32), COLUMNS)
        if GRADIENT:
            fits = fits & _moderate(f) & (tl.abs(rest) <= _LARGEST)
            result += across(f.to(tl.float32), COLUMNS) * g.to(tl.float32)
        else:
            fits = fits & (tl.abs(rest) <= _CANCELS)
        if tl.min(fits.to(tl.int32), 0) == 0:
            exact = (values.to(tl.float64) - across(m, COLUMNS)) * across(k, COLUMNS) + across(b, COLUMNS)
            if GRADIENT:
                exact += across(f, COLUMNS) * g.to(tl.float64)
            result = tl.where(across(fits, COLUMNS), result, exact.to(tl.float32))
    tl.store(y + offset, result.to(y.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["weight", "bessel"])
def _running(
    running_mean: tl.tensor,
    running_var: tl.tensor,
    mean: tl.tensor,
    var: tl.tensor,
    weight: tl.tensor,
    bessel: tl.tensor,
    c: tl.tensor,
    B: tl.constexpr,
) -> None:
    """Running estimates moved towards new ones, where what comes out is finite in their own type."""
    j = tl.program_id(0) * B + tl.arange(0, B)
    kind: tl.constexpr = running_mean.dtype.element_ty
    w = double(weight)
    old_mean = tl.load(running_mean + j, mask=j < c, other=0.0)
    old_var = tl.load(running_var + j, mask=j < c, other=0.0)
    wide_mean = old_mean.to(tl.float64)
    wide_var = old_var.to(tl.float64)
    new_mean = (wide_mean + w * (tl.load(mean + j, mask=j < c, other=0.0) - wide_mean)).to(kind)
    new_var = (wide_var + w * (tl.load(var + j, mask=j < c, other=0.0) * double(bessel) - wide_var)).to(kind)
    sound = (tl.abs(new_mean) < float("inf")) & (tl.abs(new_var) < float("inf"))
    tl.store(running_mean + j, tl.where(sound, new_mean, old_mean), mask=j < c)
    tl.store(running_var + j, tl.where(sound, new_var, old_var), mask=j < c)


# ---- operators ----------------------------------------------------------------------------------------------------------------


def bits(value: float) -> int:
    """The float64 ``value`` as an integer; see :func:`double`."""
    return int.from_bytes(struct.pack("<d", value), "little", signed=True)


def dtype(x: Tensor) -> tl.dtype:
    """The type of arithmetic on tiles of ``x``."""
    return tl.float64 if x.dtype is torch.float64 else tl.float32


def _shape(x: Tensor) -> tuple[int, int, int, bool]:
    n, c = x.shape[:2]
    s = x.numel() // (n * c)
    return n, c, s, not x.is_contiguous() or s == 1


class _Tiles:
    """A plan for n samples, as arguments of the kernels."""

    def __init__(self, n: int, c: int, s: int, itemsize: int, columns: bool, each: int, pitch: int | None = None) -> None:
        self.plan = cut = plan(c, s, itemsize, columns, each)
        self.partial = n * cut.parts * cut.fold * c
        programs = n * cut.parts * cut.blocks if columns else triton.cdiv(n * c, cut.a) * cut.parts
        self.grid = (programs,)
        self.sizes = (n * c, c, s, s * c if columns else pitch or s, cut.parts, cut.chunk, cut.fold, cut.blocks)
        self.options = {"COLUMNS": columns, "A": cut.a, "B": cut.b, "num_warps": cut.warps, **LAUNCH}


def run_moments(x: Tensor, n: int, c: int, s: int, columns: bool, per_sample: bool, pitch: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean and variance, (n, c) or (1, c), of dense (n, c, s) or (n, s, c); contiguous runs of s may lie ``pitch`` apart."""
    if columns and not per_sample:
        n, s = 1, n * s
    tiles = _Tiles(n, c, s, x.element_size(), columns, 32, pitch)
    cut = tiles.plan
    groups = n if per_sample else 1
    count = tiles.partial // (groups * c)
    shape = (groups, count, c)
    means, squares = (torch.empty(shape, dtype=torch.float64, device=x.device) for _ in range(2))
    with torch.cuda.device_of(x):
        _moments[tiles.grid](x, means, squares, *tiles.sizes, FINAL=count == 1, ACC=dtype(x), **tiles.options)
        if count == 1:
            return means[:, 0], squares[:, 0]
        mean, var = (torch.empty(groups, c, dtype=torch.float64, device=x.device) for _ in range(2))
        q, b = pooling(count, c)
        grid = (groups * triton.cdiv(c, b),)
        _pool[grid](means, squares, mean, var, c, s, count, cut.parts, cut.chunk, cut.fold, Q=q, B=b, num_warps=4, **LAUNCH)
    return mean, var


def pooling(count: int, c: int) -> tuple[int, int]:
    """The tile in which ``count`` partial results of c channels are pooled: 1024 at a time, few channels to a program."""
    b = min(triton.next_power_of_2(c), 16)
    return min(triton.next_power_of_2(count), 1024 // b), b


def add(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the middle dimension of two (groups, count, c), in float64 and in a fixed order: (groups, c)."""
    groups, count, c = first.shape
    if count == 1:
        return first[:, 0].double(), second[:, 0].double()
    sums = [torch.empty(groups, c, dtype=torch.float64, device=first.device) for _ in range(2)]
    q, b = pooling(count, c)
    _add[(groups * triton.cdiv(c, b),)](first, second, *sums, c, count, Q=q, B=b, num_warps=4, **LAUNCH)
    return sums[0], sums[1]


def _step(t: Tensor) -> int:
    """From one sample of a small tensor to the next; 0 where all share one."""
    return t.shape[1] if t.shape[0] > 1 else 0


LIBRARY = torch.library.Library("equinorm", "FRAGMENT")


def operator(schema: str) -> Any:
    """Register a function on tensors as ``torch.ops.equinorm.<name>``, for every device that Triton can launch on."""

    def register(function: Any) -> Any:
        LIBRARY.define(schema)
        LIBRARY.impl(schema.partition("(")[0], function, "CompositeExplicitAutograd")
        return function

    return register


def fake(name: str) -> Any:
    """Register what an operator returns, without its values: what a compiler and ``FakeTensorMode`` see."""
    return torch.library.register_fake(f"equinorm::{name}", lib=LIBRARY)


@operator("triton_moments(Tensor x, bool per_sample) -> (Tensor, Tensor)")
def _moments_op(x: Tensor, per_sample: bool) -> tuple[Tensor, Tensor]:
    return run_moments(x, *_shape(x), per_sample)


@operator("triton_reduce(Tensor dy, Tensor x, Tensor center, bool per_sample) -> (Tensor, Tensor)")
def _reduce_op(dy: Tensor, x: Tensor, center: Tensor, per_sample: bool) -> tuple[Tensor, Tensor]:
    n, c, s, columns = _shape(x)
    center = small(center, c)
    groups = n if per_sample else 1
    if columns and not per_sample and center.shape[0] == 1:
        n, s = 1, n * s
    tiles = _Tiles(n, c, s, x.element_size(), columns, 16)
    parts = [torch.empty(groups, tiles.partial // (groups * c), c, dtype=torch.float64, device=x.device) for _ in range(2)]
    with torch.cuda.device_of(x):
        _reduce[tiles.grid](dy, x, center, *parts, _step(center), *tiles.sizes, ACC=dtype(x), **tiles.options)
        return add(*parts)


@fake("triton_moments")
def _(x: Tensor, per_sample: bool) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0] if per_sample else 1, x.shape[1])
    return x.new_empty(shape, dtype=torch.float64), x.new_empty(shape, dtype=torch.float64)


@fake("triton_reduce")
def _(dy: Tensor, x: Tensor, center: Tensor, per_sample: bool) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0] if per_sample else 1, x.shape[1])
    return x.new_empty(shape, dtype=torch.float64), x.new_empty(shape, dtype=torch.float64)


def _mapped(dy: Tensor | None, x: Tensor, center: Tensor, scale: Tensor | None, slope: Tensor, constant: Tensor) -> Tensor:
    n, c, s, columns = _shape(x)
    y = torch.empty_like(x)
    given = [small(t, c) for t in (center, slope if scale is None else scale, slope, constant)]
    if columns and all(t.shape[0] == 1 for t in given):
        n, s = 1, n * s
    tiles = _Tiles(n, c, s, x.element_size(), columns, 16)
    with torch.cuda.device_of(x):
        _map[tiles.grid](
            x if dy is None else dy,
            x,
            *given,
            y,
            *(_step(t) for t in given),
            *tiles.sizes,
            GRADIENT=dy is not None,
            ACC=dtype(x),
            **tiles.options,
        )
    return y


@operator("triton_affine(Tensor x, Tensor center, Tensor scale, Tensor shift) -> Tensor")
def _affine_op(x: Tensor, center: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return _mapped(None, x, center, None, scale, shift)


@operator("triton_backward(Tensor dy, Tensor x, Tensor center, Tensor scale, Tensor slope, Tensor offset) -> Tensor")
def _backward_op(dy: Tensor, x: Tensor, center: Tensor, scale: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    return _mapped(dy, x, center, scale, slope, offset)


@fake("triton_affine")
def _(x: Tensor, center: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.empty_like(x)


@fake("triton_backward")
def _(dy: Tensor, x: Tensor, center: Tensor, scale: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    return torch.empty_like(x)


@operator(
    "triton_running_update(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, float weight, float bessel) -> ()"
)
def _running_op(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, weight: float, bessel: float) -> None:
    c = running_mean.numel()
    with torch.cuda.device_of(running_mean):
        moments = mean.contiguous(), var.contiguous()
        _running[(triton.cdiv(c, 256),)](running_mean, running_var, *moments, bits(weight), bits(bessel), c, B=256, num_warps=4, **LAUNCH)


@fake("triton_running_update")
def _(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, weight: float, bessel: float) -> None:
    return None
