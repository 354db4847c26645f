"""The reference against loops, Python integers, NumPy and autograd: things that share no line with it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparta_kernels import reference

SHAPES = [(2, 3, 4, 4), (1, 1, 1, 1), (3, 2, 5, 7), (2, 1, 1, 6), (1, 5, 3, 1), (0, 3, 5, 4)]


def blocks(extent: int, share: int) -> int:
    return -(-extent // share)


def gate_inputs(
    shape: tuple[int, int, int, int], share: int = 1, kernel: bool = True, dtype: torch.dtype = torch.float64
) -> list[Tensor | None]:
    """x (with exact zeros), spatial, channel, kernel: all leaves that require a gradient."""
    n, c, h, w = shape
    generator = torch.Generator().manual_seed(h * 1000 + w * 100 + share)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    x = draw(*shape)
    x[torch.rand(shape, generator=generator) < 0.1] = 0.0
    small = [draw(n, 1, blocks(h, share), blocks(w, share)), draw(n, c), draw(n) if kernel else None]
    return [None if t is None else t.to(dtype).requires_grad_() for t in (x, *small)]


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


# ---- the gate ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("share", [1, 2, 3, 9])
@pytest.mark.parametrize("shape", SHAPES)
def test_gate_is_the_equation_element_by_element(shape, share, kernel):
    x, spatial, channel, scale = gate_inputs(shape, share, kernel)
    y = reference.gate(x, spatial, channel, scale, share)
    want = torch.empty(shape, dtype=torch.float64)
    for n, c, h, w in itertools.product(*map(range, shape)):
        s = spatial[n, 0, h // share, w // share].item() * (scale[n].item() if kernel else 1.0)
        want[n, c, h, w] = max(x[n, c, h, w].item(), 0.0) * sigmoid(s * channel[n, c].item())
    torch.testing.assert_close(y, want, rtol=1e-13, atol=1e-14)


def test_gate_of_special_values():
    nan, inf = math.nan, math.inf
    x = torch.tensor([nan, inf, -inf, 0.0, -0.0, 2.0, -2.0]).view(1, 1, 1, 7)
    y = reference.gate(x, torch.zeros(1, 1, 1, 7), torch.ones(1, 1)).flatten()
    torch.testing.assert_close(y, torch.tensor([nan, inf, 0.0, 0.0, 0.0, 1.0, 0.0]), equal_nan=True)
    # A nan in the attention is not hidden by a negative x.
    y = reference.gate(x, torch.full((1, 1, 1, 7), nan), torch.ones(1, 1))
    assert y.isnan().all()


@pytest.mark.parametrize("small", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gate_in_low_precision_rounds_once(dtype, small):
    exact = gate_inputs((3, 4, 5, 6), share=2)
    x = exact[0].detach().to(dtype)
    spatial, channel, kernel = (t.detach().to(small) for t in exact[1:])
    y = reference.gate(x, spatial, channel, kernel, 2)
    assert y.dtype == dtype
    want = reference.gate(x.double(), spatial.double(), channel.double(), kernel.double(), 2)
    # Half a unit in the last place of the result, and a few of float32 on the way.
    unit = torch.finfo(dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps
    assert ((y.double() - want).abs() <= unit * want.abs()).all()


def test_gate_gradients_come_back_in_each_inputs_dtype():
    dtypes = (torch.bfloat16, torch.float32, torch.float64, torch.float16)
    leaves = [t.detach().to(d).requires_grad_() for t, d in zip(gate_inputs((2, 3, 4, 5)), dtypes, strict=True)]
    y = reference.gate(*leaves)
    grads = torch.autograd.grad(y.sum(), leaves)
    assert tuple(g.dtype for g in grads) == dtypes
    by_rule = reference.gate_backward(torch.ones_like(y), *leaves)
    assert tuple(g.dtype for g in by_rule) == dtypes
    for got, want in zip(by_rule, grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "sliced": lambda t: F.pad(t, (1, 2, 1, 1))[:, :, 1:-1, 1:-2],
    "expanded": lambda t: t[:, :, :1, :1].expand_as(t),
}


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("share", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gate_backward_equals_autograd(shape, layout, share, kernel):
    leaves = gate_inputs(shape, share, kernel)
    x = LAYOUTS[layout](leaves[0].detach()).requires_grad_()
    gy = LAYOUTS[layout](torch.linspace(-1, 2, x.numel(), dtype=torch.float64).view(shape))
    given = [x, *leaves[1:]]
    wanted = [t for t in given if t is not None]
    want = torch.autograd.grad(reference.gate(*given, share=share), wanted, gy)
    got = reference.gate_backward(gy, *given, share=share)
    assert (got[3] is None) == (not kernel)
    for g, w, leaf in zip([g for g in got if g is not None], want, wanted, strict=True):
        assert g.shape == leaf.shape
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-13)


def test_gate_backward_by_finite_differences():
    """Independent of autograd: the derivative of sum(weights * y) along a random direction of every input."""
    leaves = [t.detach() for t in gate_inputs((2, 3, 5, 4), share=2)]
    leaves[0][leaves[0].abs() < 1e-3] = 0.5  # away from the kink
    weights = torch.linspace(-1, 1, leaves[0].numel(), dtype=torch.float64).view_as(leaves[0])
    grads = reference.gate_backward(weights, *leaves, share=2)
    for position, grad in enumerate(grads):
        direction = torch.sin(torch.arange(grad.numel(), dtype=torch.float64) * 1.7).view_as(grad)
        ends = []
        for sign in (-1, 1):
            moved = list(leaves)
            moved[position] = leaves[position] + sign * 1e-6 * direction
            ends.append((reference.gate(*moved, share=2) * weights).sum())
        torch.testing.assert_close((grad * direction).sum(), (ends[1] - ends[0]) / 2e-6, rtol=1e-6, atol=1e-8)


def test_gate_backward_at_special_values_equals_autograd():
    nan, inf = math.nan, math.inf
    x = torch.tensor([nan, inf, -inf, 0.0, -0.0, 2.0, -2.0, -2.0], dtype=torch.float64).view(1, 1, 2, 4)
    spatial = torch.full((1, 1, 2, 4), 0.3, dtype=torch.float64)
    spatial[0, 0, 1, 3] = nan
    gy = torch.tensor([1.0, 1.0, inf, inf, 1.0, nan, nan, 1.0], dtype=torch.float64).view(1, 1, 2, 4)
    given = [
        x,
        spatial,
        torch.full((1, 1), 0.7, dtype=torch.float64),
        torch.full((1,), 1.1, dtype=torch.float64),
    ]
    given = [t.requires_grad_() for t in given]
    want = torch.autograd.grad(reference.gate(*given), given, gy)
    got = reference.gate_backward(gy, *given)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, equal_nan=True)
    # Nothing comes through where x <= 0, whatever gy and phi are; a nan in x lets the gradient through.
    assert (got[0].flatten()[[2, 3, 4, 6, 7]] == 0).all()
    assert 0 < got[0].flatten()[0] < 1


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("share", [1, 2])
def test_gate_backward_is_the_rule_for_double_backward(share, kernel):
    given = gate_inputs((2, 3, 3, 5), share, kernel)
    leaves = [t for t in given if t is not None]
    gy = torch.cos(torch.arange(90, dtype=torch.float64)).view(2, 3, 3, 5).requires_grad_()
    twice = torch.autograd.grad(reference.gate(*given, share=share), leaves, gy, create_graph=True)
    rule = [g for g in reference.gate_backward(gy, *given, share=share) if g is not None]
    weights = [torch.sin(torch.arange(g.numel(), dtype=torch.float64)).view_as(g) for g in rule]
    want = torch.autograd.grad(sum((g * v).sum() for g, v in zip(twice, weights, strict=True)), [gy, *leaves])
    got = torch.autograd.grad(sum((g * v).sum() for g, v in zip(rule, weights, strict=True)), [gy, *leaves])
    for g, w in zip(got, want, strict=True):
        assert w.abs().max() > 0
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-12)


# ---- Conv5 and the attention network -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (1, 1, 1, 1), (3, 1, 1, 7), (0, 1, 4, 4)])
def test_dynamic_conv_is_a_convolution_for_every_sample(shape, size):
    spatial = torch.sin(torch.arange(math.prod(shape), dtype=torch.float64)).view(shape)
    kernel = torch.cos(torch.arange(shape[0] * size * size, dtype=torch.float64)).view(-1, size, size)
    got = reference.dynamic_conv(spatial, kernel)
    assert got.shape == shape
    for n in range(shape[0]):
        want = F.conv2d(spatial[n : n + 1], kernel[n][None, None], padding=size // 2)
        torch.testing.assert_close(got[n : n + 1], want, rtol=1e-12, atol=1e-13)


def test_dynamic_conv_is_not_flipped_and_keeps_the_dtype_of_spatial():
    spatial = torch.zeros(1, 1, 3, 3, dtype=torch.bfloat16)
    spatial[0, 0, 1, 1] = 1
    kernel = torch.arange(9.0).view(1, 3, 3)
    got = reference.dynamic_conv(spatial, kernel)
    assert got.dtype == torch.bfloat16
    assert got[0, 0].tolist() == [[8, 7, 6], [5, 4, 3], [2, 1, 0]]


def parameters(c: int, hidden: int, size: int, dynamic: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(size + dynamic)

    def draw(*shape: int) -> Tensor:  # small enough to keep the sigmoid away from its flat ends
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / math.sqrt(2 * size * size)

    found: dict[str, Tensor] = {}
    convs = {"conv1": (hidden, c), "conv2": (c, hidden), "conv3": (hidden, c), "conv4": (1, hidden)}
    norms = ["bn1", "bn3"]
    if dynamic:
        convs["conv6"] = (hidden, hidden)
        norms.append("bn6")
        found["predict.weight"], found["predict.bias"] = draw(size * size, hidden), draw(size * size)
    else:
        found["conv5"] = draw(size, size)
    for name, (rows, columns) in convs.items():
        found[f"{name}.weight"], found[f"{name}.bias"] = draw(rows, columns, size, size), draw(rows)
    for name in norms:
        found[f"{name}.weight"], found[f"{name}.bias"] = draw(hidden), draw(hidden)
        found[f"{name}.running_mean"], found[f"{name}.running_var"] = draw(hidden), draw(hidden).abs() + 0.1
    return found


def numpy_attention(
    x: np.ndarray, p: dict[str, np.ndarray], size: int, dynamic: bool, training: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """DSCANet with explicit windows in NumPy."""

    def conv(name: str, value: np.ndarray) -> np.ndarray:
        pad = size // 2
        padded = np.pad(value, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(2, 3))
        return np.einsum("nchwij,ocij->nohw", windows, p[f"{name}.weight"]) + p[f"{name}.bias"][:, None, None]

    def norm(name: str, v: np.ndarray) -> np.ndarray:
        mean = v.mean((0, 2, 3)) if training else p[f"{name}.running_mean"]
        var = v.var((0, 2, 3)) if training else p[f"{name}.running_var"]
        scale = p[f"{name}.weight"] / np.sqrt(var + 1e-5)
        return (v - mean[:, None, None]) * scale[:, None, None] + p[f"{name}.bias"][:, None, None]

    # conv2 before the mean at every size: at size 1 the two orders are the same function.
    channel = conv("conv2", np.maximum(norm("bn1", conv("conv1", x)), 0)).mean((2, 3))
    h3 = np.maximum(norm("bn3", conv("conv3", x)), 0)
    if dynamic:
        pooled = np.maximum(norm("bn6", conv("conv6", h3)), 0).mean((2, 3))
        kernel = pooled @ p["predict.weight"].T + p["predict.bias"]
    else:
        kernel = np.repeat(p["conv5"].reshape(1, -1), len(x), axis=0)
    return conv("conv4", h3), channel, kernel


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("share", [1, 2, 4])
def test_attention_and_sparta_against_numpy(size, dynamic, training, share):
    x = torch.sin(torch.arange(2 * 3 * 5 * 6, dtype=torch.float64) * 1.3).view(2, 3, 5, 6)
    given = parameters(3, 4, size, dynamic)
    before = {name: value.clone() for name, value in given.items()}
    spatial, channel, kernel = reference.attention(x, given, kernel_size=size, dynamic=dynamic, training=training)
    arrays = {name: value.numpy() for name, value in given.items()}
    a, c, k = numpy_attention(x.numpy(), arrays, size, dynamic, training)
    np.testing.assert_allclose(spatial.numpy(), a, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(channel.numpy(), c, rtol=1e-10, atol=1e-12)
    assert kernel.shape == ((2,) if size == 1 else (2, 3, 3))
    np.testing.assert_allclose(kernel.reshape(2, -1).numpy(), k, rtol=1e-10, atol=1e-12)

    padded = np.pad(a, ((0, 0), (0, 0), (size // 2,) * 2, (size // 2,) * 2))
    want = np.empty(x.shape)
    s = np.empty((2, 5, 6))
    for n, h, w in np.ndindex(2, 5, 6):
        s[n, h, w] = (padded[n, 0, h : h + size, w : w + size] * k[n].reshape(size, size)).sum()
    for n, ch, h, w in np.ndindex(2, 3, 5, 6):
        rows, columns = (slice(v // share * share, v // share * share + share) for v in (h, w))
        want[n, ch, h, w] = max(x[n, ch, h, w].item(), 0) * sigmoid(s[n, rows, columns].mean() * c[n, ch])
    got = reference.sparta(x, given, kernel_size=size, dynamic=dynamic, share=share, training=training)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(given[name], before[name]) for name in before), "the parameters were written"


# ---- Philox ------------------------------------------------------------------------------------------------


def python_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    """Philox4x32-10 in Python's integers, which cannot overflow."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


