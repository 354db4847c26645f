"""attack.prepare: what is fused, what it keeps, how it follows the model, and what is left with which reason."""

from __future__ import annotations

import copy
import gc
import io
import time
import warnings
import weakref

import pytest
import torch
from prepare_case import assert_same_function, images_of, network, outputs, settle, step
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from sparta_kernels import use_backend
from sparta_kernels.attack import Prepared, perturb, prepare
from sparta_kernels.nn import resnet18

# ---- what was done, and what was left ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "sites", "relus", "own"),
    [("relu", "G1234.B2", 17, 0), ("sparta", "G1234.B2", 13, 4), ("sparta", "G4.B2", 16, 1)],
)
def test_everything_in_a_resnet_is_fused(activation, sites, relus, own):
    prepared = prepare(settle(resnet18(activation=activation, sites=sites, width=8)))
    report = prepared.report
    assert (len(report.folded), report.relus, report.sums, len(report.prepared)) == (20, relus, 8, own)
    assert report.left == {}
    assert ("layer1.0.bn1", "layer1.0.conv1") in report.folded
    assert not any(isinstance(m, (nn.BatchNorm2d, nn.ReLU, nn.Conv2d)) for m in prepared.modules())
    parts = "1 module" if own == 1 else f"{own} modules"
    assert str(report) == f"20 BatchNorms folded, {relus} ReLUs and 8 sums fused, {parts} prepared by themselves"


def test_a_torchvision_resnet_is_fused_too():
    report = prepare(network("torchvision-resnet18")).report
    assert (len(report.folded), report.relus, report.sums, report.left) == (20, 17, 8, {})


def test_normalisation_by_a_function_is_folded_too():
    """timm's networks have their BatchNorm and activation in one module, which calls torch's function."""
    report = prepare(network("timm-efficientnet")).report
    assert len(report.folded) == 49
    assert ("bn1", "conv_stem") in report.folded
    assert report.left == {}
    left = prepare(network("timm-resnetv2")).report.left
    assert left["stages.0.blocks.0.norm1"] == "there is no convolution before it to fold it into"


def test_what_is_left_is_named_with_the_reason():
    left = prepare(network("odd")).report.left
    reasons = {
        "0": "padding is 'reflect'",
        "1": "no convolution before it",
        "7": "follows a ConvTranspose2d",
        "8": "GroupNorm",
        "9": "neither a convolution nor a linear layer",
        "10": "no convolution before it",
        "12": "no convolution before it",
        "17": "no convolution before it",
    }
    for name, reason in reasons.items():
        assert reason in left[name], (name, left[name])
    assert set(left) == set(reasons)
    left = prepare(network("untraceable")).report.left
    assert list(left) == ["part"]
    assert "cannot be traced" in left["part"]
    assert list(prepare(network("whole")).report.left) == [""]
    left = prepare(network("shared")).report.left
    assert "others read the output" not in str(left)


def test_a_convolution_that_others_read_keeps_its_batchnorm():
    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return (self.norm(y) + y).mean((2, 3))

    report = assert_same_function(settle(Read()), images_of()).report
    assert report.folded == ()
    assert report.left == {"norm": "others read the output of conv too"}


def test_hooks_still_run():
    model = settle(resnet18(activation="relu", width=8))
    calls = []
    model.layer2[0].conv1.register_forward_hook(lambda module, args, output: calls.append(1) or output * 2)
    model.layer3.register_forward_pre_hook(lambda module, args: calls.append(2))
    prepared = prepare(model)
    assert prepared.report.left["layer2.0.conv1"] == prepared.report.left["layer3"] == "it has hooks"
    images = images_of(32)
    prepared(images)
    calls.clear()
    torch.testing.assert_close(prepared(images), model(images), rtol=1e-4, atol=1e-4)
    assert calls == [1, 2, 1, 2]


