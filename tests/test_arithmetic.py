"""The GPU's arithmetic during an attack: torch's settings by both of their names, which a CPU has too."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from sparta_kernels.attack import prepare
from sparta_kernels.attack.arithmetic import float32_products
from sparta_kernels.nn import resnet18

MATMUL, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn
NEWER = (torch.backends, CUDNN, MATMUL, CUDNN.conv, CUDNN.rnn, torch.backends.mkldnn.matmul)
READ = (torch.get_float32_matmul_precision, lambda: MATMUL.allow_tf32, lambda: CUDNN.allow_tf32)


@pytest.fixture(autouse=True)
def _as_torch_has_it() -> Iterator[None]:
    before = [place.fp32_precision for place in NEWER]
    yield
    for place in NEWER:
        place.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    MATMUL.allow_tf32, CUDNN.allow_tf32 = False, True
    for place, value in zip(NEWER, before, strict=True):
        place.fp32_precision = value


def settings() -> list[object]:
    """Everything that can be read, and what cannot."""

    def read(function: Callable[[], object]) -> object:
        try:
            return function()
        except RuntimeError:
            return "mixed"

    return [*map(read, READ), *(place.fp32_precision for place in NEWER)]


def kernels() -> set[bool]:
    """Whether products are in TF32, as the kernels see it."""
    return {place.fp32_precision == "tf32" for place in (MATMUL, CUDNN.conv, CUDNN.rnn)}


def newer(*places: object) -> Callable[[str], None]:
    def write(value: str) -> None:
        for place in places:
            place.fp32_precision = value  # type: ignore[attr-defined]

    return write


def older(value: bool) -> None:
    MATMUL.allow_tf32 = CUDNN.allow_tf32 = value


USERS = {
    "nobody": lambda: None,
    "older-on": lambda: older(True),
    "older-off": lambda: older(False),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "medium-then-on": lambda: (torch.set_float32_matmul_precision("medium"), older(True)),
    "matmul-tf32": lambda: newer(MATMUL)("tf32"),
    "matmul-ieee": lambda: newer(MATMUL)("ieee"),
    "conv-ieee": lambda: newer(CUDNN.conv)("ieee"),
    "rnn-ieee": lambda: newer(CUDNN.rnn)("ieee"),
    "cudnn-ieee": lambda: newer(CUDNN)("ieee"),
    "all-tf32": lambda: newer(torch.backends)("tf32"),
    "all-ieee": lambda: newer(torch.backends)("ieee"),
    "off-then-all-tf32": lambda: (older(False), newer(torch.backends)("tf32")),
    "bf16-on-a-cpu": lambda: newer(torch.backends.mkldnn.matmul)("bf16"),
    "both": lambda: (older(True), newer(MATMUL, CUDNN.conv)("ieee")),
}


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("user", USERS)
def test_by_whichever_name_they_were_set_they_come_back(user, precision):
    USERS[user]()
    before = settings()
    with float32_products(precision == "tf32"):
        assert kernels() == {precision == "tf32"}
    assert settings() == before


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("user", ["nobody", "older-on", "older-off", "high", "medium", "all-ieee"])
def test_the_older_names_say_the_same(user, tf32):
    """torch.compile reads them, and torch refuses where they differ from the newer ones."""
    USERS[user]()
    with float32_products(tf32):
        assert (MATMUL.allow_tf32, CUDNN.allow_tf32) == (tf32, tf32)
        assert (torch.get_float32_matmul_precision() != "highest") == tf32


def test_after_an_error():
    newer(MATMUL)("tf32")
    before = settings()
    with pytest.raises(KeyError), float32_products(False):
        raise KeyError
    assert settings() == before


def test_one_within_another():
    before = settings()
    with float32_products(True):
        with float32_products(False):
            assert kernels() == {False}
        assert kernels() == {True}
    assert settings() == before


@pytest.mark.parametrize("second", [False, True])
def test_two_threads_that_overlap(second):
    """The one that began first ends first: what the second one found then is not what the user had set."""
    before = settings()
    begun, ended = threading.Event(), threading.Event()

    def other() -> None:
        with float32_products(second):
            begun.set()
            assert ended.wait(300)

    thread = threading.Thread(target=other)
    with float32_products(True):
        thread.start()
        assert begun.wait(300)
    between = kernels()
    ended.set()
    thread.join()
    assert between == {second}
    assert settings() == before


def test_a_prepared_model_after_the_newer_names(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    newer(MATMUL)("tf32")
    before, seen = settings(), []
    model = resnet18(num_classes=3, width=2).eval()
    model.conv1.register_forward_hook(lambda *_: seen.append(kernels()))
    prepare(model)(torch.rand(1, 3, 8, 8))
    assert seen
    assert all(found == {False} for found in seen)
    assert settings() == before
