"""Probing while training: every so many steps, the step's own forward and backward pass is observed.

No pass is added. Between samples the model carries no hook at all; at a sample the hooks of a probe are put on for one forward pass and its
backward pass, and taken off again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from equinorm.probe import calling, kinds
from equinorm.probe.diagnose import diagnose
from equinorm.probe.diagnose.view import Seen
from equinorm.probe.findings import SEVERITIES, resolve
from equinorm.probe.loggers import Logger
from equinorm.probe.measure import SAMPLE, measure
from equinorm.probe.parameters import described, fill
from equinorm.probe.record import Report, Stats
from equinorm.probe.tensors import named_tensors, real
from equinorm.probe.watch import Watch


class ProbeCallback:
    """Observes every so many steps of a training loop, and writes what it saw.

    With an optimizer it counts the optimizer's steps and needs no call in the loop. Without one, call :meth:`step` after each step. In
    processes of a distributed run other than the first it does nothing.

    Args:
        model: the model; compiled and wrapped ones are unwrapped, and run uncompiled in the steps that are observed.
        optimizer: the optimizer, or what accelerate made of it; adds the size of its steps relative to the weights.
        every: observe steps 0, every, 2 every, ...
        loggers: see :class:`equinorm.probe.loggers.Logger`.
        thresholds: as for :func:`equinorm.probe`.
        manual: do not wait for the model's own forward; the loop calls :meth:`begin` before what it does with the model and :meth:`end`
            before the backward pass, as it must where it calls parts of the model and not the model.

    Attributes:
        report: of the last observed step; None before the first. Without the gap between training and evaluation, and
            not to be prescribed from.
        count: steps so far.

    Raises:
        TypeError: the model is not a module. ValueError: ``every`` is not positive, or an unknown threshold.

    Example:
        >>> import torch, equinorm
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with equinorm.probe.ProbeCallback(model, optimizer, every=10) as callback:
        ...     for _ in range(11):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(16, 8)).square().mean().backward()
        ...         optimizer.step()
        >>> [call.name for call in callback.report.leaves()], callback.count
        (['0', '1', '2'], 11)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any = None,
        *,
        every: int = 100,
        loggers: Sequence[Logger] = (),
        thresholds: Mapping[str, float] | None = None,
        manual: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"ProbeCallback: model must be a torch.nn.Module, got {type(model).__name__}")
        if every < 1:
            raise ValueError(f"ProbeCallback: every must be at least 1, got {every}")
        self.model, self.every, self.loggers, self.thresholds = calling.unwrapped(model), every, tuple(loggers), resolve(thresholds)
        while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = inner
        self.optimizer, self.manual = optimizer, manual
        self.report: Report | None = None
        self.count = 0
        self._watch: Watch | None = None
        self._input: dict[str, Stats] = {}
        self._told: set[tuple[str, str, str]] = set()
        self._handles: list[RemovableHandle] = []
        self._counting: list[RemovableHandle] = []
        self._stance: Any = None
        self._due = self._open = False
        self._idle = torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0
        if self.optimizer is not None and not self._idle:
            self._counting = [
                self.optimizer.register_step_pre_hook(lambda *_: self.before_step()),
                self.optimizer.register_step_post_hook(lambda *_: self.step()),
            ]
        self._arm()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Take everything off the model and the optimizer, and close the loggers."""
        self._disarm()
        for handle in self._counting:
            handle.remove()
        self._counting.clear()
        for logger in self.loggers:
            logger.close()

    def before_step(self) -> None:
        """Gradients are there and weights not changed yet: the moment to look. Called by the optimizer, where there is one."""
        self._collect(self.optimizer)

    def step(self) -> None:
        """A step is done. Called by the optimizer, where there is one."""
        self._collect(None)  # where nothing came before the step, what is left of it
        self.count += 1
        if self.count % self.every == 0:
            self._arm()

    # ------------------------------------------------------------------------------------------------------------------------------
    # one observed step

    def _arm(self) -> None:
        """Wait for the next forward pass in training."""
        if self._idle or self._due:
            return
        self._due = True
        if "torch._dynamo" in sys.modules:  # somebody compiles, and hooks see nothing inside compiled code
            self._stance = torch.compiler.set_stance("force_eager")
        if not self.manual:
            self._handles = [self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True)]

    def begin(self, batch: Any) -> None:
        """Watch from here on, if this step is to be observed; only where the callback is ``manual``.

        Args:
            batch: what the model is about to be given.
        """
        if not self._due or self._watch is not None:
            return
        self._input = {name: measure(t)[0] for name, t in named_tensors(batch) if real(t) and t.numel()}
        self._watch = Watch(self.model, _Writes())  # type: ignore[arg-type]
        self._watch.begin(batch)
        self._watch.attach(but=None if self.manual else self.model)
        self._watch.__enter__()
        self._open = True

    def end(self) -> None:
        """The forward pass is over; only where the callback is ``manual``."""
        if self._open and self._watch is not None:
            self._watch.__exit__(None, None, None)
        self._open = False

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not module.training or not torch.is_grad_enabled():
            return None  # validation
        if self._watch is not None:
            self._watch.detach()  # a second forward pass within the step
            return None
        self.begin((*args, kwargs) if kwargs else args[0] if len(args) == 1 else args)
        watch = self._watch
        assert watch is not None
        # This hook stands for the one that a watch puts in front of the model itself, which would come too late for this call.
        once = [
            module.register_forward_hook(watch._exit, with_kwargs=True),
            module.register_forward_hook(lambda *_: self._behind_forward(once), always_call=True),
        ]
        return watch._enter(module, args, kwargs)

    def _behind_forward(self, once: list[RemovableHandle]) -> None:
        self.end()
        for handle in once:
            handle.remove()

    def _disarm(self) -> None:
        self.end()
        self._due = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None

    def _collect(self, optimizer: torch.optim.Optimizer | None) -> None:
        watch = self._watch
        if watch is None or not watch.calls:
            return
        report = Report(model=type(self.model).__name__, calls=watch.calls, thresholds=self.thresholds, input=self._input, loss="training")
        report.norms = [norm for norm in watch.norms if norm.call >= 0]
        records = described(self.model)
        backward = any(parameter.grad is not None for _, parameter in records)
        for record, parameter in records:
            fill(record, parameter, parameter.grad, optimizer, weights=False, backward=backward)
        report.parameters = [record for record, _ in records]
        report.environment = {
            "torch": str(torch.__version__),
            "devices": sorted({str(p.device) for p in self.model.parameters()}),
            "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in self.model.parameters()}),
            "training": True,
            "optimizer": type(self.optimizer).__name__ if self.optimizer is not None else None,
            "sample": SAMPLE,
        }
        report.notes.append(f"Seen in step {self.count} of training; gradients are as the training scaled them.")
        dropout = {
            name: rate
            for name, m in self.model.named_modules()
            if kinds.is_dropout(m) and m.training and isinstance(rate := vars(m).get("p"), float)
        }
        self._disarm()
        report.findings = diagnose(report, Seen(dropout=dropout))
        self.report = report
        self._write(report)

    def _write(self, report: Report) -> None:
        values = dict(_scalars(report))
        told = {(f.kind, f.severity, f.layers[0] if f.layers else "") for f in report.findings}
        for logger in self.loggers:
            logger.scalars(self.count, values)
            for finding in report.findings:
                if (finding.kind, finding.severity, finding.layers[0] if finding.layers else "") not in self._told:
                    logger.finding(self.count, finding)
        self._told = told

    # ------------------------------------------------------------------------------------------------------------------------------
    # frameworks

    @staticmethod
    def lightning(**options: Any) -> Any:
        """A callback for Lightning's ``Trainer(callbacks=[...])``, for the module that is trained and its first optimizer.

        Args:
            **options: of :class:`ProbeCallback`: ``every``, ``loggers``, ``thresholds``.

        Raises:
            ImportError: neither ``lightning`` nor ``pytorch_lightning`` is installed.
        """
        try:
            from lightning.pytorch import Callback  # type: ignore[import-not-found]
        except ImportError:
            from pytorch_lightning import Callback  # type: ignore[import-not-found]

        class LightningProbe(Callback):
            """Lightning runs forward and backward inside the optimizer's step, so its own hooks say when gradients are there."""

            probe: Any = None  # a ProbeCallback, from the start of training on

            def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                self.probe = ProbeCallback(pl_module, manual=True, **options)

            def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                self.probe.begin(batch)

            def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
                self.probe.end()

            def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
                self.probe._collect(getattr(optimizer, "optimizer", optimizer))

            def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
                self.probe.step()

            def on_train_end(self, trainer: Any, pl_module: Any) -> None:
                self.probe.close()

            def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
                if self.probe is not None:
                    self.probe.close()

        return LightningProbe()

    @staticmethod
    def transformers(**options: Any) -> Any:
        """A callback for transformers' ``Trainer(callbacks=[...])``.

        Args:
            **options: of :class:`ProbeCallback`: ``every``, ``loggers``, ``thresholds``.

        Raises:
            ImportError: transformers is not installed.
        """
        from transformers import TrainerCallback  # type: ignore[import-not-found]

        class TransformersProbe(TrainerCallback):
            """Follows the trainer's optimizer."""

            probe: ProbeCallback

            def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any) -> None:
                self.probe = ProbeCallback(model, optimizer, **options)

            def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                self.probe.close()

        return TransformersProbe()


class _Writes:
    """Takes the place of what preserves a probed model: in training, what is written to parameters stays."""

    def about_to_write(self, tensor: Tensor) -> None:
        pass


def _scalars(report: Report) -> Iterator[tuple[str, float]]:
    """What is logged of a report: size of signal and gradient per layer, shares of dead channels, sizes of steps, counts of findings."""
    for call in report.leaves():
        if call.forward is not None:
            yield f"signal/{call.label}", call.forward.rms
            if call.gradient is not None:
                yield f"gradient/{call.label}", call.gradient.rms
            if call.channels is not None and call.role == "activation":
                yield f"dead/{call.label}", call.channels.dead / call.channels.count
    for parameter in report.parameters:
        if parameter.gradient is not None:
            yield f"parameter gradient/{parameter.name}", parameter.gradient.rms
        if parameter.update is not None:
            yield f"step size/{parameter.name}", parameter.update
    for norm in report.norms:
        if norm.mean_drift is not None:
            yield f"drift of running mean/{norm.name}", norm.mean_drift
    for severity in SEVERITIES:
        yield f"findings/{severity}", float(sum(finding.severity == severity for finding in report.findings))
