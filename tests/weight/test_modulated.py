from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from equinorm import ModulatedConv2d, modulated_conv2d
from equinorm.weight.modulated import resampling_filter
from tests.helpers import assert_close, assert_grads_close
from tests.references import weight as reference

FILTER = resampling_filter((1, 3, 3, 1)).double()
both_forms = pytest.mark.parametrize("fused", [False, True])


def inputs(k: int = 3, n: int = 2) -> tuple[torch.Tensor, ...]:
    x, w, s = torch.randn(n, 3, 4, 5), torch.randn(2, 3, k, k), torch.randn(n, 3)
    return tuple(t.double().requires_grad_() for t in (x, w, s))


@both_forms
@pytest.mark.parametrize("demodulate", [False, True])
@pytest.mark.parametrize("k", [1, 3])
def test_equals_the_reference(k, demodulate, fused):
    x, w, s = inputs(k)
    expected = reference.modulated_conv2d(x, w, s, demodulate, 0.01)
    y = modulated_conv2d(x, w, s, demodulate, 0.01, fused=fused)
    assert_close(y, expected)
    upstream = torch.randn_like(expected)
    names = {"x": x, "w": w, "s": s}
    got = torch.autograd.grad(y, names.values(), upstream)
    want = torch.autograd.grad(expected, names.values(), upstream)
    assert_grads_close(dict(zip(names, got, strict=True)), dict(zip(names, want, strict=True)))


@both_forms
@pytest.mark.parametrize("taps", [(1, 3, 3, 1), (1, 1), (1, 2, 3, 5, 7), (1, 4, 6, 4, 1, 2)])
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("up", "down"), [(2, 1), (1, 2), (3, 1), (1, 3)])
def test_resampling_equals_its_definition(k, up, down, taps, fused):
    """Filter and convolution one after the other, as defined, whatever cheaper order the layer takes."""
    if len(taps) < max(up, down):
        taps = (1.0, 2.0, 1.0)
    f = resampling_filter(taps).double()
    x, w, s = inputs(k)
    length = len(taps)
    y = modulated_conv2d(x, w, s, up=up, down=down, resample_filter=f, fused=fused)
    if up > 1:
        big = reference.upfirdn2d(x, f * up**2, up=up, before=k // 2 + (length + up - 1) // 2, after=k // 2 + (length - up) // 2)
        padded_kernel = w.flip(2, 3)
        scaled = F.conv2d(big * s[:, :, None, None], padded_kernel)
    else:
        small = reference.upfirdn2d(x, f, before=k // 2 + (length - down + 1) // 2, after=k // 2 + (length - down) // 2)
        scaled = F.conv2d(small * s[:, :, None, None], w)[:, :, ::down, ::down]
    d = ((w[None] * s[:, None, :, None, None]).square().sum((2, 3, 4)) + 1e-8).rsqrt()
    assert_close(y, (scaled * d[:, :, None, None]).detach())
    if up > 1:
        assert y.shape[2:] == (4 * up, 5 * up)


@both_forms
@pytest.mark.parametrize(("up", "down", "k"), [(1, 1, 3), (2, 1, 3), (2, 1, 1), (1, 2, 3), (1, 2, 1)])
def test_derivatives_of_both_orders(up, down, k, fused):
    x, w, s = inputs(k, n=1)

    def run(x, w, s):
        return modulated_conv2d(x, w, s, up=up, down=down, resample_filter=FILTER, fused=fused)

    assert torch.autograd.gradcheck(run, (x, w, s))
    assert torch.autograd.gradgradcheck(run, (x, w, s))


@both_forms
def test_unit_variance_whatever_the_style(fused):
    torch.manual_seed(0)
    x, w = torch.randn(8, 64, 20, 20), torch.randn(64, 64, 3, 3)
    styles = (0.5 * torch.randn(8, 64)).exp() * 30
    y = modulated_conv2d(x, w, styles, fused=fused)[:, :, 1:-1, 1:-1]
    assert_variance(y, 1.0)
    assert modulated_conv2d(x, w, styles, demodulate=False, fused=fused).std() > 100


def assert_variance(y: torch.Tensor, wanted: float) -> None:
    assert y.var().item() == pytest.approx(wanted, rel=0.03)


def test_upsampling_keeps_the_mean_and_leaves_25_64_of_white_noise():
    torch.manual_seed(0)
    x = torch.randn(8, 16, 48, 48)
    w, ones = torch.zeros(1, 16, 3, 3), torch.ones(8, 16)
    w[:, :, 1, 1] = torch.randn(16)
    y = modulated_conv2d(x, w, ones, up=2, resample_filter=FILTER.float())
    assert_variance(y[:, :, 4:-4, 4:-4], 25 / 64)
    flat = modulated_conv2d(torch.ones(1, 1, 8, 8), torch.ones(1, 1, 1, 1), torch.ones(1, 1), up=2, resample_filter=FILTER.float())
    assert_close(flat[:, :, 2:-2, 2:-2], torch.ones(1, 1, 12, 12))


@both_forms
def test_invariances_and_unit_length(fused):
    x, w, s = inputs()
    y = modulated_conv2d(x, w, s, eps=1e-30, fused=fused)
    assert_close(modulated_conv2d(x, w, 7 * s, eps=1e-30, fused=fused), y.detach())
    assert_close(modulated_conv2d(x, w * torch.tensor([0.1, 9.0]).view(-1, 1, 1, 1), s, eps=1e-30, fused=fused), y.detach())
    ones = modulated_conv2d(x, w, torch.ones_like(s), eps=1e-30, fused=fused)
    assert_close(ones, F.conv2d(x, w / w.flatten(1).norm(dim=1).view(-1, 1, 1, 1), padding=1).detach())
    assert_close(modulated_conv2d(x[:1], w, s[:1], eps=1e-30, fused=fused), y[:1].detach())


def test_the_sum_is_of_squares():
    """The erratum of a widespread text: for w' = (3, -4, 0) the length is 5, not |3 - 4 + 0| = 1."""
    w = torch.tensor([3.0, -4.0, 0.0]).view(1, 3, 1, 1)
    y = modulated_conv2d(torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1), w, torch.ones(1, 3), eps=1e-30)
    assert y.item() == pytest.approx(3 / 5)


@both_forms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_stay_in_range_and_agree(dtype, fused):
    torch.manual_seed(0)
    x = torch.randn(2, 64, 8, 8).to(dtype)
    w, s = 1000 * torch.randn(16, 64, 3, 3), 1e5 * torch.randn(2, 64)
    y = modulated_conv2d(x, w, s, fused=fused)
    assert y.dtype == dtype
    expected = modulated_conv2d(x.double(), w.double(), s.double(), eps=1e-30)
    # Filters, scaled input (or filters of each sample), output and its scale are each rounded to the half type.
    bound = 8 * torch.finfo(dtype).eps
    assert (y - expected).abs().max() < bound * expected.abs().max()


@both_forms
def test_zero_styles_and_weights_are_finite(fused):
    for dtype in (torch.float32, torch.float16):
        x, w, s = torch.randn(2, 3, 4, 4).to(dtype), torch.zeros(2, 3, 3, 3, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
        y = modulated_conv2d(x, w, s, fused=fused)
        y.sum().backward()
        assert not y.any()
        assert w.grad.isfinite().all()
        assert s.grad.isfinite().all()


@both_forms
def test_the_module_computes_its_styles(fused):
    layer = ModulatedConv2d(3, 4, 3, style_dim=6, fused=fused)
    x, style = torch.randn(2, 3, 5, 5), torch.randn(2, 6)
    styles = style @ layer.affine.weight.T / 6**0.5 + 1
    assert_close(layer(x, style), modulated_conv2d(x, layer.weight, styles).detach())
    assert set(layer.state_dict()) == {"weight", "affine.weight", "affine.bias"}
    colour = ModulatedConv2d(3, 4, 1, style_dim=6, demodulate=False, fused=fused)
    styles = style @ colour.affine.weight.T / 6**0.5 + 1
    assert_close(colour(x, style), modulated_conv2d(x, colour.weight, styles / 3**0.5, demodulate=False).detach())


@pytest.mark.parametrize(("up", "down", "size"), [(1, 1, 8), (2, 1, 16), (1, 2, 4)])
def test_the_module_resamples_copies_compiles(up, down, size):
    layer = ModulatedConv2d(3, 4, 3, style_dim=6, up=up, down=down)
    x, style = torch.randn(2, 3, 8, 8), torch.randn(2, 6)
    y = layer(x, style)
    assert y.shape == (2, 4, size, size)
    assert torch.equal(copy.deepcopy(layer)(x, style), y)
    assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x, style), y.detach())
    other = ModulatedConv2d(3, 4, 3, style_dim=6, up=up, down=down)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x, style), y)
    assert f"up={up}, down={down}" in repr(layer)
    assert layer.half()(x.half(), style.half()).dtype == torch.float16
    with torch.device("meta"):
        assert ModulatedConv2d(3, 4, 3, 6, up=up, down=down)(torch.empty(2, 3, 8, 8), torch.empty(2, 6)).shape == y.shape


