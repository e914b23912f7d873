"""Centered weight normalization: every output unit's weights have mean 0 and one common length."""

from __future__ import annotations

from torch import Tensor, nn

from equinorm.facts import Facts, Paper, describes
from equinorm.weight.standardization import centre
from equinorm.weight.units import Units, named_weight, register, units_of, wide


class _CenteredWeightNorm(nn.Module):
    def __init__(self, weight: Tensor, units: Units, scale: float, learnable_scale: bool, eps: float) -> None:
        super().__init__()
        self.units, self.eps = units, eps
        values = weight.detach().new_full((units.count(weight),), scale)
        self.scale = nn.Parameter(values) if learnable_scale else scale

    def forward(self, weight: Tensor) -> Tensor:
        w = self.units.unfold(wide(weight))
        w = centre(w, self.units.within(w))
        w = w / (self.units.norm(w) + self.eps)
        w = w * (self.units.spread(wide(self.scale), w) if isinstance(self.scale, Tensor) else self.scale)
        return self.units.fold(w).to(weight.dtype)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value

    def extra_repr(self) -> str:
        return f"scale={'learned' if isinstance(self.scale, Tensor) else self.scale}, eps={self.eps}"


@describes(
    Facts(
        name="centered_weight",
        title="Centered Weight Normalization",
        paper=Paper(
            authors="Huang et al.",
            title="Centered Weight Normalization in Accelerating Training of Deep Neural Networks",
            year=2017,
            venue="ICCV",
        ),
        family="weight",
        pools="W",
        invariances=frozenset({"weight-scale", "per-sample"}),
        reads_writes="0R+0W",
    )
)
def centered_weight_norm(
    module: nn.Module,
    name: str = "weight",
    scale: float = 2**0.5,
    learnable_scale: bool = False,
    eps: float = 1e-5,
    dim: int | None = None,
) -> nn.Module:
    r"""Give every output unit weights of mean 0 and length ``scale``.

    Formula:
        w = scale * (v - mean(v)) / (||v - mean(v)|| + eps), per output unit

        It is weight standardization times scale / sqrt(fan_in).

    Use it when: a network without norm layers, or with batch norm, is to train faster; with relu and scale sqrt(2) the layer keeps the
        second moment of what the relu received.
    Not when: output units have few weights: depthwise filters lose one of nine degrees of freedom.
    Known trouble: eps is added to the length, so that tiny weights come out shorter than ``scale``.

    Args:
        module: the layer.
        name: its parameter.
        scale: length of every unit's weights.
        learnable_scale: train one scale per output unit, from the given value.
        eps: added to the length.
        dim: dimension that counts the output units; None finds it from the kind of layer.

    Returns:
        The same module; the raw weight is ``parametrizations.<name>.original``, learned scales are ``parametrizations.<name>.0.scale``
        (out,). Half types are computed in float32.

    Raises:
        ValueError: an output unit has a single weight; eps or scale not positive; no such parameter; already registered.
        TypeError: the parameter is not real floating point.

    Example:
        >>> import torch, equinorm
        >>> layer = equinorm.centered_weight_norm(torch.nn.Linear(4, 1), scale=1.0)
        >>> layer.weight = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
        >>> layer.weight.detach()
        tensor([[-0.5345, -0.2673,  0.0000,  0.8018]])

    Source: Huang et al., ICCV 2017. The default scale sqrt(2), a constant, is that of the authors' PyTorch code (their Lua code for
        linear layers uses 1); that code stores a learned scale as (out, 1, 1, 1).
    """
    units = units_of("centered_weight_norm", module, name, dim)
    weight = named_weight("centered_weight_norm", module, name)
    if units.fan_in(weight) < 2:
        raise ValueError(
            f"centered_weight_norm: every output unit must have at least 2 weights, got {units.fan_in(weight)}: subtracting the mean of "
            "one weight leaves 0. Leave this layer as it is, or use weight_norm"
        )
    if not eps > 0:
        raise ValueError(f"centered_weight_norm: eps must be positive, got {eps}")
    if not scale > 0:
        raise ValueError(f"centered_weight_norm: scale must be positive, got {scale}")
    register("centered_weight_norm", module, name, _CenteredWeightNorm(weight, units, scale, learnable_scale, eps))
    return module
