"""In-place activated batch norm: one stored map per layer instead of two, whatever the input; and inputs that must not be overwritten."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import equinorm
from equinorm import InPlaceABN
from equinorm.core import overwrite
from tests.helpers import assert_close, assert_grads_close

CHANNELS = 6


def example(*shape, dtype=torch.float64):
    return (torch.randn(shape or (4, CHANNELS, 5, 3), dtype=torch.float64) * 2 + 1).to(dtype)


def explicit(norm, x):
    """The same function, with everything stored: batch norm and activation of torch."""
    weight = norm.weight.abs() + norm.eps if norm.weight_mode == "abs" else norm.weight
    z = functional.batch_norm(x, None, None, weight, norm.bias, True, eps=norm.eps)
    apply = {"leaky_relu": functional.leaky_relu, "elu": functional.elu, "identity": lambda z, _: z}[norm.activation]
    return apply(z, norm.activation_param)


def gradients(function, norm, x, dy):
    x = x.clone().requires_grad_()
    y = function(norm, x.clone())
    found = torch.autograd.grad(y, (x, norm.weight, norm.bias), dy.to(y.dtype))
    return dict(zip(("x", "weight", "bias"), found, strict=True))


def call(norm, x):
    return norm(x)


def randomized(**options):
    norm = InPlaceABN(CHANNELS, **options).double()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1.2, 1.5, CHANNELS))
        norm.bias.copy_(torch.linspace(-0.7, 0.9, CHANNELS))
    return norm


@pytest.mark.parametrize("weight_mode", ["abs", "signed"])
@pytest.mark.parametrize(
    ("activation", "param"), [("leaky_relu", 0.01), ("leaky_relu", 0.2), ("elu", 1.0), ("elu", 0.5), ("identity", 1.0)]
)
def test_is_batch_norm_and_activation(activation, param, weight_mode):
    norm = randomized(activation=activation, activation_param=param, weight_mode=weight_mode)
    x, dy = example(), example()
    assert_close(norm(x.clone()), explicit(norm, x))
    assert_grads_close(gradients(call, norm, x, dy), gradients(explicit, norm, x, dy))


def test_the_identity_with_weight_one_less_eps_is_batch_norm():
    norm, batch = InPlaceABN(CHANNELS, activation="identity").double(), equinorm.BatchNorm(CHANNELS).double()
    nn.init.constant_(norm.weight, 1 - norm.eps)
    for _ in range(3):
        x = example()
        assert_close(norm(x.clone()), batch(x))
    assert_close(norm.eval()(x.clone()), batch.eval()(x))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_output_is_in_the_memory_of_the_input(training, grad):
    norm, x = InPlaceABN(CHANNELS).train(training), example(dtype=torch.float32)
    with torch.set_grad_enabled(grad):
        before, place = x.clone(), x.data_ptr()
        y = norm(x)
        assert y is x
        assert y.data_ptr() == place
        assert not torch.equal(y, before)


def network(norm, depth=6, width=16):
    layers = [nn.Sequential(nn.Conv2d(width, width, 1, bias=False), norm(width)) for _ in range(depth)]
    return nn.Sequential(*layers)


def stored(model, x):
    """Bytes of all storages that backward keeps alive, each counted once."""
    sizes = {}

    def pack(t):
        storage = t.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    y.sum().backward()
    return sum(sizes.values())


def conventional(inplace):
    return lambda width: nn.Sequential(equinorm.BatchNorm(width), nn.LeakyReLU(0.01, inplace=inplace))


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("options", [{}, {"activation": "elu", "activation_param": 1.0}, {"weight_mode": "signed"}])
def test_backward_keeps_40_percent_less(inplace, options):
    x = torch.randn(8, 16, 24, 24)
    saved = stored(network(lambda width: InPlaceABN(width, **options)), x)
    assert saved <= 0.6 * stored(network(conventional(inplace)), x)


class Allocations(TorchDispatchMode):
    """Bytes of the storages that operators made and that are still alive; the most there were at any time."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.now())
        return result

    def now(self):
        self.alive = {place: found for place, found in self.alive.items() if not found[0].expired()}
        return sum(size for _, size in self.alive.values())


