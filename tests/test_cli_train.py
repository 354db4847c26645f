"""`sparta train`: what it prints and keeps, its configuration files, and that wrong calls leave nothing."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from terminal import TRAIN, one_line, run, store_network

from sparta_kernels import data, training
from sparta_kernels.processes import Processes
from sparta_kernels.training import step

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

pytestmark = pytest.mark.usefixtures("one_thread", "few_images")

STANDARD = [*TRAIN, "--attack", "none"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return store_network(tmp_path_factory.mktemp("stored"))


def _rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---- what it prints and keeps --------------------------------------------------------------------------------


def test_train_and_resume(tmp_path):
    path = tmp_path / "net.safetensors"
    arguments = ["train", path, *TRAIN, "--eps", "8/255", "--seed", 3, "--robust-images", 8]
    result = run(*arguments, "--json", tmp_path / "train.json")
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    shape = r"epoch \d  loss \d\.\d+  robust training error \d+\.\d%  robust test error \d+\.\d%  "
    shape += r"clean test error \d+\.\d%  [\d.]+ images/s"
    assert [line[:7] for line in lines if re.fullmatch(shape, line)] == ["epoch 1", "epoch 2"], result.stderr
    assert re.search(r"2 epochs, robust test error [\d.]+%, clean test error", result.stdout), result.stdout
    saved = json.loads((tmp_path / "train.json").read_text())
    _, metadata = training.load_checkpoint(path)
    assert saved["results"]["history"] == metadata["history"]
    assert saved["settings"] == metadata["settings"]
    assert metadata["settings"]["eps"] == 8 / 255
    assert (saved["seed"], saved["settings"]["width"], saved["settings"]["milestones"]) == (3, 2, [30, 60])
    assert sorted(os.listdir(tmp_path)) == ["net.csv", "net.safetensors", "net.toml", "train.json"]

    table = (tmp_path / "net.csv").read_bytes()
    rows = _rows(tmp_path / "net.csv")
    assert [int(row["epoch"]) for row in rows] == [1, 2]
    for row, epoch in zip(rows, metadata["history"], strict=True):
        assert {name: float(value) for name, value in row.items()} == epoch  # bit for bit
    (tmp_path / "net.csv").unlink()
    assert run(*arguments, "--resume").exit_code == 0
    assert (tmp_path / "net.csv").read_bytes() == table
    assert run("train", path, *TRAIN, "--overwrite", "--attack", "none", "--milestones", "1,2").exit_code == 0
    assert training.load_checkpoint(path)[1]["settings"]["milestones"] == [1, 2]
    assert [row["robust_error"] for row in _rows(tmp_path / "net.csv")] == ["", ""]


@pytest.fixture
def asked(monkeypatch):
    """What `train` was called with, instead of a run."""
    calls = []

    def stub(settings, path, **options):
        calls.append((settings, path, options))
        return [training.Epoch(1, 2.0, 0.5, 0.5, 100.0, 0.1)]

    monkeypatch.setattr(training, "train", stub)
    return calls


def test_the_defaults_are_the_papers_settings(tmp_path, asked):
    assert run("train", tmp_path / "net").exit_code == 0
    [(settings, path, options)] = asked
    assert (settings, path) == (training.Settings(), tmp_path / "net")
    assert (options["save_every"], options["robust_images"], options["resume"]) == (600, 0, False)


def test_every_setting_has_an_option(tmp_path, asked):
    values = {
        "model": "resnet34",
        "activation": "sparta:share=2",
        "sites": "G1.B2",
        "width": 3,
        "epochs": 5,
        "batch_size": 7,
        "learning_rate": 0.25,
        "schedule": "cosine",
        "milestones": (4, 5),
        "warmup": 2,
        "momentum": 0.5,
        "nesterov": True,
        "weight_decay": 0.125,
        "ema": 0.75,
        "label_smoothing": 0.1,
        "loss": "trades",
        "trades_beta": 5.5,
        "precision": "bf16",
        "augment": False,
        "attack": "sparta",
        "eps": 0.03,
        "attack_steps": 3,
        "seed": 11,
    }
    flags = {"nesterov": ["--nesterov"], "augment": ["--no-augment"], "milestones": ["--milestones", "4,5"]}
    names = {field.name for field in dataclasses.fields(training.Settings)}
    assert set(values) == names - {"data", "sparta_from", "freeze_sparta"}  # the last two are with the transfer
    assert all(getattr(training.Settings(), name) != value for name, value in values.items())
    arguments = [flags.get(name, ["--" + name.replace("_", "-"), value]) for name, value in values.items()]
    result = run("train", tmp_path / "net", *(word for words in arguments for word in words), "--save-every", 0)
    assert result.exit_code == 0, result.output
    [(settings, _, options)] = asked
    assert dataclasses.asdict(settings) == {**dataclasses.asdict(training.Settings()), **values}
    assert options["save_every"] is None


def test_help_groups_the_options():
    text = run("train", "--help").stdout
    headings = re.findall(r"^(\w[\w ]+):$", text, flags=re.MULTILINE)
    assert headings[2:] == [
        "Images",
        "The network",
        "Learning",
        "The loss",
        "The attack",
        "The machine",
        "What is stored and shown",
    ]
    assert text.index("The network:") < text.index("--sites") < text.index("Learning:") < text.index("--epochs")


# ---- the configuration ---------------------------------------------------------------------------------------


def test_the_stored_configuration_repeats_the_run(tmp_path):
    path, again = tmp_path / "net.safetensors", tmp_path / "again"
    assert run("train", path, *STANDARD, "--eps", "3/255", "--save-every", 5, "--no-augment").exit_code == 0
    entries = tomllib.loads((tmp_path / "net.toml").read_text())
    wanted = training.load_checkpoint(path)[1]["settings"]
    assert {name: entries[name] for name in wanted} == wanted
    run_only = {"device": "cpu", "backend": "auto", "robust_images": 0, "save_every": 5}
    assert {name: value for name, value in entries.items() if name not in wanted} == run_only
    result = run("train", again, "--config", tmp_path / "net.toml")
    assert result.exit_code == 0, result.output
    assert training.load_checkpoint(again)[1]["settings"] == wanted
    assert (tmp_path / "again.toml").read_text() == (tmp_path / "net.toml").read_text()
    # Its own is as good, and stays as it is.
    before = (tmp_path / "net.toml").read_text() + "# a note\n"
    (tmp_path / "net.toml").write_text(before)
    for more in (["--resume"], ["--overwrite"]):
        result = run("train", path, "--config", tmp_path / "net.toml", *more)
        assert result.exit_code == 0, result.output
        assert (tmp_path / "net.toml").read_text() == before


def test_options_go_before_the_file(tmp_path):
    config = tmp_path / "run.toml"
    config.write_text(
        'width = 2\nepochs = 3\nattack = "none"\neps = "4/255"\nnesterov = true\naugment = false\n'
        "milestones = []\nbatch_size = 16\nlearning_rate = 1e-2\n"
    )
    arguments = ["train", tmp_path / "net", "--epochs", 1, "--augment", "--config", config, "--no-nesterov"]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    settings = training.load_checkpoint(tmp_path / "net")[1]["settings"]
    wanted = {"width": 2, "epochs": 1, "eps": 4 / 255, "nesterov": False, "augment": True, "milestones": []}
    wanted |= {"learning_rate": 0.01, "batch_size": 16}
    assert {name: settings[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("widht = 2", "'--config': {tmp}/run.toml: unknown entry widht; did you mean width?"),
        ("learning-rate = 2", "unknown entry learning-rate; did you mean learning_rate?"),
        ("qqq = 2", "unknown entry qqq; allowed are activation, attack,"),
        ("resume = true", "unknown entry resume"),
        ("json = 'x'", "unknown entry json"),
        ("config = 'x'", "unknown entry config"),
        ("[width]\nx = 1", "width must be a string, a number, true or false, or a list of them, got dict"),
        ("eps = 2020-01-01", "eps must be a string, a number, true or false, or a list of them, got date"),
        ("width = ", "no TOML ("),
        ("width = 2\nwidth = 3", "no TOML ("),
        ("width = 2.5", "{tmp}/run.toml: width must be an integer, got 2.5"),
        ("width = [2]", "width must be an integer, got [2]"),
        ("width = true", "width must be an integer, got True"),
        ("width = 'x'", "--width"),
        ("threads = 1.0", "threads must be an integer, got 1.0"),
        ("momentum = [0.5]", "momentum must be a number, got [0.5]"),
        ("momentum = false", "momentum must be a number, got False"),
        ("augment = 1", "augment must be true or false, got 1"),
        ("log_dir = true", "log_dir must be a string, got True"),
        ("root = 0", "root must be a string, got 0"),
        ("data = ['digits']", "data must be a string, got ['digits']"),
        ("eps = true", "eps must be a number, a string or a list, got True"),
        ("width = 0", "--width"),
        ("augment = 'perhaps'", "--augment"),
        ("momentum = 1", "--momentum: must be at least 0 and below 1"),
        ("eps = nan", "--eps"),
        ("milestones = ['x']", "--milestones"),
        ("milestones = [0]", "--milestones"),
        ("activation = 'sparta:size=3'", "--activation"),
    ],
)
def test_wrong_configurations(tmp_path, capsys, text, words):
    (tmp_path / "run.toml").write_text(text)
    code, err = one_line(["train", tmp_path / "net", "--config", tmp_path / "run.toml"], capsys)
    assert code == 2, err
    assert words.format(tmp=tmp_path) in err
    assert err.count("\n") == 1
    assert os.listdir(tmp_path) == ["run.toml"]


def test_a_configuration_is_not_lost(tmp_path, capsys, checkpoint):
    net, toml = tmp_path / "net.safetensors", tmp_path / "net.toml"
    toml.write_text("width = 2 # mine\n")
    before = toml.read_bytes()
    (tmp_path / "no.toml").write_bytes(b"\xff")
    for arguments, words in [
        ([net, "--config", toml], f"--config: the run's whole configuration would go into {toml}; name the checkpoint"),
        ([net, "--config", toml, "--overwrite"], "--config: the run's whole configuration would go"),
        ([net], f"CHECKPOINT: {toml} exists; add --resume or --overwrite"),
        ([tmp_path / "new", "--config", tmp_path / "none"], "/none: No such file or directory"),
        ([tmp_path / "new", "--config", tmp_path], f"'--config': cannot read {tmp_path}: Is a directory"),
        ([tmp_path / "new", "--config", tmp_path / "no.toml"], "no.toml: no TOML"),
        ([toml, "--config", toml, "--overwrite"], "CHECKPOINT: must not be the file of --config"),
        ([tmp_path / "new", "--config", toml, "--json", toml], "--json: must not be the file of --config"),
    ]:
        code, err = one_line(["train", *arguments], capsys)
        assert code == 2, arguments
        assert words in err
        assert err.count("\n") == 1
    assert toml.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["net.toml", "no.toml"]


# ---- wrong calls ---------------------------------------------------------------------------------------------

WRONG = [
    ("--data", "imagenet"),
    ("--model", "vgg"),
    ("--activation", "tanhh"),
    ("--activation", "sparta:size=3"),
    ("--sites", "G9.B2"),
    ("--width", "0"),
    ("--width", "4097"),
    ("--width", "100000000"),
    ("--epochs", "0"),
    ("--epochs", "many"),
    ("--batch-size", "1"),
    ("--learning-rate", "0"),
    ("--learning-rate", "nan"),
    ("--schedule", "step"),
    ("--milestones", "1,x"),
    ("--milestones", "0"),
    ("--warmup", "-1"),
    ("--warmup", "90"),
    ("--momentum", "1"),
    ("--weight-decay", "-1"),
    ("--ema", "1"),
    ("--loss", "mart"),
    ("--trades-beta", "-1"),
    ("--label-smoothing", "1"),
    ("--precision", "fp8"),
    ("--precision", "tf32"),
    ("--attack", "fgsm"),
    ("--eps", "16"),
    ("--eps", "1/0"),
    ("--eps", "x"),
    ("--eps", "nan"),
    ("--attack-steps", "0"),
    ("--robust-images", "-1"),
    ("--save-every", "-1"),
    ("--save-every", "soon"),
    ("--save-every", "nan"),
    ("--save-every", "inf"),
    ("--log-dir", "{tmp}/none/logs"),
    ("--log-dir", "/proc/logs"),
    ("--sparta-from", "{tmp}/none"),
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
    ("--json", "{tmp}/net.csv"),
    ("--json", "{tmp}/net.toml"),
    ("--json", "{tmp}/../{tmp.name}/net.safetensors"),
    ("--unknown", "1"),
]


@pytest.mark.parametrize(("option", "value"), WRONG)
def test_wrong_arguments(tmp_path, capsys, option, value):
    arguments = ["train", tmp_path / "net.safetensors", "--width", "2", option, value.format(tmp=tmp_path)]
    code, err = one_line(arguments, capsys)
    assert code == 2, err
    assert option in err
    assert err.count("\n") == 1
    assert err.startswith("sparta: ")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["--warmup", 1, "--schedule", "one-cycle"], "--warmup"),
        (["--nesterov", "--momentum", 0], "--nesterov"),
        (["--loss", "trades", "--attack", "none"], "--loss"),
        (["--freeze-sparta"], "--freeze-sparta"),
    ],
)
def test_options_that_exclude_each_other(tmp_path, capsys, arguments, option):
    code, err = one_line(["train", tmp_path / "net", *arguments], capsys)
    assert code == 2
    assert f"Invalid value for {option}: must be" in err
    assert not os.listdir(tmp_path)


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
    assert not os.listdir(tmp_path)
    calls.clear()
    stop_at = 5  # the second step of epoch 2
    code, err = one_line(["train", path, *TRAIN], capsys)
    assert code == 130
    assert err.endswith(f"interrupted; {path} holds 1 epoch and 1 step of the next; go on with --resume\n")
    assert training.read_metadata(path)["position"]["step"] == 1
    assert sorted(os.listdir(tmp_path)) == ["net.csv", path.name, "net.toml"]
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    calls.clear()
    stop_at = 1  # an old file is not the work of this run
    assert "nothing was written" in one_line(["train", path, *TRAIN, "--overwrite"], capsys)[1]
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    calls.clear()
    code, err = one_line(["train", path, *TRAIN, "--resume"], capsys)
    assert f"interrupted; {path} holds 1 epoch and 1 step of the next" in err
    assert run("train", path, *TRAIN, "--resume").exit_code == 0
    assert [row["epoch"] for row in _rows(tmp_path / "net.csv")] == ["1", "2"]
    assert (tmp_path / "net.csv").read_text().startswith(before["net.csv"].decode())


def test_divergence_keeps_the_last_good_epoch(tmp_path, capsys, monkeypatch):
    path, rate = tmp_path / "net", step.learning_rate

    def too_high(settings, done, steps):
        return 1e30 if done >= steps else rate(settings, done, steps)

    monkeypatch.setattr(step, "learning_rate", too_high)
    code, err = one_line(["train", path, *TRAIN], capsys)
    assert code == 1
    assert err.count("\n") == 2  # the first epoch's, and this
    assert "try a lower --learning-rate" in err
    assert training.load_checkpoint(path)[1]["epoch"] == 1


def test_a_run_that_diverges_at_once_leaves_nothing_in_the_way(tmp_path, capsys, monkeypatch):
    path = tmp_path / "net.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(step, "learning_rate", lambda *_: 1e30)
        code, err = one_line(["train", path, *TRAIN, "--learning-rate", 2], capsys)
    assert (code, "try a lower --learning-rate" in err) == (1, True)
    assert not os.listdir(tmp_path)
    assert run("train", path, *TRAIN).exit_code == 0
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert sorted(before) == ["net.csv", "net.safetensors", "net.toml"]
    monkeypatch.setattr(step, "learning_rate", lambda *_: 1e30)  # and the files of an older run stay whole
    assert one_line(["train", path, *TRAIN, "--learning-rate", 2, "--overwrite"], capsys)[0] == 1
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_the_files_of_an_older_run_go_with_its_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    assert run("train", path, *TRAIN).exit_code == 0
    perturb, calls = step.attack.perturb, []

    def interrupt(*args, **keywords):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return perturb(*args, **keywords)

    monkeypatch.setattr(step.attack, "perturb", interrupt)
    assert run("train", path, *TRAIN, "--seed", 7, "--overwrite").exit_code == 130
    assert training.read_metadata(path)["settings"]["seed"] == 7
    assert tomllib.loads((tmp_path / "net.toml").read_text())["seed"] == 7
    assert _rows(tmp_path / "net.csv") == []


def test_a_longer_run(tmp_path, capsys):
    path, constant = tmp_path / "net.safetensors", [*STANDARD, "--schedule", "constant"]
    assert run("train", path, *constant, "--epochs", 1).exit_code == 0
    (tmp_path / ".net.safetensors.0a1b2c3d.tmp").write_bytes(b"of a run that was killed")
    result = run("train", path, *constant, "--epochs", 2, "--resume")
    assert result.exit_code == 0, result.output
    assert [row["epoch"] for row in _rows(tmp_path / "net.csv")] == ["1", "2"]
    assert tomllib.loads((tmp_path / "net.toml").read_text())["epochs"] == 2
    assert sorted(os.listdir(tmp_path)) == ["net.csv", "net.safetensors", "net.toml"]
    code, err = one_line(["train", path, *constant, "--epochs", 1, "--resume"], capsys)
    assert (code, "it can only be raised" in err, err.count("\n")) == (2, True, 1)


# ---- transfer, events, several processes ---------------------------------------------------------------------


def test_transfer_and_events(tmp_path, checkpoint, capsys):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    path, logs = tmp_path / "net", tmp_path / "logs"
    transfer = ["--model", "resnet34", "--sparta-from", checkpoint]
    result = run("train", path, *STANDARD, *transfer, "--freeze-sparta", "--log-dir", logs, "--ema", 0.5)
    assert result.exit_code == 0, result.output
    theirs, ours = (training.load_checkpoint(file)[0].layer4[1].act2.state_dict() for file in (checkpoint, path))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert (logs / "metrics.csv").read_bytes() == (tmp_path / "net.csv").read_bytes()
    events = accumulator.EventAccumulator(str(logs)).Reload()
    assert [event.step for event in events.Scalars("batch/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("epoch/clean_error")] == [3, 6]

    last, average = (
        run("evaluate", path, "--weights", weights, "--steps", 1, "--json", "-") for weights in ("last", "ema")
    )
    last, average = (json.loads(result.stdout)["results"][0] for result in (last, average))
    assert last["loss_mean"] != average["loss_mean"]
    code, err = one_line(["evaluate", checkpoint, "--weights", "ema"], capsys)
    assert code == 2
    assert "--weights: must be 'auto' or 'last'" in err
    code, err = one_line(["evaluate", checkpoint, "--weights", "best"], capsys)
    assert "--weights: must be one of 'auto', 'last', 'ema'" in err

    for arguments, words in [
        (["--width", 3], f"--sparta-from: must have channels 2 at G1.B2, as {checkpoint} has, got 3"),
        (["--sites", "G1.B2"], f"--sparta-from: must have SPARTA where {checkpoint} has"),
        (["--activation", "relu"], f"--sparta-from: must have SPARTA where {checkpoint} has"),
        (["--log-dir", logs], f"--log-dir: {logs / 'metrics.csv'} exists"),
        (["--log-dir", tmp_path / "net.csv"], "--log-dir: must be a folder"),
        (["--json", checkpoint], "--json: must not be the file of --sparta-from"),
    ]:
        code, err = one_line(["train", tmp_path / "new", "--width", 2, *transfer, *arguments], capsys)
        assert code == 2
        assert words in err
    assert not (tmp_path / "new").exists()


def test_what_only_the_images_tell_is_about_an_option_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Processes, "count", 9, raising=False)
    monkeypatch.setattr(Processes, "__init__", lambda *_: None)
    monkeypatch.setattr(Processes, "rank", 0, raising=False)
    code, err = one_line(["train", tmp_path / "net", *STANDARD], capsys)
    assert code == 2
    assert err.startswith("sparta: Invalid value for --batch-size: must give each of the 9 processes at least 2 images")
    assert not os.listdir(tmp_path)


def test_two_processes_write_and_speak_as_one(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = ["sparta_kernels.cli", "train", "net", "--width", "2", "--epochs", "1", "--batch-size", "720"]
    options = ["--attack", "none", "--threads", "1", "--json", "net.json", "--log-dir", "logs"]
    result = subprocess.run([*torchrun, *command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("net: 1 epoch,") == 1
    assert result.stderr.count("clean test error") == 1
    assert "UserWarning" not in result.stderr
    assert sorted(os.listdir(tmp_path)) == ["logs", "net", "net.csv", "net.json", "net.toml"]
    assert len(os.listdir(tmp_path / "logs")) == 2  # one file of events
    assert len(_rows(tmp_path / "net.csv")) == 1
    history = json.loads((tmp_path / "net.json").read_text())["results"]["history"]
    assert history == training.read_metadata(tmp_path / "net")["history"]
