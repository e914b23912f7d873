"""What a training forward keeps for its backward: the input, or for in-place forms the output, and numbers per sample and channel.

Counted is what autograd saves and what a backward's context holds besides, by storage, in units of the input. Small is what has no more
elements than four numbers per sample and channel (one per row), or than the largest parameter or buffer. It needs the kernels: the plain
path keeps what autograd makes of it.
"""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import equinorm
from equinorm.kernels import cpu
from tests.cases import CASES

SAMPLES, SIDE, ROWS = 40, 16, 40

# Methods that are more than a rule on channels or rows, with what they keep, in inputs, and why.
MORE = {
    "generalized_divisive": (4, "a matrix product at every position: the input, its square, the divisor and its power"),
    "local_contrast": (2, "the centred input, and maps of one channel"),
    "divisive": (2, "the input, and maps of one channel"),
    "ada_layer": (2.3, "the norm's output, which the map per token multiplies, and that map"),
    "ada_layer_zero": (2.3, "as ada_layer"),
    "spade": (4, "scale and shift at every position, and the convolutions that make them"),
    "mixture": (1.6, "the input, and posteriors per position and component"),
    "online": (2, "the input and the output, from which the backward's control takes its step"),
    "power": (2.2, "group scaling before the norm is a layer of its own"),
    "layer_lstm": (20, "gates of every step"),
    "layer_gru": (20, "gates of every step"),
}

pytestmark = pytest.mark.skipif(not cpu.available(), reason="needs the kernels")


def example(case):
    if case.geometry == "row":
        shape = (ROWS, *case.shape[1:])
        small = torch.Size(shape[:-1]).numel()
    else:
        shape = (SAMPLES, case.shape[1], SIDE, SIDE)
        small = 4 * shape[0] * shape[1]  # a scale and a shift for each, or a number for each of a few modes
    x = torch.randn(shape, requires_grad=True)
    extra = case.extra(x, torch.Generator().manual_seed(0)) if case.extra else ()
    return x, tuple(t.float() if t.is_floating_point() else t for t in extra), small


def storage(t):
    return t.untyped_storage().data_ptr()


def alive():
    # isinstance would ask objects that warn; other subclasses are what compilers of other tests left behind, and have no memory
    return [t for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter)]


def kept(module, x, extra, small):
    """Bytes of the large storages that a backward of ``module(x, *extra)`` needs, in units of those of x; and how many small ones."""
    own = [*module.parameters(), *module.buffers(), *extra]
    small = max(small, 64, *(t.numel() for t in own))
    gc.collect()
    known = {storage(t) for t in [*alive(), *own]}
    saved: dict[int, Tensor] = {}

    def pack(t):
        saved[storage(t)] = t
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        y = module(x, *extra)
    outputs = {storage(t) for t in (y if isinstance(y, tuple) else (y,))}
    # What a context holds as an attribute passes no hook. The output is the user's, unless backward needs it.
    in_contexts = {storage(t): t for t in alive() if storage(t) not in known | outputs}
    inputs = {storage(t) for t in own}
    needed = {pointer: t for pointer, t in (in_contexts | saved).items() if pointer not in inputs and t.untyped_storage().nbytes()}
    large = [t for t in needed.values() if t.untyped_storage().nbytes() // t.element_size() > small]
    return sum(t.untyped_storage().nbytes() for t in large) / x.untyped_storage().nbytes(), len(needed) - len(large)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_backward_needs_one_tensor_of_the_size_of_the_input(case):
    x, extra, small = example(case)
    module = case.make()
    if case.ready:
        case.ready(module, x.detach())
    module(x, *extra)  # what is measured once is measured now
    large, count = kept(module, x, extra, small)
    bound, _ = MORE.get(case.name, (1, ""))
    assert large <= bound, f"{case.name} keeps {large:.2f} inputs for its backward, at most {bound} are allowed"
    assert count <= 60
    if case.name in MORE:
        assert large > 1, f"{case.name} keeps no more than a rule does: take it out of MORE"


def test_every_exception_is_a_case():
    assert set(MORE) <= {case.name for case in CASES}


def test_the_meter_sees_what_a_composition_keeps():
    x = torch.randn(SAMPLES, 6, SIDE, SIDE, requires_grad=True)
    one, _ = kept(equinorm.BatchNorm(6), x, (), SAMPLES * 6)
    assert one == 1
    two, _ = kept(torch.nn.Sequential(equinorm.BatchNorm(6), torch.nn.GELU()), x, (), SAMPLES * 6)
    assert two == 2
    with equinorm.plain():
        assert kept(equinorm.BatchNorm(6), x, (), SAMPLES * 6)[0] >= 2


def test_the_meter_sees_what_a_context_hides():
    class Hides(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.hidden = x * 2
            return x + 1

        @staticmethod
        def backward(ctx, dy):
            return dy * ctx.hidden

    class Module(torch.nn.Module):
        def forward(self, x):
            return Hides.apply(x)

    x = torch.randn(SAMPLES, 6, SIDE, SIDE, requires_grad=True)
    assert kept(Module(), x, (), SAMPLES * 6)[0] == 1
