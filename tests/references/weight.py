"""Weight norms retyped from their papers in float64, one output unit at a time, importing nothing of the library.

``units_of(shape, ...)`` lists by loops which entries belong to one output unit; every rule below takes one such unit as a vector.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

Index = tuple[int, ...]


def units_of(shape: torch.Size | tuple[int, ...], transposed: bool = False, groups: int = 1) -> list[list[Index]]:
    """For every output unit, the indices of its weights in a tensor of this shape, in (input, *kernel) order."""
    kernel = list(itertools.product(*(range(k) for k in shape[2:])))
    if not transposed:
        return [[(o, i, *k) for i in range(shape[1]) for k in kernel] for o in range(shape[0])]
    inputs = shape[0] // groups
    return [[(g * inputs + i, o, *k) for i in range(inputs) for k in kernel] for g in range(groups) for o in range(shape[1])]


def per_unit(weight: Tensor, rule: Callable[[Tensor], Tensor], transposed: bool = False, groups: int = 1) -> Tensor:
    """``rule`` applied to the vector of weights of every output unit; differentiable."""
    result = weight.new_zeros(weight.shape)
    for unit in units_of(weight.shape, transposed, groups):
        where = tuple(torch.tensor(column) for column in zip(*unit, strict=True))
        result = result.index_put(where, rule(weight[where]))
    return result


def standardize(w: Tensor, eps: float, unbiased: bool, eps_mode: str) -> Tensor:
    """Qiao et al. 2019, with the divisors found in published code."""
    mean = sum(w) / len(w)
    var = sum((value - mean) ** 2 for value in w) / (len(w) - 1 if unbiased else len(w))
    divisor = {
        "inside": lambda: (var + eps) ** 0.5,
        "outside": lambda: var**0.5 + eps,
        "clamp": lambda: torch.maximum(var, torch.tensor(eps, dtype=w.dtype)) ** 0.5,
        "relative": lambda: (var + eps * sum(value**2 for value in w) / len(w)) ** 0.5,
    }[eps_mode]()
    return torch.stack([(value - mean) / divisor for value in w])


def weight_norm(v: Tensor, g: Tensor) -> Tensor:
    """Salimans and Kingma 2016, Eq. 2."""
    norm = sum(value**2 for value in v) ** 0.5
    return torch.stack([g * value / norm for value in v])


def weight_norm_gradients(v: Tensor, g: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Salimans and Kingma 2016, Eq. 3: the gradients with respect to g and v."""
    norm = v.square().sum().sqrt()
    grad_g = (upstream * v).sum() / norm
    return grad_g, g / norm * upstream - g * grad_g / norm**2 * v


def cosine(x: Tensor, w: Tensor, centered: bool, eps: float) -> Tensor:
    """Luo et al. 2017, of two vectors, with eps beside the squared lengths."""
    if centered:
        x, w = x - x.sum() / len(x), w - w.sum() / len(w)
    return (x * w).sum() / ((x * x).sum() + eps).sqrt() / ((w * w).sum() + eps).sqrt()


def cosine_conv2d(x: Tensor, weight: Tensor, stride: int, dilation: int, groups: int, centered: bool, eps: float) -> Tensor:
    """Cosine of every filter with every patch of an input that is already padded."""
    n, channels, height, width = x.shape
    out, _, kh, kw = weight.shape
    rows = (height - dilation * (kh - 1) - 1) // stride + 1
    columns = (width - dilation * (kw - 1) - 1) // stride + 1
    y = []
    for sample in range(n):
        for o in range(out):
            first = o // (out // groups) * (channels // groups)
            for r in range(rows):
                for c in range(columns):
                    top, left = r * stride, c * stride
                    patch = x[
                        sample,
                        first : first + channels // groups,
                        top : top + dilation * (kh - 1) + 1 : dilation,
                        left : left + dilation * (kw - 1) + 1 : dilation,
                    ]
                    y.append(cosine(patch.reshape(-1), weight[o].reshape(-1), centered, eps))
    return torch.stack(y).view(n, out, rows, columns)


