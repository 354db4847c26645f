"""Evaluation against the attack itself: its padding, precisions and measurements."""

from __future__ import annotations

import dataclasses
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from sparta_kernels import backends, report
from sparta_kernels.attack import pgd, prepare
from sparta_kernels.evaluation import Outcomes, Parity, batches, evaluate, memory, result
from sparta_kernels.nn import resnet18

CLASSES = 4
SETTINGS = {"eps": 0.2, "step_size": 0.05, "steps": 3}


class Net(nn.Module):
    """A network that notes the batches it sees and which backend computes them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 4, 3), nn.Linear(4, CLASSES)
        self.shapes: set[tuple[int, ...]] = set()
        self.used: set[str] = set()
        self.passes = 0

    def forward(self, x):
        self.shapes.add(tuple(x.shape))
        self.used.add(backends.choose(x.device).backend)
        self.passes += 1
        return 9 * self.linear(self.conv(x).relu().mean((2, 3)))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model():
    torch.manual_seed(2)
    return Net().eval()


@pytest.fixture
def images():
    return torch.rand(10, 1, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels():
    return torch.arange(10) % CLASSES


def test_equals_the_attack(model, images, labels):
    found = evaluate(model, images, labels, **SETTINGS, report_at=(0, 1, 3), batch_size=10, seed=4)
    expected = pgd(model, images, labels, **SETTINGS, report_at=(0, 1, 3), seed=4)
    assert found.images == 10
    assert found.clean_error == pytest.approx((model(images).argmax(1) != labels).float().mean().item())
    assert list(found.errors) == list(found.target_success) == [0, 1, 3]
    for k, predicted in expected.predictions.items():
        assert found.errors[k] == pytest.approx((predicted != labels).float().mean().item())
        assert found.target_success[k] == pytest.approx((predicted == expected.targets).float().mean().item())
    assert found.loss_mean == pytest.approx(expected.losses.mean(1).tolist(), rel=1e-5)
    assert found.loss_std == pytest.approx(expected.losses.std(1, correction=0).tolist(), rel=1e-4)
    assert found.loss_mean[3] < found.loss_mean[0]
    assert found.images_per_second == pytest.approx(10 / found.seconds)


def test_every_batch_has_one_shape_and_padding_does_not_count(model, images, labels):
    found = evaluate(model, images, labels, **SETTINGS, batch_size=4)
    assert model.shapes == {(1, 1, 6, 6), (4, 1, 6, 6)}  # the first image tells how many classes there are
    whole = evaluate(model, images, labels, **SETTINGS, batch_size=10)
    assert found.loss_mean == pytest.approx(whole.loss_mean, rel=1e-4)
    assert found.loss_std == pytest.approx(whole.loss_std, rel=1e-3)
    # The last batch is one image and three copies of it; they must not weigh in.
    with torch.no_grad():
        model.linear.weight.mul_(1e-6)
        model.linear.bias.copy_(torch.tensor([1.0, 0, 0, 0]))
    constant = evaluate(model, images[:5], torch.tensor([0, 0, 0, 0, 1]), **SETTINGS, batch_size=4)
    assert constant.clean_error == pytest.approx(0.2)
    assert constant.errors == {3: pytest.approx(0.2)}


def test_a_batch_is_never_larger_than_all_images(model, images, labels):
    found = evaluate(model, images, labels, **SETTINGS, batch_size=10**9)
    assert model.shapes == {(1, 1, 6, 6), (10, 1, 6, 6)}
    assert found.batch == (10, "all images")
    assert found.loss_mean == evaluate(model, images, labels, **SETTINGS, batch_size=10).loss_mean


def test_progress_tells_passes_speed_and_errors(model, images, labels):
    seen = []
    found = evaluate(model, images, labels, **SETTINGS, batch_size=4, progress=seen.append)
    # 3 batches of 1 clean pass and 4 iterates; one call at the start, and one after each batch.
    assert [step.done for step in seen] == [0, *range(1, 6), 5, *range(6, 11), 10, *range(11, 16), 15]
    assert {step.total for step in seen} == {15}
    assert {step.batch.images for step in seen} == {4}
    assert [step.images for step in seen] == [0] * 6 + [4] * 6 + [8] * 6 + [10]
    assert seen[0].images_per_second is seen[0].clean_error is seen[0].robust_error is None
    assert (seen[-1].clean_error, seen[-1].robust_error) == (found.clean_error, found.errors[3])
    assert seen[-1].images_per_second == found.images_per_second
    short = evaluate(model, images[:4], labels[:4], **SETTINGS, batch_size=4)
    assert (seen[6].clean_error, seen[6].robust_error) == (short.clean_error, short.errors[3])


def test_untargeted(model, images, labels):
    found = evaluate(model, images, labels, **SETTINGS, batch_size=10, targeted=False)
    expected = pgd(model, images, labels, **SETTINGS, targeted=False)
    assert found.errors == {3: pytest.approx((expected.predictions[3] != labels).float().mean().item())}
    assert found.target_success == {}
    assert found.loss_mean == pytest.approx(expected.losses.mean(1).tolist(), rel=1e-5)
    assert found.loss_mean[3] > found.loss_mean[0]


def test_the_worst_of_several_restarts_counts(model, images, labels):
    found = evaluate(model, images, labels, **SETTINGS, batch_size=5, restarts=3, report_at=(1, 3))
    runs = [pgd(model, images, labels, **SETTINGS, restart=i, report_at=(1, 3)) for i in range(3)]
    for k in (1, 3):
        wrong = torch.stack([run.predictions[k] != labels for run in runs]).any(0)
        hit = torch.stack([run.predictions[k] == run.targets for run in runs]).any(0)
        assert found.errors[k] == pytest.approx(wrong.float().mean().item())
        assert found.target_success[k] == pytest.approx(hit.float().mean().item())
    assert found.restarts == 3


def test_a_prepared_model_is_used_as_it_is(model, images, labels):
    prepared = prepare(model, precision="bf16")
    found = evaluate(prepared, images, labels, **SETTINGS, parity_images=0)
    assert (found.precision, found.parity) == ("bf16", None)
    assert found.loss_mean == evaluate(model, images, labels, **SETTINGS, precision="bf16").loss_mean
    with pytest.raises(ValueError, match=r"^evaluate: precision must be that of the prepared model, 'bf16'"):
        evaluate(prepared, images, labels, **SETTINGS, precision="fp32")


def test_a_lower_precision_is_compared_with_fp32(model, images, labels):
    settings = SETTINGS | {"report_at": (1, 3), "precision": "bf16"}
    found = evaluate(model, images, labels, **settings, batch_size=4, parity_images=6)
    exact = evaluate(model, images[:6], labels[:6], **SETTINGS, report_at=(1, 3), batch_size=4)
    lower = evaluate(model, images[:6], labels[:6], **settings, batch_size=6, parity_images=0)
    assert found.parity.images == 6
    assert found.parity.errors == exact.errors
    assert found.parity.differences == {k: pytest.approx(100 * (lower.errors[k] - exact.errors[k])) for k in (1, 3)}
    assert found.as_dict()["parity"].keys() >= {"images", "tolerance", "errors", "differences", "difference", "passed"}
    # Predictions, and so the clean error, are in fp32 all the same.
    assert found.clean_error == evaluate(model, images, labels, **SETTINGS).clean_error
    assert evaluate(model, images, labels, **SETTINGS, parity_images=6).parity is None
    assert evaluate(model, images, labels, **settings, parity_images=99).parity.images == 10


def test_predictions_are_in_fp32(images, labels):
    """Next to a common offset of 1000, bf16 does not see the logits' differences."""
    torch.manual_seed(2)
    network = nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES)).eval()
    with torch.no_grad():
        network[1].bias.add_(1000)
        labels = network(images).argmax(1)
        assert (prepare(network, precision="bf16")(images).argmax(1) != labels).any()
    found = evaluate(network, images, labels, eps=0, step_size=0.1, steps=1, report_at=(0, 1), precision="bf16")
    assert found.clean_error == found.errors[0] == found.errors[1] == 0


