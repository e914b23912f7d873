"""Decorrelated batch norm and IterNorm: what whitening promises, the authors' numbers, equal eigenvalues, stability, running estimates."""

from __future__ import annotations

import copy

import pytest
import torch

import equinorm
from equinorm.norms.iterative import newton
from tests.helpers import assert_close, run_ranks
from tests.references.whitening import by_eigenvectors

BOTH = [equinorm.DecorrelatedBatchNorm, equinorm.IterNorm]
EXAMPLE = torch.tensor([[1.0, 2.0], [3.0, 1.0], [0.0, -1.0], [2.0, 4.0]], dtype=torch.float64)


def decorrelated(channels, d=16, **options):
    return equinorm.DecorrelatedBatchNorm(channels, d, affine=False, dtype=torch.float64, **options)


def iterative(channels, d=64, **options):
    return equinorm.IterNorm(channels, d, affine=False, dtype=torch.float64, **options)


def data(*shape, mix=True):
    """Correlated channels with a mean."""
    x = torch.randn(*shape, dtype=torch.float64)
    if mix:
        x = torch.einsum("nc...,dc->nd...", x, torch.randn(shape[1], shape[1], dtype=torch.float64))
    return x + 2


def covariance(x):
    return torch.cov(x.movedim(1, 0).flatten(1), correction=0)


def white(n, d):
    """n samples of mean 0 and covariance exactly I, n >= d + 1."""
    x = torch.randn(n, d, dtype=torch.float64)
    return torch.linalg.qr(x - x.mean(0))[0] * n**0.5


# Both


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_groups_of_one_are_batch_norm_in_training(cls, eps):
    x = data(5, 4, 3, 3)
    norm = cls(4, 1, eps=eps, dtype=torch.float64)
    assert_close(norm(x), equinorm.BatchNorm(4, eps=eps, dtype=torch.float64)(x))


@pytest.mark.parametrize(("norm", "bound"), [(decorrelated(6), 1e-12), (iterative(6), 1e-12)], ids=["decorrelated", "iterative"])
def test_a_rotated_input_gives_the_rotated_output(norm, bound):
    x = data(50, 6)
    q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    turned, straight = copy.deepcopy(norm)(x @ q.T), copy.deepcopy(norm)(x) @ q.T
    assert (turned - straight).abs().max() < bound * straight.abs().max()