# The known answers of Random123 (kat_vectors, philox 4 32 10).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, answer):
    assert reference.philox4x32(torch.tensor(counter), torch.tensor(key)).tolist() == list(answer)
    assert python_philox(counter, key) == list(answer)


def test_philox_on_many_counters_at_once():
    numbers = torch.randint(0, 2**32, (7, 5, 6), generator=torch.Generator().manual_seed(1))
    got = reference.philox4x32(numbers[..., :4], numbers[..., 4:])
    for i, j in itertools.product(range(7), range(5)):
        words = numbers[i, j].tolist()
        assert got[i, j].tolist() == python_philox(tuple(words[:4]), tuple(words[4:]))


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3, 2**64 - 1])
@pytest.mark.parametrize(("purpose", "restart"), [(0, 0), (1, 0), (2, 5), (0, 2**24 - 1)])
def test_uniform_is_keyed_by_seed_index_element_purpose_and_restart(seed, purpose, restart):
    indices = torch.tensor([0, 3, 2**32 + 3, 2**62 + 1])
    got = reference.uniform(seed, indices, 6, purpose, restart)
    assert got.dtype == torch.float32
    assert got.shape == (4, 6)
    key = (seed % 2**32, seed // 2**32)
    for row, index in enumerate(indices.tolist()):
        for element in range(6):
            counter = (element // 4, purpose + 256 * restart, index % 2**32, index // 2**32)
            assert got[row, element].item() == (python_philox(counter, key)[element % 4] >> 8) / 2**24


def test_uniform_belongs_to_the_image_and_not_to_its_place():
    indices = torch.arange(50)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    whole = reference.uniform(11, indices, 33, reference.PURPOSE_START)
    assert torch.equal(reference.uniform(11, indices[order], 33, reference.PURPOSE_START), whole[order])
    assert torch.equal(reference.uniform(11, indices[20:23], 33, reference.PURPOSE_START), whole[20:23])
    assert torch.equal(reference.uniform(11, indices, 7, reference.PURPOSE_START), whole[:, :7])
    assert reference.uniform(11, indices[:0], 33, 0).shape == (0, 33)


def test_uniform_streams_differ():
    indices = torch.arange(4)
    streams = [
        reference.uniform(seed, indices + shift, 64, purpose, restart)
        for seed, shift, purpose, restart in itertools.product((0, 1, 2**32), (0, 4, 2**32), (0, 1, 2), (0, 1))
    ]
    assert len({tuple(row) for stream in streams for row in stream.tolist()}) == len(streams) * 4


def chi_square(counts: np.ndarray) -> float:
    """Standardised: (chi2 - dof) / sqrt(2 dof), about normal. The draws are fixed: 4 never flickers."""
    expected = counts.sum() / len(counts)
    dof = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - dof) / math.sqrt(2 * dof))


