"""The factor that gives an activation's output variance 1, as networks without norm layers need it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from equinorm.kernels.activations import find

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


def variance_gain(activation: str | nn.Module | Callable[[Tensor], Tensor], preset: Literal["exact", "deepmind"] = "exact") -> float:
    r"""The gain gamma = 1 / std(f(z)), z standard normal: ``gamma * f(z)`` has variance 1.

    This is not He's gain 1 / rms(f(z)), which also counts the mean: standardized weights remove the mean by themselves, so behind them the
    standard deviation is what matters (relu: 1.7129, He: 1.4142).

    Args:
        activation: name of a function in ``torch.nn.functional`` ("relu", "silu", "gelu" ...), a module such as ``nn.LeakyReLU(0.2)``, or
            an elementwise function of a tensor. It may have kinks and jumps at multiples of 1/1024.
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
    return find(activation).variance_gain


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

    def __init__(self, activation: str | nn.Module | Callable[[Tensor], Tensor], preset: Literal["exact", "deepmind"] = "exact") -> None:
        super().__init__()
        self.gain = variance_gain(activation, preset)
        found = find(activation)
        self.activation: Callable[[Tensor], Tensor] = found.function if isinstance(activation, str) else activation
        self.name = found.name

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x) * self.gain

    def extra_repr(self) -> str:
        return f"{self.name}, gain={self.gain:.6f}"
