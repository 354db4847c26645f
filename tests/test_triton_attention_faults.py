"""Planted faults: each is a small mistake in a copy of the attention network's kernels, and comparing must catch it."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from types import ModuleType

import pytest
import torch
from attention_case import AttentionCase, check_backward, check_forward, unpacked

from sparta_kernels import backends

pytest.importorskip("triton")

from sparta_kernels.backends import triton
from sparta_kernels.backends.triton import attention, attention_plan

pytestmark = pytest.mark.skipif("cpu" not in backends.DEVICES["triton"], reason="needs TRITON_INTERPRET=1")

FAULTS = {
    "another bias": ("hidden_of(h6, b6, first", "hidden_of(h6, b13, first"),
    "h1's weights for h3": ("weights = w13 + HIDDEN * CHANNELS + col", "weights = w13 + col"),
    "h1's weights for h3, together": ("factor(weights + HIDDEN * CHANNELS, None)", "factor(weights, None)"),
    "conv6 transposed": (
        "w6 + (first + chunk)[None, :] * HIDDEN + col[:, None]",
        "w6 + (first + chunk)[None, :] + col[:, None] * HIDDEN",
    ),
    "conv6 without ReLU before it": (
        "h3 = hidden_of(h3, b13 + HIDDEN, col, hidden, PADDED)",
        "h3 += tl.load(b13 + HIDDEN + col)[None, :]",
    ),
    "bits of numbers that are 0": ("tl.where(h <= 0, 0, 1)", "tl.where(h < 0, 0, 1)"),
    "bits in the other order": ("passing << tl.arange(0, 8)", "passing << (7 - tl.arange(0, 8))"),
    "a tile has one sample": ("tl.minimum((tile * PIXELS + PIXELS - 1) // pixels, samples - 1)", "first"),
    "always the first slot": ("slot = n - tile * PIXELS // pixels", "slot = (n - tile * PIXELS // pixels) * 0"),
    "the last tile of a sample left out": ("last = ((n + 1) * pixels - 1) // PIXELS", "last = n * pixels // PIXELS"),
    "a sum that is no mean": ("sum_over(total, 0) / tl.full([1], pixels, tl.float32)", "sum_over(total, 0)"),
    "another sample's": ("n = pixel // pixels\n    sample", "n = pixel * 0\n    sample"),
    "G6 not masked": ("tl.where(passing, value, 0.0)", "value + tl.where(passing, 0.0, 0.0)"),
    "G3 of h1's bits": ("load_bits(bits, row + BYTES,", "load_bits(bits, row,"),
    "w4 left out": ("g3 += spatial[:, None] * tl.load(w4 + col)[None, :]", "g3 += spatial[:, None]"),
    "W1 for G3": ("factor(weights + HIDDEN, None)", "factor(weights, None)"),
    "one half twice": (
        "HIDDEN, SCALED)\n        if HALVES == 2:\n            sums = add_products(sums, other1, other3",
        "HIDDEN, SCALED)\n        if HALVES == 2:\n            sums = add_products(sums, g1, g3",
    ),
    "the gate's part lost": ("read(target, mask, tl.float32) + sums", "sums"),
    "a scale forgotten": ("sums += more * size[:, None]", "sums += more"),
}
# What is in the code only where hidden tensors are made together, or one after the other.
ONE_WAY = {"h1's weights for h3": False, "h1's weights for h3, together": True, "one half twice": False}


def _check_all() -> None:
    for dtype, size in itertools.product((torch.float32, torch.float16), ((4, 4), (7, 7))):
        case = AttentionCase((3, 20, *size), 24, dtype)
        check_backward(attention_plan, case, check_forward(attention_plan, case).bits)
    # A sum that is exactly 0 does not pass.
    case = AttentionCase((1, 20, 4, 4), 24, torch.float32)
    x, weights = case.inputs()
    bits = attention_plan.hidden_forward(torch.zeros_like(x), triton.pack_attention(weights, torch.float32), 24, True)[
        3
    ]
    assert torch.equal(unpacked(bits, 24)[0, 0, 0], weights.b13[:24] > 0)


@pytest.mark.parametrize("together", [True, False], ids=["together", "one after the other"])
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_a_planted_fault_is_seen(fault, together, tmp_path, monkeypatch):
    for name in ("attention_forward_tiling", "attention_backward_tiling"):
        before = getattr(attention_plan, name)
        changed = lambda *extents, before=before: before(*extents)._replace(together=together)  # noqa: E731
        monkeypatch.setattr(attention_plan, name, changed)
    if fault is None:
        _check_all()
        return
    old, new = FAULTS[fault]
    if fault in ONE_WAY and together != ONE_WAY[fault]:
        pytest.skip("not in this way to compute it")
    source = Path(attention.__file__).read_text()
    assert old in source
    monkeypatch.setattr(attention_plan, "attention", _imported(tmp_path / "faulty.py", source.replace(old, new)))
    with pytest.raises(AssertionError):
        _check_all()


def _imported(file: Path, source: str) -> ModuleType:
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
