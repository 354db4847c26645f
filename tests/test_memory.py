"""keep_freed_memory: page faults of large buffers, and what may stand in its way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest

import sparta_kernels
from sparta_kernels import _native, keep_freed_memory, memory, training

SETTINGS = (*memory._VARIABLES, "GLIBC_TUNABLES", "LD_PRELOAD")
KEPT = 0.02  # of the faults that there are without

needs_glibc = pytest.mark.skipif(not _native.malloc_is_glibc(), reason="malloc is not glibc's")

# A process whose environment does not say anything about malloc; it prints what it found as JSON. Buffers of 64 MiB
# are beyond all thresholds of glibc. As bytes, since malloc alone is asked for those: what an aligned allocation cuts
# off lies between a freed buffer and the heap's end for a while, so that the next one may not fit.
PROGRAM = """
import ctypes, json, resource, threading, torch
from sparta_kernels import keep_freed_memory
torch.set_num_threads(1)

def buffer():
    return b"x" * 2**26

def faults(make=buffer, warm_up=1, repeats=3):
    for number in range(-warm_up, repeats):
        if number == 0:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        made = make()
        del made
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / repeats

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def active():
    with keep_freed_memory() as kept:
        return kept.active

found = {}
"""


def run(body, **environment):
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", f"{PROGRAM}{body}\nprint(json.dumps(found))"],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def calls(monkeypatch):
    """The native functions' names as they are called, in their place; and nothing stands in the way."""
    made = []
    monkeypatch.setattr(_native, "keep_freed_memory", lambda: made.append("keep") or True)
    monkeypatch.setattr(_native, "return_freed_memory", lambda: made.append("return"))
    monkeypatch.setattr(memory, "_obstacle", lambda: "")
    return made


@needs_glibc
def test_page_faults_stay_away_inside_and_come_back_outside():
    found = run("""
found["before"] = faults()
with keep_freed_memory() as kept:
    found["inside"] = faults()
    with keep_freed_memory() as nested:
        found["nested"] = faults()
    found["again"] = faults()
    found["active"] = kept.active, nested.active
    found["held"] = resident()
found["returned"] = found["held"] - resident()
end_of_heap = ctypes.CDLL(None).sbrk
end_of_heap.restype = ctypes.c_void_p
before = end_of_heap(0)
held = buffer()
found["heap_grew"] = end_of_heap(0) - before
del held
found["after"] = faults()
try:
    with keep_freed_memory():
        raise KeyboardInterrupt
except KeyboardInterrupt:
    found["interrupted"] = faults()
keep = keep_freed_memory()
found["decorated"] = keep(faults)()
found["idle"] = keep.active
""")
    outside = found["before"]
    assert outside > 10
    for stretch in ("inside", "nested", "again", "decorated"):
        assert found[stretch] <= KEPT * outside, found
    for stretch in ("after", "interrupted"):
        assert found[stretch] >= 0.9 * outside, found
    assert found["active"] == [True, False]
    assert not found["idle"]
    assert found["returned"] > 50 * 2**20
    assert found["heap_grew"] < 2**20  # a large buffer is mapped by itself again


@needs_glibc
def test_buffers_that_another_thread_frees_are_kept():
    found = run("""
def freed_elsewhere():
    box = [buffer()]
    thread = threading.Thread(target=box.clear)
    thread.start()
    thread.join()

found["before"] = faults(freed_elsewhere)
with keep_freed_memory():
    found["inside"] = faults(freed_elsewhere)
""")
    assert found["inside"] <= KEPT * found["before"], found


@needs_glibc
def test_tensors_of_an_iteration():
    """Aligned buffers of several sizes that live and die like those of a network's forward and backward pass."""
    found = run("""
def iteration():
    kept = [torch.empty(2**23 >> depth).fill_(1.) for depth in range(5)]
    gradient = kept[-1]
    while kept:
        gradient = torch.ones_like(kept.pop()) + gradient.mean()

found["before"] = faults(iteration, warm_up=5, repeats=5)
with keep_freed_memory():
    found["inside"] = faults(iteration, warm_up=30, repeats=5)
""")
    assert found["before"] > 1000
    assert found["inside"] <= KEPT * found["before"], found


@needs_glibc
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "100000000"),
        ("MALLOC_MMAP_MAX_", "0"),
        ("GLIBC_TUNABLES", "glibc.malloc.check=0:glibc.malloc.mmap_threshold=8388608"),
    ],
)
def test_the_environment_has_its_say(name, value):
    found = run(
        """
found["before"] = faults()
with keep_freed_memory() as kept:
    found["inside"] = faults()
    found["active"], found["reason"] = kept.active, kept.reason
found["after"] = faults()
""",
        **{name: value},
    )
    assert not found["active"]
    assert name in found["reason"]
    for stretch in ("inside", "after"):  # as the environment wants it, whatever that is
        assert found[stretch] == pytest.approx(found["before"], rel=0.05, abs=50), found


