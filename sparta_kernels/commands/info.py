"""`sparta info`: what is installed."""

from __future__ import annotations

from .. import build_info, report
from . import options
from .options import Json


def info(json_file: Json = None) -> None:
    """Show versions, devices, and the backend that each operation would use."""
    options.check_outputs([("--json", options.file(json_file))])
    facts = build_info()
    options.console(json_file).print(report.facts_table(facts, title="sparta_kernels"))
    options.save(json_file, facts)
