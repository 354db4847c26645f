"""Plots of every table, ours beside the papers' numbers, and of Figures 1 and 3."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..report import COLOURS, draw_losses, new_figure, save_figure
from .experiments import QUICK_LABEL, Need, Plan
from .feature_maps import FeatureMaps
from .published import Figure
from .runs import Runs
from .tables import Compared

_OURS, _PAPER = COLOURS[0], COLOURS[1]
_GREY = "#666666"


def plot_table(path: str | os.PathLike[str], compared: Compared) -> None:
    """Plot every error of a table, ours and the papers', with a panel per column, to `path` (.png, .pdf, ...).

    Raises:
        ImportError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    columns = [column for column in compared.headings if column != "size"]
    places, labels, headings = _places(compared)
    figure = new_figure(2.0 + 2.1 * len(columns), 1.9 + 0.27 * (len(places) + len(headings)))
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=True):
        for place, cells in zip(places, compared.cells, strict=True):
            cell = cells[column]
            if cell.ours is not None:
                axes.plot([cell.paper, cell.ours], [place, place], color="#bbbbbb", linewidth=1.2, zorder=1)
                axes.errorbar(
                    cell.ours, place, xerr=cell.spread, fmt="o", color=_OURS, markersize=6, capsize=2, zorder=3
                )
            axes.plot(cell.paper, place, "D", markerfacecolor="white", color=_PAPER, markersize=5.5, zorder=2)
        axes.set_title(compared.headings[column], fontsize=10)
        axes.grid(axis="x", alpha=0.25)
        axes.grid(axis="y", alpha=0.12)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.12)
        axes.set_xlabel("error in %", fontsize=9, color=_GREY)
    panels[0].set_yticks([*places, *headings], [*labels, *headings.values()])
    for tick in panels[0].get_yticklabels()[len(places) :]:
        tick.set_fontweight("bold")
    panels[0].set_ylim(max([*places, *headings]) + 0.7, -0.7)
    handles = [
        panels[0].plot([], [], "o", color=_OURS, label="ours")[0],
        panels[0].plot([], [], "D", markerfacecolor="white", color=_PAPER, label="the paper's")[0],
    ]
    figure.legend(handles=handles, loc="outside lower right", ncols=2, frameon=False, fontsize=9)
    _title(figure, compared.title, compared.quick)
    save_figure(path, figure)


