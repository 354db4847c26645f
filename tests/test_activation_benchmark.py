"""benchmarks/activation.py and training_step.py: what they time, check, keep and refuse."""

from __future__ import annotations

import json

import pytest
import torch

from sparta_kernels import backends
from sparta_kernels.nn.frozen_sparta import FrozenSparta

TINY = (
    "--shape",
    "3,8,4,4",
    "--inputs",
    "2",
    "--seconds",
    "0.001",
    "--quick",
    "--threads",
    "1",
    "--allocator",
    "default",
)


@pytest.fixture
def run(modules):
    return lambda path, *arguments: modules["activation"].main([*TINY, "--json", str(path), *arguments])


@pytest.fixture(scope="module")
def measured(modules, tmp_path_factory):
    path = tmp_path_factory.mktemp("activation") / "activation.json"
    threads = torch.get_num_threads()
    assert modules["activation"].main([*TINY, "--json", str(path)]) == 0
    torch.set_num_threads(threads)
    return json.loads(path.read_text())


def test_all_are_timed(measured):
    assert measured["complete"] is True
    assert measured["failed"] == measured["not_measured"] == []
    assert [(cell["dtype"], cell["layout"]) for cell in measured["results"]] == [
        (dtype, layout) for dtype in ("fp32", "bf16") for layout in ("nchw", "channels_last")
    ]
    for cell in measured["results"]:
        assert list(cell["candidates"]) == ["copy", "relu", "products", "eager", "ours"]
        assert cell["floor_bytes"] == 4 * cell["copy_bytes"]
        for name, times in cell["candidates"].items():
            assert 0 < times["p20_ms"] <= times["median_ms"] <= times["p80_ms"]
            assert ("memory" in times) == (name not in ("copy", "products"))
        image = cell["copy_bytes"] // 2
        memory = {name: times.get("memory") for name, times in cell["candidates"].items()}
        assert 2 * image <= memory["relu"] < memory["eager"]
        assert memory["ours"] > 2 * image
    assert measured["device"]["type"] == "cpu"
    assert {bar["passed"] for bar in measured["bars"]} == {None}  # torch.compile was not asked for


def test_the_compiled_reference_is_measured_and_judged(run, modules, tmp_path, monkeypatch, capsys):
    path = tmp_path / "activation.json"
    monkeypatch.setattr(modules["gates"], "SHAPES", ((8, 4, 4),))
    monkeypatch.setitem(modules["activation"]._BATCHES, "cpu", [3])
    candidates = ("--candidates", "compile", "ours", "--dtype", "fp32", "--layout", "nchw")
    assert run(path, *candidates) == 0, capsys.readouterr().err
    document = json.loads(path.read_text())
    (cell,) = document["results"]
    times = {name: found["median_ms"] for name, found in cell["candidates"].items()}
    bar = document["bars"][0]
    assert bar["name"] == "compile / ours, fp32, nchw, geometric mean"
    assert bar["value"] == pytest.approx(times["compile"] / times["ours"])
    assert bar["passed"] == (bar["value"] >= 1.3)
    assert bar["cells"] == bar["wanted"] == 1
    assert "compile / ours, fp32, nchw" in capsys.readouterr().out


def judged(modules, shapes, settings, device="cpu"):
    """The bars of fp32 (on a GPU bf16), NCHW, where torch.compile is twice as slow at these shapes."""
    times = {"ours": {"median_ms": 1.0}, "compile": {"median_ms": 2.0}}
    cell = {"dtype": "fp32" if device == "cpu" else "bf16", "layout": "nchw", "candidates": times}
    results = [{**cell, "shape": list(shape)} for shape in shapes]
    document = {"results": results, "settings": {"shape": None, **settings}, "device": {"type": device}}
    bar, *others = modules["activation"].judge(document)
    assert all((other["passed"], other["cells"]) == (None, 0) for other in others)
    return bar["value"], bar["passed"], bar["cells"], bar["wanted"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_bars_are_judged_where_all_sites_were_measured(modules, device):
    sites = [(batch, *image) for batch in (128, 512) for image in modules["gates"].SHAPES]
    asked = {"batch": [128, 512]}
    assert judged(modules, sites, asked, device) == (pytest.approx(2.0), True, 8, 8)
    assert judged(modules, sites[:-1], asked, device) == (pytest.approx(2.0), None, 7, 8)
    assert judged(modules, sites[:4], {"batch": [128]}, device) == (pytest.approx(2.0), True, 4, 4)
    assert judged(modules, [], asked, device) == (None, None, 0, 8)


def test_bars_are_not_about_other_shapes(modules):
    odd, small = (128, 64, 33, 33), (2, 64, 32, 32)
    asked = {"batch": [32, 128], "shape": [odd, small]}  # with shapes, the batches are none that was asked for
    assert judged(modules, [odd, small], asked) == (None, None, 0, 4)
    site = (128, 64, 32, 32)
    assert judged(modules, [odd, site], {**asked, "shape": [odd, site]}) == (pytest.approx(2.0), None, 1, 4)


def test_ours_is_what_attack_prepare_makes(modules):
    candidates, case = modules["activation_candidates"], modules["gates"].Case((2, 8, 4, 4), "bf16", "channels_last")
    made = candidates._ours(case, "cpu")
    assert isinstance(made, FrozenSparta)
    assert made.conv1.weight.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in made.parameters())


