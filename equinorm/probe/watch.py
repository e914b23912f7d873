"""The observer of one forward and one backward pass: hooks on every module, a function mode for what is written as functions.

Nothing is kept of an activation but numbers: a hook measures what a module returned at the moment it returned it, so that an in-place
operation behind it changes nothing, and puts a hook on the tensor itself that will measure its gradient. (Module backward hooks would wrap
outputs in views, which in-place operations refuse.) Which call read what is followed by the identity of tensors, through every function.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from equinorm.kernels.activations import Activation, of_module
from equinorm.probe import kinds
from equinorm.probe.measure import SAMPLE, binned, measure, sample, strides
from equinorm.probe.record import Call, Channels, Norm, Residual, Role, Stats, Steps
from equinorm.probe.state import Preserved
from equinorm.probe.tensors import real, tensors_in

PRINT = 512  # values of each output that are kept to compare training with evaluation
ROWS = 4096  # rows of a softmax that are looked at
PEAKED = 0.99
"""A softmax row counts as saturated from this share on: the gradient's factor p (1 - p) is then below 0.01, against 0.25 at its best."""

MEASURED_INPUT: tuple[Role, ...] = ("linear", "norm", "activation", "recurrent", "attention")


class Seen(NamedTuple):
    """What is known of a live tensor: the calls that it comes from as bits, its channel axis, and its statistics if it was measured."""

    tensor: weakref.ref[Tensor]
    version: int
    origins: int
    axis: int | None
    stats: Stats | None = None
    channels: Channels | None = None
    sinks: list[Call] | None = None


class Frame:
    """A module's call that has not ended."""

    __slots__ = (
        "functions",
        "given",
        "inner",
        "input",
        "module",
        "name",
        "norm",
        "number",
        "origins",
        "position",
        "role",
        "saturation",
        "source",
    )

    role: Role

    def __init__(self, module: nn.Module, name: str, number: int, role: Role, position: int, given: list[Tensor]) -> None:
        self.module, self.name, self.number, self.role, self.position = module, name, number, role, position
        self.given = tuple(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in given)
        self.inner = 0
        self.functions: dict[str, int] = {}
        self.origins = 0
        self.input: Stats | None = None
        self.saturation: float | None = None
        self.norm: Norm | None = None
        self.source: weakref.ref[Tensor] | None = None


