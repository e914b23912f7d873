"""Compile the Triton kernels for compute capability 9.0, without a device, as the operators would launch them; print what became of them.

Run as ``python -m tests.kernels.compiled``: a list of objects in JSON.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from equinorm.kernels import gpu

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
STREAMS = {"_moments", "_map", "_reduce", "_row_forward", "_row_backward", "_wide_forward", "_wide_sums", "_wide_backward"}
SUMS = {"_moments", "_reduce", "_wide_sums"}  # they write a number or two for each run


class Hopper:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


found: list[dict[str, Any]] = []
seen: set[str] = set()
compile_and_launch = jit.JITFunction.run


def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    kernel = compile_and_launch(self, *args, grid=grid, warmup=True, **options)
    if kernel.hash not in seen:
        seen.add(kernel.hash)
        found.append(describe(self.fn.__name__, kernel, options))
    return kernel


def describe(name: str, kernel: Any, options: dict[str, Any]) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOL, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{label}:(\d+)", usage)[1]) for label in ("REG", "STACK"))
    ptx = kernel.asm["ptx"]
    return {
        "name": name,
        "options": {key: str(value) for key, value in options.items()},
        "registers": registers,
        "stack bytes": stack,
        "shared bytes": kernel.metadata.shared,
        "streams": name in STREAMS,
        "writes": name in STREAMS - SUMS,
        "widest load": max([16 * ("cp.async.cg" in ptx), *widths("ld", ptx)]),
        "widest store": max(widths("st", ptx)),
    }


def widths(access: str, ptx: str) -> list[int]:
    """Bytes of each access to global memory by one thread."""
    found = re.findall(rf"\b{access}\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)", ptx)
    return [int(vector or 1) * int(bits) // 8 for vector, bits in found]


def channel(shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> None:
    x = torch.empty(shape, dtype=dtype)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
    small = torch.zeros(1, shape[1], dtype=torch.float64)
    gpu.moments(x, "batch")
    gpu.reduce(x, x, small, "batch")
    gpu.affine(x, small, small, small)
    gpu.backward(x, x, small, small, small, small)


def row(rows: int, groups: int, k: int, s: int, dtype: torch.dtype) -> None:
    x, weight = torch.empty(rows, k * s, dtype=dtype), torch.empty(groups * k, dtype=dtype)
    shape = {"rows": rows, "groups": groups, "k": k, "s": s, "measured": k * s, "centered": True}
    _, center, rstd = gpu.row_forward(x, weight, weight, eps=1e-5, **shape)
    gpu.row_backward(x, x, weight, center, rstd, wanted=(True, True, True), **shape)


def main() -> None:
    warnings.simplefilter("ignore")
    driver.set_active(Hopper())
    jit.JITFunction.run = only_compile
    assert gpu.available(), gpu.reason()
    channel((64, 256, 32, 32), torch.float32, last=False)
    channel((64, 256, 32, 32), torch.bfloat16, last=True)
    channel((64, 3, 224, 224), torch.float32, last=True)
    row(2048, 1, 1024, 1, torch.bfloat16)
    row(2048, 1, 8192, 1, torch.float32)
    row(2048, 1, 32768, 1, torch.bfloat16)
    row(2048, 32, 8, 1024, torch.bfloat16)
    row(1, 1, 1, 1, torch.bfloat16)  # sizes of 1 become constants of the kernel
    for kernel in found[-2:]:
        kernel["streams"] = False  # one element
    moments = torch.zeros(1, 5, dtype=torch.float64)
    gpu.running_update(torch.zeros(5), torch.ones(5), moments, moments, 0.1, 1.0)
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
