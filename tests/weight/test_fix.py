"""Fixed norm: rows of one length, whatever was stored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from equinorm import fix_norm
from tests.helpers import assert_close
from tests.references.weight import units_of


@pytest.mark.parametrize(
    ("layer", "transposed", "groups"),
    [
        (lambda: nn.Embedding(5, 4), False, 1),
        (lambda: nn.Linear(6, 4), False, 1),
        (lambda: nn.Conv2d(4, 6, 3, groups=2), False, 1),
        (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), True, 2),
    ],
    ids=["embedding", "linear", "conv", "transposed"],
)
def test_equals_its_formula_and_gradient_row_by_row(layer, transposed, groups):
    module = fix_norm(layer().double(), length=3.0)
    v = module.parametrizations.weight.original
    upstream = torch.randn_like(v)
    expected, gradient = torch.empty_like(v), torch.empty_like(v)
    for unit in units_of(v.shape, transposed, groups):
        where = tuple(torch.tensor(column) for column in zip(*unit, strict=True))
        row, g = v.detach()[where], upstream[where]
        norm = sum(value**2 for value in row) ** 0.5
        expected[where] = 3 * row / norm
        gradient[where] = 3 / norm * (g - row * (g * row).sum() / norm**2)
    assert_close(module.weight, expected)
    assert_close(torch.autograd.grad(module.weight, v, upstream)[0], gradient, label="gradient")


def test_only_directions_count():
    module = fix_norm(nn.Linear(6, 4).double())
    before = module.weight.detach()
    with torch.no_grad():
        module.parametrizations.weight.original.mul_(torch.tensor([[0.1], [2.0], [30.0], [1.0]]))
    assert_close(module.weight, before)
    assert_close(before.norm(dim=1), torch.ones(4, dtype=torch.float64))


def test_the_padding_row_stays_zero():
    words = fix_norm(nn.Embedding(5, 4, padding_idx=2))
    assert not words(torch.tensor([2])).any()
    words(torch.arange(5)).sum().backward()
    assert words.parametrizations.weight.original.grad.isfinite().all()


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"fix_norm: length must be positive, got 0"):
        fix_norm(nn.Linear(2, 2), length=0.0)
    with pytest.raises(ValueError, match=r"fix_norm: eps must be positive, got 0"):
        fix_norm(nn.Linear(2, 2), eps=0.0)
    with pytest.raises(ValueError, match=r"fix_norm: Linear must have a parameter named 'words'"):
        fix_norm(nn.Linear(2, 2), "words")
    with pytest.raises(ValueError, match=r"fix_norm: ParametrizedLinear\.weight already has it"):
        fix_norm(fix_norm(nn.Linear(2, 2)))
