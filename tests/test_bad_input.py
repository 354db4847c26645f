"""One table of wrong calls, every argument of every public operation: it is named, and nothing is written."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import sparta_kernels
from sparta_kernels import (
    AttentionWeights,
    backends,
    dynamic_conv,
    dyrelu,
    pgd_start_,
    pgd_step_,
    smooth_relu,
    sparta_activation,
    sparta_attention,
    sparta_gate,
    swish_relu,
    use_backend,
)

SHAPES = {
    **{"w13": (8, 3), "b13": (8,), "w4": (4,), "b4": (1,), "w2": (3, 4), "b2": (3,), "b7": (1,)},
    **{"w6": (4, 4), "b6": (4,), "w7": (4,)},
}


def weights(**other: Any) -> AttentionWeights:
    """Of 3 channels and 4 hidden ones."""
    return AttentionWeights(**{**{name: torch.ones(shape) for name, shape in SHAPES.items()}, **other})


GOOD: dict[Callable[..., Any], Callable[[], dict[str, Any]]] = {
    sparta_gate: lambda: {
        "x": torch.ones(2, 3, 5, 4),
        "spatial": torch.ones(2, 1, 3, 2),
        "channel": torch.ones(2, 3),
        "kernel": torch.ones(2),
        "share": 2,
        "backend": "native",
    },
    dynamic_conv: lambda: {
        "spatial": torch.ones(2, 1, 5, 4),
        "kernel": torch.ones(2, 3, 3),
        "backend": "native",
    },
    pgd_step_: lambda: {
        "adv": torch.full((2, 3, 5, 4), 0.5),
        "grad": torch.ones(2, 3, 5, 4),
        "clean": torch.full((2, 3, 5, 4), 0.5),
        "step_size": 0.1,
        "eps": 0.1,
        "lower": 0.0,
        "upper": 1.0,
        "targeted": True,
        "backend": "native",
    },
    pgd_start_: lambda: {
        "adv": torch.full((2, 3, 5, 4), 0.5),
        "clean": torch.full((2, 3, 5, 4), 0.5),
        "indices": torch.arange(2),
        "eps": 0.1,
        "seed": 0,
        "restart": 0,
        "lower": 0.0,
        "upper": 1.0,
        "backend": "native",
    },
    sparta_attention: lambda: {"x": torch.ones(2, 3, 5, 4), "weights": weights(), "backend": "native"},
    sparta_activation: lambda: {"x": torch.ones(2, 3, 5, 4), "weights": weights(), "share": 2, "backend": "native"},
    swish_relu: lambda: {"x": torch.ones(2, 3, 5, 4), "backend": "native"},
    smooth_relu: lambda: {"x": torch.ones(2, 3, 5, 4), "b": torch.ones(()), "backend": "native"},
    dyrelu: lambda: {
        "x": torch.ones(2, 3, 5, 4),
        "slopes": torch.ones(2, 3, 2),
        "intercepts": torch.ones(2, 3, 2),
        "backend": "native",
    },
    use_backend: lambda: {"name": "native"},
}

NAN, INF = math.nan, math.inf

IMAGE = (2, 3, 5, 4)
NOT_FLOATS = [  # for every tensor of floats
    (None, TypeError, "must be a tensor, got NoneType"),
    ([1.0], TypeError, "must be a tensor, got list"),
    (torch.ones(2, 3, 5, 4).numpy(), TypeError, "must be a tensor, got ndarray"),
    (
        torch.ones(2, 3, 5, 4, dtype=torch.int64),
        TypeError,
        "float64, float32, bfloat16, float16, got torch.int64",
    ),
    (torch.ones(2, 3, 5, 4, dtype=torch.bool), TypeError, "got torch.bool"),
    (torch.ones(2, 3, 5, 4, dtype=torch.complex64), TypeError, "got torch.complex64"),
    (torch.ones(2, 3, 5, 4, dtype=torch.float8_e4m3fn), TypeError, "got torch.float8_e4m3fn"),
    (torch.ones(2, 3, 5, 4).to_sparse(), TypeError, "must be a strided tensor, got torch.sparse_coo"),
]
NOT_IMAGES = [
    *NOT_FLOATS,
    (torch.ones(3, 5, 4), ValueError, r"must have shape \(N, C, H, W\), got \(3, 5, 4\)"),
    (torch.ones(2, 3, 5, 4, 1), ValueError, r"got \(2, 3, 5, 4, 1\)"),
    (torch.ones(()), ValueError, r"got \(\)"),
]
NOT_LIKE_ADV = [
    *NOT_FLOATS,
    (torch.ones(2, 3, 5, 5), ValueError, r"must have shape of adv = \(2, 3, 5, 4\), got \(2, 3, 5, 5\)"),
    (torch.ones(1, 3, 5, 4), ValueError, r"got \(1, 3, 5, 4\)"),
    (torch.ones(3, 5, 4), ValueError, r"got \(3, 5, 4\)"),
    (
        torch.ones(IMAGE, dtype=torch.float64),
        TypeError,
        "must have adv's dtype torch.float32, got torch.float64",
    ),
    (torch.ones(IMAGE, device="meta"), ValueError, "must be on cpu like the first tensor, got meta"),
]
NOT_ADV = [
    *NOT_IMAGES,
    (torch.ones(1, 3, 5, 4).expand(2, 3, 5, 4), ValueError, "must not be expanded"),
    (torch.ones(IMAGE, requires_grad=True), ValueError, "must not require a gradient"),
    (torch.ones(IMAGE, dtype=torch.complex64).conj().imag, ValueError, "must not be a negated view"),
]
NOT_RADII = [  # a step or a ball's radius
    ("1", TypeError, "must be a number, got str"),
    (None, TypeError, "must be a number, got NoneType"),
    (True, TypeError, "must be a number, got bool"),
    (torch.tensor(0.1), TypeError, "must be a number, got Tensor"),
    (-0.1, ValueError, r"must be finite and at least 0.0, got -0.1"),
    (NAN, ValueError, "must be finite and at least 0.0, got nan"),
    (INF, ValueError, "must be finite and at least 0.0, got inf"),
]
NOT_BOUNDS = [
    ("0", TypeError, "must be a number, got str"),
    (NAN, ValueError, "must be finite, got nan"),
    (-INF, ValueError, "must be finite, got -inf"),
]
NOT_BACKENDS = [
    (3, TypeError, "must be a string, got int"),
    ("cuda", ValueError, "must be one of auto, reference, native, triton; got 'cuda'"),
    ("Native", ValueError, "got 'Native'"),
    ("", ValueError, "got ''"),
    *(
        (name, ValueError, f"{name!r} is not part of this installation; available: auto, reference")
        for name in backends.NAMES
        if name not in ("auto", "reference", *backends.DEVICES)
    ),
]

NOT_SHARES = [
    (0, ValueError, "must be in"),
    (-2, ValueError, "got -2"),
    (2**31, ValueError, "got 2147483648"),
    (2.0, TypeError, "must be an int, got float"),
    (True, TypeError, "must be an int, got bool"),
    ("2", TypeError, "must be an int, got str"),
    (None, TypeError, "must be an int, got NoneType"),
]
NOT_WEIGHTS = [
    (None, TypeError, "must be AttentionWeights, got NoneType"),
    (tuple(weights()), TypeError, "must be AttentionWeights, got tuple"),
    (weights()._asdict(), TypeError, "got dict"),
    (weights(w6=None), ValueError, "w6, b6 and w7 must all be given, or none; missing: w6"),
    (weights(w6=None, w7=None), ValueError, "missing: w6, w7"),
    (weights(w4=torch.ones(0)), ValueError, r"weights\.w4 must have shape \(Co,\), got \(0,\)"),
    (weights(w4=torch.ones(())), ValueError, r"weights\.w4 must have shape \(Co,\), got \(\)"),
    (weights(w4=torch.ones(1, 4)), ValueError, r"weights\.w4 must have shape \(Co,\), got \(1, 4\)"),
    (weights(w4=torch.ones(5)), ValueError, r"weights\.w13 must have shape .* = \(10, 3\), got \(8, 3\)"),
    (weights(w13=torch.ones(8, 3, 1, 1)), ValueError, r"weights\.w13 must .* = \(8, 3\), got \(8, 3, 1, 1\)"),
    (weights(w4=None), TypeError, r"weights\.w4 must be a tensor, got NoneType"),
    *(
        row
        for name, shape in SHAPES.items()
        for row in (
            (weights(**{name: [1.0]}), TypeError, rf"weights\.{name} must be a tensor, got list"),
            (weights(**{name: torch.ones(shape).long()}), TypeError, rf"weights\.{name} must have .* got torch.int64"),
            (weights(**{name: torch.ones(shape).to_sparse()}), TypeError, rf"weights\.{name} must be a strided tensor"),
            (weights(**{name: torch.ones(shape, device="meta")}), ValueError, rf"weights\.{name} must be on cpu"),
            *(
                [(weights(**{name: torch.ones(7, *shape[1:])}), ValueError, rf"weights\.{name} must have shape .* got")]
                if name != "w4"
                else []
            ),
        )
    ),
]

NOT_LINES = [
    *NOT_FLOATS,
    (torch.ones(1, 3, 2), ValueError, r"must have shape \(N, C, K\) = \(2, 3, 2\), got \(1, 3, 2\)"),
    (torch.ones(2, 4, 2), ValueError, r"got \(2, 4, 2\)"),
    (torch.ones(2, 3), ValueError, r"must have shape \(N, C, K\) .*got \(2, 3\)"),
    (torch.ones(2, 3, 2, device="meta"), ValueError, "must be on cpu like the first tensor, got meta"),
]

TABLE: dict[tuple[Callable[..., Any], str], list[tuple[Any, type[Exception], str]]] = {
    (sparta_gate, "x"): NOT_IMAGES,
    (sparta_gate, "spatial"): [
        *NOT_FLOATS,
        (
            torch.ones(2, 1, 3, 1),
            ValueError,
            r"\(N, 1, ceil\(H/share\), ceil\(W/share\)\) = \(2, 1, 3, 2\), got \(2, 1, 3, 1\)",
        ),
        (torch.ones(2, 1, 2, 2), ValueError, r"got \(2, 1, 2, 2\)"),
        (torch.ones(2, 1, 5, 4), ValueError, r"got \(2, 1, 5, 4\)"),
        (torch.ones(2, 3, 3, 2), ValueError, r"got \(2, 3, 3, 2\)"),
        (torch.ones(1, 1, 3, 2), ValueError, r"got \(1, 1, 3, 2\)"),
        (torch.ones(2, 3, 2), ValueError, r"got \(2, 3, 2\)"),
        (torch.ones(2, 1, 3, 2, device="meta"), ValueError, "must be on cpu like the first tensor, got meta"),
    ],
    (sparta_gate, "channel"): [
        *NOT_FLOATS,
        (torch.ones(2, 4), ValueError, r"must have shape \(N, C\) = \(2, 3\), got \(2, 4\)"),
        (torch.ones(3), ValueError, r"got \(3,\)"),
        (torch.ones(1, 3), ValueError, r"got \(1, 3\)"),
        (torch.ones(2, 3, 1, 1), ValueError, r"got \(2, 3, 1, 1\)"),
        (torch.ones(2, 3, device="meta"), ValueError, "must be on cpu like the first tensor, got meta"),
    ],
    (sparta_gate, "kernel"): [
        *NOT_FLOATS[1:],  # None is allowed
        (torch.ones(3), ValueError, r"must have shape \(N,\) = \(2,\), got \(3,\)"),
        (torch.ones(2, 1), ValueError, r"got \(2, 1\)"),
        (torch.ones(()), ValueError, r"got \(\)"),
        (1.0, TypeError, "must be a tensor, got float"),
        (torch.ones(2, device="meta"), ValueError, "must be on cpu like the first tensor, got meta"),
    ],
    (sparta_gate, "share"): NOT_SHARES,
    (sparta_gate, "backend"): NOT_BACKENDS,
    (dynamic_conv, "spatial"): [
        *NOT_IMAGES,
        (
            torch.ones(2, 3, 5, 4),
            ValueError,
            r"must have shape \(N, 1, H, W\) = \(2, 1, 5, 4\), got \(2, 3, 5, 4\)",
        ),
    ],
    (dynamic_conv, "kernel"): [
        *NOT_FLOATS,
        (torch.ones(2, 2, 2), ValueError, r"must have shape \(N, K, K\) with K odd, got \(2, 2, 2\)"),
        (torch.ones(2, 3, 5), ValueError, r"got \(2, 3, 5\)"),
        (torch.ones(2, 0, 0), ValueError, r"got \(2, 0, 0\)"),
        (torch.ones(3, 3), ValueError, r"got \(3, 3\)"),
        (torch.ones(2), ValueError, r"got \(2,\)"),
        (torch.ones(3, 3, 3), ValueError, r"= \(2, 3, 3\), got \(3, 3, 3\)"),
        (torch.ones(2, 3, 3, device="meta"), ValueError, "must be on cpu like the first tensor, got meta"),
    ],
    (dynamic_conv, "backend"): NOT_BACKENDS,
    (pgd_step_, "adv"): NOT_ADV,
    (pgd_step_, "grad"): NOT_LIKE_ADV,
    (pgd_step_, "clean"): NOT_LIKE_ADV,
    (pgd_step_, "step_size"): NOT_RADII,
    (pgd_step_, "eps"): NOT_RADII,
    (pgd_step_, "lower"): [
        *NOT_BOUNDS,
        (1.5, ValueError, "lower must not exceed upper, got lower=1.5 and upper=1.0"),
    ],
    (pgd_step_, "upper"): [*NOT_BOUNDS, (-0.5, ValueError, "got lower=0.0 and upper=-0.5")],
    (pgd_step_, "targeted"): [
        (1, TypeError, "must be a bool, got int"),
        (None, TypeError, "must be a bool, got NoneType"),
        ("no", TypeError, "must be a bool, got str"),
    ],
    (pgd_step_, "backend"): NOT_BACKENDS,
    (pgd_start_, "adv"): NOT_ADV,
    (pgd_start_, "clean"): NOT_LIKE_ADV,
    (pgd_start_, "indices"): [
        (None, TypeError, "must be an int64 tensor, got NoneType"),
        ([0, 1], TypeError, "must be an int64 tensor, got list"),
        (torch.arange(2, dtype=torch.int32), TypeError, "must be an int64 tensor, got torch.int32"),
        (torch.ones(2), TypeError, "got torch.float32"),
        (torch.arange(3), ValueError, r"must have shape \(N,\) = \(2,\), got \(3,\)"),
        (torch.arange(2)[:, None], ValueError, r"got \(2, 1\)"),
        (torch.arange(2, device="meta"), ValueError, "must be on cpu like the first tensor, got meta"),
    ],
    (pgd_start_, "eps"): NOT_RADII,
    (pgd_start_, "seed"): [
        (-1, ValueError, "got -1"),
        (2**63, ValueError, "got 9223372036854775808"),
        (1.0, TypeError, "must be an int, got float"),
        (True, TypeError, "must be an int, got bool"),
        (None, TypeError, "must be an int, got NoneType"),
    ],
    (pgd_start_, "restart"): [
        (-1, ValueError, "got -1"),
        (2**24, ValueError, "got 16777216"),
        ("0", TypeError, "must be an int, got str"),
    ],
    (pgd_start_, "lower"): [
        *NOT_BOUNDS,
        (2, ValueError, "lower must not exceed upper, got lower=2 and upper=1.0"),
    ],
    (pgd_start_, "upper"): [*NOT_BOUNDS, (-1, ValueError, "got lower=0.0 and upper=-1")],
    (pgd_start_, "backend"): NOT_BACKENDS,
    (sparta_attention, "x"): NOT_IMAGES,
    (sparta_attention, "weights"): NOT_WEIGHTS,
    (sparta_attention, "backend"): NOT_BACKENDS,
    (sparta_activation, "x"): NOT_IMAGES,
    (sparta_activation, "weights"): NOT_WEIGHTS,
    (sparta_activation, "share"): NOT_SHARES,
    (sparta_activation, "backend"): NOT_BACKENDS,
    (swish_relu, "x"): NOT_FLOATS,
    (swish_relu, "backend"): NOT_BACKENDS,
    (smooth_relu, "x"): NOT_FLOATS,
    (smooth_relu, "b"): [
        *NOT_FLOATS,
        (torch.ones(2), ValueError, r"must have one element, got shape \(2,\)"),
        (torch.ones(0), ValueError, r"got shape \(0,\)"),
        (torch.ones((), device="meta"), ValueError, "must be on cpu like the first tensor, got meta"),
    ],
    (smooth_relu, "backend"): NOT_BACKENDS,
    (dyrelu, "x"): [*NOT_FLOATS, (torch.ones(5), ValueError, r"must have shape \(N, C, ...\), got \(5,\)")],
    (dyrelu, "slopes"): [
        *NOT_LINES,
        (torch.ones(2, 3, 0), ValueError, r"with 1 <= K <= 8, got \(2, 3, 0\)"),
        (torch.ones(2, 3, 9), ValueError, r"with 1 <= K <= 8, got \(2, 3, 9\)"),
    ],
    (dyrelu, "intercepts"): [*NOT_LINES, (torch.ones(2, 3, 3), ValueError, r"= \(2, 3, 2\), got \(2, 3, 3\)")],
    (dyrelu, "backend"): NOT_BACKENDS,
    (use_backend, "name"): [*NOT_BACKENDS, (None, TypeError, "must be a string, got NoneType")],
}


def same(value: Any, good: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and name_of(value) == name_of(good) and value.layout == good.layout


def name_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype)[6:]}{list(value.shape)}{value.device.type}".replace(" ", "")
    if isinstance(value, AttentionWeights):
        different = (key for key, good in weights()._asdict().items() if not same(getattr(value, key), good))
        return ",".join(f"{key}={name_of(getattr(value, key))}" for key in different)
    return repr(value)[:20]


ROWS = [
    pytest.param(operation, argument, *row, id=f"{operation.__name__}-{argument}-{name_of(row[0])}")
    for (operation, argument), rows in TABLE.items()
    for row in rows
]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(("operation", "argument", "value", "error", "message"), ROWS)
def test_a_wrong_call_names_its_argument_and_writes_nothing(
    operation, argument, value, error, message, backend, monkeypatch
):
    def computed(*_: object) -> None:
        pytest.fail("a kernel ran")

    kernels = ("gate_forward", "conv_forward", "attention_forward", "pgd_step", "pgd_start")
    for name in (*kernels, "swish_relu_forward", "smooth_relu_forward", "dyrelu_forward"):
        monkeypatch.setattr(backends.module("native"), name, computed)
    requested = backends._requested
    arguments = GOOD[operation]()
    if "backend" in arguments:
        arguments["backend"] = backend
    arguments[argument] = value
    before = {n: t.clone() for n, t in arguments.items() if isinstance(t, torch.Tensor) and t.device.type == "cpu"}
    with pytest.raises(error, match=message) as raised:
        operation(**arguments)
    text = str(raised.value)
    assert argument in text, text
    assert operation.__name__ in text, text
    assert "\n" not in text
    assert backends._requested == requested
    for name, tensor in before.items():
        assert torch.equal(arguments[name].to_dense(), tensor.to_dense()), f"{name} was written"
        assert arguments[name]._version == (0 if tensor.layout == torch.strided else arguments[name]._version)


def test_the_table_has_every_argument_of_every_operation():
    public = {name: getattr(sparta_kernels, name) for name in sparta_kernels.__all__ if name != "__version__"}
    del public["build_info"], public["AttentionWeights"]  # takes nothing; checks nothing
    expected = {
        (operation, argument) for operation in public.values() for argument in inspect.signature(operation).parameters
    }
    assert expected == set(TABLE)
    assert all(TABLE.values())


@pytest.mark.parametrize("operation", GOOD, ids=lambda operation: operation.__name__)
def test_the_good_call_is_good(operation):
    with use_backend("auto"):
        operation(**GOOD[operation]())


def test_the_options_are_given_by_name():
    x, spatial, channel = torch.ones(2, 3, 5, 4), torch.ones(2, 1, 3, 2), torch.ones(2, 3)
    with pytest.raises(TypeError, match="positional"):
        sparta_gate(x, spatial, channel, None, 2)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("shape", [(2, 3, 0, 4), (2, 3, 5, 0), (0, 3, 0, 0)], ids=str)
@pytest.mark.parametrize("operation", [sparta_attention, sparta_activation])
def test_an_image_without_pixels_has_no_mean(operation, shape, backend):
    with pytest.raises(ValueError, match=rf"^{operation.__name__}: x must have C, H, W >= 1, got shape \("):
        operation(torch.ones(shape), weights(), backend=backend)


@pytest.mark.parametrize("name", ["w13", "b13", "b4", "w2", "b2", "b7"])
@pytest.mark.parametrize("operation", [sparta_attention, sparta_activation])
def test_a_weight_that_must_be_there(operation, name, monkeypatch):
    monkeypatch.setattr(backends.module("native"), "attention_forward", lambda *_: pytest.fail("a kernel ran"))
    with pytest.raises(TypeError, match=rf"weights\.{name} must be a tensor, got NoneType"):
        operation(torch.ones(2, 3, 5, 4), weights(**{name: None}))


def test_the_channels_of_x_and_of_the_weights_are_the_same():
    with pytest.raises(ValueError, match=r"weights\.w13 must have shape for C channels .* = \(8, 4\), got \(8, 3\)"):
        sparta_activation(torch.ones(2, 4, 5, 4), weights())


def test_an_empty_batch_is_not_a_wrong_one():
    y = sparta_gate(torch.ones(0, 3, 5, 4), torch.ones(0, 1, 5, 4), torch.ones(0, 3), torch.ones(0))
    assert y.shape == (0, 3, 5, 4)
    adv = torch.ones(0, 3, 5, 4)
    assert pgd_start_(adv, adv, torch.arange(0), 0.1) is adv
