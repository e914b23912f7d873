"""Rules on values: saturated, dead, constant, too large or too small for their type, not finite."""

from __future__ import annotations

import math
from collections.abc import Iterator

from equinorm.probe.diagnose.view import View, names, number, owner, unique
from equinorm.probe.findings import Finding, Severity
from equinorm.probe.record import Call

LARGEST_HALF = 65504.0

# What may have gone wrong inside a function that made NaN or infinity of finite numbers.
DOMAIN = {
    "log": "the logarithm takes positive numbers",
    "log2": "the logarithm takes positive numbers",
    "log10": "the logarithm takes positive numbers",
    "log1p": "log1p takes numbers above -1",
    "sqrt": "the square root takes no negative numbers",
    "rsqrt": "the inverse square root takes positive numbers",
    "div": "something was divided by 0",
    "truediv": "something was divided by 0",
    "rtruediv": "something was divided by 0",
    "rdiv": "something was divided by 0",
    "reciprocal": "something was divided by 0",
    "exp": "the exponential overflows above 88.7 in float32 and above 11.1 in float16",
    "pow": "a negative number to a broken power, or an overflow",
    "acos": "the arc cosine takes numbers from -1 to 1",
    "asin": "the arc sine takes numbers from -1 to 1",
    "softmax": "a row whose entries are all minus infinity has no softmax",
    "std": "one value has no standard deviation",
    "var": "one value has no variance",
}


def not_finite(view: View) -> Iterator[Finding]:
    """The first NaN or infinity of the forward pass, and where it came from."""
    report = view.report
    for name, stats in report.input.items():
        if not stats.finite:
            place = f"entry {name!r} of the batch" if name else "the batch"
            yield Finding(
                kind="not_finite", severity="severe", layers=("",), sentence=f"Already {place} holds {stats.nan} NaN and {stats.inf} "
                "infinite values.",
                evidence={"nan": stats.nan, "inf": stats.inf}, suggestion="inspect",
            )  # fmt: skip
            return
    broken = [p for p in report.parameters if math.isnan(p.rms)]
    if broken:
        yield Finding(
            kind="not_finite", severity="severe", layers=unique([p.module for p in broken]), suggestion="inspect",
            sentence=f"Parameter {names([p.name for p in broken])} holds NaN or infinity itself.", evidence={"parameter": broken[0].name},
        )  # fmt: skip
        return
    first = next((call for call in view.calls if call.forward is not None and not call.forward.finite), None)
    if first is None or ((origin := view.seen.origin) is None and _overflowed(first)):
        return
    assert first.forward is not None
    if origin is None:
        yield Finding(
            kind="not_finite", severity="severe", layers=(owner(first),), calls=(first.index,),
            sentence=f"{names([first.label])} is the first layer to return NaN ({first.forward.nan} of {first.forward.count} values) or "
            "infinity "
            f"({first.forward.inf}).",
            evidence={"nan": first.forward.nan, "inf": first.forward.inf},
        )  # fmt: skip
        return
    if _overflowed(first) and origin.nan == 0 and owner(first) == origin.layer:
        return  # half_overflow tells it better
    known = f": {DOMAIN[origin.function]}" if origin.function in DOMAIN else ""
    yield Finding(
        kind="not_finite", severity="severe", layers=(origin.layer,), calls=tuple(c.index for c in view.calls if owner(c) ==
        origin.layer)[:1], sentence=f"The first NaN or infinity comes from {origin.function}() in {names([origin.layer])}: given values "
            "from "
        f"{number(origin.low)} to "
        f"{number(origin.high)} it returned {origin.nan} NaN and {origin.inf} infinite ones{known}.",
        evidence={"function": origin.function, "low": origin.low, "high": origin.high, "nan": origin.nan, "inf": origin.inf},
    )  # fmt: skip


def _overflowed(call: Call) -> bool:
    """Whether a call's infinities come from float16's range."""
    return call.dtype == "float16" and call.forward is not None and call.forward.inf > 0