def test_what_the_program_writes_into_its_environment_comes_too_late(monkeypatch):
    """glibc has read it at the start; a variable that means something else is nobody's business."""
    monkeypatch.setattr(_native, "malloc_is_glibc", lambda: True)
    before = memory._obstacle()
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    assert memory._obstacle() == before


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        (b"", ""),
        (b"PATH=/bin\0MALLOC_ARENA_MAX=1\0GLIBC_TUNABLES=glibc.malloc.tcache_count=1\0", ""),
        (
            b"GLIBC_TUNABLES=glibc.malloc.check=0\0glibc.malloc.top_pad=1\0",
            "the environment sets GLIBC_TUNABLES (top_pad)",
        ),
        (b"MALLOC_TOP_PAD_=1\0", "the environment sets MALLOC_TOP_PAD_"),
        (
            b"A=1\0MALLOC_MMAP_MAX_=0\0GLIBC_TUNABLES=glibc.malloc.mmap_max=0\0",
            "the environment sets MALLOC_MMAP_MAX_, GLIBC_TUNABLES (mmap_max)",
        ),
    ],
)
def test_the_environment_at_the_start(monkeypatch, tmp_path, environment, reason):
    monkeypatch.setattr(_native, "malloc_is_glibc", lambda: True)
    monkeypatch.setattr(memory, "_ENVIRONMENT", tmp_path / "environ")
    (tmp_path / "environ").write_bytes(environment)
    assert memory._obstacle() == reason


def test_without_proc_the_environment_is_the_present_one(monkeypatch, tmp_path):
    monkeypatch.setattr(_native, "malloc_is_glibc", lambda: True)
    monkeypatch.setattr(memory, "_ENVIRONMENT", tmp_path / "none")
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    assert memory._obstacle() == "the environment sets MALLOC_MMAP_MAX_"


def test_another_allocator_is_left_alone(monkeypatch, calls):
    monkeypatch.undo()
    monkeypatch.setattr(_native, "malloc_is_glibc", lambda: False)
    monkeypatch.setattr(_native, "keep_freed_memory", lambda: pytest.fail("it is not glibc's"))
    with keep_freed_memory() as kept:
        assert not kept.active
        assert kept.reason == "malloc is not glibc's"


@needs_glibc
def test_a_malloc_that_was_preloaded_is_seen(tmp_path):
    """As jemalloc and tcmalloc are: a library with a malloc of its own, in front of glibc's."""
    source, library = tmp_path / "other.c", tmp_path / "libother.so"
    source.write_text(
        "#include <stddef.h>\n"
        "extern void *__libc_malloc(size_t);\n"
        "void *malloc(size_t size) { return __libc_malloc(size); }\n"
    )
    compiler = os.environ.get("CC", "cc")
    try:
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip(f"there is no C compiler called {compiler}")
    found = run(
        """
with keep_freed_memory() as kept:
    found["active"], found["reason"] = kept.active, kept.reason
""",
        LD_PRELOAD=str(library),
    )
    assert found == {"active": False, "reason": "malloc is not glibc's"}


def test_a_setting_that_is_refused(monkeypatch, calls):
    monkeypatch.setattr(_native, "keep_freed_memory", lambda: False)
    with keep_freed_memory() as kept:
        assert not kept.active
    assert kept.reason == "glibc refused the setting"
    assert calls == []


def test_the_last_of_nested_blocks_puts_it_back(calls):
    outer = keep_freed_memory()
    with outer:
        with keep_freed_memory() as inner, outer:
            assert inner.active
        assert not inner.active
        assert outer.active
        assert calls == ["keep"]
    assert not outer.active
    assert calls == ["keep", "return"]


def test_blocks_of_several_threads_overlap(calls):
    entered, leave = threading.Barrier(9), threading.Event()

    def work():
        with keep_freed_memory():
            entered.wait(60)
            leave.wait(60)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    entered.wait(60)
    assert calls == ["keep"]
    leave.set()
    for thread in threads:
        thread.join(60)
    assert calls == ["keep", "return"]


def test_an_error_passes_through(calls):
    with pytest.raises(ZeroDivisionError), keep_freed_memory():
        raise ZeroDivisionError
    assert calls == ["keep", "return"]


def test_training_runs_inside(calls, tmp_path):
    with pytest.raises(TypeError, match="settings"):
        training.train(None, tmp_path / "checkpoint")
    assert calls == ["keep", "return"]


def test_it_is_public():
    assert "keep_freed_memory" in sparta_kernels.__all__
