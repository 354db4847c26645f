"""benchmarks/device_suite.py: its rehearsal, and what it does when a step fails, hangs, or is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import BENCHMARKS
from time_limit_case import time_is_up_once, written

from sparta_kernels.backends import choices

STEPS = ["build", "test", "sanitize", "ops", "attack", "rivals", "batches", "training", "activation", "choices"]


# ---- the rehearsal -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """One `--dry-run`: the folder, the process, its suite.json."""
    folder = tmp_path_factory.mktemp("suite") / "out"
    compiler = folder.parent / "compiler"  # what it makes of the code is for other tests to see: a quarter of the time
    compiler.write_text('#!/bin/sh\nexec "$@" -O0\n')
    compiler.chmod(0o755)
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "device_suite.py", "--dry-run", "--out", folder],
        cwd=folder.parent,
        env=os.environ | {"CMAKE_CXX_COMPILER_LAUNCHER": str(compiler)},
        capture_output=True,
        text=True,
    )
    return folder, done, json.loads((folder / "suite.json").read_text())


def test_rehearsal_passes(rehearsal):
    folder, done, document = rehearsal
    logs = "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("*.log")))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    assert list(document["steps"]) == STEPS
    assert {name: step["status"] for name, step in document["steps"].items()} == dict.fromkeys(STEPS, "passed")
    assert document["complete"] is True
    assert document["dry_run"] is True
    assert document["machine"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert document["seconds"] >= sum(step["seconds"] for step in document["steps"].values()) > 0


def test_rehearsal_does_every_step(rehearsal):
    _, _, document = rehearsal
    figures = {name: step["figures"] for name, step in document["steps"].items()}
    assert figures["build"]["cuda"] == {"built": False}
    assert figures["test"]["gpu_tests"] > 100
    assert figures["test"]["passed"] >= 5
    assert figures["test"]["failed"] == figures["test"]["errors"] == 0
    assert "552 results of native on cpu checked, 0 wrong" in figures["sanitize"]["plain"]
    assert figures["ops"]["cells"] == 4 + 2 + 1 + 1 + 2 + (2 + 2 + 4)  # the last three: activations
    sparta = [f"sparta fp32 {name}" for name in ("loop", "ours-eager")]
    both = {*sparta, *(name.replace("sparta", "relu") for name in sparta)}
    found = {name: figures[name]["batches"] for name in ("attack", "rivals", "batches")}
    assert [(f["batch"], set(f["iterations"])) for f in found["attack"]] == [(2, both)]
    assert [(f["batch"], set(f["iterations"])) for f in found["batches"]] == [(2, both), (3, both)]
    (rivals,) = found["rivals"]
    assert set(rivals["iterations"]) == set(sparta)
    assert set(rivals["row_ms"]) == set(rivals["parts_ms"]) == {"sparta fp32 ours-eager"}
    assert set(figures["training"]["steps"]) == {f"sparta fp32 {name}" for name in ("ours", "eager")}
    (cell,) = figures["activation"]["cells"].values()
    assert list(cell) == ["copy", "relu", "products", "eager", "ours"]
    assert sum(figures["choices"]["rows"].values()) == 10 + 8  # the last: activations


def test_rehearsal_leaves_few_small_files(rehearsal):
    folder, _, document = rehearsal
    logs = {step["log"] for step in document["steps"].values()}
    assert {path.name for path in folder.rglob("*")} == {
        "suite.json",
        "test.log",
        "benchmarks.log",
        "ops.json",
        "attack.json",
        "rivals.json",
        "batches.json",
        "training.json",
        "activation.json",
        "choices.csv",
    }
    assert logs < {path.name for path in folder.iterdir()}
    for name, step in document["steps"].items():
        for command in step["commands"]:
            assert f"$ {command}\n" in (folder / step["log"]).read_text(), name


def test_rehearsal_ends_with_a_table(rehearsal):
    _, done, _ = rehearsal
    assert len(done.stdout) < 12_000
    table = done.stdout[done.stdout.index("Rehearsal without a GPU") :].splitlines()
    assert [line.split()[:2] for line in table if line.split()[0] in STEPS] == [[name, "passed"] for name in STEPS]


def test_rehearsal_covers_triton_where_it_is(rehearsal):
    folder, _, _ = rehearsal
    pytest.importorskip("triton")
    document = json.loads((folder / "ops.json").read_text())
    assert document["failed"] == []
    for cell in document["results"]:
        assert {"kernel", "triton_kernel"} <= set(cell["candidates"])
    rows = choices.read(folder / "choices.csv")
    assert {row.operation for row in rows if row.capability == "cpu"} == set(choices.OPERATIONS)


# ---- with other steps --------------------------------------------------------------------------------------


class Suite:
    """The suite with steps of our own."""

    def __init__(self, modules, monkeypatch, folder):
        self.module, self.folder, self.done = modules["device_suite"], folder, []
        self.Step, self.Failed = modules["suite_steps"].Step, modules["suite_runner"].StepFailed
        self.Skipped = modules["suite_runner"].StepSkipped
        self.steps, self.tree = {}, "1"
        self.machine = {"torch": "2", "python": "3", "device": "GPU"}
        monkeypatch.setattr(self.module, "STEPS", self.steps)
        monkeypatch.setattr(self.module, "probe", lambda job: self.machine)
        monkeypatch.setattr(modules["origin"], "tree", lambda: self.tree)

    def add(self, name, do=lambda job: None, limit=100.0, least=1.0, **options):
        def step(job):
            self.done.append(name)
            do(job)

        self.steps[name] = self.Step(step, limit, least, f"{name}.log", **options)

    def run(self, *arguments):
        self.done.clear()
        return self.module.main(["--out", str(self.folder), *arguments])

    @property
    def document(self):
        return json.loads((self.folder / "suite.json").read_text())

    def statuses(self):
        return {name: step["status"] for name, step in self.document["steps"].items()}


@pytest.fixture
def suite(modules, monkeypatch, tmp_path):
    return Suite(modules, monkeypatch, tmp_path / "out")


def command(code):
    return lambda job: job.python("-c", code)


def is_running(pid):
    """Whether there is such a process, other than as an entry that nobody has asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


