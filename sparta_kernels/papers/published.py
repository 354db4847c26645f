"""The published numbers of the two SPARTA papers, from published.json, and where the papers disagree."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Network:
    """A trained network of the papers.

    Attributes:
        activation: used at the sites, a string for `nn.make_activation`.
        model, sites, data: backbone, sites and data set, by this package's names.
        training: "adversarial" or "standard".
        source: where its SPARTA comes from and stays frozen: what of that network differs ("model" or "data"), as
            (name, value) pairs; empty for a network trained as a whole.
    """

    activation: str
    model: str = "resnet18"
    sites: str = "G1234.B2"
    data: str = "cifar10"
    training: str = "adversarial"
    source: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Row:
    """A line of a table: its heading and label there, the network, and the printed number of each column."""

    group: str
    label: str
    network: Network
    values: dict[str, float]


@dataclass(frozen=True)
class Table:
    """A table of v2. Errors are top-1, in percent; sizes in millions of parameters.

    Attributes:
        name: "table2" ... "table9".
        title: what it compares.
        v1: the same table's name in v1.
        columns: of "pgd10", "pgd30", "pgd50", "clean" (all of the network in the row), "standard_clean" (of the
            same network under standard training) and "size".
        rows: its lines.
        notes: where the papers are ambiguous, or disagree with each other or themselves.
    """

    name: str
    title: str
    v1: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Figure:
    """A figure of v2 that trained networks are in: labels and networks in the paper's order."""

    name: str
    title: str
    v1: str
    networks: tuple[tuple[str, Network], ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Protocol:
    """How the papers train and attack, as far as stated (v2, section 4.2.1). eps and step_size are in pixel units."""

    eps: float
    step_size: float
    training_attack_steps: int
    reported_iterates: tuple[int, ...]
    learning_rate: float
    milestones: tuple[int, ...]
    weight_decay: float


@dataclass(frozen=True)
class Published:
    """Both papers: their titles by "v1" and "v2", and what v2 numbers "table2", ..., "figure1", ..."""

    papers: dict[str, str]
    protocol: Protocol
    tables: dict[str, Table]
    figures: dict[str, Figure] = field(default_factory=dict)


@cache
def published() -> Published:
    """The papers' numbers, read once."""
    content = json.loads(Path(__file__).with_name("published.json").read_text("utf-8"))
    protocol = content["protocol"]
    return Published(
        papers=content["papers"],
        protocol=Protocol(
            eps=protocol["eps"][0] / protocol["eps"][1],
            step_size=protocol["step_size"][0] / protocol["step_size"][1],
            training_attack_steps=protocol["training_attack_steps"],
            reported_iterates=tuple(protocol["reported_iterates"]),
            learning_rate=protocol["learning_rate"],
            milestones=tuple(protocol["milestones"]),
            weight_decay=protocol["weight_decay"],
        ),
        tables={name: _table(name, table) for name, table in content["tables"].items()},
        figures={
            name: Figure(
                name,
                figure["title"],
                figure["v1"],
                tuple((entry.pop("label"), _network(entry)) for entry in figure["networks"]),
                tuple(figure["notes"]),
            )
            for name, figure in content["figures"].items()
        },
    )


def _table(name: str, table: dict[str, Any]) -> Table:
    columns = tuple(table["columns"])
    rows = tuple(
        Row(
            row["group"],
            row["label"],
            _network(row["network"]),
            dict(zip(columns, row["values"], strict=True)),
        )
        for row in table["rows"]
    )
    return Table(name, table["title"], table["v1"], columns, rows, tuple(table["notes"]))


def _network(entry: dict[str, Any]) -> Network:
    return Network(**entry | {"source": tuple(entry.get("source", {}).items())})
