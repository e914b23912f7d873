from __future__ import annotations

import pytest
import torch
from torch import nn

from equinorm import spectral_norm, stable_rank, stable_rank_norm, stable_rank_projection
from tests.helpers import assert_close


def converged(layer: nn.Module, **options) -> nn.Module:
    stable_rank_norm(layer, **options)
    layer.parametrizations.weight[0].restart(layer.parametrizations.weight.original, 2000)
    return layer.eval()


def test_stable_rank_of_known_matrices():
    assert stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0]))).item() == pytest.approx(1.5)
    assert stable_rank(torch.ones(3, 4)).item() == pytest.approx(1)
    assert stable_rank(torch.zeros(3, 4)).item() == 0
    assert stable_rank(1e-30 * torch.eye(4)).item() == pytest.approx(4)
    assert stable_rank(torch.eye(3).to(torch.bfloat16)).item() == 3
    w = torch.randn(3, 4, 2)
    assert_close(stable_rank(w, dim=1), stable_rank(w.transpose(0, 1)))


@pytest.mark.parametrize("preserve", [0, 1, 2])
def test_projection_reaches_the_rank_and_is_the_nearest(preserve):
    """Against a search by gradient over the scales of the singular values."""
    w = torch.randn(6, 5).double()
    target = 0.5 * (1 + stable_rank(w).item()) if preserve < 2 else 0.98 * stable_rank(w).item()
    s = torch.linalg.svdvals(w)
    if preserve == 2 and (s[:2].square().sum() / s[0].square()) > target:
        s = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.9]).double()
        u, _, vh = torch.linalg.svd(w, full_matrices=False)
        w, target = (u * s) @ vh, 1.3
    projected = stable_rank_projection(w, target, preserve)
    assert stable_rank(projected).item() == pytest.approx(target, abs=1e-12)
    got = torch.linalg.svdvals(projected)
    assert_close(got[:preserve], s[:preserve])
    best = (w - projected).norm().item()
    for _ in range(2000):  # no feasible neighbour in singular values is nearer
        other = (got + 0.05 * torch.randn(5).double() * torch.rand(()).double()).clamp(min=0)
        other[:preserve] = s[:preserve]
        if other.square().sum() <= target * other.max().square():
            assert (other - s).norm().item() >= best - 1e-12


def test_projection_matches_a_constrained_minimiser():
    """The distance by penalised gradient descent over all entries, as the specification did by brute force."""
    torch.manual_seed(3)
    w = torch.randn(6, 5).double()
    target = 0.9 * stable_rank(w).item()
    exact = (w - stable_rank_projection(w, target, 0)).norm().item()
    x = w.clone().requires_grad_()
    for penalty in (1.0, 10.0, 100.0, 1e4, 1e6):
        optimizer = torch.optim.LBFGS([x], max_iter=300, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe")

        def loss(penalty=penalty, optimizer=optimizer):
            optimizer.zero_grad()
            value = (x - w).square().sum() + penalty * (stable_rank(x) - target).clamp(min=0).square()
            value.backward()
            return value

        optimizer.step(loss)
    assert (x.detach() - w).norm().item() == pytest.approx(exact, rel=1e-4)


def test_projection_leaves_lower_ranks_alone_and_handles_rank_one():
    w = torch.randn(4, 5).double()
    assert stable_rank_projection(w, 5.0) is w
    one = stable_rank_projection(w, 1.0, 0)
    u, s, vh = torch.linalg.svd(w)
    assert_close(one, s[0] * u[:, :1] @ vh[:1])
    assert stable_rank_projection(torch.zeros(3, 3), 1.0).abs().max() == 0


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 8), lambda: nn.Conv2d(3, 5, 2), lambda: nn.ConvTranspose2d(5, 3, 2)])
@pytest.mark.parametrize("spectral", [True, False])
def test_the_layer_equals_the_exact_projection(make, spectral):
    layer = make().double()
    rows = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    matrix = layer.weight.detach().movedim(rows, 0).flatten(1)
    converged(layer, rank=1.5, spectral=spectral)
    expected = stable_rank_projection(matrix / torch.linalg.svdvals(matrix)[0] if spectral else matrix, 1.5)
    assert_close(layer.weight.movedim(rows, 0).flatten(1), expected)


