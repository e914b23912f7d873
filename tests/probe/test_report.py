"""The report as a page, in a terminal and as JSON."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import subprocess
import time
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import equinorm
from equinorm.checkup import charts
from equinorm.checkup.numbers import Numbers, percent, short
from equinorm.checkup.terminal import show
from equinorm.probe import record
from tests.probe import networks as net

VOID = {"meta", "br", "hr", "img", "input", "link", "wbr", "path", "use", "rect", "circle", "image"}


class Page(HTMLParser):
    """Identifiers, links, text, and whether every element is closed."""

    def __init__(self, html):
        super().__init__()
        self.ids, self.links, self.open, self.tags, self.words = [], [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attributes = dict(attrs)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "a":
            self.links.append(attributes.get("href") or attributes.get("xlink:href"))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        if "id" in dict(attrs):
            self.ids.append(dict(attrs)["id"])

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.words))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


@pytest.fixture(scope="module")
def broken():
    """A residual network on raw pixels with a layer of dead channels."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), *[Block(16) for _ in range(3)], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )
    with torch.no_grad():
        model[2].norm1.bias[:12] = -100
    report = equinorm.probe(model, torch.rand(4, 3, 12, 12) * 255, weights=True)
    report.prescribe()
    return report


@pytest.fixture(scope="module")
def page(broken, tmp_path_factory):
    return broken.html(tmp_path_factory.mktemp("page") / "report.html").read_text()


def test_the_page_needs_nothing_but_itself(page):
    assert "<script" not in page
    assert not re.findall(r"(?:src|href)=\"(?!#|data:image/png)[^\"]*\"|url\((?!#)[^)]*\)|@import", page)
    parsed = Page(page)
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids)), "an identifier is there twice"
    missing = {link for link in parsed.links if link.startswith("#") and link[1:] not in parsed.ids}
    assert not missing, f"links into nothing: {missing}"


def test_the_page_shows_everything(broken, page):
    parsed = Page(page)
    for finding in broken.findings:
        assert finding.sentence in parsed.text
    for number in range(1, len(broken.findings) + 1):
        assert f"finding-{number}" in parsed.ids
    for prescription in broken.prescriptions:
        assert prescription.title[1:] in parsed.text
        assert prescription.outcome in parsed.text
    for call in broken.leaves():
        assert f"call-{call.index}" in parsed.ids
    for parameter in broken.parameters:
        assert parameter.name in parsed.text
    for heading in ("signal", "gradient", "propagation", "residuals", "channels"):
        assert f"{heading}-figure" in parsed.ids
    assert "stable rank" in parsed.text
    drawn = [p for p in broken.prescriptions[:3] if p.after is not None]
    overlays = sum(charts.differ(broken, p.after, what) for p in drawn for what in ("signal", "gradient"))
    assert overlays >= 2
    assert parsed.tags.count("svg") == 2 * (5 + overlays)  # wide and narrow


def test_findings_and_layers_link_to_each_other(broken, page):
    number, finding = next((n, f) for n, f in enumerate(broken.findings, 1) if f.kind == "dead_channels")
    assert f'<a href="#call-{finding.calls[0]}">' in page
    row = re.search(rf'<tr id="call-{finding.calls[0]}">.*?</tr>', page, re.DOTALL)
    assert row is not None
    assert f'href="#finding-{number}"' in row[0]
    assert "12 of 16" in row[0]


def test_the_page_has_colours_for_light_and_dark(page):
    variables = set(re.findall(r"var\((--[\w-]+)\)", page))
    light = page[page.index("<style>") : page.index("</style>")]
    dark = "".join(re.findall(r"prefers-color-scheme: dark\) \{(.*?)\}\s*\}", light, re.DOTALL))
    assert variables
    for variable in variables:
        assert f"{variable}:" in light
        assert f"{variable}:" in dark, f"{variable} has no dark value"
    assert not re.search(r"#0000\d\d|#0001\d\d", page), "a placeholder colour was not replaced"


def test_a_healthy_model_and_one_that_raises(tmp_path):
    healthy = equinorm.probe(net.mlp(3, 64), torch.randn(32, 64))
    text = Page(healthy.html(tmp_path / "healthy.html").read_text()).text
    assert "None: at the thresholds below nothing is out of order." in text
    raising = equinorm.probe(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(9, 4)), torch.randn(4, 8))
    text = Page(raising.html(tmp_path / "raising.html").read_text()).text
    assert "The model raised. layer '2' (Linear) refused in the forward pass" in text
    nothing = equinorm.probe(nn.Linear(9, 4), torch.randn(4, 8))
    assert "The model raised." in Page(nothing.html(tmp_path / "nothing.html").read_text()).text


