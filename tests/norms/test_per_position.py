"""Norms over the channels at each position: pixel norm, positional norm and its shortcuts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

import equinorm
from tests.helpers import assert_close
from tests.references.local import positional


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pixel_norm_is_rms_norm_over_any_dimension(dim, memory_format):
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    y = equinorm.PixelNorm(dim)(x)
    want = F.rms_norm(x.movedim(dim, -1), (x.shape[dim],), eps=1e-8).movedim(-1, dim)
    assert_close(y, want)
    dy = torch.randn_like(x)
    assert_close(*(torch.autograd.grad(out, x, dy)[0] for out in (y, want)), label="gradient")


def test_pixel_norm_puts_latent_vectors_on_the_sphere():
    z = torch.randn(16, 512, dtype=torch.float64)
    assert_close(equinorm.PixelNorm(eps=0.0)(z).norm(dim=1), torch.full((16,), 512**0.5, dtype=torch.float64))


def test_pixel_norm_of_nothing_is_nothing():
    x = torch.zeros(2, 4, 3, requires_grad=True)
    y = equinorm.PixelNorm()(x)
    assert torch.equal(y, torch.zeros_like(y))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert_close(dx, torch.full_like(dx, 1e4).double())


def test_pixel_norm_needs_its_dimension():
    with pytest.raises(ValueError, match=r"PixelNorm: the input must have shape .* a dimension 2, got \(3, 4\)"):
        equinorm.PixelNorm(2)(torch.randn(3, 4))


def test_positional_norm_is_layer_norm_over_the_channels():
    x = torch.randn(2, 7, 4, 3, dtype=torch.float64) * 3 + 5
    y, mean, std = equinorm.PositionalNorm()(x)
    assert_close(y, F.layer_norm(x.movedim(1, -1), (7,)).movedim(-1, 1))
    assert_close(mean, x.mean(1, keepdim=True))
    assert_close(std, (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt())


def test_the_numbers_of_the_specification():
    y, mean, std = equinorm.PositionalNorm(eps=0.0)(torch.tensor([[1.0, 2.0, 3.0, 6.0]], dtype=torch.float64))
    assert y[0].tolist() == pytest.approx([-1.069045, -0.534522, 0.0, 1.603568], abs=1e-6)
    assert (mean.item(), std.item()) == (3.0, pytest.approx(1.870829, abs=1e-6))


@pytest.mark.parametrize("unbiased", [False, True])
def test_the_moments_and_their_gradients_equal_the_reference(unbiased):
    x = torch.randn(2, 6, 3, 2, dtype=torch.float64, requires_grad=True)
    results = equinorm.PositionalNorm(unbiased=unbiased)(x)
    wanted, _ = positional(x, {}, unbiased=unbiased, return_moments=True)
    for name, got, want in zip(("y", "mean", "std"), results, wanted, strict=True):
        assert_close(got, want, label=name)
        dy = torch.randn_like(want)
        grads = (torch.autograd.grad(out, x, dy, create_graph=True)[0] for out in (got, want))
        assert_close(*grads, label=f"gradient of {name}")


def test_unbiased_moments_are_those_of_published_weights():
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    ours, theirs = (equinorm.PositionalNorm(eps=0.0, unbiased=u)(x)[2] for u in (False, True))
    assert_close(theirs / ours, torch.full_like(ours, (6 / 5) ** 0.5))  # 1.095


def test_one_channel_comes_out_as_zero_unless_unbiased():
    x = torch.randn(2, 1, 3)
    y, mean, std = equinorm.PositionalNorm()(x)
    assert not y.any()
    assert_close(mean, x.double())
    assert_close(std, torch.full_like(x, 1e-5**0.5).double())
    with pytest.raises(ValueError, match="unbiased variance over the channels needs at least two, got one"):
        equinorm.PositionalNorm(unbiased=True)(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_the_shortcut_undoes_the_norm(dtype, mean):
    x = torch.randn(2, 8, 5, 5, dtype=dtype) + mean
    assert_close(equinorm.MomentShortcut()(*equinorm.PositionalNorm()(x)), x.double(), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_keep_their_type_throughout(dtype):
    x = (torch.randn(2, 8, 5, 5) * 3 + 300).to(dtype)
    y, mean, std = equinorm.PositionalNorm()(x)
    assert {y.dtype, mean.dtype, std.dtype, equinorm.MomentShortcut()(y, mean, std).dtype} == {dtype}
    exact = equinorm.PositionalNorm()(x.double())
    for got, want in zip((y, mean, std), exact, strict=True):
        assert_close(got, want)
    dynamic = equinorm.DynamicMomentShortcut()
    assert dynamic(y, mean, std).dtype == dtype
    assert dynamic.to(dtype)(y, mean, std).dtype == dtype


def test_the_shortcut_leaves_its_input_alone_and_can_stop_gradients():
    x, z = torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 5, 3)
    before = z.clone()
    _, mean, std = equinorm.PositionalNorm()(x)
    y = equinorm.MomentShortcut()(z, mean, std)
    assert torch.equal(z, before)
    assert torch.autograd.grad(y.sum(), x)[0].any()
    assert not equinorm.MomentShortcut(detach=True)(z, mean, std).requires_grad
    assert equinorm.DynamicMomentShortcut(spatial_dims=1)(z, *equinorm.PositionalNorm()(x)[1:]).requires_grad
    still = equinorm.DynamicMomentShortcut(spatial_dims=1, detach=True)
    out = still(z, *equinorm.PositionalNorm()(x)[1:])
    assert torch.autograd.grad(out.sum(), x, allow_unused=True) == (None,)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_the_dynamic_shortcut_starts_as_the_static_one_and_learns(channels, spatial):
    torch.set_default_dtype(torch.float64)
    x, z = torch.randn(2, 6, *(4, 3, 2)[:spatial]), torch.randn(2, 4, *(4, 3, 2)[:spatial])
    _, mean, std = equinorm.PositionalNorm()(x)
    dynamic = equinorm.DynamicMomentShortcut(channels, hidden_channels=3, spatial_dims=spatial)
    assert_close(dynamic(z, mean, std), equinorm.MomentShortcut()(z, mean, std))
    for parameter in dynamic.parameters():
        torch.nn.init.normal_(parameter)
    conv = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    hidden = conv(torch.cat((mean, std), 1), dynamic.hidden.weight, dynamic.hidden.bias, padding=1).clamp(min=0)
    change = conv(hidden, dynamic.change.weight, dynamic.change.bias, padding=1)
    want = z * (std + change[:, channels:]) + mean + change[:, :channels]
    assert_close(dynamic(z, mean, std), want)
    again = copy.deepcopy(dynamic)
    again.reset_parameters()
    assert_close(again(z, mean, std), equinorm.MomentShortcut()(z, mean, std))


def test_wrong_moments_and_settings_are_refused():
    x, mean, std = torch.randn(2, 4, 5, 5), torch.randn(2, 1, 3, 3), torch.rand(2, 1, 5, 5)
    with pytest.raises(ValueError, match=r"MomentShortcut: mean must have shape \(2, 1, 5, 5\) for the input .*, got \(2, 1, 3, 3\)"):
        equinorm.MomentShortcut()(x, mean, std)
    with pytest.raises(ValueError, match=r"DynamicMomentShortcut: std must have shape"):
        equinorm.DynamicMomentShortcut()(x, std, std.expand(2, 4, 5, 5))
    with pytest.raises(ValueError, match=r"2 spatial dimensions and 3 channels, got \(2, 4, 5, 5\)"):
        equinorm.DynamicMomentShortcut(channels=3)(x, std, std)
    with pytest.raises(ValueError, match="kernel_size must be odd, got 4"):
        equinorm.DynamicMomentShortcut(kernel_size=4)
    with pytest.raises(ValueError, match="spatial_dims must be 1, 2 or 3, got 4"):
        equinorm.DynamicMomentShortcut(spatial_dims=4)
    with pytest.raises(TypeError, match="MomentShortcut: the input must be floating point"):
        equinorm.MomentShortcut()(x.long(), std, std)
