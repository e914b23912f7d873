"""ReZero: one learned scalar, zero at the start, gates all residual sublayers of a layer."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from equinorm.facts import Facts, Paper


class ReZero(nn.Module):
    r"""A layer of residual sublayers that share one learned scalar, zero at the start, so that a fresh network is the identity.

    Formula:
        x <- x + alpha * F_j(x)  for each sublayer F_j in turn;  alpha = 0 at the start

    Use it when: a very deep network (the paper trains transformers of 128 layers and more) is to train without norm layers and warm-up.
    Not when: activations must be bounded afterwards: nothing limits alpha or the branches.
    Known trouble: at the first step only alpha receives a gradient. Keep weight decay away from alpha.

    Args:
        *sublayers: modules; in a transformer layer, attention and feed-forward (three with cross-attention).
        init: value of alpha at the start.
        device, dtype: of alpha.

    Shape: each sublayer must keep the shape of its input. Keyword arguments of ``forward`` go to every sublayer. Parameter: ``alpha`` (1,).

    Raises:
        ValueError: no sublayer.

    Example:
        >>> import torch, equinorm
        >>> layer = equinorm.ReZero(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        >>> layer(torch.tensor([1.0, 2.0])).detach()
        tensor([1., 2.])

    Source: Bachlechner et al., 2020, arXiv:2003.04887, Eq. 3; that the sublayers of a layer share one scalar is in the authors' code.
    """

    facts: ClassVar[Facts] = Facts(
        name="rezero",
        title="ReZero",
        paper=Paper(
            authors="Bachlechner et al.",
            title="ReZero is All You Need: Fast Convergence at Large Depth",
            year=2020,
            venue="UAI 2021",
            arxiv="2003.04887",
        ),
        family="residual",
        pools="",
        invariances=frozenset({"per-sample"}),
        reads_writes="2R+1W",
    )

    def __init__(self, *sublayers: nn.Module, init: float = 0.0, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if not sublayers:
            raise ValueError("ReZero: there must be at least one sublayer, got none")
        self.init = init
        self.sublayers = nn.ModuleList(sublayers)
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The scalar back to its initial value."""
        nn.init.constant_(self.alpha, self.init)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        for sublayer in self.sublayers:
            branch = sublayer(x, **kwargs)
            x = x + self.alpha.to(branch.dtype) * branch
        return x

    def extra_repr(self) -> str:
        return f"init={self.init}"