def test_names_are_escaped(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleDict({"<b>&": nn.Linear(4, 4)})

        def forward(self, x):
            return self.layers["<b>&"](x)

    html = equinorm.probe(Odd(), torch.randn(8, 4)).html(tmp_path / "odd.html").read_text()
    assert "<b>" not in html
    assert "&lt;b&gt;&amp;" in html


def deep(layers=500):
    model = nn.Sequential(*[layer for _ in range(layers) for layer in (nn.Linear(32, 32), nn.ReLU())])
    equinorm.init.initialize(model)
    return model


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    torch.manual_seed(0)
    report = equinorm.probe(deep(), torch.randn(32, 32))
    start = time.process_time()
    path = report.html(tmp_path_factory.mktemp("large") / "large.html")
    return path, time.process_time() - start


def test_the_page_of_a_thousand_layers_stays_small_and_legible(large):
    path, seconds = large
    html = path.read_text()
    parsed = Page(html)
    assert sum(i.startswith("call-") for i in parsed.ids) == 1000
    assert len(html) < 1_500_000
    assert len(parsed.tags) < 25_000
    assert seconds < 10
    figure = html[html.index('id="signal-figure"') : html.index('id="gradient-figure"')]
    numbers = re.findall(r">(\d+)</text>", figure)
    assert len(numbers) < 40, "too many labels to read"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_the_page_of_a_thousand_layers_opens_within_two_seconds(large, tmp_path):
    empty = tmp_path / "empty.html"
    empty.write_text("<!doctype html><title>x</title>")

    def opened(path: Path) -> float:
        times = []
        for run in range(3):
            start = time.perf_counter()
            command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/{path.stem}{run}"]
            subprocess.run(
                [*command, f"--screenshot={tmp_path}/{path.stem}.png", path.as_uri()], capture_output=True, check=True, timeout=60
            )
            times.append(time.perf_counter() - start)
        return min(times)

    took, base = opened(large[0]), opened(empty)
    assert took - base < 2, f"opening took {took:.1f} s, of which {base:.1f} s for the browser itself"


def printed(report, prescriptions=(), width=80):
    console = Console(width=width, record=True, file=io.StringIO(), highlight=False)
    show(report, prescriptions, console)
    return console.export_text()


def test_the_terminal_shows_numbers_profile_findings_and_what_was_tried(broken):
    text = printed(broken, broken.prescriptions)
    assert max(map(len, text.splitlines())) <= 80
    flat = re.sub(r"\s+", " ", text)
    for number, finding in enumerate(broken.findings, 1):
        assert f"{number}. {finding.severity}: {finding.title}" in flat
        assert finding.sentence in flat
    for prescription in broken.prescriptions:
        assert f"Prescription {prescription.number}: {prescription.title}" in flat
    assert printed(broken, width=60)


def test_the_terminal_shortens_deep_models():
    text = printed(equinorm.probe(deep(100), torch.randn(16, 32)))
    assert sum("█" in line for line in text.splitlines()) <= 24
    assert "0 … " in text


def test_bars_are_longer_for_more():
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(8)])
    for layer in model:
        nn.init.orthogonal_(layer.weight, gain=10.0)
    text = printed(equinorm.probe(model, torch.randn(16, 64)))
    lines = text.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("layer"))
    column = lines[start].index("output") + len("output") + 2
    bars = [line[column : column + 16].count("█") for line in lines[start + 1 : start + 9]]
    assert bars == sorted(bars)
    assert bars[-1] > bars[0] + 10


def test_json_has_the_documented_fields():
    report = equinorm.probe(net.mlp(3, 32), torch.randn(8, 64))
    data = json.loads(report.to_json())
    assert data["schema"] == record.SCHEMA == 1
    documented = (Path(equinorm.__file__).parent.parent / "docs" / "probe-schema.md").read_text()
    for section, cls, value in (
        ("Report", record.Report, data),
        ("Call", record.Call, data["calls"][0]),
        ("Stats", record.Stats, data["calls"][0]["forward"]),
        ("Channels", record.Channels, data["calls"][0]["channels"]),
        ("Parameter", record.Parameter, data["parameters"][0]),
        ("Residual", record.Residual, None),
        ("Norm", record.Norm, None),
        ("Gap", record.Gap, None),
        ("Failure", record.Failure, None),
        ("Steps", record.Steps, None),
    ):
        names = {f.name for f in fields(cls)} - {"source", "prescriptions"}
        if value is not None:
            assert set(value) == names
        part = re.search(rf"^## {section}$(.*?)(?=^## |\Z)", documented, re.MULTILINE | re.DOTALL)
        assert part is not None, f"docs/probe-schema.md has no section {section}"
        assert set(re.findall(r"^\| `(\w+)`", part[1], re.MULTILINE)) == names, f"docs/probe-schema.md, section {section}"


def test_profiles_are_drawn_over_each_other_where_they_differ():
    model, x = net.mlp(4, 64), torch.randn(32, 64)
    one, same = equinorm.probe(model, x), equinorm.probe(model, x)
    with torch.no_grad():
        net.linears(model)[2].weight.mul_(1.1)
    other = equinorm.probe(model, x)
    assert not charts.differ(one, same, "signal")
    assert charts.differ(one, other, "signal")
    assert charts.differ(one, other, "gradient")


def test_numbers_of_a_report(broken):
    numbers = Numbers.of(broken)
    assert numbers.severe == len(broken.severe)
    assert numbers.dead == 12
    assert numbers.forward.high == max(c.forward.rms for c in broken.leaves() if c.forward)
    assert numbers.forward.ratio == pytest.approx(numbers.forward.high / numbers.forward.low)


def test_a_dead_channel_is_counted_once_behind_its_activation():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        model[0].weight[:5] = 0
        model[0].bias[:5] = 0
    assert Numbers.of(equinorm.probe(model, torch.randn(32, 8))).dead == 5


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (1.0, "1"),
        (0.012345, "0.0123"),
        (123.4, "123"),
        (1.2e-7, "1.2e-7"),
        (45e5, "4.5e6"),
        (math.inf, "∞"),
        (math.nan, "NaN"),
    ],
)
def test_short_numbers(value, text):
    assert short(value) == text


def test_percentages():
    assert [percent(v) for v in (None, 0.0, 0.001, 0.25, 1.0)] == ["–", "0", "<1 %", "25 %", "100 %"]


def test_the_signal_propagation_plot_is_brocks(broken):
    """At residual sums: the two averages and the variance at the end of the branch, as recorded."""
    sums = [call for call in broken.calls if call.residual is not None]
    assert len(sums) == 3
    assert charts.propagation(broken, "x") is not None
    plain = equinorm.probe(nn.Sequential(nn.Linear(8, 8)), torch.randn(8, 8))
    assert charts.propagation(plain, "x") is None
