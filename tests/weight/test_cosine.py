from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import equinorm
from equinorm import CosineConv1d, CosineConv2d, CosineConv3d, CosineLinear
from tests.helpers import assert_close, assert_grads_close
from tests.references import weight as reference

both = pytest.mark.parametrize("centered", [False, True])


@both
def test_linear_equals_the_reference(centered):
    layer = CosineLinear(5, 3, centered, eps=0.01).double()
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([reference.cosine(row, w, centered, 0.01) for row in x.flatten(0, 1) for w in layer.weight]).view(2, 4, 3)
    assert_close(layer(x), expected)
    upstream = torch.randn_like(expected)
    names = {"x": x, "weight": layer.weight}
    got = torch.autograd.grad(layer(x), names.values(), upstream)
    want = torch.autograd.grad(expected, names.values(), upstream)
    assert_grads_close(dict(zip(names, got, strict=True)), dict(zip(names, want, strict=True)))


@both
@pytest.mark.parametrize(
    ("options", "pad"),
    [
        ({}, {}),
        ({"stride": 2, "padding": 1}, {"pad": (1, 1, 1, 1)}),
        ({"groups": 2, "dilation": 2, "padding": 2, "padding_mode": "circular"}, {"pad": (2, 2, 2, 2), "mode": "circular"}),
        ({"padding": "same", "padding_mode": "reflect"}, {"pad": (1, 1, 1, 1), "mode": "reflect"}),
    ],
)
def test_convolution_equals_the_reference(options, pad, centered):
    layer = CosineConv2d(4, 6, 3, centered=centered, eps=0.01, **options).double()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    padded = F.pad(x, **pad) if pad else x
    expected = reference.cosine_conv2d(padded, layer.weight, layer.stride[0], layer.dilation[0], layer.groups, centered, 0.01)
    assert_close(layer(x), expected)
    upstream = torch.randn_like(expected)
    names = {"x": x, "weight": layer.weight}
    got = torch.autograd.grad(layer(x), names.values(), upstream)
    want = torch.autograd.grad(expected, names.values(), upstream)
    assert_grads_close(dict(zip(names, got, strict=True)), dict(zip(names, want, strict=True)))


LAYERS = {
    "linear": (lambda **o: CosineLinear(6, 4, **o), (3, 6)),
    "conv1d": (lambda **o: CosineConv1d(4, 6, 3, groups=2, **o), (2, 4, 7)),
    "conv2d": (lambda **o: CosineConv2d(3, 4, (2, 3), padding=(1, 2), **o), (2, 3, 4, 3)),
    "conv3d": (lambda **o: CosineConv3d(2, 3, 2, stride=2, **o), (2, 2, 4, 4, 4)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


@both
@every_layer
def test_derivatives_of_both_orders(name, centered):
    make, shape = LAYERS[name]
    layer = make(centered=centered, scale=3.0, learnable_scale=True).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    parameters = {key: p.detach().requires_grad_() for key, p in layer.named_parameters()}

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters.values()))
    assert torch.autograd.gradgradcheck(run, (x, *parameters.values()))


@both
@every_layer
def test_outputs_are_bounded_and_invariant(name, centered):
    make, shape = LAYERS[name]
    layer = make(centered=centered, eps=1e-30).double()
    x = torch.randn(shape).double()
    y = layer(x)
    assert y.abs().max() <= 1 + 1e-12
    assert_close(layer(7 * x), y.detach())
    with torch.no_grad():
        factors = torch.rand(len(layer.weight)).double() + 0.1
        layer.weight.mul_(factors.view(-1, *[1] * (layer.weight.ndim - 1)))
    assert_close(layer(x), y.detach())
    if centered and name != "conv2d":  # padding is not shifted along
        assert_close(layer(x + 3), y.detach())


def test_convolution_without_extent_is_the_linear_layer():
    conv, linear = CosineConv2d(5, 3, 1, centered=True), CosineLinear(5, 3, centered=True)
    linear.weight.data.copy_(conv.weight.data.flatten(1))
    x = torch.randn(2, 5, 4, 4)
    assert_close(conv(x).movedim(1, -1), linear(x.movedim(1, -1)))


def test_the_numbers_of_the_specification():
    plain, centred = CosineLinear(2, 1).double(), CosineLinear(3, 1, centered=True).double()
    plain.weight.data = torch.tensor([[4.0, 3.0]]).double()
    centred.weight.data = torch.tensor([[1.0, 3.0, 2.0]]).double()
    assert plain(torch.tensor([3.0, 4.0]).double()).item() == pytest.approx(0.96, abs=1e-8)
    assert centred(torch.tensor([1.0, 2.0, 3.0]).double()).item() == pytest.approx(0.5, abs=1e-8)


