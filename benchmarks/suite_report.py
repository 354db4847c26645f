"""What the device suite found, in a few lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_MOST_LINES = 60  # of details for a step: the whole must fit on a screen or two
_LONGEST_LINE = 160
_RATIOS = {
    "ratio_to_relu": "x relu",
    "speedup_over_loop": "x as fast as a plain loop",
    "speedup_over_compiled": "x as fast as torch.compile",
}


def summary(document: Mapping[str, Any]) -> str:
    """A line for each step and below it what it found."""
    machine, commit = document["machine"], document["commit"] or {"hash": "unknown", "changed": None}
    changed = " with changes" if commit["changed"] else ""
    lines = [
        "",
        f"{'Rehearsal without a GPU' if document['dry_run'] else machine['device']}: "
        f"torch {machine['torch']}, Python {machine['python']}, commit {commit['hash'][:12]}{changed}, "
        f"sources {document['tree']}, {document['seconds']:.0f} s" + ("" if document["complete"] else ", interrupted"),
        f"{'step':<10} {'status':<10} {'seconds':>7}",
    ]
    for name, step in document["steps"].items():
        lines.append(f"{name:<10} {step['status']:<10} {step['seconds']:>7.1f}  {step.get('reason') or ''}".rstrip())
        details = [f"    {line}"[:_LONGEST_LINE] for line in _details(name, step)]
        lines += details[:_MOST_LINES]
        if len(details) > _MOST_LINES:
            lines.append(f"    and {len(details) - _MOST_LINES} lines more in suite.json")
    return "\n".join(lines)


def _details(name: str, step: Mapping[str, Any]) -> Iterator[str]:
    if name in _DETAILS:
        yield from _DETAILS[name](step.get("figures") or {})


def _build(figures: Mapping[str, Any]) -> Iterator[str]:
    if "cuda" in figures:
        cuda = figures["cuda"]
        built = f"CUDA for {cuda.get('archs')}" if cuda["built"] else "for the CPU alone"
        yield f"{built}, {figures['compiler']}"


def _test(figures: Mapping[str, Any]) -> Iterator[str]:
    if "gpu_tests" in figures:
        yield f"{figures['gpu_tests']} tests are marked gpu"
    if "passed" in figures:
        yield ", ".join(f"{figures[key]} {key}" for key in ("passed", "failed", "errors", "skipped"))
    yield from figures.get("failures", ())


def _sanitize(figures: Mapping[str, Any]) -> Iterator[str]:
    for name, found in figures.items():
        yield f"{name}: {found}"


def _ops(figures: Mapping[str, Any]) -> Iterator[str]:
    if "cells" not in figures:
        return
    ceilings = figures["ceilings"]
    told = (
        f", a large copy {ceilings['copy_gb_per_s']:.0f} GB/s, a large bf16 matrix product "
        f"{ceilings['matmul_tflops']:.0f} TFLOP/s, an empty launch {ceilings['empty_launch_us']:.2f} us"
        if ceilings
        else ""
    )
    yield f"{figures['cells']} cells measured, {figures['not_measured']} cases not{told}"
    yield from figures.get("failures", ())
    yield from _bars(figures["bars"], 3)
    for name, shares in sorted(figures["shares"].items()):
        yield f"{name}: " + ", ".join(f"{backend} {share:.0%}" for backend, share in shares.items()) + " of copy"


def _bars(bars: Sequence[Mapping[str, Any]], digits: int) -> Iterator[str]:
    """The bars of which something was measured; the word "part" where that is too little to judge."""
    for bar in bars:
        if bar["value"] is not None:
            verdict = {True: "pass", False: "FAIL", None: "part"}[bar["passed"]]
            line = f"{verdict} {bar['name']}: {bar['value']:.{digits}f} {bar['relation']} {bar['limit']:g}"
            of = f" of {bar['wanted']}" if "wanted" in bar else ""
            yield f"{line}, {bar['cells']}{of} cells" if "cells" in bar else line


def _attack(figures: Mapping[str, Any]) -> Iterator[str]:
    yield from figures.get("failures", ())
    for found in figures.get("batches", ()):
        where = f"batch {found['batch']}, "
        for name, times in found["iterations"].items():
            ratios = [f"{times[key]:.2f} {words}" for key, words in _RATIOS.items() if times[key] is not None]
            memory = [] if times["peak_memory"] is None else [f"{times['peak_memory'] / 1e6:.0f} MB"]
            yield f"{where}{name}: " + ", ".join([f"{times['median_ms']:.2f} ms", *ratios, *memory])
        for name, milliseconds in found["row_ms"].items():
            yield f"{where}{name}: clean + PGD-10 + PGD-30 + PGD-50 {1e-3 * milliseconds:.2f} s"
        for name, parts in found["parts_ms"].items():
            yield (
                f"{where}{name}: " + ", ".join(f"{part} {value:.2f}" for part, value in parts.items() if value) + " ms"
            )
    yield from _bars(figures.get("bars", ()), 2)
    if figures.get("not_measured"):
        yield f"{figures['not_measured']} entries not measured"


def _training(figures: Mapping[str, Any]) -> Iterator[str]:
    yield from figures.get("failures", ())
    for name, step in figures.get("steps", {}).items():
        beside = "" if name.endswith(" ours") else f", {step['over_ours']:.2f} x ours"
        yield f"{name}: {step['median_ms']:.1f} ms, an epoch of CIFAR-10 {step['epoch_seconds']:.0f} s{beside}"


def _activation(figures: Mapping[str, Any]) -> Iterator[str]:
    yield from figures.get("failures", ())
    for name, times in figures.get("cells", {}).items():
        yield f"{name}: " + ", ".join(f"{candidate} {milliseconds:.3f}" for candidate, milliseconds in times.items())
    yield from _bars(figures.get("bars", ()), 2)
    if figures.get("not_measured"):
        yield f"{figures['not_measured']} cases not measured"


def _choices(figures: Mapping[str, Any]) -> Iterator[str]:
    if "rows" in figures:
        yield "rows: " + ", ".join(f"{count} {backend}" for backend, count in figures["rows"].items())


_DETAILS = {
    "build": _build,
    "test": _test,
    "sanitize": _sanitize,
    "ops": _ops,
    "attack": _attack,
    "rivals": _attack,
    "batches": _attack,
    "training": _training,
    "activation": _activation,
    "choices": _choices,
}
