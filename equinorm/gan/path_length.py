"""Path length penalty: steps in a generator's latent space should change its images by one and the same amount, in every direction."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from equinorm.facts import Facts, Paper
from equinorm.weight.units import wide


class PathLengthPenalty(nn.Module):
    r"""Penalise how far the length of a random projection of the generator's Jacobian is from its running mean.

    Formula:
        l_n = sqrt(mean over layers of || J_n^T y_n ||^2),  y_n ~ N(0, I) / sqrt(H W),  J_n = d image_n / d latent_n
        a <- a + momentum (mean_n l_n - a)
        penalty = weight * mean_n (l_n - a)^2

        J^T y costs one backward pass: it is the gradient of sum(image * y). For a Jacobian of orthogonal columns of equal length, l is
        the same
        for all y, up to its own spread: the penalty draws the generator there.

    Use it when: a generator's latent space is to be smooth and invertible; every 4th step times 4 (:class:`LazyRegularizer`), on half a
        batch.
    Not when: the generator holds layers without a second derivative, or reentrant activation checkpointing.
    Known trouble: why sqrt(H W): the length of J^T y for plain noise grows with the root of the number of pixels, so that the weight would
        depend on the resolution. Dividing is nothing but another weight: ``divide_by_size=False`` with weight / (H W) is the same penalty.

    Args:
        weight: factor of the penalty.
        momentum: weight of the new value in the running mean a (0.01 in StyleGAN2).
        divide_by_size: divide the noise by sqrt(number of pixels), as the published code does and the paper does not say.
        detach_mean: True treats a as a constant. By default gradient flows through the share ``momentum`` that the current batch has in
            it, as in the published code.
        eps: added to the squared length; its root has no second derivative at 0.
        process_group: average the lengths over this process group, or over all processes with "world", before they enter a.

    Shape: ``forward(images, latents)``: images ``(N, C, *S)``, computed from latents ``(N, D)`` or ``(N, layers, D)``, which require a
        gradient; with ``latent_batch_dim=1`` latents are ``(layers, N, D)``. Returns a scalar, in at least float32.

    Buffers: ``mean_path_length`` a (0, float32) and ``num_updates`` (int64), persistent. There is no evaluation form.

    Raises:
        ValueError: settings out of range, latents that require no gradient or that the images do not depend on, or shapes that do not
            match.

    Example:
        >>> import torch, equinorm
        >>> penalty = equinorm.PathLengthPenalty()
        >>> w = torch.randn(4, 8).requires_grad_()
        >>> images = (w @ torch.randn(8, 3 * 16 * 16)).view(4, 3, 16, 16)
        >>> penalty(images, w).item() > 0
        True

    Source: Karras et al., 2019, arXiv:1912.04958, section 3.2 and appendix B, with the published code's division and running mean. That
        code keeps a per process and out of the checkpoint; here it is a buffer. A widespread copy averages latents of shape (layers, N,
        D) over the batch, which gives one length per layer instead of one per sample, and returns a constant at the first call.
    """

    facts: ClassVar[Facts] = Facts(
        name="path_length_penalty",
        title="Path Length Regularization",
        paper=Paper(
            authors="Karras et al.",
            title="Analyzing and Improving the Image Quality of StyleGAN",
            year=2019,
            venue="CVPR 2020",
            arxiv="1912.04958",
            equation="Eq. 4",
        ),
        family="gan",
        pools="",
        synchronizes="mean path length",
        reads_writes="1R+1W",
    )
    mean_path_length: Tensor
    num_updates: Tensor

    def __init__(
        self,
        weight: float = 2.0,
        momentum: float = 0.01,
        divide_by_size: bool = True,
        detach_mean: bool = False,
        eps: float = 1e-12,
        process_group: dist.ProcessGroup | Literal["world"] | None = None,
    ) -> None:
        super().__init__()
        if not 0 < momentum <= 1:
            raise ValueError(f"PathLengthPenalty: momentum is the weight of the new value and must lie in (0, 1], got {momentum}")
        if not weight > 0 or not eps > 0:
            raise ValueError(f"PathLengthPenalty: weight and eps must be positive, got {weight} and {eps}")
        self.weight, self.momentum, self.divide_by_size = weight, momentum, divide_by_size
        self.detach_mean, self.eps, self.process_group = detach_mean, eps, process_group
        self.register_buffer("mean_path_length", torch.zeros((), dtype=torch.float32))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    def lengths(self, images: Tensor, latents: Tensor, latent_batch_dim: int = 0, noise: Tensor | None = None) -> Tensor:
        """The path length of every sample, ``(N,)``, differentiable; ``noise`` of the shape of the images replaces the random one."""
        if latent_batch_dim not in (0, 1) or latents.ndim < 2 + latent_batch_dim or latents.shape[latent_batch_dim] != len(images):
            raise ValueError(
                "PathLengthPenalty: latents must have shape (N, D) or (N, layers, D), or with latent_batch_dim=1 (layers, N, D), with the "
                f"N of the images; got latents {tuple(latents.shape)}, images {tuple(images.shape)}, latent_batch_dim={latent_batch_dim}"
            )
        if not latents.requires_grad or not images.requires_grad:
            raise ValueError("PathLengthPenalty: latents must require a gradient, and images must be computed from them with gradients on")
        x = wide(images)
        y = torch.randn_like(x) if noise is None else noise
        if self.divide_by_size:
            y = y / math.sqrt(math.prod(images.shape[2:]))
        (gradient,) = torch.autograd.grad((x * y).sum(), latents, create_graph=True, allow_unused=True)
        if gradient is None:
            raise ValueError("PathLengthPenalty: images must depend on latents; pass the tensor that the generator's layers received")
        square = wide(gradient).movedim(latent_batch_dim, 0).square().sum(-1)  # (N,) or (N, layers)
        return (square.flatten(1).mean(1) if square.ndim > 1 else square).add(self.eps).sqrt()

    def forward(self, images: Tensor, latents: Tensor, latent_batch_dim: int = 0, noise: Tensor | None = None) -> Tensor:
        lengths = self.lengths(images, latents, latent_batch_dim, noise)
        a = self.mean_path_length.to(lengths.dtype, copy=True)
        a = a + self.momentum * (self._mean(lengths) - a)
        with torch.no_grad():
            self.mean_path_length.copy_(a)
            self.num_updates.add_(1)
        if self.detach_mean:
            a = a.detach()
        return (lengths - a).square().mean() * self.weight

    def _mean(self, lengths: Tensor) -> Tensor:
        """Mean length over all samples of all processes; only this process's share carries gradient."""
        if self.process_group is None or not (dist.is_available() and dist.is_initialized()):
            return lengths.mean()
        total = torch.stack((lengths.detach().sum(), lengths.new_tensor(float(len(lengths)))))
        dist.all_reduce(total, group=dist.group.WORLD if self.process_group == "world" else self.process_group)
        own = lengths.sum() / total[1]
        return own + (total[0] / total[1] - own.detach())

    def extra_repr(self) -> str:
        return f"weight={self.weight}, momentum={self.momentum}, divide_by_size={self.divide_by_size}, detach_mean={self.detach_mean}"
