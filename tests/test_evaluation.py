"""Evaluation against the attack itself, its padding and its measurements; and the reports made of it."""

from __future__ import annotations

import json
import math
import platform
import sys

import pytest
import torch
from torch import nn

from sparta_kernels import backends, report
from sparta_kernels.attack import pgd
from sparta_kernels.evaluation import evaluate, memory
from sparta_kernels.report import machine

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
    ticks = []
    found = evaluate(model, images, labels, **SETTINGS, batch_size=4, progress=lambda *tick: ticks.append(tick))
    assert model.shapes == {(4, 1, 6, 6)}
    assert ticks == [(i, 15) for i in range(1, 16)]  # 3 batches of 1 clean pass and 4 iterates
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
    assert model.shapes == {(10, 1, 6, 6)}
    assert found.loss_mean == evaluate(model, images, labels, **SETTINGS, batch_size=10).loss_mean


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
    assert model.passes <= (name == "labels")  # which the clean pass tells the number of classes


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
