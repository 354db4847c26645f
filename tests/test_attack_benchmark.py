"""benchmarks/attack.py: what it times, checks, keeps and refuses."""

from __future__ import annotations

import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch

from sparta_kernels import backends

TINY = ("--batch", "2", "--width", "4", "--steps", "3", "--rounds", "3", "--threads", "1")


@pytest.fixture
def attack(modules):
    """The program; ours alone needs no second process, and starts at once."""

    def run(path, *arguments, candidates=("ours-eager",)):
        return modules["attack"].main([*TINY, "--candidates", *candidates, "--json", str(path), *arguments])

    return run


def names(document):
    return [row["name"] for result in document["results"] for row in result["entries"]]


@pytest.fixture(scope="module")
def measured(modules, tmp_path_factory):
    """A whole measurement, in two processes."""
    pytest.importorskip("torchattacks")
    path = tmp_path_factory.mktemp("attack") / "attack.json"
    threads = torch.get_num_threads()
    candidates = ("--candidates", "loop", "torchattacks", "ours-eager")
    status = modules["attack"].main([*TINY, *candidates, "--row", "--breakdown", "--json", str(path)])
    torch.set_num_threads(threads)
    assert status == 0
    return json.loads(path.read_text())


def test_all_are_timed(measured):
    assert measured["complete"] is True
    assert measured["failed"] == measured["not_measured"] == []
    (result,) = measured["results"]
    assert set(names(measured)) == {
        *(f"{activation} fp32 torchattacks" for activation in ("sparta", "relu")),
        *(f"{a} {p} {c}" for a in ("sparta", "relu") for p in ("fp32", "bf16") for c in ("loop", "ours-eager")),
    }
    for row in result["entries"]:
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert len(row["iteration_ms"]) == len(row["iteration_faults"]) == row["samples"] == 3
        assert row["images_per_second"] == pytest.approx(2e3 / row["median_ms"])
        assert row["page_faults"] >= 0
        assert row["peak_memory"] > row["memory"]
        relu = next(r for r in result["entries"] if r["name"] == row["name"].replace("sparta", "relu"))
        assert row["ratio_to_relu"] == pytest.approx(row["median_ms"] / relu["median_ms"])
    exact = {row["loss"] for row in result["entries"] if row["activation"] == "sparta" and row["precision"] == "fp32"}
    assert max(exact) == pytest.approx(min(exact), rel=1e-4)  # they do the same


def test_the_row_is_timed(measured):
    rows = measured["results"][0]["row"]
    assert [row["name"] for row in rows] == [
        "sparta fp32 torchattacks",
        "sparta fp32 ours-eager",
        "sparta bf16 ours-eager",
    ]
    for row in rows:
        assert row["speedup_over_torchattacks"] == pytest.approx(rows[0]["median_ms"] / row["median_ms"])
        assert row["samples"] == 3
    assert any(bar["name"].startswith("clean + PGD-10") for bar in measured["bars"])


def test_the_time_of_ours_is_broken_down(measured):
    found = measured["results"][0]["breakdown"]
    assert set(found) == {f"{a} {p} ours-eager" for a in ("sparta", "relu") for p in ("fp32", "bf16")}
    for name, profile in found.items():
        parts = profile["ms"]
        assert set(parts) == set(measured["parts"])
        assert min(parts["convolutions"], parts["relu"], parts["step"]) > 0
        assert (parts["attention"] > 0) == (parts["gate"] > 0) == name.startswith("sparta")
        assert parts["batch_norm"] == 0
        assert profile["operations"][0]["ms"] > 0


def test_the_breakdown_sees_what_is_not_folded(modules):
    candidates = modules["attack_candidates"]
    bench = candidates.Bench(candidates.Settings("cpu", 4, 3, 1), 2)
    entry = candidates.Entry("sparta", "fp32", "ours-eager", "native")
    bench._prepared = lambda *_: bench._network("sparta")  # nothing is
    parts = modules["attack_breakdown"].breakdown(bench, entry)["ms"]
    assert parts["batch_norm"] > 0
    assert parts["element_wise"] > 0
    assert parts["attention"] == 0


def test_an_iteration_is_timed_between_the_first_and_the_last(modules):
    clock = modules["attack_candidates"].Clock(torch.device("cpu"))
    clock.marks = [0.0, 1.0, 1.5, 2.0, 9.0]  # iterates 0 to 4
    clock.faults = [0, 100, 110, 120, 500]
    assert clock.iteration() == (pytest.approx(0.5), pytest.approx(10))


