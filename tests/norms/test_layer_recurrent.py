"""Recurrent layers with layer norm: cells, layers, directions, padding, packed sequences, states."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import equinorm
from tests.helpers import assert_close
from tests.references import recurrent as reference

BOTH = pytest.mark.parametrize("cls", [equinorm.LayerNormLSTM, equinorm.LayerNormGRU], ids=["lstm", "gru"])
CELLS = {equinorm.LayerNormLSTM: equinorm.LayerNormLSTMCell, equinorm.LayerNormGRU: equinorm.LayerNormGRUCell}


def build(cls, *args, **options):
    module = cls(*args, **options).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def data(*shape):
    return torch.randn(*shape, dtype=torch.float64) * 2 + 1


def parts(state):
    return state if isinstance(state, tuple) else (state,)


def assert_states_close(actual, expected):
    for a, e in zip(parts(actual), parts(expected), strict=True):
        assert_close(a, e, label="state")


@pytest.mark.parametrize("gate_norm", ["joint", "per_gate"])
@BOTH
def test_both_directions_and_layers_equal_the_reference(cls, gate_norm):
    rnn, x = build(cls, 3, 4, num_layers=2, bidirectional=True, gate_norm=gate_norm), data(5, 2, 3)
    naive = reference.lstm if cls is equinorm.LayerNormLSTM else reference.gru
    want, _ = naive(x.transpose(0, 1), dict(rnn.named_parameters()), num_layers=2, bidirectional=True, gate_norm=gate_norm)
    y, _ = rnn(x)
    assert_close(y, want.transpose(0, 1))


@BOTH
def test_a_layer_is_its_cell_step_by_step(cls):
    rnn, x = build(cls, 3, 4), data(5, 2, 3)
    cell = CELLS[cls](3, 4).double()
    cell.load_state_dict(rnn.cells[0].state_dict())
    y, final = rnn(x)
    state = None
    for t in range(5):
        state = cell(x[t], state)
        assert_close(y[t], parts(state)[0])
    assert_states_close(tuple(part[0] for part in parts(final)), state)
    assert_states_close(cell(x[0, 0]), tuple(part[0] for part in parts(cell(x[0]))))


def test_the_carried_cell_state_is_not_normalized():
    cell = build(equinorm.LayerNormLSTMCell, 3, 4)
    h, c = data(2, 4), data(2, 4) * 100
    with torch.no_grad():
        cell.bias[:4] = -100.0  # the input gate lets nothing in
        cell.bias[4:8] = 100.0  # the forget gate keeps everything
    after = cell(data(2, 3), (h, c))[1]
    assert_close(after, c, dtype=torch.float32)


def test_the_forget_bias_is_a_bias():
    cell = build(equinorm.LayerNormLSTMCell, 3, 4, forget_bias=1.5)
    other = equinorm.LayerNormLSTMCell(3, 4).double()
    other.load_state_dict(cell.state_dict())
    with torch.no_grad():
        other.bias[4:8] += 1.5
    x, state = data(2, 3), (data(2, 4), data(2, 4))
    assert_states_close(cell(x, state), other(x, state))


@BOTH
def test_two_halves_with_the_state_handed_over_are_the_whole(cls):
    rnn, x = build(cls, 3, 4, num_layers=2), data(6, 2, 3)
    want, final = rnn(x)
    first, state = rnn(x[:2])
    second, last = rnn(x[2:], state)
    assert_close(torch.cat((first, second)), want)
    assert_states_close(last, final)


@BOTH
def test_batch_first_and_single_sequences(cls):
    rnn, x = build(cls, 3, 4, num_layers=2, bidirectional=True), data(5, 2, 3)
    first = build(cls, 3, 4, num_layers=2, bidirectional=True, batch_first=True)
    first.load_state_dict(rnn.state_dict())
    want, final = rnn(x)
    y, state = first(x.transpose(0, 1))
    assert_close(y.transpose(0, 1), want)
    assert_states_close(state, final)
    y, state = rnn(x[:, 1])
    assert_close(y, want[:, 1])
    assert_states_close(state, tuple(part[:, 1] for part in parts(final)))
    y, _ = rnn(x[:, 1], tuple(part * 0 for part in state) if isinstance(state, tuple) else state * 0)
    assert_close(y, want[:, 1])


@pytest.mark.parametrize("batch_first", [False, True])
@BOTH
def test_padded_packed_and_alone_are_the_same(cls, batch_first):
    rnn = build(cls, 3, 4, num_layers=2, bidirectional=True, batch_first=batch_first)
    sequences = [data(length, 3) for length in (3, 5, 1, 4)]
    start = tuple(data(4, 4, 4) for _ in range(cls.parts))
    x = torch.full((5, 4, 3), torch.nan, dtype=torch.float64)
    mask = torch.zeros(5, 4, dtype=torch.bool)
    for k, sequence in enumerate(sequences):
        x[: len(sequence), k] = sequence
        mask[: len(sequence), k] = True
    turn = (lambda t: t.transpose(0, 1)) if batch_first else (lambda t: t)
    state = start if cls.parts == 2 else start[0]
    padded, final = rnn(turn(x), state, turn(mask))
    packed_in = pack_sequence(sequences, enforce_sorted=False)
    packed, packed_final = rnn(packed_in, state)
    assert torch.equal(packed.sorted_indices, packed_in.sorted_indices)
    assert_close(pad_packed_sequence(packed, batch_first)[0], padded)
    assert_states_close(packed_final, final)
    for k, sequence in enumerate(sequences):
        own = tuple(part[:, k] for part in start)
        y, last = rnn(sequence, own if cls.parts == 2 else own[0])
        assert_close(turn(padded)[: len(sequence), k], y)
        assert not turn(padded)[len(sequence) :, k].any()
        assert_states_close(tuple(part[:, k] for part in parts(final)), last)


@BOTH
def test_sorted_packed_sequences(cls):
    rnn, x = build(cls, 3, 4), data(5, 2, 3)
    packed, _ = rnn(pack_padded_sequence(x, [5, 3]))
    assert packed.sorted_indices is None
    assert_close(pad_packed_sequence(packed)[0][:3, 1], rnn(x[:3, 1])[0])


@BOTH
def test_a_step_without_data_keeps_the_state(cls):
    rnn, x = build(cls, 3, 4), data(5, 2, 3)
    mask = torch.tensor([True, True, False, True, False])[:, None].expand(5, 2)
    y, final = rnn(x, mask=mask)
    short, last = rnn(x[[0, 1, 3]])
    assert_close(y[[0, 1, 3]], short)
    assert not y[[2, 4]].any()
    assert_states_close(final, last)


@BOTH
def test_no_gradient_flows_into_padding(cls):
    rnn, x = build(cls, 3, 4), data(5, 2, 3)
    x[3:, 1] = torch.nan
    x.requires_grad_()
    mask = ~x.detach().isnan().any(2)
    rnn(x, mask=mask)[0].square().sum().backward()
    assert x.grad.isfinite().all()
    assert not x.grad[3:, 1].any()
    assert all(p.grad.isfinite().all() for p in rnn.parameters())


@BOTH
def test_derivatives_reach_the_state(cls):
    cell = build(CELLS[cls], 2, 3)
    state = tuple(data(2, 3).requires_grad_() for _ in range(cls.parts))

    def run(x, *state):
        return cell(x, state if len(state) == 2 else state[0])

    torch.autograd.gradcheck(run, (data(2, 2).requires_grad_(), *state))
    torch.autograd.gradgradcheck(run, (data(2, 2).requires_grad_(), *state))


@BOTH
def test_dropout_between_layers_only(cls):
    rnn, x = cls(3, 4, num_layers=2, dropout=0.5), torch.randn(5, 2, 3)
    assert not torch.equal(rnn(x)[0], rnn(x)[0])
    rnn.eval()
    assert torch.equal(rnn(x)[0], rnn(x)[0])
    with pytest.warns(UserWarning, match=f"{cls.__name__}: dropout stands between layers"):
        single = cls(3, 4, dropout=0.5)
    assert torch.equal(single(x)[0], single(x)[0])


def test_small_steps_of_the_state_count_in_half_precision():
    # Gates that depend on nothing: a thousandth is added to, or taken from, a state of 1, whose spacing in bfloat16 is 8 thousandths.
    def constant(norm, *values):
        torch.nn.init.zeros_(norm.weight)
        norm.bias.data.copy_(torch.tensor(values).repeat_interleave(4))

    little = torch.tensor(0.001).logit().item()
    lstm, gru = equinorm.LayerNormLSTM(3, 4), equinorm.LayerNormGRU(3, 4)
    for norm in (lstm.cells[0].norm_ih, lstm.cells[0].norm_hh):
        constant(norm, little / 2, 50.0, 50.0, 0.0)  # i = 0.001, f = 1, g = 1
    for norm in (gru.cells[0].norm_ih, gru.cells[0].norm_hh):
        constant(norm, 0.0, -little / 2)  # z = 0.999
    for norm in (gru.cells[0].norm_in, gru.cells[0].norm_hn):
        constant(norm, 0.0)
    x, one = torch.randn(100, 2, 3).bfloat16(), torch.ones(1, 2, 4).bfloat16()
    _, (_, c) = lstm.bfloat16()(x, (one, one))
    _, h = gru.bfloat16()(x, one)
    assert (c - 1.1).abs().max() < 0.02
    assert (h - 0.999**100).abs().max() < 0.02


@BOTH
def test_empty_sequences_and_batches(cls):
    rnn = cls(3, 4, bidirectional=True)
    for shape in ((0, 2, 3), (5, 0, 3)):
        y, final = rnn(torch.randn(shape))
        assert y.shape == (*shape[:2], 8)
        assert all(part.shape == (2, shape[1], 4) for part in parts(final))


@BOTH
def test_bad_inputs_are_refused(cls):
    rnn, name, state = cls(3, 4, num_layers=2), cls.__name__, torch.zeros(1, 2, 4)
    state = (state, state) if cls.parts == 2 else state
    for call, error, pattern in (
        (lambda: rnn(torch.zeros(5, 2, 4)), ValueError, r"must have shape \(T, N, 3\) or \(T, 3\), got \(5, 2, 4\)"),
        (lambda: cls(3, 4, batch_first=True)(torch.zeros(3)), ValueError, r"must have shape \(N, T, 3\) or \(T, 3\), got \(3,\)"),
        (lambda: rnn(torch.zeros(5, 2, 3, dtype=torch.long)), TypeError, r"must be floating point, got torch.int64"),
        (lambda: rnn(torch.zeros(5, 2, 3), state), ValueError, r"state must be .* of shape \(2, 2, 4\) .* got \[\(1, 2, 4\)"),
        (lambda: rnn(torch.zeros(5, 2, 3), mask=torch.ones(2, 5).bool()), ValueError, r"mask must be boolean .* of shape \(5, 2\)"),
        (lambda: rnn(torch.zeros(5, 2, 3), mask=torch.ones(5, 2)), ValueError, r"mask must be boolean .* got torch.float32"),
        (
            lambda: rnn(pack_padded_sequence(torch.zeros(5, 2, 3), [5, 3]), mask=torch.ones(5, 2).bool()),
            ValueError,
            "a packed sequence knows its lengths, so mask must be None",
        ),
        (lambda: rnn(pack_padded_sequence(torch.zeros(5, 2, 4), [5, 3])), ValueError, r"must have shape \(T, N, 3\)"),
    ):
        with pytest.raises(error, match=f"{name}: .*{pattern}"):
            call()


@BOTH
def test_bad_cell_inputs_are_refused(cls):
    cell, name, wrong = CELLS[cls](3, 4), CELLS[cls].__name__, torch.zeros(2, 5)
    state = (wrong, wrong) if cls.parts == 2 else wrong
    for call, error, pattern in (
        (lambda: cell(torch.zeros(2, 4)), ValueError, r"must have shape \(N, 3\) or \(3,\), got \(2, 4\)"),
        (lambda: cell(torch.zeros(2, 3, dtype=torch.long)), TypeError, "must be floating point"),
        (lambda: cell(torch.zeros(2, 3), state), ValueError, r"state must be .* of shape \(2, 4\), got \[\(2, 5\)"),
        (lambda: CELLS[cls](3, 1), ValueError, "hidden_size must be at least 2"),
        (lambda: CELLS[cls](3, 4, eps=-1.0), ValueError, "eps must be"),
    ):
        with pytest.raises(error, match=f"{name}: .*{pattern}"):
            call()


def test_the_catalogue_builds_them():
    rnn = equinorm.create("layer_lstm", 8, num_layers=2)
    assert (rnn.input_size, rnn.hidden_size, len(rnn.cells)) == (8, 8, 2)
    assert equinorm.create("LayerNormGRU", 8).hidden_size == 8
