"""Whatever a norm hands to the kernels lies on the device of its input. Tensors without data stand for a device that is not there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from equinorm import kernels
from equinorm.bench.contenders import BY_NAME
from equinorm.bench.cuda import further
from equinorm.core import overwrite
from equinorm.kernels import gpu

pytest.importorskip("triton")
NO_AUTOCAST = {"film"}  # torch.autocast knows no meta device
FUNCTIONS = ("moments", "affine", "reduce", "backward", "row_forward", "row_backward", "running_update")


@pytest.fixture(autouse=True)
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Serve meta tensors by the shapes that the GPU kernels declare; returns the functions called."""
    names: list[str] = []
    monkeypatch.setitem(kernels._BY_DEVICE, "meta", gpu)

    def watched(name, run):
        def call(*args, **kwargs):
            names.append(name)
            assert {t.device.type for t in (*args, *kwargs.values()) if isinstance(t, Tensor)} == {"meta"}, name
            return run(*args, **kwargs)

        return call

    for name in FUNCTIONS:
        monkeypatch.setattr(gpu, name, watched(name, getattr(gpu, name)))
    return names


@pytest.mark.parametrize("name", sorted(BY_NAME.keys() - NO_AUTOCAST))
def test_norms_keep_to_the_device_of_their_input(name: str) -> None:
    contender = BY_NAME[name]
    norm = contender.ours(64).to("meta")
    x = torch.randn((8, 64, 6, 5) if contender.geometry == "channel" else (8, 64), device="meta", requires_grad=True)
    norm(x, *further(contender, x)).sum().backward()
    assert x.grad.device.type == "meta"
    with torch.no_grad():
        assert norm.eval()(x, *further(contender, x)).device.type == "meta"


@pytest.mark.parametrize(("name", "expected"), [("batch", {"moments", "affine", "running_update"}), ("layer", {"row_forward"})])
def test_the_kernels_are_what_serves_them(name: str, expected: set[str], served: list[str]) -> None:
    BY_NAME[name].ours(64).to("meta")(torch.randn(8, 64, device="meta"))
    assert set(served) == expected


def test_the_norm_in_place_reduces_on_the_device_of_its_input(served: list[str]) -> None:
    sums = overwrite._reduce(torch.randn(2, 3, 4, device="meta"), torch.randn(2, 3, 4, device="meta"), "auto")
    assert served == ["reduce"]
    assert {total.device.type for total in sums} == {"meta"}


@pytest.mark.parametrize("shape", [(0, 6, 4), (3, 6, 0)], ids=str)
def test_an_empty_batch_stays_on_its_device(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, device="meta", requires_grad=True)
    norm = BY_NAME["batch"].ours(6).to("meta").train(shape[0] == 0)
    norm(x).sum().backward()
    assert x.grad.device.type == "meta"