class Watch(TorchFunctionMode):
    """Records the calls made while it is entered, and their gradients until it is closed.

    Args:
        model: the model; its modules get hooks.
        preserved: is told of operations in place.
        measured: False records only prints of the outputs, for comparisons.
        still: make every dropout, module or function, do nothing.

    Attributes:
        calls, norms: the records.
        prints: of each leaf module's call, by name and number: a few of its output's values.
        frames: the calls under way, innermost last; after an exception, those that it broke.
        extra: inputs of recurrent layers that need a gradient for their steps to be seen.
    """

    def __init__(self, model: nn.Module, preserved: Preserved, *, measured: bool = True, still: bool = False) -> None:
        super().__init__()
        self.preserved, self.measured, self.still = preserved, measured, still
        self.calls: list[Call] = []
        self.norms: list[Norm] = []
        self.prints: dict[tuple[str, int], Tensor] = {}
        self.frames: list[Frame] = []
        self.extra: list[Tensor] = []
        self.ancestors: list[int] = []
        self._known: dict[int, Seen] = {}
        self._numbers: dict[str, int] = {}
        self._pending: dict[str, list[tuple[Call, list[Call]]]] = {}
        self._leaves = 0
        self._names = {}
        for name, module in model.named_modules():
            self._names[module] = name.replace("_orig_mod.", "").replace("._orig_mod", "").replace("_checkpoint_wrapped_module.", "")
        self._roles: dict[nn.Module, Role] = {module: kinds.role_of(module) for module in self._names}
        self._handles: list[RemovableHandle] = []

    # ------------------------------------------------------------------------------------------------------------------------------
    # hooks

    def attach(self, but: nn.Module | None = None) -> None:
        """Put the hooks on all modules ``but`` one; :meth:`close` takes them off."""
        for module in self._names:
            if module is but or isinstance(module, torch.jit.ScriptModule):
                continue
            self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._exit, with_kwargs=True))

    def detach(self) -> None:
        """Take the hooks off the modules; those on tensors stay until their gradients have come."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def close(self) -> None:
        """Take all hooks off and forget all tensors."""
        self.detach()
        self._known.clear()
        self._pending.clear()
        self.extra.clear()

    def begin(self, batch: Any) -> None:
        """Mark the tensors of the batch as the model's input."""
        for tensor in tensors_in(batch):
            self._note(tensor, Seen(weakref.ref(tensor), tensor._version, 0, None))

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if _recomputing():
            return None
        with torch._C.DisableTorchFunction():
            return self._entered(module, args, kwargs)

    def _entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        name = self._names[module]
        number = self._numbers.get(name, 0)
        self._numbers[name] = number + 1
        inputs = list(tensors_in((args, kwargs)))
        frame = Frame(module, name, number, self._roles[module], self._leaves, inputs)
        self.frames.append(frame)
        if not self.measured:
            return None
        for tensor in inputs:
            if (seen := self._seen(tensor)) is not None:
                frame.origins |= seen.origins
        first = next((tensor for tensor in inputs if real(tensor)), None)
        if first is None or frame.role not in MEASURED_INPUT:
            return None
        frame.input = self._stats(first)
        if frame.role == "activation":
            if (activation := of_module(module)) is not None:
                frame.saturation = saturation(activation, first)
        elif frame.role == "norm":
            frame.norm = self._norm(frame, first)
        elif isinstance(module, nn.RNNBase) and isinstance(args[0] if args else None, Tensor) and torch.is_grad_enabled():
            if not first.requires_grad:
                first = first.detach().requires_grad_()
                self._note(first, Seen(weakref.ref(first), first._version, frame.origins, first.ndim - 1, frame.input))
                self.extra.append(first)
                args = (first, *args[1:])
            frame.source = weakref.ref(first)
            return args, kwargs
        return None

    def _exit(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        with torch._C.DisableTorchFunction():
            if _recomputing():
                self._reattach(module, output)
            else:
                self._exited(module, args, output)

    def _exited(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        while self.frames and self.frames[-1].module is not module:
            self.frames.pop()  # calls whose exception somebody caught
        frame = self.frames.pop()
        leaf = frame.inner == 0
        call = Call(
            index=len(self.calls), name=frame.name, type=type(module).__name__, kind="module", role=frame.role, number=frame.number,
            nesting=len(self.frames), leaf=leaf, position=frame.position if leaf else self._leaves,
        )  # fmt: skip
        call.input, call.saturation = frame.input, frame.saturation
        call.inputs = _bits(frame.origins)
        axis = None
        if leaf and args and isinstance(args[0], Tensor) and frame.role in ("activation", "dropout", "shape", "norm", "other", "pool"):
            seen = self._seen(args[0])
            axis = seen.axis if seen is not None else None
        self._finish(call, output, frame.origins, partial(kinds.channel_axis, module, frame.role, inherited=axis))
        if call.role == "activation" and isinstance(module, kinds.SOFTMAX):
            first = next((t for t in tensors_in(output) if real(t)), None)
            if first is not None:
                dim = 1 if isinstance(module, nn.Softmax2d) else module.dim
                call.saturation = peaked(first, -1 if dim is None else dim)
        if frame.norm is not None:
            frame.norm.call = frame.norm.call if frame.norm.call >= 0 else call.index
            self.norms.append(frame.norm)
        if isinstance(module, nn.RNNBase) and self.measured:
            self._steps(call, module, output, frame.source() if frame.source is not None else None)

    def _finish(self, call: Call, output: Any, origins: int, axis_of: Callable[[Tensor], int | None]) -> None:
        """Measure what a call returned, and take the call into the record."""
        outputs = [tensor for tensor in tensors_in(output) if real(tensor)]
        call.outputs = len(outputs)
        for frame in self.frames:
            frame.inner += 1
        if call.leaf:
            self._leaves += 1
        bit = 1 << call.index
        above = bit
        for index in call.inputs:
            above |= self.ancestors[index]
        self.calls.append(call)
        self.ancestors.append(above)
        for place, tensor in enumerate(outputs):
            seen = self._seen(tensor)
            if place == 0:
                call.shape, call.dtype, call.device = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), str(tensor.device)
                if not self.measured:
                    if call.leaf and call.kind == "module":
                        self._print(call, tensor)
                    continue
                if seen is not None and seen.stats is not None and seen.sinks is not None:  # a container returns what a child returned
                    call.forward, call.channels = seen.stats, seen.channels
                    seen.sinks.append(call)
                    if not call.leaf:
                        continue
                axis = axis_of(tensor)
                if call.forward is None:
                    call.forward, call.channels = measure(tensor, axis)
                    if call.leaf and call.kind == "module":
                        self._print(call, tensor)
                sinks = [call]
                if tensor.requires_grad:
                    tensor.register_hook(partial(_gradient, sinks))
                else:
                    self._pending.setdefault(call.name, []).append((call, sinks))
                # A container's result made by a function that is not recorded still comes from the calls inside.
                known = seen.origins if seen is not None and not call.leaf and seen.origins else bit
                self._note(tensor, Seen(weakref.ref(tensor), tensor._version, known, axis, call.forward, call.channels, sinks))
            elif self.measured and (seen is None or call.leaf):
                self._note(tensor, Seen(weakref.ref(tensor), tensor._version, bit, None))

    def _reattach(self, module: nn.Module, output: Any) -> None:
        """In a forward that checkpointing repeats: hook the tensors of a first forward that ran without gradients."""
        waiting = self._pending.get(self._names[module])
        first = next((tensor for tensor in tensors_in(output) if real(tensor)), None)
        if waiting and first is not None and first.requires_grad:
            _, sinks = waiting.pop()
            first.register_hook(partial(_gradient, sinks))

    # ------------------------------------------------------------------------------------------------------------------------------
    # functions

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if _recomputing():
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if self.still and func in kinds.DROPOUTS:
            if func in (torch.dropout, torch.dropout_, torch.feature_dropout):
                return func(args[0], *args[1:-1], False) if not kwargs else func(args[0], **{**kwargs, "train": False})
            args, kwargs = args[:1], {**kwargs, "training": False, **({"p": args[1]} if len(args) > 1 else {})}
        if self.still and func is F.scaled_dot_product_attention and len(args) < 5:
            kwargs = {**kwargs, "dropout_p": 0.0}
        if (name.endswith("_") or name == "__set__") and args and isinstance(args[0], Tensor):
            self.preserved.about_to_write(args[0])
        for tensor in tensors_in(kwargs.get("out")):
            self.preserved.about_to_write(tensor)
        if not self.measured:
            return func(*args, **kwargs)
        if func in kinds.ACTIVATIONS or func in kinds.SOFTMAXES:
            if self.frames and self.frames[-1].role != "activation":
                return self._activation(func, args, kwargs)
        elif func in kinds.SUMS and len(args) == 2:
            return self._sum(func, args, kwargs)
        elif func is F.scaled_dot_product_attention:
            return self._attention(func, args, kwargs)
        elif func in kinds.NORM_FUNCTIONS and self.frames and (self.frames[-1].role != "norm" or self.frames[-1].module._modules):
            return self._normalization(func, args, kwargs)
        result = func(*args, **kwargs)
        self._follow(result, args, kwargs)
        return result

    def _follow(self, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hand the origins of a function's arguments on to its results, and the channel axis to results of the same shape."""
        if not isinstance(result, (Tensor, tuple, list)):
            return
        known = [(tensor, seen) for tensor in tensors_in((args, kwargs)) if (seen := self._seen(tensor)) is not None]
        if not known:
            return
        origins = 0
        for _, seen in known:
            origins |= seen.origins
        for tensor in (result,) if isinstance(result, Tensor) else result:
            if not isinstance(tensor, Tensor) or ((old := self._seen(tensor)) is not None and old.stats is not None):
                continue  # handed through unchanged: what was measured still holds
            axis = next((seen.axis for argument, seen in known if argument.shape == tensor.shape), None)
            self._note(tensor, Seen(weakref.ref(tensor), tensor._version, origins, axis))

    def _function(self, name: str, role: Role, origins: int) -> Call:
        frame = self.frames[-1] if self.frames else None
        where, number = (frame.name, frame.number) if frame else ("", 0)
        nth = 1
        if frame:
            nth = frame.functions[name] = frame.functions.get(name, 0) + 1
        label = f"{where}:{name}" + (f"#{nth}" if nth > 1 else "")
        return Call(
            index=len(self.calls), name=label, type=name, kind="function", role=role, number=number, nesting=len(self.frames), leaf=True,
            position=self._leaves, inputs=_bits(origins),
        )  # fmt: skip

    def _activation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor) or not real(x):
            return func(*args, **kwargs)
        softmax = func in kinds.SOFTMAXES
        seen = self._seen(x)
        axis, origins = (seen.axis, seen.origins) if seen else (None, 0)
        with torch._C.DisableTorchFunction():
            before, share = self._stats(x), None
            if not softmax:
                share = saturation(kinds.activation_of(func, args, kwargs), x)
        result = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            call = self._function("softmax" if softmax else kinds.ACTIVATIONS[func], "activation", origins)
            if softmax:
                dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
                share = peaked(result, -1 if dim is None else dim)
            call.input, call.saturation = before, share
            self._finish(
                call, result, origins, lambda t: axis if axis is not None else (1 if t.ndim >= 4 else t.ndim - 1 if t.ndim > 1 else None)
            )
        return result

    def _normalization(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A norm written as a function, such as that of a module which joins a norm and its activation."""
        x = args[0] if args else kwargs.get("input")
        seen = self._seen(x) if isinstance(x, Tensor) else None
        if not isinstance(x, Tensor) or not real(x):
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            before = self._stats(x)
        result = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            origins, frame = seen.origins if seen else 0, self.frames[-1]
            call = self._function(func.__name__, "norm", origins)
            call.input = before
            if frame.norm is not None and frame.norm.call < 0:
                frame.norm.call = call.index
            self._finish(call, result, origins, lambda t: None if t.ndim < 2 else t.ndim - 1 if func in (F.layer_norm, F.rms_norm) else 1)
        return result

    def _sum(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        a, b = args
        if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.ndim > 1 and real(a) and real(b)):
            result = func(*args, **kwargs)
            self._follow(result, args, kwargs)
            return result
        first, second = self._seen(a), self._seen(b)
        roles = self._skip_and_branch(first, second) if first and second else None
        if roles is None:
            result = func(*args, **kwargs)
            self._follow(result, args, kwargs)
            return result
        with torch._C.DisableTorchFunction():
            skip, branch = (a, b) if roles == 0 else (b, a)
            sizes = self._stats(skip).rms, self._stats(branch).rms
        assert first
        assert second
        skip_seen, branch_seen = (first, second) if roles == 0 else (second, first)
        result = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            origins = first.origins | second.origins
            call = self._function("add", "residual", origins)
            call.residual = Residual(
                skip=sizes[0], branch=sizes[1], module=self.frames[-1].name if self.frames else "",
                skip_from=skip_seen.origins.bit_length() - 1, branch_from=branch_seen.origins.bit_length() - 1,
            )  # fmt: skip
            axis = skip_seen.axis if skip_seen.axis is not None else branch_seen.axis
            self._finish(call, result, origins, lambda t: axis if axis is not None else (1 if t.ndim >= 4 else t.ndim - 1))
        return result

    def _skip_and_branch(self, a: Seen, b: Seen) -> int | None:
        """Which of two terms is the skip, 0 or 1: the other one is computed from it, or both from one call. None if that is not so."""
        above_a, above_b = self._above(a.origins), self._above(b.origins)
        if not above_a and not above_b:
            return None
        if a.origins & ~above_b == 0 and a.origins != b.origins:  # the model's input itself has no origins
            return 0
        if b.origins & ~above_a == 0 and a.origins != b.origins:
            return 1
        common = above_a & above_b
        if not common:
            return None
        own_a, own_b = (above_a & ~common).bit_count(), (above_b & ~common).bit_count()
        if min(own_a, own_b) > 2 or own_a == own_b:  # a projection and its norm at most; equal lengths: no skip among them
            return None
        return 0 if own_a < own_b else 1

    def _above(self, origins: int) -> int:
        result = 0
        for index in _bits(origins):
            result |= self.ancestors[index]
        return result

    def _attention(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        origins = 0
        for tensor in tensors_in((args, kwargs)):
            if (seen := self._seen(tensor)) is not None:
                origins |= seen.origins
        result = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            call = self._function("scaled_dot_product_attention", "attention", origins)
            call.saturation = _peaked_attention(args, kwargs)
            self._finish(call, result, origins, lambda t: t.ndim - 1)
        return result

    # ------------------------------------------------------------------------------------------------------------------------------
    # measures

    def _seen(self, tensor: Tensor) -> Seen | None:
        seen = self._known.get(id(tensor))
        if seen is None or seen.tensor() is not tensor:
            return None
        if seen.version != tensor._version:  # changed in place since: its origins still hold, its statistics do not
            return seen._replace(version=tensor._version, stats=None, channels=None, sinks=None)
        return seen

    def _note(self, tensor: Tensor, seen: Seen) -> None:
        self._known[id(tensor)] = seen

    def _stats(self, tensor: Tensor) -> Stats:
        """Statistics of an input: those of the call that made it, or measured now."""
        seen = self._seen(tensor)
        return seen.stats if seen is not None and seen.stats is not None else measure(tensor)[0]

    def _print(self, call: Call, tensor: Tensor) -> None:
        values = tensor.detach()
        values = torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
        if values.layout is torch.strided:
            slices = strides(tuple(values.shape), None, PRINT)
            self.prints[call.name, call.number] = (values if slices is None else values[slices]).flatten().float().clone()

    def _norm(self, frame: Frame, x: Tensor) -> Norm:
        module = frame.module
        pools, values, removes, axis = kinds.norm_geometry(module, tuple(x.shape))
        running_mean, running_var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        tracks = isinstance(running_mean, Tensor) and isinstance(running_var, Tensor)
        batches = getattr(module, "num_batches_tracked", None)
        learning = module.training and not getattr(module, "frozen", False)
        momentum = getattr(module, "momentum", None)
        norm = Norm(
            name=frame.name, type=type(module).__name__, call=-1, pools=pools, values=values, removes_mean=removes,  # type: ignore[arg-type]
            training=learning or not tracks, tracks=tracks, momentum=float(momentum) if isinstance(momentum, (int, float)) and tracks else
            None, batches=int(batches) if isinstance(batches, Tensor) and batches.numel() == 1 else None,
        )  # fmt: skip
        if tracks and axis is not None and x.numel() and frame.input is not None and frame.input.finite:
            assert isinstance(running_mean, Tensor)
            assert isinstance(running_var, Tensor)
            s = sample(x.detach(), axis, limit=max(SAMPLE, 512 * x.shape[axis])).double()
            mean = s.mean(1)
            var = (s - mean[:, None]).square_().mean(1)
            count = s.shape[1]
            mu, sigma2 = running_mean.double(), running_var.double()
            eps = float(getattr(module, "eps", 0.0) or 0.0)
            shift = (mean - mu) / (sigma2.clamp(min=0) + eps).sqrt().clamp(min=1e-30)
            if count > 1:  # with one value per channel there is no variance to compare
                ratio = ((var * count / (count - 1) + eps).clamp(min=1e-30) / (sigma2.clamp(min=0) + eps).clamp(min=1e-30)).log()
                worst = int(ratio.abs().argmax())
                norm.log_variance_drift = ratio.mean().item()
                norm.log_variance_drift_max, norm.log_variance_drift_channel = ratio[worst].item(), worst
            far = int(shift.abs().argmax())
            norm.mean_drift = shift.square().mean().sqrt().item()
            norm.mean_drift_max, norm.mean_drift_channel = abs(shift[far].item()), far
        return norm

    def _steps(self, call: Call, module: nn.RNNBase, output: Any, source: Tensor | None) -> None:
        first = output[0] if isinstance(output, tuple) and output and isinstance(output[0], Tensor) else None
        if first is None or first.ndim != 3:
            return
        time_axis = 1 if module.batch_first else 0

        def profile(x: Tensor) -> tuple[float, ...]:
            rows = x.detach().movedim(time_axis, 0).flatten(1)
            top = rows.abs().amax().double()
            rows = rows.double() if not 1e-15 < float(top) < 1e15 else rows.float()
            return tuple(binned(rows.square().mean(1).sqrt()))

        call.steps = Steps(length=first.shape[time_axis], forward=profile(first))
        if source is not None and source.requires_grad and source.ndim == 3:

            def arrived(gradient: Tensor) -> None:
                with torch._C.DisableTorchFunction():
                    assert call.steps is not None
                    call.steps = Steps(length=call.steps.length, forward=call.steps.forward, gradient=profile(gradient))

            source.register_hook(arrived)


def _gradient(sinks: list[Call], gradient: Tensor) -> None:
    with torch._C.DisableTorchFunction():
        stats, _ = measure(gradient)
    for call in sinks:
        call.gradient = stats


def _recomputing() -> bool:
    """Whether this runs inside a backward pass, where checkpointing repeats forwards that were already recorded."""
    return torch._C._current_graph_task_id() != -1


def _bits(mask: int) -> tuple[int, ...]:
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return tuple(found)


@torch.no_grad()
def saturation(activation: Activation, z: Tensor) -> float | None:
    """Share of a sample of inputs that lie in a flat end of the activation; None where it has none."""
    low, high = activation.ends
    if z.numel() == 0 or (low == -float("inf") and high == float("inf")):
        return None
    s = sample(z.detach() if not z.is_complex() else torch.view_as_real(z.detach()), None)
    return ((s < low) | (s > high)).float().mean().item()


@torch.no_grad()
def peaked(probabilities: Tensor, dim: int) -> float | None:
    """Share of a softmax's rows, of a sample of them, with more than 0.99 on one entry."""
    if probabilities.numel() == 0 or probabilities.shape[dim] < 2:
        return None
    rows = probabilities.detach().movedim(dim, -1)
    slices = strides(tuple(rows.shape), rows.ndim - 1, ROWS * rows.shape[-1])
    rows = rows if slices is None else rows[slices]
    return (rows.amax(-1) > PEAKED).float().mean().item()


@torch.no_grad()
def _peaked_attention(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """The same for fused attention, from a few queries of each head against all keys."""
    named = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
    q, k, mask = named["query"].detach(), named["key"].detach(), named.get("attn_mask")
    if q.numel() == 0 or k.shape[-2] < 2 or q.shape[:-2] != k.shape[:-2]:
        return None  # grouped queries: heads of their own
    rows = torch.arange(0, q.shape[-2], max(1, q.shape[-2] // 8), device=q.device)
    scale = named.get("scale") or q.shape[-1] ** -0.5
    logits = (q.index_select(-2, rows).float() * scale) @ k.float().mT
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], q.shape[-2], k.shape[-2]).index_select(-2, rows)
        logits = logits.masked_fill(~mask, -float("inf")) if mask.dtype == torch.bool else logits + mask
    allowed = logits > -float("inf")
    if named.get("is_causal"):
        allowed = allowed & (torch.arange(k.shape[-2], device=q.device) <= rows[:, None])
        logits = logits.masked_fill(~allowed, -float("inf"))
    choice = allowed.sum(-1) > 1  # a row with one key has nothing to choose
    return (logits.softmax(-1).amax(-1) > PEAKED)[choice].float().mean().item() if bool(choice.any()) else None
