"""TRADES: the attack on a divergence, its loss, and a step of training beside a loop written out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attack_case import pretend_graphs
from torch import nn

from sparta_kernels import reference
from sparta_kernels.attack import perturb, pgd, prepare
from sparta_kernels.nn import resnet18

EPS, STEP = 8 / 255, 2 / 255


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return resnet18(num_classes=5, activation="sparta", width=4, in_channels=1).double().eval()


@pytest.fixture(scope="module")
def images():
    return torch.rand(6, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


LABELS = torch.arange(6) % 5


@pytest.fixture
def graphs(monkeypatch):
    return pretend_graphs(monkeypatch)


def by_hand(model, images, steps, seed):
    """TRADES's inner maximisation as its authors write it, from this package's start."""
    criterion = nn.KLDivLoss(reduction="sum")
    natural = F.softmax(model(images), dim=1).detach()
    adversarial = reference.pgd_start(images, torch.arange(len(images)), eps=EPS, seed=seed, restart=0)
    for _ in range(steps):
        adversarial = adversarial.detach().requires_grad_()
        loss = criterion(F.log_softmax(model(adversarial), dim=1), natural)
        (gradient,) = torch.autograd.grad(loss, adversarial)
        adversarial = adversarial.detach() + STEP * gradient.sign()
        adversarial = torch.min(torch.max(adversarial, images - EPS), images + EPS).clamp(0, 1)
    return adversarial.detach()


@pytest.mark.parametrize("form", ["plain", "prepared"])
def test_the_attack_maximises_the_divergence(model, images, form):
    with torch.no_grad():
        natural = model(images).softmax(1)
    attacked = model if form == "plain" else prepare(model)
    found = perturb(attacked, images, LABELS, targets=natural, targeted=False, eps=EPS, step_size=STEP, steps=3, seed=3)
    expected = by_hand(model, images, 3, 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)

    def divergence(x):
        with torch.no_grad():
            return F.kl_div(model(x).log_softmax(1), natural, reduction="sum")

    start = reference.pgd_start(images, torch.arange(6), eps=EPS, seed=3, restart=0)
    assert divergence(found) > divergence(start)


def test_what_is_reported_of_it(model, images):
    with torch.no_grad():
        natural = model(images).softmax(1)
    options = {"targeted": False, "eps": EPS, "step_size": STEP, "steps": 2, "seed": 3}
    result = pgd(model, images, LABELS, targets=natural, report_at=[0, 2], restarts=2, **options)
    assert result.targets is None
    assert result.hits == {}
    with torch.no_grad():
        last = F.cross_entropy(model(result.adversarial), natural, reduction="none")
    torch.testing.assert_close(result.losses[-1], last)
    # One class for certain is the label itself.
    hard = perturb(model, images, LABELS, targets=F.one_hot(LABELS, 5).double(), **options)
    assert torch.equal(hard, perturb(model, images, LABELS, **options))


def test_a_graph_reads_the_distributions_of_its_batch(model, images, graphs):
    prepared = prepare(model)
    options = {"targeted": False, "eps": EPS, "step_size": STEP, "steps": 2}
    with torch.no_grad():
        natural = model(images).softmax(1)
    given, before = [], []
    for count in (6, 4):  # the second batch is filled up to the first's size
        some, soft, labels = images[:count], natural[:count].roll(count % 5, 1), LABELS[:count]
        given.append(soft)
        before.append(soft.clone())
        found = perturb(prepared, some, labels, targets=soft, engine="graph", **options)
        assert torch.equal(found, perturb(prepared, some, labels, targets=soft, engine="eager", **options))
    assert graphs.captures == 1
    perturb(prepared, images, LABELS, engine="graph", **options)  # to the labels: another graph
    assert graphs.captures == 2
    assert all(map(torch.equal, given, before))  # the graph's own memory is no caller's


@pytest.mark.parametrize(
    ("targets", "targeted", "error"),
    [
        (torch.full((6, 5), 0.2), True, TypeError),
        (torch.full((6, 5), 0.2).half(), False, TypeError),
        (torch.full((6, 5), 0.3), False, ValueError),
        (torch.full((6, 5), float("nan")), False, ValueError),
        (torch.eye(6)[:, :5] * 2 - 0.2, False, ValueError),
        (torch.full((5, 5), 0.2), False, ValueError),
        (torch.full((6,), 1.0), False, ValueError),
        (torch.full((6, 4), 0.25), False, ValueError),  # the model has 5 classes
        (torch.zeros(6, dtype=torch.int64), False, ValueError),
    ],
)
def test_distributions_that_are_none(model, images, targets, targeted, error):
    with pytest.raises(error, match=r"targets must"):
        perturb(model, images, LABELS, targets=targets, targeted=targeted, eps=EPS, step_size=STEP, steps=1)
