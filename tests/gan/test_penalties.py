from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from equinorm import LazyRegularizer, MinibatchStdDev, PathLengthPenalty, create, lazy_adam_hparams, r1_penalty
from tests.helpers import assert_close, run_ranks
from tests.references import gan as reference


class Generator(nn.Module):
    """A small nonlinear map from latents, (N, D) or (N, layers, D), to images (N, 3, 4, 5)."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(size, 8), nn.Linear(8, 60)

    def forward(self, w):
        h = self.first(w).tanh()
        return self.second(h if h.ndim == 2 else h.cumsum(1).sum(1)).view(-1, 3, 4, 5)


def latents(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6)])
def test_lengths_equal_those_from_the_whole_jacobian(shape):
    g, w = Generator().double(), latents(*shape)
    images, noise = g(w), torch.randn(4, 3, 4, 5).double()
    assert_close(PathLengthPenalty(eps=1e-30).lengths(images, w, noise=noise), reference.path_lengths(images, w, noise / math.sqrt(20)))


def test_latents_with_the_layers_first():
    """A copy that averages (layers, N, D) over the wrong dimension has one length per layer; here there is one per sample."""
    g, w = Generator().double(), latents(6, 4, 6)
    images, noise = g(w.movedim(1, 0)), torch.randn(4, 3, 4, 5).double()
    lengths = PathLengthPenalty().lengths(images, w, latent_batch_dim=1, noise=noise)
    assert lengths.shape == (4,)
    swapped = w.detach().movedim(1, 0).contiguous().requires_grad_()
    assert_close(lengths, PathLengthPenalty().lengths(g(swapped), swapped, noise=noise).detach())


def test_linear_generator_has_the_expected_length():
    torch.manual_seed(0)
    a = torch.randn(60, 6).double()
    w = latents(20_000, 6)
    lengths = PathLengthPenalty().lengths((w @ a.T).view(-1, 3, 4, 5), w)
    assert lengths.square().mean().item() == pytest.approx(a.square().sum().item() / 20, rel=0.02)


def test_why_the_noise_is_divided_by_the_root_of_the_image_size():
    """For one and the same change per pixel the length of J^T y grows with the number of pixels; divided, it does not."""
    torch.manual_seed(0)
    for divided, ratio in ((True, 1.0), (False, 8.0)):
        means = []
        for size in (4, 32):
            a = torch.randn(3 * size * size, 16).double()
            w = latents(512, 16)
            penalty = PathLengthPenalty(divide_by_size=divided)
            means.append(penalty.lengths((w @ a.T).view(-1, 3, size, size), w).mean().item())
        assert means[1] / means[0] == pytest.approx(ratio, rel=0.1)


def test_dividing_is_a_mere_change_of_weight():
    g = Generator().double()
    divided, plain = PathLengthPenalty(weight=2.0, eps=1e-30), PathLengthPenalty(weight=2.0 / 20, divide_by_size=False, eps=1e-30)
    for _ in range(3):
        w, noise = latents(4, 6), torch.randn(4, 3, 4, 5).double()
        a, b = divided(g(w), w, noise=noise), plain(g(w), w, noise=noise)
        # The running mean is a float32 buffer and is not scaled exactly.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)
        for p, q in zip(
            torch.autograd.grad(a, g.parameters(), allow_unused=True),
            torch.autograd.grad(b, g.parameters(), allow_unused=True),
            strict=True,
        ):
            assert (p is None) == (q is None)
            if p is not None:
                torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("detach_mean", [False, True])
def test_running_mean_and_its_gradient(detach_mean):
    g = Generator().double()
    penalty = PathLengthPenalty(weight=3.0, momentum=0.2, detach_mean=detach_mean).double()
    a = torch.zeros((), dtype=torch.float64)
    for step in range(1, 4):
        w, noise = latents(4, 6), torch.randn(4, 3, 4, 5).double()
        lengths = penalty.lengths(g(w), w, noise=noise)
        now = 0.8 * a + 0.2 * lengths.mean()
        expected = 3.0 * (lengths - (now.detach() if detach_mean else now)).square().mean()
        got = penalty(g(w), w, noise=noise)
        assert_close(got, expected.detach())
        assert_close(torch.autograd.grad(got, g.first.weight)[0], torch.autograd.grad(expected, g.first.weight)[0], label="gradient")
        a = now.detach()
        assert_close(penalty.mean_path_length, a)
        assert not penalty.mean_path_length.requires_grad
        assert penalty.num_updates.item() == step
    other = PathLengthPenalty().double()
    other.load_state_dict(penalty.state_dict())
    assert torch.equal(other.mean_path_length, penalty.mean_path_length)
    assert copy.deepcopy(penalty).num_updates.item() == 3


def test_an_orthogonal_jacobian_has_nearly_no_penalty_and_training_lowers_it():
    torch.manual_seed(0)
    orthogonal, skewed = torch.linalg.qr(torch.randn(300, 200).double())[0], torch.zeros(300, 200).double()
    skewed[:, 0] = torch.randn(300).double()
    skewed *= orthogonal.norm() / skewed.norm()
    values = []
    for a in (orthogonal, skewed):
        penalty = PathLengthPenalty(momentum=1.0)
        w = latents(400, 200)
        values.append(penalty((w @ a.T).view(-1, 3, 10, 10), w).item() / penalty.mean_path_length.item() ** 2)
    assert values[0] < 0.01
    assert values[1] > 0.5
    g = Generator()
    optimizer, penalty = torch.optim.Adam(g.parameters(), lr=1e-2), PathLengthPenalty(momentum=0.1)
    history = []
    for _ in range(150):
        w = torch.randn(64, 6, requires_grad=True)
        loss = penalty(g(w), w)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert sum(history[-20:]) < 0.5 * sum(history[20:40])


def test_a_constant_generator_and_half_images_stay_finite():
    w = torch.randn(4, 6, requires_grad=True)
    scale = torch.zeros((), requires_grad=True)
    images = (scale * w.sum(1)).view(4, 1, 1, 1).expand(4, 3, 4, 5)
    PathLengthPenalty()(images, w).backward()
    assert scale.grad.isfinite()
    half = torch.randn(4, 6).half().requires_grad_()
    value = PathLengthPenalty()(Generator().half()(half), half)
    assert value.dtype == torch.float32
    assert value.isfinite()


def _length_on_rank(rank: int, sizes: list[int]) -> tuple[float, float]:
    torch.manual_seed(0)
    g = Generator().double()
    w = torch.randn(sum(sizes), 6, dtype=torch.float64).split(sizes)[rank].requires_grad_()
    noise = torch.randn(sum(sizes), 3, 4, 5, dtype=torch.float64).split(sizes)[rank]
    penalty = PathLengthPenalty(momentum=0.5, process_group="world").double()
    (gradient,) = torch.autograd.grad(penalty(g(w), w, noise=noise), g.first.weight)
    lengths = penalty.lengths(g(w), w, noise=noise)
    mean = penalty.mean_path_length + 0.5 * (lengths.sum() - lengths.sum().detach()) / sum(sizes)
    (expected,) = torch.autograd.grad(2.0 * (lengths - mean).square().mean(), g.first.weight)
    assert_close(gradient, expected, label="gradient")
    return penalty.mean_path_length.item(), lengths.sum().item()


def test_the_running_mean_is_shared_by_uneven_ranks():
    results = run_ranks(2, _length_on_rank, [5, 2])
    expected = 0.5 * (results[0][1] + results[1][1]) / 7
    for mean, _ in results:
        assert mean == pytest.approx(expected, rel=1e-12)


def test_r1_of_known_discriminators():
    x = latents(5, 3, 2, 2)
    a = torch.randn(3, 2, 2).double()
    assert_close(r1_penalty((x * a).sum((1, 2, 3)), x, gamma=7.0), 3.5 * a.square().sum())
    assert_close(r1_penalty(x.square().sum((1, 2, 3)), x), (5 * (2 * x).square().sum() / 5).detach())
    assert_close(r1_penalty((0 * x).sum((1, 2, 3)), x), torch.zeros(()).double())


def test_r1_can_be_trained_through():
    d, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 1)).double(), latents(3, 3, 2, 2)
    r1_penalty(d(x), x).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in d.named_parameters() if n != "3.bias")
    assert torch.autograd.gradcheck(lambda x: r1_penalty(d(x), x), (x,))
    half = torch.randn(3, 3, 2, 2).half().requires_grad_()
    assert r1_penalty(d.half()(half), half).dtype == torch.float32


def test_r1_mixes_samples_where_layers_couple_them():
    """The gradient of the summed logits is each sample's own only if no layer lets samples see each other."""
    torch.manual_seed(0)
    apart = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    coupled = nn.Sequential(MinibatchStdDev(), nn.Flatten(), nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = latents(4, 3, 2, 2)
    for d, equal in ((apart, True), (coupled, False)):
        (summed,) = torch.autograd.grad(d(x).sum(), x)
        own = torch.stack([torch.autograd.grad(d(x)[n, 0], x)[0][n] for n in range(4)])
        assert torch.allclose(summed, own) == equal


def test_r1_errors():
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match=r"real_images must require a gradient; call real_images.requires_grad_"):
        r1_penalty(x.sum(1), x)
    y = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"logits must depend on real_images"):
        r1_penalty(x.sum(1), y)
    with pytest.raises(ValueError, match=r"logits must depend on real_images"):
        r1_penalty(x.clone().requires_grad_().sum(1), y)


