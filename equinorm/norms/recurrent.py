"""What recurrent layers with norms inside share: layers, directions, padding, packed sequences."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, Literal, Protocol, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from equinorm.core.base import check_count, check_eps, check_floating
from equinorm.core.row import group_norm, row_norm
from equinorm.facts import Facts
from equinorm.kernels.reference import wide

State = tuple[Tensor, ...]  # each (N, H), in float32 at least; the first is the output


class Cell(Protocol):
    """What a recurrent layer asks of its cell."""

    hidden_size: int

    def project(self, x: Tensor) -> Tensor:
        """The normalized input terms of all steps at once: (T, N, I) to (T, N, gates)."""
        ...

    def step(self, projected: Tensor, state: State) -> State:
        """The next state, from one step of :meth:`project`."""
        ...

    def reset_parameters(self) -> None: ...


def check_cell(module: nn.Module, input_size: int, hidden_size: int, eps: float, gate_norm: str) -> None:
    """Raises ValueError unless the settings that all cells share are in range."""
    check_count(module, input_size=input_size, hidden_size=hidden_size)
    check_eps(module, eps)
    if hidden_size == 1:
        raise ValueError(f"{type(module).__name__}: hidden_size must be at least 2, a norm over one value is constant; got 1")
    if gate_norm not in ("joint", "per_gate"):
        raise ValueError(f'{type(module).__name__}: gate_norm must be "joint" or "per_gate", got {gate_norm!r}')


def product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` in the type of the weight, or that of autocast; the result in float32 at least."""
    return wide(F.linear(x.to(weight.dtype), weight))