def test_correlation_is_layer_norm_times_a_centred_unit_weight():
    layer = CosineLinear(6, 4, centered=True, eps=1e-30).double()
    x = torch.randn(3, 6).double()
    w = layer.weight - layer.weight.mean(1, keepdim=True)
    normed = F.layer_norm(x, (6,), eps=0.0)
    assert_close(layer(x), normed @ (w / w.norm(dim=1, keepdim=True)).T / 6**0.5)


def test_a_large_mean_costs_no_digits_of_a_correlation():
    torch.manual_seed(0)
    layer = CosineConv2d(3, 4, 3, padding=1, centered=True)
    x = torch.randn(2, 3, 8, 8)
    shifted = (x + 1000) - 1000  # what float32 leaves of x
    exact = copy.deepcopy(layer).double()
    inside = (..., slice(1, -1), slice(1, -1))
    assert_close(layer(x + 1000)[inside], exact(shifted.double())[inside])


def test_patches_far_from_the_images_mean_lose_only_what_the_dot_product_loses():
    """Offsets of 500 standard deviations: float32 dot products are off by about 500 eps; summed squares would be off by 500^2 eps."""
    layer = CosineConv2d(3, 4, 3, centered=True)
    x = torch.randn(2, 3, 8, 8)
    x[..., 4:] += 1000
    y, exact = layer(x), copy.deepcopy(layer).double()(x.double())
    assert (y - exact)[..., [0, 1, 4, 5]].abs().max() < 5e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_patches_far_from_the_images_mean_have_no_correlation(dtype):
    layer = CosineConv2d(3, 16, 3, centered=True, dtype=dtype)
    x = torch.zeros(32, 3, 8, 8, dtype=dtype)
    x[..., 4:] = 1e6 * torch.rand(32, 1, 1, 1, dtype=dtype)
    y = layer(x)[..., [0, 1, 4, 5]]
    assert y.isfinite().all()
    assert y.abs().max() < 0.1


@both
@every_layer
def test_zeros_give_zeros_and_finite_gradients(name, centered):
    make, shape = LAYERS[name]
    layer = make(centered=centered)
    x = torch.zeros(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.abs().max() == 0
    assert x.grad.isfinite().all()
    nn.init.zeros_(layer.weight)
    layer.zero_grad()
    layer(torch.ones(shape)).sum().backward()
    assert layer.weight.grad.isfinite().all()


@both
@every_layer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_is_computed_in_float32(name, dtype, centered):
    make, shape = LAYERS[name]
    layer = make(centered=centered).to(dtype)
    x = (300 * torch.randn(shape)).to(dtype)  # squares overflow float16
    y = layer(x)
    assert y.dtype == dtype
    assert_close(y, copy.deepcopy(layer).double()(x.double()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), y)


@both
@every_layer
def test_compile_copy_and_unbatched_input(name, centered):
    make, shape = LAYERS[name]
    layer = make(centered=centered, scale=2.0)
    x = torch.randn(shape)
    assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x).detach())
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert_close(layer(x[0]), layer(x)[0].detach())
    other = make(centered=centered, scale=2.0)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert "centered=" in repr(layer)


def test_scale_is_a_factor_and_may_be_learned():
    fixed, learned = CosineLinear(4, 3, scale=16.0), CosineLinear(4, 3, scale=16.0, learnable_scale=True)
    learned.load_state_dict({**fixed.state_dict(), "scale": torch.tensor(8.0)})
    x = torch.randn(2, 4)
    assert_close(fixed(x), 2 * learned(x).detach())
    assert list(dict(fixed.named_parameters())) == ["weight"]
    learned(x).sum().backward()
    assert learned.scale.grad is not None


def test_errors():
    with pytest.raises(ValueError, match=r"CosineLinear: eps must be positive, got 0\.0"):
        CosineLinear(3, 2, eps=0.0)
    with pytest.raises(ValueError, match=r"CosineConv2d: centered needs at least 2 inputs per output unit, got 1"):
        CosineConv2d(4, 4, 1, groups=4, centered=True)
    with pytest.raises(ValueError, match=r"learnable_scale needs a value to start from; pass scale"):
        CosineLinear(3, 2, learnable_scale=True)
    with pytest.raises(ValueError, match=r"CosineLinear: the input must have shape \(\*, 3\), got \(2, 4\)"):
        CosineLinear(3, 2)(torch.randn(2, 4))
    with pytest.raises(
        ValueError, match=r"CosineConv1d: the input must have shape \(N, 3, \*S\) or \(3, \*S\) with 1 spatial .* got \(2, 4, 5\)"
    ):
        CosineConv1d(3, 2, 3)(torch.randn(2, 4, 5))


def test_facts():
    assert equinorm.CosineLinear.facts is CosineConv3d.facts
