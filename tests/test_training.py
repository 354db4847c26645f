"""The training loop: what it feeds the network, what it stores, and that a resumed run ends bit-equal."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from sparta_kernels import data, training
from sparta_kernels.training import CheckpointError, Settings, TrainingDiverged, finished, load_checkpoint, step, train
from sparta_kernels.training.schedule import learning_rate

IMAGES = 50
pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {
    "width": 2,
    "epochs": 3,
    "batch_size": 16,
    "schedule": "one-cycle",
    "attack": "xie2019",
    "attack_steps": 2,
}


@pytest.fixture(autouse=True)
def _few_images(monkeypatch):
    """The first images of the digits: enough for a loop, and fast."""
    load = data.load
    monkeypatch.setattr(data, "load", lambda *args: tuple(part[:IMAGES] for part in load(*args)))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.safetensors"


def _stop_after(epoch):
    def on_epoch(done):
        if done.epoch == epoch:
            raise KeyboardInterrupt

    return on_epoch


@pytest.mark.parametrize("attack_name", ["xie2019", "none"])
def test_resume_is_bit_equal(tmp_path, attack_name):
    settings = Settings(**TINY | {"attack": attack_name})
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    history = train(settings, whole)
    for epoch in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            train(settings, parts, resume=epoch > 1, on_epoch=_stop_after(epoch))
        assert load_checkpoint(parts)[1]["epoch"] == epoch
        torch.rand(3)  # the global generator must not matter
    resumed = train(settings, parts, resume=True)
    expected, found = load_file(whole), load_file(parts)
    assert expected.keys() == found.keys()
    assert any(name.startswith("momentum.") for name in found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [(e.epoch, e.loss, e.error, e.clean_error) for e in resumed] == [
        (e.epoch, e.loss, e.error, e.clean_error) for e in history
    ]
    assert train(settings, parts, resume=True) == resumed  # nothing left to do


def test_an_interrupted_epoch_is_done_again(path, tmp_path):
    settings = Settings(**TINY)

    def on_batch(batch):
        if (batch.epoch, batch.number) == (2, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, path, on_batch=on_batch)
    assert load_checkpoint(path)[1]["epoch"] == 1
    train(settings, path, resume=True)
    train(settings, tmp_path / "whole.safetensors")
    expected, found = load_file(tmp_path / "whole.safetensors"), load_file(path)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(("train_images", "test_images"), [(0, 10), (1, 10), (10, 0)])
def test_data_without_images(path, monkeypatch, train_images, test_images):
    counts, load = {"train": train_images, "test": test_images}, data.load
    monkeypatch.setattr(data, "load", lambda *args: tuple(part[: counts[args[2]]] for part in load(*args)))
    with pytest.raises(ValueError, match=f"training: data must have .* got {train_images} and {test_images} of digits"):
        train(Settings(**TINY), path)
    assert not path.exists()


def test_seed_decides_the_weights(tmp_path):
    runs = []
    for number, seed in enumerate([0, 0, 1]):
        train(Settings(**TINY | {"epochs": 1, "seed": seed}), tmp_path / str(number))
        runs.append(load_file(tmp_path / str(number))["model.conv1.weight"])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_what_the_attack_is_given(path, monkeypatch):
    calls = []

    def spy(prepared, images, labels, **keywords):
        # It attacks the network as it is now, in eval mode.
        now = copy.deepcopy(prepared.model).eval()
        torch.testing.assert_close(prepared(images), now(images), rtol=1e-4, atol=1e-4)
        calls.append((images, labels, keywords))
        return images

    monkeypatch.setattr(step.attack, "perturb", spy)
    train(Settings(**TINY | {"epochs": 12, "seed": 1}), path)
    images, labels = data.load("digits")
    orders = []
    for epoch in range(1, 13):
        part = [call for call in calls if call[2]["restart"] == epoch]
        order = torch.cat([keywords["indices"] for _, _, keywords in part])
        assert sorted(order.tolist()) == list(range(IMAGES))  # every image once
        assert torch.equal(torch.cat([x for x, _, _ in part]), images[order] / 255.0)
        assert torch.equal(torch.cat([y for _, y, _ in part]), labels[order])
        assert {len(x) for x, _, _ in part} == {12, 13}  # 50 images, evenly over 4 batches of at most 16
        orders.append(tuple(order.tolist()))
    assert len(set(orders)) == 12
    keywords = [keywords for _, _, keywords in calls]
    assert {k["seed"] for k in keywords} == {1}
    assert {(k["eps"], k["steps"], k["step_size"]) for k in keywords} == {(16 / 255, 2, 8 / 255)}
    clean = sum(not k["random_start"] for k in keywords)
    assert 5 <= clean <= 15  # 20% of 48 batches


def test_standard_training_makes_no_attack(path, monkeypatch):
    monkeypatch.setattr(step.attack, "perturb", None)
    batches, epochs = [], []
    settings = Settings(**TINY | {"attack": "none", "epochs": 2})
    history = train(settings, path, on_batch=batches.append, on_epoch=epochs.append)
    assert epochs == history
    assert [(b.epoch, b.number, b.batches) for b in batches] == [(e, n, 4) for e in (1, 2) for n in (1, 2, 3, 4)]
    first = batches[:4]
    assert sum(b.images for b in first) == IMAGES
    assert history[0].loss == pytest.approx(sum(b.loss * b.images for b in first) / IMAGES)
    assert history[0].error == pytest.approx(sum(b.error * b.images for b in first) / IMAGES)


def test_training_learns(path):
    settings = Settings(width=4, epochs=12, batch_size=10, attack="none", schedule="one-cycle", learning_rate=0.1)
    history = train(settings, path)
    assert history[-1].error < 0.5 < history[0].error


def test_the_schedule_runs_over_all_epochs(path, monkeypatch):
    steps = []

    def spy(_, step, count):
        steps.append((step, count))
        return 0.01 * step

    monkeypatch.setattr(step, "learning_rate", spy)
    history = train(Settings(**TINY | {"attack": "none"}), path)
    assert steps == [(step, 4) for step in range(12)]
    assert [epoch.learning_rate for epoch in history] == pytest.approx([0.03, 0.07, 0.11])


def test_learning_rates():
    steps = Settings(schedule="milestones", milestones=(2, 3), epochs=4, learning_rate=0.5)
    assert [learning_rate(steps, i, 2) for i in range(8)] == pytest.approx(
        [0.5, 0.5, 0.5, 0.5, 0.05, 0.05, 0.005, 0.005]
    )
    cycle = Settings(schedule="one-cycle", epochs=2, learning_rate=0.8)
    rates = [learning_rate(cycle, i, 4) for i in range(8)]
    assert rates[:2] == pytest.approx([0.4, 0.8])
    assert rates[2:] == pytest.approx([0.8 * left / 7 for left in (6, 5, 4, 3, 2, 1)])
    assert learning_rate(Settings(schedule="one-cycle", epochs=1), 0, 1) == 0.1
    for epochs in range(1, 9):  # every update of every run moves the weights
        cycle = Settings(schedule="one-cycle", epochs=epochs)
        assert all(0 < learning_rate(cycle, i, 3) <= 0.1 for i in range(3 * epochs))


def test_a_loss_that_is_not_finite_stops_the_run(path, monkeypatch):
    settings = Settings(**TINY)
    with pytest.raises(KeyboardInterrupt):
        train(settings, path, on_epoch=_stop_after(1))
    good = path.read_bytes()
    monkeypatch.setattr(step, "learning_rate", lambda *_: 1e30)
    with pytest.raises(TrainingDiverged, match=r"in epoch 2, batch 2 of 4.*"):
        train(settings, path, resume=True)
    assert path.read_bytes() == good
    assert os.listdir(path.parent) == [path.name]


def test_ruined_weights_are_never_stored(path, monkeypatch):
    # The loss of the last batch is still finite; only the weights after it are not.
    rates = iter([0.0, 0.0, 0.0, float("inf")])
    monkeypatch.setattr(step, "learning_rate", lambda *_: next(rates))
    with pytest.raises(TrainingDiverged, match="is not finite after step 4 of epoch 1"):
        train(Settings(**TINY), path)
    assert not path.exists()


def test_load_checkpoint_gives_the_trained_network(path):
    settings = Settings(**TINY | {"epochs": 1, "activation": "relu", "sites": "none"})
    train(settings, path)
    model, metadata = load_checkpoint(path)
    assert not model.training
    assert metadata["settings"] == settings.as_dict()
    assert metadata["model"]["arguments"]["width"] == 2
    assert metadata["epoch"] == len(metadata["history"]) == 1
    images, labels = data.load("digits", None, "test")
    assert (model(images / 255.0).argmax(1) != labels).float().mean() == pytest.approx(
        metadata["history"][0]["clean_error"]
    )
    assert all(p.requires_grad for p in model.parameters())
    again, _ = load_checkpoint(path)
    assert torch.equal(again(images / 255.0), model(images / 255.0))


def test_interrupted_save_keeps_the_old_checkpoint(path, monkeypatch):
    settings = Settings(**TINY)

    def fail(*_):
        raise KeyboardInterrupt

    def on_epoch(done):
        monkeypatch.setattr(os, "replace", fail)

    with pytest.raises(KeyboardInterrupt):
        train(settings, path, on_epoch=on_epoch)
    assert load_checkpoint(path)[1]["epoch"] == 1
    assert os.listdir(path.parent) == [path.name]


def test_existing_and_missing_checkpoints(path, tmp_path):
    settings = Settings(**TINY | {"epochs": 1})
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        train(settings, path, resume=True)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        train(settings, tmp_path / "none" / "run.safetensors")
    train(settings, path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="exists"):
        train(settings, path)
    with pytest.raises(ValueError, match="exclude each other"):
        train(settings, path, resume=True, overwrite=True)
    with pytest.raises(CheckpointError, match=r"other settings: eps was 0\.06.* and is 0\.5"):
        train(Settings(**TINY | {"epochs": 1, "eps": 0.5}), path, resume=True)
    assert path.read_bytes() == before
    train(settings, path, overwrite=True)


@pytest.fixture
def stored(path):
    train(Settings(**TINY | {"epochs": 1}), path)
    with safe_open(str(path), framework="pt") as file:
        header = file.metadata()
    return load_file(path), header


def _with_description(header, **changes):
    return header | {"metadata": json.dumps(json.loads(header["metadata"]) | changes)}


def test_a_setting_that_a_run_does_not_know_yet_was_as_it_is_by_default(path, stored):
    tensors, header = stored
    known = {name: value for name, value in json.loads(header["metadata"])["settings"].items() if name != "precision"}
    path.write_bytes(save(tensors, _with_description(header, settings=known)))
    settings = Settings(**TINY | {"epochs": 1})
    assert finished(path, settings)
    assert not finished(path, dataclasses.replace(settings, precision="bf16"))
    assert len(train(settings, path, resume=True)) == 1


def test_damaged_files(path, stored):
    whole = path.read_bytes()
    for content in (b"", b"\x80", whole[:100], whole[:-10], whole + b"x", os.urandom(500), b"{}" * 50):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged, or not a safetensors file"):
            load_checkpoint(path)


def test_foreign_and_altered_files(path, stored):
    tensors, header = stored
    name = "model.conv1.weight"
    arguments = json.loads(header["metadata"])["model"]["arguments"]
    cases = [
        (tensors, None, "not written by"),
        (tensors, {"format": "pt"}, "not written by"),
        (tensors, header | {"format": "sparta_kernels checkpoint 2"}, "of another version .*checkpoint 2'"),
        (tensors, {"format": header["format"]}, "description is damaged"),
        (tensors, header | {"metadata": "{"}, "description is damaged"),
        (tensors, header | {"metadata": "[]"}, "description is damaged"),
        (tensors, header | {"metadata": "[" * 10**5}, "description is damaged"),
        (tensors, _with_description(header, epoch="1"), "description is damaged .*epoch"),
        (
            tensors,
            _with_description(header, model={"name": "os.system", "arguments": {}}),
            "no known network",
        ),
        (
            tensors,
            _with_description(header, model={"name": "resnet18", "arguments": {"x": 1}}),
            "no known network",
        ),
        (
            tensors,
            _with_description(header, model={"name": "resnet18", "arguments": []}),
            "description is damaged",
        ),
        (
            tensors,
            _with_description(header, model={"name": "resnet18", "arguments": arguments | {"width": 3}}),
            r"model\..* must be torch.float32",
        ),
        ({k: v for k, v in tensors.items() if k != name}, header, "missing tensor model.conv1.weight"),
        (tensors | {"model.more": torch.zeros(1)}, header, "unknown tensor model.more"),
        (tensors | {name: tensors[name].half()}, header, "model.conv1.weight must be torch.float32"),
        (tensors | {"momentum.linear.bias": torch.zeros(3)}, header, "momentum.linear.bias must be"),
    ]
    for content, metadata, words in cases:
        save_file(content, path, metadata)
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(path)
    save_file(tensors, path, _with_description(header, history=[{"epoch": 1}]))
    with pytest.raises(CheckpointError, match="history is damaged"):
        train(Settings(**TINY | {"epochs": 1}), path, resume=True)


def test_nothing_is_unpickled(path, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    for write in (lambda: path.write_bytes(pickle.dumps(Bomb())), lambda: torch.save(Bomb(), path)):
        write()
        with pytest.raises(CheckpointError):
            load_checkpoint(path)
    assert not (tmp_path / "exploded").exists()


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load_checkpoint(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="it is not a file"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("data", "imagenet", ValueError),
        ("model", "vgg", ValueError),
        ("activation", None, TypeError),
        ("sites", 3, TypeError),
        ("width", 0, ValueError),
        ("epochs", 0, ValueError),
        ("epochs", 1.5, TypeError),
        ("batch_size", 2, ValueError),
        ("learning_rate", 0, ValueError),
        ("learning_rate", float("nan"), ValueError),
        ("schedule", "step", ValueError),
        ("milestones", (0,), ValueError),
        ("milestones", ("a",), TypeError),
        ("milestones", 5, TypeError),
        ("milestones", "", TypeError),
        ("momentum", 1.0, ValueError),
        ("momentum", -0.1, ValueError),
        ("weight_decay", -1.0, ValueError),
        ("attack", "fgsm", ValueError),
        ("eps", 16, ValueError),
        ("attack_steps", 0, ValueError),
        ("seed", -1, ValueError),
        ("warmup", -1, ValueError),
        ("warmup", 90, ValueError),
        ("nesterov", 1, TypeError),
        ("label_smoothing", 1.0, ValueError),
        ("ema", 1, ValueError),
        ("precision", "fp8", ValueError),
        ("loss", "mart", ValueError),
        ("trades_beta", -1.0, ValueError),
        ("augment", "yes", TypeError),
        ("sparta_from", None, TypeError),
        ("freeze_sparta", 0, TypeError),
        ("freeze_sparta", True, ValueError),
    ],
)
def test_wrong_settings(name, value, error):
    with pytest.raises(error, match=f"{'name' if name == 'data' else name} must"):
        Settings(**{name: value})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("warmup", {"warmup": 2, "schedule": "one-cycle"}),
        ("nesterov", {"nesterov": True, "momentum": 0.0}),
        ("loss", {"loss": "trades", "attack": "none"}),
    ],
)
def test_settings_that_exclude_each_other(name, values):
    with pytest.raises(ValueError, match=f"training: {name} must be"):
        Settings(**values)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("settings", {}, TypeError),
        ("checkpoint", 3, TypeError),
        ("root", 3, TypeError),
        ("resume", 1, TypeError),
        ("overwrite", "yes", TypeError),
        ("device", "nope", ValueError),
        ("device", "meta", ValueError),
        ("device", "cuda:99", ValueError),
        ("device", 0, TypeError),
        ("save_every", 0, ValueError),
        ("save_every", "1", TypeError),
        ("robust_images", -1, ValueError),
        ("on_batch", 3, TypeError),
        ("on_epoch", 3, TypeError),
        ("on_store", 3, TypeError),
    ],
)
def test_wrong_arguments(path, monkeypatch, name, value, error):
    monkeypatch.setattr(data, "load", None)  # never reached
    arguments = {"settings": Settings(**TINY), "checkpoint": path, name: value}
    with pytest.raises(error, match=f"^train: {name} must be"):
        train(**arguments)
    assert not os.listdir(path.parent)


def test_a_checkpoint_is_loaded_onto_a_device_that_is_there(path):
    with pytest.raises(ValueError, match=r"^load_checkpoint: device must be cpu, cuda"):
        load_checkpoint(path, "nope")


def test_nothing_is_built_for_a_file_whose_tensors_do_not_fit(path, stored):
    tensors, header = stored
    arguments = json.loads(header["metadata"])["model"]["arguments"]
    # 36 TB of weights, had they been made; and sizes that no integer holds.
    for changes, words in [
        ({"width": 10**5}, "must be torch.float32"),
        ({"num_classes": 2**31 - 1}, "must be torch.float32"),
        ({"width": 2**31 - 1}, "describes no known network"),
        ({"width": 10**30}, "describes no known network"),
        ({"mean": 10**400}, "describes no known network"),
    ]:
        save_file(
            tensors, path, _with_description(header, model={"name": "resnet18", "arguments": arguments | changes})
        )
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(path)


def test_unknown_networks(path):
    with pytest.raises(ValueError, match="model must be one of"):
        training.build_model("vgg", {})
    with pytest.raises(ValueError, match="sites must"):
        train(Settings(**TINY | {"sites": "G9.B2"}), path)
    assert not path.exists()
