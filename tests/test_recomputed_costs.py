"""What the attention network in training mode computes in backward, and what it keeps until then."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from conftest import BENCHMARKS
from sparta_case import SHAPE, build, features
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparta_kernels import use_backend
from sparta_kernels.nn import recomputed


@pytest.fixture(autouse=True)
def _made_again(monkeypatch) -> None:
    """The images of these tests are small; what is kept of such is made again all the same."""
    monkeypatch.setattr(recomputed, "_FEW_PIXELS", 0)


# ---- what is computed --------------------------------------------------------------------------------------


class Counted(TorchDispatchMode):
    """Which operations of a backward pass ran, and the masks of those that have one."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[list[bool]] = []
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.names.append(name)
        if name == "convolution_backward":
            self.masks.append(list(args[-1]))
        return func(*args, **(kwargs or {}))


def counted(module: nn.Module, wanted: list[str]) -> tuple[Counted, dict[str, Tensor]]:
    """autograd.grad for some of the inputs only, everything being trainable, and all gradients beside it."""
    x = features(*SHAPE).requires_grad_()
    leaves = {"x": x, **dict(module.named_parameters())}
    loss = module(1 * x).square().sum()
    want = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    with Counted() as mode:
        got = torch.autograd.grad(loss, [leaves[name] for name in wanted])
    all_of_them = dict(zip(leaves, want, strict=True))
    for name, value in zip(wanted, got, strict=True):
        torch.testing.assert_close(value, all_of_them[name], rtol=1e-10, atol=1e-12)
    return mode, all_of_them


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("arguments", [{}, {"dynamic": False}, {"kernel_size": 3}], ids=str)
def test_for_the_images_alone_no_gradient_of_a_weight_is_computed(arguments, kept, monkeypatch):
    if kept:
        monkeypatch.setattr(recomputed, "_FEW_PIXELS", 35)
    module = build(**arguments)
    mode, _ = counted(module, ["x"])
    sites = 2 + module.dynamic  # the BatchNorms; conv2 and, where it is not an outer product, conv4
    outer = module.kernel_size == 1
    ours = [True, False, False]
    if outer:
        assert mode.masks == [ours] * (sites + 1)
    else:  # and conv4; Conv5 is the gate's matter
        assert mode.masks.count(ours) >= sites + 2
        assert not any(mask[2] for mask in mode.masks)
    assert mode.names.count("native_batch_norm_backward") == sites
    if kept:  # h3 is not made again: nobody reads it
        assert "convolution" not in mode.names or not outer
        assert "relu_" not in mode.names


@pytest.mark.parametrize(
    ("name", "masks", "norms", "again"),
    [
        ("predict.bias", [], 0, 0),
        ("predict.weight", [], 0, 0),
        ("conv2.bias", [[False, False, True]], 0, 0),
        ("conv2.weight", [[False, True, False]], 0, 0),
        ("conv4.weight", [[False, True, False]], 0, 1),
        ("bn1.weight", [[True, False, False]], 1, 1),
        ("bn6.bias", [], 1, 2),
        ("conv6.weight", [[False, True, False]], 1, 2),
        ("conv3.bias", [[True, False, False]], 2, 2),
    ],
)
def test_for_one_weight_no_more_is_computed_than_it_takes(name, masks, norms, again):
    mode, _ = counted(build(), [name])
    assert mode.masks == masks
    assert mode.names.count("native_batch_norm_backward") == norms
    assert mode.names.count("convolution") == again


@pytest.mark.parametrize("arguments", [{}, {"dynamic": False}, {"kernel_size": 3}], ids=str)
def test_every_gradient_can_be_asked_for_alone(arguments):
    module = build(**arguments)
    for name, _ in module.named_parameters():
        counted(module, [name])


# ---- what is kept ------------------------------------------------------------------------------------------


def kept_bytes(call) -> int:
    """What autograd keeps for backward, each piece of memory once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    assert output.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("arguments", [{}, {"dynamic": False}, {"kernel_size": 3}], ids=str)
def test_no_hidden_tensor_is_kept(arguments):
    module = build(32, dtype=torch.float32, **arguments)
    x = features(8, 32, 16, 16, dtype=torch.float32).requires_grad_()
    weights = sum(p.nbytes for p in module.parameters())
    bits = (3 if module.dynamic else 2) * x.nbytes // 32
    small = x.nbytes // 32 + 16 * 1024  # spatial, channel, kernel, the means and statistics
    got = kept_bytes(lambda: module(x))
    assert got <= x.nbytes + bits + small + weights
    with use_backend("reference"):
        assert kept_bytes(lambda: module(x)) > (7 if module.dynamic else 5) * x.nbytes


def test_of_small_images_the_outputs_of_convolutions_are_kept(monkeypatch):
    monkeypatch.undo()
    module = build(32, dtype=torch.float32)
    x = features(32, 32, 8, 8, dtype=torch.float32).requires_grad_()
    weights = sum(p.nbytes for p in module.parameters())
    assert 4 * x.nbytes < kept_bytes(lambda: module(x)) < 4.5 * x.nbytes + weights


_PEAK = """
import json, sys, torch
import torch.nn.functional as F
from sparta_kernels.nn import resnet18
sys.path.insert(0, sys.argv[1])
from memory import peak_of_tensors

def peak(activation):
    torch.manual_seed(0)
    model = resnet18(activation=activation).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    images, labels = torch.rand(32, 3, 32, 32), torch.randint(10, (32,))

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    step()
    held = 2 * sum(p.nbytes for p in model.parameters())  # and the momentum; the gradients are given up first
    # The gradients of the step before are given up within the work, and were there before it.
    return held + peak_of_tensors(step, "cpu")

torch.set_num_threads(2)
print(json.dumps({name: peak(name) for name in ("relu", "sparta")}))
"""


def test_a_training_step_takes_little_more_memory_than_with_relu():
    """ResNet-18 on CIFAR's images: at most 1.25 times as much at its peak."""
    done = subprocess.run([sys.executable, "-c", _PEAK, BENCHMARKS], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["sparta"] <= 1.25 * found["relu"]