def test_errors():
    x, w, s = inputs()
    for call, message in (
        (lambda: modulated_conv2d(x, w[:, :, :2, :2], s), r"weight must have shape \(out, in, k, k\) with k odd, got \(2, 3, 2, 2\)"),
        (lambda: modulated_conv2d(x[:, :2], w, s), r"x must have shape \(N, 3, H, W\), got \(2, 2, 4, 5\)"),
        (lambda: modulated_conv2d(x, w, s[:1]), r"styles must have shape \(N, in\) = \(2, 3\), got \(1, 3\)"),
        (lambda: modulated_conv2d(x, w, s, up=2, down=2), "not both above it, got up=2, down=2"),
        (lambda: modulated_conv2d(x, w, s, up=2), r"resampling needs resample_filter of shape \(L, L\) with L at least 2, got None"),
        (lambda: ModulatedConv2d(3, 4, 2, 6), "ModulatedConv2d: kernel_size must be odd, got 2"),
        (lambda: ModulatedConv2d(3, 4, 3, 6, up=0), "up and down must be at least 1"),
        (lambda: ModulatedConv2d(3, 4, 3, 6, up=3, resample_filter=(1, 1)), "resample_filter must have at least 3 taps, got 2"),
        (lambda: ModulatedConv2d(3, 4, 3, 6, eps=0), "eps must be positive"),
        (
            lambda: ModulatedConv2d(3, 4, 3, 6)(torch.randn(2, 3, 4, 4), torch.randn(2, 5)),
            r"style must have shape .* \(2, 6\), got \(2, 5\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
