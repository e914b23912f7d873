"""Networks that are broken in one known way each, and healthy ones; what the probe says of them. ``./dev diagnose`` prints the table.

Every broken network begins as one that is healthy, and one thing is done to it. It counts as a hit when a finding names the expected kind
and names the expected layer first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import equinorm
from tests.probe import networks as net

CLASSES = 10


def images(n=16, size=32):
    return torch.randn(n, 3, size, size), torch.randint(0, CLASSES, (n,))


def features(n=64, width=64):
    return torch.randn(n, width), torch.randint(0, CLASSES, (n,))


def tokens(n=16, length=24):
    return torch.randint(0, 100, (n, length)), torch.randint(0, CLASSES, (n,))


CROSS_ENTROPY = nn.CrossEntropyLoss()


@dataclass(frozen=True)
class Case:
    """A network and how to probe it.

    Attributes:
        name: of the network.
        build: returns (model, batch, keyword arguments of probe).
        broken: what was done to it; "" for healthy ones.
        kinds: kinds of finding that name the cause; several where two names are equally right.
        layer: the layer that must come first in the finding.
    """

    name: str
    build: Callable[[], tuple[nn.Module, Any, dict[str, Any]]]
    broken: str = ""
    kinds: tuple[str, ...] = ()
    layer: str = ""

    def report(self):
        torch.manual_seed(0)
        model, batch, options = self.build()
        return equinorm.probe(model, batch, **options)

    def hit(self, report):
        """The place of the first finding that is right, from 1; None if there is none."""
        for place, finding in enumerate(report.findings, 1):
            if finding.kind in self.kinds and finding.layers and finding.layers[0] == self.layer:
                return place
        return None


BROKEN: list[Case] = []
HEALTHY: list[Case] = []


def broken(name, what, kinds, layer):
    def add(build):
        BROKEN.append(Case(name, build, what, (kinds,) if isinstance(kinds, str) else kinds, layer))
        return build

    return add


def healthy(name):
    def add(build):
        HEALTHY.append(Case(name, build))
        return build

    return add


def classify(model, batch, **options):
    return model, batch, {"loss_fn": CROSS_ENTROPY, **options}


def seasoned(model, batch, steps=50, momentum=None):
    """Let running estimates learn from batches like this one."""
    model.train()
    with torch.no_grad():
        for _ in range(steps):
            model(torch.randn_like(batch))
    return model


# ------------------------------------------------------------------------------------------------------------------------- gains and scale


@broken("MLP, 16 layers", "weights twice too big", "exploding_forward", "0")
def gain_too_big():
    model = net.mlp(16)
    for layer in net.linears(model)[:-1]:
        layer.weight.data.mul_(2)
    return classify(model, features())


@broken("MLP, 16 layers", "weights half as big as they should be", "vanishing_forward", "0")
def gain_too_small():
    model = net.mlp(16)
    for layer in net.linears(model)[:-1]:
        layer.weight.data.mul_(0.5)
    return classify(model, features())


@broken("MLP, 20 layers", "Glorot's gain of 1 in front of ReLU", "vanishing_forward", "0")
def linear_gain():
    model = net.mlp(20, 256)
    for layer in net.linears(model):
        nn.init.xavier_normal_(layer.weight)
    return classify(model, features())


@broken("convolutions, 12 layers", "torch's default initialisation without norms", "vanishing_forward", "0")
def default_convolutions():
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU()]
    for _ in range(11):
        layers += [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
    return classify(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES)), images(8, 16))


@broken("MLP, 12 layers", "from layer 12 on weights 4 times too big", "exploding_forward", "12")
def explodes_late():
    model = net.mlp(12)
    for layer in net.linears(model)[6:-1]:
        layer.weight.data.mul_(4)
    return classify(model, features())


@broken("MLP, 8 layers", "one layer's weights times 100", "scale_jump", "6")
def one_layer_big():
    model = net.mlp(8)
    model[6].weight.data.mul_(100)
    return classify(model, features())


@broken("MLP, 8 layers", "one layer's weights times 0.01", "scale_jump", "4")
def one_layer_small():
    model = net.mlp(8)
    model[4].weight.data.mul_(0.01)
    return classify(model, features())


@broken("MLP, 30 layers", "sigmoid units, whose slope is at most 1/4", "vanishing_backward", "60")
def sigmoid_depth():
    return classify(net.mlp(30, 128, nn.Sigmoid), features())


@broken("residual MLP, 16 blocks", "no scaling of the residual sums", "residual_growth", "1")
def residual_sums():
    return classify(nn.Sequential(nn.Linear(64, 128), *[net.NormFreeBlock(128) for _ in range(16)], nn.Linear(128, CLASSES)), features())


# ------------------------------------------------------------------------------------------------------------------------- activations


@broken("sigmoid MLP", "weights of layer 2 times 100", "saturation", "3")
def sigmoid_saturation():
    model = net.mlp(4, 64, nn.Sigmoid)
    for layer in net.linears(model):
        nn.init.xavier_normal_(layer.weight)
    model[2].weight.data.mul_(100)
    return classify(model, features())


@broken("tanh MLP", "weights of all layers times 10", "saturation", "1")
def tanh_saturation():
    model = net.mlp(6, 128, nn.Tanh)
    for layer in net.linears(model)[:-1]:
        nn.init.xavier_normal_(layer.weight, gain=10)
    return classify(model, features())


@broken("MLP, 6 layers", "biases of layer 4 at -20", "dead_channels", "5")
def dead_relus():
    model = net.mlp(6)
    model[4].bias.data.fill_(-20)
    return classify(model, features())


@broken("VGG with batch norm", "bias of norm 4 at -6", "dead_channels", "5")
def dead_behind_norm():
    model = net.vgg()
    model[4].bias.data.fill_(-6)
    return classify(model, images())


@broken("GPT", "queries and keys of block 2 a hundred times too big", "peaked_softmax", "blocks.2")
def huge_logits():
    model = net.GPT()
    model.blocks[2].qkv.weight.data[:128].mul_(100)
    ids = torch.randint(0, 100, (8, 24))
    return model, (ids, ids), {"loss_fn": lambda y, ids: F.cross_entropy(y.flatten(0, 1), ids.flatten())}


@broken("convolutional network", "half of the filters of layer 3 at 0", "constant_channels", "3")
def constant_channels():
    model = net.vgg()
    model[3].weight.data[:8].zero_()
    return classify(model, images())


# ------------------------------------------------------------------------------------------------------------------------- numbers


class Functions(nn.Module):
    """Linear layers with one function between them."""

    def __init__(self, function):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(64, 64), Applied(function), nn.Linear(64, CLASSES)

    def forward(self, x):
        return self.last(self.second(F.relu(self.first(x))))


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@broken("features", "logarithm of ReLU's zeros", "not_finite", "second")
def nan_log():
    return classify(Functions(lambda x: torch.log(x) * 0.1), features())


@broken("features", "root of negative numbers", "not_finite", "second")
def nan_sqrt():
    return classify(Functions(lambda x: torch.sqrt(x - 0.1)), features())


@broken("features", "division by a sum that can be 0", "not_finite", "second")
def nan_div():
    return classify(Functions(lambda x: x / (x - x)), features())


@broken("features", "root at 0: finite forward, infinite backward", "not_finite_backward", "second")
def inf_backward():
    return classify(Functions(torch.sqrt), features())


@broken("features", "exponential of large numbers", "not_finite", "second")
def inf_exp():
    return classify(Functions(lambda x: torch.exp(200 * x)), features())


@broken("MLP in float16", "layer 4 beyond 65504", "half_overflow", "4")
def half_overflow():
    model = net.mlp(6)
    model[2].weight.data.mul_(60)
    model[4].weight.data.mul_(3000)
    x, y = features()
    return model.half(), (x.half(), y), {"loss_fn": lambda out, y: F.cross_entropy(out.float(), y)}


@broken("MLP in float16", "loss a million times too small", "half_underflow", "12")
def half_underflow():
    x, y = features()
    return net.mlp(6).half(), (x.half(), y), {"loss_fn": lambda out, y: F.cross_entropy(out.float(), y) * 1e-6}


@broken("VGG without norm on the input", "pixels from 0 to 255", "unnormalized_input", "0")
def pixels():
    _, y = images()
    return classify(net.vgg(), (torch.randint(0, 256, (16, 3, 32, 32)).float(), y))


# ------------------------------------------------------------------------------------------------------------------------- norms


@broken("VGG with batch norm, trained", "running statistics of norm 7 are those of other data", "running_drift", "8")
def stale():
    x, y = images()
    model = seasoned(net.vgg(), x)
    model[8].running_mean.add_(4 * model[8].running_var.sqrt())
    model[8].running_var.mul_(50)
    return classify(model, (x, y))


@broken("ResNet, trained", "input brighter and with more contrast than in training", "running_drift", "bn1")
def shifted_data():
    x, y = images()
    model = seasoned(net.ResNet(net.BasicBlock), x)
    return classify(model, (x * 6 + 2, y))


@broken("VGG with batch norm", "momentum 0.99, taken from another framework", "momentum", "1")
def momentum():
    model = net.vgg()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.99
    return classify(model, images())


@broken("VGG with batch norm, trained", "evaluated after a change of layer 3", ("running_drift", "train_eval_gap"), "4")
def stale_after_change():
    x, y = images()
    model = seasoned(net.vgg(), x)
    model[3].weight.data.mul_(5)
    return classify(model.eval(), (x, y))


@broken("ResNet", "batch of 2", "small_batch", "bn1")
def batch_of_two():
    return classify(net.ResNet(net.BasicBlock), images(2))


@broken("MLP with batch norm", "batch of 1", "small_batch", "1")
def one_value():
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, CLASSES))
    return classify(model, features(1))


@broken("MLP with layer norm", "norm behind a norm", "norm_after_norm", "2")
def norm_after_norm():
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, CLASSES))
    return classify(model, features())


@broken("VGG with batch norm", "convolutions with a bias", "bias_before_norm", "0")
def bias_before_norm():
    return classify(net.vgg(bias=True), images())


@broken("ResNet with SGD", "weight decay on every parameter", "decay_on_affine", "bn1")
def decay_on_affine():
    model = net.ResNet(net.BasicBlock)
    return classify(model, images(), optimizer=torch.optim.SGD(model.parameters(), 0.1, weight_decay=1e-4))


@broken("MLP with batch norm", "dropout in front of the norm", "dropout_before_norm", "3")
def dropout_before_norm():
    model = nn.Sequential(
        nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64,
        CLASSES)
    )  # fmt: skip
    return classify(model, features())


# ------------------------------------------------------------------------------------------------------------------------- recurrence


@broken("RNN with ReLU", "recurrent weight 1.5 times a rotation", "exploding_forward", "rnn")
def exploding_rnn():
    rnn = nn.RNN(64, 64, nonlinearity="relu", batch_first=True)
    rnn.weight_hh_l0.data.copy_(1.5 * torch.eye(64))
    return classify(net.LastStep(rnn), (torch.randn(16, 32, 64), torch.randint(0, CLASSES, (16,))))


@broken("RNN with tanh", "recurrent weight 0.3 times a rotation", "vanishing_backward", "rnn")
def vanishing_rnn():
    rnn = nn.RNN(64, 64, batch_first=True)
    nn.init.orthogonal_(rnn.weight_hh_l0)
    rnn.weight_hh_l0.data.mul_(0.3)
    return classify(net.LastStep(rnn), (torch.randn(16, 32, 64), torch.randint(0, CLASSES, (16,))))


# ------------------------------------------------------------------------------------------------------------------------- training


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = net.mlp(2, 64, outputs=64), net.mlp(2, 64)

    def forward(self, x):
        return self.decoder(self.encoder(x).detach())


@broken("encoder and decoder", "detach between them", "no_gradient", "encoder.4")
def detached():
    return classify(Detached(), features())


@broken("MLP, 6 layers", "layer 6 starts at 0", ("dead_channels", "no_gradient"), "6")
def zero_layer():
    model = net.mlp(6)
    model[6].weight.data.zero_()
    return classify(model, features())


@broken("MLP, 6 layers", "layer 4 frozen by mistake", "frozen", "4")
def frozen_layer():
    model = net.mlp(6)
    model[4].requires_grad_(False)
    return classify(model, features())


@broken("MLP with Adam", "learning rate of layer 2 is 1", "update_size", "2")
def huge_step():
    model = net.mlp(3, 256)
    others = [p for name, p in model.named_parameters() if not name.startswith("2.")]
    groups = [{"params": list(model[2].parameters()), "lr": 1.0}, {"params": others}]
    return classify(model, features(), optimizer=torch.optim.Adam(groups, lr=1e-3))


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.spare, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, CLASSES)

    def forward(self, x):
        return self.head(F.relu(self.body(x)))


@broken("MLP with a spare layer", "a layer is never called", "no_gradient", "spare")
def unused():
    return classify(Unused(), features())


# ------------------------------------------------------------------------------------------------------------------------- healthy


@healthy("VGG with batch norm")
def healthy_vgg():
    return classify(net.vgg(), images())


@healthy("VGG with batch norm, trained estimates, evaluation")
def healthy_eval():
    x, y = images()
    return classify(seasoned(net.vgg(), x).eval(), (x, y))


@healthy("ResNet-18, post-activation")
def healthy_resnet():
    return classify(net.ResNet(net.BasicBlock), images())


@healthy("ResNet-18, pre-activation")
def healthy_preact():
    return classify(net.ResNet(net.PreActBlock), images())


@healthy("MLP, He initialisation, 8 layers")
def healthy_mlp():
    model = net.mlp(8)
    return classify(model, features(), optimizer=torch.optim.AdamW(model.parameters()))


@healthy("self-normalizing MLP (SELU)")
def healthy_selu():
    return classify(net.selu_net(), features())


@healthy("Transformer encoder, pre-LN, 6 layers")
def healthy_pre_ln():
    return classify(net.Encoder(6), tokens())


@healthy("Transformer encoder, post-LN, 3 layers")
def healthy_post_ln():
    return classify(net.Encoder(3, norm_first=False), tokens())


@healthy("GPT")
def healthy_gpt():
    ids = torch.randint(0, 100, (8, 24))
    return net.GPT(), (ids, ids), {"loss_fn": lambda y, ids: F.cross_entropy(y.flatten(0, 1), ids.flatten())}


@healthy("Llama")
def healthy_llama():
    ids = torch.randint(0, 100, (8, 24))
    return net.Llama(), (ids, ids), {"loss_fn": lambda y, ids: F.cross_entropy(y.flatten(0, 1), ids.flatten())}


@healthy("LSTM tagger")
def healthy_lstm():
    ids = torch.randint(0, 100, (16, 24))
    return net.Tagger(), (ids, ids % CLASSES), {"loss_fn": lambda y, t: F.cross_entropy(y.flatten(0, 1), t.flatten())}


@healthy("LSTM, last step alone")
def healthy_lstm_last():
    return classify(net.LastStep(nn.LSTM(64, 64, batch_first=True)), (torch.randn(16, 24, 64), torch.randint(0, CLASSES, (16,))))


@healthy("DCGAN generator")
def healthy_generator():
    return net.generator(), torch.randn(16, 64, 1, 1), {}


@healthy("DCGAN discriminator")
def healthy_discriminator():
    return net.discriminator(), torch.rand(16, 3, 32, 32) * 2 - 1, {"loss_fn": lambda y: F.softplus(-y).mean()}


@healthy("ConvNeXt")
def healthy_convnext():
    return classify(net.ConvNeXt(), images())


@healthy("MobileNetV2")
def healthy_mobilenet():
    return classify(net.mobilenet(), images())


@healthy("ViT")
def healthy_vit():
    return classify(net.ViT(), images())


@healthy("U-Net")
def healthy_unet():
    x, _ = images(8)
    return net.UNet(), (x, torch.randint(0, 2, (8, 32, 32))), {"loss_fn": CROSS_ENTROPY}


def main(arguments=None):
    """Print the table and the score."""
    parser = argparse.ArgumentParser(prog="./dev diagnose", description=__doc__.splitlines()[0])
    parser.add_argument("-v", "--verbose", action="store_true", help="print every finding")
    parser.add_argument("names", nargs="*", help="only networks whose name or defect contains one of these")
    options = parser.parse_args(arguments)

    def chosen(case):
        return not options.names or any(name in f"{case.name} {case.broken} {case.build.__name__}" for name in options.names)

    hits = total = quiet = calm = 0
    print(f"{'network':44} {'what was broken':58} {'expected':34} {'found: kind, layer (place in the list)':44} hit")
    for case in filter(chosen, BROKEN):
        report = case.report()
        place = case.hit(report)
        finding = report.findings[place - 1] if place else (report.findings[0] if report.findings else None)
        found = (
            f"{finding.kind} {finding.layers[0] if finding.layers else ''!r} ({report.findings.index(finding) + 1})"
            if finding
            else "nothing"
        )
        total += 1
        hits += place is not None
        print(f"{case.name:44} {case.broken:58} {case.kinds[0] + ' ' + case.layer:34} {found:44} {'yes' if place else 'NO'}")
        if options.verbose:
            print("".join(f"    [{f.severity}] {f.kind} {list(f.layers[:3])}: {f.sentence}\n" for f in report.findings), end="")
    for case in filter(chosen, HEALTHY):
        report = case.report()
        severe = [finding.kind for finding in report.severe]
        warnings = [finding.kind for finding in report.findings if finding.severity == "warning"]
        calm += 1
        quiet += not severe and report.failure is None
        print(
            f"{case.name:44} {'(healthy)':58} {'no severe finding':34} {', '.join(severe or warnings) or 'nothing':44} "
            f"{'NO' if severe else 'yes'}"
        )
        if options.verbose:
            print("".join(f"    [{f.severity}] {f.kind} {list(f.layers[:3])}: {f.sentence}\n" for f in report.findings), end="")
    print(f"right cause and layer: {hits} of {total} broken networks; no severe finding: {quiet} of {calm} healthy ones")
    return int(hits < total or quiet < calm)


if __name__ == "__main__":
    sys.exit(main())