def plot_figure3(
    path: str | os.PathLike[str], figure3: Figure, runs: Runs
) -> dict[str, tuple[list[float], list[float]]]:
    """Plot the loss at every iteration of the attack, for standard and adversarial training, to `path`.

    Networks that are not evaluated yet are left out; their labels say so. Of several seeds the first is plotted.

    Returns:
        "training/label" -> mean and standard deviation of the loss at iterations 0, 1, ...

    Raises:
        ImportError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    steps = runs.plan.report_at[-1]
    drawn: dict[str, tuple[list[float], list[float]]] = {}
    figure = new_figure(10.0, 4.6)
    panels = figure.subplots(1, 2)
    for axes, training, letter in zip(panels, ("standard", "adversarial"), "ab", strict=True):
        count = 0
        of_panel = [(label, network) for label, network in figure3.networks if network.training == training]
        for i, (label, network) in enumerate(of_panel):
            found = runs.found(runs.plan.runs(network)[0], Need.ATTACKED)
            if found is None:
                axes.plot([], [], color=COLOURS[i], label=f"{label}: not evaluated yet")
                continue
            losses = every_fifth(found.outcomes.arrays["loss"]).astype(np.float64)
            count = len(losses)
            mean, std = losses.mean(0).tolist(), losses.std(0).tolist()
            draw_losses(axes, mean, std, colour=COLOURS[i], label=f"{label}: {mean[-1]:.2f} at the end")
            drawn[f"{training}/{label}"] = (mean, std)
        axes.set_title(f"({letter}) {training} training, {count} images", fontsize=10, loc="left")
        axes.set_xlim(0, steps)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(f"iteration of PGD-{steps}")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    panels[0].set_ylabel("cross-entropy to the target class (nats)")
    _title(
        figure,
        f"Figure 3. {_with_data(figure3.title, runs.plan)}\n"
        "mean and standard deviation; the attack brings the loss down: a higher line is harder to attack",
        runs.plan.quick,
    )
    save_figure(path, figure)
    return drawn


def plot_figure1(path: str | os.PathLike[str], figure1: Figure, maps: Sequence[FeatureMaps], plan: Plan) -> None:
    """Plot the feature maps of each network, a row each, to `path`.

    Raises:
        ImportError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    headings = (
        *("clean image", "adversarial image", f"perturbation (±{plan.eps * 255:g}/255)"),
        *("before: clean", "before: adversarial", "before: difference"),
        *("after: clean", "after: adversarial", "after: difference"),
    )
    figure = new_figure(1.75 * len(headings), 1.1 + 2.05 * len(maps))
    grid = figure.subplots(len(maps), len(headings), squeeze=False)
    for line, found in zip(grid, maps, strict=True):
        pictures = [
            *((image, {"vmin": 0, "vmax": 1, "cmap": "gray"}) for image in (found.clean, found.adversarial)),
            (_centred(found.adversarial - found.clean, plan.eps), {"vmin": 0, "vmax": 1, "cmap": "gray"}),
        ]
        difference = max(float(np.abs(b - a).max()) for a, b in (found.before, found.after)) or 1.0
        for clean, adversarial in (found.before, found.after):
            shared = {
                "vmin": float(min(clean.min(), adversarial.min())),
                "vmax": float(max(clean.max(), adversarial.max())),
                "cmap": "viridis",
            }
            pictures += [(clean, shared), (adversarial, shared)]
            pictures.append((adversarial - clean, {"vmin": -difference, "vmax": difference, "cmap": "RdBu_r"}))
        for axes, (picture, how) in zip(line, pictures, strict=True):
            axes.imshow(picture, interpolation="nearest", **how)
            axes.set_xticks([])
            axes.set_yticks([])
        line[0].set_ylabel(found.label, fontsize=11, fontweight="bold")
        line[0].set_xlabel(f"predicted: {found.predicted[0]}", fontsize=8)
        line[1].set_xlabel(f"predicted: {found.predicted[1]}", fontsize=8)
        for k, change in ((5, found.change[0]), (8, found.change[1])):
            line[k].set_xlabel(f"changed by {change:.0%}", fontsize=8)
        line[3].set_xlabel(f"channel {found.channel}", fontsize=8)
    for axes, heading in zip(grid[0], headings, strict=True):
        axes.set_title(heading, fontsize=9)
    _title(
        figure,
        f"Figure 1. {_with_data(figure1.title, plan)}\n"
        f"test image {maps[0].image}, class {maps[0].true}; targeted PGD-{plan.report_at[-1]}. The channel that the "
        "attack changes most, before the activation; one colour scale for clean and adversarial,\none for both "
        "differences of a line. Changed by: mean |adversarial - clean| over mean |clean|, over all channels",
        plan.quick,
    )
    save_figure(path, figure)


def every_fifth(values: np.ndarray) -> np.ndarray:
    """Rows 0, 5, 10, ...: the 20% of the test images that Figure 3 uses."""
    return values[::5]


def _centred(perturbation: np.ndarray, eps: float) -> np.ndarray:
    """Map -eps..eps to 0..1."""
    shown: np.ndarray = np.clip(perturbation / (2 * eps) + 0.5, 0, 1)
    return shown


def _places(compared: Compared) -> tuple[list[float], list[str], dict[float, str]]:
    """Each row's position from the top and its label, and the positions of the groups' headings."""
    places, labels, headings = [], [], {}
    place, group = 0.0, None
    several = len({row.group for row in compared.table.rows}) > 1
    for row in compared.table.rows:
        if several and row.group != group:
            headings[place] = row.group
            place += 1
        group = row.group
        places.append(place)
        labels.append(row.label)
        place += 1
    return places, labels, headings


def _with_data(title: str, plan: Plan) -> str:
    return title.replace("CIFAR-10's", "digits'") if plan.quick else title


def _title(figure: Any, title: str, quick: bool) -> None:
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    if quick:
        figure.supxlabel(QUICK_LABEL, fontsize=10, color="#b00000", x=0.01, ha="left", fontweight="bold")
