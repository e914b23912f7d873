from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from equinorm import data_dependent_init_, weight_norm
from tests.helpers import assert_close, assert_grads_close, run_ranks
from tests.references import weight as reference

LAYERS = [
    (lambda: nn.Linear(5, 3), False, 1, (3, 1)),
    (lambda: nn.Conv2d(4, 6, 3, groups=2), False, 2, (6, 1, 1, 1)),
    (lambda: nn.ConvTranspose2d(4, 6, 3), True, 1, (1, 6, 1, 1)),
    (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), True, 2, (2, 1, 3, 1)),
]


def parts(module: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    return module.parametrizations.weight.original0, module.parametrizations.weight.original1


@pytest.mark.parametrize(("layer", "transposed", "groups", "g_shape"), LAYERS)
def test_equals_the_reference_and_its_gradients(layer, transposed, groups, g_shape):
    module = weight_norm(layer().double())
    g, v = parts(module)
    assert g.shape == g_shape
    with torch.no_grad():
        g.normal_()
    upstream = torch.randn_like(v)
    expected, grad_g, grad_v = torch.empty_like(v), [], torch.empty_like(v)
    for length, unit in zip(g.detach().flatten(), reference.units_of(v.shape, transposed, groups), strict=True):
        where = tuple(torch.tensor(column) for column in zip(*unit, strict=True))
        expected[where] = reference.weight_norm(v.detach()[where], length)
        one, grad_v[where] = reference.weight_norm_gradients(v.detach()[where], length, upstream[where])
        grad_g.append(one)
    assert_close(module.weight, expected)
    got = torch.autograd.grad(module.weight, (g, v), upstream)
    assert_grads_close({"g": got[0].flatten(), "v": got[1]}, {"g": torch.stack(grad_g), "v": grad_v})
    assert_close(reference.per_unit(got[1] * v, lambda w: w.sum().expand(len(w)), transposed, groups), torch.zeros_like(v))


@pytest.mark.parametrize(("layer", "transposed", "groups", "g_shape"), LAYERS)
def test_registering_keeps_the_function(layer, transposed, groups, g_shape):
    module = layer()
    before = module.weight.detach().clone()
    assert_close(weight_norm(module).weight, before)


def test_invariant_to_the_length_of_v():
    module = weight_norm(nn.Linear(6, 4).double())
    before = module.weight.detach()
    with torch.no_grad():
        parts(module)[1].mul_(torch.tensor([[0.1], [2.0], [30.0], [1.0]]))
    assert_close(module.weight, before)
    assert_close(module.weight.norm(dim=1), parts(module)[0].flatten().abs())


def test_whole_tensor_has_one_length():
    module = weight_norm(nn.Linear(6, 4).double(), dim=None)
    g, _ = parts(module)
    assert g.shape == ()
    with torch.no_grad():
        g.fill_(3.0)
    assert_close(module.weight.norm(), torch.tensor(3.0).double())


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("make", [lambda: nn.Conv2d(4, 6, 3), lambda: nn.ConvTranspose1d(4, 6, 3)])
def test_loads_checkpoints_of_torch(make, dim):
    theirs = parametrizations.weight_norm(make(), dim=dim)
    with torch.no_grad():
        parts(theirs)[0].normal_()
    ours = weight_norm(make(), dim=dim)
    ours.load_state_dict(theirs.state_dict())
    assert_close(ours.weight, theirs.weight.detach())


def test_loads_keys_of_the_old_hook():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ReLU(), weight_norm(nn.Linear(4, 3)))
    g, v = torch.randn(3, 1), torch.randn(3, 4)
    model.load_state_dict({"1.weight_g": g, "1.weight_v": v, "1.bias": torch.zeros(3)})
    assert_close(model[1].weight, g * v / v.norm(dim=1, keepdim=True))


def test_a_zero_unit_still_learns():
    layer = nn.Linear(4, 2)
    nn.init.zeros_(layer.weight)
    weight_norm(layer)
    g, v = parts(layer)
    assert_close(layer.weight, torch.zeros(2, 4))
    layer(torch.rand(3, 4)).sum().backward()
    assert g.grad.abs().min() > 0.1
    assert_close(v.grad, torch.zeros(2, 4))


def test_errors():
    with pytest.raises(ValueError, match=r"weight_norm: eps must be positive, got 0"):
        weight_norm(nn.Linear(2, 2), eps=0)
    with pytest.raises(ValueError, match=r"weight_norm: dim must lie in \[-2, 1\]"):
        weight_norm(nn.Linear(2, 2), dim=2)
    with pytest.raises(ValueError, match=r"must have a parameter named 'weigt'"):
        weight_norm(nn.Linear(2, 2), name="weigt", dim=None)