@pytest.mark.parametrize("cls", BOTH)
def test_groups_have_matrices_of_their_own(cls):
    x = torch.randn(200, 8, dtype=torch.float64)
    x[:, 4:] *= 5
    y = cls(8, 4, dtype=torch.float64)(x)
    assert (y.std(0, correction=0) - 1).abs().max() < 5e-3
    alone = cls(4, 4, dtype=torch.float64)
    assert_close(alone(x[:, 4:]), y[:, 4:])


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("value", [0.0, 7.0])
def test_constant_inputs_come_out_as_the_bias_with_a_gradient(cls, value):
    x = torch.full((4, 3, 5), value, dtype=torch.float64, requires_grad=True)
    for eps in (1e-5, 0.0):
        norm = cls(3, eps=eps, dtype=torch.float64)
        y = norm(x)
        assert not y.any()
        (dx,) = torch.autograd.grad(y.square().sum() + y.sum(), x, create_graph=True)
        assert dx.isfinite().all()
        assert torch.autograd.grad(dx.square().sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("cls", BOTH)
def test_one_value_per_channel_and_too_few_are_spoken_about(cls):
    norm = cls(6)
    with pytest.raises(ValueError, match=f"{cls.__name__}: training needs more than one value per channel"):
        norm(torch.randn(1, 6, 1))
    assert norm.num_batches_tracked == 0
    with pytest.warns(RuntimeWarning, match=rf"{cls.__name__}: a covariance of 6 channels from 11 values per channel is poor, .* below 7"):
        norm(torch.randn(11, 6))
    norm(torch.randn(12, 6))


@pytest.mark.parametrize("cls", BOTH)
def test_fewer_values_than_channels_have_the_right_derivative(cls):
    norm = cls(6, eps=0.1, affine=False, dtype=torch.float64)
    x = data(4, 6).requires_grad_()

    def run(x):
        with pytest.warns(RuntimeWarning, match="poor"):
            return copy.deepcopy(norm)(x)

    torch.autograd.gradcheck(run, x)
    torch.autograd.gradgradcheck(run, x)


@pytest.mark.parametrize("make", [equinorm.DecorrelatedBatchNorm, *(lambda c, t=t: equinorm.IterNorm(c, T=t) for t in (5, 12, 40))])
@pytest.mark.parametrize("scale", [1.0, 300.0, 1e5])
def test_dependent_channels_stay_finite_in_float32(make, scale):
    """The products of float32 data have eigenvalues below zero, by far more than eps."""
    x = (torch.randn(256, 8) @ torch.randn(8, 16) * scale).requires_grad_()
    norm = make(16)
    y = norm(x)
    assert y.abs().max() < 20
    (dx,) = torch.autograd.grad(y.square().mean(), x)
    assert dx.isfinite().all()
    assert norm.eval()(x).isfinite().all()


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_group_breaks_alone_and_spoils_no_estimate(cls, bad):
    norm = cls(6, 3)
    norm(torch.randn(20, 6))
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    x = torch.randn(20, 6)
    x[3, 1] = bad
    y = norm(x)
    assert not y[:, :3].isfinite().any()
    assert y[:, 3:].isfinite().all()
    for name in ("running_mean", "running_projection"):
        assert torch.equal(norm.state_dict()[name][0], before[name][0]), f"{name} of the broken group moved"
        assert not torch.equal(norm.state_dict()[name][1], before[name][1]), f"{name} of the other group did not move"


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("running", ["projection", "covariance"])
def test_estimates_are_kept_wide_and_can_be_frozen(cls, running):
    norm = cls(6, 3, running=running, dtype=torch.bfloat16)
    wide = {name: b.dtype for name, b in norm.named_buffers()}
    assert wide == {"running_mean": torch.float32, f"running_{running}": torch.float32, "num_batches_tracked": torch.int64}
    assert {b.dtype for b in norm.half().buffers()} == {torch.float32, torch.int64}
    assert {b.dtype for b in norm.double().buffers()} == {torch.float64, torch.int64}
    x = data(20, 6)
    norm(x)
    want, state = norm.eval()(x), {name: b.clone() for name, b in norm.named_buffers()}
    norm.frozen = True
    assert torch.equal(norm.train()(x), want)
    assert all(torch.equal(b, state[name]) for name, b in norm.named_buffers())
    norm.reset_running_stats()
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.get_buffer(f"running_{running}"), torch.eye(3, dtype=torch.float64).expand(2, 3, 3))


def test_the_mean_of_matrices_is_not_the_matrix_of_the_mean():
    one = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)  # variance 1
    for running, expected in (("projection", 2 / 3), ("covariance", 5**-0.5)):
        norm = decorrelated(1, eps=0.0, momentum=None, running=running)
        norm(one)
        norm(3 * one)  # variance 9
        _, matrix = norm.estimate()
        assert matrix.item() == pytest.approx(expected)  # 0.667 and 0.447
        assert_close(norm.eval()(one), one * expected)


@pytest.mark.parametrize("cls", BOTH)
def test_evaluation_can_be_trained_through(cls):
    """Fine-tuning with frozen statistics: gradients flow through the input and the affine map, not through the estimates."""
    norm = cls(6, 3, dtype=torch.float64)
    norm(data(30, 6))
    norm.eval()
    x = data(5, 6).requires_grad_()
    torch.autograd.gradcheck(norm, x)
    y = norm(x)
    (want,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    norm.train()(data(30, 6))  # moves the estimates that y was computed with
    assert torch.equal(torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0], want)
    y.sum().backward()
    assert norm.weight.grad.any()


def test_groups_follow_from_the_channels():
    assert equinorm.create("decorrelated_batch", 24).channels_per_group == 12
    assert equinorm.create("iterative", 96).channels_per_group == 48
    assert equinorm.DecorrelatedBatchNorm(6).channels_per_group == 6
    assert equinorm.create("decorrelated_batch", 24, channels_per_group=5).channels_per_group == 4


