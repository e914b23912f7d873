"""Linear layers that can take a norm in: read with the weight that they multiply by, written as a plain layer of torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode

from equinorm.surgery.kinds import parametrized
from equinorm.surgery.places import plain_class

PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CALLS = {
    F.linear: nn.Linear,
    F.conv1d: nn.Conv1d,
    F.conv2d: nn.Conv2d,
    F.conv3d: nn.Conv3d,
    F.conv_transpose1d: nn.ConvTranspose1d,
    F.conv_transpose2d: nn.ConvTranspose2d,
    F.conv_transpose3d: nn.ConvTranspose3d,
}
GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode", "output_padding")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer or convolution of torch, or a subclass, which may make its weight in its own way."""
    return isinstance(module, PLAIN)


@dataclass
class Linear:
    """The map of a linear layer, in float64, while norms are folded into it.

    Attributes:
        module: the layer as it stands in the model.
        cls: the plain class of torch that computes the same from ``weight``.
        weight: what it multiplies by, of the plain layer's shape.
        bias: (out,).
        baked: how its weight was made, if not stored as it is; empty otherwise.
    """

    module: Any
    cls: Any
    weight: Tensor
    bias: Tensor
    dtype: torch.dtype
    had_bias: bool
    baked: str

    @classmethod
    def of(cls, module: Any) -> Linear:
        """Read a layer that is in evaluation mode.

        Raises:
            ValueError: it does more than multiply its input by a weight and add a bias.
        """
        weight, bias, plain = module.weight, module.bias, plain_class(module)
        baked = ""
        if type(module) not in PLAIN or _weight_hooks(module):
            weight, bias = _multiplied_by(module)
            plain = next(base for base in PLAIN if isinstance(module, base))
            baked = _how_made(module, weight)
        assert isinstance(weight, Tensor)
        out = weight.shape[1] * module.groups if isinstance(module, _ConvTransposeNd) else weight.shape[0]
        zero = torch.zeros(out, dtype=torch.float64, device=weight.device)
        wide = zero if bias is None else bias.detach().to(torch.float64, copy=True)
        return cls(module, plain, weight.detach().to(torch.float64, copy=True), wide, weight.dtype, bias is not None, baked)

    def then(self, scale: Tensor, shift: Tensor) -> None:
        """Take in the map ``y -> scale * y + shift`` (out,) of the output."""
        if isinstance(self.module, _ConvTransposeNd):  # (in, out / groups, *K)
            groups = self.module.groups
            grouped = self.weight.unflatten(0, (groups, -1))  # (groups, in / groups, out / groups, *K)
            self.weight = (grouped * _spread(scale.reshape(groups, 1, -1), grouped)).flatten(0, 1)
        else:
            self.weight = self.weight * _spread(scale.reshape(-1), self.weight)
        self.bias = self.bias * scale + shift

    def after(self, scale: Tensor, shift: Tensor) -> None:
        """Take in the map ``x -> scale * x + shift`` (in,) of the input. What padding adds to the input must not need the shift."""
        if isinstance(self.module, _ConvTransposeNd):
            self.weight = self.weight * _spread(scale.reshape(-1), self.weight)
            return
        groups = getattr(self.module, "groups", 1)
        grouped = self.weight.unflatten(0, (groups, -1))  # (groups, out / groups, in / groups, *K)
        added = grouped * _spread(shift.reshape(groups, 1, -1), grouped)
        self.bias = self.bias + added.flatten(2).sum(2).reshape(-1)
        self.weight = (grouped * _spread(scale.reshape(groups, 1, -1), grouped)).flatten(0, 1)

    @property
    def channels(self) -> int:
        """Output channels or features."""
        return self.bias.numel()

    def refuses_shift_before(self) -> str:
        """Why a constant added to the input is no constant in the output; empty where it is."""
        if isinstance(self.module, _ConvTransposeNd):
            return "a transposed convolution sums fewer taps at the borders, so a shift before it is no constant after it"
        if isinstance(self.module, _ConvNd) and self.module.padding_mode == "zeros" and any(self.module._reversed_padding_repeated_twice):
            return "the convolution after it pads with zeros, which the norm's shift would have to reach"
        return ""

    def made(self, *, bias: bool) -> nn.Module:
        """A plain layer with the weight, in the dtype of the old one; with a bias if there was one or ``bias`` asks for it."""
        old = self.module
        keep = bias or self.had_bias
        if issubclass(self.cls, nn.Linear):
            new = self.cls(old.in_features, old.out_features, keep, device="meta")
        else:
            geometry = {name: getattr(old, name) for name in GEOMETRY if name != "output_padding" or issubclass(self.cls, _ConvTransposeNd)}
            new = self.cls(old.in_channels, old.out_channels, old.kernel_size, bias=keep, device="meta", **geometry)
        trained = any(parameter.requires_grad for parameter in old.parameters())
        new.weight = nn.Parameter(self.weight.to(self.dtype), trained)
        if keep:
            new.bias = nn.Parameter(self.bias.to(self.dtype), trained)
        new.training = old.training
        return new


