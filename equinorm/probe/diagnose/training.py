"""Rules on what goes in, what is trained and how: input, gradients that do not arrive, the optimizer's groups and steps."""

from __future__ import annotations

from collections.abc import Iterator

from equinorm.probe.diagnose.view import View, names, number, unique
from equinorm.probe.findings import Finding, Severity
from equinorm.probe.record import Call, Parameter


def failed(view: View) -> Iterator[Finding]:
    """The exception that ended the probe."""
    failure = view.report.failure
    if failure is None or "more than 1 value per channel" in failure.error:  # that one is told as a batch too small
        return
    hint = ""
    if any(shape.endswith(("int64", "int32", "uint8", "int16", "bool")) for shape in failure.inputs) and "float" in failure.expected:
        hint = " The input is of an integer type; convert it, as in batch.float()."
    elif (
        failure.inputs
        and failure.expected
        and failure.inputs[0].split()[-1] != failure.expected.split()[-1]
        and "int" not in failure.expected
    ):
        hint = f" Input and weights have different types; convert one, as in batch.to(torch.{failure.expected.split()[-1]})."
    said = str(failure)
    said = f"{said[0].upper()}{said[1:]}{'' if said.endswith('.') else '.'}"
    yield Finding(
        kind="failed", severity="severe", layers=(failure.layer,), sentence=f"{said}{hint}",
        evidence={"phase": failure.phase, "error": failure.error},
    )  # fmt: skip


def unnormalized_input(view: View) -> Iterator[Finding]:
    """What enters the first linear layers, after whatever the model does to it itself."""
    for call in view.leaves:
        stats = call.input
        if (
            call.inputs
            or call.role not in ("linear", "recurrent", "attention")
            or stats is None
            or not stats.finite
            or stats.count == 0
            or call.number
        ):
            continue
        off = stats.rms if stats.rms >= 1 else 1 / stats.rms if stats.rms > 0 else 0.0
        severity: Severity | None = view.severity(off, "input_rms")
        lopsided = abs(stats.mean) / stats.std if stats.std > 0 else 0.0
        sparse = stats.zeros > 0.5  # codes and counts are not centred
        if severity is None and lopsided >= view.t["input_mean"] and not sparse:
            severity = "warning"
        if severity is None:
            continue
        yield Finding(
            kind="unnormalized_input", severity=severity, layers=(call.name,), calls=(call.index,),
            sentence=f"The input of {names([call.name])} has mean {number(stats.mean)} and standard deviation {number(stats.std)}, from "
            f"{number(stats.min)} to {number(stats.max)}; layers learn best at mean 0 and standard deviation 1.",
            evidence={"mean": stats.mean, "std": stats.std, "rms": stats.rms, "min": stats.min, "max": stats.max},
        )  # fmt: skip
        return


def no_gradient(view: View) -> Iterator[Finding]:
    """Parameters that are to learn and get nothing."""
    report = view.report
    if report.failure is not None or any(call.forward is not None and not call.forward.finite for call in view.calls):
        return
    trained = [p for p in report.parameters if p.requires_grad]
    if report.loss == "none":
        if trained:
            yield Finding(
                kind="no_gradient", severity="severe", layers=_cut(view, trained),
                sentence="No gradient can flow: parameters are to be trained, but the output (or loss) does not depend on them in a "
                "differentiable way.",
                evidence={"parameters": len(trained)},
            )  # fmt: skip
        return
    unused = [p for p in trained if p.used is False]
    if unused:
        called = {call.name for call in view.calls}
        never = [p for p in unused if p.module not in called]
        cut = [p for p in unused if p.module in called]
        for group, why in (
            (cut, "is computed, but the loss does not depend on it: something cuts the graph behind it"),
            (never, "is not used"),
        ):
            if group:
                layers = _cut(view, group)
                yield Finding(
                    kind="no_gradient", severity="severe" if len(unused) == len(trained) else "warning", layers=layers,
                    calls=tuple(call.index for call in view.leaves if call.name in layers[:1]),
                    sentence=f"{names(layers)} {why}; {len(group)} parameter{'s' * (len(group) != 1)} will not learn.",
                    evidence={"parameters": len(group), "values": sum(_size(p) for p in group)},
                    suggestion="connect",
                )  # fmt: skip
    zero = [p for p in trained if p.gradient is not None and p.gradient.finite and p.gradient.absmax == 0]
    if zero and not any(call.dtype == "float16" for call in view.calls):  # there it is underflow, and told as such
        yield _blocked(view, zero, trained)


