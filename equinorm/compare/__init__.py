"""Which norm suits a task: the same task trained with each norm, at each batch size, for each seed.

A task is a generator function. It trains a model whose norm layers come from ``norm_layer`` and yields a dict of numbers per epoch::

    def task(norm_layer, batch_size, seed):
        model = torch.nn.Sequential(torch.nn.Linear(64, 32), norm_layer(32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
        for epoch in range(5):
            ...                                  # train one epoch, measure
            yield {"accuracy": accuracy}

and is named on the command line as ``file.py:task`` or ``package.module:task``::

    equinorm compare mytask.py:task --norms batch group layer --batch-sizes 2,16,64 --seeds 3

**What a task is given.** ``norm_layer(channels)`` returns the norm for that many channels (``torch.nn.Identity`` for ``none``).
``batch_size`` and ``seed`` are integers. Further arguments are passed by keyword, and only if they were asked for on the command line:
``lr`` (``--lr``), ``epochs`` (``--epochs``), ``data`` (``--data``), ``device`` (``--device``), ``weight_layer`` (a function ``module ->
module`` that reparametrizes a linear layer or convolution, where a norm was named with ``+ws``), and anything given as ``--option
name=value``. An option that the task does not take is refused.

**What a task yields.** A dict from names to numbers, once per epoch. The metric compared is called ``accuracy`` unless ``--metric`` says
otherwise. ``test_<metric>`` is reported if the task yields it, else plain ``<metric>``. ``validation_<metric>`` chooses among learning
rates; without it a grid of learning rates is refused. ``seconds_per_step`` is the time of one optimizer step as the task measured it;
without it the time of a whole epoch is reported. The value after the last epoch counts. A value that is not finite ends the cell as
diverged.

**What a task may say about itself**, as attributes of the function: ``metric`` (name), ``direction`` ("maximize" or "minimize"), and
``check``, a function called once with ``batch_sizes=`` and the task's options before any cell starts; it raises ``ValueError`` for a
missing data folder and the like. The docstring describes the task in the report.

**What is kept the same.** Before the task is called, the random generators of Python, NumPy and torch are seeded with ``seed``. Making a
norm layer does not advance torch's generator, so initial weights are the same for every norm. A norm that draws random numbers while
training does advance it: draw the order of the data from a generator of the task's own, as the built-in tasks do.

One combination of norm, batch size, seed and learning rate is a *cell*. Cells wait in an Optuna study in a database; each runs in a process
of its own. A cell ends measured or failed with a reason: ``refused`` (the norm cannot be used there), ``diverged``, ``error`` or ``died``.
"""

from __future__ import annotations

from equinorm.compare.errors import InputError, Interrupted
from equinorm.compare.plan import Plan

__all__ = ["InputError", "Interrupted", "Plan", "compare"]


def __getattr__(name: str) -> object:
    if name == "compare":  # needs Optuna: imported when it is used
        from equinorm.compare.runner import compare

        return compare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
