"""From cells to rows, sentences and a page."""

from __future__ import annotations

import itertools
import random
import re
import statistics
from html.parser import HTMLParser

import pytest

from equinorm.compare.findings import findings, interval_statement, progress
from equinorm.compare.intervals import median_interval
from equinorm.compare.outcomes import Failed, Measured
from equinorm.compare.plan import Plan
from equinorm.compare.report import write_report
from equinorm.compare.results import Comparison


def comparison(score, **plan):
    """A comparison on digits-mlp whose cells ended as ``score(cell)`` says: a test accuracy, a failure or None for not finished."""
    plan = Plan(**{"norms": ("none", "batch", "group:num_groups=2"), "batch_sizes": (2, 16), **plan})
    outcomes = {cell: outcome for cell in plan.cells() if (outcome := _outcome(score(cell))) is not None}
    return Comparison(plan, outcomes, "A <task>.\n\nIn two paragraphs.", "equinorm compare 'a & b'", workers=2)


def _outcome(score):
    if score is None or isinstance(score, Failed):
        return score
    validation, test = score if isinstance(score, tuple) else (score, score)
    history = {"validation_accuracy": [0.1, validation], "test_accuracy": [0.1, test], "seconds_per_step": [0.004, 0.002]}
    return Measured(history, seconds=2.0, seconds_per_epoch=1.0, peak_memory=3 * 2**20, machine={"torch": "2.13"})


def by_norm(cell):
    if cell.norm == "none" and cell.batch_size == 2:
        return Failed("diverged", "train_loss is nan after epoch 2", 1)
    fall = 0.5 if cell.norm == "batch" and cell.batch_size == 2 else 0.0
    return {"none": 0.8, "batch": 0.9}.get(cell.norm, 0.895) + 0.01 * cell.seed - fall


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 9, 20])
def test_interval_holds_the_median_as_often_as_it_says(count):
    generator = random.Random(count)
    hits, trials = 0, 4000
    for _ in range(trials):
        interval = median_interval([generator.lognormvariate(0, 1) for _ in range(count)])  # its median is 1
        hits += interval.low <= 1 <= interval.high
    expected = interval.confidence
    assert abs(hits / trials - expected) < 4 * (expected * (1 - expected) / trials) ** 0.5 + 1e-9
    assert expected >= 0.95 or interval.rank == 1


def test_row_is_median_and_range_of_its_seeds():
    row = comparison(by_norm).row("batch", 16)
    assert row.scores == pytest.approx([0.9, 0.91, 0.92])
    assert (row.interval.median, row.interval.low, row.interval.high) == pytest.approx((0.91, 0.9, 0.92))
    assert row.seconds_per_step == pytest.approx(0.003)
    assert row.peak_memory == 3 * 2**20
    assert comparison(by_norm).row("none", 2).interval is None


def test_learning_rate_is_chosen_by_validation_alone():
    rates = (0.01, 0.1, 1.0)
    scores = {0.01: (0.7, 0.99), 0.1: (0.9, 0.5), 1.0: (0.8, 0.8)}  # (validation, test)
    assert {row.lr for row in comparison(lambda cell: scores[cell.lr], learning_rates=rates).rows} == {0.1}
    worst_of_loss = {0.01: (0.7, 0.99), 0.1: (0.9, 0.5), 1.0: (0.8, 0.8)}
    minimized = comparison(lambda cell: worst_of_loss[cell.lr], learning_rates=rates, direction="minimize")
    assert {row.lr for row in minimized.rows} == {0.01}
    assert "smallest or the largest of the grid" in findings(minimized)[-1]


def test_learning_rate_at_which_a_seed_fails_comes_last():
    def score(cell):
        return Failed("diverged", "nan") if (cell.lr, cell.seed) == (1.0, 1) else {0.1: 0.5, 1.0: 0.9}[cell.lr]

    assert {row.lr for row in comparison(score, learning_rates=(0.1, 1.0)).rows} == {0.1}


