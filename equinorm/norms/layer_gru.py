"""Gated recurrent unit with layer normalization inside."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from equinorm.facts import Facts, Paper
from equinorm.norms.recurrent import RecurrentNorm, RowNorm, State, check_cell, product, single_step

FACTS = Facts(
    name="layer_gru",
    title="Layer-Normalized Gated Recurrent Unit",
    paper=Paper(
        authors="Ba, Kiros and Hinton", title="Layer Normalization", year=2016, arxiv="1607.06450", equation="supplementary material"
    ),
    family="sample",
    pools="D",
    invariances=frozenset({"scale", "per-sample"}),
    one_position="works: a sequence of one step",
)


class LayerNormGRUCell(nn.Module):
    r"""One step of a GRU whose input and recurrent terms are layer-normalized.

    Formula:
        (r, z) = sigmoid(LN(W_ih x) + LN(W_hh h)), n = tanh(LN(W_in x) + r LN(W_hn h)), h' = z h + (1 - z) n.
        Each LN has a gain and a shift of its own; those of r and z normalize both gates, 2 H numbers, together.

    Args:
        input_size: I.
        hidden_size: H, at least 2.
        eps: added to the variances inside the root.
        gate_norm: "joint" (the paper), or "per_gate" for a norm over the H numbers of each of r and z.
        device, dtype: of the parameters ``weight_ih`` (3H, I) and ``weight_hh`` (3H, H), in torch's order r, z, n, and of the norms
            ``norm_ih``, ``norm_hh`` (r and z), ``norm_in`` and ``norm_hn`` (n), whose shifts are the only biases.

    Shape:
        x: (N, I) or (I,). hx: h, (N, H) or (H,), or None for zeros. Returns the new h in the dtype of x.

    Raises:
        TypeError: the input is not floating point.
        ValueError: an input or state of another shape, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> equinorm.LayerNormGRUCell(5, 8)(torch.randn(3, 5)).shape
        torch.Size([3, 8])

    Source: as for :class:`LayerNormGRU`.
    """

    facts: ClassVar[Facts] = FACTS

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        eps: float = 1e-5,
        gate_norm: Literal["joint", "per_gate"] = "joint",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_cell(self, input_size, hidden_size, eps, gate_norm)
        self.input_size, self.hidden_size, self.gate_norm = input_size, hidden_size, gate_norm
        groups = 2 if gate_norm == "per_gate" else 1
        self.weight_ih = nn.Parameter(torch.empty(3 * hidden_size, input_size, device=device, dtype=dtype))
        self.weight_hh = nn.Parameter(torch.empty(3 * hidden_size, hidden_size, device=device, dtype=dtype))
        self.norm_ih = RowNorm(2 * hidden_size, groups, eps, device, dtype)
        self.norm_hh = RowNorm(2 * hidden_size, groups, eps, device, dtype)
        self.norm_in = RowNorm(hidden_size, 1, eps, device, dtype)
        self.norm_hn = RowNorm(hidden_size, 1, eps, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W uniform within 1 / sqrt(H), as torch's GRU; shifts 0, gains 1."""
        bound = self.hidden_size**-0.5
        for weight in (self.weight_ih, self.weight_hh):
            nn.init.uniform_(weight, -bound, bound)
        for norm in (self.norm_ih, self.norm_hh, self.norm_in, self.norm_hn):
            norm.reset_parameters()

    def project(self, x: Tensor) -> Tensor:
        """Both normalized input terms: (..., I) to (..., 3H)."""
        return self._normed(product(x, self.weight_ih), self.norm_ih, self.norm_in)

    def step(self, projected: Tensor, state: State) -> State:
        """The next (h,) from :meth:`project` of one step, (N, 3H), and the last (h,)."""
        (h,) = state
        sizes = (2 * self.hidden_size, self.hidden_size)
        gates, candidate = projected.split(sizes, -1)
        gates_h, candidate_h = self._normed(product(h, self.weight_hh), self.norm_hh, self.norm_hn).split(sizes, -1)
        r, z = (gates + gates_h).sigmoid().chunk(2, -1)
        n = (candidate + r * candidate_h).tanh()
        return (z * h + (1 - z) * n,)

    def _normed(self, terms: Tensor, of_gates: RowNorm, of_candidate: RowNorm) -> Tensor:
        gates, candidate = terms.split((2 * self.hidden_size, self.hidden_size), -1)
        return torch.cat((of_gates(gates), of_candidate(candidate)), -1)

    def forward(self, x: Tensor, hx: Tensor | None = None) -> Tensor:
        return single_step(self, type(self).__name__, self.input_size, x, None if hx is None else (hx,), 1)[0]

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, gate_norm={self.gate_norm!r}"


class LayerNormGRU(RecurrentNorm):
    r"""Layers of GRU, in one or both directions, with layer norm in every step.

    Formula:
        (r, z) = sigmoid(LN(W_ih x) + LN(W_hh h)), n = tanh(LN(W_in x) + r LN(W_hn h)), h' = z h + (1 - z) n.
        Each LN has a gain and a shift of its own; those of r and z normalize both gates, 2 H numbers, together.

    Use it when: recurrent networks train on long sequences or with small batches, with fewer parameters than an LSTM.
    Not when: speed decides: steps run one after another in Python, where ``torch.nn.GRU`` has one kernel.
    Known trouble: the reset gate r multiplies behind the norm of the recurrent term; forms where it stands in front are another network.

    Differences: from ``torch.nn.GRU``: ``mask``; no bias beyond the shifts of the norms; parameters live in ``cells``, one per layer and
    direction.

    Args:
        input_size: I.
        hidden_size: H, at least 2.
        num_layers: L.
        batch_first: sequences are (N, T, I) instead of (T, N, I).
        dropout: on the outputs of every layer but the last, in training.
        bidirectional: run a second set of cells from the end to the beginning.
        eps: added to the variances inside the root.
        gate_norm: "joint" (the paper), or "per_gate" for a norm over the H numbers of each of r and z.
        device, dtype: of the parameters.

    Shape:
        x: (T, N, I), (N, T, I) with ``batch_first``, (T, I) for one sequence, or a PackedSequence. hx: (L * directions, N, H), or None for
        zeros. mask: boolean, of the shape of x without I, True where data is: other steps keep the state and come out as 0. Returns the
        output (T, N, directions * H), packed as x is, and the last h, in the dtype of x.
        Matrix products run in the type of the parameters, or of autocast; norms, gates and the state in float32 at least.

    Raises:
        TypeError: the input is not floating point.
        ValueError: an input, state or mask of another shape, a mask beside a packed sequence, or settings out of range.

    Example:
        >>> import torch, equinorm
        >>> rnn = equinorm.LayerNormGRU(5, 8, batch_first=True)
        >>> y, h = rnn(torch.randn(3, 7, 5))
        >>> torch.equal(y[:, -1], h[0])
        True

    Source: Ba, Kiros and Hinton 2016, supplementary material. As in the authors' code, r multiplies behind the norm and z keeps the old
    state. Gates are in torch's order, W starts as torch's (the authors': Gaussian, and orthogonal for W_hh).
    """

    facts: ClassVar[Facts] = FACTS
    cell: ClassVar[type[nn.Module]] = LayerNormGRUCell
    parts: ClassVar[int] = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        eps: float = 1e-5,
        gate_norm: Literal["joint", "per_gate"] = "joint",
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
            eps=eps,
            gate_norm=gate_norm,
            device=device,
            dtype=dtype,
        )

    def forward(
        self, x: Tensor | PackedSequence, hx: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        y, (h,) = self.run(x, None if hx is None else (hx,), mask)
        return y, h
