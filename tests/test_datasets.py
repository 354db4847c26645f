"""CIFAR-10, SVHN and Tiny-ImageNet: small files in their formats, whole and damaged in every way thought of."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import shutil
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from sparta_kernels import data
from sparta_kernels.data import cifar10, svhn, tiny_imagenet

BATCH = 20
COUNTS = {"train": 12, "test": 6}  # of SVHN and Tiny-ImageNet
WNIDS = ("n03", "n01", "n02")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(cifar10, "BATCH_IMAGES", BATCH)
    monkeypatch.setattr(svhn, "COUNTS", COUNTS)
    monkeypatch.setattr(tiny_imagenet, "COUNTS", COUNTS)
    monkeypatch.setattr(tiny_imagenet, "CLASSES", len(WNIDS))


def test_facts():
    for name, classes, shape, counts, augmentation in (
        ("digits", 10, (1, 8, 8), (1437, 360), (0, False)),
        ("cifar10", 10, (3, 32, 32), (50_000, 10_000), (4, True)),
        ("svhn", 10, (3, 32, 32), (73_257, 26_032), (4, False)),
        ("tiny-imagenet", 200, (3, 64, 64), (100_000, 10_000), (8, True)),
    ):
        facts = data.describe(name)
        assert (facts.name, facts.classes, facts.shape) == (name, classes, shape)
        assert (facts.train_images, facts.test_images) == counts
        assert (facts.crop, facts.flip) == augmentation
        assert len(facts.mean) == len(facts.std) == shape[0]
    assert tuple(data.DATASETS) == ("digits", "cifar10", "svhn", "tiny-imagenet")


def _refused(name, root, *words, split="train"):
    """The error of reading this split names each of these, and how to fetch the data set."""
    with pytest.raises(data.DataError) as caught:
        data.load(name, root, split)
    for word in (f"{name}: ", *words, f"sparta data fetch {name} --root "):
        assert word in str(caught.value), (word, str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cifar10", "svhn", "tiny-imagenet"])
def test_no_files(tmp_path, name):
    _refused(name, None, "pass it as root")
    _refused(name, tmp_path / "none", f"root {tmp_path / 'none'} is no folder")
    _refused(name, tmp_path, f"{tmp_path} must hold")


# ---- CIFAR-10 ----------------------------------------------------------------------------------------------


def _batches(seed=0):
    """What each file holds: name -> (pixels (BATCH, 3072), labels (BATCH,))."""
    random = np.random.RandomState(seed)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    return {
        name: (random.randint(0, 256, (BATCH, 3072)).astype(np.uint8), random.randint(0, 10, BATCH)) for name in names
    }


def _pickled(pixels, labels, python=2):
    content = {"data": pixels, "labels": labels, "batch_label": b"batch"}
    if isinstance(labels, np.ndarray):
        content["labels"] = labels.tolist()
    if python == 2:  # bytes as keys, and the name by which old numpy called the function
        content = {key.encode(): value for key, value in content.items()}
        return pickle.dumps(content, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    return pickle.dumps(content, protocol=4)


def _row_bytes(pixels, labels):
    return np.concatenate([labels.astype(np.uint8)[:, None], pixels], axis=1).tobytes()


FORMS = {
    "python": ("cifar-10-batches-py", "cifar-10-python.tar.gz", "", _pickled),
    "binary": ("cifar-10-batches-bin", "cifar-10-binary.tar.gz", ".bin", _row_bytes),
}


def _write_cifar10(root, form="python", archived=True, batches=None, change=lambda name, content: content):
    """Write the data set; `change` makes another content, or None, of a file's own."""
    folder, archive, ending, write = FORMS[form]
    contents = {name + ending: write(*parts) for name, parts in (batches or _batches()).items()}
    contents = {name: change(name, content) for name, content in {"readme.html": b"<html>", **contents}.items()}
    contents = {name: content for name, content in contents.items() if content is not None}
    if not archived:
        (root / folder).mkdir(parents=True)
        for name, content in contents.items():
            (root / folder / name).write_bytes(content)
        return root / folder
    with tarfile.open(root / archive, "w:gz") as file:
        for name, content in reversed(contents.items()):
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return root / archive