@pytest.mark.parametrize("activation", ["relu", "sparta", "sparta:kernel_size=3"])
def test_backward_hooks_on_every_module_of_the_process(activation):
    """Which pass outputs on as views: autograd refuses to have those overwritten."""
    prepared = prepare(settle(resnet18(activation=activation, width=4)))
    x, seen = images_of(32).requires_grad_(), []
    (expected,) = torch.autograd.grad(prepared(x).sum(), x)
    hook = nn.modules.module.register_module_full_backward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        (found,) = torch.autograd.grad(prepared(x).sum(), x)
    finally:
        hook.remove()
    assert seen.count("FrozenConv") >= 20
    torch.testing.assert_close(found, expected)


# ---- what it keeps -------------------------------------------------------------------------------------------


def saved_by(model, images):
    """What autograd keeps for the backward pass: addresses with sizes, and their bytes together."""
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(images.clone().requires_grad_())
    return logits, list(kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_input_of_a_convolution_is_kept(precision):
    model, images = settle(resnet18(activation="relu", width=8)), images_of(32, count=4)
    prepared = prepare(model, precision=precision)
    prepared(images)  # the first call checks the function
    seen = []
    for module in prepared.modules():
        if type(module).__name__ in ("FrozenConv", "FrozenLinear"):
            module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    _, kept = saved_by(prepared, images)
    assert len(seen) == 21
    addresses = {tensor.untyped_storage().data_ptr() for tensor in kept}
    assert not addresses & {tensor.untyped_storage().data_ptr() for tensor in seen}
    weights = sum(p.numel() * p.element_size() for p in [*prepared.parameters(), *prepared.buffers()])
    total = sum(tensor.numel() * tensor.element_size() for tensor in kept)
    elements = sum(tensor.numel() for tensor in seen)
    assert total <= weights + elements / 8 * 1.2 + 4096  # a bit an element: nothing else


def test_nothing_is_trainable_and_weights_are_shared():
    model = settle(resnet18(activation="sparta", width=8))
    prepared = prepare(model)
    assert not any(p.requires_grad for p in prepared.parameters())
    own = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in prepared.parameters()} <= own
    assert model.linear.weight.data_ptr() in {p.data_ptr() for p in prepared.parameters()}
    assert not {b.data_ptr() for b in prepared.buffers()} & own
    loss = prepared(images_of(32)).sum()
    assert not loss.requires_grad
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["resnet18-relu", "resnet18-sparta", "functional", "untraceable"])
def test_refresh_takes_over_what_was_learnt(name, precision):
    model, images = network(name), images_of(32)
    prepared = prepare(model, precision=precision)
    first = prepared(images)
    prepared.exact(images)
    tensors = [*prepared.parameters(), *prepared.buffers()]
    places = [tensor.data_ptr() for tensor in tensors]
    step(model)
    prepared.refresh()
    assert [tensor.data_ptr() for tensor in tensors] == places
    assert torch.equal(prepared(images), prepare(model, precision=precision)(images))
    assert torch.equal(prepared.exact(images), prepare(model)(images))
    assert not torch.equal(prepared(images), first)


def test_a_refresh_costs_little():
    """Under 2% of a training step with PGD-10 on 128 images, of which eleven passes each way are the most."""
    model, images = settle(resnet18(activation="sparta", width=32)), images_of(32, count=16)
    prepared = prepare(model)

    def seconds(call):
        call()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    passes = 128 / 16 * 11
    assert seconds(prepared.refresh) < 0.02 * passes * seconds(lambda: outputs(prepared, images))


def test_the_model_can_be_given_new_tensors():
    model, images = settle(resnet18(activation="relu", width=8)), images_of(32)
    prepared = prepare(model)
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1
    prepared.refresh()
    assert torch.equal(prepared(images), prepare(model)(images))


# ---- wrapped, saved, copied, refused ---------------------------------------------------------------------------


def test_wrappers_are_looked_through(tmp_path):
    model, images = settle(resnet18(activation="relu", width=8)), images_of(32)
    wanted = prepare(model)(images)
    assert torch.equal(prepare(DataParallel(model).eval())(images), wanted)
    assert torch.equal(prepare(torch.compile(model))(images), wanted)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        prepared = prepare(DistributedDataParallel(model).eval())
    finally:
        torch.distributed.destroy_process_group()
    assert prepared.model is model
    assert torch.equal(prepared(images), wanted)