class _Capture(TorchFunctionMode):
    """Keeps the arguments of the first product that a layer computes, and what came out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in CALLS:
            self.calls.append((func, args, kwargs or {}, result))
        return result


def _multiplied_by(module: Any) -> tuple[Tensor, Tensor | None]:
    """The weight and bias that a layer hands to torch's product, whoever makes them: parametrization, hook or its own forward."""
    name = type(module).__name__
    if getattr(module, "padding_mode", "zeros") != "zeros":
        raise ValueError(f"makes its weight in its own way ({name}) and pads its input itself, so the weight cannot be read")
    own = next(module.parameters())
    x = own.new_ones(_input_shape(module))
    with torch.no_grad(), _Capture() as capture:
        for hook in _weight_hooks(module):  # none but these: a user's hook should not see what is run here
            hook(module, (x,))
        y = module.forward(x)
    if len(capture.calls) != 1:
        raise ValueError(f"{name} computes {len(capture.calls)} products, not one")
    func, args, kwargs, result = capture.calls[0]
    given = dict(zip(("input", "weight", "bias", "stride", "padding"), args, strict=False)) | kwargs
    if CALLS[func] not in type(module).__mro__ or result is not y or given["input"] is not x:
        raise ValueError(f"{name} does more than multiply its input by a weight and add a bias")
    return given["weight"], given.get("bias")


def _input_shape(module: Any) -> tuple[int, ...]:
    if isinstance(module, nn.Linear):
        return (1, module.in_features)
    reach = (d * (k - 1) + s + 1 for k, d, s in zip(module.kernel_size, module.dilation, module.stride, strict=True))
    return (1, module.in_channels, *reach)


def _weight_hooks(module: nn.Module) -> list[Any]:
    """Hooks of torch.nn.utils that make the weight before each forward, as those of its older weight_norm and spectral_norm."""
    return [hook for hook in module._forward_pre_hooks.values() if type(hook).__module__.startswith("torch.nn.utils.")]


def _how_made(module: Any, weight: Tensor) -> str:
    if names := parametrized(module):
        kinds = [type(part).__name__.lstrip("_") for name in names for part in module.parametrizations[name]]
        return f"the parametrization {', '.join(kinds)}"
    if weight is module._parameters.get("weight"):
        return ""
    if hooks := _weight_hooks(module):
        return f"the hook {', '.join(type(hook).__name__ for hook in hooks)}"
    return f"the weight of {type(module).__name__}"


def _spread(factors: Tensor, weight: Tensor) -> Tensor:
    """``factors`` with trailing dimensions of size 1, up to the rank of ``weight``."""
    return factors.reshape(*factors.shape, *[1] * (weight.ndim - factors.ndim))