def scaled_standardize(w: Tensor, gain: Tensor | float, gamma: float, eps: float, eps_mode: str) -> Tensor:
    """Brock, De and Smith 2021, with the authors' clamp ("clamp") or timm's eps ("inside")."""
    mean = sum(w) / len(w)
    var = sum((value - mean) ** 2 for value in w) / len(w)
    if eps_mode == "clamp":
        scale = gain * gamma / torch.maximum(var * len(w), torch.tensor(eps, dtype=w.dtype)) ** 0.5
    else:
        scale = gain * gamma / (len(w) * (var + eps)) ** 0.5
    return torch.stack([(value - mean) * scale for value in w])


def centered_weight(v: Tensor, scale: Tensor | float, eps: float) -> Tensor:
    """Huang et al. 2017."""
    mean = sum(v) / len(v)
    length = sum((value - mean) ** 2 for value in v) ** 0.5
    return torch.stack([scale * (value - mean) / (length + eps) for value in v])


def bjorck(w: Tensor, iterations: int) -> Tensor:
    """Björck and Bowie 1971 at first order: 3/2 W - 1/2 W W^T W, repeated."""
    for _ in range(iterations):
        w = 1.5 * w - 0.5 * w @ w.T @ w
    return w


def forced_weight(v: Tensor, gain: float, eps: float) -> Tensor:
    """Karras et al. 2023, Eq. 47 and 66: unit root mean square, over the root of the fan-in."""
    rms = (sum(value**2 for value in v) / len(v)) ** 0.5
    return torch.stack([gain * value / (eps + rms) / len(v) ** 0.5 for value in v])


def modulated_conv2d(x: Tensor, weight: Tensor, styles: Tensor, demodulate: bool, eps: float) -> Tensor:
    """Karras et al. 2019, Eq. 1 and 3, one sample, one filter and one pixel at a time; the padding keeps the size."""
    n, channels, height, width = x.shape
    out, _, k, _ = weight.shape
    padded = torch.nn.functional.pad(x, (k // 2,) * 4)
    y = []
    for sample in range(n):
        for o in range(out):
            w = torch.stack([styles[sample, i] * weight[o, i] for i in range(channels)])
            if demodulate:
                w = w / (sum((w[i] ** 2).sum() for i in range(channels)) + eps) ** 0.5
            y += [(padded[sample, :, r : r + k, c : c + k] * w).sum() for r in range(height) for c in range(width)]
    return torch.stack(y).view(n, out, height, width)


def upfirdn2d(x: Tensor, f: Tensor, up: int = 1, down: int = 1, before: int = 0, after: int = 0) -> Tensor:
    """Zero insertion, zero padding, true convolution with f, every down-th pixel: one output pixel at a time."""
    n, channels, height, width = x.shape
    size = [height * up + before + after, width * up + before + after]
    canvas = x.new_zeros(n, channels, *size)
    for r in range(height):
        for c in range(width):
            canvas[:, :, before + r * up, before + c * up] = x[:, :, r, c]
    taps = f.shape[0]
    y = [
        [(canvas[:, :, r : r + taps, c : c + taps] * f.flip(0, 1)).sum((2, 3)) for c in range(0, size[1] - taps + 1, down)]
        for r in range(0, size[0] - taps + 1, down)
    ]
    return torch.stack([torch.stack(row, -1) for row in y], -2)


def mean_only_batch(
    x: Tensor, p: dict[str, Tensor], *, training: bool, mask: Tensor | None = None, momentum: float | None = 0.1, **_: object
):
    """Salimans and Kingma 2016, section 4: what the batch's mean leaves, one channel at a time."""
    mask = torch.ones(x.shape[0], *x.shape[2:], dtype=torch.bool) if mask is None else mask
    channels, means = [], []
    for c in range(x.shape[1]):
        mean = x[:, c][mask].sum() / mask.sum() if training else p["running_mean"][c]
        means.append(mean.detach())
        channels.append(torch.where(mask, x[:, c] - mean + (p["bias"][c] if "bias" in p else 0), torch.zeros((), dtype=x.dtype)))
    if not training:
        return torch.stack(channels, 1), {}
    rate = 1 / (p["num_batches_tracked"].item() + 1) if momentum is None else momentum
    moved = (1 - rate) * p["running_mean"] + rate * torch.stack(means)
    return torch.stack(channels, 1), {"running_mean": moved, "num_batches_tracked": p["num_batches_tracked"] + 1}
