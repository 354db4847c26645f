"""The attention network's raw operations: their weights, their backends, and their schemas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from sparta_kernels import backends
from sparta_kernels.ops.library import fill, register, untraced


class AttentionWeights(NamedTuple):
    """The attention network's weights (DSCANet, Fig. 2) at K = 1, with BatchNorm folded in.

    C channels, Co hidden channels; any floating dtypes.

    Attributes:
        w13, b13: ``(2 * Co, C)``, ``(2 * Co,)``: conv1 stacked on conv3.
        w4, b4: ``(Co,)``, ``(1,)``: conv4.
        w2, b2: ``(C, Co)``, ``(C,)``: conv2.
        b7: ``(1,)``: predict's bias. Where w6, b6 and w7 are None (SPARTA-w/o-DPNet), the learned kernel.
        w6, b6: ``(Co, Co)``, ``(Co,)``: conv6; or None.
        w7: ``(Co,)``: predict; or None.
    """

    w13: Tensor
    b13: Tensor
    w4: Tensor
    b4: Tensor
    w2: Tensor
    b2: Tensor
    b7: Tensor
    w6: Tensor | None = None
    b6: Tensor | None = None
    w7: Tensor | None = None

    @property
    def hidden(self) -> int:
        return self.w4.shape[0]


class Packed(NamedTuple):
    """Copies of the weights in the form that a backend's kernels read."""

    backend: str
    tensors: list[Tensor]
    hidden: int
    dynamic: bool


def pack(weights: AttentionWeights, dtype: torch.dtype, backend: str) -> Packed:
    """Pack the weights for images of `dtype`."""
    with torch.inference_mode(False), torch.no_grad():  # they may be used with gradients later
        tensors = backends.module(backend).pack_attention(weights, dtype)
    return Packed(backend, tensors, weights.hidden, weights.w7 is not None)


def fused_backend(x: Tensor, hidden: int, backend: str | None = None, argument: str = "backend") -> tuple[str, str]:
    """The backend whose kernels compute the attention network of x, and "", or "" and why there is none.

    Raises:
        TypeError, ValueError: those of `sparta_kernels.backends.choose`.
    """
    chosen = backends.choose(x.device, backend, argument).backend
    if chosen == "reference":
        return "", "the reference was chosen"
    if not untraced():
        return "", "torch.compile, torch.func, torch.jit and forward-mode AD see plain PyTorch"
    if x.numel() == 0:
        return "", "x is empty"
    reasons = []
    for name in backends.DEVICES if chosen == "auto" else (chosen,):
        reason = backends.module(name).attention_unfit(x, hidden)
        if reason is None:
            return name, ""
        reasons.append(f"{name}: {reason}")
    return "", "; ".join(reasons)


# ---- the raw operations ------------------------------------------------------------------------------------


_Found = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _forward(x: Tensor, packed: Sequence[Tensor], hidden: int, dynamic: bool, keep: bool, backend: str) -> _Found:
    found = backends.module(backend).attention_forward(x, list(packed), hidden, keep)
    return *found[:4], fill(found[4], found[0]), fill(found[5], x)


def _forward_(
    x: Tensor, skip: Tensor, packed: Sequence[Tensor], hidden: int, dynamic: bool, keep: bool, backend: str
) -> _Found:
    if not x.is_inference():
        increment_version(x)  # so that autograd notices a write into what it saved
    found = backends.module(backend).attention_forward(x, list(packed), hidden, keep, skip)
    return *found[:4], fill(found[4], found[0]), fill(found[5], x)


def _forward_fake(x: Tensor, packed: Sequence[Tensor], hidden: int, dynamic: bool, keep: bool, backend: str) -> _Found:
    samples, channels, height, width = x.shape
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    sizes = [(samples, 1, height, width), (samples, channels), (samples,), (samples, hidden)]
    made = [x.new_empty(size, dtype=work) for size in (*sizes, (samples, hidden) if dynamic else (0,))]
    masks = x.new_empty((samples, height * width, 3 if dynamic else 2, -(-hidden // 16) * 2), dtype=torch.uint8)
    return *made, masks if keep else x.new_empty(0)  # type: ignore[return-value]


def _forward_in_place_fake(
    x: Tensor, skip: Tensor, packed: Sequence[Tensor], hidden: int, dynamic: bool, keep: bool, backend: str
) -> _Found:
    return _forward_fake(x, packed, hidden, dynamic, keep, backend)


def _backward_(
    gx: Tensor,
    ga: Tensor,
    gchannel: Tensor,
    gkernel: Tensor,
    bits: Tensor,
    packed: Sequence[Tensor],
    hidden: int,
    backend: str,
) -> None:
    backends.module(backend).attention_backward_(gx, ga, gchannel, gkernel, bits, list(packed), hidden)


def _backward_fake(
    gx: Tensor,
    ga: Tensor,
    gchannel: Tensor,
    gkernel: Tensor,
    bits: Tensor,
    packed: Sequence[Tensor],
    hidden: int,
    backend: str,
) -> None:
    return None


# a (N, 1, H, W), channel (N, C), kernel (N,); then what backward takes: the means of h1 and h6 over pixels (N, Co), the
# latter empty where static, and the bits of h1, h3 and h6, uint8 (N, H * W, 3, 2 * ceil(Co / 16)), empty unless `keep`:
# bit i % 8 of byte i // 8 is that of channel i.
_OPTIONS = "Tensor[] packed, int hidden, bool dynamic, bool keep, str backend"
_RESULTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
register(f"_attention_forward(Tensor x, {_OPTIONS}) -> {_RESULTS}", _forward, _forward_fake)
# The same of x + skip, which is written over x.
register(f"_attention_forward_(Tensor(a!) x, Tensor skip, {_OPTIONS}) -> {_RESULTS}", _forward_, _forward_in_place_fake)
# Adds to gx.
register(
    "_attention_backward_(Tensor(a!) gx, Tensor ga, Tensor gchannel, Tensor gkernel, Tensor bits, Tensor[] packed, "
    "int hidden, str backend) -> ()",
    _backward_,
    _backward_fake,
)
raw_forward = torch.ops.sparta_kernels._attention_forward.default
raw_forward_ = torch.ops.sparta_kernels._attention_forward_.default
raw_backward_ = torch.ops.sparta_kernels._attention_backward_.default
