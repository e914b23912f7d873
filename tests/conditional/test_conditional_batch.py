"""Conditional batch norm: it starts as the batch norm it extends, and conditions reach it."""

from __future__ import annotations

import pytest
import torch

import equinorm
from tests.helpers import assert_close


def data(n=4):
    return torch.randn(n, 6, 5, 4, dtype=torch.float64) * 2 + 1


def trained(**options):
    norm = equinorm.BatchNorm(6, eps=1e-3, momentum=0.3, **options).double()
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    for _ in range(3):
        norm(data() * 3)
    return norm


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}, {"track_running_stats": False}])
@pytest.mark.parametrize("kind", [{"cond_dim": 7}, {"num_classes": 3}])
def test_starts_as_the_norm_it_extends(kind, options):
    plain = trained(**options)
    norm = equinorm.ConditionalBatchNorm.from_batch_norm(plain, **kind)
    condition = torch.randn(4, 7).double() if "cond_dim" in kind else torch.tensor([0, 2, 1, 1])
    for training in (True, False):
        x = data()
        assert_close(norm.train(training)(x, condition), plain.train(training)(x))
    for name, buffer in plain.named_buffers():
        assert torch.equal(dict(norm.named_buffers())[name], buffer), name


def test_torch_norms_are_extended_too():
    plain = torch.nn.BatchNorm2d(6).eval()
    plain.running_var.fill_(4.0)
    norm = equinorm.ConditionalBatchNorm.from_batch_norm(plain, cond_dim=7)
    assert not norm.training
    x = data().float()
    assert_close(norm(x, torch.randn(4, 7)), plain(x).double(), dtype=torch.float32)
    assert plain.weight.requires_grad, "the original was changed"


def test_a_frozen_base_leaves_the_learning_to_the_perceptrons():
    norm = equinorm.ConditionalBatchNorm.from_batch_norm(trained(), cond_dim=7)
    assert {name for name, p in norm.named_parameters() if not p.requires_grad} == {"weight", "bias"}
    norm(data(), torch.randn(4, 7).double()).square().sum().backward()
    assert norm.weight.grad is None
    assert norm.delta_weight.out.weight.grad.any()
    assert not norm.delta_weight.hidden.weight.grad.any(), "behind a zero W2 the first layer waits for one step"
    free = equinorm.ConditionalBatchNorm.from_batch_norm(trained(), cond_dim=7, freeze_base=False)
    assert all(p.requires_grad for p in free.parameters())


def test_one_class_is_batch_norm():
    norm, plain, x = equinorm.ConditionalBatchNorm(6, num_classes=1).double(), equinorm.BatchNorm(6).double(), data()
    for training in (True, False):
        y = norm.train(training)(x, torch.zeros(4, dtype=torch.long))
        assert_close(y, plain.train(training)(x))


def test_init_std_and_dropout():
    norm = equinorm.ConditionalBatchNorm(300, cond_dim=200, hidden_dim=100, init_std=0.02, dropout=0.5)
    assert abs(norm.delta_bias.out.weight.std().item() - 0.02) < 0.001
    assert norm.delta_bias.out.bias is None
    x, e = torch.randn(4, 300, 3, 3), torch.randn(4, 200)
    assert not torch.equal(norm(x, e), norm(x, e)), "dropout changes from call to call"
    norm.eval()
    assert torch.equal(norm(x, e), norm(x, e))


def test_one_embedding_may_serve_the_batch():
    norm, x, e = equinorm.ConditionalBatchNorm(6, cond_dim=7, init_std=1.0).double(), data(), torch.randn(1, 7).double()
    assert_close(norm(x, e), norm(x, e.expand(4, 7)))


@pytest.mark.parametrize("kind", [{"cond_dim": 3, "init_std": 1.0}, {"num_classes": 3}])
@pytest.mark.parametrize("training", [True, False])
def test_derivatives_reach_the_condition(kind, training):
    norm = equinorm.ConditionalBatchNorm(6, track_running_stats=False, **kind).double().train(training)
    x, condition = data(2)[..., 0].requires_grad_(), torch.randn(2, 3).double().requires_grad_()
    torch.autograd.gradcheck(norm, (x, condition))
    torch.autograd.gradgradcheck(norm, (x, condition))


@pytest.mark.parametrize(
    ("kind", "condition", "error", "pattern"),
    [
        ({"cond_dim": 7}, torch.zeros(4, 6), ValueError, r"condition must have shape \(4, 7\).* got \(4, 6\)"),
        ({"cond_dim": 7}, torch.zeros(4, dtype=torch.long), TypeError, "condition must be floating point"),
        ({"num_classes": 3}, torch.tensor([0, 1, 2, 3]), ValueError, r"class numbers must be in \[0, 3\), got 3"),
    ],
)
def test_bad_conditions_are_refused_before_anything_moves(kind, condition, error, pattern):
    norm = equinorm.ConditionalBatchNorm(6, **kind)
    with pytest.raises(error, match=f"ConditionalBatchNorm: .*{pattern}"):
        norm(data().float(), condition)
    assert norm.num_batches_tracked == 0


def test_one_value_per_channel_is_refused_in_training():
    with pytest.raises(ValueError, match="ConditionalBatchNorm: training needs more than one value per channel"):
        equinorm.ConditionalBatchNorm(6, num_classes=2)(torch.randn(1, 6), torch.tensor([0]))
