"""Peak memory of a cell, which runs in a process of its own.

On a GPU: the most bytes that torch had allocated. On the CPU: by how much the process's peak resident memory grew after the task's module
was imported; this includes the task's data, and for small tasks differences of a few MB are noise.
"""

from __future__ import annotations

import sys

import torch

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None


class PeakMemory:
    """Starts to measure when it is made.

    Args:
        device: where the task computes.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._cuda = self._device.type == "cuda"
        self._start = self._peak()

    def bytes(self) -> int | None:
        """The peak since the start; None where the system does not tell."""
        peak = self._peak()
        if peak is None or self._start is None:
            return None
        return peak if self._cuda else peak - self._start

    def _peak(self) -> int | None:
        if self._cuda:
            return torch.cuda.max_memory_allocated(self._device)
        if resource is None:
            return None
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