def test_sentences_say_what_the_numbers_say():
    said = comparison(by_norm)
    assert (
        progress(said) == "18 cells were asked for and 15 were measured to the end. Without a result: 3 diverged (a metric was not finite)."
    )
    at_16, at_2, change = findings(said)
    assert at_16.startswith("At batch size 16 the highest median test accuracy is that of batch, 0.910 (0.900 to 0.920)")
    assert "; the intervals of group:num_groups=2 overlap with it." in at_16
    assert "Lower: none 0.810." in at_16
    assert "is that of group:num_groups=2, 0.905 (0.895 to 0.915); no other interval overlaps with it. Lower: batch 0.410." in at_2
    assert change.endswith("changed by: batch -0.500 (from 0.910 to 0.410); group:num_groups=2 +0.000 (from 0.905 to 0.905).")
    assert "75 % probability (95 % takes six seeds)" in interval_statement(said)
    lower = findings(comparison(by_norm, direction="minimize"))[0]
    assert "the lowest median test accuracy is that of none" in lower
    assert "Higher: group:num_groups=2 0.905 and batch 0.910." in lower


def test_sentences_when_little_is_there():
    nothing = comparison(lambda cell: None)
    assert progress(nothing) == "18 cells were asked for and 0 were measured to the end. 18 are not finished yet."
    assert findings(nothing) == ["At batch size 16 no norm has a result.", "At batch size 2 no norm has a result."]
    assert interval_statement(nothing) == "No norm finished with all its seeds."


class Page(HTMLParser):
    """Checks that elements are closed in order; collects references, identifiers and text."""

    VOID = frozenset({"meta", "input", "br", "wbr", "link", "img"})

    def __init__(self, html):
        super().__init__()
        self.open, self.references, self.ids, self.tags, self.text = [], [], [], set(), []
        self.feed(html)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        attributes = dict(attributes)
        self.references += [attributes[name] for name in ("src", "href", "xlink:href", "srcset", "action", "data") if name in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without a beginning"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize(
    "made",
    [
        lambda: [comparison(by_norm)],
        lambda: [comparison(by_norm), comparison(by_norm, learning_rates=(0.1, 1.0))],
        lambda: [comparison(by_norm, batch_sizes=(2,), norms=("batch",), seeds=(5,))],
        lambda: [comparison(lambda cell: None)],
        lambda: [comparison(by_norm, norms=("none", "batch", "group:num_groups=2"), batch_sizes=(16, 2))],
    ],
    ids=["one", "two, with a grid of rates", "one norm, batch size and seed", "nothing measured", "unsorted"],
)
def test_report_is_one_well_formed_page_that_needs_nothing_else(made, tmp_path):
    comparisons = made()
    html = write_report(comparisons, tmp_path / "report.html").read_text()
    page = Page(html)
    assert all(reference.startswith("#") for reference in page.references)
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert not re.search(r"https?:|url\((?!#)|@import|<script", html)
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"#000[01][0-9a-f]{2}\b", html), "a placeholder colour was left"
    assert len(html) < 1_000_000
    text = " ".join(page.text)
    for made_of in comparisons:
        for sentence in [*findings(made_of), progress(made_of), interval_statement(made_of), made_of.command, *made_of.plan.norms]:
            assert sentence in text
        assert "A <task>." in text
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


def test_report_shows_each_norm_in_its_colour_in_every_figure(tmp_path):
    said = comparison(
        by_norm, norms=("none", *(f"group:num_groups={2**i},eps={eps}" for i, eps in itertools.product(range(4), (0.1, 0.01))))
    )
    html = write_report([said], tmp_path / "report.html").read_text()
    for index in range(1, 9):
        assert html.count(f'id="c0-main-n{index}-line"') == 1
        assert f"#c0:has(#c0-show{index}:not(:checked)) [id*=&#34;-n{index}-&#34;]" not in html
        assert f'#c0:has(#c0-show{index}:not(:checked)) [id*="-n{index}-"]' in html
    assert len(set(re.findall(r"var\((--series-\d)\)", html))) == 8


def test_median_over_seeds_is_what_the_curve_shows():
    said = comparison(by_norm)
    finals = [outcome.final("test_accuracy") for cell, outcome in said.outcomes.items() if (cell.norm, cell.batch_size) == ("batch", 16)]
    assert said.row("batch", 16).interval.median == statistics.median(finals)
