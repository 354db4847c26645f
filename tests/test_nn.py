"""Sparta against the reference, the ResNets' sizes and sites, and the ways modules are used."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from sparta_case import CONFIGURATIONS, build, features
from torch import Tensor, nn

from sparta_kernels import reference
from sparta_kernels.nn import ACTIVATIONS, ResNet, Sparta, make_activation, parse_sites, resnet18, resnet34


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---- Sparta ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("arguments", CONFIGURATIONS, ids=str)
def test_sparta_is_the_reference(arguments, training):
    module = build(**arguments).train(training)
    x = features(3, 6, 5, 7).requires_grad_()
    values = {name: value.detach().clone() for name, value in module.state_dict().items()}
    for name, _ in module.named_parameters():
        values[name].requires_grad_()
    options = {key: value for key, value in arguments.items() if key != "hidden"}
    want = reference.sparta(x, values, training=training, **options)
    got = module(x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)

    weights = torch.cos(torch.arange(x.numel(), dtype=torch.float64)).view_as(x)
    names = [name for name, _ in module.named_parameters()]
    got_grads = torch.autograd.grad(got, [x, *module.parameters()], weights)
    want_grads = torch.autograd.grad(want, [x, *(values[name] for name in names)], weights)
    for name, g, w in zip(["x", *names], got_grads, want_grads, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("training", [False, True])
def test_running_statistics_move_in_training_alone(training):
    module = build().train(training)
    x = features(4, 6, 5, 5)
    before = {name: value.clone() for name, value in module.named_buffers()}
    module(x)
    h1 = F.conv2d(x, module.conv1.weight, module.conv1.bias)
    want = before["bn1.running_mean"] * 0.9 + 0.1 * h1.mean((0, 2, 3)) if training else before["bn1.running_mean"]
    torch.testing.assert_close(module.bn1.running_mean, want)
    for name, value in module.named_buffers():
        assert torch.equal(value, before[name]) != training, name


@pytest.mark.parametrize("dynamic", [True, False])
def test_the_names_are_those_of_the_papers_figure(dynamic):
    names = list(dict(Sparta(4, dynamic=dynamic).named_children()))
    last = ["conv6", "bn6", "predict"] if dynamic else []
    assert names == ["conv1", "bn1", "conv2", "conv3", "bn3", "conv4", *last]
    own = [name for name, _ in Sparta(4, dynamic=dynamic).named_parameters(recurse=False)]
    assert own == ([] if dynamic else ["conv5"])
    assert Sparta(4, kernel_size=3, dynamic=False).conv5.shape == (3, 3)


@pytest.mark.parametrize(
    ("channels", "arguments", "hidden", "count"),
    [
        # conv1 and conv3 C Co + Co each, conv2 Co C + C, conv4 Co + 1, conv6 Co Co + Co, norms 2 Co, predict
        (64, {}, 64, 4 * 64 * 64 + 3 * 64 + 64 + 65 + 6 * 64 + 65),
        (512, {}, 256, 3 * 512 * 256 + 2 * 256 + 512 + 257 + 256 * 257 + 6 * 256 + 257),
        (64, {"dynamic": False}, 64, 3 * 64 * 64 + 2 * 64 + 64 + 65 + 4 * 64 + 1),
        (512, {"kernel_size": 3, "hidden": 8}, 8, 3 * 512 * 72 + 16 + 512 + 73 + 8 * 73 + 48 + 81),
        (300, {"kernel_size": 3}, 300, 4 * 9 * 300 * 300 + 4 * 300 + 2701 + 1800 + 9 * 301),
    ],
)
def test_sizes(channels, arguments, hidden, count):
    module = Sparta(channels, **arguments)
    assert module.hidden == hidden
    assert parameters(module) == count


def test_at_the_start_conv5_is_the_identity_and_every_parameter_learns():
    for arguments in CONFIGURATIONS:
        torch.manual_seed(0)
        module = Sparta(16, **arguments)
        kernel = module.predict.bias if module.dynamic else module.conv5
        size = module.kernel_size
        impulse = torch.zeros(size, size)
        impulse[size // 2, size // 2] = 1
        assert torch.equal(kernel.detach().view(size, size), impulse)

        x = features(8, 16, 6, 6, dtype=torch.float32)
        y = module(x)
        half = y[x > 0] / x[x > 0]
        assert 0.3 < half.min() < half.max() < 0.7
        (y * features(8, 16, 6, 6, dtype=torch.float32).roll(1, 0)).sum().backward()
        for name, parameter in module.named_parameters():
            if name not in {"conv1.bias", "conv3.bias", "conv6.bias"}:  # the norm behind them takes them away
                assert parameter.grad.abs().max() > 1e-5, name


def test_reset_parameters_begins_anew():
    module = build()
    module.train()(features(2, 6, 4, 4))
    module.reset_parameters()
    assert torch.equal(module.bn1.running_mean, torch.zeros(6, dtype=torch.float64))
    assert torch.equal(module.conv1.bias.detach(), torch.zeros(6, dtype=torch.float64))
    assert module.predict.bias.item() == 1


@pytest.mark.parametrize("arguments", CONFIGURATIONS, ids=str)
def test_in_eval_mode_a_sample_does_not_depend_on_its_batch(arguments):
    module = build(**arguments).eval()
    x = features(4, 6, 4, 4)
    torch.testing.assert_close(module(x)[1:2], module(x[1:2]))
    assert module(x[:0]).shape == (0, 6, 4, 4)


@pytest.mark.parametrize("arguments", [{}, {"share": 2}, {"kernel_size": 3}, {"dynamic": False}], ids=str)
def test_channels_last_stays_and_changes_nothing(arguments):
    module = build(dtype=torch.float32, **arguments)
    x = features(2, 6, 4, 5, dtype=torch.float32)
    want = module.eval()(x)
    got = module.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert want.is_contiguous()
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("arguments", [{}, {"share": 2}, {"kernel_size": 3}, {"dynamic": False}], ids=str)
def test_low_precision_is_near_the_float64_result(arguments):
    module = build(**arguments).eval()
    x = features(2, 6, 4, 4)
    want = module(x)
    low = copy.deepcopy(module).bfloat16()
    got = low(x.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=0.05, atol=0.05)
    got.sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in low.parameters())

    module.float()
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = module(x.to(dtype))
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=0.05, atol=0.05)
        module.zero_grad()
        got.sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("arguments", CONFIGURATIONS, ids=str)
def test_copies_are_equal_and_independent(arguments):
    module = build(**arguments).eval()
    x = features(2, 6, 4, 4)
    want = module(x)
    fresh = Sparta(6, **arguments).double().eval()
    fresh.load_state_dict(module.state_dict())
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    loaded = Sparta(6, **arguments).double().eval()
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh, loaded):
        assert torch.equal(other(x), want)
        with torch.no_grad():
            next(other.parameters()).add_(1)
        assert not torch.equal(other(x), want)
        assert torch.equal(module(x), want)


@pytest.mark.parametrize("arguments", [{}, {"kernel_size": 3, "share": 2}, {"dynamic": False}], ids=str)
def test_torch_compile_takes_the_whole_module(arguments):
    torch._dynamo.reset()
    module = build(dtype=torch.float32, **arguments).eval()
    # aot_eager: the graphs are the thing in question here, not the code made of them.
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 6, 4, 4), (3, 6, 5, 4)):
        x = features(*shape, dtype=torch.float32).requires_grad_()
        want = module(x)
        got = compiled(x)
        torch.testing.assert_close(got, want)
        (gx,) = torch.autograd.grad(got.square().sum(), x)
        (wx,) = torch.autograd.grad(want.square().sum(), x)
        torch.testing.assert_close(gx, wx)


def test_repr_tells_the_configuration():
    text = repr(Sparta(8, hidden=4, kernel_size=3, dynamic=False, share=2))
    assert "8, hidden=4, kernel_size=3, dynamic=False, share=2" in text


# ---- activations by name -----------------------------------------------------------------------------------


def test_activations_by_name():
    assert set(ACTIVATIONS) >= {"relu", "sparta", "sparta-static"}
    x = features(2, 6, 4, 4, dtype=torch.float32)
    for name in ACTIVATIONS:
        assert make_activation(name, 6)(x).shape == x.shape
    assert torch.equal(make_activation("relu", 6)(x), x.clamp(min=0))
    dynamic, static = make_activation("sparta", 300), make_activation("sparta-static", 300)
    assert isinstance(dynamic, Sparta)
    assert isinstance(static, Sparta)
    assert (dynamic.dynamic, static.dynamic, static.channels, static.hidden) == (True, False, 300, 256)


# ---- sites and ResNets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sites", "blocks", "want"),
    [
        ("", (2, 2, 2, 2), set()),
        ("none", (2, 2, 2, 2), set()),
        ("G1.B2", (2, 2, 2, 2), {(1, 2)}),
        ("G1234.B2", (2, 2, 2, 2), {(1, 2), (2, 2), (3, 2), (4, 2)}),
        ("G42.B21", (2, 2, 2, 2), {(2, 1), (2, 2), (4, 1), (4, 2)}),
        ("G3.B6", (3, 4, 6, 3), {(3, 6)}),
        ("G14.B3,G2.B4,G3.B6", (3, 4, 6, 3), {(1, 3), (4, 3), (2, 4), (3, 6)}),
    ],
)
def test_sites_are_parsed(sites, blocks, want):
    assert parse_sites(sites, blocks) == want


@pytest.mark.parametrize(
    ("sites", "blocks", "message"),
    [
        ("G1B2", (2, 2, 2, 2), 'such as "G1234.B2"'),
        ("g1.b2", (2, 2, 2, 2), "got 'g1.b2'"),
        ("G.B2", (2, 2, 2, 2), 'such as "G1234.B2"'),
        ("G1.B", (2, 2, 2, 2), 'such as "G1234.B2"'),
        ("G1.B2 ", (2, 2, 2, 2), 'such as "G1234.B2"'),
        ("G1.B2,", (2, 2, 2, 2), 'such as "G1234.B2"'),
        ("G\N{ARABIC-INDIC DIGIT ONE}.B2", (2, 2, 2, 2), 'such as "G1234.B2"'),
        ("G5.B2", (2, 2, 2, 2), r"groups in 1\.\.4"),
        ("G0.B2", (2, 2, 2, 2), r"groups in 1\.\.4"),
        ("G1.B3", (2, 2, 2, 2), r"blocks in 1\.\.2 of group 1"),
        ("G1.B0", (2, 2, 2, 2), r"blocks in 1\.\.2 of group 1"),
        ("G1234.B4", (3, 4, 6, 3), r"blocks in 1\.\.3 of group 1"),
        ("G11.B2", (2, 2, 2, 2), r"G1\.B2 once"),
        ("G1.B12,G1.B2", (2, 2, 2, 2), r"G1\.B2 once"),
    ],
)
def test_wrong_sites_say_what_is_allowed(sites, blocks, message):
    with pytest.raises(ValueError, match=message):
        parse_sites(sites, blocks)


@pytest.mark.parametrize(
    ("make", "arguments", "count"),
    [
        (resnet18, {}, 11_985_490),
        (resnet18, {"activation": "relu"}, 11_173_962),
        (resnet18, {"sites": ""}, 11_173_962),
        (resnet18, {"sites": "none"}, 11_173_962),
        (resnet34, {}, 22_093_650),
        (resnet34, {"sites": "G14.B3,G2.B4,G3.B6"}, 22_093_650),
        (resnet34, {"activation": "relu"}, 21_282_122),
    ],
)
def test_the_networks_have_the_papers_sizes(make, arguments, count):
    with torch.device("meta"):
        assert parameters(make(**arguments)) == count


@pytest.mark.parametrize(
    ("make", "sites", "want"),
    [
        (resnet18, "G1234.B2", {"layer1.1", "layer2.1", "layer3.1", "layer4.1"}),
        (resnet18, "G3.B12", {"layer3.0", "layer3.1"}),
        (resnet34, "G3.B6", {"layer3.5"}),
        (resnet18, "", set()),
    ],
)
@pytest.mark.parametrize("activation", ["sparta", "sparta-static"])
def test_sparta_stands_at_the_sites_and_relu_elsewhere(make, sites, want, activation):
    model = make(activation=activation, sites=sites, width=2)
    found = {name for name, module in model.named_modules() if isinstance(module, Sparta)}
    assert found == {f"{name}.act2" for name in want}
    assert all(model.get_submodule(name).dynamic == (activation == "sparta") for name in found)
    blocks = [name for name, module in model.named_modules() if hasattr(module, "act2")]
    assert len(blocks) == (8 if make is resnet18 else 16)
    for name in blocks:
        assert isinstance(model.get_submodule(f"{name}.act1"), nn.ReLU)
        if name not in want:
            assert isinstance(model.get_submodule(f"{name}.act2"), nn.ReLU)


def test_the_stem_and_the_groups_have_the_cifar_shapes():
    model = resnet18(num_classes=7, width=4, in_channels=1).eval()
    shapes = {}
    for name in ("bn1", "layer1", "layer2", "layer3", "layer4"):
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: shapes.update({name: tuple(output.shape[1:])})
        )
    assert model(torch.rand(2, 1, 30, 32)).shape == (2, 7)
    assert shapes == {
        "bn1": (4, 30, 32),
        "layer1": (4, 30, 32),
        "layer2": (8, 15, 16),
        "layer3": (16, 8, 8),
        "layer4": (32, 4, 4),
    }


def test_a_relu_network_is_its_formula():
    torch.manual_seed(0)
    model = resnet18(activation="relu", width=3, in_channels=2, mean=(0.4, 0.6), std=0.25).double().eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.shape != (2,):
            tensor.add_(0.1 * torch.rand_like(tensor))
    state = model.state_dict()

    def conv(name: str, value: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(value, weight, None, stride, padding=weight.shape[-1] // 2)

    def norm(name: str, value: Tensor) -> Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (value - mean) / (var + 1e-5).sqrt() * weight + bias

    x = torch.rand(2, 2, 9, 9, dtype=torch.float64)
    out = (x - torch.tensor([0.4, 0.6], dtype=torch.float32).double()[:, None, None]) / 0.25
    out = norm("bn1", conv("conv1", out)).clamp(min=0)
    for group in range(4):
        for block in range(2):
            name, stride = f"layer{group + 1}.{block}", 2 if group and not block else 1
            inner = norm(f"{name}.bn1", conv(f"{name}.conv1", out, stride)).clamp(min=0)
            inner = norm(f"{name}.bn2", conv(f"{name}.conv2", inner))
            if stride == 2:
                out = norm(f"{name}.shortcut.1", conv(f"{name}.shortcut.0", out, stride))
            out = (inner + out).clamp(min=0)
    want = out.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]
    torch.testing.assert_close(model(x), want)


def test_normalisation_lives_in_the_model():
    plain = resnet18(width=4).eval()
    normed = resnet18(width=4, mean=(0.1, 0.5, 0.3), std=(0.2, 0.3, 0.4)).eval()
    assert torch.equal(plain.mean, torch.zeros(3))
    assert torch.equal(plain.std, torch.ones(3))
    state = {name: value for name, value in normed.state_dict().items() if name not in ("mean", "std")}
    assert len(state) == len(normed.state_dict()) - 2
    plain.load_state_dict(state, strict=False)
    x = torch.rand(2, 3, 8, 8)
    by_hand = (x - torch.tensor([0.1, 0.5, 0.3])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    torch.testing.assert_close(normed(x), plain(by_hand))


def test_a_network_is_trained_copied_and_run_in_channels_last():
    torch.manual_seed(0)
    small = {"num_classes": 4, "sites": "G1234.B1", "width": 4, "in_channels": 1}
    model = ResNet((1, 1, 1, 1), **small, mean=0.5, std=0.3)
    x, labels = torch.rand(16, 1, 8, 8), torch.arange(16) % 4
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(model(x), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    want = model(x)
    assert torch.equal(copy.deepcopy(model)(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), want)
    fresh = ResNet((1, 1, 1, 1), **small).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), want)
    fresh.to(memory_format=torch.channels_last)
    torch.testing.assert_close(fresh(x.to(memory_format=torch.channels_last)), want, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(x)
    torch.testing.assert_close(low.float(), want, rtol=0.1, atol=0.1 * want.abs().max().item())


# ---- bad arguments -----------------------------------------------------------------------------------------

WRONG = [
    (lambda: Sparta(0), ValueError, "Sparta: channels"),
    (lambda: Sparta(-3), ValueError, "Sparta: channels"),
    (lambda: Sparta(6.0), TypeError, "Sparta: channels"),
    (lambda: Sparta(True), TypeError, "Sparta: channels"),
    (lambda: Sparta(6, hidden=0), ValueError, "Sparta: hidden"),
    (lambda: Sparta(6, hidden="4"), TypeError, "Sparta: hidden"),
    (lambda: Sparta(6, kernel_size=0), ValueError, "Sparta: kernel_size"),
    (lambda: Sparta(6, kernel_size=2), ValueError, "Sparta: kernel_size must be odd, got 2"),
    (lambda: Sparta(6, kernel_size=(3, 3)), TypeError, "Sparta: kernel_size"),
    (lambda: Sparta(6, dynamic=1), TypeError, "Sparta: dynamic"),
    (lambda: Sparta(6, share=0), ValueError, "Sparta: share"),
    (lambda: Sparta(6, share=1.5), TypeError, "Sparta: share"),
    (
        lambda: Sparta(6)(torch.zeros(2, 5, 4, 4)),
        ValueError,
        r"Sparta: x .*\(N, 6, H, W\), got \(2, 5, 4, 4\)",
    ),
    (lambda: Sparta(6)(torch.zeros(6, 4, 4)), ValueError, "Sparta: x"),
    (lambda: Sparta(6)(torch.zeros(2, 6, 4, 4, dtype=torch.int64)), TypeError, "Sparta: x"),
    (lambda: Sparta(6)([[0.0]]), TypeError, "Sparta: x"),
    (
        lambda: make_activation("swoosh", 6),
        ValueError,
        "make_activation: activation must be one of 'relu', 'leaky-relu'",
    ),
    (lambda: make_activation(None, 6), TypeError, "make_activation: activation must be a string"),
    (lambda: make_activation("relu", 0), ValueError, "make_activation: channels"),
    (lambda: make_activation("sparta", "6"), TypeError, "make_activation: channels"),
    (lambda: parse_sites(12), TypeError, "parse_sites: sites"),
    (lambda: ResNet((2, 2, 2)), ValueError, "ResNet: blocks"),
    (lambda: ResNet(18), ValueError, "ResNet: blocks"),
    (lambda: ResNet((2, 2, 0, 2)), ValueError, "ResNet: blocks"),
    (lambda: ResNet((2, 2, 2.0, 2)), TypeError, "ResNet: blocks"),
    (lambda: resnet18(0), ValueError, "ResNet: num_classes"),
    (lambda: resnet18(10.0), TypeError, "ResNet: num_classes"),
    (lambda: resnet18(activation="swoosh"), ValueError, "make_activation: activation"),
    (lambda: resnet18(activation="swoosh", sites=""), ValueError, "make_activation: activation"),
    (lambda: resnet18(sites="G1234.B3"), ValueError, "parse_sites: sites"),
    (lambda: resnet18(sites=None), TypeError, "parse_sites: sites"),
    (lambda: resnet18(width=0), ValueError, "ResNet: width"),
    (lambda: resnet18(width=0.5), TypeError, "ResNet: width"),
    (lambda: resnet18(in_channels=0), ValueError, "ResNet: in_channels"),
    (lambda: resnet18(width=1, mean=(0.5, 0.5)), ValueError, "ResNet: mean"),
    (lambda: resnet18(width=1, mean=float("nan")), ValueError, "ResNet: mean"),
    (lambda: resnet18(width=1, mean="half"), TypeError, "ResNet: mean"),
    (lambda: resnet18(width=1, std=0.0), ValueError, "ResNet: std"),
    (lambda: resnet18(width=1, std=(0.1, -0.1, 0.1)), ValueError, "ResNet: std"),
    (lambda: resnet18(width=1, std=[[0.1] * 3]), ValueError, "ResNet: std"),
    (lambda: resnet34(sites="G1.B4"), ValueError, "parse_sites: sites"),
    (lambda: resnet34(width=-1), ValueError, "ResNet: width"),
    (lambda: resnet18(width=1)(torch.zeros(2, 1, 8, 8)), ValueError, r"ResNet: x .*\(N, 3, H, W\)"),
    (lambda: resnet18(width=1)(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)), TypeError, "ResNet: x"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=[f"{i}" for i in range(len(WRONG))])
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
