"""Models of timm and transformers with random weights, small, built without a network."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn


class _Named(type):
    """A class whose every attribute is its own name."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Torchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for torchvision, which timm imports for its data pipeline, and whose wheels fit one build of torch each."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "torchvision" else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: _Named(name, (), {}) if not name.startswith("__") else _missing(name)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing is in it."""


def _missing(name: str) -> Any:
    raise AttributeError(name)


def timm() -> Any:
    """The package; the test is skipped where it is not installed."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed: pip install --no-deps timm huggingface_hub safetensors")
    transformers()  # asks for torchvision, too, and takes a stand-in for the real one
    stand_in = _Torchvision()
    absent = importlib.util.find_spec("torchvision") is None
    if absent:
        sys.meta_path.append(stand_in)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import timm
    finally:
        if absent:
            sys.meta_path.remove(stand_in)
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
    return timm


def transformers() -> Any:
    """The package; the test is skipped where it is not installed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if importlib.util.find_spec("transformers") is None:
        pytest.skip('transformers is not installed: pip install "equinorm[models]"')
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        transformers.ResNetModel  # noqa: B018 - loads what all models share
    return transformers


def _timm(name: str, size: int = 64, **options: Any) -> Callable[[], tuple[nn.Module, Any]]:
    def make() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        return timm().create_model(name, pretrained=False, num_classes=7, **options), torch.randn(2, 3, size, size)

    return make


def _transformers(name: str, **config: Any) -> Callable[[], tuple[nn.Module, Any]]:
    def make() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        package = transformers()
        settings = getattr(package, f"{name}Config")(**config)
        model = getattr(package, f"{name}Model")(settings)
        if hasattr(settings, "vocab_size"):
            return model, {"input_ids": torch.arange(24).reshape(2, 12) % settings.vocab_size}
        return model, {"pixel_values": torch.randn(2, 3, 64, 64)}

    return make


_TEXT = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}

# Convolutional families in which every batch norm follows a convolution that nobody else reads.
WHOLE: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "timm resnet18": _timm("resnet18"),
    "timm mobilenetv2": _timm("mobilenetv2_035"),
    "timm mobilenetv3": _timm("mobilenetv3_small_050"),
    "timm efficientnet": _timm("efficientnet_lite0", 48),
    "timm regnety": _timm("regnety_002"),
    "timm ghostnet": _timm("ghostnet_050"),
    "transformers ResNet, basic": _transformers("ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic"),
    "transformers ResNet, bottleneck": _transformers("ResNet", embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1]),
    "transformers MobileNetV1": _transformers("MobileNetV1", depth_multiplier=0.25, image_size=64),
    "transformers MobileNetV2": _transformers("MobileNetV2", depth_multiplier=0.35, image_size=64),
    "transformers RegNet": _transformers("RegNet", embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], groups_width=8),
    "transformers EfficientNet": _transformers("EfficientNet", image_size=64, hidden_dim=384, width_coefficient=0.3, depth_coefficient=0.3),
}
# Families in which some norms have no linear layer beside them, or whose weights are computed.
PARTLY: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "timm densenet": _timm("densenet121", 32, growth_rate=8, block_config=(2, 2), bn_size=2),
    "timm repvgg": _timm("repvgg_a0", 32),
    "timm levit": _timm("levit_conv_128s", 224),
}
# Families without batch norm whose weights are computed.
COMPUTED = {"timm nf_regnet": _timm("nf_regnet_b0", 32), "timm resnetv2": _timm("resnetv2_50x1_bit", 32)}
# Families of layer and RMS norms.
SAMPLE: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "timm convnext": _timm("convnext_atto", depths=(1, 1, 1, 1)),
    "timm vit": _timm("vit_tiny_patch16_224", 224, depth=2),
    "transformers ConvNext": _transformers("ConvNext", hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1]),
    "transformers Bert": _transformers("Bert", **_TEXT),
    "transformers Llama": _transformers("Llama", **_TEXT, num_key_value_heads=2),
    "transformers Gemma": _transformers("Gemma", **_TEXT, num_key_value_heads=2, head_dim=8),
    "transformers GPT2": _transformers("GPT2", vocab_size=31, n_embd=32, n_layer=2, n_head=4),
}
