"""What a probe records: plain numbers about one forward and one backward pass, and nothing of the tensors themselves.

The same records are the JSON format: :meth:`Report.to_dict` writes every field under its own name, tuples as lists, and numbers that are
not finite as null (JSON has no NaN; the counts ``nan`` and ``inf`` say which it was). :data:`SCHEMA` is raised when a field changes its
meaning or goes away; new fields do not raise it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pathlib import Path

    from equinorm.checkup.prescribe import Prescriptions
    from equinorm.probe.findings import Finding
    from equinorm.probe.source import Source

SCHEMA = 1

BINS = 64
"""Channels are kept one by one up to this number; more are averaged in as many runs of neighbours."""

Role = Literal[
    "linear",  # linear maps with weights: Linear, convolutions, bilinear
    "norm",
    "activation",  # elementwise, and softmax
    "residual",  # a sum of two activations
    "recurrent",
    "attention",
    "embedding",
    "dropout",
    "pool",  # pooling, up- and down-sampling, padding
    "shape",  # identity, flatten, unflatten
    "container",  # any module with children that is none of the above
    "other",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """Statistics of one floating-point tensor. Complex tensors count as pairs of real numbers.

    Attributes:
        count: number of values.
        sampled: how many of them mean, std, rms, zeros and tiny were taken from (a strided sample of large tensors; the others are exact).
        mean, std, rms: over the finite values of the sample; std divides by n, so rms² = mean² + std².
        min, max: over all values that are not NaN.
        zeros: share of values that are exactly 0.
        tiny: share of values that are not 0 but smaller in magnitude than float16's smallest normal number, 6.1e-5.
        nan, inf: number of such values, over all.
    """

    count: int
    sampled: int
    mean: float
    std: float
    rms: float
    min: float
    max: float
    zeros: float
    tiny: float
    nan: int
    inf: int

    @property
    def finite(self) -> bool:
        """Whether neither NaN nor infinity occurs."""
        return self.nan == 0 and self.inf == 0

    @property
    def absmax(self) -> float:
        """Largest magnitude."""
        return max(abs(self.min), abs(self.max))


@dataclass(frozen=True, kw_only=True, slots=True)
class Channels:
    """Per-channel summary of one tensor; a channel's values are those of all samples and positions.

    Attributes:
        axis: which dimension of ``Call.shape`` the channels are.
        count: number of channels.
        squared_mean: average over channels of the channel mean squared; with the next, the signal propagation plot of Brock et al. 2021.
        variance: average over channels of the channel variance.
        dead: how many channels are exactly 0 everywhere in the batch.
        constant: how many have one and the same value everywhere, dead ones included.
        dead_channels, constant_channels: their numbers, the first 64 of them.
        rms: root mean square per channel; with more than 64 channels, of 64 runs of neighbours. For heat maps.
    """

    axis: int
    count: int
    squared_mean: float
    variance: float
    dead: int
    constant: int
    dead_channels: tuple[int, ...]
    constant_channels: tuple[int, ...]
    rms: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Residual:
    """A sum of two activations, one of which was computed from the other: the residual branch and its skip.

    Attributes:
        skip, branch: root mean square of the two terms.
        module: name of the module whose forward adds them.
        skip_from, branch_from: indices of the calls that the terms come from, -1 where no call is known.
    """

    skip: float
    branch: float
    module: str
    skip_from: int
    branch_from: int

    @property
    def share(self) -> float:
        """Branch / skip: above 1 the branch overtakes the skip."""
        return self.branch / self.skip if self.skip else math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """The signal over the time steps of one call of a recurrent module, in order of time; long sequences are averaged in 64 runs.

    Attributes:
        length: number of time steps.
        forward: rms of the output at each step.
        gradient: rms of the gradient with respect to the input at each step; empty when none arrived.
    """

    length: int
    forward: tuple[float, ...]
    gradient: tuple[float, ...] = ()


@dataclass(kw_only=True, slots=True)
class Call:
    """One call of a module, or of an activation or residual sum written as a function inside a module's forward.

    Attributes:
        index: position in ``Report.calls``, which is the order in which calls ended.
        name: the module's dotted name; "" is the model itself. For functions, the calling module's name and the function with its number
            there: "layer1.0:relu", "layer1.0:add#2".
        type: class name, or the function's.
        kind: "module" or "function".
        role: what it is to the diagnosis.
        number: which call of this module it is, from 0: a shared module has several.
        nesting: how many modules it is inside of.
        leaf: no recorded module call happened inside it.
        position: depth of the signal: number of leaf calls that ended before. The abscissa of profiles.
        inputs: indices of the calls whose outputs it read, seen through functions that are not recorded.
        shape, dtype, device: of the first floating-point tensor in the output; () and "" when there is none.
        outputs: number of floating-point tensors in the output.
        forward: statistics of that first tensor.
        gradient: statistics of the loss's gradient with respect to it; None when none arrived.
        channels: per-channel summary; None for tensors without channels.
        input: statistics of the first floating-point input, for norms and activations.
        saturation: share of inputs in the flat region of an activation; for softmax the share of rows that put nearly all weight on one
            entry; None elsewhere.
        residual: the two terms, for residual sums.
        steps: the signal over time, for recurrent modules.
    """

    index: int
    name: str
    type: str
    kind: Literal["module", "function"]
    role: Role
    number: int
    nesting: int
    leaf: bool
    position: int
    inputs: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    dtype: str = ""
    device: str = ""
    outputs: int = 0
    forward: Stats | None = None
    gradient: Stats | None = None
    channels: Channels | None = None
    input: Stats | None = None
    saturation: float | None = None
    residual: Residual | None = None
    steps: Steps | None = None

    @property
    def label(self) -> str:
        """Name for people, "the model" at the top; with the number of the call from the second on."""
        name = self.name or "the model"
        return name if self.number == 0 else f"{name} (call {self.number + 1})"


@dataclass(kw_only=True, slots=True)
class Parameter:
    """One parameter, under its first name.

    Attributes:
        name: dotted name.
        module: name of the module that holds it.
        module_type: that module's class name.
        role: "weight" (two or more dimensions), "bias", "affine weight" or "affine bias" (of a norm), "scalar", "embedding", "other".
        shape, dtype: of the tensor.
        aliases: further names of the same tensor.
        requires_grad: whether it is trained.
        used: whether the loss's gradient reached it; None when no backward pass was made.
        rms: root mean square of its values; NaN when one of them is not finite.
        gradient: statistics of its gradient.
        weight_decay: of its group in the optimizer; None without an optimizer, or when the optimizer does not hold it.
        lr: likewise.
        update: rms of the next step's change divided by ``rms``; None without an optimizer or gradient.
        spectral_norm: largest singular value of the weight as matrix (output units, rest); None unless asked for.
        stable_rank: squared Frobenius norm over squared spectral norm; None unless asked for.
    """

    name: str
    module: str
    module_type: str
    role: str
    shape: tuple[int, ...]
    dtype: str
    aliases: tuple[str, ...] = ()
    requires_grad: bool = True
    used: bool | None = None
    rms: float = 0.0
    gradient: Stats | None = None
    weight_decay: float | None = None
    lr: float | None = None
    update: float | None = None
    spectral_norm: float | None = None
    stable_rank: float | None = None


@dataclass(kw_only=True, slots=True)
class Norm:
    """One call of a norm: what its statistics were taken over, and how the batch compares with the running estimates.

    Attributes:
        name, type: of the module.
        call: index into ``Report.calls``.
        pools: what one statistic averages over, in the letters of :class:`equinorm.facts.Facts` ("NS", "GS", "D"); "" when unknown.
        values: number of values in one statistic; None when unknown.
        removes_mean: whether a constant added to every channel alike, or to one channel, disappears ("channel": a constant per channel
            disappears; "all": one constant over all channels does; "": none does).
        training: whether it normalized with the statistics of the batch (True) or with its running estimates.
        tracks: whether it keeps running estimates.
        momentum: weight of the new value in them; None for a plain average, or when there are none.
        batches: ``num_batches_tracked`` before the probe; None when not kept.
        mean_drift: root mean square over channels of (batch mean - running mean) / running standard deviation; None without estimates.
        mean_drift_max, mean_drift_channel: the largest magnitude among the channels, and its channel.
        log_variance_drift: mean over channels of log(batch variance / running variance); None without estimates.
        log_variance_drift_max, log_variance_drift_channel: the largest in magnitude, with its sign, and its channel.
    """

    name: str
    type: str
    call: int
    pools: str = ""
    values: int | None = None
    removes_mean: Literal["channel", "all", ""] = ""
    training: bool = True
    tracks: bool = False
    momentum: float | None = None
    batches: int | None = None
    mean_drift: float | None = None
    mean_drift_max: float | None = None
    mean_drift_channel: int | None = None
    log_variance_drift: float | None = None
    log_variance_drift_max: float | None = None
    log_variance_drift_channel: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Gap:
    """The output in training mode against that in evaluation mode, on the same batch and with the same random numbers.

    Attributes:
        difference: rms of the difference divided by the rms of the training output.
        layer: the layer after which the two runs part by more than before; "" when they do not part.
        layers: for each leaf module that was called in both runs, in order: (name, relative difference of its output).
        train_rms, eval_rms: of the outputs.
    """

    difference: float
    layer: str
    layers: tuple[tuple[str, float], ...]
    train_rms: float
    eval_rms: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """An exception that the model raised while it was probed.

    Attributes:
        phase: "forward", "loss" or "backward".
        layer: dotted name of the innermost module that was running, "" for the model itself.
        layer_type: its class name.
        expected: what the layer takes, where that can be read off it ("(N, 64, H, W)"); "" elsewhere.
        inputs: shapes and dtypes of what the layer was given.
        error: class name and message of the exception.
    """

    phase: str
    layer: str
    layer_type: str
    expected: str
    inputs: tuple[str, ...]
    error: str

    def __str__(self) -> str:
        where = f"layer {self.layer!r} ({self.layer_type})" if self.layer else f"the model itself ({self.layer_type})"
        given = f", given {', '.join(self.inputs)}" if self.inputs else ""
        takes = f"; it takes {self.expected}" if self.expected else ""
        return f"{where} refused in the {self.phase} pass{given}{takes}: {self.error}"


@dataclass(kw_only=True)
class Report:
    """The result of :func:`equinorm.probe`.

    Attributes:
        model: the model's class name.
        calls: one record per call, in the order in which calls ended.
        parameters: one record per parameter tensor.
        norms: one record per call of a norm.
        findings: the diagnosis, worst first.
        input: statistics of the batch's floating-point tensors, by their place in it ("", "0", "image").
        loss: what was differentiated: "loss_fn", "the model's own loss", "the output", "stand-in", or "none" with the reason in notes.
        loss_value: its value; None without a loss, and for the stand-in, whose value means nothing.
        gap: training against evaluation mode; None when it was not measured (the reason is in notes).
        failure: what the model raised, if it raised; the rest of the report is then what was seen until that moment.
        notes: sentences on what was done for want of information and what could not be measured.
        environment: versions, devices, mode, and the numbers of values behind each statistic.
        thresholds: the values that the findings were judged by, by name (:data:`equinorm.probe.findings.THRESHOLDS`).
        schema: version of this format.
        source: what was probed, for prescriptions to repeat it; not part of the JSON.
        prescriptions: what :meth:`prescribe` tried last; not part of the JSON.
    """

    model: str
    calls: list[Call] = field(default_factory=list)
    parameters: list[Parameter] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    input: dict[str, Stats] = field(default_factory=dict)
    loss: str = "none"
    loss_value: float | None = None
    gap: Gap | None = None
    failure: Failure | None = None
    notes: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    thresholds: dict[str, float] = field(default_factory=dict)
    schema: int = SCHEMA
    source: Source | None = field(default=None, repr=False, compare=False)
    prescriptions: Prescriptions | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """All but ``source`` and ``prescriptions`` as lists, dictionaries, strings, numbers and None; see the head of this module."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self) if f.name not in ("source", "prescriptions")}

    def to_json(self, indent: int | None = None) -> str:
        """Return :meth:`to_dict` as strict JSON."""
        return json.dumps(self.to_dict(), allow_nan=False, indent=indent)

    @property
    def severe(self) -> list[Finding]:
        """The findings of severity "severe"."""
        return [finding for finding in self.findings if finding.severity == "severe"]

    def call(self, name: str, number: int = 0) -> Call:
        """Return the record of a call by name.

        Raises:
            KeyError: no such call; the message shows what there is.
        """
        for call in self.calls:
            if call.name == name and call.number == number:
                return call
        raise KeyError(f"no call {number} of {name!r} was recorded; there are {', '.join(c.label for c in self.calls)}")

    def leaves(self) -> Iterator[Call]:
        """The calls with nothing recorded inside them, which carry the signal step by step."""
        return (call for call in self.calls if call.leaf)

    def show(self) -> None:
        """Print the key numbers, the profile over depth, the findings and what was tried against them. Needs the extra ``probe``."""
        from equinorm.checkup.terminal import show

        show(self, self.prescriptions or ())

    def html(self, path: str | Path) -> Path:
        """Write a page with figures, which needs nothing but itself, and return its path. Needs the extra ``probe``."""
        from equinorm.checkup.page import write_page

        return write_page(self, path, self.prescriptions or ())

    def prescribe(self) -> Prescriptions:
        """Try what may help, each on a copy of the model probed with the same batch; the most helpful comes first.

        Example:
            >>> import torch, equinorm
            >>> from torch import nn
            >>> deep = nn.Sequential(*[layer for _ in range(30) for layer in (nn.Linear(64, 64), nn.ReLU())])
            >>> report = equinorm.probe(deep, torch.randn(32, 64))
            >>> [finding.kind for finding in report.severe]
            ['vanishing_forward', 'vanishing_backward']
            >>> report.prescribe()[0].helps
            True
            >>> report.apply(1).severe
            []
        """
        from equinorm.checkup.prescribe import prescribe

        self.prescriptions = prescribe(self)
        return self.prescriptions

    def apply(self, number: int) -> Report:
        """Do to the model itself what prescription ``number`` did to its copy. Returns a report of the changed model.

        Raises:
            ValueError: nothing was prescribed, no such number, or the prescription could not be tried.
        """
        if self.prescriptions is None:
            raise ValueError("apply: nothing was prescribed yet; call report.prescribe() and look at what it found")
        return self.prescriptions.apply(number)

    def __str__(self) -> str:
        head = f"{self.model}: {len(self.calls)} calls, {len(self.parameters)} parameters, {len(self.findings)} findings"
        lines = [head, *(f"  {self.failure}" for _ in [0] if self.failure), *(f"  [{f.severity}] {f.sentence}" for f in self.findings)]
        return "\n".join(lines)


def plain(value: Any) -> Any:
    """Turn records, tuples and mappings into what JSON has; numbers that are not finite become None."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