class Shared(nn.Module):
    """Uses one layer twice and another not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unused = weight_norm(nn.Linear(5, 5)), weight_norm(nn.Linear(5, 5))

    def forward(self, x):
        return self.layer(self.layer(x))


def network() -> nn.Sequential:
    return nn.Sequential(
        weight_norm(nn.Conv2d(3, 8, 3)),
        nn.ReLU(),
        weight_norm(nn.ConvTranspose2d(8, 4, 3, groups=2)),
        nn.ReLU(),
        nn.Flatten(),
        weight_norm(nn.Linear(4 * 36, 7)),
    )


def pre_activations(model: nn.Sequential, x: torch.Tensor) -> list[torch.Tensor]:
    out = []
    for layer in model:
        x = layer(x)
        if hasattr(layer, "parametrizations"):
            out.append(x.movedim(1, 0).flatten(1))
    return out


def test_data_dependent_init_standardizes_every_pre_activation():
    model, x = network().double(), torch.randn(32, 3, 6, 6).double() * 5 + 2
    assert data_dependent_init_(model, x) == ["0", "2", "5"]
    for t in pre_activations(model, x):
        assert t.mean(1).abs().max() < 1e-10
        assert (t.std(1, unbiased=False) - 1).abs().max() < 1e-8
    for layer in model:
        if hasattr(layer, "parametrizations"):
            assert parts(layer)[1].std().item() == pytest.approx(0.05, rel=0.3)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_data_dependent_init_options():
    model, x = network().double(), torch.randn(32, 3, 6, 6).double()
    before = [parts(layer)[1].detach().clone() for layer in model if hasattr(layer, "parametrizations")]
    data_dependent_init_(model, x, init_scale=0.5, v_std=None)
    assert all(torch.equal(v, parts(layer)[1]) for v, layer in zip(before, [model[0], model[2], model[5]], strict=True))
    assert all((t.std(1, unbiased=False) - 0.5).abs().max() < 1e-8 for t in pre_activations(model, x))
    layer = weight_norm(nn.Linear(3, 2).double())
    data_dependent_init_(layer, torch.randn(9, 3).double(), eps=1e6)
    assert parts(layer)[0].max() < 1e-3


def test_data_dependent_init_without_bias_keeps_the_mean():
    model = nn.Sequential(weight_norm(nn.Linear(4, 3, bias=False)), weight_norm(nn.Linear(3, 2))).double()
    x = torch.randn(50, 4).double() + 3
    data_dependent_init_(model, x)
    first, second = pre_activations(model, x)
    assert first.mean(1).abs().min() > 0.1
    assert (first.std(1, unbiased=False) - 1).abs().max() < 1e-8
    assert second.mean(1).abs().max() < 1e-10


def test_data_dependent_init_of_a_shared_layer_happens_at_its_first_use():
    model, x = Shared().double(), torch.randn(20, 5).double()
    untouched = parts(model.unused)[0].detach().clone()
    assert data_dependent_init_(model, x) == ["layer"]
    assert model.layer(x).mean(0).abs().max() < 1e-10
    assert torch.equal(parts(model.unused)[0], untouched)
    assert not model.layer._forward_hooks
    assert not model.unused._forward_pre_hooks


def test_data_dependent_init_errors():
    with pytest.raises(ValueError, match=r"Linear must contain a layer with weight_norm"):
        data_dependent_init_(nn.Linear(2, 2), torch.randn(3, 2))
    with pytest.raises(ValueError, match=r"must contain a layer with weight_norm"):
        data_dependent_init_(weight_norm(nn.Linear(2, 2), dim=None), torch.randn(3, 2))
    model = nn.Sequential(weight_norm(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"must vary over the batch and be finite; '0' has units of variance 0 to 0 in an output of shape"):
        data_dependent_init_(model, torch.randn(1, 2))
    assert not model[0]._forward_hooks
    with pytest.raises(ValueError, match=r"must vary over the batch"):
        data_dependent_init_(weight_norm(nn.Linear(1, 1)), torch.full((7, 1), 0.7))  # the mean of seven times 0.7 is not 0.7 in float32
    with pytest.raises(ValueError, match=r"must vary over the batch and be finite"):
        data_dependent_init_(model, torch.tensor([[1.0, float("nan")], [0.0, 0.0]]))
    lonely = Shared()
    lonely.forward = lambda x: x
    with pytest.raises(ValueError, match=r"reached none of \['layer', 'unused'\]"):
        data_dependent_init_(lonely, torch.randn(3, 5))


def _init_on_rank(rank: int, sizes: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    torch.manual_seed(7)
    x = torch.randn(sum(sizes), 3, 6, 6, dtype=torch.float64).split(sizes)[rank]
    model = network().double()
    torch.manual_seed(rank)
    data_dependent_init_(model, x, process_group="world")
    return [p.detach() for p in model.parameters()], [t.detach() for t in pre_activations(model, x)]


def test_data_dependent_init_pools_over_uneven_and_empty_ranks():
    results = run_ranks(3, _init_on_rank, [5, 0, 2])
    for ours, other in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(ours, other)
    for layer in range(3):
        every = torch.cat(
            [t[layer].unflatten(1, (size, -1)).flatten(1) if size else t[layer] for (_, t), size in zip(results, [5, 0, 2], strict=True)], 1
        )
        assert every.mean(1).abs().max() < 1e-10
        assert (every.std(1, unbiased=False) - 1).abs().max() < 1e-8