def test_its_state_dict_is_the_models():
    model, images = settle(resnet18(activation="sparta", width=8)), images_of(32)
    prepared = prepare(model, precision="bf16")
    state = prepared.state_dict()
    assert list(state) == list(model.state_dict())
    other = settle(resnet18(activation="sparta", width=8))
    other.load_state_dict(state)
    step(model)
    prepared.load_state_dict(other.state_dict())
    assert torch.equal(prepared(images), prepare(other, precision="bf16")(images))


def test_copies_and_pickles_are_prepared_anew():
    model, images = settle(resnet18(activation="sparta", width=8)), images_of(32)
    prepared = prepare(model, precision="bf16")
    file = io.BytesIO()
    torch.save(prepared, file)
    file.seek(0)
    for twin in (copy.deepcopy(prepared), torch.load(file, weights_only=False)):
        assert isinstance(twin, Prepared)
        assert twin.model is not model
        assert twin.precision == "bf16"
        assert torch.equal(twin(images), prepared(images))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_prepared_model_under_another_backend(backend):
    model, images = settle(resnet18(activation="sparta", width=8)), images_of(32)
    wanted = prepare(model)(images)
    state = model.state_dict()
    with use_backend(backend):
        fresh = settle(resnet18(activation="sparta", width=8))
        fresh.load_state_dict(state)
        torch.testing.assert_close(prepare(fresh)(images), wanted, rtol=1e-5, atol=1e-5)


def test_nothing_outlives_it():
    model = settle(resnet18(activation="relu", width=8))
    prepared = prepare(model)
    prepared.exact(images_of(32))
    gone = weakref.ref(prepared)
    del prepared
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("make", "options", "error", "words"),
    [
        (lambda: "model", {}, TypeError, "model must be a torch.nn.Module, got str"),
        (lambda: nn.Linear(2, 2).train(), {}, ValueError, "model must be in eval mode"),
        (
            lambda: nn.Sequential(nn.Conv2d(1, 1, 1), nn.Dropout().train()).train(False)[1].train(),
            {},
            ValueError,
            "training mode",
        ),
        (lambda: nn.Linear(2, 2).eval(), {"precision": "fp8"}, ValueError, "precision must be one of 'fp32', "),
        (lambda: nn.Linear(2, 2).eval(), {"precision": "tf32"}, ValueError, "precision must be 'fp32' or 'bf16' on a"),
        (lambda: prepare(nn.Linear(2, 2).eval()), {}, ValueError, "model must not be prepared already"),
    ],
)
def test_refused(make, options, error, words):
    with pytest.raises(error, match=f"^prepare: .*{words}"):
        prepare(make(), **options)


def test_it_stays_as_it_was_prepared():
    prepared = prepare(nn.Linear(2, 2).eval())
    with pytest.raises(ValueError, match="mode must be False"):
        prepared.train()
    assert prepared.eval() is prepared
    with pytest.raises(RuntimeError, match="cannot be moved"):
        prepared.double()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_attack_on_a_stale_view_warns(precision):
    model = settle(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 14), nn.Flatten()))
    images, labels = images_of(), torch.zeros(len(images_of()), dtype=torch.int64)
    prepared = prepare(model, precision=precision)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)

    def attacked():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            perturb(prepared, images, labels, eps=0.1, step_size=0.1, steps=1)
        return [(str(each.message), each.filename) for each in caught]

    assert attacked() == []
    model(images).square().sum().backward()
    assert attacked() == []
    optimiser.step()
    assert prepared.stale
    ((message, file),) = attacked()
    assert "call refresh()" in message
    assert file == __file__
    prepared.refresh()
    assert attacked() == []
    model.train()(images)  # new statistics
    model.eval()
    assert len(attacked()) == 1
    model.load_state_dict(prepared.state_dict())
    prepared.load_state_dict(model.state_dict())
    assert not prepared.stale
    assert attacked() == []
