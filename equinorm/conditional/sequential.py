"""A chain of modules some of which take a condition."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn


def takes_condition(module: nn.Module) -> bool:
    """Whether ``module`` says that its forward takes a condition after the input."""
    return getattr(module, "takes_condition", False) is True


class ConditionalSequential(nn.Sequential):
    """A ``torch.nn.Sequential`` that hands one condition to those of its modules that take it.

    A module takes the condition if its attribute ``takes_condition`` is True, as of every conditional norm of this package; a module of
    your own joins by setting it. All others are called with the input alone. One chain may be part of another.

    Args:
        args: modules, or one ordered dict of them, as for ``torch.nn.Sequential``.

    Shape:
        x: what the first module takes. condition: what the modules that take it agree on: embeddings, class numbers, a label map.

    Raises:
        ValueError: a module that takes the condition stands inside a plain ``torch.nn.Sequential``, where it cannot be reached; told when
            the chain is called.

    Example:
        >>> import torch, equinorm
        >>> from torch import nn
        >>> block = equinorm.ConditionalSequential(
        ...     nn.Conv2d(3, 8, 3), equinorm.ConditionalBatchNorm(8, num_classes=10), nn.ReLU(), equinorm.FiLM(8, cond_dim=10)
        ... )
        >>> block(torch.randn(2, 3, 6, 6), torch.nn.functional.one_hot(torch.tensor([1, 7]), 10).float()).shape
        torch.Size([2, 8, 4, 4])
    """

    takes_condition: ClassVar[bool] = True

    def forward(self, x: Any, condition: Any) -> Any:
        for name, module in self.named_children():
            if takes_condition(module):
                x = module(x, condition)
            else:
                _refuse_hidden(name, module)
                x = module(x)
        return x


def _refuse_hidden(name: str, module: nn.Module) -> None:
    if isinstance(module, nn.Sequential) and any(takes_condition(inner) for inner in module.modules()):
        raise ValueError(
            f"ConditionalSequential: module {name!r} is a plain Sequential, but holds a module that takes the condition; make it a "
            "ConditionalSequential too"
        )
