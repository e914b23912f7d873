"""SkipInit: a residual branch behind a learned scalar that starts at zero."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from equinorm.facts import Facts, Paper


class SkipInit(nn.Module):
    r"""Add a residual branch times a learned scalar, zero at the start.

    Formula:
        y = x + alpha * f(x),  alpha = 0 at the start (or 1 / sqrt(number of blocks))

    Use it when: a deep residual network is to train without norm layers; the paper finds this scalar to be what batch norm chiefly gave it.
    Not when: large learning rates are needed, where batch norm does more.
    Known trouble: at the first step only alpha and nothing inside the branch receives a gradient; gradient monitors show zeros. Keep weight
        decay away from alpha. A branch that overflows spoils the sum even at alpha = 0.

    Args:
        init: value of alpha at the start.
        device, dtype: of alpha.

    Shape: x and the branch's output, of one shape (or broadcasting). Parameter: ``alpha`` (1,).

    Example:
        >>> import torch, equinorm
        >>> add = equinorm.SkipInit()
        >>> add(torch.tensor([1.0, 2.0]), torch.tensor([5.0, 5.0])).detach()
        tensor([1., 2.])

    Source: De and Smith, 2020, arXiv:2002.10444. ReZero is the same with one scalar for all sublayers of a layer.
    """

    facts: ClassVar[Facts] = Facts(
        name="skip_init",
        title="SkipInit",
        paper=Paper(
            authors="De and Smith",
            title="Batch Normalization Biases Residual Blocks Towards the Identity Function in Deep Networks",
            year=2020,
            venue="NeurIPS",
            arxiv="2002.10444",
            equation="section 4",
        ),
        family="residual",
        pools="",
        invariances=frozenset({"per-sample", "per-channel"}),
        reads_writes="2R+1W",
    )

    def __init__(self, init: float = 0.0, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.init = init
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The scalar back to its initial value."""
        nn.init.constant_(self.alpha, self.init)

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return x + self.alpha.to(branch.dtype) * branch

    def extra_repr(self) -> str:
        return f"init={self.init}"
