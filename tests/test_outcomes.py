"""Every image's outcome in a file: whole at any moment, and a run that was stopped goes on to the very same bytes."""

from __future__ import annotations

import json
import os
import pickle
import resource
import sys

import numpy as np
import pytest
import torch
from torch import nn

from sparta_kernels.attack import pgd
from sparta_kernels.data import files
from sparta_kernels.evaluation import Outcomes, OutcomesError, evaluate, outcomes
from sparta_kernels.evaluation.digest import model_digest
from sparta_kernels.nn import Sparta
from sparta_kernels.processes import Processes

CLASSES, IMAGES = 4, 10
SETTINGS = {"eps": 0.2, "step_size": 0.05, "steps": 3, "report_at": (1, 3), "batch_size": 4, "seed": 5}


pytestmark = pytest.mark.usefixtures("one_thread")


def network(activation=nn.ReLU):
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(1, 4, 3), activation(), nn.Flatten(), nn.Linear(64, CLASSES)).eval()


@pytest.fixture
def model():
    return network()


@pytest.fixture
def images():
    return torch.rand(IMAGES, 1, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels():
    return torch.arange(IMAGES) % CLASSES


@pytest.fixture
def path(tmp_path):
    return tmp_path / "found.npz"


class Stop(BaseException):
    """As Ctrl-C, or worse."""


def stop_after(ticks):
    """A callback that ends the run at its call number `ticks`."""

    def callback(progress):
        nonlocal ticks
        ticks -= 1
        if ticks < 0:
            raise Stop

    return callback


def stopped(ticks, *arguments, **options):
    with pytest.raises(Stop):
        evaluate(*arguments, **options, progress=stop_after(ticks))


def numbers(found):
    """All that must not depend on when the run was stopped."""
    dropped = ("attacked", "images_per_second", "seconds", "peak_memory", "batch", "engine_reason")
    return {name: value for name, value in vars(found).items() if name not in dropped}


def test_what_the_file_holds(model, images, labels, path):
    indices = torch.arange(100, 100 + IMAGES)
    found = evaluate(model, images, labels, **SETTINGS, indices=indices, outcomes=path)
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    options = {name: value for name, value in SETTINGS.items() if name != "batch_size"}
    attack = pgd(model, images, labels, **options, indices=indices)
    assert arrays["index"].tolist() == indices.tolist()
    assert arrays["label"].tolist() == labels.tolist()
    assert arrays["done"].all()
    assert arrays["target"].tolist() == attack.targets.tolist()
    assert arrays["clean"].tolist() == model(images).argmax(1).tolist()
    assert arrays["report_at"].tolist() == [1, 3]
    for column, k in enumerate((1, 3)):
        assert arrays["prediction"][:, column].tolist() == attack.predictions[k].tolist()
        assert arrays["hit"][:, column].tolist() == attack.hits[k].tolist()
    assert arrays["loss"] == pytest.approx(attack.losses.T.numpy(), rel=1e-4)
    assert found.errors[3] == (arrays["prediction"][:, 1] != arrays["label"]).mean()
    assert found.clean_error == (arrays["clean"] != arrays["label"]).mean()
    settings = json.loads(str(arrays["settings"]))
    assert (settings["eps"], settings["batch_size"], settings["threads"]) == (0.2, 4, 1)
    assert arrays["parity_prediction"].shape == (0, 2)


def test_untargeted_images_have_no_target(model, images, labels, path):
    evaluate(model, images, labels, **SETTINGS, targeted=False, outcomes=path)
    arrays = np.load(path)
    assert set(arrays["target"]) == {-1}
    assert not arrays["hit"].any()


CALLS = 1 + 3 * (1 + 2 * 4) + 3 + 2 * 2 * 4 + 2  # the start, passes, batches, parity passes, parity batches


@pytest.mark.parametrize("ticks", range(0, CALLS, 3))
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(model, images, labels, path, tmp_path, ticks):
    settings = SETTINGS | {"restarts": 2, "precision": "bf16", "parity_images": 6}
    whole = evaluate(model, images, labels, **settings, outcomes=tmp_path / "whole.npz")
    stopped(ticks, model, images, labels, **settings, outcomes=path)
    # A call at the start, then 9 passes and a call after the batch, which is stored by then.
    known = Outcomes.load(path).arrays["done"].sum() if path.exists() else 0
    assert known == min(IMAGES, 4 * (max(0, ticks - 1) // 10 + ((ticks - 1) % 10 == 9 and ticks > 0)))
    seen = []
    again = evaluate(model, images, labels, **settings, outcomes=path, resume=True, progress=seen.append)
    assert path.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert numbers(again) == numbers(whole)
    assert again.attacked == IMAGES - known
    assert seen[0].images == known
    parity = (ticks >= 39) + (ticks >= 48)  # its two batches are stored by then
    assert seen[0].total == 9 * -(-again.attacked // 4) + 8 * (2 - parity)
    assert sorted(os.listdir(tmp_path)) == ["found.npz", "whole.npz"]


def test_a_finished_run_is_not_run_again(model, images, labels, path):
    whole = evaluate(model, images, labels, **SETTINGS, outcomes=path)
    before, seen = path.stat(), []
    again = evaluate(model, images, labels, **SETTINGS, outcomes=path, resume=True, progress=seen.append)
    assert numbers(again) == numbers(whole)
    assert (again.attacked, again.images_per_second, again.peak_memory) == (0, None, None)
    assert [(step.done, step.total, step.images) for step in seen] == [(0, 0, IMAGES)]
    assert path.stat().st_size == before.st_size


def test_every_state_of_the_file_is_whole(model, images, labels, path, monkeypatch):
    write, states = outcomes.write_atomically, []

    def note(where, content):
        write(where, content)
        states.append(Outcomes.load(where).arrays["done"].sum())

    monkeypatch.setattr(outcomes, "write_atomically", note)
    evaluate(model, images, labels, **SETTINGS, outcomes=path)
    assert states == [0, 4, 8, 10, 10]


def test_the_batch_size_is_that_of_the_run_that_is_resumed(model, images, labels, path):
    stopped(8, model, images, labels, **SETTINGS, outcomes=path)
    free = SETTINGS | {"batch_size": None}
    found = evaluate(model, images, labels, **free, outcomes=path, resume=True)
    assert found.batch == (4, "as before it was resumed")


def test_files_that_are_there(model, images, labels, path):
    evaluate(model, images, labels, **SETTINGS, outcomes=path, resume=True)  # nothing to resume: a first run
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="exists; resume it, overwrite it"):
        evaluate(model, images, labels, **SETTINGS | {"seed": 6}, outcomes=path)
    assert path.read_bytes() == before
    evaluate(model, images, labels, **SETTINGS | {"seed": 6}, outcomes=path, overwrite=True)
    other = path.read_bytes()
    assert other != before
    with pytest.raises(ValueError, match="resume must be False"):
        evaluate(model, images, labels, **SETTINGS, outcomes=path, overwrite=True, resume=True)


DIFFERENT = {
    "eps": 0.3,
    "step_size": 0.04,
    "steps": 4,
    "report_at": (3,),
    "batch_size": 5,
    "seed": 6,
    "targeted": False,
    "restarts": 2,
    "precision": "fp32",
    "engine": "eager",
    "backend": "reference",
    "parity_images": 3,
}


@pytest.fixture
def half(model, images, labels, path):
    """A run that has been stopped half-way, and how to take it up."""
    settings = SETTINGS | {"precision": "bf16", "parity_images": 4}
    stopped(8, model, images, labels, **settings, outcomes=path)
    return settings | {"outcomes": path, "resume": True}


@pytest.mark.parametrize("name", DIFFERENT)
def test_other_settings_are_refused(model, images, labels, half, name):
    before = half["outcomes"].read_bytes()
    with pytest.raises(OutcomesError, match=rf"cannot resume with other settings: .*\b{name} was .* and is "):
        evaluate(model, images, labels, **half | {name: DIFFERENT[name]})
    assert half["outcomes"].read_bytes() == before
    assert os.listdir(half["outcomes"].parent) == [half["outcomes"].name]


def test_other_images_weights_networks_and_threads_are_refused(model, images, labels, half):
    other = network()
    with torch.no_grad():
        other[3].bias[0] += 1e-7
    shifted = images.clone()
    shifted[-1, 0, 0, 0] += 1e-6
    for arguments, options, name in [
        ((other, images, labels), {}, "model"),
        ((network(nn.ELU), images, labels), {}, "model"),  # the very weights
        ((model, shifted, labels), {}, "data"),
        ((model, images, (labels + 1) % CLASSES), {}, "data"),
        ((model, images, labels), {"indices": torch.arange(1, IMAGES + 1)}, "data"),
        ((model, images[:-1], labels[:-1]), {}, "images"),
    ]:
        with pytest.raises(OutcomesError, match=rf"\b{name} was"):
            evaluate(*arguments, **half | options)
    torch.set_num_threads(2)
    with pytest.raises(OutcomesError, match=r"threads was 1 and is 2 \(rounding depends on it"):
        evaluate(model, images, labels, **half)
    torch.set_num_threads(1)
    evaluate(network(), images, labels, **half)


class Scaled(nn.Module):
    """A factor that no state dict holds, and one that it holds as it is."""

    def __init__(self, factor=2.0, extra=1):
        super().__init__()
        self.register_buffer("factor", torch.tensor(factor), persistent=False)
        self.extra = extra

    def get_extra_state(self):
        return {"extra": self.extra}

    def set_extra_state(self, state):
        self.extra = state["extra"]

    def forward(self, x):
        return self.extra * self.factor * x


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: nn.LeakyReLU(0.1), lambda: nn.LeakyReLU(0.9)),
        (lambda: nn.MaxPool2d(2, stride=1), lambda: nn.MaxPool2d(2, stride=2)),
        (Scaled, lambda: Scaled(3.0)),
        (Scaled, lambda: Scaled(extra=2)),
        (lambda: Sparta(4, share=1), lambda: Sparta(4, share=2)),
    ],
)
def test_networks_with_equal_weights_are_told_apart(one, other):
    found = []
    for make in (one, one, other):
        torch.manual_seed(0)
        found.append(model_digest(make()))
    assert found[0] == found[1] != found[2]


