"""Norms as they stand in models, ours, torch's and those of other packages, read into one form."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

from equinorm.facts import Facts
from equinorm.kernels.activations import PARAMETRIC, as_module
from equinorm.surgery.layout import MovedChannels
from equinorm.surgery.places import places, plain_class, within

Where = type[nn.Module] | tuple[type[nn.Module], ...] | str | Callable[[str, nn.Module], bool] | None

FAMILIES = ("batch", "sample", "learned", "whitening", "local", "bounded")
# Of these families, but with another signature than one tensor in, one of its shape out.
OTHERWISE = ("layer_gru", "layer_lstm", "query_key", "thresholded_linear", "virtual_batch")
TORCH: tuple[tuple[type[nn.Module], str], ...] = (
    (_BatchNorm, "batch"),
    (_InstanceNorm, "instance"),
    (nn.GroupNorm, "group"),
    (nn.LayerNorm, "layer"),
    (nn.RMSNorm, "rms"),
    (nn.LocalResponseNorm, "local_response"),
)
FUSED = ("drop", "act", "activation")  # children of fused forms, in the order in which they are applied


@dataclass(frozen=True)
class Norm:
    """A norm layer of a model.

    Attributes:
        module: as it stands in the model.
        core: the normalization alone: the module itself, or a view of it without its activation that shares all tensors.
        after: what a fused form applies to the normalized value, in order.
        kind: the catalogue name of what it computes.
        channels: C; None where the module does not know (local response norm).
        axis: the dimension of the channels, 1 or -1 except where a layer can choose.
    """

    module: nn.Module
    core: nn.Module
    after: tuple[nn.Module, ...]
    kind: str
    channels: int | None
    axis: int

    @property
    def inner(self) -> Any:
        """The norm itself without its activation, inside a change of layout where there is one: what to read."""
        return self.core.norm if isinstance(self.core, MovedChannels) else self.core

    @property
    def layer(self) -> Any:
        """The norm itself as the model holds it, activation included: what to change where something is changed."""
        return self.module.norm if isinstance(self.module, MovedChannels) else self.module

    def affine(self) -> tuple[Tensor | None, Tensor | None]:
        """The factor and the summand (C,) that its normalized value gets, in float64; None where it has none."""
        weight, bias = (_vector(getattr(self.inner, name, None), self.channels) for name in ("weight", "bias"))
        if weight is not None:
            weight = weight + offset(self.inner)
            if getattr(self.inner, "weight_mode", None) == "abs":  # in-place activated batch norm
                weight = weight.abs() + self.eps
        return weight, bias

    @property
    def eps(self) -> float:
        """What is added to the variance; 0 where the layer has no number of that kind."""
        for name in ("eps", "variance_epsilon"):
            if isinstance(value := getattr(self.inner, name, None), float):
                return value
        return 0.0

    def moments(self) -> tuple[Tensor, Tensor] | None:
        """The running mean and variance of its input (C,), in float64, where it keeps both."""
        mean, var, std = (_vector(getattr(self.inner, f"running_{name}", None), self.channels) for name in ("mean", "var", "std"))
        if var is None and std is not None:
            var = std.square()
        return None if mean is None or var is None else (mean, var)

    def __str__(self) -> str:
        inside = [] if self.channels is None else [str(self.channels)]
        if (groups := getattr(self.inner, "num_groups", None)) is not None:
            inside.append(f"{groups} groups")
        text = f"{plain_class(self.inner).__name__}({', '.join(inside)})"
        return " + ".join([text, *(type(module).__name__ for module in self.after)])


def read(module: nn.Module) -> Norm | None:
    """The norm that a module is, or None.

    Known are the catalogue's layers, torch's norms, subclasses of either, and layers of other packages that are called BatchNorm,
    LayerNorm or RMSNorm in some spelling and hold what that needs.
    """
    if isinstance(module, MovedChannels):
        inner = read(module.norm)
        return inner and Norm(module, module, (), inner.kind, inner.channels, module.dim)
    kind = _kind(module)
    if kind is None:
        return None
    core, after = _without_activation(module)
    return Norm(module, core, after, kind, _channels(module), _axis(module, kind))


def norms(model: nn.Module) -> dict[Norm, tuple[str, ...]]:
    """All norms of a model with their names, in its order; what stands inside of a norm belongs to it."""
    found = {module: (norm, names) for module, names in places(model).items() if (norm := read(module)) is not None}
    inside = within(set(found))
    return {norm: names for module, (norm, names) in found.items() if module not in inside}


def chosen(operation: str, found: dict[Norm, tuple[str, ...]], where: Where) -> dict[Norm, tuple[str, ...]]:
    """Those of ``found`` that ``where`` asks for: a type or several, a pattern of names as in a shell, or ``where(name, module)``.

    Raises:
        ValueError: there is no norm at all, or none that ``where`` asks for.
    """
    if not found:
        raise ValueError(
            f"{operation}: the model holds no norm layer; known are equinorm's, torch's, and layers of other packages like them"
        )
    kept = {norm: names for norm, names in found.items() if any(_asked(where, name, norm.module) for name in names)}
    if not kept:
        some = ", ".join(f"{names[0]!r} ({type(norm.module).__name__})" for norm, names in list(found.items())[:5])
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise ValueError(f"{operation}: no norm matches where={where!r}; the model's norms are {some}{more}")
    return kept


def offset(module: nn.Module) -> float:
    """What a layer adds to its ``weight``: 1 for the RMS norms that store weight - 1, as Gemma's do."""
    if (stated := getattr(module, "weight_offset", None)) is not None:
        return float(stated)
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.RMSNorm) or not isinstance(weight, Tensor) or _kind(module) != "rms" or weight.is_meta:
        return 0.0
    with torch.no_grad():  # ones have the root mean square 1, so the output is what they are multiplied by
        factor = module(torch.ones_like(weight).unsqueeze(0))
    return float((factor.float().mean() - weight.float().mean()).round())


