"""Statistics across processes: what disagrees is an error on every rank, soon; what agrees costs one collective."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from equinorm.core import Moments
from equinorm.core.sync import BLOCK, gather
from tests.helpers import assert_close, run_ranks

# What each of three ranks brings: (channels, whether its input needs a gradient).
DISAGREEMENTS = {
    "few channels": ((6, True), (8, True), (6, True)),
    "one message or two": ((6, True), (6, True), (2 * BLOCK, True)),
    "two messages": ((BLOCK, True), (BLOCK, True), (2 * BLOCK, True)),
    "gradient": ((6, True), (6, True), (6, False)),
}


def local(rank, channels, gradient=True):
    values = torch.randn(1, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    return Moments(values.requires_grad_(gradient), values.detach().square().requires_grad_(gradient), (5, 0, 2)[rank])


def _disagree(rank):
    messages = {}
    for name, brought in DISAGREEMENTS.items():
        start = time.monotonic()
        with pytest.raises(RuntimeError) as caught:
            gather(local(rank, *brought[rank]), "world")
        messages[name] = str(caught.value), time.monotonic() - start
    # The group is as good as new afterwards.
    return messages, gather(local(rank, 6), "world").mean.detach()


def test_ranks_that_disagree_are_told_so_on_every_rank():
    ranks = run_ranks(3, _disagree)
    for name, said in {"few channels": "channels [6, 8, 6] on ranks 0 to 2", "gradient": "gradient [1, 1, 0] on ranks 0 to 2"}.items():
        assert all(said in messages[name][0] for messages, _ in ranks)
    for name in DISAGREEMENTS:
        assert len({messages[name][0] for messages, _ in ranks}) == 1
        assert max(messages[name][1] for messages, _ in ranks) < 5, "seconds until a disagreement is reported"
    assert all(torch.equal(mean, ranks[0][1]) for _, mean in ranks)


def _agree(rank):
    calls, all_gather = [], dist.all_gather

    def counted(*args, **kwargs):
        calls.append(args)
        return all_gather(*args, **kwargs)

    dist.all_gather = counted
    try:
        results = []
        for channels in (6, 525, 526, 2 * BLOCK):
            before = len(calls)
            pooled = gather(local(rank, channels), "world")
            results.append((channels, len(calls) - before, [part.detach() for part in pooled]))
    finally:
        dist.all_gather = all_gather
    return results


def test_one_collective_up_to_525_channels_and_two_beyond():
    for results in run_ranks(3, _agree):
        for channels, collectives, (mean, var, count) in results:
            ranks = [local(rank, channels) for rank in range(3)]
            together = ranks[0].merge(ranks[1]).merge(ranks[2])
            assert collectives == (1 if channels <= 525 else 2)
            assert count.item() == 7
            assert_close(mean, together.mean, label=f"mean of {channels} channels")
            assert_close(var, together.var, label=f"variance of {channels} channels")
