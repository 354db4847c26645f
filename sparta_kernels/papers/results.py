"""Makes a table or figure from completed runs: files in a folder, lines for the terminal, JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from torch import Tensor

from .. import training
from ..data.files import write_atomically
from ..nn import ResNet
from .experiments import QUICK_LABEL, Need
from .feature_maps import FeatureMaps, feature_maps
from .figures import plot_figure1, plot_figure3, plot_table
from .published import Figure, published
from .runs import Runs
from .tables import as_csv, compare, markdown, terminal


@dataclass(frozen=True)
class Result:
    """The result of one table or figure.

    Attributes:
        name: "table6", say.
        shown: for the terminal, in order.
        notes: to be printed below.
        files: written.
        content: JSON-serialisable.
    """

    name: str
    shown: list[RenderableType]
    notes: list[str]
    files: list[Path]
    content: dict[str, Any] = field(default_factory=dict)


def write(
    name: str, runs: Runs, folder: Path, *, device: torch.device | str, images: Callable[[str], tuple[Tensor, Tensor]]
) -> Result:
    """Write a table or figure, as far as known, to `folder`: NAME.md, NAME.csv and NAME.png.

    Args:
        name: one of `experiments.experiments()`.
        runs: where the runs are kept.
        folder: must exist.
        device: where Figure 1's images are attacked.
        images: returns the test images and labels of a data set; only Figure 1 calls it.

    Raises:
        ImportError: matplotlib is missing. OSError: a file cannot be written.
    """
    if name in published().tables:
        return _table(name, runs, folder)
    if name == "figure3":
        return _figure3(runs, folder)
    return _figure1(runs, folder, device, images)


def _table(name: str, runs: Runs, folder: Path) -> Result:
    compared = compare(published().tables[name], runs)
    picture = folder / f"{name}.png"
    plot_table(picture, compared)
    _write(folder / f"{name}.md", markdown(compared, picture.name))
    _write(folder / f"{name}.csv", as_csv(compared))
    rows = [
        {"group": row.group, "label": row.label}
        | {
            column: {"ours": cell.ours, "std": cell.spread, "paper": cell.paper, "difference": cell.difference}
            for column, cell in cells.items()
        }
        for row, cells in compared.lines
    ]
    content = {"headings": compared.headings, "rows": rows, "notes": compared.notes}
    return Result(name, [terminal(compared)], compared.notes, _files(folder, name), content)


def _figure3(runs: Runs, folder: Path) -> Result:
    figure = published().figures["figure3"]
    drawn = plot_figure3(folder / "figure3.png", figure, runs)
    columns = ["iteration", *(f"{name} {kind}" for name in drawn for kind in ("mean", "std"))]
    series = [values for mean_and_std in drawn.values() for values in mean_and_std]
    rows = [[k, *(f"{values[k]:.6g}" for values in series)] for k in range(runs.plan.report_at[-1] + 1)]
    lines = [
        f"{name}: mean loss {mean[0]:.2f} at the start, {mean[-1]:.2f} (std {std[-1]:.2f}) at iteration {len(mean) - 1}"
        for name, (mean, std) in drawn.items()
    ]
    return _figure(figure, runs, folder, columns, rows, lines)


def _figure1(
    runs: Runs, folder: Path, device: torch.device | str, images: Callable[[str], tuple[Tensor, Tensor]]
) -> Result:
    figure = published().figures["figure1"]
    models: dict[str, ResNet] = {}
    data_name = ""
    for label, network in figure.networks:
        run = runs.plan.runs(network)[0]
        if runs.state(run, Need.TRAINED).done:
            models[label], _ = training.load_checkpoint(runs.checkpoint(run), device)
            data_name = run.data
    maps: list[FeatureMaps] = []
    (folder / "figure1.png").unlink(missing_ok=True)  # of another plan, perhaps
    if models:
        x, y = images(data_name)
        maps = feature_maps(models, x.to(device), y.to(device), runs.plan)
        plot_figure1(folder / "figure1.png", figure, maps, runs.plan)
    columns = ["network", "image", "class", "predicted clean", "predicted adversarial", "change before", "change after"]
    rows = [
        [m.label, m.image, m.true, *m.predicted, f"{m.change[0]:.6g}", f"{m.change[1]:.6g}"] for m in maps
    ]  # fmt: skip
    lines = [
        f"{m.label}: the attack changes the maps by {m.change[0]:.1%} before the activation and by {m.change[1]:.1%} "
        f"after it (mean |adversarial - clean| over mean |clean|); class {m.predicted[0]} becomes {m.predicted[1]}"
        for m in maps
    ]
    return _figure(figure, runs, folder, columns, rows, lines)


def _figure(
    figure: Figure, runs: Runs, folder: Path, columns: list[str], rows: list[list[Any]], lines: list[str]
) -> Result:
    """What figures have in common: `columns` and `rows` for the CSV, `lines` for people."""
    name, quick = figure.name, runs.plan.quick
    labels = {network: label for label, network in figure.networks}
    need = Need.ATTACKED if name == "figure3" else Need.TRAINED
    for network, label in labels.items():
        if not runs.state(runs.plan.runs(network)[0], need).done:
            lines.append(f"{network.training}/{label}: not there yet, -")
    notes = runs.plan.readings() + [f"the papers: {note}" for note in figure.notes]
    title = f"Figure {name.removeprefix('figure')} ({figure.v1} in v1). {figure.title}"
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([[f"# {QUICK_LABEL}"]] if quick else [])
    writer.writerows([columns, *rows])
    _write(folder / f"{name}.csv", text.getvalue())
    label_lines = [f"**{QUICK_LABEL[0].upper()}{QUICK_LABEL[1:]}.**", ""] if quick else []
    listed = [f"- {line}" for line in [*lines, *notes]]
    picture = [f"![{title}]({name}.png)", ""] if (folder / f"{name}.png").exists() else []
    page = [f"# {title}", "", *label_lines, *picture, *listed]
    _write(folder / f"{name}.md", "\n".join(page) + "\n")
    heading = f"{title}\n{QUICK_LABEL.upper()}" if quick else title
    content = {"columns": columns, "rows": rows, "lines": lines, "notes": notes}
    return Result(name, [heading, *lines], notes, _files(folder, name), content)


def _files(folder: Path, name: str) -> list[Path]:
    every = [folder / f"{name}.{ending}" for ending in ("md", "csv", "png")]
    return [path for path in every if path.exists()]


def _write(path: Path, text: str) -> None:
    write_atomically(path, text.encode())
