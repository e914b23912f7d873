"""What is timed: shapes, layouts, types and passes, and the entries they make."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from math import prod
from typing import Literal, NamedTuple

import torch

from equinorm.bench.contenders import BY_NAME, Contender
from equinorm.kernels.traffic import Pass

Shape = tuple[int, ...]
Layout = Literal["contiguous", "channels_last"]
Pages = Literal["default", "reused"]

SHAPES: tuple[Shape, ...] = (
    (64, 256, 32, 32),
    (16, 256, 32, 32),
    (8, 512, 64, 64),
    (64, 3, 224, 224),
    (32, 64, 8, 8),
    (32 * 1024, 768),
    (8 * 2048, 4096),
    (64, 128),
)
FEW: tuple[Shape, ...] = ((64, 256, 32, 32), (32, 64, 8, 8), (32 * 1024, 768), (64, 128))  # for methods that torch has not
QUICK: tuple[Shape, ...] = ((16, 256, 32, 32), (32, 64, 8, 8), (8 * 1024, 768), (64, 128))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PASSES: tuple[Pass, ...] = ("forward", "both", "eval")
SMALL = 1 << 18  # elements below which the call itself is what costs


class Entry(NamedTuple):
    """One line of the table: what is timed side by side.

    Attributes:
        pages: how the allocator serves outputs.
        norm: catalogue name.
        shape: of the input.
        dtype, layout: names out of :data:`DTYPES` and :data:`LAYOUTS`; rows are contiguous.
        of: the pass; "both" is forward and backward.
    """

    pages: Pages
    norm: str
    shape: Shape
    dtype: str
    layout: Layout
    of: Pass

    def __str__(self) -> str:
        return f"{self.norm} {written(self.shape)} {self.dtype} {self.layout} {self.of}, pages {self.pages}"

    @property
    def contender(self) -> Contender:
        """The method and its peers."""
        return BY_NAME[self.norm]

    @property
    def bytes(self) -> int:
        """Of one tensor of the input's size."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def small(self) -> bool:
        """Whether the call itself is what costs."""
        return prod(self.shape) < SMALL


def written(shape: Shape) -> str:
    """``64x256x32x32``."""
    return "x".join(map(str, shape))


def parsed(text: str) -> Shape:
    """The shape that :func:`written` writes.

    Raises:
        ValueError: it is none of two or four positive sizes.
    """
    sizes = text.split("x")
    if len(sizes) not in (2, 4) or not all(size.isdecimal() and int(size) for size in sizes):
        raise ValueError(f"a shape is ROWSxFEATURES or SAMPLESxCHANNELSxHEIGHTxWIDTH, as in 32768x768 or 64x256x32x32; got {text!r}")
    return tuple(map(int, sizes))


def entries(
    pages: Pages,
    norms: Iterable[str],
    shapes: Iterable[Shape] | None,
    dtypes: Iterable[str],
    layouts: Iterable[Layout],
    passes: Iterable[Pass],
) -> Iterator[Entry]:
    """All entries of the grid, those of one input next to each other.

    Args:
        pages, norms, dtypes, layouts, passes: which.
        shapes: which, or None for all of :data:`SHAPES` where torch has the layer and :data:`FEW` where it has not.
    """
    chosen = [BY_NAME[name] for name in norms]
    for contender in sorted(chosen, key=lambda c: not c.torch):  # what is compared with torch first
        own = shapes if shapes is not None else SHAPES if contender.torch else FEW
        for shape, dtype, layout, of in product(own, dtypes, layouts, passes):
            if contender.fits(shape) and (layout == "contiguous" or len(shape) == 4):
                yield Entry(pages, contender.name, shape, dtype, layout, of)
