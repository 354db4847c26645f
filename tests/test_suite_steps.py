"""The steps of benchmarks/device_suite.py, with other tools and tests in the place of the real ones."""

from __future__ import annotations

import json
import os
import stat
import sys
import time

import pytest
from time_limit_case import time_is_up_once


@pytest.fixture
def job(modules, tmp_path):
    for name in ("out", "scratch"):
        (tmp_path / name).mkdir()
    machine = {"capability": "9.0"}
    return modules["suite_runner"].Job(
        tmp_path / "out", tmp_path / "scratch", tmp_path / "log", time.monotonic() + 600, False, machine
    )


def test_failed_tests_are_named(modules, job, tmp_path):
    """Also where a file of tests cannot be imported."""
    (tmp_path / "test_a.py").write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2, 'one is not two'\n"
        "def test_not_here(): pytest.skip('no')\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('no fixture')\n"
        "def test_broken(broken): pass\n"
    )
    (tmp_path / "test_b.py").write_text("import no_such_module\n")
    modules["suite_checks"]._pytest(job, "some", str(tmp_path), "--rootdir", str(tmp_path))
    figures = job.figures
    assert {key: figures[key] for key in ("passed", "failed", "errors", "skipped")} == {
        "passed": 1,
        "failed": 1,
        "errors": 2,
        "skipped": 1,
    }
    failures = "\n".join(figures["failures"])
    for text in ("test_a.py::test_wrong: AssertionError: one is not two", "test_a.py::test_broken: ", "test_b"):
        assert text in failures


def fake_sanitizer(folder, monkeypatch, body):
    tool = folder / "compute-sanitizer"
    tool.write_text(f"#!{sys.executable}\nimport sys\ntool = sys.argv[sys.argv.index('--tool') + 1]\n{body}")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_faults_under_the_sanitizer(modules, job, tmp_path, monkeypatch):
    fake_sanitizer(
        tmp_path,
        monkeypatch,
        "assert sys.argv[sys.argv.index('--error-exitcode') + 1] == '99'\n"
        "assert sys.argv[-4:] == ['--device', 'cuda', '--backend', sys.argv[-1]]\n"
        "bad = tool == 'racecheck'\n"
        "print('========= RACECHECK SUMMARY: 3 hazards' if bad else '========= ERROR SUMMARY: 0 errors')\n"
        "sys.exit(99 if bad else 0)",
    )
    with pytest.raises(modules["suite_runner"].StepFailed, match="faults under racecheck native"):
        modules["suite_checks"].sanitize(job)
    assert job.figures == {
        "memcheck native": "clean",
        "racecheck native": "========= RACECHECK SUMMARY: 3 hazards",
        "synccheck native": "clean",
        "initcheck native": "clean",
        "memcheck triton": "clean",
    }
    assert job.commands[0].count("--report-api-errors no") == 1


def test_wrong_results_under_the_sanitizer(modules, job, tmp_path, monkeypatch):
    """What the script says of them, not that the tool found no errors of its own."""
    fake_sanitizer(
        tmp_path,
        monkeypatch,
        "print('5 results of native on cuda checked, 2 wrong\\n========= ERROR SUMMARY: 0 errors')\n"
        "sys.exit(tool == 'memcheck')",
    )
    with pytest.raises(modules["suite_runner"].StepFailed, match="faults under memcheck native, memcheck triton"):
        modules["suite_checks"].sanitize(job)
    assert job.figures["memcheck native"] == "5 results of native on cuda checked, 2 wrong"
    assert job.figures["racecheck native"] == "clean"


def test_no_sanitizer(modules, job, tmp_path, monkeypatch):
    checks, skipped = modules["suite_checks"], modules["suite_runner"].StepSkipped
    monkeypatch.setattr(checks, "_SANITIZER", tmp_path / "none")
    monkeypatch.setattr(checks.shutil, "which", lambda name: None)
    with pytest.raises(skipped, match="compute-sanitizer is not installed here"):
        checks.sanitize(job)
    monkeypatch.undo()
    fake_sanitizer(tmp_path, monkeypatch, "print('========= Error: Device not supported')\nsys.exit(1)")
    with pytest.raises(skipped, match="does not support this device"):
        checks.sanitize(job)


