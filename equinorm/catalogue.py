"""The catalogue: every method by name, with what it says about itself.

Nothing is written here twice: names and properties come from each method's ``facts``, prose from its docstring. Other packages add methods
through the entry-point group ``equinorm.norms``, each entry naming a class or function that carries ``facts``.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from torch import nn

import equinorm
from equinorm.facts import FAMILIES, INVARIANCES, Facts

Method = type[nn.Module] | Callable[..., Any]

SECTIONS = ("Formula", "Use it when", "Not when", "Known trouble", "Differences", "Args", "Shape", "Returns", "Raises", "Example", "Source")


@cache
def methods() -> dict[str, Method]:
    """Every method by its catalogue name: the package's own in the order of its table of contents, then those of other packages.

    Raises:
        ValueError: another package's method carries no facts, or a name that is taken.
    """
    own = [value for value in vars(equinorm).values() if isinstance(getattr(value, "facts", None), Facts)]
    known: dict[str, Method] = {}
    for method in own:
        known.setdefault(method.facts.name, method)
    for entry in entry_points(group="equinorm.norms"):
        method = entry.load()
        facts = getattr(method, "facts", None)
        if not isinstance(facts, Facts):
            raise ValueError(f"entry point {entry.value!r} of group equinorm.norms must carry `facts = equinorm.Facts(...)`, got {facts!r}")
        if known.setdefault(facts.name, method) is not method:
            raise ValueError(f"entry point {entry.value!r} of group equinorm.norms brings the name {facts.name!r}, which is taken")
    return known


def resolve(name: str) -> Method:
    """The method called ``name``; case, underscores, hyphens and the word "norm" do not matter ("BatchNorm", "batch_norm", "batch").

    Raises:
        ValueError: no such method; the message suggests the nearest names.
    """
    known = {}
    for catalogued, method in methods().items():
        known[_plain(catalogued)] = method
        known.setdefault(_plain(method.__name__), method)
    if (method := known.get(_plain(name))) is not None:
        return method
    near = difflib.get_close_matches(_plain(name), known, n=3, cutoff=0.5)
    suggestions = list(dict.fromkeys(known[key].facts.name for key in near))  # type: ignore[union-attr]
    hint = f"did you mean {' or '.join(map(repr, suggestions))}?" if suggestions else "`equinorm list` shows all."
    raise ValueError(f"no normalization method is called {name!r}; {hint}")


def create(name: str, channels: int, **options: Any) -> nn.Module:
    """Build the norm called ``name`` for ``channels`` channels, with the method's default settings or those in ``options``.

    Args:
        name: as for :func:`resolve`.
        channels: C of an input (N, C, *S), or the last dimension for norms over features.
        options: keyword arguments of the class.

    Raises:
        ValueError: unknown name, or a method that is no layer (weight parametrizations are applied to a layer instead).
        TypeError: an option that the class does not have.

    Example:
        >>> import equinorm
        >>> equinorm.create("group", 24)
        GroupNorm(24, 24, eps=1e-05, affine=True...)
    """
    method = resolve(name)
    build = getattr(method, "for_channels", None)
    if build is None:
        call = f"equinorm.{method.__name__}"
        if inspect.isclass(method):
            raise ValueError(f"{method.__name__} needs more than a number of channels; construct it: {call}{inspect.signature(method)}")
        if method.facts.family != "weight":  # type: ignore[union-attr]
            raise ValueError(f"{method.__name__} is a function and no layer; call it: {call}{inspect.signature(method)}")
        raise ValueError(f"{method.__name__} acts on a layer's weight and is no layer; apply it, as in {call}(torch.nn.Linear(4, 4))")
    return build(channels, **options)


def find(text: str = "", *, family: str | None = None, **properties: Any) -> list[Facts]:
    """The methods that match all given conditions, in the catalogue's order.

    Args:
        text: occurs in the name, the title, the class name or the paper, in any case.
        family: one of :data:`equinorm.facts.FAMILIES`.
        properties: fields of :class:`~equinorm.facts.Facts` and the values they must have; ``invariances`` takes one claim or several,
            all of which must be made; ``synchronizes`` takes a bool.

    Raises:
        ValueError: unknown family, field or invariance.
    """
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family must be one of {sorted(FAMILIES)}, got {family!r}")
    if unknown := set(properties) - set(Facts.__dataclass_fields__):
        raise ValueError(f"unknown properties {sorted(unknown)}; known are {sorted(Facts.__dataclass_fields__)}")
    claims = properties.pop("invariances", ())
    claims = {claims} if isinstance(claims, str) else set(claims)
    if unknown := claims - set(INVARIANCES):
        raise ValueError(f"unknown invariances {sorted(unknown)}; known are {sorted(INVARIANCES)}")
    synchronizes = properties.pop("synchronizes", None)
    found = []
    for method in methods().values():
        facts: Facts = method.facts  # type: ignore[union-attr]
        searched = f"{facts.name} {facts.title} {method.__name__} {facts.paper}".lower()
        if text.lower() not in searched or (family is not None and facts.family != family) or not claims <= facts.invariances:
            continue
        if synchronizes is not None and bool(facts.synchronizes) != bool(synchronizes):
            continue
        if all(getattr(facts, field) == value for field, value in properties.items()):
            found.append(facts)
    return found


def prose(method: Method) -> dict[str, str]:
    """The docstring of a method by section: "Summary" (what it does), then those of :data:`SECTIONS` that it has."""
    text = inspect.cleandoc(method.__doc__ or "")
    pattern = re.compile(rf"^({'|'.join(SECTIONS)}):[ \t]*", re.MULTILINE)
    heads = list(pattern.finditer(text))
    sections = {"Summary": text[: heads[0].start()].strip() if heads else text}
    for head, after in zip(heads, [*heads, None][1:], strict=True):
        body = text[head.end() : after.start() if after else len(text)]
        first, _, rest = body.partition("\n")
        sections[head[1]] = inspect.cleandoc(first + "\n" + rest).strip()
    return sections


def _plain(name: str) -> str:
    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    return letters.replace("normalization", "").replace("norm", "") or letters
