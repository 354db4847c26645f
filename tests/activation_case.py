"""Inputs for sparta_attention and sparta_activation, and what they have to give: plain torch in float64.

ReLU's bits are taken as the kernels kept them, once it is sure that they are right wherever a sum is more than rounding
away from 0; for these bits the network is a polynomial, which autograd differentiates. The same polynomial of absolute
values gives the magnitudes of all terms, rounding's yardstick.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from cases import lay, random
from hypothesis import strategies as st
from torch import Tensor

from sparta_kernels import AttentionWeights, sparta_attention
from sparta_kernels.backends import extension, native_attention
from sparta_kernels.ops.attention import pack

FIELDS = AttentionWeights._fields
LAYOUTS = (
    *("contiguous", "channels_last", "sliced_n", "sliced_c", "sliced_n_channels_last", "sliced_c_channels_last"),
    *("permuted", "stepped", "sliced_w", "shifted_channels_last", "expanded_n", "expanded_hw"),
)
# One pixel; as many as a tile divides into whole samples or does not; several tiles, the last one shorter or not.
SIZES = ((1, 1), (7, 7), (1, 3), (4, 4), (5, 7), (8, 8), (9, 15), (16, 17))

_OPERAND = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
_RESULT = {torch.float64: 2.0**-48, torch.float32: 2.0**-19}  # of sums of some hundred terms


@dataclass(frozen=True)
class ActivationCase:
    """One call, and the gradients that come back. Hypothesis prints it; `inputs` and `gradients` make the tensors."""

    shape: tuple[int, int, int, int]
    hidden: int
    dtype: torch.dtype
    layout: str = "contiguous"
    gradient_layout: str = "contiguous"
    dynamic: bool = True
    share: int = 1
    low_weights: bool = False  # in x's dtype, not float32
    seed: int = 0

    @property
    def work(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def inputs(self) -> tuple[Tensor, AttentionWeights]:
        """x, and weights whose matrices are what the images' dtype can hold."""
        _, channels, _, _ = self.shape
        hidden, generator = self.hidden, torch.Generator().manual_seed(self.seed)
        x = lay(random(generator, *self.shape).to(self.dtype), self.layout)
        made = AttentionWeights(
            w13=random(generator, 2 * hidden, channels) / channels**0.5,
            b13=0.5 * random(generator, 2 * hidden),
            w4=random(generator, hidden) / hidden**0.5,
            b4=random(generator, 1),
            w2=random(generator, channels, hidden) / hidden**0.5,
            b2=random(generator, channels),
            b7=random(generator, 1),
            w6=random(generator, hidden, hidden) / hidden**0.5,
            b6=0.5 * random(generator, hidden),
            w7=random(generator, hidden) / hidden**0.5,
        )
        if not self.dynamic:
            made = made._replace(w6=None, b6=None, w7=None)
        kept = self.dtype if self.low_weights else self.work
        return x, AttentionWeights(*(None if w is None else w.to(self.dtype).to(kept) for w in made))

    def leaves(self) -> tuple[Tensor, AttentionWeights]:
        x, weights = self.inputs()
        return x.requires_grad_(), AttentionWeights(*(None if w is None else w.requires_grad_() for w in weights))

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of a, channel and kernel."""
        samples, channels, height, width = self.shape
        generator = torch.Generator().manual_seed(self.seed + 1)
        shapes = (samples, 1, height, width), (samples, channels), (samples,)
        return tuple(random(generator, *shape).to(self.work) for shape in shapes)  # type: ignore[return-value]

    def gradient(self) -> Tensor:
        """Of y."""
        generator = torch.Generator().manual_seed(self.seed + 2)
        return lay(random(generator, *self.shape).to(self.dtype), self.gradient_layout)


@st.composite
def activation_cases(draw: st.DrawFn) -> ActivationCase:
    extents = st.sampled_from([1, 2, 3, 8, 15, 16, 17, 33, 64, 100])
    return ActivationCase(
        shape=(draw(st.sampled_from([1, 2, 3, 5, 19])), draw(extents), *draw(st.sampled_from(SIZES))),
        hidden=draw(extents),
        dtype=draw(st.sampled_from(tuple(extension.DTYPES))),
        layout=draw(st.sampled_from(LAYOUTS)),
        gradient_layout=draw(st.sampled_from(LAYOUTS)),
        dynamic=draw(st.booleans()),
        share=draw(st.sampled_from([1, 2, 3])),
        low_weights=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def present(weights: Sequence[Tensor | None]) -> list[Tensor]:
    return [weight for weight in weights if weight is not None]


def forward(case: ActivationCase, x: Tensor, weights: AttentionWeights, keep: bool = True) -> tuple[Tensor, ...]:
    """The raw operation's results: a, channel, kernel, mean1, mean6, bits."""
    packed = pack(weights, case.dtype, "native")
    return torch.ops.sparta_kernels._attention_forward(
        x, packed.tensors, packed.hidden, packed.dynamic, keep, packed.backend
    )


