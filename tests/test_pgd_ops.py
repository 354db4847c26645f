"""pgd_step_ and pgd_start_: bit for bit the reference, on every backend and instruction set."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from cases import FLOATS, LAYOUTS, assert_same_bits, here, lay, random
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparta_kernels import pgd_start_, pgd_step_, reference
from sparta_kernels.backends import extension

NAN, INF = math.nan, math.inf
WRITABLE = tuple(layout for layout in LAYOUTS if not layout.startswith("expanded"))
SHAPES = [(2, 3, 5, 7), (1, 1, 1, 1), (3, 1, 4, 4), (2, 17, 1, 3), (0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)]


def images(seed: int, shape: tuple[int, ...], dtype: torch.dtype, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """adv (some of it on the edge of the ball, some past it, and of the range), grad (with zeros), clean."""
    generator = torch.Generator().manual_seed(seed)
    clean = here(torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu"))
    clean.view(-1)[::5] = clean.view(-1)[::5].round()
    offset = random(generator, *shape) * eps
    offset.view(-1)[::3] = eps * offset.view(-1)[::3].sign()
    grad = random(generator, *shape) * 10.0 ** here(torch.randint(-30, 3, shape, generator=generator, device="cpu"))
    grad.view(-1)[::4] = 0.0
    grad.view(-1)[2::8] = -0.0
    return (clean + offset).to(dtype), grad.to(dtype), clean.to(dtype)


# ---- the step ----------------------------------------------------------------------------------------------


@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(FLOATS),
    layouts=st.tuples(st.sampled_from(WRITABLE), st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    step=st.sampled_from([1 / 255, 0.1, 0.0, 3.0]),
    eps=st.sampled_from([16 / 255, 0.3, 0.0, 1e9]),
    bounds=st.sampled_from([(0.0, 1.0), (-1.7, 2.3), (0.25, 0.25), (-1e9, 1e9)]),
    targeted=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_step_is_the_reference(backend, shape, dtype, layouts, step, eps, bounds, targeted, seed):
    adv, grad, clean = (lay(t, how) for t, how in zip(images(seed, shape, dtype, eps), layouts, strict=True))
    want = reference.pgd_step(adv, grad, clean, step, eps, *bounds, targeted)
    kept = grad.clone(), clean.clone()
    assert pgd_step_(adv, grad, clean, step, eps, *bounds, targeted, backend=backend) is adv
    assert_same_bits(adv, want)
    assert_same_bits(grad, kept[0], "grad")
    assert_same_bits(clean, kept[1], "clean")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("targeted", [True, False])
def test_step_of_special_values(backend, dtype, targeted):
    """Every combination of NaN, inf, zeros of both signs, ties and corners."""
    values = [NAN, INF, -INF, 0.0, -0.0, 0.25, 0.75, 1.0, -0.5, torch.finfo(dtype).tiny]
    adv, grad, clean = torch.tensor(list(itertools.product(values, repeat=3)), dtype=dtype).T
    for count in (adv.numel(), 3, 1):
        a, g, c = (t[:count].clone().view(1, 1, 1, -1) for t in (adv, grad, clean))
        want = reference.pgd_step(a, g, c, 0.25, 0.5, targeted=targeted)
        pgd_step_(a, g, c, 0.25, 0.5, targeted=targeted, backend=backend)
        assert_same_bits(a, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_that_is_nan_of_any_payload_moves_nothing(backend, dtype):
    integer = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    quiet = torch.tensor([NAN], dtype=dtype).view(integer).item()
    grad = torch.tensor([-1, quiet, quiet + 1, quiet - 1, -2], dtype=integer).view(dtype).view(1, 1, 1, -1)
    assert grad.isnan().all()
    adv = torch.full_like(grad, 0.5)
    pgd_step_(adv, grad, torch.full_like(grad, 0.25), 0.1, 1.0, backend=backend)
    assert (adv == 0.5).all()


def test_step_has_torchattacks_order_of_operations(backend):
    """The offset is clamped, and added to clean again.

    Clamping the pixel between clean - eps and clean + eps is the same on paper, and rounds otherwise.
    """
    adv, grad, clean = images(3, (4, 3, 32, 32), torch.float32, 8 / 255)
    want = reference.pgd_step(adv, grad, clean, 2 / 255, 8 / 255)
    step, eps = np.float32(2 / 255), np.float32(8 / 255)
    other = (adv - step * grad.sign()).clamp(clean - eps, clean + eps).clamp(0, 1)
    assert (want != other).any(), "the case cannot tell"
    torch.testing.assert_close(want, other, rtol=0, atol=1e-6)
    pgd_step_(adv, grad, clean, 2 / 255, 8 / 255, backend=backend)
    assert_same_bits(adv, want)


def test_the_range_has_the_last_word(backend):
    """Where no allowed pixel lies in the ball, the nearest allowed one is taken."""
    clean = torch.tensor([-3.0, 3.0, 0.5, 2.0]).view(1, 1, 1, 4)
    adv = clean.clone()
    pgd_step_(adv, torch.zeros_like(adv), clean, 0.1, 0.1, backend=backend)
    assert adv.flatten().tolist() == [0.0, 1.0, 0.5, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fifty_steps_in_place_are_fifty_steps_of_the_reference(backend, dtype):
    adv, _, clean = images(4, (2, 3, 8, 8), dtype, 0.01)
    want, generator = adv.clone(), torch.Generator().manual_seed(9)
    for _ in range(50):
        grad = random(generator, 2, 3, 8, 8).to(dtype)
        want = reference.pgd_step(want, grad, clean, 1 / 255, 16 / 255)
        pgd_step_(adv, grad, clean, 1 / 255, 16 / 255, backend=backend)
    assert_same_bits(adv, want)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced_w"])
def test_step_for_any_number_of_threads(backend, layout):
    tensors = images(5, (8, 3, 64, 64), torch.float32, 8 / 255)
    want = reference.pgd_step(*tensors, 2 / 255, 8 / 255)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        adv, grad, clean = (lay(t, layout) for t in tensors)
        pgd_step_(adv, grad, clean, 2 / 255, 8 / 255, backend=backend)
        assert_same_bits(adv, want, f"{threads} threads")


@pytest.mark.parametrize("layout", ["contiguous", "sliced_w", "sliced_c_channels_last", "stepped"])
def test_nothing_beside_a_sliced_adv_is_written(backend, layout):
    adv, grad, clean = images(6, (2, 3, 5, 7), torch.float32, 0.1)
    adv = lay(adv, layout)
    whole = torch.as_strided(adv, (adv.untyped_storage().nbytes() // 4,), (1,), 0)
    before = whole.clone()
    pgd_step_(adv, grad, clean, 0.1, 0.1, backend=backend)
    pgd_start_(adv, clean, torch.arange(2), 0.1, backend=backend)
    outside = torch.ones_like(whole, dtype=torch.bool)
    torch.as_strided(outside, adv.shape, adv.stride(), adv.storage_offset()).fill_(False)
    assert_same_bits(whole[outside], before[outside])


def test_adv_may_be_clean_itself(backend):
    """A first step from the clean image, and a start, without a copy."""
    adv, grad, clean = images(7, (2, 3, 5, 7), torch.float32, 0.0)
    want = reference.pgd_step(clean, grad, clean, 0.1, 0.2)
    adv = clean.clone()
    pgd_step_(adv, grad, adv, 0.1, 0.2, backend=backend)
    assert_same_bits(adv, want)
    adv = clean.clone()
    pgd_start_(adv, adv, torch.arange(2), 0.2, backend=backend)
    assert_same_bits(adv, reference.pgd_start(clean, torch.arange(2), eps=0.2))


def test_autograd_notices_the_writes():
    adv, grad, clean = images(8, (2, 3, 4, 4), torch.float32, 0.1)
    for write in (
        lambda backend: pgd_step_(adv, grad, clean, 0.1, 0.1, backend=backend),
        lambda backend: pgd_start_(adv, clean, torch.arange(2), 0.1, backend=backend),
    ):
        for backend in ("reference", "native"):
            version = adv._version
            write(backend)
            assert adv._version > version
    weight = torch.ones(2, 3, 4, 4, requires_grad=True)
    loss = (weight * adv).sum()
    pgd_step_(adv, grad, clean, 0.1, 0.1, backend="native")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- Philox ------------------------------------------------------------------------------------------------

# The known answers that Random123 publishes (tests/kat_vectors, philox4x32 with 10 rounds).
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, answer):
    assert extension.kernels.philox4x32(counter, key) == answer


@given(st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6))
def test_philox_is_the_reference(words):
    want = reference.philox4x32(torch.tensor(words[:4]), torch.tensor(words[4:]))
    assert extension.kernels.philox4x32(words[:4], words[4:]) == want.tolist()


# ---- the start ---------------------------------------------------------------------------------------------


@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(FLOATS),
    layouts=st.tuples(st.sampled_from(WRITABLE), st.sampled_from(LAYOUTS)),
    eps=st.sampled_from([16 / 255, 0.0, 3.0]),
    bounds=st.sampled_from([(0.0, 1.0), (-1.7, 2.3), (-1e9, 1e9)]),
    first=st.sampled_from([0, 1, 2**31 - 1, 2**32 - 1, 2**32, 2**40 + 5, 2**63 - 4]),
    seed=st.sampled_from([0, 1, 2**32 - 1, 2**32, 2**40 + 7, 2**63 - 1]),
    restart=st.sampled_from([0, 1, 2**24 - 1]),
)
def test_start_is_the_reference(backend, shape, dtype, layouts, eps, bounds, first, seed, restart):
    _, _, clean = images(1, shape, dtype, eps)
    indices = first + torch.arange(shape[0])
    adv, clean = lay(torch.full_like(clean, NAN), layouts[0]), lay(clean, layouts[1])
    want = reference.pgd_start(clean, indices, eps=eps, seed=seed, restart=restart, lower=bounds[0], upper=bounds[1])
    options = {"seed": seed, "restart": restart, "lower": bounds[0], "upper": bounds[1], "backend": backend}
    assert pgd_start_(adv, clean, indices, eps, **options) is adv
    assert_same_bits(adv, want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced_c"])
def test_start_belongs_to_the_image(backend, dtype, layout):
    """Not to its place in the batch, the batch, the memory format or the number of threads."""
    _, _, clean = images(2, (9, 3, 37, 41), dtype, 0.0)
    indices = torch.tensor([5, 0, 7, 2**33, 1, 8, 3, 2**32 + 5, 6])
    whole = reference.pgd_start(clean, indices, eps=0.1, seed=3)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        order = torch.tensor([4, 1, 8, 0, 2, 6, 3, 7, 5])
        adv = lay(torch.empty_like(clean), layout)
        pgd_start_(adv, lay(clean[order], layout), indices[order], 0.1, seed=3, backend=backend)
        assert_same_bits(adv, whole[order])
    one = torch.empty_like(clean[4:5])
    pgd_start_(one, clean[4:5], indices[4:5], 0.1, seed=3, backend=backend)
    assert_same_bits(one, whole[4:5])


def test_start_takes_any_stride_of_indices(backend):
    clean = torch.full((3, 1, 4, 4), 0.5)
    indices = torch.arange(6)[::2]
    adv = pgd_start_(torch.empty_like(clean), clean, indices, 0.3, backend=backend)
    assert_same_bits(adv, reference.pgd_start(clean, torch.tensor([0, 2, 4]), eps=0.3))


def test_seeds_indices_and_restarts_give_other_noise(backend):
    clean = torch.full((1, 3, 16, 16), 0.5)

    def start(index: int = 0, **options: int) -> Tensor:
        return pgd_start_(torch.empty_like(clean), clean, torch.tensor([index]), 0.3, backend=backend, **options)

    starts = [start(), start(1), start(2**32), start(seed=1), start(seed=2**32), start(restart=1)]
    for a, b in itertools.combinations(starts, 2):
        assert (a == b).float().mean() < 0.01


def test_start_would_differ_with_a_fused_multiply_add(backend):
    """(2u - 1) * eps rounded and then added, and not the two at once."""
    clean, indices, eps = images(3, (4, 3, 32, 32), torch.float32, 0.0)[2], torch.arange(4), 8 / 255
    u = reference.uniform(0, indices, 3 * 32 * 32, reference.PURPOSE_START).view(clean.shape)
    radius = np.float64(np.float32(eps))
    fused = (clean.double() + (2 * u.double() - 1) * radius).float().clamp(0, 1)  # exact, then rounded once
    want = reference.pgd_start(clean, indices, eps=eps)
    assert (want != fused).any(), "the case cannot tell"
    adv = pgd_start_(torch.empty_like(clean), clean, indices, eps, backend=backend)
    assert_same_bits(adv, want)


@pytest.mark.parametrize("value", [NAN, INF, -INF, -0.0])
def test_start_of_special_values(backend, value):
    clean = torch.full((2, 3, 5, 5), value)
    adv = pgd_start_(torch.zeros_like(clean), clean, torch.arange(2), 0.3, backend=backend)
    assert_same_bits(adv, reference.pgd_start(clean, torch.arange(2), eps=0.3))


# ---- more than 2^31 elements -------------------------------------------------------------------------------


@pytest.mark.slow
def test_step_of_more_than_2_to_the_31_elements(large_zeros):
    shape = (33, 64, 1024, 1024)
    grad = large_zeros(*shape, dtype=torch.bfloat16, outputs=1)
    clean = large_zeros(*shape, dtype=torch.bfloat16, outputs=1)
    adv = large_zeros(*shape, dtype=torch.bfloat16, outputs=1)
    assert adv.numel() > 2**31
    corner = (32, 63, slice(1000, 1024))
    adv[corner], grad[corner], clean[corner] = images(9, (24, 1024), torch.bfloat16, 0.1)
    want = reference.pgd_step(adv[corner], grad[corner], clean[corner], 0.25, 0.5)
    grad[0, 0, 0, 0] = -1.0
    pgd_step_(adv, grad, clean, 0.25, 0.5, backend="native")
    assert_same_bits(adv[corner], want)
    assert adv[0, 0, 0, 0] == 0.25
    assert adv[32, 62].count_nonzero() == 0