def _asked(where: Where, name: str, module: nn.Module) -> bool:
    if where is None:
        return True
    if isinstance(where, str):
        return fnmatch.fnmatchcase(name, where)
    return isinstance(module, where) if isinstance(where, (type, tuple)) else where(name, module)


def _kind(module: nn.Module) -> str | None:
    cls = plain_class(module)
    if isinstance(facts := getattr(cls, "facts", None), Facts):
        taken = facts.family in FAMILIES and facts.name not in OTHERWISE and hasattr(cls, "for_channels")
        return facts.name if taken else None
    for known, kind in TORCH:
        if isinstance(module, known):
            return kind
    name, weight = cls.__name__.lower(), getattr(module, "weight", None)
    if "batchnorm" in name and all(isinstance(getattr(module, part, None), Tensor) for part in ("running_mean", "running_var")):
        return "batch"
    if isinstance(weight, Tensor) and weight.ndim == 1:
        # T5 calls its RMS norm a layer norm; like Llama's it names its eps otherwise, and has no bias.
        if isinstance(getattr(module, "variance_epsilon", None), float) and getattr(module, "bias", None) is None:
            return "rms"
        if "rmsnorm" in name and isinstance(getattr(module, "eps", None), float):
            return "rms"
        if "layernorm" in name and isinstance(getattr(module, "eps", None), float):
            return "layer"
    return None


def _channels(module: nn.Module) -> int | None:
    for name in ("num_features", "num_channels"):
        if isinstance(count := getattr(module, name, None), int):
            return count
    if (shape := getattr(module, "normalized_shape", None)) is not None:
        return int(tuple(shape)[-1] if isinstance(shape, (tuple, list)) else shape)
    for name in ("weight", "running_mean"):
        if isinstance(tensor := getattr(module, name, None), Tensor):
            return tensor.numel()
    return None


def _axis(module: nn.Module, kind: str) -> int:
    if isinstance(dim := getattr(module, "channel_dim", None), int):
        return dim
    if isinstance(last := getattr(module, "channels_last", None), bool):
        return -1 if last else 1
    name = plain_class(module).__name__
    if getattr(module, "data_format", None) == "channels_first" or name.endswith("2d"):
        return 1
    facts = getattr(module, "facts", None)
    rows = "D" in facts.pools if isinstance(facts, Facts) else kind in ("layer", "rms")
    return -1 if rows else 1


def view(module: nn.Module) -> Any:
    """Another module with the same tensors and submodules: what is assigned to it stays with it."""
    other = object.__new__(type(module))  # copy.copy would go by pickling, which parametrized modules refuse
    other.__dict__.update(module.__dict__)
    return other


def _without_activation(module: nn.Module) -> tuple[nn.Module, tuple[nn.Module, ...]]:
    """The module without what it applies after normalizing, sharing its tensors; and what that is."""
    if isinstance(name := getattr(module, "activation", None), str) and name != "identity" and hasattr(module, "activation_param"):
        parameter: Any = module.activation_param if name in PARAMETRIC else None
        bare = view(module)
        bare.activation, bare.activation_param = "identity", None
        return bare, (as_module(name, parameter),)
    fused = [name for name in FUSED if isinstance(module._modules.get(name), nn.Module)]
    if not fused:
        return module, ()
    bare = view(module)
    bare._modules = {name: nn.Identity() if name in fused else child for name, child in module._modules.items()}
    parts = (module._modules[name] for name in fused)
    return bare, tuple(part for part in parts if part is not None and not isinstance(part, nn.Identity))


def _vector(value: Any, channels: int | None) -> Tensor | None:
    """``value`` as a vector (C,) in float64 apart from the model; None if it is no such thing."""
    if not isinstance(value, Tensor) or value.numel() != channels or value.is_meta:
        return None
    return value.detach().to(torch.float64, copy=True).reshape(-1)


def parametrized(module: nn.Module) -> tuple[str, ...]:
    """Names of the parametrized tensors of a module."""
    return tuple(module.parametrizations) if parametrize.is_parametrized(module) else ()  # type: ignore[arg-type]
