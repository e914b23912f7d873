"""Small networks of the usual architectures, written as their papers draw them, at torch's or their own standard initialisation."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F


def kaiming(model, nonlinearity="relu", mode="fan_out"):
    """He's initialisation of every convolution and linear layer."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity=nonlinearity)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def mlp(depth=8, width=128, activation=nn.ReLU, inputs=64, outputs=10):
    """Linear layers 0, 2, 4 ... with activations between them, He initialised for ReLU."""
    layers = []
    for i in range(depth):
        layers += [nn.Linear(inputs if i == 0 else width, width), activation()]
    return kaiming(nn.Sequential(*layers, nn.Linear(width, outputs)), mode="fan_in")


def linears(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def vgg(widths=(16, 16, "pool", 32, 32, "pool", 64, 64, "pool"), norm=nn.BatchNorm2d, classes=10, bias=True):
    layers, c = [], 3
    for width in widths:
        if width == "pool":
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(c, width, 3, padding=1, bias=bias), norm(width), nn.ReLU(inplace=True)]
        c = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, classes))


class BasicBlock(nn.Module):
    """He et al. 2016a."""

    def __init__(self, c_in, c, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c, c, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)
        self.downsample = None
        if stride != 1 or c_in != c:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c, 1, stride, bias=False), nn.BatchNorm2d(c))

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class PreActBlock(nn.Module):
    """He et al. 2016b."""

    def __init__(self, c_in, c, stride=1):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c, c, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(c_in, c, 1, stride, bias=False) if stride != 1 or c_in != c else None

    def forward(self, x):
        out = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(out)
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return out + skip


class ResNet(nn.Module):
    def __init__(self, block, width=16, blocks=(2, 2, 2, 2), classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages, c = [], width
        for i, count in enumerate(blocks):
            for j in range(count):
                stages.append(block(c, width << i, 2 if i and not j else 1))
                c = width << i
        self.blocks = nn.Sequential(*stages)
        self.fc = nn.Linear(c, classes)
        kaiming(self)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(self.blocks(x).mean((2, 3)))


class NormFreeBlock(nn.Module):
    """A residual block without norm: its sum has twice the variance unless it is scaled."""

    def __init__(self, width, scale=1.0):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)
        self.scale = scale
        kaiming(self, mode="fan_in")

    def forward(self, x):
        return (x + self.fc2(F.relu(self.fc1(x)))) * self.scale


class ViT(nn.Module):
    def __init__(self, width=64, depth=4, heads=4, patch=8, size=32, classes=10):
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.pos = nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*[AttentionBlock(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        return self.head(self.norm(self.blocks(x))[:, 0])


class AttentionBlock(nn.Module):
    """Pre-LN, with torch's fused attention."""

    def __init__(self, width, heads, causal=False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads, self.causal = heads, causal

    def attend(self, x):
        n, t, c = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).reshape(n, t, c))

    def forward(self, x):
        x = x + self.attend(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, vocabulary=100, width=64, depth=4, heads=4, length=32):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*[AttentionBlock(width, heads, causal=True) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x)))


class LlamaBlock(nn.Module):
    """Touvron et al. 2023, without positions: RMS norms, gated units, every projection a layer of its own."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2, self.heads = nn.RMSNorm(width), nn.RMSNorm(width), heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up, self.down = (nn.Linear(a, b, bias=False) for a, b in ((width, 128), (width, 128), (128, width)))

    def forward(self, x):
        n, t, c = x.shape
        y = self.norm1(x)
        q, k, v = (layer(y).view(n, t, self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, t, c))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    def __init__(self, vocabulary=100, width=64, depth=4):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*[LlamaBlock(width, 4) for _ in range(depth)])
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids):
        return self.head(self.norm(self.blocks(self.tokens(ids))))


class Encoder(nn.Module):
    """torch's encoder over tokens, with a classifier on the mean."""

    def __init__(self, depth=3, width=64, norm_first=True, dropout=0.1):
        super().__init__()
        self.embed = nn.Embedding(100, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=dropout, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, ids):
        return self.head(self.encoder(self.embed(ids)).mean(1))


class Tagger(nn.Module):
    """An LSTM with an output at each step."""

    def __init__(self, width=64):
        super().__init__()
        self.embed = nn.Embedding(100, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, ids):
        return self.head(self.lstm(self.embed(ids))[0])