class RowNorm(nn.Module):
    """Layer norm of the last dimension, or of each of its ``groups`` equal parts, with one weight (1) and bias (0) for all of it."""

    def __init__(self, size: int, groups: int, eps: float, device: Any, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(size, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.groups == 1:
            return row_norm(x, 1, self.weight, self.bias, self.eps)
        return group_norm(x.reshape(-1, x.shape[-1]), self.groups, self.weight, self.bias, self.eps).reshape(x.shape)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, groups={self.groups}, eps={self.eps}"


def single_step(cell: Cell, name: str, input_size: int, x: Tensor, state: State | None, parts: int) -> State:
    """One call of a cell: x (N, I) or (I,), state of ``parts`` tensors (N, H) or (H,); the new state in the type of x.

    Raises:
        TypeError: x is not floating point.
        ValueError: another shape of x or of the state.
    """
    check_floating(cast("nn.Module", cell), x)
    if x.ndim not in (1, 2) or x.shape[-1] != input_size:
        raise ValueError(f"{name}: the input must have shape (N, {input_size}) or ({input_size},), got {tuple(x.shape)}")
    expected = (*x.shape[:-1], cell.hidden_size)
    if state is not None and (len(state) != parts or any(part.shape != expected for part in state)):
        raise ValueError(
            f"{name}: the state must be {'a tensor' if parts == 1 else f'{parts} tensors'} of shape {expected}, got "
            f"{[tuple(part.shape) for part in state]}"
        )
    rows = x.unsqueeze(0) if x.ndim == 1 else x
    zeros = wide(x).new_zeros(rows.shape[0], cell.hidden_size)
    before = (zeros,) * parts if state is None else tuple(wide(part).reshape(zeros.shape) for part in state)
    return tuple(part.reshape(expected).to(x.dtype) for part in cell.step(cell.project(rows), before))


class RecurrentNorm(nn.Module):
    """Abstract stack of recurrent layers whose cells hold norms, with the calling conventions of ``torch.nn.LSTM``.

    A class that completes it names its ``cell`` and the number of tensors of a state in ``parts``.

    Attributes:
        facts: what the method says about itself.
        cells: one per layer and direction, layer by layer.
    """

    facts: ClassVar[Facts]
    cell: ClassVar[type[nn.Module]]
    parts: ClassVar[int]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        eps: float,
        gate_norm: Literal["joint", "per_gate"],
        **options: Any,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_cell(self, input_size, hidden_size, eps, gate_norm)
        check_count(self, num_layers=num_layers)
        if not 0 <= dropout < 1:
            raise ValueError(f"{name}: dropout must be in [0, 1), got {dropout}")
        if dropout and num_layers == 1:
            warnings.warn(f"{name}: dropout stands between layers, so with num_layers=1 it does nothing", stacklevel=3)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.batch_first, self.dropout, self.bidirectional = batch_first, dropout, bidirectional
        directions = 1 + bidirectional
        self.cells = nn.ModuleList(
            self.cell(input_size if layer == 0 else directions * hidden_size, hidden_size, eps=eps, gate_norm=gate_norm, **options)
            for layer in range(num_layers)
            for _ in range(directions)
        )

    @classmethod
    def for_channels(cls, channels: int, **options: Any) -> Self:
        """The layer with ``channels`` inputs and as many hidden units."""
        return cls(channels, channels, **options)

    def reset_parameters(self) -> None:
        """Every cell anew."""
        for cell in self._cells():
            cell.reset_parameters()

    def _cells(self) -> list[Cell]:
        return cast("list[Cell]", list(self.cells))

    def run(self, x: Tensor | PackedSequence, state: State | None, mask: Tensor | None) -> tuple[Tensor | PackedSequence, State]:
        """All layers over a sequence; the final states are each (layers * directions, N, H)."""
        if isinstance(x, PackedSequence):
            if mask is not None:
                raise ValueError(f"{type(self).__name__}: a packed sequence knows its lengths, so mask must be None")
            return self._packed(x, state)
        self._check(x, mask)
        single = x.ndim == 2
        if single:
            x, mask = x.unsqueeze(1), None if mask is None else mask.unsqueeze(1)
            state = None if state is None else tuple(part.unsqueeze(1) for part in state)
        elif self.batch_first:
            x, mask = x.transpose(0, 1), None if mask is None else mask.transpose(0, 1)
        self._check_state(x.shape[1], state)
        y, final = self._layers(x, state, mask)
        if single:
            return y.squeeze(1), tuple(part.squeeze(1) for part in final)
        return y.transpose(0, 1) if self.batch_first else y, final

    def _packed(self, x: PackedSequence, state: State | None) -> tuple[PackedSequence, State]:
        # Padded in the order of the packed data, so that what comes out packs the same way.
        data, lengths = pad_packed_sequence(PackedSequence(x.data, x.batch_sizes))
        self._check(data, None, batch_first=False)
        self._check_state(data.shape[1], state)
        mask = torch.arange(data.shape[0])[:, None] < lengths  # (T, N)
        if state is not None and x.sorted_indices is not None:
            state = tuple(part.index_select(1, x.sorted_indices) for part in state)
        y, final = self._layers(data, state, mask.to(data.device))
        if x.unsorted_indices is not None:
            final = tuple(part.index_select(1, x.unsorted_indices) for part in final)
        packed = pack_padded_sequence(y, lengths)
        return PackedSequence(packed.data, packed.batch_sizes, x.sorted_indices, x.unsorted_indices), final

    def _layers(self, x: Tensor, state: State | None, mask: Tensor | None) -> tuple[Tensor, State]:
        """From x (T, N, I) and mask (T, N): the output (T, N, directions * H) and the final states."""
        dtype, finals, cells = x.dtype, [], self._cells()
        keep = None if mask is None else mask.unsqueeze(2)  # (T, N, 1)
        y = x if keep is None else torch.where(keep, x, 0.0)
        directions = 1 + self.bidirectional
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                k = layer * directions + direction
                zeros = wide(x).new_zeros(x.shape[1], self.hidden_size)
                before = (zeros,) * self.parts if state is None else tuple(wide(part[k]) for part in state)
                output, final = _through_time(cells[k], y, before, keep, backwards=direction == 1)
                outputs.append(output)
                finals.append(final)
            y = torch.cat(outputs, 2)  # (T, N, directions * H)
            if layer < self.num_layers - 1:
                y = F.dropout(y, self.dropout, self.training)
        return y.to(dtype), tuple(torch.stack(parts).to(dtype) for parts in zip(*finals, strict=True))

    def _check(self, x: Tensor, mask: Tensor | None, batch_first: bool | None = None) -> None:
        check_floating(self, x)
        name, first = type(self).__name__, self.batch_first if batch_first is None else batch_first
        if x.ndim not in (2, 3) or x.shape[-1] != self.input_size:
            batched = f"(N, T, {self.input_size})" if first else f"(T, N, {self.input_size})"
            raise ValueError(f"{name}: the input must have shape {batched} or (T, {self.input_size}), got {tuple(x.shape)}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:-1]):
            raise ValueError(
                f"{name}: mask must be boolean (True where data is) and of shape {tuple(x.shape[:-1])}, as the input without its features, "
                f"got {mask.dtype} of shape {tuple(mask.shape)}"
            )

    def _check_state(self, samples: int, state: State | None) -> None:
        expected = (self.num_layers * (1 + self.bidirectional), samples, self.hidden_size)
        if state is not None and (len(state) != self.parts or any(part.shape != expected for part in state)):
            raise ValueError(
                f"{type(self).__name__}: the state must be {'a tensor' if self.parts == 1 else f'{self.parts} tensors'} of shape "
                f"{expected} (layers times directions, samples, hidden units), got {[tuple(part.shape) for part in state]}"
            )

    def extra_repr(self) -> str:
        options = {"num_layers": 1, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        changed = "".join(f", {name}={getattr(self, name)}" for name, default in options.items() if getattr(self, name) != default)
        return f"{self.input_size}, {self.hidden_size}{changed}"


def _through_time(cell: Cell, x: Tensor, state: State, keep: Tensor | None, backwards: bool) -> tuple[Tensor, State]:
    """One cell over (T, N, I): its outputs (T, N, H), 0 where there is no data, and the last state; steps without data keep the state."""
    projected = cell.project(x)  # the input terms of all steps at once
    outputs: list[Tensor] = [state[0]] * x.shape[0]
    for t in reversed(range(x.shape[0])) if backwards else range(x.shape[0]):
        after = cell.step(projected[t], state)
        if keep is not None:
            after = tuple(torch.where(keep[t], new, old) for new, old in zip(after, state, strict=True))
        state = after
        outputs[t] = state[0]
    y = torch.stack(outputs) if outputs else x.new_zeros(0, x.shape[1], cell.hidden_size)
    return y if keep is None else torch.where(keep, y, 0.0), state
