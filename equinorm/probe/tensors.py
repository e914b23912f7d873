"""Tensors inside whatever a module takes or returns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

DEEP = 8  # levels of nesting; deeper structures are someone's bookkeeping


def tensors_in(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples, mappings, dataclasses and packed sequences, in order."""
    for _, tensor in named_tensors(value, "", depth):
        yield tensor


def named_tensors(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The same with their place: "" for the value itself, else indices and keys joined by dots ("0", "image", "0.mask")."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, PackedSequence):
        yield name, value.data
    elif depth < DEEP and not isinstance(value, (str, bytes)):
        if isinstance(value, Mapping):
            items = value.items()
        elif isinstance(value, (list, tuple)):
            items = enumerate(value)
        elif is_dataclass(value) and not isinstance(value, type):
            items = ((field.name, getattr(value, field.name)) for field in fields(value))
        else:
            return
        for key, item in items:
            yield from named_tensors(item, f"{name}.{key}" if name else str(key), depth + 1)


def real(tensor: Tensor) -> bool:
    """Whether a tensor holds floating-point or complex numbers."""
    return tensor.is_floating_point() or tensor.is_complex()


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with every tensor changed; what is no structure of tensors is passed on as it is.

    Classes are kept: named tuples, dataclasses and mappings are built anew through their own constructors or copies.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, PackedSequence):
        return value._replace(data=change(value.data))
    if isinstance(value, tuple):
        items = [mapped(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, list):
        return type(value)(mapped(item, change) for item in value)
    if isinstance(value, Mapping):
        items = {key: mapped(item, change) for key, item in value.items()}
        if type(value) is dict:
            return items

        new = copy.copy(value)
        if hasattr(new, "update"):
            new.update(items)  # type: ignore[attr-defined]
        return new
    if is_dataclass(value) and not isinstance(value, type):
        new = copy.copy(value)
        for field in fields(value):
            object.__setattr__(new, field.name, mapped(getattr(value, field.name), change))
        return new
    return value
