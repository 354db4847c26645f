"""`sparta info`: what is installed."""

from __future__ import annotations

from .. import build_info, report
from . import options
from .options import Json


def info(json_file: Json = None) -> None:
    """Show versions, devices, and who computes what.

    For every operation and kind of device: the backend that is taken, and why.
    """
    options.check_outputs([("--json", options.file(json_file))])
    facts = build_info()
    options.console(json_file).print(report.facts_table(facts, title="sparta_kernels"))
    options.save(json_file, facts)
