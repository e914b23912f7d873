"""The first of the three beats: what is known of the data, one mean and variance per sample and channel, and how to pool it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from equinorm.core.sync import LEAST, gather

if TYPE_CHECKING:
    from equinorm.core.sync import Group


class Moments(NamedTuple):
    """Mean and biased variance with the number of values behind each entry.

    Pooling uses "variance of a union = mean of the variances + variance of the means", weighted by counts, which never subtracts two large
    numbers. Shapes stay broadcastable to ``(N, C)``, so that pooled and unpooled moments mix freely in a rule.

    Attributes:
        mean: (N | 1, C | 1) small tensor.
        var: same shape, divided by the count (not by count - 1).
        count: values behind each entry; a number where all entries share it, else a tensor of shape (N | 1, 1).
    """

    mean: Tensor
    var: Tensor
    count: int | Tensor

    def over_batch(self, group: Group = None) -> Moments:
        """Pool over the samples, and over the processes of ``group`` where one is given: ``(1, C)``."""
        pooled = self if self.mean.shape[0] == 1 else self._pooled(0)
        return pooled if group is None else gather(pooled, group)

    def over_channels(self) -> Moments:
        """Pool over all channels of each sample: ``(N, 1)``."""
        return self if self.mean.shape[1] == 1 else self._pooled(1)

    def over_groups(self, groups: int) -> Moments:
        """Pool over the channels of each of ``groups`` contiguous groups, repeated for each channel of the group: ``(N, C)``."""
        n, c = self.mean.shape
        if groups == c:
            return self
        grouped = (n, groups, c // groups)
        count = self.count[..., None] if isinstance(self.count, Tensor) else self.count
        pooled = Moments(self.mean.reshape(grouped), self.var.reshape(grouped), count)._pooled(2)
        count = pooled.count[..., 0] if isinstance(pooled.count, Tensor) else pooled.count
        return Moments(pooled.mean.expand(grouped).reshape(n, c), pooled.var.expand(grouped).reshape(n, c), count)

    def over_chunks(self, chunks: int) -> Moments:
        """Pool over each of ``chunks`` runs of consecutive samples, as near to equal as can be, the longer ones first: ``(chunks, C)``."""
        n = self.mean.shape[0]
        size, longer = divmod(n, chunks)
        count = torch.as_tensor(self.count, dtype=self.mean.dtype, device=self.mean.device).expand(n, 1)
        pooled = []
        for start, runs, length in ((0, longer, size + 1), (longer * (size + 1), chunks - longer, size)):
            parts = (part[start : start + runs * length].reshape(runs, length, part.shape[1]) for part in (self.mean, self.var, count))
            pooled.append(Moments(*parts)._pooled(1))
        return Moments(*(torch.cat(parts).squeeze(1) for parts in zip(*pooled, strict=True)))

    def weighted_over_batch(self, weights: Tensor, group: Group = None) -> Moments:
        """Pool over the samples with a weight for each, once per column of ``weights``, and over the processes of ``group``.

        Args:
            weights: (N, K), not negative; they multiply the counts.
            group: as for :meth:`over_batch`.

        Returns:
            moments ``(K, C)`` with counts ``(K, 1)``. A column of zeros has moments 0.
        """
        pooled = Moments(*(part.T for part in self._weighted(weights.unsqueeze(1), 0)))
        return pooled if group is None else gather(pooled, group)

    def weighted_over_channels(self, weights: Tensor) -> Moments:
        """Pool over the channels of each sample with weights (N, C, K): moments and counts ``(N, K)``."""
        return Moments(*self._weighted(weights, 1))

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of values together, entry by entry."""
        count = self.count + other.count
        share = other.count / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))
        apart = other.mean - self.mean
        mean = self.mean + share * apart
        var = self.var + share * (other.var - self.var) + share * (1 - share) * apart.square()
        return Moments(mean, var, count)

    def _weighted(self, weights: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        weights = weights * (self.count.unsqueeze(2) if isinstance(self.count, Tensor) else self.count)  # (N, C | 1, K)
        count = weights.sum(dim)
        share = weights / count.clamp(min=LEAST).unsqueeze(dim)
        means = self.mean.unsqueeze(2)  # (N, C, 1)
        mean = (means * share).sum(dim)
        var = ((self.var.unsqueeze(2) + (means - mean.unsqueeze(dim)).square()) * share).sum(dim)
        return mean, var, count

    def _pooled(self, dim: int) -> Moments:
        size = self.mean.shape[dim]
        if isinstance(self.count, Tensor) and self.count.shape[dim] != 1:
            count = self.count.sum(dim, keepdim=True)
            share = self.count / count.clamp(min=1)
            mean = (self.mean * share).sum(dim, keepdim=True)
            var = ((self.var + (self.mean - mean).square()) * share).sum(dim, keepdim=True)
            return Moments(mean, var, count)
        if size == 0:  # an empty batch: no values, moments 0
            return Moments(self.mean.sum(dim, keepdim=True), self.var.sum(dim, keepdim=True), 0)
        mean = self.mean.mean(dim, keepdim=True)
        var = (self.var + (self.mean - mean).square()).mean(dim, keepdim=True)
        return Moments(mean, var, self.count * size)
