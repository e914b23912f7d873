"""What stands next to what in a model: whose output a layer reads, and who else reads it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from equinorm.surgery.calling import call_example, tensors


@dataclass
class Use:
    """How a layer is used in one run of a model.

    Attributes:
        calls: how often it runs.
        source: the watched layer whose output it reads unchanged; None where there is none.
        readers: who reads its output: watched layers, and names of operations.
        more: whether it is given more than one tensor, as a mask.
        shape: of its input; None where only the graph is known.
        foreign: an operation outside of it that reads its parameters; empty where there is none.
    """

    calls: int = 0
    source: nn.Module | None = None
    readers: list[nn.Module | str] = field(default_factory=list)
    more: bool = False
    shape: torch.Size | None = None
    foreign: str = ""


Uses = dict[nn.Module, Use]


def watch(model: nn.Module, watched: set[nn.Module], example: Any) -> tuple[Uses, list[Tensor], str]:
    """How each of ``watched`` is used: by running the example, or by tracing the model symbolically where there is none.

    Returns:
        the uses, the outputs on the example (empty without one), and how they were found.

    Raises:
        ValueError: there is no example and the model cannot be traced.
    """
    if example is not None:
        uses, output = _run(model, watched, example)
        return uses, output, "neighbours found by running the example"
    return _trace(model, watched), [], "neighbours found in a symbolic trace (torch.fx); nothing was run, so nothing is checked"


class _Watch(TorchDispatchMode):
    """Notes every operation that reads an output or a parameter of a watched layer outside of the layers that may."""

    def __init__(self, watched: set[nn.Module], uses: Uses) -> None:
        super().__init__()
        self.uses, self.inside = uses, []
        self.outputs: dict[int, tuple[Tensor, nn.Module]] = {}  # kept alive, so that an id is one tensor's
        self.parameters = {id(p): module for module in watched for p in module.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        current = self.inside[-1] if self.inside else None
        for tensor in tensors([args, kwargs or {}]):
            if (known := self.outputs.get(id(tensor))) is not None and current is None:
                self.uses[known[1]].readers.append(str(func.overloadpacket))
            owner = self.parameters.get(id(tensor))
            if owner is not None and owner is not current:
                self.uses[owner].foreign = str(func.overloadpacket)
        return func(*args, **(kwargs or {}))


def _run(model: nn.Module, watched: set[nn.Module], example: Any) -> tuple[Uses, list[Tensor]]:
    uses: Uses = {module: Use() for module in watched}
    mode = _Watch(watched, uses)

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        use = uses[module]
        use.calls += 1
        given = list(tensors([args, kwargs]))
        use.more = len(given) != 1
        use.shape = given[0].shape if given else None
        known = mode.outputs.get(id(given[0])) if given else None
        use.source = None if known is None else known[1]
        for tensor in given:
            if (known := mode.outputs.get(id(tensor))) is not None:
                uses[known[1]].readers.append(module)
        mode.inside.append(module)

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        mode.inside.pop()
        if isinstance(output, Tensor):
            mode.outputs[id(output)] = (output, module)

    handles = [module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True) for module in watched]
    handles += [module.register_forward_hook(leave) for module in watched]
    try:
        with torch.no_grad(), mode:
            output = call_example(model, example)
    finally:
        for handle in handles:
            handle.remove()
    for tensor in tensors(output):
        if (known := mode.outputs.get(id(tensor))) is not None:
            uses[known[1]].readers.append("output of the model")
    return uses, [tensor.detach().double() for tensor in tensors(output) if tensor.is_floating_point()]


class _Tracer(fx.Tracer):
    def __init__(self, watched: set[nn.Module]) -> None:
        super().__init__()
        self.watched = watched

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.watched or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module, watched: set[nn.Module]) -> Uses:
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    try:
        graph = _Tracer(watched).trace(model, concrete_args=defaults or None)
    except Exception as error:
        raise ValueError(
            f"fold: {type(model).__name__} cannot be traced symbolically ({type(error).__name__}: {str(error).splitlines()[0][:200]}); "
            "pass example_input, and it is run instead"
        ) from error
    uses: Uses = {module: Use() for module in watched}
    modules: Mapping[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    node_of: dict[fx.Node, nn.Module] = {}
    parameters = {id(p): module for module in watched for p in module.parameters()}
    for node in graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if module is not None and module not in watched:  # a leaf of torch that holds watched layers uses them in its own way
            for inner in module.modules():
                if inner in uses:
                    uses[inner].calls += 2
        if node.op == "get_attr" and (owner := parameters.get(id(_attribute(model, str(node.target))))) is not None:
            uses[owner].foreign = node.name
        reader: nn.Module | str = module if module in uses else "output of the model" if node.op == "output" else node.name
        for argument in node.all_input_nodes:
            if argument in node_of:
                uses[node_of[argument]].readers.append(reader)
        if module in uses:
            use = uses[module]
            use.calls += 1
            use.more = len(node.all_input_nodes) != 1
            use.source = node_of.get(node.all_input_nodes[0]) if node.all_input_nodes else None
            node_of[node] = module
    return uses


def _attribute(model: nn.Module, path: str) -> Any:
    value: Any = model
    for part in path.split("."):
        value = getattr(value, part)
    return value
