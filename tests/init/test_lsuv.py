"""LSUV: unit variance wherever the data goes, whatever the model's signature, and no trace but the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from equinorm.init import lsuv
from tests.init.profiles import chain, spread


def outputs(model, *args, **kwargs):
    """Standard deviations of the outputs of the layers, in the order of the calls."""
    found = []
    handles = [m.register_forward_hook(lambda _m, _a, y: found.append(y.std().item())) for m in model.modules() if hasattr(m, "weight")]
    model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return found


class Strange(nn.Module):
    """A module called twice, functional activations, a keyword, a skip, a dictionary out, an unused layer, registered in another order."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(16, 4)
        self.unused = nn.Linear(5, 5)
        self.body = nn.Linear(16, 16)
        self.first = nn.ConvTranspose1d(3, 8, 4, stride=2, groups=1)

    def forward(self, x, *, scale):
        h = F.softplus(self.first(x * scale)).mean(-1).repeat(1, 2)
        h = h + self.body(h) ** 2
        h = self.body(h)
        return {"y": self.last(F.gelu(h))}


def test_the_profile_is_flat_after_it():
    for activation in (nn.ReLU(), nn.Softplus(), nn.Hardswish()):
        model, x = chain(40, 64, activation), torch.randn(128, 64)
        lsuv(model, x)
        assert spread(model, x) < 1.5
        assert outputs(model, x) == pytest.approx([1.0] * 40, abs=0.01)


def test_it_follows_the_calls_of_a_strange_model():
    model, batch = Strange(), {"x": torch.randn(64, 3, 7), "scale": 30.0}
    unused = copy.deepcopy(model.unused.state_dict())
    found = lsuv(model, batch)
    assert list(found) == ["first", "body", "last"]
    stds = outputs(model, **batch)
    assert [stds[0], stds[1], stds[3]] == pytest.approx([1, 1, 1], abs=0.01)  # stds[2] is the second call of the shared layer
    assert all(torch.equal(unused[name], value) for name, value in model.unused.state_dict().items())
    assert found["first"] > 5  # what was measured before


def test_arguments_come_as_tuple_or_by_a_function():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, a, b):
            return self.linear(a * b)

    model, a, b = Two(), torch.randn(64, 4), torch.randn(64, 4)
    for batch in ((a, b), [a, b]):
        nn.init.constant_(model.linear.weight, 5.0)
        lsuv(model, batch)
        assert outputs(model, a, b) == pytest.approx([1], abs=0.01)
    lsuv(model, {"left": a, "right": 9 * b}, forward=lambda m, batch: m(batch["left"], batch["right"]))
    assert outputs(model, a, 9 * b) == pytest.approx([1], abs=0.01)


def test_it_starts_orthonormal_or_from_what_is_there():
    x = torch.randn(256, 32)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    lsuv(model, x)
    gram = model[2].weight.detach() @ model[2].weight.detach().T
    assert torch.allclose(gram / gram[0, 0], torch.eye(16), atol=1e-5)
    assert model[0].bias.abs().max() == 0

    nn.init.normal_(model[0].weight, 0, 7)
    nn.init.normal_(model[0].bias, 0, 0.1)
    before = copy.deepcopy(model.state_dict())
    found = lsuv(model, x, orthonormal=False, layers=[model[0]])
    assert list(found) == ["0"]
    ratio = model[0].weight.detach() / before["0.weight"]
    assert ratio.std() < 1e-6
    assert torch.equal(before["0.bias"], model[0].bias)  # the paper's algorithm moves the weight alone
    assert torch.equal(before["2.weight"], model[2].weight)
    assert outputs(model, x)[0] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("training", [True, False])
def test_it_leaves_no_trace(training):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 8, 3)).train(training)
    x = torch.randn(8, 3, 8, 8)
    model(x).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    torch.manual_seed(3)
    torch.randint(2**62, ())
    expected = torch.rand(3)
    torch.manual_seed(3)
    lsuv(model, x)
    assert torch.equal(torch.rand(3), expected)  # one number is drawn, as a seed for the weights, whatever the model draws
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True))
    assert all(b is buffers[name][0] and torch.equal(b, buffers[name][1]) for name, b in model.named_buffers())
    assert [m.training for m in model.modules()] == [training] * 6
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad_fn is None and p.requires_grad for p in model.parameters())


def test_a_parametrized_and_a_tied_weight():
    x = torch.randn(128, 16)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(16, 16)), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    model[4].weight = model[2].weight
    found = lsuv(model, x)
    assert list(found) == ["0", "2"]
    assert outputs(model, x)[:2] == pytest.approx([1, 1], abs=0.01)


def test_half_precision_weights():
    model, x = chain(5, 64, nn.ReLU()).bfloat16(), torch.randn(256, 64).bfloat16()
    lsuv(model, x)
    assert outputs(model, x) == pytest.approx([1.0] * 5, abs=0.02)


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.zeros(8, 4), r"lsuv: the output of 0 must vary and be finite, got standard dev"),
        (nn.Sequential(nn.Linear(4, 4), nn.Flatten(0), nn.Linear(4, 4)), torch.randn(8, 4), r"mat1 and mat2 shapes|size mismatch"),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.full((8, 4), torch.nan), r"output of 0 must vary and be finite"),
        (nn.Sequential(nn.ReLU()), torch.randn(8, 4), r"lsuv: the batch must reach a linear or convolution layer of Sequential"),
        (
            nn.Sequential(nn.Linear(4, 4), parametrizations.spectral_norm(nn.Linear(4, 4))),
            9 * torch.randn(8, 4),
            r"lsuv: the output of 1 must reach standard deviation 1, got .* after scaling 10 times; its weight's scale is fixed",
        ),
    ],
)
def test_whatever_is_raised_the_model_is_as_before(model, batch, message):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((ValueError, RuntimeError), match=message):
        lsuv(model, batch, tolerance=1e-4)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_errors():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"lsuv: tolerance must be positive and trials at least 1, got 0 and 10"):
        lsuv(model, torch.randn(2, 4), tolerance=0)
    with pytest.raises(ValueError, match=r"every one of layers must belong to the model, got a Linear that does not"):
        lsuv(model, torch.randn(2, 4), layers=[nn.Linear(4, 4)])
    with pytest.raises(TypeError, match=r"lsuv: the layer 1 must be Linear"):
        lsuv(model.append(nn.ReLU()), torch.randn(2, 4), layers=[model[1]])
