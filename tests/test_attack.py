"""The attack against a loop written by hand, and what it promises about randomness, flags and arguments."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from attack_case import CLASSES, SETTINGS, Net, images_and_labels, network
from torch import nn

from sparta_kernels import reference
from sparta_kernels.attack import PRESETS, pgd, preset


@pytest.fixture
def model() -> Net:
    return network()


@pytest.fixture
def images() -> torch.Tensor:
    return images_and_labels()[0]


@pytest.fixture
def labels() -> torch.Tensor:
    return images_and_labels()[1]


def by_hand(model, images, goal, start, *, eps, step_size, steps, targeted=True):
    """torchattacks' PGD, with the summed loss: what every iterate looks like."""
    adversarial, iterates = start.clone(), [start]
    for _ in range(steps):
        adversarial.requires_grad_(True)
        cost = F.cross_entropy(model(adversarial), goal, reduction="sum")
        if targeted:
            cost = -cost
        gradient = torch.autograd.grad(cost, adversarial)[0]
        adversarial = adversarial.detach() + step_size * gradient.sign()
        delta = torch.clamp(adversarial - images, min=-eps, max=eps)
        adversarial = torch.clamp(images + delta, min=0, max=1).detach()
        iterates.append(adversarial)
    return iterates


@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("random_start", [True, False])
def test_equals_a_loop_by_hand(model, images, labels, targeted, random_start):
    result = pgd(
        model,
        images,
        labels,
        **SETTINGS,
        seed=3,
        targeted=targeted,
        random_start=random_start,
        report_at=range(7),
    )
    indices = torch.arange(10)
    goal = reference.pgd_targets(labels, CLASSES, indices, seed=3) if targeted else labels
    start = reference.pgd_start(images, indices, eps=SETTINGS["eps"], seed=3) if random_start else images
    iterates = by_hand(model, images, goal, start, **SETTINGS, targeted=targeted)
    assert torch.equal(result.adversarial, iterates[-1])
    assert not torch.equal(iterates[-1], iterates[-2])
    for k, iterate in enumerate(iterates):
        logits = model(iterate)
        assert torch.equal(result.predictions[k], logits.argmax(1))
        torch.testing.assert_close(result.losses[k], F.cross_entropy(logits, goal, reduction="none"))
    if targeted:
        assert torch.equal(result.targets, goal)
        assert not (result.targets == labels).any()
        assert result.losses[-1].mean() < result.losses[0].mean()
    else:
        assert result.targets is None
        assert result.losses[-1].mean() > result.losses[0].mean()


def test_stays_in_the_ball_and_the_box(model, images, labels):
    images = images.round()  # pixels at 0 and 1
    result = pgd(model, images, labels, eps=0.1, step_size=0.07, steps=4)
    assert result.adversarial.min() >= 0
    assert result.adversarial.max() <= 1
    assert (result.adversarial - images).abs().max() <= 0.1 + 1e-7
    assert (result.adversarial - images).abs().max() > 0.09


@pytest.mark.parametrize(("steps", "expected"), [(5, [5]), (10, [10]), (12, [10, 12]), (50, [10, 30, 50])])
def test_default_report(model, images, labels, steps, expected):
    result = pgd(model, images[:2], labels[:2], eps=0.1, step_size=0.01, steps=steps)
    assert list(result.predictions) == expected
    assert result.losses.shape == (steps + 1, 2)


def test_a_result_in_a_notebook_is_one_line(model, images, labels):
    found = pgd(model, images, labels, eps=0.1, step_size=0.02, steps=2, report_at=(1, 2))
    assert repr(found) == (
        "PGDResult(targeted, adversarial=(10, 3, 9, 7), predictions at 1, 2, losses=(3, 10), engine=eager)"
    )


