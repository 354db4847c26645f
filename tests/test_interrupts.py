"""What schedulers and closed terminals send ends a command as Ctrl-C does; blocks that must end first."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from terminal import TRAIN, one_line, run, store_network

from sparta_kernels import papers, training
from sparta_kernels.evaluation import batches
from sparta_kernels.interrupts import as_ctrl_c, uninterrupted
from sparta_kernels.training import step

pytestmark = pytest.mark.usefixtures("one_thread", "few_images")
SIGNALS = pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])


@pytest.fixture(autouse=True)
def _as_it_was():
    """No test leaves a handler behind, or begins with what nohup ignores."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    left = [signal.signal(number, handler) for number, handler in before.items()]
    assert left == [signal.SIG_DFL, signal.SIG_DFL]


def _send(number, at, function):
    """`function`, whose call number `at` gets this signal first."""
    calls = []

    def sending(*arguments, **options):
        calls.append(1)
        if len(calls) == at:
            assert callable(signal.getsignal(number)), "it would end the tests"
            os.kill(os.getpid(), number)
        return function(*arguments, **options)

    return sending


@SIGNALS
def test_train_stores_its_last_whole_step(tmp_path, capsys, monkeypatch, number, status):
    path, whole = tmp_path / "net", tmp_path / "whole"
    with monkeypatch.context() as patch:
        patch.setattr(step.attack, "perturb", _send(number, 5, step.attack.perturb))  # the second step of epoch 2
        code, err = one_line(["train", path, *TRAIN, "--save-every", 0], capsys)
    assert code == status
    assert err.endswith(f"interrupted; {path} holds 1 epoch and 1 step of the next; go on with --resume\n")
    assert sorted(os.listdir(tmp_path)) == ["net", "net.csv", "net.toml"]
    assert run("train", path, *TRAIN, "--resume").exit_code == 0
    assert run("train", whole, *TRAIN).exit_code == 0
    one, two = (training.load_checkpoint(file)[0].state_dict() for file in (path, whole))
    assert all(one[name].equal(two[name]) for name in two)


def test_an_update_is_done_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step, "learning_rate", _send(signal.SIGTERM, 2, step.learning_rate))
    code, err = one_line(["train", tmp_path / "net", *TRAIN], capsys)
    assert (code, "holds 0 epochs and 2 steps of the next" in err) == (143, True)


@SIGNALS
def test_evaluate_keeps_every_batch(tmp_path, capsys, monkeypatch, number, status):
    checkpoint, path = store_network(tmp_path), tmp_path / "found.npz"
    command = ["evaluate", checkpoint, "--batch-size", 16, "--steps", 2, "--outcomes", path]
    with monkeypatch.context() as patch:
        patch.setattr(batches.attack, "pgd", _send(number, 3, batches.attack.pgd))  # after the warm-up and a batch
        code, err = one_line(command, capsys)
    assert code == status
    assert err.splitlines()[-1] == f"sparta: interrupted; 16 of 40 images of net are in {path}; go on with --resume"
    assert run(*command, "--resume").exit_code == 0


def test_reproduce_goes_on_later(tmp_path, capsys, monkeypatch):
    quick = papers.quick_plan
    small = {"report_at": (1, 2, 3), "width": 2, "images": 40}
    monkeypatch.setattr(papers, "quick_plan", lambda **given: quick(**small, **given))
    monkeypatch.setattr(step.attack, "perturb", _send(signal.SIGTERM, 2, step.attack.perturb))
    command = ["reproduce", "table5", "--quick", "--epochs", 1, "--batch-size", 16, "--out", tmp_path]
    code, err = one_line(command, capsys)
    assert code == 143
    assert err.splitlines()[-1] == "sparta: interrupted; 0 of 3 runs are done, and the same command goes on"
    assert "in its first epoch" in run(*command, "--list").stdout


def test_before_there_is_anything_to_keep(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "read_run", _send(signal.SIGTERM, 1, training.read_run))
    assert one_line(["train", store_network(tmp_path), "--resume"], capsys)[0] == 143


def test_ctrl_c_keeps_its_own_status(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step.attack, "perturb", _send(signal.SIGINT, 1, step.attack.perturb))
    assert one_line(["train", tmp_path / "net", *TRAIN], capsys)[0] == 130


def test_one_that_is_ignored_stays_ignored():
    """As nohup has it with SIGHUP."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with as_ctrl_c() as came, uninterrupted() as held:
            os.kill(os.getpid(), signal.SIGHUP)
            assert (len(held), came) == (0, [])
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_other_threads_are_left_alone():
    def enter():
        with as_ctrl_c(), uninterrupted() as held:
            found.append((len(held), signal.getsignal(signal.SIGTERM)))

    found = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(0, signal.SIG_DFL)]


def test_what_is_held_back_is_told_as_it_would_have_been():
    with as_ctrl_c() as came:
        with pytest.raises(KeyboardInterrupt), uninterrupted() as held:  # noqa: PT012
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            assert (len(held), came) == (2, [])
        assert came == [signal.SIGTERM]
        with pytest.raises(ZeroDivisionError), uninterrupted():  # noqa: PT012
            os.kill(os.getpid(), signal.SIGTERM)
            raise ZeroDivisionError
    assert came == [signal.SIGTERM], "a block that ends in an error raises that alone"
