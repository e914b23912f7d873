"""Results too large for the caches, which the kernels write past them: the same bits as those of their parts, and every one written."""

from __future__ import annotations

import pytest
import torch

from equinorm.kernels import cpu
from tests.helpers import poisoned_memory

pytestmark = pytest.mark.skipif(not cpu.available(), reason="needs the compiled kernels")

SAMPLES = 8
# Values per sample: 64 MiB in float32 and in bfloat16 altogether, more than most processors' last level can hold twice. In odd lengths
# runs begin anywhere in a cache line.
SHAPES = {torch.float32: (32, 257, 255), torch.bfloat16: (32, 512, 256)}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("dtype", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_maps_of_a_large_batch_are_those_of_its_samples(dtype, layout):
    shape = (SAMPLES, *SHAPES[dtype])
    x, dy = (torch.randn(shape).to(dtype).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))
    center, scale, shift, offset = torch.randn(4, SAMPLES, shape[1], dtype=torch.float64).unbind()
    with poisoned_memory():
        y, dx = cpu.affine(x, center, scale, shift), cpu.backward(dy, x, center, scale, shift, offset)
    for i in range(SAMPLES):
        one = slice(i, i + 1)
        assert torch.equal(y[one], cpu.affine(x[one], center[one], scale[one], shift[one]))
        assert torch.equal(dx[one], cpu.backward(dy[one], x[one], center[one], scale[one], shift[one], offset[one]))


@pytest.mark.parametrize("dtype", SHAPES)
@pytest.mark.parametrize("affine", ["columns", "channels", "none"])
def test_rows_of_a_large_batch_are_those_of_its_samples(dtype, affine):
    c, height, width = SHAPES[dtype]
    x, dy = (torch.randn(SAMPLES, c, height * width).to(dtype) for _ in range(2))
    k, s = (height * width, 1) if affine == "columns" else (c // 4, height * width)
    row = {"groups": 1 if affine == "columns" else 4, "k": k, "s": s, "measured": k * s}
    weight = None if affine == "none" else torch.rand(row["groups"] * k) + 0.5

    def run(x, dy):
        rows = x.numel() // (k * s)
        y, mean, rstd = cpu.row_forward(x, weight, weight, **row, rows=rows, eps=1e-5, centered=True)
        return y, cpu.row_backward(dy, x, weight, mean, rstd, **row, rows=rows, centered=True, wanted=(True, False, False))[0]

    with poisoned_memory():
        y, dx = run(x, dy)
    for i in range(SAMPLES):
        one = slice(i, i + 1)
        for whole, part in zip((y, dx), run(x[one], dy[one]), strict=True):
            assert torch.equal(whole[one], part)
