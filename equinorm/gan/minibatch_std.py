"""Minibatch standard deviation: a discriminator's feature that shows how much the samples of a group differ."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from equinorm.core.base import check_count, check_floating
from equinorm.facts import Facts, Paper
from equinorm.kernels.reference import wide


class MinibatchStdDev(nn.Module):
    r"""Append channels that hold the mean standard deviation of the features over a group of samples.

    Formula:
        s[m, f] = mean over channels of f and positions of sqrt(var over the group of x + eps)

        The batch falls into N / G groups of G samples, group m being the samples m, m + N / G, m + 2 N / G ...; every sample of group m
        receives F constant channels s[m, 1..F]. The variance is the biased one.

    Use it when: a discriminator must see whether the generator's samples are all alike; near the discriminator's end.
    Not when: samples must not see each other: gradient penalties per sample, evaluation with another batch.
    Known trouble: it couples samples. The gradient of summed logits with respect to one image then contains what other samples' logits
        owe to it, so that R1 is only approximately per sample. Evaluate with the batch layout of training. Processes form their own
        groups.

    Args:
        group_size: G at most; the largest divisor of the batch size up to it is used. None for the whole batch.
        num_channels: F, which must divide the channels.
        eps: added to the variance. A group of one sample gives sqrt(eps).

    Shape: ``(N, C, *S)`` to ``(N, C + F, *S)``, same dtype; statistics in at least float32.

    Raises:
        TypeError: the input is not floating point.
        ValueError: sizes below 1, eps not positive, F does not divide C, or fewer than two dimensions.

    Example:
        >>> import torch, equinorm
        >>> x = torch.tensor([[0.0], [1.0], [4.0], [9.0]])
        >>> equinorm.MinibatchStdDev(group_size=2)(x)[:, 1]
        tensor([2., 4., 2., 4.])

    Source: Karras et al., 2018, arXiv:1710.10196, section 3; grouping as in StyleGAN2's code. A widespread copy takes one unbiased
        deviation over all groups, which every sample then shares.
    """

    facts: ClassVar[Facts] = Facts(
        name="minibatch_std",
        title="Minibatch Standard Deviation",
        paper=Paper(
            authors="Karras et al.",
            title="Progressive Growing of GANs for Improved Quality, Stability, and Variation",
            year=2018,
            venue="ICLR",
            arxiv="1710.10196",
            equation="section 3",
        ),
        family="gan",
        pools="NCS",
        batch_of_one="appends the constant sqrt(eps)",
        reads_writes="2R+1W",
    )

    def __init__(self, group_size: int | None = 4, num_channels: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        check_count(self, num_channels=num_channels, **({} if group_size is None else {"group_size": group_size}))
        if not eps > 0:
            raise ValueError(f"MinibatchStdDev: eps must be positive, got {eps}")
        self.group_size, self.num_channels, self.eps = group_size, num_channels, eps

    def forward(self, x: Tensor) -> Tensor:
        check_floating(self, x)
        if x.ndim < 2 or x.shape[1] % self.num_channels:
            raise ValueError(
                f"MinibatchStdDev: the input must have shape (N, C, *S) with C divisible by num_channels={self.num_channels}, "
                f"got {tuple(x.shape)}"
            )
        n, f = x.shape[0], self.num_channels
        largest = n if self.group_size is None else min(n, self.group_size)
        g = next((size for size in range(largest, 1, -1) if n % size == 0), 1)
        y = wide(x).reshape(g, n // g, f, x.shape[1] // f * x.shape[2:].numel())  # (G, N / G, F, C / F * S)
        y = y - y.mean(0)
        y = (y.square().mean(0) + self.eps).sqrt().mean(2)  # (N / G, F)
        y = y.to(x.dtype).repeat(g, 1).view(n, f, *[1] * (x.ndim - 2)).expand(n, f, *x.shape[2:])
        return torch.cat((x, y), 1)

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}, num_channels={self.num_channels}, eps={self.eps}"