def not_finite_backward(view: View) -> Iterator[Finding]:
    """The gradient that stops being finite on its way back."""
    if any(call.forward is not None and not call.forward.finite for call in view.calls):
        return
    broken = [call for call in view.leaves if call.gradient is not None and not call.gradient.finite]
    weights = [p for p in view.report.parameters if p.gradient is not None and not p.gradient.finite]
    if not broken and not weights:
        return
    if broken:
        last = broken[-1]
        assert last.gradient is not None
        readers = [call for call in view.consumers.get(last.index, []) if call.gradient is not None and call.gradient.finite]
        culprit = readers[0] if readers else None
        behind = f"it is in order behind {names([culprit.label])}" if culprit else "nothing recorded lies behind it"
        inside = next((c for c in view.calls if not c.leaf and c.index > last.index and c.name and last.name.startswith(c.name)), None)
        layers = (culprit.name if culprit else last.name, last.name) + ((inside.name,) if inside else ())
        yield Finding(
            kind="not_finite_backward", severity="severe", layers=unique([layer.partition(":")[0] for layer in layers]),
            calls=(last.index,), sentence=f"The gradient of the output of {names([last.label])} holds {last.gradient.nan} NaN and "
                f"{last.gradient.inf} "
            "infinite values, "
            f"though {behind} and the forward pass is finite: a function with an infinite slope (a root or norm at 0, say) lies between.",
            evidence={"nan": last.gradient.nan, "inf": last.gradient.inf},
            suggestion="scale_loss" if last.dtype == "float16" else "",
        )  # fmt: skip
        return
    yield Finding(
        kind="not_finite_backward", severity="severe", layers=unique([p.module for p in weights]),
        sentence=f"The gradient of parameter {names([p.name for p in weights])} holds NaN or "
        "infinity.", evidence={"parameter": weights[0].name},
    )  # fmt: skip


def half_overflow(view: View) -> Iterator[Finding]:
    """float16 activations at or near the end of their range."""
    halves = [call for call in view.leaves if call.dtype == "float16" and call.forward is not None]
    first = next((call for call in halves if call.forward is not None and not call.forward.finite), None)
    if first is not None and first.forward is not None and first.forward.inf > 0:
        given = f", given values up to {number(first.input.absmax)}" if first.input is not None and first.input.finite else ""
        yield Finding(
            kind="half_overflow", severity="severe", layers=(owner(first),), calls=(first.index,),
            sentence=f"{names([first.label])} overflows in float16: {first.forward.inf} of {first.forward.count} values are "
            f"infinite{given}; the "
            "largest number is 65504.",
            evidence={"inf": first.forward.inf, "nan": first.forward.nan},
        )  # fmt: skip
        return
    near = [c for c in halves if c.forward is not None and c.forward.finite and c.forward.absmax * view.t["half_headroom"] >= LARGEST_HALF]
    if near:
        top = max(near, key=lambda call: call.forward.absmax if call.forward is not None else 0.0)
        assert top.forward is not None
        yield Finding(
            kind="half_overflow", severity="warning", layers=unique([owner(top), *(owner(call) for call in near)]), calls=(top.index,),
            sentence=f"{names([top.label])} reaches {number(top.forward.absmax)} in float16, "
            f"{number(LARGEST_HALF / top.forward.absmax)} times under the "
            "largest number, 65504.",
            evidence={"absmax": top.forward.absmax},
        )  # fmt: skip


def half_underflow(view: View) -> Iterator[Finding]:
    """float16 gradients that lose digits or became 0. Not judged with the stand-in loss, whose size means nothing."""
    if view.report.loss in ("stand-in", "none"):
        return
    halves = [
        c
        for c in view.leaves
        if c.dtype == "float16" and c.gradient is not None and c.gradient.finite and c.forward is not None and c.outputs
    ]
    lost: list[tuple[Call, float]] = []
    for call in halves:
        assert call.gradient is not None
        alive = 1 - call.gradient.zeros
        if alive > 0:
            share = call.gradient.tiny / alive
        else:  # all of it is 0: lost if something arrived at the layers behind, or should have, from a loss that is not 0
            readers = view.consumers.get(call.index, [])
            arrived = any(r.gradient is not None and r.gradient.absmax > 0 for r in readers) or (
                not readers and bool(view.report.loss_value)
            )
            share = 1.0 if arrived else 0.0
        if share >= view.t["half_lost"]:
            lost.append((call, share))
    if not lost:
        return
    zero = [call for call, _ in lost if call.gradient is not None and call.gradient.zeros == 1]
    worst, share = (zero[-1], 1.0) if zero else lost[-1]
    assert worst.gradient is not None
    what = "is 0 throughout" if zero else f"has {100 * share:.0f} % of its values below 6.1e-5, where digits are lost"
    yield Finding(
        kind="half_underflow", severity="severe" if zero else "warning", layers=unique([owner(worst), *(owner(call) for call, _ in
        reversed(lost))]), calls=(worst.index,),
        sentence=f"In float16 the gradient of the output of {names([worst.label])} {what}; {len(lost)} of {len(halves)} float16 layers "
        "are so.",
        evidence={"share": share, "layers": len(lost), "rms": worst.gradient.rms},
    )  # fmt: skip


