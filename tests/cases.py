"""Sample inputs that the tests of the operations share, and the one rule by which results are compared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from sparta_kernels.reference import gating

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def one_thread() -> Iterator[None]:
    """For what is small: several threads, on cores that others use too, would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def interpreted(backend: str) -> bool:
    """Whether Triton's interpreter computes, which takes its time: a thousand times a kernel's."""
    return backend == "triton" and torch.get_default_device().type == "cpu"


def thread_counts(backend: str) -> tuple[int, ...]:
    """To compare results for. Triton's interpreter has one thread."""
    return (1,) if backend == "triton" else (1, 2, 3)


# ---- how a tensor lies in memory ---------------------------------------------------------------------------

LAYOUTS = (
    "contiguous",
    "channels_last",
    "permuted",
    *(f"sliced_{axis}" for axis in "nchw"),
    *(f"sliced_{axis}_channels_last" for axis in "nchw"),
    "stepped",
    "shifted",
    "shifted_channels_last",
    *(f"expanded_{axes}" for axes in ("n", "c", "hw", "nchw")),
)


def lay(values: Tensor, layout: str) -> Tensor:
    """A new tensor of that shape in the given layout; its values are the same too, but for the expanded ones.

    What lies between the elements is NaN, so that whoever reads it shows it.
    """
    kind, _, rest = layout.partition("_")
    axes, _, order = rest.partition("_")
    if kind == "contiguous":
        return values.clone(memory_format=torch.contiguous_format)
    if kind == "channels":
        return values.clone(memory_format=torch.channels_last)
    if kind == "permuted":
        return values.permute(3, 0, 2, 1).clone(memory_format=torch.contiguous_format).permute(1, 3, 2, 0)
    if kind == "shifted":  # by one element: no address is a multiple of anything
        plain = lay(values, "channels_last" if rest else "contiguous")
        buffer = torch.full((values.numel() + 1,), math.nan, dtype=values.dtype)
        return buffer[1:].as_strided(plain.shape, plain.stride()).copy_(values)
    if kind == "expanded":
        chosen = ["nchw".index(axis) for axis in axes]
        single = [slice(0, 1) if i in chosen else slice(None) for i in range(4)]
        return values[tuple(single)].clone().expand(values.shape)
    room = list(values.shape)
    if kind == "stepped":
        room[1] *= 2
        buffer = torch.full(room, math.nan, dtype=values.dtype)
        view = buffer[:, ::2]
    else:
        axis = "nchw".index(axes)
        room[axis] += 3
        buffer = torch.full(room, math.nan, dtype=values.dtype)
        if order:
            buffer = buffer.contiguous(memory_format=torch.channels_last)
        view = buffer.narrow(axis, 2, values.shape[axis])
    return view.copy_(values)


def lay_small(values: Tensor, strided: bool) -> Tensor:
    """A small tensor as it is, or with a NaN behind every element."""
    if not strided:
        return values
    return torch.stack([values, torch.full_like(values, math.nan)], dim=-1)[..., 0]


def here(tensor: Tensor) -> Tensor:
    """On the device under test: the default one, which the fixture `backend` sets."""
    return tensor.to(torch.get_default_device())


