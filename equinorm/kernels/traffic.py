"""How often a norm must read and write a large tensor: the limit that measured times are held against.

The unit is one pass over one tensor of the input's size; small tensors (a number per sample and channel) do not count. Two counts are
kept for each method:

- *least*: every input is read once and every output written once, by any algorithm. It is reached where what shares a statistic stays
  in registers or cache between measuring and normalizing. Backward reads the incoming gradients and the inputs and writes a gradient for
  each input; with one input and one output this is 1R+1W forward and 2R+1W backward, together five passes, or 2.5 copies.
- *streamed*: what remains when nothing stays in cache. A statistic over positions then takes one more reading of the inputs in forward
  (two for a covariance, which needs the mean first), and in backward one more of everything that backward reads: 2R+1W and 4R+1W. A
  statistic over the last dimensions, over the channels of a position or over a window is short; it stays in cache on every machine.

Evaluation with running estimates measures nothing: 1R+1W in both counts. Both follow from a method's facts; what facts do not say (more
inputs than one, something measured in evaluation too) is in two tables below.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from equinorm.facts import Facts

Pass = Literal["forward", "eval", "backward", "both"]


class Traffic(NamedTuple):
    """Passes over a tensor of the input's size.

    Attributes:
        reads, writes: how many.
    """

    reads: int
    writes: int

    def __str__(self) -> str:
        return f"{self.reads}R+{self.writes}W"

    @property
    def passes(self) -> int:
        """Reads and writes together; a copy has 2."""
        return self.reads + self.writes


class Operands(NamedTuple):
    """The large tensors of a call, each in units of the first input's size.

    Attributes:
        inputs: what forward reads.
        outputs: what it writes, and what backward reads the gradients of.
        measured: how many of the inputs a statistic is taken of.
        saved: how many of the inputs backward reads again; none where the method is linear in them.
        gradients: what backward writes.
    """

    inputs: int = 1
    outputs: int = 1
    measured: int = 1
    saved: int = 1
    gradients: int = 1


OPERANDS: dict[str, Operands] = {
    "query_key": Operands(2, 2, 2, 2, 2),  # queries and keys
    "adaptive_instance": Operands(2, 1, 2, 2, 2),  # content and style
    "spade": Operands(3, 1, 1, 2, 3),  # x, and a scale and a shift at every position
    "virtual_batch": Operands(2, 1, 2, 1, 1),  # the reference batch is measured anew with each step's weights
    "mean_only_batch": Operands(saved=0),
    "subtractive": Operands(saved=0),
    "deep_norm": Operands(2, 1, 2, 2, 2),  # x, and what the branch made of it
    "normalized_residual": Operands(2, 1, 2, 2, 2),
    "rezero": Operands(2, 1, 0, 1, 1),  # the gradient of the skip is the incoming one
    "skip_init": Operands(2, 1, 0, 1, 1),
    "residual_scaling": Operands(2, 1, 0, 0, 2),
    "mp_sum": Operands(2, 1, 0, 0, 2),
    "mp_cat": Operands(saved=0),  # the unit is both parts together
}

# Methods whose statistic over the batch has a running estimate, and that measure something of each sample's positions in evaluation too,
# though their facts name the statistic of the batch alone.
MEASURED_IN_EVAL = frozenset({"evonorm_b", "mode"})

# No layer from a large tensor to another: nothing to count.
UNCOUNTED: dict[str, str] = {
    "adaptive_gradient_clip": "acts on gradients of weights",
    "r1_penalty": "a loss: a gradient of the user's network",
    "path_length_penalty": "a loss: a gradient of the user's network",
    "discriminator_block": "a block with convolutions",
    "fixup": "a block with convolutions",
    "layer_lstm": "a recurrent layer: matrix products step by step",
    "layer_gru": "a recurrent layer: matrix products step by step",
}


def least(facts: Facts, of: Pass) -> Traffic:
    """The traffic that no algorithm can go below.

    Raises:
        ValueError: the method has no count (see :data:`UNCOUNTED`; methods of the family "weight" act on weights).
    """
    return _count(facts, of, streamed=False)


def streamed(facts: Facts, of: Pass) -> Traffic:
    """The traffic when nothing stays in cache between measuring and normalizing.

    Raises:
        ValueError: as for :func:`least`.
    """
    return _count(facts, of, streamed=True)


def _count(facts: Facts, of: Pass, streamed: bool) -> Traffic:
    if facts.family == "weight" or facts.name in UNCOUNTED:
        why = UNCOUNTED.get(facts.name, "acts on weights, which are small beside what flows through the layer")
        raise ValueError(f"{facts.name!r} has no count of passes over its input: {why}")
    if of == "both":
        forward, backward = (_count(facts, part, streamed) for part in ("forward", "backward"))
        return Traffic(forward.reads + backward.reads, forward.writes + backward.writes)
    inputs, outputs, measured, saved, gradients = OPERANDS.get(facts.name, Operands())
    again = _measuring(facts, of) if streamed else 0
    if of == "backward":
        return Traffic((outputs + saved) * (1 + again), gradients)
    return Traffic(inputs + measured * again, outputs)


def _measuring(facts: Facts, of: Pass) -> int:
    """How often the data is read for statistics alone, when it does not stay in cache."""
    over_positions = [pool for pool in facts.pools.split("+") if "S" in pool]
    if facts.name == "activation":  # measured at the first batch, a fixed map from then on
        return 0
    if of == "eval" and facts.train_differs:
        return int(any("N" not in pool for pool in over_positions) or facts.name in MEASURED_IN_EVAL)
    if facts.family == "whitening" and of == "forward":
        return 2
    return int(bool(over_positions))
