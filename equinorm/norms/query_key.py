"""Normalization of queries and keys in front of attention."""

from __future__ import annotations

from math import log2
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from equinorm.core.base import check_count, check_eps, check_floating
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl
from equinorm.norms.layer import LayerNorm
from equinorm.norms.rms import RMSNorm
from equinorm.norms.scale import scale_norm


class QKNorm(nn.Module):
    """Normalize queries and keys, so that attention logits stay bounded however large the features grow.

    Formula:
        kind "rms" or "layer": q' = norm(q), k' = norm(k), each with a gain over the head dimension; attention divides by sqrt(d) as ever.
        kind "l2": q' = g q / ||q||, k' = k / ||k||, with one learned number g; the logits are g times cosines, and g takes the place of
        1 / sqrt(d): pass ``scale=norm.attention_scale`` to attention.

    Use it when: attention logits of a large or long-trained transformer diverge, or learning rates are to be raised.
    Not when: logits must be able to grow without bound (very sharp attention over long contexts).
    Known trouble: a cache of keys must hold normalized keys. With a gain per dimension it matters whether the norm stands before or after
        rotary embeddings (before is common); without gains it does not. Rows of zeros (padding) stay zero under "l2" and "rms" and give
        logits of 0: mask them in attention.

    Args:
        head_dim: size of the last dimension of queries: of one head, or of all heads side by side for a norm over all of them (OLMo 2).
        kind: "rms" (Gemma 3, Qwen 3, OLMo 2), "layer" (ViT-22B) or "l2" (the original).
        eps: that of the norm, added inside the root; for "l2" the smallest norm divided by. None for 1e-6, and 1e-12 for "l2".
        learnable_scale: learn the gains of "rms" and "layer", or g; False leaves the gains out and keeps g constant.
        init_scale: g at the start, for "l2" only, which needs it: :meth:`scale_for_length` computes the authors' choice.
        key_dim: size of the last dimension of keys where it differs (a norm over all heads with fewer key heads).
        device, dtype: of the parameters.
        options: further options of :class:`~equinorm.RMSNorm` (``weight_offset=1.0`` for Gemma) or of :class:`~equinorm.LayerNorm`
            (``bias``, False here).

    Shape:
        q: (..., head_dim), k: (..., key_dim), to a pair of the same shapes and dtypes. Heads may be any of the leading dimensions; there
        may be fewer key heads than query heads.

    Raises:
        TypeError: queries or keys are not floating point, or an option that the norm does not have.
        ValueError: another last dimension, ``init_scale`` missing or superfluous, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> norm = equinorm.QKNorm(16, "l2", init_scale=equinorm.QKNorm.scale_for_length(100))
        >>> q, k = norm(torch.randn(2, 4, 10, 16), torch.randn(2, 4, 12, 16))
        >>> (q @ k.mT).abs().max().item() <= 13.28
        True

    Source: Henry et al. 2020, section 3 ("l2"); Dehghani et al. 2023 (arXiv:2302.05442) ("layer"). The authors' code makes g a float64
    parameter by accident; here it has the parameters' dtype.
    """

    facts: ClassVar[Facts] = Facts(
        name="query_key",
        title="Query-Key Normalization (QKNorm)",
        paper=Paper(
            authors="Henry et al.",
            title="Query-Key Normalization for Transformers",
            year=2020,
            venue="Findings of EMNLP",
            arxiv="2010.04245",
            equation="section 3",
        ),
        family="sample",
        pools="D",
        invariances=frozenset({"scale", "per-sample"}),
        one_position="normalizes the features of the one position",
    )

    scale: Tensor

    def __init__(
        self,
        head_dim: int,
        kind: Literal["rms", "layer", "l2"] = "rms",
        eps: float | None = None,
        learnable_scale: bool = True,
        init_scale: float | None = None,
        key_dim: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        key_dim = head_dim if key_dim is None else key_dim
        check_count(self, head_dim=head_dim, key_dim=key_dim)
        if kind not in ("rms", "layer", "l2"):
            raise ValueError(f'QKNorm: kind must be "rms", "layer" or "l2", got {kind!r}')
        eps = (1e-12 if kind == "l2" else 1e-6) if eps is None else eps
        check_eps(self, eps)
        if (kind == "l2") != (init_scale is not None):
            reason = "needs init_scale, as from QKNorm.scale_for_length(length)" if kind == "l2" else "has no scale of its own to start"
            raise ValueError(f"QKNorm: kind {kind!r} {reason}, got init_scale={init_scale}")
        self.head_dim, self.key_dim, self.kind, self.eps = head_dim, key_dim, kind, eps
        self.learnable_scale, self.init_scale = learnable_scale, init_scale
        factory = {"device": device, "dtype": dtype}
        if kind == "l2":
            if options:
                raise TypeError(f'QKNorm: kind "l2" has no options {sorted(options)}')
            if eps == 0:
                raise ValueError('QKNorm: eps must be positive for kind "l2", it is what a row of zeros is divided by; got 0')
            scale = torch.empty((), **factory)
            if learnable_scale:
                self.scale = nn.Parameter(scale)
            else:
                self.register_buffer("scale", scale)
        else:
            norm = {"rms": RMSNorm, "layer": LayerNorm}[kind]
            defaults = {"bias": False} if kind == "layer" else {}
            made = {"eps": eps, "elementwise_affine": learnable_scale, **factory, **defaults, **options}
            self.q_norm, self.k_norm = norm(head_dim, **made), norm(key_dim, **made)
        self.reset_parameters()

    @classmethod
    def for_channels(cls, channels: int, **options: Any) -> Self:
        """The norm for queries and keys of ``channels`` features."""
        return cls(channels, **options)

    @staticmethod
    def scale_for_length(length: float) -> float:
        """The authors' start for g, log2(L^2 - L), with L the 97.5th percentile of the lengths of training sequences.

        Raises:
            ValueError: the length is not greater than 1.
        """
        if not length > 1:
            raise ValueError(f"QKNorm: length must be greater than 1, got {length}")
        return log2(length * length - length)

    @property
    def attention_scale(self) -> float | None:
        """What attention multiplies the logits by: 1 for "l2", where g is in the queries; None for torch's default, 1 / sqrt(d)."""
        return 1.0 if self.kind == "l2" else None

    def reset_parameters(self) -> None:
        """Gains 1 (and biases 0), or g to its initial value."""
        if self.init_scale is not None:
            with torch.no_grad():
                self.scale.fill_(self.init_scale)
        else:
            self.q_norm.reset_parameters()
            self.k_norm.reset_parameters()

    def forward(self, q: Tensor, k: Tensor, *, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
        for role, x, dim in (("queries", q, self.head_dim), ("keys", k, self.key_dim)):
            check_floating(self, x)
            if x.ndim < 1 or x.shape[-1] != dim:
                raise ValueError(f"QKNorm: the input must have shape (..., {dim}) for {role}, got {tuple(x.shape)}")
        if self.kind == "l2":
            return scale_norm(q, self.scale, self.eps, impl=impl), scale_norm(k, torch.ones_like(self.scale), self.eps, impl=impl)
        return self.q_norm(q, impl=impl), self.k_norm(k, impl=impl)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, kind={self.kind!r}, eps={self.eps}"
