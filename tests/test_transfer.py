"""SPARTA from one network to another: what is copied, what stays as it is, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from sparta_kernels import attack, nn, training
from sparta_kernels.nn import Sparta
from sparta_kernels.training import freeze_sparta, keep_frozen_in_eval, transfer

pytestmark = pytest.mark.usefixtures("one_thread", "few_images")

SITES = ("G1.B2", "G2.B2", "G3.B2", "G4.B2")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A function that gives a stored network, trained for an epoch, with these settings."""
    folder = tmp_path_factory.mktemp("transfer")
    found = {}

    def store(**options):
        key = tuple(sorted(options.items()))
        if key not in found:
            found[key] = folder / f"{len(found)}.safetensors"
            training.train(
                training.Settings(**{"width": 2, "epochs": 1, "attack": "none", "seed": 5} | options), found[key]
            )
        return found[key]

    return store


def _spartas(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Sparta)}


def _state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("source", "target"), [("resnet18", "resnet34"), ("resnet34", "resnet18")])
def test_every_tensor_goes_to_its_site_and_nothing_else(stored, source, target):
    path = stored(model=source)
    torch.manual_seed(1)
    model = getattr(nn, target)(num_classes=7, in_channels=3, width=2)  # another data set, another depth
    before = _state(model)
    found = transfer(model, path, freeze=False)
    assert (found.sites, found.model, found.data, found.epoch) == (SITES, source, "digits", 1)
    assert str(found) == f"SPARTA at G1.B2, G2.B2, G3.B2, G4.B2 from {source} after 1 epochs on digits"
    theirs, ours = training.load_checkpoint(path)[0].state_dict(), model.state_dict()
    moved = [name for name in ours if any(name.startswith(f"layer{g}.1.act2.") for g in range(1, 5))]
    assert len(moved) == 4 * len(Sparta(2).state_dict())
    assert all(torch.equal(ours[name], theirs[name]) for name in moved)
    assert not torch.equal(ours["layer1.1.act2.bn1.running_mean"], torch.zeros(2))  # buffers too
    assert all(torch.equal(ours[name], before[name]) for name in ours.keys() - set(moved))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_frozen_ones_do_not_learn_and_the_layers_below_do(stored):
    torch.manual_seed(2)
    model = nn.resnet18(width=2, in_channels=1)
    transfer(model, stored(), freeze=True)
    before = _state(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    for _ in range(3):
        model.train()
        keep_frozen_in_eval(model)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    after = model.state_dict()
    frozen = {name for name in after if ".act2." in name}
    assert frozen
    assert all(torch.equal(after[name], before[name]) for name in frozen)
    learnt = {name for name, parameter in model.named_parameters() if name not in frozen}
    assert all(not torch.equal(after[name], before[name]) for name in learnt)
    assert not torch.equal(after["layer1.0.bn1.running_mean"], before["layer1.0.bn1.running_mean"])
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name in frozen)


def test_the_gradient_below_is_that_of_constants(stored):
    torch.manual_seed(3)
    model = nn.resnet18(width=2, in_channels=1).double()
    transfer(model, stored(), freeze=True)
    other = copy.deepcopy(model).requires_grad_(True)
    x, y = torch.rand(4, 1, 8, 8, dtype=torch.double), torch.arange(4)
    for network in (model, other):
        network.train()
        for sparta in _spartas(network).values():
            sparta.eval()  # by hand
        F.cross_entropy(network(x), y).backward()
    for (name, parameter), wanted in zip(model.named_parameters(), other.parameters(), strict=True):
        if ".act2." not in name:
            torch.testing.assert_close(parameter.grad, wanted.grad)
            assert parameter.grad.abs().max() > 0, name


def test_only_what_is_frozen_is_kept_in_eval_mode():
    model = nn.resnet18(width=2)
    model.layer2[1].act2.requires_grad_(False)
    model.layer3[1].act2.conv1.requires_grad_(False)  # a part of it
    model.train()
    keep_frozen_in_eval(model)
    assert [name for name, sparta in _spartas(model).items() if not sparta.training] == ["layer2.1.act2"]
    assert not model.layer2[1].act2.bn1.training
    assert all(m.training for n, m in model.named_modules() if not n.startswith("layer2.1.act2"))
    freeze_sparta(model)
    assert not any(sparta.training or sparta.bn3.training for sparta in _spartas(model).values())


@pytest.mark.parametrize("frozen", [True, False])
def test_an_attack_sees_what_was_transferred(stored, frozen):
    torch.manual_seed(4)
    model = nn.resnet18(width=2, in_channels=1).eval()
    prepared = attack.prepare(model)
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6)
    before = prepared(x)
    transfer(model, stored(), freeze=frozen)
    prepared.refresh()
    assert not torch.equal(prepared(x), before)
    for view in (prepared, attack.prepare(model)):
        torch.testing.assert_close(view(x), model(x), rtol=1e-4, atol=1e-5)
    results = [
        attack.perturb(network, x, y, eps=0.1, step_size=0.03, steps=2) for network in (model, attack.prepare(model))
    ]
    assert (results[0] - results[1]).abs().max() < 1e-5
    wanted = [not frozen if ".act2." in name else True for name, _ in model.named_parameters()]
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted  # as before the attack


def test_mismatches_are_refused_and_nothing_changes(stored, tmp_path):
    path, plain, static = stored(), stored(activation="relu"), stored(activation="sparta-static")
    (tmp_path / "damaged").write_bytes(path.read_bytes()[:-9])
    wide, other_sites, relu = (
        nn.resnet18(width=4),
        nn.resnet18(width=2, sites="G12.B12"),
        nn.resnet18(activation="relu"),
    )
    hidden, shared, large = (nn.resnet18(width=2) for _ in range(3))
    hidden.layer4[1].act2 = Sparta(16, hidden=3)
    shared.layer4[1].act2 = Sparta(16, share=2)
    large.layer4[1].act2 = Sparta(16, kernel_size=3)
    same = nn.resnet18(width=2)
    everywhere = "G1.B2, G2.B2, G3.B2, G4.B2"
    for model, source, error, words in [
        (wide, path, ValueError, f"model must have channels 2 at G1.B2, as {path} has, got 4"),
        (hidden, path, ValueError, "model must have hidden 16 at G4.B2"),
        (shared, path, ValueError, f"model must have share 1 at G4.B2, as {path} has, got 2"),
        (large, path, ValueError, "model must have kernel_size 1 at G4.B2"),
        (same, static, ValueError, "model must have dynamic False at G1.B2"),
        (other_sites, path, ValueError, f"where {path} has, at {everywhere}, got G1.B1, G1.B2, G2.B1, G2.B2"),
        (nn.resnet18(width=2, sites="G1234.B12"), path, ValueError, f"at {everywhere}, got G1.B1, G1.B2, G2.B1"),
        (relu, path, ValueError, f"at {everywhere}, got none"),
        (same, plain, ValueError, f"path must be a network with SPARTA, got {plain}, which has none"),
        (same, tmp_path / "damaged", training.CheckpointError, "damaged"),
        (same, tmp_path / "none", FileNotFoundError, "there is no such file"),
    ]:
        before = _state(model)
        with pytest.raises(error) as caught:
            transfer(model, source, freeze=True)
        assert words in str(caught.value)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_network_of_other_names_keeps_its_own(stored):
    model = torch.nn.Sequential(Sparta(2), torch.nn.ReLU())
    with pytest.raises(ValueError, match=r"at G1\.B2, G2\.B2, G3\.B2, G4\.B2, got 0$"):
        transfer(model, stored(), freeze=False)
