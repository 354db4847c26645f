"""What runs an attack's iterations: the engines agree, and whoever cannot says why."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from attack_case import pretend_graphs
from prepare_case import images_of, settle, step
from torch import nn

from sparta_kernels import build_info
from sparta_kernels.attack import engines, pgd, prepare
from sparta_kernels.attack.capture import capture
from sparta_kernels.nn import resnet18

SETTINGS = {"eps": 16 / 255, "step_size": 2 / 255, "steps": 4, "report_at": [0, 2, 4], "seed": 5}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return settle(resnet18(activation="sparta", width=8))


def attacked(model, count=6, **options):
    images = images_of(32, count=count)
    return pgd(model, images, torch.arange(count) % 10, **{**SETTINGS, **options})


def assert_same_attack(got, wanted):
    assert torch.equal(got.targets, wanted.targets)
    torch.testing.assert_close(got.losses, wanted.losses, rtol=1e-4, atol=1e-4)
    # A pixel whose gradient is all but 0 may go the other way.
    assert ((got.adversarial - wanted.adversarial).abs() > 1e-6).float().mean() < 0.01
    assert list(got.predictions) == list(wanted.predictions)


# ---- a CUDA graph, pretended -------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch):
    return pretend_graphs(monkeypatch)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_graph_gives_what_eager_gives(model, graphs, precision):
    prepared = prepare(model, precision=precision)
    wanted = attacked(prepared, engine="eager")
    for _ in range(2):
        found = attacked(prepared, engine="graph")
        assert found.engine.name == "graph"
        assert torch.equal(found.adversarial, wanted.adversarial)
        assert torch.equal(found.losses, wanted.losses)
        for k, predicted in wanted.predictions.items():
            assert torch.equal(found.predictions[k], predicted)
    assert graphs.captures == 1


def test_fewer_images_are_filled_up(model, graphs):
    prepared = prepare(model)
    attacked(prepared, engine="graph", count=6)
    found = attacked(prepared, engine="graph", count=4)
    assert graphs.captures == 1
    assert found.adversarial.shape[0] == found.losses.shape[1] == len(found.predictions[2]) == 4
    assert_same_attack(found, attacked(prepared, engine="eager", count=4))
    attacked(prepared, engine="graph", count=8)  # more do not fit
    assert graphs.captures == 2
    attacked(prepared, engine="graph", step_size=1 / 255)  # the step is part of what was captured
    assert graphs.captures == 3


def test_a_graph_outlives_an_optimiser_step(model, graphs):
    prepared = prepare(model)
    first = attacked(prepared, engine="graph")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    step(model)
    prepared.refresh()
    found = attacked(prepared, engine="graph")
    wanted = attacked(prepare(model), engine="eager")
    assert graphs.captures == 1
    assert torch.equal(found.losses, wanted.losses)
    assert not torch.equal(found.losses, first.losses)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    prepared.refresh()
    attacked(prepared, engine="graph")
    assert graphs.captures == 2  # other tensors: what was captured would read the old ones
    model.load_state_dict(state)


def test_what_cannot_be_captured_falls_back_with_the_reason(model, graphs, monkeypatch):
    def refuse(self, run):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "__call__", refuse)
    prepared = prepare(model)
    wanted = attacked(prepared, engine="eager")
    with pytest.raises(ValueError, match=r"^pgd: engine must be .*cannot be captured \(operation not permitted"):
        attacked(prepared, engine="graph")
    choose = engines.choose
    monkeypatch.setattr(engines, "choose", lambda *_: choose("graph", None, None))
    fresh = prepare(model)
    with pytest.warns(UserWarning, match="cannot be captured"):
        found = attacked(fresh, engine="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once, and not tried again
        assert attacked(fresh, engine="auto").engine == found.engine
    assert found.engine.name == "eager"
    assert "cannot be captured (operation not permitted when stream is capturing)" in found.engine.reason
    assert torch.equal(found.losses, wanted.losses)


class CapturingTorch:
    """torch.cuda as captures see it, up to 2.12: what the driver declares invalid is never taken back."""

    def __init__(self, monkeypatch):
        self.stream, self.streams, self.underway, self.released, self.drawing = "before", [], [], [], False
        self.handles = iter(range(1, 100))
        replaced = {
            "graph": self.graph,
            "CUDAGraph": object,
            "graph_pool_handle": lambda: (0, next(self.handles)),
            "current_stream": lambda: self.stream,
            "set_stream": lambda stream: setattr(self, "stream", stream),
            "synchronize": lambda: None,
        }
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *pool: self.released.append(pool), raising=False)

    @contextmanager
    def graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        assert not self.underway, "captures_underway.empty() INTERNAL ASSERT FAILED"
        assert capture_error_mode == "thread_local"
        before, self.stream = self.stream, stream
        self.underway.append(pool)
        self.drawing = True
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError("operation failed due to a previous error during capture") from error
        self.underway.remove(pool)
        self.drawing, self.stream = False, before

    def end(self, device, pool):
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)


@pytest.mark.parametrize("cleans_up", [False, True], ids=["torch-2.12", "torch-2.13"])
def test_after_a_capture_that_failed_others_are_possible(monkeypatch, cleans_up):
    """Else every one that follows, and everything that needs memory or random numbers, would be an error."""
    pretended, stream = CapturingTorch(monkeypatch), SimpleNamespace(device=torch.device("cpu:0"))

    def refused():
        if cleans_up:
            pretended.underway.clear()
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="previous error during capture"):
        capture(refused, stream)
    assert (pretended.stream, pretended.underway, pretended.drawing) == ("before", [], False)
    assert pretended.released == ([] if cleans_up else [(0, (0, 1))])  # once, if nobody else did
    assert capture(lambda: "done", stream)[1] == "done"
    assert pretended.stream == "before"


# ---- torch.compile, and the choice ---------------------------------------------------------------------------


def test_compile_gives_what_eager_gives(model):
    prepared = prepare(model)
    wanted = attacked(prepared, engine="eager")
    found = attacked(prepared, engine="compile")
    assert found.engine == ("compile", "asked for")
    assert_same_attack(found, wanted)
    with warnings.catch_warnings(), torch._dynamo.config.patch(error_on_recompile=True):
        warnings.simplefilter("error")
        assert torch.equal(attacked(prepared, engine="compile").losses, found.losses)


def test_the_choice_is_told(model):
    found = attacked(prepare(model))
    assert found.engine == engines.fastest("cpu", "fp32")
    assert "attack.prepare" in attacked(model).engine.reason
    told = build_info()["engines"]
    assert set(told["cpu"]) == {"fp32", "bf16"}
    assert all(phrase.split(":")[0] in engines.ENGINES for phrase in told["cpu"].values())


def test_graphs_need_a_gpu(model):
    with pytest.raises(ValueError, match=r"^pgd: engine must be 'auto', 'eager' or 'compile' on a cpu, got 'graph'"):
        attacked(model, engine="graph")


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"engine": "compile"}], ids=str)
def test_a_model_that_is_not_prepared_is_prepared_for_the_call(options):
    torch.manual_seed(0)
    small = settle(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(7200, 10)))
    prepared = prepare(small, precision=options.get("precision", "fp32"))
    found, wanted = attacked(small, **options), attacked(prepared, **options)
    assert torch.equal(found.losses, wanted.losses)
