"""Which tensors the kernels take as they are."""

from __future__ import annotations

import pytest
import torch

from equinorm.kernels import dense


@pytest.mark.parametrize("spatial", [(), (5,), (5, 3), (5, 3, 2), (2, 3, 2, 2)])
def test_both_dense_layouts_of_any_rank_are_taken_without_a_copy(spatial):
    first = torch.randn(3, 4, *spatial)
    last = torch.randn(3, *spatial, 4).movedim(-1, 1)
    assert dense(first) is first
    assert dense(last) is last


def test_other_strides_are_copied():
    gaps = torch.randn(3, 4, 10)[..., ::2]
    assert dense(gaps).is_contiguous()
    assert torch.equal(dense(gaps), gaps)
    transposed = torch.randn(5, 4, 3).transpose(0, 2)  # neither channels first nor last
    assert dense(transposed).is_contiguous()