@pytest.mark.parametrize("what", ["y", "gradient"])
def test_what_is_wrong_is_not_timed(run, modules, tmp_path, monkeypatch, capsys, what):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return 1.1 * y if what == "y" else y.clone()

        @staticmethod
        def backward(ctx, grad):
            return 1.1 * grad if what == "gradient" else grad

    path, right = tmp_path / "activation.json", modules["activation_candidates"]._ours

    def wrong(case, device):
        function = right(case, device)
        return lambda x: Wrong.apply(function(x))

    monkeypatch.setattr(modules["activation_candidates"], "_ours", wrong)
    assert run(path, "--dtype", "fp32", "--layout", "nchw") == 1
    document = json.loads(path.read_text())
    assert document["complete"] is False
    assert "ours" not in document["results"][0]["candidates"]
    assert "eager" in document["results"][0]["candidates"]
    assert f"ours computes a wrong {what}" in document["failed"][0]
    assert f"ours computes a wrong {what}" in capsys.readouterr().err


def test_a_wrong_eager_is_caught_and_excuses_nobody(run, modules, tmp_path, monkeypatch):
    path, right = tmp_path / "activation.json", modules["activation_candidates"]._eager

    def wrong(case, device):
        function = right(case, device)
        return lambda x: 2 * function(x)

    monkeypatch.setattr(modules["activation_candidates"], "_eager", wrong)
    assert run(path, "--dtype", "bf16", "--layout", "nchw") == 1
    document = json.loads(path.read_text())
    assert list(document["results"][0]["candidates"]) == ["copy", "relu", "products"]
    eager, ours = document["failed"]
    assert "eager computes a wrong y" in eager
    assert "ours cannot be checked, eager's y is wrong" in ours


@pytest.mark.parametrize("what", ["y", "gradient"])
@pytest.mark.parametrize("value", [0.0, float("nan")])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_sample_is_checked(modules, monkeypatch, what, value, dtype):
    """Also one that is not among those compared in float64."""
    candidates, case = modules["activation_candidates"], modules["gates"].Case((64, 8, 4, 4), dtype, "nchw")
    inputs, sample = candidates.make_inputs(case, 1), 1
    assert sample not in torch.linspace(0, 63, 16).long()
    ours = candidates.make_candidate("ours")
    candidates.check("ours", ours, inputs)
    both = ours.both

    def wrong(inputs):
        def call(index):
            found = [result.clone() for result in both(inputs)(index)]
            found[what == "gradient"][sample] = value
            return found

        return call

    monkeypatch.setattr(ours, "both", wrong)
    with pytest.raises(modules["gates"].WrongResult, match=f"ours computes a wrong {what}"):
        candidates.check("ours", ours, inputs)


def test_one_sample_of_a_large_batch_is_not_lost_in_the_norm(modules):
    right = torch.ones(4096, 2)
    value = right.clone()
    value[7] = 0
    assert modules["activation_candidates"]._distance(value, right) < 0.02
    assert modules["activation_candidates"]._bad_samples(value, right) == [7]


def test_an_interruption_keeps_what_there_is(run, modules, tmp_path, monkeypatch, capsys):
    path, check = tmp_path / "activation.json", modules["activation_candidates"].check

    def interrupted(name, candidate, inputs):
        if inputs.case.dtype == "bf16":
            raise KeyboardInterrupt
        check(name, candidate, inputs)

    monkeypatch.setattr(modules["activation_candidates"].Operation, "check", staticmethod(interrupted))
    assert run(path) == 130
    document = json.loads(path.read_text())
    assert document["complete"] is False
    assert [cell["dtype"] for cell in document["results"]] == ["fp32", "fp32"]
    printed = capsys.readouterr()
    assert "3x8x4x4" in printed.out
    assert "activation.py: interrupted" in printed.err


def test_an_interruption_keeps_what_was_wrong(run, modules, tmp_path, monkeypatch):
    """Also where no cell was measured yet."""
    path = tmp_path / "activation.json"

    def interrupted(name, candidate, inputs):
        if name == "relu":
            raise KeyboardInterrupt
        raise modules["gates"].WrongResult(f"{name} is wrong")

    monkeypatch.setattr(modules["activation_candidates"].Operation, "check", staticmethod(interrupted))
    assert run(path) == 130
    document = json.loads(path.read_text())
    assert document["failed"] == ["copy is wrong"]
    assert document["complete"] is False