@pytest.mark.parametrize("candidate", ["loop", "torchattacks", "foolbox", "art", "ours-eager"])
def test_everybody_makes_the_same_images(modules, candidate):
    if modules["attack_candidates"].missing(candidate, "cpu"):
        pytest.skip(f"needs {candidate} (requirements-compare.txt)")
    candidates = modules["attack_candidates"]
    bench = candidates.Bench(candidates.Settings("cpu", 4, 5, 1), 4)
    entry = candidates.Entry("sparta", "fp32", candidate, "auto" if candidate in candidates.OURS else "")
    clock = candidates.Clock(torch.device("cpu"))
    found = bench._run(entry, clock)
    wanted = bench._run(candidates.Entry("sparta", "fp32", "loop"), None)
    assert float((found - wanted).abs().gt(1e-6).float().mean()) < 0.01
    assert len(clock.marks) == 6
    assert not torch.equal(found, bench.images)


def test_an_attack_by_wrong_kernels_is_not_timed(attack, tmp_path, monkeypatch, capsys):
    path = tmp_path / "attack.json"
    monkeypatch.setattr(backends.module("native"), "gate_forward", lambda x, *_: torch.relu(x))
    assert attack(path, "--precision", "fp32", "--backends", "native") == 1
    document = json.loads(path.read_text())
    assert names(document) == ["relu fp32 ours-eager/native"]
    assert "batch 2: sparta fp32 ours-eager/native computes a wrong logits" in document["failed"][0]
    assert "computes a wrong logits" in capsys.readouterr().err


def test_an_attack_that_goes_nowhere_is_not_timed(modules):
    """The losses: 1 at the start; 0.5 by the loop in fp32, which is believed rather than the one in bf16."""
    losses = {("bf16", "loop"): 0.9, ("fp32", "loop"): 0.5, ("fp32", "ours-eager"): 0.88, ("bf16", "ours-eager"): 0.51}
    entries = [modules["attack_candidates"].Entry("sparta", *keys) for keys in losses]
    rows = [
        {"name": str(entry), **entry._asdict(), "loss": loss}
        for entry, loss in zip(entries, losses.values(), strict=True)
    ]
    run = modules["attack"]._Run(SimpleNamespace(budget=None), {"failed": []}, 0.0)
    result = {"batch": 2, "entries": rows}
    sides = SimpleNamespace(here=SimpleNamespace(start_loss=lambda activation: 1.0))
    ready = run._as_good(sides, result, {str(entry): entry for entry in entries}, [row["name"] for row in rows])
    assert ready == [row["name"] for row in result["entries"]] == ["sparta fp32 loop", "sparta bf16 ours-eager"]
    assert run.document["failed"] == [
        "batch 2: sparta bf16 loop moves the loss 0.20 times as far as the plain loop",
        "batch 2: sparta fp32 ours-eager moves the loss 0.24 times as far as the plain loop",
    ]