def test_the_last_reported_iterate_tells():
    parity = Parity(256, 1.0, errors={10: 0.5, 50: 0.6}, differences={10: 5.0, 50: -0.9})
    assert (parity.difference, parity.passed) == (-0.9, True)
    parity = Parity(256, 1.0, errors={10: 0.5, 50: 0.6}, differences={10: 0.0, 50: -1.1})
    assert (parity.difference, parity.passed) == (-1.1, False)


@pytest.mark.parametrize("more", [7, -7, 29, 0])
def test_a_difference_just_within_the_tolerance(more):
    """100 x 0.07 is above 7 in floating point, as is 100 x 0.29 above 29."""
    found = Outcomes.none_yet(
        {}, index=np.arange(100), label=np.zeros(100, np.int64), report_at=(5,), steps=5, parity=100
    )
    found.put(slice(0, 40), prediction=1)
    found.put(slice(0, 40 - more), parity_prediction=1)
    parity = result.parity(found, float(abs(more)))
    assert parity.differences == {5: more}
    assert parity.passed


def test_parity_past_the_tolerance(model, images, labels, monkeypatch):
    with torch.no_grad():
        model.linear.weight.mul_(40)
    settings = SETTINGS | {"eps": 0.3, "step_size": 0.1, "precision": "bf16"}
    fair = evaluate(model, images, labels, **settings).parity
    assert fair.passed
    assert fair.difference == fair.differences[3] == pytest.approx(0, abs=1e-9)
    pgd_of = batches.attack.pgd

    def astray(network, *arguments, **options):
        if network.precision == "bf16":
            options["eps"] = 0.0
        return pgd_of(network, *arguments, **options)

    monkeypatch.setattr(batches.attack, "pgd", astray)
    found = evaluate(model, images, labels, **settings)
    assert found.parity.errors == fair.errors  # of the fp32 attack
    assert found.parity.difference == pytest.approx(100 * (found.clean_error - fair.errors[3]))
    assert abs(found.parity.difference) > 1
    assert not found.parity.passed
    assert evaluate(model, images, labels, **settings, parity_tolerance=100).parity.passed


