"""The benchmark's own parts: peers are checked before they are timed, and entries are those that were asked for. Nothing is timed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import equinorm
from equinorm.bench.contenders import BY_NAME, CONTENDERS, Composed, Contender, composed
from equinorm.bench.grid import FEW, SHAPES, Entry, entries, parsed, written
from equinorm.bench.measure import BATCH, COPY, OURS, Disagreement, Timing, agree, inputs, interleaved, measure, perturbed, prepared
from equinorm.kernels.traffic import least

TINY = {"channel": (4, 64, 5, 6), "row": (9, 16)}


def entry(name="batch", shape=(4, 64, 5, 6), dtype="float32", layout="contiguous", of="both", pages="default"):
    return Entry(pages, name, shape, dtype, layout, of)


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda c: c.name)
def test_every_peer_computes_what_ours_computes(contender):
    torch.manual_seed(3)
    size = TINY[contender.geometry][1]
    modules, notes = prepared(contender, size, torch.float32, compiled=False)
    broken = {name for name, note in notes.items() if name == "timm" and note.startswith("cannot be built: ModuleNotFoundError")}
    assert set(notes) == broken, "timm may be there without what it needs; nothing else may be missing"
    assert set(contender.installed()) - broken < set(modules)


def test_every_contender_is_in_the_catalogue_and_has_a_count():
    for contender in CONTENDERS:
        assert least(equinorm.find(name=contender.name)[0], "both").passes >= 4


WRONG = {
    "the unbiased variance": lambda x, p, training: (
        (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True) + 1e-5).sqrt() * p["weight"].view(1, -1, 1, 1)
        + p["bias"].view(1, -1, 1, 1)
    ),
    "no bias": lambda x, p, training: nn.functional.batch_norm(
        x, *((None, None) if training else (p["running_mean"], p["running_var"])), p["weight"], None, training=training
    ),
    "batch statistics in evaluation": lambda x, p, training: nn.functional.batch_norm(x, None, None, p["weight"], p["bias"], training=True),
    "no gradient through the statistics": lambda x, p, training: nn.functional.batch_norm(
        x,
        *((x.mean((0, 2, 3)).detach(), x.var((0, 2, 3), correction=0).detach()) if training else (p["running_mean"], p["running_var"])),
        p["weight"],
        p["bias"],
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_peer_that_computes_something_else_is_refused(mistake):
    own = perturbed(equinorm.BatchNorm(8))
    with pytest.raises(Disagreement, match=r"computes something else: in float64 its (training|evaluation|gradient) differs by"):
        agree(BY_NAME["batch"], own, Composed(own, WRONG[mistake]), 8)


def test_a_refused_peer_has_a_note_and_no_number(monkeypatch):
    peers = {"right": composed(WRONG["no bias"]), "broken": composed(lambda x, p, training: x.new_zeros(x.shape, requires_grad=True) + x)}
    contender = Contender("batch", "channel", lambda c: equinorm.BatchNorm(c, bias=False), peers)
    monkeypatch.setitem(BY_NAME, "batch", contender)
    timings = {t.who: t for t in measure([entry()], rounds=1, seconds=0.0, compiled=False)}
    assert timings["right"].seconds is not None
    assert timings["right"].note == ""
    assert timings["broken"].seconds is None
    assert timings["broken"].note.startswith("computes something else: in float64 its")


def test_a_peer_whose_library_is_broken_says_so():
    def build(own, size):
        raise ModuleNotFoundError("No module named 'torchvision'")

    _, notes = prepared(Contender("batch", "channel", equinorm.BatchNorm, {"peer": build}), 8, torch.float32, compiled=False)
    assert notes == {"peer": "cannot be built: ModuleNotFoundError: No module named 'torchvision'"}


def test_a_peer_that_does_not_run_says_why(monkeypatch):
    def refuses_bfloat16(x, p, training):
        if x.dtype == torch.bfloat16:
            raise NotImplementedError("no kernel for this type\nand more")
        return torch.batch_norm(x, p["weight"], p["bias"], p["running_mean"], p["running_var"], training, 0.0, 1e-5, False)

    monkeypatch.setitem(BY_NAME, "batch", Contender("batch", "channel", equinorm.BatchNorm, {"peer": composed(refuses_bfloat16)}))
    timings = {t.who: t for t in measure([entry(dtype="bfloat16", of="forward")], rounds=1, seconds=0.0, compiled=False)}
    assert timings["peer"].note == "does not run: NotImplementedError: no kernel for this type"
    assert set(timings) == {OURS, COPY, "peer"}


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        if dy.dtype == torch.float32:
            raise RuntimeError("no backward in float32")
        return dy


def test_a_peer_that_fails_in_backward_says_why(monkeypatch):
    peer = composed(
        lambda x, p, training: OnceDifferentiable.apply(
            nn.functional.batch_norm(x, p["running_mean"].clone(), p["running_var"].clone(), p["weight"], p["bias"], training=training)
        )
    )
    monkeypatch.setitem(BY_NAME, "batch", Contender("batch", "channel", equinorm.BatchNorm, {"peer": peer}))
    timings = {t.who: t for t in measure([entry()], rounds=1, seconds=0.0, compiled=False)}
    assert timings["peer"].note == "does not run: RuntimeError: no backward in float32"
    assert timings["peer"].seconds is None
    assert timings[OURS].seconds is not None


def test_a_failure_of_ours_is_no_note(monkeypatch):
    class Fails(equinorm.BatchNorm):
        def forward(self, x, *args, **kwargs):
            if x.dtype == torch.float32:
                raise RuntimeError("ours is broken")
            return super().forward(x, *args, **kwargs)

    monkeypatch.setitem(BY_NAME, "batch", Contender("batch", "channel", Fails, {"torch": BY_NAME["batch"].peers["torch"]}))
    with pytest.raises(RuntimeError, match="ours is broken"):
        measure([entry()], rounds=1, seconds=0.0, compiled=False)


@pytest.mark.parametrize("of", ["eval", "forward", "both"])
@pytest.mark.parametrize(("name", "who"), [("switch", {OURS, COPY, BATCH, "composed"}), ("rms", {OURS, COPY, "torch"})])
def test_ours_peers_and_a_copy_are_timed_in_the_same_rounds(name, who, of):
    timings = measure([entry(name, TINY[BY_NAME[name].geometry], of=of)], rounds=3, seconds=60.0, compiled=False)
    assert {t.who for t in timings} == who
    assert {t.rounds for t in timings} == {3}
    assert len({t.copy for t in timings}) == 1


def test_evaluation_is_compared_before_training_moves_estimates():
    timings = measure([entry("switch", of=of) for of in ("forward", "both", "eval")], rounds=1, seconds=0.0, compiled=False)
    assert [t.note for t in timings if t.note] == []


def test_functions_take_turns():
    calls = []
    times, rounds = interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=2, seconds=0.0)
    assert set(times) == {"a", "b"}
    assert rounds == 2
    timed = "".join(calls).replace("aa", "a")
    while "aa" in timed or "bb" in timed:
        timed = timed.replace("aa", "a").replace("bb", "b")
    assert timed == "abab" + "ab"  # one turn to warm up


def test_shares_of_a_copy():
    both = Timing(entry(), OURS, 0.010, 0.004, 5)
    assert both.passes == 5
    assert both.of_copy == pytest.approx(2.5 * 0.004 / 0.010)
    assert both.bandwidth == pytest.approx(5 * 4 * 64 * 5 * 6 * 4 / 0.010)
    assert Timing(entry(), COPY, 0.004, 0.004, 5).of_copy == 1
    assert Timing(entry(), "peer", None, 0.004, 0).of_copy is None


def test_the_grid():
    whole = list(entries("reused", ["batch", "rms", "switch"], None, ["float32"], ["contiguous", "channels_last"], ["both"]))
    assert {e.shape for e in whole if e.norm == "batch"} == {s for s in SHAPES if len(s) == 4}
    assert {e.shape for e in whole if e.norm == "rms"} == {s for s in SHAPES if len(s) == 2}
    assert {e.shape for e in whole if e.norm == "switch"} == {s for s in FEW if len(s) == 4}
    assert {e.layout for e in whole if e.norm == "rms"} == {"contiguous"}
    assert [e.norm for e in whole if e.norm != "batch"][-1] == "switch", "what torch has comes first"
    assert not list(entries("reused", ["group"], [(64, 3, 224, 224)], ["float32"], ["contiguous"], ["both"])), "32 groups of 3 channels"
    assert [len(group) for group in inputs([entry(of="eval"), entry(of="both"), entry(dtype="bfloat16")])] == [2, 1]


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_read_as_they_are_written(shape):
    assert parsed(written(shape)) == shape


@pytest.mark.parametrize("text", ["", "64", "64x", "64x0", "1x2x3", "-1x2", "axb"])
def test_what_is_no_shape(text):
    with pytest.raises(ValueError, match="a shape is ROWSxFEATURES or"):
        parsed(text)
