"""Reused pages: the effect is counted in page faults, in processes of their own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

import equinorm
from equinorm.kernels import pages

COUNT = """
import resource, sys, torch, equinorm
if sys.argv[1] == "reused":
    assert equinorm.reuse_pages() is True
x = torch.zeros(64, 1 << 18)  # 64 MiB
x.clone()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    x.clone()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode):
    return int(subprocess.run([sys.executable, "-c", COUNT, mode], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_serves_the_next_tensor():
    fresh, reused = faults("default"), faults("reused")
    assert fresh > 100, "new pages at every clone, or there is nothing to save"
    assert reused < fresh / 10


def test_another_c_library_is_told_of(monkeypatch):
    monkeypatch.setattr(pages.platform, "libc_ver", lambda: ("", ""))
    with pytest.warns(RuntimeWarning, match="reuse_pages needs the allocator of glibc, .* nothing was changed"):
        assert equinorm.reuse_pages() is False
