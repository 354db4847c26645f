"""benchmarks/attack.py: what it times, checks and refuses."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from sparta_kernels import backends

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, str(FOLDER))
    yield {name: importlib.import_module(name) for name in ("attack", "timing")}
    sys.path.remove(str(FOLDER))


@pytest.fixture
def attack(modules, monkeypatch):
    monkeypatch.setattr(modules["timing"], "use_allocator", lambda name: None)  # would start pytest again
    return modules["attack"]


def run_attack(attack, path, *arguments):
    tiny = ["--batch", "2", "--width", "4", "--steps", "3", "--threads", "1"]
    tiny += ["--candidates", "native", "reference", "relu"]
    return attack.main([*tiny, "--json", str(path), *arguments])


def test_attack(attack, tmp_path, capsys):
    path = tmp_path / "attack.json"
    assert run_attack(attack, path, "--budget", "300") == 0
    document = json.loads(path.read_text())
    assert document["complete"] is True
    assert [found["precision"] for found in document["results"]] == ["fp32", "bf16"]
    for found in document["results"]:
        assert list(found["candidates"]) == ["native", "reference", "relu"]
        for times in found["candidates"].values():
            assert 0 < times["p20_ms"] <= times["median_ms"] <= times["p80_ms"]
            assert times["samples"] >= 3
            assert times["images_per_second"] == pytest.approx(2e3 / times["median_ms"])
        assert found["candidates"]["relu"]["ratio_to_relu"] == 1
        assert found["candidates"]["reference"]["speedup_over_reference"] == 1
    printed = capsys.readouterr().out
    assert printed.count("reference") >= 2
    assert "PGD iteration, ResNet-18, batch 2" in printed


def test_an_iteration_is_timed_between_the_first_and_the_last(attack):
    clock = attack.Clock(torch.device("cpu"))
    clock.marks = [0.0, 1.0, 1.5, 2.0, 9.0]  # iterates 0 to 4
    assert clock.iteration() == pytest.approx(0.5)


def test_an_attack_by_wrong_kernels_is_not_timed(attack, tmp_path, monkeypatch, capsys):
    path = tmp_path / "attack.json"
    monkeypatch.setattr(backends.module("native"), "gate_forward", lambda x, *_: torch.relu(x))
    assert run_attack(attack, path, "--precision", "fp32") == attack.FAILED
    document = json.loads(path.read_text())
    assert list(document["results"][0]["candidates"]) == ["reference", "relu"]
    assert "fp32: native computes a wrong logits" in document["failed"][0]
    assert "native computes a wrong logits" in capsys.readouterr().err


def test_an_attack_that_breaks_costs_no_other(attack, tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("gate_forward: CUDA launch failed")

    path = tmp_path / "attack.json"
    monkeypatch.setattr(backends.module("native"), "gate_forward", broken)
    assert run_attack(attack, path, "--precision", "fp32") == attack.FAILED
    document = json.loads(path.read_text())
    assert list(document["results"][0]["candidates"]) == ["reference", "relu"]
    assert document["failed"] == ["fp32: native: RuntimeError: gate_forward: CUDA launch failed"]


def test_a_gpu_that_breaks_down_ends_an_attack(attack, tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore")

    path = tmp_path / "attack.json"
    monkeypatch.setattr(backends.module("native"), "gate_forward", broken)
    assert run_attack(attack, path) == attack.FAILED
    (failure,) = json.loads(path.read_text())["failed"]
    assert failure.startswith("fp32: CUDA error: an illegal memory access was encountered; nothing")


def test_an_attack_without_time(attack, tmp_path, capsys):
    path = tmp_path / "attack.json"
    assert run_attack(attack, path, "--budget", "0.001") == 0
    document = json.loads(path.read_text())
    assert (document["complete"], document["results"]) == (False, [])
    assert document["not_measured"] == ["fp32: no time left", "bf16: no time left"]


@pytest.mark.gpu
def test_attack_on_a_gpu(attack, tmp_path, capsys):
    path, benchmark = tmp_path / "attack.json", torch.backends.cudnn.benchmark
    try:
        arguments = ["--batch", "4", "--width", "8", "--steps", "3", "--device", "cuda", "--json", str(path)]
        assert attack.main(arguments) == 0, capsys.readouterr().err
    finally:
        torch.backends.cudnn.benchmark = benchmark
    document = json.loads(path.read_text())
    for found in document["results"]:
        assert list(found["candidates"]) == ["native", "triton", "reference", "relu"]
        assert all(0 < times["median_ms"] < 1e3 for times in found["candidates"].values())
        assert all(times["peak_memory"] > 0 for times in found["candidates"].values())
