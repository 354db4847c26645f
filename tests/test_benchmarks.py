"""benchmarks/: the measuring loop, the bars, and the command, which refuses what it cannot do."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import BENCHMARKS

from sparta_kernels import report

TINY = ["--shape", "2,4,4,4", "3,2,5,1", "--inputs", "2", "--seconds", "0.001"]


@pytest.fixture
def bars(modules):
    return modules["bars"]


@pytest.fixture
def gates(modules):
    return modules["gates"]


@pytest.fixture
def ops(modules):
    return modules["ops"]


@pytest.fixture
def timing(modules):
    return modules["timing"]


def test_candidates_take_turns_and_outputs_stay_alive(timing):
    calls, alive = [], set()

    class Output:
        def __init__(self, number):
            self.number = number
            alive.add(number)

        def __del__(self):
            alive.discard(self.number)

    def candidate(name):
        def call(index):
            output = Output(len(calls))
            calls.append((name, index, len(alive)))
            return output

        return call

    names = ("a", "b", "c")
    times = timing.interleave({n: candidate(n) for n in names}, inputs=4, seconds=1e-9, rounds=10)
    assert list(times) == list(names)
    assert all(found.samples == 10 for found in times.values())
    assert len(calls) == 3 * (4 + 2 + 10)  # warm-up: every input once and two rounds
    assert all({name for name, _, _ in calls[i : i + 3]} == set(names) for i in range(0, len(calls), 3))
    assert [index for _, index, _ in calls] == [i % 4 for i in range(len(calls))]
    assert calls[-1][2] == 3 * 4 + 1
    assert len({tuple(name for name, _, _ in calls[i : i + 3]) for i in range(0, len(calls), 3)}) > 1


def test_times_are_those_of_the_calls(timing):
    waited = []
    times = timing.interleave(
        {"long": lambda index: time.sleep(0.003), "short": lambda index: None},
        inputs=1,
        seconds=0.05,
        rounds=3,
        synchronize=lambda: waited.append(1),
    )
    long, short = times["long"], times["short"]
    assert 0.003 <= long.p20 <= long.median <= long.p80 < 0.1
    assert short.median < 0.003
    assert long.samples == short.samples >= 3
    assert len(waited) == 2 * (long.samples + 3)
    assert long.as_dict()["median_ms"] == long.median * 1e3


def test_the_machine(timing):
    cache = timing.last_level_cache()
    assert 2**15 <= cache < 2**34
    assert timing.inputs_needed(cache) == 3
    assert timing.inputs_needed(100 * cache) == 2
    assert timing.inputs_needed(1) == 2048
    with timing.OtherLoad() as others:
        time.sleep(0.05)
    assert others.share is None or 0 <= others.share <= 1
    assert timing.geometric_mean([1.0, 4.0]) == pytest.approx(2)


def cell(bars, direction, times, shape=(128, 64, 32, 32), dtype="fp32", layout="nchw", other_load=0.0):
    found = bars.cell(shape, dtype, layout, 1_000_000, direction)
    found["other_load"] = other_load
    found["candidates"] = {
        name: {"p20_ms": ms, "median_ms": ms, "p80_ms": ms, "samples": 10, "page_faults": 0.0}
        for name, ms in times.items()
    }
    return bars.finish(found)


def test_ratios_and_rates(bars):
    forward = cell(bars, "forward", {"copy": 1.0, "native": 2.0})
    backward = cell(bars, "backward", {"copy": 1.0, "native": 2.0}, other_load=0.5)
    assert forward["candidates"]["native"]["ratio_to_copy"] == 2
    assert forward["candidates"]["native"]["gb_per_s"] == pytest.approx(1)  # 2 MB in 2 ms
    assert backward["candidates"]["native"]["gb_per_s"] == pytest.approx(1.5)  # 3 MB in 2 ms
    assert backward["candidates"]["copy"]["gb_per_s"] == pytest.approx(2)
    assert (forward["noisy"], backward["noisy"]) == (False, True)


def test_bars(bars):
    results = [
        cell(bars, "forward", {"copy": 1.0, "kernel": 1.0, "native": 1.1, "compile": 2.2}),
        cell(
            bars,
            "forward",
            {"copy": 1.0, "kernel": 1.21, "native": 1.3, "compile": 2.6},
            layout="channels_last",
        ),
        cell(bars, "backward", {"copy": 1.0, "kernel": 1.7, "native": 1.8, "compile": 3.0}),
        cell(bars, "backward", {"copy": 1.0, "kernel": 9.0, "native": 9.0, "compile": 9.0}, shape=(2, 64, 32, 32)),
        cell(bars, "backward", {"copy": 1.0, "kernel": 9.0, "native": 9.0, "compile": 9.0}, dtype="fp64"),
    ]
    verdicts = {bar["name"]: (bar["value"], bar["passed"], bar["cells"]) for bar in bars.judge(results)}
    assert verdicts == {
        "forward, kernel / copy, geometric mean": (pytest.approx(1.1), False, 2),
        "forward, kernel / copy, worst": (pytest.approx(1.21), False, 2),
        "forward, compile / native, nchw, geometric mean": (pytest.approx(2), True, 1),
        "forward, compile / native, channels_last, geometric mean": (pytest.approx(2), True, 1),
        "backward, kernel / copy, geometric mean": (pytest.approx(1.7), True, 1),
        "backward, kernel / copy, worst": (pytest.approx(1.7), True, 1),
        "backward, compile / native, nchw, geometric mean": (pytest.approx(3 / 1.8), False, 1),
    }
    summary = bars.summarise(results)
    assert summary["backward"]["native"]["worst"] == 9
    assert summary["forward"]["native"]["worst_cell"] == "128x64x32x32 fp32 channels_last forward"
    assert all(bar["passed"] is None for bar in bars.judge([]))


@pytest.mark.parametrize("wrong", range(5))
def test_a_wrong_candidate_is_found(gates, wrong):
    inputs = gates.make_inputs(gates.Case((2, 3, 4, 5), "fp32", "channels_last"), 2)
    kernel = gates.Kernel()
    gates.check("right", kernel, inputs)

    class Wrong:
        def forward(self, inputs):
            return lambda index: kernel.forward(inputs)(index) * (1.001 if wrong == 0 else 1)

        def backward(self, inputs):
            def call(index):
                grads = list(kernel.backward(inputs)(index))
                if wrong:
                    grads[wrong - 1] = grads[wrong - 1] * 1.001
                return grads

            return call

    with pytest.raises(gates.WrongResult, match=("y", "gx", "gspatial", "gchannel", "gkernel")[wrong]):
        gates.check("wrong", Wrong(), inputs)


def test_the_command(tmp_path):
    """In a process of its own, since it starts itself again with other allocator settings."""
    path = tmp_path / "out.json"
    candidates = ["copy", "native", "kernel", "eager"]
    if shutil.which(os.environ.get("CXX", "g++")) is not None:
        candidates.append("compile")
    arguments = [*TINY[:2], *TINY[3:], "--quick", "--threads", "1", "--json", str(path)]
    run = subprocess.run(
        [sys.executable, str(BENCHMARKS / "ops.py"), *arguments, "--candidates", *candidates],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    document = json.loads(path.read_text())
    assert document["complete"] is True
    assert document["command"].startswith("benchmarks/ops.py --shape 2,4,4,4 ")
    assert document["environment"]["MALLOC_MMAP_MAX_"] == "0"
    assert document["device"]["threads"] == 1
    assert document["device"]["name"] == report.cpu_name()
    assert document["device"]["system"] == f"{platform.system()} {platform.machine()}"  # and not whose kernel it is
    assert document["build"]["cpu"]["isa"]
    assert set(document["commit"] or {"hash", "changed"}) == {"hash", "changed"}
    assert set(document) >= {"date", "settings", "timed", "summary", "bars"}
    cells = {(c["shape"][0], c["dtype"], c["layout"], c["direction"]): c for c in document["results"]}
    assert len(cells) == len(document["results"]) == 2 * 2 * 2
    for found in cells.values():
        assert list(found["candidates"]) == candidates
        for times in found["candidates"].values():
            assert 0 < times["p20_ms"] <= times["median_ms"] <= times["p80_ms"]
            assert times["samples"] >= 5
            assert times["ratio_to_copy"] > 0
    assert set(document["summary"]["backward"]) == set(candidates[1:])
    assert all(bar["passed"] is None for bar in document["bars"])  # no such shape has bars
    for heading in ("Gate forward", "Gate backward", "The gate against its bars", "not measured"):
        assert heading in run.stdout
    assert "2x4x4x4 bf16 channels_last backward: copy " in run.stderr


def run(ops, path, *arguments):
    return ops.main([*TINY, "--quick", "--allocator", "default", "--json", str(path), *arguments])


def test_every_dtype_and_no_copy(ops, tmp_path, capsys):
    path = tmp_path / "out.json"
    dtypes = ["fp64", "fp32", "fp16", "bf16"]
    assert run(ops, path, "--dtype", *dtypes, "--candidates", "eager", "native") == 0
    document = json.loads(path.read_text())
    assert [found["dtype"] for found in document["results"][::4]] == 2 * dtypes
    assert list(document["results"][0]["candidates"]) == ["native", "eager"]
    assert document["summary"] == {}


def test_interrupted(ops, timing, tmp_path, monkeypatch, capsys):
    path = tmp_path / "out.json"
    interleave, calls = timing.interleave, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return interleave(*arguments, **options)

    monkeypatch.setattr(timing, "interleave", interrupted)
    assert run(ops, path) == ops.INTERRUPTED
    document = json.loads(path.read_text())
    assert document["complete"] is False
    assert len(document["results"]) == 2
    assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


def test_a_wrong_candidate_is_left_out(ops, gates, tmp_path, monkeypatch, capsys):
    path = tmp_path / "out.json"
    monkeypatch.setattr(
        gates,
        "naive",
        lambda x, spatial, channel, kernel: torch.relu(x) * channel.sum() * kernel.sum() * spatial.sum(),
    )
    assert run(ops, path) == ops.FAILED
    assert "2x4x4x4 fp32 nchw: eager computes a wrong y" in capsys.readouterr().err
    document = json.loads(path.read_text())
    assert document["complete"] is False
    assert len(document["failed"]) == 2 * 2 * 2
    assert all(list(found["candidates"]) == ["copy", "native", "kernel"] for found in document["results"])
    assert len(document["results"]) == 2 * 2 * 2 * 2


def test_a_broken_candidate_is_left_out(ops, gates, tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no kernel for you")

    path = tmp_path / "out.json"
    monkeypatch.setattr(gates, "naive", broken)
    assert run(ops, path) == ops.FAILED
    assert "2x4x4x4 fp32 nchw: eager: RuntimeError: no kernel for you" in capsys.readouterr().err
    assert len(json.loads(path.read_text())["results"]) == 2 * 2 * 2 * 2


def test_every_operation(ops, tmp_path, capsys):
    path = tmp_path / "out.json"
    operations = ["gate", "dynamic_conv", "pgd_step", "pgd_start", "add_relu", "swish_relu", "smooth_relu", "dyrelu"]
    assert run(ops, path, "--operation", *operations, "--layout", "nchw") == 0
    document = json.loads(path.read_text())
    cells = [(c["operation"], tuple(c["shape"]), c["dtype"], c["direction"]) for c in document["results"]]
    assert len(set(cells)) == len(cells) == (4 + 4) * 2 + 2 + 2 + 4 * 8
    assert ("dynamic_conv", (3, 1, 5, 1), "bf16", "backward") in cells
    found = {c["operation"]: c for c in document["results"] if c["shape"] == [2, 4, 4, 4]}
    assert list(found["pgd_step"]["candidates"]) == ["copy", "native", "kernel", "eager"]
    assert list(found["pgd_start"]["candidates"]) == ["copy", "native", "kernel"]
    size = 2 * 4 * 4 * 4 * 4
    assert found["pgd_step"]["floor_bytes"] == 4 * size  # adv, grad and clean read, adv written
    assert found["pgd_start"]["floor_bytes"] == 2 * size
    assert found["add_relu"]["floor_bytes"] == size  # the last: backward, gy read and gx written, in bf16
    assert list(found["add_relu"]["candidates"]) == ["copy", "native", "kernel", "eager"]
    printed = capsys.readouterr().out
    for heading in ("Gate forward", "Dynamic_conv backward", "Pgd_step call", "Pgd_start call", "Add_relu forward"):
        assert heading in printed


@pytest.mark.parametrize(
    "operation", ["dynamic_conv", "pgd_step", "pgd_start", "add_relu", "swish_relu", "smooth_relu", "dyrelu"]
)
def test_wrong_candidates_of_the_other_operations_are_found(modules, operation):
    small = modules["small"]
    parts = small.OPERATIONS[operation]
    case = small.cases(operation, [2], [(2, 3, 4, 5)], ["fp32"], None)[-1]
    inputs = parts.make_inputs(case, 1, "cpu")
    right = parts.make_candidate("kernel")
    parts.check("right", right, inputs)

    class Wrong:
        def forward(self, inputs):
            return lambda index: right.forward(inputs)(index) * 1.001

        def backward(self, inputs):
            return right.backward(inputs)

        def call(self, inputs):
            return lambda index: right.call(inputs)(index).mul_(1 - 1e-6)

    with pytest.raises(modules["gates"].WrongResult, match="wrong"):
        parts.check("wrong", Wrong(), inputs)


def test_no_time_left(ops, tmp_path, capsys):
    path = tmp_path / "out.json"
    assert run(ops, path, "--budget", "0.001") == 0
    document = json.loads(path.read_text())
    assert document["results"] == []
    assert document["complete"] is False
    assert len(document["not_measured"]) == 2 * 2 * 2
    assert "not measured: 2x4x4x4 fp32 nchw, measure: no time left" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "argument --batch: must be an integer of at least 1, got '0'"),
        (["--batch", "128", "many"], "argument --batch: must be an integer of at least 1, got 'many'"),
        (["--batch", "2", "--shape", "1,2,3,4"], "argument --shape: not allowed with argument --batch"),
        (["--batch", "100000000"], "GB of memory"),
        (["--shape", "1,2,3"], "argument --shape: must be four integers of at least 1"),
        (["--shape", "1,2,0,4"], "argument --shape: must be four integers of at least 1"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--layout", "nhwc"], "argument --layout: invalid choice: 'nhwc'"),
        (["--candidates", "copy", "magic"], "argument --candidates: invalid choice: 'magic'"),
        (["--allocator", "jemalloc"], "argument --allocator: invalid choice: 'jemalloc'"),
        (["--operation", "gates"], "argument --operation: invalid choice: 'gates'"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--budget", "0"], "argument --budget: must be a positive number, got '0'"),
        (["--threads", "0"], "argument --threads: must be an integer of at least 1, got '0'"),
        (["--threads", "1000000"], "argument --threads: must be at most "),
        (["--seconds", "nan"], "argument --seconds: must be a positive number, got 'nan'"),
        (["--seconds", "-1"], "argument --seconds: must be a positive number, got '-1'"),
        (["--inputs", "0"], "argument --inputs: must be an integer of at least 1, got '0'"),
        (
            ["--json", "no/such/folder.json"],
            "argument --json: cannot write no/such/folder.json: there is no folder",
        ),
        (["--json", "."], "argument --json: cannot write .: it is a folder"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_bad_arguments(ops, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        ops.main(["--json", "out.json", "--quick", *arguments])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_compile_without_a_compiler(ops, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit) as stopped:
        ops.main(["--json", str(tmp_path / "out.json")])
    assert stopped.value.code == 2
    assert "compile needs a C++ compiler, and no-such-compiler is not here" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