def test_an_attack_that_breaks_costs_no_other(attack, tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("gate_forward: CUDA launch failed")

    path = tmp_path / "attack.json"
    monkeypatch.setattr(backends.module("native"), "gate_forward", broken)
    assert attack(path, "--precision", "fp32") == 1
    document = json.loads(path.read_text())
    assert names(document) == ["relu fp32 ours-eager"]
    assert document["failed"] == [
        "batch 2: sparta fp32 ours-eager: RuntimeError: gate_forward: CUDA launch failed",
    ]


def test_a_gpu_that_breaks_down_ends_an_attack(attack, tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore")

    path = tmp_path / "attack.json"
    monkeypatch.setattr(backends.module("native"), "gate_forward", broken)
    assert attack(path) == 1
    (failure,) = json.loads(path.read_text())["failed"]
    assert "sparta fp32 ours-eager: CUDA error: an illegal memory access was encountered; nothing" in failure


def test_what_was_measured_before_a_breakdown_is_kept(modules, attack, tmp_path, monkeypatch, capsys):
    path, turn, taken = tmp_path / "attack.json", modules["attack_candidates"].Bench.turn, []

    def breaking(bench, entry):
        taken.append(entry)
        if len(taken) == 4:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure\nmore")
        return turn(bench, entry)

    monkeypatch.setattr(modules["attack_candidates"].Bench, "turn", breaking)
    assert attack(path, "--precision", "fp32") == 1
    document = json.loads(path.read_text())
    assert document["failed"] == ["CUDA error: unspecified launch failure"]
    assert document["complete"] is False
    assert sum(len(row["iteration_ms"]) for row in document["results"][0]["entries"]) == 3


def test_an_attack_without_time(attack, tmp_path, capsys):
    path = tmp_path / "attack.json"
    assert attack(path, "--budget", "0.001") == 0
    document = json.loads(path.read_text())
    assert (document["complete"], names(document)) == (False, [])
    assert document["not_measured"][0] == "batch 2: sparta fp32 ours-eager: no time left"
    assert len(document["not_measured"]) == 4


def test_what_was_interrupted_is_resumed(modules, attack, tmp_path, monkeypatch, capsys):
    path, turn, taken = tmp_path / "attack.json", modules["attack_candidates"].Bench.turn, []

    def interrupted(bench, entry):
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(entry)
        return turn(bench, entry)

    monkeypatch.setattr(modules["attack_candidates"].Bench, "turn", interrupted)
    assert attack(path, "--precision", "fp32") == 130
    first = json.loads(path.read_text())
    assert first["complete"] is False
    before = {row["name"]: row["iteration_ms"] for row in first["results"][0]["entries"]}
    assert sorted(map(len, before.values())) == [1, 2]

    monkeypatch.setattr(modules["attack_candidates"].Bench, "turn", turn)
    assert attack(path, "--precision", "fp32", "--resume") == 0
    document = json.loads(path.read_text())
    assert document["complete"] is True
    assert [origin["date"] for origin in document["resumed"]] == [first["date"]]
    for row in document["results"][0]["entries"]:
        assert len(row["iteration_ms"]) == 3
        assert row["iteration_ms"][: len(before[row["name"]])] == before[row["name"]]
    with pytest.raises(SystemExit, match=r"attack\.json: other settings: steps was 3 and is 4$"):
        attack(path, "--precision", "fp32", "--steps", "4", "--resume")
    whole = path.read_text()
    for damaged in ("", whole[: len(whole) // 2], "[]", "{}"):
        path.write_text(damaged)
        with pytest.raises(SystemExit, match=r"attack\.json: it is no whole document of this program \([^\n]*$"):
            attack(path, "--precision", "fp32", "--resume")
        assert path.read_text() == damaged


def test_what_has_to_be_compiled_waits_where_time_is_short(modules, attack, tmp_path, monkeypatch, capsys):
    """It then has the others beside it once more."""
    path = tmp_path / "attack.json"
    monkeypatch.setattr(modules["attack"], "COMPILED", ("loop",))  # compiling takes long here too
    choice = ("--precision", "fp32", "--activation", "sparta", "--row", "--budget", "600")
    assert attack(path, *choice, candidates=("loop", "ours-eager")) == 0
    (result,) = json.loads(path.read_text())["results"]
    samples = {row["name"]: row["samples"] for row in result["entries"]}
    assert samples == {"sparta fp32 ours-eager": 6, "sparta fp32 loop": 3}
    assert [row["name"] for row in result["row"]] == ["sparta fp32 ours-eager"]
    told = [line.partition("] ")[2] for line in capsys.readouterr().err.splitlines()]
    assert told.index("batch 2: sparta fp32 loop: warms up") > told.index("batch 2: round 3 of 3")


def test_a_full_disk(modules, attack, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(modules["attack"], "save_json", full)
    assert attack(tmp_path / "attack.json", "--precision", "fp32") == 1
    err = capsys.readouterr().err
    assert err.count("No space left on device") == 1
    assert err.splitlines()[-1] == "attack.py: [Errno 28] No space left on device"


def test_nothing_is_done_again(modules, attack, tmp_path, monkeypatch, capsys):
    path = tmp_path / "attack.json"
    assert attack(path, "--precision", "fp32") == 0
    monkeypatch.setattr(modules["attack"], "Sides", lambda *_: pytest.fail("there is nothing left to measure"))
    assert attack(path, "--precision", "fp32", "--resume") == 0


def test_the_other_process(modules):
    """It answers, says what is wrong there, and says that it has died."""
    candidates, others = modules["attack_candidates"], modules["other_process"]
    other = others.OtherProcess(candidates.Bench, candidates.Settings("cpu", 4, 3, 1), 2)
    try:
        seconds, faults = other.call("turn", candidates.Entry("relu", "fp32", "loop"))
        assert 0 < seconds < 60
        assert faults >= 0
        with pytest.raises(others.OtherProcessFailed, match="KeyError: 'nobody'"):
            other.call("turn", candidates.Entry("relu", "fp32", "nobody"))
        os.kill(other._process.pid, signal.SIGKILL)
        with pytest.raises(others.OtherProcessFailed, match="ended with status -9"):
            other.call("turn", candidates.Entry("relu", "fp32", "loop"))
    finally:
        other.close()


def row_of(activation, precision, candidate, ms, memory=100):
    name = f"{activation} {precision} {candidate}"
    keys = {"activation": activation, "precision": precision, "candidate": candidate}
    backend = "auto" if candidate.startswith("ours") else ""
    samples = {"iteration_ms": [ms] * 3, "iteration_faults": [0.0] * 3}
    return {"name": name, **keys, "backend": backend, **samples, "memory": memory, "peak_memory": memory}


@pytest.mark.parametrize(
    ("device", "amx", "expected"),
    [
        (
            "cpu",
            True,
            {
                "SPARTA over torchattacks (fp32), batch 32, fp32, ours-compile": (1.25, False),
                "memory of an iteration, of the loop's, batch 32, fp32, ours-compile": (0.5, True),
                "SPARTA / ReLU, batch 32, fp32, ours-compile": (1.6, False),
                "memory of an iteration, SPARTA / ReLU, batch 32, fp32, ours-compile": (1.0, True),
                "SPARTA over torchattacks (fp32), batch 32, bf16, ours-eager": (5.0, True),
            },
        ),
        ("cpu", False, {"SPARTA over torchattacks (fp32), batch 32, bf16, ours-eager": (5.0, None)}),
        (
            "cuda",
            False,
            {
                "SPARTA over loop, batch 32, fp32, ours-compile": (1.5, False),
                "SPARTA over compiled, batch 32, fp32, ours-compile": (1.375, True),
            },
        ),
    ],
)
def test_bars(modules, device, amx, expected):
    report = modules["attack_report"]
    entries = [
        row_of("sparta", "fp32", "torchattacks", 100.0),
        row_of("sparta", "fp32", "loop", 120.0),
        row_of("sparta", "fp32", "compiled", 110.0),
        row_of("sparta", "fp32", "ours-eager", 90.0, memory=70),
        row_of("sparta", "fp32", "ours-compile", 80.0, memory=50),
        row_of("relu", "fp32", "ours-compile", 50.0, memory=50),
        row_of("sparta", "bf16", "ours-eager", 20.0, memory=None),
    ]
    result = {"batch": 32, "entries": entries}
    report.add_figures(result)
    document = {"settings": {"device": device}, "amx": amx, "results": [result]}
    found = {bar["name"]: (pytest.approx(bar["value"]), bar["passed"]) for bar in report.bars(document)}
    assert expected.items() <= found.items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "2"), "at least 3"),
        (("--precision", "tf32"), "tf32 needs a GPU"),
        (("--candidates", "ours-graph"), "ours-graph: CUDA graphs need a GPU"),
        (("--resume",), "needs --json"),
        (("--resume", "--json", "none.json"), "there is no none.json"),
        (("--json", "no/such/folder/a.json"), "argument --json"),
    ],
)
def test_bad_arguments(modules, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        modules["attack_options"].read(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_all_candidates_are_asked_for_where_they_can_run(modules):
    options, entries = modules["attack_options"].read(["--precision", "fp32", "bf16", "--activation", "sparta"])
    assert "ours-graph: CUDA graphs need a GPU" in options.missing
    found = [(entry.precision, entry.candidate) for entry in entries]
    assert ("bf16", "loop") in found
    assert ("bf16", "ours-compile") in found
    assert not {("bf16", name) for name in ("torchattacks", "foolbox", "art")} & set(found)


@pytest.mark.gpu
def test_attack_on_a_gpu(modules, tmp_path, capsys):
    path, benchmark = tmp_path / "attack.json", torch.backends.cudnn.benchmark
    arguments = ["--batch", "4", "--width", "8", "--steps", "4", "--rounds", "2", "--device", "cuda"]
    arguments += ["--backends", "native", "triton", "--breakdown", "--json", str(path)]
    try:
        assert modules["attack"].main(arguments) == 0, capsys.readouterr().err
    finally:
        torch.backends.cudnn.benchmark = benchmark
    document = json.loads(path.read_text())
    (result,) = document["results"]
    assert len(result["entries"]) == 2 * 3 * (1 + 2 * 2)
    for row in result["entries"]:
        assert 0 < row["median_ms"] < 1e3
        assert row["memory"] > 0
    assert all(profile["ms"]["convolutions"] > 0 for profile in result["breakdown"].values())


def test_products_are_set_where_the_compiler_reads_them(modules, monkeypatch):
    """torch refuses to read its older settings once they differ from what its newer ones say."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    places = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    for precision in ("tf32", "fp32", "bf16"):
        with modules["attack_candidates"]._products(precision):
            assert [place.allow_tf32 for place in places] == [precision == "tf32"] * 2
            assert torch.get_float32_matmul_precision() == ("high" if precision == "tf32" else "highest")
        assert [place.allow_tf32 for place in places] == before
