"""Makes a module whose forward calls one ReLU several times call separate modules at some of these places.

The forward is traced (torch.fx) with the module's parts as leaves. The trace, with the ReLU calls replaced, becomes the
forward of a class derived from the module's. The module stays the same object, with its attributes, hooks and names in
a state dict.
"""

from __future__ import annotations

import importlib
import itertools
import linecache
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

RELU_FUNCTIONS = (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
_METHODS = ("relu", "relu_")
_numbers = itertools.count()


class Untraceable(Exception):
    """A module's forward cannot be rewritten; the message says why."""


@dataclass(frozen=True)
class _Code:
    """The source of a forward and the values of its names; modules are given by name, so that it can be pickled."""

    source: str
    modules: dict[str, str]
    objects: dict[str, Any]


class _Tracer(fx.Tracer):
    """Traces the module's own code; its parts are leaves."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def original_type(module: nn.Module) -> type[nn.Module]:
    """The class that the module had before `call_own_modules`."""
    return getattr(type(module), "_original_type", type(module))


def call_own_modules(module: nn.Module, names: dict[int, str], count: int) -> None:
    """Make the module's forward call ``self.<name>`` instead of its n-th ReLU, for every n and name.

    Args:
        names: by the number of the ReLU, from 1 in the order of execution.
        count: how many ReLUs a forward calls.

    Raises:
        Untraceable: the forward cannot be traced, or does not do the same in training and eval mode, or needs a ReLU to
            write into its input. Nothing has been changed then.
    """
    if "forward" in vars(module):
        raise Untraceable("its forward is its own and not its class's")
    codes = [_rewritten(module, mode, names, count) for mode in (True, False)]
    if codes[0].source != codes[1].source:
        raise Untraceable("its forward differs between training and eval mode")
    module.__class__ = _derived(original_type(module), codes[0])


def _rewritten(module: nn.Module, training: bool, names: dict[int, str], count: int) -> _Code:
    twin = _twin(module)
    twin.training = training
    try:
        graph = _Tracer().trace(twin)
    except Exception as error:  # whatever code does with what is not a tensor
        raise Untraceable(f"its forward cannot be traced ({type(error).__name__}: {first_line(error)})") from error
    if holds_proxies(twin):
        raise Untraceable("its forward stores what it computes")
    relus = [node for node in graph.nodes if _is_relu(node, twin)]
    if len(relus) != count:
        raise Untraceable("its forward takes another way when it is traced")
    order = {node: i for i, node in enumerate(graph.nodes)}
    for number, name in names.items():
        relu = relus[number - 1]
        x: Any = relu.args[0] if relu.args else relu.kwargs["input"]
        if not relu.users or (_in_place(relu, twin) and any(order[user] > order[relu] for user in x.users)):
            raise Untraceable("it reads a tensor that its ReLU has written over")
        with graph.inserting_before(relu):
            node = graph.create_node("call_module", name, (x,))
        relu.replace_all_uses_with(node)
        graph.erase_node(relu)
    made = graph.python_code("self")
    modules = {name: value.__name__ for name, value in made.globals.items() if isinstance(value, ModuleType)}
    return _Code(made.src, modules, {name: value for name, value in made.globals.items() if name not in modules})


def _twin(module: nn.Module) -> nn.Module:
    """A copy with the same parts and tensors: proxies that a forward stores are stored only there."""
    twin = type(module).__new__(type(module))
    copied = (dict, list, set)
    twin.__dict__ = {
        name: type(value)(value) if type(value) in copied else value for name, value in vars(module).items()
    }
    return twin


def holds_proxies(module: nn.Module) -> bool:
    """Whether the module has stored what a tracer put in the place of tensors."""
    values = [*vars(module).values(), *module._buffers.values()]
    inside = [item for value in values if isinstance(value, (list, tuple, set)) for item in value]
    return any(isinstance(value, fx.Proxy) for value in [*values, *inside])


def _is_relu(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))) is nn.ReLU
    return node.target in (
        RELU_FUNCTIONS if node.op == "call_function" else _METHODS if node.op == "call_method" else ()
    )


def _in_place(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return bool(module.get_submodule(str(node.target)).inplace)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.endswith("_") or bool(node.kwargs.get("inplace")) or True in node.args[1:]


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _derived(base: type[nn.Module], code: _Code) -> type[nn.Module]:
    """A derived class with this forward; copying or unpickling its modules creates it again."""

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        state = base.__reduce_ex__(self, protocol)[2]
        return _rebuild, (base, code), state

    names = {name: importlib.import_module(module) for name, module in code.modules.items()} | code.objects
    # A file name of its own, under which tracebacks find the lines.
    file = f"<{base.__module__}.{base.__qualname__}.forward traced {next(_numbers)}>"
    linecache.cache[file] = (len(code.source), None, code.source.splitlines(keepends=True), file)
    exec(compile(code.source, file, "exec"), names)
    members = {"forward": names["forward"], "__reduce_ex__": __reduce_ex__, "_original_type": base}
    members |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), members)


def _rebuild(base: type[nn.Module], code: _Code) -> nn.Module:
    kind = _derived(base, code)
    return kind.__new__(kind)
