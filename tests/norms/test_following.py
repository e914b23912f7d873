"""Norms with an activation behind them: one map, the same numbers as the two one after the other."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

import equinorm
from equinorm.kernels import activations, cpu
from tests.helpers import assert_close, assert_grads_close, poisoned_memory

CHANNELS = 12
NORMS = {
    "batch": lambda **options: equinorm.BatchNorm(CHANNELS, **options),
    "sync": lambda **options: equinorm.SyncBatchNorm(CHANNELS, **options),
    "group": lambda **options: equinorm.GroupNorm(3, CHANNELS, **options),
    "instance": lambda **options: equinorm.InstanceNorm(CHANNELS, affine=True, **options),
    "switch": lambda **options: equinorm.SwitchNorm(CHANNELS, **options),
    "batch_channel": lambda **options: equinorm.BatchChannelNorm(CHANNELS, 3, **options),
}
# Those that the kernels know, with a parameter where they have one, and two that they do not.
FUNCTIONS = {
    "relu": (None, F.relu),
    "leaky_relu": (0.2, lambda z: F.leaky_relu(z, 0.2)),
    "relu6": (None, F.relu6),
    "elu": (0.7, lambda z: F.elu(z, 0.7)),
    "silu": (None, F.silu),
    "hardswish": (None, F.hardswish),
    "tanh": (None, torch.tanh),
    "gelu": (None, F.gelu),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
HALF = (torch.bfloat16, torch.float16)


def build(kind, activation=None, dtype=torch.float32):
    torch.manual_seed(0)
    options = {} if activation is None else {"activation": activation, "activation_param": FUNCTIONS[activation][0]}
    norm = NORMS[kind](**options).to(dtype)
    with torch.no_grad():
        for name, parameter in norm.named_parameters():
            parameter.uniform_(0.5, 1.5) if "weight" in name else parameter.normal_()
    return norm


def run(norm, x, dy, impl="auto", following=None):
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = norm(x, impl=impl)
    y = y if following is None else following(y)
    parameters = dict(norm.named_parameters())
    grads = torch.autograd.grad(y, [x, *parameters.values()], dy)
    return y.detach(), dict(zip(("x", *parameters), grads, strict=True))


def check(kind, activation, dtype, layout, shape):
    norm, plain = build(kind, activation, dtype), build(kind, dtype=dtype).double()
    plain.load_state_dict(norm.state_dict())
    x, dy = (torch.randn(shape[0], CHANNELS, *shape[1:]).to(dtype).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))
    with poisoned_memory():
        y, grads = run(norm, x, dy)
    wanted_y, wanted = run(plain, x.double(), dy.double(), "plain", FUNCTIONS[activation][1])
    assert_close(y, wanted_y)
    assert_grads_close(grads, wanted)
    assert y.dtype == dtype
    assert y.stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("kind", NORMS)
def test_equals_the_norm_and_then_the_activation(kind, activation, dtype):
    check(kind, activation, dtype, "contiguous", (2, 37, 31))


# The kernels work on 1024 values at a time: samples of less, of more, with ends within; one position.
@pytest.mark.parametrize("shape", [(4, 5, 7), (2, 37, 31), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("activation", ["leaky_relu", "silu", "tanh"])
@pytest.mark.parametrize("kind", ["batch", "group", "switch"])
def test_in_every_shape_layout_and_type(kind, activation, dtype, layout, shape):
    check(kind, activation, dtype, layout, shape)


@pytest.mark.parametrize("activation", ["silu", "relu", "tanh"])
@pytest.mark.parametrize("kind", NORMS)
def test_in_evaluation(kind, activation):
    norm, plain = build(kind, activation), build(kind)
    for trained in (norm, plain):
        torch.manual_seed(1)
        for _ in range(3):
            trained(torch.randn(8, CHANNELS, 5, 5) * 3 + 1)
        trained.eval()
    x, dy = torch.randn(4, CHANNELS, 5, 5), torch.randn(4, CHANNELS, 5, 5)
    y, grads = run(norm, x, dy)
    wanted_y, wanted = run(plain.double(), x.double(), dy.double(), following=FUNCTIONS[activation][1])
    assert_close(y, wanted_y)
    assert_grads_close(grads, wanted)


@pytest.mark.parametrize("activation", ["silu", "elu", "tanh"])
@pytest.mark.parametrize("kind", NORMS)
def test_derivatives_of_first_and_second_order(kind, activation):
    norm = build(kind, activation, torch.float64)
    x = torch.randn(3, CHANNELS, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, x)
    assert torch.autograd.gradgradcheck(norm, x)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1e30, 5e37])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu"])
def test_any_magnitude(activation, magnitude):
    norm, plain = build("group", activation), build("group").double()
    norm.eps = plain.eps = 1e-80
    x, dy = torch.randn(2, CHANNELS, 9, 9), torch.randn(2, CHANNELS, 9, 9)
    y, grads = run(norm, x * magnitude, dy)
    wanted_y, wanted = run(plain, x.double() * magnitude, dy.double(), following=FUNCTIONS[activation][1])
    assert_close(y, wanted_y)
    assert_close(grads["x"] * magnitude, wanted["x"] * magnitude, label="gradient of x")


@pytest.mark.parametrize("activation", cpu._FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_kernels_functions_are_torchs(activation, dtype):
    if not cpu.available():
        pytest.skip("needs the compiled kernels")
    parameter, function = FUNCTIONS[activation]
    # Inputs of all sizes, and the ends: where exp overflows and where its result vanishes, kinks, zero, infinity.
    z = torch.cat(
        [torch.linspace(-12, 12, 4001), torch.logspace(-30, 30, 301), -torch.logspace(-30, 30, 301), torch.tensor([0.0, 3, -3, 6])]
    )
    z = z.to(dtype).reshape(1, 1, -1)
    one, zero = (torch.full((1, 1), value, dtype=torch.float64) for value in (1.0, 0.0))
    fused = cpu.fused(activations.named(activation, parameter))
    reference = z.double().requires_grad_()
    expected = function(reference)
    slope = torch.autograd.grad(expected.sum(), reference)[0]
    if activation == "silu":  # torch's own derivative loses the digits of 1 - sigmoid
        slope = z.double().sigmoid() * (1 + z.double() * (-z.double()).sigmoid())
    y = cpu.affine(z, zero, one, zero, fused)
    dx = cpu.backward(torch.ones_like(z), z, zero, one, zero, zero, (zero, one, zero), fused)
    eps = torch.finfo(dtype).eps
    # Relative to the larger of 1 and |f|: behind a norm values are of order 1.
    assert ((y.double() - expected).abs() / expected.abs().clamp(min=1)).max() <= 4 * eps
    assert ((dx.double() - slope).abs()).max() <= 4 * eps
    assert cpu.affine(torch.full_like(z, torch.nan), zero, one, zero, fused).isnan().all()


@pytest.mark.parametrize("kind", NORMS)
def test_backward_keeps_the_input_and_nothing_of_its_size_besides(kind):
    norm, kept = build(kind, "silu"), set()
    x = torch.randn(4, CHANNELS, 16, 16, requires_grad=True)

    def pack(t):
        if t.numel() >= x.numel():
            kept.add(t.data_ptr())
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        norm(x)
    assert kept == {x.data_ptr()}


def test_masked_positions_come_out_as_zero():
    norm, mask = build("batch", "silu"), torch.rand(4, 5, 5) > 0.3
    y = norm(torch.randn(4, CHANNELS, 5, 5), mask)
    assert (y[~mask.unsqueeze(1).expand_as(y)] == 0).all()


def test_survives_copies_compilation_and_conversion():
    norm, x = build("batch", "leaky_relu"), torch.randn(4, CHANNELS, 5, 5)
    expected = norm(x)
    for copied in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm)), equinorm.convert_sync_batchnorm(nn.Sequential(norm))[0]):
        torch.testing.assert_close(copied(x), expected)
        assert "activation='leaky_relu', activation_param=0.2" in repr(copied)
    torch.testing.assert_close(torch.compile(norm, fullgraph=True, backend="aot_eager")(x), expected)


def test_the_state_dict_is_that_of_the_norm_alone():
    assert build("group", "silu").state_dict().keys() == nn.GroupNorm(3, CHANNELS).state_dict().keys()


@pytest.mark.parametrize("kind", NORMS)
def test_errors(kind):
    name = type(build(kind)).__name__
    with pytest.raises(ValueError, match=f"{name}: activation must be a function of torch.nn.functional, got 'rleu'"):
        NORMS[kind](activation="rleu")
    with pytest.raises(ValueError, match=f"{name}: activation silu: only leaky_relu, elu, celu take a parameter, got 0.1"):
        NORMS[kind](activation="silu", activation_param=0.1)
    with pytest.raises(ValueError, match=f"{name}: activation_param=0.1 needs an activation"):
        NORMS[kind](activation_param=0.1)