def saturation(view: View) -> Iterator[Finding]:
    """Bounded activations and softmaxes that work in their flat ends."""
    for kind, chosen in (
        ("saturation", [c for c in view.leaves if c.saturation is not None and _bounded(c)]),
        (
            "peaked_softmax",
            [c for c in view.leaves if c.saturation is not None and (c.type.lower().startswith("softmax") or c.role == "attention")],
        ),
    ):
        judged = [(call, view.severity(call.saturation or 0.0, "saturation")) for call in chosen]
        found = [(call, level) for call, level in judged if level is not None]
        if not found:
            continue
        call = found[0][0]
        assert call.saturation is not None
        severity: Severity = "severe" if any(s == "severe" for _, s in found) else "warning"
        if all(c is view.last for c, _ in found):
            severity = "note"  # an output may be certain
        sources = [source for source in view.producers(call) if source.name]
        from_ = f" Its input, from {names([s.label for s in sources])}, has rms {number(call.input.rms)}." if call.input and sources else ""
        what = "of the rows put more than 0.99 on one entry" if kind == "peaked_softmax" else "of its inputs lie where it is flat"
        others = f", as do {len(found) - 1} more layers" if len(found) > 1 else ""
        yield Finding(
            kind=kind, severity=severity, layers=unique([owner(call), *(owner(s) for s in sources), *(owner(c) for c, _ in found)]),
            calls=tuple(c.index for c, _ in found),
            sentence=f"{names([call.label])} ({call.type}) is saturated: {100 * call.saturation:.0f} % {what}{others}.{from_}",
            evidence={"share": call.saturation, "layers": len(found), "input_rms": call.input.rms if call.input else 0.0},
        )  # fmt: skip


BOUNDED = ("sigmoid", "tanh", "softsign", "hardtanh", "hardsigmoid")


def _bounded(call: Call) -> bool:
    """Whether an activation is flat at both ends, where units get no gradient and carry no difference; ReLUs are flat at one."""
    return call.role == "activation" and call.type.lower() in BOUNDED


def dead_channels(view: View) -> Iterator[Finding]:
    """Channels that are 0 throughout behind an activation."""
    found: list[tuple[Call, float, Severity]] = []
    for call in view.leaves:
        channels = call.channels
        if call.role != "activation" or channels is None or call.forward is None or call.saturation is None:
            continue
        if call.forward.count / channels.count < view.t["values_per_channel"]:
            continue
        share = channels.dead / channels.count
        if severity := view.severity(share, "dead"):
            found.append((call, share, severity))
    if not found:
        return
    call, share, _ = found[0]
    assert call.channels is not None
    sources = [source for source in view.producers(call) if source.name]
    silent = [source for source in sources if source.role == "linear" and source.forward is not None and source.forward.absmax == 0]
    if silent:
        yield Finding(
            kind="dead_channels", severity="severe", layers=unique([owner(silent[0]), owner(call), *(owner(c) for c, *_ in found)]),
            calls=(silent[0].index, *(c.index for c, *_ in found)), suggestion="init_gain",
            sentence=f"{names([silent[0].label])} returns 0 for the whole batch, as weights of 0 do; behind {names([call.label])} no "
            "gradient comes back.",
            evidence={"dead": call.channels.dead, "channels": call.channels.count, "share": share},
        )  # fmt: skip
        return
    offset = f" Its input has mean {number(call.input.mean)} and standard deviation {number(call.input.std)}." if call.input else ""
    others = f" The same holds for {len(found) - 1} later layers." if len(found) > 1 else ""
    yield Finding(
        kind="dead_channels", severity="severe" if any(s == "severe" for *_, s in found) else "warning",
        layers=unique([owner(call), *(owner(s) for s in sources), *(owner(c) for c, *_ in found)]), calls=tuple(c.index for c, *_ in found),
        sentence=f"{call.channels.dead} of {call.channels.count} channels behind {names([call.label])} are 0 for the whole "
        f"batch.{offset}{others}",
        evidence={"dead": call.channels.dead, "channels": call.channels.count, "share": share, "input_mean": call.input.mean if call.input
        else 0.0},
    )  # fmt: skip


def constant_channels(view: View) -> Iterator[Finding]:
    """Channels with one value throughout, of linear layers and norms; a layer all of which is constant 0 was initialised so."""
    for call in view.leaves:
        channels = call.channels
        if channels is None or call.role not in ("linear", "norm") or call.forward is None or channels.constant == 0:
            continue
        if call.forward.count / channels.count < view.t["values_per_channel"] or channels.dead == channels.count:
            continue
        if call.input is not None and call.input.std == 0:
            continue  # constant in, constant out: told where it begins
        sources = view.producers(call)
        if any(s.channels is not None and s.channels.constant >= channels.constant for s in sources):
            continue
        severity: Severity = view.severity(channels.constant / channels.count, "constant") or "note"
        yield Finding(
            kind="constant_channels", severity=severity, layers=(call.name,),
            calls=(call.index,), sentence=f"{channels.constant} of {channels.count} channels of {names([call.label])} have one value "
                "for the whole batch "
            f"(channel {', '.join(map(str, channels.constant_channels[:5]))}{' ...' if channels.constant > 5 else ''}): they say "
            "nothing about the input.",
            evidence={"constant": channels.constant, "channels": channels.count},
        )  # fmt: skip
