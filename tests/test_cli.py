"""The command line: what it prints and saves; a wrong argument gives exit code 2 and leaves nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import typer
from terminal import _few_images, _one_thread, one_line, run, store_network  # noqa: F401 (fixtures)
from torch._inductor.exc import InductorError

from sparta_kernels import cli, data, evaluation, report, training
from sparta_kernels.commands import launch, options
from sparta_kernels.training import step

TRAIN = [
    "--width",
    "2",
    "--epochs",
    "2",
    "--batch-size",
    "16",
    "--attack-steps",
    "1",
    "--schedule",
    "one-cycle",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return store_network(tmp_path_factory.mktemp("stored"))


def test_info(tmp_path):
    result = run("info", "--json", tmp_path / "info.json")
    assert result.exit_code == 0, result.output
    assert torch.__version__ in result.stdout
    assert json.loads((tmp_path / "info.json").read_text())["versions"]["torch"] == torch.__version__
    printed = run("info", "--json", "-")
    assert json.loads(printed.stdout)["versions"]["torch"] == torch.__version__


def test_train_and_resume(tmp_path):
    path = tmp_path / "net.safetensors"
    result = run("train", path, *TRAIN, "--eps", "8/255", "--json", tmp_path / "train.json", "--seed", 3)
    assert result.exit_code == 0, result.output
    for words in ("epoch  1", "robust error", "clean test error", "images/s", "ETA"):
        assert words in result.stderr, words
    assert "2 epochs, clean test error" in result.stdout
    saved = json.loads((tmp_path / "train.json").read_text())
    _, metadata = training.load_checkpoint(path)
    assert saved["results"]["history"] == metadata["history"]
    assert saved["settings"] == metadata["settings"]
    assert metadata["settings"]["eps"] == 8 / 255
    assert (saved["seed"], saved["settings"]["width"], saved["settings"]["milestones"]) == (3, 2, [30, 60])

    assert run("train", path, *TRAIN, "--eps", "8/255", "--seed", 3, "--resume").exit_code == 0
    assert run("train", path, *TRAIN, "--overwrite", "--attack", "none", "--milestones", "1,2").exit_code == 0
    assert training.load_checkpoint(path)[1]["settings"]["milestones"] == [1, 2]


TRAIN_WRONG = [
    ("--data", "imagenet"),
    ("--model", "vgg"),
    ("--activation", "tanhh"),
    ("--sites", "G9.B2"),
    ("--width", "0"),
    ("--width", "4097"),
    ("--width", "100000000"),
    ("--epochs", "0"),
    ("--epochs", "many"),
    ("--batch-size", "1"),
    ("--learning-rate", "0"),
    ("--learning-rate", "nan"),
    ("--schedule", "cosine"),
    ("--milestones", "1,x"),
    ("--milestones", "0"),
    ("--momentum", "1"),
    ("--weight-decay", "-1"),
    ("--attack", "fgsm"),
    ("--eps", "16"),
    ("--eps", "1/0"),
    ("--eps", "x"),
    ("--eps", "nan"),
    ("--attack-steps", "0"),
    ("--seed", "-1"),
    ("--backend", "cudnn"),
    ("--device", "tpu"),
    ("--device", "cuda:99"),
    ("--device", "meta"),
    ("--threads", "0"),
    ("--threads", "1025"),
    ("--json", "{tmp}"),
    ("--json", "{tmp}/none/out.json"),
    ("--json", "{tmp}/net.safetensors"),
    ("--json", "{tmp}/../{tmp.name}/net.safetensors"),
    ("--unknown", "1"),
]


@pytest.mark.parametrize(("option", "value"), TRAIN_WRONG)
def test_wrong_training_arguments(tmp_path, capsys, option, value):
    arguments = ["train", tmp_path / "net.safetensors", "--width", "2", option, value.format(tmp=tmp_path)]
    code, err = one_line(arguments, capsys)
    assert code == 2, err
    assert option in err
    assert err.count("\n") == 1
    assert err.startswith("sparta: ")
    assert not os.listdir(tmp_path)
    assert run(*arguments).exit_code == 2


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


def test_the_network_is_checked_without_memory(tmp_path, capsys, monkeypatch):
    built = []
    build = training.build_model
    monkeypatch.setattr(training, "build_model", lambda *args: built.append(build(*args)) or built[-1])
    code, err = one_line(["train", tmp_path / "net", "--width", "4096", "--activation", "tanhh"], capsys)
    assert (code, built) == (2, []), err
    monkeypatch.setattr(training, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    code, err = one_line(["train", tmp_path / "net", "--width", "4096"], capsys)
    assert code == 130, err
    assert all(tensor.is_meta for tensor in built[0].state_dict().values())


def test_zero_is_no_learning_rate(tmp_path, capsys):
    _, err = one_line(["train", tmp_path / "net", "--learning-rate", "0"], capsys)
    assert "--learning-rate: must be finite and above 0, got 0.0" in err
    assert "pixel" not in err


def test_a_missing_file_of_the_data_is_not_called_the_checkpoint(tmp_path, capsys, monkeypatch):
    def missing(*_):
        raise FileNotFoundError(2, "No such file or directory", "images.bin")

    monkeypatch.setattr(data, "load", missing)
    code, err = one_line(["train", tmp_path / "net", *TRAIN], capsys)
    assert code == 1
    assert "images.bin" in err
    assert "CHECKPOINT" not in err
    assert not os.listdir(tmp_path)


def test_wrong_checkpoints_to_train(checkpoint, tmp_path, capsys):
    path = tmp_path / "net.safetensors"
    path.write_bytes(checkpoint.read_bytes())
    (tmp_path / "damaged").write_bytes(b"x" * 100)
    for arguments, words in [
        ([path], "exists; add --resume or --overwrite"),
        ([path, "--resume", "--overwrite"], "cannot be combined"),
        ([path, "--resume", "--width", "3"], "cannot resume with other settings"),
        ([tmp_path / "none", "--resume"], "there is no such file"),
        ([tmp_path / "damaged", "--resume"], "damaged"),
        ([tmp_path], "is a folder"),
        ([tmp_path / "none" / "net"], "there is no folder"),
        (["/proc/net.safetensors"], "cannot write"),
    ]:
        code, err = one_line(["train", *arguments], capsys)
        assert code == 2, arguments
        assert "CHECKPOINT" in err or "--resume" in err
        assert words in err
        assert err.count("\n") == 1  # no progress bar before it
    assert sorted(os.listdir(tmp_path)) == ["damaged", "net.safetensors"]
    assert path.read_bytes() == checkpoint.read_bytes()


def test_missing_packages(checkpoint, tmp_path, capsys, monkeypatch):
    for name in ("sklearn", "sklearn.datasets", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    for arguments, words in [
        (["train", tmp_path / "net"], "scikit-learn"),
        (["evaluate", checkpoint], "scikit-learn"),
        (["evaluate", checkpoint, "--plot", tmp_path / "a.png"], "matplotlib"),
    ]:
        code, err = one_line(arguments, capsys)
        assert code == 2
        assert f"pip install {words}" in err
    assert not os.listdir(tmp_path)


def test_ctrl_c_keeps_the_checkpoint(tmp_path, capsys, monkeypatch):
    path = tmp_path / "net.safetensors"
    attack, calls = step.attack.perturb, []

    def interrupt(*args, **keywords):
        calls.append(1)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return attack(*args, **keywords)

    monkeypatch.setattr(step.attack, "perturb", interrupt)
    stop_at = 1
    code, err = one_line(["train", path, *TRAIN], capsys)
    assert code == 130
    assert "interrupted; nothing was written" in err
    calls.clear()
    stop_at = 5  # 40 images in batches of 16: the second step of epoch 2
    code, err = one_line(["train", path, *TRAIN], capsys)
    assert code == 130
    assert f"interrupted; the last whole epoch is in {path}" in err
    assert training.load_checkpoint(path)[1]["epoch"] == 1
    assert os.listdir(tmp_path) == [path.name]
    calls.clear()
    stop_at = 1  # an old file is not the work of this run
    assert "nothing was written" in one_line(["train", path, *TRAIN, "--overwrite"], capsys)[1]
    calls.clear()
    code, err = one_line(["train", path, *TRAIN, "--resume"], capsys)
    assert f"the last whole epoch is in {path}" in err


def test_divergence_and_full_disks_fail_with_a_message(checkpoint, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(step, "learning_rate", lambda *_: 1e30)
        code, err = one_line(["train", tmp_path / "net", *TRAIN], capsys)
        assert code == 1
        assert "try a lower --learning-rate" in err

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
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        assert json.loads((tmp_path / files[0]).read_text())["results"]
        assert all((tmp_path / file).exists() for file in files)


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


def test_names_are_no_markup(tmp_path):
    path = tmp_path / "net[bold]:star:.safetensors"
    result = run("train", path, *TRAIN, "--epochs", 1, "--attack", "none")
    assert f"{path.name}: 1 epochs" in result.stdout.replace("\n", ""), result.output
    result = run("evaluate", path, path, "--steps", 1, "--limit", 4)
    assert result.exit_code == 0, result.output
    assert path.name in result.stdout.replace("\n", "")
    (tmp_path / "other").write_bytes(path.read_bytes())
    result = run("evaluate", path, tmp_path / "other", "--steps", 1, "--limit", 4)
    assert f" {path.stem} " in result.stdout
    assert f"{path.stem}, auto (" in result.stderr