SPAWN = """
import pathlib, signal, subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
process.stdout.readline()
pathlib.Path({path!r}).write_text(str(process.pid))
print("spawned", flush=True)
time.sleep({seconds})
"""


@pytest.mark.parametrize("seconds", [600, 0], ids=["hangs", "ends"])
def test_no_child_is_left(suite, tmp_path, monkeypatch, seconds):
    path = tmp_path / "pid"
    suite.add("spawn", command(SPAWN.format(path=str(path), seconds=seconds)))
    suite.add("after")
    if seconds:
        time_is_up_once(monkeypatch, lambda: b"\nspawned\n" in written(suite.folder / "spawn.log"))
    started = time.monotonic()
    assert suite.run() == (1 if seconds else 0)
    assert time.monotonic() - started < 300
    assert suite.statuses() == {"spawn": "timed out" if seconds else "passed", "after": "passed"}
    assert "spawned" in (suite.folder / "spawn.log").read_text()
    assert not is_running(int(path.read_text()))


def test_a_command_can_save_what_it_has(suite, monkeypatch):
    code = "import time\ntry:\n print('on', flush=True); time.sleep(600)\nexcept KeyboardInterrupt:\n print('saved')"
    suite.add("slow", command(code))
    time_is_up_once(monkeypatch, lambda: b"\non\n" in written(suite.folder / "slow.log"))
    assert suite.run() == 1
    assert "saved" in (suite.folder / "slow.log").read_text()


