"""Numbers that other layers get wrong: far means, long sums, extreme magnitudes; and bits that depend on nothing but the input.

These run on larger inputs than the catalogue's table, on the norms with kernels of their own, one of each kind.
"""

from __future__ import annotations

import copy

import pytest
import torch

import equinorm
from equinorm.bench.exactness import far, magnitude, one_sided
from tests.helpers import assert_close, assert_grads_close
from tests.tolerances import relative_error

CHANNEL = {
    "batch": lambda: equinorm.BatchNorm(8),
    "instance": lambda: equinorm.InstanceNorm(8, affine=True),
    "group": lambda: equinorm.GroupNorm(4, 8),
    "switch": lambda: equinorm.SwitchNorm(8),
    "batch_channel": lambda: equinorm.BatchChannelNorm(8, 4),
}
ROW = {"layer": lambda: equinorm.LayerNorm(96), "rms": lambda: equinorm.RMSNorm(96, eps=1e-6)}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

channel_norms = pytest.mark.parametrize("name", CHANNEL)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def make(name, eps=None):
    module = (CHANNEL | ROW)[name]()
    if eps is not None:
        module.eps = eps
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def compare_with_float64(module, x):
    """Output and input gradient of a float32 or half module against itself in float64 on the same numbers."""
    exact = copy.deepcopy(module).double()
    own, ref = x.clone(memory_format=torch.preserve_format).requires_grad_(), x.double().requires_grad_()
    y, want = module(own), exact(ref)
    assert_close(y, want)
    dy = torch.randn_like(y)
    (dx,), (dx_want,) = torch.autograd.grad(y, own, dy), torch.autograd.grad(want, ref, dy.double())
    assert_grads_close({"x": dx}, {"x": dx_want})


@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6])
@layouts
@channel_norms
def test_far_from_zero(name, layout, ratio):
    x = far((4, 8, 12, 12), ratio).to(memory_format=LAYOUTS[layout])
    compare_with_float64(make(name), x)


@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("name", ROW)
def test_rows_far_from_zero(name, ratio):
    compare_with_float64(make(name), far((40, 96), ratio))


@pytest.mark.parametrize("std", [1e-30, 1e-18, 1e18, 1e30, 5e37])
@layouts
@channel_norms
def test_extreme_magnitudes(name, layout, std):
    """The answer is that of an ordinary Gaussian in other units: never zeros, NaN or infinity."""
    x = magnitude((4, 8, 6, 6), std).to(memory_format=LAYOUTS[layout])
    # eps stands for nothing where it is far below the variance; where it is far above, the answer is 0 by right.
    module = make(name, eps=0.0 if std < 1 else 1e-5)
    exact = copy.deepcopy(module).double()
    own, ref = x.clone().requires_grad_(), x.double().requires_grad_()
    y, want = module(own), exact(ref)
    assert_close(y, want)
    assert want.abs().max() > 0.1, "the reference itself must not be silent zeros"
    dy = torch.randn_like(y) * min(std, 1e30)  # so that the gradient is of order one, or as near as float32 lets it be
    (dx,), (dx_want,) = torch.autograd.grad(y, own, dy), torch.autograd.grad(want, ref, dy.double())
    assert relative_error(dx, dx_want) < 2e-6


@pytest.mark.parametrize("std", [1e-18, 1e18, 1e30, 5e37])
@pytest.mark.parametrize("name", ROW)
def test_rows_of_extreme_magnitude(name, std):
    module = make(name, eps=0.0 if std < 1 else 1e-5)
    x = magnitude((40, 96), std)
    want = copy.deepcopy(module).double()(x.double())
    assert_close(module(x), want)


@layouts
@pytest.mark.parametrize("name", ["batch", "group", "instance"])
def test_a_million_values_per_statistic(name, layout):
    """relu(x) + 3 in blocks of a million and more: naive float32 sums lose three digits here."""
    x = one_sided((2, 8, 520, 520)).to(memory_format=LAYOUTS[layout])
    module = make(name)
    want = copy.deepcopy(module).double()(x.double())
    assert_close(module(x), want)


@layouts
@channel_norms
def test_a_constant_input_is_the_bias(name, layout):
    module = make(name)
    with torch.no_grad():
        for bias in (p for n, p in module.named_parameters() if n in ("bias", "channel_bias")):
            bias.zero_()
    x = torch.full((4, 8, 6, 6), 3.3).to(memory_format=LAYOUTS[layout])
    assert module(x).abs().max() < 1e-6


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@layouts
@pytest.mark.parametrize("name", ["batch", "group", "instance"])
def test_a_bad_value_stays_in_its_group(name, layout, bad):
    x = torch.randn(4, 8, 6, 6).to(memory_format=LAYOUTS[layout])
    module = make(name)
    want = module(x)
    x[1, 3, 2, 2] = bad
    hit = module(x).isnan()
    group = {"batch": (slice(None), 3), "group": (1, slice(2, 4)), "instance": (1, 3)}[name]
    expected = torch.zeros_like(hit)
    expected[group] = True
    assert torch.equal(hit, expected)
    assert_close(module(x)[~expected], want[~expected].double())
    if name != "batch":
        others = [0, 2, 3]
        assert torch.equal(module(x)[others], want[others]), "the bits of other samples"


@pytest.mark.parametrize("shape", [(6, 8, 64, 64), (5, 8, 37, 41)])
@layouts
@channel_norms
def test_bits_do_not_depend_on_threads(name, layout, shape, threads):
    x = torch.randn(shape).to(memory_format=LAYOUTS[layout]).requires_grad_()
    dy = torch.randn(shape).to(memory_format=LAYOUTS[layout])
    module = make(name)
    results = []
    for count in (1, 2, 3):
        threads(count)
        again = copy.deepcopy(module)
        y = again(x)
        results.append((y, *torch.autograd.grad(y, [x, *again.parameters()], dy), *again.buffers()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ROW)
def test_bits_of_rows_do_not_depend_on_threads(name, threads):
    x, dy = torch.randn(3000, 96, requires_grad=True), torch.randn(3000, 96)
    module = make(name)
    results = []
    for count in (1, 2, 3):
        threads(count)
        y = module(x)
        results.append((y, *torch.autograd.grad(y, [x, *module.parameters()], dy)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@layouts
@pytest.mark.parametrize("name", ["group", "instance"])
def test_bits_of_a_sample_do_not_depend_on_the_batch(name, layout):
    x = torch.randn(33, 8, 37, 41).to(memory_format=LAYOUTS[layout])
    dy = torch.randn_like(x)
    module = make(name)

    def run(x, dy):
        x = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = module(x)
        return y, torch.autograd.grad(y, x, dy)[0]

    y, dx = run(x, dy)
    for size in (1, 2, 3, 16, 32):
        some_y, some_dx = run(x[:size], dy[:size])
        assert torch.equal(some_y, y[:size])
        assert torch.equal(some_dx, dx[:size])


@pytest.mark.parametrize("name", ROW)
def test_bits_of_a_row_do_not_depend_on_the_batch(name):
    x, dy = torch.randn(1025, 96), torch.randn(1025, 96)
    module = make(name)

    def run(x, dy):
        x = x.clone().requires_grad_()
        y = module(x)
        return y, torch.autograd.grad(y, x, dy)[0]

    y, dx = run(x, dy)
    for size in (1, 2, 3, 31, 33, 255, 257, 1023):
        some_y, some_dx = run(x[:size], dy[:size])
        assert torch.equal(some_y, y[:size])
        assert torch.equal(some_dx, dx[:size])
