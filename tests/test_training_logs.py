"""What a run writes down: tables and TensorBoard's events, however often it was stopped; configurations as TOML."""

from __future__ import annotations

import csv
import io
import math
import os
import re
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from sparta_kernels.training import (
    Batch,
    ConfigError,
    Epoch,
    Settings,
    TrainingLog,
    TrainingProgress,
    as_toml,
    progress,
    read_config,
)

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

BATCHES = 3


def _epoch(number, robust=None):
    values = {"epoch": number, "loss": 1 / number, "error": 0.1 * number, "clean_error": 1 / 3, "robust_error": robust}
    return Epoch(**values, images_per_second=12.5, learning_rate=0.1)


def _batch(epoch, number, loss=1.0):
    return Batch(epoch, number, BATCHES, 16, loss, 0.5)


def _rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---- tables --------------------------------------------------------------------------------------------------


def test_a_table_has_every_epoch_once_whatever_it_had_before(tmp_path):
    path, other = tmp_path / "net.csv", tmp_path / "more" / "metrics.csv"
    log = TrainingLog([path, other])
    assert not path.exists()
    for number in (1, 2, 3):
        log.epoch(_epoch(number, robust=0.75 if number == 2 else None))
    log.close()
    assert path.read_bytes() == other.read_bytes()
    rows = _rows(path)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [row["robust_error"] for row in rows] == ["", "0.75", ""]
    assert [float(row["clean_error"]) for row in rows] == [1 / 3] * 3  # bit for bit

    path.write_text("epoch,loss\n1,2\n1,2\n7,")  # what another program made of it
    log = TrainingLog([path], history=[_epoch(1), _epoch(2)])
    assert path.read_text().endswith("7,")  # this process may yet be refused
    log.begin()
    assert [row["epoch"] for row in _rows(path)] == ["1", "2"]
    log.epoch(_epoch(3))
    assert [row["epoch"] for row in _rows(path)] == ["1", "2", "3"]
    log.close()


def test_the_table_of_an_older_run_goes_when_this_one_is_stored(tmp_path):
    path = tmp_path / "net.csv"
    path.write_text("old")
    log = TrainingLog([path])
    assert path.read_text() == "old"
    log.batch(_batch(1, 1))
    assert path.read_text() == "old"
    log.begin()
    assert _rows(path) == []
    assert path.read_text().startswith("epoch,loss,error,clean_error,")
    log.close()


# ---- TensorBoard ---------------------------------------------------------------------------------------------


