"""The names of metrics: which one is compared, on which data, and which way is better."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

from equinorm.compare.errors import InputError

DIRECTIONS = ("maximize", "minimize")

HIGHER_IS_BETTER = frozenset(
    {"accuracy", "acc", "auc", "auroc", "average_precision", "bleu", "dice", "f1", "iou", "map", "miou", "precision"}
)
HIGHER_IS_BETTER |= {"psnr", "r2", "recall", "return", "reward", "score", "ssim", "top1", "top5"}
LOWER_IS_BETTER = frozenset({"bits_per_byte", "bits_per_dim", "cer", "cost", "cross_entropy", "error", "fid", "loss", "mae", "mse", "nll"})
LOWER_IS_BETTER |= {"perplexity", "ppl", "rmse", "wer"}

STEP_TIME = "seconds_per_step"


def direction_of(metric: str) -> str:
    """Which way is better for a metric of a common name.

    Raises:
        InputError: the name is not a common one.
    """
    if metric in HIGHER_IS_BETTER:
        return "maximize"
    if metric in LOWER_IS_BETTER:
        return "minimize"
    raise InputError(f"whether a higher or a lower {metric!r} is better is not known: say --direction maximize or --direction minimize")


def reported_key(keys: Iterable[str], metric: str) -> str:
    """The yielded name whose value is reported: the metric on test data if there is one.

    Raises:
        InputError: the task yields no such metric.
    """
    known = set(keys)
    for key in (f"test_{metric}", metric):
        if key in known:
            return key
    raise InputError(
        f"the task yielded no metric {metric!r} (or 'test_{metric}'), only {', '.join(sorted(known)) or 'nothing'}: "
        "name one of those with --metric, or yield it"
    )


def choosing_key(keys: Iterable[str], metric: str) -> str:
    """The yielded name that chooses among learning rates: the metric on validation data.

    Raises:
        InputError: the task yields no such metric.
    """
    if (key := f"validation_{metric}") in set(keys):
        return key
    raise InputError(
        f"a grid of learning rates needs 'validation_{metric}' from the task to choose by (choosing by the reported numbers would flatter "
        "them): yield it, or give one --lr"
    )


def numbers_of(yielded: Any) -> dict[str, float]:
    """What a task yielded, as a dict of floats.

    Raises:
        InputError: it is not a dict from names to numbers, or is empty.
    """
    if not isinstance(yielded, Mapping):
        raise InputError(f"a task must yield a dict of metrics per epoch, such as {{'accuracy': 0.9}}; it yielded {_described(yielded)}")
    if not yielded:
        raise InputError("a task must yield at least one metric per epoch, such as {'accuracy': 0.9}; it yielded an empty dict")
    metrics = {}
    for name, value in yielded.items():
        if not isinstance(name, str):
            raise InputError(f"the names of metrics must be strings; the task yielded the name {name!r}")
        if not isinstance(value, numbers.Real) and not hasattr(value, "__float__"):
            raise InputError(f"metrics must be numbers; the task yielded {_described(value)} for {name!r}")
        try:
            metrics[name] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:  # a tensor of several elements
            raise InputError(f"metrics must be single numbers; the task yielded {_described(value)} for {name!r}") from error
    return metrics


def not_finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those that are NaN or infinite."""
    return {name: value for name, value in metrics.items() if not math.isfinite(value)}


def _described(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
