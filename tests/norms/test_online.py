"""Online normalization: the numbers of a small example, splits of a batch, the control process, state between processes."""

from __future__ import annotations

import copy
import time

import pytest
import torch

import equinorm
from equinorm.norms.online import recurrence
from tests.helpers import assert_close, run_ranks
from tests.references import online as reference


def test_the_numbers_of_a_small_example():
    x = torch.tensor([[1.0], [3.0], [2.0]], dtype=torch.float64, requires_grad=True)
    norm = equinorm.OnlineNorm(1, 0.5, 0.5, eps=0.0, affine=False, ecm=None).double()
    y = norm(x)
    assert (y.flatten() - torch.tensor([1.0, 2.886751, 0.179605])).abs().max() < 5e-7
    assert norm.running_mean.item() == 1.875
    assert norm.running_var.item() == 0.984375
    y.sum().backward()
    assert x.grad is not None
    assert (x.grad.flatten() - torch.tensor([1.0, -1.011966, 0.742463])).abs().max() < 5e-7
    assert norm.u.item() == pytest.approx(0.730497, abs=5e-7)
    assert norm.v.item() == pytest.approx(-0.095795, abs=5e-7)


def test_statistics_are_those_of_the_weighted_past():
    x, f = torch.randn(9, 2, 4, dtype=torch.float64), 0.7
    norm = equinorm.OnlineNorm(2, alpha_fwd=f).double()
    norm(x)
    # The start counts f^9 as one value 0 with variance 1, sample t counts (1 - f) f^(8 - t).
    weights = (1 - f) * f ** torch.arange(8, -1, -1, dtype=torch.float64)
    mean = (weights[:, None] * x.mean(2)).sum(0)
    square = (weights[:, None] * x.square().mean(2)).sum(0) + f**9
    assert_close(norm.running_mean, mean)
    assert_close(norm.running_var, square - mean.square())


@pytest.mark.parametrize("pieces", [(33,), (1,) * 33, (16, 17), (5, 0, 28)])
def test_splitting_a_batch_changes_nothing(pieces):
    x, dy = torch.randn(2, 33, 3, 4, dtype=torch.float64)
    whole = equinorm.OnlineNorm(3, 0.9, 0.8).double()
    parts = copy.deepcopy(whole)
    x_whole = x.clone().requires_grad_()
    y = whole(x_whole)
    y.backward(dy)
    ys, dxs = [], []
    for piece, gradient in zip(x.split(pieces), dy.split(pieces), strict=True):
        piece = piece.clone().requires_grad_()
        ys.append(parts(piece))
        ys[-1].backward(gradient)
        dxs.append(piece.grad)
    assert_close(torch.cat(ys), y)
    assert_close(torch.cat(dxs), x_whole.grad, label="gradient of x")
    for name, state in whole.named_buffers():
        assert_close(dict(parts.named_buffers())[name], state, label=name)
    assert_close(parts.weight.grad, whole.weight.grad, label="gradient of weight")


def test_the_scan_is_the_loop():
    a, b, start = torch.randn(33, 5).double(), torch.randn(33, 5).double(), torch.randn(5).double()
    before, last = recurrence(a, b, start)
    state = start
    for t in range(33):
        assert_close(before[t], state)
        state = a[t] * state + b[t]
    assert_close(last, state)
    assert torch.equal(recurrence(a[:0], b[:0], start)[1], start)


def test_a_long_batch_takes_a_scan_and_no_loop():
    x = torch.randn(2048, 16, dtype=torch.float64, requires_grad=True)
    norm = equinorm.OnlineNorm(16, ecm=None).double()
    values = {name: b.clone() for name, b in norm.named_buffers()} | dict(norm.named_parameters())
    norm(x).sum().backward()  # whatever the first call has to load

    def seconds(forward):
        started = time.process_time()
        forward().sum().backward()
        return time.process_time() - started

    fast = min(seconds(lambda: norm(x)) for _ in range(3))
    slow = seconds(lambda: reference.online(x, values, training=True, ecm=None)[0])
    assert fast < slow / 5, f"{fast:.4f} s against {slow:.4f} s by the loop"


def test_the_control_process_takes_out_what_biases_the_gradient():
    # 20 000 samples whose incoming gradient has a mean and a part along y.
    x = torch.randn(20_000, 1, dtype=torch.float64, requires_grad=True)
    norm = equinorm.OnlineNorm(1, affine=False, ecm=None).double()
    y = norm(x)
    g = 2 + 1.5 * y.detach() + torch.randn_like(x)
    y.backward(g)
    assert x.grad is not None
    settled = slice(5000, None)
    assert g[settled].mean() > 1.9
    assert (g * y)[settled].mean() > 1.3
    assert x.grad[settled].mean().abs() < 0.05
    assert (x.grad * y)[settled].mean().abs() < 0.05


