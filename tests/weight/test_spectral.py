from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from equinorm import spectral_norm
from tests.helpers import assert_close


def converge(module: nn.Module, steps: int = 300) -> nn.Module:
    module.parametrizations.weight[0].restart(module.parametrizations.weight.original, steps)
    return module.eval()


def dense(module: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    """The matrix of a layer's linear map, by its Jacobian."""
    channels = module.in_channels
    x = torch.zeros(1, channels, *shape, dtype=torch.float64)
    bias, module.bias = module.bias, None
    jacobian = torch.autograd.functional.jacobian(module, x)
    module.bias = bias
    return jacobian.reshape(-1, x.numel())


def top(matrix: torch.Tensor) -> float:
    return torch.linalg.svdvals(matrix.detach())[0].item()


def test_the_rule_with_given_vectors():
    module = spectral_norm(nn.Linear(5, 4).double()).eval()
    step = module.parametrizations.weight[0]
    w = module.parametrizations.weight.original.detach()
    sigma = sum(step._u[i] * w[i, j] * step._v[j] for i in range(4) for j in range(5))
    assert_close(module.weight, w / sigma)


def test_one_step_per_training_forward():
    module = spectral_norm(nn.Linear(5, 4).double(), n_power_iterations=2)
    step, w = module.parametrizations.weight[0], module.parametrizations.weight.original.detach()
    u, v = step._u.clone(), step._v.clone()
    module(torch.randn(2, 5).double())
    for _ in range(2):
        u = w @ v / (w @ v).norm()
        v = w.T @ u / (w.T @ u).norm()
    assert_close(step._u, u)
    assert_close(step._v, v)
    module.eval()(torch.randn(2, 5).double())
    assert_close(step._u, u)


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(6, 4), lambda: nn.Conv2d(3, 4, 3), lambda: nn.ConvTranspose2d(4, 6, 3), lambda: nn.Embedding(9, 4)]
)
def test_state_dict_and_steps_are_those_of_torch(make):
    ours, theirs = spectral_norm(make().double()), parametrizations.spectral_norm(make().double())
    ours.load_state_dict(theirs.state_dict())
    for _ in range(3):
        assert_close(ours.weight, theirs.weight.detach())
    theirs.load_state_dict(ours.state_dict())
    assert_close(ours.eval().weight, theirs.eval().weight.detach())


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(6, 4), lambda: nn.Conv1d(3, 4, 3), lambda: nn.ConvTranspose2d(4, 6, 3), lambda: nn.Embedding(9, 4)]
)
def test_largest_singular_value_becomes_one(make):
    module = converge(spectral_norm(make().double()))
    rows = 1 if isinstance(module, nn.ConvTranspose2d) else 0
    assert top(module.weight.movedim(rows, 0).flatten(1)) == pytest.approx(1, abs=1e-9)


def test_a_vector_is_divided_by_its_length():
    module = nn.Module()
    module.direction = nn.Parameter(torch.tensor([3.0, 4.0]))
    spectral_norm(module, "direction")
    assert_close(module.direction, torch.tensor([0.6, 0.8]))
    with torch.no_grad():
        module.parametrizations.direction.original.zero_()
    module.direction.sum().backward()
    assert_close(module.direction, torch.zeros(2))
    assert module.parametrizations.direction.original.grad.isfinite().all()


def test_gradient_is_the_papers_and_orthogonal_to_the_weight():
    module = converge(spectral_norm(nn.Linear(6, 4).double()))
    original, step = module.parametrizations.weight.original, module.parametrizations.weight[0]
    upstream = torch.randn(4, 6).double()
    (got,) = torch.autograd.grad(module.weight, original, upstream)
    w_bar = module.weight.detach()
    sigma = top(original)
    assert_close(got, (upstream - (upstream * w_bar).sum() * torch.outer(step._u, step._v)) / sigma)
    assert abs((got * original).sum().item()) < 1e-12


def test_invariant_to_the_scale_of_the_weight():
    module = converge(spectral_norm(nn.Linear(6, 4).double()))
    before = module.weight.detach()
    with torch.no_grad():
        module.parametrizations.weight.original.mul_(7)
    assert_close(module.weight, before)


@pytest.mark.parametrize("coeff", [0.5, 3.0])
def test_the_coefficient_bounds_and_otherwise_leaves_alone(coeff):
    module = nn.Linear(6, 4).double()
    raw = module.weight.detach().clone()
    raw = raw / top(raw)
    module.weight = nn.Parameter(raw)
    converge(spectral_norm(module, coeff=coeff))
    assert_close(module.weight, raw * min(1.0, coeff))
    (grad,) = torch.autograd.grad(module.weight.sum(), module.parametrizations.weight.original)
    assert torch.equal(grad, torch.ones(4, 6).double()) == (coeff > 1)


