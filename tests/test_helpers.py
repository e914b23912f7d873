"""The checks can fail: each helper is shown wrong input once."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.helpers import RankError, assert_close, assert_grads_close, run_ranks
from tests.tolerances import GRADIENT, OUTPUT, relative_error


@pytest.mark.parametrize("dtype", OUTPUT, ids=str)
def test_assert_close_holds_the_line(dtype):
    expected = torch.linspace(-4, 4, 9, dtype=torch.float64).reshape(3, 3)
    slip = torch.zeros(3, 3, dtype=torch.float64)
    slip[1, 2] = 4 * OUTPUT[dtype].rtol
    assert_close((expected + 0.9 * slip), expected, dtype=dtype)
    with pytest.raises(AssertionError, match=r"batch norm: off by .* at \(1, 2\)"):
        assert_close((expected + 1.1 * slip), expected, dtype=dtype, label="batch norm")


def test_assert_close_refuses_shapes_and_nan():
    with pytest.raises(AssertionError, match=r"output: shape \(2,\), expected \(1, 2\)"):
        assert_close(torch.zeros(2), torch.zeros(1, 2))
    for got, want in [(float("nan"), 0.0), (0.0, float("nan")), (float("inf"), -float("inf")), (0.0, float("inf"))]:
        with pytest.raises(AssertionError, match=r"NaN or infinite .* first at \(1,\)"):
            assert_close(torch.tensor([1.0, got]), torch.tensor([1.0, want]))
    assert_close(torch.tensor([float("nan"), float("inf"), 1.0]), torch.tensor([float("nan"), float("inf"), 1.0]))


def test_assert_grads_close_names_every_failure():
    good = {"x": torch.ones(2), "weight": torch.ones(2), "bias": None}
    assert_grads_close(good, good)
    slip = 3 * GRADIENT[torch.float32].rtol
    with pytest.raises(AssertionError) as error:
        assert_grads_close({"x": torch.ones(2) + slip, "weight": None, "bias": torch.ones(1)}, good)
    assert "x: off by" in str(error.value)
    assert "weight: is missing" in str(error.value)
    assert "bias: is there but should be None" in str(error.value)
    with pytest.raises(AssertionError, match="expected"):
        assert_grads_close({"x": torch.ones(2)}, good)


def test_relative_error_is_per_group():
    expected = torch.tensor([[1e6, 1e6], [1.0, 2.0], [0.0, 0.0]])
    actual = torch.tensor([[1e6, 1e6], [1.0, 2.5], [0.0, 0.0]])
    assert relative_error(actual, expected, over=(1,)).tolist() == [0.0, 0.25, 0.0]
    assert relative_error(actual, expected).item() == 0.5 / 1e6


@pytest.mark.parametrize(
    "make", [lambda: torch.empty(1000), lambda: torch.ones(1000).new_empty(1000), lambda: torch.empty_like(torch.ones(9))]
)
def test_memory_is_poisoned(make):
    assert make().isnan().all()


def test_threads_are_restored(threads):
    threads(3)
    assert torch.get_num_threads() == 3


def _sum(rank, factor):
    total = torch.tensor(float(rank + 1)) * factor
    dist.all_reduce(total)
    return rank, dist.get_world_size(), total


def _raise_on_one(rank):
    if rank == 1:
        raise ValueError("one value per channel")
    dist.all_reduce(torch.zeros(1))


def _hang(rank):
    if rank == 0:
        time.sleep(600)


def _die(rank):
    if rank == 1:
        os._exit(7)
    dist.all_reduce(torch.zeros(1))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_run_ranks_forms_a_group(world_size):
    total = 2.0 * sum(range(1, world_size + 1))
    assert run_ranks(world_size, _sum, 2.0) == [(rank, world_size, torch.tensor(total)) for rank in range(world_size)]


def test_run_ranks_names_the_rank_that_raised():
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2:.*ValueError: one value per channel"):
        run_ranks(2, _raise_on_one)


def test_run_ranks_names_the_rank_that_died():
    with pytest.raises(RankError, match="rank 1 of 2 died with exit code 7"):
        run_ranks(2, _die)


def test_run_ranks_names_the_rank_that_hangs():
    with pytest.raises(RankError, match=r"ranks \[0.*\] of 2 had not finished after 3 s"):
        run_ranks(2, _hang, timeout=3)
