"""Reports of an evaluation: JSON, tables and plots."""

from __future__ import annotations

import json
import math
import platform
import sys

import pytest
import torch
from torch import nn

from sparta_kernels import machine, report
from sparta_kernels.evaluation import evaluate

SETTINGS = {"eps": 0.2, "step_size": 0.05, "steps": 3}


@pytest.fixture
def document():
    torch.set_num_threads(1)
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)).eval()
    images, labels = torch.rand(10, 1, 6, 6), torch.arange(10) % 4
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
    console.print(report.evaluation_table([row], "a title", console.width))
    text = console.export_text()
    assert "target" in text
    cells = ("PGD-30", "3.1%", "100.0%", "25.0%", "123", "410 MB")
    for cell in ("a title", "plain", "auto (native)", *cells):
        assert cell in text, cell
    console = Console(width=40, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.evaluation_table([row, row], "a title", console.width))
    text = console.export_text()
    for cell in ("a title", "network 1", "network 2", "plain", "auto (native)", "images/s", *cells):
        assert cell in text, cell
    console.print(report.facts_table({"a": {"b": [1, 2], "e": {"f": 3}}, "c": None, "d": {}}))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert lines == ["a", "  b    1, 2", "  e.f  3", "c      none", "d      none"]


def test_plot_draws_each_model_once(document, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **kw: drawn.append((list(x), y, kw)) or plot(self, x, y, **kw))
    report.plot_losses(tmp_path / "loss.png", document)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    drawn = [line for line in drawn if "label" in line[2]]  # the others are the edges of the shades
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


def test_titles_and_notes(document):
    settings = {"images": 10, "data": "digits", "eps": 0.2, "step_size": 1 / 255, "targeted": True, "restarts": 1}
    assert report.evaluation_title(settings) == "10 digits test images, eps 51/255, step 1/255"
    title = report.evaluation_title(settings | {"targeted": False, "restarts": 3})
    assert title.endswith("step 1/255, untargeted, worst of 3 restarts")
    first, second = document["results"][0], dict(document["results"][3])
    first["engine_reason"] = second["engine_reason"] = "why"
    (line,) = report.evaluation_notes([first, second])  # alike: said once
    assert line == "batches of 10 images (at most 256 on a CPU), 1 CPU thread, gradients in fp32, engine eager (why)"
    second |= {"threads": 2, "processes": 4}
    lines = report.evaluation_notes([first, second])
    assert lines[0] == f"plain, auto (native): {line}"
    assert lines[1].startswith("robust, reference: batches of 10 images")
    assert "2 CPU threads, 4 processes" in lines[1]
    parity = {"images": 8, "tolerance": 1.5, "differences": {"1": -0.4, "3": 1.6}, "passed": False}
    *_, last = report.evaluation_notes([first, second | {"precision": "bf16", "parity": parity}])
    assert last == (
        "robust, reference: errors in bf16 minus those in fp32, on 8 images: PGD-1 -0.4, PGD-3 +1.6 points; "
        "MORE THAN the 1.5 allowed at the last"
    )


def test_what_there_is_not_is_not_available(document):
    from rich.console import Console

    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    row = document["results"][0] | {"target_success": {}, "images_per_second": None, "peak_memory": None}
    console.print(report.evaluation_table([row]))
    assert console.export_text().count("n/a") == 3


@pytest.mark.parametrize("targeted", [True, False])
def test_the_plot_says_which_way_is_up(document, tmp_path, monkeypatch, targeted):
    from matplotlib.axes import Axes

    said = []
    for method in ("set_ylabel", "set_title"):
        monkeypatch.setattr(Axes, method, lambda self, text, **_: said.append(text))
    document["settings"]["targeted"] = targeted
    report.plot_losses(tmp_path / "loss.png", document)
    assert ("target class" in said[0], "true class" in said[0]) == (targeted, not targeted)
    assert said[1].endswith("down" if targeted else "up")
    assert ("untargeted" in said[1]) != targeted


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0:00:00"), (61.6, "0:01:02"), (90_061, "25:01:01")])
def test_durations_in_hours(seconds, words):
    assert report.duration(seconds) == words
