"""One value for all processes."""

from __future__ import annotations

import pytest
import torch

from equinorm.core.sync import agree
from tests.helpers import run_ranks


def _rank(rank):
    value = torch.full((2, 3), float(rank), dtype=torch.float64)
    results = [agree(value, present, "world")[0, 0].item() for present in (True, rank == 2, rank > 0, False)]
    with pytest.raises(RuntimeError, match=r"channels \[3, 4, 3\]"):
        agree(value if rank != 1 else torch.zeros(2, 4, dtype=torch.float64), True, "world")
    return results


def test_all_processes_take_the_first_that_has_one():
    assert run_ranks(3, _rank) == [[0.0, 2.0, 1.0, 0.0]] * 3
    alone = torch.ones(2, 3)
    assert agree(alone, False, None) is alone
