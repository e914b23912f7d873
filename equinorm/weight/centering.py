"""Weight centring: every output unit's weights get mean 0, and keep their scale."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from equinorm.facts import Facts, Paper, describes
from equinorm.weight.standardization import centre
from equinorm.weight.units import Units, register, units_of, wide


def centered(weight: Tensor, units: Units) -> Tensor:
    """The rule: ``W - mean`` per output unit."""
    w = units.unfold(wide(weight))
    return units.fold(centre(w, units.within(w))).to(weight.dtype)


def check(method: str, fan_in: int) -> None:
    """Refuse weights that centring would make 0."""
    if fan_in < 2:
        raise ValueError(
            f"{method}: every output unit must have at least 2 weights, got {fan_in}: subtracting the mean of one weight leaves 0. "
            "Leave this layer as it is"
        )


class _WeightCentering(nn.Module):
    def __init__(self, units: Units) -> None:
        super().__init__()
        self.units = units

    def forward(self, weight: Tensor) -> Tensor:
        return centered(weight, self.units)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value


@describes(
    Facts(
        name="weight_centering",
        title="Weight Centralization",
        paper=Paper(
            authors="Yan et al.",
            title="Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization",
            year=2020,
            venue="ICLR",
            arxiv="2001.06838",
        ),
        family="weight",
        pools="W",
        invariances=frozenset({"per-sample"}),
        reads_writes="0R+0W",
    )
)
def weight_centering(module: nn.Module, name: str = "weight", dim: int | None = None) -> nn.Module:
    r"""Subtract the mean of every output unit's weights.

    Formula:
        w_hat[i, j] = w[i, j] - mean_j w[i, j]

        i is an output unit (a row, a filter), j runs over its fan_in = in / groups * prod(kernel) weights. The gradient flows through the
        mean, so that the stored weight's gradient has mean 0 too.

    Use it when: ``MovingAverageBatchNorm`` follows, which subtracts no mean of its own: where the inputs of a unit share one mean, centred
        weights remove it.
    Not when: a norm that subtracts the mean follows, or units have few weights; a depthwise 3x3 filter loses one of nine degrees of
        freedom.
    Known trouble: the outputs have mean 0 only as far as the inputs of a unit have equal means; zero padding is another input.

    Args:
        module: the layer. Transposed convolutions are centred over what one output channel sees (dimension 1, per group).
        name: its parameter.
        dim: dimension that counts the output units; None finds it from the kind of layer.

    Returns:
        The same module, with ``module.<name>`` computed from ``module.parametrizations.<name>.original``; half types are computed in
        float32. ``torch.nn.utils.parametrize.remove_parametrizations(module, name)`` bakes the result in.

    Raises:
        ValueError: an output unit has a single weight; no such parameter; already registered.
        TypeError: the parameter is not real floating point.

    Example:
        >>> import torch, equinorm
        >>> layer = equinorm.weight_centering(torch.nn.Linear(3, 1))
        >>> layer.weight = torch.tensor([[1.0, 2.0, 6.0]])
        >>> layer.weight.detach()
        tensor([[-2., -1.,  3.]])

    Source: Yan et al. 2020, section 3.3, where the layer is called CenConv; ``CenConv1d``, ``CenConv2d`` and ``CenConv3d`` are this.
    """
    units = units_of("weight_centering", module, name, dim)
    check("weight_centering", units.fan_in(getattr(module, name)))
    register("weight_centering", module, name, _WeightCentering(units))
    return module


class _Centered(_ConvNd):
    """Abstract: a convolution that centres its ``weight`` at every call, so that its state dict stays that of the plain layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check(type(self).__name__, Units().fan_in(self.weight))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name, which callers may use as a keyword
        return self._conv_forward(input, centered(self.weight, Units()), self.bias)


class CenConv1d(_Centered, nn.Conv1d):
    """Convolution with centred filters and the state dict of :class:`torch.nn.Conv1d`; see :func:`weight_centering`.

    Arguments and initialisation are those of :class:`torch.nn.Conv1d`. Raises ValueError for filters of a single weight.
    """


class CenConv2d(_Centered, nn.Conv2d):
    """Convolution with centred filters and the state dict of :class:`torch.nn.Conv2d`; see :func:`weight_centering`.

    Arguments and initialisation are those of :class:`torch.nn.Conv2d`. Raises ValueError for filters of a single weight.
    """


class CenConv3d(_Centered, nn.Conv3d):
    """Convolution with centred filters and the state dict of :class:`torch.nn.Conv3d`; see :func:`weight_centering`.

    Arguments and initialisation are those of :class:`torch.nn.Conv3d`. Raises ValueError for filters of a single weight.
    """
