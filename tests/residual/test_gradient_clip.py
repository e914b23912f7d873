from __future__ import annotations

import pytest
import torch
from torch import nn

from equinorm import AdaptiveGradientClip, adaptive_clip_grad_
from tests.helpers import assert_close
from tests.references import residual as reference
from tests.references import weight as weight_reference


def with_gradients(module: nn.Module, scale: float = 1.0) -> nn.Module:
    for p in module.parameters():
        p.grad = scale * torch.randn_like(p)
    return module


@pytest.mark.parametrize("order", [2.0, 1.0, 3.0])
@pytest.mark.parametrize(
    ("make", "transposed", "groups"),
    [
        (lambda: nn.Linear(5, 3), False, 1),
        (lambda: nn.Conv2d(4, 6, 3, groups=2), False, 2),
        (lambda: nn.ConvTranspose2d(4, 6, 3), True, 1),
        (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), True, 2),
        (lambda: nn.Embedding(7, 4), False, 1),
    ],
)
@pytest.mark.parametrize("scale", [1e-3, 0.02, 10.0])
def test_equals_the_reference(make, transposed, groups, order, scale):
    module = with_gradients(make().double(), scale)
    weight, before = module.weight.detach().clone(), module.weight.grad.clone()
    expected = before.clone()
    for unit in weight_reference.units_of(weight.shape, transposed, groups):
        where = tuple(torch.tensor(column) for column in zip(*unit, strict=True))
        expected[where] = reference.adaptive_clip(weight[where], before[where], 0.05, 1e-3, order)
    bias = None
    if getattr(module, "bias", None) is not None:
        bias = reference.adaptive_clip(module.bias.detach(), module.bias.grad.clone(), 0.05, 1e-3, order)
    AdaptiveGradientClip(module, clip_factor=0.05, norm_type=order).clip()
    assert_close(module.weight.grad, expected)
    if bias is not None:
        assert_close(module.bias.grad, bias)
    assert torch.equal(module.weight, weight)


def test_the_numbers_of_the_specification():
    w = nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    w.grad = torch.tensor([[1.0, 0.0], [0.01, 0.0]])
    adaptive_clip_grad_([w])
    assert_close(w.grad, torch.tensor([[0.05, 0.0], [1e-5, 0.0]]))


@pytest.mark.parametrize("shape", [(4,), (4, 1, 1, 1)])
def test_a_gain_is_one_vector_whatever_its_shape(shape):
    gain = nn.Parameter(torch.ones(shape))
    gain.grad = torch.tensor([0.02, 0, 0, 0]).view(shape)
    adaptive_clip_grad_(gain)
    assert_close(gain.grad.flatten(), torch.tensor([0.02, 0, 0, 0]))
    gain.grad.mul_(100)
    adaptive_clip_grad_(gain)
    assert_close(gain.grad.flatten(), torch.tensor([0.02, 0, 0, 0]))


def test_idempotent_and_silent_below_the_ratio():
    module = with_gradients(nn.Linear(5, 3).double(), 10.0)
    adaptive_clip_grad_(module.parameters())
    once = module.weight.grad.clone()
    adaptive_clip_grad_(module.parameters())
    assert_close(module.weight.grad, once)
    small = with_gradients(nn.Linear(5, 3), 1e-6)
    before = small.weight.grad.clone()
    adaptive_clip_grad_(small.parameters())
    assert torch.equal(small.weight.grad, before)


def test_missing_zero_half_and_not_finite_gradients():
    p, q, r, s = (nn.Parameter(torch.ones(2, 2)) for _ in range(4))
    q.grad, r.grad = torch.zeros(2, 2), torch.tensor([[float("nan"), 1.0], [300.0, 300.0]])
    s.data = s.data.half()
    s.grad = torch.full((2, 2), 300.0).half()
    adaptive_clip_grad_([p, q, r, s])
    assert p.grad is None
    assert not q.grad.any()
    assert r.grad[0].isnan().any()
    assert_close(r.grad[1], torch.tensor([0.01, 0.01]))
    torch.testing.assert_close(s.grad, torch.full((2, 2), 0.01).half())


def test_the_hook_clips_before_the_step_and_can_be_removed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    clip = AdaptiveGradientClip(model, optimizer, exclude=[model[1]])
    with_gradients(model, 100.0)
    first, last, unclipped = model[0].weight.detach().clone(), model[1].weight.detach().clone(), model[1].weight.grad.clone()
    optimizer.step()
    steps = (model[0].weight - first).norm(dim=1)
    assert_close(steps, 0.01 * first.norm(dim=1))
    assert_close(model[1].weight, last - unclipped)
    clip.remove()
    with_gradients(model, 100.0)
    first = model[0].weight.detach().clone()
    optimizer.step()
    assert (model[0].weight - first).norm() > 10
    AdaptiveGradientClip(model).remove()


def test_errors():
    with pytest.raises(ValueError, match=r"adaptive_clip_grad_: clip_factor and eps must be positive, got 0 and 0.001"):
        adaptive_clip_grad_([], clip_factor=0)
    with pytest.raises(ValueError, match=r"AdaptiveGradientClip: clip_factor and eps must be positive"):
        AdaptiveGradientClip(nn.Linear(2, 2), eps=0.0)
    with pytest.raises(ValueError, match=r"excluded modules must be part of the model, Linear is not"):
        AdaptiveGradientClip(nn.Linear(2, 2), exclude=[nn.Linear(2, 2)])
