"""Whole layers with the Triton kernels in place of the CPU's, against the same layers in plain float64 operations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import equinorm
from equinorm import kernels
from equinorm.kernels import gpu, triton_channel
from tests.helpers import assert_close, assert_grads_close
from tests.kernels.test_cpu import LAYOUTS, lay

CHANNELS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: equinorm.BatchNorm(6),
    "instance": lambda: equinorm.InstanceNorm(6, affine=True),
    "group": lambda: equinorm.GroupNorm(2, 6),
    "switch": lambda: equinorm.SwitchNorm(6),
    "batch_channel": lambda: equinorm.BatchChannelNorm(6, num_groups=2),
}
ROWS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: equinorm.LayerNorm(37),
    "rms": lambda: equinorm.RMSNorm(37),
    "layer of two dimensions": lambda: equinorm.LayerNorm((3, 37)),
    "rms of a long row": lambda: equinorm.RMSNorm((5, 3, 37)),
}


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch, small_tiles: None) -> Iterator[list[str]]:
    """Serve CPU tensors by the Triton kernels; the functions called, of which there must be some."""
    names: list[str] = []
    monkeypatch.setitem(kernels._BY_DEVICE, "cpu", gpu)
    for name in ("moments", "affine", "reduce", "backward", "row_forward", "row_backward", "running_update"):
        run = getattr(gpu, name)
        monkeypatch.setattr(gpu, name, lambda *args, _run=run, _name=name, **kwargs: (names.append(_name), _run(*args, **kwargs))[1])
    yield names
    assert names


def step(norm: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    x = x.detach().requires_grad_()
    y = norm(x)
    named = {"x": x, **dict(norm.named_parameters())}
    return y.detach(), dict(zip(named, torch.autograd.grad(y, list(named.values()), dy), strict=True))


def check(make: Callable[[], nn.Module], x: Tensor) -> nn.Module:
    norm = make()  # its parameters are float32, also beside half-precision data
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.rand_like(parameter) - 0.5)
    exact = copy.deepcopy(norm).double()
    dy = torch.randn_like(x)
    y, grads = step(norm, x, dy)
    with equinorm.plain():
        want, want_grads = step(exact, x.double(), dy.double())
    assert y.stride() == x.stride()
    assert_close(y, want)
    assert_grads_close(grads, want_grads)
    for (name, got), expected in zip(norm.named_buffers(), exact.buffers(), strict=True):
        if got.is_floating_point():
            assert_close(got, expected, label=name)
    return norm


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CHANNELS)
def test_layers_over_channels(name: str, dtype: torch.dtype, layout: str, launched: list[str]) -> None:
    x = lay(torch.randn(3, 6, 7, 5) * 2 + 1, layout).to(dtype)
    norm = check(CHANNELS[name], x)
    assert {"row_forward", "row_backward"} <= set(launched) or {"moments", "affine", "reduce", "backward"} <= set(launched)
    norm.eval()
    with equinorm.plain():
        want = copy.deepcopy(norm).double()(x.double())
    assert_close(norm(x).detach(), want.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_layers_over_rows(name: str, dtype: torch.dtype) -> None:
    check(ROWS[name], (torch.randn(4, 5, 3, 37) * 2 + 1).to(dtype))


def test_running_estimates_move_in_one_launch(launched: list[str]) -> None:
    equinorm.BatchNorm(6)(torch.randn(3, 6, 4))
    assert launched.count("running_update") == 1


@pytest.mark.parametrize("make", [CHANNELS["batch"], CHANNELS["group"]], ids=["batch", "group"])
def test_second_derivatives_are_those_of_the_definition(make: Callable[[], nn.Module]) -> None:
    def penalty(norm: nn.Module, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (dx,) = torch.autograd.grad(norm(x).square().square().sum(), x, create_graph=True)
        (ddx,) = torch.autograd.grad(dx.square().sum(), x)
        return ddx

    norm, x = make().double(), torch.randn(3, 6, 5, dtype=torch.float64)
    got = penalty(copy.deepcopy(norm), x)
    with equinorm.plain():
        assert_close(got, penalty(norm, x))


@pytest.mark.parametrize("shape", [(0, 6, 4), (3, 6, 0)], ids=str)
def test_an_empty_batch_launches_nothing(shape: tuple[int, ...], launched: list[str]) -> None:
    x = torch.randn(shape, requires_grad=True)
    norm: Any = equinorm.GroupNorm(2, 6) if shape[0] == 0 else equinorm.BatchNorm(6).eval()
    norm(x).sum().backward()
    assert x.grad.shape == shape
    assert not launched
    launched.append("nothing, as it should")


def test_the_kernels_are_named_by_the_operators_that_run() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        equinorm.BatchNorm(6)(torch.randn(3, 6, 4))
    assert {"equinorm::triton_moments", "equinorm::triton_affine"} <= {event.key for event in profile.key_averages()}
    assert triton_channel.LIBRARY.ns == "equinorm"
