"""The factor that gives an activation's output variance 1, as networks without norm layers need it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Monte-Carlo estimates that published normalizer-free weights were trained with; up to 1e-3 off.
DEEPMIND = {
    "celu": 1.270926833152771,
    "elu": 1.2716004848480225,
    "gelu": 1.7015043497085571,
    "leaky_relu": 1.70590341091156,
    "logsigmoid": 1.9193484783172607,
    "relu": 1.7139588594436646,
    "relu6": 1.7131484746932983,
    "selu": 1.0008515119552612,
    "sigmoid": 4.803835391998291,
    "silu": 1.7881293296813965,
    "softplus": 1.9203323125839233,
    "softsign": 2.338853120803833,
    "tanh": 1.5939117670059204,
}


def variance_gain(activation: str | Callable[[Tensor], Tensor], preset: Literal["exact", "deepmind"] = "exact") -> float:
    r"""The gain gamma = 1 / std(f(z)), z standard normal: ``gamma * f(z)`` has variance 1.

    This is not He's gain 1 / rms(f(z)), which also counts the mean: standardized weights remove the mean by themselves, so behind them the
    standard deviation is what matters (relu: 1.7129, He: 1.4142).

    Args:
        activation: name of a function in ``torch.nn.functional`` ("relu", "silu", "gelu" ...), or an elementwise function of a tensor.
            It may have kinks and jumps at multiples of 1/1024.
        preset: "exact" integrates numerically, to about 1e-9; "deepmind" returns the constant of the published normalizer-free networks,
            which is a Monte-Carlo estimate, to run their weights as they were trained.

    Returns:
        The gain.

    Raises:
        ValueError: unknown name, no such preset, or the activation is constant, undefined or not elementwise.

    Example:
        >>> import torch, equinorm
        >>> round(equinorm.variance_gain("relu"), 6)
        1.712859
        >>> round(equinorm.variance_gain(lambda x: 2 * x), 6)
        0.5

    Source: Brock, De and Smith, 2021, arXiv:2101.08692, section 4; the published constants are in the authors' code.
    """
    if preset == "deepmind":
        if not isinstance(activation, str) or activation not in DEEPMIND:
            raise ValueError(f'variance_gain: preset "deepmind" has constants for {", ".join(DEEPMIND)}; got {activation!r}')
        return DEEPMIND[activation]
    if preset != "exact":
        raise ValueError(f'variance_gain: preset must be "exact" or "deepmind", got {preset!r}')
    f = activation
    if isinstance(f, str):
        f = getattr(F, f, None)
        if f is None:
            raise ValueError(f"variance_gain: activation must be a function of torch.nn.functional, got {activation!r}")
    # Gauss-Legendre with 3 nodes in each of 2 * 12 * 1024 cells: kinks of all usual activations lie between cells, not inside one.
    edge, cells = 12, 2 * 12 * 1024
    nodes = torch.tensor([-math.sqrt(0.6), 0.0, math.sqrt(0.6)], dtype=torch.float64)
    weights = torch.tensor([5 / 18, 8 / 18, 5 / 18], dtype=torch.float64)
    centres = (torch.arange(cells, dtype=torch.float64) + 0.5) / 1024 - edge
    z = (centres[:, None] + nodes / 2048).flatten()
    density = (weights / 1024).repeat(cells) * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    with torch.no_grad():
        y = f(z)
    if not isinstance(y, Tensor) or y.shape != z.shape:
        raise ValueError("variance_gain: activation must be elementwise: one tensor of the shape of its input")
    mean = (y * density).sum()
    variance = ((y - mean).square() * density).sum().item()
    if not 1e-24 < variance < math.inf:
        raise ValueError(
            f"variance_gain: the activation's output must vary and be finite for inputs within +-{edge}, got variance {variance:.3g}"
        )
    return variance**-0.5


class ScaledActivation(nn.Module):
    """An activation times its :func:`variance_gain`: standard normal input gives variance 1.

    Args:
        activation: as for :func:`variance_gain`.
        preset: as for :func:`variance_gain`.

    Shape: any, elementwise.

    Raises:
        ValueError: as :func:`variance_gain`.

    Example:
        >>> import torch, equinorm
        >>> equinorm.ScaledActivation("relu")(torch.tensor([-1.0, 1.0]))
        tensor([0.0000, 1.7129])
    """

    def __init__(self, activation: str | Callable[[Tensor], Tensor], preset: Literal["exact", "deepmind"] = "exact") -> None:
        super().__init__()
        self.gain = variance_gain(activation, preset)
        self.activation: Callable[[Tensor], Tensor] = getattr(F, activation) if isinstance(activation, str) else activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x) * self.gain

    def extra_repr(self) -> str:
        return f"{getattr(self.activation, '__name__', self.activation)}, gain={self.gain:.6f}"
