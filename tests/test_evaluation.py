"""Evaluation against the attack itself, its padding and its measurements; and the reports made of it."""

from __future__ import annotations

import json
import math
import platform
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from sparta_kernels import backends, machine, report
from sparta_kernels.attack import pgd, prepare
from sparta_kernels.evaluation import Outcomes, Parity, batch_size, batches, evaluate, memory, result
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


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads only cost time on networks this small, the more so where the cores are shared."""
    torch.set_num_threads(1)


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


# ---- the batch size ----


def test_the_batch_size_is_found(model, images, labels):
    found = evaluate(model, images, labels, **SETTINGS)
    assert found.batch == (10, "at most 256 on a CPU")
    assert evaluate(model, images, labels, **SETTINGS, batch_size=3).batch == (3, "as asked for")


@pytest.mark.parametrize(
    ("count", "processes", "images"),
    [(1, 1, 1), (256, 1, 256), (257, 1, 129), (360, 1, 180), (10000, 1, 250), (100, 3, 34)],
)
def test_batches_are_equal_and_all_processes_have_as_many(count, processes, images):
    tried = []
    found = batch_size.find_batch_size(tried.append, count, torch.device("cpu"), processes)
    assert found.images == images
    assert -(-count // images) % processes == 0
    assert all(1 <= trial <= min(16, count) for trial in tried)


@pytest.mark.parametrize("sharers", [1, 2])
def test_as_many_as_memory_holds(monkeypatch, sharers):
    """3 MB an image beside 50 MB that any batch takes; half of 1.2 GB is to be used."""
    held = []

    class Fake:
        def __init__(self, device):
            held.clear()

        def bytes(self):
            return 50_000_000 + 3_000_000 * held[-1]

    monkeypatch.setattr(batch_size, "PeakMemory", Fake)
    monkeypatch.setattr(batch_size, "available", lambda device: 1_200_000_000)
    found = batch_size.find_batch_size(held.append, 1000, torch.device("cpu"), sharers=sharers)
    assert found.images * sharers <= 200
    assert found.images == {1: 200, 2: 100}[sharers]
    assert "3 MB an image" in found.reason
    monkeypatch.setattr(batch_size, "available", lambda device: 1000)
    assert batch_size.find_batch_size(held.append, 1000, torch.device("cpu")).images == 1
    for unknown in (lambda device: None, lambda device: 10**12):
        monkeypatch.setattr(batch_size, "available", unknown)
        assert batch_size.find_batch_size(held.append, 1000, torch.device("cpu")).images == 250
    monkeypatch.setattr(Fake, "bytes", lambda self: None)
    monkeypatch.setattr(batch_size, "available", lambda device: 1000)
    assert batch_size.find_batch_size(held.append, 1000, torch.device("cpu")).images == 250


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_an_image_costs_is_measured(monkeypatch):
    if memory.PeakMemory(torch.device("cpu")).bytes() is None:
        pytest.skip("/proc/self/clear_refs cannot be written here")
    monkeypatch.setattr(batch_size, "available", lambda device: 1_000_000_000)
    for cost in (5_000_000, 10_000_000):
        found = batch_size.find_batch_size(
            lambda images, cost=cost: torch.ones(images * cost // 4), 100_000, torch.device("cpu")
        )
        assert found.images == pytest.approx(500_000_000 / cost, rel=0.25)


@pytest.mark.parametrize("version", [1, 2])
def test_memory_that_a_control_group_leaves(tmp_path, monkeypatch, version):
    system, group = tmp_path / "meminfo", tmp_path / "cgroup"
    system.write_text("MemTotal: 9000 kB\nMemAvailable:  8000 kB\n")
    top = tmp_path / "groups" / ("memory" if version == 1 else "")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    cache = "total_inactive_file" if version == 1 else "inactive_file"

    def limit(folder, most, used):
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in zip(names, (most, used), strict=True):
            (folder / name).write_text(f"{value}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{cache} 1000\n")

    monkeypatch.setattr(memory, "_SYSTEM", system)
    monkeypatch.setattr(memory, "_GROUP", group)
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")
    cpu = torch.device("cpu")
    assert memory.available(cpu) == 8000 * 1024  # no groups
    group.write_text("4:cpu:/x\n9:memory:/a/b\n" if version == 1 else "0::/a/b\n")
    assert memory.available(cpu) == 8000 * 1024
    limit(top, 2_000_000, 500_000)  # in a container, whose path is the host's
    assert memory.available(cpu) == 1_501_000
    limit(top / "a", 1_000_000, 400_000)
    assert memory.available(cpu) == 601_000
    limit(top / "a" / "b", "max", 1)
    assert memory.available(cpu) == 601_000
    limit(top / "a" / "b", 1_000, 5_000)
    assert memory.available(cpu) == 0
    system.unlink()
    assert memory.available(cpu) is None


# ---- arguments ----


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


# ---- reports ----


@pytest.fixture
def document(model, images, labels):
    rows = []
    for name in ("plain", "robust"):
        for backend in ("auto (native)", "reference"):
            found = evaluate(model, images, labels, **SETTINGS, report_at=(1, 3))
            rows.append({"model": name, "checkpoint": f"{name}.st", "backend": backend} | found.as_dict())
    settings = {"data": "digits", "images": 10, "steps": 3, "eps": 0.2, "step_size": 0.05}
    return report.document("evaluate", settings=settings, results=rows, device="cpu", seed=0, build={"x": 1})


def test_document_is_json(document, tmp_path):
    report.save_json(tmp_path / "out.json", document)
    read = json.loads((tmp_path / "out.json").read_text())
    assert read["results"] == document["results"]
    assert read["results"][0]["errors"].keys() == {"1", "3"}
    assert len(read["results"][0]["loss_mean"]) == 4
    assert read["versions"]["torch"] == torch.__version__
    assert (read["command"], read["seed"], read["device"]["type"]) == ("evaluate", 0, "cpu")
    assert json.loads(report.as_json({"a": math.inf, "b": [math.nan, 1]})) == {"a": "inf", "b": ["nan", 1]}


def test_the_cpu_is_named(document, tmp_path, monkeypatch):
    assert document["device"]["name"] == report.cpu_name() != ""
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(machine, "_CPUINFO", info)
    fallback = platform.processor() or platform.machine()
    assert report.cpu_name() == fallback  # no such file
    for content, name in [
        ("processor\t: 0\nmodel\t\t: 17\nmodel name\t: AMD EPYC: 9B45\n", "AMD EPYC: 9B45"),
        ("processor\t: 0\nBogoMIPS\t: 50\n", fallback),  # as on ARM
        ("model name\t:\n", fallback),
    ]:
        info.write_text(content)
        assert report.cpu_name() == name


def test_table_fits_and_shows_every_row(document):
    from rich.console import Console

    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    row = document["results"][0]
    row.update(clean_error=0.0306, errors={"10": 0.5, "30": 0.6, "50": 1.0}, target_success={"50": 0.25})
    row.update(images_per_second=123.4, peak_memory=410_000_000)
    console.print(report.evaluation_table([row], "a title"))
    text = console.export_text()
    assert "target" in text
    for cell in ("a title", "PGD-30", "plain", "auto (native)", "3.1%", "100.0%", "25.0%", "123", "410 MB"):
        assert cell in text, cell
    console.print(report.facts_table({"a": {"b": [1, 2]}, "c": None, "d": {}}))
    text = console.export_text()
    assert "a.b" in text
    assert "1, 2" in text


def test_plot_draws_each_model_once(document, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **kw: drawn.append((list(x), y, kw)) or plot(self, x, y, **kw))
    report.plot_losses(tmp_path / "loss.png", document)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [kw["label"].split(":")[0] for _, _, kw in drawn] == ["plain", "robust"]
    assert [x for x, _, _ in drawn] == [[0, 1, 2, 3]] * 2
    assert drawn[0][1] == document["results"][0]["loss_mean"]
    report.plot_losses(tmp_path / "loss.svg", document)
    assert b"PGD iteration" in (tmp_path / "loss.svg").read_bytes() or b"<svg" in (tmp_path / "loss.svg").read_bytes()


def test_plots_that_cannot_be_drawn(document, tmp_path, monkeypatch):
    for name in ("loss.doc", "loss"):
        with pytest.raises(ValueError, match=r"must end in one of .*png"):
            report.plot_losses(tmp_path / name, document)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        report.check_plot(tmp_path / "loss.png")
    assert not list(tmp_path.iterdir())
