"""Leaving no trace: everything that a forward pass can change in a model or around it, put back bit for bit.

Buffers and tensors held as attributes are copied before, attributes of every module are put back as they were, and so are the random
generators of the processor and of every device in use, of Python and of NumPy. Parameters are not copied, which would cost as much memory
as the model: one that a forward writes to in place is copied at that moment (:meth:`Preserved.about_to_write`).
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

REGISTRIES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class Preserved:
    """A context that gives a model back as it got it, exceptions included.

    Args:
        model: its modules, parameters and buffers are watched.
        devices: those whose random generators the model may use.

    Attributes:
        lost: names of parameters that were changed behind our back, after which they cannot be put back; empty in all usual cases.
    """

    def __init__(self, model: nn.Module, devices: set[torch.device]) -> None:
        self.model, self.devices = model, devices
        self.lost: list[str] = []

    def __enter__(self) -> Self:
        self._attributes = [(module, _attributes(module)) for module in self.model.modules()]
        self._parameters = [(p, p.requires_grad, p.grad, p._version) for p in self.model.parameters()]
        self._names = {id(p): name for name, p in self.model.named_parameters()}
        self._storages = {_place(p): p for p in self.model.parameters() if _place(p)}
        self._written: dict[int, Tensor] = {}
        self._tensors = [(tensor, _copy(tensor)) for tensor in self._plain_tensors()]
        self._grads = [(p.grad, p.grad._version) for p in self.model.parameters() if p.grad is not None]
        self._random = _random_states(self.devices)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with torch.no_grad():
            for module, attributes in self._attributes:
                _put_back(module, attributes)
            for parameter, requires_grad, grad, version in self._parameters:
                if (before := self._written.get(id(parameter))) is not None:
                    parameter.detach().copy_(before)
                elif parameter._version != version:
                    self.lost.append(self._names[id(parameter)])
                if parameter.requires_grad != requires_grad:
                    parameter.requires_grad_(requires_grad)
                parameter.grad = grad
            for tensor, before in self._tensors:
                if not _same_bits(tensor, before):
                    tensor.detach().copy_(before)
        self.rewind()
        for device_type in {device.type for device in self.devices}:
            if torch.is_autocast_enabled(device_type):
                torch.clear_autocast_cache()  # casts made under the probe belong to its graph

    def rewind(self) -> None:
        """Set the random generators to where they were at the beginning, so that a further forward meets the same numbers."""
        for restore in self._random:
            restore()

    def about_to_write(self, tensor: Tensor) -> None:
        """Copy the parameter that shares this tensor's memory, if there is one, before an operation in place changes it."""
        parameter = self._storages.get(_place(tensor))
        if parameter is not None and id(parameter) not in self._written:
            self._written[id(parameter)] = parameter.detach().clone()

    def restore_buffers(self) -> None:
        """Give buffers their first values, so that a further forward starts from the same state."""
        with torch.no_grad():
            for tensor, before in self._tensors:
                if not _same_bits(tensor, before):
                    tensor.detach().copy_(before)

    def _plain_tensors(self) -> Iterator[Tensor]:
        seen: set[int] = set()
        for module in self.model.modules():
            held = [*module._buffers.values(), *(v for v in vars(module).values() if isinstance(v, Tensor))]
            for tensor in held:
                if tensor is not None and id(tensor) not in seen and not isinstance(tensor, nn.Parameter):
                    seen.add(id(tensor))
                    yield tensor


def _place(tensor: Tensor) -> int:
    """The address of a tensor's memory; 0 for those without."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse and wrapper tensors have no storage of their own
        return 0


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _same_bits(tensor: Tensor, before: Tensor) -> bool:
    if tensor.shape != before.shape or tensor.layout is not torch.strided:
        return False
    mine, theirs = tensor.detach(), before
    if mine.is_floating_point() and mine.element_size() in (1, 2, 4, 8):  # NaN equals NaN, and 0 is not -0
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[mine.element_size()]
        mine, theirs = mine.contiguous().view(bits), theirs.contiguous().view(bits)
    return torch.equal(mine, theirs)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """A module's attributes; lists, dictionaries and sets are copied one level deep, so that what is appended to them goes away again."""
    saved = {}
    for name, value in vars(module).items():
        container = name in REGISTRIES or name.endswith("_hooks") or type(value) in (list, dict, set)
        saved[name] = (value, copy.copy(value) if container else None)
    return saved


def _put_back(module: nn.Module, attributes: dict[str, Any]) -> None:
    held = vars(module)
    for name in [name for name in held if name not in attributes]:
        del held[name]
    for name, (value, content) in attributes.items():
        held[name] = value
        if isinstance(value, list):
            value[:] = content
        elif content is not None:
            value.clear()
            value.update(content)


def _random_states(devices: set[torch.device]) -> list[Callable[[], None]]:
    """Functions that set each random generator to its present state."""
    cpu, python = torch.get_rng_state(), random.getstate()
    restore: list[Callable[[], None]] = [lambda: torch.set_rng_state(cpu), lambda: random.setstate(python)]
    for device in devices:
        backend: Any = getattr(torch, device.type, None)
        if device.type != "cpu" and hasattr(backend, "get_rng_state"):
            state = backend.get_rng_state(device)
            restore.append(lambda backend=backend, state=state, device=device: backend.set_rng_state(state, device))
    if (numpy := sys.modules.get("numpy")) is not None:
        numbers = numpy.random.get_state()
        restore.append(lambda: numpy.random.set_state(numbers))
    return restore
