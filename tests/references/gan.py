"""The pieces of adversarial training, retyped naively in float64, importing nothing of the library."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.references.weight import upfirdn2d


def minibatch_std(x: Tensor, group_size: int, num_channels: int, eps: float) -> Tensor:
    """Karras et al. 2018 with StyleGAN2's strided groups, one group and one feature group at a time."""
    n, channels = x.shape[:2]
    groups = n // group_size
    y = x.new_zeros(n, num_channels, *x.shape[2:])
    per = channels // num_channels
    for m in range(groups):
        members = x[m::groups]
        assert len(members) == group_size
        for f in range(num_channels):
            values = members[:, f * per : (f + 1) * per].reshape(group_size, -1)
            mean = sum(values) / group_size
            deviation = (sum((v - mean) ** 2 for v in values) / group_size + eps) ** 0.5
            y[m::groups, f] = deviation.sum() / deviation.numel()
    return torch.cat((x, y), 1)


def path_lengths(images: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """Karras et al. 2019, Eq. 4, from the whole Jacobian of every sample: latents (N, D) or (N, layers, D), noise as given."""
    lengths = []
    for n in range(len(images)):
        rows = [torch.autograd.grad(value, latents, retain_graph=True)[0][n] for value in images[n].flatten()]
        product = sum(y * row for y, row in zip(noise[n].flatten(), rows, strict=True))  # J^T y, (D,) or (layers, D)
        square = (product**2).sum(-1)
        lengths.append(square.mean().sqrt() if square.ndim else square.sqrt())
    return torch.stack(lengths)


def discriminator_block(x: Tensor, p: dict[str, Tensor], taps: tuple[float, ...]) -> Tensor:
    """Karras et al. 2019, figure 7, in the published order: filter, then convolution with stride, each branch times sqrt(1/2)."""
    f = torch.tensor(taps, dtype=torch.float64).outer(torch.tensor(taps, dtype=torch.float64))
    f = f / f.sum()

    def conv(x: Tensor, name: str, **options) -> Tensor:
        w = p[f"{name}.weight"]
        return F.conv2d(x, w / math.sqrt(w[0].numel()), p.get(f"{name}.bias"), **options)

    def act(x: Tensor) -> Tensor:
        return torch.where(x > 0, x, 0.2 * x) * math.sqrt(2)

    h = act(conv(x, "conv0", padding=1))
    branch = act(conv(upfirdn2d(h, f, before=2, after=2), "conv1", stride=2))
    skip = conv(upfirdn2d(x, f, down=2, before=1, after=1), "skip")
    return branch * math.sqrt(0.5) + skip * math.sqrt(0.5)