def test_an_image_s_result_does_not_depend_on_how_many_there_are(model, images, labels):
    some = evaluate(model, images[:3], labels[:3], **SETTINGS, batch_size=3)
    more = evaluate(model, images[:6], labels[:6], **SETTINGS, batch_size=3)
    rest = evaluate(model, images[3:6], labels[3:6], **SETTINGS, batch_size=3, indices=torch.arange(3, 6))
    assert more.loss_mean == pytest.approx([(a + b) / 2 for a, b in zip(some.loss_mean, rest.loss_mean, strict=True)])


def test_bytes_are_pixels(model, images, labels):
    pixels = (images * 255).round().to(torch.uint8)
    assert (
        evaluate(model, pixels, labels, **SETTINGS).loss_mean
        == evaluate(model, pixels.float() / 255, labels, **SETTINGS).loss_mean
    )


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_backend_is_used_and_given_back(model, images, labels, backend):
    before = backends.choose(torch.device("cpu"))
    evaluate(model, images, labels, **SETTINGS, backend=backend)
    assert model.used == {backends.choose(torch.device("cpu"), backend).backend}
    assert backends.choose(torch.device("cpu")) == before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_that_of_the_stretch():
    before = memory.PeakMemory(torch.device("cpu"))
    base = before.bytes()
    if base is None:
        pytest.skip("/proc/self/clear_refs cannot be written here")
    torch.ones(60_000_000)  # 240 MB, gone at once
    assert 200e6 < before.bytes() - base < 400e6
    assert memory.PeakMemory(torch.device("cpu")).bytes() < base + 100e6


@pytest.mark.parametrize(("engine", "counted"), [("graph", True), ("eager", False)])
def test_a_graph_s_memory_is_that_of_its_capture(model, images, labels, monkeypatch, engine, counted):
    """Which is in the first call; for other engines that is not the attack's own."""
    done = []

    class Measured:
        def __init__(self, _):
            self.from_the_start = not done

        def bytes(self):
            return int(self.from_the_start)

    def warm_up(*given):
        found = before(*given)
        done.append(1)
        return dataclasses.replace(found, engine=found.engine._replace(name=engine))

    before = batches.Attacker.warm_up
    monkeypatch.setattr(batches.Attacker, "warm_up", warm_up)
    monkeypatch.setattr("sparta_kernels.evaluation.run.PeakMemory", Measured)
    found = evaluate(model, images, labels, **SETTINGS, batch_size=5)
    assert (found.engine, found.peak_memory) == (engine, int(counted))


