"""Equalized learning rate: weights stored with variance 1 and scaled at every call, so that all layers learn at the same relative speed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from equinorm.facts import Facts, Paper, describes
from equinorm.weight.units import Units, named_weight, register, units_of


def check(method: str, fan_in: int, gain: float, lr_multiplier: float) -> None:
    """Refuse scales that are zero, negative or undefined."""
    if fan_in < 1:
        raise ValueError(f"{method}: every output unit must have at least 1 weight, got {fan_in}")
    if not gain > 0:
        raise ValueError(f"{method}: gain must be positive, got {gain}")
    if not lr_multiplier > 0:
        raise ValueError(f"{method}: lr_multiplier must be positive, got {lr_multiplier}")


class _Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale

    def right_inverse(self, value: Tensor) -> Tensor:
        return value / self.scale

    def extra_repr(self) -> str:
        return f"{self.scale:.6g}"


@describes(
    Facts(
        name="equalized_lr",
        title="Equalized Learning Rate",
        paper=Paper(
            authors="Karras et al.",
            title="Progressive Growing of GANs for Improved Quality, Stability, and Variation",
            year=2018,
            venue="ICLR",
            arxiv="1710.10196",
            equation="section 4.1",
        ),
        family="weight",
        pools="",
        invariances=frozenset({"per-sample"}),
        reads_writes="0R+0W",
    )
)
def equalized_lr(
    module: nn.Module, name: str = "weight", gain: float = 1.0, lr_multiplier: float = 1.0, redraw: bool = False, dim: int | None = None
) -> nn.Module:
    r"""Move a layer's initial scale from its weights into a constant factor: Adam's steps become equally large relative to all weights.

    Formula:
        w = v * lr_multiplier * gain / sqrt(fan_in),  v ~ N(0, 1) / lr_multiplier,  bias = b * lr_multiplier

        v and b are trained. The layer's own weights have standard deviation gain / sqrt(fan_in), as with He's or LeCun's initialisation.

    Use it when: training with Adam or another optimizer whose step does not depend on the gradient's scale: GANs of the ProGAN and StyleGAN
        line.
    Not when: training with plain SGD, where a factor c on the weight multiplies the learning rate by c^2 instead of equalizing it.
    Known trouble: weight decay acts on v.

    Args:
        module: the layer.
        name: its parameter; a ``bias`` beside it follows ``lr_multiplier``.
        gain: wanted standard deviation times sqrt(fan_in).
        lr_multiplier: learning rate relative to other layers (0.01 in StyleGAN's mapping network).
        redraw: draw v from N(0, 1) / lr_multiplier and set the bias to 0. Otherwise the layer's function is kept.
        dim: dimension that counts the output units; None finds it from the kind of layer.

    Returns:
        The same module; v is ``parametrizations.<name>.original``.

    Raises:
        ValueError: gain or lr_multiplier not positive, no such parameter, or already registered.
        TypeError: the parameter is not real floating point.

    Example:
        >>> import torch, equinorm
        >>> layer = equinorm.equalized_lr(torch.nn.Linear(400, 300), redraw=True)
        >>> round(layer.parametrizations.weight.original.std().item(), 1), round(layer.weight.std().item(), 2)
        (1.0, 0.05)

    Source: Karras et al., 2018, arXiv:1710.10196, section 4.1, with gain sqrt(2); StyleGAN2 (arXiv:1912.04958) uses gain 1 and puts sqrt(2)
        on the activation, which differs through the bias. sqrt(2) belongs to relu; exact for a leaky relu of slope 0.2 is
        sqrt(2 / 1.04) = 1.387.
    """
    units = units_of("equalized_lr", module, name, dim)
    fan_in = units.fan_in(named_weight("equalized_lr", module, name))
    check("equalized_lr", fan_in, gain, lr_multiplier)
    register("equalized_lr", module, name, _Scaled(lr_multiplier * gain / fan_in**0.5))
    bias = module._parameters.get("bias")
    if bias is not None and name != "bias" and lr_multiplier != 1:
        register("equalized_lr", module, "bias", _Scaled(lr_multiplier))
    if redraw:
        nn.init.normal_(module.parametrizations[name].original, std=1 / lr_multiplier)  # type: ignore[index, union-attr]
        if bias is not None:
            nn.init.zeros_(bias)
    return module


class _Equalized(nn.Module):
    """Abstract: a layer that scales ``weight`` and ``bias`` at every call."""

    weight: Tensor

    def __init__(self, *args: Any, bias_init: float = 0.0, lr_multiplier: float = 1.0, gain: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        fan_in = Units().fan_in(self.weight)
        check(type(self).__name__, fan_in, gain, lr_multiplier)
        self.gain, self.lr_multiplier = gain, lr_multiplier
        self.weight_scale = lr_multiplier * gain / fan_in**0.5
        nn.init.normal_(self.weight, std=1 / lr_multiplier)
        bias = getattr(self, "bias", None)
        if bias is not None:
            nn.init.constant_(bias, bias_init / lr_multiplier)

    def scaled_bias(self) -> Tensor | None:
        """The bias this layer adds."""
        bias = getattr(self, "bias", None)
        return bias if bias is None or self.lr_multiplier == 1 else bias * self.lr_multiplier

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lr_multiplier={self.lr_multiplier}, gain={self.gain}"


class EqualizedLinear(_Equalized, nn.Linear):
    """Linear layer with equalized learning rate; see :func:`equalized_lr`.

    Args:
        *args: those of :class:`torch.nn.Linear`.
        bias_init: value of the bias at the start.
        lr_multiplier, gain: those of :func:`equalized_lr`.
        **kwargs: those of :class:`torch.nn.Linear`.

    Parameters are ``weight``, N(0, 1) / lr_multiplier, and ``bias``, bias_init / lr_multiplier; both are scaled at every call. (StyleGAN2's
    code stores bias_init undivided, StyleGAN3's divided; they agree at lr_multiplier 1 or bias_init 0.) Shape: ``(*, in_features)`` to
    ``(*, out_features)``.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name, which callers may use as a keyword
        return F.linear(input, self.weight * self.weight_scale, self.scaled_bias())


class EqualizedConv1d(_Equalized, nn.Conv1d):
    """Convolution with equalized learning rate; see :func:`equalized_lr` and :class:`EqualizedLinear`.

    Args:
        *args: those of :class:`torch.nn.Conv1d`.
        bias_init: value of the bias at the start.
        lr_multiplier, gain: those of :func:`equalized_lr`.
        **kwargs: those of :class:`torch.nn.Conv1d`.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name, which callers may use as a keyword
        return self._conv_forward(input, self.weight * self.weight_scale, self.scaled_bias())


class EqualizedConv2d(_Equalized, nn.Conv2d):
    """Convolution with equalized learning rate; see :func:`equalized_lr` and :class:`EqualizedLinear`.

    Args:
        *args: those of :class:`torch.nn.Conv2d`.
        bias_init: value of the bias at the start.
        lr_multiplier, gain: those of :func:`equalized_lr`.
        **kwargs: those of :class:`torch.nn.Conv2d`.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name, which callers may use as a keyword
        return self._conv_forward(input, self.weight * self.weight_scale, self.scaled_bias())


class EqualizedConv3d(_Equalized, nn.Conv3d):
    """Convolution with equalized learning rate; see :func:`equalized_lr` and :class:`EqualizedLinear`.

    Args:
        *args: those of :class:`torch.nn.Conv3d`.
        bias_init: value of the bias at the start.
        lr_multiplier, gain: those of :func:`equalized_lr`.
        **kwargs: those of :class:`torch.nn.Conv3d`.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name, which callers may use as a keyword
        return self._conv_forward(input, self.weight * self.weight_scale, self.scaled_bias())
