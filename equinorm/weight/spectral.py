"""Spectral normalization: a layer's weight divided by the largest singular value of its linear map."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from equinorm.facts import Facts, Paper, describes
from equinorm.weight.power import ConvOperator, ConvTransposeOperator, MatrixOperator, PowerIterated, full_precision
from equinorm.weight.units import named_weight, register, safe_sqrt, units_of, wide

Method = Literal["reshape", "conv", "fft"]


def bounded(weight: Tensor, sigma: Tensor, coeff: float | None, eps: float) -> Tensor:
    """The rule: ``W / sigma``, or with a coefficient c ``W / max(1, sigma / c)``."""
    return weight / (sigma.clamp(min=eps) if coeff is None else (sigma / coeff).clamp(min=1))


class _SpectralNorm(PowerIterated):
    """By power iteration; of the reshaped matrix or of the convolution."""

    def __init__(
        self, operator: ConvOperator | ConvTransposeOperator | MatrixOperator, weight: Tensor, steps: int, coeff: float | None, eps: float
    ) -> None:
        super().__init__(operator, weight, steps)
        self.coeff, self.eps = coeff, eps

    def forward(self, weight: Tensor) -> Tensor:
        w = wide(weight)
        with full_precision(weight):
            _, _, sigma = self.top(w)
            return bounded(w, sigma.amax(), self.coeff, self.eps).to(weight.dtype)

    def extra_repr(self) -> str:
        return f"{type(self.operator).__name__}, n_power_iterations={self.n_power_iterations}, coeff={self.coeff}"


class _ExactSpectralNorm(nn.Module):
    """By a function that computes sigma from the weight alone."""

    def __init__(self, sigma: Callable[[Tensor], Tensor], coeff: float | None, eps: float) -> None:
        super().__init__()
        self.sigma, self.coeff, self.eps = sigma, coeff, eps

    def forward(self, weight: Tensor) -> Tensor:
        w = wide(weight)
        with full_precision(weight):
            return bounded(w, self.sigma(w), self.coeff, self.eps).to(weight.dtype)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value

    def extra_repr(self) -> str:
        return f"exact, coeff={self.coeff}"


def length(weight: Tensor) -> Tensor:
    """Spectral norm of a vector."""
    return safe_sqrt(weight.square().sum())


def lattice(sizes: tuple[int, ...], like: Tensor) -> Tensor:
    """All index tuples below ``sizes`` in row-major order, ``(prod(sizes), d)``."""
    axes = [torch.arange(n, dtype=like.dtype, device=like.device) for n in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


def circular_norm(weight: Tensor, spatial: tuple[int, ...], dilation: tuple[int, ...], groups: int) -> Tensor:
    """Spectral norm of a circular convolution of stride 1 on inputs of size ``spatial``: a Fourier transform makes it block diagonal.

    At frequency f the block is ``T(f) = sum_t W[:, :, t] exp(-2 pi i <f, t * dilation / size>)``, out by in; the norm is the largest
    singular value of any block. The singular vectors are constants of the derivative, which is exact for the first one.
    """
    blocks = weight.unflatten(0, (groups, -1)).flatten(3)  # (G, out / G, in / G, K)
    taps = lattice(tuple(weight.shape[2:]), weight)  # (K, d)
    # A real kernel has conjugate blocks at f and -f: half of the last axis is enough.
    half = (*spatial[:-1], spatial[-1] // 2 + 1)
    frequencies = lattice(half, weight)  # (F, d)
    step = torch.tensor([2 * math.pi * d / n for d, n in zip(dilation, spatial, strict=True)], dtype=weight.dtype, device=weight.device)

    def transfer(at: Tensor, kernel: Tensor) -> Tensor:
        angle = at @ (taps * step).T  # (F, K)
        phase = torch.complex(angle.cos(), -angle.sin())
        return torch.einsum("goik,fk->fgoi", kernel.to(phase.dtype), phase)

    with torch.no_grad():
        largest = torch.linalg.svdvals(transfer(frequencies, blocks))[..., 0]  # (F, G)
        where = largest.argmax()
        frequency = frequencies.index_select(0, (where // groups)[None])
        group = (where % groups)[None]
        u, _, v = torch.linalg.svd(transfer(frequency, blocks.index_select(0, group))[0, 0], full_matrices=False)
        left, right = u[:, 0].clone(), v[0].clone()
    block = transfer(frequency, blocks.index_select(0, group))[0, 0]  # (out / G, in / G)
    return (left.conj() @ block @ right.conj()).real


@describes(
    Facts(
        name="spectral",
        title="Spectral Normalization",
        paper=Paper(
            authors="Miyato et al.",
            title="Spectral Normalization for Generative Adversarial Networks",
            year=2018,
            venue="ICLR",
            arxiv="1802.05957",
            equation="Eq. 8 and Algorithm 1",
        ),
        family="weight",
        pools="W",
        train_differs=True,
        invariances=frozenset({"per-sample"}),
        reads_writes="0R+0W",
    )
)
def spectral_norm(
    module: nn.Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    coeff: float | None = None,
    method: Method = "reshape",
    input_shape: tuple[int, ...] | None = None,
    per_group: bool = False,
) -> nn.Module:
    r"""Divide a layer's weight by its largest singular value, or bound that value.

    Formula:
        w_bar = W / sigma,  sigma = u^T W v,  u <- W v / ||W v||,  v <- W^T u / ||W^T u||  (once per training forward)

        With ``coeff`` c: w_bar = W / max(1, sigma / c), which leaves the layer alone while sigma <= c. u and v are constants of the
        derivative: the gradient is (G - <G, w_bar> u v^T) / sigma.

    Use it when: a layer must be Lipschitz with a known constant: discriminators of GANs (coeff None), invertible residual networks
        (``coeff`` below 1, ``method="conv"``), robust classifiers.
    Not when: the layer is followed by a norm that divides the scale out again.
    Known trouble: of a convolution, ``method="reshape"`` (the paper's, and torch's) bounds the matrix of one patch, not the operator: its
        norm can be up to sqrt(prod(kernel)) times larger with zero or circular padding (3x3: three times). Power iteration approaches
        sigma from below, so the true norm is slightly above the wanted one. Every access to the weight in training advances u and v;
        ``torch.nn.utils.parametrize.cached()`` computes it once. u and v follow a weight that changes slowly; after a large change by
        hand call ``module.parametrizations.weight[0].restart(module.parametrizations.weight.original)``.

    Args:
        module: the layer. An embedding is normalized as the matrix (num_embeddings, dim); a vector by its length.
        name: its parameter.
        n_power_iterations: iterations per training forward.
        eps: smallest value that W is divided by.
        dim: dimension that becomes the rows of the matrix; None: 1 for transposed convolutions, else 0.
        coeff: bound on sigma; None normalizes it to 1.
        method: "reshape" for the matrix (dim, everything else); "conv" for the convolution with its padding and stride, by power
            iteration through it; "fft" exactly, for circular padding that keeps the size and stride 1 (a singular value decomposition
            per frequency and call: for small maps).
        input_shape: spatial size of the layer's input, for "conv" and "fft".
        per_group: with "reshape" and a grouped convolution, take sigma as the largest over the groups' own matrices, which is the norm of
            the block-diagonal map; the joint matrix over-estimates it.

    Returns:
        The same module. The raw weight is ``parametrizations.<name>.original``; buffers ``parametrizations.<name>.0._u`` and ``_v``
        (names and shapes of torch for "reshape"; feature maps for "conv"), float32 in half-precision modules, as is the computation.

    Raises:
        ValueError: an argument out of range, ``input_shape`` missing or of the wrong length, a method that does not fit the layer, no such
            parameter, or already registered.
        TypeError: the parameter is not real floating point.

    Example:
        >>> import torch, equinorm
        >>> layer = equinorm.spectral_norm(torch.nn.Linear(20, 30), n_power_iterations=30)
        >>> for _ in range(10):
        ...     _ = layer(torch.randn(2, 20))
        >>> round(torch.linalg.svdvals(layer.weight)[0].item(), 3)
        1.0

    Source: Miyato et al., 2018, arXiv:1802.05957. "conv": Gouk et al., 2018, arXiv:1804.04368, and Behrmann et al., 2019, arXiv:1811.00995
        (the soft coefficient); "fft": Sedghi, Gupta and Long, 2019, arXiv:1805.10408. The order of the two updates and the 15 iterations
        at registration are torch's. The authors' Chainer code keeps only u and takes one unsaved iteration in evaluation, too; we use
        the stored vectors, as torch does. A zero weight gives zeros, where torch divides by zero; and it keeps u and v, which torch
        turns into zeros for good.
    """
    weight = named_weight("spectral_norm", module, name)
    rows = units_of("spectral_norm", module, name, dim).dim
    if not isinstance(n_power_iterations, int) or n_power_iterations < 1:
        raise ValueError(f"spectral_norm: n_power_iterations must be an integer of at least 1, got {n_power_iterations!r}")
    if not eps > 0:
        raise ValueError(f"spectral_norm: eps must be positive, got {eps}")
    if coeff is not None and not coeff > 0:
        raise ValueError(f"spectral_norm: coeff must be positive, or None to normalize to 1; got {coeff}")
    if method not in get_args(Method):
        raise ValueError(f"spectral_norm: method must be one of {', '.join(get_args(Method))}, got {method!r}")
    if method == "reshape":
        if input_shape is not None:
            raise ValueError(f'spectral_norm: input_shape is for method "conv" and "fft"; leave it out for "reshape", got {input_shape}')
        groups = _groups(module) if per_group else None
        if weight.ndim == 1:
            register("spectral_norm", module, name, _ExactSpectralNorm(length, coeff, eps))
        else:
            operator = MatrixOperator(rows, groups)
            register("spectral_norm", module, name, _SpectralNorm(operator, weight, n_power_iterations, coeff, eps))
        return module
    if per_group:
        raise ValueError(f'spectral_norm: per_group is for method "reshape"; {method!r} sees the groups of the convolution by itself')
    if not isinstance(module, _ConvNd) or name != "weight":
        raise ValueError(f"spectral_norm: method {method!r} needs the weight of a convolution, got {type(module).__name__}.{name}")
    spatial = _spatial(module, method, input_shape)
    if method == "fft":
        _check_circular(module)
        sigma = partial(circular_norm, spatial=spatial, dilation=module.dilation, groups=module.groups)
        register("spectral_norm", module, name, _ExactSpectralNorm(sigma, coeff, eps))
        return module
    operator = ConvTransposeOperator(module, spatial) if isinstance(module, _ConvTransposeNd) else ConvOperator(module, spatial)
    if any(n < 1 for n in operator.sizes(weight)[0]):
        raise ValueError(
            f"spectral_norm: input_shape must be large enough for the layer to have an output, got {spatial} for a kernel of size "
            f"{module.kernel_size}"
        )
    register("spectral_norm", module, name, _SpectralNorm(operator, weight, n_power_iterations, coeff, eps))
    return module


def _groups(module: nn.Module) -> int:
    if not isinstance(module, _ConvNd):
        raise ValueError(f"spectral_norm: per_group needs a convolution, got {type(module).__name__}")
    return module.groups


def _spatial(module: _ConvNd, method: str, input_shape: tuple[int, ...] | None) -> tuple[int, ...]:
    wanted = len(module.kernel_size)
    if input_shape is None or len(input_shape) != wanted or not all(isinstance(n, int) and n > 0 for n in input_shape):
        raise ValueError(
            f'spectral_norm: method "{method}" needs input_shape, the {wanted} spatial sizes of the input of {type(module).__name__} '
            f"(without batch and channels), got {input_shape}"
        )
    return tuple(input_shape)


def _check_circular(module: _ConvNd) -> None:
    keeps = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    pads = module._reversed_padding_repeated_twice
    total = [pads[2 * d] + pads[2 * d + 1] for d in reversed(range(len(keeps)))]
    if isinstance(module, _ConvTransposeNd) or module.padding_mode != "circular" or set(module.stride) != {1} or total != keeps:
        raise ValueError(
            'spectral_norm: method "fft" is exact only for a convolution of stride 1 with padding_mode="circular" and padding="same", got '
            f'{module}; use method="conv" for any other'
        )
