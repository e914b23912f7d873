"""Adaptive instance norm: the published numbers, identities, and gradients that reach the style."""

from __future__ import annotations

import pytest
import torch

import equinorm
from equinorm.conditional.adaptive_instance import Style
from tests.helpers import assert_close


def maps(*shape):
    return torch.randn(*shape, dtype=torch.float64) * 2 + 1


def statistics(x):
    return x.mean((2, 3)), x.var((2, 3), correction=0).sqrt()


@pytest.mark.parametrize("unbiased", [False, True])
def test_numbers_of_the_common_port(unbiased):
    content, style = torch.tensor([[[0.0, 1.0, 2.0, 3.0]]]).double(), torch.tensor([[[10.0, 10.0, 14.0, 14.0]]]).double()
    y = equinorm.adaptive_instance_norm(content, style, unbiased=unbiased)
    # n - 1 cancels where content and style are of one size, but for eps
    torch.testing.assert_close(y, torch.tensor([[[9.3167, 11.1056, 12.8944, 14.6833]]]).double(), rtol=0, atol=5e-5)


def test_unbiased_differs_where_sizes_differ():
    content, style = maps(1, 2, 2, 2), maps(1, 2, 4, 4)
    biased, unbiased = (equinorm.adaptive_instance_norm(content, style, eps=0.0, unbiased=u) - style.mean((2, 3), True) for u in (0, 1))
    assert_close(unbiased, biased * (16 / 15 * 3 / 4) ** 0.5)


def test_output_has_the_statistics_of_the_style():
    content, style = maps(2, 3, 6, 5), maps(2, 3, 9, 4) * 5 - 3
    y = equinorm.adaptive_instance_norm(content, style, eps=0.0)
    for actual, expected in zip(statistics(y), statistics(style), strict=True):
        assert_close(actual, expected)
    assert_close(equinorm.adaptive_instance_norm(y, style, eps=0.0), y, label="applied twice")
    assert_close(equinorm.adaptive_instance_norm(content, content), content, label="a tensor in its own style")


def test_strength_goes_from_content_to_style():
    content, style = maps(2, 3, 6, 5), maps(1, 3, 9, 4)
    full = equinorm.adaptive_instance_norm(content, style)
    assert_close(equinorm.adaptive_instance_norm(content, style, strength=0.0), content)
    assert_close(equinorm.adaptive_instance_norm(content, style, strength=0.3), 0.7 * content + 0.3 * full)


def test_a_mixture_of_styles_is_the_mixture_of_outputs():
    norm, content, styles = equinorm.AdaptiveInstanceNorm(3), maps(2, 3, 6, 5), [maps(1, 3, 4, 4), maps(2, 3, 7, 2) * 3]
    known = [norm.measure(s) for s in styles]
    mixed = Style(*(0.25 * a + 0.75 * b for a, b in zip(*known, strict=True)))
    assert_close(norm(content, mixed), 0.25 * norm(content, styles[0]) + 0.75 * norm(content, styles[1]))


def test_regions_take_their_own_style():
    norm, content, styles = equinorm.AdaptiveInstanceNorm(3), maps(1, 3, 6, 5), [maps(1, 3, 4, 4), maps(1, 3, 4, 4)]
    left = torch.zeros(1, 6, 5, dtype=torch.bool)
    left[..., :2] = True
    y = norm(content, styles[0], left) + norm(content, styles[1], ~left)
    assert_close(y[..., :2], norm(content[..., :2], styles[0]))
    assert_close(y[..., 2:], norm(content[..., 2:], styles[1]))


def test_padding_of_the_style_enters_nothing():
    content, style = maps(2, 3, 6, 5), maps(2, 3, 4, 4)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[..., 3] = False
    padded = torch.where(mask.unsqueeze(1), style, torch.nan).requires_grad_()
    y = equinorm.adaptive_instance_norm(content, padded, style_mask=mask)
    assert_close(y, equinorm.adaptive_instance_norm(content, style[..., :3]))
    (gradient,) = torch.autograd.grad(y.square().sum(), padded)
    assert gradient.isfinite().all()
    assert not gradient[..., 3].any()


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 3, 4)])
def test_derivatives_reach_content_and_style(shape):
    content, style = maps(2, 3, 5).requires_grad_(), maps(*shape).requires_grad_()
    torch.autograd.gradcheck(equinorm.adaptive_instance_norm, (content, style))
    torch.autograd.gradgradcheck(equinorm.adaptive_instance_norm, (content, style))


