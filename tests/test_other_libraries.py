"""Other people's attacks on a SPARTA network, and ours beside them: torchattacks, foolbox, ART.

They are installed from requirements-compare.txt; what is missing is skipped.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import one_thread
from torch import Tensor, nn

from sparta_kernels import attack, data, reference
from sparta_kernels.nn import resnet18

EPS, STEP = 24 / 255, 2 / 255
BATCH = 32  # torchattacks averages the loss, we sum it: a power of two is an exact factor between the gradients
IMAGES = 1000


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def torchattacks():
    return pytest.importorskip("torchattacks", reason="needs torchattacks (requirements-compare.txt)")


@pytest.fixture
def foolbox():
    return pytest.importorskip("foolbox", reason="needs foolbox (requirements-compare.txt)")


@pytest.fixture
def art():
    pytest.importorskip("art", reason="needs adversarial-robustness-toolbox (requirements-compare.txt)")
    import art.attacks.evasion
    import art.estimators.classification

    return art


@pytest.fixture(scope="module", params=["sparta", "relu"])
def random_network(request) -> nn.Module:
    """A narrow ResNet-18 for 3x16x16, with normalisation statistics that are not the trivial ones."""
    torch.manual_seed(0)
    network = resnet18(num_classes=10, activation=request.param, width=8)
    with torch.no_grad():
        for _ in range(3):
            network(torch.rand(16, 3, 16, 16))
    return network.eval()


@pytest.fixture(scope="module")
def random_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(BATCH, 3, 16, 16, generator=generator), torch.randint(10, (BATCH,), generator=generator)


@pytest.fixture(scope="module")
def all_digits() -> tuple[Tensor, Tensor]:
    (images, labels), (more_images, more_labels) = (data.load("digits", None, split) for split in ("train", "test"))
    return torch.cat([images, more_images]) / 255, torch.cat([labels, more_labels])


@pytest.fixture(scope="module")
def digits(all_digits) -> tuple[Tensor, Tensor]:
    """1,000 images that `digits_network` has not been trained on, and their labels."""
    images, labels = all_digits
    return images[:IMAGES], labels[:IMAGES]


@pytest.fixture(scope="module")
def digits_network(all_digits, digits) -> nn.Module:
    """A narrow SPARTA ResNet-18 that tells most of the other digits, trained for seconds."""
    images, labels = (part[IMAGES:] for part in all_digits)
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        digit = data.describe("digits")
        network = resnet18(10, activation="sparta", width=8, in_channels=1, mean=digit.mean, std=digit.std)
        optimizer = torch.optim.Adam(network.parameters(), 4e-3)
        for _ in range(6):
            for rows in torch.randperm(len(images)).split(64):
                noisy = (images[rows] + 0.1 * torch.randn_like(images[rows])).clamp(0, 1)
                optimizer.zero_grad()
                F.cross_entropy(network(noisy), labels[rows]).backward()
                optimizer.step()
    network.eval()
    with torch.no_grad():
        assert error(network, *digits) < 0.1
    return network


@pytest.fixture(params=["model", "prepared"])
def attacked(request, digits_network) -> nn.Module:
    """The trained network, as it is and prepared."""
    return attack.prepare(digits_network) if request.param == "prepared" else digits_network


def error(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((network(images).argmax(1) != labels).float().mean())


def targets_of(labels: Tensor, **options) -> Tensor:
    return reference.pgd_targets(labels, 10, torch.arange(len(labels)), **options)


def start_noise(images: Tensor, seed: int) -> Tensor:
    """The noise with which our attack starts."""
    u = reference.uniform(seed, torch.arange(len(images)), images[0].numel(), reference.PURPOSE_START)
    return ((2 * u - 1) * torch.tensor(EPS)).reshape(images.shape)


def run_torchattacks(torchattacks, network, images, labels, *, steps, targets=None, noise=None, monkeypatch=None):
    """Adversarial images by torchattacks, which starts on the images, or with `noise` on them."""
    found = torchattacks.PGD(network, eps=EPS, alpha=STEP, steps=steps, random_start=noise is not None)
    if targets is not None:
        found.set_mode_targeted_by_function(lambda images, labels: targets, quiet=True)
    with monkeypatch.context() if monkeypatch is not None else contextlib.nullcontext() as patch:
        if noise is not None:  # where torchattacks draws its own
            patch.setattr(Tensor, "uniform_", lambda fresh, low, high: fresh.copy_(noise))
        return found(images, labels)


@pytest.mark.parametrize("start", ["image", "noise"])
@pytest.mark.parametrize("mode", ["targeted", "untargeted"])
def test_our_images_are_torchattacks_images(torchattacks, random_network, random_batch, monkeypatch, mode, start):
    """Bit for bit, on a model that is not prepared."""
    images, labels = random_batch
    targets = targets_of(labels, seed=3) if mode == "targeted" else None
    settings = {"eps": EPS, "step_size": STEP, "steps": 10, "random_start": start == "noise", "seed": 3}
    ours = attack.pgd(random_network, images, labels, targets=targets, targeted=mode == "targeted", **settings)
    noise = start_noise(images, seed=3) if start == "noise" else None
    theirs = run_torchattacks(
        torchattacks, random_network, images, labels, steps=10, targets=targets, noise=noise, monkeypatch=monkeypatch
    )
    assert torch.equal(ours.adversarial, theirs)
    assert (theirs - images).abs().max() > 9 * STEP  # and they have gone somewhere


def test_another_start_gives_other_images(torchattacks, random_network, random_batch, monkeypatch):
    """That the test above can fail."""
    images, labels = random_batch
    ours = attack.pgd(random_network, images, labels, eps=EPS, step_size=STEP, steps=2, seed=3)
    theirs = run_torchattacks(
        torchattacks,
        random_network,
        images,
        labels,
        steps=2,
        targets=ours.targets,
        noise=start_noise(images, seed=4),
        monkeypatch=monkeypatch,
    )
    assert not torch.equal(ours.adversarial, theirs)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_our_error_on_a_prepared_model_is_torchattacks_error(
    torchattacks, digits_network, digits, monkeypatch, precision
):
    """Within half a point on 1,000 images: same start, same targets, same step."""
    images, labels = digits
    theirs = run_torchattacks(
        torchattacks,
        digits_network,
        images,
        labels,
        steps=20,
        targets=targets_of(labels),
        noise=start_noise(images, seed=0),
        monkeypatch=monkeypatch,
    )
    prepared = attack.prepare(digits_network, precision=precision)
    ours = attack.pgd(prepared, images, labels, eps=EPS, step_size=STEP, steps=20)
    wrong = float((ours.predictions[20] != labels).float().mean())
    expected = error(digits_network, theirs, labels)
    assert 0.2 < expected < 0.9  # neither of them is at an end of the scale
    assert abs(wrong - expected) <= 0.005
    assert error(digits_network, ours.adversarial, labels) == pytest.approx(wrong, abs=0.001)


def check(network, digits_network, adversarial, digits, expected):
    """Adversarial images of someone else's attack lie where they may, and deceive about as many as ours."""
    images, labels = digits
    assert adversarial.shape == images.shape
    assert float((adversarial - images).abs().max()) <= EPS + 1e-6
    assert 0 <= float(adversarial.min()) <= float(adversarial.max()) <= 1
    assert error(digits_network, adversarial, labels) == pytest.approx(expected, abs=0.02)
    assert not network.training


