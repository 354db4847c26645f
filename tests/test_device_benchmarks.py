"""benchmarks/ on a GPU, as far as a CPU shows it: the loop, the bars, the sanitized script."""

from __future__ import annotations

import json
import math
import os
import time
import weakref
from dataclasses import replace

import pytest
import torch

from sparta_kernels import backends

CEILINGS = {"copy_gb_per_s": 2000.0, "matmul_tflops": 600.0, "empty_launch_us": 1.5}


@pytest.fixture
def bars(modules):
    return modules["bars"]


@pytest.fixture
def device_timing(modules):
    return modules["device_timing"]


# ---- the loop ----------------------------------------------------------------------------------------------


class FakeDevice:
    """A queue whose time passes by what its work costs."""

    def __init__(self):
        self.now, self.recording = 0.0, None
        self.graphs, self.replayed = [], []

    def spend(self, name, cost, index):
        if self.recording is None:
            self.now += cost
        else:
            self.recording.append((name, cost, index))

    def capture(self, work):
        self.recording = []
        try:
            work()
            graph = list(self.recording)
        finally:
            self.recording = None
        self.graphs.append(graph)

        def replay():
            self.replayed.append(graph[0][0])
            self.now += sum(cost for _, cost, _ in graph)

        return replay

    def mark(self):
        return self.now

    def seconds(self, start, end):
        return end - start

    def synchronize(self):
        pass


def test_a_graph_goes_round_the_ring(device_timing):
    device = FakeDevice()
    calls = {name: lambda i, name=name, cost=cost: device.spend(name, cost, i) for name, cost in (("a", 3), ("b", 5))}
    times = device_timing.interleave(device, calls, inputs=5, seconds=1e-9, rounds=6)
    assert {name: (found.p20, found.median, found.p80) for name, found in times.items()} == {
        "a": (3, 3, 3),
        "b": (5, 5, 5),
    }
    for graph in device.graphs:
        assert [index for _, _, index in graph] == [i % 5 for i in range(len(graph))]
        assert len(graph) == 35  # whole rounds, 32 calls or more
    for found in times.values():
        assert found.samples == 6
        assert found.more["captured"] is True
        assert found.more["calls"] == 35
        assert 0 < found.more["host_us"] < 1e5
    # Every round, first of all, what comes first is run once more: nothing is timed on an idle device.
    rounds = [device.replayed[i : i + 3] for i in range(0, len(device.replayed), 3)]
    assert len(rounds) == 1 + 6
    assert all(first == second and {second, third} == {"a", "b"} for first, second, third in rounds)
    assert len({tuple(names) for names in rounds}) == 2


def test_outputs_of_a_round_of_the_ring_are_alive_together(device_timing):
    alive, most = weakref.WeakSet(), []

    class Output:
        def __init__(self):
            alive.add(self)
            most.append(len(alive))

    class Device(FakeDevice):
        def capture(self, work):
            most.clear()
            return super().capture(work)

    def call(index):
        device.spend("a", 1, index)
        return Output()

    device = Device()
    device_timing.interleave(device, {"a": call}, inputs=4, seconds=1e-9, rounds=1, calls=8)
    assert most[:8] == [1, 2, 3, 4, 5, 5, 5, 5]  # those of the last round, and the one that is being made


def test_slow_calls_make_small_graphs(device_timing):
    device = FakeDevice()

    def call(index):
        device.spend("slow", 1, index)
        time.sleep(0.004)

    times = device_timing.interleave(device, {"slow": call}, inputs=2, seconds=1e-9, rounds=1)
    assert times["slow"].more["calls"] in (2, 4, 6)
    assert times["slow"].more["host_us"] >= 4000


def test_what_cannot_be_captured_is_timed_all_the_same(device_timing):
    device = FakeDevice()

    def call(index):
        if device.recording is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        device.spend("loose", 7, index)

    calls = {"loose": call, "fine": lambda index: device.spend("fine", 2, index)}
    times = device_timing.interleave(device, calls, inputs=1, seconds=1e-9, rounds=3)
    assert (times["loose"].median, times["fine"].median) == (7, 2)
    assert times["loose"].more["captured"] is False
    assert "RuntimeError" in times["loose"].more["reason"]
    assert "operation not permitted" in times["loose"].more["reason"]
    assert times["fine"].more["captured"] is True


