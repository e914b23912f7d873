"""Functions found by name: ``file.py:function`` or ``module:function``."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from equinorm.compare.errors import InputError


def module(asked: str, place: str) -> ModuleType:
    """A module, imported.

    Args:
        asked: how it was asked for, which begins every message.
        place: path of a Python file, or a dotted name.

    Raises:
        InputError: there is none, or it cannot be imported.
    """
    return _file_module(asked, Path(place)) if place.endswith(".py") else _module(asked, place)


def function(asked: str, module: ModuleType, name: str) -> Callable[..., Any]:
    """A function of a module.

    Raises:
        InputError: the module has no such function; the message names those that it has.
    """
    function = getattr(module, name, None)
    if function is None:
        here = [key for key, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__]
        near = difflib.get_close_matches(name, here, n=2, cutoff=0.5)
        suggestion = f"did you mean {' or '.join(near)}?" if near else f"its functions are {', '.join(here) or 'none'}"
        raise InputError(f"{asked}: {module.__name__} has no function {name!r}; {suggestion}")
    if not callable(function):
        raise InputError(f"{asked}: {name!r} is not a function but {type(function).__name__}")
    return function


def _module(asked: str, name: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # a console script does not start with the current folder on its path, python -m does
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{asked}: module {name!r} cannot be imported: {error}") from error
    except Exception as error:
        raise InputError(f"{asked}: module {name!r} fails when it is imported: {type(error).__name__}: {error}") from error


def _file_module(asked: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"{asked}: there is no file {path}")
    path = path.resolve()
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # as when Python runs the file, so that it finds its neighbours
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{asked}: {path.name} fails when it is imported: {type(error).__name__}: {error}") from error
    return module
