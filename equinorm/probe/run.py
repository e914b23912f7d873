"""The probe itself: one forward and one backward pass, observed, and the model given back as it was."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from equinorm.probe import calling, gaps, kinds
from equinorm.probe.diagnose import diagnose
from equinorm.probe.diagnose.view import Seen
from equinorm.probe.findings import resolve
from equinorm.probe.hunt import first_function
from equinorm.probe.measure import SAMPLE, measure
from equinorm.probe.parameters import described, fill
from equinorm.probe.record import Failure, Report
from equinorm.probe.source import Source
from equinorm.probe.state import Preserved
from equinorm.probe.tensors import mapped, named_tensors, real, tensors_in
from equinorm.probe.watch import Watch

REENTRANT = "compatible with .grad()"  # torch's words when reentrant checkpointing meets autograd.grad


def probe(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[..., Any] | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    thresholds: Mapping[str, float] | None = None,
    weights: bool = False,
    gap: bool = True,
) -> Report:
    """Run a model once forward and once backward on a batch, and report what the signal did on its way and what hurts it.

    Works on any module. The mode (training or evaluation), the autocast context and the device are those that it is called in. The model,
    the batch, the optimizer and the random generators are left exactly as they were.

    Args:
        model: any ``nn.Module``. Compiled models and DataParallel or DistributedDataParallel wrappers are unwrapped first.
        batch: a tensor (the only argument of forward), a mapping (its keywords), a list or tuple (its positional arguments; with a
            ``loss_fn`` and two entries: input and target).
        loss_fn: gives the loss of ``loss_fn(output, target)`` for such a pair, else of ``loss_fn(output)``. Default: the loss that the
            output carries (``output.loss``), the output itself if it is a single number, else a stand-in whose gradient is standard normal
            noise divided by the number of outputs; ``Report.loss`` says which.
        optimizer: one that holds the parameters; adds the relative size of its next step and the rules about weight decay.
        forward: how the model is called, ``forward(model, batch) -> output``, where the rules above do not fit.
        thresholds: values for some of :data:`equinorm.probe.THRESHOLDS`, by name.
        weights: also compute spectral norm and stable rank of every weight, which takes longer than the rest.
        gap: also compare the output in training mode with that in evaluation mode: one or two more forward passes.

    Returns:
        The report; ``print(report)`` lists the findings. If the model raises, the report holds what was seen until then, with the layer
        and the exception in ``report.failure``.

    Raises:
        TypeError: the model is not a module, or the batch holds no tensor.
        ValueError: an empty batch, parameters without values, an unknown threshold.

    Example:
        >>> import torch, equinorm
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> report = equinorm.probe(model, torch.randn(16, 32))
        >>> [call.name for call in report.calls], report.severe
        (['0', '1', '2', ''], [])
    """
    calling.check(model, batch)
    source = Source(
        model=calling.unwrapped(model), batch=batch, loss_fn=loss_fn, optimizer=optimizer, forward=forward, thresholds=thresholds,
        weights=weights, gap=gap,
    )  # fmt: skip
    report = Report(model=type(source.model).__name__, thresholds=resolve(thresholds), source=source)
    run = _Run(source, report)
    run.observe()
    report.environment = _environment(source)
    report.findings = diagnose(report, run.seen)
    return report


class _Run:
    """One probe: the passes over the model, in order, each inside :class:`Preserved`."""

    def __init__(self, source: Source, report: Report) -> None:
        self.source, self.model, self.report = source, source.model, report
        held = [*self.model.parameters(), *self.model.buffers(), *tensors_in(source.batch)]
        self.devices = {tensor.device for tensor in held}
        self.seen = Seen()

    def observe(self) -> None:
        report = self.report
        report.input = {name: measure(t)[0] for name, t in named_tensors(self.source.batch) if real(t) and t.numel()}
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            _uncompiled(self.model),
            Preserved(self.model, self.devices) as preserved,
        ):
            self.preserved = preserved
            try:
                finished, prints, output = self._pass(accumulate=False)
            except RuntimeError as error:
                if REENTRANT not in str(error):
                    raise
                self._again()
                finished, prints, output = self._pass(accumulate=True)
            self.seen.dropout = {
                name: rate for name, module in self.model.named_modules()
                if kinds.is_dropout(module) and module.training and isinstance(rate := vars(module).get("p"), float)
            }  # fmt: skip
            if finished:
                self._look_again(prints, output)
        if preserved.lost:
            report.notes.append(
                f"The forward pass changed parameters by ways that cannot be seen from outside ({', '.join(preserved.lost)}); they keep "
                "the new values."
            )

    def _again(self) -> None:
        """Forget a pass that must be repeated."""
        self.preserved.rewind()
        self.preserved.restore_buffers()
        self.report.notes.clear()

    def _pass(self, *, accumulate: bool) -> tuple[bool, dict[tuple[str, int], Tensor], list[Tensor]]:
        """The observed forward and backward pass. Returns whether the forward came to its end, prints of all layers, and the output."""
        report = self.report
        watch = Watch(self.model, self.preserved)
        records = described(self.model)
        output: Any = None
        loss: Tensor | None = None
        phase = "forward"
        try:
            watch.attach()
            with watch:
                output, targets = self.call(watch)
                phase = "loss"
                loss = self._loss(output, targets)
            final = [tensor.detach() for tensor in tensors_in(output) if real(tensor)]
            del output
            gradients = None
            if loss is not None:
                phase = "backward"
                trained = [parameter for _, parameter in records if parameter.requires_grad]
                gradients = self._backward(loss, trained, watch.extra, accumulate=accumulate)
            problems = set()
            for record, parameter in records:
                gradient = gradients.pop(id(parameter), None) if gradients is not None else None
                problems.add(
                    fill(record, parameter, gradient, self.source.optimizer, weights=self.source.weights, backward=gradients is not None)
                )
            if problem := "; ".join(sorted(problems - {""})):
                report.notes.append(
                    f"The size of the next step could not be measured: {type(self.source.optimizer).__name__} raised {problem}"
                )
            return True, watch.prints, final
        except calling.LossError:
            raise
        except Exception as error:
            if accumulate is False and REENTRANT in str(error):
                raise
            report.failure = _failure(watch, phase, error)
            for record, parameter in records:
                fill(record, parameter, None, None, weights=False, backward=False)
            return False, {}, []
        finally:
            report.calls, report.norms = watch.calls, [norm for norm in watch.norms if norm.call >= 0]
            report.parameters = [record for record, _ in records]
            watch.close()

    def call(self, watch: Watch) -> tuple[Any, tuple[Any, ...]]:
        """Call the model with a copy of the batch; returns the output and what is left of the batch for the loss."""
        batch = mapped(self.source.batch, _private)
        watch.begin(batch)
        if self.source.forward is not None:
            return self.source.forward(self.model, batch), ()
        args, kwargs, targets, note = calling.split(self.model, batch, self.source.loss_fn)
        if note and note not in self.report.notes:
            self.report.notes.append(note)
        return self.model(*args, **kwargs), targets

    def _loss(self, output: Any, targets: tuple[Any, ...]) -> Tensor | None:
        report = self.report
        if self.source.loss_fn is not None:
            report.loss, loss = "loss_fn", self.source.loss_fn(output, *targets)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                came = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise calling.LossError(f"probe: loss_fn must return a tensor with one number, got {came}; reduce it, as in loss.mean()")
        elif (own := calling.own_loss(output)) is not None:
            report.loss, loss = "the model's own loss", own
        elif isinstance(output, Tensor) and output.ndim == 0 and output.requires_grad:
            report.loss, loss = "the output", output
        else:
            report.loss, loss = "stand-in", calling.stand_in(output)
        if loss is not None and report.loss != "stand-in":
            report.loss_value = float(loss.detach())
        if loss is None or not loss.requires_grad:
            report.loss = "none"
            why = (
                "no parameter requires a gradient"
                if not any(p.requires_grad for p in self.model.parameters())
                else "no output requires a gradient"
            )
            report.notes.append(f"There was no backward pass: {why}.")
            return None
        if report.loss == "stand-in":
            report.notes.append(
                "No loss was given: gradients are those of half the mean squared error of outputs whose errors are standard normal. "
                "Their profile "
                "over depth means something, their absolute size does not."
            )
        return loss.sum()

    def _backward(self, loss: Tensor, trained: list[nn.Parameter], extra: list[Tensor], *, accumulate: bool) -> dict[int, Tensor]:
        if not accumulate:
            wanted = [*trained, *extra]
            if not wanted:
                return {}
            found = torch.autograd.grad(loss, wanted, allow_unused=True)
            return {id(p): g for p, g in zip(trained, found, strict=False) if g is not None}
        # Reentrant checkpointing works through .grad only; what was there is put back at the end, and hooks that would step are held.
        held = [hooks for p in trained if (hooks := getattr(p, "_post_accumulate_grad_hooks", None))]
        asleep = [dict(hooks) for hooks in held]
        for parameter in trained:
            parameter.grad = None
        try:
            for hooks in held:
                hooks.clear()
            loss.backward()
            return {id(p): p.grad for p in trained if p.grad is not None}
        finally:
            for hooks, content in zip(held, asleep, strict=True):
                hooks.update(content)

    def _look_again(self, prints: dict[tuple[str, int], Tensor], output: list[Tensor]) -> None:
        """Further forward passes, without gradients: training against evaluation, and the function that made the first NaN."""
        finite = all(call.forward is None or call.forward.finite for call in self.report.calls)
        if not finite:
            self.preserved.rewind()
            self.preserved.restore_buffers()
            self.seen.origin = first_function(self.model, self.preserved, self.call)
            self.report.notes.append("Training and evaluation were not compared, because the output is not finite.")
        elif self.source.gap:
            self.report.gap, note = gaps.measured(self.model, self.preserved, self.call, prints, output)
            if note:
                self.report.notes.append(note)


def _private(tensor: Tensor) -> Tensor:
    """A copy that the model may change."""
    copy = tensor.detach().clone()
    return copy.requires_grad_(tensor.requires_grad) if real(copy) else copy


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Run compiled parts of the model as they were written, because hooks see nothing inside compiled code."""
    compiled = any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())
    context: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with context:
        yield


