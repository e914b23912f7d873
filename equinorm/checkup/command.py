"""The command ``equinorm probe``."""

from __future__ import annotations

import inspect
import json
import re
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from equinorm.compare import loading
from equinorm.compare.environment import require
from equinorm.compare.errors import InputError
from equinorm.probe.findings import SEVERITIES

DESCRIPTION = """Run a model once forward and once backward on a batch, and report what the signal did on its way and what hurts it."""

EPILOG = """the model:
  file.py:factory or module:factory, a function without required arguments that returns a torch.nn.Module

inputs:
  --input 8x3x224x224            float32, standard normal
  --input 8x128:int64:0-1000     integers from 0 to 999
  --input 8x3x32x32:float16      another type; also float64, bfloat16, bool
  Given several times: the positional arguments. With NAME=, as in --input ids=8x128:int64:0-1000: keyword arguments.
  --loader file.py:loader        a function that returns batches (its first is taken), or a batch

exit codes:
  0    no finding of the severity that --fail-on names, or worse
  1    there is one, or the model raised
  2    bad input: nothing was probed"""

TYPES = {name: getattr(torch, name) for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool")}


def add_arguments(parser: ArgumentParser) -> None:
    """The arguments of ``equinorm probe``."""
    parser.description, parser.epilog, parser.formatter_class = DESCRIPTION, EPILOG, RawDescriptionHelpFormatter
    parser.add_argument("model", help="file.py:factory or module:factory")
    what = parser.add_argument_group("what it is given")
    what.add_argument("--input", action="append", default=[], metavar="SHAPE", help="shape of a random input; may be repeated")
    what.add_argument("--loader", metavar="FILE:FUNCTION", help="where a batch comes from")
    what.add_argument(
        "--loss", metavar="FILE:FUNCTION", help="loss(output, target) or loss(output) (default: the model's own, or a stand-in)"
    )
    what.add_argument("--eval", action="store_true", help="probe in evaluation mode (default: training mode)")
    what.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and random inputs (default: %(default)s)")
    what.add_argument("--device", default="cpu", help="default: %(default)s")
    how = parser.add_argument_group("how it is judged")
    how.add_argument(
        "--threshold", action="append", default=[], metavar="NAME=VALUE", help="replace a threshold of the diagnosis; may be repeated"
    )
    how.add_argument("--weights", action="store_true", help="also spectral norm and stable rank of every weight")
    how.add_argument("--prescribe", action="store_true", help="try what may help on copies of the model, and show before and after")
    how.add_argument(
        "--fail-on", choices=[*SEVERITIES, "never"], default="severe", help="severity from which the exit code is 1 (default: %(default)s)"
    )
    out = parser.add_argument_group("what comes out")
    out.add_argument("--html", type=Path, metavar="FILE", help="write a page")
    out.add_argument("--json", action="store_true", help="print the report as JSON instead of text")


def run(arguments: Namespace) -> int:
    """Probe, print, write. Returns the exit code."""
    require("probe")
    from equinorm.checkup.page import write_page
    from equinorm.checkup.prescribe import prescribe
    from equinorm.checkup.terminal import show
    from equinorm.probe.run import probe

    torch.manual_seed(arguments.seed)
    model = _model(arguments.model).to(arguments.device).train(not arguments.eval)
    batch, note = _batch(arguments, model)
    loss_fn = _function("--loss", arguments.loss) if arguments.loss else None
    try:
        report = probe(model, batch, loss_fn, thresholds=dict(map(_threshold, arguments.threshold)), weights=arguments.weights)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error
    if note:
        report.notes.insert(0, note)
    prescriptions = prescribe(report) if arguments.prescribe else ()
    if arguments.html:
        write_page(report, arguments.html, prescriptions)
    if arguments.json:
        tried = {"prescriptions": [p.to_dict() for p in prescriptions]} if arguments.prescribe else {}
        print(json.dumps({**report.to_dict(), **tried}, indent=2, allow_nan=False))
    else:
        show(report, prescriptions)
        if arguments.html:
            print(f"The page: {arguments.html}")
    if report.failure:
        return 1
    if arguments.fail_on == "never":
        return 0
    counting = SEVERITIES[: SEVERITIES.index(arguments.fail_on) + 1]
    return int(any(finding.severity in counting for finding in report.findings))


def _function(option: str, name: str) -> Callable[..., Any]:
    place, colon, function = name.rpartition(":")
    if not colon:
        raise InputError(f"{option} {name!r}: name a function as file.py:function or module:function")
    return loading.function(f"{option} {name!r}", loading.module(f"{option} {name!r}", place), function)


def _called(option: str, name: str) -> Any:
    function = _function(option, name)
    required = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if required:
        raise InputError(f"{option} {name!r} must be callable without arguments, but it takes {', '.join(required)}; wrap it in a function")
    try:
        return function()
    except Exception as error:
        raise InputError(f"{option} {name!r} raised {type(error).__name__}: {error}") from error


def _model(name: str) -> nn.Module:
    model = _called("model", name)
    if not isinstance(model, nn.Module):
        raise InputError(f"model {name!r} must return a torch.nn.Module, got {type(model).__name__}")
    return model


def _batch(arguments: Namespace, model: nn.Module) -> tuple[Any, str]:
    """The batch, and a note on where it comes from if that is not the user's data."""
    if arguments.loader and arguments.input:
        raise InputError("give --input or --loader, not both")
    if arguments.loader:
        return _moved(_first(arguments.loader), arguments.device), ""
    if not arguments.input:
        raise InputError("give the shape of an input, as in --input 8x3x224x224, or --loader file.py:function")
    named = [_named(text) for text in arguments.input]
    if any(name for name, _ in named) and not all(name for name, _ in named):
        raise InputError("either all --input have names (name=8x3) or none")
    tensors = [(name, _random(text).to(arguments.device)) for name, text in named]
    note = "The input is random, standard normal numbers or uniform integers: what the network does with real data may differ."
    if named[0][0]:
        return dict(tensors), note
    return tensors[0][1] if len(tensors) == 1 else tuple(tensor for _, tensor in tensors), note


def _first(name: str) -> Any:
    batches = _called("--loader", name)
    if isinstance(batches, (Tensor, dict, tuple)) or not isinstance(batches, Iterable):
        return batches
    for batch in batches:
        return batch
    raise InputError(f"--loader {name!r} must give at least one batch, got none")


def _moved(batch: Any, device: str) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
        return type(batch)(_moved(value, device) for value in batch)
    return batch


def _named(text: str) -> tuple[str, str]:
    name, equals, shape = text.rpartition("=")
    if equals and not name.isidentifier():
        raise InputError(f"--input {text!r}: {name!r} is no name of an argument")
    return name, shape


def _random(text: str) -> Tensor:
    match = re.fullmatch(r"(\d+(?:x\d+)*)(?::(\w+))?(?::(-?\d+)-(\d+))?", text)
    if match is None:
        raise InputError(f"--input {text!r} must be a shape as 8x3x224x224, with a type as 8x3:float16, with a range as 8x128:int64:0-1000")
    shape = [int(size) for size in match[1].split("x")]
    name = match[2] or ("float32" if match[3] is None else "int64")
    if name not in TYPES:
        raise InputError(f"--input {text!r}: the type must be one of {', '.join(TYPES)}, got {name!r}")
    dtype = TYPES[name]
    if dtype.is_floating_point:
        if match[3] is not None:
            raise InputError(f"--input {text!r}: a range is for integers; random {name} numbers are standard normal")
        return torch.randn(shape).to(dtype)
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    if match[3] is None or int(match[3]) >= int(match[4]):
        raise InputError(f"--input {text!r}: say which integers, as {match[1]}:{name}:0-1000, which gives 0 to 999")
    return torch.randint(int(match[3]), int(match[4]), shape).to(dtype)


def _threshold(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name.strip(), float(value)
    except ValueError:
        raise InputError(f"--threshold {text!r} must be NAME=NUMBER, as growth_severe=1000") from None
