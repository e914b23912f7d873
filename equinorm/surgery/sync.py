"""Statistics over all processes, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from equinorm.norms.batch import BatchNorm
from equinorm.norms.sync_batch import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm
from equinorm.surgery.freeze import is_frozen
from equinorm.surgery.kinds import Norm, Where, chosen, norms, parametrized, view
from equinorm.surgery.layout import MovedChannels
from equinorm.surgery.places import replace
from equinorm.surgery.plan import Change, Plan, Refusal

if TYPE_CHECKING:
    from equinorm.core.sync import Group

PARAMETRIZED = (
    "has a parametrization, which the norm in its place would lose; torch.nn.utils.parametrize.remove_parametrizations takes it off"
)
TORCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def sync(model: nn.Module, process_group: Group = None, *, where: Where = None, dry_run: bool = False) -> Plan:
    """Let norms pool their training statistics over processes, in place.

    Norms of equinorm that take a ``process_group`` get one. Batch norms of torch become :class:`equinorm.SyncBatchNorm`, with the same
    parameters and buffers, so that an optimizer need not know. Fused forms keep their activation behind it.

    Args:
        model: any module that contains norms.
        process_group: whom to pool with; None for all processes.
        where: which norms, as for :func:`~equinorm.surgery.swap`.
        dry_run: work the plan out and change nothing.

    Returns:
        The plan, applied unless ``dry_run``.

    Raises:
        ValueError: no norm matches, or the model is itself a batch norm of torch.

    Example:
        >>> import torch
        >>> from equinorm.surgery import sync
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> print(sync(model))
        sync (done): 1 change, 0 refusals
          1: BatchNorm2d(8) -> SyncBatchNorm(8)
              keeps parameters and buffers, which are the same objects
    """
    plan = Plan("sync")
    settings: dict[nn.Module, Group] = {}
    replacements: dict[nn.Module, nn.Module] = {}
    who = "all processes" if process_group in (None, "world") else "the process group"
    for norm, names in chosen("sync", norms(model), where).items():
        layer = norm.layer
        wanted = process_group if isinstance(layer, SyncBatchNorm) else process_group or "world"
        if hasattr(layer, "process_group") and not isinstance(layer, nn.SyncBatchNorm):
            if layer.process_group == wanted:
                plan.refusals.append(Refusal(names, str(norm), f"pools over {who} already"))
            else:
                settings[layer] = wanted
                plan.changes.append(Change(names, f"{norm}: pools over {who}"))
        elif parametrized(layer):
            plan.refusals.append(Refusal(names, str(norm), PARAMETRIZED))
        elif isinstance(twin := convert_sync_batchnorm(_plain(norm), process_group), SyncBatchNorm):
            replacements[norm.module] = _placed(norm, names, twin, plan)
        else:
            plan.refusals.append(Refusal(names, str(norm), "has no form that pools over processes"))
    return _done(model, plan, settings, replacements, dry_run)


def unsync(model: nn.Module, *, where: Where = None, dry_run: bool = False) -> Plan:
    """Let norms use the statistics of their own process again, in place: the inverse of :func:`sync`.

    A model trained on many processes then trains, runs and exports on one. Synchronised batch norms, ours or torch's, become
    :class:`equinorm.BatchNorm` with the same parameters and buffers; norms with a ``process_group`` lose it.

    Args:
        model: any module that contains norms.
        where: which norms, as for :func:`~equinorm.surgery.swap`.
        dry_run: work the plan out and change nothing.

    Returns:
        The plan, applied unless ``dry_run``.

    Raises:
        ValueError: no norm matches, none that does is synchronised, or the model is itself a synchronised batch norm.

    Example:
        >>> import torch
        >>> from equinorm.surgery import sync, unsync
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> _ = sync(model)
        >>> unsync(model).changes[0].what
        'SyncBatchNorm(8) -> BatchNorm(8)'
    """
    plan = Plan("unsync")
    settings: dict[nn.Module, Group] = {}
    replacements: dict[nn.Module, nn.Module] = {}
    for norm, names in chosen("unsync", norms(model), where).items():
        layer = norm.layer
        if isinstance(layer, (SyncBatchNorm, nn.SyncBatchNorm)) and parametrized(layer):
            plan.refusals.append(Refusal(names, str(norm), PARAMETRIZED))
        elif isinstance(layer, (SyncBatchNorm, nn.SyncBatchNorm)):
            twin = revert_sync_batchnorm(_plain(norm))
            if isinstance(twin, BatchNorm):
                replacements[norm.module] = _placed(norm, names, twin, plan)
            else:
                plan.refusals.append(Refusal(names, str(norm), "has a forward of its own, which would be lost"))
        elif getattr(layer, "process_group", None) is not None:
            settings[layer] = None
            plan.changes.append(Change(names, f"{norm}: measures its own process"))
        elif where is not None:
            plan.refusals.append(Refusal(names, str(norm), "is not synchronised"))
    return _done(model, plan, settings, replacements, dry_run)


def _plain(norm: Norm) -> nn.Module:
    """The norm as torch's class, sharing its tensors, where a fused form only adds an activation to that."""
    fused = norm.core is not norm.module and not isinstance(norm.core, MovedChannels)
    base = next((cls for cls in TORCH if isinstance(norm.core, cls)), None)
    if not fused or base is None:
        return norm.inner
    bare = view(norm.core)
    bare.__class__ = base
    bare._modules = {}
    return bare


def _placed(norm: Norm, names: tuple[str, ...], twin: nn.Module, plan: Plan) -> nn.Module:
    """What stands in the model in place of ``norm``; the plan says it."""
    if "" in names:
        raise ValueError(
            f"{plan.operation}: the model is itself a norm, {type(norm.module).__name__}, and has no place in another; use "
            "convert_sync_batchnorm or revert_sync_batchnorm, which return it"
        )
    if is_frozen(norm.layer):
        twin.frozen = True  # type: ignore[assignment]
    after = "".join(f" + {type(part).__name__}" for part in norm.after)
    what = f"{norm} -> {type(twin).__name__}({norm.channels}){after}"
    plan.changes.append(Change(names, what, kept=("parameters and buffers, which are the same objects",)))
    if isinstance(norm.module, MovedChannels):
        return MovedChannels(twin, norm.module.dim)
    return nn.Sequential(twin, *norm.after) if norm.after else twin


def _done(model: nn.Module, plan: Plan, settings: dict[nn.Module, Group], replacements: dict[nn.Module, nn.Module], dry_run: bool) -> Plan:
    """Act on the plan.

    Raises:
        ValueError: there is nothing to do.
    """
    if not plan.changes and not plan.refusals:
        raise ValueError(f"{plan.operation}: no norm of {type(model).__name__} is synchronised")
    if dry_run or not plan.changes:
        return plan
    for layer, group in settings.items():
        layer.process_group = group  # type: ignore[assignment]
    replace(model, replacements)
    plan.applied = True
    return plan