def test_a_failure_costs_only_what_needs_it(suite, capsys):
    def fail(job):
        job.figures["found"] = 3
        raise suite.Failed("3 things are wrong")

    def skip(job):
        raise suite.Skipped("no tool")

    def break_down(job):
        raise ZeroDivisionError("oh")

    suite.add("first", fail)
    suite.add("second", needs=("first",))
    suite.add("third", skip)
    suite.add("fourth", break_down)
    suite.add("fifth", after=("first",))
    assert suite.run() == 1
    assert suite.done == ["first", "third", "fourth", "fifth"]
    steps = suite.document["steps"]
    assert suite.statuses() == {
        "first": "failed",
        "second": "skipped",
        "third": "skipped",
        "fourth": "failed",
        "fifth": "passed",
    }
    assert steps["first"]["figures"] == {"found": 3}
    reasons = [steps[name]["reason"] for name in ("first", "second", "third", "fourth")]
    assert reasons == ["3 things are wrong", "first did not pass", "no tool", "ZeroDivisionError: oh"]
    printed = capsys.readouterr().out
    assert all(reason in printed for reason in reasons)


def test_skipped_for_a_reason_is_success(suite):
    def skip(job):
        raise suite.Skipped("no tool")

    suite.add("first", skip)
    assert suite.run() == 0


def test_a_second_call_does_what_is_left(suite):
    broken = [True]

    def fail(job):
        if broken:
            raise suite.Failed("not yet")

    suite.add("first")
    suite.add("second", fail)
    suite.add("third")
    suite.add("fourth", after=("second",))
    assert suite.run() == 1
    broken.clear()
    assert suite.run() == 0
    assert suite.done == ["second", "fourth"]  # the fourth uses what the second found
    assert suite.run() == 0
    assert suite.done == []
    assert suite.run("--only", "third,first") == 0
    assert suite.done == ["first", "third"]
    assert suite.run("--fresh") == 0
    assert suite.done == ["first", "second", "third", "fourth"]
    suite.tree = "2"
    assert suite.run() == 0
    assert suite.done == ["first", "second", "third", "fourth"]
    suite.machine = {**suite.machine, "device": "another"}
    assert suite.run("--dry-run") == 0
    assert suite.done == ["first", "second", "third", "fourth"]
    (suite.folder / "suite.json").write_text("{")
    assert suite.run() == 0
    assert suite.done == ["first", "second", "third", "fourth"]


def test_only(suite):
    def fail(job):
        raise suite.Failed("wrong")

    suite.add("first", fail)
    suite.add("second")
    suite.add("third")
    assert suite.run("--only", "second") == 0
    assert suite.statuses() == {"second": "passed", "first": "skipped", "third": "skipped"}
    assert suite.document["steps"]["first"]["reason"] == "not asked for"
    assert suite.run() == 1
    assert suite.done == ["first", "third"]
    assert suite.run("--only", "third") == 0  # though the first has failed before
    assert suite.statuses()["first"] == "failed"


def test_a_step_that_has_to_be_named(suite):
    suite.add("first")
    suite.add("second", by_name=True)
    assert suite.run() == 0
    assert suite.statuses() == {"first": "passed", "second": "skipped"}
    assert suite.run("--only", "second") == 0
    assert suite.done == ["second"]
    assert suite.statuses() == {"first": "passed", "second": "passed"}
    assert suite.run() == 0
    assert suite.done == []
    assert suite.statuses()["second"] == "passed"  # what it found stays
    suite.machine = {**suite.machine, "device": None}
    assert suite.run("--dry-run") == 0
    assert suite.done == ["first", "second"]


@pytest.fixture
def no_time_passes(monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)


@pytest.mark.usefixtures("no_time_passes")
def test_time_is_shared(suite):
    """A step leaves to the later ones what they need at least; what has too little left is not begun."""
    left = {}

    def look(name):
        return lambda job: left.setdefault(name, job.left())

    suite.add("long", look("long"), limit=1000.0, least=10.0)
    suite.add("short", look("short"), limit=7.0, least=5.0)
    suite.add("large", look("large"), limit=1000.0, least=200.0)
    assert suite.run("--limit", "310") == 0
    assert left == {"long": 300 - 5 - 200, "short": 7, "large": 300}
    assert suite.run("--limit", "150", "--fresh") == 1
    assert suite.statuses() == {"long": "passed", "short": "passed", "large": "timed out"}
    assert "not begun: it needs 200 s, 140 were left" in suite.document["steps"]["large"]["reason"]


