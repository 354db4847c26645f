"""replace_relu: which ReLUs of a network change, that only they do, and what the network can still do afterwards."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision_here import import_torchvision

from sparta_kernels import attack
from sparta_kernels.nn import DyReLU, Sparta, replace_relu, resnet18

# ---- small networks -------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """A block as torchvision writes it: one module, called twice, in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class Functional(Shared):
    """As pytorch-cifar writes it, with every spelling of ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = torch.relu(self.bn2(self.conv2(out))).relu_()
        return (out + x).relu()


class Asking(Shared):
    """One that torch.fx cannot trace: it asks for a value."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(out + x) if out.sum() > -1e9 else out


class Moody(Shared):
    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(out + F.dropout(x, 0.5, self.training))


class Keeping(Shared):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.last + x)


class Overwriting(Shared):
    """One that relies on a ReLU that writes into its input."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        self.relu(out)
        y = out + x
        self.relu(y)
        return y


class Net(nn.Module):
    """Two groups of two blocks."""

    def __init__(self, block: type[nn.Module], channels: int = 4) -> None:
        super().__init__()
        self.conv1, self.relu = nn.Conv2d(3, channels, 3), nn.ReLU()
        self.layer1 = nn.Sequential(block(channels), block(channels))
        self.down = nn.Conv2d(channels, 2 * channels, 1, stride=2)
        self.layer2 = nn.ModuleList([block(2 * channels), block(2 * channels)])
        self.fc = nn.Linear(2 * channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.layer1(self.relu(self.conv1(x))))
        for block in self.layer2:
            x = block(x)
        return self.fc(F.relu(x.mean((2, 3))))


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape or (2, 3, 9, 7), generator=torch.Generator().manual_seed(seed))


def net(block: type[nn.Module] = Shared) -> nn.Module:
    torch.manual_seed(1)
    return Net(block).eval()


def names(report) -> list[str]:
    return [each.name for each in report.replaced]


def spartas(model: nn.Module) -> list[str]:
    return [name for name, part in model.named_modules() if isinstance(part, Sparta)]


def by_hand(block: nn.Module, x: Tensor, first, second) -> Tensor:
    """A block of the kind `Shared`, its two activations named."""
    out = block.bn2(block.conv2(first(block.bn1(block.conv1(x)))))
    return second(out + x)


# ---- what is replaced -----------------------------------------------------------------------------------------------


def test_ours_becomes_the_resnet_with_sparta():
    torch.manual_seed(0)
    model, want = resnet18(4, "relu", width=4), resnet18(4, "sparta", width=4)
    report = replace_relu(model)
    assert names(report) == spartas(want) == spartas(model)
    assert [each.channels for each in report.replaced] == [4, 8, 16, 32]
    assert report.parameters == sum(p.numel() for p in want.parameters()) - sum(
        p.numel() for p in resnet18(4, "relu", width=4).parameters()
    )
    assert len(report.left) == 13
    assert set(report.left.values()) == {"not asked for"}
    model.load_state_dict(want.state_dict())
    x = images(2, 3, 8, 8)
    assert torch.equal(model.eval()(x), want.eval()(x))


def test_a_model_elsewhere_than_on_the_default_device():
    model = net()
    with torch.device("meta"):
        assert replace_relu(model, "leaky-relu").replaced


@pytest.mark.parametrize("where", ["last-of-group", "last-of-block"])
def test_a_module_called_twice_changes_at_its_last_call(where):
    model, x = net(), torch.randn(2, 4, 5, 5)
    report = replace_relu(model, "sparta", where)
    every = ["layer1.0.act2", "layer1.1.act2", "layer2.0.act2", "layer2.1.act2"]
    assert names(report) == spartas(model) == (every if where == "last-of-block" else every[1::2])
    assert report.replaced[-1].was == "ReLU 2 of layer2.1: layer2.1.relu"
    block = model.layer1[1]
    want = by_hand(block, x, F.relu, block.act2)
    assert not torch.allclose(want, by_hand(block, x, F.relu, F.relu))
    torch.testing.assert_close(block(x), want)
    other = model.layer1[0]
    torch.testing.assert_close(other(x), by_hand(other, x, F.relu, getattr(other, "act2", F.relu)))


def test_functions_change_too():
    model, x = net(Functional), torch.randn(2, 4, 5, 5)
    report = replace_relu(model, "dyrelu:k=2", "last-of-block")
    assert names(report)[0] == "layer1.0.act4"
    assert report.replaced[0].was == "ReLU 4 of layer1.0: a function"
    block = model.layer1[0]
    assert isinstance(block.act4, DyReLU)
    assert block.act4.k == 2
    out = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu())).relu()
    torch.testing.assert_close(block(x), block.act4(out + x))
    assert report.left["act2"] == "its input is no feature map (N, C, H, W) but (1, 8)"


def test_a_function_that_chooses_sees_every_relu_of_a_feature_map():
    model, seen = net(), []

    def where(name: str, channels: int) -> bool:
        seen.append((name, channels))
        return name in ("relu", "layer1.0.act1")

    report = replace_relu(model, "swish", where)
    blocks = [(f"layer{i}.{j}.act{k}", 4 * i) for i in (1, 2) for j in (0, 1) for k in (1, 2)]
    assert seen == [("relu", 4), *blocks]
    assert names(report) == ["relu", "layer1.0.act1"]
    assert isinstance(model.relu, nn.SiLU)
    block, x = model.layer1[0], torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(block(x), by_hand(block, x, F.silu, F.relu))


def test_torchvisions_resnets():
    import_torchvision()
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    for kind, number, size in ((BasicBlock, 2, 811_528), (Bottleneck, 3, 3_226_376)):
        torch.manual_seed(0)
        model = ResNet(kind, [1, 2, 1, 1]).eval()
        before, original = copy.deepcopy(model.layer2[1]), set(model.state_dict())
        report = replace_relu(model)
        sites = [f"layer{i}.{1 if i == 2 else 0}.act{number}" for i in (1, 2, 3, 4)]
        assert names(report) == spartas(model) == sites
        assert report.parameters == size
        assert original < set(model.state_dict())
        block, x = model.layer2[1], torch.randn(2, before.conv1.in_channels, 4, 4)
        assert isinstance(block, kind)
        assert block.stride == before.stride
        sums: list[Tensor] = []
        hook = block.get_submodule(f"act{number}").register_forward_pre_hook(lambda _, args: sums.append(args[0]))  # noqa: B023
        y = block(x)
        hook.remove()
        torch.testing.assert_close(sums[0].relu(), before(x))  # all that comes before is as it was
        torch.testing.assert_close(y, block.get_submodule(f"act{number}")(sums[0]))


def test_timms_by_name():
    import_torchvision()
    timm = pytest.importorskip("timm")
    model = timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, [1, 2, 1, 1], channels=(8, 8, 8, 8), num_classes=3)
    kinds = {type(part) for part in model.modules()}
    report = replace_relu(model, "feature-denoising")
    assert names(report) == ["layer1.0.act2", "layer2.1.act2", "layer3.0.act2", "layer4.0.act2"]
    assert {each.was for each in report.replaced} == {"the ReLU of that name"}
    assert [each.channels for each in report.replaced] == [8] * 4
    assert all(type(part) in kinds for part in model.modules() if not type(part).__module__.startswith("sparta"))


def test_blocks_in_wrapped_networks_and_named_groups_are_found():
    wrapped = nn.Sequential(nn.Identity(), net())
    assert names(replace_relu(wrapped)) == ["1.layer1.1.act2", "1.layer2.1.act2"]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(Shared(4)))
    assert names(replace_relu(model)) == ["1.0.act2"]


def test_plain_networks_want_a_function():
    relu = nn.ReLU()
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        relu,
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        relu,
        nn.Flatten(),
        nn.LazyLinear(2),
    )
    for where in ("last-of-group", "last-of-block"):
        with pytest.raises(ValueError, match=r"where must be a function .*'last-of-.*its ReLUs: 1, 3, 5$"):
            replace_relu(model, where=where, example=images(1, 3, 9, 9))
    report = replace_relu(model, "maxout", lambda name, channels: channels == 6, example=images(1, 3, 9, 9))
    assert names(report) == ["5"]
    assert model[1] is relu  # which stood at 5, too
    assert str(report).splitlines() == [
        "1 ReLU replaced by maxout (+84 parameters), 2 left",
        "  5      6 channels, was the ReLU of that name",
        "left, not asked for: 1, 3",
    ]


def test_relu6_is_named_but_not_replaced():
    """A MobileNet has little else, and whoever asks for its ReLUs should hear of it."""
    kinds = [nn.ReLU6, nn.ReLU, *[nn.ReLU6] * 13]
    model = nn.Sequential(*(part for kind in kinds for part in (nn.Conv2d(3, 3, 1), kind())))
    report = replace_relu(model, "maxout", lambda name, channels: True, example=images(1, 3, 9, 9))
    assert names(report) == ["3"]
    assert set(report.left.values()) == {"it is a ReLU6, not a ReLU"}
    assert [type(part) for part in model[1::2]].count(nn.ReLU6) == 14
    first = ", ".join(map(str, [1, *range(5, 27, 2)]))
    assert str(report).splitlines()[2:] == [f"left: {first} and 2 more: it is a ReLU6, not a ReLU"]


# ---- what cannot be replaced ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (Asking, r"its forward cannot be traced \(TraceError: .*"),
        (Moody, "its forward differs between training and eval mode"),
        (Keeping, "its forward stores what it computes"),
        (Overwriting, "it reads a tensor that its ReLU has written over"),
    ],
)
def test_blocks_that_cannot_be_traced_are_left(block, why):
    model = net()
    model.layer1[1] = block(4).eval()
    kind, state, x = type(model.layer1[1]), set(vars(model.layer1[1])), images()
    want = model(x)
    with pytest.raises(
        ValueError, match=f"(?s)where must ask for a ReLU that can be replaced.*left: layer1.1.act2: {why}"
    ):
        replace_relu(model, where=lambda name, channels: name == "layer1.1.act2")
    assert type(model.layer1[1]) is kind
    assert set(vars(model.layer1[1])) - {"last"} == state - {"last"}
    assert torch.equal(model(x), want)
    assert "act2" not in dict(model.layer1[1].named_modules())

    report = replace_relu(model, where=lambda name, channels: name.endswith("1.act2"))
    assert names(report) == spartas(model) == ["layer2.1.act2"]
    assert "1 ReLU replaced by sparta" in str(report)
    assert f"left: layer1.1.act2: {why.split(' (')[0].split(chr(92))[0]}" in str(report)


def test_a_model_that_computes_something_else_stays_as_it_was():
    class Writing(nn.Module):
        """Relies on a ReLU of its own that writes into its input, which no look at one call can tell."""

        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(channels, channels, 1), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            out = self.conv(x)
            self.relu(out)
            return out

    model, x = net(), images()
    model.layer1 = nn.Sequential(Writing(4), Writing(4)).eval()
    want, modules, kinds = model(x), list(model.modules()), [type(part) for part in model.modules()]
    with pytest.raises(ValueError, match=r"model must compute the same .* layer1.1.relu, layer2.1.act2, but does not"):
        replace_relu(model)
    assert list(model.modules()) == modules
    assert [type(part) for part in modules] == kinds
    assert torch.equal(model(x), want)


def test_a_model_that_fails_with_other_relus_stays_as_it_was():
    class Optional(nn.Module):
        """Asks whether it was given a second argument, which torch.fx has always given it."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return F.relu(self.conv(x if mask is None else x * mask))

    model, x = Optional(), torch.rand(2, 3, 8, 8)
    want = model(x)
    with pytest.raises(
        ValueError, match=r"model must run with other ReLUs at act1, but fails \(TypeError: unsupported"
    ):
        replace_relu(model, where=lambda name, channels: True)
    assert type(model) is Optional
    assert [name for name, _ in model.named_children()] == ["conv"]
    assert torch.equal(model(x), want)