def test_tools_for_which_no_time_is_left_are_named(modules, job, tmp_path, monkeypatch):
    fake_sanitizer(tmp_path, monkeypatch, "")
    run = job.run

    def aged(command):
        done = run(command)
        if "racecheck" in command:  # as if it had taken so long
            job.deadline -= 0.7 * job.left()
        return done

    monkeypatch.setattr(job, "run", aged)
    modules["suite_checks"].sanitize(job)
    assert list(job.figures.values())[:2] == ["clean", "clean"]
    assert "no time left" in job.figures.values()


def test_a_tool_that_takes_too_long_costs_nothing_that_is_needed(modules, job, tmp_path, monkeypatch):
    begun = tmp_path / "begun"
    hangs = (
        f"if sys.argv[-1] == 'triton':\n import pathlib, time; pathlib.Path({str(begun)!r}).touch(); time.sleep(600)"
    )
    fake_sanitizer(tmp_path, monkeypatch, hangs)
    time_is_up_once(monkeypatch, begun.exists)
    modules["suite_checks"].sanitize(job)
    assert job.figures == {
        "memcheck native": "clean",
        "racecheck native": "clean",
        "memcheck triton": "stopped, no time left",
    }


SIDE_BY_SIDE = """
import os, pathlib, signal, time, pytest
@pytest.mark.parametrize("i", range(40))
def test_a(i):
    assert i != 3, "three"
    pathlib.Path(__file__).with_name(f"begun{{i}}").touch()
    if i == 7:
        {trouble}
"""
HANGS = "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]); [time.sleep(1) for _ in range(600)]"


@pytest.fixture
def side_by_side(modules, job, tmp_path, monkeypatch):
    pytest.importorskip("xdist")
    checks = modules["suite_checks"]
    monkeypatch.setattr(checks, "_WORKERS", 3)

    def run(trouble):
        (tmp_path / "test_a.py").write_text(SIDE_BY_SIDE.format(trouble=trouble))
        checks._pytest(job, "some", str(tmp_path), "--rootdir", str(tmp_path), *checks._side_by_side())

    return run


def test_a_process_that_dies_fails_its_test_and_is_replaced(side_by_side, job):
    side_by_side("os._exit(1)")
    assert [job.figures[key] for key in ("passed", "failed", "errors")] == [38, 1, 1]
    failures = "\n".join(job.figures["failures"])
    assert "test_a[3]: AssertionError: three" in failures
    assert "crashed while running" in failures


def test_a_process_that_hangs_does_not_cost_the_others_results(modules, side_by_side, job, tmp_path, monkeypatch):
    monkeypatch.setattr(modules["suite_checks"], "_GIVING_UP", 120.0)  # other tests may have the processors

    def only_one_hangs():
        """All have begun but those behind the one that hangs, and what they found had time to be told."""
        begun = [path.stat().st_mtime for path in tmp_path.glob("begun*")]
        return len(begun) >= 37 and time.time() - max(begun) > 3

    time_is_up_once(monkeypatch, only_one_hangs)
    with pytest.raises(modules["suite_runner"].StepTimedOut):
        side_by_side(HANGS)
    assert job.figures["passed"] >= 35  # some may have stood behind the one that hangs
    assert job.figures["errors"] == 0


