"""Small networks of the families that surgery meets, with norms whose values no default gives away."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def stir(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every norm its own factors, summands and estimates; return the model in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)

    def between(low: float, high: float, tensor: Tensor) -> None:
        tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator, dtype=torch.float64))

    with torch.no_grad():
        for module in model.modules():
            if "norm" not in type(module).__name__.lower() and "bn" not in type(module).__name__.lower():
                continue
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if name in ("running_var", "running_std", "weight", "running_phi"):
                    between(0.4, 1.8, tensor)
                elif name in ("running_mean", "bias", "log_scale"):
                    between(-0.7, 0.7, tensor)
    return model.eval()


def settle(model: nn.Module, x: Tensor) -> nn.Module:
    """Let the running estimates be those of ``x``, as after training; return the model in evaluation mode."""
    momenta = {module: module.momentum for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    for module in momenta:
        module.reset_running_stats()
        module.momentum = None
    with torch.no_grad():
        model.train()(x)
    for module, momentum in momenta.items():
        module.momentum = momentum
    return model.eval()


class Residual(nn.Module):
    """The block of ResNet: two convolutions with batch norm, and a shortcut that has its own."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


class InvertedResidual(nn.Module):
    """The block of MobileNetV2: expand, depthwise, project, each with batch norm."""

    def __init__(self, channels: int, expand: int = 4) -> None:
        super().__init__()
        hidden = channels * expand
        self.layers = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class BatchNormAct2d(nn.BatchNorm2d):
    """The fused form of timm: a batch norm that drops and activates."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.SiLU(inplace=True)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return self.act(self.drop(super().forward(input)))


class LayerNorm2d(nn.LayerNorm):
    """The layer norm of ConvNeXt: over the channels of (N, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FrozenBatchNorm2d(nn.Module):
    """The frozen batch norm of detection code: four buffers, no parameters."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


class LlamaRMSNorm(nn.Module):
    """The RMS norm of Llama, as transformers has it."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


class GemmaRMSNorm(nn.Module):
    """The RMS norm of Gemma, which stores its weight minus one."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.weight) * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


def resnet() -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(stem, Residual(8, 8), Residual(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def mobilenet() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2, bias=False), nn.BatchNorm2d(6), nn.ReLU6(), InvertedResidual(6), InvertedResidual(6))


def efficientnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        BatchNormAct2d(8),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        BatchNormAct2d(8),
        nn.Conv2d(8, 12, 1, bias=False),
        nn.BatchNorm2d(12),
    )


def dcgan() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(3, 16, 4, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(True),
        nn.ConvTranspose2d(16, 12, 4, 2, 1, groups=4, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(True),
        nn.ConvTranspose2d(12, 3, 4, 2, 1),
        nn.Tanh(),
    )


def convnext() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 4), LayerNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, groups=8), LayerNorm2d(8), nn.Conv2d(8, 16, 1)
    )


class Transformer(nn.Module):
    """Two blocks of a transformer without attention, on tokens (N, T, C), returning a mapping."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm, width: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.norms = nn.ModuleList(norm(width) for _ in range(2))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width)) for _ in range(2))

    def forward(self, tokens: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(tokens)
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            x = x + mlp(norm(x))
        return {"last": x if scale is None else x * scale, "mean": x.mean(1)}