def _failure(watch: Watch, phase: str, error: Exception) -> Failure:
    frame = watch.frames[-1] if watch.frames and phase == "forward" else None
    message = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    if frame is None:
        return Failure(phase=phase, layer="", layer_type=type(next(iter(watch._names))).__name__, expected="", inputs=(), error=message)
    return Failure(
        phase=phase, layer=frame.name, layer_type=type(frame.module).__name__, expected=_takes(frame.module), inputs=frame.given,
        error=message
    )  # fmt: skip


def _takes(module: nn.Module) -> str:
    """The input that a layer of torch takes, "" for others."""
    if isinstance(module, kinds.CONV):
        return f"(N, {module.in_channels}, {', '.join('DHW'[-len(module.kernel_size) :])}) {_dtype(module)}"
    if isinstance(module, nn.Linear):
        return f"(..., {module.in_features}) {_dtype(module)}"
    if isinstance(module, (*kinds.BATCH, *kinds.INSTANCE)):
        return f"(N, {module.num_features}, ...) {_dtype(module)}"
    if isinstance(module, nn.GroupNorm):
        return f"(N, {module.num_channels}, ...) {_dtype(module)}"
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return f"(..., {', '.join(map(str, module.normalized_shape))}) {_dtype(module)}"
    if isinstance(module, nn.Embedding):
        return f"integers from 0 to {module.num_embeddings - 1}"
    if isinstance(module, nn.RNNBase):
        return f"({'N, T' if module.batch_first else 'T, N'}, {module.input_size}) {_dtype(module)}"
    return ""


def _dtype(module: nn.Module) -> str:
    parameter = next(module.parameters(), None)
    return str(parameter.dtype).removeprefix("torch.") if parameter is not None else ""


@cache
def _version() -> str:
    return version("equinorm")


def _environment(source: Source) -> dict[str, Any]:
    model, devices = source.model, sorted({str(p.device) for p in source.model.parameters()})
    kinds_of = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    autocast = [
        f"{kind} {str(torch.get_autocast_dtype(kind)).removeprefix('torch.')}" for kind in {d.split(":")[0] for d in devices} | {"cpu"}
        if torch.is_autocast_enabled(kind)
    ]  # fmt: skip

    return {
        "equinorm": _version(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "devices": devices,
        "dtypes": sorted(kinds_of),
        "autocast": autocast,
        "training": model.training,
        "optimizer": type(source.optimizer).__name__ if source.optimizer is not None else None,
        "sample": SAMPLE,
    }
