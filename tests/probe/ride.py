"""What the callback costs a training loop: ``python -m tests.probe.ride``. Interleaved runs, processor time."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

import equinorm
from tests.probe import networks as net


def models():
    torch.manual_seed(0)
    yield "VGG, 16 x 3 x 32 x 32", net.vgg(), torch.randn(16, 3, 32, 32)
    yield "MLP, 8 layers of 512, batch 256", net.mlp(8, 512, inputs=512), torch.randn(256, 512)
    yield (
        "transformer, 4 layers of 128, 16 x 64",
        nn.TransformerEncoder(nn.TransformerEncoderLayer(128, 4, 256, batch_first=True), 4),
        torch.randn(16, 64, 128),
    )


def seconds(model, x, optimizer, steps):
    start = time.process_time()
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return time.process_time() - start


def overhead(model, x, every=100, rounds=5):
    """Seconds per step without, what one observed step costs more, and the share of that at one sample every ``every`` steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    seconds(model, x, optimizer, 10)
    plain, between, observed = [], [], []
    for _ in range(rounds):
        plain.append(seconds(model, x, optimizer, 20) / 20)
        with equinorm.probe.ProbeCallback(model, optimizer, every=10**9):
            observed.append(seconds(model, x, optimizer, 1))
            between.append(seconds(model, x, optimizer, 20) / 20)
    step, idle, sample = (statistics.median(times) for times in (plain, between, observed))
    return step, sample - step, (sample - step) / (every * step), idle / step - 1


def main():
    print("model, ms per step, ms more per observed step, overhead at every 100th step, of steps between")
    for name, model, x in models():
        step, more, share, idle = overhead(model, x)
        print(f"{name}: {1000 * step:.2f}, {1000 * more:.2f}, {share:.2%}, {idle:.2%}")


if __name__ == "__main__":
    main()