def test_control_runs_away_beyond_its_bound_unless_clipped():
    def control_after(size, **options):
        norm = equinorm.OnlineNorm(1, alpha_fwd=1.0, affine=False, ecm=None, **options).double()  # statistics stay at 0 and 1
        x = torch.full((3000, 1), size**0.5, dtype=torch.float64).requires_grad_()
        norm(x).backward(torch.ones_like(x))
        return norm.v.abs().item()

    assert control_after(199) < 100
    assert not control_after(203) < 1e6
    assert control_after(203, clip_control=True) < 100


@pytest.mark.parametrize("ecm", ["ls", "ac"])
def test_the_guard_stays_in_evaluation(ecm):
    x = 100 * torch.randn(4, 3, 5)
    norm = equinorm.OnlineNorm(3, ecm=ecm).eval()
    y = norm(x)
    if ecm == "ac":
        assert y.abs().max() == 5
    else:
        assert_close(y.square().mean((1, 2)), torch.ones(4))


def test_gradients_stop_at_the_clamp():
    x = torch.tensor([[2.0], [9.0]], requires_grad=True)
    norm = equinorm.OnlineNorm(1, alpha_fwd=1.0, alpha_bkw=1.0, ecm="ac", eps=0.0)  # no statistics, no control: the identity, clamped
    norm(x).sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [1.0, 0.0]


def test_a_second_derivative_is_refused():
    x = torch.randn(4, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="by definition not the derivative"):
        torch.autograd.grad(equinorm.OnlineNorm(2)(x).sum(), x, create_graph=True)


def test_a_bad_sample_is_no_step():
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    x[2, 0, 1] = torch.nan
    x.requires_grad_()
    norm = equinorm.OnlineNorm(2, 0.9, 0.9, ecm=None).double()
    without = copy.deepcopy(norm)
    norm(x).sum().backward()
    rest = x.detach()[[0, 1, 3, 4, 5]].requires_grad_()
    without(rest).sum().backward()
    for name, state in norm.named_buffers():
        assert state.isfinite().all()
        assert_close(state[0], dict(without.named_buffers())[name][0], label=name)
    assert x.grad is not None
    assert_close(x.grad[[0, 1, 3, 4, 5], 0], rest.grad[:, 0])


def test_frozen_state_rests_and_has_the_exact_derivative():
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    norm = equinorm.OnlineNorm(2).double()
    norm(x)
    norm.frozen = True
    before = [b.clone() for b in norm.buffers()]
    torch.autograd.gradcheck(norm, (x,))
    torch.autograd.gradgradcheck(norm, (x,))
    assert all(torch.equal(a, b) for a, b in zip(before, norm.buffers(), strict=True))


def test_the_authors_checkpoints_load():
    norm = equinorm.OnlineNorm(3)
    state = {f"norm.{name}": torch.rand(3) for name in ("m", "var", "u", "v")} | {"weight": torch.rand(3), "bias": torch.rand(3)}
    norm.load_state_dict(dict(state))
    assert torch.equal(norm.running_mean, state["norm.m"])
    assert torch.equal(norm.v, state["norm.v"])


def _rank(rank):
    norm = equinorm.OnlineNorm(2, 0.9, 0.9).double()
    x = (torch.randn(8, 2, 3, generator=torch.Generator().manual_seed(rank)).double() + rank).requires_grad_()
    norm(x).sin().sum().backward()
    before = {name: b.clone() for name, b in norm.named_buffers()}
    norm.average_over()
    return before, {name: b.clone() for name, b in norm.named_buffers()}


def test_processes_average_their_streams():
    before, after = zip(*run_ranks(3, _rank), strict=True)
    for name in ("running_mean", "u", "v"):
        expected = torch.stack([b[name] for b in before]).mean(0)
        assert all(torch.equal(a[name], after[0][name]) for a in after)
        assert_close(after[0][name], expected, label=name)
    means, variances = (torch.stack([b[name] for b in before]) for name in ("running_mean", "running_var"))
    assert_close(after[0]["running_var"], variances.mean(0) + means.var(0, correction=0))


def test_layer_scaling_gives_every_group_the_mean_square_one():
    x = torch.randn(3, 6, 4, dtype=torch.float64) + 5
    y = equinorm.LayerScaling(group_size=2, eps=0.0)(x)
    assert_close(y.reshape(3, 3, -1).square().mean(2), torch.ones(3, 3).double())
    with pytest.raises(ValueError, match=r"LayerScaling: the input must have shape \(N, C, \*spatial\), got \(4,\)"):
        equinorm.LayerScaling()(torch.zeros(4))
