"""A report as one HTML file: no network, no scripts, light and dark, wide and narrow."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from equinorm.checkup import charts
from equinorm.checkup.charts import Mark
from equinorm.checkup.numbers import Numbers, percent, profiled, short
from equinorm.page.templates import templates
from equinorm.probe.findings import KINDS, SUGGESTIONS, THRESHOLDS, Finding
from equinorm.probe.record import Report

if TYPE_CHECKING:
    from equinorm.checkup.prescribe import Prescription

LAYERS = 6  # layers that a finding links to; more are counted
DRAWN = 3  # prescriptions whose profile is drawn


def write_page(report: Report, path: str | Path, prescriptions: Sequence[Prescription] = ()) -> Path:
    """Write a report as a page.

    Args:
        report: of :func:`equinorm.probe`.
        path: of the HTML file.
        prescriptions: shown with before and after.

    Returns:
        The path.
    """
    environment = templates("equinorm.checkup")
    environment.filters.update(short=short, percent=percent, breakable=_breakable)
    html = environment.get_template("page.html.j2").render(
        report=report,
        numbers=Numbers.of(report),
        findings=[_finding(report, number, finding) for number, finding in enumerate(report.findings, 1)],
        figures=list(_figures(report)),
        rows=[call for call in report.calls if call.leaf],
        marked=_marked(report),
        spectra=any(p.spectral_norm is not None for p in report.parameters),
        updates=any(p.update is not None for p in report.parameters),
        prescriptions=[_prescription(report, p) for p in prescriptions],
        thresholds={name: (value, THRESHOLDS[name]) for name, value in report.thresholds.items()},
        ratio=_ratio,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    path = Path(path)
    path.write_text(html, encoding="utf-8")
    return path


def _marks(report: Report) -> list[Mark]:
    """Where findings stand in the profiles: by their number, at the culprit's call."""
    return [Mark(number, _leaf(report, finding.calls[0])) for number, finding in enumerate(report.findings, 1) if finding.calls]


def _leaf(report: Report, index: int) -> int:
    """The call itself, or the last leaf inside it, which is where profiles have a point."""
    call = report.calls[index]
    while not call.leaf and index > 0:
        index -= 1
        call = report.calls[index]
    return index


def _figures(report: Report) -> Iterator[dict[str, Any]]:
    marks = _marks(report)
    numbered = " Numbers are those of the findings." if marks else ""
    if next(iter(profiled(report)), None) is None:
        return
    yield _figure(
        "signal",
        "The signal on its way forward",
        f"Root mean square of every layer's output; dots are linear layers and convolutions.{numbered}",
        lambda name, narrow: charts.signal(report, name, marks, narrow=narrow),
    )
    if charts.has_gradient(report):
        yield _figure(
            "gradient",
            "The gradient on its way back",
            f"Root mean square of the loss's gradient with respect to every layer's output: it flows from right to left.{numbered}",
            lambda name, narrow: charts.gradient(report, name, marks, narrow=narrow),
        )
    plot = _figure(
        "propagation",
        "Mean and variance of the channels",
        "Signal propagation plot of Brock, De and Smith (2021), averages over channels. {squared} channel mean squared: a shift that all "
        "samples share and that carries no information. {variance} channel variance: the signal.{branch}",
        lambda name, narrow: charts.propagation(report, name, narrow=narrow),
        squared=_key(2),
        variance=_key(1),
        branch=Markup(" {} variance at the end of the residual branches; points are residual sums.").format(_key(3))
        if charts.has_sums(report)
        else "",
    )
    if plot["wide"]:
        yield plot
    if charts.has_sums(report):
        yield _figure(
            "residuals",
            "Branches and skips",
            "Size of the residual branch over that of the skip at every sum. Above 1 the branch overtakes the skip.",
            lambda name, narrow: charts.residuals(report, name, narrow=narrow),
        )
    plot = _figure(
        "channels",
        "Channels",
        "A column per layer, a row per channel (of more than 64: per run of neighbours). {larger} larger and {smaller} smaller than "
        "the layer's typical channel, fully coloured at a factor of 100; {dead} 0 throughout the batch.",
        lambda name, narrow: charts.channels(report, name, narrow=narrow),
        larger=_swatch("rgb(217 89 13)"),
        smaller=_swatch("rgb(26 115 217)"),
        dead=_swatch("rgb(179 26 140)"),
    )
    if plot["wide"]:
        yield plot


def _figure(name: str, title: str, caption: str, draw: Any, **parts: Any) -> dict[str, Any]:
    return {
        "name": name,
        "title": title,
        "caption": Markup(caption).format(**parts) if parts else caption,
        "wide": draw(name, False),
        "narrow": draw(f"{name}-narrow", True),
    }


def _key(number: int) -> Markup:
    return Markup('<span class="key" style="background: var(--series-{})"></span>').format(number)


def _swatch(colour: str) -> Markup:
    return Markup('<span class="swatch" style="background: {}"></span>').format(colour)


def _finding(report: Report, number: int, finding: Finding) -> dict[str, Any]:
    return {
        "number": number,
        "finding": finding,
        "meaning": KINDS[finding.kind].meaning,
        "suggestion": SUGGESTIONS[finding.suggestion],
        "links": [report.calls[index] for index in finding.calls[:LAYERS]],
        "layers": finding.layers[:LAYERS],
        "more": len(finding.layers) - LAYERS,
    }


def _marked(report: Report) -> dict[int, list[int]]:
    """The findings' numbers by call."""
    marked: dict[int, list[int]] = {}
    for number, finding in enumerate(report.findings, 1):
        for index in finding.calls:
            marked.setdefault(index, []).append(number)
    return marked


def _prescription(report: Report, prescription: Prescription) -> dict[str, Any]:
    after = prescription.after
    name = f"p{prescription.number}"
    before = dict(Numbers.of(report).rows())
    rows = dict(Numbers.of(after).rows()) if after is not None else {}
    return {
        "it": prescription,
        "rows": [(key, before.get(key, "–"), rows.get(key, "–")) for key in {**before, **rows}],
        "overlays": [
            {
                "wide": draw(report, f"{name}-{what}", (), after),
                "narrow": draw(report, f"{name}-{what}-narrow", (), after, narrow=True),
            }
            for what, draw in (("signal", charts.signal), ("gradient", charts.gradient))
            if after is not None and prescription.number <= DRAWN and charts.differ(report, after, what)
        ],
    }


def _ratio(logarithm: float | None) -> str:
    return short(None if logarithm is None else math.exp(min(logarithm, 700)))


def _breakable(text: str) -> Markup:
    """A dotted name that a narrow table may break between its parts."""
    return Markup(re.sub(r"([._:])", r"\1<wbr>", str(escape(text))))
