"""What a training step is made of: losses, averages, precisions, augmentation, schedules, transferred activations."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from sparta_kernels import attack, data, nn, training
from sparta_kernels.nn import Sparta
from sparta_kernels.nn import sparta as sparta_module
from sparta_kernels.training import CheckpointError, Settings, finished, load_checkpoint, read_run, step, train
from sparta_kernels.training.objective import Objective
from sparta_kernels.training.run import Run
from sparta_kernels.training.schedule import learning_rate

pytestmark = pytest.mark.usefixtures("one_thread", "few_images")

TINY = {"width": 2, "epochs": 1, "batch_size": 16, "attack_steps": 2, "schedule": "constant", "learning_rate": 0.05}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.safetensors"


@pytest.fixture
def attacks(monkeypatch):
    """What every attack of a run was given and made."""
    perturb, calls = attack.perturb, []

    def spy(prepared, images, labels, **keywords):
        made = perturb(prepared, images, labels, **keywords)
        calls.append((prepared, images, labels, keywords, made))
        return made

    monkeypatch.setattr(step.attack, "perturb", spy)
    return calls


def trades(model, x, y, adversarial, smoothing, beta):
    """The loss as its authors write it, with smoothed labels written out."""
    logits, other = model(x), model(adversarial)
    classes = logits.shape[1]
    wanted = F.one_hot(y, classes) * (1 - smoothing) + smoothing / classes
    natural = -(wanted * logits.log_softmax(1)).sum(1).mean()
    p, q = logits.softmax(1), other.softmax(1)
    robust = (p * (p.log() - q.log())).sum(1).mean()
    return natural + beta * robust, other


def test_a_run_of_trades_written_out(path, attacks):
    """Nesterov's momentum, weight decay, smoothing and the average, too."""
    values = {"loss": "trades", "label_smoothing": 0.1, "trades_beta": 3.0, "nesterov": True, "ema": 0.8, "seed": 4}
    settings = Settings(**TINY | values)
    batches = []
    train(settings, path, on_batch=batches.append)

    torch.manual_seed(4)
    model = training.build_model("resnet18", training.model_arguments(settings))
    momentum = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    average = None
    assert len(attacks) == len(batches) >= 3
    for (_, x, y, keywords, adversarial), batch in zip(attacks, batches, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(keywords["targets"], model.eval()(x).softmax(1), rtol=1e-3, atol=1e-4)
        assert keywords["targeted"] is False
        assert keywords["random_start"] is True  # also where the preset would start clean
        loss, logits = trades(model.train(), x, y, adversarial, 0.1, 3.0)
        assert batch.loss == pytest.approx(loss.item(), rel=1e-4)
        assert batch.error == pytest.approx((logits.argmax(1) != y).float().mean().item())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for (name, p), gradient in zip(model.named_parameters(), gradients, strict=True):
                gradient = gradient + settings.weight_decay * p
                momentum[name] = 0.9 * momentum[name] + gradient
                p -= 0.05 * (gradient + 0.9 * momentum[name])
        state = {name: value.clone() for name, value in model.state_dict().items() if value.is_floating_point()}
        average = state if average is None else {name: 0.8 * average[name] + 0.2 * state[name] for name in state}
    stored = load_file(path)
    for kind, expected in (("model", state), ("momentum", momentum), ("ema", average)):
        for name, value in expected.items():
            torch.testing.assert_close(stored[f"{kind}.{name}"], value, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(average["conv1.weight"], state["conv1.weight"], atol=1e-3)


def test_the_average_is_what_is_tested_and_loaded(path):
    settings = Settings(**TINY | {"attack": "none", "epochs": 8, "ema": 0.995, "learning_rate": 0.1, "width": 4})
    history = train(settings, path)
    stored, errors = load_file(path), {}
    images, labels = data.load("digits", None, "test")
    for weights in ("auto", "ema", "last"):
        loaded, _ = load_checkpoint(path, weights=weights)
        wanted = stored[f"{'model' if weights == 'last' else 'ema'}.linear.weight"]
        assert torch.equal(loaded.linear.weight, wanted)
        errors[weights] = (loaded(images / 255.0).argmax(1) != labels).float().mean().item()
    assert errors["last"] != errors["ema"]  # or this would show nothing
    assert history[-1].clean_error == pytest.approx(errors["ema"])


def test_weights_that_were_not_kept(path):
    train(Settings(**TINY | {"attack": "none"}), path)
    with pytest.raises(ValueError, match=r"weights must be 'auto' or 'last'.*keeps no average"):
        load_checkpoint(path, weights="ema")
    with pytest.raises(ValueError, match="weights must be one of"):
        load_checkpoint(path, weights="best")
    assert not load_checkpoint(path)[0].training


def _updates(settings, attacks, low):
    """Losses and weights of plain SGD on the images that attacks made."""
    torch.manual_seed(0)
    model = training.build_model("resnet18", training.model_arguments(settings)).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    losses = []
    for _, _, y, _, adversarial in attacks:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = F.cross_entropy(model(adversarial), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(("precision", "wanted"), [("fp32", torch.contiguous_format), ("bf16", torch.channels_last)])
def test_all_images_of_an_update_are_in_the_weights_memory_format(path, monkeypatch, precision, wanted):
    load, digits = data.load, data.DATASETS["digits"]
    monkeypatch.setattr(data, "load", lambda *args: (load(*args)[0].expand(-1, 3, -1, -1), load(*args)[1]))
    colours = dataclasses.replace(digits, shape=(3, 8, 8), mean=digits.mean * 3, std=digits.std * 3)
    monkeypatch.setitem(data.DATASETS, "digits", colours)
    forward, seen = Objective.forward, []

    def spy(self, x, labels, adversarial):
        seen.extend(images.is_contiguous(memory_format=wanted) for images in (x, adversarial))
        return forward(self, x, labels, adversarial)

    monkeypatch.setattr(Objective, "forward", spy)
    train(Settings(**TINY | {"loss": "trades", "precision": precision}), path)
    assert len(seen) >= 6
    assert all(seen)


@pytest.mark.parametrize("activation", ["sparta", "relu"])
def test_bf16(path, attacks, activation):
    settings = Settings(**TINY | {"width": 4, "precision": "bf16", "activation": activation, "learning_rate": 0.01})
    batches = []
    (epoch,) = train(settings, path, on_batch=batches.append)
    assert {call[0].precision for call in attacks} == {"bf16"}
    stored = load_file(path)
    assert {t.dtype for t in stored.values() if t.is_floating_point()} == {torch.float32}
    assert all(t.is_contiguous() for t in stored.values())
    # The same updates on the images that the attack made, in fp32 and under autocast: ours are no worse than those.
    losses, weights = zip(*(_updates(settings, attacks, low) for low in (False, True)), strict=True)
    assert [batch.loss for batch in batches] == pytest.approx(losses[0], rel=0.05)
    ours = torch.cat([stored[f"model.{name}"].flatten() for name, _ in load_checkpoint(path)[0].named_parameters()])
    exact, low = weights
    assert 0 < (ours - exact).norm() <= 2 * (low - exact).norm()
    # The errors are those of predictions in fp32.
    images, labels = data.load("digits", None, "test")
    loaded, _ = load_checkpoint(path)
    assert epoch.clean_error == pytest.approx((loaded(images / 255.0).argmax(1) != labels).float().mean().item())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_sparta_trains_without_hidden_tensors_under_autocast(memory_format, monkeypatch):
    """The path that makes them again in backward is taken, and its gradients are those of the plain composition."""
    torch.manual_seed(0)
    sparta = Sparta(8).train()
    x = torch.randn(4, 8, 16, 16).contiguous(memory_format=memory_format).requires_grad_()
    weight = torch.randn(4, 8, 16, 16)

    def gradients(low=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            (sparta(x) * weight).sum().backward()
        found = [x.grad, *(p.grad for p in sparta.parameters())]
        x.grad = None
        sparta.zero_grad()
        return torch.cat([g.flatten() for g in found])

    taken, recompute = [], sparta_module.attention_in_training
    monkeypatch.setattr(sparta_module, "attention_in_training", lambda *a: taken.append(recompute(*a)) or taken[-1])
    ours = gradients()
    assert taken[0] is not None
    monkeypatch.setattr(sparta_module, "attention_in_training", lambda *_: None)
    plain, exact = gradients(), gradients(low=False)
    assert 0 < (ours - exact).norm() <= 2 * (plain - exact).norm()


def test_precisions_that_the_device_lacks(path):
    for precision in ("tf32", "fp16"):
        with pytest.raises(ValueError, match=f"precision must be 'fp32' or 'bf16' on a CPU, got '{precision}'"):
            train(Settings(**TINY | {"precision": precision}), path)
    assert not path.exists()


def test_the_scale_of_the_loss_is_stored(path, monkeypatch):
    """fp16 needs a GPU; its scaler does not."""
    settings = Settings(**TINY | {"attack": "none"})
    run = Run(settings, torch.device("cpu"), None)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
    run.scaler.scale(torch.ones(()))
    run.store(path)
    begin = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: begin(device, enabled=True))
    again = Run(settings, torch.device("cpu"), read_run(settings, path)[0])
    assert again.scaler.get_scale() == 2.0**7


def test_augmentation_is_the_data_sets_own(path, attacks, monkeypatch):
    digits = dataclasses.replace(data.DATASETS["digits"], crop=2, flip=True)
    monkeypatch.setitem(data.DATASETS, "digits", digits)
    images, labels = data.load("digits")
    for augment in (True, False):
        attacks.clear()
        train(Settings(**TINY | {"epochs": 2, "seed": 3, "augment": augment}), path, overwrite=True)
        seen = set()
        for _, x, y, keywords, _ in attacks:
            rows, epoch = keywords["indices"], keywords["restart"]
            wanted = images[rows]
            if augment:
                wanted = data.augment(wanted, rows, seed=3, epoch=epoch, crop=2, flip=True)
            assert torch.equal(x, wanted / 255.0)
            assert torch.equal(y, labels[rows])
            seen.add(x.sum().item())
        assert len(seen) == len(attacks)


def test_robust_errors(path):
    settings = Settings(**TINY | {"epochs": 2, "seed": 2, "eps": 0.2})
    history = train(settings, path, robust_images=30)
    assert [epoch.robust_error for epoch in history] != [None, None]
    images, labels = (part[:30] for part in data.load("digits", None, "test"))
    model, metadata = load_checkpoint(path)
    assert metadata["history"][1]["robust_error"] == history[1].robust_error
    preset = attack.preset("xie2019", 0.2, 2)
    options = {"eps": preset.eps, "step_size": preset.step_size, "steps": 2, "seed": 2}
    predicted = attack.pgd(attack.prepare(model), images / 255.0, labels, **options).predictions[2]
    assert history[1].robust_error == pytest.approx((predicted != labels).float().mean().item(), abs=1 / 30 + 1e-6)
    # Standard training: the papers' test attack; all images where more are asked for than there are.
    (epoch,) = train(Settings(**TINY | {"attack": "none"}), path, overwrite=True, robust_images=10**6)
    assert 0 <= epoch.robust_error <= 1
    (epoch,) = train(Settings(**TINY | {"attack": "none"}), path, overwrite=True)
    assert epoch.robust_error is None


def test_sparta_from_another_run(path, tmp_path):
    source = tmp_path / "source.safetensors"
    train(Settings(**TINY | {"attack": "none", "seed": 9}), source)
    theirs = load_checkpoint(source)[0].state_dict()
    values = TINY | {"epochs": 2, "sparta_from": str(source), "attack": "none"}

    def stop(epoch):
        if epoch.epoch == 1:
            raise KeyboardInterrupt

    for freeze in (True, False):
        settings = Settings(**values | {"freeze_sparta": freeze})
        with pytest.raises(KeyboardInterrupt):
            train(settings, path, overwrite=True, on_epoch=stop)
        kept = source.read_bytes()
        source.unlink()  # a resumed run needs it no more
        train(settings, path, resume=True)
        source.write_bytes(kept)
        model, metadata = load_checkpoint(path)
        assert metadata["sparta_digest"] == hashlib.sha256(kept).hexdigest()
        ours = model.state_dict()
        same = {name: torch.equal(ours[name], theirs[name]) for name in ours if ".act2." in name}
        assert same["layer1.1.act2.conv3.weight"] is freeze
        assert all(same.values()) is freeze
        assert not torch.equal(ours["conv1.weight"], theirs["conv1.weight"])
        whole = tmp_path / f"whole-{freeze}.safetensors"
        train(settings, whole)
        expected, found = load_file(whole), load_file(path)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert any(name.startswith("momentum.layer1.1.act2") for name in found) is not freeze
    with pytest.raises(ValueError, match="transfer: model must have SPARTA"):
        train(Settings(**values | {"sites": "G1.B1"}), tmp_path / "other.safetensors")


def test_finished(path):
    settings = Settings(**TINY | {"attack": "none", "epochs": 2})
    assert not finished(path, settings)

    def stop(epoch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, path, on_epoch=stop)
    assert not finished(path, settings)
    train(settings, path, resume=True)
    assert finished(path, settings)
    assert not finished(path, dataclasses.replace(settings, seed=1))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged"):
        finished(path, settings)
    with pytest.raises(TypeError, match="settings must be"):
        finished(path, {})


def test_learning_rates():
    def rates(**values):
        settings = Settings(**{"epochs": 4, "learning_rate": 0.8, "milestones": (2, 3)} | values)
        return [learning_rate(settings, i, 2) for i in range(8)]

    assert rates(schedule="constant") == pytest.approx([0.8] * 8)
    assert rates(schedule="constant", warmup=2) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8, 0.8])
    assert rates(schedule="milestones", warmup=1) == pytest.approx([0.4, 0.8, 0.8, 0.8, 0.08, 0.08, 0.008, 0.008])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.8)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    cosine = []
    for _ in range(8):
        cosine.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert rates(schedule="cosine") == pytest.approx(cosine)
    warm = rates(schedule="cosine", warmup=2)
    assert warm[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    assert warm[6] == pytest.approx(0.4)
    assert all(rate > 0 for rate in warm)


def test_a_resnet_of_every_activation_trains(path):
    """One step each: nothing that a checkpoint needs is missing."""
    for name in nn.ACTIVATIONS:
        settings = Settings(**TINY | {"attack": "none", "activation": name, "batch_size": 1000})
        train(settings, path, overwrite=True)
        stored = load_file(path)
        parameters = dict(load_checkpoint(path)[0].named_parameters())
        assert {key.removeprefix("momentum.") for key in stored if key.startswith("momentum.")} == set(parameters)
