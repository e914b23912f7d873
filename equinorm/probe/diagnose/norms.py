"""Rules on norms: what they pool over, what they remember, and what stands before and behind them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from equinorm.probe.diagnose.view import View, names, number, unique
from equinorm.probe.findings import Finding, Severity
from equinorm.probe.record import Call, Norm


def _by_name(view: View) -> list[Norm]:
    """The first call of every norm."""
    first: dict[str, Norm] = {}
    for norm in view.report.norms:
        first.setdefault(norm.name, norm)
    return list(first.values())


def running_drift(view: View) -> Iterator[Finding]:
    """Running estimates that are not those of this batch. Of norms that no batch has gone through yet nothing is expected."""
    found: list[tuple[Norm, Severity]] = []
    fresh: list[Norm] = []
    for norm in _by_name(view):
        if not norm.tracks or norm.mean_drift is None:
            continue
        if norm.batches == 0:
            fresh.append(norm)
            continue
        severities = [view.severity(norm.mean_drift, "drift_mean"), view.severity(abs(norm.log_variance_drift or 0.0), "drift_variance")]
        judged = [s for s in severities if s is not None]
        if judged:
            worst: Severity = "severe" if "severe" in judged else "warning"
            found.append((norm, worst))
    if fresh and not any(norm.training for norm in fresh):
        yield Finding(
            kind="running_drift", severity="warning", layers=tuple(norm.name for norm in fresh), calls=tuple(norm.call for norm in fresh),
            sentence=f"{names([norm.name for norm in fresh])} normalizes with running estimates that no batch has ever moved: mean 0 "
            "and variance 1.",
            evidence={"norms": len(fresh)},
        )  # fmt: skip
    if not found:
        return
    norm, _ = found[0]
    log = norm.log_variance_drift or 0.0
    others = f" {len(found) - 1} further norms have drifted too." if len(found) > 1 else ""
    yield Finding(
        kind="running_drift", severity="severe" if any(s == "severe" for _, s in found) else "warning",
        layers=tuple(n.name for n, _ in found), calls=tuple(n.call for n, _ in found),
        sentence=f"The running statistics of {names([norm.name])} are not those of this batch: the means are "
        f"{number(norm.mean_drift or 0.0)} running "
        f"standard deviations apart (channel {norm.mean_drift_channel}: {number(norm.mean_drift_max or 0.0)}), the batch's variance is "
        f"{number(math.exp(log))} times the running one.{others}",
        evidence={
            "mean_drift": norm.mean_drift or 0.0, "log_variance_drift": log, "worst_channel": norm.mean_drift_channel or 0,
            "worst_mean_drift": norm.mean_drift_max or 0.0, "norms": len(found), "batches": norm.batches if norm.batches is not None else
            -1,
        },
    )  # fmt: skip


def small_batch(view: View) -> Iterator[Finding]:
    """Statistics over so few values or samples that they are noise."""
    failure = view.report.failure
    if failure is not None and "more than 1 value per channel" in failure.error:
        yield Finding(
            kind="small_batch", severity="severe", layers=(failure.layer,),
            sentence=f"{names([failure.layer])} got one value per channel, which has no variance: batch statistics need more samples or "
            "positions.",
            evidence={"values": 1},
        )  # fmt: skip
        return
    few = [n for n in _by_name(view) if n.training and n.values is not None and n.values < view.t["values_severe"]]
    if few:
        yield Finding(
            kind="small_batch", severity="severe", layers=tuple(n.name for n in few), calls=tuple(n.call for n in few),
            sentence=f"{names([n.name for n in few])} takes each statistic over {few[0].values} value{'s' * (few[0].values != 1)}: the "
            "output hardly "
            "depends on the input.",
            evidence={"values": few[0].values or 0, "norms": len(few)},
        )  # fmt: skip
        return
    over_batch = [(n, view.calls[n.call].shape[0]) for n in _by_name(view) if n.training and "N" in n.pools and view.calls[n.call].shape]
    small = [(n, size) for n, size in over_batch if size < view.t["batch_note"]]
    if not small:
        return
    norm, size = min(small, key=lambda pair: pair[1])
    yield Finding(
        kind="small_batch", severity="warning" if size < view.t["batch_warning"] else "note", layers=unique([norm.name, *(n.name for n, _
        in small)]), calls=tuple(n.call for n, _ in small),
        sentence=f"{names([n.name for n, _ in small])} normalizes with the statistics of {size} samples ({norm.values} values per "
        "channel): they differ "
        "from batch to batch, and the more so the fewer there are.",
        evidence={"samples": size, "values": norm.values or 0, "norms": len(small)},
    )  # fmt: skip


def norm_after_norm(view: View) -> Iterator[Finding]:
    """Two norms in a row over the same axes, or a norm within the sample and channel behind one over the batch."""
    of_call = {norm.call: norm for norm in view.report.norms}
    for norm in _by_name(view):
        sources = view.producers(view.calls[norm.call])
        if len(sources) != 1 or sources[0].index not in of_call:
            continue
        before = of_call[sources[0].index]
        if before.name == norm.name or not norm.pools or (before.pools != norm.pools and (before.pools, norm.pools) != ("NS", "S")):
            continue
        if view.calls[norm.call].shape != view.calls[before.call].shape:
            continue
        yield Finding(
            kind="norm_after_norm", severity="warning", layers=(norm.name, before.name), calls=(norm.call, before.call),
            sentence=f"{names([norm.name])} ({norm.type}) directly follows {names([before.name])} ({before.type}) and takes its "
            "statistics over the same "
            "axes: what the first one scaled and shifted is undone.",
            evidence={"pools": norm.pools},
        )  # fmt: skip


def bias_before_norm(view: View) -> Iterator[Finding]:
    """Biases per channel that norms behind them subtract."""
    removing = {norm.call for norm in view.report.norms if norm.removes_mean == "channel"}
    biases = {p.module: p for p in view.report.parameters if p.role == "bias" and p.requires_grad and p.name.endswith("bias")}
    found: list[Call] = []
    for call in view.leaves:
        readers = view.consumers.get(call.index, [])
        if call.role == "linear" and call.number == 0 and call.name in biases and readers and all(r.index in removing for r in readers):
            found.append(call)
    if found:
        first = view.consumers[found[0].index][0]
        yield Finding(
            kind="bias_before_norm", severity="note", layers=tuple(call.name for call in found), calls=tuple(call.index for call in found),
            sentence=f"The bias of {names([call.name for call in found])} does nothing: a norm behind subtracts the mean of every channel "
            f"({names([found[0].name])} is followed by {names([first.name])}).",
            evidence={"layers": len(found), "parameters": sum(math.prod(biases[call.name].shape) for call in found)},
        )  # fmt: skip


def momentum(view: View) -> Iterator[Finding]:
    """Running estimates that forget at once, or never learn."""
    odd = [
        n for n in _by_name(view) if n.tracks and n.momentum is not None and not view.t["momentum_low"] < n.momentum <
        view.t["momentum_high"]
    ]  # fmt: skip
    if odd:
        value = odd[0].momentum
        assert value is not None
        effect = "hardly ever move" if value <= view.t["momentum_low"] else f"are those of the last {1 / value:.1f} batches"
        yield Finding(
            kind="momentum", severity="warning", layers=tuple(n.name for n in odd), calls=tuple(n.call for n in odd),
            sentence=f"With momentum {number(value)} the running estimates of {names([n.name for n in odd])} {effect}; here momentum is "
            "the weight of the "
            "new value, usually 0.1.",
            evidence={"momentum": value, "norms": len(odd)},
        )  # fmt: skip


def dropout_before_norm(view: View) -> Iterator[Finding]:
    """Dropout whose added variance goes into running estimates that evaluation uses without it."""
    tracking = {norm.call for norm in view.report.norms if norm.tracks}
    for call in view.leaves:
        rate = view.seen.dropout.get(call.name, 0.0)
        if call.role != "dropout" or rate <= 0:
            continue
        norm = _next_norm(view, call)
        if norm is None or norm.index not in tracking:
            continue
        yield Finding(
            kind="dropout_before_norm", severity="warning", layers=(call.name, norm.name), calls=(call.index, norm.index),
            sentence=f"{names([call.name])} drops {100 * rate:.0f} % in front of {names([norm.name])}, whose running variance learns "
            f"the {1 / (1 - rate):.2f} "
            "times larger mean square of training and applies it in evaluation, where nothing is dropped.",
            evidence={"rate": rate, "mean_square_ratio": 1 / (1 - rate)},
        )  # fmt: skip


def _next_norm(view: View, call: Call) -> Call | None:
    """The first norm behind a call along each path that no residual sum has joined."""
    queue, met = [call], set()
    while queue:
        for reader in view.consumers.get(queue.pop(0).index, []):
            if reader.role == "norm":
                return reader
            if reader.index not in met and reader.role not in ("residual", "recurrent", "attention"):
                met.add(reader.index)
                queue.append(reader)
    return None


def train_eval_gap(view: View) -> Iterator[Finding]:
    """Another output in evaluation than in training, dropout left out of both."""
    gap = view.report.gap
    if gap is None or (severity := view.severity(gap.difference, "gap")) is None:
        return
    tracking = [norm for norm in _by_name(view) if norm.tracks]
    fresh = bool(tracking) and all(norm.batches == 0 for norm in tracking)
    why = " No batch has moved the running estimates yet, so this is to be expected before training." if fresh else ""
    yield Finding(
        kind="train_eval_gap", severity="note" if fresh else severity, layers=(gap.layer,),
        sentence="On the same batch and without dropout the output in evaluation mode differs from that in training mode by "
        f"{100 * gap.difference:.0f} % "
        f"of its size; they part at {names([gap.layer])}.{why}",
        evidence={"difference": gap.difference, "train_rms": gap.train_rms, "eval_rms": gap.eval_rms},
    )  # fmt: skip
