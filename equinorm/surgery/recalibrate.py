"""Running statistics measured anew: over any loader, for the model as it is now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from equinorm.core import Moments
from equinorm.core.channel import canonical_mask
from equinorm.core.running import RunningMoments, RunningState
from equinorm.core.sync import gather
from equinorm.core.whiten import WhiteningNorm
from equinorm.norms.batch_renorm import BatchRenorm
from equinorm.norms.sync_batch import SyncBatchNorm
from equinorm.surgery.calling import Forward, call
from equinorm.surgery.freeze import is_frozen
from equinorm.surgery.kinds import Norm, Where, chosen, norms
from equinorm.surgery.places import evaluating
from equinorm.surgery.plan import Change, Plan, Refusal
from equinorm.surgery.population import moments_along

if TYPE_CHECKING:
    from equinorm.core.sync import Group

AVERAGING = (RunningMoments, WhiteningNorm, BatchRenorm)  # whose momentum may be None, for the plain average
Mode = Literal["population", "average"]
SYNCHRONIZED = (SyncBatchNorm, nn.SyncBatchNorm)  # also without a group of their own
# What these keep is the mean and the unbiased variance of a channel: it can be measured from outside, exactly.
MEASURED = ("batch", "sync_batch", "ghost_batch", "in_place_batch")


class _Estimate:
    """The statistics of one norm over all batches: of all values together, or averaged over batches or samples."""

    def __init__(self, norm: Norm, mode: Mode) -> None:
        self.norm, self.batches = norm, 0
        self.averaged = mode == "average" or norm.kind == "instance"
        width = norm.inner.running_mean.numel() * (2 if self.averaged else 1)
        zeros = torch.zeros(1, width, dtype=torch.float64, device=norm.inner.running_mean.device)
        self.moments = Moments(zeros, zeros, 0)  # where averages are wanted, of (mean, variance) as if these were the data

    def see(self, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: measure the input."""
        x = args[0] if args else next(iter(kwargs.values()))
        mask = kwargs.get("mask", args[1] if len(args) > 1 else None)
        if self.norm.kind == "instance":
            data = x.detach().flatten(2).double()  # (N, C, S)
            parts, weight = torch.cat((data.mean(2), data.var(2)), 1).mean(0, keepdim=True), x.shape[0]
            seen = Moments(parts, torch.zeros_like(parts), weight)
        else:
            seen = moments_along(x, self.norm.axis, None if mask is None else canonical_mask(x, mask).squeeze(1))
            if self.averaged and seen.count:
                parts = torch.cat((seen.mean, seen.var * _bessel(int(seen.count))), 1)
                seen = Moments(parts, torch.zeros_like(parts), 1)
        if not seen.count:
            return
        if not bool((seen.mean + seen.var).isfinite().all()):
            raise ValueError(f"recalibrate: {self.norm} is given values that are not finite")
        self.moments = self.moments.merge(seen)
        self.batches += 1

    def over(self, group: Group) -> tuple[Tensor, Tensor, int] | None:
        """Mean, variance as it is stored, and number of batches, over all processes; None where nobody saw anything."""
        mean, var, count = gather(self.moments, group)
        batches = _total(self.batches, group, mean.device)
        if not batches:
            return None
        if self.averaged:
            mean, var = mean.chunk(2, 1)
            return mean[0], var[0], batches
        return mean[0], var[0] * _bessel(int(count)), batches


def _bessel(count: int) -> float:
    return count / max(count - 1, 1)


def _total(number: int, group: Group, device: torch.device) -> int:
    """The sum of a number over all processes."""
    zero = torch.zeros(1, 1, dtype=torch.float64, device=device)
    return int(gather(Moments(zero, zero, number), group).count)


def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    forward: Forward = call,
    batches: int | None = None,
    mode: Mode = "population",
    where: Where = None,
    process_group: Group = None,
    dry_run: bool = False,
) -> Plan:
    r"""Measure running statistics anew, in place: after averaging weights, swapping norms or a change of data.

    The model runs in evaluation mode, but for its norms with running statistics, which normalize by the batch as in training. What batch
    norms store is then either

    - "population": the mean and the unbiased variance of all values that the loader shows, exactly as if they were one batch: moments of
      batches are merged with their counts in float64, the spread of their means included; or
    - "average": the plain average of the batches' means and unbiased variances, as ``momentum=None`` gives.

    An instance norm stores the average over samples of their means and unbiased variances in either mode. Norms that keep another state
    (whitening matrices, mixtures, deviations) start anew and run their own training forward, with ``momentum=None`` where they have one.

    Args:
        model: any module; how it is called is up to ``forward``.
        loader: an iterable of batches.
        forward: ``forward(model, batch)``; the default passes a mapping as keywords, and of a tuple or list the first entry.
        batches: how many batches to use; None for all.
        mode: see above.
        where: which norms, as for :func:`~equinorm.surgery.swap`.
        process_group: merge the statistics of this process group, or of all processes with "world". Processes may have unequal numbers of
            batches, none included; while they run, each normalizes by its own batches.
        dry_run: say what would be measured, and run nothing.

    Returns:
        The plan, applied unless ``dry_run``.

    Raises:
        ValueError: no norm with running statistics, an empty loader (on all processes), settings out of range, values not finite.
        Exception: whatever the model raises. After any error all statistics are as they were.

    Example:
        >>> import torch, equinorm
        >>> from equinorm.surgery import recalibrate
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
        >>> data = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0], [5.0]])]
        >>> _ = recalibrate(model, data)
        >>> model[0].running_mean, model[0].running_var
        (tensor([3.]), tensor([2.5000]))
    """
    if mode not in ("population", "average"):
        raise ValueError(f'recalibrate: mode must be "population" or "average", got {mode!r}')
    if batches is not None and (isinstance(batches, bool) or not isinstance(batches, int) or batches < 1):
        raise ValueError(f"recalibrate: batches must be an integer of at least 1, or None for all, got {batches!r}")
    plan = Plan("recalibrate")
    estimates, running = _planned(model, where, mode, process_group, plan)
    if dry_run:
        return plan
    buffers = [(norm.layer, [buffer.clone() for buffer in norm.layer.buffers()]) for norm in (*estimates, *running)]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), evaluating(model), _measuring(estimates, running):
            count = 0
            for batch in islice(loader, batches):
                forward(model, batch)
                count += 1
            for layer, before in buffers[: len(estimates)]:
                _back(layer, before)  # the norms' own averages, which the measured ones replace
            _stored(estimates, count, process_group, plan)
    except BaseException:
        for layer, before in buffers:
            _back(layer, before)
        raise
    plan.applied = True
    return plan


