"""Conditional batch normalization."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from equinorm.conditional.condition import Projection, check_choice, check_condition, chosen
from equinorm.core import Affine, Moments, normalize
from equinorm.core.base import ChannelNorm, check_batch, check_channels, check_count, check_momentum
from equinorm.core.channel import canonical_mask, channel_norm
from equinorm.core.running import RunningMoments
from equinorm.facts import Facts, Paper
from equinorm.kernels import Impl

if TYPE_CHECKING:
    from equinorm.core.sync import Group


def conditional_batch(x: Moments, gamma: Tensor, beta: Tensor, eps: float, group: Group = None) -> tuple[Affine, Moments]:
    """One mean and variance per channel for the batch, one scale and shift (N | 1, C) per sample."""
    pooled = x.over_batch(group)  # (1, C)
    return normalize(pooled, gamma, beta, eps), pooled


class _Delta(nn.Module):
    """``W2 relu(W1 e + b1)``, what an embedding adds to one number per channel."""

    def __init__(
        self, cond_dim: int, hidden_dim: int, num_features: int, dropout: float, init_std: float, device: Any, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.init_std = init_std
        self.hidden = Projection(cond_dim, hidden_dim, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.out = Projection(hidden_dim, num_features, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        self.hidden.reset_parameters()
        nn.init.normal_(self.out.weight, std=self.init_std)

    def forward(self, embedding: Tensor) -> Tensor:
        return self.out(self.dropout(self.hidden(embedding).relu()))


class ConditionalBatchNorm(RunningMoments, ChannelNorm):
    r"""Batch norm whose weight and bias depend on a condition of each sample.

    Formula:
        y = gamma(e) * (x - mu) / sqrt(var + eps) + beta(e), with mu and the biased var of each channel over (N, *S), or their running
        estimates in evaluation, as in batch norm.
        Embedding form (``cond_dim``): gamma(e) = gamma + W2 relu(W1 e + b1), beta(e) likewise with an MLP of its own; gamma, beta (C,) are
        an ordinary batch norm's, often pretrained and frozen.
        Class form (``num_classes``): gamma(e), beta(e) are row e of a table (K, C), or a blend of rows.

    Use it when: a trained convolutional network shall listen to a second input (a question, an instruction) without forgetting what it
        knows (embedding form, :meth:`from_batch_norm`), or a generator makes images of a known set of classes (class form).
    Not when: batches are small or samples must not see each other; FiLM behind another norm then does the same.
    Known trouble: mu and var are shared by all conditions of a batch, so a batch with other proportions of classes changes every output
        in training. Training and evaluation compute different things, as in batch norm. Synchronisation pools the statistics; the
        condition stays with its sample. Keep class tables out of weight decay.

    Args:
        num_features: C.
        num_classes: K, for the class form.
        cond_dim: length of the embedding, for the embedding form. Exactly one of the two must be given.
        hidden_dim: width of the MLPs' hidden layer; None for ``cond_dim``.
        eps: added to the variance inside the root.
        momentum: weight of the new value in the running estimates; None for the plain average over all batches.
        freeze_base: embedding form: gamma and beta do not learn, only the MLPs do (the paper).
        init_std: embedding form: standard deviation of the initial W2. At 0 the layer starts as the batch norm that it extends.
        dropout: embedding form: dropout behind the hidden layer.
        track_running_stats: keep running estimates; without them evaluation uses the batch.
        process_group: pool the statistics over this process group, or over all processes with "world".
        device, dtype: of the parameters.

    Shape:
        x: (N, C, *S) to the same shape and dtype. condition: embeddings (N | 1, cond_dim); or class numbers (N,), int64 or int32, or shares
        (N, K) or (K,). mask: boolean (N, *S) or (N, 1, *S), True where data is; the rest comes out as 0.

    Raises:
        TypeError: the input is not floating point, or the condition of another type.
        ValueError: neither or both of num_classes and cond_dim, wrong number of channels, one value per channel in training, a condition
            or mask of another shape, class numbers out of range, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> trained, x = torch.nn.BatchNorm2d(8), torch.randn(4, 8, 5, 5)
        >>> norm = equinorm.ConditionalBatchNorm.from_batch_norm(trained, cond_dim=16)
        >>> torch.allclose(norm(x, torch.randn(4, 16)), trained(x), atol=1e-6)
        True
        >>> equinorm.ConditionalBatchNorm(8, num_classes=10)(x, torch.tensor([0, 9, 3, 3])).shape
        torch.Size([4, 8, 5, 5])

    Source: de Vries et al. 2017 (embedding form, where W2 has no bias as in the authors' code); Miyato and Koyama 2018
    (arXiv:1802.05637) for the class form, following Dumoulin et al. The paper asks for deltas of zero mean and small variance at first; the
    authors' code starts W2 as any layer, here it starts at 0. Their code estimates the running statistics anew with decay 0.99;
    :meth:`from_batch_norm` keeps the trained ones.
    """

    facts: ClassVar[Facts] = Facts(
        name="conditional_batch",
        title="Conditional Batch Normalization",
        paper=Paper(
            authors="de Vries et al.",
            title="Modulating early visual processing by language",
            year=2017,
            venue="NeurIPS",
            arxiv="1707.00683",
        ),
        family="conditional",
        pools="NS",
        train_differs=True,
        synchronizes="count, mean and variance per channel",
        invariances=frozenset({"shift", "scale", "per-channel"}),
        batch_of_one="normalizes over the positions of the one sample; refused when there is one position",
        one_position="normalizes over the samples",
        reads_writes="2R+1W",
    )
    takes_condition: ClassVar[bool] = True

    process_group: Group

    def __init__(
        self,
        num_features: int,
        num_classes: int | None = None,
        cond_dim: int | None = None,
        hidden_dim: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        freeze_base: bool = False,
        init_std: float = 0.0,
        dropout: float = 0.0,
        track_running_stats: bool = True,
        process_group: Group = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, num_classes is None, device, dtype)
        check_momentum(self, momentum)
        if (num_classes is None) == (cond_dim is None):
            raise ValueError(
                "ConditionalBatchNorm: give either num_classes, for a table of classes, or cond_dim, for embeddings; "
                f"got num_classes={num_classes} and cond_dim={cond_dim}"
            )
        if num_classes is not None and (hidden_dim is not None or freeze_base or init_std or dropout):
            raise ValueError("ConditionalBatchNorm: hidden_dim, freeze_base, init_std and dropout belong to cond_dim, not to num_classes")
        if not init_std >= 0:
            raise ValueError(f"ConditionalBatchNorm: init_std must be at least 0, got {init_std}")
        self.momentum, self.num_classes, self.cond_dim = momentum, num_classes, cond_dim
        self.process_group = process_group
        self.delta_weight = self.delta_bias = None
        if num_classes is not None:
            check_count(self, num_classes=num_classes)
            self.affine = True
            self.weight = nn.Parameter(torch.empty(num_classes, num_features, device=device, dtype=dtype))
            self.bias = nn.Parameter(torch.empty(num_classes, num_features, device=device, dtype=dtype))
        elif cond_dim is not None:
            hidden_dim = cond_dim if hidden_dim is None else hidden_dim
            check_count(self, cond_dim=cond_dim, hidden_dim=hidden_dim)
            self.delta_weight, self.delta_bias = (
                _Delta(cond_dim, hidden_dim, num_features, dropout, init_std, device, dtype) for _ in range(2)
            )
            for parameter in (self.weight, self.bias):
                assert parameter is not None
                parameter.requires_grad_(not freeze_base)
        self.register_running((num_features,), track=track_running_stats, device=device, dtype=dtype)
        self.reset_parameters()

    @classmethod
    def from_batch_norm(
        cls,
        norm: _BatchNorm,
        num_classes: int | None = None,
        cond_dim: int | None = None,
        *,
        freeze_base: bool | None = None,
        **options: Any,
    ) -> Self:
        """A conditional form of a trained batch norm that starts out computing the same, in training and in evaluation.

        Args:
            norm: :class:`~equinorm.BatchNorm` or one of torch's. It is copied, not changed.
            num_classes, cond_dim: as for the constructor. Every row of a class table starts as a copy of the weight and the bias.
            freeze_base: None for True with ``cond_dim``.
            options: further arguments of the constructor.
        """
        like = next((t for t in (norm.weight, norm.running_mean) if t is not None), torch.empty(0))
        mine = cls(
            norm.num_features,
            num_classes,
            cond_dim,
            eps=norm.eps,
            momentum=norm.momentum,
            freeze_base=cond_dim is not None if freeze_base is None else freeze_base,
            track_running_stats=norm.running_mean is not None,
            device=like.device,
            dtype=like.dtype,
            **options,
        )
        with torch.no_grad():
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                if (value := getattr(norm, name)) is not None:
                    getattr(mine, name).copy_(value)  # a (C,) weight fills every row of a table
        return mine.train(norm.training)

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, W2 as ``init_std`` says, W1 and b1 as any linear layer; forget the running estimates."""
        super().reset_parameters()
        for delta in (self.delta_weight, self.delta_bias):
            if delta is not None:
                delta.reset_parameters()
        self.reset_running_stats()

    def _conditioned(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift, each (N | 1, C)."""
        assert self.weight is not None
        assert self.bias is not None
        if self.num_classes is not None:
            check_choice(self, x, condition, self.num_classes)
            return chosen(self.weight, condition), chosen(self.bias, condition)
        assert self.cond_dim is not None
        assert self.delta_weight is not None
        assert self.delta_bias is not None
        check_condition(self, x, condition, self.cond_dim)
        return self.weight + self.delta_weight(condition), self.bias + self.delta_bias(condition)

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
        check_channels(self, x, self.num_features)
        mask = None if mask is None else canonical_mask(x, mask)
        gamma, beta = self._conditioned(x, condition)
        if not self.learning and self.running_mean is not None:
            estimate = self.estimate()
            return channel_norm(x, lambda _, g, b: normalize(estimate, g, b, self.eps), gamma, beta, per=None, mask=mask, impl=impl)[0]
        if self.training and self.process_group is None and mask is None:
            check_batch(self, x)
        group = self.process_group if self.training else None
        y, seen = channel_norm(
            x, lambda m, g, b: conditional_batch(m, g, b, self.eps, group), gamma, beta, per="batch", mask=mask, impl=impl
        )
        if self.learning and seen is not None:
            self.learn(seen)
        return y

    def extra_repr(self) -> str:
        condition = f"num_classes={self.num_classes}" if self.num_classes is not None else f"cond_dim={self.cond_dim}"
        return f"{self.num_features}, {condition}, eps={self.eps}, momentum={self.momentum}"