def test_uniform_is_uniform():
    u = reference.uniform(5, torch.arange(400), 1000, reference.PURPOSE_START).double()
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 4 * math.sqrt(1 / 12 / u.numel())
    assert abs(u.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / u.numel())
    assert abs(chi_square(torch.histc(u, 256, 0, 1).numpy())) < 4
    for other in (u.roll(1, 0), u.roll(1, 1), u.roll(4, 1)):  # neighbours in images, lanes and blocks
        correlation = ((u - 0.5) * (other - 0.5)).mean() * 12
        assert abs(correlation) < 4 / math.sqrt(u.numel())


# ---- the attack --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_targets_are_never_the_label_and_uniform_over_the_rest(classes):
    count = 40_000
    indices = torch.arange(count)
    labels = indices % classes
    targets = reference.pgd_targets(labels, classes, indices, seed=3)
    assert targets.dtype == torch.int64
    assert targets.min() >= 0
    assert targets.max() < classes
    offsets = (targets - labels) % classes
    assert (offsets != 0).all()
    if classes > 2:
        assert abs(chi_square(np.bincount(offsets.numpy(), minlength=classes)[1:])) < 4


def test_targets_follow_the_multiply_high_rule():
    indices, labels = torch.tensor([0, 9, 2**33 + 1]), torch.tensor([6, 0, 3], dtype=torch.int32)
    got = reference.pgd_targets(labels, 7, indices, seed=2**35 + 1, restart=4).tolist()
    for label, index, target in zip(labels.tolist(), indices.tolist(), got, strict=True):
        counter = (0, 1 + 256 * 4, index % 2**32, index // 2**32)
        word = python_philox(counter, (1, 8))[0]
        assert target == (label + 1 + word * 6 // 2**32) % 7


def test_targets_change_with_seed_and_restart_and_not_with_the_batch():
    indices, labels = torch.arange(200), torch.zeros(200, dtype=torch.int64)
    base = reference.pgd_targets(labels, 10, indices)
    assert not torch.equal(base, reference.pgd_targets(labels, 10, indices, seed=1))
    assert not torch.equal(base, reference.pgd_targets(labels, 10, indices, restart=1))
    assert torch.equal(base.flip(0), reference.pgd_targets(labels, 10, indices.flip(0)))


def test_start_is_the_formula_in_float32_without_fused_multiply_add():
    clean = torch.rand(3, 2, 5, 5, generator=torch.Generator().manual_seed(2))
    indices = torch.tensor([4, 0, 2**40])
    got = reference.pgd_start(clean, indices, eps=16 / 255, seed=9, restart=1)
    u = reference.uniform(9, indices, 50, reference.PURPOSE_START, 1).numpy().reshape(3, 2, 5, 5)
    eps, one, two = np.float32(16 / 255), np.float32(1), np.float32(2)
    noise = (two * u - one) * eps
    want = np.clip(clean.numpy() + noise, np.float32(0), one)
    assert want.dtype == np.float32
    assert np.array_equal(got.numpy(), want)
    # The product is exact in float64, so this is what a fused multiply-add would give: the data tells the two
    # apart.
    fused = np.clip((clean.numpy() + (two * u - one).astype(np.float64) * eps).astype(np.float32), 0, 1)
    assert not np.array_equal(fused, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_start_stays_in_the_ball_and_in_the_image(dtype):
    clean = torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(3)).to(dtype)
    got = reference.pgd_start(clean, torch.arange(8), eps=0.1, lower=0.2, upper=0.7)
    assert got.dtype == dtype
    assert got.min() >= 0.2 - torch.finfo(dtype).eps
    assert got.max() <= 0.7 + torch.finfo(dtype).eps
    inside = (clean > 0.3) & (clean < 0.6)
    moved = (got - clean)[inside].double()
    assert moved.abs().max() <= 0.1 + torch.finfo(dtype).eps
    assert moved.abs().max() > 0.09
    work = torch.float64 if dtype == torch.float64 else torch.float32
    want = reference.pgd_start(clean.to(work), torch.arange(8), eps=0.1, lower=0.2, upper=0.7).to(dtype)
    assert torch.equal(got, want)


def test_start_belongs_to_the_image_whatever_the_batch_and_the_layout():
    clean = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    indices = torch.tensor([5, 1, 9, 0, 7, 2])
    whole = reference.pgd_start(clean, indices, eps=0.3, seed=1)
    assert torch.equal(reference.pgd_start(clean[2:4], indices[2:4], eps=0.3, seed=1), whole[2:4])
    last = clean.contiguous(memory_format=torch.channels_last)
    assert torch.equal(reference.pgd_start(last, indices, eps=0.3, seed=1), whole)
    assert not torch.equal(reference.pgd_start(clean, indices, eps=0.3, seed=2), whole)
    assert reference.pgd_start(clean[:0], indices[:0], eps=0.3).shape == (0, 3, 4, 4)


def step_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)

    def draw() -> Tensor:
        return torch.rand(4, 3, 24, 24, generator=generator, dtype=torch.float64)

    clean = draw().square()  # dark pixels, whose differences are not exact
    adv = (clean + (draw() - 0.5) * 0.13).clamp(0, 1)
    grad = draw() - 0.5
    grad[grad.abs() < 0.05] = 0
    return adv.to(dtype), grad.to(dtype), clean.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("targeted", [True, False])
def test_step_is_torchattacks_bit_by_bit(dtype, targeted):
    adv, grad, clean = step_inputs(dtype)
    step, eps = 1 / 255, 16 / 255
    # torchattacks' PGD ascends its cost, which is minus the loss where it is targeted.
    ascent = -grad if targeted else grad
    moved = adv + step * ascent.sign()
    delta = torch.clamp(moved - clean, min=-eps, max=eps)
    want = torch.clamp(clean + delta, min=0, max=1)
    got = reference.pgd_step(adv, grad, clean, step, eps, targeted=targeted)
    assert torch.equal(got, want)
    # Projecting onto [clean - eps, clean + eps] rounds differently: the data tells the two orders apart.
    other = torch.maximum(torch.minimum(moved, clean + eps), clean - eps).clamp(0, 1)
    assert not torch.equal(other, want)
    torch.testing.assert_close(other, want)


def test_step_in_numbers():
    clean = torch.tensor([0.5, 0.5, 0.5, 0.02, 0.98, 0.5, 0.5])
    adv = torch.tensor([0.5, 0.58, 0.42, 0.01, 0.99, 0.5, 0.5])
    grad = torch.tensor([2.0, -3.0, 1e-30, 5.0, -5.0, 0.0, math.nan])
    got = reference.pgd_step(adv, grad, clean, 0.05, 0.1)
    torch.testing.assert_close(got, torch.tensor([0.45, 0.6, 0.4, 0.0, 1.0, 0.5, 0.5]))
    got = reference.pgd_step(adv, grad, clean, 0.05, 0.1, 0.3, 0.6, targeted=False)
    torch.testing.assert_close(got, torch.tensor([0.55, 0.53, 0.47, 0.3, 0.6, 0.5, 0.5]))
    nowhere = torch.full_like(adv, math.nan)
    assert reference.pgd_step(nowhere, grad, clean, 0.05, 0.1).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_step_in_low_precision_rounds_once(dtype):
    adv, grad, clean = step_inputs(dtype)
    got = reference.pgd_step(adv, grad, clean, 1 / 255, 16 / 255)
    assert got.dtype == dtype
    want = reference.pgd_step(adv.float(), grad.float(), clean.float(), 1 / 255, 16 / 255).to(dtype)
    assert torch.equal(got, want)
    # Rounding after every operation gives something else.
    delta = (adv - (1 / 255) * grad.sign() - clean).clamp(-16 / 255, 16 / 255)
    assert not torch.equal(got, (clean + delta).clamp(0, 1))
