"""What a swapped-in norm remembers of the one that it replaced, so that swapping back loses nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from equinorm.surgery.kinds import parametrized
from equinorm.surgery.layout import MovedChannels

ATTRIBUTE = "replaced_norm"
SETTINGS = ("eps", "momentum")


@dataclass(frozen=True)
class Replaced:
    """A norm as it was when :func:`~equinorm.surgery.swap` replaced it; the attribute ``replaced_norm`` of what stands in its place.

    It is copied and pickled with the module, and is no part of its state dict.

    Attributes:
        kind: the catalogue name of what it computed.
        state: its parameters and buffers by name.
        settings: its ``eps`` and ``momentum``, where it had them.
        given: the parameters that the new norm began with. Once they have been trained, ``state`` no longer tells what the model computes.
    """

    kind: str
    state: Mapping[str, Tensor]
    settings: Mapping[str, Any]
    given: Mapping[str, Tensor]

    def untouched(self, module: nn.Module) -> bool:
        """Whether ``module`` still has the parameters that it began with."""
        now = dict(module.named_parameters())
        return now.keys() == self.given.keys() and all(_same(now[name].detach(), value) for name, value in self.given.items())

    def fits(self, module: nn.Module) -> bool:
        """Whether ``module`` holds tensors of the same names and shapes."""
        state = _state(module)
        return state.keys() == self.state.keys() and all(state[name].shape == value.shape for name, value in self.state.items())

    @torch.no_grad()
    def restore(self, module: nn.Module) -> None:
        """Give ``module`` the remembered tensors and settings."""
        for name, value in _state(module).items():
            value.copy_(self.state[name])
        for name, setting in self.settings.items():
            if hasattr(module, name):
                setattr(module, name, setting)


def remember(kind: str, norm: nn.Module) -> Replaced:
    """The record of a norm that is about to be replaced; ``given`` is filled by :func:`attach`."""
    state = {name: value.detach().clone() for name, value in _state(norm).items()}
    return Replaced(kind, state, {name: getattr(norm, name) for name in SETTINGS if hasattr(norm, name)}, {})


def attach(record: Replaced, norm: nn.Module) -> None:
    """Leave the record with the norm that took the place, together with the parameters that this begins with."""
    given = {name: value.detach().clone() for name, value in norm.named_parameters()}
    setattr(norm, ATTRIBUTE, Replaced(record.kind, record.state, record.settings, given))


def record_of(norm: nn.Module) -> Replaced | None:
    """The record that a norm carries, if it took another's place."""
    return getattr(norm.norm if isinstance(norm, MovedChannels) else norm, ATTRIBUTE, None)


def _state(norm: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; in place of what a parametrization stores, the value that it gives."""
    made = parametrized(norm)
    state = {**dict(norm.named_parameters()), **dict(norm.named_buffers())}
    return {name: getattr(norm, name) for name in made} | {
        n: t for n, t in state.items() if not (made and n.startswith("parametrizations."))
    }


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b.to(a.device)))
