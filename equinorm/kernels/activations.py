"""The table of activations: function, derivative, gains, and where they saturate.

Only what cannot be computed is written down: the function, and its derivative as a function of the output where the output determines it.
Gains, means, derivatives and ends of saturation follow from the function by integration and differentiation, so that none can be wrong by
itself.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Gauss-Legendre with 3 nodes in each of 2 * 12 * 1024 cells: kinks of all usual activations lie between cells, not inside one.
EDGE, PER_UNIT = 12, 1024

# An activation is flat where its slope is below this share of its steepest: half of leaky_relu's usual slope, which still passes a signal.
FLAT = 0.005


@dataclass(frozen=True)
class Activation:
    """An elementwise function and what a network's designer needs to know about it.

    Attributes:
        name: that of torch.nn.functional, or of the function given.
        function: of a floating tensor of any shape.
        pull: gradient with respect to the input, of the gradient with respect to the output and the output; None where the output does
            not determine it. ``pull(ones, y)`` is the derivative.
        inverse: the input from the output; None where there is none.
        least: of the relative precision eps of the output, the least input that it still determines to 1e-3; of invertible ones.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    pull: Callable[[Tensor, Tensor], Tensor] | None = field(default=None, repr=False)
    inverse: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    least: Callable[[float], float] = field(default=lambda eps: -math.inf, repr=False)

    def derivative(self, z: Tensor) -> Tensor:
        """The derivative at the input ``z``, of its shape and type, without a graph."""
        with torch.inference_mode(False), torch.enable_grad():
            z = z.detach().clone().requires_grad_()
            y = self.function(z)
            return torch.autograd.grad(y.sum(), z)[0] if y.requires_grad else torch.zeros_like(y)

    def pulled(self, z: Tensor, dy: Tensor) -> Tensor:
        """The gradient at the input ``z`` of a gradient ``dy`` at the output, without a graph."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            return torch.autograd.grad(self.function(z), z, dy)[0]

    @property
    def mean(self) -> float:
        """Mean of f(z), z standard normal."""
        return self._moments[0]

    @property
    def std(self) -> float:
        """Standard deviation of f(z), z standard normal."""
        return math.sqrt(self._moments[1])

    @property
    def rms(self) -> float:
        """Root mean square of f(z), z standard normal."""
        return math.hypot(self.mean, self.std)

    @property
    def gain(self) -> float:
        """He's gain 1 / rms(f(z)): weights of this gain behind the activation keep the mean square of the signal."""
        return 1 / self.rms

    @property
    def variance_gain(self) -> float:
        """1 / std(f(z)): behind it the activation's output has variance 1. For weights that sum to 0, which remove the mean."""
        return 1 / self.std

    @cached_property
    def backward_gain(self) -> float:
        """1 / rms(f'(z)): weights of this gain before the activation keep the mean square of the gradient."""
        z, density = _grid()
        return (self.derivative(z).square() * density).sum().item() ** -0.5

    @cached_property
    def ends(self) -> tuple[float, float]:
        """The input below which, and that above which the function is flat; infinite where it is not.

        Flat means a slope below 0.5 % of the steepest on (-12, 12), everywhere from there to the edge.
        """
        cells = 2 * EDGE * PER_UNIT
        z = (torch.arange(cells, dtype=torch.float64) + 0.5) / PER_UNIT - EDGE
        slope = self.derivative(z).abs()
        steep = (slope >= FLAT * slope.max()).nonzero().flatten()
        first, last = steep[0].item(), steep[-1].item() + 1
        return (first / PER_UNIT - EDGE if first > 0 else -math.inf), (last / PER_UNIT - EDGE if last < cells else math.inf)

    def saturated(self, z: Tensor) -> Tensor:
        """Where the input ``z`` lies in a flat end: boolean, of its shape."""
        low, high = self.ends
        return (z < low) | (z > high)

    @cached_property
    def _moments(self) -> tuple[float, float]:
        """Mean and variance of f(z), z standard normal, to about 1e-9."""
        z, density = _grid()
        with torch.no_grad():
            y = self.function(z)
        if not isinstance(y, Tensor) or y.shape != z.shape:
            raise ValueError(f"activation {self.name}: it must be elementwise: one tensor of the shape of its input")
        mean = (y * density).sum()
        variance = ((y - mean).square() * density).sum().item()
        if not 1e-24 < variance < math.inf:
            raise ValueError(
                f"activation {self.name}: its output must vary and be finite for inputs within +-{EDGE}, got variance {variance:.3g}"
            )
        return mean.item(), variance


@cache
def _grid() -> tuple[Tensor, Tensor]:
    """Nodes, and the weights with which a sum over them is the expectation under the standard normal distribution."""
    nodes = torch.tensor([-math.sqrt(0.6), 0.0, math.sqrt(0.6)], dtype=torch.float64)
    weights = torch.tensor([5 / 18, 8 / 18, 5 / 18], dtype=torch.float64)
    centres = (torch.arange(2 * EDGE * PER_UNIT, dtype=torch.float64) + 0.5) / PER_UNIT - EDGE
    z = (centres[:, None] + nodes / (2 * PER_UNIT)).flatten()
    return z, (weights / PER_UNIT).repeat(len(centres)) * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)


