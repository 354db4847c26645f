"""The data sets, and files that are written whole or not at all."""

from __future__ import annotations

import os
import re
import sys

import pytest
import torch

from sparta_kernels import data
from sparta_kernels.data import digits, files

FIRST_TEST_ROWS = [4, 5, 6, 9, 14, 17, 18, 19]


@pytest.fixture(scope="module")
def splits():
    return data.load("digits"), data.load("digits", split="test")


def test_shapes_and_dtypes(splits):
    (train, train_labels), (test, test_labels) = splits
    assert train.shape == (1437, 1, 8, 8)
    assert test.shape == (360, 1, 8, 8)
    assert train.dtype == test.dtype == torch.uint8
    assert train_labels.dtype == test_labels.dtype == torch.int64
    assert train_labels.shape == (1437,)
    assert test_labels.shape == (360,)
    assert train.min() == 0
    assert train.max() == 255


def test_splits_share_nothing_and_miss_nothing(splits):
    from sklearn.datasets import load_digits

    source = load_digits()
    rows = {split: set(digits._rows(source.target, split).tolist()) for split in data.SPLITS}
    assert not rows["train"] & rows["test"]
    assert rows["train"] | rows["test"] == set(range(1797))
    (_, _), (test, labels) = splits
    first = min(rows["test"])
    assert torch.equal(test[0, 0].double(), torch.tensor(source.images[first] * 255 / 16).round())
    assert labels[0] == source.target[first]


def test_split_is_stratified_and_fixed(splits):
    (_, train), (_, test) = splits
    share = test.bincount() / (train.bincount() + test.bincount())
    assert (share - 360 / 1797).abs().max() < 0.003
    # The split is part of every published number: it must never change.
    from sklearn.datasets import load_digits

    assert digits._rows(load_digits().target, "test")[:8].tolist() == FIRST_TEST_ROWS


def test_facts_are_true(splits):
    (images, labels), _ = splits
    facts = data.describe("digits")
    assert facts.shape == tuple(images.shape[1:])
    assert facts.classes == len(labels.unique())
    pixels = images.double() / 255
    assert facts.mean == (pytest.approx(pixels.mean().item(), abs=1e-3),)
    assert facts.std == (pytest.approx(pixels.std().item(), abs=1e-3),)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("imagenet",), ValueError, "name must be one of digits, cifar10, svhn, tiny-imagenet, got 'imagenet'"),
        ((None,), ValueError, "name must"),
        (("digits", None, "validation"), ValueError, "split must be one of train, test"),
        (("digits", 3), TypeError, "root must be a path"),
    ],
)
def test_wrong_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        data.load(*arguments)


def test_missing_scikit_learn(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        data.load("digits")


def test_write_replaces_the_whole_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"a longer file that was there before")
    files.write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path):
    path = tmp_path / "file"
    others = [".other.0a1b2c3d.tmp", ".file.tmp", ".file.mine.tmp", ".file.part1.0a1b2c3d.tmp"]
    for write in (lambda: files.check_writable(path), lambda: files.write_atomically(path, b"new")):
        for name in (".file.0a1b2c3d.tmp", *others):
            (tmp_path / name).touch()
        write()
        (tmp_path / "file").unlink(missing_ok=True)
        assert sorted(os.listdir(tmp_path)) == sorted(others)


def test_what_a_living_writer_writes_is_left_to_it(tmp_path):
    path = tmp_path / "file"
    with files.replacing(path) as temporary:
        temporary.write_bytes(b"first")
        files.write_atomically(path, b"second")
        assert temporary.read_bytes() == b"first"
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["file"]


def test_a_new_file_taken_for_an_abandoned_one(tmp_path, monkeypatch):
    """By another writer, between its making and its lock."""
    path, lock, removed = tmp_path / "file", files._lock, []

    def late(file, *, wait):
        if wait and not removed:
            removed.append(file.name)
            os.unlink(file.name)
        return lock(file, wait=wait)

    monkeypatch.setattr(files, "_lock", late)
    files.write_atomically(path, b"new")
    assert removed
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match=f"^cannot write {re.escape(str(path))}: No space left on device$"):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_check_writable_leaves_nothing(tmp_path):
    assert files.check_writable(tmp_path / "new") == tmp_path / "new"
    (tmp_path / "old").write_text("kept")
    files.check_writable(str(tmp_path / "old"))
    assert os.listdir(tmp_path) == ["old"]
    assert (tmp_path / "old").read_text() == "kept"


def test_check_writable_says_why_not(tmp_path):
    (tmp_path / "file").touch()
    for path, words in [
        (tmp_path, "is a folder"),
        (tmp_path / "none" / "file", "there is no folder"),
        (tmp_path / "file" / "file", "there is no folder"),
        ("/proc/sparta", "cannot write /proc/sparta"),
        ("/dev/null", "not a regular file"),
    ]:
        with pytest.raises(OSError, match=words):
            files.check_writable(path)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anything")
def test_check_writable_meets_permissions(tmp_path):
    (tmp_path / "file").touch(mode=0o400)
    with pytest.raises(PermissionError, match="read-only"):
        files.check_writable(tmp_path / "file")
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="cannot write"):
        files.check_writable(tmp_path / "new")
