"""Our numbers beside the papers': a table for the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, replace
from statistics import mean, stdev

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table as TerminalTable
from rich.text import Text

from .. import nn
from .experiments import QUICK_LABEL, READINGS, READINGS_OF_QUICK, Need, Run
from .published import Network, Row, Table
from .runs import Runs

MISSING = "-"


@dataclass(frozen=True)
class Cell:
    """Our number (the mean and, of several seeds, the standard deviation) beside the papers'.

    Errors are in percent, their difference in percentage points; sizes in millions of parameters. `ours` and `spread`
    are None if a run is missing, `spread` also with a single seed.
    """

    ours: float | None
    spread: float | None
    paper: float

    @property
    def difference(self) -> float | None:
        """Ours minus the papers'."""
        return None if self.ours is None else self.ours - self.paper

    def words(self) -> tuple[str, str, str]:
        """Our number, the papers' and the difference, as printed."""
        ours = MISSING if self.ours is None else f"{self.ours:.2f}"
        ours += "" if self.spread is None else f" ±{self.spread:.2f}"
        return ours, f"{self.paper:.2f}", MISSING if self.difference is None else f"{self.difference:+.2f}"


@dataclass(frozen=True)
class Compared:
    """A table of the papers with our numbers in it.

    Attributes:
        table: the papers'.
        headings: of its columns.
        cells: for each of its rows, by column.
        quick: our numbers are of the quick plan.
        notes: how ours were made, then the papers' ambiguities, a line each.
    """

    table: Table
    headings: dict[str, str]
    cells: list[dict[str, Cell]]
    quick: bool
    notes: list[str]

    @property
    def title(self) -> str:
        number = self.table.name.removeprefix("table")
        return f"Table {number} ({self.table.v1} in v1). {self.table.title}"

    @property
    def lines(self) -> list[tuple[Row, dict[str, Cell]]]:
        return list(zip(self.table.rows, self.cells, strict=True))


def compare(table: Table, runs: Runs) -> Compared:
    """The table with the results of the finished runs."""
    plan = runs.plan
    cells = [{column: _cell(row, column, runs) for column in table.columns} for row in table.rows]
    notes = plan.readings() + READINGS.get(table.name, [])
    notes += (READINGS_OF_QUICK.get(table.name, []) if plan.quick else []) + _parity(table, runs)
    notes += [f"the papers: {note}" for note in table.notes]
    return Compared(table, {c: plan.headings[c] for c in table.columns}, cells, plan.quick, notes)


def parameters(network: Network) -> int:
    """The exact number of parameters at the papers' width, for 32x32 images in ten classes."""
    build = {"resnet18": nn.resnet18, "resnet34": nn.resnet34}[network.model]
    with torch.device("meta"):
        model = build(activation=network.activation, sites=network.sites)
    return sum(parameter.numel() for parameter in model.parameters())


def terminal(compared: Compared) -> TerminalTable:
    """Three lines for each row: ours, the papers', the difference."""
    title = f"{compared.title}\n{QUICK_LABEL.upper()}" if compared.quick else compared.title
    shown = TerminalTable(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    shown.collapse_padding, shown.pad_edge = True, False
    shown.add_column("error in %")
    shown.add_column("")
    for heading in compared.headings.values():
        shown.add_column(heading, justify="right", no_wrap=True)
    group = None
    for row, cells in compared.lines:
        if row.group != group:
            group = row.group
            shown.add_row(Text(group, style="bold"))
        columns = [cell.words() for cell in cells.values()]
        for i, name in enumerate(("ours", "paper", "difference")):
            shown.add_row(Text(row.label if i == 0 else ""), name, *(words[i] for words in columns))
    return shown


def markdown(compared: Compared, picture: str | None = None) -> str:
    """The table, the notes under it and, if it has one, the picture of this name, as Markdown."""
    lines = [f"# {compared.title}", ""]
    if compared.quick:
        lines += [f"**{QUICK_LABEL[0].upper()}{QUICK_LABEL[1:]}.**", ""]
    lines += ["Each cell: ours / the paper's (difference). Errors in percent, differences in percentage points.", ""]
    if "size" in compared.headings:
        lines[-2] += " Sizes in millions of parameters."
    lines.append(f"| | {' | '.join(compared.headings.values())} |")
    lines.append("|---|" + "---:|" * len(compared.headings))
    group = None
    for row, cells in compared.lines:
        if row.group != group:
            group = row.group
            lines.append(f"| **{group}** |" + " |" * len(cells))
        words = [cell.words() for cell in cells.values()]
        lines.append(f"| {row.label} | " + " | ".join(f"{a} / {b} ({c})" for a, b, c in words) + " |")
    lines += ["", *(f"- {note}" for note in compared.notes)]
    if picture is not None:
        lines += ["", f"![{compared.title}]({picture})"]
    return "\n".join(lines) + "\n"


def as_csv(compared: Compared) -> str:
    """A line for each number: table, group, label, column, ours, spread, paper, difference, and what ours are of."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", "group", "label", "column", "ours", "ours_std", "paper", "difference", "note"])
    note = QUICK_LABEL if compared.quick else ""
    for row, cells in compared.lines:
        for column, cell in cells.items():
            heading = compared.headings[column]
            numbers = [cell.ours, cell.spread, cell.paper, cell.difference]
            shown = ["" if number is None else f"{number:.6g}" for number in numbers]
            writer.writerow([compared.table.name, row.group, row.label, heading, *shown, note])
    return text.getvalue()


def _cell(row: Row, column: str, runs: Runs) -> Cell:
    paper = row.values[column]
    if column == "size":
        return Cell(parameters(row.network) / 1e6, None, paper)
    network = replace(row.network, training="standard") if column == "standard_clean" else row.network
    values = [_error(run, column, runs) for run in runs.plan.runs(network)]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return Cell(None, None, paper)
    return Cell(mean(known), stdev(known) if len(known) > 1 else None, paper)


def _error(run: Run, column: str, runs: Runs) -> float | None:
    """The error in percent; None if it is not known yet."""
    need = Need.CLEAN if column == "standard_clean" else Need.ATTACKED
    found = runs.found(run, need)
    if found is None:
        return None
    if column in ("clean", "standard_clean"):
        return 100 * found.clean
    iterate = dict(zip(("pgd10", "pgd30", "pgd50"), runs.plan.report_at, strict=True))[column]
    return 100 * found.errors[iterate]


def _parity(table: Table, runs: Runs) -> list[str]:
    """How the attack's gradients in a lower precision compare with fp32's, at worst."""
    if runs.plan.precision == "fp32":
        return []
    checks = [runs.found(run, Need.ATTACKED) for row in table.rows for run in runs.plan.runs(row.network)]
    parities = [found.parity for found in checks if found is not None and found.parity is not None]
    if not parities:
        return []
    worst = max(parities, key=lambda parity: abs(parity.difference))
    verdict = "at most" if worst.passed else "MORE THAN"
    return [
        f"errors under attack by gradients in {runs.plan.precision} differ from those by fp32, on {worst.images} "
        f"images, by {worst.difference:+.2f} points where most: {verdict} the {worst.tolerance:g} allowed"
    ]