def test_derivatives_reach_the_style_vector():
    norm = equinorm.AdaptiveInstanceNorm(3, 4).double()
    content, style = maps(2, 3, 5).requires_grad_(), maps(2, 4).requires_grad_()
    torch.autograd.gradcheck(norm, (content, style))
    torch.autograd.gradgradcheck(norm, (content, style))


def test_flat_maps_are_defined():
    content, style = torch.full((1, 2, 3, 3), 5.0), maps(1, 2, 4, 4).float()
    y = equinorm.adaptive_instance_norm(content, style)
    assert_close(y, style.mean((2, 3), keepdim=True).double().expand(1, 2, 3, 3))
    assert_close(equinorm.adaptive_instance_norm(maps(1, 2, 1, 1).float(), style), style.mean((2, 3), keepdim=True).double())
    flat = torch.full((1, 2, 4, 4), 3.0, requires_grad=True)
    equinorm.adaptive_instance_norm(style, flat).square().sum().backward()
    assert flat.grad.isfinite().all()


def test_generator_form_is_instance_norm_while_its_map_is_zero():
    norm, x = equinorm.AdaptiveInstanceNorm(3, 4).double(), maps(2, 3, 6, 5)
    torch.nn.init.zeros_(norm.projection.weight)
    assert_close(norm(x, maps(2, 4)), equinorm.InstanceNorm(3)(x))


def test_generator_form_starts_with_unit_styles():
    norm = equinorm.AdaptiveInstanceNorm(400, 256)
    out = norm.projection(torch.randn(300, 256))
    assert abs(out.std().item() - 1) < 0.02
    assert not norm.projection.bias.any()


@pytest.mark.parametrize(
    ("style", "options", "pattern"),
    [
        (torch.zeros(3, 3, 4, 4), {}, r"must have 2 samples.* got statistics of shape \(3, 3\)"),
        (torch.zeros(2, 4, 4, 4), {}, r"4 channels where 3"),
        (torch.zeros(2, 3), {}, r"at least one spatial dimension"),
        (torch.zeros(2, 3, 4, 4), {"strength": 1.5}, r"strength must be in \[0, 1\].* got 1.5"),
        (torch.zeros(2, 3, 4, 4), {"style_mask": torch.ones(2, 5, 5, dtype=torch.bool)}, r"mask must have shape"),
        (Style(torch.zeros(2, 3), torch.ones(2, 3)), {"style_mask": torch.ones(2, 4, 4, dtype=torch.bool)}, r"style_mask belongs"),
    ],
)
def test_bad_styles_are_refused(style, options, pattern):
    with pytest.raises(ValueError, match=pattern):
        equinorm.AdaptiveInstanceNorm(3)(torch.randn(2, 3, 6, 5), style, **options)


@pytest.mark.parametrize(
    ("style", "error", "pattern"),
    [
        (torch.zeros(2, 5), ValueError, r"condition must have shape \(2, 4\).* got \(2, 5\)"),
        (torch.zeros(3, 4), ValueError, r"condition must have shape \(2, 4\).* got \(3, 4\)"),
        (torch.zeros(2, 4, dtype=torch.long), TypeError, r"condition must be floating point, got torch.int64"),
        (Style(torch.zeros(2, 3), torch.ones(2, 3)), ValueError, r"style must be a vector"),
    ],
)
def test_bad_style_vectors_are_refused(style, error, pattern):
    with pytest.raises(error, match=rf"AdaptiveInstanceNorm: .*{pattern}"):
        equinorm.AdaptiveInstanceNorm(3, 4)(torch.randn(2, 3, 6, 5), style)
