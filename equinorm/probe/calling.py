"""How a model is called with a batch, and what is differentiated."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from equinorm.probe.tensors import named_tensors, real, tensors_in


class LossError(TypeError):
    """The loss function returned what cannot be differentiated: a mistake of the call, not of the model."""


WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside compilation and data parallelism."""
    while True:
        if isinstance(model, WRAPPERS):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def split(model: nn.Module, batch: Any, loss_fn: Callable[..., Any] | None) -> tuple[tuple[Any, ...], dict[str, Any], tuple[Any, ...], str]:
    """How a batch becomes a call: positional arguments, keyword arguments, what is left for the loss, and a note on what was guessed.

    A tensor is the only argument. A mapping is keyword arguments, unless ``forward`` has no such names and takes one argument. Of a list or
    tuple with two entries and a ``loss_fn``, the first is the input and the second the target. Other lists and tuples are positional
    arguments; those that ``forward`` has no room for, at the end, are left out, as targets are.
    """
    targets: tuple[Any, ...] = ()
    note = ""
    if isinstance(batch, (list, tuple)) and not hasattr(batch, "batch_sizes"):
        if loss_fn is not None and len(batch) == 2:
            args, kwargs, _, note = split(model, batch[0], None)
            return args, kwargs, (batch[1],), note
        room = _room(model)
        if room == 1 and len(batch) > 1 and all(isinstance(item, Tensor) for item in batch) and _wants_list(model):
            return (batch,), {}, (), ""
        if room is not None and len(batch) > room:
            targets = tuple(batch[room:])
            note = f"The batch has {len(batch)} entries and forward takes {room}: the last {len(targets)} were taken for targets."
            batch = batch[:room]
        return tuple(batch), {}, targets, note
    if isinstance(batch, Mapping):
        names = _names(model)
        if names is None or all(key in names for key in batch):
            return (), dict(batch), (), ""
        if not any(key in names for key in batch) and _room(model) == 1:
            return (batch,), {}, (), ""
        return (), dict(batch), (), ""
    return (batch,), {}, (), ""


def _parameters(model: nn.Module) -> list[inspect.Parameter] | None:
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return None


def _room(model: nn.Module) -> int | None:
    """How many positional arguments forward takes; None for any number."""
    parameters = _parameters(model)
    if parameters is None or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def _names(model: nn.Module) -> set[str] | None:
    """The keywords of forward; None for any."""
    parameters = _parameters(model)
    if parameters is None or any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}


def _wants_list(model: nn.Module) -> bool:
    """Whether forward's only argument is annotated as a list or tuple."""
    parameters = _parameters(model) or []
    text = str(parameters[0].annotation).lower() if parameters else ""
    return text.startswith(("list", "tuple", "sequence", "typing.list", "typing.tuple", "typing.sequence")) or "list[" in text


def check(model: Any, batch: Any) -> None:
    """Refuse what cannot be probed.

    Raises:
        TypeError: the model is no module, or no tensor is in the batch.
        ValueError: a tensor of the batch is empty.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"probe: model must be a torch.nn.Module, got {type(model).__name__}; for a function, wrap it in a module")
    lazy = [name for name, p in model.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise ValueError(
            f"probe: every parameter must have a shape, but {lazy[0]!r} is lazy; run the model once on a batch, which gives it one, and "
            "probe then"
        )
    meta = [name for name, p in model.named_parameters() if p.is_meta]
    if meta:
        raise ValueError(f"probe: parameters must have values, but {meta[0]!r} is on the meta device; build the model on a real device")
    found = list(named_tensors(batch))
    if not found and not hasattr(batch, "__dict__"):
        raise TypeError(
            f"probe: batch must be a tensor, or a list, tuple, mapping or dataclass with tensors in it, got {type(batch).__name__} "
            "without any; for other objects say with forward=lambda model, batch: ... how the model is called"
        )
    for name, tensor in found:
        if tensor.numel() == 0:
            place = f"its entry {name!r}" if name else "it"
            raise ValueError(
                f"probe: the batch must hold samples, but {place} has shape {tuple(tensor.shape)}; take a batch of at least one"
            )


def own_loss(output: Any) -> Tensor | None:
    """The loss that a model computed itself: ``output.loss`` or ``output["loss"]``; None if there is none."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad else None


def stand_in(output: Any) -> Tensor | None:
    """A loss for want of one: the sum of the outputs times fixed standard normal numbers, divided by the number of outputs.

    Its gradient is that of half the mean squared error of outputs whose errors are independent and standard normal, so no direction of the
    output is preferred. None when no output has a gradient.
    """
    total: Tensor | None = None
    outputs = [tensor for tensor in tensors_in(output) if real(tensor) and tensor.requires_grad]
    count = sum(tensor.numel() for tensor in outputs)
    for place, tensor in enumerate(outputs):
        generator = torch.Generator().manual_seed(place)
        values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        noise = torch.randn(values.shape, generator=generator).to(values.device)
        term = (values.float() if values.dtype != torch.float64 else values) * (noise / count)
        total = term.sum() if total is None else total + term.sum()
    return total