CONVS = {
    "zeros": lambda: nn.Conv2d(3, 4, 3, padding=1),
    "unpadded": lambda: nn.Conv2d(3, 4, 3),
    "same": lambda: nn.Conv2d(3, 4, (2, 3), padding="same"),
    "circular": lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
    "reflect": lambda: nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="reflect"),
    "replicate": lambda: nn.Conv2d(3, 4, 3, padding=2, padding_mode="replicate"),
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=(2, 3), padding=1, groups=2),
    "dilated": lambda: nn.Conv2d(3, 4, 3, dilation=2, padding=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
    "transposed-dilated": lambda: nn.ConvTranspose2d(3, 4, 3, dilation=2),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("make", CONVS.values(), ids=CONVS)
def test_the_convolution_itself_gets_norm_one(make):
    module = converge(spectral_norm(make().double(), method="conv", input_shape=(6, 5)), 1500)
    assert top(dense(module, (6, 5))) == pytest.approx(1, abs=1e-6)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("make", CONVS.values(), ids=CONVS)
def test_the_adjoint_is_the_transpose(make):
    module = spectral_norm(make().double(), method="conv", input_shape=(6, 5))
    operator = module.parametrizations.weight[0].operator
    weight = module.parametrizations.weight.original.detach()
    u_shape, v_shape = operator.sizes(weight)
    assert module(torch.zeros(1, *v_shape).double()).shape == (1, *u_shape)
    u, v = torch.randn(u_shape).double(), torch.randn(v_shape).double()
    assert_close((operator.apply(weight, v) * u).sum(), (operator.adjoint(weight, u) * v).sum())


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), (7,)),
        (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (6, 5)),
        (lambda: nn.Conv2d(4, 6, (3, 5), padding="same", padding_mode="circular", groups=2, dilation=2), (8, 9)),
        (lambda: nn.Conv2d(2, 3, 2, padding="same", padding_mode="circular"), (4, 4)),
        (lambda: nn.Conv3d(2, 2, 3, padding=1, padding_mode="circular"), (3, 4, 3)),
    ],
)
def test_fft_is_exact_for_circular_padding(make, shape):
    module = spectral_norm(make().double(), method="fft", input_shape=shape)
    assert not list(module.buffers())
    assert top(dense(module, shape)) == pytest.approx(1, abs=1e-12)
    original = module.parametrizations.weight.original
    assert torch.autograd.gradcheck(lambda w: module.parametrizations.weight[0](w), (original,))


def test_fft_compiles_copies_and_survives_zero_weights():
    module = spectral_norm(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), method="fft", input_shape=(4, 4))
    x = torch.randn(2, 2, 4, 4)
    assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x).detach())
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    assert module.to(torch.bfloat16).weight.dtype == torch.bfloat16
    module.float()
    with torch.no_grad():
        module.parametrizations.weight.original.zero_()
    module(x).sum().backward()
    assert module.weight.abs().max() == 0
    assert module.parametrizations.weight.original.grad.isfinite().all()
    with pytest.raises(ValueError, match=r"already has it"):
        spectral_norm(module, method="fft", input_shape=(4, 4))


def test_the_reshaped_norm_is_not_the_operators():
    """An all-ones 3x3 kernel: the patch matrix has norm 3, the convolution 9; and 9 = sqrt(3 * 3) * 3 is the worst ratio."""
    ones = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular").double()
    nn.init.ones_(ones.weight)
    by_patch, by_operator = copy.deepcopy(ones), copy.deepcopy(ones)
    converge(spectral_norm(by_patch))
    assert top(dense(by_patch, (8, 8))) == pytest.approx(3, abs=1e-9)
    spectral_norm(by_operator, method="fft", input_shape=(8, 8))
    assert_close(by_operator.weight, torch.full((1, 1, 3, 3), 1 / 9, dtype=torch.float64))
    for make in (CONVS["zeros"], CONVS["circular"], CONVS["dilated"]):
        layer = make().double()
        assert top(dense(layer, (6, 5))) <= 3 * top(layer.weight.flatten(1)) + 1e-9


def test_reflection_can_exceed_the_bound():
    layer = nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect").double()
    nn.init.ones_(layer.weight)
    assert top(dense(layer, (3, 3))) == pytest.approx(11.2, abs=0.05)


@pytest.mark.parametrize(
    "make", [lambda: nn.Conv2d(8, 8, 3, groups=8), lambda: nn.Conv2d(6, 4, 3, groups=2), lambda: nn.ConvTranspose2d(6, 4, 3, groups=2)]
)
def test_per_group_is_the_norm_of_the_block_diagonal_map(make):
    joint, split = make().double(), None
    split = copy.deepcopy(joint)
    raw = joint.weight.detach().clone()
    converge(spectral_norm(joint))
    converge(spectral_norm(split, per_group=True), 2000)
    groups = split.groups
    blocks = split.weight.unflatten(0, (groups, -1))
    if isinstance(split, nn.ConvTranspose2d):
        blocks = blocks.transpose(1, 2)
    assert max(top(block.flatten(1)) for block in blocks) == pytest.approx(1, abs=1e-6)
    assert (raw / split.weight).mean() < (raw / joint.weight).mean()  # the joint matrix over-estimates