@pytest.mark.usefixtures("no_time_passes")
def test_what_is_asked_for_alone_shares_all_the_time(suite):
    left = {}

    def look(name):
        return lambda job: left.setdefault(name, job.left())

    suite.add("first", look("first"), limit=50.0)
    suite.add("second", look("second"), limit=20.0)
    suite.add("third", look("third"), limit=10.0)
    assert suite.run("--limit", "130", "--only", "second,third") == 0
    assert left == pytest.approx({"second": 80, "third": 40})  # of 120, as 20 to 10


@pytest.mark.usefixtures("no_time_passes")
def test_a_rehearsal_is_not_hurried(suite):
    """The limits are a GPU's. A CPU that is busy with other work takes longer, and nothing is wrong with the suite."""
    left = {}
    suite.add("build", lambda job: left.setdefault("build", job.left()), limit=100.0)
    suite.add("other", limit=60.0)
    assert suite.run("--dry-run") == 0
    assert left["build"] > 1800
    left.clear()
    assert suite.run("--dry-run", "--limit", "90", "--fresh") == 0
    assert left["build"] < 80


def test_a_module_that_is_not_there_is_built(suite, monkeypatch):
    """A result of the same sources holds on a machine that has just begun, with nothing built on it."""
    suite.add("build")
    suite.add("test", needs=("build",))
    suite.add("choices", after=("test",))
    monkeypatch.setattr(suite.module, "is_built", lambda: False)
    assert suite.run() == 0
    assert suite.done == ["build", "test", "choices"]
    assert suite.run() == 0
    assert suite.done == ["build"]
    assert suite.run("--only", "test") == 0
    assert suite.done == ["build", "test"]
    assert suite.run("--only", "choices") == 0
    assert suite.done == ["choices"]
    monkeypatch.setattr(suite.module, "is_built", lambda: True)
    assert suite.run() == 0
    assert suite.done == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_what_is_done(suite, tmp_path, number, capsys):
    path = tmp_path / "pid"

    def interrupted(job):
        timer = threading.Thread(target=lambda: (wait_for(path), os.kill(os.getpid(), number)))
        timer.start()
        try:
            command(SPAWN.format(path=str(path), seconds=600))(job)
        finally:
            timer.join()

    suite.add("first")
    suite.add("second", interrupted)
    suite.add("third")
    before = signal.getsignal(number)
    assert suite.run() == suite.module.INTERRUPTED
    assert signal.getsignal(number) is before
    assert suite.statuses() == {"first": "passed", "second": "failed"}
    assert suite.document["steps"]["second"]["reason"] == "interrupted"
    assert suite.document["complete"] is False
    assert not is_running(int(path.read_text()))
    assert "interrupted" in capsys.readouterr().out
    suite.steps["second"] = suite.steps["first"]
    assert suite.run() == 0
    assert suite.statuses() == dict.fromkeys(("first", "second", "third"), "passed")


def wait_for(path):
    end = time.monotonic() + 300
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --out"),
        (["--out", "out", "--only", "first,magic"], "argument --only: must name steps among first, got 'magic'"),
        (["--out", "out", "--only", ""], "argument --only: must name steps among first, got ''"),
        (["--out", "out", "--limit", "10"], "argument --limit: must be a number above 10, got '10'"),
        (["--out", "out", "--limit", "soon"], "argument --limit: must be a number above 10, got 'soon'"),
        (["--out", "file"], "argument --out: cannot write in file: File exists"),
        (["--out", "out"], "there is no NVIDIA GPU here that torch can use; --dry-run rehearses"),
    ],
)
def test_bad_arguments(suite, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    suite.add("first")
    suite.machine = {**suite.machine, "device": None}
    with pytest.raises(SystemExit) as stopped:
        suite.module.main(arguments)
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert suite.done == []