_aten = torch.ops.aten


def identity() -> Activation:
    """Nothing."""
    return Activation("identity", nn.Identity(), lambda dy, _: dy, lambda y: y)


def relu() -> Activation:
    """Z above 0, else 0."""
    return Activation("relu", F.relu, lambda dy, y: _aten.threshold_backward(dy, y, 0))


def leaky_relu(negative_slope: float = 0.01) -> Activation:
    """The larger of z and slope z."""
    return Activation(
        "leaky_relu",
        partial(F.leaky_relu, negative_slope=negative_slope),
        lambda dy, y: _aten.leaky_relu_backward(dy, y, negative_slope, True),
        lambda y: F.leaky_relu(y, 1 / negative_slope),
    )


def prelu(weight: Tensor) -> Activation:
    """leaky_relu of a learned slope; of several, their mean."""
    return leaky_relu(weight.detach().mean().item())


def rrelu(lower: float = 1 / 8, upper: float = 1 / 3) -> Activation:
    """leaky_relu of a random slope in training; here as it is in evaluation, with the mean slope."""
    return leaky_relu((lower + upper) / 2)


def elu(alpha: float = 1.0) -> Activation:
    """Of z, z above 0 and alpha (exp(z) - 1) below: z is known to an error of eps / 2 exp(-z), which should stay below 1e-3."""
    return Activation(
        "elu",
        partial(F.elu, alpha=alpha),
        lambda dy, y: _aten.elu_backward(dy, alpha, 1.0, 1.0, True, y),
        lambda y: torch.where(y >= 0, y, torch.log1p((y / alpha).clamp(torch.finfo(y.dtype).eps / 2 - 1, 0))),
        lambda eps: math.log(eps / 2e-3),
    )


def celu(alpha: float = 1.0) -> Activation:
    """Elu whose slope is continuous for every alpha."""
    return Activation("celu", partial(F.celu, alpha=alpha), lambda dy, y: _aten.elu_backward(dy, alpha, 1.0, 1 / alpha, True, y))


def selu() -> Activation:
    """elu, scaled so that standard normal input gives mean 0 and variance 1."""
    alpha, scale = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
    return Activation("selu", F.selu, lambda dy, y: _aten.elu_backward(dy, alpha, scale, 1.0, True, y))


def gelu(approximate: str = "none") -> Activation:
    """Z times the standard normal distribution function, or its tanh approximation."""
    return Activation("gelu" if approximate == "none" else f"gelu_{approximate}", partial(F.gelu, approximate=approximate))


def tanh() -> Activation:
    """Hyperbolic tangent."""
    return Activation("tanh", torch.tanh, lambda dy, y: _aten.tanh_backward(dy, y))


def sigmoid() -> Activation:
    """1 / (1 + exp(-z))."""
    return Activation("sigmoid", torch.sigmoid, lambda dy, y: _aten.sigmoid_backward(dy, y))


def logsigmoid() -> Activation:
    """Logarithm of the sigmoid."""
    return Activation("logsigmoid", F.logsigmoid, lambda dy, y: dy * -torch.expm1(y))


def softplus(beta: float = 1.0, threshold: float = 20.0) -> Activation:
    """log(1 + exp(beta z)) / beta, and z itself where beta z is above the threshold."""
    return Activation("softplus", partial(F.softplus, beta=beta, threshold=threshold), lambda dy, y: dy * -torch.expm1(-beta * y))


def softsign() -> Activation:
    """Z / (1 + |z|)."""
    return Activation("softsign", F.softsign, lambda dy, y: dy * (1 - y.abs()).square())


def hardtanh(min_val: float = -1.0, max_val: float = 1.0) -> Activation:
    """Z within bounds."""
    name = "relu6" if (min_val, max_val) == (0.0, 6.0) else "hardtanh"
    return Activation(
        name, partial(F.hardtanh, min_val=min_val, max_val=max_val), lambda dy, y: _aten.hardtanh_backward(dy, y, min_val, max_val)
    )


def hardsigmoid() -> Activation:
    """Z / 6 + 1/2 within 0 and 1."""
    return Activation("hardsigmoid", F.hardsigmoid, lambda dy, y: torch.where((y > 0) & (y < 1), dy / 6, 0.0))


def softshrink(lambd: float = 0.5) -> Activation:
    """Z moved towards 0 by lambda, 0 within it."""
    return Activation("softshrink", partial(F.softshrink, lambd=lambd), lambda dy, y: torch.where(y == 0, 0.0, dy))


def hardshrink(lambd: float = 0.5) -> Activation:
    """z, 0 within lambda."""
    return Activation("hardshrink", partial(F.hardshrink, lambd=lambd), lambda dy, y: torch.where(y == 0, 0.0, dy))


def silu() -> Activation:
    """Z sigmoid(z), also called swish."""
    return Activation("silu", F.silu)


def mish() -> Activation:
    """Z tanh(softplus(z))."""
    return Activation("mish", F.mish)


