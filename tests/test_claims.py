"""A file that one process is using is refused to all others."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys

import pytest
from terminal import TRAIN, one_line, store_network

from sparta_kernels import claims, training
from sparta_kernels.claims import claimed

pytestmark = pytest.mark.usefixtures("one_thread", "few_images")
HOLDING = """
import runpy, sys
with runpy.run_path(sys.argv[1])["claimed"](sys.argv[2]):
    print(flush=True)
    input()
"""


@pytest.fixture
def hold():
    """Has another process claim a path, and returns it."""
    started = []

    def hold(path):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDING, claims.__file__, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        started.append(process)
        process.stdout.readline()
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".lock")}


@pytest.mark.parametrize("how", [[], ["--overwrite"], ["--resume"]])
def test_a_network_that_another_process_trains(tmp_path, capsys, hold, how):
    path = tmp_path / "net"
    if how:
        assert one_line(["train", path, *TRAIN], capsys)[0] in (0, None)
        (tmp_path / "net.csv").write_text("what the other has just written")
    before = contents(tmp_path)
    process = hold(path)
    code, err = one_line(["train", path, *TRAIN, *how], capsys)
    assert code == 1
    assert re.fullmatch(rf"sparta: {path} is in use by process {process.pid} on \S+\n", err)
    assert contents(tmp_path) == before

    process.send_signal(signal.SIGKILL)
    process.wait()
    assert one_line(["train", path, *TRAIN, *how], capsys)[0] in (0, None)
    assert not list(tmp_path.glob(".*"))


def test_an_evaluation_that_another_process_does(tmp_path, capsys, hold):
    network, path = store_network(tmp_path), tmp_path / "found.npz"
    process = hold(path)
    command = ["evaluate", network, "--steps", 1, "--limit", 4, "--batch-size", 4, "--outcomes", path]
    code, err = one_line(command, capsys)
    assert code == 1
    assert re.fullmatch(rf"sparta: {path} is in use by process {process.pid} on \S+\n", err)
    assert not path.exists()
    process.communicate(b"\n")
    assert one_line(command, capsys)[0] in (0, None)
    assert sorted(os.listdir(tmp_path)) == ["found.npz", "net.safetensors"]


def test_a_path_is_claimed_before_it_is_read(tmp_path):
    """Or a run that goes on would go on from before the other's last step."""
    with claimed(tmp_path / "net"), pytest.raises(BlockingIOError, match=f"process {os.getpid()} on"):
        training.train(training.Settings(), tmp_path / "net", resume=True)  # there is none to read
    assert not os.listdir(tmp_path)


def test_a_claim_ends_with_its_block(tmp_path):
    with pytest.raises(KeyError), claimed(tmp_path / "a"), claimed(tmp_path / "b"):
        raise KeyError
    with claimed(tmp_path / "a"):
        assert os.listdir(tmp_path) == [".a.lock"]
    assert not os.listdir(tmp_path)


def test_a_lock_that_its_owner_removes_meanwhile_is_none(tmp_path, monkeypatch):
    path, lock, flock, removed = tmp_path / "a", tmp_path / ".a.lock", claims.fcntl.flock, []

    def late(*arguments):
        if not removed:
            removed.append(lock.unlink())
        flock(*arguments)

    monkeypatch.setattr(claims.fcntl, "flock", late)
    with claimed(path):
        assert lock.exists()
        with pytest.raises(BlockingIOError), claimed(path):
            pass


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(claims.fcntl, "flock", none)
    with (
        pytest.warns(UserWarning, match="a: cannot be locked; .* No locks available") as told,
        claimed(tmp_path / "a"),
    ):
        assert not os.listdir(tmp_path)
    assert told[0].filename == __file__
