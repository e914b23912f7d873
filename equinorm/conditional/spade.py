"""Spatially-adaptive normalization."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equinorm.core import Affine, Moments, normalize
from equinorm.core.base import ChannelNorm, check_batch, check_channels, check_count, check_momentum
from equinorm.core.channel import canonical_mask, channel_norm
from equinorm.core.row import group_norm
from equinorm.core.running import RunningMoments
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl
from equinorm.kernels.reference import wide

if TYPE_CHECKING:
    from equinorm.core.sync import Group

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class SPADE(RunningMoments, ChannelNorm):
    r"""Normalize, then scale and shift every position by what a small convolutional network makes of a label map.

    Formula:
        y = norm(x) * (1 + gamma(m)) + beta(m), norm(x) = (x - mu) / sqrt(var + eps) without parameters. mu and the biased var are a
        channel's over (N, *S), or their running estimates in evaluation ("batch"), or those of each sample ("instance"). The label map m,
        resized to x by nearest neighbour, gives h = relu(conv(m)), gamma = conv(h), beta = conv(h).

    Use it when: images are generated from a segmentation map: ordinary norms wash out what a label says over a uniform region.
    Not when: the condition is one vector per sample (ConditionalBatchNorm, AdaptiveInstanceNorm, FiLM).
    Known trouble: with norm="instance" a region of one label that fills the map loses its content. The three convolutions are most of the
        cost; they run in their parameters' type, and under autocast in its type, while the statistics and the modulation do not.

    Args:
        num_features: C.
        label_channels: channels of the label map (classes of a one-hot map).
        hidden_channels: channels of h.
        kernel_size: of the convolutions, odd; they are padded to keep the size.
        norm: "batch" or "instance".
        spatial_dims: 1, 2 or 3.
        eps: added to the variance inside the root.
        momentum: weight of the new value in the running estimates ("batch"); None for the plain average over all batches.
        process_group: pool the statistics ("batch") over this process group, or over all processes with "world". The authors train so.
        device, dtype: of the parameters.

    Shape:
        x: (N, C, *S) to the same shape and dtype. labels: floating point (N | 1, label_channels, *T) of any size, one-hot for class maps.
        mask: boolean (N, *S) or (N, 1, *S), True where data is; the rest enters neither statistics nor convolutions and comes out as 0.

    Raises:
        TypeError: an input is not floating point.
        ValueError: wrong number of channels or dimensions, one value per channel in training ("batch"), one position ("instance"), a mask
            of another shape, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> from torch.nn.functional import one_hot
        >>> norm, labels = equinorm.SPADE(8, label_channels=3), torch.randint(3, (2, 64, 64))
        >>> norm(torch.randn(2, 8, 16, 16), one_hot(labels, 3).movedim(-1, 1).float()).shape
        torch.Size([2, 8, 16, 16])

    Source: Park et al. 2019, Eq. 1; the paper scales by gamma, the authors' code by 1 + gamma, which is followed. Their checkpoints load.
    In their networks other convolutions carry spectral norm, these three do not.
    """

    facts: ClassVar[Facts] = Facts(
        name="spade",
        title="Spatially-Adaptive Normalization",
        paper=Paper(
            authors="Park et al.",
            title="Semantic Image Synthesis with Spatially-Adaptive Normalization",
            year=2019,
            venue="CVPR",
            arxiv="1903.07291",
            equation="Eq. 1",
        ),
        family="conditional",
        pools="NS",
        train_differs=True,
        synchronizes="count, mean and variance per channel",
        invariances=frozenset({"shift", "scale", "per-channel"}),
        batch_of_one="normalizes over the positions of the one sample; refused when there is one position",
        one_position="normalizes over the samples",
        reads_writes="4R+1W",
    )
    takes_condition: ClassVar[bool] = True

    process_group: Group

    def __init__(
        self,
        num_features: int,
        label_channels: int,
        hidden_channels: int = 128,
        kernel_size: int = 3,
        norm: Literal["batch", "instance"] = "batch",
        spatial_dims: int = 2,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        process_group: Group = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, False, device, dtype)
        check_count(self, label_channels=label_channels, hidden_channels=hidden_channels, kernel_size=kernel_size)
        check_momentum(self, momentum)
        if norm not in ("batch", "instance"):
            raise ValueError(f'SPADE: norm must be "batch" or "instance", got {norm!r}')
        if spatial_dims not in CONVOLUTIONS:
            raise ValueError(f"SPADE: spatial_dims must be 1, 2 or 3, got {spatial_dims}")
        if kernel_size % 2 == 0:
            raise ValueError(f"SPADE: kernel_size must be odd, so that padding keeps the size, got {kernel_size}")
        if norm == "instance" and process_group is not None:
            raise ValueError('SPADE: norm="instance" pools nothing over samples, so process_group must be None')
        self.label_channels, self.norm, self.spatial_dims = label_channels, norm, spatial_dims
        self.momentum, self.process_group = momentum, process_group
        convolution, options = CONVOLUTIONS[spatial_dims], {"padding": kernel_size // 2, "device": device, "dtype": dtype}
        self.mlp_shared = nn.Sequential(convolution(label_channels, hidden_channels, kernel_size, **options), nn.ReLU())
        self.mlp_gamma = convolution(hidden_channels, num_features, kernel_size, **options)
        self.mlp_beta = convolution(hidden_channels, num_features, kernel_size, **options)
        self.register_running((num_features,), track=norm == "batch", device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """The convolutions as any convolution; forget the running estimates."""
        for convolution in (self.mlp_shared[0], self.mlp_gamma, self.mlp_beta):
            convolution.reset_parameters()  # pyright: ignore[reportCallIssue]
        self.reset_running_stats()

    def forward(self, x: Tensor, labels: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        check_channels(self, x, self.num_features)
        if x.ndim != 2 + self.spatial_dims:
            raise ValueError(
                f"SPADE: the input must have {self.spatial_dims} spatial dimensions, as spatial_dims says, got {tuple(x.shape)}"
            )
        self._check_labels(x, labels)
        mask = None if mask is None else canonical_mask(x, mask)
        # Wide from the start: rounding the normalized x before it is modulated would round twice.
        y = self._normalized(wide(x), mask, impl) if self.norm == "batch" else self._instance(wide(x), mask, impl)
        gamma, beta = self._modulation(x, labels, mask)
        y = y * (1 + gamma) + beta
        return (y if mask is None else torch.where(mask, y, 0.0)).to(x.dtype)

    def _check_labels(self, x: Tensor, labels: Tensor) -> None:
        if not labels.is_floating_point():
            raise TypeError(
                f"SPADE: the label map must be floating point, got {labels.dtype}; make class maps one-hot, as in "
                f"torch.nn.functional.one_hot(labels, {self.label_channels}).movedim(-1, 1).float()"
            )
        if labels.ndim != x.ndim or labels.shape[1] != self.label_channels or labels.shape[0] not in (1, x.shape[0]):
            raise ValueError(
                f"SPADE: the label map must have shape ({x.shape[0]} or 1, {self.label_channels}, *T) with {self.spatial_dims} spatial "
                f"dimensions, got {tuple(labels.shape)}"
            )

    def _modulation(self, x: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gamma and beta, each (N | 1, C, *S), in float32 at least."""
        labels = F.interpolate(labels.to(self.mlp_gamma.weight.dtype), x.shape[2:], mode="nearest")
        h = self.mlp_shared(labels if mask is None else torch.where(mask, labels, 0.0))
        h = h if mask is None else torch.where(mask, h, 0.0)  # as if the image ended where its data ends
        return wide(self.mlp_gamma(h)), wide(self.mlp_beta(h))

    def _normalized(self, x: Tensor, mask: Tensor | None, impl: Impl) -> Tensor:
        if not self.learning:
            estimate = self.estimate()
            return channel_norm(x, lambda _: normalize(estimate, None, None, self.eps), per=None, mask=mask, impl=impl)[0]
        if self.process_group is None and mask is None:
            check_batch(self, x)

        def rule(moments: Moments) -> tuple[Affine, Moments]:
            pooled = moments.over_batch(self.process_group)
            return normalize(pooled, None, None, self.eps), pooled

        y, seen = channel_norm(x, rule, per="batch", mask=mask, impl=impl)
        if seen is not None:
            self.learn(seen)
        return y

    def _instance(self, x: Tensor, mask: Tensor | None, impl: Impl) -> Tensor:
        if x.shape[2:].numel() == 1:
            raise ValueError(
                f'SPADE: norm="instance" needs more than one position to have a variance, got shape {tuple(x.shape)}; use norm="batch"'
            )
        return group_norm(x, self.num_features, None, None, self.eps, mask=mask, impl=impl)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in ("running_mean", "running_var", "num_batches_tracked"):  # where the authors' checkpoints keep them
            theirs = f"{prefix}param_free_norm.{name}"
            if theirs in state_dict:
                state_dict[prefix + name] = state_dict.pop(theirs)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.num_features}, label_channels={self.label_channels}, norm={self.norm!r}, eps={self.eps}, momentum={self.momentum}"
