"""The gap between training and evaluation: the same batch and random numbers in both modes, dropout still in both."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from equinorm.probe import kinds
from equinorm.probe.record import Gap
from equinorm.probe.state import Preserved
from equinorm.probe.tensors import real, tensors_in
from equinorm.probe.watch import Watch

Prints = dict[tuple[str, int], Tensor]


def measured(
    model: nn.Module, preserved: Preserved, call: Callable[[Watch], tuple[Any, Any]], prints: Prints, output: list[Tensor]
) -> tuple[Gap | None, str]:
    """Compare the two modes. Returns the gap, or None and the reason.

    Args:
        model: as the probe found it; its modes are changed, and put back by ``preserved``.
        preserved: the context that the probe runs in.
        call: runs the model on the batch.
        prints, output: of the probe's own pass, which is one of the two when nothing in it was random.
    """
    random = any(_random(module) for module in model.modules())
    runs: dict[bool, tuple[Prints, list[Tensor]]] = {}
    if not any(module.training for module in model.modules()):
        runs[False] = prints, output
    elif model.training and not random:
        runs[True] = prints, output
    training = True
    as_given = {module: module.training for module in model.modules()}
    try:
        for training in (True, False):
            if training not in runs:
                for module, was in as_given.items():
                    module.training = was
                if not training or not model.training:
                    model.train(training)
                runs[training] = _forward(model, preserved, call)
    except Exception as error:  # noqa: BLE001 - a mode that the model does not work in is a result, and no reason to lose the rest
        message = str(error).strip().splitlines()
        mode = "training" if training else "evaluation"
        return (
            None,
            f"Training and evaluation were not compared: in {mode} mode the model raised {type(error).__name__}: "
            f"{message[0] if message else ''}",
        )
    ours, theirs = runs[True], runs[False]
    if [t.shape for t in ours[1]] != [t.shape for t in theirs[1]]:
        return None, "Training and evaluation were not compared: the outputs have different shapes."
    if not ours[1]:
        return None, "Training and evaluation were not compared: there is no floating-point output."
    difference, size = _distance(ours[1], theirs[1])
    layers = []
    for key, print_ in ours[0].items():
        other = theirs[0].get(key)
        if other is not None and other.shape == print_.shape:
            apart, own = _distance([print_], [other])
            layers.append((key[0], apart / own if own else 0.0 if apart == 0 else math.inf))
    relative = difference / size if size else (0.0 if difference == 0 else math.inf)
    layer = next((name for name, apart in layers if apart >= max(relative / 2, 1e-4)), "")
    parent = layer.rpartition(".")[0]
    if parent and kinds.is_norm(model.get_submodule(parent)):
        layer = parent  # a norm with its activation inside
    _, eval_size = _distance(theirs[1], ours[1])
    return Gap(difference=relative, layer=layer, layers=tuple(layers), train_rms=size, eval_rms=eval_size), ""


def _forward(model: nn.Module, preserved: Preserved, call: Callable[[Watch], tuple[Any, Any]]) -> tuple[Prints, list[Tensor]]:
    """One forward without gradients, dropout and the like doing nothing."""
    preserved.rewind()
    preserved.restore_buffers()
    for module in model.modules():
        if kinds.is_dropout(module):
            module.training = False
        elif isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
            module.dropout = 0.0
    watch = Watch(model, preserved, measured=False, still=True)
    try:
        watch.attach()
        with torch.no_grad(), watch:
            output, _ = call(watch)
        return watch.prints, [tensor.detach() for tensor in tensors_in(output) if real(tensor)]
    finally:
        watch.close()


def _random(module: nn.Module) -> bool:
    """Whether a module may be random in training: dropout, or anything with a rate of that name."""
    if kinds.is_dropout(module):
        return True
    return any(isinstance(value, float) and value > 0 and "drop" in name for name, value in vars(module).items())


def _distance(a: list[Tensor], b: list[Tensor]) -> tuple[float, float]:
    """Root mean squares of a - b and of a."""
    count = sum(t.numel() for t in a) or 1

    def square(t: Tensor) -> float:
        t = torch.view_as_real(t) if t.is_complex() else t
        return float(t.double().square().sum())

    with torch.no_grad():
        apart = sum(square(x.to(torch.promote_types(x.dtype, torch.float32)) - y.to(x.device)) for x, y in zip(a, b, strict=True))
        return math.sqrt(apart / count), math.sqrt(sum(square(x) for x in a) / count)
