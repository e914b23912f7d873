"""Scaled weight standardization: standardized weights over sqrt(fan_in), with a learned gain; variance in, variance out."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from equinorm.facts import Facts, Paper, describes
from equinorm.weight.standardization import centre
from equinorm.weight.units import Units, named_weight, register, units_of, wide

ScaledEpsMode = Literal["clamp", "inside"]


def scaled_standardized(weight: Tensor, gain: Tensor | None, units: Units, gamma: float, eps: float, eps_mode: ScaledEpsMode) -> Tensor:
    """The rule: ``gain * gamma * (W - mean) / sqrt(max(var * fan_in, eps))`` per output unit."""
    w = units.unfold(wide(weight))
    within, fan_in = units.within(w), units.fan_in(weight)
    centred = centre(w, within)
    total = centred.square().sum(within, keepdim=True)  # var * fan_in
    size = total.clamp(min=eps) if eps_mode == "clamp" else total + eps * fan_in
    w = centred * (gamma * size.rsqrt())
    if gain is not None:
        w = w * units.spread(wide(gain), w)
    return units.fold(w).to(weight.dtype)


def check(method: str, fan_in: int, gamma: float, eps: float, eps_mode: str) -> None:
    """Refuse what would give a constant or undefined weight."""
    if fan_in < 2:
        raise ValueError(
            f"{method}: every output unit must have at least 2 weights, got {fan_in}: subtracting the mean of one weight leaves 0. "
            "Leave this layer as it is, or use weight_norm"
        )
    if not eps > 0:
        raise ValueError(f"{method}: eps must be positive, got {eps}")
    if not gamma > 0:
        raise ValueError(f"{method}: gamma must be positive, got {gamma}")
    if eps_mode not in ("clamp", "inside"):
        raise ValueError(f"{method}: eps_mode must be clamp or inside, got {eps_mode!r}")


class _ScaledWeightStandardization(nn.Module):
    def __init__(self, weight: Tensor, units: Units, gain: float | None, gamma: float, eps: float, eps_mode: ScaledEpsMode) -> None:
        super().__init__()
        self.units, self.gamma, self.eps = units, gamma, eps
        self.eps_mode: ScaledEpsMode = eps_mode
        self.gain = None if gain is None else nn.Parameter(weight.detach().new_full((units.count(weight),), gain))

    def forward(self, weight: Tensor) -> Tensor:
        return scaled_standardized(weight, self.gain, self.units, self.gamma, self.eps, self.eps_mode)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value

    def extra_repr(self) -> str:
        return f"gain={self.gain is not None}, gamma={self.gamma}, eps={self.eps}, eps_mode={self.eps_mode!r}"


@describes(
    Facts(
        name="scaled_weight_standardization",
        title="Scaled Weight Standardization",
        paper=Paper(
            authors="Brock, De and Smith",
            title="Characterizing signal propagation to close the performance gap in unnormalized ResNets",
            year=2021,
            venue="ICLR",
            arxiv="2101.08692",
        ),
        family="weight",
        pools="W",
        invariances=frozenset({"weight-scale", "per-sample"}),
        reads_writes="0R+0W",
    )
)
def scaled_weight_standardization(
    module: nn.Module,
    name: str = "weight",
    gain: float | None = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-4,
    eps_mode: ScaledEpsMode = "clamp",
    dim: int | None = None,
) -> nn.Module:
    r"""Give every output unit weights of mean 0 and length ``gain``, so that the layer keeps the variance of its input.

    Formula:
        w_hat[i, j] = gain[i] * gamma * (w[i, j] - mean_j w[i, j]) / sqrt(max(fan_in * var_j w[i, j], eps))

        gain is learned, one value per output unit. gamma is constant; it may undo an activation's loss of variance, although the authors
        (and ``ScaledActivation``) put that factor on the activation.

    Use it when: a residual network is to train without norm layers, with ``ScaledActivation`` and scaled residual branches; together with
        ``AdaptiveGradientClip`` at large batches.
    Not when: a norm layer follows: plain ``weight_standardization`` does.
    Known trouble: a filter whose sum of squares is below eps (zeros at initialisation) is not brought to its length. Clip the gain's
        gradient as one vector, not per element.

    Args:
        module: the layer.
        name: its parameter.
        gain: initial value of the learned gains; None for none.
        gamma: constant factor.
        eps: see ``eps_mode``.
        eps_mode: "clamp" divides by ``sqrt(max(fan_in * var, eps))``, "inside" by ``sqrt(fan_in * (var + eps))``.
        dim: dimension that counts the output units; None finds it from the kind of layer.

    Returns:
        The same module; the raw weight is ``parametrizations.<name>.original``, the gains ``parametrizations.<name>.0.gain`` (out,).
        Half types are computed in float32.

    Raises:
        ValueError: an output unit has a single weight; eps or gamma not positive; unknown ``eps_mode``; no such parameter; already
            registered.
        TypeError: the parameter is not real floating point.

    Example:
        >>> import torch, equinorm
        >>> layer = equinorm.scaled_weight_standardization(torch.nn.Linear(256, 64))
        >>> layer.weight.norm(dim=1).allclose(torch.ones(64))
        True

    Source: Brock, De and Smith, 2021, arXiv:2101.08692, with the clamp and the gain of the authors' code. timm adds 1e-6 to the
        variance and folds the activation's factor into the weight: ``eps=1e-6, eps_mode="inside"``, gamma =
        ``variance_gain("silu", "deepmind")``.
    """
    units = units_of("scaled_weight_standardization", module, name, dim)
    weight = named_weight("scaled_weight_standardization", module, name)
    check("scaled_weight_standardization", units.fan_in(weight), gamma, eps, eps_mode)
    parametrization = _ScaledWeightStandardization(weight, units, gain, gamma, eps, eps_mode)
    register("scaled_weight_standardization", module, name, parametrization)
    return module


class _ScaledStandardized(nn.Module):
    """Abstract: a layer with ``weight``, ``gain`` (out,) and ``bias`` that standardizes and scales its weight at every call."""

    weight: Tensor

    def __init__(
        self,
        *args: Any,
        gain: float = 1.0,
        gamma: float = 1.0,
        eps: float = 1e-4,
        eps_mode: ScaledEpsMode = "clamp",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check(type(self).__name__, Units().fan_in(self.weight), gamma, eps, eps_mode)
        self.gamma, self.eps = gamma, eps
        self.eps_mode: ScaledEpsMode = eps_mode
        self.gain = nn.Parameter(self.weight.detach().new_full((len(self.weight),), gain))
        bias = getattr(self, "bias", None)
        if bias is not None:
            nn.init.zeros_(bias)

    def standardized_weight(self) -> Tensor:
        """The weight this layer multiplies by."""
        return scaled_standardized(self.weight, self.gain, Units(), self.gamma, self.eps, self.eps_mode)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        gain = state_dict.get(f"{prefix}gain")
        if gain is not None and gain.numel() == self.gain.numel():
            state_dict[f"{prefix}gain"] = gain.reshape(-1)  # timm stores (out, 1, 1, 1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gamma={self.gamma}, eps={self.eps}, eps_mode={self.eps_mode!r}"


class ScaledWSLinear(_ScaledStandardized, nn.Linear):
    """Linear layer with scaled standardized weights; see :func:`scaled_weight_standardization`.

    Args:
        *args: those of :class:`torch.nn.Linear`.
        gain, gamma, eps, eps_mode: those of :func:`scaled_weight_standardization`.
        **kwargs: those of :class:`torch.nn.Linear`.

    Parameters are ``weight``, ``gain`` (out,) and ``bias`` (zeros). Shape: ``(*, in_features)`` to ``(*, out_features)``.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name, which callers may use as a keyword
        return F.linear(input, self.standardized_weight(), self.bias)


