"""Norms as they are named on the command line: ``NAME[:key=value,...][+WEIGHT]``."""

from __future__ import annotations

import ast
import inspect
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from types import FrameType
from typing import Any, cast

import torch
from torch import nn

import equinorm
from equinorm import catalogue
from equinorm.compare.errors import InputError
from equinorm.facts import Facts

NO_NORM = "none"
SHORT_WEIGHT_NAMES = {"ws": "weight_standardization"}
GIVEN_BY_TASK = frozenset({"num_features", "num_channels", "normalized_shape", "device", "dtype"})
GRAMMAR = "expected NAME, NAME:key=value,key=value or either with +ws at the end, for example group:num_groups=1+ws"

_SPEC = re.compile(r"(?P<name>\w+)(?::(?P<options>.+?))?(?:\+(?P<weight>[a-z_]+))?", re.IGNORECASE)


@dataclass(frozen=True)
class NormSpec:
    """A norm with its settings, and what is done to the weights of the layers before it.

    Attributes:
        name: name in the catalogue, or "none".
        options: constructor keywords, sorted by name.
        weight: name of a weight method in the catalogue; empty for plain weights.
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()
    weight: str = ""

    @classmethod
    def parse(cls, text: str) -> NormSpec:
        """Read a specification and check everything that can be checked without knowing the model.

        Raises:
            InputError: not of the grammar, an unknown name, an unknown or unusable option.
        """
        match = _SPEC.fullmatch(text.strip())
        if match is None:
            raise InputError(f"norm {text!r} is not understood: {GRAMMAR}")
        options = dict(_option(text, part) for part in (match["options"] or "").split(",") if part)
        name, weight = match["name"], match["weight"] or ""
        spec = cls(
            NO_NORM if name.lower() == NO_NORM else _resolve(name, weight_method=False),
            tuple(sorted(options.items())),
            _resolve(SHORT_WEIGHT_NAMES.get(weight, weight), weight_method=True) if weight else "",
        )
        spec._check_options()
        return spec

    def __str__(self) -> str:
        options = ",".join(f"{key}={value!r}" if isinstance(value, str) else f"{key}={value}" for key, value in self.options)
        short = {name: abbreviation for abbreviation, name in SHORT_WEIGHT_NAMES.items()}
        return self.name + (f":{options}" if options else "") + (f"+{short.get(self.weight, self.weight)}" if self.weight else "")

    def norm_layer(self, channels: int) -> nn.Module:
        """The norm for ``channels`` channels. Leaves torch's random generators as they were, whatever the norm draws for itself."""
        if self.name == NO_NORM:
            return nn.Identity()
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices):
            return equinorm.create(self.name, channels, **dict(self.options))

    def weight_layer(self, module: nn.Module) -> nn.Module:
        """The layer with its weight reparametrized as the specification says; the layer itself without ``+``."""
        return catalogue.resolve(self.weight)(module) if self.weight else module

    def made(self, frame: FrameType) -> bool:
        """Whether this frame of a traceback is at work making or running the norm: what is raised below it, the norm refuses."""
        if frame.f_code in (NormSpec.norm_layer.__code__, NormSpec.weight_layer.__code__):
            return True
        return self.name != NO_NORM and isinstance(frame.f_locals.get("self"), cast(type, catalogue.resolve(self.name)))

    def _check_options(self) -> None:
        if self.name == NO_NORM:
            if self.options:
                raise InputError(f"norm 'none' takes no options, got {', '.join(key for key, _ in self.options)}")
            return
        # A channel count that every number or size of groups divides: what is refused even here is wrong for any model.
        divisible = 64 * math.prod(value for _, value in self.options if isinstance(value, int) and value > 0)
        try:
            self.norm_layer(divisible)
        except Exception as error:
            raise InputError(f"norm {str(self)!r} cannot be made: {error}. Its options are {', '.join(self._known_options())}") from error

    def _known_options(self) -> list[str]:
        method = catalogue.resolve(self.name)
        build, constructor = (inspect.signature(function).parameters for function in (cast(Any, method).for_channels, method))
        own = [name for name, parameter in build.items() if parameter.kind is parameter.KEYWORD_ONLY]
        return own + [name for name in constructor if name not in own and name not in GIVEN_BY_TASK]


def split_specs(texts: Iterable[str]) -> list[str]:
    """Separate specifications given with commas or as words: ``batch,group:num_groups=1,eps=1e-3 rms`` names three norms."""
    specs: list[str] = []
    for piece in (piece for text in texts for piece in text.split(",")):
        if "=" in piece and ":" not in piece and specs:  # a further option of the norm before it
            specs[-1] += f",{piece}"
        elif piece.strip():
            specs.append(piece.strip())
    return specs


def _option(text: str, part: str) -> tuple[str, Any]:
    key, equals, value = part.partition("=")
    if not (equals and key.strip().isidentifier() and value.strip()):
        raise InputError(f"option {part!r} of norm {text!r} is not understood: {GRAMMAR}")
    return key.strip(), literal(value)


def literal(text: str) -> Any:
    """The Python literal that a text spells (number, True, None, tuple, quoted string), or the text itself."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text.strip()


def _resolve(name: str, *, weight_method: bool) -> str:
    try:
        facts: Facts = cast(Any, catalogue.resolve(name)).facts
    except ValueError as error:
        raise InputError(str(error)) from error
    if (facts.family == "weight") != weight_method:
        place = "after a + (batch+ws)" if facts.family == "weight" else "before the +"
        raise InputError(f"{facts.name!r} is {'a weight method' if facts.family == 'weight' else 'a norm'}: name it {place}; {GRAMMAR}")
    return facts.name
