"""Norms that are a fixed affine map at inference, into the linear layers beside them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from equinorm.facts import Facts
from equinorm.surgery.calling import call_example, difference, floating
from equinorm.surgery.kinds import Norm, norms, read
from equinorm.surgery.linear import Linear, is_linear
from equinorm.surgery.neighbours import Use, Uses, watch
from equinorm.surgery.optimizers import exchange, named
from equinorm.surgery.places import owners, places, plain_class, replace, within
from equinorm.surgery.plan import Change, Plan, Refusal


class _Unfoldable(Exception):
    """The reason, as the plan will give it."""


@dataclass
class _Work:
    """A model and what is known of it while the plan is made."""

    model: nn.Module
    names: dict[nn.Module, tuple[str, ...]]
    uses: Uses
    affine: dict[nn.Module, Norm]  # norms that fold by their kind, and layers of factors alone
    tied: set[nn.Module]
    layers: dict[nn.Module, Linear] = field(default_factory=dict)
    unreadable: dict[nn.Module, str] = field(default_factory=dict)
    carrier: dict[nn.Module, nn.Module] = field(default_factory=dict)  # folded norm -> the layer before it that took it in
    taken: dict[nn.Module, list[Norm]] = field(default_factory=dict)

    def name(self, module: nn.Module) -> str:
        return self.names[module][0]

    def layer(self, module: nn.Module) -> Linear:
        """The linear layer, read once.

        Raises:
            _Unfoldable: it is not used in the one way that folding needs.
        """
        use, name = self.uses[module], self.name(module)
        if module in self.unreadable:
            raise _Unfoldable(f"{name} {self.unreadable[module]}")
        if use.calls != 1:
            raise _Unfoldable(f"{name} is called {use.calls} times, and only once with this norm")
        if module in self.tied:
            raise _Unfoldable(f"{name} shares a parameter with another layer")
        if use.foreign:
            raise _Unfoldable(f"a parameter of {name} is also read by {use.foreign}")
        return self.layers[module]


@torch.no_grad()
def fold(model: nn.Module, example_input: Any = None, *, optimizer: torch.optim.Optimizer | None = None, dry_run: bool = False) -> Plan:
    r"""Fold every norm that is an affine map at inference into a neighbouring linear layer, in place; bake in weights that are computed.

    Formula:
        A norm y = s x + t per channel after a layer x = W u + b becomes that layer with W' = s W (per output channel) and b' = s b + t.
        Before a layer z = W y + b it becomes W' = W s (per input channel) and b' = b + W t.

    Folded are batch norms with running estimates, frozen ones, instance norms with running estimates, and every layer whose ``facts``
    state that it folds; into ``Linear``, ``Conv1d`` to ``3d`` and ``ConvTranspose1d`` to ``3d``, grouped or not. A norm before a layer
    needs that layer to see it everywhere: no zero padding, and no transposed convolution, unless t = 0. Activations that a norm applies
    stay. Weights made by a parametrization, by a hook of ``torch.nn.utils`` or by the layer's own forward (weight standardization) are
    computed once. All of it in float64, stored in the dtype of the weight.

    Args:
        model: in evaluation mode.
        example_input: a tensor, a tuple of positional arguments or a mapping of keywords. It is run to find neighbours, and to compare
            outputs before and after. Without it the model is traced symbolically with torch.fx, and nothing is compared.
        optimizer: parameters that vanish are taken out of its groups, and new ones put in.
        dry_run: work the plan out and change nothing.

    Returns:
        The plan, applied unless ``dry_run``; its ``error`` compares outputs.

    Raises:
        ValueError: the model is in training mode, holds nothing to fold or bake, or can be neither traced nor run.
        RuntimeError: outputs before and after differ by more than rounding explains.
        Exception: whatever the model raises on the example. After any error the model is as it was.

    Example:
        >>> import torch, equinorm
        >>> from equinorm.surgery import fold
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
        >>> _ = torch.nn.init.ones_(model[1].bias)
        >>> plan = fold(model, torch.randn(1, 3, 8, 8))
        >>> plan.error < 1e-5
        True
        >>> model
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        )
    """
    if model.training:
        raise ValueError("fold: the model is in training mode, in which norms are no fixed maps; call model.eval() first")
    plan = Plan("fold")
    names = places(model)
    candidates = _candidates(model, names, plan)
    linear = {module for module in names if is_linear(module)}
    uses, before, how = watch(model, linear | set(candidates), example_input)
    plan.remarks.append(how)
    tied = {module for held in owners(model).values() if len(held) > 1 for module in held}
    tied_layers = {module for module in linear | set(candidates) if any(part in tied for part in module.modules())}
    work = _Work(model, names, uses, candidates, tied_layers)
    _read_layers(work, linear)
    maps = _maps(work)
    waiting: dict[Norm, str] = {}
    for norm in candidates.values():
        try:
            _fold_into_source(work, maps, norm)
        except _Unfoldable as reason:
            waiting[norm] = str(reason)
    for norm, reason in waiting.items():
        try:
            _fold_into_reader(work, maps, norm)
        except _Unfoldable as other:
            both = (reason,) if str(other) == reason else (reason, str(other))
            plan.refusals.append(Refusal(names[norm.module], str(norm), "; ".join(both)))
    replacements = _built(work, plan)
    if not plan.changes and not plan.refusals:
        raise ValueError(
            f"fold: {type(model).__name__} holds nothing to fold or to bake: no norm is an affine map at inference, as a batch norm with "
            "running estimates is, and no weight is computed"
        )
    if dry_run or not replacements:
        return plan
    _apply(model, replacements, example_input, before, plan)
    if optimizer is not None:
        exchanges = [({**_biases(work, old), **named(old)}, named(new)) for old, new in replacements.items()]
        plan.remarks += exchange(optimizer, exchanges, set(model.parameters()))
    plan.applied = True
    return plan


def _candidates(model: nn.Module, names: dict[nn.Module, tuple[str, ...]], plan: Plan) -> dict[nn.Module, Norm]:
    """Norms that may fold, in the order of the model; those of a foldable kind in another state are refused at once."""
    found = {norm.module: norm for norm in norms(model)}
    inside = within(set(found))
    for module in names:
        if module not in found and module not in inside and (factors := _factors(module)) is not None:
            found[module] = factors
    kept = {}
    for module in names:  # the order of the model
        norm = found.get(module)
        if norm is None or not _folds_by_kind(norm):
            continue
        if norm.inner.training and not getattr(norm.inner, "frozen", False):
            reason = "is in training mode, in which it uses the statistics of the batch; call eval() on it"
        elif norm.kind in ("batch", "instance") and getattr(norm.inner, "running_mean", None) is None:
            reason = "keeps no running estimates, so it uses the statistics of the batch at inference, too"
        elif "" in names[module]:
            reason = "is the model itself"
        else:
            kept[module] = norm
            continue
        if norm.kind != "instance":  # an instance norm without estimates is no failed batch norm
            plan.refusals.append(Refusal(names[module], str(norm), reason))
    return kept


def _folds_by_kind(norm: Norm) -> bool:
    facts = getattr(plain_class(norm.inner), "facts", None)
    return norm.kind in ("batch", "instance", "in_place_batch", "factors") or (isinstance(facts, Facts) and facts.folds)


def _factors(module: nn.Module) -> Norm | None:
    """A layer that multiplies each channel by a number (layer scale), ours or another's, read as a norm."""
    gamma = getattr(module, "gamma", None)
    if not plain_class(module).__name__.startswith("LayerScale") or not isinstance(gamma, Tensor) or gamma.ndim != 1 or read(module):
        return None
    axis = getattr(module, "channel_dim", 1 if plain_class(module).__name__.endswith("2d") else -1)
    return Norm(module, module, (), "factors", gamma.numel(), axis)


