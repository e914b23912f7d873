"""Mode group normalization: a gate assigns the channels of each sample to groups."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from equinorm.core import Affine, Moments
from equinorm.core.base import ChannelNorm, check_channels, check_count
from equinorm.core.channel import canonical_mask, channel_norm
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl


def mode_group(x: Moments, gate_weight: Tensor, gate_bias: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Affine:
    """Gate every channel of a sample by its mean, pool the channels of each mode, normalize by every mode and mix."""
    gates = (x.mean.unsqueeze(2) * gate_weight.to(x.mean.dtype) + gate_bias.to(x.mean.dtype)).softmax(2)  # (N, C, K)
    modes = x.weighted_over_channels(gates)  # (N, K)
    rstd = (modes.var + eps).rsqrt().unsqueeze(2)  # (N, K, 1)
    scale = gates @ rstd  # (N, C, 1)
    center = gates @ (rstd * modes.mean.unsqueeze(2)) / scale
    scale, center = scale.squeeze(2), center.squeeze(2)
    return Affine(center, scale if weight is None else scale * weight, scale.new_zeros(()) if bias is None else bias.to(scale.dtype))


class ModeGroupNorm(ChannelNorm):
    r"""Group normalization whose groups are found by a gate, softly and per sample.

    Formula:
        g_nc = softmax(gate_weight phi(x_nc) + gate_bias), phi(x_nc) the mean of channel c of sample n; C_nk = sum_c g_nck;
        mu_nk and var_nk: mean and biased variance over (C, *S) of one sample, channel c counting g_nck times;
        y_nc = sum_k g_nck (x_nc - mu_nk) / sqrt(var_nk + eps) * weight + bias.

    Use it when: group norm is wanted, and which channels belong together should be learned rather than fixed by their order.
    Not when: inference must fold into a neighbouring layer.
    Known trouble: only the authors' paper describes it, in one paragraph; no code was released. Channels are told apart by their means
        alone. Gates start nearly equal, where the method is layer norm over (C, *S), and may stay there.

    Args:
        num_features: C.
        num_modes: K.
        eps: added to each variance inside the root.
        affine: learn ``weight`` (1) and ``bias`` (0), both (C,).
        device, dtype: of the parameters.

    Shape:
        x: (N, C, *S) to the same shape and dtype. mask: boolean (N, *S) or (N, 1, *S), True where data is; the rest comes out as 0.

    Raises:
        TypeError: the input is not floating point.
        ValueError: wrong number of channels, one value per sample, a mask of another shape, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> equinorm.ModeGroupNorm(8, num_modes=3)(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])

    Source: Deecke, Murray and Bilen 2018, the section on mode group normalization. The paper averages the pooled channel values; here a
    mode's variance also holds the variance within its channels, without which one mode would not be group norm. The gate's bias starts
    at 0: with the one input it has, torch's default for a linear layer would assign channels at random.
    """

    facts: ClassVar[Facts] = Facts(
        name="mode_group",
        title="Mode Group Normalization",
        paper=Paper(
            authors="Deecke, Murray and Bilen",
            title="Mode Normalization",
            year=2018,
            venue="ICLR 2019",
            arxiv="1810.05466",
            equation="section on MGN",
        ),
        family="learned",
        pools="CS",
        invariances=frozenset({"per-sample"}),
        one_position="normalizes over the channels; refused when there is one channel",
        reads_writes="2R+1W",
    )

    def __init__(
        self,
        num_features: int,
        num_modes: int = 2,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine, device, dtype)
        check_count(self, num_modes=num_modes)
        self.num_modes = num_modes
        self.gate_weight = nn.Parameter(torch.empty(num_modes, device=device, dtype=dtype))
        self.gate_bias = nn.Parameter(torch.empty(num_modes, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Nearly equal gates, weight 1, bias 0."""
        super().reset_parameters()
        nn.init.normal_(self.gate_weight, 1 / self.num_modes, 0.01)
        nn.init.zeros_(self.gate_bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        check_channels(self, x, self.num_features)
        if x.shape[1:].numel() == 1:
            raise ValueError(
                f"ModeGroupNorm: a sample needs more than one value to have a variance, got shape {tuple(x.shape)}; use ModeNorm"
            )
        mask = None if mask is None else canonical_mask(x, mask)
        return channel_norm(
            x,
            lambda m, gw, gb, w, b: mode_group(m, gw, gb, w, b, self.eps),
            self.gate_weight,
            self.gate_bias,
            self.weight,
            self.bias,
            mask=mask,
            impl=impl,
        )[0]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_modes={self.num_modes}"