def _blocked(view: View, zero: list[Parameter], trained: list[Parameter]) -> Finding:
    """Gradients that are exactly 0, and the layer through which nothing passes."""
    modules = {p.module for p in zero}
    behind: Call | None = None
    for call in reversed(view.leaves):
        if call.gradient is None or call.gradient.absmax == 0:
            continue
        if any(source.gradient is not None and source.gradient.absmax == 0 for source in view.producers(call)):
            behind = call
            break
    order = [call.name for call in view.leaves if call.name in modules]
    alive = [call.name for call in view.leaves if call.name in {p.module for p in trained} - modules]
    position = {call.name: call.position for call in reversed(view.leaves)}
    early = [name for name in alive if order and position[name] < position[order[-1]]]
    opening = behind is not None and any(
        p.module == behind.name and p.rms == 0 and p.gradient is not None and p.gradient.absmax > 0 for p in trained
    )  # fmt: skip
    severity: Severity = "severe" if order and not early and not opening else "note"
    passes = f" Nothing passes back through {names([behind.label])}." if behind is not None else ""
    intended = " Others before them do learn, so a branch that starts at 0 may be meant." if early else ""
    if opening:
        intended = " Its weight starts at 0 and will move at the first step, as is usual for last layers."
    layers = unique([*([behind.name.partition(":")[0]] if behind is not None else []), *order, *modules])
    return Finding(
        kind="no_gradient", severity=severity, layers=layers, calls=(behind.index,) if behind is not None else (),
        sentence=f"The gradient of {len(zero)} of {len(trained)} parameters is exactly 0, in "
        f"{names(unique([*order, *modules]))}.{passes}{intended}",
        evidence={"parameters": len(zero), "of": len(trained)},
    )  # fmt: skip


def _cut(view: View, group: list[Parameter]) -> tuple[str, ...]:
    """Modules of parameters, the one nearest to the output first: behind it lies the cut."""
    position = {call.name: call.index for call in view.calls}
    return unique(sorted((p.module for p in group), key=lambda name: -position.get(name, -1)))


def _size(parameter: Parameter) -> int:
    size = 1
    for n in parameter.shape:
        size *= n
    return size


def frozen(view: View) -> Iterator[Finding]:
    """Parameters that do not require a gradient, while others do."""
    still = [p for p in view.report.parameters if not p.requires_grad]
    if still and len(still) < len(view.report.parameters):
        layers = unique([p.module for p in still])
        yield Finding(
            kind="frozen", severity="note", layers=layers,
            sentence=f"{names(layers)} {'is' if len(layers) == 1 else 'are'} frozen: {len(still)} of {len(view.report.parameters)} "
            "parameters do not require a "
            "gradient.",
            evidence={"parameters": len(still), "of": len(view.report.parameters)},
        )  # fmt: skip


def decay_on_affine(view: View) -> Iterator[Finding]:
    """Weight decay on biases and on the affine parameters of norms."""
    decayed = [
        p for p in view.report.parameters if p.weight_decay and p.requires_grad and p.role in ("affine weight", "affine bias", "bias")
    ]
    affine = [p for p in decayed if p.role.startswith("affine")]
    if decayed:
        first = (affine or decayed)[0]
        yield Finding(
            kind="decay_on_affine", severity="warning" if affine else "note", layers=unique([p.module for p in affine] + [p.module for p in
            decayed]), sentence=f"Weight decay {number(first.weight_decay or 0.0)} also acts on {len(affine)} affine parameters of "
                "norms and "
            f"{len(decayed) - len(affine)} "
            f"biases ({names([p.name for p in affine or decayed])}).",
            evidence={"affine": len(affine), "biases": len(decayed) - len(affine), "weight_decay": first.weight_decay or 0.0},
        )  # fmt: skip


def update_size(view: View) -> Iterator[Finding]:
    """Steps of the optimizer that replace a weight, or that rounding swallows."""
    weights = [p for p in view.report.parameters if p.update is not None and p.role in ("weight", "embedding")]
    large = [p for p in weights if p.update is not None and p.update >= view.t["update_high"]]
    if large:
        worst = max(large, key=lambda p: p.update or 0.0)
        yield Finding(
            kind="update_size", severity="warning", layers=unique([worst.module, *(p.module for p in large)]),
            sentence=f"The next step changes {names([worst.name])} by {100 * (worst.update or 0.0):.0f} % of its size, and {len(large)} "
            f"of {len(weights)} "
            "weights by more than a tenth.",
            evidence={"update": worst.update or 0.0, "lr": worst.lr or 0.0, "weights": len(large)},
        )  # fmt: skip
    small = [p for p in weights if p.update is not None and 0 < p.update < view.t["update_low"] and p.gradient is not None]
    if small:
        yield Finding(
            kind="update_size", severity="note", layers=unique([p.module for p in small]),
            sentence=f"The next step changes {names([p.name for p in small])} by less than float32 resolves "
            f"({number(small[0].update or 0.0)} of its size).",
            evidence={"update": small[0].update or 0.0, "lr": small[0].lr or 0.0, "weights": len(small)},
        )  # fmt: skip
