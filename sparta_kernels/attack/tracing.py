"""What a model does to its images, as a graph of layers and functions (torch.fx)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..nn.frozen import has_hooks

ROOT = "model"  # what the model is called in the graph


class _Caller(nn.Module):
    """Calls the model with images alone, so that its other arguments have their defaults while it is traced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.training = False
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model(images)


class _Tracer(fx.Tracer):
    """Goes into every module of a user's; one that cannot be traced stays whole, and only it."""

    proxy_buffer_attributes = True  # or what is computed from them would be a constant

    def __init__(self) -> None:
        super().__init__()
        self.whole: dict[str, str] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.whole or hasattr(type(m), "prepare_for_attack"):
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
            self.whole[name] = f"it cannot be traced ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
            self.module_stack = stack
            for node in reversed(list(self.graph.nodes)[before:]):
                self.graph.erase_node(node)
            return self.create_proxy("call_module", name, args, kwargs)


def trace(model: nn.Module) -> tuple[fx.Graph, dict[str, nn.Module | Tensor], dict[str, str]]:
    """The model's graph, the modules and tensors that it names, and why which of the modules were kept whole.

    Every name begins with `ROOT`. The graph has one placeholder, the images.
    """
    caller, tracer = _Caller(model), _Tracer()
    graph = tracer.trace(caller)
    for node in reversed(graph.nodes):
        if node.target is torch._assert:  # of shapes, while it was traced; whoever reads them is no reader of values
            graph.erase_node(node)
    named: dict[str, nn.Module | Tensor] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            named[str(node.target)] = caller.get_submodule(node.target)
        elif node.op == "get_attr":
            named[str(node.target)] = operator.attrgetter(node.target)(caller)
    _no_overwriting(graph, named)
    drop_unused(graph, named)
    whole = {name: reason for name, reason in tracer.whole.items() if name in named}
    return graph, named, whole


# ---- what nodes are ---------------------------------------------------------------------------------------

_RELU = {F.relu, torch.relu, F.relu_, torch.relu_, "relu", "relu_"}
_ADD = {operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__iadd__"}
_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow, operator.imod}


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
        return bool(getattr(named[str(node.target)], "inplace", False))
    if node.op == "call_method":
        name = str(node.target)
        return name == "__iadd__" or (name.endswith("_") and not name.endswith("__"))
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    in_place = node.target in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    return bool(in_place or node.kwargs.get("inplace"))


def drop_unused(graph: fx.Graph, named: dict[str, Any]) -> None:
    """Drop nodes whose results nobody reads, unless they overwrite what somebody may."""
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or writes_input(node, named))


def first_input(node: fx.Node) -> fx.Node | None:
    """What the node computes with first, where that is a node too."""
    found = node.args[0] if node.args else node.kwargs.get("input")
    return found if isinstance(found, fx.Node) else None


def _no_overwriting(graph: fx.Graph, named: dict[str, Any]) -> None:
    """Let whoever reads a tensor after it was overwritten name the node that did it."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        written = first_input(node) if writes_input(node, named) else None
        if written is None:
            continue
        for user in list(written.users):
            if order[user] > order[node]:
                user.replace_input_with(written, node)
