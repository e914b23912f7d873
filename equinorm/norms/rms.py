"""Root mean square normalization, whole or partial."""

from __future__ import annotations

from math import ceil
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from equinorm.core.base import check_eps, check_trailing
from equinorm.core.row import row_norm
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl
from equinorm.kernels.reference import wide


class RMSNorm(torch.nn.RMSNorm):
    r"""Divide the last dimensions of the input by their root mean square.

    Formula:
        y = x / sqrt(mean(x^2) + eps) * (weight_offset + weight) + bias; with ``partial`` = p the mean reads only the first ceil(p D) of
        the D features.

    Use it when: a transformer or MLP needs layer norm's scale control without its centring, at less cost.
    Not when: the mean of the features drifts and must be removed.
    Known trouble: code bases differ in eps, in where eps stands, and in the type that multiplies the weight; the options name each of
        these so that published weights give published numbers. With ``partial``, a prefix near zero with a large tail explodes by
        1/sqrt(eps).

    Differences: from ``torch.nn.RMSNorm``: ``mask``, ``bias``, ``partial`` and the options for published weights; one fused pass on CPU.

    Args:
        normalized_shape: trailing shape to normalize, an int for the last dimension.
        eps: inside the root; None for the machine epsilon of the type that computes (float32 for half types), as torch does.
        elementwise_affine: learn ``weight`` of that shape, initially 1 - weight_offset.
        bias: learn ``bias`` (0) too.
        partial: share of the features that the statistic reads, in (0, 1]; one normalized dimension only. The paper's p is 0.0625.
        eps_inside: False adds eps to the root mean square instead (the authors' code, with 1e-8).
        weight_offset: constant added to ``weight``; Gemma's checkpoints store weight - 1 and use 1.
        cast_before_weight: round the normalized value to the input's type before multiplying (Llama's convention).
        device, dtype: of the parameters.

    Shape:
        x: (..., *normalized_shape) to the same shape and dtype. mask: boolean, broadcastable to x, True where data is; the rest enters no
        statistic and comes out as 0.

    Raises:
        TypeError: the input is not floating point.
        ValueError: the trailing shape differs, a mask that does not broadcast or is not boolean, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> equinorm.RMSNorm(2, eps=0.0)(torch.tensor([[3.0, 4.0]])).detach()
        tensor([[0.8485, 1.1314]])

    Source: Zhang and Sennrich 2019, Eq. 4 (and section 4 for the partial form). The authors' code rounds p D down, which measures nothing
    for small D; the paper's ceiling is used here.
    """

    facts: ClassVar[Facts] = Facts(
        name="rms",
        title="Root Mean Square Layer Normalization",
        paper=Paper(
            authors="Zhang and Sennrich",
            title="Root Mean Square Layer Normalization",
            year=2019,
            venue="NeurIPS",
            arxiv="1910.07467",
            equation="Eq. 4",
        ),
        family="sample",
        pools="D",
        invariances=frozenset({"scale", "per-sample"}),
        one_position="normalizes the features of the one position",
    )

    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = False,
        partial: float | None = None,
        eps_inside: bool = True,
        weight_offset: float = 0.0,
        cast_before_weight: bool = False,
    ) -> None:
        self.weight_offset = weight_offset  # read by reset_parameters, which the constructor of torch calls
        super().__init__(normalized_shape, eps, elementwise_affine, device=device, dtype=dtype)
        check_eps(self, eps or 0.0)
        if partial is not None and (not 0 < partial <= 1 or len(self.normalized_shape) != 1):
            raise ValueError(
                f"RMSNorm: partial must be a share in (0, 1] of one normalized dimension, got {partial} of {tuple(self.normalized_shape)}"
            )
        self.partial, self.eps_inside, self.cast_before_weight = partial, eps_inside, cast_before_weight
        wanted = bias and elementwise_affine
        self.register_parameter("bias", nn.Parameter(torch.zeros(self.normalized_shape, device=device, dtype=dtype)) if wanted else None)

    @classmethod
    def for_channels(cls, channels: int, **options: Any) -> Self:
        """RMS norm over a last dimension of ``channels`` features."""
        return cls(channels, **options)

    def reset_parameters(self) -> None:
        """Weight 1 - weight_offset, bias 0."""
        if self.elementwise_affine:
            nn.init.constant_(self.weight, 1 - self.weight_offset)
        if (bias := getattr(self, "bias", None)) is not None:
            nn.init.zeros_(bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        check_trailing(self, x, self.normalized_shape, mask)
        dims, eps = len(self.normalized_shape), self.eps
        if eps is None:
            eps = torch.finfo(wide(x[:0]).dtype).eps
        measured = None if self.partial is None else ceil(self.partial * self.normalized_shape[0])
        weight = self.weight
        if weight is not None and self.weight_offset:
            weight = weight + self.weight_offset
        if self.eps_inside and not self.cast_before_weight:
            return row_norm(x, dims, weight, self.bias, eps, centered=False, measured=measured, mask=mask, impl=impl)
        if self.eps_inside:
            normalized = row_norm(x, dims, None, None, eps, centered=False, measured=measured, mask=mask, impl=impl)
        else:
            normalized = self._eps_outside(x, dims, eps, measured, mask)
        normalized = normalized if weight is None else normalized * weight
        normalized = normalized if self.bias is None else normalized + self.bias
        return (normalized if mask is None else normalized * mask).to(x.dtype)

    def _eps_outside(self, x: Tensor, dims: int, eps: float, measured: int | None, mask: Tensor | None) -> Tensor:
        over = tuple(range(-dims, 0))
        data = wide(x) if mask is None else torch.where(mask, wide(x), 0.0)
        head = data[..., :measured] if measured else data
        if mask is None:
            count = torch.Size(head.shape[-dims:]).numel()
        else:
            count = mask.expand_as(data)[..., : head.shape[-1]].sum(over, keepdim=True).clamp(min=1)
        rms = (head.square().sum(over, keepdim=True) / count).sqrt()
        normalized = data / (rms + eps)
        return normalized.to(x.dtype) if self.cast_before_weight else normalized

    def extra_repr(self) -> str:
        options = {"bias": self.bias is not None, "partial": self.partial, "weight_offset": self.weight_offset}
        return super().extra_repr() + "".join(f", {name}={value}" for name, value in options.items() if value)
