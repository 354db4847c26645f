"""`sparta evaluate` by torchrun: two processes write the file that one writes, also after they were killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sparta_kernels import cli, training
from sparta_kernels.evaluation import Outcomes, OutcomesError, batches

EVALUATE = ["--limit", "24", "--batch-size", "4", "--threads", "1", "--precision", "bf16", "--parity-images", "8"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("stored") / "net.safetensors"
    torch.set_num_threads(1)
    training.train(training.Settings(width=4, epochs=1, attack="none"), path)
    return path


def alone(*arguments):
    result = CliRunner().invoke(cli.app, ["evaluate", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result


def together(*arguments):
    """Two processes, started but not awaited."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*torchrun, "-m", "sparta_kernels.cli", "evaluate", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def known(path: Path) -> int:
    """How many images' outcome is in this file."""
    try:
        return int(Outcomes.load(path).arrays["done"].sum())
    except (FileNotFoundError, OutcomesError):
        return 0


def kill(process: subprocess.Popen) -> None:
    """End it and what it started, at once; torchrun gives each worker a session of its own."""
    if process.poll() is None:
        for pid in [*workers(process.pid), process.pid]:
            os.kill(pid, signal.SIGKILL)
        process.communicate()


def workers(pid: int) -> list[int]:
    """Its children, and theirs."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *workers(child)]
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_two_processes_finish_what_one_began(checkpoint, tmp_path, monkeypatch):
    steps = ["--steps", "3", "--report-at", "1,3", *EVALUATE]
    alone(checkpoint, *steps, "--outcomes", tmp_path / "one.npz", "--json", tmp_path / "one.json")
    attack, calls = batches.attack.pgd, []

    def interrupt(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:  # after the warm-up and two batches
            raise KeyboardInterrupt
        return attack(*arguments, **options)

    monkeypatch.setattr(batches.attack, "pgd", interrupt)
    begun = CliRunner().invoke(cli.app, ["evaluate", str(checkpoint), *steps, "--outcomes", str(tmp_path / "two.npz")])
    assert begun.exit_code == 130
    assert known(tmp_path / "two.npz") == 8
    files = ["--outcomes", tmp_path / "two.npz", "--resume", "--json", tmp_path / "two.json"]
    process = together(checkpoint, *steps, *files)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        kill(process)
    assert process.returncode == 0, err
    assert (tmp_path / "two.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["one.json", "one.npz", "two.json", "two.npz"]
    assert out.count("digits test images") == 1  # process 0 prints, the other is silent
    assert "2 processes" in out
    (one,), (two,) = (json.loads((tmp_path / f"{name}.json").read_text())["results"] for name in ("one", "two"))
    for name in ("clean_error", "errors", "target_success", "loss_mean", "loss_std", "parity", "threads"):
        assert one[name] == two[name], name
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["attacked"] == 16
    assert np.load(tmp_path / "two.npz")["done"].all()


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_killed_processes_are_taken_up_by_one(checkpoint, tmp_path):
    steps = ["--steps", "15", "--report-at", "5,15", *EVALUATE]
    path = tmp_path / "found.npz"
    part = path.with_name("found.npz.part1")
    process = together(checkpoint, *steps, "--outcomes", path)
    try:
        end = time.monotonic() + 300
        while not (known(path) and known(part)):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        kill(process)
    before = known(path) + known(part)
    assert 8 <= before < 24
    result = alone(checkpoint, *steps, "--outcomes", path, "--resume", "--json", "-")
    assert json.loads(result.stdout)["results"][0]["attacked"] == 24 - before
    alone(checkpoint, *steps, "--outcomes", tmp_path / "whole.npz")
    assert path.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["found.npz", "whole.npz"]


def test_what_several_processes_cannot_do(checkpoint, tmp_path, monkeypatch, capsys):
    """Here in one process that takes itself for one of two."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for arguments, code, words in [
        (["reproduce", "table2", "--quick", "--out", tmp_path / "papers"], 1, "start it without torchrun"),
        (["evaluate", checkpoint, "--steps", "0"], 2, "--steps"),
    ]:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        assert stop.value.code == code
        err = capsys.readouterr().err
        assert err.startswith("sparta (process 1): ")
        assert words in err
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(("asked", "threads"), [((), None), (("--threads", "3"), 3)])
def test_processes_share_the_cores(checkpoint, tmp_path, monkeypatch, asked, threads):
    from sparta_kernels import evaluation

    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(10)), raising=False)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    used = []

    def stop(*_, **__):
        used.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "evaluate", stop)
    assert CliRunner().invoke(cli.app, ["evaluate", str(checkpoint), *asked]).exit_code == 130
    assert used == [threads or 5]