def test_a_relu_called_with_two_numbers_of_channels_is_left():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.more, self.relu = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Sequential(nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.more(self.relu(self.conv(x))))

    with pytest.raises(ValueError, match=r"left: relu\.0: it is called with 4 and 6 channels"):
        replace_relu(Twice(), where=lambda name, channels: True)


def test_a_hooked_relu_is_left():
    model = net()
    model.relu.register_forward_hook(lambda *_: None)
    report = replace_relu(model, "elu", lambda name, channels: True)
    assert len(report.replaced) == 8
    assert report.left == {"relu": "it has hooks", "act2": "its input is no feature map (N, C, H, W) but (1, 8)"}


WRONG = [
    (lambda: replace_relu("resnet18"), TypeError, "model must be a torch.nn.Module, got str"),
    (lambda: replace_relu(net(), "swoosh"), ValueError, "activation must be one of"),
    (lambda: replace_relu(net(), where="last"), ValueError, "where must be one of 'last-of-group', 'last-of-block'"),
    (lambda: replace_relu(net(), where=3), ValueError, "where must be one of"),
    (lambda: replace_relu(net(), example=(1, 3, 8, 8)), TypeError, "example must be a tensor, got tuple"),
    (lambda: replace_relu(torch.compile(net())), ValueError, "model must be neither wrapped nor compiled"),
    (lambda: replace_relu(nn.Linear(2, 2)), ValueError, "example must be given: the model has no torch.nn.Conv2d"),
    (
        lambda: replace_relu(nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Linear(5, 5))),
        ValueError,
        r"example must be given: the model fails on \(1, 3, 299, 299\): mat1 and mat2",
    ),
    (lambda: replace_relu(nn.Conv2d(3, 4, 1)), ValueError, "its ReLUs: none"),
    (lambda: replace_relu(net(), where=lambda *_: False), ValueError, "where must ask for a ReLU that can be replaced"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- what the network can still do ----------------------------------------------------------------------------------


@pytest.fixture
def replaced() -> nn.Module:
    model = net()
    replace_relu(model, "sparta", "last-of-block")
    return model


def test_new_modules_are_as_what_surrounds_them():
    model = net().double().train()
    model.layer1.eval()
    modes = {part: part.training for part in model.modules()}
    replace_relu(model)
    assert all(part.training == mode for part, mode in modes.items())
    assert not any(part.training for part in model.layer1.modules())
    assert all(part.training for part in model.layer2[1].act2.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    model.train()(images().double()).sum().backward()
    assert model.layer1[1].act2.conv1.weight.grad.abs().sum() > 0
    with torch.device("meta"):
        model = resnet18(activation="relu", width=4)
    replace_relu(model)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_what_the_model_counts_and_draws_is_untouched():
    model = net().train()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(7)
    replace_relu(model, "swish")
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_copies_pickles_and_state_dicts(replaced):
    x = images()
    want = replaced(x)
    stored = io.BytesIO()
    torch.save(replaced, stored)
    stored.seek(0)
    twice = pickle.loads(pickle.dumps(copy.deepcopy(replaced)))
    for other in (copy.deepcopy(replaced), torch.load(stored, weights_only=False), twice):
        assert torch.equal(other(x), want)
        assert isinstance(other.layer1[0], Shared)
        with torch.no_grad():
            other.layer1[0].act2.conv1.weight.zero_()
        assert not torch.equal(other(x), want)
        assert torch.equal(replaced(x), want)
    other = Net(Shared).eval()
    replace_relu(other, "sparta", "last-of-block")
    other.load_state_dict(replaced.state_dict())
    assert torch.equal(other(x), want)


def test_replicas_call_their_own_modules(replaced):
    block = replaced.layer1[0]
    replica = block._replicate_for_data_parallel()  # what DataParallel makes on every device
    replica._modules["act2"] = nn.Identity()
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(replica(x), by_hand(block, x, F.relu, nn.Identity()))
    torch.testing.assert_close(block(x), by_hand(block, x, F.relu, block.act2))


def test_hooks_and_attributes_of_a_block_stay():
    model, seen = net(), []
    model.layer1[1].register_forward_hook(lambda *_: seen.append("hook"))
    model.layer1[1].note = "kept"
    replace_relu(model)
    seen.clear()
    model(images())
    assert seen == ["hook"]
    assert model.layer1[1].note == "kept"


@pytest.mark.parametrize("activation", ["sparta", "se", "dyrelu", "feature-denoising"])
def test_relus_of_activations_are_theirs(activation):
    model, seen = net(), []
    replace_relu(model, activation)
    replace_relu(model, "elu", lambda name, channels: not seen.append(name))
    assert seen == ["relu", *(f"layer{i}.{rest}" for i in (1, 2) for rest in ("0.act1", "0.act2", "1.relu"))]


def test_again(replaced):
    report = replace_relu(replaced, "gelu", lambda name, channels: name == "layer1.0.relu")
    assert names(report) == ["layer1.0.relu"]  # which is called once by now
    block, x = replaced.layer1[0], torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(block(x), by_hand(block, x, F.gelu, block.act2))
    assert torch.equal(pickle.loads(pickle.dumps(block))(x), block(x))


@pytest.mark.parametrize("where", ["last-of-group", "last-of-block"])
def test_the_last_one_is_not_another_one_the_second_time(replaced, where):
    state = replaced.state_dict().keys()
    with pytest.raises(ValueError, match=r"where must be a function .* replaced: layer1\.0\.act2, "):
        replace_relu(copy.deepcopy(replaced), "gelu", where)
    assert replaced.state_dict().keys() == state


def test_compiled_without_a_graph_break(replaced):
    torch._dynamo.reset()
    block, x = replaced.layer1[0], torch.randn(2, 4, 5, 5)
    block.act2 = nn.SiLU()
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), by_hand(block, x, F.relu, F.silu))


def test_prepared_for_attack(replaced):
    prepared, x = attack.prepare(replaced), images().requires_grad_()
    (want,) = torch.autograd.grad(replaced(x).sum(), x)
    (got,) = torch.autograd.grad(prepared(x).sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)
    report = prepared.report
    assert report.left == {}
    assert report.prepared == tuple(spartas(replaced))
    assert len(report.folded) == 8
    assert report.relus == 6  # of 10, four are SPARTA now
