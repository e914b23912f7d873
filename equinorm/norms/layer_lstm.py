"""Long short-term memory with layer normalization inside."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from equinorm.facts import Facts, Paper
from equinorm.norms.recurrent import RecurrentNorm, RowNorm, State, check_cell, product, single_step

FACTS = Facts(
    name="layer_lstm",
    title="Layer-Normalized Long Short-Term Memory",
    paper=Paper(
        authors="Ba, Kiros and Hinton", title="Layer Normalization", year=2016, arxiv="1607.06450", equation="supplementary material"
    ),
    family="sample",
    pools="D",
    invariances=frozenset({"scale", "per-sample"}),
    one_position="works: a sequence of one step",
)


class LayerNormLSTMCell(nn.Module):
    r"""One step of an LSTM whose input term, recurrent term and output are layer-normalized.

    Formula:
        (i, f, g, o) = LN(W_ih x) + LN(W_hh h) + b, c' = sigmoid(f + forget_bias) c + sigmoid(i) tanh(g), h' = sigmoid(o) tanh(LN(c')).
        Each LN has a gain and a shift of its own; those of the gates normalize all 4 H numbers together. The carried c' is not normalized.

    Args:
        input_size: I.
        hidden_size: H, at least 2.
        bias: learn b (0); the norms have shifts in any case.
        eps: added to the variances inside the root.
        gate_norm: "joint" (the paper), or "per_gate" for a norm over the H numbers of each gate.
        forget_bias: constant added to the forget gate.
        device, dtype: of the parameters ``weight_ih`` (4H, I), ``weight_hh`` (4H, H) and ``bias`` (4H,), in torch's order of gates, and of
            the norms ``norm_ih``, ``norm_hh`` and ``norm_c``.

    Shape:
        x: (N, I) or (I,). hx: the pair (h, c), each (N, H) or (H,), or None for zeros. Returns the new pair in the dtype of x.

    Raises:
        TypeError: the input is not floating point.
        ValueError: an input or state of another shape, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> h, c = equinorm.LayerNormLSTMCell(5, 8)(torch.randn(3, 5))
        >>> h.shape, c.shape
        (torch.Size([3, 8]), torch.Size([3, 8]))

    Source: as for :class:`LayerNormLSTM`.
    """

    facts: ClassVar[Facts] = FACTS
    bias: nn.Parameter | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        eps: float = 1e-5,
        gate_norm: Literal["joint", "per_gate"] = "joint",
        forget_bias: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_cell(self, input_size, hidden_size, eps, gate_norm)
        self.input_size, self.hidden_size, self.gate_norm, self.forget_bias = input_size, hidden_size, gate_norm, forget_bias
        groups = 4 if gate_norm == "per_gate" else 1
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size, device=device, dtype=dtype))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", nn.Parameter(torch.empty(4 * hidden_size, device=device, dtype=dtype)) if bias else None)
        self.norm_ih = RowNorm(4 * hidden_size, groups, eps, device, dtype)
        self.norm_hh = RowNorm(4 * hidden_size, groups, eps, device, dtype)
        self.norm_c = RowNorm(hidden_size, 1, eps, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W uniform within 1 / sqrt(H), as torch's LSTM; b and shifts 0, gains 1."""
        bound = self.hidden_size**-0.5
        for weight in (self.weight_ih, self.weight_hh):
            nn.init.uniform_(weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        for norm in (self.norm_ih, self.norm_hh, self.norm_c):
            norm.reset_parameters()

    def project(self, x: Tensor) -> Tensor:
        """``LN(W_ih x) + b``: (..., I) to (..., 4H)."""
        gates = self.norm_ih(product(x, self.weight_ih))
        return gates if self.bias is None else gates + self.bias

    def step(self, projected: Tensor, state: State) -> State:
        """The next (h, c) from :meth:`project` of one step, (N, 4H), and the last (h, c)."""
        h, c = state
        i, f, g, o = (projected + self.norm_hh(product(h, self.weight_hh))).chunk(4, -1)
        c = (f + self.forget_bias).sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * self.norm_c(c).tanh(), c

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        h, c = single_step(self, type(self).__name__, self.input_size, x, hx, 2)
        return h, c

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, bias={self.bias is not None}, gate_norm={self.gate_norm!r}"


class LayerNormLSTM(RecurrentNorm):
    r"""Layers of LSTM, in one or both directions, with layer norm in every step.

    Formula:
        (i, f, g, o) = LN(W_ih x) + LN(W_hh h) + b, c' = sigmoid(f + forget_bias) c + sigmoid(i) tanh(g), h' = sigmoid(o) tanh(LN(c')).
        Each LN has a gain and a shift of its own; those of the gates normalize all 4 H numbers together. The carried c' is not normalized.

    Use it when: recurrent networks train on long sequences or with small batches; the state stays in range whatever the weights do.
    Not when: speed decides: steps run one after another in Python, where ``torch.nn.LSTM`` has one kernel.
    Known trouble: under the name of layer-normalized LSTM circulate forms with a norm per gate (``gate_norm``) and forms that carry the
        normalized cell state; they are not interchangeable.

    Differences: from ``torch.nn.LSTM``: ``mask``; no projection (proj_size); parameters live in ``cells``, one per layer and direction.

    Args:
        input_size: I.
        hidden_size: H, at least 2.
        num_layers: L.
        bias: learn b (0); the norms have shifts in any case.
        batch_first: sequences are (N, T, I) instead of (T, N, I).
        dropout: on the outputs of every layer but the last, in training.
        bidirectional: run a second set of cells from the end to the beginning.
        eps: added to the variances inside the root.
        gate_norm: "joint" (the paper), or "per_gate" for a norm over the H numbers of each gate.
        forget_bias: constant added to the forget gate.
        device, dtype: of the parameters.

    Shape:
        x: (T, N, I), (N, T, I) with ``batch_first``, (T, I) for one sequence, or a PackedSequence. hx: the pair (h, c), each
        (L * directions, N, H), or None for zeros. mask: boolean, of the shape of x without I, True where data is: other steps keep the
        state and come out as 0. Returns the output (T, N, directions * H), packed as x is, and the last (h, c), in the dtype of x.
        Matrix products run in the type of the parameters, or of autocast; norms, gates and the cell state in float32 at least.

    Raises:
        TypeError: the input is not floating point.
        ValueError: an input, state or mask of another shape, a mask beside a packed sequence, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> rnn = equinorm.LayerNormLSTM(5, 8, num_layers=2, bidirectional=True)
        >>> y, (h, c) = rnn(torch.randn(7, 3, 5))
        >>> y.shape, h.shape
        (torch.Size([7, 3, 16]), torch.Size([4, 3, 8]))

    Source: Ba, Kiros and Hinton 2016, supplementary material. The authors' Theano code adds b inside the norm of the input term too, which
    is left out; their Lua code normalizes the cell only. Gates are in torch's order, W starts as torch's (the authors': Gaussian, and
    orthogonal for W_hh).
    """

    facts: ClassVar[Facts] = FACTS
    cell: ClassVar[type[nn.Module]] = LayerNormLSTMCell
    parts: ClassVar[int] = 2

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        eps: float = 1e-5,
        gate_norm: Literal["joint", "per_gate"] = "joint",
        forget_bias: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            batch_first,
            dropout,
            bidirectional,
            bias=bias,
            eps=eps,
            gate_norm=gate_norm,
            forget_bias=forget_bias,
            device=device,
            dtype=dtype,
        )

    def forward(
        self, x: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        y, (h, c) = self.run(x, hx, mask)
        return y, (h, c)
