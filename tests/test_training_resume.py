"""A run that is stopped at any moment, and resumed, ends with the file of one that was not."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sparta_kernels import data
from sparta_kernels.training import CheckpointError, Settings, TrainingDiverged, load_checkpoint, read_run, step, train
from sparta_kernels.training import run as run_module

TINY = {"width": 2, "epochs": 2, "batch_size": 16, "attack": "xie2019", "attack_steps": 2}
EVERYTHING = TINY | {
    "loss": "trades",
    "ema": 0.9,
    "nesterov": True,
    "label_smoothing": 0.1,
    "schedule": "cosine",
    "warmup": 1,
    "precision": "bf16",
}
# The first images of the digits, with crops and flips.
FEW_IMAGES = """
import dataclasses, sys, torch
from sparta_kernels import data, training
torch.set_num_threads(1)
load = data.load
data.load = lambda *args: tuple(part[:50] for part in load(*args))
data.DATASETS["digits"] = dataclasses.replace(data.DATASETS["digits"], crop=1, flip=True)
"""


@pytest.fixture(autouse=True)
def _few_images(monkeypatch):
    threads = torch.get_num_threads()
    load, digits = data.load, data.DATASETS["digits"]
    exec(FEW_IMAGES, {})
    yield
    data.load, data.DATASETS["digits"] = load, digits
    torch.set_num_threads(threads)


def contents(path):
    """What a run ends with: its tensors as bytes, and its description without the seconds that it took."""
    with safe_open(str(path), framework="pt") as file:
        metadata = json.loads(file.metadata()["metadata"])
    for epoch in metadata["history"]:
        del epoch["images_per_second"], epoch["seconds"]
    del metadata["position"]["seconds"]
    tensors = {name: (t.dtype, t.shape, t.numpy().tobytes()) for name, t in load_file(path).items()}
    return metadata, tensors


def steps_done(path):
    metadata = load_checkpoint(path)[1]
    return metadata["epoch"], metadata["position"]["step"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The file of an uninterrupted run with these settings."""
    files = {}

    def run(settings):
        if settings not in files:
            files[settings] = tmp_path_factory.mktemp("whole") / "run.safetensors"
            train(settings, files[settings])
        return contents(files[settings])

    return run


@pytest.mark.parametrize("values", [TINY, EVERYTHING], ids=["plain", "everything"])
def test_ctrl_c_stores_the_last_whole_step(tmp_path, whole, values, monkeypatch):
    settings, path = Settings(**values), tmp_path / "run.safetensors"
    perturb, calls, stop_at = step.attack.perturb, [], 3

    def interrupt(*args, **keywords):
        calls.append(1)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return perturb(*args, **keywords)

    monkeypatch.setattr(step.attack, "perturb", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(settings, path, save_every=None)
    assert steps_done(path) == (0, 2)
    stop_at = 1 + len(calls)
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):  # nothing new: nothing is written
        train(settings, path, resume=True)
    assert path.read_bytes() == before
    torch.rand(3)  # the global generator must not matter
    stop_at = 4 + len(calls)
    with pytest.raises(KeyboardInterrupt):
        train(settings, path, resume=True)
    assert steps_done(path) == (1, 1)
    monkeypatch.undo()
    assert len(train(settings, path, resume=True)) == 2
    assert contents(path) == whole(settings)