def test_peak_memory_is_none_where_it_cannot_be_reset(model, images, labels, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "none" / "clear_refs")
    found = evaluate(model, images, labels, **SETTINGS)
    assert found.peak_memory is None
    assert report.megabytes(found.peak_memory) == "n/a"


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_cudnn_is_repeatable_meanwhile(model, images, labels, error):
    seen = []

    def look(progress):
        seen.append(torch.backends.cudnn.deterministic)
        if error is not None:
            raise error

    with nullcontext() if error is None else pytest.raises(error):
        evaluate(model, images, labels, **SETTINGS, progress=look)
    assert set(seen) == {True}
    assert not torch.backends.cudnn.deterministic


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu_it_is_repeatable_and_stored_too(images, labels, tmp_path, precision):
    torch.manual_seed(0)
    network = resnet18(width=16, in_channels=1, num_classes=CLASSES).cuda().eval()
    images, labels = images.cuda(), labels.cuda()
    settings = SETTINGS | {"precision": precision, "batch_size": 4}
    whole = evaluate(network, images, labels, **settings, outcomes=tmp_path / "whole.npz")
    assert whole.peak_memory > 0
    expected = evaluate(network.cpu(), images.cpu(), labels.cpu(), **SETTINGS)
    assert whole.clean_error == expected.clean_error
    assert whole.loss_mean == pytest.approx(expected.loss_mean, rel=0.02)

    def stop(progress):
        if progress.images:
            raise KeyboardInterrupt

    network.cuda()
    with pytest.raises(KeyboardInterrupt):
        evaluate(network, images, labels, **settings, outcomes=tmp_path / "found.npz", progress=stop)
    evaluate(network, images, labels, **settings, outcomes=tmp_path / "found.npz", resume=True)
    assert (tmp_path / "found.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    found = evaluate(network, images, labels, **SETTINGS)
    assert found.batch == (10, "at most 1024 on a GPU")


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("model", None, TypeError),
        ("images", torch.zeros(0, 1, 6, 6), ValueError),
        ("images", torch.zeros(10, 6, 6), ValueError),
        ("images", torch.full((10, 1, 6, 6), 2.0), ValueError),
        ("images", torch.zeros(10, 1, 6, 6, dtype=torch.int64), TypeError),
        ("labels", torch.zeros(9, dtype=torch.int64), ValueError),
        ("labels", torch.zeros(10), TypeError),
        ("labels", torch.tensor([0] * 9 + [CLASSES]), ValueError),
        ("labels", torch.tensor([CLASSES] + [0] * 9), ValueError),
        ("labels", torch.tensor([-1] + [0] * 9), ValueError),
        ("eps", -1, ValueError),
        ("eps", None, TypeError),
        ("step_size", 0, ValueError),
        ("steps", 0, ValueError),
        ("report_at", (4,), ValueError),
        ("report_at", (), ValueError),
        ("report_at", (2, 1), ValueError),
        ("report_at", (1, 1), ValueError),
        ("targeted", 1, TypeError),
        ("restarts", 0, ValueError),
        ("restarts", 1.5, TypeError),
        ("precision", "fp8", ValueError),
        ("precision", 16, ValueError),
        ("engine", "jit", ValueError),
        ("engine", None, ValueError),
        ("parity_images", -1, ValueError),
        ("parity_tolerance", -0.1, ValueError),
        ("parity_tolerance", float("nan"), ValueError),
        ("parity_tolerance", "1", TypeError),
        ("outcomes", 3, TypeError),
        ("resume", True, ValueError),
        ("resume", 1, TypeError),
        ("overwrite", True, ValueError),
        ("batch_size", 0, ValueError),
        ("batch_size", 2.5, TypeError),
        ("seed", -1, ValueError),
        ("indices", torch.arange(9), ValueError),
        ("indices", -torch.ones(10, dtype=torch.int64), ValueError),
        ("backend", "cudnn", ValueError),
        ("backend", 3, TypeError),
        ("backend", None, TypeError),
        ("progress", 3, TypeError),
    ],
)
def test_wrong_arguments(model, images, labels, name, value, error):
    ticks = []
    arguments = {"model": model, "images": images, "labels": labels, "batch_size": 4, **SETTINGS}
    arguments |= {"progress": lambda *tick: ticks.append(tick), name: value}
    with pytest.raises(error, match=f"^evaluate: (each of )?{name} "):
        evaluate(**arguments)
    assert not ticks  # before the long work
    assert model.passes <= 2 * (name == "labels")  # the first image's pass, and its tracing, tell how many classes


@pytest.mark.parametrize("output", [torch.zeros(4), torch.zeros(4, 1), torch.zeros(4, 3, dtype=torch.int64), None])
def test_models_that_do_not_classify(images, labels, output):
    class Odd(nn.Module):
        def forward(self, x):
            return output

    with pytest.raises(ValueError, match=r"^evaluate: model must return"):
        evaluate(Odd().eval(), images, labels, **SETTINGS, batch_size=4)


def test_training_mode_is_refused(model, images, labels):
    with pytest.raises(ValueError, match="model must be in eval mode"):
        evaluate(model.train(), images, labels, **SETTINGS)
