"""Running a model on what a loader gives, and comparing what comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module, Any], Any]


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch of a loader: a mapping is passed as keywords; of a tuple or list the first entry, the input."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise ValueError("a batch is an empty tuple: it must hold the model's input first; or pass forward=lambda model, batch: ...")
        return model(batch[0])
    return model(batch)


def call_example(model: nn.Module, example: Any) -> Any:
    """The model's output for an example: a mapping is passed as keywords, a tuple as positional arguments."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def batches_of(data: Any) -> list[Any]:
    """The batches in ``data``: one batch (a tensor or a mapping) or an iterable of batches."""
    if isinstance(data, (Tensor, Mapping)):
        return [data]
    if not isinstance(data, Iterable):
        raise TypeError(f"calibrate must be a batch (a tensor or a mapping) or an iterable of batches, got {type(data).__name__}")
    batches = list(data)
    if not batches:
        raise ValueError("calibrate holds no batch; pass at least one, as a tensor, a mapping or an iterable of them")
    return batches


def tensors(output: Any) -> Iterator[Tensor]:
    """All tensors in an output, in order: nested tuples, lists, mappings and dataclasses."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from tensors(value)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for entry in dataclasses.fields(output):
            yield from tensors(getattr(output, entry.name))


def floating(output: Any) -> list[Tensor]:
    """Copies of the floating-point tensors in an output, in float64."""
    return [tensor.detach().to(torch.float64, copy=True) for tensor in tensors(output) if tensor.is_floating_point()]


def difference(before: list[Tensor], after: list[Tensor]) -> float:
    """``max|after - before| / max|before|`` over each tensor, the largest of them; infinity where one is not finite and was."""
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        if not old.numel():
            continue
        finite = old.isfinite()
        if not bool(new.isfinite()[finite].all()):
            return float("inf")
        gap = (new - old)[finite].abs()
        if gap.numel() and (top := gap.max().item()):
            scale = old[finite].abs().max().item()
            worst = max(worst, top / scale if scale else float("inf"))
    return worst
