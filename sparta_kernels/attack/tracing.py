"""Traces a model into a graph of layers and functions (torch.fx)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..nn.frozen import has_hooks
from ..nn.traced_forward import first_line, holds_proxies

ROOT = "model"  # what the model is called in the graph


class _Caller(nn.Module):
    """Calls the model with images alone, so that its other arguments have their defaults while it is traced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.training = False
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model(images)


class _Proxy(fx.Proxy):
    """A proxy that records in-place operators; plain ones record ``y += x`` as ``y = y + x``."""


def _record(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: _Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow, operator.imod}
for _function in _IN_PLACE:
    setattr(_Proxy, f"__{_function.__name__}__", _record(_function))


class _Tracer(fx.Tracer):
    """Traces through every module that is not torch's own; one that cannot be traced is kept whole."""

    proxy_buffer_attributes = True  # or what is computed from them would be a constant

    def __init__(self, whole: dict[str, str]) -> None:
        super().__init__()
        self.whole = whole

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.whole or hasattr(type(m), "prepare_for_attack"):
            return True
        if isinstance(m, torch.jit.ScriptModule):
            self.whole[module_qualified_name] = "it is compiled by torch.jit"
            return True
        if super().is_leaf_module(m, module_qualified_name):
            return True
        if has_hooks(m):
            self.whole[module_qualified_name] = "it has hooks"
            return True
        return False

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        before, stack = len(self.graph.nodes), self.module_stack.copy()
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:  # whatever a module does with what is not a tensor
            name = self.path_of_module(m)
            self.whole[name] = f"it cannot be traced ({type(error).__name__}: {first_line(error)})"
            self.module_stack = stack
            for node in reversed(list(self.graph.nodes)[before:]):
                self.graph.erase_node(node)
            return self.create_proxy("call_module", name, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        for name, proxy in list(parameter_proxy_cache.items()):
            if proxy.node._erased:  # with the module that could not be traced
                del parameter_proxy_cache[name]
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def trace(model: nn.Module, whole: dict[str, str]) -> tuple[fx.Graph, dict[str, nn.Module | Tensor], dict[str, str]]:
    """Trace a model: its graph, the modules and tensors that it names, and which modules were kept whole, and why.

    Every name begins with `ROOT`. The graph has one placeholder, the images.

    Args:
        whole: modules not to trace, and why.
    """
    whole = dict(whole)
    while True:
        # A model may store what it computes, and that must not be what the tracer puts in its place.
        twin = _Caller(_twin(model, {}))
        tracer = _Tracer(whole)
        graph = tracer.trace(twin)
        parts = [each for each in twin.named_modules() if not isinstance(each[1], torch.jit.ScriptModule)]
        stored = {name: "it stores what it computes" for name, part in parts if holds_proxies(part)}
        if any(writes_input(node, {}) and _unknown_memory(first_input(node)) for node in graph.nodes):
            stored[ROOT] = "it writes into tensors that it makes, or into one in another shape"
        if not stored.keys() - whole.keys():
            break
        whole |= stored
    for node in reversed(graph.nodes):
        if node.target is torch._assert:  # of shapes, while it was traced; whoever reads them is no reader of values
            graph.erase_node(node)
    caller = _Caller(model)
    named: dict[str, nn.Module | Tensor] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            named[node.target] = caller.get_submodule(node.target)
        elif node.op == "get_attr":
            made = getattr(twin, node.target, None)  # a constant that the tracer has put there
            named[node.target] = made if isinstance(made, Tensor) else operator.attrgetter(node.target)(caller)
        elif node.op == "call_method" and node.target == "view" and not any(map(_is_dtype, node.args)):
            node.target = "reshape"  # of tensors in another memory format than the model's
    drop_unused(graph, named)
    return graph, named, {name: reason for name, reason in whole.items() if name in named}


def _twin(module: nn.Module, twins: dict[nn.Module, nn.Module]) -> nn.Module:
    """A copy of the module tree that shares tensors, but not the containers that hold them."""
    if isinstance(module, torch.jit.ScriptModule):
        return module
    if module not in twins:
        twin = twins[module] = type(module).__new__(type(module))
        twin.__dict__ = {name: _own(value, module, twin) for name, value in module.__dict__.items()}
        twin._modules = {name: None if part is None else _twin(part, twins) for name, part in module._modules.items()}
    return twins[module]


def _own(value: Any, module: nn.Module, twin: nn.Module) -> Any:
    if isinstance(value, MethodType) and value.__self__ is module:
        return MethodType(value.__func__, twin)
    return type(value)(value) if type(value) in (dict, list, set) else value


def _unknown_memory(node: fx.Node | None) -> bool:
    """Whether the node is a constant made by the tracer, or may be either a copy or a view of another."""
    if node is None:
        return False
    made = node.op == "get_attr" and not str(node.target).startswith(f"{ROOT}.")
    return made or node.target in ("view", "reshape", "flatten", torch.reshape, torch.flatten)


def _is_dtype(value: object) -> bool:
    return isinstance(value, torch.dtype)


# ---- what nodes are ---------------------------------------------------------------------------------------

_RELU = {F.relu, torch.relu, F.relu_, torch.relu_, "relu", "relu_"}
_ADD = {operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__iadd__"}


def is_relu(node: fx.Node, named: dict[str, Any]) -> bool:
    """Whether the node is a ReLU: a module, a function or a method."""
    if node.op == "call_module":
        return type(named[str(node.target)]) is nn.ReLU and not has_hooks(named[str(node.target)])
    return node.op in ("call_function", "call_method") and node.target in _RELU


def is_sum(node: object) -> bool:
    """Whether the node adds two things that the graph computes, and nothing else."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method") or node.target not in _ADD:
        return False
    return len(node.args) == 2 and all(isinstance(arg, fx.Node) for arg in node.args) and not node.kwargs


def writes_input(node: fx.Node, named: dict[str, Any]) -> bool:
    """Whether the node overwrites its first argument."""
    if node.op == "call_module":
        return bool(getattr(named.get(str(node.target)), "inplace", False))
    if node.op == "call_method":
        name = str(node.target)
        return name == "__iadd__" or (name.endswith("_") and not name.endswith("__"))
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    in_place = node.target in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    return bool(in_place or node.kwargs.get("inplace"))


def drop_unused(graph: fx.Graph, named: dict[str, Any]) -> None:
    """Drop nodes with unused results, unless they overwrite a tensor that may be read."""
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or writes_input(node, named))


def first_input(node: fx.Node) -> fx.Node | None:
    """The node's first operand, if that is a node too."""
    found = node.args[0] if node.args else node.kwargs.get("input")
    return found if isinstance(found, fx.Node) else None


def no_overwriting(graph: fx.Graph, named: dict[str, Any]) -> None:
    """Make consumers of a tensor after an in-place write read the node that wrote it."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        written = first_input(node) if writes_input(node, named) else None
        if written is None:
            continue
        for user in list(written.users):
            if order[user] > order[node]:
                user.replace_input_with(written, node)