def test_the_layer_may_change_the_first_value():
    layer = nn.Linear(6, 8).double()
    raw = layer.weight.detach().clone()
    converged(layer, rank=1.5, spectral=False, preserve=0)
    assert_close(layer.weight, stable_rank_projection(raw, 1.5, 0))


def test_ratio_sets_the_rank_and_one_is_spectral_normalization():
    assert stable_rank_norm(nn.Linear(10, 30), ratio=0.5).parametrizations.weight[0].rank == 5
    assert stable_rank_norm(nn.Linear(10, 1), ratio=0.5).parametrizations.weight[0].rank == 1
    full, plain = nn.Linear(6, 8).double(), nn.Linear(6, 8).double()
    plain.load_state_dict(full.state_dict())
    converged(full, ratio=1.0)
    spectral_norm(plain).eval()
    plain.parametrizations.weight[0].load_state_dict(full.parametrizations.weight[0].state_dict())
    assert_close(full.weight, plain.weight.detach())


def test_rank_one_gives_the_first_component():
    layer = converged(nn.Linear(6, 8).double(), rank=1.0)
    step = layer.parametrizations.weight[0]
    assert_close(layer.weight, step._u.outer(step._v))


def test_a_layer_with_one_output_keeps_its_direction():
    layer = nn.Linear(6, 1).double()
    raw = layer.weight.detach().clone()
    converged(layer)
    assert_close(layer.weight, raw / raw.norm())
    layer.weight.sum().backward()
    assert layer.parametrizations.weight.original.grad.isfinite().all()


def test_invariant_to_the_scale_of_the_weight():
    layer = converged(nn.Linear(6, 8).double(), rank=2.0)
    before = layer.weight.detach()
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(7)
    assert_close(layer.weight, before)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: nn.Linear(2, 2), {"rank": 0.5}, "stable_rank_norm: rank must be at least 1"),
        (lambda: nn.Linear(2, 2), {"ratio": 0.0}, r"ratio must lie in \(0, 1\], got 0.0"),
        (lambda: nn.Linear(2, 2), {"preserve": 2}, "preserve must be 0 or 1, got 2; stable_rank_projection takes more"),
        (lambda: nn.Linear(2, 2), {"preserve": 0}, "preserve=0 has no effect with spectral=True"),
        (lambda: nn.Linear(2, 2), {"n_power_iterations": 0}, "n_power_iterations must be an integer of at least 1"),
        (lambda: nn.Linear(2, 2), {"eps": 0.0}, "eps must be positive"),
        (lambda: nn.LayerNorm(2), {}, r"at least 2 dimensions, got shape \(2,\); use weight_norm"),
    ],
)
def test_errors(make, options, message):
    with pytest.raises(ValueError, match=message):
        stable_rank_norm(make(), **options)


def test_projection_errors():
    w = torch.diag(torch.tensor([2.0, 2.0, 1.0]))
    with pytest.raises(
        ValueError, match=r"the 2 preserved singular values alone have stable rank 2, more than the wanted 1\.5; preserve fewer"
    ):
        stable_rank_projection(w, 1.5, 2)
    with pytest.raises(ValueError, match=r"must be a matrix, got shape \(3,\)"):
        stable_rank_projection(w[0], 1.5)
    with pytest.raises(ValueError, match=r"rank must be at least 1"):
        stable_rank_projection(w, 0.9)
    with pytest.raises(ValueError, match=r"preserve must be at least 0"):
        stable_rank_projection(w, 1.5, -1)