@pytest.fixture
def scalars():
    """A function: what TensorBoard shows of a folder, {tag: [(step, value), ...]}."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def read(folder):
        events = accumulator.EventAccumulator(str(folder)).Reload()
        return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    return read


def test_events_of_steps_done_again_are_told_once(tmp_path, scalars):
    log = TrainingLog([], tmp_path / "logs")
    assert not (tmp_path / "logs").exists()
    for number in (1, 2, 3):
        log.batch(_batch(1, number, loss=number))
    log.epoch(_epoch(1, robust=0.5))
    log.batch(_batch(2, 1, loss=99))  # killed here; the checkpoint is of step 3
    log.close()
    log = TrainingLog([], tmp_path / "logs", [_epoch(1)])
    for number in (1, 2, 3):
        log.batch(_batch(2, number, loss=3 + number))
    log.epoch(_epoch(2))
    log.close()
    found = scalars(tmp_path / "logs")
    assert found["batch/loss"] == [(step, step) for step in range(1, 7)]
    assert found["epoch/loss"] == [(3, 1), (6, 0.5)]
    assert found["epoch/epoch"] == [(3, 1), (6, 2)]
    assert found["epoch/robust_error"] == [(3, 0.5)]
    assert set(found) == {"batch/loss", "batch/error", *(f"epoch/{name}" for name in Epoch.__dataclass_fields__)}


def test_an_epoch_whose_steps_were_done_before_a_resume_is_told(tmp_path, scalars):
    log = TrainingLog([], tmp_path)
    for number in (1, 2, 3):
        log.batch(_batch(1, number))
    log.close()  # stopped while the epoch's network was tested
    log = TrainingLog([], tmp_path)
    log.epoch(_epoch(1))
    log.batch(_batch(2, 1))
    log.close()
    assert scalars(tmp_path)["epoch/loss"] == [(3, 1)]
    assert [step for step, _ in scalars(tmp_path)["batch/loss"]] == [1, 2, 3, 4]


def test_events_of_an_older_run_are_left_out(tmp_path, scalars):
    for loss in (7, 8):
        log = TrainingLog([], tmp_path)
        log.batch(_batch(1, 1, loss=loss))
        log.close()
    assert len(os.listdir(tmp_path)) == 2
    assert scalars(tmp_path)["batch/loss"] == [(1, 8)]


# ---- configurations ------------------------------------------------------------------------------------------

_names = st.text(string.ascii_lowercase + "_", min_size=1)
_items = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"])),
)


@example({"a": 'quotes " and \\ and \n, \x00, \x7f, \u2028, \U0001f600'})
@given(st.dictionaries(_names, st.one_of(_items, st.lists(_items, max_size=3))))
def test_configurations_are_read_as_they_were_written(entries):
    found = tomllib.loads(as_toml(entries))
    assert found == entries
    assert list(found) == list(entries)
    assert repr(found) == repr(entries)  # True is no 1, -0.0 no 0.0


def test_what_has_no_value_is_left_out_and_what_toml_cannot_hold_refused():
    assert as_toml({"a": None, "b": 1e-05, "c": (30, 60)}) == "b = 1e-05\nc = [30, 60]\n"
    assert math.isnan(tomllib.loads(as_toml({"a": math.nan}))["a"])
    with pytest.raises(TypeError, match="as_toml: a must be a string, a number, a boolean or a list"):
        as_toml({"a": {}})


def test_an_entry_has_a_known_name_and_a_plain_value(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('width = 2\nmilestones = [1, 2]\nactivation = "relu"\n')
    known = ("width", "milestones", "activation", "batch_size")
    assert read_config(path, known) == {"width": 2, "milestones": [1, 2], "activation": "relu"}
    for text, words in [
        ("batchsize = 1", "unknown entry batchsize; did you mean batch_size"),
        ("zzz = 1", "unknown entry zzz; allowed are activation, batch_size, milestones, width"),
        ("width = {a = 1}", "width must be a string, .* got dict"),
        ("milestones = [[1]]", "milestones must be .* got list"),
        ("width 2", "no TOML"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=f"run.toml: {words}"):
            read_config(path, known)
    with pytest.raises(FileNotFoundError):
        read_config(tmp_path / "none", known)


# ---- on the terminal -----------------------------------------------------------------------------------------


@pytest.fixture
def shown(monkeypatch):
    """A function: what the progress of two epochs is on a terminal or not, six seconds a step."""

    def show(terminal):
        now = [0.0]
        monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
        text = io.StringIO()
        console = Console(file=text, force_terminal=terminal, width=120, color_system=None)
        with TrainingProgress(console, Settings(epochs=2)) as shown:
            for epoch in (1, 2):
                for number in (1, 2, 3):
                    now[0] += 6
                    shown.batch(_batch(epoch, number))
                now[0] += 60  # of testing
                shown.epoch(_epoch(epoch, robust=0.5))
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.getvalue())

    return show


def test_a_line_now_and_then_where_there_is_no_terminal(shown):
    tested = "robust test error 50.0%  clean test error 33.3%  12 images/s"
    assert shown(terminal=False).splitlines() == [
        "epoch 1/2, step 2/3  loss 1.000  robust error 50.0%  2.67 images/s  ETA 0:00:24",
        "epoch 1  loss 1.000  robust training error 10.0%  " + tested,
        "epoch 2/2, step 1/3  loss 1.000  robust error 50.0%  2.67 images/s  ETA 0:00:52",
        "epoch 2/2, step 3/3  loss 1.000  robust error 50.0%  2.67 images/s  ETA 0:00:00",
        "epoch 2  loss 0.500  robust training error 20.0%  " + tested,
    ]


def test_a_bar_on_a_terminal(shown):
    text = shown(terminal=True)
    assert text.count("robust test error") == 2
    assert re.search(r"epoch 2/2 ━+ loss 1\.000  robust error 50\.0%  2\.67 images/s  ETA 0:00:00", text)
    assert "step" not in text
