"""Bars and durations on the terminal, as every command draws them."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn


def progress_bars(console: Console, *more: ProgressColumn) -> Progress:
    """A task's description, its bar, its field `state`, and what else; nothing on a quiet console or no terminal."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        TextColumn("{task.fields[state]}", markup=False),
        *more,
        console=console,
        disable=console.quiet or not console.is_terminal,
    )


def duration(seconds: float) -> str:
    """As h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
