"""Layer scaling: divide each sample by its root mean square over channels and positions."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from torch import Tensor, nn

from equinorm.core import Affine, Moments
from equinorm.core.base import check_count, check_eps, check_floating
from equinorm.core.channel import canonical_mask, channel_norm
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl


def layer_scaling(x: Moments, groups: int, eps: float) -> Affine:
    """Divide by the root mean square over the channels of a group and all positions; the mean square is known from mean and variance."""
    group = x.over_channels() if groups == 1 else x.over_groups(groups)
    zero = group.mean.new_zeros(())
    return Affine(zero, (group.var + group.mean.square() + eps).rsqrt(), zero)


class LayerScaling(nn.Module):
    r"""Divide each sample by its root mean square over all channels and positions.

    Formula:
        y = x / sqrt(mean(x^2) + eps), the mean over (C, *S) of one sample, or over the channels of a group of ``group_size``.

    Use it when: something must keep a signal in range without learned parameters: after ``OnlineNorm`` (which has it built in), or in place
        of a norm where means should stay.
    Not when: weight and bias are wanted; ``RMSNorm`` and ``GroupNorm`` have them.
    Known trouble: a loud channel makes the others quiet.

    Args:
        group_size: channels that share a statistic; -1 for all.
        eps: added to the mean square inside the root.

    Shape:
        x: (N, C, *S) to the same shape and dtype. mask: boolean (N, *S) or (N, 1, *S), True where data is; the rest comes out as 0.

    Raises:
        TypeError: the input is not floating point.
        ValueError: fewer than two dimensions, a group size that does not divide C, a mask of another shape, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> equinorm.LayerScaling(eps=0.0)(torch.tensor([[3.0, 4.0]]))
        tensor([[0.8485, 1.1314]])

    Source: Chiley et al. 2019, section 3. The authors' layer writes the first input's number of channels into its settings; this one does
    not remember its inputs.
    """

    facts: ClassVar[Facts] = Facts(
        name="layer_scaling",
        title="Layer Scaling",
        paper=Paper(
            authors="Chiley et al.",
            title="Online Normalization for Training Neural Networks",
            year=2019,
            venue="NeurIPS",
            arxiv="1905.05894",
            equation="section 3",
        ),
        family="sample",
        pools="CS",
        invariances=frozenset({"scale", "per-sample"}),
        one_position="normalizes over the channels",
        reads_writes="2R+1W",
    )

    def __init__(self, group_size: int = -1, eps: float = 1e-5) -> None:
        super().__init__()
        if group_size != -1:
            check_count(self, group_size=group_size)
        check_eps(self, eps)
        self.group_size, self.eps = group_size, eps

    @classmethod
    def for_channels(cls, channels: int, **options: Any) -> Self:
        """The layer; it does not depend on the number of channels."""
        return cls(**options)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        check_floating(self, x)
        if x.ndim < 2:
            raise ValueError(f"LayerScaling: the input must have shape (N, C, *spatial), got {tuple(x.shape)}")
        channels = x.shape[1]
        if self.group_size != -1 and channels % self.group_size:
            raise ValueError(f"LayerScaling: group_size must divide the number of channels, got {self.group_size} for {channels} channels")
        groups = 1 if self.group_size == -1 else channels // self.group_size
        mask = None if mask is None else canonical_mask(x, mask)
        return channel_norm(x, lambda m: layer_scaling(m, groups, self.eps), mask=mask, impl=impl)[0]

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}, eps={self.eps}"