def test_a_zero_weight_gives_zeros_and_does_not_kill_the_vectors():
    layer = nn.Linear(6, 4)
    nn.init.zeros_(layer.weight)
    spectral_norm(layer)
    assert_close(layer(torch.ones(1, 6)) - layer.bias, torch.zeros(1, 4))
    with torch.no_grad():
        layer.parametrizations.weight.original.normal_()
    for _ in range(300):  # power iteration as in training, from the vectors that saw the zeros
        _ = layer.weight
    assert top(layer.eval().weight) == pytest.approx(1, abs=1e-5)


def test_assignment_and_restart_find_the_vectors_anew():
    layer = spectral_norm(nn.Linear(2, 2).double())
    layer.weight = torch.tensor([[1.0, 0.0], [0.0, 5.0]]).double()
    layer.eval()
    assert top(layer.weight) == pytest.approx(1, abs=1e-9)
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(torch.tensor([[5.0, 0.0], [0.0, 1.0]]))
    assert top(layer.weight) > 2  # the stored vectors belong to the old weight
    layer.parametrizations.weight[0].restart(layer.parametrizations.weight.original)
    assert top(layer.weight) == pytest.approx(1, abs=1e-9)


def test_cached_computes_the_weight_once():
    layer = spectral_norm(nn.Linear(6, 4))
    with parametrize.cached():
        first = layer.weight
        after = layer.parametrizations.weight[0]._u.clone()
        assert layer.weight is first
    assert torch.equal(layer.parametrizations.weight[0]._u, after)


def test_works_for_a_gan_step_with_gradient_penalty():
    d = nn.Sequential(spectral_norm(nn.Conv2d(2, 4, 3)), nn.LeakyReLU(0.2), nn.Flatten(), spectral_norm(nn.Linear(36, 1)))
    real, fake = torch.randn(3, 2, 5, 5, requires_grad=True), torch.randn(3, 2, 5, 5)
    score = d(real)
    (grad,) = torch.autograd.grad(score.sum(), real, create_graph=True)
    (score.mean() - d(fake).mean() + grad.square().sum()).backward()
    assert all(p.grad.isfinite().all() for name, p in d.named_parameters())


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: nn.Linear(2, 2), {"n_power_iterations": 0}, "n_power_iterations must be an integer of at least 1, got 0"),
        (lambda: nn.Linear(2, 2), {"eps": 0}, "eps must be positive, got 0"),
        (lambda: nn.Linear(2, 2), {"coeff": -1.0}, "coeff must be positive, or None to normalize to 1; got -1.0"),
        (lambda: nn.Linear(2, 2), {"method": "svd"}, "method must be one of reshape, conv, fft, got 'svd'"),
        (lambda: nn.Linear(2, 2), {"method": "conv", "input_shape": (4, 4)}, r"needs the weight of a convolution, got Linear\.weight"),
        (lambda: nn.Linear(2, 2), {"per_group": True}, "per_group needs a convolution, got Linear"),
        (lambda: nn.Conv2d(2, 2, 3), {"input_shape": (4, 4)}, 'input_shape is for method "conv" and "fft"'),
        (lambda: nn.Conv2d(2, 2, 3), {"method": "conv"}, "needs input_shape, the 2 spatial sizes of the input of Conv2d .* got None"),
        (
            lambda: nn.Conv2d(2, 2, 3),
            {"method": "conv", "input_shape": (2, 4, 4)},
            r"needs input_shape, the 2 spatial sizes .* got \(2, 4, 4\)",
        ),
        (lambda: nn.Conv2d(2, 2, 3), {"method": "conv", "input_shape": (2, 2)}, "large enough for the layer to have an output"),
        (lambda: nn.Conv2d(2, 2, 3), {"method": "conv", "input_shape": (4, 4), "per_group": True}, 'per_group is for method "reshape"'),
        (lambda: nn.Conv2d(2, 2, 3, padding=1), {"method": "fft", "input_shape": (4, 4)}, '"fft" is exact only for .*use method="conv"'),
        (
            lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular", stride=2),
            {"method": "fft", "input_shape": (4, 4)},
            '"fft" is exact only for a convolution of stride 1',
        ),
        (
            lambda: nn.Conv2d(2, 2, 3, padding=2, padding_mode="circular"),
            {"method": "fft", "input_shape": (4, 4)},
            '"fft" is exact only for .* padding="same"',
        ),
    ],
)
def test_errors(make, options, message):
    module = make()
    with pytest.raises(ValueError, match=message):
        spectral_norm(module, **options)
    assert not parametrize.is_parametrized(module)


def test_the_methods_agree_on_a_1x1_convolution():
    """It is the same matrix at every position."""
    base = nn.Conv2d(3, 5, 1, padding_mode="circular").double()
    reshape, conv, fft = (copy.deepcopy(base) for _ in range(3))
    converge(spectral_norm(reshape))
    converge(spectral_norm(conv, method="conv", input_shape=(3, 3)))
    spectral_norm(fft, method="fft", input_shape=(3, 3))
    assert top(reshape.weight.flatten(1)) == pytest.approx(1, abs=1e-9)
    assert_close(conv.weight, reshape.weight.detach())
    assert_close(fft.weight, reshape.weight.detach())