class LastStep(nn.Module):
    """A recurrent layer whose last step alone is used."""

    def __init__(self, rnn, width=64):
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def dcgan(model):
    """Radford et al. 2016: N(0, 0.02) for convolutions, N(1, 0.02) for the norms' weights."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
    return model


def generator(z=64, c=32):
    return dcgan(
        nn.Sequential(
            nn.ConvTranspose2d(z, 4 * c, 4, 1, 0, bias=False), nn.BatchNorm2d(4 * c), nn.ReLU(True),
            nn.ConvTranspose2d(4 * c, 2 * c, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * c), nn.ReLU(True),
            nn.ConvTranspose2d(2 * c, c, 4, 2, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU(True),
            nn.ConvTranspose2d(c, 3, 4, 2, 1, bias=False), nn.Tanh(),
        )
    )  # fmt: skip


def discriminator(c=32):
    return dcgan(
        nn.Sequential(
            nn.Conv2d(3, c, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True),
            nn.Conv2d(c, 2 * c, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * c), nn.LeakyReLU(0.2, True),
            nn.Conv2d(2 * c, 4 * c, 4, 2, 1, bias=False), nn.BatchNorm2d(4 * c), nn.LeakyReLU(0.2, True),
            nn.Conv2d(4 * c, 1, 4, 1, 0, bias=False), nn.Flatten(),
        )
    )  # fmt: skip


class ConvNeXtBlock(nn.Module):
    """Liu et al. 2022, with the layer scale of 1e-6."""

    def __init__(self, c):
        super().__init__()
        self.dwconv = nn.Conv2d(c, c, 7, padding=3, groups=c)
        self.norm = nn.LayerNorm(c, eps=1e-6)
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(c, 4 * c), nn.GELU(), nn.Linear(4 * c, c)
        self.gamma = nn.Parameter(1e-6 * torch.ones(c))

    def forward(self, x):
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.pwconv2(self.act(self.pwconv1(y)))).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self, c=32, depth=4):
        super().__init__()
        self.stem = nn.Conv2d(3, c, 4, 4)
        self.stem_norm = nn.GroupNorm(1, c)
        self.blocks = nn.Sequential(*[ConvNeXtBlock(c) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(c), nn.Linear(c, 10)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.stem_norm(self.stem(x))).mean((2, 3))))


class InvertedResidual(nn.Module):
    """Sandler et al. 2018."""

    def __init__(self, c_in, c, stride, expand=4):
        super().__init__()
        h = c_in * expand
        self.conv = nn.Sequential(
            nn.Conv2d(c_in, h, 1, bias=False), nn.BatchNorm2d(h), nn.ReLU6(True),
            nn.Conv2d(h, h, 3, stride, 1, groups=h, bias=False), nn.BatchNorm2d(h), nn.ReLU6(True),
            nn.Conv2d(h, c, 1, bias=False), nn.BatchNorm2d(c),
        )  # fmt: skip
        self.skip = stride == 1 and c_in == c

    def forward(self, x):
        return x + self.conv(x) if self.skip else self.conv(x)


def mobilenet():
    return kaiming(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(True),
            InvertedResidual(16, 24, 2), InvertedResidual(24, 24, 1), InvertedResidual(24, 32, 1), InvertedResidual(32, 32, 1),
            nn.Conv2d(32, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU6(True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Dropout(0.2), nn.Linear(64, 10),
        )
    )  # fmt: skip


class UNet(nn.Module):
    """Ronneberger et al. 2015, with batch norm."""

    def __init__(self, c=16):
        super().__init__()

        def double(c_in, c):
            return nn.Sequential(
                nn.Conv2d(c_in, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU(True), nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c),
                nn.ReLU(True)
            )  # fmt: skip

        self.down1, self.down2, self.middle = double(3, c), double(c, 2 * c), double(2 * c, 4 * c)
        self.up2, self.up1 = nn.ConvTranspose2d(4 * c, 2 * c, 2, 2), nn.ConvTranspose2d(2 * c, c, 2, 2)
        self.dec2, self.dec1 = double(4 * c, 2 * c), double(2 * c, c)
        self.out = nn.Conv2d(c, 2, 1)

    def forward(self, x):
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        y = self.middle(F.max_pool2d(b, 2))
        y = self.dec2(torch.cat([b, self.up2(y)], 1))
        return self.out(self.dec1(torch.cat([a, self.up1(y)], 1)))


def selu_net(depth=12, width=128):
    """Klambauer et al. 2017: LeCun's initialisation."""
    model = mlp(depth, width, nn.SELU)
    for layer in linears(model):
        nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features))
    return model
