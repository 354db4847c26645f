"""The papers' numbers that are shipped, which runs they need, and how ours are put beside them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sparta_kernels
from sparta_kernels import papers, training
from sparta_kernels.papers.published import Network
from sparta_kernels.papers.tables import parameters
from sparta_kernels.training import checkpoint

PUBLISHED = papers.published()
SEVEN = ["ReLU", "ELU", "GELU", "FD", "DyReLU", "SmReLU", "SPARTA"]
ERRORS = ["pgd10", "pgd30", "pgd50", "clean"]
# Rows in their order, columns, and the sum of all numbers in the paper's table: a slip of the pen in any changes it.
TABLES = {
    "table2": (["ReLU", "SPARTA-w/o-DPNet", "SPARTA"] * 2, ERRORS, 1479.65),
    "table3": (["N = 1", "N = 2", "N = 4"], ERRORS, 553.92),
    "table4": (["G1.B2", "G2.B2", "G3.B2", "G4.B2", "G1234.B12", "G1234.B2"], ERRORS, 1125.12),
    "table5": (["Swish", "Swish-ReLU", "SPARTA"], ERRORS[:3], 515.78),
    "table6": (SEVEN * 2, [*ERRORS, "standard_clean", "size"], 2979.31),
    "table7": (SEVEN * 2, ERRORS, 3144.84),
    "table8": (
        [
            "ReLU",
            "SPARTA from ResNet-34",
            "SPARTA",
            "ReLU",
            "SPARTA from ResNet-18",
            "SPARTA",
            "SPARTA, as v1 prints it",
        ],
        ERRORS,
        1257.85,
    ),
    "table9": (["ReLU", "SPARTA from SVHN", "SPARTA", "ReLU", "SPARTA from CIFAR-10", "SPARTA"], ERRORS, 1025.58),
}
# The same network has the same numbers in every table, but for these: (column, the numbers printed).
DISAGREEMENTS = {
    ("svhn", "relu", "clean"): {6.44, 6.45},
    ("svhn", "sparta", "clean"): {6.54, 7.05},
    ("resnet34", "sparta", "pgd10"): {29.17, 27.73},
    ("resnet34", "sparta", "pgd30"): {64.13, 42.23},
    ("resnet34", "sparta", "pgd50"): {72.91, 46.4},
    ("resnet34", "sparta", "clean"): {14.47, 23.84},
}


def test_every_table_is_complete():
    assert list(PUBLISHED.tables) == list(TABLES)
    for name, (labels, columns, total) in TABLES.items():
        table = PUBLISHED.tables[name]
        assert [row.label for row in table.rows] == labels, name
        assert list(table.columns) == columns, name
        assert all(list(row.values) == columns for row in table.rows), name
        assert sum(value for row in table.rows for value in row.values.values()) == pytest.approx(total, abs=0.001)
    assert [label for label, _ in PUBLISHED.figures["figure1"].networks] == ["ReLU", "DyReLU", "FD", "SPARTA"]
    assert [network.training for _, network in PUBLISHED.figures["figure3"].networks] == 3 * ["standard"] + 3 * [
        "adversarial"
    ]


def test_tables_agree_but_where_their_notes_say_so():
    printed: dict[tuple[Network, str], set[float]] = {}
    for table in PUBLISHED.tables.values():
        for row in table.rows:
            for column, value in row.values.items():
                network = replace(row.network, training="standard") if column == "standard_clean" else row.network
                printed.setdefault((network, column.replace("standard_", "")), set()).add(value)
    different = {}
    for (network, column), values in printed.items():
        if len(values) > 1:
            place = network.model if network.data == "cifar10" else network.data
            different[place, network.activation, column] = values
    assert different == DISAGREEMENTS
    notes = {name: " ".join(table.notes) for name, table in PUBLISHED.tables.items()}
    for name, words in {
        "table3": ["Table 4's G4.B2"],
        "table4": ["Table 3's N = 1"],
        "table5": ["Table 6's SmReLU"],
        "table6": ["Swish in Table 5", "11.99 M and 22.11 M"],
        "table7": ["PGD-20", "6.54", "67.95 twice"],
        "table8": ["27.73, 42.23, 46.40 and 23.84"],
        "table9": ["6.44 and 6.54", "PGD-20"],
    }.items():
        assert all(word in notes[name] for word in words), name
    # What those notes say of equal numbers.
    rows = {(name, row.group, row.label): row.values for name, table in PUBLISHED.tables.items() for row in table.rows}
    smooth, swish = rows["table6", "ResNet-18", "SmReLU"], rows["table5", "ResNet-18", "Swish"]
    assert all(smooth[column] == swish[column] for column in ERRORS[:3])


def test_sizes_are_those_that_the_paper_prints():
    for row in PUBLISHED.tables["table6"].rows:
        ours = parameters(row.network)
        off = 0.01 if (row.network.model, row.network.activation) == ("resnet34", "sparta") else 0.0
        assert abs(ours / 1e6 + off - row.values["size"]) <= 0.0065, (row.group, row.label, ours)
    assert parameters(Network("sparta")) == 11_985_490
    assert parameters(Network("sparta", model="resnet34")) == 22_093_650


def test_the_numbers_are_shipped():
    root = Path(sparta_kernels.__file__).parents[1]
    if not (root / "pyproject.toml").exists():
        pytest.skip("not in the source folder")
    assert '"papers/*.json"' in (root / "pyproject.toml").read_text()


@pytest.mark.parametrize("activation", sorted({row.network.activation for row in PUBLISHED.tables["table6"].rows}))
def test_a_stored_network_is_the_same_when_it_is_read(activation, tmp_path):
    """Whatever of a module is in no state dict is lost in a checkpoint, and what is read in its place is garbage."""
    settings = training.Settings(activation=activation, width=2, epochs=1, attack="none")
    torch.manual_seed(0)
    model = training.build_model(settings.model, training.model_arguments(settings)).eval()
    metadata = {"model": {"name": settings.model, "arguments": training.model_arguments(settings)}}
    path = tmp_path / "network.safetensors"
    checkpoint.save_checkpoint(path, model, {}, metadata | {"settings": {}, "history": [], "epoch": 0})
    x = torch.rand(3, 1, 8, 8)
    read, _ = training.load_checkpoint(path)
    assert torch.equal(read(x), model(x))
    assert {name for name, _ in model.named_buffers()} <= set(model.state_dict()), "a buffer that is not stored"


def test_the_plan_is_the_papers():
    plan = papers.Plan()
    settings = plan.run(Network("sparta"), 0).settings()
    assert (settings.learning_rate, settings.weight_decay, settings.milestones) == (0.1, 1e-4, (30, 60))
    assert (settings.attack, settings.attack_steps, settings.eps) == ("sparta", 10, 16 / 255)
    assert (settings.epochs, settings.batch_size, settings.momentum, settings.width) == (90, 128, 0.9, 64)
    assert (plan.step_size, plan.report_at, plan.images) == (1 / 255, (10, 30, 50), None)
    assert plan.run(Network("sparta", training="standard"), 0).settings().attack == "none"
    words = " ".join(plan.readings())
    assert "do not give epochs, batch size, momentum, augmentation: here 90, 128, 0.9" in words
    assert "preset sparta" in words
    short = papers.Plan(epochs=30, attack="xie2019")
    assert short.milestones == (10, 20)
    assert papers.Plan(epochs=2).milestones == (1,)
    assert "after epochs 10 and 20 (the papers: 30 and 60)" in " ".join(short.readings())
    assert "Xie et al. 2019; the papers state step 1/255" in " ".join(short.readings())
    assert papers.QUICK_LABEL not in words
    assert papers.QUICK_LABEL in papers.quick_plan().readings()


def test_tables_share_runs_and_sources_come_first():
    plan = papers.Plan()
    sparta = plan.run(Network("sparta"), 0)
    sharing = [name for name in papers.experiments() if sparta in papers.needs([name], plan)]
    assert sharing == ["table2", "table4", "table5", "table6", "table8", "table9", "figure3"]
    counts = {name: len(papers.needs([name], plan)) for name in papers.experiments()}
    assert counts == {
        **{"table2": 6, "table3": 3, "table4": 6, "table5": 3, "table6": 28, "table7": 14, "table8": 6, "table9": 6},
        **{"figure1": 4, "figure3": 6},
    }
    every = papers.needs(papers.experiments(), plan)
    assert len(every) == 57
    order = list(every)
    assert all(order.index(run.source) < order.index(run) for run in order if run.source)
    assert len({run.name for run in order}) == len({run.folder for run in order}) == 57
    standard = replace(sparta.network, training="standard")
    wanted = papers.needs(["table6", "figure3"], plan)
    assert wanted[plan.run(standard, 0)] is papers.Need.ATTACKED, "Figure 3 wants more than Table 6"
    assert papers.needs(["table6"], plan)[plan.run(standard, 0)] is papers.Need.CLEAN


def test_a_run_is_another_one_with_other_settings():
    network = Network("sparta", source=(("model", "resnet34"),))
    folders = {
        plan.run(network, seed).folder
        for plan in (
            papers.Plan(),
            papers.Plan(epochs=30),
            papers.Plan(precision="bf16"),
            papers.Plan(attack="xie2019"),
            papers.quick_plan(),
        )
        for seed in (0, 1)
    }
    assert len(folders) == 10
    names = {papers.quick_plan().run(Network("relu", data=data), 0).folder for data in ("cifar10", "svhn")}
    assert len(names) == 2, "digits for one data set are not digits for another"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"epochs": 0}, "epochs"),
        ({"seeds": 0}, "seeds"),
        ({"attack": "none"}, "attack"),
        ({"precision": "fp8"}, "precision"),
    ],
)
def test_a_wrong_plan_is_refused(arguments, name):
    with pytest.raises(ValueError, match=f"{name} must"):
        papers.Plan(**arguments)
