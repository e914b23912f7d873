"""Large outputs in memory that the process already has: an opt-in of the user, because it concerns the whole process.

glibc serves an allocation of 32 MiB and more, and at first one of 128 KiB and more, with pages newly mapped from the system, and returns
them when it is freed. The system fills each page with zeros at its first touch, which costs several times what a norm does with it.
"""

from __future__ import annotations

import ctypes
import platform
import sys
import warnings

# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def reuse_pages() -> bool:
    """Let this process keep the memory that it frees, so that new tensors reuse it. Call it once, before the first large tensor.

    What it costs: freed memory serves later tensors and is not returned to the system before the process ends, so the process stays as
    large as it ever was; and as blocks of all sizes share one heap, gaps can make it somewhat larger. It holds for every allocation of the
    process, not only for this package's. It has no effect on other devices than the CPU.

    It sets glibc's ``M_MMAP_MAX`` to 0 and turns ``M_TRIM_THRESHOLD`` off. Without Python the same is the environment variables
    ``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1``.

    Returns:
        whether it took effect. It does not where the C library is not glibc; then a warning says so.

    Example:
        >>> import equinorm
        >>> equinorm.reuse_pages()  # doctest: +SKIP
        True
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        warnings.warn(
            f"reuse_pages needs the allocator of glibc, which {platform.system()} with {platform.libc_ver()[0] or 'this C library'} has "
            "not; nothing was changed. An allocator that keeps memory, such as jemalloc or mimalloc, can be preloaded instead",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))
