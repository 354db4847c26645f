"""Two processes train one network, as DistributedDataParallel over gloo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ddp_case
import pytest
import torch
from safetensors.torch import load_file

from sparta_kernels import data
from sparta_kernels.training import Settings, load_checkpoint, step
from sparta_kernels.training.step import Trainer

CASE = Path(ddp_case.__file__)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder with what two processes made."""
    folder = tmp_path_factory.mktemp("ddp")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.run([*torchrun, CASE, folder], capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    return folder


@pytest.fixture
def _few_images(monkeypatch):
    monkeypatch.setattr(data, "load", data.load)
    ddp_case.few_images()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def found(together):
    first, second = (json.loads((together / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second  # losses, errors and weights, to the last bit
    return first


@pytest.mark.usefixtures("_few_images")
def test_the_curve_is_that_of_one_process(together, found, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "keep_frozen_in_eval", ddp_case.statistics_in_eval_mode)
    path = tmp_path / "alone.safetensors"
    alone = torch.tensor(ddp_case.losses(Settings(**ddp_case.TINY), path))
    torch.testing.assert_close(torch.tensor(found["exact"]), alone, rtol=1e-3, atol=1e-3)
    one, two = load_file(path), load_file(together / "exact.safetensors")
    assert one.keys() == two.keys()
    for name, value in one.items():  # rounding, and pixels whose gradient is all but 0
        torch.testing.assert_close(two[name], value, rtol=1e-2, atol=1e-3, msg=lambda words, n=name: f"{n}: {words}")


@pytest.mark.usefixtures("_few_images")
def test_the_usual_curve_is_near_it(found, tmp_path):
    """With statistics of half a batch in each process: near, not equal."""
    alone = ddp_case.losses(Settings(**ddp_case.TINY), tmp_path / "alone.safetensors")
    means = [sum(loss for loss, _ in curve[4:]) / 4 for curve in (alone, found["usual"])]
    assert len(found["usual"]) == len(alone) == 8
    assert means[1] == pytest.approx(means[0], rel=0.15)


def test_a_resumed_run_ends_alike(together, found):
    assert (found["stopped"], found["stored"]) == (6, 2)  # the second step of the second epoch
    one, two = (load_file(together / f"{name}.safetensors") for name in ("usual", "resumed"))
    assert one.keys() == two.keys()
    assert any(name.startswith("ema.") for name in one)
    assert all(torch.equal(one[name], two[name]) for name in one)
    histories = [load_checkpoint(together / f"{name}.safetensors")[1]["history"] for name in ("usual", "resumed")]
    assert histories[0][1]["robust_error"] == histories[1][1]["robust_error"] is not None


def test_ctrl_c_in_the_test_after_an_epoch(found):
    assert found["tested"] == [0, 4]  # none of the epoch's steps is lost


def test_frozen_parameters_are_not_waited_for(together, found):
    assert len(found["frozen"]) == 4
    source, frozen = (load_file(together / f"{name}.safetensors") for name in ("usual", "frozen"))
    names = [name for name in source if name.startswith("model.layer1.1.act2.")]
    assert names
    assert all(torch.equal(frozen[name], source[name.replace("model.", "ema.", 1)]) for name in names)


@pytest.mark.usefixtures("_few_images")
def test_every_process_needs_two_images():
    class Many:
        rank, count = 0, 10

    with pytest.raises(ValueError, match=r"batch_size must give each of the 10 processes at least 2 images, got 16"):
        Trainer(type("", (), {"settings": Settings(**ddp_case.TINY)})(), *data.load("digits"), Many())