def test_report_at_equals_separate_runs(model, images, labels):
    long = pgd(model, images, labels, eps=0.2, step_size=0.03, steps=8, report_at=[0, 3, 8])
    assert list(long.predictions) == [0, 3, 8]
    changed = 0
    for k in (3, 8):
        short = pgd(model, images, labels, eps=0.2, step_size=0.03, steps=k)
        assert torch.equal(long.predictions[k], short.predictions[k])
        assert torch.equal(long.losses[: k + 1], short.losses)
        changed += int((long.predictions[k] != long.predictions[0]).sum())
    assert changed  # otherwise every iterate would do


def test_passes_are_counted(model, images, labels):
    backwards = []
    model.conv1.register_full_backward_hook(lambda *_: backwards.append(1))
    pgd(model, images, labels, **SETTINGS, report_at=[0, 2, 6])
    assert model.calls == SETTINGS["steps"] + 1
    assert len(backwards) == SETTINGS["steps"]
    assert model.grads == [True] * SETTINGS["steps"] + [False]  # the last pass keeps nothing for a backward
    assert all(model.frozen)


def _starts(model, images, labels, **keywords):
    """The starting points: a step of 1e-30 moves no pixel that is not 0."""
    settings = {"eps": 0.1, "step_size": 1e-30, "steps": 1}
    result = pgd(model, 0.3 + 0.4 * images, labels, **settings, **keywords)
    return result.adversarial, result.targets


def test_randomness_belongs_to_the_image(model, images, labels):
    starts, targets = _starts(model, images, labels, seed=7)
    order = torch.tensor([9, 2, 4])
    some, some_targets = _starts(model, images[order], labels[order], seed=7, indices=order)
    assert torch.equal(some, starts[order])
    assert torch.equal(some_targets, targets[order])
    for other in ({"seed": 8}, {"seed": 7, "restart": 1}, {"seed": 7, "indices": torch.arange(10) + 2**33}):
        noise, drawn = _starts(model, images, labels, **other)
        assert not torch.equal(noise, starts)
        assert not torch.equal(drawn, targets)


def test_layouts_and_label_dtypes_give_the_same(model, images, labels):
    expected = pgd(model, images, labels, **SETTINGS)
    wide = torch.rand(10, 3, 9, 14)
    wide[..., ::2] = images
    for same in (images.to(memory_format=torch.channels_last), wide[..., ::2]):
        result = pgd(model, same, labels.to(torch.uint8), **SETTINGS)
        torch.testing.assert_close(result.losses, expected.losses, rtol=1e-4, atol=1e-4)
        assert result.adversarial.shape == images.shape
    one = pgd(model, images[:1].expand(4, -1, -1, -1), labels[:1].expand(4), **SETTINGS)
    torch.testing.assert_close(one.losses[:, 0], expected.losses[:, 0], rtol=1e-4, atol=1e-4)
    double = pgd(model.double(), images.double(), labels, **SETTINGS)
    assert double.adversarial.dtype == double.losses.dtype == torch.float64


def test_leaves_everything_as_it_was(model, images, labels):
    model.conv1.weight.requires_grad_(False)
    model.conv2.bias.grad = torch.full((8,), 3.0)
    flags = [p.requires_grad for p in model.parameters()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = images.clone().requires_grad_(True)
    pgd(model, before, labels, **SETTINGS)
    assert torch.equal(before, images)
    assert before.grad is None
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(model.conv2.bias.grad, torch.full((8,), 3.0))
    assert all(p.grad is None for p in model.parameters() if p is not model.conv2.bias)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("failure", [RuntimeError("planted"), KeyboardInterrupt()])
@pytest.mark.parametrize("fail_at", [1, 3, 7])
def test_flags_come_back_after_a_failure(model, images, labels, failure, fail_at):
    model.bn1.bias.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    before = images.clone()
    model.fail_at, model.failure = fail_at, failure
    with pytest.raises(type(failure)):
        pgd(model, before, labels, **SETTINGS)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(before, images)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)]
)
def test_the_caller_s_context_does_not_matter(model, images, labels, context):
    expected = pgd(model, images, labels, **SETTINGS)
    with context():
        result = pgd(model, images + 0, labels + 0, **SETTINGS)
    assert torch.equal(result.adversarial, expected.adversarial)
    assert torch.equal(result.losses, expected.losses)