def test_what_a_benchmark_measured_before_it_was_stopped_is_kept(modules, job, tmp_path, monkeypatch):
    steps = modules["suite_measurements"]
    times = {"median_ms": 1.0, "share_of_copy": 0.95}
    cell = {"operation": "gate", "shape": [512, 64, 32, 32], "dtype": "bf16", "layout": "nchw", "direction": "forward"}
    document = {
        "results": [{**cell, "candidates": {"kernel": times, "triton_kernel": {**times, "share_of_copy": 0.9}}}],
        "bars": [],
        "failed": [],
        "not_measured": [],
        "ceilings": {"copy_gb_per_s": 3000.0, "matmul_tflops": 600.0, "empty_launch_us": 1.0},
    }
    monkeypatch.setattr(steps, "BENCHMARKS", tmp_path)
    (tmp_path / "ops.py").write_text(
        "import pathlib, sys, time\n"
        "path = pathlib.Path(sys.argv[sys.argv.index('--json') + 1])\n"
        f"path.with_suffix('.part').write_text({json.dumps(document)!r})\n"
        "path.with_suffix('.part').replace(path)\n"
        "time.sleep(600)\n"
    )
    time_is_up_once(monkeypatch, (job.folder / "ops.json").exists)
    with pytest.raises(modules["suite_runner"].StepTimedOut, match="kept"):
        steps.ops(job)
    assert job.figures["shares"] == {"forward 512x64x32x32 bf16 nchw": {"native": 0.95, "triton": 0.9}}
    assert "--device cuda" in job.commands[0]
    assert "--budget" in job.commands[0]


def test_bars_say_how_many_cells_they_are_about(modules, job, tmp_path, monkeypatch):
    steps, report = modules["suite_measurements"], modules["suite_report"]
    bar = {"name": "compile / ours", "value": 2.5, "relation": ">=", "limit": 2.0, "cells": 4, "wanted": 4}
    times = {"ours": {"median_ms": 1.0}, "compile": {"median_ms": 2.5}}
    document = {
        "results": [{"shape": [512, 64, 32, 32], "dtype": "bf16", "layout": "nchw", "candidates": times}],
        "bars": [
            {**bar, "passed": True},
            {**bar, "passed": None, "cells": 1},
            {**bar, "passed": None, "cells": 0, "value": None},
        ],
        "failed": [],
        "not_measured": ["a", "b"],
    }
    monkeypatch.setattr(steps, "BENCHMARKS", tmp_path)
    (tmp_path / "activation.py").write_text(
        "import pathlib, sys\n"
        f"pathlib.Path(sys.argv[sys.argv.index('--json') + 1]).write_text({json.dumps(document)!r})\n"
    )
    steps.activation(job)
    lines = list(report._activation(job.figures))
    assert lines[1:] == [
        "pass compile / ours: 2.50 >= 2, 4 of 4 cells",
        "part compile / ours: 2.50 >= 2, 1 of 4 cells",
        "2 cases not measured",
    ]
    figures = {**job.figures, "cells": 3, "ceilings": None, "shares": {}, "bars": [{**bar, "passed": False}]}
    del figures["bars"][0]["wanted"]
    assert "FAIL compile / ours: 2.500 >= 2, 4 cells" in list(report._ops(figures))


def test_choices_need_measurements(modules, job):
    with pytest.raises(modules["suite_runner"].StepFailed, match=r"there is no ops\.json"):
        modules["suite_measurements"].choices(job)


def test_long_logs_lose_their_middle(modules, tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"first\n" + b"x" * 2**23 + b"\nlast")
    modules["suite_runner"].shorten(log)
    content = log.read_bytes()
    assert len(content) < 2**22 + 100
    assert content.startswith(b"first\n")
    assert content.endswith(b"\nlast")
    assert b" bytes left out " in content


def test_the_tree_is_its_sources(modules, tmp_path, monkeypatch):
    origin = modules["origin"]
    monkeypatch.setattr(origin, "ROOT", tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "setup.py").write_text("1")
    first = origin.tree()
    (tmp_path / "csrc" / "a.so").write_text("built")
    assert origin.tree() == first
    (tmp_path / "csrc" / "a.cu").write_text("code")
    assert origin.tree() != first
    monkeypatch.setenv("SPARTA_COMMIT", "abc")
    assert origin.commit() == {"hash": "abc", "changed": None}