def test_40_percent_less_is_allocated(monkeypatch):
    monkeypatch.setitem(overwrite.PIECE, "cpu", 2**12)  # small against a map here, as its real size is against real maps
    x = torch.randn(8, 16, 32, 32)

    def allocated(norm):
        model = network(norm)
        with Allocations() as allocations:
            y = model(x)
            held = allocations.now()
            y.sum().backward()
        return held, allocations.peak

    held, peak = allocated(InPlaceABN)
    conventionally_held, conventional_peak = allocated(conventional(True))
    assert held <= 0.6 * conventionally_held
    assert peak <= 0.7 * conventional_peak, "backward adds two maps of gradients in either case"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(4, CHANNELS, 5, 3), (1, CHANNELS, 7, 9), (30, CHANNELS, 1, 1)])
@pytest.mark.parametrize("impl", ["auto", "plain"])
def test_pieces_make_up_the_whole(monkeypatch, shape, memory_format, impl):
    monkeypatch.setitem(overwrite.PIECE, "cpu", 40)
    norm, x, dy = randomized(), example(*shape).to(memory_format=memory_format), example(*shape)
    assert_close(copy.deepcopy(norm)(x.clone(), impl=impl), explicit(norm, x))
    assert_grads_close(gradients(lambda norm, x: norm(x, impl=impl), norm, x, dy), gradients(explicit, norm, x, dy))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_channels_that_rounding_loses_are_kept(dtype):
    norm = randomized(weight_mode="signed").float()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 0.1, 1e-3, 1e-6, 0.0, -1e-6]))
        norm.bias.fill_(1.0)
    x, dy = example(dtype=dtype), example(dtype=dtype)
    exact = copy.deepcopy(norm).double()
    found, expected = gradients(call, norm, x, dy), gradients(explicit, exact, x.double(), dy.double())
    for name in ("x", "weight", "bias"):
        over = (0, 2, 3) if name == "x" else ()
        error = (found[name].double() - expected[name]).abs()
        scale = expected[name].abs()
        if over:
            error, scale = error.amax(over), scale.amax(over)
        tolerance, underflow = {torch.bfloat16: (0.05, 0), torch.float16: (0.01, 6e-8), torch.float32: (1e-3, 0)}[dtype]
        assert (error <= tolerance * scale + underflow + 1e-12).all(), f"{name}: {error} of {scale}"


def test_only_those_channels_are_kept():
    norm, x = InPlaceABN(CHANNELS, weight_mode="signed"), example(dtype=torch.float32)
    y = norm(x.clone())
    assert y.grad_fn.saved_tensors[3].shape == (4, 0, 5, 3)
    with torch.no_grad():
        norm.weight[2] = 0.0
    assert norm(x.clone()).grad_fn.saved_tensors[3].shape == (4, 1, 5, 3)


@pytest.mark.parametrize("weight_mode", ["abs", "signed"])
def test_a_weight_of_zero_learns(weight_mode):
    norm, x, dy = randomized(weight_mode=weight_mode), example(), example()
    nn.init.zeros_(norm.weight)
    x_hat = functional.batch_norm(x, None, None, training=True, eps=norm.eps)
    dz = torch.where(norm.bias.reshape(-1, 1, 1) + x_hat * (norm.eps if weight_mode == "abs" else 0) >= 0, 1.0, 0.01).double() * dy
    assert_grads_close({"weight": gradients(call, norm, x, dy)["weight"]}, {"weight": (dz * x_hat).sum((0, 2, 3))}, dtype=torch.float32)


