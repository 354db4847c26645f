"""benchmarks/training.py and adversarial_digits.py: what they write, judge and refuse."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import Future

import pytest
import torch

from sparta_kernels import data

TINY = ("--width", "2", "--steps", "2", "--rounds", "2", "--threads", "1", "--batch", "4")


@pytest.fixture(scope="module")
def measured(modules, tmp_path_factory):
    """A whole measurement, in two processes."""
    path = tmp_path_factory.mktemp("training") / "training.json"
    threads = torch.get_num_threads()
    status = modules["training"].main([*TINY, "--precision", "bf16", "--activation", "sparta", "--json", str(path)])
    torch.set_num_threads(threads)
    assert status == 0
    return json.loads(path.read_text())


def test_everybody_is_timed_as_often(measured):
    assert measured["complete"] is True
    (result,) = measured["results"]
    assert [row["candidate"] for row in result["entries"]] == ["ours", "eager", "eager-low"]
    for row in result["entries"]:
        assert len(row["step_ms"]) == 2
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["epoch_seconds"] == pytest.approx(row["median_ms"] * 1e-3 * 12_500)


def test_the_bar_is_about_the_same_loop_in_float32(measured):
    (result,) = measured["results"]
    ours, eager, _ = (row["median_ms"] for row in result["entries"])
    (bar,) = measured["bars"]
    assert bar["value"] == pytest.approx(eager / ours)
    assert bar["limit"] == 2.5
    assert bar["passed"] is (None if not measured["amx"] else bar["value"] >= 2.5)


def test_the_data_set_is_as_before(measured):
    with pytest.raises(data.DataError):
        data.load("cifar10", "/nowhere")


def test_the_eager_attack_stays_in_its_ball_and_lowers_the_loss(modules):
    settings = modules["training"].training.Settings(data="cifar10", width=4, batch_size=8, attack_steps=5)
    threads = torch.get_num_threads()
    eager = modules["training_eager"].Eager(settings, 1, "cpu")
    images = eager.images.float() / 255
    torch.manual_seed(0)
    adversarial = eager.attacked(images, "fp32")
    torch.set_num_threads(threads)
    assert float((adversarial - images).abs().max()) <= settings.eps + 1e-6
    assert 0 <= float(adversarial.min()) <= float(adversarial.max()) <= 1
    torch.manual_seed(0)
    targets = (eager.labels + torch.randint_like(eager.labels, 1, 10)) % 10
    with torch.no_grad():
        before, after = (torch.nn.functional.cross_entropy(eager.model(x), targets) for x in (images, adversarial))
    assert after < before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "2"], "argument --batch: must be at least 3, got 2"),
        (["--precision", "fp16"], "argument --precision: fp16 needs a GPU"),
        (["--activation", "foo"], "argument --activation: "),
        (["--threads", "100000"], "argument --threads: must be at most"),
        (["--json", "/nowhere/x.json"], "argument --json: cannot write"),
    ],
)
def test_wrong_calls(modules, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        modules["training"].main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_digits_over_seeds_are_trained_once_and_drawn(modules, tmp_path, monkeypatch, capsys):
    """One tiny run of each activation in this process; the second call trains nothing."""
    digits = modules["adversarial_digits"]
    monkeypatch.setattr(digits, "STEPS", 2)
    monkeypatch.setattr(digits, "REPORTED", (1, 2))
    monkeypatch.setattr(digits, "ProcessPoolExecutor", _Here)
    whole = data.load("digits", split="train")
    few = tuple(part[:32] for part in whole)
    monkeypatch.setattr(data, "load", lambda *_, **__: few)
    plain = digits.settings_of
    monkeypatch.setattr(
        digits, "settings_of", lambda *given: dataclasses.replace(plain(*given), width=2, attack_steps=1, batch_size=16)
    )
    arguments = ["--out", str(tmp_path), "--seeds", "1", "--epochs", "2"]
    threads = torch.get_num_threads()
    assert digits.main(arguments) == 0
    document = json.loads((tmp_path / "results.json").read_text())
    assert [row["activation"] for row in document["results"]] == ["relu", "sparta"]
    assert all(len(row["history"]) == 2 for row in document["results"])
    assert all(0 <= epoch["robust_error"] <= 1 for row in document["results"] for epoch in row["history"])
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert "SPARTA" in capsys.readouterr().out
    monkeypatch.setattr(digits.training, "train", lambda *_, **__: pytest.fail("it was trained already"))
    assert digits.main(arguments) == 0
    torch.set_num_threads(threads)


class _Here:
    """A pool whose work is done at once, in this process."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future
