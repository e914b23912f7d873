"""Weight standardization: every output unit's weights get mean 0 and variance 1."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equinorm.facts import Facts, Paper, describes
from equinorm.weight.units import Units, register, safe_sqrt, units_of, wide

EpsMode = Literal["inside", "outside", "clamp", "relative"]


def centre(unfolded: Tensor, within: tuple[int, ...]) -> Tensor:
    """``unfolded`` minus the mean of every unit; the second pass removes what rounding the first mean left behind."""
    centred = unfolded - unfolded.mean(within, keepdim=True)
    # Without gradient: that of centring twice is that of centring once.
    return centred - centred.detach().mean(within, keepdim=True)


def standardized(weight: Tensor, units: Units, eps: float, unbiased: bool, eps_mode: EpsMode) -> Tensor:
    """The rule: ``(W - mean) / sqrt(var + eps)`` per output unit, in the variants of ``eps_mode``."""
    w = units.unfold(wide(weight))
    within, fan_in = units.within(w), units.fan_in(weight)
    centred = centre(w, within)
    var = centred.square().sum(within, keepdim=True) / (fan_in - unbiased)
    if eps_mode == "inside":
        std = (var + eps).sqrt()
    elif eps_mode == "outside":
        std = safe_sqrt(var) + eps
    elif eps_mode == "clamp":
        std = var.clamp(min=eps).sqrt()
    else:
        size = var + eps * w.square().mean(within, keepdim=True)
        std = torch.where(size > 0, size, 1).sqrt()  # only an all-zero unit has size 0
    return units.fold(centred / std).to(weight.dtype)


def check(method: str, fan_in: int, eps: float, eps_mode: str) -> None:
    """Refuse what would give a constant or undefined weight."""
    if fan_in < 2:
        raise ValueError(
            f"{method}: every output unit must have at least 2 weights, got {fan_in}: subtracting the mean of one weight leaves 0. "
            "Leave this layer as it is, or use weight_norm"
        )
    if not eps > 0:
        raise ValueError(f"{method}: eps must be positive, got {eps}")
    if eps_mode not in get_args(EpsMode):
        raise ValueError(f"{method}: eps_mode must be one of {', '.join(get_args(EpsMode))}, got {eps_mode!r}")


class _WeightStandardization(nn.Module):
    def __init__(self, units: Units, eps: float, unbiased: bool, eps_mode: EpsMode) -> None:
        super().__init__()
        self.units, self.eps, self.unbiased = units, eps, unbiased
        self.eps_mode: EpsMode = eps_mode

    def forward(self, weight: Tensor) -> Tensor:
        return standardized(weight, self.units, self.eps, self.unbiased, self.eps_mode)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value

    def extra_repr(self) -> str:
        return f"eps={self.eps}, unbiased={self.unbiased}, eps_mode={self.eps_mode!r}"


@describes(
    Facts(
        name="weight_standardization",
        title="Weight Standardization",
        paper=Paper(
            authors="Qiao et al.",
            title="Micro-Batch Training with Batch-Channel Normalization and Weight Standardization",
            year=2019,
            arxiv="1903.10520",
        ),
        family="weight",
        pools="W",
        invariances=frozenset({"weight-scale", "per-sample"}),
        reads_writes="0R+0W",
    )
)
def weight_standardization(
    module: nn.Module,
    name: str = "weight",
    eps: float = 1e-6,
    unbiased: bool = False,
    eps_mode: EpsMode = "inside",
    dim: int | None = None,
) -> nn.Module:
    r"""Give every output unit of a layer weights of mean 0 and variance 1.

    Formula:
        w_hat[i, j] = (w[i, j] - mean_j w[i, j]) / sqrt(var_j w[i, j] + eps)

        i is an output unit (a row, a filter), j runs over its fan_in = in / groups * prod(kernel) weights. The gradient flows through mean
        and variance. There is no affine part: a norm layer follows. The layer's bias stays as it is.

    Use it when: the batch is so small that batch norm fails; with group norm or batch-channel norm after the layer.
    Not when: nothing rescales the output afterwards. The output grows with sqrt(fan_in); ``scaled_weight_standardization`` divides by it.
    Known trouble: eps inside the root is not negligible for small weights: at a weight std of 0.001, eps 1e-6 gives a std of 0.71, not 1,
        so the scale invariance is lost. ``eps_mode="relative"`` and ``"clamp"`` keep it. Depthwise 3x3 filters lose one of nine degrees of
        freedom. A constant filter (zeros at initialisation) gives zero output and 1 / sqrt(eps) times the centred upstream gradient.

    Args:
        module: the layer. Transposed convolutions are standardized over what one output channel sees (dimension 1, per group).
        name: its parameter.
        eps: see ``eps_mode``.
        unbiased: divide the sum of squares by ``fan_in - 1`` instead of ``fan_in``; differs by 6 % at fan_in 9. For published weights.
        eps_mode: the divisor is ``sqrt(var + eps)`` for "inside", ``sqrt(var) + eps`` for "outside", ``sqrt(max(var, eps))`` for "clamp",
            ``sqrt(var + eps * mean(w**2))`` for "relative".
        dim: dimension that counts the output units; None finds it from the kind of layer.

    Returns:
        The same module, with ``module.<name>`` computed from ``module.parametrizations.<name>.original``; half types are computed in
        float32. ``torch.nn.utils.parametrize.remove_parametrizations(module, name)`` bakes the result in.

    Raises:
        ValueError: an output unit has a single weight; eps is not positive; unknown ``eps_mode``; no such parameter; already registered.
        TypeError: the parameter is not real floating point.

    Example:
        >>> import torch, equinorm
        >>> layer = equinorm.weight_standardization(torch.nn.Linear(4, 1))
        >>> layer.weight = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
        >>> layer.weight.detach()
        tensor([[-1.0690, -0.5345,  0.0000,  1.6036]])

    Source: Qiao et al., 2019, arXiv:1903.10520. The published codes disagree: the authors' readme adds 1e-5 to the unbiased std
        (``unbiased=True, eps_mode="outside", eps=1e-5``), their batch-channel code adds it to the unbiased variance (``unbiased=True,
        eps=1e-5``), timm uses the biased variance with 1e-6 (the default here, which is also the paper's formula).
    """
    units = units_of("weight_standardization", module, name, dim)
    check("weight_standardization", units.fan_in(getattr(module, name)), eps, eps_mode)
    register("weight_standardization", module, name, _WeightStandardization(units, eps, unbiased, eps_mode))
    return module


class _Standardized(nn.Module):
    """Abstract: a layer that standardizes its ``weight`` at every call, so that its state dict stays that of the plain layer."""

    weight: Tensor

    def __init__(self, *args: Any, eps: float = 1e-6, unbiased: bool = False, eps_mode: EpsMode = "inside", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check(type(self).__name__, Units().fan_in(self.weight), eps, eps_mode)
        self.eps, self.unbiased = eps, unbiased
        self.eps_mode: EpsMode = eps_mode

    def standardized_weight(self) -> Tensor:
        """The weight this layer multiplies by."""
        return standardized(self.weight, Units(), self.eps, self.unbiased, self.eps_mode)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}, unbiased={self.unbiased}, eps_mode={self.eps_mode!r}"


class WSLinear(_Standardized, nn.Linear):
    """Linear layer with standardized weights and the state dict of :class:`torch.nn.Linear`; see :func:`weight_standardization`.

    Args:
        *args: those of :class:`torch.nn.Linear`.
        eps, unbiased, eps_mode: those of :func:`weight_standardization`.
        **kwargs: those of :class:`torch.nn.Linear`.

    Shape: ``(*, in_features)`` to ``(*, out_features)``.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name, which callers may use as a keyword
        return F.linear(input, self.standardized_weight(), self.bias)


class WSConv1d(_Standardized, nn.Conv1d):
    """Convolution with standardized filters and the state dict of :class:`torch.nn.Conv1d`; see :func:`weight_standardization`.

    Args:
        *args: those of :class:`torch.nn.Conv1d`.
        eps, unbiased, eps_mode: those of :func:`weight_standardization`.
        **kwargs: those of :class:`torch.nn.Conv1d`.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name, which callers may use as a keyword
        return self._conv_forward(input, self.standardized_weight(), self.bias)


class WSConv2d(_Standardized, nn.Conv2d):
    """Convolution with standardized filters and the state dict of :class:`torch.nn.Conv2d`; see :func:`weight_standardization`.

    Args:
        *args: those of :class:`torch.nn.Conv2d`.
        eps, unbiased, eps_mode: those of :func:`weight_standardization`.
        **kwargs: those of :class:`torch.nn.Conv2d`.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name, which callers may use as a keyword
        return self._conv_forward(input, self.standardized_weight(), self.bias)


class WSConv3d(_Standardized, nn.Conv3d):
    """Convolution with standardized filters and the state dict of :class:`torch.nn.Conv3d`; see :func:`weight_standardization`.

    Args:
        *args: those of :class:`torch.nn.Conv3d`.
        eps, unbiased, eps_mode: those of :func:`weight_standardization`.
        **kwargs: those of :class:`torch.nn.Conv3d`.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name, which callers may use as a keyword
        return self._conv_forward(input, self.standardized_weight(), self.bias)