def unpacked(bits: Tensor, hidden: int) -> Tensor:
    """(N, P, masks, bytes) as (masks, N, P, hidden) booleans; channels that do not exist have none."""
    passing = ((bits.int()[..., None] >> torch.arange(8)) & 1).flatten(-2).bool()
    assert not passing[..., hidden:].any(), "bits of channels that do not exist"
    return passing[..., :hidden].movedim(2, 0)


def network(x: Tensor, weights: AttentionWeights, masks: Tensor | None) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """What the ReLUs are given, (N, P, Co) each; then a, channel and kernel. Without masks: the ReLUs' own."""
    samples, _, height, width = x.shape
    pixels = x.flatten(2).transpose(1, 2)

    def relu(index: int) -> Tensor:
        return sums[index].relu() if masks is None else torch.where(masks[index], sums[index], 0.0)

    w, hidden = weights, weights.hidden
    sums = [pixels @ w.w13[:hidden].t() + w.b13[:hidden], pixels @ w.w13[hidden:].t() + w.b13[hidden:]]
    h3 = relu(1)
    a = (h3 @ w.w4 + w.b4).view(samples, 1, height, width)
    channel = relu(0).mean(1) @ w.w2.t() + w.b2
    if w.w6 is None or w.b6 is None or w.w7 is None:
        return sums, (a, channel, w.b7.expand(samples))
    sums.append(h3 @ w.w6.t() + w.b6)
    return sums, (a, channel, relu(2).mean(1) @ w.w7 + w.b7)


def _with_gradients(
    x: Tensor, weights: AttentionWeights, masks: Tensor, incoming: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    x = x.detach().requires_grad_()
    weights = AttentionWeights(*(None if w is None else w.detach().requires_grad_() for w in weights))
    sums, found = network(x, weights, masks)
    return [s.detach() for s in sums], list(found), list(torch.autograd.grad(found, [x, *present(weights)], incoming))


def near(got: Tensor, want: Tensor, room: Tensor, name: str) -> None:
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, not {tuple(want.shape)}"
    finfo = torch.finfo(got.dtype)
    room = room + finfo.eps / 2 * (want.abs() + room) + finfo.smallest_normal * finfo.eps
    wrong = ~((got.double() - want).abs() <= room)
    assert not wrong.any(), f"{name}: {int(wrong.sum())} of {wrong.numel()}, first at {wrong.nonzero()[0].tolist()}"


def check_attention(case: ActivationCase, backend: str) -> None:
    """Values, bits, the gradients of x and of every weight."""
    x, weights = case.leaves()
    incoming = case.gradients()
    found = sparta_attention(x, weights, backend=backend)
    grads = torch.autograd.grad(found, [x, *present(weights)], incoming)
    raw = forward(case, x.detach(), weights)
    for got, other in zip(found, raw, strict=False):
        assert got.dtype == case.work
        assert torch.equal(got, other)

    samples, _, height, width = case.shape
    bits = raw[5]
    assert bits.shape == (samples, height * width, 3 if case.dynamic else 2, 2 * -(-case.hidden // 16))
    assert bits.is_contiguous()
    masks = unpacked(bits, case.hidden)
    double = AttentionWeights(*(None if w is None else w.detach().double() for w in weights))
    sizes = AttentionWeights(*(None if w is None else w.abs() for w in double))
    sums, wants, want_grads = _with_gradients(x.double(), double, masks, [g.double() for g in incoming])
    rooms, sizes_of, grad_sizes = _with_gradients(x.double().abs(), sizes, masks, [g.double().abs() for g in incoming])

    result = _RESULT[case.work]
    rounded = result + 2 * _OPERAND[native_attention._product_dtype(case.dtype)]  # operands may be rounded more than x
    units = (result, result, rounded)
    for name, passing, total, size, unit in zip("136", masks, sums, rooms, units, strict=False):
        wrong = (passing != (total > 0)) & (total.abs() > unit * size)
        assert not wrong.any(), f"bits of h{name}: {int(wrong.sum())}, first at {wrong.nonzero()[0].tolist()}"
    for name, got, want, size, unit in zip(("a", "channel", "kernel"), found, wants, sizes_of, units, strict=True):
        near(got, want, unit * size, name)
    names = ["x", *(name for name in FIELDS if getattr(weights, name) is not None)]
    for name, got, want, size in zip(names, grads, want_grads, grad_sizes, strict=True):
        assert got.dtype == (case.dtype if name == "x" or case.low_weights else case.work), name
        near(got, want, (rounded if name in ("x", "w7") else result) * size, f"gradient of {name}")
