"""Batch normalization over all processes, and the conversion of models to it and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from equinorm.core.base import check_count, check_eps, check_momentum
from equinorm.core.following import set_activation, shown_activation
from equinorm.core.running import RunningMoments
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl
from equinorm.kernels.reference import wide
from equinorm.norms.batch import BatchNorm, batch_norm

if TYPE_CHECKING:
    from equinorm.core.sync import Group


def convert_sync_batchnorm(module: nn.Module, process_group: Group = None) -> nn.Module:
    """Replace every batch norm in ``module`` by a :class:`SyncBatchNorm` that holds the same parameters and buffers.

    Replaced are ``torch.nn.BatchNorm1d``, ``2d``, ``3d``, ``torch.nn.SyncBatchNorm`` and :class:`equinorm.BatchNorm`. A subclass with a
    ``forward`` of its own is left alone, because that would be lost. A norm used in several places stays one norm.

    Args:
        module: any model; it is changed in place. A norm by itself is returned converted.
        process_group: whom the statistics are pooled with; None for all processes.

    Returns:
        ``module``, or what replaces it.

    Raises:
        ValueError: a lazy batch norm that does not know its channels yet.

    Example:
        >>> import torch, equinorm
        >>> equinorm.convert_sync_batchnorm(torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8)))[1]
        SyncBatchNorm(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """
    return _replaced(module, lambda norm: _twin(SyncBatchNorm, norm, process_group=process_group), {})


def revert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Replace every synchronised batch norm in ``module``, ours or torch's, by a local :class:`equinorm.BatchNorm`: the inverse.

    A model trained on many processes then runs, exports and trains on one. Parameters and buffers are the same objects as before.

    Args:
        module: any model; it is changed in place. A norm by itself is returned converted.

    Returns:
        ``module``, or what replaces it.
    """
    return _replaced(module, lambda norm: _twin(BatchNorm, norm), {})


def _replaced(module: nn.Module, twin: Callable[[Any], nn.Module], done: dict[nn.Module, nn.Module]) -> nn.Module:
    if module not in done:
        forwards = (_BatchNorm.forward, nn.SyncBatchNorm.forward, BatchNorm.forward, SyncBatchNorm.forward)
        done[module] = twin(module) if type(module).forward in forwards else module
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = _replaced(child, twin, done)
    return done[module]


def _twin(cls: type[BatchNorm | SyncBatchNorm], norm: Any, **options: Any) -> nn.Module:
    if nn.parameter.is_lazy(norm.weight) or nn.parameter.is_lazy(norm.running_mean):
        raise ValueError(f"{type(norm).__name__} does not know its channels yet; run the model once on an example, then convert it")
    twin = cls(
        norm.num_features,
        norm.eps,
        norm.momentum,
        norm.affine,
        norm.track_running_stats,
        device="meta",
        bias=norm.bias is not None,
        activation=getattr(norm, "activation", None),
        activation_param=getattr(norm, "activation_param", None),
        **options,
    )
    twin.weight, twin.bias, twin.num_batches_tracked = norm.weight, norm.bias, norm.num_batches_tracked
    for name in ("running_mean", "running_var"):
        buffer = getattr(norm, name)
        setattr(twin, name, None if buffer is None else wide(buffer))
    twin.frozen = getattr(norm, "frozen", False)
    return twin.train(norm.training)


class SyncBatchNorm(RunningMoments, _BatchNorm):
    r"""Batch norm whose statistics cover the batches of all processes.

    Formula:
        y = (x - mu) / sqrt(var + eps) * weight + bias. Process r holds n_r values per channel with mean m_r and biased variance v_r;
        n = sum n_r, mu = sum n_r m_r / n, var = sum n_r (v_r + (m_r - mu)^2) / n. Running estimates are as in ``BatchNorm``, with n
        counted over all processes. Evaluation is local.

    Use it when: the batch of one process is too small for batch norm: detection, segmentation, large inputs.
    Not when: each process has some 16 or more independent samples; the exchange then costs time and buys little.
    Known trouble: every process must call the layer equally often. One without data passes an empty batch; one that skips the call leaves
        the others waiting until the group's timeout. Gradients of ``weight`` and ``bias`` are those of the process's own samples, as for
        any parameter: DistributedDataParallel averages them. In evaluation with ``track_running_stats=False`` statistics are local.

    Differences: from ``torch.nn.SyncBatchNorm``: any device and backend; (N, C, *S) with ``mask``; counts and statistics travel in float64
    whatever the input's type, so that empty processes, unequal batches, half types and variances far below eps are exact; differentiable
    twice; what disagrees between processes is an error on all of them. DistributedDataParallel need not recognise the class, and does not.

    Args:
        num_features: C.
        eps: added to the variance inside the root.
        momentum: weight of the new value in the running estimates; None for the plain average over all batches.
        affine: learn ``weight`` (1) and ``bias`` (0), both (C,).
        track_running_stats: keep running estimates; without them evaluation uses the batch.
        process_group: whom to pool with; None (or "world") for all processes. Outside of distributed training it is batch norm.
        device, dtype: of the parameters. Estimates are float32, or float64 in a float64 module.
        bias: False leaves out the bias.
        activation: name of a function of ``torch.nn.functional`` that follows the norm ("relu", "silu", "leaky_relu" ...), or None. What is
            between the two is never stored, and backward computes it anew.
        activation_param: slope of leaky_relu, alpha of elu and celu.

    Shape:
        x: (N, C, *S) to the same shape and dtype; N may differ between processes and be 0. mask: boolean (N, *S) or (N, 1, *S), True where
        data is; the rest comes out as 0.

    Raises:
        TypeError: the input is not floating point.
        ValueError: wrong number of channels, one value per channel over all processes in training, a mask of another shape, or settings out
            of range.
        RuntimeError: on every process, when one refused its input, or they disagree on the channels or on whether a gradient is needed.

    Example:
        >>> import torch, equinorm
        >>> equinorm.SyncBatchNorm(8)(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])

    Source: Ioffe and Szegedy 2015, Algorithm 1, over all processes as in Peng et al. 2017 (section 3.3). torch's layer gathers
    1 / sqrt(var + eps) and rebuilds the variance from it, which loses variances far below eps; here the variance itself travels.
    """

    facts: ClassVar[Facts] = Facts(
        name="sync_batch",
        title="Synchronized Batch Normalization",
        paper=Paper(
            authors="Peng et al.",
            title="MegDet: A Large Mini-Batch Object Detector",
            year=2017,
            venue="CVPR 2018",
            arxiv="1711.07240",
            equation="section 3.3",
        ),
        family="batch",
        pools="NS",
        train_differs=True,
        synchronizes="count, mean and variance per channel",
        folds=True,
        invariances=frozenset({"shift", "scale", "per-channel"}),
        batch_of_one="normalizes over the positions and the other processes; refused when there is one value in all",
        one_position="normalizes over the samples",
        reads_writes="2R+1W",
    )

    process_group: Group

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Group = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        activation_param: float | None = None,
    ) -> None:
        nn.Module.__init__(self)
        check_count(self, num_features=num_features)
        check_eps(self, eps)
        check_momentum(self, momentum)
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats, self.process_group = affine, track_running_stats, process_group
        for name, wanted in (("weight", affine), ("bias", affine and bias)):
            self.register_parameter(name, nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if wanted else None)
        self.register_running((num_features,), track=track_running_stats, device=device, dtype=dtype)
        set_activation(self, activation, activation_param)
        self.reset_parameters()

    convert_sync_batchnorm = staticmethod(convert_sync_batchnorm)

    @classmethod
    def for_channels(cls, channels: int, **options: Any) -> Self:
        """The norm for ``channels`` channels with its default settings, as the catalogue builds it."""
        return cls(channels, **options)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        return batch_norm(self, x, mask, impl, self.process_group or "world")

    def extra_repr(self) -> str:
        return super().extra_repr() + shown_activation(self)