def test_an_engine_that_is_another_by_now(model, images, labels, half):
    """ "auto" may choose another one, after an update of torch, say."""
    stored = Outcomes.load(half["outcomes"])
    stored.settings["engine_used"] = "steam"
    stored.save(half["outcomes"])
    with pytest.raises(OutcomesError, match="engine_used was 'steam' and is '"):
        evaluate(model, images, labels, **half)


def _foreign(path):
    np.savez(path, x=np.zeros(3))


def _pickled(path):
    path.write_bytes(pickle.dumps({"done": True}))


def _pickled_within(path):
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {"label": np.array([print, 1], dtype=object)})


def _without(path):
    arrays = dict(np.load(path))
    del arrays["hit"]
    np.savez(path, **arrays)


def _more(path):
    np.savez(path, **dict(np.load(path)), more=np.zeros(1))


def _shorter(path):
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {"loss": arrays["loss"][:-1]})


def _dtype(path):
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {"clean": arrays["clean"].astype(np.float64)})


def _settings(path):
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {"settings": np.str_("[")})


def _list(path):
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {"settings": np.str_("[1]")})


def _lone_array(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def _flipped(path):
    content = bytearray(path.read_bytes())
    content[content.find(b"loss.npy") + 300] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 9),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "half": lambda path: path.write_bytes(path.read_bytes()[:2000]),
    "flipped": _flipped,
    "foreign": _foreign,
    "pickle": _pickled,
    "pickle-within": _pickled_within,
    "lone-array": _lone_array,
    "missing": _without,
    "unknown": _more,
    "shape": _shorter,
    "dtype": _dtype,
    "settings": _settings,
    "settings-list": _list,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused(model, images, labels, half, damage):
    path = half["outcomes"]
    DAMAGE[damage](path)
    before = path.read_bytes()
    with pytest.raises(OutcomesError, match=r"^outcomes .*found\.npz: .*(damaged|not written by)"):
        evaluate(model, images, labels, **half)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_places_where_nothing_can_be_written(model, images, labels, tmp_path):
    for where, error in [
        (tmp_path, IsADirectoryError),
        (tmp_path / "none" / "x.npz", FileNotFoundError),
        ("/proc/x.npz", OSError),
    ]:
        with pytest.raises(error, match="cannot write"):
            evaluate(model, images, labels, **SETTINGS, outcomes=where, progress=stop_after(0))
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="limits a file's size")
def test_a_full_disk(images, labels, path, tmp_path):
    """Files may not become larger than they are after the first batch: the next save fails, and leaves the last."""
    model, before = network(), resource.getrlimit(resource.RLIMIT_FSIZE)
    evaluate(model, images, labels, **SETTINGS, outcomes=tmp_path / "whole.npz")

    def fill(progress):
        if progress.images == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size - 1, before[1]))

    try:
        with pytest.raises(OSError, match=r"cannot write .*found\.npz: File too large"):
            evaluate(model, images, labels, **SETTINGS, outcomes=path, progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(os.listdir(tmp_path)) == ["found.npz", "whole.npz"]
    assert Outcomes.load(path).arrays["done"].tolist() == [True] * 4 + [False] * 6
    evaluate(model, images, labels, **SETTINGS, outcomes=path, resume=True)
    assert path.read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_that_nothing_can_be_written_is_said_once(model, images, labels, path, monkeypatch):
    """In mid-run, when the folder cannot even take a new file."""

    def lock(progress):
        if progress.images == 4:
            monkeypatch.setattr(files, "_create", refuse)

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"^cannot write [^ ]*found\.npz: No space left on device$"):
        evaluate(model, images, labels, **SETTINGS, outcomes=path, progress=lock)