def random(generator: torch.Generator, *shape: int) -> Tensor:
    """Normal numbers; drawn on the CPU, so that they are the same on every device."""
    return here(torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu"))


# ---- the gate ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GateCase:
    """One call of sparta_gate and of its backward pass. Hypothesis prints it; `inputs` makes the tensors."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    small_dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None]  # spatial, channel, kernel
    share: int = 1
    layout: str = "contiguous"
    gradient_layout: str = "contiguous"
    strided: bool = False  # the small tensors
    logit: float = 2.0  # how large z is: phi is everything from 0 to 1 at 2, and 0 or 1 at 100
    seed: int = 0

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x (with zeros of both signs), spatial, channel, kernel."""
        n, c, h, w = self.shape
        generator = torch.Generator().manual_seed(self.seed)
        x = random(generator, *self.shape)
        x.view(-1)[1::7] = 0.0
        x.view(-1)[4::7] = -0.0
        spatial = self.logit * random(generator, n, 1, -(-h // self.share), -(-w // self.share))
        channel, kernel = random(generator, n, c), random(generator, n)
        spatial_dtype, channel_dtype, kernel_dtype = self.small_dtypes
        return (
            lay(x.to(self.dtype), self.layout),
            lay_small(spatial.to(spatial_dtype), self.strided),
            lay_small(channel.to(channel_dtype), self.strided),
            None if kernel_dtype is None else lay_small(kernel.to(kernel_dtype), self.strided),
        )

    def gradient(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        return lay(random(generator, *self.shape).to(self.dtype), self.gradient_layout)


@st.composite
def gate_cases(draw: st.DrawFn) -> GateCase:
    """Extents around the registers' widths (4, 8, 16), 1 and 0; every dtype, layout, share."""
    extents = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 0])
    channels = st.sampled_from([1, 2, 3, 5, 8, 15, 16, 17, 33, 0])
    size = draw(st.one_of(st.tuples(extents, extents), st.sampled_from([(1, 1), (7, 7), (1, 17), (33, 1)])))
    floats = st.sampled_from(FLOATS)
    return GateCase(
        shape=(draw(st.sampled_from([1, 2, 3, 0])), draw(channels), *size),
        dtype=draw(floats),
        small_dtypes=(draw(floats), draw(floats), draw(st.one_of(floats, st.none()))),
        share=draw(st.sampled_from([1, 2, 3, 16])),
        layout=draw(st.sampled_from(LAYOUTS)),
        gradient_layout=draw(st.sampled_from(LAYOUTS)),
        strided=draw(st.booleans()),
        logit=draw(st.sampled_from([2.0, 10.0, 100.0])),
        seed=draw(st.integers(0, 2**16)),
    )


def to_double(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def magnitudes(tensors: Sequence[Tensor | None], gy: Tensor, share: int) -> list[Tensor]:
    """For y, gx, gspatial, gchannel, gkernel: what their terms add up to in size, rounding's yardstick.

    With the factor 1 - phi left out (it is rounded as a number near 1, not as a small one), and with what a
    rounding of z does to phi added: |z| * phi * (1 - phi).
    """
    x, spatial, channel, kernel = to_double(tensors)
    assert x is not None
    assert spatial is not None
    assert channel is not None
    scale = spatial if kernel is None else spatial * kernel[:, None, None, None]
    s = gating.spread(scale, share, x.shape[2], x.shape[3])
    z = s * channel[:, :, None, None]
    phi = torch.sigmoid(z) * (1 + z.abs() * torch.sigmoid(-z))
    y = torch.relu(x) * phi
    gx = gy.double().abs() * phi
    gz = gy.double().abs() * y
    gs = gating.gather((gz * channel.abs()[:, :, None, None]).sum(1, keepdim=True), share)
    gchannel = (gz * s.abs()).sum((2, 3))
    gspatial = gs if kernel is None else gs * kernel.abs()[:, None, None, None]
    return [y, gx, gspatial, gchannel, (gs * spatial.abs()).sum((1, 2, 3))]


# ---- dynamic_conv ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConvCase:
    """One call of dynamic_conv and of its backward pass."""

    shape: tuple[int, int, int]  # N, H, W
    size: int
    dtype: torch.dtype
    kernel_dtype: torch.dtype
    layout: str = "contiguous"
    gradient_layout: str = "contiguous"
    strided: bool = False
    seed: int = 0

    def inputs(self) -> tuple[Tensor, Tensor]:
        """spatial, kernel"""
        n, h, w = self.shape
        generator = torch.Generator().manual_seed(self.seed)
        spatial, kernel = random(generator, n, 1, h, w), random(generator, n, self.size, self.size)
        return lay(spatial.to(self.dtype), self.layout), lay_small(kernel.to(self.kernel_dtype), self.strided)

    def gradient(self) -> Tensor:
        n, h, w = self.shape
        generator = torch.Generator().manual_seed(self.seed + 1)
        return lay(random(generator, n, 1, h, w).to(self.dtype), self.gradient_layout)


@st.composite
def conv_cases(draw: st.DrawFn) -> ConvCase:
    extents = st.sampled_from([1, 2, 3, 4, 7, 8, 16, 17, 0])
    layouts = st.sampled_from(LAYOUTS)
    return ConvCase(
        shape=(draw(st.sampled_from([1, 2, 3, 0])), draw(extents), draw(extents)),
        size=draw(st.sampled_from([3, 1, 5, 7])),  # also wider than the map
        dtype=draw(st.sampled_from(FLOATS)),
        kernel_dtype=draw(st.sampled_from(FLOATS)),
        layout=draw(layouts),
        gradient_layout=draw(layouts),
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


# ---- the rule ----------------------------------------------------------------------------------------------

# What one rounding of the arithmetic may cost. For 16-bit images the sigmoid may err by 2^-14 (a polynomial
# and the processor's quick reciprocal): a quarter of float16's rounding, but seen in a float32 gradient.
_UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-16, torch.float16: 2.0**-16}


def assert_near(
    got: Tensor, exact: Tensor, yardstick: Tensor, magnitude: Tensor, image_dtype: torch.dtype, name: str
) -> None:
    """Largest error <= 2 x (largest error of plain torch) + atol.

    Plain torch, the yardstick, is the reference on the same tensors: it computes in float32 (or float64) and
    rounds once, so for 16-bit tensors this asks for more than an expression in bfloat16 would. Twice, because
    another order of operations is another sample of the same rounding errors. atol covers the case where
    torch's few roundings cancel by luck: eight roundings of the arithmetic, on the terms' magnitude, and one
    of the result.

    Args:
        got: what is tested, of any dtype.
        exact: the reference in float64.
        yardstick: the reference in the dtypes of the test.
        magnitude: at least |exact|, and for a sum the sum of its terms' magnitudes.
        image_dtype: which arithmetic is used.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    assert got.dtype == yardstick.dtype, f"{name}: {got.dtype}, expected {yardstick.dtype}"
    if got.numel() == 0:
        return
    error = (got.double() - exact).abs().max()
    torchs = (yardstick.double() - exact).abs().max()
    finfo = torch.finfo(got.dtype)
    result = max(finfo.eps / 2 * exact.abs().max(), finfo.tiny)
    limit = 2 * torchs + 8 * _UNIT[image_dtype] * magnitude.max() + result
    assert error <= limit, f"{name}: error {error:.3g}, above {limit:.3g}; plain torch's is {torchs:.3g}"


def assert_same_bits(got: Tensor, expected: Tensor, name: str = "") -> None:
    """Equal bit for bit; any two NaNs are equal."""
    assert got.shape == expected.shape, name
    assert got.dtype == expected.dtype, name
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[got.element_size()]
    same = got.contiguous().view(integer) == expected.contiguous().view(integer)
    same |= got.isnan() & expected.isnan()
    where = (~same).nonzero()
    assert not len(where), f"{name}: {len(where)} of {same.numel()} elements differ, the first at {where[0].tolist()}"
