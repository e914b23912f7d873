"""Forced weight normalization: magnitude-preserving layers whose weights are kept on the sphere, in the forward and after every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from equinorm.facts import Facts, Paper, describes
from equinorm.weight.units import Units, named_weight, register, units_of, wide


def unit_rms(weight: Tensor, units: Units, eps: float) -> Tensor:
    """The rule: every unit divided by eps plus its root mean square."""
    w = units.unfold(wide(weight))
    return units.fold(w / (eps + units.norm(w) / units.fan_in(weight) ** 0.5))


def check(method: str, fan_in: int, gain: float, eps: float) -> None:
    """Refuse lengths that are zero, negative or undefined."""
    if fan_in < 1:
        raise ValueError(f"{method}: every output unit must have at least 1 weight, got {fan_in}")
    if not gain > 0:
        raise ValueError(f"{method}: gain must be positive, got {gain}")
    if not eps > 0:
        raise ValueError(f"{method}: eps must be positive, got {eps}")


class _ForcedWeightNorm(nn.Module):
    def __init__(self, units: Units, gain: float, eps: float) -> None:
        super().__init__()
        self.units, self.gain, self.eps = units, gain, eps

    def forward(self, weight: Tensor) -> Tensor:
        return (unit_rms(weight, self.units, self.eps) * (self.gain / self.units.fan_in(weight) ** 0.5)).to(weight.dtype)

    def right_inverse(self, value: Tensor) -> Tensor:
        return unit_rms(value, self.units, self.eps).to(value.dtype)

    def extra_repr(self) -> str:
        return f"gain={self.gain}, eps={self.eps}"


@describes(
    Facts(
        name="forced_weight",
        title="Forced Weight Normalization",
        paper=Paper(
            authors="Karras et al.",
            title="Analyzing and Improving the Training Dynamics of Diffusion Models",
            year=2023,
            venue="CVPR 2024",
            arxiv="2312.02696",
            equation="Eq. 47 and 66",
        ),
        family="weight",
        pools="W",
        invariances=frozenset({"weight-scale", "per-sample"}),
        reads_writes="0R+0W",
    )
)
def forced_weight_norm(module: nn.Module, name: str = "weight", gain: float = 1.0, eps: float = 1e-4, dim: int | None = None) -> nn.Module:
    r"""Divide every output unit's weights by their length, so that the layer keeps magnitudes; and keep the stored weights at unit size.

    Formula:
        w = gain * v_hat / sqrt(fan_in),  v_hat = v / (eps + ||v|| / sqrt(fan_in))

        v_hat has root mean square 1, w has length gain. The gradient runs through the division, which projects it onto the tangent. After
        every step v <- v_hat (``project_weights_``), so that weights cannot grow and the learning rate alone says how fast they turn.

    Use it when: a network is built of magnitude-preserving parts (``mp_silu``, ``mp_sum``, ``mp_cat``), as in EDM2; with a decaying
        learning rate and no weight decay.
    Not when: the projection after each step is left out: the effective learning rate then falls as weights grow (plain weight norm).
    Known trouble: eps makes every projection shrink the root mean square to 0.9999.

    Args:
        module: the layer; it should have no bias (append a channel of ones to the network's input instead).
        name: its parameter.
        gain: length of every unit's weights.
        eps: added to the root mean square.
        dim: dimension that counts the output units; None finds it from the kind of layer.

    Returns:
        The same module; v is ``parametrizations.<name>.original``. An assigned weight keeps its direction only. Half types are computed in
        float32.

    Raises:
        ValueError: eps or gain not positive, no such parameter, or already registered.
        TypeError: the parameter is not real floating point.

    Example:
        >>> import torch, equinorm
        >>> model = equinorm.forced_weight_norm(torch.nn.Linear(64, 32, bias=False))
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> handle = equinorm.project_after_step(model, optimizer)
        >>> model(torch.randn(8, 64)).sum().backward()
        >>> optimizer.step()
        >>> round(model.parametrizations.weight.original.square().mean().item(), 3)
        1.0

    Source: Karras et al., 2023, arXiv:2312.02696, Eq. 47 and 66. The authors' code projects inside the training forward, in place, which
        breaks two forwards before one backward, activation checkpointing and accumulation; we project after the optimizer's step.
    """
    units = units_of("forced_weight_norm", module, name, dim)
    fan_in = units.fan_in(named_weight("forced_weight_norm", module, name))
    check("forced_weight_norm", fan_in, gain, eps)
    register("forced_weight_norm", module, name, _ForcedWeightNorm(units, gain, eps))
    return module


@torch.no_grad()
def project_weights_(model: nn.Module) -> int:
    """Bring the stored weights of all layers with forced weight normalization to unit root mean square, in place.

    Args:
        model: contains layers with :func:`forced_weight_norm`, or :class:`MPLinear`, :class:`MPConv2d` and the like.

    Returns:
        How many weights were projected.
    """
    count = 0
    for module in model.modules():
        if isinstance(module, _MagnitudePreserving):
            module.weight.copy_(unit_rms(module.weight, Units(), module.eps))
            count += 1
        for steps in getattr(module, "parametrizations", {}).values():
            first = steps[0]
            if isinstance(first, _ForcedWeightNorm):
                steps.original.copy_(unit_rms(steps.original, first.units, first.eps))
                count += 1
    return count


def project_after_step(model: nn.Module, optimizer: Optimizer) -> RemovableHandle:
    """Call :func:`project_weights_` now and after every step of ``optimizer``.

    Args:
        model: as for :func:`project_weights_`.
        optimizer: trains the model.

    Returns:
        A handle; ``handle.remove()`` ends it.

    Raises:
        ValueError: the model has no weight to project.
    """
    if not project_weights_(model):
        raise ValueError(
            f"project_after_step: {type(model).__name__} must contain a layer with forced_weight_norm, or MPLinear, or MPConv1d to 3d; "
            "found none"
        )

    def project(*_: Any) -> None:
        project_weights_(model)

    return optimizer.register_step_post_hook(project)


class _MagnitudePreserving(nn.Module):
    """Abstract: a layer without bias whose weight, N(0, 1), has forced normalization at every call."""

    weight: Tensor

    def __init__(self, *args: Any, gain: float = 1.0, eps: float = 1e-4, **kwargs: Any) -> None:
        if kwargs.pop("bias", False):
            raise ValueError(f"{type(self).__name__}: a magnitude-preserving layer has no bias; append a channel of ones to the input")
        super().__init__(*args, bias=False, **kwargs)
        check(type(self).__name__, Units().fan_in(self.weight), gain, eps)
        self.gain, self.eps = gain, eps
        nn.init.normal_(self.weight)

    def normalized_weight(self, gain: float | Tensor | None = None) -> Tensor:
        """The weight this layer multiplies by; ``gain`` replaces the layer's own."""
        w = unit_rms(self.weight, Units(), self.eps) * ((self.gain if gain is None else gain) / Units().fan_in(self.weight) ** 0.5)
        return w.to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gain={self.gain}, eps={self.eps}"


class MPLinear(_MagnitudePreserving, nn.Linear):
    """Linear layer that keeps magnitudes: unit second moment in, unit second moment out; see :func:`forced_weight_norm`.

    Args:
        *args: those of :class:`torch.nn.Linear`, except ``bias``: there is none.
        gain, eps: those of :func:`forced_weight_norm`.
        **kwargs: those of :class:`torch.nn.Linear`.

    Shape: ``(*, in_features)`` to ``(*, out_features)``. ``forward`` takes a ``gain`` (a learned scalar, for instance) that replaces the
    layer's own. The parameter ``weight`` is N(0, 1); project it after every step with :func:`project_after_step`.

    Raises:
        ValueError: a bias is asked for, or gain or eps is not positive.
    """

    def forward(self, input: Tensor, gain: float | Tensor | None = None) -> Tensor:  # noqa: A002 - torch's name
        return F.linear(input, self.normalized_weight(gain))


class MPConv1d(_MagnitudePreserving, nn.Conv1d):
    """Convolution that keeps magnitudes; see :class:`MPLinear` and :func:`forced_weight_norm`.

    Args:
        *args: those of :class:`torch.nn.Conv1d`, except ``bias``: there is none.
        gain, eps: those of :func:`forced_weight_norm`.
        **kwargs: those of :class:`torch.nn.Conv1d`.

    Raises:
        ValueError: a bias is asked for, or gain or eps is not positive.
    """

    def forward(self, input: Tensor, gain: float | Tensor | None = None) -> Tensor:  # noqa: A002 - torch's name
        return self._conv_forward(input, self.normalized_weight(gain), None)


class MPConv2d(_MagnitudePreserving, nn.Conv2d):
    """Convolution that keeps magnitudes; see :class:`MPLinear` and :func:`forced_weight_norm`.

    Args:
        *args: those of :class:`torch.nn.Conv2d`, except ``bias``: there is none.
        gain, eps: those of :func:`forced_weight_norm`.
        **kwargs: those of :class:`torch.nn.Conv2d`.

    Raises:
        ValueError: a bias is asked for, or gain or eps is not positive.
    """

    def forward(self, input: Tensor, gain: float | Tensor | None = None) -> Tensor:  # noqa: A002 - torch's name
        return self._conv_forward(input, self.normalized_weight(gain), None)


class MPConv3d(_MagnitudePreserving, nn.Conv3d):
    """Convolution that keeps magnitudes; see :class:`MPLinear` and :func:`forced_weight_norm`.

    Args:
        *args: those of :class:`torch.nn.Conv3d`, except ``bias``: there is none.
        gain, eps: those of :func:`forced_weight_norm`.
        **kwargs: those of :class:`torch.nn.Conv3d`.

    Raises:
        ValueError: a bias is asked for, or gain or eps is not positive.
    """

    def forward(self, input: Tensor, gain: float | Tensor | None = None) -> Tensor:  # noqa: A002 - torch's name
        return self._conv_forward(input, self.normalized_weight(gain), None)
