"""benchmarks/choices.py: the table that `auto` reads, from what was measured."""

from __future__ import annotations

import json

import pytest

from sparta_kernels.backends.choices import Row, read


@pytest.fixture(scope="module")
def choices(modules):
    return modules["choices"]


def measured(shape, native, triton, **named):
    candidates = {"kernel": {"median_ms": native}, "triton_kernel": {"median_ms": triton}}
    usual = {"operation": "gate", "direction": "forward", "dtype": "bf16", "layout": "nchw"}
    return {**usual, **named, "shape": shape, "candidates": candidates}


def test_rows_end_where_the_faster_one_changes(choices):
    cells = [
        measured([1, 1, 1, 300], 2.0, 1.0),
        measured([1, 1, 1, 100], 1.0, 2.0),
        measured([1, 1, 1, 200], 1.0, 0.985),  # a tie: native
        measured([1, 1, 1, 400], 1.0, 0.9),
        measured([2, 1, 1, 200], 1.0, 1.5),  # with the last one: native
        measured([1, 1, 1, 100], 2.0, 1.0, layout="channels_last"),
        measured([1, 1, 1, 100], 2.0, 1.0, operation="pgd_step", direction="call", dtype="fp32"),
        measured([1, 1, 1, 100], 1.0, 1.0, operation="dynamic_conv", direction="backward"),
    ]
    del cells[0]["candidates"]["kernel"]["median_ms"]
    cells[0]["candidates"] = {"kernel": {"median_ms": 2.0}}  # Triton's was not measured
    assert choices.fastest(cells, "9.0") == [
        Row("conv_backward", "9.0", "bfloat16", "any", 100, "native"),
        Row("gate_forward", "9.0", "bfloat16", "channels_last", 100, "triton"),
        Row("gate_forward", "9.0", "bfloat16", "planar", 400, "native"),
        Row("pgd_step", "9.0", "float32", "any", 100, "triton"),
    ]
    cells.append(measured([1, 1, 1, 800], 1.0, 0.9))
    cells.append(measured([1, 1, 1, 900], 1.0, 0.9))
    planar = [row for row in choices.fastest(cells, "9.0") if row.layout == "planar"]
    assert [(row.elements, row.backend) for row in planar] == [(400, "native"), (900, "triton")]


def test_the_table_is_merged(choices, tmp_path, capsys):
    results, table = tmp_path / "ops.json", tmp_path / "choices.csv"
    device = {"type": "cuda", "capability": "9.0"}
    results.write_text(json.dumps({"device": device, "results": [measured([1, 1, 1, 100], 2.0, 1.0)]}))
    before = [
        Row("gate_forward", "8.0", "bfloat16", "planar", 7, "native"),
        Row("gate_forward", "9.0", "bfloat16", "planar", 7, "native"),
        Row("gate_forward", "9.0", "bfloat16", "planar", 8, "triton"),
        Row("gate_forward", "9.0", "float32", "planar", 7, "native"),
    ]
    table.write_text(choices.as_csv(before))
    assert choices.main([str(results), "--out", str(table)]) == 0
    after = [before[0], Row("gate_forward", "9.0", "bfloat16", "planar", 100, "triton"), before[3]]
    assert read(table) == tuple(after)
    assert "1 rows for capability 9.0, 2 others kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not what ops.py writes"),
        ('{"results": [{}], "device": {}}', "is not what ops.py writes (KeyError"),
        ('{"results": [], "device": {"type": "cpu"}}', "was measured on a CPU"),
        (None, "is not what ops.py writes (FileNotFoundError"),
    ],
)
def test_other_files_are_refused(choices, tmp_path, capsys, content, message):
    path = tmp_path / "ops.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        choices.main([str(path)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_broken_table_is_not_overwritten(choices, tmp_path, capsys):
    results, table = tmp_path / "ops.json", tmp_path / "choices.csv"
    results.write_text(json.dumps({"device": {"capability": "9.0"}, "results": [measured([1, 1, 1, 1], 2.0, 1.0)]}))
    table.write_text("something else\n")
    with pytest.raises(SystemExit) as stopped:
        choices.main([str(results), "--out", str(table)])
    assert stopped.value.code == 2
    assert "the columns must be" in capsys.readouterr().err
    assert table.read_text() == "something else\n"


def test_nothing_measured_writes_nothing(choices, tmp_path, capsys):
    results = tmp_path / "ops.json"
    results.write_text(json.dumps({"device": {"capability": "9.0"}, "results": []}))
    assert choices.main([str(results), "--out", str(tmp_path / "choices.csv")]) == 1
    assert list(tmp_path.iterdir()) == [results]
