"""What a diagnosis says: the findings, the kinds there are, and the numbers that they are judged by.

Two tables carry the meaning, and the documentation prints both. :data:`KINDS` names every kind of finding with what it means and what is
usually done about it; :data:`THRESHOLDS` holds every number that a rule compares with, and the reason for it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Severity = Literal["severe", "warning", "note"]

SEVERITIES: tuple[Severity, ...] = ("severe", "warning", "note")
"""Worst first. Severe: training fails or the result is wrong. Warning: training suffers. Note: worth knowing, may be intended."""


class Kind(NamedTuple):
    """One kind of finding.

    Attributes:
        title: in a few words, for headings.
        meaning: one or two sentences: what is the case, and why it hurts.
        suggestion: what usually helps, a key of :data:`SUGGESTIONS`.
    """

    title: str
    meaning: str
    suggestion: str


SUGGESTIONS: dict[str, str] = {
    "init_gain": "initialise the linear layers with the gain of the activation behind them",
    "lsuv": "scale each layer's weights until its output on this batch has variance 1 (LSUV)",
    "rescale_layer": "divide this one layer's weights by the factor by which it stands out",
    "scale_residual": "scale the residual sum, by 1/sqrt(2) for two equal branches or with a branch that starts at 0",
    "shift_bias": "set the biases in front of the activation back to 0",
    "swap_norm": "use a norm whose statistics do not need the batch, such as GroupNorm",
    "recalibrate": "compute the running statistics anew on training data",
    "set_momentum": "set the norm's momentum to 0.1, or to None for a plain average",
    "remove_norm": "remove the norm that the other one makes redundant",
    "remove_bias": "build the layer with bias=False",
    "split_decay": "put biases and the affine parameters of norms into a group with weight_decay=0",
    "standardize_input": "subtract the mean of the data and divide by its standard deviation before the first layer",
    "guard_function": "keep the argument of the function inside its domain, with a small constant or a clamp",
    "use_bfloat16": "use bfloat16, or float32 for this layer; a smaller signal in front of it also helps",
    "scale_loss": "multiply the loss before the backward pass and divide the gradients after it (GradScaler)",
    "scale_logits": "divide what goes into the softmax by its scale, as attention does by sqrt(d), or normalize queries and keys",
    "move_dropout": "put the dropout behind the last norm that keeps running statistics",
    "clip_gradient": "bound the recurrent map (orthogonal initialisation, a gated cell) and clip the gradient's norm",
    "gated_cell": "use a gated cell (LSTM, GRU) or initialise the recurrent weight orthogonally",
    "connect": "let the layer's output reach the loss: look for detach(), no_grad, argmax, a branch that is not added or a gate at 0",
    "unfreeze": "set requires_grad, or freeze the whole layer if it was meant",
    "learning_rate": "change the learning rate of the group in question",
    "inspect": "look at the layer",
}


KINDS: dict[str, Kind] = {
    "exploding_forward": Kind(
        "activations explode",
        "The size of the activations grows exponentially with depth. Late layers see huge numbers, saturate or overflow.",
        "init_gain",
    ),
    "vanishing_forward": Kind(
        "activations vanish",
        "The size of the activations shrinks exponentially with depth, until outputs no longer depend on the input.",
        "init_gain",
    ),
    "exploding_backward": Kind(
        "gradients explode",
        "The gradient grows exponentially on its way to the first layers: they are thrown around while the last ones hardly move.",
        "init_gain",
    ),
    "vanishing_backward": Kind(
        "gradients vanish",
        "The gradient shrinks exponentially on its way to the first layers, which therefore do not learn.",
        "init_gain",
    ),
    "scale_jump": Kind(
        "one layer out of scale",
        "One layer multiplies the signal by a factor far from that of its peers.",
        "rescale_layer",
    ),
    "residual_growth": Kind(
        "residual sums without scaling",
        "Every residual sum makes the signal bigger by a constant factor, as sums of two equal independent terms do by sqrt(2).",
        "scale_residual",
    ),
    "saturation": Kind(
        "saturated activation",
        "Most inputs lie where the activation is flat: hardly any gradient passes.",
        "init_gain",
    ),
    "peaked_softmax": Kind(
        "softmax saturated",
        "Most rows of a softmax put all weight on one entry: its gradient is nearly 0.",
        "scale_logits",
    ),
    "dead_channels": Kind(
        "dead channels",
        "Channels that are 0 for every sample and position of the batch: they contribute nothing and, behind a ReLU, get no gradient.",
        "shift_bias",
    ),
    "constant_channels": Kind(
        "constant channels",
        "Channels that have the same value for every sample and position of the batch: they carry no information.",
        "inspect",
    ),
    "half_overflow": Kind(
        "overflow in half precision",
        "Values come near or beyond the largest float16 number, 65504.",
        "use_bfloat16",
    ),
    "half_underflow": Kind(
        "underflow in half precision",
        "Gradients in float16 are so small that they lose digits or become 0.",
        "scale_loss",
    ),
    "not_finite": Kind(
        "NaN or infinity",
        "A layer returned NaN or infinity although what it was given was finite.",
        "guard_function",
    ),
    "not_finite_backward": Kind(
        "NaN or infinity in the backward pass",
        "A gradient became NaN or infinite although the forward pass was finite.",
        "guard_function",
    ),
    "running_drift": Kind(
        "running statistics off",
        "The running estimates of a norm differ from the statistics of this batch: in evaluation the model computes something else.",
        "recalibrate",
    ),
    "momentum": Kind(
        "momentum of running statistics",
        "The running estimates follow the last batch alone, or nearly stand still.",
        "set_momentum",
    ),
    "small_batch": Kind(
        "batch too small for its norm",
        "A statistic is taken over so few values that it is noise, and the noise goes into the signal.",
        "swap_norm",
    ),
    "norm_after_norm": Kind(
        "norm after norm",
        "A norm directly behind another over the same axes: the second undoes the affine map of the first and costs a pass.",
        "remove_norm",
    ),
    "bias_before_norm": Kind(
        "bias in front of a norm",
        "The norm subtracts the bias again: its gradient is 0, and weight decay or noise is all that moves it.",
        "remove_bias",
    ),
    "decay_on_affine": Kind(
        "weight decay on affine parameters",
        "Weight decay pulls biases and the scales of norms towards 0, which limits no capacity and takes the signal away.",
        "split_decay",
    ),
    "unnormalized_input": Kind(
        "input not normalized",
        "The input is far from mean 0 and standard deviation 1; the first layer's gradients are then badly scaled.",
        "standardize_input",
    ),
    "train_eval_gap": Kind(
        "training and evaluation differ",
        "The model computes something else in evaluation mode than in training mode, on the same batch.",
        "recalibrate",
    ),
    "dropout_before_norm": Kind(
        "dropout in front of running statistics",
        "Dropout raises the variance in training and not in evaluation, so the running variance behind it does not fit evaluation.",
        "move_dropout",
    ),
    "failed": Kind(
        "the model raised",
        "A layer raised an exception; the records end there.",
        "inspect",
    ),
    "no_gradient": Kind(
        "no gradient",
        "Parameters that are to be trained receive no gradient, or one that is exactly 0.",
        "connect",
    ),
    "frozen": Kind(
        "frozen parameters",
        "Parameters do not require a gradient while others of the same kind do.",
        "unfreeze",
    ),
    "update_size": Kind(
        "size of the update",
        "One step of the optimizer changes a weight by far more, or far less, than is usual.",
        "learning_rate",
    ),
}


class Threshold(NamedTuple):
    """A number that a rule compares with.

    Attributes:
        value: the default.
        meaning: what is compared.
        reason: why this number.
    """

    value: float
    meaning: str
    reason: str


THRESHOLDS: dict[str, Threshold] = {
    "growth_warning": Threshold(
        32.0,
        "factor by which activations or gradients change over depth, time steps or repeated calls, step by step: warning",
        "2^5. With well-chosen gains the logarithm of the scale does a random walk; a layer of width n adds a standard deviation of about "
        "1.1/sqrt(n), so that at n = 64 a factor of 32 takes 600 layers by chance.",
    ),
    "growth_severe": Threshold(
        1024.0,
        "the same factor: severe",
        "2^10. float16 has 10 bits of fraction: of two numbers that are 2^10 apart the smaller hardly survives their sum; and one learning "
        "rate cannot suit layers whose gradients differ by three orders of magnitude.",
    ),
    "jump": Threshold(
        10.0,
        "factor by which a layer's gain (output rms / input rms) differs from the median of the linear layers, where no norm follows: "
        "warning",
        "The gains of the usual initialisations (torch's default 0.58, Glorot 1, He 1.41) lie within a factor of 2.5 of each other.",
    ),
    "residual_excess": Threshold(
        2.0,
        "growth over the residual sums, in units of the square root of their number: warning",
        "Branches of equal size, as norms make them, add up to the square root of their number. What grows faster multiplies.",
    ),
    "saturation_warning": Threshold(
        0.5,
        "share of the inputs of a bounded activation in its flat ends (slope below 0.5 % of the steepest), or of softmax rows above "
        "0.99: warning",
        "Half of the units pass no gradient. At unit variance it is 0.1 % for tanh and 0 for the sigmoid.",
    ),
    "saturation_severe": Threshold(
        0.9,
        "the same share: severe",
        "A tenth of the units or fewer still learn.",
    ),
    "dead_warning": Threshold(
        0.5,
        "share of channels that are 0 throughout behind an activation: warning",
        "In a deep network without norms samples become alike, and every second ReLU is off for all of them, by the symmetry of its "
        "weights. More than half is no chance.",
    ),
    "dead_severe": Threshold(
        0.9,
        "the same share: severe",
        "Less than a tenth of the width is left to carry the signal.",
    ),
    "constant_warning": Threshold(
        0.0625,
        "share of channels with one value throughout, of a linear layer or norm: warning (fewer are noted)",
        "Single ones are often meant, like the row of zeros of a padding token.",
    ),
    "constant_severe": Threshold(0.5, "the same share: severe", "Most of the layer carries nothing."),
    "values_per_channel": Threshold(
        16.0,
        "fewest values per channel from which a channel is called dead or constant",
        "A healthy ReLU unit is off half of the time; that 16 independent values are all 0 has a chance of 2^-16.",
    ),
    "half_headroom": Threshold(
        8.0,
        "factor between the largest float16 value seen and 65504 under which overflow is near: warning",
        "2^3. Extremes of other batches, and those later in training, are larger than the ones of this batch by such factors.",
    ),
    "half_lost": Threshold(
        0.5,
        "share of the float16 gradients that are not 0 but below 6.1e-5, the smallest normal number: warning",
        "Below it digits go one by one: what is smaller than 6e-8 is 0.",
    ),
    "drift_mean_warning": Threshold(
        1.0,
        "root mean square over channels of (batch mean - running mean) / running standard deviation: warning",
        "A shift by one standard deviation turns a ReLU that is on for half of the values into one that is on for 84 % or 16 %.",
    ),
    "drift_mean_severe": Threshold(3.0, "the same: severe", "At three standard deviations it is on for all values or for none."),
    "drift_variance_warning": Threshold(
        1.386,
        "magnitude of the mean over channels of log(batch variance / running variance): warning",
        "log 4: in evaluation the norm's output has twice or half the standard deviation of training.",
    ),
    "drift_variance_severe": Threshold(
        2.773,
        "the same: severe",
        "log 16: four times or a quarter, at every such norm, and the factors multiply along depth in evaluation.",
    ),
    "batch_note": Threshold(
        16.0,
        "samples under a statistic over the batch, below which it is noted",
        "Wu and He 2018 (Group Normalization, table 2): batch norm loses nothing at 16 samples and 1.1 points at 8.",
    ),
    "batch_warning": Threshold(8.0, "the same: warning", "In the same table it loses 3.7 points at 4 samples and 11 at 2."),
    "values_severe": Threshold(
        4.0,
        "values in one statistic, of any norm, below which it is severe",
        "One value is normalized to 0 and two to -1 and 1, whatever they were; three leave one degree of freedom.",
    ),
    "momentum_high": Threshold(
        0.5,
        "momentum (weight of the new value) from which it is a warning",
        "The estimate is then an average of 1/momentum, two batches or fewer. The weight of the old value, as other frameworks give it "
        "(0.9, 0.99), is the usual mistake.",
    ),
    "momentum_low": Threshold(
        1e-4,
        "momentum up to which it is a warning",
        "The estimates need 1/momentum, ten thousand steps or more, to follow.",
    ),
    "gap_warning": Threshold(
        0.5,
        "rms of the output's difference between training and evaluation, relative to the output: warning",
        "Statistics of 16 samples against those of all differ by 1/sqrt(16); a few norms in a row add up to less than this.",
    ),
    "gap_severe": Threshold(1.0, "the same: severe", "The difference is as large as the output itself."),
    "input_rms_warning": Threshold(
        10.0,
        "rms of what enters the first linear layer, or its inverse: warning",
        "The first layer's gradient is proportional to it and its curvature to its square: 100 times that of layers fed with unit "
        "variance.",
    ),
    "input_rms_severe": Threshold(100.0, "the same: severe", "Ten thousand times: no learning rate suits both."),
    "input_mean": Threshold(
        5.0,
        "|mean| / standard deviation of what enters the first linear layer: warning",
        "The curvature along the mean exceeds that along the rest by its square (LeCun et al. 1998, Efficient BackProp, section 4.3). "
        "Images "
        "scaled to 0..1 have 2.",
    ),
    "update_high": Threshold(
        0.1,
        "rms of the next step relative to the weight's rms: warning",
        "Ten such steps replace the weight. Usual is about 0.001.",
    ),
    "update_low": Threshold(
        6e-8,
        "the same, below which it is noted",
        "Half a unit in the last place of float32: the step is rounded away.",
    ),
}


def resolve(changes: Mapping[str, float] | None) -> dict[str, float]:
    """Return the value of every threshold, those in ``changes`` replaced.

    Raises:
        ValueError: no such threshold (the nearest name is suggested), or a value that is not a number.
    """
    values = {name: threshold.value for name, threshold in THRESHOLDS.items()}
    for name, value in (changes or {}).items():
        if name not in values:
            near = difflib.get_close_matches(name, values, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(values)}"
            raise ValueError(f"probe: no threshold is called {name!r}; {hint}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
            raise ValueError(f"probe: threshold {name!r} must be a number, got {value!r}")
        values[name] = float(value)
    return values


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that the probe found, with its evidence.

    Attributes:
        kind: a key of :data:`KINDS`.
        severity: one of :data:`SEVERITIES`.
        layers: dotted names of the layers concerned, the culprit first; "" is the model itself.
        sentence: what a colleague would say, with names and numbers.
        evidence: the numbers behind the sentence, by name.
        suggestion: a key of :data:`SUGGESTIONS`.
        calls: indices into ``Report.calls`` of the calls concerned, the culprit first.
    """

    kind: str
    severity: Severity
    layers: tuple[str, ...]
    sentence: str
    evidence: dict[str, float | int | str] = field(default_factory=dict)
    suggestion: str = ""
    calls: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Finding: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.severity not in SEVERITIES:
            raise ValueError(f"Finding: severity must be one of {', '.join(SEVERITIES)}, got {self.severity!r}")
        if not self.suggestion:
            object.__setattr__(self, "suggestion", KINDS[self.kind].suggestion)
        if self.suggestion not in SUGGESTIONS:
            raise ValueError(f"Finding: suggestion must be one of {', '.join(SUGGESTIONS)}, got {self.suggestion!r}")

    @property
    def title(self) -> str:
        """The kind in a few words."""
        return KINDS[self.kind].title
