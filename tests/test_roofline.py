"""benchmarks/roofline.py: a picture of what ops.py measured."""

from __future__ import annotations

import json

import pytest
from conftest import BENCHMARKS

CPU = {"type": "cpu", "name": "A CPU", "threads": 2}
GPU = {"type": "cuda", "name": "A GPU"}


@pytest.fixture(scope="module")
def roofline(modules):
    pytest.importorskip("matplotlib")
    return modules["roofline"]


def cell(size, rates, dtype="fp32", direction="forward"):
    candidates = {name: {"gb_per_s": rate} for name, rate in rates.items()}
    return {"direction": direction, "dtype": dtype, "floor_bytes": size, "candidates": candidates}


def written(folder, name="ops.json", device=CPU, **more):
    cells = [
        cell(10**6, {"copy": 30.0, "kernel": 28.0, "eager": 3.0}),
        cell(10**7, {"copy": 40.0, "kernel": 39.0, "triton_kernel": 20.0}, dtype="bf16", direction="backward"),
    ]
    path = folder / name
    path.write_text(json.dumps({"device": device, "results": cells, **more}))
    return str(path)


def test_the_roof_is_a_copy_of_as_many_bytes(roofline):
    cells = [cell(2, {"copy": 10.0}), cell(1, {"copy": 5.0}), cell(2, {"copy": 40.0})]
    sizes, rates = roofline._roof(cells, None)
    assert sizes == pytest.approx([1e-6, 2e-6])
    assert rates == pytest.approx([5.0, 20.0])


def test_the_roof_of_a_gpu_begins_with_a_launch(roofline):
    ceilings = {"copy_gb_per_s": 3000.0, "empty_launch_us": 2.0}
    _, rates = roofline._roof([cell(6 * 10**6, {}), cell(6 * 10**12, {})], ceilings)
    assert rates == pytest.approx([1500.0, 3000.0], rel=1e-4)  # 2 us of launch and 2 us of bytes


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_it_is_drawn(roofline, tmp_path, ending):
    more = {"ceilings": {"copy_gb_per_s": 3000.0, "empty_launch_us": 2.0}}
    for device, document in ((CPU, {}), (GPU, more)):
        out = tmp_path / f"{device['type']}.{ending}"
        assert roofline.main([written(tmp_path, device=device, **document), "--out", str(out)]) == 0
        content = out.read_bytes()
        assert content.startswith(b"\x89PNG" if ending == "png" else b"<?xml")
    texts = {"A GPU", "forward", "backward", "Triton kernel", "eager PyTorch", "bf16", "large copy and empty launch"}
    if ending == "svg":
        assert all(f"<!-- {text} -->" in content.decode() or text in content.decode() for text in texts)


def test_committed_results_can_be_drawn(roofline, tmp_path):
    (folder,) = (BENCHMARKS / "results").glob("amd-*")
    out = tmp_path / "roof.png"
    files = [str(folder / name) for name in ("ops.json", "ops-large-batches.json")]
    assert roofline.main([*files, "--out", str(out)]) == 0
    assert out.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (["none.json", "--out", "a.png"], "argument OPS.json: none.json is not what ops.py writes (FileNotFoundError"),
        (["ops.json", "--out", "a.doc"], "argument --out: a plot's name must end in one of"),
        (["ops.json", "--out", "no/a.png"], "argument --out: "),
        (["ops.json"], "the following arguments are required: --out"),
        (["ops.json", "other.json", "--out", "a.png"], "argument OPS.json: measured on several devices: A CPU, A GPU"),
        (["list.json", "--out", "a.png"], "argument OPS.json: list.json is not what ops.py writes (TypeError"),
        (["ops.json", "--operation", "dyrelu", "--out", "a.png"], "argument --operation: no copy was measured beside"),
    ],
)
def test_bad_arguments(roofline, tmp_path, monkeypatch, capsys, choice, message):
    monkeypatch.chdir(tmp_path)
    written(tmp_path)
    written(tmp_path, "other.json", GPU)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(SystemExit) as stopped:
        roofline.main(choice)
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "a.png").exists()
