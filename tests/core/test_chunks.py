"""Moments pooled over runs of consecutive samples, against a loop over torch's own split."""

from __future__ import annotations

import pytest
import torch

from equinorm.core.measure import measure
from tests.helpers import assert_close


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("n", "chunks"), [(6, 3), (7, 3), (8, 3), (5, 5), (4, 1)])
def test_over_chunks_is_the_batch_of_each_chunk(n, chunks, masked):
    x = torch.randn(n, 3, 4, dtype=torch.float64)
    mask = torch.rand(n, 1, 4) < 0.6 if masked else torch.ones(n, 1, 4, dtype=torch.bool)
    found = measure(x, mask=mask if masked else None).over_chunks(chunks)
    pieces = zip(x.tensor_split(chunks), mask.tensor_split(chunks), strict=True)
    parts = [measure(piece, per="batch", mask=known) for piece, known in pieces]
    assert_close(found.mean, torch.cat([part.mean for part in parts]))
    assert_close(found.var, torch.cat([part.var for part in parts]))
    assert_close(torch.as_tensor(found.count), torch.stack([torch.as_tensor(part.count).double().reshape(1) for part in parts]))


def test_no_samples_are_one_empty_chunk():
    found = measure(torch.randn(0, 3, 4)).over_chunks(1)
    assert found.mean.shape == (1, 3)
    assert found.count.tolist() == [[0.0]]
