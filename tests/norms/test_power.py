"""Power norm and moving average batch norm: small examples, past the warm-up, the two directions' state, checkpoints."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import equinorm
from tests.cases import CASES
from tests.helpers import assert_close, run_ranks
from tests.test_catalogue import buffers, build, data, masks, step_matches_reference


def experienced(steps):
    """Something in all of a module's state, after ``steps`` steps."""

    def ready(module, x):
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                if name == "iters":
                    buffer.fill_(steps)
                else:
                    buffer.copy_(1 + torch.arange(buffer.numel()).sin().reshape(buffer.shape) / 2)

    return ready


def case(cls, steps, **options):
    """The line of ``cls`` in the table, after ``steps`` steps."""
    line = next(case for case in CASES if case.cls is cls)
    return dataclasses.replace(line, options=({**line.options[0], **options},), ready=experienced(steps))


LATER = {
    "power": case(equinorm.PowerNorm, 7, warmup_iters=5, num_groups=2),
    "power, end of the warm-up": case(equinorm.PowerNorm, 3, warmup_iters=5, num_groups=None),
    "power, batch form": case(equinorm.PowerNorm, 7, warmup_iters=5, variant="PN-V"),
    "moving": case(equinorm.MovingAverageBatchNorm, 998, buffer_size=3, alpha=0.7),
    "moving, tight": case(equinorm.MovingAverageBatchNorm, 1000, buffer_size=3, clip=1.05),
    "moving, before r": case(equinorm.MovingAverageBatchNorm, 99, buffer_size=3),
}
later = pytest.mark.parametrize("case", LATER.values(), ids=LATER.keys())


@later
def test_past_the_warm_up_they_are_the_loop(case):
    module = build(case)
    for _ in range(5):
        step_matches_reference(case, module, 0, data(case))
    step_matches_reference(case, module.eval(), 0, data(case))
    for mask in masks(case):
        step_matches_reference(case, build(case), 0, data(case), mask, poison=True)


@later
def test_a_compiled_backward_reads_the_state_of_its_own_step(case):
    # The compiler would recompute what depends on a buffer in backward, when the buffer has moved on.
    module, x = build(case), data(case).requires_grad_()
    straight = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        (expected,) = torch.autograd.grad(straight(x).sin().sum(), x)
        (actual,) = torch.autograd.grad(compiled(x).sin().sum(), x)
        assert_close(actual, expected)
    for name, buffer in straight.named_buffers():
        assert_close(dict(module.named_buffers())[name].double(), buffer.double(), label=name)


@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
@later
def test_checkpointing_repeats_the_step(case, reentrant):
    module, x = build(case), data(case).requires_grad_()
    straight = copy.deepcopy(module)
    (expected,) = torch.autograd.grad(straight(x).sum(), x)
    torch.utils.checkpoint.checkpoint(module, x, use_reentrant=reentrant).sum().backward()
    assert x.grad is not None
    assert_close(x.grad, expected)
    for name, buffer in straight.named_buffers():
        assert torch.equal(dict(module.named_buffers())[name], buffer), name


@later
def test_bad_batches_and_frozen_modules_leave_finite_and_unmoved_state(case):
    module, x = build(case), data(case)
    x[0, 0] = torch.inf
    x.requires_grad_()
    module(x).sum().backward()
    assert all(b.isfinite().all() for b in module.buffers())
    module.frozen = True
    before = buffers(module)
    (-module(data(case).requires_grad_())).sum().backward()
    assert all(torch.equal(b, before[name]) for name, b in module.named_buffers())


def _rank(rank):
    sizes, results = (3, 0, 2), []
    for line in LATER.values():
        torch.manual_seed(3)
        module = build(line, process_group="world")
        x = data(line, (5, *line.shape[1:]))[sum(sizes[:rank]) : sum(sizes[: rank + 1])].requires_grad_()
        y = module(x)
        y.sin().sum().backward()
        results.append((y.detach(), x.grad, buffers(module)))
    return results


def test_processes_together_are_the_big_batch():
    ranks = run_ranks(3, _rank)
    for i, line in enumerate(LATER.values()):
        torch.manual_seed(3)
        module = build(line)
        x = data(line, (5, *line.shape[1:])).requires_grad_()
        y = module(x)
        y.sin().sum().backward()
        assert_close(torch.cat([results[i][0] for results in ranks]), y)
        assert_close(torch.cat([results[i][1] for results in ranks]), x.grad, label="gradient of x")
        for results in ranks:
            for name, buffer in module.named_buffers():
                assert_close(results[i][2][name].double(), buffer.double(), label=name)


# Power norm

TOKENS = torch.tensor([[1.0], [2.0], [2.0]], dtype=torch.float64)


def power(**options):
    return equinorm.PowerNorm(1, eps=0.0, affine=False, num_groups=None, **options).double()


def test_the_batch_form_gives_mean_square_one_and_its_true_derivative():
    norm = equinorm.PowerNorm(3, eps=0.0, num_groups=None, variant="PN-V").double()
    x = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    assert_close(norm(x).square().mean((0, 1)), torch.ones(3).double())
    torch.autograd.gradcheck(norm, (x,), fast_mode=True)
    torch.autograd.gradgradcheck(norm, (x,), fast_mode=True)


def test_the_running_value_before_the_batch_normalizes_it():
    norm = power(warmup_iters=0, alpha_fwd=0.5)
    norm.running_phi.fill_(4.0)
    assert norm(TOKENS).flatten().tolist() == [0.5, 1.0, 1.0]
    assert norm.running_phi.item() == 3.5  # halfway to 3, the batch's


