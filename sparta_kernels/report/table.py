"""Results as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text


def evaluation_table(results: Sequence[Mapping[str, Any]], title: str | None = None, width: int | None = None) -> Table:
    """One row for each checkpoint and backend in an evaluation's results: errors, speed and memory.

    Where `width` columns are too few for every number, a block of lines for each instead.
    """
    iterates = list(results[0]["errors"])
    # Tight, and headings on two lines: the table has to fit into 80 columns.
    headings = ("clean", *(f"PGD-{k}" for k in iterates), "target\nhit", "images\n/s", "memory")
    names = [(str(row["model"]), str(row["backend"])) for row in results]
    numbers = [
        (
            percent(row["clean_error"]),
            *(percent(row["errors"][k]) for k in iterates),
            percent(row["target_success"][iterates[-1]]) if row["target_success"] else "n/a",
            "n/a" if row["images_per_second"] is None else f"{row['images_per_second']:.0f}",
            megabytes(row["peak_memory"]),
        )
        for row in results
    ]

    def table(folded: int | None) -> Table:
        table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
        table.collapse_padding, table.pad_edge = True, False
        table.add_column("model", overflow="fold")
        table.add_column("backend", no_wrap=True)
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        for (model, backend), cells in zip(names, numbers, strict=True):
            # Text, not what Rich would read into it: a name may have brackets.
            table.add_row(Text(model[:folded]), Text(backend), *cells)
        return table

    if width is None or Console(width=1000).measure(table(folded=8)).maximum <= width:
        return table(folded=None)
    plain = ["model", "backend", *(heading.replace("\n/", "/").replace("\n", " ") for heading in headings)]
    blocks = {
        f"network {number}": dict(zip(plain, (*name, *cells), strict=True))
        for number, (name, cells) in enumerate(zip(names, numbers, strict=True), 1)
    }
    return facts_table(blocks, title)


def evaluation_title(settings: Mapping[str, Any]) -> str:
    """What the networks were evaluated on: images and attack."""
    title = (
        f"{settings['images']} {settings['data']} test images, "
        f"eps {settings['eps'] * 255:g}/255, step {settings['step_size'] * 255:g}/255"
    )
    title += "" if settings["targeted"] else ", untargeted"
    return title + (f", worst of {settings['restarts']} restarts" if settings["restarts"] > 1 else "")


def evaluation_notes(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """How it was computed, in lines below the table: batches, precision, engine; how the precision compares."""
    told: dict[str, list[str]] = {}
    for row in results:
        batch, processes = row["batch"], row["processes"]
        words = [
            f"batches of {batch['images']} images ({batch['reason']})",
            f"{row['threads']} CPU {_plural('thread', row['threads'])}",
            *([f"{processes} processes"] if processes > 1 else []),
            f"gradients in {row['precision']}",
            f"engine {row['engine']} ({row['engine_reason']})",
        ]
        told.setdefault(", ".join(words), []).append(f"{row['model']}, {row['backend']}")
    lines = [words if len(told) == 1 else f"{'; '.join(rows)}: {words}" for words, rows in told.items()]
    for row in results:
        parity = row["parity"]
        if parity is None:
            continue
        parts = ", ".join(f"PGD-{k} {points:+.1f}" for k, points in parity["differences"].items())
        verdict = "at most" if parity["passed"] else "MORE THAN"
        lines.append(
            f"{row['model']}, {row['backend']}: errors in {row['precision']} minus those in fp32, "
            f"on {parity['images']} images: {parts} points; {verdict} the {parity['tolerance']:g} allowed at the last"
        )
    return lines


def facts_table(facts: Mapping[str, Any], title: str | None = None) -> Table:
    """Facts as two columns, under the names of their groups: `isa  avx512` below `cpu`. It fits into 40 columns."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.title, table.title_justify, table.title_style = title, "left", "bold"
    table.add_column("fact", no_wrap=True)
    table.add_column("value", overflow="fold")
    for group, content in facts.items():
        if not isinstance(content, Mapping) or not content:
            table.add_row(Text(group, "bold"), Text(_words(content)))
            continue
        table.add_row(Text(group, "bold"), "")
        for name, value in _leaves("", content):
            table.add_row(Text(f"  {name}"), Text(value))
    return table


def percent(share: float) -> str:
    """0.0306 as "3.1%"."""
    return f"{100 * share:.1f}%"


def megabytes(count: int | None) -> str:
    """A number of bytes as "310 MB", and None as "n/a"."""
    return "n/a" if count is None else f"{count / 1e6:.0f} MB"


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"


def _leaves(prefix: str, content: Mapping[str, Any]) -> list[tuple[str, str]]:
    leaves: list[tuple[str, str]] = []
    for key, value in content.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        leaves += _leaves(name, value) if isinstance(value, Mapping) and value else [(name, _words(value))]
    return leaves


def _words(value: Any) -> str:
    if isinstance(value, (list, tuple, set, frozenset)):
        return ", ".join(str(item) for item in value) or "none"
    return "none" if value is None or value == {} else str(value)
