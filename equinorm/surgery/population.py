"""Statistics over many batches: merged with their counts, in float64, without keeping the data."""

from __future__ import annotations

import torch
from torch import Tensor

from equinorm.core import Moments


def moments_along(x: Tensor, axis: int, mask: Tensor | None = None) -> Moments:
    """Mean and biased variance of each channel of ``x`` over everything else: (1, C) in float64.

    Args:
        x: any floating shape.
        axis: the dimension of the channels.
        mask: boolean over the values of one channel, True where data is: broadcastable to ``x`` without its channels.
    """
    data = x.detach().movedim(axis, 0).flatten(1).double()  # (C, M)
    if mask is not None:
        data = data[:, mask.expand(x.movedim(axis, 0).shape[1:]).flatten()]
    count = data.shape[1]
    if not count:
        empty = data.new_zeros(1, data.shape[0])
        return Moments(empty, empty, 0)
    mean = data.mean(1, keepdim=True)
    return Moments(mean.T, (data - mean).square().mean(1).unsqueeze(0), count)


class Regression:
    """The line of least squares through pairs of values, one line per channel, pair by pair as they come."""

    def __init__(self) -> None:
        self.count = 0
        self.z = self.y = self.zz = self.zy = torch.zeros(())

    def add(self, z: Tensor, y: Tensor, axis: int) -> None:
        """Count the pairs of two tensors of one shape, with their channels in dimension ``axis``."""
        z, y = (t.detach().movedim(axis, 0).flatten(1).double() for t in (z, y))
        count = z.shape[1]
        if not count:
            return
        mean_z, mean_y = z.mean(1), y.mean(1)
        apart_z, apart_y = z - mean_z[:, None], y - mean_y[:, None]
        zz, zy = apart_z.square().sum(1), (apart_z * apart_y).sum(1)
        total = self.count + count
        share, gap_z, gap_y = count / total, mean_z - self.z, mean_y - self.y
        between = self.count * share
        self.zz, self.zy = self.zz + zz + between * gap_z.square(), self.zy + zy + between * gap_z * gap_y
        self.z, self.y, self.count = self.z + share * gap_z, self.y + share * gap_y, total

    def line(self) -> tuple[Tensor, Tensor]:
        """Slope and intercept (C,); slope 0 for a channel whose z never changes."""
        slope = torch.where(self.zz > 0, self.zy / self.zz.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
        return slope, self.y - slope * self.z

    def slope_through_zero(self) -> Tensor:
        """The slope (C,) of the best line without an intercept."""
        squares = self.zz + self.count * self.z.square()
        products = self.zy + self.count * self.z * self.y
        return torch.where(squares > 0, products / squares.clamp(min=torch.finfo(torch.float64).tiny), 0.0)

    def intercept(self) -> Tensor:
        """The intercept (C,) of the best line of slope 1."""
        return self.y - self.z