def _expected(batches, split):
    names = sorted(name for name in batches if name.startswith("test" if split == "test" else "data"))
    images = np.concatenate([batches[name][0] for name in names]).reshape(-1, 3, 32, 32)
    return torch.from_numpy(images), torch.from_numpy(np.concatenate([batches[name][1] for name in names]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("archived", [True, False])
def test_cifar10(tmp_path, form, archived):
    root = tmp_path / "root"
    root.mkdir()
    where = _write_cifar10(root, form, archived)
    before = sorted(root.rglob("*"))
    for place in [root] if archived else [root, where]:
        for split in data.SPLITS:
            images, labels = data.load("cifar10", str(place), split)
            assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
            wanted = _expected(_batches(), split)
            assert torch.equal(images, wanted[0])
            assert torch.equal(labels, wanted[1])
    assert sorted(root.rglob("*")) == before  # nothing is extracted
    root.rename(tmp_path / "cifar10")  # a folder of the data set's name
    assert torch.equal(data.load("cifar10", tmp_path, "train")[0], _expected(_batches(), "train")[0])


def test_cifar10_pickled_otherwise(tmp_path):
    """By Python 3, and with the pixels stored column by column."""
    batches = _batches()

    def change(name, content):
        if name not in batches:
            return content
        pixels, labels = batches[name]
        return _pickled(np.asfortranarray(pixels), labels, python=3 if name == "data_batch_3" else 2)

    _write_cifar10(tmp_path, change=change)
    assert torch.equal(data.load("cifar10", tmp_path)[0], _expected(batches, "train")[0])


class _Evil:
    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("archived", [True, False])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_cifar10_runs_no_code(tmp_path, archived, protocol):
    evil = _Evil()
    evil.path = str(tmp_path / "run")
    pixels, labels = _batches()["data_batch_2"]
    bad = pickle.dumps({b"data": pixels, b"labels": labels.tolist(), b"more": evil}, protocol=protocol)
    _write_cifar10(tmp_path, archived=archived, change=lambda name, c: bad if name == "data_batch_2" else c)
    pickle.loads(bad)  # it would
    os.rmdir(tmp_path / "run")
    _refused("cifar10", tmp_path, "data_batch_2", ".mkdir", "do not trust it")
    assert not (tmp_path / "run").exists()
    assert data.load("cifar10", tmp_path, "test")[0].shape == (BATCH, 3, 32, 32)


@pytest.mark.parametrize(
    "function", ["builtins eval", "os system", "numpy load", "_codecs decode", "numpy.core.multiarray x"]
)
def test_cifar10_pickles_name_nothing_else(function):
    content = b"c" + function.replace(" ", "\n").encode() + b"\n(tR."
    with pytest.raises(ValueError, match="do not trust it"):
        cifar10._parse_python(content)


PIXELS, LABELS = np.zeros((BATCH, 3072), np.uint8), np.zeros(BATCH, int)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "truncated or damaged"),
        (b"not a pickle", "truncated or damaged"),
        (_pickled(PIXELS, LABELS)[:-500], "truncated or damaged"),
        (pickle.dumps([1]), "must hold a dictionary, got list"),
        (pickle.dumps({}), "data must be an array, got NoneType"),
        (_pickled([1], LABELS), "data must be an array, got list"),
        (_pickled(PIXELS[:, :-1], LABELS), "data must have shape (20, 3072), got (20, 3071)"),
        (_pickled(PIXELS[:-1], LABELS), "data must have shape (20, 3072), got (19, 3072)"),
        (_pickled(PIXELS.astype(np.int8), LABELS), "data must be bytes, got type"),
        (_pickled(PIXELS.astype(object), LABELS), "data must be bytes"),
        (_pickled(PIXELS, LABELS[1:]), "must have 20 labels, got 19"),
        (_pickled(PIXELS, LABELS + 10), "labels must be 0 to 9, got 10 to 10"),
        (_pickled(PIXELS, LABELS - 1), "labels must be 0 to 9, got -1 to -1"),
        (_pickled(PIXELS, "x"), "labels must be a list of integers"),
        (_pickled(PIXELS, [0.5] * BATCH), "labels must be a list of integers"),
        (b"cnumpy\nndarray\n(tR}b.", "must hold a dictionary"),
        (b"(dS'data'\ncnumpy\nndarray\n(tRsS'labels'\n(lI0\nas.", "must have 20 labels, got 1"),
        (
            b"(dS'data'\ncnumpy\nndarray\n(tRsS'labels'\n(l" + b"I0\na" * BATCH + b"s.",
            "data must be an array, got none",
        ),
    ],
)
def test_cifar10_damaged_batches(tmp_path, content, words):
    folder = _write_cifar10(tmp_path, archived=False, change=lambda n, c: content if n == "data_batch_4" else c)
    _refused("cifar10", tmp_path, str(folder / "data_batch_4"), words)