def _masked(cls, **options):
    torch.manual_seed(3)
    norm = cls(6, 3, running="covariance", dtype=torch.float64, **options)
    x, mask, w = data(6, 6, 4), torch.rand(6, 4) < 0.6, torch.randn(6, 6, 4, dtype=torch.float64)
    mask[4:] = False  # the last process has samples without data
    return norm, x, mask, w


def _masked_shard(rank):
    results = {}
    mine = (slice(0, 3), slice(3, 4), slice(4, 6))[rank]
    for cls in BOTH:
        norm, x, mask, w = _masked(cls, process_group="world")
        own = x[mine].clone().requires_grad_()
        y = norm(own, mask=mask[mine])
        (dx,) = torch.autograd.grad((y.sin() * w[mine]).sum(), own)
        results[cls.__name__] = y.detach(), dx, norm.running_mean, norm.running_covariance
    return results


def test_masked_ranks_together_are_the_big_batch():
    shards = run_ranks(3, _masked_shard)
    for cls in BOTH:
        norm, x, mask, w = _masked(cls)
        y = norm(x.requires_grad_(), mask=mask)
        (dx,) = torch.autograd.grad((y.sin() * w).sum(), x)
        mine = [shard[cls.__name__] for shard in shards]
        assert_close(torch.cat([s[0] for s in mine]), y)
        assert_close(torch.cat([s[1] for s in mine]), dx, label="gradient")
        for s in mine:
            assert_close(s[2], norm.running_mean)
            assert_close(s[3], norm.running_covariance)


# Decorrelated batch norm


