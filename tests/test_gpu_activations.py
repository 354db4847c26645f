"""swish_relu, smooth_relu and dyrelu at the sizes of networks, on a GPU."""

import pytest
import torch
from cases import assert_same_bits, lay, random
from torch import Tensor

from sparta_kernels import backends, reference

pytestmark = pytest.mark.gpu

SITES = [(64, 32, 32), (512, 4, 4), (512, 7, 7), (64, 56, 56)]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(params=["native", "triton"])
def module(request):
    if "cuda" not in backends.DEVICES.get(request.param, ()):
        pytest.skip(f"{request.param} has no kernels for GPUs in this installation")
    with torch.device("cuda"):
        yield backends.module(request.param)


def tensors(site: tuple[int, int, int], dtype: torch.dtype, layout: str, lines: int) -> list[Tensor]:
    """gy, x, slopes, intercepts; the last three in steps so coarse that no line is rounded."""
    generator = torch.Generator().manual_seed(0)
    gy, x = random(generator, 33, *site), (4 * random(generator, 33, *site)).round() / 4
    small = [(2 * random(generator, 33, site[0], lines)).round() / 2 for _ in range(2)]
    return [lay(t.to(dtype), layout) for t in (gy, x)] + [t.to(dtype) for t in small]


def assert_close(got, wanted, dtype: torch.dtype) -> None:
    for one, other in zip(got, wanted, strict=True):
        tolerance = TOLERANCES[dtype]
        torch.testing.assert_close(
            one.double(), other.double(), rtol=tolerance, atol=tolerance * float(other.abs().max())
        )


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("site", SITES, ids=str)
def test_the_sites_of_networks(module, site, layout, dtype):
    for lines in (2, 3, 8):
        gy, *inputs = tensors(site, dtype, layout, lines)
        doubles = [t.double() for t in inputs]
        assert_close([module.dyrelu_forward(*inputs)], [reference.dyrelu(*doubles)], dtype)
        grads = module.dyrelu_backward(gy, *inputs, [True] * 3)
        assert_close(grads, reference.dyrelu_backward(gy.double(), *doubles), dtype)
        for one, other in zip(module.dyrelu_backward(gy, *inputs, [True] * 3), grads, strict=True):
            assert_same_bits(one, other, "again")
    x, b = inputs[0], torch.tensor(20.0)
    assert_close([module.swish_relu_forward(x)], [reference.swish_relu(x.double())], dtype)
    assert_close([module.swish_relu_backward(gy, x)], [reference.swish_relu_backward(gy.double(), x.double())], dtype)
    assert_close([module.smooth_relu_forward(x, b)], [reference.smooth_relu(x.double(), b.double())], dtype)
    grads = module.smooth_relu_backward(gy, x, b, [True, True])
    # The terms of gb have either sign: their sum is small beside them.
    assert_close(grads[:1], reference.smooth_relu_backward(gy.double(), x.double(), b.double())[:1], dtype)
    ones = torch.ones_like(x)
    gb = module.smooth_relu_backward(ones, x, b, [False, True])[1]
    assert_close([gb], [reference.smooth_relu_backward(ones.double(), x.double(), b.double())[1]], torch.float32)
    assert_same_bits(module.smooth_relu_backward(gy, x, b, [False, True])[1], grads[1], "again")


def test_what_is_not_finite(module):
    """A compiled maximum may drop a NaN; the approximate instructions have inf and NaN of their own."""
    nan, inf = torch.nan, torch.inf
    x = torch.tensor([nan, inf, -inf, -0.0, 0.0, 1e-40, 3e38, -3e38]).view(1, 1, 2, 4)
    one = torch.ones_like(x)
    got = [module.swish_relu_forward(x), module.swish_relu_backward(one, x)]
    want = [reference.swish_relu(x), reference.swish_relu_backward(one, x)]
    for value in (20.0, 1e-3, 0.0):
        b = torch.tensor(value)
        got += [module.smooth_relu_forward(x, b), module.smooth_relu_backward(one, x, b, [True, False])[0]]
        want += [reference.smooth_relu(x, b), reference.smooth_relu_backward(one, x, b)[0]]
    slopes, intercepts = torch.tensor([[[1.0, 2.0, 2.0]]]), torch.tensor([[[0.0, nan, inf]]])
    for lines in (1, 2, 3):
        small = slopes[..., :lines].contiguous(), intercepts[..., :lines].contiguous()
        got += [module.dyrelu_forward(x, *small), *module.dyrelu_backward(one, x, *small, [True] * 3)]
        want += [reference.dyrelu(x, *small), *reference.dyrelu_backward(one, x, *small)]
    for one_of, other in zip(got, want, strict=True):
        torch.testing.assert_close(one_of, other, equal_nan=True)