def test_ctrl_c_waits_for_the_end_of_an_update(tmp_path, whole, monkeypatch):
    settings, path = Settings(**TINY), tmp_path / "run.safetensors"
    rate, updates = step.learning_rate, []

    def interrupt(*args):
        updates.append(args)
        if len(updates) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return rate(*args)

    monkeypatch.setattr(step, "learning_rate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(settings, path)
    assert steps_done(path) == (0, 2)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(settings, path, resume=True)
    assert contents(path) == whole(settings)


def test_an_update_that_breaks_off_is_not_stored(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"

    update, updates = torch.optim.SGD.step, []

    def stop(*arguments):  # not by a signal: in the midst of the second update
        updates.append(1)
        if len(updates) == 2:
            raise KeyboardInterrupt
        return update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(Settings(**TINY | {"attack": "none"}), path)
    assert not path.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("values", [EVERYTHING], ids=["everything"])
def test_killed_at_a_random_moment(tmp_path, whole, values):
    settings, path = Settings(**values), tmp_path / "run.safetensors"
    expected = whole(settings)
    script = (
        FEW_IMAGES
        + f"""
settings = training.Settings(**{values!r})
training.train(settings, sys.argv[1], save_every=1e-9, on_batch=lambda _: print("step", flush=True))
"""
    )
    process = subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE, text=True)
    draw = random.Random()  # another moment in every run of this test
    try:
        for _ in range(draw.randint(1, 6)):
            assert process.stdout.readline() == "step\n"
        time.sleep(draw.random() * 0.1)
    finally:
        process.kill()
        process.communicate()
    if not path.exists():  # killed before the first step was stored
        assert train(settings, path)
    else:
        done = steps_done(path)
        assert (0, 1) <= done <= (2, 0)
        train(settings, path, resume=True)
    assert contents(path) == expected


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), torch.OutOfMemoryError("of the GPU"), SystemExit("nobody reads")]
)
def test_whole_steps_are_stored_when_something_else_ends_them(tmp_path, whole, monkeypatch, error):
    settings, path = Settings(**TINY), tmp_path / "run.safetensors"
    perturb, calls = step.attack.perturb, []

    def fail(*args, **keywords):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return perturb(*args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(step.attack, "perturb", fail)
        with pytest.raises(type(error)) as raised:
            train(settings, path)
        assert raised.value is error
    assert steps_done(path) == (0, 2)
    train(settings, path, resume=True)
    assert contents(path) == whole(settings)


def test_a_file_that_cannot_be_written_is_told_once(tmp_path, monkeypatch):
    error = OSError(28, "No space left on device")

    def full(*_):
        raise error

    monkeypatch.setattr(run_module, "save_checkpoint", full)
    with pytest.raises(OSError, match="No space left") as raised:
        train(Settings(**TINY), tmp_path / "run.safetensors", save_every=1e-9)
    assert raised.value is error


@pytest.mark.parametrize("schedule", ["milestones", "constant"])
def test_more_epochs(tmp_path, whole, schedule):
    """A run that is made longer is the run that was so long from the start."""
    longer = Settings(**TINY | {"schedule": schedule, "milestones": (1,), "ema": 0.9})
    shorter, path = dataclasses.replace(longer, epochs=1), tmp_path / "run.safetensors"
    train(shorter, path)
    for other in ({"seed": 1}, {"milestones": (1, 2)}):
        with pytest.raises(CheckpointError, match=next(iter(other))):
            train(dataclasses.replace(longer, **other), path, resume=True)
    assert len(train(longer, path, resume=True)) == 2
    assert contents(path) == whole(longer)
    with pytest.raises(CheckpointError, match=r"epochs was 2 and is 1 \(it can only be raised\)"):
        train(shorter, path, resume=True)


@pytest.mark.parametrize("schedule", ["cosine", "one-cycle"])
def test_more_epochs_where_learning_rates_depend_on_them(tmp_path, schedule):
    settings, path = Settings(**TINY | {"schedule": schedule, "epochs": 1, "attack": "none"}), tmp_path / "run"
    train(settings, path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"epochs was 1 and is 2 \(its learning rates depend on it\)$"):
        train(dataclasses.replace(settings, epochs=2), path, resume=True)
    assert path.read_bytes() == before


def test_a_source_of_sparta_that_was_moved(tmp_path, monkeypatch):
    first, second, path = tmp_path / "first", tmp_path / "second", tmp_path / "run"
    standard = TINY | {"attack": "none"}
    train(Settings(**standard), first)
    settings = Settings(**standard | {"sparta_from": str(first), "freeze_sparta": True})

    def stop(batch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, path, on_batch=stop)
    moved = dataclasses.replace(settings, sparta_from=str(second))
    for content in (None, b"another file"):
        if content is not None:
            second.write_bytes(content)
        with pytest.raises(CheckpointError, match="sparta_from was"):
            train(moved, path, resume=True)
    first.rename(second)
    assert len(train(moved, path, resume=True)) == 2
    assert load_checkpoint(path)[1]["settings"]["sparta_from"] == str(second)


def test_checkpoints_by_the_clock(tmp_path):
    settings, path, seen = Settings(**TINY | {"attack": "none"}), tmp_path / "run.safetensors", []
    stores = []

    def look(batch):  # called before the step just done is stored
        seen.append(steps_done(path) if path.exists() else None)

    train(settings, path, save_every=1e-9, on_batch=look, on_store=lambda: stores.append(steps_done(path)))
    assert stores == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (2, 0)]
    assert seen == [None, (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)]
    seen.clear()
    train(settings, path, overwrite=True, save_every=None, on_batch=look)
    assert seen == [(2, 0)] * 4 + [(1, 0)] * 4


def test_ruined_weights_are_not_stored_between_epochs(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    rates = iter([0.0, float("inf")])
    monkeypatch.setattr(step, "learning_rate", lambda *_: next(rates))
    with pytest.raises(TrainingDiverged, match="is not finite after step 2 of epoch 1"):
        train(Settings(**TINY | {"attack": "none"}), path, save_every=1e-9)
    assert steps_done(path) == (0, 1)


def test_weights_that_only_the_test_shows_are_ruined(tmp_path, monkeypatch):
    """They are finite, but what they make of an image is not."""
    path, rate = tmp_path / "run.safetensors", step.learning_rate
    monkeypatch.setattr(step, "learning_rate", lambda *place: 1e30 if place[1] == 7 else rate(*place))
    with pytest.raises(
        TrainingDiverged, match=r"test after an epoch: the network's logits are not finite for \d+ of 50"
    ):
        train(Settings(**TINY | {"attack": "none"}), path)
    assert steps_done(path) == (1, 0)


def test_a_stop_after_an_epochs_last_step(tmp_path, whole, monkeypatch):
    settings, path = Settings(**TINY), tmp_path / "run.safetensors"

    def stop(batch):
        if batch.number == batch.batches:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, path, on_batch=stop)
    assert steps_done(path) == (0, 4)
    train(settings, path, resume=True)
    assert contents(path) == whole(settings)


def test_positions_that_are_none(tmp_path):
    from safetensors.torch import save_file

    settings, path = Settings(**TINY | {"epochs": 1, "attack": "none"}), tmp_path / "run.safetensors"
    train(settings, path)
    with safe_open(str(path), framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    epoch = json.loads(header["metadata"])["history"][0]
    for changes in (
        {"position": {"step": -1}},
        {"position": {"step": 0.5}},
        {"position": {"x": 1}},
        {"position": {"step": 1, "loss": "x", "seconds": 1}},
        {"position": {"step": 1}},
        {"epoch": 3},
        {"history": [epoch | {"loss": "x"}]},
    ):
        metadata = json.loads(header["metadata"]) | changes
        save_file(tensors, path, header | {"metadata": json.dumps(metadata)})
        with pytest.raises(CheckpointError, match="history is damaged"):
            read_run(settings, path)