def test_cifar10_damaged_rows(tmp_path):
    pixels, labels = _batches()["data_batch_1"]
    rows = _row_bytes(pixels, labels)
    folder = _write_cifar10(tmp_path, "binary", archived=False)
    for content, words in (
        (rows[:-1], "must have 61460 bytes, got 61459"),
        (b"\x0a" + rows[1:], "labels must be 0 to"),
    ):
        (folder / "data_batch_1.bin").write_bytes(content)
        _refused("cifar10", tmp_path, str(folder / "data_batch_1.bin"), words)


def test_cifar10_damaged_archives(tmp_path):
    path = _write_cifar10(tmp_path)
    whole = path.read_bytes()
    tar = gzip.decompress(whole)
    padded = gzip.compress(tar + bytes(3 << 20))  # far more than is read to find the files
    for content, words in [
        (b"", "truncated or damaged"),
        (b"<html>", "truncated or damaged"),
        (whole[: len(whole) // 2], "truncated or damaged"),
        (whole[:-4], "truncated or damaged"),
        (whole[:-8] + b"\0\0\0\0" + whole[-4:], "truncated or damaged"),  # a wrong checksum at the very end
        (gzip.compress(tar[: len(tar) // 2]), "truncated or damaged"),
        (padded[:-8] + b"\0\0\0\0" + padded[-4:], "truncated or damaged"),
    ]:
        path.write_bytes(content)
        _refused("cifar10", tmp_path, str(path), words)
    _write_cifar10(tmp_path, change=lambda name, content: None if name == "data_batch_5" else content)
    _refused("cifar10", tmp_path, str(path), "has no cifar-10-batches-py/data_batch_5")
    _write_cifar10(tmp_path, change=lambda name, content: bytes(2**18) if name == "test_batch" else content)
    _refused("cifar10", tmp_path, str(path), "test_batch is said to have 262144 bytes", split="test")


def test_cifar10_half_extracted(tmp_path):
    folder = _write_cifar10(tmp_path, archived=False)
    (folder / "data_batch_5").unlink()
    _refused("cifar10", tmp_path, str(folder / "data_batch_5"), "is not there, though its folder is")
    _write_cifar10(tmp_path, "binary", batches=_batches(1))
    assert torch.equal(data.load("cifar10", tmp_path)[0], _expected(_batches(1), "train")[0])


# ---- SVHN --------------------------------------------------------------------------------------------------


def _write_svhn(root, change=lambda split, found: found):
    from scipy.io import savemat

    random, written = np.random.RandomState(0), {}
    for split, count in COUNTS.items():
        images = random.randint(0, 256, (count, 3, 32, 32)).astype(np.uint8)
        labels = np.arange(count) % 10
        y = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        found = change(split, {"X": np.asfortranarray(images.transpose(2, 3, 1, 0)), "y": y})
        savemat(root / f"{split}_32x32.mat", found, do_compression=True)
        written[split] = torch.from_numpy(images), torch.from_numpy(labels)
    return written


def test_svhn(tmp_path):
    (tmp_path / "svhn").mkdir()
    for folder in (tmp_path, tmp_path / "svhn"):
        for split, (images, labels) in _write_svhn(folder).items():
            found = data.load("svhn", tmp_path, split)
            assert (found[0].dtype, found[1].dtype) == (torch.uint8, torch.int64)
            assert found[0].is_contiguous()
            assert torch.equal(found[0], images)
            assert torch.equal(found[1], labels)  # 10 is the digit 0
            (folder / f"{split}_32x32.mat").unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: {"X": found["X"]}, "has no variable y"),
        (lambda found: {"y": found["y"]}, "has no variable X"),
        (lambda found: {**found, "X": found["X"][..., 1:]}, "X must be uint8 of shape (32, 32, 3, 12), got uint8"),
        (
            lambda found: {**found, "X": found["X"].astype(float)},
            "X must be uint8 of shape (32, 32, 3, 12), got float64",
        ),
        (lambda found: {**found, "y": found["y"][1:]}, "y must be uint8 of shape (12, 1), got"),
        (lambda found: {**found, "y": found["y"] - found["y"].min()}, "y must be 1 to 10, got 0 to 9"),
        (lambda found: {**found, "y": found["y"] + np.uint8(1)}, "y must be 1 to 10, got 2 to 11"),
    ],
)
def test_svhn_wrong_content(tmp_path, change, words):
    _write_svhn(tmp_path, lambda split, found: change(found) if split == "train" else found)
    _refused("svhn", tmp_path, str(tmp_path / "train_32x32.mat"), words)
    assert len(data.load("svhn", tmp_path, "test")[0]) == COUNTS["test"]


def test_svhn_damaged(tmp_path):
    _write_svhn(tmp_path)
    path = tmp_path / "train_32x32.mat"
    whole = path.read_bytes()
    for content in (b"", b"<html>404</html>" * 40, whole[: len(whole) // 2], whole[:200]):
        path.write_bytes(content)
        _refused("svhn", tmp_path, str(path), "truncated or damaged")
    path.unlink()
    _refused("svhn", tmp_path, "must hold train_32x32.mat")


# ---- Tiny-ImageNet -----------------------------------------------------------------------------------------


def _jpeg(value, mode="RGB", size=(64, 64), kind="JPEG"):
    from PIL import Image

    colour = value if mode == "L" else (value, 255 - value, 7)
    content = io.BytesIO()
    Image.new(mode, size, colour).save(content, kind, quality=95)
    return content.getvalue()


def _tiny_files():
    """name -> content: 4 training images a class, 6 others, the values of their pixels telling them apart."""
    files = {"wnids.txt": "\n".join(WNIDS).encode(), "words.txt": b"n01\tgoldfish", "test/images/test_0.JPEG": b"none"}
    for label, name in enumerate(sorted(WNIDS)):
        files[f"train/{name}/{name}_boxes.txt"] = b""
        for row in range(4):
            mode = "L" if (label, row) == (1, 2) else "RGB"
            files[f"train/{name}/images/{name}_{row}.JPEG"] = _jpeg(10 * (4 * label + row), mode)
    lines = []
    for row in range(COUNTS["test"]):
        files[f"val/images/val_{row}.JPEG"] = _jpeg(200 + row)
        lines.append(f"val_{row}.JPEG\t{WNIDS[row % 3]}\t0\t0\t62\t62\n")
    files["val/val_annotations.txt"] = "".join(lines).encode()
    return files


def _write_tiny(root, files=None, archived=True):
    files = files or _tiny_files()
    if archived:
        with zipfile.ZipFile(root / "tiny-imagenet-200.zip", "w") as archive:
            for name, content in files.items():
                archive.writestr(f"tiny-imagenet-200/{name}", content)
        return root / "tiny-imagenet-200.zip"
    for name, content in files.items():
        path = root / "tiny-imagenet-200" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root / "tiny-imagenet-200"


def _check_tiny(train, test):
    for images, labels in (train, test):
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert images.shape == (len(labels), 3, 64, 64)
        assert (images == images[:, :, :1, :1]).all()
    values = torch.arange(0, 120, 10)
    assert (train[0][:, 0, 0, 0].int() - values).abs().max() <= 2  # rounded by JPEG
    blue = train[0][:, 2, 0, 0].int()
    grey = torch.arange(12) == 6
    assert (blue - torch.where(grey, values, 7)).abs().max() <= 2
    assert train[1].tolist() == [label for label in range(3) for _ in range(4)]  # of the sorted names
    assert (test[0][:, 0, 0, 0].int() - torch.arange(200, 206)).abs().max() <= 2
    assert test[1].tolist() == [2, 0, 1, 2, 0, 1]


CACHES = ["tiny-imagenet-200.test.safetensors", "tiny-imagenet-200.train.safetensors"]


def _loads_anew(root, monkeypatch):
    """Whether the training images are decoded, and not taken from the cache."""
    decoded, decode = [], tiny_imagenet._decode
    with monkeypatch.context() as patch:
        patch.setattr(tiny_imagenet, "_decode", lambda *args: decoded.append(1) or decode(*args))
        _check_tiny(data.load("tiny-imagenet", root), data.load("tiny-imagenet", root, "test"))
    return bool(decoded)


@pytest.mark.parametrize("archived", [True, False])
def test_tiny_imagenet_and_its_cache(tmp_path, monkeypatch, archived):
    where = _write_tiny(tmp_path, archived=archived)
    assert _loads_anew(tmp_path, monkeypatch)
    assert not _loads_anew(tmp_path, monkeypatch)
    assert sorted(os.listdir(tmp_path)) == sorted([*CACHES, where.name])
    files = _tiny_files()
    other = {**files, "train/n01/images/n01_0.JPEG": _jpeg(99)}
    _write_tiny(tmp_path, other, archived)
    assert abs(int(data.load("tiny-imagenet", tmp_path)[0][0, 0, 0, 0]) - 99) <= 2
    _write_tiny(tmp_path, files, archived)
    assert _loads_anew(tmp_path, monkeypatch)
    if not archived:  # a file of the same size, written later
        os.utime(where / "train/n01/images/n01_0.JPEG", (1, 1))
        assert _loads_anew(tmp_path, monkeypatch)
    cache = tmp_path / CACHES[1]
    whole = cache.read_bytes()
    for content in (b"", whole[:-1], whole[:100], b"x" * 1000):
        cache.unlink()  # the tensors of the last one may still be mapped
        cache.write_bytes(content)
        assert _loads_anew(tmp_path, monkeypatch)
        assert cache.read_bytes() == whole
    with monkeypatch.context() as patch:  # whole, but of another number of images
        patch.setattr(tiny_imagenet, "COUNTS", {"train": 11, "test": 6})
        _refused("tiny-imagenet", tmp_path, str(where), "must have 11 images in train, got 12")
    if archived:
        where.unlink()
    else:
        shutil.rmtree(where)
    assert not _loads_anew(tmp_path, monkeypatch)  # the caches alone will do
    cache.unlink()
    _refused("tiny-imagenet", tmp_path, "must hold tiny-imagenet-200.zip")


def test_tiny_imagenet_without_room_for_a_cache(tmp_path, monkeypatch):
    _write_tiny(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for _ in range(2):
        with pytest.warns(UserWarning, match="not kept and will be decoded again next time .*No space left"):
            images, _ = data.load("tiny-imagenet", tmp_path)
        assert images.shape == (12, 3, 64, 64)
        assert os.listdir(tmp_path) == ["tiny-imagenet-200.zip"]


@pytest.mark.parametrize(
    ("change", "split", "words"),
    [
        ({"wnids.txt": None}, "train", "has no wnids.txt"),
        ({"wnids.txt": b"n01\nn02"}, "train", "wnids.txt must name 3 classes, got 2"),
        ({"wnids.txt": b"n01\nn02\nn02"}, "test", "wnids.txt must name 3 classes, got 2"),
        ({"train/n02/images/n02_1.JPEG": None}, "train", "must have 12 images in train, got 11"),
        ({"train/n02/images/n02_1.JPEG": b""}, "train", "train/n02/images/n02_1.JPEG is no JPEG"),
        ({"train/n02/images/n02_1.JPEG": _jpeg(9)[:-200]}, "train", "n02_1.JPEG is truncated or damaged"),
        ({"train/n02/images/n02_1.JPEG": _jpeg(9, size=(64, 63))}, "train", "must be 64x64 pixels, got 64x63"),
        ({"train/n02/images/n02_1.JPEG": _jpeg(9, kind="PNG")}, "train", "is no JPEG"),
        ({"val/val_annotations.txt": None}, "test", "has no val/val_annotations.txt"),
        ({"val/val_annotations.txt": b"val_0.JPEG\tn01\n"}, "test", "must have 6 images in val, got 1"),
        ({"val/val_annotations.txt": b"val_0.JPEG\tn09\n"}, "test", "must name an image and its class"),
        ({"val/val_annotations.txt": b"../../x\tn01\n" * 6}, "test", "must name an image and its class"),
        ({"val/val_annotations.txt": b"\xff\x00\n"}, "test", "must name an image and its class"),
        ({"val/images/val_3.JPEG": None}, "test", "has no val/images/val_3.JPEG"),
    ],
)
@pytest.mark.parametrize("archived", [True, False])
def test_tiny_imagenet_damaged(tmp_path, change, split, words, archived):
    files = {name: content for name, content in {**_tiny_files(), **change}.items() if content is not None}
    where = _write_tiny(tmp_path, files, archived)
    if not archived and "wnids.txt" not in files:
        words = "wnids.txt"
    _refused("tiny-imagenet", tmp_path, str(where), words, split=split)
    assert os.listdir(tmp_path) == [where.name]


def test_tiny_imagenet_damaged_zips(tmp_path, monkeypatch):
    path = _write_tiny(tmp_path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(_jpeg(10)) + 300] ^= 1
    for content, words in (
        (b"", "not a zip"),
        (whole[: len(whole) // 2], "not a zip"),
        (b"<html>", "not a zip"),
        (bytes(flipped), "Bad CRC-32"),
    ):
        path.write_bytes(content)
        _refused("tiny-imagenet", tmp_path, str(path), words)
    path.write_bytes(whole)
    monkeypatch.setattr(tiny_imagenet, "_LARGEST", 500)
    _refused("tiny-imagenet", tmp_path, str(path), "is said to have")


@pytest.mark.parametrize(
    ("name", "package", "module"), [("svhn", "scipy", "scipy.io"), ("tiny-imagenet", "pillow", "PIL")]
)
def test_missing_packages(tmp_path, monkeypatch, name, package, module):
    _write_svhn(tmp_path)
    _write_tiny(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        data.load(name, tmp_path)
