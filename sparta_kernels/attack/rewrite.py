"""Rewrites a model's graph for attacks: BatchNorm folded, weights constant, ReLUs fused."""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..nn.frozen import (
    CONVOLUTIONS,
    NORMS,
    Form,
    FrozenConv,
    Statistics,
    freeze,
    has_hooks,
    may_be_written,
    why_not,
    why_not_fold,
)
from ..ops.relu import add_relu, add_relu_fork
from .casting import InDtype, cast_functions
from .tracing import ROOT, drop_unused, first_input, is_relu, is_sum, no_overwriting, trace, writes_input

_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)  # in eval mode
_POOLING = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_READERS = (torch.cat, torch.mul, operator.mul, torch.mean, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, "mean")
_SIGNATURE = inspect.signature(F.batch_norm)
_NORMALISATION = (*NORMS, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d)


@dataclass(frozen=True)
class Report:
    """What `prepare` did to a model. Modules are named as in `model.named_modules()`.

    Attributes:
        folded: pairs (BatchNorm, convolution that it was folded into).
        relus: how many ReLUs were replaced by fused ones, which save one bit per element.
        sums: how many additions were fused into the ReLU or other activation after them.
        prepared: modules that provided their own form (`prepare_for_attack`).
        left: modules that were left alone, and why.
    """

    folded: tuple[tuple[str, str], ...]
    relus: int
    sums: int
    prepared: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [
            f"{_counted(len(self.folded), 'BatchNorm')} folded, {_counted(self.relus, 'ReLU')} and "
            f"{_counted(self.sums, 'sum')} fused, {_counted(len(self.prepared), 'module')} prepared by themselves"
        ]
        return "\n".join([*lines, *(f"left alone: {name or 'the model'}: {why}" for name, why in self.left.items())])


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


Constants = list[tuple[nn.Parameter, nn.Parameter]]  # a constant parameter, and the model's that it is made of


class Rewritten(NamedTuple):
    """The result of `rewrite`.

    Attributes:
        network: computes what the model computes in eval mode, but is differentiable in the images alone.
        constants: its parameters that `refresh_constants` updates; its modules' `refresh` updates the others.
        form: dtype and memory format of its weights.
        report: what was done.
    """

    network: fx.GraphModule
    constants: Constants
    form: Form
    report: Report


def rewrite(model: nn.Module, form: Form, whole: str | None = None) -> Rewritten:
    """Make a network for attacks from a model, sharing weights where it can.

    Args:
        form: dtype and memory format of the weights; contiguous instead if parts of the model stay whole.
        whole: a reason not to trace the model at all.
    """
    rewriter = _Rewriter(model, form, {} if whole is None else {ROOT: whole})
    network = fx.GraphModule(rewriter.built, rewriter.graph, class_name=type(model).__name__)
    return Rewritten(network.eval(), rewriter.constants, rewriter.form, rewriter.report())


@torch.no_grad()
def refresh_constants(constants: Constants) -> None:
    """Update the constants to the model's current parameters."""
    for mine, now in constants:
        if mine.dtype != now.dtype:
            mine.copy_(now)
        elif mine.data_ptr() != now.data_ptr():
            mine.data = now.detach()


