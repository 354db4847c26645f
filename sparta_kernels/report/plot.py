"""The attack's loss at every iteration, as the SPARTA papers' Fig. 3 shows it."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
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
    from matplotlib.figure import Figure

    settings = document["settings"]
    figure = Figure(figsize=(7.2, 4.5), dpi=150, layout="constrained")
    _canvas()(figure)
    axes = figure.add_subplot()
    models: dict[str, Mapping[str, Any]] = {}
    for row in document["results"]:
        models.setdefault(row["model"], row)
    for i, (name, row) in enumerate(models.items()):
        mean, std = row["loss_mean"], row["loss_std"]
        iterations = range(len(mean))
        colour = COLOURS[i % len(COLOURS)]
        label = f"{name}: clean error {row['clean_error']:.1%}, PGD-{settings['steps']} {_last(row):.1%}"
        axes.plot(iterations, mean, color=colour, label=label)
        low = [max(0.0, m - s) for m, s in zip(mean, std, strict=True)]
        high = [m + s for m, s in zip(mean, std, strict=True)]
        axes.fill_between(iterations, low, high, color=colour, alpha=0.18, linewidth=0)
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


def save_figure(path: str | os.PathLike[str], figure: Any) -> None:
    """Write a matplotlib figure whole or not at all, in the format of the path's ending."""
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
