"""Norms as named on the command line, and that making them leaves the task's random numbers alone."""

from __future__ import annotations

import pytest
import torch

import equinorm
from equinorm import catalogue
from equinorm.compare.norms import NormSpec, split_specs


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("none", "none"),
        ("None", "none"),
        ("BatchNorm", "batch"),
        ("group:num_groups=1", "group:num_groups=1"),
        ("group_norm:eps=1e-3,num_groups=2", "group:eps=0.001,num_groups=2"),
        ("batch_channel+ws", "batch_channel+ws"),
        ("group:num_groups=4+weight_standardization", "group:num_groups=4+ws"),
        ("batch:momentum=None,affine=False", "batch:affine=False,momentum=None"),
    ],
)
def test_canonical_text_reads_back_as_itself(text, canonical):
    assert str(NormSpec.parse(text)) == canonical
    assert NormSpec.parse(canonical) == NormSpec.parse(text)


def test_options_reach_the_norm():
    norm = NormSpec.parse("group:num_groups=2,eps=1e-3").norm_layer(8)
    assert isinstance(norm, equinorm.GroupNorm)
    assert (norm.num_groups, norm.num_channels, norm.eps) == (2, 8, 1e-3)
    assert isinstance(NormSpec.parse("none").norm_layer(8), torch.nn.Identity)


def test_weights_are_reparametrized_only_where_asked():
    plain, standardized = (NormSpec.parse(text).weight_layer(torch.nn.Linear(6, 3)) for text in ("batch", "batch+ws"))
    assert not torch.nn.utils.parametrize.is_parametrized(plain)
    torch.testing.assert_close(standardized.weight.mean(1), torch.zeros(3), rtol=0, atol=1e-6)


def test_specifications_may_be_separated_by_commas_or_be_words():
    assert split_specs(["batch,group:num_groups=1,eps=1e-3,layer", "rms", " switch ,none"]) == [
        "batch",
        "group:num_groups=1,eps=1e-3",
        "layer",
        "rms",
        "switch",
        "none",
    ]


def makes_itself(facts):
    """Whether a number of channels is enough: no weight method, no condition."""
    return hasattr(catalogue.resolve(facts.name), "for_channels") and facts.family != "conditional"


@pytest.mark.parametrize("name", [facts.name for facts in catalogue.find() if makes_itself(facts)])
def test_making_a_norm_does_not_advance_the_random_generator(name):
    before = torch.get_rng_state()
    NormSpec(name).norm_layer(16)
    assert torch.equal(torch.get_rng_state(), before)


def test_not_even_a_norm_that_draws_its_parameters(monkeypatch):
    drawn = []
    monkeypatch.setattr(equinorm, "create", lambda *_: drawn.append(torch.rand(3)))
    before = torch.get_rng_state()
    NormSpec("layer").norm_layer(16)
    assert len(drawn) == 1
    assert torch.equal(torch.get_rng_state(), before)