def test_the_loop_goes_on_until_its_time_is_up(device_timing):
    device, now = FakeDevice(), iter(range(1000))
    calls = {"a": lambda index: device.spend("a", 1, index)}
    times = device_timing.interleave(device, calls, inputs=1, seconds=20, rounds=3, clock=lambda: next(now))
    assert 15 <= times["a"].samples <= 25


def test_ceilings(device_timing, monkeypatch):
    """On the CPU's tensors, with a device whose copies, additions and products take a known time."""
    device = FakeDevice()
    costs = {torch.Tensor.copy_: 1e-3, torch.Tensor.add_: 2e-6}
    for function, cost in costs.items():
        name = function.__name__
        monkeypatch.setattr(torch.Tensor, name, lambda self, *_, name=name, cost=cost: device.spend(name, cost, 0))
    monkeypatch.setattr(torch, "mm", lambda *_, out: device.spend("mm", 1e-4, 0))
    found = device_timing.ceilings(device, place="cpu", size=2**20, side=64, seconds=1e-9)
    assert found["copy_gb_per_s"] == pytest.approx(2 * 2**20 / 1e-3 / 1e9)
    assert found["matmul_tflops"] == pytest.approx(2 * 64**3 / 1e-4 / 1e12)
    assert found["empty_launch_us"] == pytest.approx(2)
    assert max(len(graph) for graph in device.graphs) == 500


@pytest.mark.gpu
def test_the_loop_on_a_gpu(device_timing):
    with device_timing.Cuda() as device:
        leaves = [torch.randn(2**22, device="cuda", requires_grad=True) for _ in range(4)]
        images, copies = [leaf.detach() for leaf in leaves], [torch.empty_like(leaf) for leaf in leaves]
        outputs, gy = [leaf.relu() for leaf in leaves], torch.ones(2**22, device="cuda")
        calls = {
            "copy": lambda index: copies[index].copy_(images[index]),
            "backward": lambda index: torch.autograd.grad(outputs[index], leaves[index], gy, retain_graph=True),
        }
        times = device_timing.interleave(device, calls, inputs=4, seconds=0.05)
        ceilings = device_timing.ceilings(device)
    assert all(found.more["captured"] for found in times.values()), times
    assert all(1e-6 < found.median < 0.01 for found in times.values())  # others may be using the GPU too
    assert 10 < ceilings["copy_gb_per_s"] < 50_000
    assert 1 < ceilings["matmul_tflops"] < 5_000
    assert 0.1 < ceilings["empty_launch_us"] < 500


# ---- the command on a GPU ----------------------------------------------------------------------------------


class Immediately:
    """A device without a queue: the CPU."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def capture(self, work):
        work()
        return work

    def mark(self):
        return time.perf_counter()

    def seconds(self, start, end):
        return end - start

    def synchronize(self):
        pass


@pytest.fixture
def seeming_gpu(modules, monkeypatch):
    """A CPU in the GPU's place: everything else is as `ops.py --device cuda` does it."""
    timing, small = modules["device_timing"], modules["small"]
    described = {"type": "cuda", "name": "Seeming", "capability": "9.0"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "DEVICES", {"native": ("cpu", "cuda")})
    monkeypatch.setattr(timing, "Cuda", Immediately)
    monkeypatch.setattr(timing, "describe", lambda: described)
    monkeypatch.setattr(timing, "ceilings", lambda device: CEILINGS)
    monkeypatch.setattr(timing, "ring_bytes", lambda: 2**14)
    for name, operation in small.OPERATIONS.items():
        on_cpu = lambda case, count, device, make=operation.make_inputs: make(case, count, "cpu")  # noqa: E731
        monkeypatch.setitem(small.OPERATIONS, name, replace(operation, make_inputs=on_cpu))
    make_gate = small.OPERATIONS["gate"].make_candidate
    plainly = lambda name: make_gate("eager" if name == "compile" else name)  # noqa: E731
    monkeypatch.setitem(small.OPERATIONS, "gate", replace(small.OPERATIONS["gate"], make_candidate=plainly))
    return modules["ops"]