def test_never_waits_for_the_device(model, images, labels, monkeypatch):
    def refuse(*_):
        raise AssertionError("a host sync inside the loop")

    names = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "nonzero")
    originals = {name: getattr(torch.Tensor, name) for name in names}

    def progress(k):
        for name in names:
            setattr(torch.Tensor, name, originals[name] if k == SETTINGS["steps"] else refuse)

    for name in names:  # so that monkeypatch puts them back if the test fails
        monkeypatch.setattr(torch.Tensor, name, originals[name])
    result = pgd(model, images, labels, **SETTINGS, report_at=[0, 2], progress=progress)
    assert list(result.predictions) == [0, 2]


def test_given_targets(model, images, labels):
    targets = (labels + 2) % CLASSES
    result = pgd(model, images, labels, **SETTINGS, targets=targets.to(torch.int32))
    assert torch.equal(result.targets, targets)
    assert torch.equal(result.adversarial, pgd(model, images, labels, **SETTINGS, targets=targets).adversarial)


def test_eps_zero_is_the_image(model, images, labels):
    assert torch.equal(pgd(model, images, labels, eps=0, step_size=0.1, steps=2).adversarial, images)


def test_empty_batch(model, images, labels):
    result = pgd(model, images[:0], labels[:0], **SETTINGS)
    assert result.adversarial.shape == (0, 3, 9, 7)
    assert result.targets.shape == result.predictions[6].shape == (0,)
    assert result.losses.shape == (7, 0)
    assert model.calls == 0


def test_presets():
    sparta, xie = preset("sparta", 16 / 255, 10), preset("xie2019", 16 / 255, 10)
    assert (sparta.step_size, sparta.clean_start) == (1 / 255, 0.0)
    assert (xie.step_size, xie.clean_start) == (pytest.approx(1.6 / 255), 0.2)
    assert preset("xie2019", 16 / 255, 50).step_size == 1 / 255
    assert PRESETS == ("sparta", "xie2019")


NAN_IMAGES = torch.full((10, 3, 9, 7), 0.5)
NAN_IMAGES[3, 1, 2, 2] = math.nan

WRONG = [
    ("images", torch.zeros(10, 3, 9), ValueError),
    ("images", torch.zeros(10, 0, 9, 7), ValueError),
    ("images", torch.zeros(10, 3, 9, 7, dtype=torch.uint8), TypeError),
    ("images", torch.zeros(10, 3, 9, 7, dtype=torch.bfloat16), TypeError),
    ("images", [[0.0]], TypeError),
    ("images", torch.full((10, 3, 9, 7), 255.0), ValueError),
    ("images", torch.full((10, 3, 9, 7), -0.01), ValueError),
    ("images", NAN_IMAGES, ValueError),
    ("images", torch.zeros(10, 3, 9, 7, device="meta"), ValueError),
    ("labels", torch.zeros(9, dtype=torch.int64), ValueError),
    ("labels", torch.zeros(10, 1, dtype=torch.int64), ValueError),
    ("labels", torch.zeros(10), TypeError),
    ("labels", torch.zeros(10, dtype=torch.bool), TypeError),
    ("labels", [0] * 10, TypeError),
    ("labels", torch.full((10,), CLASSES), ValueError),
    ("labels", torch.full((10,), -1), ValueError),
    ("labels", torch.zeros(10, dtype=torch.int64, device="meta"), ValueError),
    ("eps", -0.1, ValueError),
    ("eps", math.nan, ValueError),
    ("eps", math.inf, ValueError),
    ("eps", 16, ValueError),
    ("eps", "16/255", TypeError),
    ("eps", None, TypeError),
    ("step_size", 0, ValueError),
    ("step_size", -1 / 255, ValueError),
    ("step_size", math.inf, ValueError),
    ("step_size", True, TypeError),
    ("steps", 0, ValueError),
    ("steps", 2.0, TypeError),
    ("steps", True, TypeError),
    ("report_at", [7], ValueError),
    ("report_at", [-1], ValueError),
    ("report_at", [2, 2], ValueError),
    ("report_at", [3, 2], ValueError),
    ("report_at", [], ValueError),
    ("report_at", [1.5], TypeError),
    ("report_at", 3, TypeError),
    ("report_at", "3", TypeError),
    ("targets", torch.arange(10) % CLASSES, ValueError),
    ("targets", torch.full((10,), CLASSES), ValueError),
    ("targets", torch.full((10,), -1), ValueError),
    ("targets", torch.zeros(10), TypeError),
    ("targets", torch.zeros(3, dtype=torch.int64), ValueError),
    ("seed", -1, ValueError),
    ("seed", 2**63, ValueError),
    ("seed", 0.5, TypeError),
    ("indices", torch.arange(9), ValueError),
    ("indices", torch.arange(10) - 1, ValueError),
    ("indices", torch.arange(10.0), TypeError),
    ("indices", range(10), TypeError),
    ("targeted", 1, TypeError),
    ("random_start", None, TypeError),
    ("restart", -1, ValueError),
    ("restart", 2**24, ValueError),
    ("restart", "0", TypeError),
    ("precision", "bf17", ValueError),
    ("precision", "tf32", ValueError),  # not on a CPU
    ("precision", 16, ValueError),
    ("engine", "graph", ValueError),
    ("progress", 3, TypeError),
    ("model", lambda x: x, TypeError),
]


