"""Mode normalization and its group form: limits, the numbers of a small example, estimates, failures."""

from __future__ import annotations

import pytest
import torch

import equinorm
from tests.helpers import assert_close


def gated(norm, rows):
    """Fix the gates of one-channel samples: sample n gets the n-th row, by logits that read nothing but which sample it is."""
    with torch.no_grad():
        norm.gate_weight.zero_()
        norm.gate_bias.copy_(torch.tensor(rows, dtype=torch.float64).log())
    return norm


@pytest.mark.parametrize("affine", [True, False])
def test_one_mode_is_batch_norm(affine):
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    mode, batch = equinorm.ModeNorm(3, num_modes=1, affine=affine).double(), equinorm.BatchNorm(3, affine=affine).double()
    assert_close(mode(x), batch(x))


@pytest.mark.parametrize("modes", [2, 5])
def test_equal_gates_are_batch_norm(modes):
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    mode = gated(equinorm.ModeNorm(3, num_modes=modes).double(), [1 / modes] * modes)
    assert_close(mode(x), equinorm.BatchNorm(3).double()(x))


def test_certain_gates_are_batch_norm_on_each_part():
    x = torch.randn(6, 2, 4, dtype=torch.float64)
    x[:3, 0] += 1000
    norm = equinorm.ModeNorm(2).double()
    with torch.no_grad():  # the first channel's mean decides, with a margin of hundreds
        norm.gate_weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        norm.gate_bias.copy_(torch.tensor([-500.0, 500.0]))
    y = norm(x)
    for part in (slice(0, 3), slice(3, 6)):
        assert_close(y[part], equinorm.BatchNorm(2).double()(x[part]))
    assert_close(norm.running_share, torch.tensor([0.5, 0.5]).double())


def test_the_numbers_of_a_small_example():
    x = torch.tensor([0.0, 2.0, 10.0, 14.0]).double()
    # Logits that are linear in x cannot give these gates: a second channel carries them.
    carrier = torch.tensor([0.9, 0.9, 0.2, 0.2], dtype=torch.float64)
    norm = equinorm.ModeNorm(2, eps=0.0).double()
    with torch.no_grad():
        norm.gate_weight.copy_(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
        norm.gate_bias.zero_()
    y = norm(torch.stack((x, (carrier / (1 - carrier)).log()), 1))[:, 0]
    expected = torch.tensor([-0.883444, -0.425690, 0.159219, 1.149915]).double()
    assert (y - expected).abs().max() < 5e-7


def test_one_sample_is_instance_norm():
    x = torch.randn(1, 3, 7, dtype=torch.float64)
    assert_close(equinorm.ModeNorm(3, num_modes=4).double()(x), equinorm.InstanceNorm(3).double()(x))


def test_estimates_hold_the_drift_of_the_mean():
    norm = equinorm.ModeNorm(1, num_modes=1, momentum=None).double()
    batch = equinorm.BatchNorm(1, momentum=None).double()
    around = torch.tensor([-1.0, 1.0]).double().reshape(2, 1)
    for step in range(20):
        norm(around + 2 * (step % 2))
        batch(around + 2 * (step % 2))
    assert norm.running_var.item() == pytest.approx(2.0, rel=1e-12)  # variance 1 within, variance 1 of the means 0 and 2
    assert batch.running_var.item() == pytest.approx(2.0, rel=1e-12)  # n / (n - 1) of 1, and no drift


def test_estimates_do_not_cancel_far_from_zero():
    norm = gated(equinorm.ModeNorm(1, momentum=None), [0.7, 0.3])
    for _ in range(60):
        norm(1e4 + torch.randn(64, 1, 8))
    assert 0.8 < norm.running_var.min() <= norm.running_var.max() < 1.3


def test_a_rare_mode_moves_by_its_share_where_asked():
    x = torch.randn(64, 1, 4, dtype=torch.float64) + 3
    steps = {}
    for weighted in (False, True):
        norm = gated(equinorm.ModeNorm(1, momentum=0.1, count_weighted=weighted).double(), [0.99, 0.01])
        norm(x)
        steps[weighted] = norm.running_mean[:, 0] / x.mean()
    assert_close(steps[False], torch.full((2,), 0.1, dtype=torch.float64))
    share = torch.tensor([0.99, 0.01], dtype=torch.float64)
    assert_close(steps[True], 0.1 * share / (0.9 * 0.5 + 0.1 * share))


def test_second_moments_are_taken_over():
    norm = equinorm.ModeNorm(2, num_modes=1).double()
    norm.set_second_moments(torch.tensor([[1.0, -2.0]]), torch.tensor([[5.0, 4.0]]))
    assert norm.running_mean.tolist() == [[1.0, -2.0]]
    assert norm.running_var.tolist() == [[4.0, 0.0]]
    with pytest.raises(ValueError, match=r"ModeNorm: mean_square must have shape \(K, C\) = \(1, 2\), got \(2,\)"):
        norm.set_second_moments(torch.zeros(1, 2), torch.zeros(2))


def test_an_unused_mode_is_harmless():
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    norm = gated(equinorm.ModeNorm(2).double(), [1.0, 1.0])
    with torch.no_grad():
        norm.gate_bias.copy_(torch.tensor([0.0, -1000.0]))  # exp underflows: the second gate is exactly 0
    y = norm(x)
    assert_close(y, equinorm.BatchNorm(2).double()(x))
    assert norm.running_mean[1].tolist() == [0.0, 0.0]
    assert norm.running_var[1].tolist() == [1.0, 1.0]
    (y**3).sum().backward()
    assert all(t.grad.isfinite().all() for t in (x, *norm.parameters()))
    assert norm.eval()(x).isfinite().all()


def test_a_single_value_per_channel_is_refused():
    norm = equinorm.ModeNorm(3)
    with pytest.raises(ValueError, match="ModeNorm: training needs more than one value per channel"):
        norm(torch.randn(1, 3))
    assert norm.num_batches_tracked == 0


def test_one_mode_of_channels_is_layer_norm():
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    assert_close(equinorm.ModeGroupNorm(4, num_modes=1).double()(x), equinorm.GroupNorm(1, 4).double()(x))


def test_certain_gates_of_channels_are_group_norm():
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    x[:, 2:] += 1000
    norm = equinorm.ModeGroupNorm(4).double()
    with torch.no_grad():
        norm.gate_weight.copy_(torch.tensor([-1.0, 1.0]))
        norm.gate_bias.copy_(torch.tensor([500.0, -500.0]))
    assert_close(norm(x), equinorm.GroupNorm(2, 4).double()(x), dtype=torch.float32)
