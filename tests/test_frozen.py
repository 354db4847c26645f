"""Convolutions with constant weights: torch's results and gradients, and nothing kept but the weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparta_kernels.nn.frozen import Form, FrozenConv, FrozenLinear, freeze, why_not, why_not_fold
from sparta_kernels.ops.frozen import frozen_convolution

CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (4, 9)),
    "2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), (4, 9, 8)),
    "2d-1x1": (lambda: nn.Conv2d(4, 6, 1), (4, 5, 5)),
    "2d-one-channel": (lambda: nn.Conv2d(4, 1, 1), (4, 5, 5)),
    "2d-groups": (lambda: nn.Conv2d(4, 8, (3, 2), groups=4, dilation=2), (4, 9, 8)),
    "2d-same": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), (4, 9, 8)),
    "2d-valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (4, 9, 8)),
    "3d": (lambda: nn.Conv3d(2, 3, 2), (2, 4, 5, 4)),
    "transposed-1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (4, 7)),
    "transposed-2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), (4, 5, 6)),
    "transposed-3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 3, 4, 3)),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def pair(name, dtype=torch.float32, form=None):
    torch.manual_seed(0)
    make, shape = CONVOLUTIONS[name]
    conv = make().to(dtype)
    return conv, FrozenConv(conv, None, form or Form()), torch.rand(3, *shape, dtype=dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_torch_s_results_bit_for_bit(name, dtype, layout):
    conv, frozen, x = pair(name, dtype)
    if x.dim() == 4:
        x = x.contiguous(memory_format=LAYOUTS[layout])
    leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
    results = []
    for layer, leaf in zip((conv, frozen), leaves, strict=True):
        y = layer(leaf)
        gy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).to(dtype).view(y.shape)
        results.append((y, torch.autograd.grad(y, leaf, gy)[0]))
    for got, wanted in zip(results[1], results[0], strict=True):
        assert torch.equal(got, wanted)
        assert got.stride() == wanted.stride()


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_gradcheck(name):
    _, frozen, x = pair(name, torch.float64)
    assert torch.autograd.gradcheck(frozen, (x.requires_grad_(),))


def test_only_the_weight_is_kept():
    conv, frozen, x = pair("2d")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        frozen(x.requires_grad_())
    assert [t.data_ptr() for t in kept] == [conv.weight.data_ptr()]
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        conv.requires_grad_(False)(x)
    assert x.data_ptr() in [t.data_ptr() for t in kept]  # torch's own keeps its input


def test_a_slice_of_a_larger_tensor():
    conv, frozen, _ = pair("2d")
    x = torch.rand(3, 8, 9, 16)[:, ::2, :, ::2].requires_grad_()
    torch.testing.assert_close(frozen(x), conv(x))
    torch.autograd.grad(frozen(x).sum(), x)


def test_an_empty_batch():
    _, frozen, x = pair("2d")
    leaf = x[:0].requires_grad_()
    assert torch.autograd.grad(frozen(leaf).sum(), leaf)[0].shape == x[:0].shape


def test_it_is_differentiable_once():
    _, frozen, x = pair("2d")
    leaf = x.requires_grad_()
    (gradient,) = torch.autograd.grad(frozen(leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), leaf)


def test_under_compile():
    conv, frozen, x = pair("2d")
    leaf = x.requires_grad_()
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(leaf), conv(leaf))
    got, wanted = (torch.autograd.grad(layer(leaf).square().sum(), leaf)[0] for layer in (compiled, conv))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [512, 16])
def test_many_channels_of_few_pixels(channels, dtype):
    """They are computed in the other memory format, and nobody can tell."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels).eval()
    norm.running_mean.uniform_()
    frozen = FrozenConv(conv, norm, Form(dtype, torch.channels_last))
    x = torch.rand(2, channels, 4, 4).contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y, wanted = frozen(leaf), norm(conv(leaf))
        assert y.is_contiguous(memory_format=torch.channels_last)
        tolerance = 1e-4 if dtype is None else 2e-2 * float(wanted.detach().abs().max())
        torch.testing.assert_close(y.float(), wanted, rtol=0, atol=tolerance)
        got, right = (torch.autograd.grad(out.float().square().sum(), leaf)[0] for out in (y, wanted))
        assert (got - right).norm() <= (1e-4 if dtype is None else 5e-2) * right.norm()
        assert (frozen.planar_weight is not None) == (channels == 512)
        conv.weight.data *= 1.5  # and once more, with what was learnt
        frozen.refresh()


def test_weights_are_cast_once(monkeypatch):
    linear, conv = nn.Linear(4, 3), nn.Conv2d(4, 3, 1)
    form = Form(torch.bfloat16, torch.channels_last)
    x, image = torch.rand(2, 4).bfloat16(), torch.rand(2, 4, 3, 3).bfloat16()
    layers = [(FrozenLinear(linear, form), x, linear), (FrozenConv(conv, None, form), image, conv)]
    for frozen, values, plain in layers:
        assert frozen.weight.dtype == frozen.bias.dtype == torch.bfloat16
        with torch.profiler.profile() as profile:
            y = frozen(values)
        assert not [event for event in profile.events() if event.name == "aten::_to_copy"]
        torch.testing.assert_close(y, plain.bfloat16()(values))


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"), "padding is 'circular'"),
        (nn.Conv2d(3, 3, 4, padding="same"), "not the same on both sides"),
        (nn.ReLU(), "neither a convolution nor a linear layer"),
        (nn.LazyConv2d(3, 3), "neither a convolution nor a linear layer"),
    ],
    ids=str,
)
def test_what_is_not_frozen(layer, words):
    assert words in why_not(layer)


def test_what_is_not_folded():
    conv = nn.Conv2d(3, 4, 3)
    assert why_not_fold(conv, nn.BatchNorm2d(4)) is None
    assert "keeps no running statistics" in why_not_fold(conv, nn.BatchNorm2d(4, track_running_stats=False))
    assert "is not a BatchNorm" in why_not_fold(conv, nn.GroupNorm(2, 4))
    assert "follows a ConvTranspose2d" in why_not_fold(nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4))
    assert "follows a Linear" in why_not_fold(nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert isinstance(freeze(conv, nn.BatchNorm2d(4), Form()), FrozenConv)


def test_mixed_dtypes_are_cast_to_the_weight_s():
    weight = torch.rand(4, 3, 1, 1, dtype=torch.bfloat16)
    x = torch.rand(2, 3, 4, 4, requires_grad=True)
    y = frozen_convolution(x, weight, None, (1, 1), (0, 0), (1, 1))
    assert y.dtype == torch.bfloat16
    assert torch.autograd.grad(y.float().sum(), x)[0].dtype == torch.float32