def hardswish() -> Activation:
    """Z hardsigmoid(z)."""
    return Activation("hardswish", F.hardswish)


def tanhshrink() -> Activation:
    """Z - tanh(z)."""
    return Activation("tanhshrink", F.tanhshrink)


# A module's activation is built from those of its attributes that the function here takes.
MODULES: dict[type[nn.Module], Callable[..., Activation]] = {
    nn.CELU: celu,
    nn.ELU: elu,
    nn.GELU: gelu,
    nn.Hardshrink: hardshrink,
    nn.Hardsigmoid: hardsigmoid,
    nn.Hardswish: hardswish,
    nn.Hardtanh: hardtanh,
    nn.Identity: identity,
    nn.LeakyReLU: leaky_relu,
    nn.LogSigmoid: logsigmoid,
    nn.Mish: mish,
    nn.PReLU: prelu,
    nn.ReLU: relu,
    nn.ReLU6: hardtanh,
    nn.RReLU: rrelu,
    nn.SELU: selu,
    nn.SiLU: silu,
    nn.Sigmoid: sigmoid,
    nn.Softplus: softplus,
    nn.Softshrink: softshrink,
    nn.Softsign: softsign,
    nn.Tanh: tanh,
    nn.Tanhshrink: tanhshrink,
}

# Names as in torch.nn.functional, and "linear" as in torch.nn.init.
TABLE: dict[str, Callable[[], Activation]] = {
    "celu": celu,
    "elu": elu,
    "gelu": gelu,
    "gelu_tanh": lambda: gelu("tanh"),
    "hardshrink": hardshrink,
    "hardsigmoid": hardsigmoid,
    "hardswish": hardswish,
    "hardtanh": hardtanh,
    "identity": identity,
    "leaky_relu": leaky_relu,
    "linear": identity,
    "logsigmoid": logsigmoid,
    "mish": mish,
    "relu": relu,
    "relu6": lambda: hardtanh(0.0, 6.0),
    "rrelu": rrelu,
    "selu": selu,
    "sigmoid": sigmoid,
    "silu": silu,
    "softplus": softplus,
    "softshrink": softshrink,
    "softsign": softsign,
    "tanh": tanh,
    "tanhshrink": tanhshrink,
}

_named: dict[tuple[str, float | None], Activation] = {}
PARAMETRIC: dict[str, Callable[[float], Activation]] = {"leaky_relu": leaky_relu, "elu": elu, "celu": celu}


@cache
def _built(build: Callable[..., Activation], *settings: Any) -> Activation:
    """An activation of the table, built once, so that its integrals are computed once."""
    return build(*settings)


def of_module(module: nn.Module) -> Activation | None:
    """The activation that a module of torch.nn computes, with its parameters; None if it is not one of the table."""
    for base in type(module).__mro__:
        if base in MODULES:
            if type(module).forward is not base.forward:
                return None  # a subclass that computes something else
            build = MODULES[base]
            settings = tuple(getattr(module, name) for name in inspect.signature(build).parameters)
            return build(*settings) if any(isinstance(value, Tensor) for value in settings) else _built(build, *settings)
    return None


def named(name: str, parameter: float | None = None) -> Activation:
    """The activation of a name in :data:`TABLE`, with its one parameter: the slope of leaky_relu, the alpha of elu and celu.

    Raises:
        ValueError: unknown name, or a parameter for an activation that has none.
    """
    if (name, parameter) not in _named:  # a plain dictionary, which torch.compile reads; a cached function it would trace
        if parameter is not None and name not in PARAMETRIC:
            raise ValueError(f"activation {name}: only {', '.join(PARAMETRIC)} take a parameter, got {parameter}")
        _named[name, parameter] = find(name) if parameter is None else PARAMETRIC[name](parameter)
    return _named[name, parameter]


def as_module(name: str, parameter: float | None = None) -> nn.Module:
    """The module of torch.nn that computes the activation of :func:`named`."""
    if name == "gelu_tanh":
        return nn.GELU("tanh")
    if name == "relu6":
        return nn.ReLU6()
    builder = TABLE[name]
    module = next(module for module, build in MODULES.items() if build is builder)
    return module() if parameter is None else module(parameter)


def find(activation: str | nn.Module | Callable[[Tensor], Any]) -> Activation:
    """The activation of a name, a module or any elementwise function.

    Args:
        activation: a name of torch.nn.functional ("relu", "gelu_tanh" for the approximation), a module such as ``nn.LeakyReLU(0.2)``, or an
            elementwise function. It may have kinks and jumps at multiples of 1/1024.

    Raises:
        ValueError: unknown name. What is not elementwise, constant or not finite is refused when a gain is asked for.
    """
    if isinstance(activation, str):
        if activation not in TABLE:
            raise ValueError(f"activation must be a function of torch.nn.functional, got {activation!r}; known are {', '.join(TABLE)}")
        return _built(TABLE[activation])
    if isinstance(activation, nn.Module) and (known := of_module(activation)):
        return known
    return Activation(getattr(activation, "__name__", type(activation).__name__), activation)