def _read_layers(work: _Work, linear: set[nn.Module]) -> None:
    for module in work.names:
        if module in linear and work.uses[module].calls:
            try:
                work.layers[module] = Linear.of(module)
            except (ValueError, RuntimeError, TypeError) as error:
                work.unreadable[module] = str(error)


def _maps(work: _Work) -> dict[nn.Module, tuple[Tensor, Tensor] | str]:
    """The affine map (scale, shift) of every candidate, or why it is none."""
    maps: dict[nn.Module, tuple[Tensor, Tensor] | str] = {}
    for module, norm in work.affine.items():
        try:
            maps[module] = _affine_map(norm, work.uses[module].shape)
        except _Unfoldable as reason:
            maps[module] = str(reason)
    return maps


def _affine_map(norm: Norm, shape: torch.Size | None) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) in float64: read off the layer's own outputs for 0 and 1, and confirmed on a third value.

    Raises:
        _Unfoldable: it is no such map.
    """
    core, channels = copy.deepcopy(norm.core).double().eval(), norm.channels
    assert channels is not None
    device = next((t.device for t in (*core.parameters(), *core.buffers())), torch.device("cpu"))
    values = torch.tensor([0.0, 1.0, -2.5], dtype=torch.float64, device=device)
    refused: Exception | None = None
    for rank in (len(shape),) if shape is not None else (4, 2, 3, 5):
        axis = norm.axis % rank
        x = values.reshape(3, *[1] * (rank - 1)).expand(3, *[channels if d == axis else 1 for d in range(1, rank)]).contiguous()
        try:
            zero, one, third = core.forward(x.clone()).movedim(axis, -1).reshape(3, channels)
        except (ValueError, RuntimeError, TypeError, IndexError) as error:
            refused = error
            continue
        scale = one - zero
        size = zero.abs() + 3.5 * scale.abs()
        if not bool(((third - (zero - 2.5 * scale)).abs() <= 1e-9 * size).all()) or not bool(size.isfinite().all()):
            raise _Unfoldable("is no affine map of each channel at inference")
        return scale, zero
    raise _Unfoldable(f"cannot be read: {refused}")


def _usable(work: _Work, maps: dict[nn.Module, tuple[Tensor, Tensor] | str], norm: Norm) -> tuple[Use, Tensor, Tensor]:
    """What holds in both directions.

    Raises:
        _Unfoldable: the norm is not used in the one way that folding needs.
    """
    use, found = work.uses[norm.module], maps[norm.module]
    if isinstance(found, str):
        raise _Unfoldable(found)
    if not use.calls:
        raise _Unfoldable("was not reached")
    if use.calls > 1:
        raise _Unfoldable(f"is called {use.calls} times")
    if use.more:
        raise _Unfoldable("is given more than one tensor, such as a mask")
    return use, *found


def _fold_into_source(work: _Work, maps: dict[nn.Module, tuple[Tensor, Tensor] | str], norm: Norm) -> None:
    use, scale, shift = _usable(work, maps, norm)
    source = use.source
    if source is None:
        raise _Unfoldable("no linear layer stands right before it")
    if source not in work.affine:
        work.layer(source)
    readers = work.uses[source].readers
    if len(readers) != 1:
        others = ", ".join(r if isinstance(r, str) else work.name(r) for r in readers if r is not norm.module)
        raise _Unfoldable(f"the output of {work.name(source)} is also read by {others}")
    if source in work.affine:
        if source not in work.carrier:
            raise _Unfoldable(f"{work.name(source)} stands right before it and is not folded itself")
        if work.affine[source].after:
            raise _Unfoldable(f"{work.name(source)} stands right before it and applies an activation")
        source = work.carrier[source]
    layer = work.layer(source)
    _check_axis(norm, layer, use, work.name(source))
    layer.then(scale, shift)
    work.carrier[norm.module] = source
    work.taken.setdefault(source, []).append(norm)


def _check_axis(norm: Norm, layer: Linear, use: Use, name: str) -> None:
    """Raises _Unfoldable unless the norm's channels are the layer's output channels."""
    rank = None if use.shape is None else len(use.shape)
    is_dense = isinstance(layer.module, nn.Linear)
    axis = norm.axis if rank is None else norm.axis % rank
    wanted = (rank - 1 if rank else -1) if is_dense else 1
    if is_dense and rank is None and norm.axis == 1:
        axis = wanted  # (N, C), as far as can be told: an input (N, T, C) would need T = C
    if axis != wanted or norm.channels != layer.channels:
        raise _Unfoldable(f"normalizes another dimension than the channels of {name}")


def _fold_into_reader(work: _Work, maps: dict[nn.Module, tuple[Tensor, Tensor] | str], norm: Norm) -> None:
    use, scale, shift = _usable(work, maps, norm)
    if norm.after:
        raise _Unfoldable(f"it applies {type(norm.after[0]).__name__} before the next layer")
    target = use.readers[0] if len(use.readers) == 1 else None
    if not isinstance(target, nn.Module) or not is_linear(target):
        who = ", ".join(r if isinstance(r, str) else work.name(r) for r in use.readers) or "nothing"
        raise _Unfoldable(f"its output is read by {who}, which is not one linear layer")
    layer, rank = work.layer(target), None if use.shape is None else len(use.shape)
    if isinstance(layer.module, nn.Linear):
        if norm.axis != -1 and rank is None:
            raise _Unfoldable(f"whether its channels are the features of {work.name(target)} depends on the input: pass example_input")
        fits, inputs = norm.axis == -1 or norm.axis % (rank or 1) == (rank or 1) - 1, layer.module.in_features
    else:
        fits, inputs = norm.axis == 1 or (rank is not None and norm.axis % rank == 1), layer.module.in_channels
    if not fits or norm.channels != inputs:
        raise _Unfoldable(f"it normalizes another dimension than the channels of {work.name(target)}")
    if bool((shift != 0).any()) and (why := layer.refuses_shift_before()):
        raise _Unfoldable(why)
    layer.after(scale, shift)
    work.taken.setdefault(target, []).append(norm)


def _built(work: _Work, plan: Plan) -> dict[nn.Module, nn.Module]:
    """The new modules in place of the old ones; the plan says which."""
    replacements: dict[nn.Module, nn.Module] = {}
    folded = {norm.module for taken in work.taken.values() for norm in taken}
    for module, layer in work.layers.items():
        taken = work.taken.get(module, [])
        if not taken and not layer.baked:
            continue
        replacements[module] = layer.made(bias=any(bool(layer.bias.any()) for _ in taken))
        lost = [layer.baked + ": its present value is stored"] if layer.baked else []
        if module in work.tied:
            lost.append("the tie of its parameters with those of another layer")
        if hooks := len(module._forward_hooks) + len(module._forward_pre_hooks):
            lost.append(f"{hooks} forward hooks, which stay with the old module")
        if taken:
            what = f"{plain_class(module).__name__} takes in " + ", ".join(f"{work.name(norm.module)} ({norm})" for norm in taken)
        else:
            what = f"{plain_class(module).__name__}: computed weight baked in"
        plan.changes.append(Change(work.names[module], what, lost=tuple(lost)))
    for module in folded:
        after = work.affine[module].after
        replacements[module] = nn.Identity() if not after else after[0] if len(after) == 1 else nn.Sequential(*after)
    plan.refusals += [Refusal(work.names[m], type(m).__name__, reason) for m, reason in work.unreadable.items()]
    return replacements


def _biases(work: _Work, layer: nn.Module) -> dict[str, nn.Parameter]:
    """The bias of a norm that a layer took in: where the optimizer has it, there a new bias of the layer belongs."""
    found: dict[str, nn.Parameter] = {}
    for norm in work.taken.get(layer, []):
        found |= {name: parameter for name, parameter in named(norm.module).items() if name == "bias"}
    return found


def _apply(model: nn.Module, replacements: dict[nn.Module, nn.Module], example: Any, before: list[Tensor], plan: Plan) -> None:
    """Put the new modules in, compare, and take them out again where the outputs do not agree."""
    for old, new in replacements.items():
        new.training = old.training
    back = _snapshot(model)
    replace(model, replacements)
    try:
        if example is not None:
            plan.error = difference(before, floating(call_example(model, example)))
            coarsest = _coarsest(model)
            if not plan.error <= coarsest**0.5:
                raise RuntimeError(
                    f"fold: outputs before and after differ by {plan.error:.2g} of the largest, more than rounding explains "
                    f"({coarsest**0.5:.2g}); the model is left as it was. Its output may depend on the example beyond what running it shows"
                )
    except BaseException:
        for parent, children in back:
            parent._modules.clear()
            parent._modules.update(children)
        raise


def _coarsest(model: nn.Module) -> float:
    """The largest rounding error among the types that a model computes in."""
    types = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()} | {torch.float32}
    kinds = {parameter.device.type for parameter in model.parameters()}
    types |= {torch.get_autocast_dtype(kind) for kind in kinds if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)}
    return max(torch.finfo(dtype).eps for dtype in types)


def _snapshot(model: nn.Module) -> list[tuple[nn.Module, dict[str, nn.Module | None]]]:
    return [(module, dict(module._modules)) for module in model.modules()]
