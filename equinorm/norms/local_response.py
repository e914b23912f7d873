"""Local response normalization, across channels or within each channel."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from equinorm.core.base import check_count, check_floating
from equinorm.core.channel import canonical_mask
from equinorm.core.roots import power
from equinorm.core.window import box, mirrored_sum, window_sum
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl, dense, like, pick
from equinorm.kernels.reference import wide

BLOCK = 1 << 17  # values of the samples whose windows are summed at a time, in the cache


class Response(NamedTuple):
    """Divide each value by a power of the mean square in its window along ``dims``, zeros beyond the border counted."""

    size: int
    alpha: float
    beta: float
    k: float
    dims: tuple[int, ...]

    def energy(self, x: Tensor) -> Tensor:
        """What is raised to the power."""
        energy = x.square()
        for dim in self.dims:
            energy = window_sum(energy, box(self.size), dim)
        s = self.k + self.alpha * energy
        return torch.where(s == 0, 1, s) if self.k == 0 else s  # a window of zeros: 0 comes out, with a finite gradient

    def value(self, x: Tensor) -> Tensor:
        return wide(x).mul(power(self.energy(wide(x)), -self.beta)).to(x.dtype)

    def pull(self, dy: Tensor, x: Tensor) -> Tensor:
        """Dx = dy s^-beta - 2 alpha beta x (sum over the windows that x lies in of dy x s^(-beta - 1))."""
        s = self.energy(x)
        direct = power(s, -self.beta).mul_(dy)
        shared = (direct * x).div_(s)
        for dim in self.dims:
            shared = mirrored_sum(shared, box(self.size), dim)
        return direct.sub_(shared.mul_(x), alpha=2 * self.alpha * self.beta)


class _Blocks(torch.autograd.Function):
    """The same on as many samples at a time as fit into the cache. Only x is kept."""

    @staticmethod
    def forward(ctx: Any, response: Response, x: Tensor) -> Tensor:
        ctx.response = response
        ctx.save_for_backward(x)
        y, step = torch.empty_like(x), max(BLOCK // x[0].numel(), 1)
        for part, target in zip(x.split(step), y.split(step), strict=True):
            target.copy_(response.value(part))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        (x,), response = ctx.saved_tensors, ctx.response
        if torch.is_grad_enabled():
            return None, *torch.autograd.grad(response.value(x), x, dy, create_graph=True)
        dx, step = torch.empty_like(x), max(BLOCK // x[0].numel(), 1)
        for part, from_y, target in zip(*(t.split(step) for t in (x, like(dy, x), dx)), strict=True):
            target.copy_(response.pull(wide(from_y), wide(part)))
        return None, dx


class LocalResponseNorm(torch.nn.LocalResponseNorm):
    """Divide each value by the energy of its neighbours: of the next channels at its position, or of the next positions in its channel.

    Formula:
        y_i = x_i / (k + alpha / n * sum over the window of i of x_j^2)^beta

        across: the window is the n channels from i - floor(n / 2) to i + floor((n - 1) / 2) at the same position; within: the n positions
        along each spatial dimension around i in the same channel, alpha over all n^d of them. What lies beyond the border counts as zeros.

    Use it when: a network of the AlexNet era must be reproduced, or neurons should inhibit their neighbours.
    Not when: training is to be stabilised: the first batch norm networks already did better without it.
    Known trouble: the paper divides alpha by nothing, this and torch and Caffe by n: the paper's k = 2, n = 5, alpha = 1e-4 is alpha = 5e-4
        here. With k = 1 and the small default alpha the layer is nearly the identity for inputs of order one.

    Differences: from ``torch.nn.LocalResponseNorm``: the window within channels; half types on the CPU in any rank, squared in float32;
    (N, C) inputs; any strides; derivatives cost a constant number of passes.

    Args:
        size: n, the length of the window in channels or, within channels, along each spatial dimension.
        alpha: weight of the energy, at least 0.
        beta: exponent, at least 0.
        k: added to the energy, at least 0. With 0, a window of zeros gives 0. Caffe's layer within channels ignores it and uses 1.
        mode: "across" channels or "within" each channel.

    Shape:
        x: (N, C, *S), with at least one spatial dimension for "within", to the same shape and dtype. mask: boolean (N, *S) or (N, 1, *S),
        True where data is; the rest counts as zeros, as beyond the border, and comes out as 0.

    Raises:
        TypeError: the input is not floating point.
        ValueError: too few dimensions, a mask of another shape, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> equinorm.LocalResponseNorm(3, alpha=1.0, beta=0.5)(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]))
        tensor([[0.6124, 0.8402, 0.9186, 0.9517, 1.3056]])

    Source: Krizhevsky, Sutskever and Hinton 2012, section 3.3; the form within channels, the divisor n and even n are those of Caffe and
    torch.
    """

    facts: ClassVar[Facts] = Facts(
        name="local_response",
        title="Local Response Normalization (LRN)",
        paper=Paper(
            authors="Krizhevsky, Sutskever and Hinton",
            title="ImageNet Classification with Deep Convolutional Neural Networks",
            year=2012,
            venue="NeurIPS",
            equation="section 3.3",
        ),
        family="local",
        pools="L",
        invariances=frozenset({"per-sample"}),
        one_position="works; within channels the window holds one value",
    )

    def __init__(
        self,
        size: int,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 1.0,
        *,
        mode: Literal["across", "within"] = "across",
    ) -> None:
        super().__init__(size, alpha, beta, k)
        check_count(self, size=size)
        for name, value in (("alpha", alpha), ("beta", beta), ("k", k)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"LocalResponseNorm: {name} must be a finite number of at least 0, got {value}")
        if mode not in ("across", "within"):
            raise ValueError(f'LocalResponseNorm: mode must be "across" or "within" channels, got {mode!r}')
        self.mode = mode

    @classmethod
    def for_channels(cls, channels: int, *, size: int = 5, **options: Any) -> Self:
        """Local response norm over windows of ``size``, for any number of channels."""
        return cls(size, **options)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        check_floating(self, x)
        least = 2 if self.mode == "across" else 3
        if x.ndim < least:
            form = "(N, C, *spatial)" if self.mode == "across" else "(N, C, *spatial) with at least one spatial dimension"
            raise ValueError(f"LocalResponseNorm: the input must have shape {form} {self.mode} channels, got {tuple(x.shape)}")
        if mask is not None:
            x = torch.where(canonical_mask(x, mask), x, 0)
        response = Response(self.size, self.alpha, self.beta, self.k, (1,) if self.mode == "across" else tuple(range(2, x.ndim)))
        return response.value(x) if pick(x, impl) is None or not x.numel() else _Blocks.apply(response, dense(x))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode}"
