"""Adaptive instance normalization."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from equinorm.conditional.condition import Projection, check_condition
from equinorm.core import Affine, Moments
from equinorm.core.base import ChannelNorm, check_channels, check_count
from equinorm.core.channel import canonical_mask, channel_norm
from equinorm.core.measure import measure
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl


class Style(NamedTuple):
    """A style, known by its mean and standard deviation per channel. Linear mixtures of styles are styles.

    Attributes:
        mean: (N | 1, C).
        std: (N | 1, C).
    """

    mean: Tensor
    std: Tensor


def adaptive_instance(x: Moments, mean: Tensor, std: Tensor, strength: float, eps: float, unbiased: bool) -> Affine:
    """Take each channel of each sample from its own mean and deviation to those of the style, by ``strength`` of the way."""
    scale = std * (_variance(x, unbiased) + eps).rsqrt()  # (N, C)
    if strength == 1:
        return Affine(x.mean, scale, mean.to(scale.dtype))
    return Affine(x.mean, strength * scale + (1 - strength), strength * mean + (1 - strength) * x.mean)


def _variance(x: Moments, unbiased: bool) -> Tensor:
    if not unbiased:
        return x.var
    return x.var * (x.count / (x.count - 1).clamp(min=1) if isinstance(x.count, Tensor) else x.count / max(x.count - 1, 1))


class AdaptiveInstanceNorm(ChannelNorm):
    r"""Give each channel of each sample the mean and standard deviation of a style.

    Formula:
        y = std_s * (x - mu) / sqrt(var + eps) + mean_s, with mu and the biased var over the positions of one channel of one sample.
        Style-statistics form: mean_s and std_s = sqrt(var_s + eps) are the same moments of a second feature map.
        Generator form (``cond_dim``): std_s = 1 + scale, mean_s = shift, with (scale, shift) = A style + b a linear map of a vector.
        strength a < 1 returns (1 - a) x + a y, still in one read and one write.

    Use it when: the look of one image is carried over to another in a feature space (style transfer), or a generator is steered by a
        latent vector at every layer.
    Not when: the input's own contrast and brightness carry information; they are removed.
    Known trouble: a map of one value comes out as the style's mean. A generator can grow a droplet in one place to steer the statistics of
        all others; StyleGAN2 modulates weights instead. In style transfer the content loss compares with this layer's output, not with
        the content's features.

    Args:
        num_features: C.
        cond_dim: length of the style vector, for the generator form. None for the style-statistics form, which has no parameters.
        eps: added inside both roots.
        unbiased: divide variances by n - 1, for decoders trained with the common PyTorch port.
        device, dtype: of the parameters.

    Shape:
        x: (N, C, *S) with at least one spatial dimension, to the same shape and dtype. style: a feature map (N | 1, C, *T) of any size, or
        a :class:`Style` measured before with :meth:`measure`; in the generator form (N | 1, cond_dim). mask, style_mask: boolean (N, *S)
        and (N | 1, *T), True where data is; masked positions of x come out as 0, so that the sum over disjoint masks paints each region
        in its style.

    Raises:
        TypeError: an input is not floating point.
        ValueError: wrong number of channels, no spatial dimension, a style that does not fit, ``style_mask`` without a map, a strength
            outside of [0, 1], a mask of another shape, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> norm = equinorm.AdaptiveInstanceNorm(1, eps=0.0)
        >>> norm(torch.tensor([[[0.0, 1.0, 2.0, 3.0]]]), torch.tensor([[[10.0, 10.0, 14.0, 14.0]]]))
        tensor([[[ 9.3167, 11.1056, 12.8944, 14.6833]]])
        >>> red, blue = norm.measure(torch.randn(1, 1, 8)), norm.measure(torch.randn(1, 1, 8))
        >>> violet = type(red)(*((r + b) / 2 for r, b in zip(red, blue)))
        >>> norm(torch.randn(2, 1, 6), violet).shape
        torch.Size([2, 1, 6])

    Source: Huang and Belongie 2017, Eq. 8 (and section 7 for strength, mixtures and regions); the generator form is Karras et al. 2018
    (arXiv:1812.04948), Eq. 1. The paper has no eps. The authors' Torch7 code divides by the biased deviation of the content (eps inside)
    and multiplies by the unbiased one of the style (no eps); the common PyTorch port is unbiased with eps inside in both places
    (``unbiased``). Both biased, as here by default, is the same but for eps where content and style have equally many positions.
    """

    facts: ClassVar[Facts] = Facts(
        name="adaptive_instance",
        title="Adaptive Instance Normalization",
        paper=Paper(
            authors="Huang and Belongie",
            title="Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization",
            year=2017,
            venue="ICCV",
            arxiv="1703.06868",
            equation="Eq. 8",
        ),
        family="conditional",
        pools="S",
        invariances=frozenset({"shift", "scale", "per-sample", "per-channel"}),
        one_position="comes out as the style's mean; an input without positions is refused",
        reads_writes="2R+1W",
    )
    takes_condition: ClassVar[bool] = True

    def __init__(
        self,
        num_features: int,
        cond_dim: int | None = None,
        eps: float = 1e-5,
        unbiased: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, False, device, dtype)
        self.cond_dim, self.unbiased = cond_dim, unbiased
        self.projection = None
        if cond_dim is not None:
            check_count(self, cond_dim=cond_dim)
            self.projection = Projection(cond_dim, 2 * num_features, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Generator form: A ~ N(0, 1 / cond_dim), which gives a unit style vector unit scales and shifts, and b = 0."""
        if self.projection is not None:
            nn.init.normal_(self.projection.weight, std=self.projection.in_features**-0.5)
            nn.init.zeros_(self.projection.bias)

    def measure(self, style: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Style:
        """The mean and standard deviation of a feature map (N, C, *T), to be used many times or mixed with others."""
        check_channels(self, style, self.num_features, spatial=1)
        moments = measure(style, mask=None if mask is None else canonical_mask(style, mask), impl=impl)
        return Style(moments.mean, (_variance(moments, self.unbiased) + self.eps).sqrt())

    def forward(
        self,
        x: Tensor,
        style: Tensor | Style,
        mask: Tensor | None = None,
        *,
        strength: float = 1.0,
        style_mask: Tensor | None = None,
        impl: Impl = "auto",
    ) -> Tensor:
        check_channels(self, x, self.num_features, spatial=1)
        mask = None if mask is None else canonical_mask(x, mask)
        if not 0 <= strength <= 1:
            raise ValueError(f"AdaptiveInstanceNorm: strength must be in [0, 1], from the content to the style, got {strength}")
        if style_mask is not None and (self.projection is not None or isinstance(style, Style)):
            raise ValueError(
                "AdaptiveInstanceNorm: style_mask belongs to a style that is a feature map; give it to measure(), or leave it out"
            )
        if self.projection is None:
            style = style if isinstance(style, Style) else self.measure(style, style_mask, impl=impl)
        else:
            style = self._generate(x, style)
        for part in style:
            if part.shape not in ((x.shape[0], self.num_features), (1, self.num_features)):
                raise ValueError(
                    f"AdaptiveInstanceNorm: the style must have {x.shape[0]} samples, as the content, or one, and {self.num_features} "
                    f"channels; got statistics of shape {tuple(part.shape)}"
                )
        return channel_norm(
            x,
            lambda m, mean, std: adaptive_instance(m, mean, std, strength, self.eps, self.unbiased),
            *style,
            mask=mask,
            impl=impl,
        )[0]

    def _generate(self, x: Tensor, style: Tensor | Style) -> Style:
        assert self.projection is not None
        if isinstance(style, Style):
            raise ValueError("AdaptiveInstanceNorm: with cond_dim the style must be a vector per sample, got statistics")
        check_condition(self, x, style, self.projection.in_features)
        scale, shift = self.projection(style).chunk(2, 1)  # each (N | 1, C)
        return Style(shift, 1 + scale)

    def extra_repr(self) -> str:
        return f"{self.num_features}, cond_dim={self.cond_dim}, eps={self.eps}, unbiased={self.unbiased}"


def adaptive_instance_norm(
    content: Tensor,
    style: Tensor | Style,
    eps: float = 1e-5,
    unbiased: bool = False,
    strength: float = 1.0,
    *,
    mask: Tensor | None = None,
    style_mask: Tensor | None = None,
) -> Tensor:
    """The style-statistics form of :class:`AdaptiveInstanceNorm` as a function: ``content`` with the statistics of ``style``.

    Args:
        content: (N, C, *S).
        style: (N | 1, C, *T), or a :class:`Style`.
        eps, unbiased: as for the class.
        strength: in [0, 1], from the content to the style.
        mask: boolean (N, *S), True where the content has data.
        style_mask: boolean (N | 1, *T), True where the style has data.

    Raises:
        TypeError, ValueError: as for the class.

    Example:
        >>> import torch, equinorm
        >>> equinorm.adaptive_instance_norm(torch.randn(2, 4, 6, 6), torch.randn(1, 4, 9, 9)).shape
        torch.Size([2, 4, 6, 6])
    """
    channels = content.shape[1] if content.ndim > 1 else 1
    norm = AdaptiveInstanceNorm(channels, eps=eps, unbiased=unbiased)
    return norm(content, style, mask, strength=strength, style_mask=style_mask)
