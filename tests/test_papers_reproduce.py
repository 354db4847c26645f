"""`sparta reproduce`: whole tables on digits in the quick plan, stopping and going on, and wrong calls."""

from __future__ import annotations

import csv
import json
import os
import re

import pytest
from terminal import one_line, run

from sparta_kernels import data, papers, training
from sparta_kernels.papers import work as real_work
from sparta_kernels.papers.experiments import QUICK_LABEL

SMALL = ["--quick", "--epochs", 1, "--batch-size", 200]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def trained(monkeypatch):
    """The settings of every network that is trained meanwhile."""
    seen = []
    train = training.train

    def counted(settings, *arguments, **options):
        seen.append(settings)
        return train(settings, *arguments, **options)

    monkeypatch.setattr(training, "train", counted)
    return seen


@pytest.fixture
def few_images(monkeypatch):
    load = data.load
    monkeypatch.setattr(data, "load", lambda *args: tuple(part[:30] for part in load(*args)))


@pytest.fixture
def short_attack(monkeypatch):
    """Three steps instead of fifty, on all of the few images."""
    quick = papers.quick_plan
    monkeypatch.setattr(
        papers, "quick_plan", lambda **given: quick(**{"report_at": (1, 2, 3), "width": 2, "images": 30, **given})
    )


