"""Casts in a graph whose convolutions and linear layers compute in a lower precision than the rest."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..ops import dyrelu, smooth_relu, swish_relu

# Functions whose operands must be of one dtype.
_PRODUCTS = {
    F.linear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
    F.bilinear,
    F.scaled_dot_product_attention,
    torch.matmul,
    torch.mm,
    torch.mv,
    torch.bmm,
    torch.addmm,
    torch.baddbmm,
    torch.tensordot,
    torch.einsum,
    operator.matmul,
    "matmul",
    "mm",
    "mv",
    "bmm",
    "addmm",
    "baddbmm",
}
_IN_FLOAT32 = {F.prelu, F.grid_sample, torch.prelu}  # want one dtype too, and are not worth fewer bits
_ANY_DTYPE = {dyrelu, smooth_relu, swish_relu}  # and for their other operands another one
_PLAIN = ("torch", "_operator", "operator", "builtins", "math")  # where functions that take any dtype come from


def convert(value: Any, dtype: torch.dtype) -> Any:
    """A floating-point tensor in `dtype`; anything else unchanged."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


class InDtype(nn.Module):
    """A module whose inputs are cast to `dtype`."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args = tuple(convert(value, self.dtype) for value in args)
        return self.module(*args, **{name: convert(value, self.dtype) for name, value in kwargs.items()})


def cast_functions(graph: fx.Graph, named: dict[str, Any], dtype: torch.dtype) -> set[str]:
    """Have the model's functional calls compute matrix products in `dtype`.

    Functions that are neither torch's nor ours get float32, since nothing is known of them.

    Returns:
        The names of the parameters that only matrix products read, to be cast to `dtype` beforehand.
    """
    weights = {
        str(node.target)
        for node in graph.nodes
        if node.op == "get_attr" and isinstance(named[node.target], nn.Parameter) and _only_in_products(node)
    }
    for node in list(graph.nodes):
        if node.target in _PRODUCTS:
            _convert_inputs(graph, node, dtype, weights)
        elif node.target in _IN_FLOAT32 or (node.op == "call_function" and not _takes_any_dtype(node.target)):
            _convert_inputs(graph, node, torch.float32, set())
    return weights


def _only_in_products(node: fx.Node) -> bool:
    return all(user.target in _PRODUCTS for user in node.users)


def _takes_any_dtype(function: Any) -> bool:
    return function in _ANY_DTYPE or _module_of(function).partition(".")[0] in _PLAIN


def _module_of(function: Any) -> str:
    return getattr(function, "__module__", None) or "torch"  # torch's builtins do not say


def _convert_inputs(graph: fx.Graph, node: fx.Node, dtype: torch.dtype, made: set[str]) -> None:
    for read in node.all_input_nodes:
        if read.op != "get_attr" or str(read.target) not in made:
            with graph.inserting_before(node):
                node.replace_input_with(read, graph.call_function(convert, (read, dtype)))