SMALL = ("--shape", "2,8,4,4", "2,4,8,8", "--dtype", "fp32", "--seconds", "0.001", "--threads", "1")


def test_the_command_as_on_a_gpu(seeming_gpu, tmp_path, capsys):
    path = tmp_path / "ops.json"
    assert seeming_gpu.main(["--device", "cuda", *SMALL, "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["complete"] is True
    assert document["ceilings"] == CEILINGS
    assert document["device"]["capability"] == "9.0"
    assert document["device"]["host"]["type"] == "cpu"
    cells = {(c["operation"], *c["shape"], c["layout"], c["direction"]): c for c in document["results"]}
    activations = (2 + 2 + 2 * 2) * 2
    assert len(cells) == len(document["results"]) == 2 * 2 * 2 + 2 * 2 + 2 + 2 + 2 * 2 + activations
    found = cells["gate", 2, 8, 4, 4, "nchw", "backward"]
    assert found["inputs"] == 16  # of 1 kB, to fill the ring
    assert list(found["candidates"]) == ["copy", "native", "kernel", "eager", "compile"]
    for times in found["candidates"].values():
        assert times["captured"] is True
        assert times["calls"] in (16, 32)
        assert times["host_us"] > 0
    assert found["candidates"]["kernel"]["excess_us"] == pytest.approx(
        1e3 * (found["candidates"]["kernel"]["median_ms"] - found["floor_ms"]) - CEILINGS["empty_launch_us"]
    )
    printed = capsys.readouterr().out
    for text in ("Gate forward", "of copy", "A large copy: 2000 GB/s", "share of copy's bandwidth", "us over empty"):
        assert text in printed


def test_the_important_comes_first_and_compiling_last(seeming_gpu, modules):
    import ops_options

    options, cases = ops_options.read(["--device", "cuda", "--threads", "1"])
    plan = seeming_gpu.plan(options, cases, modules["small"].OPERATIONS, seeming_gpu._importance)
    phases = [phase for phase, _, _ in plan]
    assert phases == sorted(phases, reverse=True)  # "measure", then "compile"
    measured = [case for phase, case, _ in plan if phase == "measure"]
    activations = 2 * 2 + 2 * 2 + 2 * 2 * 2 * 2
    assert len(measured) == len(cases) == 4 * 4 * 2 * 2 + 2 * 2 + 2 + 2 + 2 * 2 + activations
    first = measured[:16]
    assert {case.shape[1:] for case in first} == {(64, 32, 32), (128, 16, 16)}
    assert [case.shape[0] for case in first] == [512] * 8 + [1024] * 8
    assert [case.shape[0] for case in measured[-32:]] == [128] * 16 + [4096] * 16
    assert all(case.operation == "gate" for case in measured[-32:])
    assert all("compile" not in names for phase, _, names in plan if phase == "measure")
    assert all(case.operation == "gate" and "copy" in names for phase, case, names in plan if phase == "compile")


def test_a_budget_that_ends_on_the_way(seeming_gpu, modules, tmp_path, monkeypatch, capsys):
    """Cells that were measured stay; the others, and the one pass with the compiler, are named."""
    path, clock = tmp_path / "ops.json", iter(range(0, 10**6, 10))
    monkeypatch.setattr(modules["ops"].time, "monotonic", lambda: next(clock))
    arguments = ["--device", "cuda", *SMALL, "--operation", "gate", "--json", str(path), "--budget", "55"]
    assert seeming_gpu.main(arguments) == 0
    document = json.loads(path.read_text())
    assert document["complete"] is False
    measured = {tuple(cell["shape"]) for cell in document["results"]}
    assert 0 < len(document["results"]) < 8
    assert measured
    assert "2x4x8x8 fp32 channels_last, compile: no time left" in document["not_measured"]
    assert len(document["not_measured"]) == 8 - len(document["results"]) // 2


def test_a_case_for_which_memory_is_short_is_left_out(seeming_gpu, modules, tmp_path, monkeypatch, capsys):
    def full(case, count, device):
        if case.shape == (2, 8, 4, 4):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore")
        return make(case, count, device)

    path, operation = tmp_path / "ops.json", modules["small"].OPERATIONS["gate"]
    make = operation.make_inputs
    monkeypatch.setitem(modules["small"].OPERATIONS, "gate", replace(operation, make_inputs=full))
    arguments = ["--device", "cuda", *SMALL, "--operation", "gate", "--candidates", "copy", "kernel"]
    assert seeming_gpu.main([*arguments, "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert {tuple(cell["shape"]) for cell in document["results"]} == {(2, 4, 8, 8)}
    short = "CUDA out of memory. Tried to allocate 1 GiB"
    layouts = ("nchw", "channels_last")
    assert document["not_measured"] == [f"2x8x4x4 fp32 {layout}, measure: {short}" for layout in layouts]


def test_a_gpu_that_breaks_down_ends_the_command(seeming_gpu, tmp_path, monkeypatch, capsys):
    """What was measured before stays, and where it happened is told."""
    path, native = tmp_path / "ops.json", backends.module("native")
    gate_forward = native.gate_forward

    def forward(x, *others):
        if x.shape == (2, 4, 8, 8):
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore")
        return gate_forward(x, *others)

    monkeypatch.setattr(native, "gate_forward", forward)
    arguments = ["--device", "cuda", *SMALL, "--operation", "gate", "--candidates", "copy", "kernel"]
    assert seeming_gpu.main([*arguments, "--json", str(path)]) == seeming_gpu.FAILED
    document = json.loads(path.read_text())
    assert {tuple(cell["shape"]) for cell in document["results"]} == {(2, 8, 4, 4)}
    assert document["failed"] == [
        "2x4x8x8 fp32 nchw: checking kernel: CUDA error: an illegal memory access was encountered; "
        "nothing on the GPU works any more"
    ]


@pytest.mark.gpu
def test_the_command_on_a_gpu(modules, tmp_path, capsys):
    path, tf32 = tmp_path / "ops.json", torch.backends.cudnn.allow_tf32
    names = ["copy", "native", "kernel", "triton", "triton_kernel", "eager"]
    try:
        arguments = ["--device", "cuda", *SMALL, "--inputs", "2", "--candidates", *names, "--json", str(path)]
        assert modules["ops"].main(arguments) == 0, capsys.readouterr().err
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    document = json.loads(path.read_text())
    assert document["complete"] is True
    assert all(times["captured"] for cell in document["results"] for times in cell["candidates"].values())
    assert set(document["results"][0]["candidates"]) == set(names)


# ---- the bars ----------------------------------------------------------------------------------------------


def cell(bars, direction, us, shape=(512, 64, 32, 32), dtype="bf16", layout="nchw", operation="gate"):
    found = bars.cell(shape, dtype, layout, 10_000_000, direction, operation)
    found["other_load"] = None
    found["candidates"] = {
        name: {"p20_ms": t / 1e3, "median_ms": t / 1e3, "p80_ms": t / 1e3, "host_us": 20.0, "captured": name != "eager"}
        for name, t in us.items()
    }
    return bars.finish(found, CEILINGS)


def test_shares_and_excess(bars):
    backward = cell(bars, "backward", {"copy": 12.0, "kernel": 20.0, "triton_kernel": 18.0})
    assert backward["floor_ms"] == pytest.approx(0.015)  # 30 MB at 2000 GB/s
    kernel = backward["candidates"]["kernel"]
    assert kernel["share_of_copy"] == pytest.approx(1.5 * 12 / 20)
    assert kernel["excess_us"] == pytest.approx(20 - 15 - 1.5)
    assert bars.fastest(backward) == "triton_kernel"
    assert backward["noisy"] is False


def test_gpu_bars(bars):
    results = [
        cell(bars, "forward", {"copy": 10.0, "kernel": 12.0, "triton_kernel": 10.5}),
        cell(bars, "forward", {"copy": 10.0, "kernel": 10.9, "triton_kernel": 13.0}, layout="channels_last"),
        cell(bars, "forward", {"copy": 10.0, "kernel": 50.0}, shape=(128, 64, 32, 32)),  # too small for the first bar
        cell(bars, "forward", {"copy": 10.0, "kernel": 13.4}, shape=(1024, 512, 4, 4)),
        cell(bars, "forward", {"copy": 10.0, "kernel": 13.6}, shape=(128, 256, 8, 8)),
        cell(bars, "forward", {"copy": 10.0, "kernel": 99.0}, dtype="fp16"),
        cell(bars, "call", {"copy": 10.0, "kernel": 99.0}, operation="pgd_step"),
        cell(bars, "backward", {"copy": 10.0, "kernel": 17.0}),
    ]
    verdicts = {bar["name"]: (bar["value"], bar["passed"], bar["cells"]) for bar in bars.judge(results, "cuda")}
    ratios = (1.05, 1.09, 5.0, 1.34, 1.36)
    assert verdicts == {
        "forward, share of copy's bandwidth, large sites, worst": (pytest.approx(1 / 1.09), False, 2),
        "forward, us over empty launch and floor, small sites, worst": (pytest.approx(2.1), False, 2),
        "forward, faster kernel / copy, geometric mean": (pytest.approx(math.prod(ratios) ** 0.2), False, 5),
        "forward, faster kernel / copy, worst": (pytest.approx(5), False, 5),
        "backward, share of copy's bandwidth, large sites, worst": (pytest.approx(1.5 / 1.7), True, 1),
        "backward, us over empty launch and floor, small sites, worst": (None, None, 0),
        "backward, faster kernel / copy, geometric mean": (pytest.approx(1.7), True, 1),
        "backward, faster kernel / copy, worst": (pytest.approx(1.7), True, 1),
    }
    assert all(bar["passed"] is None for bar in bars.judge([], "cuda"))


def test_gpu_table(bars, modules, capsys):
    from rich.console import Console

    results = [
        cell(bars, "forward", {"copy": 10.0, "native": 12.5, "kernel": 12.0, "triton_kernel": 10.5, "eager": 80.0}),
        cell(bars, "forward", {"copy": 10.0, "kernel": 10.9}, layout="channels_last"),
    ]
    Console(width=200).print(modules["tables"].device_table(results, "gate", "forward"))
    lines = capsys.readouterr().out.splitlines()
    (nchw,) = (line for line in lines if "nchw" in line)
    for text in ("512x64x32x32", "bf16", "12.5", "10.5", "83%", "95%", "no graph: eager"):
        assert text in nchw


# ---- what needs a GPU says so ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["attack", "ops", "sanitize_ops"])
def test_no_gpu(modules, monkeypatch, capsys, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        modules[name].main(["--device", "cuda"])
    assert stopped.value.code == 2
    assert "argument --device: there is no NVIDIA GPU here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("ops", ["--candidates", "triton"], "argument --candidates: triton has no kernels for cpu here"),
        ("ops", ["--candidates", "triton_kernel"], "argument --candidates: triton_kernel has no kernels for cpu here"),
        ("attack", ["--backends", "triton"], "argument --backends: triton has no kernels for cpu here"),
        ("attack", ["--steps", "2"], "argument --steps: must be at least 3, got 2"),
        ("sanitize_ops", ["--backend", "triton"], "argument --backend: triton has no kernels for cpu here"),
    ],
)
def test_what_is_not_here_is_refused(modules, monkeypatch, capsys, name, arguments, message):
    monkeypatch.setattr(backends, "DEVICES", {"native": ("cpu",)})
    with pytest.raises(SystemExit) as stopped:
        modules[name].main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_sanitized_script_checks_what_it_runs(modules, monkeypatch, capsys):
    script = modules["sanitize_ops"]
    assert script.main(["--quick"]) == 0
    assert "552 results of native on cpu checked, 0 wrong" in capsys.readouterr().out
    native = backends.module("native")
    backward = native.conv_backward
    monkeypatch.setattr(native, "conv_backward", lambda *args: tuple(g * 1.1 for g in backward(*args)))
    assert script.main(["--quick"]) == 1
    assert "sanitize_ops.py: wrong: conv (1, 1, 1, 1) gradient torch.float32" in capsys.readouterr().err
    assert script.main(["--quick", "--dtype", "float16"]) == 1
    assert "138 results of native on cpu checked, 4 wrong" in capsys.readouterr().out
    assert "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ  # for the script's own process alone
