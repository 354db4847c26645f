"""How the iterations of an attack run: operation by operation, compiled, or as a CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from ..nn.traced_forward import first_line
from ..ops import pgd_step_
from . import checks
from .capture import Capture
from .prepare import PRECISIONS, PRECISIONS_ON_CPU, Prepared

ENGINES = ("auto", "eager", "compile", "graph")

# By device and precision, the fastest engine and where that was measured.
_MEASURED: dict[tuple[str, str], tuple[str, str]] = {
    ("cpu", "fp32"): ("eager", "measured on a Zen 5 to take the time of compile, without its minute at first"),
    ("cpu", "bf16"): ("eager", "measured on a Zen 5 to be 1.1 to 1.2 times as fast as compile"),
}
_UNMEASURED = "eager"


class Engine(NamedTuple):
    """What runs an attack's iterations, and why it was chosen."""

    name: str
    reason: str


class Step(NamedTuple):
    """What an iteration does: a step within `eps` (pixel units both), down the loss if `targeted`, else up.

    `soft`: the loss is that to a distribution, not to a class.
    """

    eps: float
    step_size: float
    targeted: bool
    soft: bool = False


_Outputs = tuple[Tensor, Tensor]  # logits (N, classes) and losses (N,)
# What the cross-entropy to is driven: classes (N,) or probabilities (N, classes), of a model with so many classes.
Goal = Callable[[int], Tensor]


def choose(engine: str, model: nn.Module, device: torch.device) -> Engine:
    """The engine requested, if it can attack `model` on `device`; for "auto", the one measured to be fastest.

    Raises:
        ValueError: it cannot.
    """
    checks.choice("pgd", "engine", engine, ENGINES)
    prepared = isinstance(model, Prepared)
    if engine == "graph" and device.type != "cuda":
        raise ValueError(f"pgd: engine must be 'auto', 'eager' or 'compile' on a {device.type}, got 'graph'")
    if engine != "auto":
        return Engine(engine, "asked for")
    if not prepared:
        return Engine("eager", "the model is attacked as it is; attack.prepare makes it faster")
    return fastest(device.type, model.precision)  # type: ignore[arg-type]


def fastest(device: str, precision: str) -> Engine:
    """The engine that "auto" takes for a prepared model."""
    return Engine(*_MEASURED.get((device, precision), (_UNMEASURED, f"nothing faster was measured on a {device}")))


def chosen() -> dict[str, dict[str, str]]:
    """For each device of this machine and each precision, the engine that "auto" takes, and why."""
    devices: dict[str, tuple[str, ...]] = {"cpu": PRECISIONS_ON_CPU}
    if torch.cuda.is_available():
        devices["cuda"] = PRECISIONS
    return {
        device: {precision: "{0.name}: {0.reason}".format(fastest(device, precision)) for precision in names}
        for device, names in devices.items()
    }


class Eager:
    """Runs iterations operation by operation; the network may be a compiled one.

    Attributes:
        clean: the images.
        adversarial: the iterate, rewritten in place.
        goal: targets of the cross-entropy, (N,) or (N, classes); None before the model has been called.
        finite: whether all gradients so far were finite; a tensor on the device.
    """

    def __init__(self, model: nn.Module, network: Callable[[Tensor], Any], step: Step) -> None:
        self._network, self._step = network, step
        prepared = isinstance(model, Prepared)
        self._arithmetic: Callable[[], AbstractContextManager[None]] = model.arithmetic if prepared else nullcontext  # type: ignore[assignment]
        # Gradients of 16 bits with 5 of exponent would vanish; a step takes their sign alone, so nothing is undone.
        self._scale = 1024.0 if prepared and model.precision == "fp16" else 1.0
        self._format: torch.memory_format = model.memory_format if prepared else torch.preserve_format  # type: ignore[assignment]
        self.goal: Tensor | None = None

    def begin(self, images: Tensor, goal: Goal) -> Tensor:
        """Take new images; returns the iterate, which is initialised with them."""
        self.clean = images.contiguous(memory_format=self._format) if self._format != torch.preserve_format else images
        self._make_goal, self.goal = goal, None
        self.adversarial = self.clean.clone()
        self.finite = torch.ones((), dtype=torch.bool, device=images.device)
        return self.adversarial

    def iterate(self) -> tuple[Tensor, Tensor]:
        """Take a step; returns the logits (N, classes) and losses (N,) of the iterate before it."""
        leaf = self.adversarial.detach().requires_grad_()
        with self._arithmetic():
            logits = self._logits(leaf)
            if not logits.requires_grad:
                raise ValueError(
                    "pgd: model must return logits that depend on the images, got a result without a gradient"
                )
            losses = self._losses(logits)
            # Summed, not averaged: an image's gradient must not depend on the size of its batch.
            (gradient,) = torch.autograd.grad(losses.sum() * self._scale if self._scale != 1 else losses.sum(), leaf)
        self.finite.logical_and_(gradient.sum().isfinite())  # a step by NaN is none, which would look like robustness
        step = self._step
        pgd_step_(self.adversarial, gradient, self.clean, step.step_size, step.eps, targeted=step.targeted)
        return logits.detach(), losses.detach()

    @torch.no_grad()
    def look(self) -> tuple[Tensor, Tensor]:
        """The logits and losses of the iterate, without a step."""
        with self._arithmetic():
            logits = self._logits(self.adversarial)
            return logits, self._losses(logits)

    def _logits(self, images: Tensor) -> Tensor:
        logits = checks.logits("pgd", self._network(images), len(images))
        return logits if logits.dtype == torch.float64 else logits.float()

    def _losses(self, logits: Tensor) -> Tensor:
        if self.goal is None:
            goal = self._make_goal(logits.shape[1])
            self.goal = goal.to(logits.dtype) if goal.is_floating_point() else goal
        return F.cross_entropy(logits, self.goal, reduction="none")


