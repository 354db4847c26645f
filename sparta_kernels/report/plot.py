"""The attack's loss at every iteration, as the SPARTA papers' Fig. 3 shows it."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.files import write_atomically

# Okabe and Ito's colours: told apart with any colour vision, and in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def check_plot(path: str | os.PathLike[str]) -> None:
    """Refuse what could not be drawn: an ending that stands for no image format, or no matplotlib.

    Raises:
        ValueError: the ending.
        ImportError: matplotlib is missing.
    """
    formats = sorted(_canvas().get_supported_filetypes())
    ending = Path(path).suffix[1:].lower()
    if ending not in formats:
        raise ValueError(f"a plot's name must end in one of {', '.join(formats)}, got {str(path)!r}")


def plot_losses(path: str | os.PathLike[str], document: Mapping[str, Any]) -> None:
    """Draw an evaluation document's losses to `path`, in the format of its ending: one line for each model.

    The line is the mean over the images, the shade one standard deviation to both sides (cut off at 0, which
    cross-entropy cannot pass). Where a model was evaluated with several backends, the first is drawn.

    Raises:
        OSError: `path` cannot be written. ValueError, ImportError: as `check_plot`.
    """
    check_plot(path)
    settings = document["settings"]
    figure = new_figure(7.2, 4.5)
    axes = figure.add_subplot()
    models: dict[str, Mapping[str, Any]] = {}
    for row in document["results"]:
        models.setdefault(row["model"], row)
    for i, (name, row) in enumerate(models.items()):
        mean, std = row["loss_mean"], row["loss_std"]
        label = f"{name}: clean error {row['clean_error']:.1%}, PGD-{settings['steps']} {_last(row):.1%}"
        draw_losses(axes, mean, std, colour=COLOURS[i % len(COLOURS)], label=label)
    axes.set_xlim(0, settings["steps"])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("PGD iteration")
    targeted = settings.get("targeted", True)
    axes.set_ylabel(f"cross-entropy to the {'target' if targeted else 'true'} class (nats)")
    axes.set_title(
        f"Loss during {'targeted' if targeted else 'untargeted'} PGD on {settings['images']} {settings['data']} images "
        f"(eps {settings['eps'] * 255:g}/255, step {settings['step_size'] * 255:g}/255)\n"
        f"mean and standard deviation; an attack succeeds by bringing it {'down' if targeted else 'up'}",
        fontsize=10,
        loc="left",
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_figure(path, figure)


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of this size in inches, which needs no display. ImportError without matplotlib."""
    canvas_kind = _canvas()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    canvas_kind(figure)
    return figure


def draw_losses(axes: Any, mean: Sequence[float], std: Sequence[float], *, colour: str, label: str) -> None:
    """The loss at iterations 0, 1, ...: a line, and a shade one standard deviation to both sides, cut off at 0."""
    axes.plot(range(len(mean)), mean, color=colour, label=label)
    low = [max(0.0, m - s) for m, s in zip(mean, std, strict=True)]
    high = [m + s for m, s in zip(mean, std, strict=True)]
    axes.fill_between(range(len(mean)), low, high, color=colour, alpha=0.14, linewidth=0)
    for edge in (low, high):
        axes.plot(range(len(mean)), edge, color=colour, alpha=0.4, linewidth=0.7)


def save_figure(path: str | os.PathLike[str], figure: Any) -> None:
    """Write it whole, in the format of the path's ending. OSError if it cannot be written."""
    image = io.BytesIO()
    figure.savefig(image, format=Path(path).suffix[1:].lower())
    write_atomically(path, image.getvalue())


def _last(row: Mapping[str, Any]) -> float:
    share: float = row["errors"][max(row["errors"], key=int)]
    return share


def _canvas() -> Any:
    """matplotlib's canvas that needs no display, leaving the program's own choice of backend alone."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install matplotlib") from error
    return FigureCanvasAgg
