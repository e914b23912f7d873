"""Global response normalization."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from equinorm.core import Affine, Moments
from equinorm.core.base import ChannelNorm, check_floating
from equinorm.core.channel import canonical_mask, channel_norm
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl


def global_response(x: Moments, weight: Tensor, bias: Tensor, eps: float) -> Affine:
    """Multiply each channel by 1 + weight times its share of the response of all channels."""
    energy = (x.var + x.mean.square()) * x.count  # (N, C): the sum of squares, without subtracting anything
    silent = energy == 0
    g = torch.where(silent, 1, energy).sqrt() * ~silent  # the derivative of the norm of a silent map is 0
    response = g / (g.mean(1, keepdim=True) + eps)
    return Affine(response.new_zeros(()), 1 + weight * response, bias.to(response.dtype))


class GlobalResponseNorm(ChannelNorm):
    """Let the channels of each sample compete: amplify those whose response is large against the mean response.

    Formula:
        y = x + weight * x * r + bias, r_c = g_c / (mean_c g_c + eps), g_c = the Euclidean norm of channel c over the positions of a sample;
        weight and bias per channel, both 0 at the start, so that a fresh layer changes nothing.

    Use it when: a ConvNeXt block is trained as a masked autoencoder, or its expanded features collapse to copies of each other; it stands
        behind the expansion and its activation.
    Not when: the scale of the activations must be controlled. This is no replacement for layer norm: scaling the input scales the output.
    Known trouble: weights start at 0, so code that sets every norm's weight to 1 breaks it. Padding counts as response unless it is masked.

    Args:
        num_features: C.
        eps: added to the mean response.
        channel_dim: where the channels are: -1 for the channels-last tensors of ConvNeXt code, 1 for (N, C, *S). The catalogue's
            ``create`` builds it with 1, like every other norm.
        device, dtype: of the parameters.

    Shape:
        x: (N, *S, C), or as ``channel_dim`` says, to the same shape and dtype; S may be empty. mask: boolean over samples and positions,
        (N, *S) or with a channel dimension of size 1, True where data is; the rest enters no response and comes out as 0.

    Raises:
        TypeError: the input is not floating point.
        ValueError: wrong number of channels, a mask of another shape, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> norm = equinorm.GlobalResponseNorm(2)
        >>> _ = torch.nn.init.ones_(norm.weight)
        >>> norm(torch.tensor([[[3.0, 1.0], [4.0, 0.0]]])).detach()
        tensor([[[ 8.0000,  1.3333],
                 [10.6667,  0.0000]]])

    Source: Woo et al. 2023, section 4. The paper's equation divides by the sum over the channels, the authors' code and their published
    weights by the mean; this follows the code. Their sparse pre-training takes the norm over all points of the batch, which couples
    samples; here it is per sample, with a mask for what is not there. Checkpoints of theirs (gamma and beta, (1, 1, 1, C)) load.
    """

    facts: ClassVar[Facts] = Facts(
        name="global_response",
        title="Global Response Normalization (GRN)",
        paper=Paper(
            authors="Woo et al.",
            title="ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders",
            year=2023,
            venue="CVPR",
            arxiv="2301.00808",
            equation="section 4",
        ),
        family="sample",
        pools="S",
        invariances=frozenset({"per-sample"}),
        one_position="the response of a channel is its absolute value",
        reads_writes="2R+1W",
    )

    def __init__(
        self, num_features: int, eps: float = 1e-6, channel_dim: Literal[1, -1] = -1, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(num_features, eps, True, device, dtype)
        if channel_dim not in (1, -1):
            raise ValueError(
                f"GlobalResponseNorm: channel_dim must be 1 for (N, C, *spatial) or -1 for (N, *spatial, C), got {channel_dim}"
            )
        self.channel_dim = channel_dim
        self.reset_parameters()

    @classmethod
    def for_channels(cls, channels: int, *, channel_dim: Literal[1, -1] = 1, **options: Any) -> Self:
        """The norm for (N, C, *S), or with the channels where ``channel_dim`` says."""
        return cls(channels, channel_dim=channel_dim, **options)

    def reset_parameters(self) -> None:
        """Weight 0, bias 0: the identity."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        check_floating(self, x)
        dim = self.channel_dim
        if x.ndim < 2 or x.shape[dim] != self.num_features:
            forms = {1: f"(N, {self.num_features}, *spatial)", -1: f"(N, *spatial, {self.num_features})"}
            raise ValueError(
                f"GlobalResponseNorm: the input must have shape {forms[dim]}, got {tuple(x.shape)}; "
                f"for {forms[-dim]} construct it with channel_dim={-dim}"
            )
        x = x.movedim(dim, 1)
        if mask is not None:
            mask = canonical_mask(x, mask.movedim(dim, 1) if mask.ndim == x.ndim else mask)

        def rule(moments: Moments, weight: Tensor, bias: Tensor) -> Affine:
            return global_response(moments, weight, bias, self.eps)

        return channel_norm(x, rule, self.weight, self.bias, mask=mask, impl=impl)[0].movedim(1, dim)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for theirs, ours in (("gamma", "weight"), ("beta", "bias")):
            if prefix + theirs in state_dict:
                state_dict[prefix + ours] = state_dict.pop(prefix + theirs)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, channel_dim={self.channel_dim}"