def test_lazy_regularization_keeps_the_average_and_the_rates():
    calls = []

    def penalty(value):
        calls.append(value)
        return torch.tensor(value)

    lazy = LazyRegularizer(penalty, interval=4)
    total = sum(term for step in range(16) if (term := lazy(step, 0.5)) is not None)
    assert total == 16 * 0.5
    assert len(calls) == 4
    assert [lazy.due(step) for step in range(5)] == [True, False, False, False, True]
    lr, (b1, b2) = lazy_adam_hparams(0.002, (0.5, 0.99), 16)
    assert lr * 17 == pytest.approx(0.002 * 16)
    assert b1**17 == pytest.approx(0.5**16)
    assert b2**17 == pytest.approx(0.99**16)
    with pytest.raises(ValueError, match=r"LazyRegularizer: interval must be at least 1, got 0"):
        LazyRegularizer(penalty, 0)
    with pytest.raises(ValueError, match=r"lazy_adam_hparams: interval must be at least 1, got 0"):
        lazy_adam_hparams(0.1, (0.9, 0.99), 0)


def test_path_length_errors():
    g, w = Generator(), torch.randn(4, 6, requires_grad=True)
    penalty = PathLengthPenalty()
    for images, latent, dim, message in (
        (g(w), w[:2], 0, r"latents must have shape \(N, D\) or .* got latents \(2, 6\), images \(4, 3, 4, 5\)"),
        (g(w), w, 1, r"latent_batch_dim=1"),
        (g(w), w, 2, r"latent_batch_dim=2"),
        (g(w), w.detach(), 0, r"latents must require a gradient"),
        (g(w).detach(), w, 0, r"images must be computed from them"),
        (g(w), torch.randn(4, 6, requires_grad=True), 0, r"images must depend on latents"),
    ):
        with pytest.raises(ValueError, match=message):
            penalty(images, latent, dim)
    with pytest.raises(ValueError, match=r"momentum is the weight of the new value and must lie in \(0, 1\], got 0"):
        PathLengthPenalty(momentum=0)
    with pytest.raises(ValueError, match=r"weight and eps must be positive, got -1 and 1e-12"):
        PathLengthPenalty(weight=-1)
    assert "divide_by_size=True" in repr(penalty)
    assert penalty.num_updates.item() == 0


def test_the_catalogue_says_that_a_penalty_is_called():
    with pytest.raises(ValueError, match=r"r1_penalty is a function and no layer; call it: equinorm\.r1_penalty\(logits"):
        create("r1_penalty", 8)