def test_the_warm_up_averages_plainly_and_once_a_step():
    norm = power(warmup_iters=3)
    for size in (4.0, 1.0, 1.0):
        assert norm(torch.full((2, 1), size**0.5, dtype=torch.float64)).abs().max() == 1
    assert norm.running_phi.item() == pytest.approx(2.0, rel=1e-12)
    assert norm.iters == 3


def test_alpha_one_turns_the_correction_off():
    norm = power(warmup_iters=0, alpha_bkw=1.0)
    norm.running_phi.fill_(4.0)
    for _ in range(2):
        x, dy = TOKENS.clone().requires_grad_(), torch.randn(3, 1).double()
        psi = norm.running_phi.sqrt()
        norm(x).backward(dy)
        assert x.grad is not None
        assert_close(x.grad, dy / psi)


def test_the_correction_takes_out_what_lies_along_the_output():
    norm = power(warmup_iters=0, alpha_fwd=0.99, alpha_bkw=0.99)
    left, given = [], []
    for step in range(1500):
        x = torch.randn(32, 1, dtype=torch.float64, requires_grad=True)
        y = norm(x)
        g = 1.5 * y.detach() + torch.randn_like(x)
        y.backward(g)
        if step > 1000:
            assert x.grad is not None
            left.append((x.grad * y).mean().detach())
            given.append((g * y).mean().detach())
    assert torch.stack(given).mean() > 1.3
    assert torch.stack(left).mean().abs() < 0.05


def test_channels_are_where_they_are_said_to_be():
    x = torch.randn(4, 5, 6)
    last, first = equinorm.PowerNorm(6, num_groups=3), equinorm.PowerNorm(6, num_groups=3, channel_dim=1)
    assert torch.equal(last(x), first(x.movedim(2, 1)).movedim(1, 2))
    assert last(x[0]).shape == (5, 6)
    padding = torch.rand(4, 5) < 0.5
    assert torch.equal(last(x, padding), last(x, padding.unsqueeze(2)))
    assert not last(x, padding)[~padding].any()
    with pytest.raises(ValueError, match=r"PowerNorm: the input must have shape \(\*, 6\), got \(4, 6, 5\); for .* channel_dim=1"):
        last(x.movedim(2, 1))


def test_group_scaling_comes_first():
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    scaled = x / x.unflatten(2, (3, 2)).square().mean(3).sqrt().repeat_interleave(2, 2)
    with_groups, without = (equinorm.PowerNorm(6, eps=0.0, num_groups=groups).double() for groups in (3, None))
    assert_close(with_groups(x), without(scaled))


def test_published_checkpoints_load():
    norm = equinorm.PowerNorm(3)
    state = {"weight": torch.rand(3), "bias": torch.rand(3), "iters": torch.tensor([12])}
    state |= {name: torch.rand(1, 3, 1, 1) for name in ("running_phi", "ema_gz")}
    norm.load_state_dict(dict(state))
    assert norm.iters == 12
    assert torch.equal(norm.ema_gz, state["ema_gz"].flatten())
    moving = equinorm.MovingAverageBatchNorm(3, buffer_size=4)
    state = {"weight": torch.rand(3), "bias": torch.rand(3), "iters": torch.tensor([12]), "running_var": torch.rand(1, 3, 1, 1)}
    state |= {name: torch.rand(4, 3) for name in ("buffer_x2", "buffer_gz")}
    moving.load_state_dict(dict(state))
    assert torch.equal(moving.running_var, state["running_var"].flatten())


# Moving average batch norm


def test_with_a_buffer_of_one_it_is_the_batch_form_of_power_norm():
    x, dy = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    moving = equinorm.MovingAverageBatchNorm(3, buffer_size=1, warmup_iters=0).double()
    batch = equinorm.PowerNorm(3, num_groups=None, variant="PN-V", channel_dim=1).double()
    for _ in range(3):
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, want = moving(ours), batch(theirs)
        assert_close(y, want)
        y.backward(dy)
        want.backward(dy)
        assert_close(ours.grad, theirs.grad, label="gradient of x")


@pytest.mark.parametrize(("clip", "expected"), [(5.0, [0.5, 1.0, 1.0]), (1.05, [0.549857, 1.099715, 1.099715])])
def test_r_leans_on_the_running_variance(clip, expected):
    norm = equinorm.MovingAverageBatchNorm(1, buffer_size=2, eps=0.0, warmup_iters=0, clip=clip, affine=False).double()
    norm.iters.fill_(1001)
    norm.running_var.fill_(4.0)
    norm.buffer_x2.fill_(3.0)
    assert (norm(TOKENS).flatten() - torch.tensor(expected)).abs().max() < 5e-7


def test_two_forwards_before_one_backward():
    norm = equinorm.MovingAverageBatchNorm(3, buffer_size=2, warmup_iters=0).double()
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    norm(x[0])
    (norm(x[0]).sum() + norm(x[1]).sum()).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert norm.iters == 3


def test_second_derivatives_are_refused():
    for norm in (equinorm.PowerNorm(2), equinorm.MovingAverageBatchNorm(2)):
        x = torch.randn(4, 2, requires_grad=True)
        with pytest.raises(RuntimeError, match="by definition not the derivative"):
            torch.autograd.grad(norm(x).sum(), x, create_graph=True)