def test_elu_that_saturates_is_exact():
    norm, x, dy = InPlaceABN(CHANNELS, activation="elu", activation_param=1.0), example(dtype=torch.float32), example(dtype=torch.float32)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, 3.0, 10.0, 30.0, 100.0]))
    assert norm(x.clone()).min() == -1.0, "this example must saturate"
    found = gradients(call, norm, x, dy)
    expected = gradients(explicit, copy.deepcopy(norm).double(), x.double(), dy.double())
    for name, want in expected.items():
        assert_close(found[name] / want.abs().max(), want / want.abs().max(), dtype=torch.bfloat16, label=name)


def test_padding_does_not_count_when_a_channel_is_kept():
    mask = torch.rand(4, 5, 3) < 0.6
    x = torch.where(mask.unsqueeze(1), example(), torch.nan).requires_grad_()
    norm = randomized(weight_mode="signed")
    nn.init.zeros_(norm.weight)
    y = norm(x.clone(), mask)
    dx, dweight = torch.autograd.grad(y.square().sum(), (x, norm.weight))
    assert y.isfinite().all()
    assert dx.isfinite().all()
    assert dweight.isfinite().all()
    assert dx[~mask.unsqueeze(1).expand_as(dx)].eq(0).all()


def test_inputs_that_cannot_be_overwritten_are_refused():
    norm, x = InPlaceABN(CHANNELS), example(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"InPlaceABN: .* must not be a leaf that requires a gradient; pass x.clone\(\)"):
        norm(x.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"InPlaceABN: .* must not be a view, .* got one of shape \(2, 6, 5, 3\)"):
        norm(x[:2])
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match=f"InPlaceABN: elu cannot be undone in half types, .* got {dtype}"):
            InPlaceABN(CHANNELS, activation="elu")(x.to(dtype))
    assert norm.num_batches_tracked == 0, "a refused input must not be counted"


@pytest.mark.parametrize("producer", [torch.sigmoid, InPlaceABN(CHANNELS)])
def test_a_producer_that_needs_its_output_is_an_error_of_autograd(producer):
    x = example(dtype=torch.float32).requires_grad_()
    y = InPlaceABN(CHANNELS)(producer(x * 1.0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_from_the_layer_before_and_not_from_the_norm(reentrant):
    conv, norm, x = nn.Conv2d(CHANNELS, CHANNELS, 1), InPlaceABN(CHANNELS), example(dtype=torch.float32).requires_grad_()
    straight = torch.autograd.grad(copy.deepcopy(norm)(conv(x)).square().sum(), x)[0]
    checkpoint(nn.Sequential(conv, norm), x, use_reentrant=reentrant).square().sum().backward()
    assert_close(x.grad, straight.double(), label="gradient of x")
    y = checkpoint(norm, conv(x), use_reentrant=reentrant)
    message = "must not be a leaf" if reentrant else "modified by an inplace operation"
    with pytest.raises((RuntimeError, ValueError), match=message):
        y.sum().backward()


def test_a_batch_norm_checkpoint_works_signed_and_turns_signs_otherwise():
    batch, x = nn.BatchNorm2d(CHANNELS), example(dtype=torch.float32)
    with torch.no_grad():
        batch.weight.copy_(torch.linspace(-1.2, 1.5, CHANNELS))
    batch(x)
    want = functional.leaky_relu(batch.eval()(x), 0.01)
    signed, absolute = (InPlaceABN(CHANNELS, weight_mode=mode).eval() for mode in ("signed", "abs"))
    for norm in (signed, absolute):
        norm.load_state_dict(batch.state_dict())
    assert_close(signed(x.clone()), want.double())
    assert not torch.allclose(absolute(x.clone()), want, atol=0.1)


def test_the_authors_checkpoints_load():
    norm, state = InPlaceABN(CHANNELS), InPlaceABN(CHANNELS).state_dict()
    del state["num_batches_tracked"]
    state["running_mean"] = torch.full((CHANNELS,), 3.0)
    norm.load_state_dict(state)
    assert norm.running_mean.eq(3.0).all()
    InPlaceABN(CHANNELS, track_running_stats=False).load_state_dict({k: v for k, v in state.items() if "running" not in k})
