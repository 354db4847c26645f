"""The batch size that memory holds: equal batches, what an image costs, what is free."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from sparta_kernels.evaluation import batch_size, evaluate, memory


def test_the_batch_size_is_found():
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).eval()
    images, labels = torch.rand(10, 1, 6, 6), torch.arange(10) % 4
    settings = {"eps": 0.2, "steps": 1}
    assert evaluate(model, images, labels, **settings).batch == (10, "at most 256 on a CPU")
    assert evaluate(model, images, labels, **settings, batch_size=3).batch == (3, "as asked for")


@pytest.mark.parametrize(
    ("count", "processes", "images"),
    [(1, 1, 1), (256, 1, 256), (257, 1, 129), (360, 1, 180), (10000, 1, 250), (100, 3, 34)],
)
def test_batches_are_equal_and_all_processes_have_as_many(count, processes, images):
    tried = []
    found = batch_size.find_batch_size(tried.append, count, torch.device("cpu"), processes)
    assert found.images == images
    assert -(-count // images) % processes == 0
    assert all(1 <= trial <= min(16, count) for trial in tried)


@pytest.mark.parametrize("sharers", [1, 2])
def test_as_many_as_memory_holds(monkeypatch, sharers):
    """3 MB an image beside 50 MB that any batch takes; half of 1.2 GB is to be used."""
    held = []

    class Fake:
        def __init__(self, device):
            held.clear()

        def bytes(self):
            return 50_000_000 + 3_000_000 * held[-1]

    monkeypatch.setattr(batch_size, "PeakMemory", Fake)
    monkeypatch.setattr(batch_size, "available", lambda device: 1_200_000_000)
    found = batch_size.find_batch_size(held.append, 1000, torch.device("cpu"), sharers=sharers)
    assert found.images * sharers <= 200
    assert found.images == {1: 200, 2: 100}[sharers]
    assert "3 MB an image" in found.reason
    monkeypatch.setattr(batch_size, "available", lambda device: 1000)
    assert batch_size.find_batch_size(held.append, 1000, torch.device("cpu")).images == 1
    for unknown in (lambda device: None, lambda device: 10**12):
        monkeypatch.setattr(batch_size, "available", unknown)
        assert batch_size.find_batch_size(held.append, 1000, torch.device("cpu")).images == 250
    monkeypatch.setattr(Fake, "bytes", lambda self: None)
    monkeypatch.setattr(batch_size, "available", lambda device: 1000)
    assert batch_size.find_batch_size(held.append, 1000, torch.device("cpu")).images == 250


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_an_image_costs_is_measured(monkeypatch):
    if memory.PeakMemory(torch.device("cpu")).bytes() is None:
        pytest.skip("/proc/self/clear_refs cannot be written here")
    monkeypatch.setattr(batch_size, "available", lambda device: 1_000_000_000)
    for cost in (5_000_000, 10_000_000):
        found = batch_size.find_batch_size(
            lambda images, cost=cost: torch.ones(images * cost // 4), 100_000, torch.device("cpu")
        )
        assert found.images == pytest.approx(500_000_000 / cost, rel=0.25)


@pytest.mark.parametrize("version", [1, 2])
def test_memory_that_a_control_group_leaves(tmp_path, monkeypatch, version):
    system, group = tmp_path / "meminfo", tmp_path / "cgroup"
    system.write_text("MemTotal: 9000 kB\nMemAvailable:  8000 kB\n")
    top = tmp_path / "groups" / ("memory" if version == 1 else "")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    cache = "total_inactive_file" if version == 1 else "inactive_file"

    def limit(folder, most, used):
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in zip(names, (most, used), strict=True):
            (folder / name).write_text(f"{value}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{cache} 1000\n")

    monkeypatch.setattr(memory, "_SYSTEM", system)
    monkeypatch.setattr(memory, "_GROUP", group)
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")
    cpu = torch.device("cpu")
    assert memory.available(cpu) == 8000 * 1024  # no groups
    group.write_text("4:cpu:/x\n9:memory:/a/b\n" if version == 1 else "0::/a/b\n")
    assert memory.available(cpu) == 8000 * 1024
    limit(top, 2_000_000, 500_000)  # in a container, whose path is the host's
    assert memory.available(cpu) == 1_501_000
    limit(top / "a", 1_000_000, 400_000)
    assert memory.available(cpu) == 601_000
    limit(top / "a" / "b", "max", 1)
    assert memory.available(cpu) == 601_000
    limit(top / "a" / "b", 1_000, 5_000)
    assert memory.available(cpu) == 0
    system.unlink()
    assert memory.available(cpu) is None
