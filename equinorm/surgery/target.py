"""What a norm is swapped for: a name of the catalogue, a class, or a function of the number of channels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from equinorm import catalogue
from equinorm.surgery.kinds import Norm, read
from equinorm.surgery.layout import MovedChannels

To = str | type[nn.Module] | Callable[[int], nn.Module]
GROUPS = 32  # Wu and He's number of groups


class Target:
    """Builds the norm that takes another's place, with the options of the caller and those that keep most of the old one.

    Args:
        to: a name of the catalogue; a class of norms; or a function that makes a norm for a number of channels.
        options: keyword arguments of the class; none with a function.

    Raises:
        ValueError: a name that the catalogue does not have, a method that is no layer, or options together with a function.
        TypeError: ``to`` is none of the three.
    """

    def __init__(self, to: To, options: Mapping[str, Any]) -> None:
        if isinstance(to, str):
            method = catalogue.resolve(to)
            if not inspect.isclass(method) or not hasattr(method, "for_channels"):
                catalogue.create(to, 1)  # says why it cannot be built from a number of channels
            self.make: Any = method
        elif isinstance(to, nn.Module):
            raise TypeError(
                f"swap: `to` is a module, {type(to).__name__}, and one module cannot stand in every place; pass its class, or a function "
                "that makes one, as lambda channels: torch.nn.GroupNorm(8, channels)"
            )
        elif callable(to):
            self.make = to
        else:
            raise TypeError(f"swap: `to` must be a name of the catalogue, a class or a function of the number of channels, got {to!r}")
        self.cls: Any = self.make if inspect.isclass(self.make) else None
        self.options = dict(options)
        if self.cls is None and options:
            raise ValueError(f"swap: a function makes the norm by itself; it takes no options, got {sorted(options)}")

    @property
    def name(self) -> str:
        """What it is called in plans."""
        return getattr(self.make, "__name__", repr(self.make))

    def is_met_by(self, norm: Norm) -> bool:
        """Whether a norm is already what is asked for."""
        return type(norm.inner) is self.cls and not self.options

    def build(self, source: Norm, channels: int) -> tuple[nn.Module, list[str]]:
        """A norm for ``channels`` channels on the device and in the dtype of ``source``, and what was decided on the way.

        Raises:
            ValueError, TypeError: what the class says of its settings.
        """
        said: list[str] = []
        if self.cls is None:
            made = self.make(channels)
            if not isinstance(made, nn.Module):
                raise TypeError(f"swap: the function {self.name} must return a module, got {type(made).__name__}")
        else:
            options = self._options(source, channels, said)
            made = self._construct(channels, options)
        new = read(made)
        if new is not None and source.axis != new.axis and {source.axis, new.axis} == {1, -1}:
            made = MovedChannels(made, source.axis)
            said.append(f"the channels' place: wrapped in MovedChannels, because {type(made.norm).__name__} takes them elsewhere")
        tensor = next((t for t in (*source.core.parameters(), *source.core.buffers()) if t.is_floating_point()), None)
        if tensor is not None:
            made = made.to(tensor.device, tensor.dtype)
        return made.train(source.module.training), said

    def _construct(self, channels: int, options: dict[str, Any]) -> nn.Module:
        if (build := getattr(self.cls, "for_channels", None)) is not None:
            return build(channels, **options)
        if issubclass(self.cls, nn.GroupNorm):
            return self.cls(options.pop("num_groups"), channels, **options)
        if issubclass(self.cls, nn.LocalResponseNorm):
            return self.cls(**{"size": 5, **options})  # Krizhevsky's neighbourhood
        return self.cls(channels, **options)

    def _options(self, source: Norm, channels: int, said: list[str]) -> dict[str, Any]:
        accepted = set(inspect.signature(self.cls).parameters)
        if (build := getattr(self.cls, "for_channels", None)) is not None:
            accepted |= set(inspect.signature(build).parameters)
        options = dict(self.options)
        weight, bias = source.affine()
        if "num_groups" in accepted and (self.cls.__name__ == "GroupNorm" or "num_groups" in options):
            wanted = options.get("num_groups", GROUPS)
            options["num_groups"] = groups = nearest_divisor(channels, wanted)
            if groups != wanted:
                said.append(f"{groups} groups, the nearest to {wanted} that divides {channels} channels")
        if weight is not None or bias is not None:
            if "affine" in accepted:
                options.setdefault("affine", True)
            # A layer that has a bias only on demand gets one when there is one to keep, or a mean to make up for.
            if "bias" in accepted and inspect.signature(self.cls).parameters["bias"].default is False:
                options.setdefault("bias", bias is not None)
        for name in ("eps", "momentum"):
            if name in accepted and (setting := source.eps if name == "eps" else getattr(source.inner, name, None)):
                options.setdefault(name, setting)
        if "channel_dim" in accepted:
            options.setdefault("channel_dim", source.axis)
        if "channels_last" in accepted:
            options.setdefault("channels_last", source.axis == -1)
        return options


def nearest_divisor(channels: int, wanted: int) -> int:
    """The divisor of ``channels`` nearest to ``wanted``, the smaller of two; one channel per group only if as many are wanted.

    Raises:
        ValueError: ``wanted`` is no integer of at least 1.
    """
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise ValueError(f"swap: num_groups must be an integer of at least 1, got {wanted!r}")
    if wanted == channels:
        return channels
    divisors = [d for d in range(1, channels + 1) if channels % d == 0 and (d < channels or channels == 1)]
    return min(divisors, key=lambda d: (abs(d - wanted), d))


def pooled(norm: Norm, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor] | None:
    """The center and scale (C,) that a norm is expected to use on an input with these means and variances per channel.

    By the law of total variance; exact for running estimates, and otherwise where samples are alike. None for norms without such a form.
    """
    if norm.kind in ("batch", "sync_batch", "ghost_batch", "in_place_batch", "instance"):
        return mean, (var + norm.eps).sqrt()
    if norm.kind == "batch_renorm":
        return mean, var.sqrt()
    if norm.kind == "rms":
        return torch.zeros_like(mean), (var + mean.square()).mean().add(norm.eps).sqrt().expand_as(mean)
    if norm.kind in ("layer", "group"):
        groups = getattr(norm.inner, "num_groups", 1)
        means = mean.reshape(groups, -1)
        center = means.mean(1, keepdim=True)
        spread = (var.reshape(groups, -1) + (means - center).square()).mean(1, keepdim=True)
        center, spread = (part.expand_as(means).reshape(-1) for part in (center, spread))
        return center, (spread + norm.eps).sqrt()
    return None
