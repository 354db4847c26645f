"""A view of a model for attacks: the same function, but differentiable in the images alone, and faster."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..nn.frozen import Form
from ..nn.modes import in_eval_mode
from . import checks
from .arithmetic import float32_products
from .rewrite import refresh_constants, rewrite

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
DTYPES = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS_ON_CPU = ("fp32", "bf16")


def prepare(model: nn.Module, *, precision: str = "fp32") -> Prepared:
    """Make a view of a network for attacks, rewriting as much of it as torch.fx can trace.

    BatchNorms are folded into the convolutions before them. Convolutions save nothing for weight gradients. ReLUs save
    one bit per element, and are fused with the additions before them. Weights have the precision and memory format of
    the attack. Whatever cannot be treated so stays as it is, and is listed in the result's `report`.

    Weights that are used unchanged are shared with the model. The others are copies: call `refresh` after the model's
    weights have changed.

    Args:
        model: in eval mode, with all its parts; takes images (N, C, H, W), returns logits. Wrappers
            (DistributedDataParallel, DataParallel, torch.compile) are removed.
        precision: of convolutions and linear layers: "fp32" (the weights' own dtype; exact on a GPU too),
            "bf16", and on a GPU "tf32" and "fp16". Images and their gradients stay float32.

    Raises:
        TypeError: model is no `torch.nn.Module`.
        ValueError: it is in training mode, or is prepared already, or its device cannot compute in `precision`.
    """
    model = unwrap(checks.model("prepare", model, None))
    if isinstance(model, Prepared):
        raise ValueError("prepare: model must not be prepared already; prepare its .model again")
    check_precision("prepare", precision, model)
    return Prepared(model, precision)


def check_precision(where: str, precision: str, model: nn.Module) -> None:
    """Refuse a precision that the model's device does not support."""
    checks.choice(where, "precision", precision, PRECISIONS)
    device = checks.device_of(model)
    if device is not None and device.type == "cpu" and precision not in PRECISIONS_ON_CPU:
        allowed = " or ".join(map(repr, PRECISIONS_ON_CPU))
        raise ValueError(f"{where}: precision must be {allowed} on a CPU, got {precision!r}")


def unwrap(model: nn.Module) -> nn.Module:
    """The model without the wrappers DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


class Prepared(nn.Module):
    """The result of `prepare`: ``prepared(images)`` gives the model's logits, at least in float32.

    Its state dict is the model's; loading one loads the model's weights and refreshes. A copy, or a pickle, is the
    copied model prepared anew. It cannot be moved or converted: move the model, and prepare that.

    Attributes:
        precision: as given to `prepare`.
        memory_format: in which the network takes the images.
        report: what was done to the model, what was left alone, and why.
        stale: whether the model has changed since the last `refresh`; an attack warns about that.
    """

    def __init__(self, model: nn.Module, precision: str) -> None:
        super().__init__()
        self.precision = precision
        self._model = (model,)  # in a tuple: its parameters are not this module's
        self.captured: dict[str, Any] = {}  # what engines make of the network, to be used again
        self._checked = False
        self._versions: list[int] = []
        # In another precision a second view gives the predictions that are reported.
        self._exact = () if precision == "fp32" else (Prepared(model, "fp32"),)
        self._build(None)
        self.eval()

    def _build(self, whole: str | None) -> None:
        """Build the network from the model's current state; `whole` gives a reason not to trace the model."""
        form = Form(DTYPES[self.precision], _memory_format(checks.device_of(self.model), self.precision))
        # Weights must not be inference tensors, which no gradient can flow past.
        with torch.inference_mode(False), torch.no_grad():
            made = rewrite(self.model, form, whole)
        self.network, self._constants, self.report = made.network, made.constants, made.report
        self.memory_format = made.form.memory_format
        self.captured.clear()
        self._versions = _versions(self.model)

    @property
    def model(self) -> nn.Module:
        """The model that this is a view of."""
        return self._model[0]

    def forward(self, images: Tensor, network: Callable[[Tensor], Any] | None = None) -> Tensor:
        """The logits; `network` may be a compiled form of this one's network."""
        self.check(images)
        if images.dim() == 4:
            images = images.contiguous(memory_format=self.memory_format)
        with self.arithmetic():
            logits = (self.network if network is None else network)(images)
        low = isinstance(logits, Tensor) and logits.dtype in (torch.bfloat16, torch.float16)
        return logits.float() if low else logits

    @torch.no_grad()
    def exact(self, images: Tensor) -> Tensor:
        """The logits in float32, without a gradient, from which predictions are reported."""
        return self._exact[0](images) if self._exact else self(images)

    def check(self, images: Tensor) -> None:
        """Compare the view's logits and input gradients with the model's, once, on the first two images.

        Code can do things that a tracer does not see, such as custom gradients. If the two differ by more than
        rounding, the model is kept whole, with a warning; the report has the reason.
        """
        if self._checked or torch.compiler.is_compiling() or not len(images):
            return
        self._checked = True
        if self._exact:
            self._exact[0].check(images)
            difference = self._exact[0].report.left.get("")
        else:
            self.refresh()
            with self.arithmetic():
                difference = _difference(self.network, self.model, images[:2], self.memory_format)
            if difference is not None:
                warnings.warn(f"prepare: the model is kept whole: {difference}", stacklevel=2)
        if difference is not None and "" not in self.report.left:
            self._build(difference)

    def refresh(self) -> None:
        """Update the view to the model's current weights and statistics.

        Everything is rewritten in place, so a captured graph stays valid. The model's tensors must be the same objects
        as when it was prepared, with new values: an optimiser, `load_state_dict` and an assignment to `.data` keep
        them; assigning a new `nn.Parameter` does not.
        """
        for module in self.network.modules():
            if hasattr(module, "refresh"):
                module.refresh()  # type: ignore[operator]
        refresh_constants(self._constants)
        for exact in self._exact:
            exact.refresh()
        self._versions = _versions(self.model)

    @property
    def stale(self) -> bool:
        """Whether the model's weights or statistics were written to since the last `refresh` (but through `.data`)."""
        return _versions(self.model) != self._versions

    def addresses(self) -> list[int]:
        """The addresses of the network's tensors: a captured graph is valid for these alone."""
        return [tensor.data_ptr() for tensor in chain(self.network.parameters(), self.network.buffers())]

    def arithmetic(self) -> AbstractContextManager[None]:
        """The GPU's arithmetic for float32 products: TF32 for precision "tf32", exact otherwise."""
        return float32_products(self.precision == "tf32") if torch.cuda.is_available() else nullcontext()

    def train(self, mode: bool = True) -> Prepared:
        if mode:
            raise ValueError("Prepared: mode must be False: a prepared model is in eval mode, train its .model")
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> Prepared:
        # Other people's attacks say .to(device) to whatever they are given, and it may well be there.
        if all(fn(tensor) is tensor for tensor in (*self.parameters(), *self.buffers())):
            return self
        raise RuntimeError("Prepared: cannot be moved or converted; move its .model, and prepare that")

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        if assign:
            raise ValueError("Prepared: assign must be False; give the .model other tensors, and prepare it again")
        result = self.model.load_state_dict(state_dict, strict)
        self.refresh()
        return result

    def __reduce__(self) -> Any:
        return partial(prepare, precision=self.precision), (self.model,)

    def extra_repr(self) -> str:
        return f"precision={self.precision}, {self.memory_format}\n{self.report}"


def _difference(network: nn.Module, model: nn.Module, images: Tensor, layout: torch.memory_format) -> str | None:
    """How the network differs from the model by more than rounding; None if it does not."""

    def computed(function: nn.Module, layout: torch.memory_format, factor: float = 1.0) -> tuple[Tensor, Tensor] | None:
        leaf = (images.detach() * factor).requires_grad_()
        logits = function(leaf.contiguous(memory_format=layout) if leaf.dim() == 4 else leaf)
        if not isinstance(logits, Tensor) or not logits.requires_grad or not logits.isfinite().all():
            return None  # the attack will say what is wrong with that
        weights = torch.linspace(1, 2, logits.numel(), device=logits.device, dtype=logits.dtype).view(logits.shape)
        return logits.detach(), torch.autograd.grad((logits * weights).sum(), leaf)[0]

    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(images.device.type, enabled=False),
        torch.random.fork_rng(devices=[]),
        in_eval_mode(model),
    ):
        wanted, got = computed(model, torch.contiguous_format), computed(network, layout)
        # The model's own answer to another rounding: where pooling has ties, gradients are as good as drawn by lot.
        other = computed(model, torch.contiguous_format, 1 - 2**-22)
    if wanted is None or got is None or other is None:
        return None
    # A mistake changes all of it. In 16 bits a single ReLU on its other side changes much, too.
    low = any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in model.parameters())
    tolerances = (0.1, 0.5) if low else (1e-3, 5e-2)
    for name, a, b, c, allowed in zip(("logits", "gradients"), got, wanted, other, tolerances, strict=True):
        if a.shape != b.shape or not (a - b).norm() <= allowed * b.norm() + 3 * (c - b).norm():
            return f"its {name} are not those that its parts compute when they are traced"
    return None


def _versions(model: nn.Module) -> list[int]:
    """How often each of the model's weights and statistics was written to, as autograd counts it."""
    # A BatchNorm's kernel writes its statistics unseen, but the batches are counted by an ordinary operation. What
    # other integers a model may count in says nothing.
    return [
        tensor._version
        for name, tensor in chain(model.named_parameters(), model.named_buffers())
        if (tensor.is_floating_point() or name.endswith("num_batches_tracked")) and not tensor.is_inference()
    ]


def _memory_format(device: torch.device | None, precision: str) -> torch.memory_format:
    """The faster format for convolutions: as measured on CPUs, as cuDNN advises for 16 bits (docs/attack.md)."""
    if device is not None and device.type == "cuda" and precision == "fp32":
        return torch.contiguous_format
    return torch.channels_last
