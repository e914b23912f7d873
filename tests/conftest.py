"""Every test starts from the same state: seeded, float32, poisoned memory; and leaves none of its own behind."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.helpers import poisoned_memory


@pytest.fixture(autouse=True)
def _same_start(request: pytest.FixtureRequest) -> Iterator[None]:
    # The seed comes from the test's name: the same alone, in the suite and on any worker, and different between tests.
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float32)
    with poisoned_memory(), torch.enable_grad():
        yield
    torch.set_default_dtype(torch.float32)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # compiled variants of one test do not count against the limit of the next


@pytest.fixture
def threads() -> Callable[[int], None]:
    """Return a function that sets the number of threads of torch's operators; the test's end restores it."""
    return torch.set_num_threads
