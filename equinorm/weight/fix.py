"""Fixed norm: every row of an embedding, or of the weights in front of a softmax, has the same length."""

from __future__ import annotations

from torch import Tensor, nn

from equinorm.facts import Facts, Paper, describes
from equinorm.weight.units import Units, register, units_of, wide


class _FixNorm(nn.Module):
    def __init__(self, units: Units, length: float, eps: float) -> None:
        super().__init__()
        self.units, self.length, self.eps = units, length, eps

    def forward(self, v: Tensor) -> Tensor:
        rows = self.units.unfold(wide(v))
        return self.units.fold(self.length * rows / self.units.norm(rows).clamp(min=self.eps)).to(v.dtype)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value

    def extra_repr(self) -> str:
        return f"dim={self.units.dim}, length={self.length}, eps={self.eps}"


@describes(
    Facts(
        name="fix",
        title="Fixed Norm of Word Embeddings (FixNorm)",
        paper=Paper(
            authors="Nguyen and Chiang",
            title="Improving Lexical Choice in Neural Machine Translation",
            year=2017,
            venue="NAACL 2018",
            arxiv="1710.01329",
        ),
        family="weight",
        pools="W",
        invariances=frozenset({"weight-scale", "per-sample"}),
        reads_writes="0R+0W",
    )
)
def fix_norm(module: nn.Module, name: str = "weight", length: float = 1.0, eps: float = 1e-5, dim: int | None = None) -> nn.Module:
    """Give every row of an embedding (or output unit of a layer) the same fixed length; only directions are trained.

    Formula:
        w = length * v / max(||v||, eps), per row

    Use it when: frequent words must not win the softmax by the length of their embedding alone; with scale norm in front of the output
        layer the logits are cosines times one learned number.
    Not when: the length of a weight vector carries meaning, as in a regression head.
    Known trouble: v only grows under gradient descent, so the effective learning rate falls; decay of v does not change the function. A row
        of zeros (an embedding's ``padding_idx``) stays zero.

    Args:
        module: the layer, such as ``nn.Embedding`` or ``nn.Linear``.
        name: its parameter.
        length: of every row.
        eps: smallest norm that v is divided by.
        dim: dimension that counts the rows; None finds it from the kind of layer.

    Returns:
        The same module; v is ``parametrizations.<name>.original``. Half types are computed in float32.

    Raises:
        ValueError: no such parameter, a dimension the weight does not have, eps or length not positive, or already registered.
        TypeError: the parameter is not real floating point.

    Example:
        >>> import torch, equinorm
        >>> words = equinorm.fix_norm(torch.nn.Embedding(1, 2))
        >>> words.weight = torch.tensor([[3.0, 4.0]])
        >>> words(torch.tensor(0)).detach()
        tensor([0.6000, 0.8000])

    Source: Nguyen and Chiang 2017; Nguyen and Salazar 2019 (arXiv:1910.05895) use length 1 together with :class:`~equinorm.ScaleNorm`.
    """
    if not eps > 0:
        raise ValueError(f"fix_norm: eps must be positive, got {eps}")
    if not length > 0:
        raise ValueError(f"fix_norm: length must be positive, got {length}")
    register("fix_norm", module, name, _FixNorm(units_of("fix_norm", module, name, dim), length, eps))
    return module
