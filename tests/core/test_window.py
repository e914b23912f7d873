"""Window sums: a loop, every derivative, function transforms, and windows longer than the data."""

from __future__ import annotations

import pytest
import torch

from equinorm.core.window import box, gaussian, window_sum
from tests.helpers import assert_close

TAPS = {"one": (2.0,), "even": (1.0, 2.0, 3.0, 4.0), "odd": (0.5, -1.0, 2.0), "longer than the data": tuple(range(1, 12))}


def loop(x, taps, dim):
    x, y = x.movedim(dim, 0), []
    for i in range(len(x)):
        parts = [tap * x[j] for tap, j in zip(taps, range(i - len(taps) // 2, i + len(taps)), strict=False) if 0 <= j < len(x)]
        y.append(sum(parts))
    return torch.stack(y).movedim(0, dim)


@pytest.mark.parametrize("taps", TAPS.values(), ids=TAPS.keys())
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, when forward mode is first used
def test_equals_a_loop_with_its_derivatives(taps, dim):
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert_close(window_sum(x, taps, dim), loop(x, taps, dim))
    results = []
    for sums in (window_sum, loop):
        (g,) = torch.autograd.grad((sums(x, taps, dim).sin() * x).sum(), x, create_graph=True)
        results += [g, *torch.autograd.grad(g.sin().sum(), x)]
    assert_close(results[0], results[2])
    assert_close(results[1], results[3])
    torch.autograd.gradcheck(lambda x: window_sum(x, taps, dim), x, check_forward_ad=True)


def test_transforms_see_through_it():
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    taps = TAPS["even"]

    def energy(x):
        return window_sum(x.square(), taps, 1).sin().sum()

    assert_close(torch.func.vmap(lambda x: window_sum(x, taps, 1))(x), window_sum(x, taps, 2))
    assert_close(torch.func.vmap(torch.func.grad(energy))(x), torch.stack([torch.func.grad(energy)(sample) for sample in x]))
    compiled = torch.compile(lambda x: window_sum(x, taps, 1), fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), window_sum(x, taps, 1))


def test_the_windows_sum_to_one():
    assert box(4) == (0.25,) * 4
    bell = gaussian(5, 1.0)
    assert sum(bell) == pytest.approx(1)
    assert bell[1] / bell[2] == pytest.approx(torch.tensor(-0.5).exp().item())
    assert bell == bell[::-1]


def test_no_data_gives_no_sums():
    assert window_sum(torch.zeros(2, 0, 3), (1.0, 2.0, 3.0), 1).shape == (2, 0, 3)