@pytest.mark.parametrize(("name", "value", "error"), WRONG, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(WRONG)])
def test_wrong_arguments(model, images, labels, name, value, error):
    arguments = {"model": model, "images": images, "labels": labels, **SETTINGS, name: value}
    with pytest.raises(error, match=rf"^pgd: (each of )?{name} must "):
        pgd(**arguments)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_16_bit_images_are_refused_with_a_way_to_say_it(model, images, labels, dtype, precision):
    with pytest.raises(TypeError, match=rf"got {dtype} \(a lower precision .*: precision='{precision}'\)$"):
        pgd(model, images.to(dtype), labels, **SETTINGS)


def test_targets_of_an_untargeted_attack(model, images, labels):
    with pytest.raises(ValueError, match="targets must be None"):
        pgd(model, images, labels, **SETTINGS, targeted=False, targets=(labels + 1) % CLASSES)


def test_training_mode_is_refused(model, images, labels):
    with pytest.raises(ValueError, match=r"model must be in eval mode .*got Net in training mode"):
        pgd(model.train(), images, labels, **SETTINGS)
    model.eval().bn1.train()
    with pytest.raises(ValueError, match=r"got 'bn1' \(BatchNorm2d\) in training mode"):
        pgd(model, images, labels, **SETTINGS)
    assert model.calls == 0


class Output(nn.Module):
    """A model that returns what a function makes of the images."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x, "logits of shape"),
        (lambda x: x.flatten(1)[:-1], "logits of shape"),
        (lambda x: x.flatten(1)[:, :1], "logits of shape"),
        (lambda x: (x.flatten(1),), "logits of shape .* got tuple"),
        (lambda x: x.flatten(1).long(), "floating point logits"),
        (lambda x: x.detach().flatten(1), "depend on the images"),
    ],
)
def test_wrong_models(images, labels, function, words):
    with pytest.raises(ValueError, match=rf"^pgd: model must return .*{words}"):
        pgd(Output(function).eval(), images, labels, **SETTINGS)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("fgsm", 0.1, 10), "name"),
        (("sparta", 2, 10), "eps"),
        (("sparta", 0.1, 0), "steps"),
        ((None, 0.1, 1), "name"),
    ],
)
def test_wrong_presets(arguments, name):
    with pytest.raises(ValueError, match=f"^preset: {name} must"):
        preset(*arguments)
