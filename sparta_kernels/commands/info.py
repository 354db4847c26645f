"""`sparta info`: what is installed."""

from __future__ import annotations

from typing import Any

from .. import build_info, report
from . import options
from .options import Json


def info(json_file: Json = None) -> None:
    """Show versions, devices, and who computes what.

    For every operation and kind of device: the backend that is taken, and why.
    """
    options.check_outputs([("--json", options.file(json_file))])
    facts = build_info()
    options.console(json_file).print(report.facts_table(_each_choice_once(facts), title="sparta_kernels"))
    options.save(json_file, facts)


def _each_choice_once(facts: dict[str, Any]) -> dict[str, Any]:
    """The same for reading: operations of which the same is to be said together."""
    told: dict[str, dict[str, list[str]]] = {}
    for operation, kinds in facts["operations"].items():
        for kind, choice in kinds.items():
            told.setdefault(kind, {}).setdefault(f"{choice['backend']}: {choice['reason']}", []).append(operation)
    groups = {
        f"operations on {kind}": {"\n  ".join(operations): words for words, operations in choices.items()}
        for kind, choices in told.items()
    }
    rest = {name: content for name, content in facts.items() if name not in ("operations", "engines")}
    return rest | groups | {f"engines on {kind}": content for kind, content in facts["engines"].items()}
