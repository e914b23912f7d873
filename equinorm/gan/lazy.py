"""Lazy regularization: a costly penalty every k-th step, k times as strong, with the optimizer adjusted to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class LazyRegularizer:
    """Compute a penalty only every ``interval``-th step, and multiply it by ``interval`` there.

    The average pull of the penalty stays the same, its cost falls by the interval. Skipped steps run no code at all, so the penalty
    belongs into a step of its own; for Adam's rates see :func:`lazy_adam_hparams`.

    Args:
        penalty: returns the penalty, for instance :func:`r1_penalty` or a :class:`PathLengthPenalty`.
        interval: 16 for R1, 4 for path lengths, in StyleGAN2.

    Raises:
        ValueError: interval below 1.

    Example:
        >>> import torch, equinorm
        >>> lazy = equinorm.LazyRegularizer(lambda: torch.tensor(0.5), interval=4)
        >>> [lazy(step) for step in range(5)]
        [tensor(2.), None, None, None, tensor(2.)]

    Source: Karras et al., 2019, arXiv:1912.04958, section 3.1.
    """

    def __init__(self, penalty: Callable[..., Tensor], interval: int) -> None:
        if interval < 1:
            raise ValueError(f"LazyRegularizer: interval must be at least 1, got {interval}")
        self.penalty, self.interval = penalty, interval

    def due(self, step: int) -> bool:
        """Whether the penalty is computed at this step (from 0)."""
        return step % self.interval == 0

    def __call__(self, step: int, *args: Any, **kwargs: Any) -> Tensor | None:
        """The penalty times the interval, or None where it is not due."""
        return self.penalty(*args, **kwargs) * self.interval if self.due(step) else None


def lazy_adam_hparams(lr: float, betas: tuple[float, float], interval: int) -> tuple[float, tuple[float, float]]:
    """Adam's learning rate and betas for training with one extra, regularizing step after every ``interval`` steps.

    With c = interval / (interval + 1): lr * c, beta^c. The extra steps then change neither the pace nor the memory of the averages.

    Args:
        lr: learning rate without lazy regularization.
        betas: likewise.
        interval: of the :class:`LazyRegularizer`.

    Returns:
        The adjusted rate and betas.

    Raises:
        ValueError: interval below 1.

    Example:
        >>> import equinorm
        >>> equinorm.lazy_adam_hparams(0.0025, (0.0, 0.99), interval=4)
        (0.002, (0.0, 0.99199...))

    Source: Karras et al., 2019, arXiv:1912.04958, appendix B.
    """
    if interval < 1:
        raise ValueError(f"lazy_adam_hparams: interval must be at least 1, got {interval}")
    c = interval / (interval + 1)
    return lr * c, (betas[0] ** c, betas[1] ** c)
