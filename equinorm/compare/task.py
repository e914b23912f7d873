"""Tasks: finding them by name, and calling them with what they take."""

from __future__ import annotations

import difflib
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from equinorm.compare import loading
from equinorm.compare.errors import InputError

BUILT_IN: dict[str, str] = {
    "digits-mlp": "equinorm.compare.tasks.digits:digits_mlp",
    "digits": "equinorm.compare.tasks.digits:digits",
    "cifar10": "equinorm.compare.tasks.cifar10:cifar10",
}

F = TypeVar("F", bound=Callable[..., Any])

REQUIRED = ("norm_layer", "batch_size", "seed")


class Task:
    """A task, found by its name.

    Args:
        name: a built-in task, ``file.py:function`` or ``module:function``.

    Raises:
        InputError: there is no such task, its module cannot be imported, or it does not take ``norm_layer``, ``batch_size`` and ``seed``.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        place, colon, function = BUILT_IN.get(name, name).rpartition(":")
        if not colon:
            near = difflib.get_close_matches(name, BUILT_IN, n=2, cutoff=0.5)
            suggestion = f"did you mean {' or '.join(near)}? " if near else ""
            raise InputError(
                f"unknown task {name!r}: {suggestion}Built in are {', '.join(BUILT_IN)}; name yours file.py:function or module:function"
            )
        self.module = loading.module(f"task {name!r}", place)
        self.function = loading.function(f"task {name!r}", self.module, function)
        missing = [parameter for parameter in REQUIRED if not self.accepts(parameter)]
        if missing:
            raise InputError(
                f"task {name!r} must take {', '.join(REQUIRED)}; {function}{self.signature} does not take {', '.join(missing)}"
            )

    @cached_property
    def signature(self) -> inspect.Signature:
        """The function's parameters."""
        return inspect.signature(self.function)

    @property
    def description(self) -> str:
        """The function's docstring, without its indentation."""
        return inspect.getdoc(self.function) or ""

    @property
    def source_hash(self) -> str:
        """Changes when the file that holds the task changes; results from before and after must not be mixed."""
        path = inspect.getsourcefile(self.function)
        return hashlib.sha256(Path(path).read_bytes() if path else repr(self.signature).encode()).hexdigest()[:16]

    def stated(self, attribute: str) -> Any:
        """What the task says about itself (``metric``, ``direction``), or None."""
        return getattr(self.function, attribute, None)

    def accepts(self, keyword: str) -> bool:
        """Whether the function can be given this keyword."""
        parameters = self.signature.parameters
        return keyword in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def check_options(self, options: Mapping[str, str]) -> None:
        """Refuse options that the task does not take.

        Args:
            options: from keyword to how it was asked for, for the message.

        Raises:
            InputError: naming what the task takes.
        """
        for keyword, asked in options.items():
            if not self.accepts(keyword):
                takes = [parameter for parameter in self.signature.parameters if parameter not in REQUIRED]
                raise InputError(
                    f"task {self.name!r} has no parameter {keyword!r}, so {asked} cannot be used; it takes {', '.join(takes) or 'none'}"
                )

    def check_input(self, batch_sizes: Sequence[int], options: Mapping[str, Any]) -> None:
        """Let the task look at its input before any cell starts.

        Raises:
            InputError: the task's own complaint.
        """
        check: Callable[..., None] | None = self.stated("check")
        if check is None:
            return
        try:
            check(batch_sizes=batch_sizes, **options)
        except (ValueError, OSError) as error:
            raise InputError(f"task {self.name!r}: {error}") from error

    def start(self, **arguments: Any) -> Iterator[Any]:
        """Call the task; what it returns yields metrics per epoch.

        Raises:
            InputError: it is not a generator function.
        """
        run = self.function(**arguments)
        if not isinstance(run, Iterator):
            raise InputError(
                f"task {self.name!r} must be a generator function that yields a dict of metrics per epoch; it returned {run!r}"
            )
        return run


def states(*, metric: str = "", direction: str = "", check: Callable[..., None] | None = None) -> Callable[[F], F]:
    """Decorate a task with what it says about itself.

    Args:
        metric: name of the metric to compare.
        direction: "maximize" or "minimize".
        check: called once with ``batch_sizes=`` and the task's options before any cell starts; raises ValueError if they cannot work.

    Example:
        >>> @states(metric="loss", direction="minimize")
        ... def task(norm_layer, batch_size, seed):
        ...     yield {"loss": 0.5}
    """

    def decorate(function: F) -> F:
        for name, value in (("metric", metric), ("direction", direction), ("check", check)):
            setattr(function, name, value)
        return function

    return decorate