@torch.no_grad()
def _back(layer: nn.Module, buffers: list[Tensor]) -> None:
    for buffer, before in zip(layer.buffers(), buffers, strict=True):
        buffer.copy_(before)


def _planned(model: nn.Module, where: Where, mode: Mode, group: Group, plan: Plan) -> tuple[dict[Norm, _Estimate], list[Norm]]:
    """Which norms are measured from outside, and which run their own training forward."""
    estimates: dict[Norm, _Estimate] = {}
    running: list[Norm] = []
    for norm, names in chosen("recalibrate", norms(model), where).items():
        layer = norm.layer
        if getattr(layer, "frozen", False) or is_frozen(layer):
            plan.refusals.append(Refusal(names, str(norm), "is frozen; unfreeze it first"))
        elif getattr(layer, "running_mean", None) is not None and not hasattr(layer, "momentum"):
            plan.refusals.append(Refusal(names, str(norm), "holds constants, which no training moves"))
        elif getattr(layer, "running_var", None) is not None and norm.kind in (*MEASURED, "instance"):
            estimates[norm] = _Estimate(norm, mode)
            over = "samples" if norm.kind == "instance" else "batches"
            what = f"averaged over {over}" if estimates[norm].averaged else "of all values together"
            plan.changes.append(Change(names, f"{norm}: mean and variance {what}"))
        elif isinstance(layer, RunningState) and any(True for _ in layer.buffers()):
            running.append(norm)
            own = group is not None and getattr(layer, "process_group", None) is None
            lost = ("what other processes see: it has no process group of its own",) if own else ()
            plan.changes.append(Change(names, f"{norm}: its own training forward, from a fresh start", lost=lost))
    if not plan.changes:
        reasons = "".join(f"; {refusal.where[0]} {refusal.reason}" for refusal in plan.refusals[:3])
        raise ValueError(f"recalibrate: {type(model).__name__} holds no norm with running statistics to measure{reasons}")
    return estimates, running


@contextmanager
def _measuring(estimates: dict[Norm, _Estimate], running: list[Norm]) -> Iterator[None]:
    """Within this context the norms normalize by their batches, and the estimates see what they are given."""
    handles = [norm.module.register_forward_pre_hook(each.see, with_kwargs=True, prepend=True) for norm, each in estimates.items()]
    momenta = [(norm.layer, norm.layer.momentum) for norm in running if isinstance(norm.layer, AVERAGING)]
    alone = [norm for norm in estimates if isinstance(norm.layer, SYNCHRONIZED) or getattr(norm.layer, "process_group", None) is not None]
    try:
        for norm in (*estimates, *running):
            norm.layer.train()
            for part in norm.after:
                part.eval()
        for norm in alone:
            norm.layer.forward = partial(_locally, norm)
        for norm in running:
            if callable(reset := getattr(norm.layer, "reset_running_stats", None)):
                reset()
        for layer, _ in momenta:
            layer.momentum = None
        yield
    finally:
        for handle in handles:
            handle.remove()
        for norm in alone:
            del norm.layer.__dict__["forward"]
        for layer, momentum in momenta:
            layer.momentum = momentum


def _locally(norm: Norm, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The training forward of a batch norm on this process's batch alone: others may have no batch to wait for."""
    mean, var, _ = moments_along(x, norm.axis, None if mask is None else canonical_mask(x, mask).squeeze(1))
    weight, bias = norm.affine()
    scale = (var + norm.eps).rsqrt() * (1 if weight is None else weight)  # (1, C)
    shift = (0 if bias is None else bias) - mean * scale
    scale, shift = (part.reshape(1, -1, *[1] * (x.ndim - 2)) for part in (scale, shift))
    y = (x.double() * scale + shift).to(x.dtype)
    if mask is not None:
        y = torch.where(canonical_mask(x, mask), y, 0)
    for part in norm.after:
        y = part(y)
    return y


def _stored(estimates: dict[Norm, _Estimate], count: int, group: Group, plan: Plan) -> None:
    """Write the statistics into the norms.

    Raises:
        ValueError: the loader was empty on all processes.
    """
    device = next((estimate.moments.mean.device for estimate in estimates.values()), torch.device("cpu"))
    total = _total(count, group, device)
    if not total:
        raise ValueError("recalibrate: the loader gave no batch" + (" on any process" if group is not None else "") + "; pass at least one")
    plan.remarks.append(f"{total} batches")
    for norm, estimate in estimates.items():
        if (found := estimate.over(group)) is None:
            plan.remarks.append(f"{norm} was not reached, and keeps its statistics")
            continue
        mean, var, batches = found
        norm.layer.running_mean.copy_(mean)
        norm.layer.running_var.copy_(var)
        if getattr(norm.layer, "num_batches_tracked", None) is not None:
            norm.layer.num_batches_tracked.fill_(batches)
