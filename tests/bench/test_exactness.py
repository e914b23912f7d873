"""The table of errors on difficult inputs: the oracle is right, mistakes are seen, and ours passes. ``./dev torture`` prints it whole."""

from __future__ import annotations

import csv

import pytest
import torch
from torch import nn

from equinorm.bench import exactness
from equinorm.bench.exactness import BOUNDS, KINDS, NORMS, SHAPE, Errors, Kind, compared, magnitude, oracle, size_of_gradient
from equinorm.cli import main
from tests.tolerances import GRADIENT, OUTPUT

SHORT = [kind for kind in KINDS if kind.shape == SHAPE]


def test_bounds_are_those_of_the_tests():
    assert {dtype: (OUTPUT[dtype].rtol, GRADIENT[dtype].rtol) for dtype in BOUNDS} == BOUNDS


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("kind", SHORT, ids=lambda kind: kind.name)
def test_ours_is_exact(kind, name):
    found = compared(kind, NORMS[name], compiled=False)
    assert found["ours"].within(kind.dtype), f"{found['ours']}"


@pytest.mark.parametrize("name", NORMS)
def test_the_oracle_is_torchs_formula_in_float64(name):
    norm = NORMS[name]
    x = torch.randn(exactness.ROWS if norm.rows else SHAPE, dtype=torch.float64)
    layer, dy = norm.torch(1e-3).double(), torch.randn_like(x)
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    want = y.detach(), torch.autograd.grad(y, leaf, dy)[0]
    for unit in (1.0, 2.0**-40, 2.0**30):
        for actual, expected in zip(oracle(x, torch.ones(x.shape[1]), dy, 1e-3, norm, unit), want, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_silent_zeros_have_error_one_and_nan_is_infinite():
    zeros = Kind("overflow", lambda s: magnitude(s, 1e25))
    found = compared(zeros, NORMS["batch"], compiled=False)["torch"]
    assert found.output == pytest.approx(1, abs=0.1)
    assert not found.within(torch.float32)
    broken = NORMS["batch"]._replace(ours=lambda eps: Broken(exactness._C))
    found = compared(SHORT[0], broken, compiled=False)["ours"]
    assert str(found).startswith("nan / ")
    assert not found.within(torch.float32)


class Broken(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * torch.nan


@pytest.mark.parametrize(
    ("dtype", "deviation"),
    [(torch.float16, 1e-4), (torch.float16, 1e4), *((dtype, d) for dtype in (torch.bfloat16, torch.float32) for d in (1e-20, 1.0, 1e37))],
)
def test_gradients_keep_their_digits(dtype, deviation):
    info = torch.finfo(dtype)
    size = size_of_gradient(deviation, info)
    assert size <= info.max / 50
    assert info.tiny <= size / deviation <= info.max / 50


def test_errors_are_written_short():
    assert str(Errors(1.23e-7, float("inf"))) == "1e-07 / nan"


def test_the_command_prints_a_line_per_input_and_norm(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(exactness, "KINDS", SHORT[:2])
    assert main(["bench", "--exactness", "--norms", "batch", "rms", "--csv", str(tmp_path / "exactness.csv")]) == 0
    out = capsys.readouterr().out
    assert "ours: 4 of 4 within what the type allows" in out
    head, *rows = csv.reader((tmp_path / "exactness.csv").read_text().splitlines())
    assert head == ["input", "norm", "type", "torch", "ours"]
    assert [row[:2] for row in rows] == [[kind.name, norm] for kind in SHORT[:2] for norm in ("batch", "rms")]


def test_the_command_fails_where_ours_does(capsys, monkeypatch):
    monkeypatch.setattr(exactness, "KINDS", SHORT[:1])
    monkeypatch.setitem(exactness.NORMS, "batch", NORMS["batch"]._replace(ours=lambda eps: Broken(exactness._C)))
    assert main(["bench", "--exactness", "--norms", "batch"]) == 1
    assert "beyond it:\n  plain, batch: nan / " in capsys.readouterr().out


def test_norms_without_difficult_inputs_are_refused(capsys):
    assert main(["bench", "--exactness", "--norms", "switch"]) == 2
    assert "--exactness knows batch, layer, group, instance, rms; got switch" in capsys.readouterr().err
