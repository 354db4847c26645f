"""`sparta evaluate`: what it prints and saves, stops, takes up and refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from terminal import one_line, run, store_network

from sparta_kernels import cli, data, evaluation, training
from sparta_kernels.commands import evaluate as evaluate_command
from sparta_kernels.commands import launch
from sparta_kernels.evaluation import batches
from sparta_kernels.training import checkpoint as checkpoint_module

pytestmark = pytest.mark.usefixtures("one_thread", "few_images")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return store_network(tmp_path_factory.mktemp("stored"))


def test_evaluate(checkpoint, tmp_path):
    other = tmp_path / "other.safetensors"
    other.write_bytes(checkpoint.read_bytes())
    out, plot = tmp_path / "out.json", tmp_path / "plot.png"
    backends = ["--backend", "auto", "--backend", "reference"]
    files = ["--json", out, "--plot", plot]
    result = run("evaluate", checkpoint, other, "--steps", 11, "--eps", 0.1, "--step-size", "2/255", *backends, *files)
    assert result.exit_code == 0, result.output
    for words in (
        "40 digits test images, eps 25.5/255, step 2/255",
        "PGD-10",
        "PGD-11",
        "net",
        "other",
        "reference",
    ):
        assert words in result.stdout, words
    saved = json.loads(out.read_text())
    assert [(row["model"], row["backend"].split()[0]) for row in saved["results"]] == [
        (name, backend) for name in ("net", "other") for backend in ("auto", "reference")
    ]
    first, second = saved["results"][:2]
    assert first["clean_error"] == second["clean_error"]
    assert first["errors"].keys() == {"10", "11"}
    assert len(first["loss_mean"]) == 12
    assert first["loss_mean"] == pytest.approx(second["loss_mean"], rel=1e-3)
    assert saved["settings"]["step_size"] == 2 / 255
    assert plot.read_bytes().startswith(b"\x89PNG")
    printed = run("evaluate", checkpoint, "--steps", 1, "--json", "-")
    assert json.loads(printed.stdout)["results"][0]["images"] == 40


def test_same_names_are_told_apart(checkpoint, tmp_path):
    (tmp_path / "b").mkdir()
    other = tmp_path / "b" / checkpoint.name
    other.write_bytes(checkpoint.read_bytes())
    result = run("evaluate", checkpoint, other, "--steps", 1, "--json", "-")
    assert [row["model"] for row in json.loads(result.stdout)["results"]] == [str(checkpoint), str(other)]


def test_the_attack_of_an_evaluation(checkpoint):
    def attack(*options):
        result = run("evaluate", checkpoint, "--steps", 2, "--limit", 10, *options, "--json", "-")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout), result.stderr

    document, _ = attack("--report-at", "0,2", "--preset", "xie2019", "--eps", "8/255", "--restarts", 2)
    assert document["settings"]["images"] == document["results"][0]["images"] == 10
    assert document["settings"]["step_size"] == 4 / 255
    assert document["settings"]["report_at"] == [0, 2]
    assert document["results"][0]["errors"].keys() == {"0", "2"}
    assert document["results"][0]["restarts"] == 2
    assert attack("--preset", "xie2019", "--step-size", "2/255")[0]["settings"]["step_size"] == 2 / 255
    document, table = attack("--untargeted", "--engine", "eager", "--batch-size", "auto")
    assert document["results"][0]["target_success"] == {}
    assert document["results"][0]["engine"] == "eager"
    for words in ("untargeted", "n/a", "batches of 10 images (at most 256 on a CPU)", "engine eager (asked for)"):
        assert words in table, words
    assert document["results"][0]["parity"] is None


def test_parity_is_told_and_can_fail(checkpoint, tmp_path, capsys, monkeypatch):
    options = ["--precision", "bf16", "--steps", "2", "--parity-images", "20", "--json", tmp_path / "out.json"]
    result = run("evaluate", checkpoint, *options, "--parity-tolerance", 100)
    assert result.exit_code == 0, result.output
    assert "errors in bf16 minus those in fp32, on 20 images: PGD-2 " in result.stdout
    parity = json.loads((tmp_path / "out.json").read_text())["results"][0]["parity"]
    assert (parity["images"], parity["tolerance"], parity["passed"]) == (20, 100, True)

    parity_of = evaluation.result.parity
    monkeypatch.setattr(
        evaluation.result, "parity", lambda *given: dataclasses.replace(parity_of(*given), differences={2: -1.5})
    )
    (tmp_path / "out.json").unlink()
    outcomes = tmp_path / "found.npz"
    code, err = one_line(["evaluate", checkpoint, *options, "--outcomes", outcomes], capsys)
    assert code == 1
    assert err.splitlines()[-1].startswith(
        "sparta: parity: bf16 differs from fp32 by more than 1 percentage points on net"
    )
    saved = json.loads((tmp_path / "out.json").read_text())["results"][0]
    assert (saved["parity"]["difference"], saved["parity"]["passed"]) == (-1.5, False)
    assert np.load(outcomes)["done"].all()
    monkeypatch.undo()
    assert run("evaluate", checkpoint, *options, "--parity-images", 0).exit_code == 0


def test_outcomes_of_several_networks_and_backends(checkpoint, tmp_path, capsys):
    (tmp_path / "b").mkdir()
    other = tmp_path / "b" / checkpoint.name
    other.write_bytes(checkpoint.read_bytes())
    folder = tmp_path / "outcomes"
    both = ["evaluate", checkpoint, other, "--backend", "auto", "--backend", "reference", "--steps", 1, "--limit", 5]
    code, err = one_line([*both, "--outcomes", tmp_path / "x.npz"], capsys)
    assert code == 2
    assert "must be a folder for several networks or backends" in err
    assert not folder.exists()
    assert run(*both, "--outcomes", folder).exit_code == 0
    names = [f"net-{number}.{backend}.npz" for number in (1, 2) for backend in ("auto", "reference")]
    assert sorted(os.listdir(folder)) == names
    code, err = one_line([*both, "--outcomes", folder], capsys)
    assert code == 2
    assert "net-1.auto.npz exists; add --resume or --overwrite" in err
    (folder / names[1]).unlink()
    again = json.loads(run(*both, "--outcomes", folder, "--resume", "--json", "-").stdout)
    assert [row["attacked"] for row in again["results"]] == [0, 5, 0, 0]
    assert run(*both, "--outcomes", folder, "--overwrite").exit_code == 0
    code, err = one_line([*both, "--outcomes", folder, "--resume", "--seed", 1], capsys)
    assert code == 2
    assert "--outcomes" in err
    assert "seed was 0 and is 1" in err
    assert err.count("\n") == 1
    (tmp_path / "file").write_bytes(b"")
    assert "must be a folder" in one_line([*both, "--outcomes", tmp_path / "file"], capsys)[1]


@pytest.mark.parametrize(
    "options", [("--resume",), ("--overwrite",), ("--resume", "--overwrite", "--outcomes", "x.npz")]
)
def test_resume_and_overwrite(checkpoint, tmp_path, capsys, monkeypatch, options):
    monkeypatch.setattr(evaluation, "evaluate", None)  # never reached
    monkeypatch.chdir(tmp_path)
    code, err = one_line(["evaluate", checkpoint, *options], capsys)
    assert code == 2
    assert options[0] in err
    assert not os.listdir(tmp_path)


def test_a_network_that_gives_nan(tmp_path, capsys):
    path = tmp_path / "net.safetensors"
    training.train(training.Settings(width=2, epochs=1, attack="none"), path)
    stored = checkpoint_module.read_checkpoint(path)
    with torch.no_grad():
        stored.model.linear.bias[0] = torch.nan
    checkpoint_module.save_checkpoint(path, stored.model, stored.momentum, stored.metadata)
    code, err = one_line(["evaluate", path, "--steps", 1], capsys)
    assert code == 1
    assert err.splitlines()[-1].startswith(f"sparta: {path}: pgd: model must return finite logits")


@pytest.mark.skipif(sys.platform == "win32", reason="kills as POSIX does")
def test_killed_and_resumed(checkpoint, tmp_path):
    """A real process, ended in mid-run with no chance to tidy up."""
    path, whole = tmp_path / "found.npz", tmp_path / "whole.npz"
    settings = ["--limit", "24", "--batch-size", "4", "--steps", "30", "--report-at", "1,30", "--threads", "1"]
    command = [sys.executable, "-m", "sparta_kernels.cli", "evaluate", str(checkpoint), *settings]
    with subprocess.Popen([*command, "--outcomes", str(path)], stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 300
        while not (path.exists() and np.load(path)["done"].any()):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.01)
        process.kill()
    known = int(np.load(path)["done"].sum())
    assert known in (4, 8, 12, 16, 20)
    result = run("evaluate", checkpoint, *settings, "--outcomes", path, "--resume", "--json", "-")
    assert json.loads(result.stdout)["results"][0]["attacked"] == 24 - known
    again = run("evaluate", checkpoint, *settings, "--outcomes", whole, "--json", "-")
    assert path.read_bytes() == whole.read_bytes()
    for name in ("clean_error", "errors", "target_success", "loss_mean", "loss_std"):
        assert json.loads(result.stdout)["results"][0][name] == json.loads(again.stdout)["results"][0][name]


EVALUATE_WRONG = [
    ("--data", "imagenet"),
    ("--steps", "0"),
    ("--eps", "-1/255"),
    ("--step-size", "0"),
    ("--step-size", "1/255/3"),
    ("--batch-size", "0"),
    ("--batch-size", "many"),
    ("--limit", "0"),
    ("--preset", "fgsm"),
    ("--report-at", ""),
    ("--report-at", "30,10"),
    ("--report-at", "10,10"),
    ("--report-at", "51"),
    ("--report-at", "-1"),
    ("--report-at", "1,x"),
    ("--restarts", "0"),
    ("--precision", "fp8"),
    ("--engine", "jit"),
    ("--parity-images", "-1"),
    ("--parity-tolerance", "-1"),
    ("--parity-tolerance", "nan"),
    ("--outcomes", "{tmp}"),
    ("--outcomes", "{tmp}/outcomes"),
    ("--outcomes", "{tmp}/none/x.npz"),
    ("--outcomes", "/proc/x.npz"),
    ("--backend", "cudnn"),
    ("--seed", "x"),
    ("--device", "tpu"),
    ("--threads", "-1"),
    ("--threads", "1000000"),
    ("--json", "{tmp}"),
    ("--json", "/proc/sparta.json"),
    ("--plot", "{tmp}/none/plot.png"),
    ("--plot", "{tmp}/plot.doc"),
    ("--plot", "/proc/plot.png"),
    ("--unknown", "1"),
]


@pytest.mark.parametrize(("option", "value"), EVALUATE_WRONG)
def test_wrong_evaluation_arguments(checkpoint, tmp_path, capsys, monkeypatch, option, value):
    monkeypatch.setattr(evaluation, "evaluate", None)  # never reached
    arguments = ["evaluate", checkpoint, option, value.format(tmp=tmp_path)]
    code, err = one_line(arguments, capsys)
    assert code == 2, err
    assert option in err
    assert err.count("\n") == 1
    assert not os.listdir(tmp_path)
    assert run(*arguments).exit_code == 2


def test_wrong_checkpoints_to_evaluate(checkpoint, tmp_path, capsys, monkeypatch):
    (tmp_path / "damaged").write_bytes(b"x" * 100)
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign")
    for path, words in [
        (tmp_path / "none", "there is no such file"),
        (tmp_path, "it is not a file"),
        (tmp_path / "damaged", "damaged"),
        (tmp_path / "foreign", "not written by"),
    ]:
        code, err = one_line(["evaluate", checkpoint, path, "--json", tmp_path / "out.json"], capsys)
        assert (code, err.count("\n")) == (2, 1)
        assert "CHECKPOINTS" in err
        assert words in err
    assert sorted(os.listdir(tmp_path)) == ["damaged", "foreign"]
    code, err = one_line(["evaluate", checkpoint, "--json", tmp_path / "a.png", "--plot", tmp_path / "a.png"], capsys)
    assert code == 2
    assert "--plot" in err
    wide = data.Dataset("wide", 10, (3, 8, 8), (0.0,) * 3, (1.0,) * 3, lambda *_: None)
    monkeypatch.setitem(data.DATASETS, "wide", wide)
    code, err = one_line(["evaluate", checkpoint, "--data", "wide"], capsys)
    assert code == 2
    assert "--data" in err
    assert "3 channels" in err


def test_ctrl_c_during_an_evaluation(checkpoint, tmp_path, capsys, monkeypatch):
    attack, calls = batches.attack.pgd, []

    def interrupt(*args, **keywords):
        calls.append(1)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return attack(*args, **keywords)

    monkeypatch.setattr(batches.attack, "pgd", interrupt)
    command = ["evaluate", checkpoint, "--batch-size", "16", "--steps", 2, "--json", tmp_path / "out.json"]
    stop_at = 3  # the second batch, after the warm-up and the first
    code, err = one_line(command, capsys)
    assert code == 130
    assert err.splitlines()[-1] == "sparta: interrupted; nothing was written"
    assert not os.listdir(tmp_path)
    calls.clear()
    path = tmp_path / "found.npz"
    code, err = one_line([*command, "--outcomes", path], capsys)
    assert code == 130
    assert err.splitlines()[-1] == f"sparta: interrupted; 16 of 40 images of net are in {path}; go on with --resume"
    assert os.listdir(tmp_path) == [path.name]
    calls.clear()
    stop_at = 0
    assert run(*command, "--outcomes", path, "--resume").exit_code == 0
    assert json.loads((tmp_path / "out.json").read_text())["results"][0]["attacked"] == 24


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), RuntimeError("a bug")])
def test_a_later_network_s_failure_leaves_the_results_before(checkpoint, tmp_path, capsys, monkeypatch, error):
    evaluate, calls, files = evaluation.evaluate, [], ("out.json", "plot.png")

    def fail(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            assert len(json.loads((tmp_path / "out.json").read_text())["results"]) == 2  # whatever comes
            raise error
        return evaluate(*arguments, **options)

    monkeypatch.setattr(evaluation, "evaluate", fail)
    other = tmp_path / "other.safetensors"
    other.write_bytes(checkpoint.read_bytes())
    command = ["evaluate", checkpoint, other, "--backend", "auto", "--backend", "reference", "--steps", 1, "--limit", 4]
    command += ["--json", tmp_path / "out.json", "--plot", tmp_path / "plot.png"]
    if isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError, match="a bug"):
            cli.main([str(argument) for argument in command])
        printed = capsys.readouterr()
    else:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in command])
        printed = capsys.readouterr()
        told = {130: "sparta: interrupted; nothing of other, auto (", 1: "sparta: other, auto ("}
        assert printed.err.splitlines()[-1].startswith(told[stop.value.code])
    assert [row["model"] for row in json.loads((tmp_path / "out.json").read_text())["results"]] == ["net", "net"]
    assert all((tmp_path / file).exists() for file in files)
    assert printed.out.count(" net ") == 2
    calls.clear()
    with pytest.raises((SystemExit, RuntimeError)):
        cli.main([str(argument) for argument in [*command[:-4], "--json", "-"]])
    assert len(json.loads(capsys.readouterr().out)["results"]) == 2


def test_a_backend_named_twice_is_run_once(checkpoint, tmp_path):
    found = ["--outcomes", tmp_path / "found.npz", "--json", "-"]  # a file: it is one run
    twice = ["--backend", "reference", "--backend", "reference"]
    result = run("evaluate", checkpoint, "--steps", 1, "--limit", 4, *twice, *found)
    assert [row["backend"] for row in json.loads(result.stdout)["results"]] == ["reference"], result.output


@pytest.mark.parametrize("there", [False, True])
def test_one_file_for_two_networks_is_refused(checkpoint, tmp_path, capsys, monkeypatch, there):
    monkeypatch.setattr(evaluation, "evaluate", None)  # never reached
    (tmp_path / "b").mkdir()
    paths = [tmp_path / "net.safetensors", tmp_path / "b" / "net.safetensors", tmp_path / "net-1.safetensors"]
    for path in paths:
        path.write_bytes(checkpoint.read_bytes())
    folder = tmp_path / "outcomes"
    if there:
        folder.mkdir()
    code, err = one_line(["evaluate", *paths, "--outcomes", folder], capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert f"--outcomes: would have one file for {paths[0]} and {paths[2]}: {folder / 'net-1.auto.npz'}" in err
    assert folder.exists() == there


def test_what_other_processes_left_is_not_run_over(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate", None)  # never reached
    part = tmp_path / "found.npz.part1"
    part.write_bytes(b"x")
    code, err = one_line(["evaluate", checkpoint, "--outcomes", tmp_path / "found.npz"], capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert f"--outcomes: {part} exists; add --resume or --overwrite" in err


def test_progress_where_nothing_can_be_drawn(checkpoint, monkeypatch):
    monkeypatch.setattr(evaluate_command, "_SECONDS_BETWEEN_LINES", 0)
    result = run("evaluate", checkpoint, "--steps", 2, "--limit", 8, "--batch-size", 4)
    lines = [line for line in result.stderr.splitlines() if line.startswith("net, auto (")]
    assert "): 4 of 8 images, 4 of 8 passes clean " in lines[5], lines  # a line for each pass, and for each batch
    assert "): 8 of 8 images, 8 of 8 passes clean " in lines[-1]
    assert "images/s" in lines[-1]
    monkeypatch.setattr(evaluate_command, "_SECONDS_BETWEEN_LINES", 1e9)
    result = run("evaluate", checkpoint, "--steps", 2, "--limit", 8, "--batch-size", 4)
    assert 0 < result.stderr.count("passes") < 3  # at least the end is told


def test_one_process_tells_that_parity_fails(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(launch, "process_group", lambda _: nullcontext())
    parity_of = evaluation.result.parity
    monkeypatch.setattr(
        evaluation.result, "parity", lambda *given: dataclasses.replace(parity_of(*given), differences={1: -1.5})
    )
    command = ["evaluate", checkpoint, "--precision", "bf16", "--steps", 1, "--limit", 4, "--threads", 1]
    for rank in (0, 1):
        monkeypatch.setattr(launch, "here", lambda rank=rank: launch.Launch(rank, 2, rank, 2))
        code, err = one_line(command, capsys)
        assert (code, "parity" in err) == (1, rank == 0)
