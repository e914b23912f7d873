"""`equinorm list` and `equinorm show`, through the real entry point, and the lookups behind them."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import equinorm
from equinorm import catalogue
from equinorm.catalogue_show import picture
from equinorm.facts import FAMILIES


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "equinorm", *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_list_shows_all_and_filters():
    shown = command("list")
    assert shown.returncode == 0
    for name in catalogue.methods():
        assert f"  {name} " in shown.stdout
    found = json.loads(command("list", "--family", "batch", "--folds", "--json").stdout)
    assert {"batch"} <= {facts["name"] for facts in found}
    assert all(facts["family"] == "batch" and facts["folds"] for facts in found)


def test_list_without_a_match_fails():
    shown = command("list", "no-such-thing")
    assert shown.returncode == 1
    assert "no method matches" in shown.stdout


def test_show_says_what_matters():
    shown = command("show", "GroupNorm")
    assert shown.returncode == 0
    for part in ("Group Normalization", "███", "Use it when", "Not when", "num_groups", "1803.08494"):
        assert part in shown.stdout


def test_show_suggests_the_nearest_name():
    shown = command("show", "grup")
    assert shown.returncode == 2
    assert "did you mean 'group'" in shown.stderr


def test_show_json_holds_facts_text_and_signature():
    shown = json.loads(command("show", "batch", "--json").stdout)
    assert shown["facts"]["paper"]["arxiv"] == "1502.03167"
    assert shown["signature"].startswith("BatchNorm(num_features")
    assert "Formula" in shown["text"]


@pytest.mark.parametrize("name", list(catalogue.methods()))
def test_every_page_is_complete(name):
    method = catalogue.resolve(name)
    text = catalogue.prose(method)
    for section in ("Summary", "Formula", "Use it when", "Not when", "Known trouble", "Args", "Source"):
        assert text.get(section), f"the docstring of {method.__name__} has no section {section!r}"
    assert method.facts.family in FAMILIES
    assert method.facts.paper.year > 1980


@pytest.mark.parametrize("spelling", ["batch", "BatchNorm", "batch_norm", "batch-norm", "BATCH NORMALIZATION"])
def test_spellings_of_a_name(spelling):
    assert catalogue.resolve(spelling) is equinorm.BatchNorm


@pytest.mark.parametrize(
    ("pools", "first_row", "second_row"),
    [
        ("NS", "███  ···", "███  ···"),
        ("S", "███  ···", "···  ···"),
        ("CS", "███  ███", "···  ···"),
        ("C", "█··  █··", "···  ···"),
        ("K", "██·  ···", "···  ···"),
        ("L", "···  █··", "···  ···"),
    ],
)
def test_pictures(pools, first_row, second_row):
    rows = picture(pools).splitlines()
    assert rows[1].startswith(f"sample 1  {first_row}")
    assert rows[2].startswith(f"sample 2  {second_row}")


def test_other_packages_add_methods(monkeypatch):
    class TheirNorm(torch.nn.Module):
        """Theirs."""

        facts = equinorm.Facts(
            name="theirs", title="Theirs", paper=equinorm.Paper(authors="They", title="It", year=2026), family="sample", pools="S"
        )

        @classmethod
        def for_channels(cls, channels):
            return cls()

    def entries(method):
        return lambda group: [SimpleNamespace(value="them:TheirNorm", load=lambda: method)] if group == "equinorm.norms" else []

    catalogue.methods.cache_clear()
    monkeypatch.setattr(catalogue, "entry_points", entries(TheirNorm))
    assert isinstance(equinorm.create("theirs", 4), TheirNorm)
    catalogue.methods.cache_clear()
    monkeypatch.setattr(catalogue, "entry_points", entries(torch.nn.Linear))
    with pytest.raises(ValueError, match="must carry `facts"):
        catalogue.methods()
    monkeypatch.setattr(TheirNorm, "facts", equinorm.BatchNorm.facts)
    monkeypatch.setattr(catalogue, "entry_points", entries(TheirNorm))
    with pytest.raises(ValueError, match="the name 'batch', which is taken"):
        catalogue.methods()
    monkeypatch.undo()
    catalogue.methods.cache_clear()
