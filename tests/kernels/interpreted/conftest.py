"""Triton's interpreter, rounding as a chip does, and tiles so small that small shapes have many of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter

from equinorm.kernels import triton_channel, triton_row


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What overflows or is no number passes without a warning, as on a chip."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(autouse=True)
def _rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 to bfloat16 rounds to nearest, ties to even, as the chip's instruction does; the interpreter cuts off."""
    cut = interpreter.InterpreterBuilder.cast_impl

    def cast(self, source, kind):
        if source.dtype.scalar != tl.float32 or kind.scalar != tl.bfloat16:
            return cut(self, source, kind)
        pattern = source.data.view(np.uint32)
        rounded = ((pattern + 0x7FFF + ((pattern >> 16) & 1)) >> 16).astype(np.uint16)
        return interpreter.TensorHandle(np.where(np.isnan(source.data), np.uint16(0x7FC0), rounded), tl.bfloat16)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast)


def _forget_plans() -> None:
    triton_channel.plan.cache_clear()
    triton_row.plan.cache_clear()


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of 128 float32 (256 where only x is read); rows of up to 128 of them in one program, 64 in backward."""
    monkeypatch.setattr(triton_channel, "TILE_BYTES", 1024)
    monkeypatch.setattr(triton_row, "TILE_BYTES", 1024)
    monkeypatch.setattr(triton_row, "FORWARD_BYTES", 512)
    monkeypatch.setattr(triton_row, "BACKWARD_BYTES", 256)
    monkeypatch.setattr(triton_row, "PROGRAMS", 2)
    _forget_plans()
    yield
    _forget_plans()
