"""The table by which `auto` takes one of several backends."""

import pytest
import torch

from sparta_kernels import _native, backends, build_info, sparta_gate
from sparta_kernels.backends import choices, extension

TABLE = """\
operation,capability,dtype,layout,elements,backend
gate_forward,9.0,bfloat16,planar,4096,native
gate_forward,9.0,bfloat16,planar,64,triton
gate_forward,9.0,bfloat16,channels_last,4096,triton
pgd_step,9.0,float32,any,100,triton
"""


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The choices above, on a machine whose GPU is of capability 9.0."""
    path = tmp_path / "choices.csv"
    path.write_text(TABLE)
    monkeypatch.setattr(choices, "FILE", path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    choices.rows.cache_clear()
    choices._look_up.cache_clear()
    yield path
    choices.rows.cache_clear()
    choices._look_up.cache_clear()


def image(*shape: int, dtype: torch.dtype = torch.bfloat16, channels_last: bool = False) -> torch.Tensor:
    tensor = torch.zeros(shape, dtype=dtype)
    return tensor.to(memory_format=torch.channels_last) if channels_last else tensor


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("operation", "tensor", "backend"),
    [
        ("gate_forward", image(1, 1, 8, 8), "triton"),  # as large as measured
        ("gate_forward", image(1, 2, 8, 8), "native"),  # between two: what is written for up to the larger
        ("gate_forward", image(2, 64, 8, 8), "native"),  # above all: the last row
        ("gate_forward", image(2, 64, 8, 8, channels_last=True), "triton"),
        ("gate_backward", image(1, 1, 8, 8), choices.UNMEASURED),
        ("gate_forward", image(1, 1, 8, 8, dtype=torch.float32), choices.UNMEASURED),
        ("pgd_step", image(1, 3, 8, 8, dtype=torch.float32, channels_last=True), "triton"),
    ],
)
def test_the_table_is_looked_up(operation, tensor, backend):
    choice = choices.fastest(operation, tensor)
    assert choice.backend == backend
    assert operation in choice.reason


@pytest.mark.usefixtures("table")
def test_another_gpu_was_not_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    choice = choices.fastest("gate_forward", image(1, 1, 8, 8))
    assert choice.backend == choices.UNMEASURED
    assert "8.0 bfloat16 planar has not been measured" in choice.reason


@pytest.mark.usefixtures("table")
def test_it_reads_as_phrases():
    assert choices.told("9.0") == {
        "gate_forward bfloat16 channels_last": "triton",
        "gate_forward bfloat16 planar": "triton to 64 elements, native",
        "pgd_step float32 any": "triton",
    }
    assert choices.told("8.0") == {}


def test_build_info_tells_what_was_measured(table, monkeypatch):
    class Native:
        def __getattr__(self, name):
            return getattr(_native, name)

        def cuda_info(self):
            devices = [{"name": "H", "capability": (9, 0)}, {"name": "A", "capability": (8, 0)}]
            return {"built": True, "runtime_version": 13000, "driver_version": 13000, "devices": devices}

    monkeypatch.setattr(extension, "kernels", Native())
    hopper, ampere = build_info()["cuda"]["devices"]
    assert hopper["choices"] == choices.told("9.0")
    assert ampere["choices"] == "native: nothing was measured on 8.0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the columns must be operation, capability"),
        (TABLE.replace("elements", "size"), "the columns must be operation, capability"),
        (TABLE.replace("4096,native", "4096,fast"), "choices.csv:2: backend must be one of native, triton"),
        (TABLE.replace("64,", "-1,"), "choices.csv:3: .* elements a number, got 'triton' and '-1'"),
        (TABLE + "gate_forward,9.0\n", "choices.csv:6: backend must be one of"),
    ],
)
def test_a_broken_table_is_refused(tmp_path, text, message):
    path = tmp_path / "choices.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        choices.read(path)


def test_the_installed_table_is_sound():
    for row in choices.read(choices.FILE):
        assert row.operation in choices.OPERATIONS
        assert row.layout in (("planar", "channels_last") if row.operation.startswith(("gate", "dyrelu")) else ("any",))
        assert isinstance(getattr(torch, row.dtype), torch.dtype)


def test_every_operation_of_every_backend_is_there():
    for name in backends.DEVICES:
        for operation in choices.OPERATIONS:
            assert callable(getattr(backends.module(name), operation))


@pytest.mark.parametrize(
    ("devices", "backend"),
    [
        ({"native": ("cpu", "cuda"), "triton": ("cuda",)}, "auto"),
        ({"native": ("cpu", "cuda")}, "native"),
        ({"native": ("cpu",), "triton": ("cuda",)}, "triton"),
        ({"native": ("cpu",)}, "reference"),
    ],
)
def test_auto_on_a_gpu(monkeypatch, devices, backend):
    monkeypatch.setattr(backends, "DEVICES", devices)
    assert backends.choose(torch.device("cuda"), "auto").backend == backend
    assert backends.choose(torch.device("cpu"), "auto").backend == "native"


def test_auto_never_interprets(monkeypatch):
    monkeypatch.setattr(backends, "DEVICES", {"native": ("cpu",), "triton": ("cpu", "cuda")})
    assert backends.choose(torch.device("cpu"), "auto").backend == "native"


def test_each_pass_takes_its_own_choice(monkeypatch):
    """Where `choose` leaves it open, the operation looks into the table itself: forward and backward may differ."""
    asked = []

    def fastest(operation, tensor):
        asked.append(operation)
        return choices.Choice("native", "")

    monkeypatch.setattr(choices, "fastest", fastest)
    monkeypatch.setattr(backends, "choose", lambda *_: choices.Choice("auto", ""))
    x, factors = torch.randn(1, 2, 3, 3, requires_grad=True), (torch.randn(1, 1, 3, 3), torch.randn(1, 2))
    y = sparta_gate(x, *factors)
    y.sum().backward()
    assert asked == ["gate_forward", "gate_backward"]
    assert torch.equal(y, backends.module("native").gate_forward(x, *factors, None, 1))