def test_table6_then_figure3_share_their_runs(tmp_path, trained, monkeypatch):
    """The quick plan with one epoch and fewer images, to be quicker still: 28 networks, then 2 more for the figure."""
    load, plan = data.load, papers.quick_plan
    monkeypatch.setattr(data, "load", lambda *args: tuple(part[:400] for part in load(*args)))
    monkeypatch.setattr(papers, "quick_plan", lambda **given: plan(**{"width": 4, "images": 60, **given}))
    result = run("reproduce", "table6", *SMALL, "--out", tmp_path, "--json", tmp_path / "table6.json")
    assert result.exit_code == 0, result.output
    assert len(trained) == 28
    assert all(settings.data == "digits" for settings in trained)
    for words in (QUICK_LABEL, QUICK_LABEL.upper(), "ours", "paper", "difference", "11.87", "22.09", "G1234.B2"):
        assert words in result.stdout, words
    assert re.search(r"run 28/28 \S+: .*ETA 0:", result.stderr)
    quick = tmp_path / "quick"
    page = (quick / "table6.md").read_text()
    assert f"**{QUICK_LABEL[0].upper()}{QUICK_LABEL[1:]}.**" in page
    assert "(table6.png)" in page
    assert "Swish in Table 5" in page
    assert (quick / "table6.png").read_bytes()[:4] == b"\x89PNG"
    lines = list(csv.DictReader((quick / "table6.csv").open()))
    assert len(lines) == 14 * 6
    assert {line["note"] for line in lines} == {QUICK_LABEL}
    assert all(
        float(line["difference"]) == pytest.approx(float(line["ours"]) - float(line["paper"]), abs=1e-3)
        for line in lines
    )
    assert len({line["ours"] for line in lines if line["column"] == "PGD-50"}) > 7  # networks, not one over and over
    rows = json.loads((tmp_path / "table6.json").read_text())["results"][0]["rows"]
    for row in rows:
        assert row["pgd10"]["ours"] <= row["pgd50"]["ours"] + 10, "fifty steps are no weaker than ten"

    again = run("reproduce", "table6", *SMALL, "--out", tmp_path)
    assert again.exit_code == 0, again.output
    assert len(trained) == 28, "the second time nothing is left to train"
    assert again.stdout == result.stdout

    figure = run("reproduce", "figure3", *SMALL, "--out", tmp_path)
    assert figure.exit_code == 0, figure.output
    assert [(settings.activation, settings.attack) for settings in trained[28:]] == [
        ("sparta-static", "none"),
        ("sparta-static", "xie2019"),
    ]
    assert QUICK_LABEL in figure.stdout
    assert (quick / "figure3.png").read_bytes()[:4] == b"\x89PNG"
    label, heads, *series = csv.reader((quick / "figure3.csv").open())
    assert QUICK_LABEL in label[0]
    assert len(heads) == 1 + 6 * 2
    assert [int(row[0]) for row in series] == list(range(51))
    for column in range(1, 13, 2):
        assert float(series[-1][column]) < float(series[0][column]), "the attack brings the loss down"

    maps = run("reproduce", "figure1", *SMALL, "--out", tmp_path)
    assert maps.exit_code == 0, maps.output
    assert len(trained) == 30, "Figure 1 is about networks of Table 6"
    assert (quick / "figure1.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list(csv.reader((quick / "figure1.csv").open()))) == 2 + 4


def test_transfer_takes_sparta_from_the_other_network_and_leaves_it(tmp_path, trained, few_images, short_attack):
    result = run("reproduce", "table9", "--quick", "--epochs", 1, "--out", tmp_path, "--only", "*-from-svhn-*")
    assert result.exit_code == 0, result.output
    source, target = trained
    assert (source.sparta_from, source.freeze_sparta, source.seed) == ("", False, 1000)
    assert (target.freeze_sparta, target.seed) == (True, 0)
    assert "svhn-resnet18-sparta-adversarial" in target.sparta_from
    lines = list(csv.DictReader((tmp_path / "quick" / "table9.csv").open()))
    known = {(line["group"], line["label"]) for line in lines if line["ours"]}
    assert known == {("CIFAR-10", "SPARTA from SVHN"), ("SVHN", "SPARTA")}, "the run asked for, and its source"
    assert "-" in result.stdout


def test_stopped_anywhere_the_same_command_goes_on(tmp_path, monkeypatch, few_images, short_attack):
    command = ["reproduce", "table5", "--quick", "--epochs", 2, "--out", tmp_path]
    listed = run(*command, "--list")
    assert listed.exit_code == 0, listed.output
    assert "missing" in listed.stdout
    assert not tmp_path.joinpath("quick").exists(), "a list writes nothing"

    train = training.train

    def interrupted(settings, path, *, on_batch, **options):
        def stop(batch):
            on_batch(batch)
            if batch.epoch == stop_in:
                raise KeyboardInterrupt

        return train(settings, path, on_batch=stop, **options)

    monkeypatch.setattr(training, "train", interrupted)
    stop_in = 1
    assert run(*command).exit_code == 130
    assert "in its first epoch" in run(*command, "--list").stdout
    stop_in = 2
    result = run(*command)
    assert result.exit_code == 130
    assert "interrupted; 0 of 3 runs are done, and the same command goes on" in result.stderr
    assert "epoch 1 of 2" in run(*command, "--list").stdout

    monkeypatch.setattr(training, "train", train)
    stopped = run(*command, "--only", "*swish-adversarial")
    assert stopped.exit_code == 0, stopped.output
    assert "goes on after epoch 1" in stopped.stderr
    straight = run(
        "reproduce", "table5", "--quick", "--epochs", 2, "--out", tmp_path / "other", "--only", "*swish-adversarial"
    )
    assert straight.exit_code == 0, straight.output
    assert (tmp_path / "quick" / "table5.csv").read_text() == (tmp_path / "other" / "quick" / "table5.csv").read_text()

    report = run(*command, "--report-only")
    assert report.exit_code == 0, report.output
    assert not re.search(r"run \d+/", report.stderr)
    assert "done" in run(*command, "--list").stdout


def test_a_folder_that_was_moved_goes_on(tmp_path, monkeypatch, few_images, short_attack):
    def command(out):
        return ["reproduce", "table9", "--quick", "--epochs", 2, "--out", out, "--only", "*-from-svhn-*"]

    train = training.train

    def interrupted(settings, path, *, on_batch, **options):
        def stop(batch):
            on_batch(batch)
            if settings.sparta_from and batch.epoch == 2:
                raise KeyboardInterrupt

        return train(settings, path, on_batch=stop, **options)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train", interrupted)
        assert run(*command(tmp_path / "one")).exit_code == 130
    (tmp_path / "one").rename(tmp_path / "two")
    result = run(*command(tmp_path / "two"))
    assert result.exit_code == 0, result.output
    assert "goes on after epoch 1" in result.stderr


def test_a_full_disk_is_not_the_data_s_fault(tmp_path, monkeypatch, capsys, few_images, short_attack):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    command = ["reproduce", "table5", "--quick", "--epochs", 1, "--out", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(training, "train", full)
        status, err = one_line(command, capsys)
    assert (status, err.splitlines()[-1]) == (1, "sparta: [Errno 28] No space left on device")
    monkeypatch.setattr(training, "train", lambda *_, **__: (_ for _ in ()).throw(data.DataError("digits: damaged")))
    status, err = one_line(command, capsys)
    assert (status, err.splitlines()[-1]) == (2, "sparta: Invalid value for --data-root: digits: damaged")


def test_seeds_give_mean_and_deviation(tmp_path, trained, few_images, short_attack):
    command = ["reproduce", "table5", "--quick", "--epochs", 1, "--out", tmp_path, "--seed", 5]
    result = run(*command, "--seeds", 2, "--only", "*-swish-adversarial-seed*")
    assert result.exit_code == 0, result.output
    assert [settings.seed for settings in trained] == [5, 6]
    assert "mean and standard deviation over seeds 5 to 6" in result.stdout
    assert re.search(r"\d+\.\d\d ±\d+\.\d\d", result.stdout)
    line = next(line for line in csv.DictReader((tmp_path / "quick" / "table5.csv").open()) if line["label"] == "Swish")
    alone = run(*command, "--only", "*-swish-adversarial-seed5")
    assert alone.exit_code == 0, alone.output
    assert len(trained) == 2, "the first seed's run is shared"
    assert float(line["ours_std"]) >= 0


def test_a_run_that_another_process_has_is_left_to_it(tmp_path, monkeypatch, few_images, short_attack):
    def elsewhere(runs, wanted, **options):
        with runs.claimed(next(iter(wanted))):
            return real_work(runs, wanted, **options)

    monkeypatch.setattr(papers, "work", elsewhere)
    result = run("reproduce", "table5", "--quick", "--epochs", 1, "--out", tmp_path, "--only", "*-swish-adversarial")
    assert result.exit_code == 1
    name = "digits-for-cifar10-resnet18-swish-adversarial"
    assert re.search(rf"{name}: .*{name}.*/run is in use by process {os.getpid()} on \S+\n", result.stderr)


def test_a_run_that_diverges_is_told_and_the_others_go_on(tmp_path, monkeypatch, few_images, short_attack):
    train = training.train

    def diverging(settings, *arguments, **options):
        if settings.activation == "swish":
            raise training.TrainingDiverged("training: the loss is nan")
        return train(settings, *arguments, **options)

    monkeypatch.setattr(training, "train", diverging)
    result = run("reproduce", "table5", "--quick", "--epochs", 1, "--out", tmp_path)
    assert result.exit_code == 1
    assert "swish-adversarial: training: the loss is nan" in result.stderr
    lines = list(csv.DictReader((tmp_path / "quick" / "table5.csv").open()))
    assert [bool(line["ours"]) for line in lines] == 3 * [False] + 6 * [True]


def test_a_picture_of_other_runs_is_not_shown(tmp_path):
    folder = tmp_path / "quick"
    folder.mkdir()
    (folder / "figure1.png").write_bytes(b"by another plan")
    result = run("reproduce", "figure1", "--quick", "--report-only", "--out", tmp_path)
    assert result.exit_code == 0
    assert not (folder / "figure1.png").exists()
    assert ".png" not in result.output + (folder / "figure1.md").read_text()


WRONG = [
    (["table1"], "EXPERIMENTS", "table2"),
    (["table2"], "--data-root", "sparta data fetch cifar10"),
    (["table7"], "--data-root", "svhn"),
    (["table2", "--quick", "--epochs", "0"], "--epochs", "1"),
    (["table2", "--quick", "--batch-size", "2"], "--batch-size", ""),
    (["table2", "--quick", "--attack", "fgsm"], "--attack", "fgsm"),
    (["table2", "--quick", "--precision", "fp8"], "--precision", "fp8"),
    (["table2", "--quick", "--seeds", "0"], "--seeds", ""),
    (["table2", "--quick", "--only", "vgg*"], "--only", "--list"),
    (["table2", "--quick", "--device", "tpu"], "--device", "tpu"),
    (["table2", "--quick", "--backend", "magic"], "--backend", "magic"),
]


@pytest.mark.parametrize(
    ("arguments", "option", "words"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else None
)
def test_wrong_calls_have_one_line_that_names_the_option(arguments, option, words, tmp_path, capsys):
    status, err = one_line(["reproduce", *arguments, "--out", tmp_path / "out"], capsys)
    assert status == 2
    assert len(err.strip().splitlines()) == 1, err
    assert option in err
    assert words in err


def test_wrong_folders(tmp_path, capsys):
    taken = tmp_path / "file"
    taken.write_text("")
    status, err = one_line(["reproduce", "table2", "--quick", "--out", taken], capsys)
    assert (status, "--out" in err, len(err.strip().splitlines())) == (2, True, 1)
    status, err = one_line(
        ["reproduce", "table2", "--data-root", tmp_path / "nowhere", "--out", tmp_path / "o"], capsys
    )
    assert (status, "--data-root" in err, len(err.strip().splitlines())) == (2, True, 1)

    plan = papers.quick_plan(epochs=1)
    runs = papers.Runs(tmp_path / "quick" / "runs", plan)
    broken = runs.checkpoint(next(iter(papers.needs(["table5"], plan))))
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"nothing")
    status, err = one_line(["reproduce", "table5", "--quick", "--epochs", 1, "--out", tmp_path], capsys)
    assert (status, "--out" in err, "damaged" in err) == (2, True, True)
