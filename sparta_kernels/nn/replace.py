"""Replaces ReLU by another activation in networks that were built elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from .activations import make_activation
from .frozen import has_hooks
from .relu_calls import ReluCall, groups, observe
from .traced_forward import Untraceable, call_own_modules, first_line

_SIZES = (32, 64, 224, 299)  # of the images that a model is tried with
_SHOWN = 12  # of the ReLUs that a printed report lists under one reason
_WHERE = ("last-of-group", "last-of-block")
_NOT_ASKED_FOR = "not asked for"
_IS_RELU6 = "it is a ReLU6, not a ReLU"
_MARK = "stands_for_a_relu"  # of the modules that were put into a model


@dataclass(frozen=True)
class Replaced:
    """One ReLU that was replaced.

    Attributes:
        name: of the module that replaced it, as in `model.named_modules()`.
        channels: of its input.
        was: what was called there before.
    """

    name: str
    channels: int
    was: str


@dataclass(frozen=True)
class Replacement:
    """What `replace_relu` did to a model.

    Attributes:
        activation: as given.
        replaced: the ReLUs that were replaced, in the order of execution.
        left: the other ReLUs (and ReLU6s) by name, and why each was left.
        parameters: how many parameters the model has gained.
    """

    activation: str
    replaced: tuple[Replaced, ...]
    left: dict[str, str]
    parameters: int

    def __str__(self) -> str:
        relus = "1 ReLU" if len(self.replaced) == 1 else f"{len(self.replaced)} ReLUs"
        lines = [f"{relus} replaced by {self.activation} (+{self.parameters:,} parameters), {len(self.left)} left"]
        width = max((len(each.name) for each in self.replaced), default=0)
        lines += [f"  {each.name:{width}}  {each.channels:5} channels, was {each.was}" for each in self.replaced]
        for why in dict.fromkeys((_NOT_ASKED_FOR, *self.left.values())):
            names = [name for name, reason in self.left.items() if reason == why]
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            shown = ", ".join(names[:_SHOWN]) + more
            if names:
                lines.append(f"left, {why}: {shown}" if why == _NOT_ASKED_FOR else f"left: {shown}: {why}")
        return "\n".join(lines)


def replace_relu(
    model: nn.Module,
    activation: str = "sparta",
    where: str | Callable[[str, int], bool] = "last-of-group",
    *,
    example: Tensor | None = None,
) -> Replacement:
    """Replace ReLUs of a network by another activation, in place.

    The network runs once on an example, to find which ReLUs it calls, modules or functions, with how many channels. A
    group is a Sequential (or ModuleList, ModuleDict) whose parts are all of one class that is not torch's, such as
    ``layer1`` to ``layer4`` of a ResNet; its parts are blocks.

    A ReLU module that is called in one place is replaced under its name. If a forward calls one ReLU several times, as
    torchvision's blocks do, or calls a function, only the selected call changes: the block gets a new submodule,
    ``act2`` for its second ReLU, and its forward is traced (torch.fx) to call it. The block stays the same object, of a
    subclass of its class; copies, pickles and state dicts work as before. Branches of its forward on its other
    attributes are fixed from then on. Before the activation is put in, the network is checked to compute the same with
    new ReLUs at the selected places.

    New modules take the device, dtype and training mode of their surroundings. Their parameters are newly initialised:
    train them, or load some, and give them to the optimiser.

    Args:
        model: takes images and is neither compiled nor wrapped for DistributedDataParallel yet.
        activation: a string for `make_activation`.
        where: which ReLUs. "last-of-group": in every group the last one, in its last block (the papers' sites in a
            ResNet-18); "last-of-block": the last one of every block of the groups; both need a
            model in which nothing has been replaced yet. Or a function ``where(name, channels)``, called for every ReLU
            of a feature map with the name that the report would use.
        example: images that the model takes, on its device. By default a random one with the channels that the first
            convolution expects and 32 pixels a side, or else 64, 224 or 299.

    Returns:
        What was replaced and what was not, and why; print it.

    Raises:
        TypeError: an argument is not of the type above.
        ValueError: an argument does not fit, the model does not run on the example or has no groups, or nothing could
            be replaced. The model is then unchanged.
    """
    _check(model, where, example)
    make_activation(activation, 1)  # an unknown one is an error before anything runs
    images, (calls, output) = _observed(model, example)
    sites = _sites(model, calls)
    chosen = _chosen(model, sites, where)
    relu6 = {name: _IS_RELU6 for name, part in model.named_modules() if type(part) is nn.ReLU6}
    left = {site.name: site.why_not or _NOT_ASKED_FOR for site in sites if site.why_not or site not in chosen}
    made = {site: _made(activation, site) for site in chosen if not site.why_not}
    undo: list[Callable[[], None]] = []
    try:
        left |= _put_other_relus(made, sites, undo)
        _check_same(model, images, output, [site for site in made if site.name not in left])
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    done = [site for site in made if site.name not in left]
    for site in done:
        setattr(made[site], _MARK, True)
        for parent, key in site.slots:
            parent._modules[key] = made[site]
    report = Replacement(
        activation,
        tuple(Replaced(site.name, site.channels, site.was) for site in done),
        {site.name: left[site.name] for site in sites if site.name in left} | relu6,
        sum(parameter.numel() for site in done for parameter in made[site].parameters()),
    )
    if not done:
        raise ValueError(f"replace_relu: where must ask for a ReLU that can be replaced, got {where!r}: {report}")
    return report


@dataclass(eq=False)
class _Site:
    """A ReLU that may be replaced.

    Attributes:
        call: the ReLU.
        name: of what will stand in its place.
        slots: where that is to be registered: modules, and what they call it.
        was: what is called now.
        traced: whether the owner's forward has to be written anew.
        why_not: why it cannot be replaced, if that is known already.
    """

    call: ReluCall
    name: str
    slots: list[tuple[nn.Module, str]]
    was: str
    traced: bool
    why_not: str

    @property
    def channels(self) -> int:
        return next(iter(self.call.inputs))


def _check(model: object, where: object, example: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace_relu: model must be a torch.nn.Module, got {type(model).__name__}")
    compiled = hasattr(model, "_orig_mod")  # what torch.compile calls the model; to import its class takes seconds
    if compiled or isinstance(model, (DistributedDataParallel, torch.jit.ScriptModule)):
        raise ValueError(f"replace_relu: model must be neither wrapped nor compiled yet, got {type(model).__name__}")
    if not callable(where) and where not in _WHERE:
        raise ValueError(
            f"replace_relu: where must be one of {', '.join(map(repr, _WHERE))} or a function, got {where!r}"
        )
    if example is not None and not isinstance(example, Tensor):
        raise TypeError(f"replace_relu: example must be a tensor, got {type(example).__name__}")


def _observed(model: nn.Module, example: Tensor | None) -> tuple[Tensor, tuple[list[ReluCall], Any]]:
    """Images that the model accepts, the ReLUs that it calls, and its output."""
    if example is not None:
        return example, observe(model, example)
    conv = next((part for part in model.modules() if isinstance(part, nn.Conv2d)), None)
    if conv is None:
        raise ValueError("replace_relu: example must be given: the model has no torch.nn.Conv2d")
    for size in _SIZES:
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(1, conv.in_channels, size, size, generator=generator, device="cpu").to(conv.weight)
        try:
            return images, observe(model, images)
        except Exception as error:  # whatever a model makes of images of the wrong size
            reason = (str(error).splitlines() or [""])[0]
    raise ValueError(f"replace_relu: example must be given: the model fails on {tuple(images.shape)}: {reason}")


def _sites(model: nn.Module, calls: list[ReluCall]) -> list[_Site]:
    names = {module: name for name, module in model.named_modules()}

    def site(call: ReluCall) -> _Site:
        owner, number = names.get(call.owner), call.number
        slots = [] if owner is None else _slots(model, call, calls)
        traced = not slots
        if traced:
            key = f"act{number}"
            while hasattr(call.owner, key):
                key += "_"
            slots = [(call.owner, key)]
        parent, key = slots[0]
        name = f"{names.get(parent) or type(parent).__name__}.{key}" if parent is not model else key
        was = "the ReLU of that name"
        if traced:
            relu = "a function" if call.module is None else names.get(call.module, "no part of the model")
            was = f"ReLU {number} of {owner or 'the model'}: {relu}"
        return _Site(call, name, slots, was, traced, _why_not(call, owner))

    return [site(call) for call in calls]


def _slots(model: nn.Module, call: ReluCall, calls: list[ReluCall]) -> list[tuple[nn.Module, str]]:
    """Where the ReLU is registered, if that identifies the call."""
    if call.module is None:
        return []
    if type(call.owner).forward is nn.Sequential.forward:
        relus = [key for key, part in call.owner._modules.items() if type(part) is nn.ReLU]
        return [(call.owner, relus[call.number - 1])]
    if sum(other.module is call.module for other in calls) > 1:
        return []
    return [(parent, key) for parent in model.modules() for key, part in parent._modules.items() if part is call.module]


def _why_not(call: ReluCall, owner: str | None) -> str:
    if owner is None:
        return "its caller is no part of the model"
    if len(call.inputs) > 1:
        return f"it is called with {' and '.join(map(str, call.inputs))} channels"
    (x,) = call.inputs.values()
    if x.dim() != 4:
        return f"its input is no feature map (N, C, H, W) but {tuple(x.shape)}"
    return "it has hooks" if call.module is not None and has_hooks(call.module) else ""


def _chosen(model: nn.Module, sites: list[_Site], where: str | Callable[[str, int], bool]) -> list[_Site]:
    if callable(where):
        return [site for site in sites if not site.why_not and where(site.name, site.channels)]
    found = groups(model)
    if not found:
        relus = ", ".join(site.name for site in sites) or "none"
        raise ValueError(
            f"replace_relu: where must be a function of (name, channels) for a model without groups of blocks, got "
            f"{where!r}; its ReLUs: {relus}"
        )
    parts = found if where == "last-of-group" else [[block] for group in found for block in group]
    inside = [{module for block in part for module in block.modules()} for part in parts]
    # The last ReLU that is left there is another one, which nobody means.
    taken = [name for name, module in model.named_modules() if hasattr(module, _MARK)]
    if taken:
        raise ValueError(
            f"replace_relu: where must be a function of (name, channels) for a model some of whose ReLUs have been "
            f"replaced, got {where!r}; replaced: {', '.join(taken)}"
        )
    last = [[site for site in sites if site.call.owner in modules][-1:] for modules in inside]
    return [site for site in sites if any(site in each for each in last)]


def _made(activation: str, site: _Site) -> nn.Module:
    """The new module, with the device, dtype and mode of its surroundings."""
    (x,) = site.call.inputs.values()
    return make_activation(activation, site.channels).to(x.device, x.dtype).train(site.call.owner.training)


def _put_other_relus(chosen: Iterable[_Site], sites: list[_Site], undo: list[Callable[[], None]]) -> dict[str, str]:
    """Put a separate ReLU at every selected place; where that is impossible, record why.

    These do not work in place. Code may rely on an in-place ReLU; the network then computes something else now.
    """
    left: dict[str, str] = {}
    traced: dict[nn.Module, list[_Site]] = {}
    for site in chosen:
        if site.traced:
            traced.setdefault(site.call.owner, []).append(site)
        for parent, key in site.slots:
            undo.append(partial(_register, parent, key, parent._modules.get(key)))
            _register(parent, key, nn.ReLU().train(site.call.owner.training))
    for owner, mine in traced.items():
        kind, count = type(owner), sum(site.call.owner is owner for site in sites)
        try:
            call_own_modules(owner, {site.call.number: site.slots[0][1] for site in mine}, count)
        except Untraceable as error:
            for site in mine:
                _register(*site.slots[0], None)
                left[site.name] = str(error)
        else:
            undo.append(partial(setattr, owner, "__class__", kind))
    return left


def _register(parent: nn.Module, key: str, module: nn.Module | None) -> None:
    if module is None:
        parent._modules.pop(key, None)
    else:
        parent._modules[key] = module


def _check_same(model: nn.Module, images: Tensor, before: Any, sites: list[_Site]) -> None:
    """Whether the network, with other ReLUs at the sites, calls these and returns what it did."""
    names = ", ".join(site.name for site in sites)
    try:
        calls, after = observe(model, images)
    except Exception as error:  # a branch on an argument's default, for one: torch.fx has seen a tensor in its place
        raise ValueError(
            f"replace_relu: model must run with other ReLUs at {names}, but fails ({type(error).__name__}: "
            f"{first_line(error)}): it may decide by what torch.fx cannot see; ask for other ones with where"
        ) from error
    called = {call.module for call in calls}
    unused = [site.name for site in sites if site.slots[0][0]._modules[site.slots[0][1]] not in called]
    if unused:
        raise ValueError(
            f"replace_relu: model must call the modules that it registers, but not so: {', '.join(unused)}"
        )
    pairs = zip(tree_leaves(before), tree_leaves(after), strict=True)
    if not all(_close(a, b) for a, b in pairs if isinstance(a, Tensor)):
        raise ValueError(
            f"replace_relu: model must compute the same with other ReLUs at {names}, but does not: it may rely on a "
            "ReLU that writes into its input, or decide by what torch.fx cannot see; ask for other ones with where"
        )


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.is_meta or not a.is_floating_point() or not a.numel():
        return a.shape == b.shape
    return torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(a.abs().max()), equal_nan=True)
