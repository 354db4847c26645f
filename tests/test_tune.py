"""benchmarks/tune.py: variants of the sources, and what it makes of their times."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from sparta_kernels import _native

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("gates", "tune", "tune_variants")
CHOICE = ("--shape", "2,4,8,8", "--dtype", "fp32", "--layout", "nchw", "--seconds", "0.001", "--rounds", "1")


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield {name: importlib.import_module(name) for name in NAMES}
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture
def tune(modules, monkeypatch):
    """Nothing is compiled: every copy gets the module that is there."""
    place = lambda source, folder, target, archs: [["cp", _native.__file__, target / "sparta_kernels"]]  # noqa: E731
    monkeypatch.setattr(modules["tune"], "build_commands", place)
    return modules["tune"]


def test_every_variant_finds_its_texts_once(modules):
    for variant in modules["tune_variants"].VARIANTS.values():
        for file, old, new in variant.edits:
            text = (ROOT / file).read_text()
            assert text.count(old) == 1, (variant.name, old)
            assert new != old, variant.name


def test_variants_are_measured_beside_the_sources(modules, tune, tmp_path, capsys):
    path = tmp_path / "tune.json"
    assert tune.main([*CHOICE, "--variant", "prefetch-8k", "--rounds", "2", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["complete"] is True
    assert document["failed"] == []
    (result,) = document["results"]
    assert (result["variant"], result["backend"]) == ("prefetch-8k", "native")
    assert set(result["speedup"]) == {"forward fp32", "backward fp32"}
    cell = result["cells"]["2x4x8x8 fp32 nchw forward"]
    assert len(cell["ms"]) == len(cell["base_ms"]) == 2
    middle = {key: sum(cell[key]) / 2 for key in ("ms", "base_ms")}
    assert cell["speedup"] == pytest.approx(middle["base_ms"] / middle["ms"])
    assert result["speedup"]["forward fp32"] == pytest.approx(cell["speedup"])
    assert "prefetch-8k" in capsys.readouterr().out


def test_a_variant_that_fails_costs_no_other(modules, tune, tmp_path, monkeypatch, capsys):
    """One whose text is gone, and one that computes something else."""
    make = modules["tune_variants"].Variant
    layout = "sparta_kernels/backends/layout.py"
    wrong = "import torch\n"
    variants = [
        make("gone", "cpu", "native", ((layout, "no such text", ""),)),
        make("broken", "cpu", "native", ((layout, wrong, wrong + "raise OSError('no layout')\n"),)),
        make("same", "cpu", "native", ((layout, wrong, wrong + "\n"),)),
    ]
    monkeypatch.setattr(tune, "VARIANTS", {variant.name: variant for variant in variants})
    path = tmp_path / "tune.json"
    assert tune.main([*CHOICE, "--json", str(path)]) == 1
    document = json.loads(path.read_text())
    assert [result["variant"] for result in document["results"]] == ["same"]
    gone, broken = document["failed"]
    assert gone == f"gone: {layout} has 'no such text' 0 times, not once"
    assert broken.startswith("broken: ")
    assert broken.endswith("OSError: no layout")
    assert document["complete"] is False
    assert capsys.readouterr().err.count("tune.py: ") == 2


def test_sources_that_do_not_build(tune, monkeypatch, capsys):
    monkeypatch.setattr(tune, "build_commands", lambda *_: [["sh", "-c", "echo no compiler; exit 1"]])
    assert tune.main([*CHOICE, "--variant", "prefetch-8k"]) == 1
    assert "tune.py: the sources as they are: does not build: no compiler" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_measured(tune, tmp_path, monkeypatch):
    path, turns = tmp_path / "tune.json", []

    def turn(tuning, variant):
        turns.append(variant.name)
        if len(turns) == 4:
            raise KeyboardInterrupt
        name = variant.name if variant.backend else "as they are native"
        tuning.samples.setdefault(name, {}).setdefault("2x4x8x8 fp32 nchw forward", []).append(float(len(turns)))

    monkeypatch.setattr(tune._Tuning, "_turn", turn)
    arguments = [*CHOICE, "--variant", "prefetch-8k", "--rounds", "2", "--json", str(path)]
    assert tune.main(arguments) == tune.INTERRUPTED
    document = json.loads(path.read_text())
    assert document["complete"] is False
    (result,) = document["results"]
    assert sorted(len(result["cells"]["2x4x8x8 fp32 nchw forward"][key]) for key in ("ms", "base_ms")) == [1, 2]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (["--variant", "faster"], "argument --variant: invalid choice: 'faster'"),
        (["--variant", "ring-2"], "argument --variant: ring-2 is for --device cuda"),
        (["--device", "cuda"], "argument --device: there is no NVIDIA GPU here"),
        (["--rounds", "0"], "argument --rounds: must be an integer of at least 1, got '0'"),
        (["--json", "no/folder.json"], "argument --json: "),
    ],
)
def test_bad_arguments(modules, monkeypatch, capsys, choice, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        modules["tune"].main(choice)
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