class Graph:
    """Runs iterations as a CUDA graph, captured once per batch shape and replayed.

    The graph has fixed buffers, so two threads must not attack the same prepared model at once. A smaller batch is
    padded with copies of its first image.
    """

    def __init__(self, model: Prepared, step: Step) -> None:
        self._model, self._step = model, step

    def begin(self, images: Tensor, goal: Goal) -> Tensor:
        # What the host decided while it was captured, and where the weights were.
        switches = (backends.choose(images.device), *self._model.addresses())
        key = (images.shape[1:], images.dtype, images.device, self._step, switches)
        captured = self._model.captured.get("graph")
        if captured is None or captured[0] != key or captured[1].room < len(images):
            self._model.captured.pop("graph", None)  # its memory is needed for the next one
            captured = (key, _Captured(self._model, self._step, images, goal))
            self._model.captured["graph"] = captured
        self._captured, self._count = captured[1], len(images)
        self._captured.load(images, goal)
        self.adversarial, self.finite = self._captured.adversarial[: self._count], self._captured.finite
        return self.adversarial

    def iterate(self) -> tuple[Tensor, Tensor]:
        logits, losses = self._captured.iterate()
        return logits[: self._count], losses[: self._count]

    def look(self) -> tuple[Tensor, Tensor]:
        logits, losses = self._captured.look()
        return logits[: self._count], losses[: self._count]


class _Captured:
    """One iteration, and one forward pass alone, on a batch of `images`, as CUDA graphs."""

    def __init__(self, model: Prepared, step: Step, images: Tensor, goal: Goal) -> None:
        self.room = len(images)
        loop = Eager(model, model, step)
        capture = Capture(images.device)

        def warm_up() -> None:
            """Allocate, choose and compile before the capture whatever the first use does."""
            loop.begin(images.clone(), goal)
            loop.iterate()
            loop.iterate()
            self.classes = loop.look()[0].shape[1]

        capture.warm_up(warm_up)
        assert loop.goal is not None
        self.clean, self.adversarial, self.goal = loop.clean, loop.adversarial, loop.goal
        self.finite = loop.finite
        try:
            self.iterate, self.look = capture(loop.iterate), capture(loop.look)
        except RuntimeError as error:
            raise NotCaptured(first_line(error)) from error

    def load(self, images: Tensor, goal: Goal) -> None:
        """Copy these images, and their goals, to where the graphs read them."""
        count = len(images)
        self.finite.fill_(True)
        for buffer, values in ((self.clean, images), (self.adversarial, images), (self.goal, goal(self.classes))):
            buffer[:count].copy_(values)
            if count < self.room:
                buffer[count:] = values[:1]


class NotCaptured(Exception):
    """torch or the driver refused a capture; the message says why."""


def runner(engine: Engine, model: nn.Module, step: Step) -> Eager | Graph:
    """What runs the iterations of an attack on `model`."""
    if engine.name == "graph":
        assert isinstance(model, Prepared)
        return Graph(model, step)
    if engine.name == "compile":
        assert isinstance(model, Prepared)
        if "compile" not in model.captured:
            model.captured["compile"] = torch.compile(model.network)
        return Eager(model, partial(model, network=model.captured["compile"]), step)
    return Eager(model, model, step)


def begin(
    engine: Engine, asked: str, model: nn.Module, step: Step, images: Tensor, goal: Goal
) -> tuple[Engine, Eager | Graph]:
    """Start a runner on the images; if "auto" chose one that cannot run the model, the eager one, with the reason.

    Raises:
        ValueError: "graph" was requested, and the model cannot be captured.
    """
    reason = None
    if isinstance(model, Prepared):
        model.check(images)
        if model.stale:
            message = (
                "pgd: the model's weights have changed since it was prepared: call refresh() on the prepared model"
            )
            warnings.warn(message, stacklevel=4)
        reason = model.captured.get("refused") if engine.name == "graph" else None
    if reason is None:
        chosen = runner(engine, model, step)
        try:
            chosen.begin(images, goal)
            return engine, chosen
        except NotCaptured as error:
            assert isinstance(model, Prepared)
            reason = model.captured["refused"] = f"the model cannot be captured ({error})"
            if asked == "auto":
                warnings.warn(f"pgd: {reason}: the engine is 'eager'", stacklevel=3)
    if asked != "auto":
        raise ValueError(f"pgd: engine must be 'auto', 'eager' or 'compile': {reason}")
    chosen = runner(Engine("eager", reason), model, step)
    chosen.begin(images, goal)
    return Engine("eager", reason), chosen
