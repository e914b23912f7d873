"""Activation normalization: an affine map per channel, set once by the first batch, learned from then on."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from equinorm.core import Affine
from equinorm.core.base import accept_published_shapes, check_channels, check_count, check_eps
from equinorm.core.channel import canonical_mask, channel_norm
from equinorm.core.measure import measure
from equinorm.core.sync import refusing_together
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl
from equinorm.kernels.reference import small_dtype

if TYPE_CHECKING:
    from equinorm.core.sync import Group


def activation(bias: Tensor, log_scale: Tensor) -> Affine:
    """The map there: (x + bias) * exp(log_scale)."""
    return Affine(-bias, log_scale.exp(), bias.new_zeros(()))


def inverse_activation(bias: Tensor, log_scale: Tensor) -> Affine:
    """The map back: y * exp(-log_scale) - bias."""
    return Affine(bias.new_zeros(()), (-log_scale).exp(), -bias)


class ActNorm(nn.Module):
    r"""Shift and scale each channel by learned numbers that start where they standardize the first batch; invertible.

    Formula:
        y = (x + bias) * exp(s * log_scale), s = ``logscale_factor``; the log-determinant of a sample is its number of positions times
        sum_c s * log_scale. The first training batch sets bias = -mean and s * log_scale = log(scale / (std + eps)), with the mean and
        the biased standard deviation of each channel over (N, *S) and all processes. From then on both are ordinary parameters.

    Use it when: a normalizing flow needs a norm that is invertible and independent of the batch; or to start any network in a sane range.
    Not when: the scale of activations drifts during training and nothing else holds it: nothing is measured after the first batch.
    Known trouble: build optimizers' and averages' copies of the parameters after the first batch, or call ``initialize`` first; call it
        also before ``torch.compile(fullgraph=True)``. A checkpoint remembers that it was initialized. A channel that is constant in the
        first batch gets the scale 1 / eps: warned of, bounded by ``max_log_scale``. Parameters of a half type round the first batch's
        mean; keep them float32.

    Args:
        num_features: C.
        scale: standard deviation after initialization.
        eps: added to the measured standard deviation.
        logscale_factor: s. The stored number is 1 / s of the logarithm, so a step of SGD moves the logarithm s^2 times as far, and one of
            Adam s times; the authors' code uses 3, the paper does not mention it.
        batch_variance: one standard deviation for all channels (each about its own mean).
        max_log_scale: upper bound of the initial s * log_scale; None for none.
        process_group: whose first batch counts: "world" for that of all processes, a process group, or None for this process alone.
        device, dtype: of the parameters.

    Shape:
        x: (N, C, *S) to the same shape and dtype. logdet: (N,) or a number; where it is given, the result is the pair of y and logdet plus
        the layer's own (minus it with ``reverse``). mask: boolean (N, *S) or (N, 1, *S), True where data is; the rest comes out as 0 and
        does not count.

    Raises:
        TypeError: the input is not floating point.
        ValueError: wrong number of channels, a mask of another shape, a first batch that is not finite, or settings out of range.
        RuntimeError: evaluation or ``reverse`` before the first training batch; processes that disagree, as in ``SyncBatchNorm``.

    Example:
        >>> import torch, equinorm
        >>> norm, x = equinorm.ActNorm(3), torch.randn(8, 3, 4, 4) * 5 + 2
        >>> y, logdet = norm(x, logdet=0.0)
        >>> torch.allclose(y.std((0, 2, 3), correction=0), torch.ones(3)), logdet.shape
        (True, torch.Size([8]))
        >>> torch.allclose(norm.inverse(y), x, atol=1e-5)
        True

    Source: Kingma and Dhariwal 2018, section 3.1. The paper writes y = s * x + b; the authors' code adds the bias first, and is followed:
    the functions are the same, the parameters and their gradients are not. The authors' code does not reduce the first batch over
    processes (the switch is off); here it is reduced.
    """

    facts: ClassVar[Facts] = Facts(
        name="activation",
        title="Activation Normalization (ActNorm)",
        paper=Paper(
            authors="Kingma and Dhariwal",
            title="Glow: Generative Flow with Invertible 1x1 Convolutions",
            year=2018,
            venue="NeurIPS",
            arxiv="1807.03039",
            equation="section 3.1",
        ),
        family="batch",
        pools="NS",
        synchronizes="count, mean and variance per channel of the first batch",
        folds=True,
        invariances=frozenset({"per-sample", "per-channel"}),
        batch_of_one="works; a first batch of one sample sets the parameters from its positions",
        one_position="works; a first batch of a single value has no deviation and is warned of",
    )

    process_group: Group
    initialized: Tensor

    def __init__(
        self,
        num_features: int,
        scale: float = 1.0,
        eps: float = 1e-6,
        logscale_factor: float = 1.0,
        batch_variance: bool = False,
        max_log_scale: float | None = None,
        process_group: Group = "world",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count(self, num_features=num_features)
        check_eps(self, eps)
        for name, value in (("scale", scale), ("logscale_factor", logscale_factor)):
            if not 0 < value < float("inf"):
                raise ValueError(f"ActNorm: {name} must be a positive finite number, got {value}")
        self.num_features, self.scale, self.eps, self.logscale_factor = num_features, scale, eps, logscale_factor
        self.batch_variance, self.max_log_scale, self.process_group = batch_variance, max_log_scale, process_group
        self.bias = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.log_scale = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.register_buffer("initialized", torch.empty((), dtype=torch.bool, device=device))
        self.reset_parameters()

    @classmethod
    def for_channels(cls, channels: int, **options: Any) -> Self:
        """The norm for ``channels`` channels with its default settings, as the catalogue builds it."""
        return cls(channels, **options)

    def reset_parameters(self) -> None:
        """The identity, to be initialized by the next training batch."""
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.log_scale)
        self.initialized.fill_(False)
        self._known = False  # the buffer's True, kept in Python: reading it costs a synchronisation, and a graph break

    @torch.no_grad()
    def initialize(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Set the parameters so that ``x`` comes out with mean 0 and standard deviation ``scale``, in place; again, if called again.

        All processes of the group take part, those without data with an empty batch. A batch that is empty everywhere changes nothing.

        Args:
            x: (N, C, *S).
            mask: as for ``forward``.
        """
        with refusing_together(self.process_group, x.device):
            check_channels(self, x, self.num_features)
            mask = None if mask is None else canonical_mask(x, mask)
        seen = measure(x, per="batch", mask=mask).over_batch(self.process_group)  # (1, C)
        if int(seen.count) == 0:
            return
        if not (seen.mean.isfinite().all() and seen.var.isfinite().all()):
            raise ValueError(
                "ActNorm: the batch that initializes must be finite, got infinity or NaN in its statistics; initialize with another"
            )
        std = (seen.var.mean(1, keepdim=True).expand_as(seen.var) if self.batch_variance else seen.var).sqrt()
        if constant := (std < self.eps).flatten().nonzero().flatten().tolist():
            warnings.warn(
                f"ActNorm: channels {constant} are constant in the batch that initializes, and get a scale of {self.scale / self.eps:g}; "
                "initialize with more data, or bound it with max_log_scale",
                RuntimeWarning,
                stacklevel=2,
            )
        log_scale = (self.scale / (std + self.eps)).log().clamp(max=float("inf") if self.max_log_scale is None else self.max_log_scale)
        self.bias.copy_(-seen.mean.flatten())
        self.log_scale.copy_(log_scale.flatten() / self.logscale_factor)
        self.initialized.fill_(True)
        self._known = True

    def forward(
        self, x: Tensor, logdet: Tensor | float | None = None, reverse: bool = False, mask: Tensor | None = None, *, impl: Impl = "auto"
    ) -> Tensor | tuple[Tensor, Tensor]:
        check_channels(self, x, self.num_features)
        if not self._is_initialized():
            if reverse or not self.training:
                raise RuntimeError(
                    f"ActNorm: {'the inverse is' if reverse else 'evaluation is'} not defined before the first training batch has set the "
                    "parameters; run one, call initialize(x), or load a checkpoint"
                )
            self.initialize(x, mask)
        mask = None if mask is None else canonical_mask(x, mask)

        def rule(_: None, bias: Tensor, log_scale: Tensor) -> Affine:
            small = small_dtype(bias)
            return (inverse_activation if reverse else activation)(bias.to(small), log_scale.to(small) * self.logscale_factor)

        y = channel_norm(x, rule, self.bias, self.log_scale, per=None, mask=mask, impl=impl)[0]
        if logdet is None:
            return y
        positions = x.shape[2:].numel() if mask is None else mask.flatten(1).sum(1)
        own = (self.log_scale.float() if x.dtype != torch.float64 else self.log_scale.double()).sum() * self.logscale_factor * positions
        return y, (logdet - own if reverse else logdet + own).expand(x.shape[0])

    def inverse(
        self, y: Tensor, logdet: Tensor | float | None = None, mask: Tensor | None = None, *, impl: Impl = "auto"
    ) -> Tensor | tuple[Tensor, Tensor]:
        """What :meth:`forward` maps to ``y``; with ``logdet``, the pair of it and logdet minus the layer's own."""
        return self(y, logdet, True, mask, impl=impl)

    def _is_initialized(self) -> bool:
        self._known = self._known or bool(self.initialized)
        return self._known

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for theirs, own in {"logs": "log_scale", "is_initialized": "initialized"}.items():
            if prefix + theirs in state_dict:
                state_dict[prefix + own] = state_dict.pop(prefix + theirs)
        accept_published_shapes(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._known = not self.initialized.is_meta and bool(self.initialized)

    def extra_repr(self) -> str:
        return f"{self.num_features}, scale={self.scale}, eps={self.eps}, logscale_factor={self.logscale_factor}"
