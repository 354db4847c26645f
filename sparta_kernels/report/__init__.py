"""What came out: JSON documents, tables and plots."""

from ..machine import cpu_name
from .plot import COLOURS, check_plot, draw_losses, new_figure, plot_losses, save_figure
from .progress import duration, progress_bars
from .results import as_json, document, save_json
from .table import evaluation_notes, evaluation_table, evaluation_title, facts_table, megabytes, percent

__all__ = [
    "COLOURS",
    "as_json",
    "check_plot",
    "cpu_name",
    "document",
    "draw_losses",
    "duration",
    "evaluation_notes",
    "evaluation_table",
    "evaluation_title",
    "facts_table",
    "megabytes",
    "new_figure",
    "percent",
    "plot_losses",
    "progress_bars",
    "save_figure",
    "save_json",
]
