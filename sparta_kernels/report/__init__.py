"""What came out: JSON documents, tables and plots."""

from ..machine import cpu_name
from .plot import check_plot, plot_losses
from .results import as_json, document, save_json
from .table import evaluation_notes, evaluation_table, evaluation_title, facts_table, megabytes, percent

__all__ = [
    "as_json",
    "check_plot",
    "cpu_name",
    "document",
    "evaluation_notes",
    "evaluation_table",
    "evaluation_title",
    "facts_table",
    "megabytes",
    "percent",
    "plot_losses",
    "save_json",
]