class ScaledWSConv1d(_ScaledStandardized, nn.Conv1d):
    """Convolution with scaled standardized filters; see :func:`scaled_weight_standardization`.

    Args:
        *args: those of :class:`torch.nn.Conv1d`.
        gain, gamma, eps, eps_mode: those of :func:`scaled_weight_standardization`.
        **kwargs: those of :class:`torch.nn.Conv1d`.

    Parameters are ``weight``, ``gain`` (out,) and ``bias`` (zeros).
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name, which callers may use as a keyword
        return self._conv_forward(input, self.standardized_weight(), self.bias)


class ScaledWSConv2d(_ScaledStandardized, nn.Conv2d):
    """Convolution with scaled standardized filters; see :func:`scaled_weight_standardization`.

    Args:
        *args: those of :class:`torch.nn.Conv2d`.
        gain, gamma, eps, eps_mode: those of :func:`scaled_weight_standardization`.
        **kwargs: those of :class:`torch.nn.Conv2d`.

    Parameters are ``weight``, ``gain`` (out,) and ``bias`` (zeros).
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name, which callers may use as a keyword
        return self._conv_forward(input, self.standardized_weight(), self.bias)


class ScaledWSConv3d(_ScaledStandardized, nn.Conv3d):
    """Convolution with scaled standardized filters; see :func:`scaled_weight_standardization`.

    Args:
        *args: those of :class:`torch.nn.Conv3d`.
        gain, gamma, eps, eps_mode: those of :func:`scaled_weight_standardization`.
        **kwargs: those of :class:`torch.nn.Conv3d`.

    Parameters are ``weight``, ``gain`` (out,) and ``bias`` (zeros).
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name, which callers may use as a keyword
        return self._conv_forward(input, self.standardized_weight(), self.bias)
