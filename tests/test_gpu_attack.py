"""The attack engine on a GPU: precisions, captured graphs, and that the host neither waits nor is waited for."""

from __future__ import annotations

import time

import pytest
import torch
from prepare_case import images_of, outputs, settle, step
from torch import nn

from sparta_kernels.attack import pgd, prepare
from sparta_kernels.nn import resnet18

pytestmark = pytest.mark.gpu

SETTINGS = {"eps": 16 / 255, "step_size": 2 / 255, "steps": 6, "report_at": [0, 3, 6], "seed": 5}
PRECISIONS = ["fp32", "tf32", "bf16", "fp16"]


@pytest.fixture(autouse=True)
def _repeatable(monkeypatch):
    """cuDNN may choose algorithms that add up in any order, and a step by a sign makes a pixel's whole step of that."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.fixture(scope="module", params=["relu", "sparta"])
def model(request):
    torch.manual_seed(0)
    return settle(resnet18(activation=request.param, width=16)).cuda()


def attacked(model, count=16, **options):
    images = images_of(32, count=count).cuda()
    return pgd(model, images, (torch.arange(count) % 10).cuda(), **{**SETTINGS, **options})


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions_compute_the_same_function(model, precision):
    images = images_of(32, count=8).cuda()
    logits, gradient = outputs(prepare(model, precision=precision), images)
    exact = outputs(prepare(model.double()), images.double())
    model.float()
    limit = {"fp32": 1e-4, "tf32": 2e-2, "bf16": 1e-1, "fp16": 2e-2}[precision]
    assert (logits.double() - exact[0]).norm() <= limit * exact[0].norm()
    if precision == "fp32":  # in the others many ReLUs are on the other side; here of an image or two, one may be
        errors = (gradient.double() - exact[1]).flatten(1).norm(dim=1) / exact[1].flatten(1).norm(dim=1)
        assert errors.quantile(0.7) <= 1e-3
        assert errors.max() <= 0.1


def test_settings_of_the_arithmetic_come_back(model):
    settings = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [setting.allow_tf32 for setting in settings]
    for precision in ("fp32", "tf32"):
        attacked(prepare(model, precision=precision))
        assert [setting.allow_tf32 for setting in settings] == before


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_graph_gives_what_eager_gives(model, precision):
    prepared = prepare(model, precision=precision)
    wanted = attacked(prepared, engine="eager")
    found = [attacked(prepared, engine="graph") for _ in range(3)]
    assert found[0].engine.name == "graph"
    for result in found:
        assert torch.equal(result.targets, wanted.targets)
        torch.testing.assert_close(result.losses[:2], wanted.losses[:2], rtol=0.05, atol=0.02)
        assert torch.equal(result.adversarial, found[0].adversarial)
        assert torch.equal(result.losses, found[0].losses)
    if precision == "fp32":
        assert ((found[0].adversarial - wanted.adversarial).abs() > 1e-6).float().mean() < 0.02


def test_a_graph_sees_what_was_learnt_and_fewer_images(model):
    prepared = prepare(model)
    first = attacked(prepared, engine="graph")
    captured = prepared.captured["graph"]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    step(model)
    prepared.refresh()
    found = attacked(prepared, engine="graph", count=11)
    wanted = attacked(prepare(model), engine="eager", count=11)
    assert prepared.captured["graph"] is captured
    torch.testing.assert_close(found.losses[:2], wanted.losses[:2], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found.losses[0], first.losses[0, :11])
    model.load_state_dict(state)


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_the_loop_never_waits_for_the_device(model, engine):
    """Between the first iterate and the last nothing synchronises."""
    prepared = prepare(model, precision="bf16")
    attacked(prepared, engine=engine)

    def progress(k):
        torch.cuda.set_sync_debug_mode("error" if 0 < k + 1 < SETTINGS["steps"] else "default")

    try:
        attacked(prepared, engine=engine, progress=progress)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_replays_take_no_time_of_the_host(model):
    """All iterations are queued long before the GPU has done them."""
    prepared = prepare(model)
    attacked(prepared, engine="graph", count=512)
    marks = []
    torch.cuda.synchronize()
    attacked(
        prepared, engine="graph", count=512, steps=20, report_at=[20], progress=lambda k: marks.append(time.time())
    )
    torch.cuda.synchronize()
    done = time.time()
    assert marks[-2] - marks[0] < 0.5 * (done - marks[0])


def test_a_model_that_waits_cannot_be_captured():
    class Waits(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3072, 10)

        def forward(self, x):
            y = self.linear(x.flatten(1))
            return y * 2 if float(y.sum()) > 0 else y

    prepared = prepare(Waits().cuda().eval())
    with pytest.raises(ValueError, match=r"^pgd: engine must be .*cannot be captured"):
        attacked(prepared, engine="graph")
    here = torch.cuda.current_stream()
    assert attacked(prepared, engine="eager").losses.isfinite().all()
    assert torch.cuda.current_stream() == here == torch.cuda.default_stream()
    assert bool(torch.rand(4, device="cuda").isfinite().all())
    linear = prepare(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).cuda().eval())
    assert attacked(linear, engine="graph").engine.name == "graph"  # and captures go on being possible
