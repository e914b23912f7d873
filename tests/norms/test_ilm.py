"""Instance-level meta norm: predicted affine maps on top of three norms."""

from __future__ import annotations

import pytest
import torch

import equinorm
from tests.helpers import assert_close

NORMS = {
    "group": lambda: equinorm.GroupNorm(3, 6, affine=False),
    "instance": lambda: equinorm.InstanceNorm(6),
    "layer": lambda: equinorm.GroupNorm(1, 6, affine=False),
}


def data(*shape):
    return torch.randn(*shape, dtype=torch.float64) * 2 + 1


@pytest.mark.parametrize("norm", NORMS)
def test_silent_decoders_leave_one_and_a_half_times_the_norm(norm):
    ilm, x = equinorm.ILMNorm(6, norm, num_groups=3, key_group_size=2).double(), data(3, 6, 5, 4)
    for decoder in (ilm.to_weight, ilm.to_bias):
        torch.nn.init.zeros_(decoder)
    assert_close(ilm(x), 1.5 * NORMS[norm]().double()(x))


@pytest.mark.parametrize("norm", NORMS)
def test_samples_do_not_see_each_other(norm):
    ilm, x = equinorm.ILMNorm(6, norm, num_groups=3, key_group_size=2).double(), data(5, 6, 5, 4)
    order = torch.tensor([3, 1, 4])
    assert_close(ilm(x[order]), ilm(x)[order])


def test_a_key_group_is_consecutive_channels():
    ilm = equinorm.ILMNorm(6, "instance", key_group_size=3).double()
    with torch.no_grad():
        ilm.encoder.copy_(torch.eye(2))
        ilm.to_weight.copy_(torch.eye(2))
        ilm.to_bias.copy_(torch.eye(2))
    x = data(1, 6, 5, 4)
    y, z = ilm(x), equinorm.InstanceNorm(6)(x)
    for first in (0, 3):
        part = x[0, first : first + 3]
        omega = 1 + torch.sigmoid(part.var(correction=0))
        beta = torch.tanh(part.mean().relu())
        assert_close(y[0, first : first + 3], omega * z[0, first : first + 3] + beta)


@pytest.mark.parametrize(("channels", "code"), [(64, 2), (256, 1), (512, 2), (1024, 4)])
def test_the_code_is_a_sixteenth_of_the_key_groups(channels, code):
    assert equinorm.ILMNorm(channels).encoder.shape == (code, channels // 16)


def test_large_half_precision_activations_do_not_overflow():
    ilm, x = equinorm.ILMNorm(32).half(), (torch.randn(2, 32, 8, 8) * 1000).half()
    y = ilm(x)
    assert y.isfinite().all()
    assert_close(y, ilm.double()(x.double()), dtype=torch.float16)


def test_statistics_over_one_value_are_refused():
    for shape in ((3, 6), (3, 6, 1, 1)):
        with pytest.raises(ValueError, match=r"ILMNorm: each statistic needs more than one value.*norm='instance'"):
            equinorm.ILMNorm(6, "instance", key_group_size=2)(torch.randn(shape))
    assert equinorm.ILMNorm(6, "layer", key_group_size=2)(torch.randn(3, 6)).isfinite().all()


def test_the_catalogue_finds_divisors():
    norm = equinorm.create("ilm", 24)
    assert (norm.groups, norm.key_groups) == (24, 2)
