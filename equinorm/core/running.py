"""Running estimates: what a norm over the batch remembers for inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from equinorm.core.moments import Moments
from equinorm.kernels import empty, pick
from equinorm.kernels.reference import HALF, small_dtype


def recomputing() -> bool:
    """Whether this forward runs inside a backward pass: activation checkpointing repeats a forward that has already been counted."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@torch.library.custom_op("equinorm::snapshot", mutates_args=())
def _opaque_copy(buffer: Tensor) -> Tensor:
    """A copy that a compiler does not look into.

    A compiled backward pass recomputes cheap operations from the inputs of the graph, buffers included, and by then the step has moved the
    buffers: the gradient would be that of the next step. What comes out of an operation unknown to the compiler is kept instead.
    """
    return buffer.clone()


@_opaque_copy.register_fake
def _(buffer: Tensor) -> Tensor:
    return torch.empty_like(buffer)


def snapshot(buffer: Tensor) -> Tensor:
    """A copy of a buffer that a training step reads and then moves, floating types as small statistics."""
    if torch.compiler.is_compiling():
        buffer = _opaque_copy(buffer)
    return buffer.to(small_dtype(buffer) if buffer.is_floating_point() else buffer.dtype, copy=True)


def some(count: int | Tensor, like: Tensor) -> Tensor:
    """Whether there are any values, as booleans of the shape of ``count``, on the device of ``like``.

    A number is turned into a tensor there: copying one to a GPU waits for it, and is refused while a CUDA graph is captured.
    """
    return count > 0 if isinstance(count, Tensor) else torch.full((), count > 0, dtype=torch.bool, device=like.device)


class RunningState(nn.Module):
    """Buffers that training moves: kept wide in a half-precision module, at rest when frozen, read as they were before a step.

    Attributes:
        frozen: True makes training behave like evaluation: the state is used and not changed. Survives ``train()``.
        kept_wide: names of the buffers that stay float32 in a half-precision module (a bfloat16 average stops moving when the step falls
            under half an ulp); they are float64 in a float64 module.
    """

    frozen: bool = False
    kept_wide: tuple[str, ...] = ()
    _read: tuple[Tensor, ...] = ()

    def register_state(self, name: str, shape: tuple[int, ...], *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        """Create an uninitialized buffer of ``dtype``, float32 in place of half types; ``name`` belongs into ``kept_wide``."""
        wide = torch.float32 if (dtype or torch.get_default_dtype()) in HALF else dtype
        self.register_buffer(name, torch.empty(shape, device=device, dtype=wide))

    @property
    def learning(self) -> bool:
        """Whether the next forward measures the batch and moves the state."""
        return self.training and not self.frozen

    def before_step(self, *names: str) -> tuple[Tensor, ...]:
        """Copies of buffers as a training step must read them, floating ones in the type of small statistics.

        A forward that activation checkpointing repeats gets the copies of its first run, so that it computes the same again. One run is
        remembered: a module that is used several times within one checkpointed forward repeats only its last use exactly.
        """
        if recomputing() and self._read:
            return self._read
        read = tuple(snapshot(buffer) for name in names if (buffer := self._buffers[name]) is not None)
        if not torch.compiler.is_compiling():
            self._read = read
        return read

    @torch.no_grad()
    def move(self, name: str, value: Tensor, where: Tensor | None = None) -> None:
        """Give a buffer new values, except where they are not finite: one bad batch must not spoil the model for good.

        Args:
            name: the buffer.
            value: its shape, up to dimensions of size 1.
            where: boolean, broadcastable to the buffer; where False the old value stays.
        """
        buffer = self._buffers[name]
        assert buffer is not None
        value = value.reshape(buffer.shape).to(buffer.dtype)
        sound = value.isfinite() if where is None else value.isfinite() & where
        buffer.copy_(torch.where(sound, value, buffer))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: buffer for name in self.kept_wide if (buffer := self._buffers.get(name)) is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype in HALF:
                self._buffers[name] = buffer.to(after.device)
        return self


class RunningMoments(RunningState):
    """A running mean and variance as buffers, with torch's names and torch's sense of ``momentum`` (the weight of the new value).

    Buffers: ``running_mean`` (0), ``running_var`` (1), and ``num_batches_tracked`` (int64). All three are None when the module does not
    track.

    Attributes:
        momentum: weight of the new value; None for the plain average over all batches seen.
    """

    momentum: float | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    kept_wide = ("running_mean", "running_var")

    def register_running(self, shape: tuple[int, ...], *, track: bool = True, device: Any = None, dtype: torch.dtype | None = None) -> None:
        """Create the buffers (or register None for each of them)."""
        wide = torch.float32 if (dtype or torch.get_default_dtype()) in HALF else dtype
        for name, make in (("running_mean", torch.zeros), ("running_var", torch.ones)):
            self.register_buffer(name, make(shape, device=device, dtype=wide) if track else None)
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device) if track else None)

    def reset_running_stats(self) -> None:
        """Forget: mean 0, variance 1, no batches."""
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def estimate(self) -> Moments:
        """The estimates as moments (1, C) without gradient; a copy, because a later step moves the buffers."""
        assert self.running_mean is not None
        assert self.running_var is not None
        small, moves = small_dtype(self.running_mean), self.learning
        mean, var = (snapshot(b) if moves else b.to(small, copy=True) for b in (self.running_mean, self.running_var))
        return Moments(mean.unsqueeze(0), var.unsqueeze(0), 1)

    @torch.no_grad()
    def learn(self, seen: Moments, *, unbiased: bool = True) -> None:
        """Move the estimates towards the moments of one batch, ``(1, C)``.

        A repeated forward (activation checkpointing) changes nothing. A channel whose batch moments are not finite keeps its estimate:
        one bad batch must not spoil the model for good. A batch of no values changes no estimate and is not counted.

        Args:
            seen: pooled moments of the batch.
            unbiased: store count / (count - 1) times the variance, as torch's batch norm does.
        """
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None or recomputing():
            return
        count = seen.count
        if isinstance(count, Tensor):
            some = count.reshape(()) > (1 if unbiased else 0)
            self.num_batches_tracked.add_(some)
            var = seen.var * (count / (count - 1).clamp(min=1)) if unbiased else seen.var
        else:
            if count == 0:
                return
            some = None
            self.num_batches_tracked.add_(1)
            kernels = pick(self.running_mean)
            if self.momentum is not None and kernels is not None and kernels is not empty:
                bessel = count / (count - 1) if unbiased else 1.0
                kernels.running_update(self.running_mean, self.running_var, seen.mean, seen.var, self.momentum, bessel)
                return
            var = seen.var * (count / (count - 1)) if unbiased else seen.var
        weight = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked.clamp(min=1).to(seen.mean.dtype)
        mean, var = seen.mean.reshape(self.running_mean.shape), var.reshape(self.running_var.shape)
        mean = self.running_mean + weight * (mean - self.running_mean)  # in the wider type of the moments
        var = self.running_var + weight * (var - self.running_var)
        # What the buffers' type cannot hold is no estimate either.
        sound = mean.to(self.running_mean.dtype).isfinite() & var.to(self.running_var.dtype).isfinite()
        if some is not None:
            sound = sound & some
        self.running_mean.copy_(torch.where(sound, mean, self.running_mean))
        self.running_var.copy_(torch.where(sound, var, self.running_var))