@pytest.fixture(scope="module")
def our_error(digits_network, digits) -> float:
    """What ours reaches from the images themselves, in 20 steps towards the same targets."""
    images, labels = digits
    settings = {"eps": EPS, "step_size": STEP, "steps": 20, "random_start": False}
    found = attack.pgd(digits_network, images, labels, targets=targets_of(labels), **settings)
    return float((found.predictions[20] != labels).float().mean())


def test_torchattacks_on_a_sparta_network(torchattacks, attacked, digits_network, digits, our_error):
    images, labels = digits
    found = run_torchattacks(torchattacks, attacked, images, labels, steps=20, targets=targets_of(labels))
    check(attacked, digits_network, found, digits, our_error)


def test_foolbox_on_a_sparta_network(foolbox, attacked, digits_network, digits, our_error):
    images, labels = digits
    model = foolbox.PyTorchModel(attacked, bounds=(0, 1), device="cpu")
    pgd = foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=20, random_start=False)
    _, found, _ = pgd(model, images, foolbox.criteria.TargetedMisclassification(targets_of(labels)), epsilons=EPS)
    check(attacked, digits_network, found, digits, our_error)


def test_art_on_a_sparta_network(art, attacked, digits_network, digits, our_error):
    images, labels = digits
    classifier = art.estimators.classification.PyTorchClassifier(
        attacked,
        loss=nn.CrossEntropyLoss(reduction="sum"),
        input_shape=tuple(images.shape[1:]),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    pgd = art.attacks.evasion.ProjectedGradientDescent(
        classifier, norm=np.inf, eps=EPS, eps_step=STEP, max_iter=20, targeted=True, batch_size=250, verbose=False
    )
    one_hot = F.one_hot(targets_of(labels), 10).numpy()
    found = torch.from_numpy(pgd.generate(images.numpy(), one_hot))
    check(attacked, digits_network, found, digits, our_error)


def test_a_prepared_model_stays_where_it_is(digits_network):
    """Others say `.to(device)` first."""
    prepared = attack.prepare(digits_network)
    assert prepared.to("cpu") is prepared.float() is prepared
    with pytest.raises(RuntimeError, match="cannot be moved or converted"):
        prepared.double()
    with pytest.raises(RuntimeError, match="cannot be moved or converted"):
        prepared.to("meta")