class _Rewriter:
    def __init__(self, model: nn.Module, form: Form, whole: dict[str, str]) -> None:
        self.graph, self.named, left = trace(model, whole)
        self.left = dict(left)
        # Code that nobody has looked into may rely on how tensors lie in memory.
        self.form = form._replace(memory_format=torch.contiguous_format) if left else form
        self.folded: list[tuple[str, str]] = []
        self.prepared: list[str] = []
        self.relus = self.sums = 0
        self.built: dict[str, Any] = {}  # what the new graph names
        self.constants: Constants = []
        self._made: dict[Any, str] = {}
        self._renamed: dict[str, str] = {}  # what the model calls the tensors that have names of their own here
        self._copies: dict[nn.Module, nn.Module] = {}
        self._drop_what_does_nothing()
        no_overwriting(self.graph, self.named)
        self._freeze_convolutions()
        self._keep_the_rest()
        self._fuse_relus()
        self._fuse_sums_before_activations()
        self._fork_activations()
        drop_unused(self.graph, self.named)
        self.graph.lint()
        used = {node.target for node in self.graph.nodes if node.op in ("call_module", "get_attr")}
        self.built = {name: value for name, value in self.built.items() if name in used}

    def report(self) -> Report:
        return Report(
            folded=tuple(dict.fromkeys((_short(norm), _short(conv)) for norm, conv in self.folded)),
            relus=self.relus,
            sums=self.sums,
            prepared=tuple(_short(name) for name in self.prepared),
            left={_short(name): why for name, why in self.left.items()},
        )

    def _module(self, node: object) -> nn.Module | None:
        """The module that the node calls."""
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return None
        found = self.named[str(node.target)]
        assert isinstance(found, nn.Module)
        return found

    def _drop_what_does_nothing(self) -> None:
        for node in list(self.graph.nodes):
            module = self._module(node)
            if type(module) in _NOTHING and len(node.args) == 1 and first_input(node) and not has_hooks(module):
                self._replace(node, node.args[0])

    def _freeze_convolutions(self) -> None:
        """Freeze convolutions and linear layers, each with the BatchNorm after it if that is its only consumer."""
        for node in list(self.graph.nodes):
            layer = self._module(node)
            if layer is None or not isinstance(layer, (*CONVOLUTIONS, nn.Linear)):
                continue
            reason = why_not(layer) or ("it is called with more than its input" if node.kwargs else None)
            if reason is not None:
                self.left[node.target] = reason
                continue
            norm_node = next(iter(node.users)) if len(node.users) == 1 else None
            norm_name, norm = self._norm(norm_node)
            if norm is None or why_not_fold(layer, norm) is not None:
                norm_name = norm = None
            name = self._name(node.target, (node.target, norm_name))
            if name not in self.built:
                self.built[name] = freeze(layer, norm, self.form)
            self.named[name] = layer
            if norm_name is not None:
                self.folded.append((norm_name, node.target))
                self._replace(norm_node, node)  # type: ignore[arg-type]
            node.target = name

    def _norm(self, node: fx.Node | None) -> tuple[str | None, Any]:
        """The normalisation that the node calls, and its name: a module, or `F.batch_norm` with a module's tensors."""
        if node is None or node.op == "call_module":
            return (None, None) if node is None else (str(node.target), self._module(node))
        if node.target is not F.batch_norm:
            return None, None
        given = _SIGNATURE.bind(*node.args, **node.kwargs)
        given.apply_defaults()
        nodes = [given.arguments[name] for name in ("running_mean", "running_var", "weight", "bias")]
        if given.arguments["training"] or nodes[0] is None or not isinstance(given.arguments["eps"], float):
            return None, None
        if any(node is not None and getattr(node, "op", None) != "get_attr" for node in nodes):
            return None, None
        tensors = [None if node is None else self.named[str(node.target)] for node in nodes]
        mean = str(nodes[0].target)
        name = self._renamed.get(mean, mean).rpartition(".")[0]
        return name, Statistics(*tensors, given.arguments["eps"])  # type: ignore[arg-type, call-arg]

    def _name(self, wanted: str, key: object) -> str:
        """A unique name for what is made from `key`; the same name for the same key."""
        if key not in self._made:
            taken, name, number = set(self._made.values()), wanted, 1
            while name in taken:
                name, number = f"{wanted}_{number}", number + 1
            self._made[key] = name
        return self._made[key]

    def _keep_the_rest(self) -> None:
        """Keep the rest: modules that prepare themselves, and copies with constant weights of all others."""
        weights = set() if self.form.dtype is None else cast_functions(self.graph, self.named, self.form.dtype)
        for node in self.graph.nodes:
            norm_name, norm = self._norm(node)
            if isinstance(norm, Statistics):
                self.left[str(norm_name)] = self._why_not_folded(node, norm)
            if node.op not in ("call_module", "get_attr") or node.target in self.built:
                continue
            thing = self.named[node.target]
            if isinstance(thing, Tensor):
                dtype = self.form.dtype if node.target in weights else None
                name = self._name(f"constant_{str(node.target).replace('.', '_')}", thing)
                self.named[name] = thing
                if name not in self.built:
                    self.built[name] = self._constant(thing, dtype)
                self._renamed[name] = node.target
                node.target = name
                continue
            if isinstance(thing, _NORMALISATION):
                self.left.setdefault(node.target, self._why_not_folded(node, thing))
            self.built[node.target] = self._kept(thing)
            if _prepares_itself(thing):
                self.prepared.append(node.target)

    def _kept(self, module: nn.Module) -> nn.Module:
        """The replacement of a module that is not a convolution."""
        if _prepares_itself(module):
            if module not in self._copies:
                self._copies[module] = module.prepare_for_attack(self.form)  # type: ignore[operator]
            return self._copies[module]
        copied = self._copy(module)
        # Normalisation takes 16-bit inputs with statistics and weights in float32. Nothing is known of others.
        if self.form.dtype is None or isinstance(module, _NORMALISATION) or next(module.parameters(), None) is None:
            return copied
        return InDtype(copied, torch.float32)

    def _copy(self, module: nn.Module) -> nn.Module:
        """A copy of the module and its parts with constant weights; buffers are shared."""
        if isinstance(module, torch.jit.ScriptModule):
            return module
        if module not in self._copies:
            same = self._copies[module] = type(module).__new__(type(module))  # copy.copy: not all modules permit it
            same.__dict__ = dict(module.__dict__)
            same._modules = {name: None if part is None else self._copy(part) for name, part in module._modules.items()}
            same._parameters = {
                name: None if value is None else self._constant(value, None)
                for name, value in module._parameters.items()
            }
        return self._copies[module]

    def _constant(self, tensor: Tensor, dtype: torch.dtype | None) -> Any:
        """A constant parameter that shares the tensor's memory, or a copy in `dtype`; a buffer stays as it is."""
        if not isinstance(tensor, nn.Parameter):
            return tensor
        floating = tensor.is_floating_point()
        constant = nn.Parameter(tensor.detach().to(dtype if floating else None), requires_grad=False)
        self.constants.append((constant, tensor))
        return constant

    def _why_not_folded(self, node: fx.Node, norm: Any) -> str:
        if not isinstance(norm, (*NORMS, Statistics)):
            return f"{type(norm).__name__} is not a BatchNorm of torch.nn"
        before = first_input(node)
        layer = None if before is None or before.op != "call_module" else self.built.get(str(before.target))
        if before is None or not isinstance(layer, FrozenConv):
            return "there is no convolution before it to fold it into"
        if len(before.users) > 1:
            return f"others read the output of {_short(str(before.target))} too"
        return why_not_fold(layer.source, norm) or "it is called in an unusual way"

    def _fuse_relus(self) -> None:
        for node in list(self.graph.nodes):
            if not is_relu(node, self.named):
                continue
            read = first_input(node)
            if read is None or (writes_input(node, self.named) and not self._own(read)):
                continue
            operands: tuple[Any, ...] = (read,)
            summed = is_sum(read) and len(read.users) == 1 and self._nothing_is_written(read, node)
            summed = summed and (not writes_input(read, self.named) or self._own(read.args[0]))
            if summed:
                operands = tuple(read.args)
                self.sums += 1
            self.relus += 1
            a, *b = operands if self._fresh(operands[0]) else operands[::-1]
            forked = self._only_read_by_several(node)
            with self.graph.inserting_before(node):
                function = relu_of_sum_fork if forked else relu_of_sum
                fused = self.graph.call_function(function, (a, *b), {"inplace": self._fresh(a)})
            if not forked:
                self._replace(node, fused)
            else:
                self._share_out(node, fused)
            if summed:
                self.graph.erase_node(read)

    def _share_out(self, node: fx.Node, pair: fx.Node) -> None:
        """Give the first consumer one of the two outputs and all others the other.

        Their gradients then arrive separately, and are added as they are masked.
        """
        users = list(node.users)
        with self.graph.inserting_before(node):
            ends = [self.graph.call_function(operator.getitem, (pair, i)) for i in (0, 1)]
        for i, user in enumerate(users):
            user.replace_input_with(node, ends[min(i, 1)])
        self.graph.erase_node(node)

    def _fuse_sums_before_activations(self) -> None:
        for node in list(self.graph.nodes):
            built = self.built.get(str(node.target)) if node.op == "call_module" else None
            read = first_input(node)
            if not getattr(built, "takes_skip", False) or not is_sum(read) or len(read.users) > 1:  # type: ignore[union-attr]
                continue
            if writes_input(read, self.named) and not self._own(read.args[0]):  # type: ignore[arg-type, union-attr]
                continue
            if not self._nothing_is_written(read, node):  # type: ignore[arg-type]
                continue
            a, b = read.args if self._fresh(read.args[0]) else read.args[::-1]  # type: ignore[union-attr]
            if self._fresh(a):
                node.args = (a, b)
                self.graph.erase_node(read)  # type: ignore[arg-type]
                self.sums += 1

    def _fork_activations(self) -> None:
        """Fork activations with several consumers: see `_share_out`."""
        for node in list(self.graph.nodes):
            built = self.built.get(str(node.target)) if node.op == "call_module" else None
            if not getattr(built, "forks", False) or not self._only_read_by_several(node):
                continue
            with self.graph.inserting_before(node):
                pair = self.graph.call_module(str(node.target), node.args, {**node.kwargs, "twice": True})
            self._share_out(node, pair)

    def _only_read_by_several(self, node: fx.Node) -> bool:
        """Whether the output has several consumers, of which none writes into it or makes a view of it."""
        return len(node.users) > 1 and all(self._only_reads(user) for user in node.users)

    def _only_reads(self, node: fx.Node) -> bool:
        if writes_input(node, self.named):
            return False
        if node.op == "call_module":
            built = self.built.get(str(node.target))
            return isinstance(built, (FrozenConv, *_POOLING)) or getattr(built, "forks", False)
        return is_sum(node) or is_relu(node, self.named) or node.target in (relu_of_sum, relu_of_sum_fork, *_READERS)

    def _nothing_is_written(self, first: fx.Node, last: fx.Node) -> bool:
        """Whether no node between the two writes in place, so that the last can compute what the first does."""
        node = first.next
        while node is not last and not writes_input(node, self.named):
            node = node.next
        return node is last

    def _own(self, node: Any) -> bool:
        """Whether the output has a single consumer and is not a view, so that no one sees a write into it."""
        if len(node.users) > 1:
            return False
        if is_sum(node):
            return not writes_input(node, self.named) or self._own(node.args[0])
        built = self.built.get(str(node.target)) if node.op == "call_module" else None
        return isinstance(built, (FrozenConv, *_NORMALISATION)) or node.target is F.batch_norm

    def _fresh(self, node: Any) -> bool:
        """Whether the node's output may be overwritten: it is a convolution's, with a single use."""
        if node.op != "call_module" or not isinstance(self.built.get(str(node.target)), FrozenConv):
            return False
        return len(node.users) == 1 and next(iter(node.users)).args.count(node) == 1

    def _replace(self, node: fx.Node, by: Any) -> None:
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)


def _prepares_itself(module: nn.Module) -> bool:
    """Whether the module has its own form for attacks, and no hooks."""
    return hasattr(type(module), "prepare_for_attack") and not has_hooks(module)


def _short(name: str) -> str:
    """The module's name in the model itself."""
    return name.removeprefix(ROOT).removeprefix(".")


def _summed(a: Tensor, b: Tensor | None, inplace: bool) -> tuple[Tensor, Tensor | None, bool]:
    """Operands for the fused operation; if shapes or dtypes differ, they are added first."""
    inplace = inplace and may_be_written(a)
    if b is None:
        return a, None, inplace
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype:
        return a, b, inplace
    return a + b, None, False


def relu_of_sum(a: Tensor, b: Tensor | None = None, *, inplace: bool = False) -> Tensor:
    """``relu(a + b)`` for operands of any shapes and dtypes."""
    a, b, inplace = _summed(a, b, inplace)
    return add_relu(a, b, inplace=inplace)


def relu_of_sum_fork(a: Tensor, b: Tensor | None = None, *, inplace: bool = False) -> tuple[Tensor, Tensor]:
    """The same for two consumers."""
    a, b, inplace = _summed(a, b, inplace)
    return add_relu_fork(a, b, inplace=inplace)
