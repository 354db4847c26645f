"""What an attack may also do: restarts, images alone, another precision; and how many passes each takes."""

from __future__ import annotations

import pytest
import torch
from attack_case import SETTINGS, Net, images_and_labels, network
from torch import nn

from sparta_kernels.attack import perturb, pgd, prepare

# Weak enough that restarts differ in whom they mislead.
WEAK = {"eps": 12 / 255, "step_size": 4 / 255, "steps": 3, "report_at": [1, 3], "seed": 11}


@pytest.fixture
def model() -> Net:
    return network()


@pytest.fixture
def images() -> torch.Tensor:
    return images_and_labels()[0]


@pytest.fixture
def labels() -> torch.Tensor:
    return images_and_labels()[1]


@pytest.mark.parametrize("targeted", [True, False])
def test_restarts_give_the_worst_case(model, images, labels, targeted):
    labels = model(images).argmax(1)  # right at first, so that every restart has something to do
    model.linear.weight.data /= 8
    options = {**WEAK, "targeted": targeted}
    runs = [pgd(model, images, labels, **options, restart=4 + r) for r in range(5)]
    found = pgd(model, images, labels, **options, restart=4, restarts=5)
    fooled = {k: torch.stack([run.predictions[k] != labels for run in runs]) for k in (1, 3)}
    first = {k: mask.float().argmax(0) for k, mask in fooled.items()}  # 0 where none misleads
    assert len(set(first[3].tolist())) > 1  # otherwise one restart would do
    for i in range(len(images)):
        best = runs[first[3][i]]
        assert torch.equal(found.adversarial[i], best.adversarial[i])
        assert torch.equal(found.losses[:, i], best.losses[:, i])
        if targeted:
            assert found.targets[i] == best.targets[i]
        for k in (1, 3):
            assert found.predictions[k][i] == runs[first[k][i]].predictions[k][i]
    if targeted:
        for k in (1, 3):
            assert torch.equal(found.hits[k], torch.stack([run.hits[k] for run in runs]).any(0))
            assert torch.equal(runs[0].hits[k], runs[0].predictions[k] == runs[0].targets)
    else:
        assert found.hits == {}


def test_restarts_know_the_last_iterate_unasked(model, images, labels):
    found = pgd(model, images, labels, **{**WEAK, "report_at": [1]}, restarts=3)
    whole = pgd(model, images, labels, **WEAK, restarts=3)
    assert list(found.predictions) == list(found.hits) == [1]
    assert torch.equal(found.adversarial, whole.adversarial)


def test_progress_over_restarts(model, images, labels):
    seen = []
    pgd(model, images, labels, **WEAK, restarts=3, progress=seen.append)
    assert seen == list(range(12))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("restarts", 0, ValueError),
        ("restarts", True, TypeError),
        ("restarts", 2**24 + 1, ValueError),
        ("restart", 2**24 - 1, ValueError),
    ],
)
def test_wrong_restarts(model, images, labels, name, value, error):
    with pytest.raises(error, match=f"^pgd: {name} must be "):
        pgd(model, images, labels, **SETTINGS, **{"restarts": 2, name: value})
    assert model.calls == 0


def test_images_alone_take_a_pass_less(model, images, labels):
    wanted = pgd(model, images, labels, **SETTINGS, seed=2, restart=9).adversarial
    model.calls = 0
    found = perturb(model, images, labels, **SETTINGS, seed=2, restart=9)
    assert torch.equal(found, wanted)
    assert model.calls == SETTINGS["steps"]
    assert perturb(model, images[:0], labels[:0], **SETTINGS).shape == (0, *images.shape[1:])
    with pytest.raises(ValueError, match=r"^perturb: steps must be "):
        perturb(model, images, labels, **{**SETTINGS, "steps": 0})
    with pytest.raises(ValueError, match=r"^perturb: restart must be "):
        perturb(model, images, labels, **SETTINGS, restart=-1)


# ---- precision -------------------------------------------------------------------------------------------------


def count_passes(prepared):
    """How often each convolution behind the images is called, with a gradient and without."""
    passes = {"low": [], "exact": []}
    prepared.exact(torch.zeros(1, 3, 9, 7))
    for name, view in (("low", prepared), ("exact", prepared._exact[0] if prepared._exact else prepared)):
        layer = view.network.get_submodule("model.conv1")
        layer.register_forward_pre_hook(lambda module, args, to=passes[name]: to.append(torch.is_grad_enabled()))
    return passes


def test_the_passes_of_a_precision(images, labels):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.linear = nn.Linear(8, 5)

        def forward(self, x):
            return self.linear(torch.relu(self.bn1(self.conv1(x))).amax((2, 3)))

    torch.manual_seed(0)
    net = Plain().eval()
    prepared = prepare(net, precision="bf16")
    passes = count_passes(prepared)
    result = pgd(prepared, images, labels, **SETTINGS, report_at=[0, 2, 6])
    assert len(passes["low"]) == SETTINGS["steps"] + 1
    assert passes["exact"] == [False] * 3
    assert torch.equal(result.predictions[6], net(result.adversarial).argmax(1))
    assert result.adversarial.dtype == result.losses.dtype == torch.float32
    steps = ((result.adversarial - images) * 255).abs()
    assert steps.max() <= SETTINGS["eps"] * 255 + 1e-3


def test_the_precision_is_the_prepared_models(model, images, labels):
    prepared = prepare(model, precision="bf16")
    alike = pgd(prepared, images, labels, **SETTINGS, precision="bf16")
    assert torch.equal(pgd(prepared, images, labels, **SETTINGS).losses, alike.losses)
    with pytest.raises(ValueError, match=r"^pgd: precision must be .*'bf16', or None, got 'fp32'"):
        pgd(prepared, images, labels, **SETTINGS, precision="fp32")


# ---- models that are no classifiers ----------------------------------------------------------------------------


class Returns(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(189, 5), function

    def forward(self, x):
        return self.function(self.linear(x.flatten(1)))


class Explodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("inf")


@pytest.mark.parametrize("attack", [pgd, perturb])
def test_gradients_that_are_not_finite_are_no_robustness(images, labels, attack):
    with pytest.raises(ValueError, match=r"model must have finite gradients, got NaN or infinity"):
        attack(Returns(Explodes.apply).eval(), images, labels, **SETTINGS)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda y: (y, y), "logits of shape .*got tuple"),
        (lambda y: {"logits": y}, "logits of shape .*got dict"),
        (lambda y: y[:, 0], r"logits of shape .*got \(10,\)"),
        (lambda y: y * float("nan"), "finite logits, got NaN or infinity at iterate 0"),
        (lambda y: y.detach(), "depend on the images"),
        (lambda y: y.argmax(1, keepdim=True).expand(-1, 2), "floating point logits"),
    ],
)
def test_models_that_are_refused(images, labels, function, words, prepared):
    net = Returns(function).eval()
    with pytest.raises(ValueError, match=f"^pgd: model must return .*{words}"):
        pgd(prepare(net) if prepared else net, images, labels, **SETTINGS)
    assert all(p.requires_grad for p in net.parameters())