def test_the_numbers_of_the_specification():
    expected = [[-0.606092, 0.404061], [1.616244, -0.606092], [-1.010153, -1.212183], [0, 1.414214]]
    y = decorrelated(2, eps=0.0)(EXAMPLE)
    assert (y - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-6


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_the_output_has_covariance_one_up_to_eps(eps):
    x = data(40, 5, 3)
    y = decorrelated(5, eps=eps)(x)
    s = covariance(x)
    assert_close(covariance(y), s @ torch.linalg.inv(s + eps * torch.eye(5, dtype=torch.float64)))


def test_rounding_noise_is_not_amplified_without_bound():
    """An eigenvalue that rounding moved to just above -eps would otherwise be divided by the root of almost nothing."""
    noise = torch.finfo(torch.float32).eps
    cov = torch.diag(torch.tensor([1e10, -1e-5 * (1 - 1e-12)], dtype=torch.float64))
    assert decorrelated(2).projection(cov, noise).abs().max().item() == pytest.approx((noise * 1e10) ** -0.5)


def test_equal_eigenvalues_have_exact_derivatives():
    """Exactly white input: every pair of eigenvalues is equal, and autograd through the eigenvectors gives NaN."""
    x = white(9, 4).requires_grad_()
    s = covariance(x.detach()).requires_grad_()
    assert (
        torch.autograd.grad(by_eigenvectors(torch.eye(4, dtype=torch.float64, requires_grad=True) * s.diagonal().mean()).sum(), s)[0]
        .isnan()
        .any()
    )

    def run(x):
        return decorrelated(4)(x)

    torch.autograd.gradcheck(run, x)
    torch.autograd.gradgradcheck(run, x)
    zero = torch.zeros(8, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(run(zero).sum(), zero)[0].isfinite().all()


def test_the_gradient_equals_that_through_the_eigenvectors():
    x = data(30, 5).requires_grad_()
    dy = torch.randn_like(x)
    centred = x - x.mean(0)
    want = centred @ by_eigenvectors(centred.T @ centred / 30 + 1e-5 * torch.eye(5, dtype=torch.float64))
    got, expected = (torch.autograd.grad(y, x, dy)[0] for y in (decorrelated(5)(x), want))
    assert (got - expected).abs().max() < 1e-12 * expected.abs().max()


# IterNorm


def test_enough_steps_reach_decorrelation():
    x = data(60, 6)
    assert_close(iterative(6, T=20)(x), decorrelated(6)(x))
    want = decorrelated(2, eps=0.0)(EXAMPLE)
    errors = {steps: (iterative(2, T=steps, eps=0.0)(EXAMPLE) - want).abs().max().item() for steps in (5, 7)}
    assert errors[5] == pytest.approx(5.5e-5, rel=0.02)
    assert errors[7] < 1e-13
    s = covariance(EXAMPLE)
    assert (newton(s, 0.0, 5) - by_eigenvectors(s)).abs().max().item() == pytest.approx(3.2e-5, rel=0.02)


def test_without_steps_it_centres_and_divides_by_the_trace():
    x = data(20, 4)
    trace = covariance(x).trace() + 4 * 1e-5
    assert_close(iterative(4, T=0)(x), (x - x.mean(0)) / trace.sqrt())


@pytest.mark.parametrize("steps", [0, 1, 5, 9])
def test_the_scale_of_the_input_cancels_at_every_step(steps):
    x = data(20, 4)
    assert_close(iterative(4, T=steps, eps=0.0)(x * 16), iterative(4, T=steps, eps=0.0)(x))


@pytest.mark.parametrize(
    ("steps", "variances"),
    [
        (5, {8: 0.9985, 16: 0.966, 32: 0.824, 64: 0.586, 128: 0.360, 256: 0.201, 512: 0.106}),
        (7, {64: 0.983, 512: 0.429}),
        (9, {512: 0.930}),
        (12, {512: 1.0}),
    ],
)
def test_wide_groups_of_white_input_fall_short_of_variance_one(steps, variances):
    for d, expected in variances.items():
        w = newton(torch.eye(d, dtype=torch.float64), 0.0, steps)
        assert w[0, 0].item() ** 2 == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("d", [1, 2, 8, 16, 64, 256])
def test_auto_takes_enough_steps_for_white_input(d):
    norm = equinorm.IterNorm(d, d, T="auto")
    assert newton(torch.eye(d, dtype=torch.float64), 0.0, norm.T)[0, 0].item() ** 2 > 0.9999
    assert f"T={norm.T}" in repr(norm)


def conditioned(kappa, d=16, dtype=torch.float64):
    q = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]
    return ((q * torch.logspace(0, -torch.tensor(float(kappa)).log10().item(), d, dtype=torch.float64)) @ q.T).to(dtype)


def published(s, steps):
    """The recurrence as the paper and its code write it."""
    trace, p = s.trace(), torch.eye(len(s), dtype=s.dtype)
    for _ in range(steps):
        p = (3 * p - p @ p @ p @ (s / trace)) / 2
    return p / trace.sqrt()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("kappa", [10, 100])
def test_many_steps_are_stable(kappa, dtype, bound):
    s = conditioned(kappa, dtype=dtype)
    want = by_eigenvectors(s.double())
    for steps in (14, 20, 30):
        error = (newton(s, 0.0, steps).double() - want).abs().max() / want.abs().max()
        assert error < bound, f"T={steps}: {error:.2g}"
    if kappa == 100:
        broken = (published(s, 20).double() - want).abs().max() / want.abs().max()
        assert not broken < 1, "the published form amplifies rounding; if it no longer does, the coupled form is not needed"


def test_the_coupled_form_is_the_published_one_with_its_gradient():
    s = conditioned(10).requires_grad_()
    w = torch.randn(16, 16, dtype=torch.float64)
    for steps in (0, 1, 3, 5, 7):
        ours, theirs = newton(s, 0.0, steps), published(s, steps)
        assert_close(ours, theirs)
        got, want = (torch.autograd.grad(((p + p.T) * w).sum(), s, allow_unused=True)[0] for p in (ours, theirs))
        assert (got - want).abs().max() < 1e-12 * want.abs().max()


def test_the_gradient_of_many_steps_is_that_of_exact_whitening():
    x = (white(64, 8) * torch.logspace(0, -1, 8, dtype=torch.float64)).requires_grad_()
    dy = torch.randn_like(x)
    want = torch.autograd.grad(decorrelated(8)(x), x, dy)[0]
    for steps in (14, 30):
        got = torch.autograd.grad(iterative(8, T=steps)(x), x, dy)[0]
        assert (got - want).abs().max() < 1e-9 * want.abs().max()
