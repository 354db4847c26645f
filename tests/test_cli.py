"""The command line: what it prints and saves; a wrong argument gives exit code 2 and leaves nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from sparta_kernels import cli, data, evaluation, report, training
from sparta_kernels.evaluation import batches
from sparta_kernels.training import checkpoint as checkpoint_module
from sparta_kernels.training import loop

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


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Threads only cost time on networks this small, the more so where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _few_images(monkeypatch):
    """The first images of the digits, and a terminal of a known width."""
    load = data.load
    monkeypatch.setattr(data, "load", lambda *args: tuple(part[:40] for part in load(*args)))
    monkeypatch.setenv("COLUMNS", "100")


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("stored") / "net.safetensors"
    settings = training.Settings(width=2, epochs=1, attack="none")
    training.train(settings, path)
    return path


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
    code, err = _one_line(["evaluate", checkpoint, *options, "--outcomes", outcomes], capsys)
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
    code, err = _one_line([*both, "--outcomes", tmp_path / "x.npz"], capsys)
    assert code == 2
    assert "must be a folder for several networks or backends" in err
    assert not folder.exists()
    assert run(*both, "--outcomes", folder).exit_code == 0
    names = [f"net-{number}.{backend}.npz" for number in (1, 2) for backend in ("auto", "reference")]
    assert sorted(os.listdir(folder)) == names
    code, err = _one_line([*both, "--outcomes", folder], capsys)
    assert code == 2
    assert "net-1.auto.npz exists; add --resume or --overwrite" in err
    (folder / names[1]).unlink()
    again = json.loads(run(*both, "--outcomes", folder, "--resume", "--json", "-").stdout)
    assert [row["attacked"] for row in again["results"]] == [0, 5, 0, 0]
    assert run(*both, "--outcomes", folder, "--overwrite").exit_code == 0
    code, err = _one_line([*both, "--outcomes", folder, "--resume", "--seed", 1], capsys)
    assert code == 2
    assert "--outcomes" in err
    assert "seed was 0 and is 1" in err
    (tmp_path / "file").write_bytes(b"")
    assert "must be a folder" in _one_line([*both, "--outcomes", tmp_path / "file"], capsys)[1]


@pytest.mark.parametrize(
    "options", [("--resume",), ("--overwrite",), ("--resume", "--overwrite", "--outcomes", "x.npz")]
)
def test_resume_and_overwrite(checkpoint, tmp_path, capsys, monkeypatch, options):
    monkeypatch.setattr(evaluation, "evaluate", None)  # never reached
    monkeypatch.chdir(tmp_path)
    code, err = _one_line(["evaluate", checkpoint, *options], capsys)
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
    code, err = _one_line(["evaluate", path, "--steps", 1], capsys)
    assert code == 1
    assert err.splitlines()[-1].startswith(f"sparta: {path}: pgd: model must return finite logits")


@pytest.mark.skipif(sys.platform == "win32", reason="kills as POSIX does")
def test_killed_and_resumed(checkpoint, tmp_path):
    """A real process, ended in mid-run with no chance to tidy up."""
    path, whole = tmp_path / "found.npz", tmp_path / "whole.npz"
    settings = ["--limit", "24", "--batch-size", "4", "--steps", "60", "--report-at", "1,60", "--threads", "1"]
    command = [sys.executable, "-m", "sparta_kernels.cli", "evaluate", str(checkpoint), *settings]
    with subprocess.Popen([*command, "--outcomes", str(path)], stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 60
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


def _one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    err = capsys.readouterr().err
    return stop.value.code, err


@pytest.mark.parametrize(("option", "value"), TRAIN_WRONG)
def test_wrong_training_arguments(tmp_path, capsys, option, value):
    arguments = ["train", tmp_path / "net.safetensors", "--width", "2", option, value.format(tmp=tmp_path)]
    code, err = _one_line(arguments, capsys)
    assert code == 2, err
    assert option in err
    assert err.count("\n") == 1
    assert err.startswith("sparta: ")
    assert not os.listdir(tmp_path)
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize(("option", "value"), EVALUATE_WRONG)
def test_wrong_evaluation_arguments(checkpoint, tmp_path, capsys, monkeypatch, option, value):
    monkeypatch.setattr(evaluation, "evaluate", None)  # never reached
    arguments = ["evaluate", checkpoint, option, value.format(tmp=tmp_path)]
    code, err = _one_line(arguments, capsys)
    assert code == 2, err
    assert option in err
    assert err.count("\n") == 1
    assert not os.listdir(tmp_path)
    assert run(*arguments).exit_code == 2


def test_wrong_info_arguments(tmp_path, capsys):
    code, err = _one_line(["info", "--json", tmp_path / "none" / "x.json"], capsys)
    assert code == 2
    assert "--json" in err
    assert _one_line(["nothing"], capsys)[0] == 2
    assert _one_line([], capsys)[0] == 2


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
        code, err = _one_line(arguments, capsys)
        assert code == 2, arguments
        assert f"Invalid value for {option}: must not be the file of" in err
        assert err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.exists()} == before


def test_the_network_is_checked_without_memory(tmp_path, capsys, monkeypatch):
    built = []
    build = training.build_model
    monkeypatch.setattr(training, "build_model", lambda *args: built.append(build(*args)) or built[-1])
    code, err = _one_line(["train", tmp_path / "net", "--width", "4096", "--activation", "tanhh"], capsys)
    assert (code, built) == (2, []), err
    monkeypatch.setattr(training, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    code, err = _one_line(["train", tmp_path / "net", "--width", "4096"], capsys)
    assert code == 130, err
    assert all(tensor.is_meta for tensor in built[0].state_dict().values())


def test_zero_is_no_learning_rate(tmp_path, capsys):
    _, err = _one_line(["train", tmp_path / "net", "--learning-rate", "0"], capsys)
    assert "--learning-rate: must be finite and above 0, got 0.0" in err
    assert "pixel" not in err


def test_a_missing_file_of_the_data_is_not_called_the_checkpoint(tmp_path, capsys, monkeypatch):
    def missing(*_):
        raise FileNotFoundError(2, "No such file or directory", "images.bin")

    monkeypatch.setattr(data, "load", missing)
    code, err = _one_line(["train", tmp_path / "net", *TRAIN], capsys)
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
        code, err = _one_line(["train", *arguments], capsys)
        assert code == 2, arguments
        assert "CHECKPOINT" in err or "--resume" in err
        assert words in err
        assert err.count("\n") == 1  # no progress bar before it
    assert sorted(os.listdir(tmp_path)) == ["damaged", "net.safetensors"]
    assert path.read_bytes() == checkpoint.read_bytes()


def test_wrong_checkpoints_to_evaluate(checkpoint, tmp_path, capsys, monkeypatch):
    (tmp_path / "damaged").write_bytes(b"x" * 100)
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign")
    for path, words in [
        (tmp_path / "none", "there is no such file"),
        (tmp_path, "it is not a file"),
        (tmp_path / "damaged", "damaged"),
        (tmp_path / "foreign", "not written by"),
    ]:
        code, err = _one_line(["evaluate", checkpoint, path, "--json", tmp_path / "out.json"], capsys)
        assert (code, err.count("\n")) == (2, 1)
        assert "CHECKPOINTS" in err
        assert words in err
    assert sorted(os.listdir(tmp_path)) == ["damaged", "foreign"]
    code, err = _one_line(["evaluate", checkpoint, "--json", tmp_path / "a.png", "--plot", tmp_path / "a.png"], capsys)
    assert code == 2
    assert "--plot" in err
    wide = data.Dataset("wide", 10, (3, 8, 8), (0.0,) * 3, (1.0,) * 3, lambda *_: None)
    monkeypatch.setitem(data.DATASETS, "wide", wide)
    code, err = _one_line(["evaluate", checkpoint, "--data", "wide"], capsys)
    assert code == 2
    assert "--data" in err
    assert "3 channels" in err


def test_missing_packages(checkpoint, tmp_path, capsys, monkeypatch):
    for name in ("sklearn", "sklearn.datasets", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    for arguments, words in [
        (["train", tmp_path / "net"], "scikit-learn"),
        (["evaluate", checkpoint], "scikit-learn"),
        (["evaluate", checkpoint, "--plot", tmp_path / "a.png"], "matplotlib"),
    ]:
        code, err = _one_line(arguments, capsys)
        assert code == 2
        assert f"pip install {words}" in err
    assert not os.listdir(tmp_path)


def test_ctrl_c_keeps_the_checkpoint(tmp_path, capsys, monkeypatch):
    path = tmp_path / "net.safetensors"
    attack, calls = loop.attack.perturb, []

    def interrupt(*args, **keywords):
        calls.append(1)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return attack(*args, **keywords)

    monkeypatch.setattr(loop.attack, "perturb", interrupt)
    stop_at = 1
    code, err = _one_line(["train", path, *TRAIN], capsys)
    assert code == 130
    assert "interrupted; nothing was written" in err
    calls.clear()
    stop_at = 5  # 40 images in batches of 16: the second step of epoch 2
    code, err = _one_line(["train", path, *TRAIN], capsys)
    assert code == 130
    assert f"interrupted; the last whole epoch is in {path}" in err
    assert training.load_checkpoint(path)[1]["epoch"] == 1
    assert os.listdir(tmp_path) == [path.name]
    calls.clear()
    stop_at = 1  # an old file is not the work of this run
    assert "nothing was written" in _one_line(["train", path, *TRAIN, "--overwrite"], capsys)[1]
    calls.clear()
    code, err = _one_line(["train", path, *TRAIN, "--resume"], capsys)
    assert f"the last whole epoch is in {path}" in err


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
    code, err = _one_line(command, capsys)
    assert code == 130
    assert err.splitlines()[-1] == "sparta: interrupted; nothing was written"
    assert not os.listdir(tmp_path)
    calls.clear()
    path = tmp_path / "found.npz"
    code, err = _one_line([*command, "--outcomes", path], capsys)
    assert code == 130
    assert err.splitlines()[-1] == f"sparta: interrupted; 16 of 40 images of net are in {path}; go on with --resume"
    assert os.listdir(tmp_path) == [path.name]
    calls.clear()
    stop_at = 0
    assert run(*command, "--outcomes", path, "--resume").exit_code == 0
    assert json.loads((tmp_path / "out.json").read_text())["results"][0]["attacked"] == 24


def test_divergence_and_full_disks_fail_with_a_message(checkpoint, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "learning_rate", lambda *_: 1e30)
        code, err = _one_line(["train", tmp_path / "net", *TRAIN], capsys)
        assert code == 1
        assert "try a lower --learning-rate" in err

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "save_json", full)
    code, err = _one_line(["evaluate", checkpoint, "--steps", 1, "--json", tmp_path / "out.json"], capsys)
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
