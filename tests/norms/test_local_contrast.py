"""Local contrast norm and its halves: the authors' numbers, borders, flat regions, windows of any shape."""

from __future__ import annotations

import pytest
import torch

import equinorm
from tests.helpers import assert_close
from tests.references.local import local_contrast

ALL = [equinorm.LocalContrastNorm, equinorm.SubtractiveNorm, equinorm.DivisiveNorm]


def test_the_numbers_of_the_specification():
    x = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    x[0, 0, 2, 2] = 1
    v = equinorm.SubtractiveNorm(3, sigma=None)(x)
    assert v[0, 0, 2, 2].item() == pytest.approx(0.888889, abs=1e-6)
    y = equinorm.LocalContrastNorm(3, sigma=None)(x)
    assert y[0, 0, 2, 2].item() == pytest.approx(2.828427, abs=1e-6)
    assert (v / y)[0, 0, 2, 2].item() == pytest.approx(0.314270, abs=1e-6)
    # where the deviation is below its mean, the mean divides
    corner = (v / y)[0, 0, 1, 1].item()
    floor = (v / equinorm.LocalContrastNorm(3, sigma=None, threshold=1e-9)(x))[0, 0].nan_to_num()
    assert floor[2, 2].item() == pytest.approx(0.314270, abs=1e-6)
    deviations = torch.tensor(
        [[(v[0, 0, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2] ** 2).mean().sqrt() for j in range(5)] for i in range(5)]
    )
    assert deviations.mean().item() == pytest.approx(0.152289, abs=1e-6)
    assert corner >= 0.152289


@pytest.mark.parametrize("sigma", [2.0, 1.591, None])
@pytest.mark.parametrize("shape", [(2, 3, 20), (2, 3, 12, 15), (1, 2, 5, 6, 4)], ids=str)
def test_a_constant_image_comes_out_as_zero_up_to_its_border(sigma, shape):
    for dtype, bound in ((torch.float64, 1e-14), (torch.float32, 1e-5)):
        x = torch.full(shape, 7.0, dtype=dtype)
        assert equinorm.SubtractiveNorm(sigma=sigma)(x).abs().max() <= bound
        assert equinorm.LocalContrastNorm(sigma=sigma)(x).abs().max() <= bound


@pytest.mark.parametrize("size", [5, (3, 7), (1, 5)])
@pytest.mark.parametrize("across", [True, False])
def test_windows_of_any_shape_equal_the_reference(size, across):
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    options = {"kernel_size": size, "sigma": 1.3, "across_channels": across, "detach_threshold": True}
    y, (want, _) = equinorm.LocalContrastNorm(**options)(x), local_contrast(x, {}, **options)
    assert_close(y, want)
    dy = torch.randn_like(x)
    assert_close(*(torch.autograd.grad(out, x, dy)[0] for out in (y, want)), label="gradient")


def test_invariances():
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    norm = equinorm.LocalContrastNorm()
    assert (norm(x + 50) - norm(x)).abs().max() < 5e-13
    assert (norm(x * 8) - norm(x)).abs().max() < 1e-14
    small = x * 1e-9  # below eps the threshold no longer follows
    assert norm(small).abs().max() < 1e-3


@pytest.mark.parametrize("cls", ALL)
def test_flat_inputs_have_a_gradient(cls):
    for value in (0.0, 7.0):
        x = torch.full((1, 2, 6, 6), value, dtype=torch.float64, requires_grad=True)
        (dx,) = torch.autograd.grad(cls(3)(x).square().sum(), x, create_graph=True)
        assert dx.isfinite().all()
        (second,) = torch.autograd.grad(dx.square().sum(), x)
        assert second.isfinite().all()
    half_flat = torch.randn(1, 2, 6, 12, dtype=torch.float64)
    half_flat[..., 6:] = 0
    half_flat.requires_grad_()
    (dx,) = torch.autograd.grad(cls(3)(half_flat).sum(), half_flat)
    assert dx.isfinite().all()


@pytest.mark.parametrize("cls", ALL)
def test_half_types_square_beyond_their_range(cls):
    for dtype in (torch.float16, torch.bfloat16):
        x = (torch.randn(1, 3, 10, 10) * 300).to(dtype)
        assert_close(cls(5)(x), cls(5)(x.double()))


def test_each_channel_alone():
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    apart = equinorm.LocalContrastNorm(5, across_channels=False)(x)
    for c in range(3):
        assert_close(apart[:, c : c + 1], equinorm.LocalContrastNorm(5)(x[:, c : c + 1]))


def test_samples_do_not_share_a_threshold():
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    x[1] *= 100
    norm = equinorm.LocalContrastNorm()
    assert_close(norm(x)[:1], norm(x[:1]))


def test_the_halves_make_the_whole():
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    assert_close(equinorm.DivisiveNorm(5)(equinorm.SubtractiveNorm(5)(x)), equinorm.LocalContrastNorm(5)(x))


def test_what_is_masked_is_like_what_lies_beyond_the_border():
    x = torch.randn(1, 2, 6, 8)
    mask = torch.zeros(1, 6, 8, dtype=torch.bool)
    mask[:, :, :5] = True
    for cls in ALL:
        assert_close(cls(5)(torch.where(mask, x, torch.nan), mask=mask)[..., :5], cls(5)(x[..., :5]).double())


def test_a_sample_without_data_gives_zeros():
    x = torch.randn(2, 2, 4, requires_grad=True)
    mask = torch.tensor([[True] * 4, [False] * 4])
    for cls in ALL:
        y = cls(3)(x, mask=mask)
        assert not y[1].any()
        assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


def test_settings_out_of_range_are_refused():
    for cls in ALL:
        with pytest.raises(ValueError, match=rf"{cls.__name__}: kernel_size must be odd, .* got 4"):
            cls(4)
        with pytest.raises(ValueError, match=rf"{cls.__name__}: sigma must be .* got 0"):
            cls(3, sigma=0.0)
        with pytest.raises(ValueError, match=rf"{cls.__name__}: the input must have shape .* with 2 spatial dimensions, got \(2, 3, 5\)"):
            cls((3, 3))(torch.randn(2, 3, 5))
    with pytest.raises(ValueError, match="LocalContrastNorm: threshold must be \"mean\" or a finite positive number, got 'batch'"):
        equinorm.LocalContrastNorm(threshold="batch")
    with pytest.raises(ValueError, match=r"DivisiveNorm: threshold must be .* got 0"):
        equinorm.DivisiveNorm(threshold=0.0)
