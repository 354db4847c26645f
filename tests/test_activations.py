"""Activations by name: their strings, formulas, gradients, sizes, and what else a module must be able to do."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from sparta_kernels import attack
from sparta_kernels.attack.casting import convert
from sparta_kernels.nn import (
    ACTIVATIONS,
    DyReLU,
    FeatureDenoising,
    MaxOut,
    SmoothReLU,
    SqueezeExcite,
    make_activation,
    parse_activation,
    resnet18,
    resnet34,
)

# ---- strings ------------------------------------------------------------------------------------------------


def test_strings_give_a_name_and_options():
    assert parse_activation("relu") == ("relu", {})
    assert parse_activation("sparta:share=2,dynamic=false") == ("sparta", {"share": 2, "dynamic": False})
    assert parse_activation("elu:alpha=-1.5e-1") == ("elu", {"alpha": -0.15})
    assert parse_activation("gelu:approximate=tanh") == ("gelu", {"approximate": "tanh"})
    assert all(parse_activation(name) == (name, {}) for name in ACTIVATIONS)


def test_options_reach_the_module():
    sparta = make_activation("sparta:kernel_size=3,share=2,hidden=5", 6)
    assert (sparta.channels, sparta.hidden, sparta.kernel_size, sparta.share, sparta.dynamic) == (6, 5, 3, 2, True)
    assert make_activation("sparta-static:share=3", 6).share == 3
    assert make_activation("leaky-relu:negative_slope=0.2", 6).negative_slope == 0.2
    assert make_activation("elu:alpha=2", 6).alpha == 2
    assert make_activation("gelu:approximate=tanh", 6).approximate == "tanh"
    assert make_activation("prelu", 6).weight.tolist() == [0.25]
    assert make_activation("prelu:channelwise=true,init=0.5", 6).weight.tolist() == [0.5] * 6


WRONG_STRINGS = [
    ("", "be one of 'relu', .*, got ''"),
    ("swoosh", "be one of 'relu', .*, got 'swoosh'"),
    ("swoosh:share=2", "be one of 'relu', .*, got 'swoosh:share=2'"),
    ("sparta:", 'be "name" or "name:option=value,option=value"'),
    ("sparta:share", 'be "name" or "name:option=value,option=value"'),
    ("sparta:share=", 'be "name" or "name:option=value,option=value"'),
    ("sparta:share=2,", 'be "name" or "name:option=value,option=value"'),
    ("sparta: share=2", 'be "name" or "name:option=value,option=value"'),
    ("sparta:share=2;hidden=3", 'be "name" or "name:option=value,option=value"'),
    ("sparta:share=2,share=2", "name the option share once"),
    ("sparta:channels=2", "have options out of hidden, kernel_size, dynamic, share where its name is 'sparta'"),
    ("sparta-static:dynamic=true", "have options out of hidden, kernel_size, share"),
    ("relu:inplace=true", "have no options where its name is 'relu'"),
    ("sparta:kernel_size=2", "fit its options, got 'sparta:kernel_size=2': kernel_size must be odd, got 2"),
    ("sparta:share=2.5", "fit its options, .*: share must be an int, got float"),
    ("sparta:dynamic=1", "fit its options, .*: dynamic must be"),
    ("elu:alpha=inf", "fit its options, .*: alpha must be a number"),
    ("leaky-relu:negative_slope=true", "fit its options, .*: negative_slope must be a number"),
    ("prelu:channelwise=1", "fit its options, .*: channelwise must be true or false"),
    ("prelu:init=big", "fit its options, .*: init must be a number"),
    ("gelu:approximate=erf", "fit its options, .*: approximate must be none or tanh"),
]


@pytest.mark.parametrize(("string", "message"), WRONG_STRINGS)
def test_wrong_strings_are_named(string, message):
    with pytest.raises(ValueError, match=f"make_activation: activation must .*{message}"):
        make_activation(string, 6)


# ---- formulas, written anew in NumPy -----------------------------------------------------------------------------

CHANNELS = 6


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def relu(x):
    return np.where(x > 0, x, 0)


def product(weight, x):
    """A 1x1 convolution of (N, C, P)."""
    return np.stack([weight @ image for image in x])


def arrays(module: nn.Module) -> dict[str, np.ndarray]:
    return {name.replace(".", "_"): value.numpy() for name, value in module.state_dict().items()}


def np_gelu(x, w):
    return x * np.vectorize(lambda v: 0.5 * (1 + math.erf(v / math.sqrt(2))))(x)


def np_gelu_tanh(x, w):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def np_smooth_relu(x, w):
    beta = w["b"] ** 2
    return relu(x - np.log(beta * np.abs(x) + 1) / beta)


def np_dyrelu(x, w, k=3):
    t = np.zeros((len(x), x.shape[1], 2 * k))
    for n, image in enumerate(x):
        hidden = relu(w["fc1_weight"] @ image.mean((1, 2)) + w["fc1_bias"])
        t[n] = (2 * sigmoid(w["fc2_weight"] @ hidden + w["fc2_bias"]) - 1).reshape(-1, 2 * k)
    lines = [
        (t[:, :, i, None, None] + (1 if i == 0 else 0)) * x + t[:, :, k + i, None, None] / 2 for i in range(k)
    ]  # fmt: skip
    return np.max(lines, axis=0)


def np_feature_denoising(x, w):
    r = relu(x).reshape(*x.shape[:2], -1)
    theta, phi = product(w["theta_weight"][:, :, 0, 0], r), product(w["phi_weight"][:, :, 0, 0], r)
    mean = np.zeros_like(r)
    for n, (t, p) in enumerate(zip(theta, phi, strict=True)):
        for i in range(r.shape[2]):
            weights = np.exp(t[:, i] @ p / math.sqrt(len(t)))
            mean[n, :, i] = (r[n] * weights).sum(1) / weights.sum()
    f = product(w["conv_weight"][:, :, 0, 0], mean)
    f = (f - w["bn_running_mean"][:, None]) / np.sqrt(w["bn_running_var"][:, None] + 1e-5)
    return (r + f * w["bn_weight"][:, None] + w["bn_bias"][:, None]).reshape(x.shape)


def np_maxout(x, w):
    flat = x.reshape(*x.shape[:2], -1)
    pieces = zip(np.split(w["conv_weight"][:, :, 0, 0], 2), np.split(w["conv_bias"], 2), strict=True)
    return np.max([product(weight, flat) + bias[:, None] for weight, bias in pieces], axis=0).reshape(x.shape)


def np_se(x, w):
    y = relu(x)
    for image in y:
        hidden = relu(w["fc1_weight"] @ image.mean((1, 2)) + w["fc1_bias"])
        image *= sigmoid(w["fc2_weight"] @ hidden + w["fc2_bias"])[:, None, None]
    return y


FORMULAS = {
    "relu": lambda x, w: relu(x),
    "leaky-relu": lambda x, w: np.where(x > 0, x, 0.01 * x),
    "leaky-relu:negative_slope=0.3": lambda x, w: np.where(x > 0, x, 0.3 * x),
    "prelu": lambda x, w: np.where(x > 0, x, w["weight"] * x),
    "prelu:channelwise=true": lambda x, w: np.where(x > 0, x, w["weight"][:, None, None] * x),
    "elu": lambda x, w: np.where(x > 0, x, np.exp(x) - 1),
    "elu:alpha=0.5": lambda x, w: np.where(x > 0, x, 0.5 * (np.exp(x) - 1)),
    "gelu": np_gelu,
    "gelu:approximate=tanh": np_gelu_tanh,
    "swish": lambda x, w: x * sigmoid(x),
    "swish-relu": lambda x, w: relu(x) * sigmoid(x),
    "smooth-relu": np_smooth_relu,
    "smooth-relu:b=0.7": np_smooth_relu,
    "dyrelu": np_dyrelu,
    "dyrelu:k=2,reduction=2": lambda x, w: np_dyrelu(x, w, 2),
    "feature-denoising": np_feature_denoising,
    "feature-denoising:hidden=4": np_feature_denoising,
    "maxout": np_maxout,
    "se": np_se,
    "se:reduction=2": np_se,
}


def made(activation: str, channels: int = CHANNELS) -> nn.Module:
    """The activation in float64 and eval mode, with every parameter and statistic away from where it starts."""
    torch.manual_seed(3)
    module = make_activation(activation, channels).double().eval()
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                value.add_(0.3 * torch.rand_like(value) if "var" in name else 0.3 * torch.randn_like(value))
    return module


def feature_map(*shape: int, seed: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(shape or (2, CHANNELS, 3, 2), generator=generator, dtype=torch.float64)


def test_every_activation_has_a_formula():
    assert {parse_activation(string)[0] for string in FORMULAS} == set(ACTIVATIONS) - {"sparta", "sparta-static"}


@pytest.mark.parametrize("activation", FORMULAS)
def test_formula(activation):
    module, x = made(activation), feature_map()
    want = FORMULAS[activation](x.numpy(), arrays(module))
    torch.testing.assert_close(module(x), torch.from_numpy(want), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", FORMULAS)
def test_gradients_of_input_and_parameters(activation):
    module, x = made(activation), feature_map(1, CHANNELS, 2, 2).requires_grad_()
    parameters = dict(module.named_parameters())

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,))

    inputs = (x, *(parameter.detach().requires_grad_() for parameter in parameters.values()))
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


# ---- sizes --------------------------------------------------------------------------------------------------------

# More than ReLU's at four sites of width 64, as sums over C = 64, 128, 256, 512; and the millions in the later paper's
# Table 6 for ResNet-18 and ResNet-34, where it has the activation.
SIZES = {
    "relu": (0, "11.17", "21.28"),
    "leaky-relu": (0, None, None),
    "prelu": (4, None, None),
    "prelu:channelwise=true": (960, None, None),
    "elu": (0, "11.17", "21.28"),
    "gelu": (0, "11.17", "21.28"),
    "swish": (0, None, None),
    "swish-relu": (0, None, None),
    "smooth-relu": (4, "11.17", "21.28"),
    "dyrelu": (615_280, "11.79", "21.90"),
    "feature-denoising": (698_240, "11.87", "21.98"),
    "maxout": (698_240, None, None),
    "se": (44_540, None, None),
    "sparta": (811_528, "11.99", None),  # the paper's 22.11 cannot come from the same four sites
    "sparta-static": (657_160, None, None),
}


def parameters_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("activation", SIZES)
def test_sizes_are_the_papers(activation):
    more, *millions = SIZES[activation]
    with torch.device("meta"):
        sizes = [parameters_of(make(activation=activation)) for make in (resnet18, resnet34)]
    assert sizes == [11_173_962 + more, 21_282_122 + more]
    for size, printed in zip(sizes, millions, strict=True):
        assert printed is None or f"{size / 1e6:.2f}" == printed


# ---- what a module must be able to do -----------------------------------------------------------------------------

PARAMETERS = {
    "smooth-relu": ["b"],
    "dyrelu": ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"],
    "feature-denoising": ["theta.weight", "phi.weight", "conv.weight", "bn.weight", "bn.bias"],
    "maxout": ["conv.weight", "conv.bias"],
    "se": ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"],
    "swish-relu": [],
}


@pytest.mark.parametrize("activation", PARAMETERS)
def test_names_in_a_state_dict(activation):
    names = PARAMETERS[activation]
    assert [name for name, _ in make_activation(activation, 4).named_parameters()] == names
    statistics = {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"} if "bn.bias" in names else set()
    assert make_activation(activation, 4).state_dict().keys() == {*names} | statistics


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_copies_and_pickles_compute_the_same(activation):
    module, x = made(activation), feature_map()
    want = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), want)
    fresh = make_activation(activation, CHANNELS).double().eval()
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(x), want)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("channels", [1, 5])
def test_memory_format_dtype_and_odd_sizes(activation, channels):
    module = make_activation(activation, channels)
    for x in (torch.randn(2, channels, 3, 5), torch.randn(0, channels, 3, 5)):
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        y = module(x)
        assert y.shape == x.shape
        assert y.dtype == x.dtype
        (gx,) = torch.autograd.grad(y.sum(), x)
        assert gx.shape == x.shape
        assert gx.isfinite().all()
    low = module.eval().to(torch.bfloat16)(torch.randn(2, channels, 3, 5, dtype=torch.bfloat16))
    assert low.dtype == torch.bfloat16


@pytest.mark.parametrize("activation", ["smooth-relu", "dyrelu", "feature-denoising", "maxout", "se"])
def test_reset_parameters_starts_anew(activation):
    module = made(activation).float()
    torch.manual_seed(11)
    module.reset_parameters()
    torch.manual_seed(11)
    new = make_activation(activation, CHANNELS)
    if activation == "feature-denoising":  # whose parts draw before they are drawn anew
        torch.manual_seed(11)
        new.reset_parameters()
    for name, value in new.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name


def test_where_activations_start():
    x = feature_map().float()
    assert torch.equal(make_activation("feature-denoising", CHANNELS)(x), x.clamp(min=0))
    assert make_activation("smooth-relu", CHANNELS).b.tolist() == SmoothReLU().b.tolist() == [20]
    dyrelu = make_activation("dyrelu", CHANNELS)
    with torch.no_grad():
        dyrelu.fc2.weight.zero_(), dyrelu.fc2.bias.zero_()
    torch.testing.assert_close(dyrelu(x), x.clamp(min=0))


def test_only_feature_denoising_and_sparta_depend_on_the_batch_while_training():
    x = feature_map()
    alone = {name for name in ACTIVATIONS if torch.allclose((module := made(name).train())(x)[:1], module(x[:1]))}
    assert set(ACTIVATIONS) - alone == {"feature-denoising", "sparta", "sparta-static"}
    module = made("feature-denoising").train()
    before = module.bn.running_mean.clone()
    module(x)
    assert not torch.equal(module.bn.running_mean, before)


WRONG = [
    (lambda: DyReLU(0), ValueError, "DyReLU: channels"),
    (lambda: DyReLU(4, k=9), ValueError, "DyReLU: k"),
    (lambda: DyReLU(4, k=2.0), TypeError, "DyReLU: k"),
    (lambda: DyReLU(4, reduction=0), ValueError, "DyReLU: reduction"),
    (lambda: DyReLU(4)(torch.zeros(2, 5, 3, 3)), ValueError, r"DyReLU: x .*\(N, 4, H, W\), got \(2, 5, 3, 3\)"),
    (lambda: FeatureDenoising("4"), TypeError, "FeatureDenoising: channels"),
    (lambda: FeatureDenoising(4, hidden=0), ValueError, "FeatureDenoising: hidden"),
    (lambda: FeatureDenoising(4)(torch.zeros(4, 3, 3)), ValueError, "FeatureDenoising: x"),
    (lambda: MaxOut(4, k=0), ValueError, "MaxOut: k"),
    (lambda: MaxOut(True), TypeError, "MaxOut: channels"),
    (lambda: MaxOut(4)(torch.zeros(2, 4, 3, 3, dtype=torch.int32)), TypeError, "MaxOut: x"),
    (lambda: SqueezeExcite(4, reduction=-1), ValueError, "SqueezeExcite: reduction"),
    (lambda: SqueezeExcite(4)(torch.zeros(2, 3, 3, 4)), ValueError, "SqueezeExcite: x"),
    (lambda: SmoothReLU(b=math.inf), ValueError, "SmoothReLU: b"),
    (lambda: SmoothReLU(b="20"), TypeError, "SmoothReLU: b"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- in networks --------------------------------------------------------------------------------------------------


def network(activation: str) -> nn.Module:
    torch.manual_seed(5)
    return resnet18(4, activation, sites="G13.B2", width=4).eval()


def test_a_string_with_options_stands_at_the_sites():
    model = resnet18(activation="sparta:share=2,hidden=3", sites="G2.B1,G4.B2", width=2)
    found = {name: part for name, part in model.named_modules() if type(part).__name__ == "Sparta"}
    assert found.keys() == {"layer2.0.act2", "layer4.1.act2"}
    assert all((part.share, part.hidden) == (2, 3) for part in found.values())
    with pytest.raises(ValueError, match="activation must have options out of k, reduction where its name is 'dyrelu'"):
        resnet18(activation="dyrelu:share=2", sites="")


# What an attack leaves alone: nothing, but for modules whose gradients torch takes by itself anyway.
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if not name.startswith("sparta")])
def test_prepared_for_attack(activation):
    model = network(activation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("act2.bn.weight"):
                parameter.fill_(0.7)  # denoising that does something
    prepared = attack.prepare(model)
    x = torch.rand(3, 3, 8, 8, requires_grad=True)
    (want,) = torch.autograd.grad(model(x).square().sum(), x)
    (got,) = torch.autograd.grad(prepared(x).square().sum(), x)
    torch.testing.assert_close(prepared(x), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * want.abs().max().item())
    assert prepared.report.left == {}
    denoised = 2 if activation == "feature-denoising" else 0
    assert len(prepared.report.folded) == 20 + denoised
    # relu, feature-denoising and se begin with ReLU themselves; se and dyrelu have one more inside.
    more = {"relu": 2, "feature-denoising": 2, "se": 4, "dyrelu": 2}.get(activation, 0)
    assert prepared.report.relus == 15 + more

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    prepared.refresh()
    torch.testing.assert_close(prepared(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["smooth-relu", "swish-relu", "dyrelu", "feature-denoising", "se", "maxout"])
def test_prepared_in_bf16(activation):
    model = network(activation)
    prepared, x = attack.prepare(model, precision="bf16"), torch.rand(3, 3, 8, 8, requires_grad=True)
    casts = [node.args[1] for node in prepared.network.graph.nodes if node.target is convert]
    assert all(dtype == torch.bfloat16 for dtype in casts)  # nothing on the way is made 32 bits
    y = prepared(x)
    (gx,) = torch.autograd.grad(y.sum(), x)
    assert y.dtype == gx.dtype == torch.float32
    assert gx.isfinite().all()
    assert (y - model(x)).norm() < 0.05 * model(x).norm()


@pytest.mark.parametrize("activation", ["smooth-relu", "swish-relu", "dyrelu", "feature-denoising", "se", "maxout"])
def test_compiled_without_a_graph_break(activation):
    torch._dynamo.reset()
    module, x = made(activation), feature_map().requires_grad_()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    (want,), (got,) = (torch.autograd.grad(f(x).square().sum(), x) for f in (module, compiled))
    torch.testing.assert_close(got, want)