def test_what_killed_processes_were_writing_is_removed(model, images, labels, half):
    folder = half["outcomes"].parent
    stale = [".found.npz.0a1b2c3d.tmp", ".found.npz.part12.0a1b2c3d.tmp"]
    others = [".other.npz.0a1b2c3d.tmp", ".found.npz.tmp", ".found.npz.mine.tmp"]
    for name in (*stale, *others):
        (folder / name).write_bytes(b"x")
    evaluate(model, images, labels, **half)
    assert sorted(os.listdir(folder)) == sorted([*others, half["outcomes"].name])


# ---- several processes (test_sharded_evaluation.py has real ones) ----


class Played(Processes):
    """One of several processes, whose others never come."""

    def __init__(self, rank, count):
        self.rank, self.count = rank, count

    def wait(self):
        pass

    def combine(self, array):
        raise Stop


def played(monkeypatch, rank, count, *arguments, **options):
    """A process's share of a run that is then stopped."""
    monkeypatch.setattr(sys.modules[evaluate.__wrapped__.__module__], "Processes", lambda device: Played(rank, count))
    with pytest.raises(Stop):
        evaluate(*arguments, **options)
    monkeypatch.undo()


def test_what_is_summed_up_is_the_same_bit_for_bit(monkeypatch):
    """Zeros, such as other processes have there, are added."""
    process = Played(0, 2)
    process._device = torch.device("cpu")
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, _: tensor.add_(torch.zeros_like(tensor)))
    for array in (
        np.array([-0.0, 0.0, np.nan, -np.inf, 1.5], np.float32),
        np.array([[True, False]]),
        np.array([-1, 2**62]),
    ):
        combined = Processes.combine(process, array)
        assert (combined.dtype, combined.shape, combined.tobytes()) == (array.dtype, array.shape, array.tobytes())