def test_a_budget_is_kept(run, tmp_path):
    path = tmp_path / "activation.json"
    assert run(path, "--budget", "0.001") == 0
    document = json.loads(path.read_text())
    assert document["results"] == []
    assert len(document["not_measured"]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", "2"), "not allowed with argument --batch"),
        (("--json", "no/such/folder/a.json"), "argument --json"),
        (("--threads", "100000"), "must be at most"),
        (("--candidates", "nobody"), "invalid choice"),
    ],
)
def test_bad_arguments(modules, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        modules["activation"].read([*TINY[:2], *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_usual_cases(modules):
    options, cases = modules["activation"].read([])
    assert len(cases) == 2 * 4 * 2 * 2
    assert {case.shape[1:] for case in cases} == set(modules["gates"].SHAPES)
    assert "compile" in options.candidates
    options, cases = modules["activation"].read(["--quick"])
    assert {case.shape[0] for case in cases} == {32}
    assert "compile" not in options.candidates


def test_the_peak_of_tensors(modules):
    def peak(work):
        return pytest.approx(modules["memory"].peak_of_tensors(work, "cpu"), abs=1024)  # a scalar may be among them

    assert peak(lambda: torch.zeros(2**18).add(1)) == 2 * 2**20
    assert peak(lambda: [torch.zeros(2**18), torch.zeros(2**18)][:0]) == 2 * 2**20

    def one_by_one():
        for _ in range(3):
            torch.zeros(2**18)

    assert peak(one_by_one) == 2**20


@pytest.mark.gpu
def test_on_a_gpu(run, tmp_path, capsys):
    path = tmp_path / "activation.json"
    built = [name for name in ("native", "triton") if "cuda" in backends.DEVICES.get(name, ())]
    for backend in ("auto", *built):
        assert run(path, "--device", "cuda", "--backend", backend) == 0, capsys.readouterr().err
        document = json.loads(path.read_text())
        assert document["complete"] is True
        for cell in document["results"]:
            assert all(times["captured"] for times in cell["candidates"].values())
            assert cell["candidates"]["ours"]["memory"] > cell["copy_bytes"]


# ---- a training step ---------------------------------------------------------------------------------------


SMALL = ("--batch", "2", "--width", "4", "--rounds", "2", "--threads", "1", "--json")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_training_step(modules, tmp_path, capsys, dtype):
    path = tmp_path / "training.json"
    assert modules["training_step"].main([*SMALL, str(path), "--dtype", dtype]) == 0
    document = json.loads(path.read_text())
    assert document["complete"] is True
    rows = {row["candidate"]: row for row in document["results"][0]["entries"]}
    assert set(rows) == {"relu", "sparta", "sparta-plain"}
    for row in rows.values():
        assert 0 < row["p20_ms"] <= row["median_ms"]
        assert row["peak_tensors"] > row["held"] > 0
    assert rows["sparta"]["peak_tensors"] < rows["sparta-plain"]["peak_tensors"]
    (bar,) = document["bars"]
    assert bar["value"] == pytest.approx(rows["sparta"]["peak_tensors"] / rows["relu"]["peak_tensors"])
    assert document["failed"] == []
    assert f"memory of a training step, SPARTA / ReLU, {dtype}, batch 2" in capsys.readouterr().out


def test_autocast_is_what_bf16_means(modules, monkeypatch):
    step = modules["training_step"]
    for dtype, expected in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        training = step._Training(step._read(["--batch", "2", "--width", "4", "--dtype", dtype]), 2, "relu")
        found = []
        training.model.conv1.register_forward_hook(lambda *arguments, found=found: found.append(arguments[2].dtype))
        training.step()
        assert found == [expected]
        assert {parameter.grad.dtype for parameter in training.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("short"), MemoryError("short"), "can't allocate memory: 9"])
def test_a_training_step_without_memory(modules, tmp_path, monkeypatch, capsys, error):
    """The candidate is named and left out, in the rounds all of the batch is."""
    path, step = tmp_path / "training.json", modules["training_step"]
    error = RuntimeError(f"[enforce fail] {error}") if isinstance(error, str) else error
    right, steps = step._Training.step, []

    def short(self):
        steps.append(self)
        if self.plain or len(steps) == last:
            raise error
        right(self)

    monkeypatch.setattr(step._Training, "step", short)
    last = None
    assert step.main([*SMALL, str(path)]) == 1
    document = json.loads(path.read_text())
    assert document["complete"] is False
    (failure,) = document["failed"]
    assert failure.startswith("batch 2: sparta-plain: ")
    assert [row["candidate"] for row in document["results"][0]["entries"]] == ["relu", "sparta"]
    assert len(document["bars"]) == 1
    assert failure in capsys.readouterr().err
    steps.clear()
    last = 8  # the first of a round, after three steps of two candidates and one of the third
    assert step.main([*SMALL, str(path)]) == 1
    document = json.loads(path.read_text())
    assert document["failed"][1].startswith("batch 2: ")
    assert len(document["failed"]) == 2


def test_other_errors_of_a_training_step_are_raised(modules, tmp_path, monkeypatch):
    def broken(self):
        raise RuntimeError("broken")

    monkeypatch.setattr(modules["training_step"]._Training, "step", broken)
    with pytest.raises(RuntimeError, match="broken"):
        modules["training_step"].main([*SMALL, str(tmp_path / "training.json")])


def test_too_many_threads_for_a_training_step(modules, capsys):
    with pytest.raises(SystemExit) as stopped:
        modules["training_step"].main(["--threads", "100000"])
    assert stopped.value.code == 2
    assert "argument --threads: must be at most" in capsys.readouterr().err
