"""The count of passes over memory: no method is forgotten, and what methods state of themselves fits it."""

from __future__ import annotations

import re

import pytest

from equinorm.catalogue import methods
from equinorm.kernels.traffic import MEASURED_IN_EVAL, OPERANDS, UNCOUNTED, Traffic, least, streamed

FACTS = {name: method.facts for name, method in methods().items()}
COUNTED = [name for name, facts in FACTS.items() if facts.family != "weight" and name not in UNCOUNTED]

# Compositions that go over the data several times, or write what lies between, and state what they do today.
COMPOSED = {"filter_response_tlu", "positional", "local_contrast", "subtractive", "divisive", "mixture", "deep_norm"}
# Counted per tensor in their facts, of which they take two.
PER_TENSOR = {"query_key"}


def parts(facts, count):
    return [str(count(facts, of)) for of in ("forward", "eval", "backward", "both")]


def test_every_method_has_a_count_or_a_reason_to_have_none():
    assert set(UNCOUNTED) | set(OPERANDS) | MEASURED_IN_EVAL <= set(FACTS)
    assert not set(UNCOUNTED) & (set(OPERANDS) | MEASURED_IN_EVAL)
    for name in FACTS.keys() - COUNTED:
        with pytest.raises(ValueError, match=f"'{name}' has no count of passes over its input: ."):
            least(FACTS[name], "forward")


@pytest.mark.parametrize("name", COUNTED)
def test_no_count_is_below_what_must_be_read_and_written(name):
    facts = FACTS[name]
    for of in ("forward", "eval", "backward", "both"):
        few, many = least(facts, of), streamed(facts, of)
        assert few.reads >= 1
        assert few.writes >= 1
        assert few.writes == many.writes
        assert few.reads <= many.reads
    assert least(facts, "both").passes == least(facts, "forward").passes + least(facts, "backward").passes


@pytest.mark.parametrize("name", COUNTED)
def test_what_a_method_states_of_its_forward_lies_between_the_counts(name):
    stated = re.match(r"(\d+)R\+(\d+)W", FACTS[name].reads_writes)
    if stated is None:
        assert name == "mixture", "only its count depends on options"
        return
    forward = Traffic(int(stated[1]), int(stated[2]))
    factor = 2 if name in PER_TENSOR or name == "virtual_batch" else 1
    assert least(FACTS[name], "forward").reads <= factor * forward.reads
    if name not in COMPOSED:
        assert forward.reads <= streamed(FACTS[name], "forward").reads
        assert forward.writes <= streamed(FACTS[name], "forward").writes


@pytest.mark.parametrize(
    ("name", "few", "many"),
    [  # forward, eval, backward, both
        ("layer", ["1R+1W", "1R+1W", "2R+1W", "3R+2W"], ["1R+1W", "1R+1W", "2R+1W", "3R+2W"]),
        ("group", ["1R+1W", "1R+1W", "2R+1W", "3R+2W"], ["2R+1W", "2R+1W", "4R+1W", "6R+2W"]),
        ("batch", ["1R+1W", "1R+1W", "2R+1W", "3R+2W"], ["2R+1W", "1R+1W", "4R+1W", "6R+2W"]),
        ("switch", ["1R+1W", "1R+1W", "2R+1W", "3R+2W"], ["2R+1W", "2R+1W", "4R+1W", "6R+2W"]),
        ("iterative", ["1R+1W", "1R+1W", "2R+1W", "3R+2W"], ["3R+1W", "1R+1W", "4R+1W", "7R+2W"]),
        ("activation", ["1R+1W", "1R+1W", "2R+1W", "3R+2W"], ["1R+1W", "1R+1W", "2R+1W", "3R+2W"]),
        ("mp_sum", ["2R+1W", "2R+1W", "1R+2W", "3R+3W"], ["2R+1W", "2R+1W", "1R+2W", "3R+3W"]),
    ],
)
def test_counts_derived_by_hand(name, few, many):
    assert parts(FACTS[name], least) == few
    assert parts(FACTS[name], streamed) == many