@pytest.mark.parametrize("count", [2, 3])
def test_what_several_processes_left_behind_is_taken_up(model, images, labels, path, tmp_path, monkeypatch, count):
    settings = SETTINGS | {"batch_size": 2, "precision": "bf16", "parity_images": 4}
    evaluate(model, images, labels, **settings, outcomes=tmp_path / "whole.npz")
    parts = []
    for rank in range(1, count):  # 0 was not even begun
        played(monkeypatch, rank, count, model, images, labels, **settings, outcomes=path)
        (part,) = set(os.listdir(tmp_path)) - {"whole.npz"}
        assert part == f"found.npz.part{rank}"
        assert Outcomes.load(tmp_path / part).arrays["done"].tolist() == [i // 2 % count == rank for i in range(IMAGES)]
        parts.append((tmp_path / part).rename(tmp_path.parent / part))  # the next one would not begin beside it
    for part in parts:
        part.rename(tmp_path / part.name)
    with pytest.raises(FileExistsError):
        evaluate(model, images, labels, **settings, outcomes=path)
    seen = []
    found = evaluate(model, images, labels, **settings, outcomes=path, resume=True, progress=seen.append)
    assert found.attacked == IMAGES - seen[0].images < IMAGES
    assert path.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["found.npz", "whole.npz"]


def test_part_of_another_run(model, images, labels, half, monkeypatch):
    path = half["outcomes"]
    stored = Outcomes.load(path)
    part = path.with_name(path.name + ".part1")
    stored.settings["seed"] = 77
    stored.save(part)
    with pytest.raises(OutcomesError, match=r"found\.npz\.part1: cannot resume with other settings: seed was 77"):
        evaluate(model, images, labels, **half)
    stored.settings["seed"] = 5
    stored.arrays["label"] = stored.arrays["label"][::-1].copy()
    stored.save(part)
    with pytest.raises(OutcomesError, match=r"found\.npz\.part1: its content is damaged"):
        evaluate(model, images, labels, **half)
    path.with_name("other.npz.part1").write_bytes(b"")  # another run's
    part.unlink()
    evaluate(model, images, labels, **half)
    assert path.with_name("other.npz.part1").exists()
