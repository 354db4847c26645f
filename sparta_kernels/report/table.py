"""Results as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table


def evaluation_table(results: Sequence[Mapping[str, Any]], title: str | None = None) -> Table:
    """One row for each checkpoint and backend in an evaluation's results: errors, speed and memory."""
    iterates = list(results[0]["errors"])
    # Tight, and headings on two lines: the table has to fit into 80 columns.
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.collapse_padding, table.pad_edge = True, False
    table.add_column("model", overflow="fold")
    table.add_column("backend", no_wrap=True)
    for heading in ("clean", *(f"PGD-{k}" for k in iterates), "target\nhit", "images\n/s", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in results:
        table.add_row(
            str(row["model"]),
            str(row["backend"]),
            percent(row["clean_error"]),
            *(percent(row["errors"][k]) for k in iterates),
            percent(row["target_success"][iterates[-1]]),
            f"{row['images_per_second']:.0f}",
            megabytes(row["peak_memory"]),
        )
    return table


def facts_table(facts: Mapping[str, Any], title: str | None = None) -> Table:
    """Nested facts as two columns, a row for each leaf: `cpu.isa  avx512`."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    table.add_column("fact", no_wrap=True)
    table.add_column("value", overflow="fold")
    for name, value in _leaves("", facts):
        table.add_row(name, value)
    return table


def percent(share: float) -> str:
    """0.0306 as "3.1%"."""
    return f"{100 * share:.1f}%"


def megabytes(count: int | None) -> str:
    """A number of bytes as "310 MB", and None as "n/a"."""
    return "n/a" if count is None else f"{count / 1e6:.0f} MB"


def _leaves(prefix: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        inner = [_leaves(f"{prefix}.{key}" if prefix else str(key), item) for key, item in value.items()]
        return [leaf for leaves in inner for leaf in leaves]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [(prefix, ", ".join(str(item) for item in value) or "none")]
    return [(prefix, "none" if value is None or value == {} else str(value))]
