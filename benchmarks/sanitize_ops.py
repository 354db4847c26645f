"""Run every operation once at small, odd shapes, in every dtype and layout: to be watched by compute-sanitizer.

    compute-sanitizer --tool memcheck python benchmarks/sanitize_ops.py --device cuda

Inputs are made on the CPU and results compared there, so that hardly anything but the kernels in question runs on
the GPU. Exit status 1 where a result is wrong.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

if __name__ == "__main__":
    # Before torch is imported, every tensor gets an allocation of its own: in a shared one, no access is out of bounds.
    # Not where a test imports this: graphs could not be captured in its process any more.
    os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch
from torch import Tensor

from sparta_kernels import AttentionWeights, backends, reference
from sparta_kernels.ops.attention_gradients import hidden_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NAMED = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-12}

# N, C, H, W, share: one element, odd rows, rows of whole vectors and one more, several chunks of a sample.
GATES = ((1, 1, 1, 1, 1), (3, 5, 7, 3, 1), (2, 16, 8, 8, 1), (2, 17, 5, 13, 2), (1, 70, 33, 31, 1), (2, 130, 4, 4, 3))
CONVS = ((1, 1, 1, 1), (3, 5, 7, 3), (2, 33, 31, 5))  # N, H, W, K
IMAGES = ((1, 1, 1, 1), (2, 3, 5, 7), (3, 3, 33, 31))
# N, C, H, W, hidden: one element, samples that share a tile and straddle tiles, several tiles of a sample.
ACTIVATIONS = ((1, 1, 1, 1, 1), (5, 17, 7, 7, 20), (2, 70, 13, 11, 33))
# N, C, H, W, K: one element, odd rows, whole vectors of channels and of pixels, pixels in several parts.
DYRELUS = ((1, 1, 1, 1, 1), (3, 5, 7, 3, 8), (2, 16, 8, 8, 3), (2, 130, 4, 4, 2), (1, 3, 91, 93, 3))
EPS, STEP, SEED = 0.25, 0.0625, 7

Result = tuple[str, Tensor, Tensor]  # what, as it is, as it should be


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0 done, 1 a wrong result. A bad argument exits with 2."""
    parser = argparse.ArgumentParser(prog="sanitize_ops.py", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", choices=("native", "triton"), default="native")
    parser.add_argument("--dtype", nargs="+", choices=_NAMED, default=list(_NAMED), help="default: all")
    parser.add_argument("--quick", action="store_true", help="the smallest shapes alone")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: there is no NVIDIA GPU here that torch can use")
    if options.device not in backends.DEVICES.get(options.backend, ()):
        parser.error(f"argument --backend: {options.backend} has no kernels for {options.device} here")

    torch.manual_seed(0)
    some = slice(2 if options.quick else None)
    module, device = backends.module(options.backend), torch.device(options.device)
    checked, wrong = 0, []
    for dtype in (_NAMED[name] for name in options.dtype):
        for what, got, wanted in _results(module, device, dtype, some):
            checked += 1
            error = float((got.cpu().double() - wanted.double()).abs().max() / max(1.0, float(wanted.abs().max())))
            if not error <= _TOLERANCES[dtype]:  # NaN is wrong too
                wrong.append(f"{what} {dtype}: error {error:.2g}, allowed {_TOLERANCES[dtype]:g}")
    for line in wrong:
        print(f"sanitize_ops.py: wrong: {line}", file=sys.stderr)
    print(f"{checked} results of {options.backend} on {options.device} checked, {len(wrong)} wrong")
    return 1 if wrong else 0


def _results(module: Any, device: torch.device, dtype: torch.dtype, some: slice) -> Iterator[Result]:
    for shape in GATES[some]:
        for layout in (torch.contiguous_format, torch.channels_last):
            for plain in (True, False):
                yield from _gate(module, device, dtype, shape, layout, plain)
    for activation in ACTIVATIONS[some]:
        for layout in (torch.contiguous_format, torch.channels_last):
            yield from _attention(module, device, dtype, activation, layout)
    for conv in CONVS[some]:
        yield from _conv(module, device, dtype, conv)
    for image in IMAGES[some]:
        for layout in (torch.contiguous_format, torch.channels_last):
            yield from _attack(module, device, dtype, image, layout)
            yield from _relu(module, device, dtype, image, layout)
            yield from _pointwise(module, device, dtype, image, layout)
    for (*image, lines), layout in itertools.product(DYRELUS[some], (torch.contiguous_format, torch.channels_last)):
        for shifted in (False, True):
            yield from _dyrelu(module, device, dtype, tuple(image), layout, lines, shifted)


def _gate(
    module: Any,
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    layout: torch.memory_format,
    plain: bool,
) -> Iterator[Result]:
    """Plain: with a kernel, x and gy aligned. Else without, and one element off any alignment."""
    samples, channels, height, width, share = shape
    cells = (-(-height // share), -(-width // share))
    x, gy = (torch.randn(shape[:4]).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    small = [torch.randn(size).to(dtype) for size in ((samples, 1, *cells), (samples, channels), (samples,))]
    inputs = [x, *small] if plain else [x, *small[:2], None]
    there = [None if tensor is None else _put(tensor, device, shifted=False) for tensor in inputs]
    there[0], gy_there = _put(x, device, not plain), _put(gy, device, not plain)
    title = f"gate {shape} {layout} {'plain' if plain else 'shifted, no kernel'}"
    y = module.gate_forward(*there, share)
    doubles = [None if tensor is None else tensor.double() for tensor in inputs]
    yield f"{title} forward", y, reference.gate(*doubles, share)
    wanted = [True, True, True, plain]
    gradients = module.gate_backward(gy_there, *there, share, wanted)
    expected = reference.gate_backward(gy.double(), *doubles, share)
    for number, (got, right) in enumerate(zip(gradients, expected, strict=True)):
        if got is not None and right is not None:
            yield f"{title} gradient {number}", got, right


def _attention(
    module: Any, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], layout: torch.memory_format
) -> Iterator[Result]:
    _, channels, height, width, hidden = shape
    x, gx = (torch.randn(shape[:4]).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    there = _put(x, device, shifted=False)
    if module.attention_unfit(there, hidden) is not None:
        return
    sizes = ((2 * hidden, channels), 2 * hidden, hidden, 1, (channels, hidden), channels, 1, (hidden, hidden), hidden)
    weights = AttentionWeights(*((torch.randn(size) / hidden**0.5).to(dtype) for size in (*sizes, hidden)))
    packed = module.pack_attention(AttentionWeights(*(weight.to(device) for weight in weights)), dtype)
    title = f"attention {shape} {layout}"
    *found, bits = module.attention_forward(there, packed, hidden, True)
    doubles = [weight.double() for weight in weights]
    expected = reference.folded_attention(x.double(), *doubles)
    for name, got, right in zip(("a", "channel", "kernel"), found, expected, strict=False):
        yield f"{title} {name}", got, right

    # With the kernel's own bits: near 0 rounding decides them.
    grads = [torch.randn_like(right) for right in expected]
    there = _put(gx, device, shifted=False)
    module.attention_backward_(there, *(grad.to(found[0]) for grad in grads), bits, packed, hidden)
    m1, m3, m6 = hidden_bits(bits.cpu(), hidden).unbind(2)
    (w1, w3), w4, w2, w6, w7 = doubles[0].chunk(2), doubles[2], doubles[4], doubles[7], doubles[9]
    ga, gchannel, gkernel = grads
    g1 = m1 * (gchannel @ w2 / (height * width))[:, None]
    g6 = m6 * (torch.outer(gkernel, w7) / (height * width))[:, None]
    g3 = m3 * (ga.flatten(1)[..., None] * w4 + g6 @ w6)
    added = (g1 @ w1 + g3 @ w3).transpose(1, 2).unflatten(2, (height, width))
    yield f"{title} gradient", there, gx.double() + added


def _conv(module: Any, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> Iterator[Result]:
    samples, height, width, size = shape
    spatial, gy = (torch.randn(samples, 1, height, width).to(dtype) for _ in range(2))
    kernel = torch.randn(samples, size, size).to(dtype)
    doubles = [tensor.double().requires_grad_() for tensor in (spatial, kernel)]
    right = reference.dynamic_conv(*doubles)
    there = [tensor.to(device) for tensor in (spatial, kernel)]
    yield f"conv {shape} forward", module.conv_forward(*there), right.detach()
    gradients = module.conv_backward(gy.to(device), *there, [True, True])
    for got, wanted in zip(gradients, torch.autograd.grad(right, doubles, gy.double()), strict=True):
        yield f"conv {shape} gradient", got, wanted


def _attack(
    module: Any, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], layout: torch.memory_format
) -> Iterator[Result]:
    clean = torch.rand(shape).to(dtype).contiguous(memory_format=layout)
    grad = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    indices = torch.arange(5, 5 + shape[0])
    shifted = layout == torch.channels_last
    adv, there = _put(torch.zeros_like(clean), device, shifted), _put(clean, device, shifted)
    module.pgd_start(adv, there, indices.to(device), EPS, SEED, 1, 0.0, 1.0)
    started = reference.pgd_start(clean, indices, eps=EPS, seed=SEED, restart=1)
    yield f"pgd_start {shape} {layout}", adv.cpu(), started
    module.pgd_step(adv, grad.to(device), there, -STEP, EPS, 0.0, 1.0)
    yield f"pgd_step {shape} {layout}", adv, reference.pgd_step(started, grad, clean, STEP, EPS)


def _relu(
    module: Any, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], layout: torch.memory_format
) -> Iterator[Result]:
    shifted = layout == torch.channels_last
    tensors = [torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(4)]
    a, b, grad, grad2 = tensors
    there, other, *grads = (_put(tensor, device, shifted) for tensor in tensors)
    for title, second, incoming in ((f"relu {shape} {layout}", None, None), (f"add_relu {shape} {layout}", b, grad2)):
        y, bits = module.relu_forward(there, None if second is None else other, True)
        right = reference.add_relu(a, second)
        yield f"{title} forward", y, right
        gradient = module.relu_backward(grads[0], None if incoming is None else grads[1], bits, y.stride())
        total = grad if incoming is None else grad + incoming
        yield f"{title} gradient", gradient, torch.where(right <= 0, torch.zeros_like(total), total)
    module.relu_forward_(there, other, False)
    yield f"add_relu_ {shape} {layout}", there, reference.add_relu(a, b)


def _pointwise(
    module: Any, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], layout: torch.memory_format
) -> Iterator[Result]:
    shifted = layout == torch.channels_last
    x, gy = (torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    b = torch.tensor(1.5, dtype=dtype)
    there, grad, b_there = _put(x, device, shifted), _put(gy, device, shifted), b.to(device)
    title = f"swish_relu {shape} {layout}"
    yield f"{title} forward", module.swish_relu_forward(there), reference.swish_relu(x.double())
    right = reference.swish_relu_backward(gy.double(), x.double())
    yield f"{title} gradient", module.swish_relu_backward(grad, there), right
    title = f"smooth_relu {shape} {layout}"
    yield f"{title} forward", module.smooth_relu_forward(there, b_there), reference.smooth_relu(x.double(), b.double())
    gradients = module.smooth_relu_backward(grad, there, b_there, [True, True])
    expected = reference.smooth_relu_backward(gy.double(), x.double(), b.double())
    for got, wanted in zip(gradients, expected, strict=True):
        yield f"{title} gradient", got, wanted


def _dyrelu(
    module: Any,
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    layout: torch.memory_format,
    lines: int,
    shifted: bool,
) -> Iterator[Result]:
    """In steps so coarse that no line is rounded: what is the largest is beyond doubt."""
    x = (4 * torch.randn(shape)).round().div(4).to(dtype).contiguous(memory_format=layout)
    gy = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    small = [(2 * torch.randn(*shape[:2], lines)).round().div(2).to(dtype) for _ in range(2)]
    there = [_put(x, device, shifted), *(tensor.to(device) for tensor in small)]
    doubles = [tensor.double() for tensor in (x, *small)]
    title = f"dyrelu {shape} {layout} {lines} lines{' shifted' if shifted else ''}"
    yield f"{title} forward", module.dyrelu_forward(*there), reference.dyrelu(*doubles)
    gradients = module.dyrelu_backward(_put(gy, device, shifted), *there, [True] * 3)
    for got, wanted in zip(gradients, reference.dyrelu_backward(gy.double(), *doubles), strict=True):
        yield f"{title} gradient", got, wanted


def _put(tensor: Tensor, device: torch.device, shifted: bool) -> Tensor:
    """The tensor on the device, in memory of its own size or one element into a larger one."""
    buffer = torch.empty(tensor.numel() + shifted, dtype=tensor.dtype, device=device)
    return buffer.as_strided(tensor.shape, tensor.stride(), int(shifted)).copy_(tensor)


if __name__ == "__main__":
    sys.exit(main())
