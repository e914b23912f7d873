"""What a probe costs beside one forward and backward pass: processor time and peak memory. ``python -m tests.probe.cost`` prints both.

Each measurement has a process of its own. Time is that of the processor, which a busy machine does not distort; memory is the peak of the
process above what it held before, as Linux counts it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

import equinorm
from tests.probe import networks as net

LOSS = nn.CrossEntropyLoss()


def labelled(x):
    return x, torch.randint(0, 10, (len(x),))


MODELS = {
    "ResNet-18, 32 channels, batch 16 of 64x64": lambda: (net.ResNet(net.BasicBlock, width=32), labelled(torch.randn(16, 3, 64, 64))),
    "ViT, 6 blocks of 256, batch 16 of 128x128": lambda: (
        net.ViT(width=256, depth=6, patch=8, size=128), labelled(torch.randn(16, 3, 128, 128))
    ),
    "Transformer encoder, 6 layers of 256, batch 16 of 128": lambda: (
        net.Encoder(6, width=256), labelled(torch.randint(0, 100, (16, 128)))
    ),
}  # fmt: skip


def status(key):
    """A line of the kernel's account of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


def measure(name, what):
    """Seconds of processor time of the best of three runs, and MiB of peak memory above the resting state."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, batch = MODELS[name]()

    def step():
        LOSS(model(batch[0]), batch[1]).backward()
        model.zero_grad()

    run = step if what == "step" else lambda: equinorm.probe(model, batch, LOSS, gap=what == "probe")
    run()
    resting = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    seconds = []
    for _ in range(3):
        began = time.process_time()
        run()
        seconds.append(time.process_time() - began)
    return min(seconds), status("VmHWM") - resting, resting


def main():
    print(f"{'':56} {'forward+backward':>20} {'probe without gap':>20} {'probe':>20}")
    for name in MODELS:
        rows = {}
        for what in ("step", "bare", "probe"):
            code = f"from tests.probe.cost import measure; print(*measure({name!r}, {what!r}))"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            rows[what] = [float(word) for word in done.stdout.split()]
        step = rows["step"]
        print(f"{name:56} {step[0]:18.2f} s" + "".join(f" {rows[w][0] / step[0]:18.2f} x" for w in ("bare", "probe")))
        peak = {what: seconds_peak[1] + seconds_peak[2] for what, seconds_peak in rows.items()}
        print(
            f"{'  peak memory of the process':56} {peak['step']:16.0f} MiB"
            + "".join(f" {peak[w] / peak['step']:18.2f} x" for w in ("bare", "probe"))
        )


if __name__ == "__main__":
    main()
