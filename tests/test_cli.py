"""The command line: what it prints and saves; a wrong argument gives exit code 2 and leaves nothing."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from terminal import TRAIN, one_line, run, store_network
from torch._inductor.exc import InductorError

import sparta_kernels
from sparta_kernels import cli, evaluation, report, training
from sparta_kernels.commands import launch, options

pytestmark = pytest.mark.usefixtures("one_thread", "few_images")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return store_network(tmp_path_factory.mktemp("stored"))


def test_info(tmp_path):
    result = run("info", "--json", tmp_path / "info.json")
    assert result.exit_code == 0, result.output
    assert torch.__version__ in result.stdout
    assert json.loads((tmp_path / "info.json").read_text())["versions"]["torch"] == torch.__version__
    assert len(re.findall("its kernels for cpu are the only", " ".join(result.stdout.split()))) <= 1  # each reason once
    assert all(operation in result.stdout for operation in sparta_kernels.build_info()["operations"])
    printed = run("info", "--json", "-")
    assert json.loads(printed.stdout)["versions"]["torch"] == torch.__version__


def test_narrow_terminals_show_all_of_a_data_set(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    shown = run("data", "info").stdout
    facts = json.loads(run("data", "info", "--json", "-").stdout)
    files = [file["name"] for row in facts for file in row["files"]]
    for words in [*(row["name"] for row in facts), *files, "augmentation", "73257 images"]:
        assert words in shown, words


def test_version():
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"sparta {sparta_kernels.__version__}\n")


def test_help_shows_every_command_s_summary_whole():
    assert "..." not in run("--help").stdout.split("Commands:")[1]
    for command, argument in [("train", "CHECKPOINT"), ("evaluate", "CHECKPOINTS"), ("reproduce", "EXPERIMENTS")]:
        assert re.search(rf" {command} \[OPTIONS\] \W?{argument}", run(command, "--help").stdout)


def test_help_of_evaluate_groups_its_options():
    text = run("evaluate", "--help").stdout
    shown = [
        "\nImages:",
        "  --limit",
        "\nThe attack:",
        "  --restarts",
        "\nPrecision:",
        "  --parity-images",
        "\nThe machine:",
    ]
    assert sorted(shown, key=text.index) == shown


def test_wrong_info_arguments(tmp_path, capsys):
    code, err = one_line(["info", "--json", tmp_path / "none" / "x.json"], capsys)
    assert code == 2
    assert "--json" in err
    assert one_line(["nothing"], capsys)[0] == 2
    assert one_line([], capsys)[0] == 2


def test_outputs_never_overwrite_inputs_or_each_other(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate", None)  # never reached
    monkeypatch.setattr(training, "train", None)
    monkeypatch.chdir(tmp_path)
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    for path in (first, second):
        path.write_bytes(checkpoint.read_bytes())
    os.link(first, "hard.png")
    os.symlink(second, "soft.png")
    os.symlink("new", "to-new")  # the same file, though none is there yet
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.exists()}
    for option, arguments in [
        ("--json", ["evaluate", first, "--json", first]),
        ("--json", ["evaluate", first, second, "--json", "second.png"]),
        ("--json", ["evaluate", first, "--json", "hard.png"]),
        ("--json", ["evaluate", "first.png", "soft.png", "--json", "./second.png"]),
        ("--plot", ["evaluate", first, second, "--plot", "second.png"]),
        ("--plot", ["evaluate", second, "--plot", "soft.png"]),
        ("--plot", ["evaluate", first, "--json", tmp_path / "out.png", "--plot", "out.png"]),
        ("--outcomes", ["evaluate", first, "--json", "out.npz", "--outcomes", tmp_path / "out.npz"]),
        ("--json", ["train", first, "--overwrite", "--json", "first.png"]),
        ("--json", ["train", "new", "--json", tmp_path / "new"]),
        ("--json", ["train", "new", "--json", "to-new"]),
    ]:
        code, err = one_line(arguments, capsys)
        assert code == 2, arguments
        assert f"Invalid value for {option}: must not be the file of" in err
        assert err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.exists()} == before


def test_missing_packages(checkpoint, tmp_path, capsys, monkeypatch):
    for name in ("sklearn", "sklearn.datasets", "matplotlib.backends.backend_agg", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    for arguments, words in [
        (["train", tmp_path / "net"], "scikit-learn"),
        (["train", tmp_path / "net", "--log-dir", tmp_path / "logs"], "tensorboard"),
        (["evaluate", checkpoint], "scikit-learn"),
        (["evaluate", checkpoint, "--plot", tmp_path / "a.png"], "matplotlib"),
    ]:
        code, err = one_line(arguments, capsys)
        assert code == 2
        assert f"pip install {words}" in err
    assert not os.listdir(tmp_path)


def test_full_disks_fail_with_a_message(checkpoint, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "save_json", full)
    code, err = one_line(["evaluate", checkpoint, "--steps", 1, "--json", tmp_path / "out.json"], capsys)
    assert code == 1
    assert err.splitlines()[-1] == "sparta: [Errno 28] No space left on device"
    assert not os.listdir(tmp_path)


def test_a_bug_is_not_dressed_up(checkpoint, monkeypatch):
    def broken(*_, **__):
        raise ValueError("a bug")

    monkeypatch.setattr(evaluation, "evaluate", broken)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["evaluate", str(checkpoint)])


def test_runs_as_a_program(tmp_path):
    command = [sys.executable, "-m", "sparta_kernels.cli", "evaluate", str(tmp_path / "none")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("sparta: Invalid value for CHECKPOINTS: ")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("gpus", "words"),
    [(0, "must be cpu: torch 2.13.0 finds no GPU here, got"), (2, "must be cpu, cuda:0, cuda:1, got")],
)
def test_a_device_that_is_not_there_is_told_from_those_that_are(checkpoint, capsys, monkeypatch, gpus, words):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    code, err = one_line(["evaluate", checkpoint, "--device", "cuda:2"], capsys)
    assert code == 2
    assert f"Invalid value for --device: {words} 'cuda:2'" in err


@pytest.mark.parametrize(
    ("name", "rank", "expected"), [("cuda", None, 0), ("cuda:1", None, 1), ("cuda", 1, 1), ("cuda:1", 1, None)]
)
def test_the_device_is_made_the_current_one(monkeypatch, name, rank, expected):
    def set_device(device):
        assert device.index is not None  # torch refuses it
        current.append(device)

    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    if rank is not None:
        monkeypatch.setattr(launch, "here", lambda: launch.Launch(rank, 2, rank, 2))
    if expected is None:
        with pytest.raises(typer.BadParameter, match="must be cuda under torchrun"):
            options.device(name, 1)
        assert current == []
    else:
        assert options.device(name, 1) == torch.device("cuda", expected)
        assert current == [torch.device("cuda", expected)]


@pytest.mark.skipif(sys.platform == "win32", reason="closes a pipe as POSIX does")
def test_results_are_saved_though_nobody_reads_the_table(checkpoint, tmp_path):
    for command, files in [
        (["train", tmp_path / "net", *TRAIN, "--epochs", 1, "--batch-size", 512, "--attack", "none"], ["train.json"]),
        (
            ["evaluate", checkpoint, "--steps", 1, "--limit", 4, "--plot", tmp_path / "a.png"],
            ["evaluate.json", "a.png"],
        ),
    ]:
        reader, writer = os.pipe()
        os.close(reader)
        command = [
            sys.executable,
            "-m",
            "sparta_kernels.cli",
            *map(str, command),
            "--threads",
            "1",
            "--json",
            tmp_path / files[0],
        ]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
        os.close(writer)
        assert done.returncode == 141, done.stderr  # as by SIGPIPE
        assert not re.search("sparta:|Error|Traceback", done.stderr)
        assert json.loads((tmp_path / files[0]).read_text())["results"]
        assert all((tmp_path / file).exists() for file in files)


@pytest.mark.skipif(sys.platform == "win32", reason="closes a pipe as POSIX does")
@pytest.mark.parametrize("arguments", [["data", "info"], ["data", "info", "--json", "-"], ["--help"]])
def test_what_nobody_reads_ends_quietly(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "sparta_kernels.cli", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 141, done.stderr
    assert not re.search("sparta:|Error|Traceback", done.stderr)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no such device")
@pytest.mark.parametrize(
    ("arguments", "into", "expected"),
    [
        ("--version", ">&-", (0, "", "")),
        ("train /nowhere/net", "2>&-", (2, "", "")),
        ("--version", ">/dev/full", (1, "", "sparta: [Errno 28] No space left on device\n")),
    ],
)
def test_output_that_goes_nowhere(arguments, into, expected):
    command = f"{sys.executable} -m sparta_kernels.cli {arguments} {into}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == expected


def test_training_whose_log_nobody_reads_stores_what_it_has(tmp_path, capsys, monkeypatch):
    def gone(self, epoch):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with monkeypatch.context() as patch:
        patch.setattr(training.TrainingProgress, "epoch", gone)
        assert one_line(["train", tmp_path / "net", *TRAIN], capsys) == (141, "")
    assert training.read_metadata(tmp_path / "net")["epoch"] == 1
    assert run("train", tmp_path / "net", *TRAIN, "--resume").exit_code == 0


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\n to"),
            "CUDA out of memory. Tried to; try a smaller --batch-",
        ),
        (
            RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: 9"),
            "memory: 9; try a smaller --batch-size",
        ),
        (MemoryError(), "MemoryError; try a smaller --batch-size"),
        (InductorError(RuntimeError("no compiler"), lambda: 0), "torch.compile failed: "),
        (
            RuntimeError("[gloo/tcp/pair.cc:553] Connection closed by peer [::1]:9. GLHF!"),
            "another process has ended; ",
        ),
    ],
)
def test_what_the_machine_cannot_do_is_one_line(checkpoint, tmp_path, capsys, monkeypatch, error, words):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(evaluation, "evaluate", fail)
    monkeypatch.setattr(training, "train", fail)
    for command in (["evaluate", checkpoint], ["train", tmp_path / "net"]):
        code, err = one_line(command, capsys)
        assert (code, err.splitlines()[-1].startswith("sparta: ")) == (1, True)
        assert words in err.splitlines()[-1]
        assert "Traceback" not in err
    assert ("--engine eager" in err) == isinstance(error, InductorError)


def test_names_are_no_markup(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("net[bold]:star:.safetensors")
    result = run("train", path, *TRAIN, "--epochs", 1, "--attack", "none")
    assert f"{path.name}: 1 epoch," in result.stdout.replace("\n", ""), result.output
    result = run("evaluate", path, path, "--steps", 1, "--limit", 4)
    assert result.exit_code == 0, result.output
    assert path.name in result.stdout.replace("\n", "")
    Path("other").write_bytes(path.read_bytes())
    result = run("evaluate", path, "other", "--steps", 1, "--limit", 4)
    assert f" {path.stem} " in result.stdout
    assert f"{path.stem}, auto (" in result.stderr
