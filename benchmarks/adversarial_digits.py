"""Adversarial training on scikit-learn's digits, SPARTA beside ReLU, over several seeds: what becomes of the errors.

    python benchmarks/adversarial_digits.py --out runs/adversarial-digits

No measurement of speed. Trains a narrow ResNet-18 for each activation and seed, attacks all test images after every
epoch, and in the end with the papers' test attack, targeted and untargeted. DIR gets the checkpoints, results.json and
results.png. Can be interrupted at any time: the same command goes on.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean
from typing import Any

import timing
import torch
from ops_options import count
from rich.console import Console
from rich.table import Table

from sparta_kernels import attack, data, evaluation, training
from sparta_kernels.report import save_json
from sparta_kernels.report.plot import COLOURS, save_figure

INTERRUPTED = 130
ACTIVATIONS = {"relu": "ReLU", "sparta": "SPARTA"}
EPS = 32 / 255  # the digits' grey levels lie 16/255 apart
STEPS, REPORTED = 50, (10, 30, 50)


def settings_of(activation: str, seed: int, epochs: int) -> training.Settings:
    """A run's settings: a narrow ResNet-18, PGD-10 in training, learning rates from 0 to 0.1 and back."""
    return training.Settings(
        activation=activation,
        width=16,
        epochs=epochs,
        batch_size=64,
        schedule="one-cycle",
        attack="xie2019",
        eps=EPS,
        attack_steps=10,
        seed=seed,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0 done, 130 Ctrl-C. A bad argument exits with 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _read(arguments)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [(activation, seed) for seed in range(options.seeds) for activation in ACTIVATIONS]
    context = multiprocessing.get_context("spawn")
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(options.jobs, context) as pool:
        running = [pool.submit(run, folder, activation, seed, options.epochs) for activation, seed in wanted]
        try:
            for done in as_completed(running):
                rows.append(done.result())
                row = rows[-1]
                print(f"{len(rows)} of {len(wanted)}: {row['activation']}, seed {row['seed']}", file=sys.stderr)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            print("adversarial_digits.py: interrupted; the same command goes on", file=sys.stderr)
            return INTERRUPTED
    rows.sort(key=lambda row: (row["activation"], row["seed"]))
    document = {
        **timing.provenance("benchmarks/adversarial_digits.py", arguments),
        "settings": settings_of("sparta", 0, options.epochs).as_dict() | {"activation": None, "seed": None},
        "evaluation": {"eps": EPS, "step_size": 1 / 255, "steps": STEPS, "images": rows[0]["images"]},
        "results": rows,
    }
    save_json(folder / "results.json", document)
    draw(folder / "results.png", document)
    Console(width=None if sys.stdout.isatty() else 150, highlight=False).print(table(rows))
    return 0


def _read(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="adversarial_digits.py", description="SPARTA beside ReLU on digits.")
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="where checkpoints and results go")
    add("--seeds", type=count, default=3, metavar="N", help="0..N-1 (default: 3)")
    add("--epochs", type=count, default=15, metavar="N", help="(default: 15)")
    add("--jobs", type=count, default=2, metavar="N", help="runs at a time, one thread each (default: 2)")
    options = parser.parse_args(arguments)
    if Path(options.out).exists() and not Path(options.out).is_dir():
        parser.error(f"argument --out: must be a folder, got the file {options.out}")
    return options


def run(folder: Path, activation: str, seed: int, epochs: int) -> dict[str, Any]:
    """Train one network, or what is left of that, and attack it."""
    torch.set_num_threads(1)
    settings, path = settings_of(activation, seed, epochs), folder / f"{activation}-{seed}.safetensors"
    images, labels = data.load("digits", split="test")
    if not training.finished(path, settings):
        training.train(settings, path, resume=path.exists(), robust_images=len(images))
    model, metadata = training.load_checkpoint(path)
    preset = attack.preset("sparta", EPS, STEPS)
    found = {
        name: evaluation.evaluate(
            model,
            images,
            labels,
            eps=preset.eps,
            step_size=preset.step_size,
            steps=preset.steps,
            report_at=REPORTED,
            targeted=name == "targeted",
            batch_size=len(images),
        )
        for name in ("targeted", "untargeted")
    }
    return {
        "activation": activation,
        "seed": seed,
        "images": len(images),
        "history": metadata["history"],
        "clean_error": found["targeted"].clean_error,
        "errors": {name: result.errors for name, result in found.items()},
    }


def _of(rows: Iterable[dict[str, Any]], activation: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["activation"] == activation]


def _outcomes(row: dict[str, Any]) -> dict[str, float]:
    """A run's errors in the end, by what a column is called."""
    found = {"clean": row["clean_error"]}
    found |= {f"PGD-{steps}": row["errors"]["targeted"][steps] for steps in REPORTED}
    return found | {f"untargeted PGD-{STEPS}": row["errors"]["untargeted"][STEPS]}


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The errors of every activation: mean over the seeds, and the lowest and the highest."""
    made = Table(
        title=f"Test errors over {len(_of(rows, 'relu'))} seeds: mean (lowest to highest)", title_justify="left"
    )
    made.add_column("activation")
    columns = list(_outcomes(rows[0]))
    for name in ("after epoch 1", *columns):
        made.add_column(name, justify="right", no_wrap=True)
    for activation, name in ACTIVATIONS.items():
        runs = _of(rows, activation)
        first = _spread([row["history"][0]["robust_error"] for row in runs])
        made.add_row(name, first, *(_spread([_outcomes(row)[column] for row in runs]) for column in columns))
    return made


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.1%} ({100 * min(values):.1f}-{100 * max(values):.1f})"


def draw(path: Path, document: dict[str, Any]) -> None:
    """The error under attack after every epoch, and the errors in the end, of every seed."""
    from matplotlib.figure import Figure

    rows = document["results"]
    figure = Figure(figsize=(9.6, 4.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    columns = list(_outcomes(rows[0]))
    for i, (activation, name) in enumerate(ACTIVATIONS.items()):
        runs, colour = _of(rows, activation), COLOURS[i]
        curves = list(zip(*([100 * epoch["robust_error"] for epoch in row["history"]] for row in runs), strict=True))
        epochs = range(1, len(curves) + 1)
        left.plot(epochs, [mean(values) for values in curves], color=colour, label=name)
        left.fill_between(epochs, [min(v) for v in curves], [max(v) for v in curves], color=colour, alpha=0.18, lw=0)
        for place, column in enumerate(columns):
            values = [100 * _outcomes(row)[column] for row in runs]
            x = place + 0.24 * (i - 0.5)
            right.scatter([x] * len(values), values, color=colour, s=22, alpha=0.7, linewidths=0)
            right.plot([x - 0.09, x + 0.09], [mean(values)] * 2, color=colour, linewidth=2)
    left.set_yscale("log")
    ticks = [1, 2, 5, 10, 20, 50, 100]
    left.set_yticks(ticks, labels=[f"{tick}%" for tick in ticks])
    left.set_xlabel("epoch")
    left.set_title(
        "Test error under the training attack (PGD-10)\nmean and range over the seeds", fontsize=10, loc="left"
    )
    left.legend(frameon=False)
    right.set_xticks(range(len(columns)), labels=[name.replace("untargeted ", "untargeted\n") for name in columns])
    right.set_ylim(bottom=0)
    right.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    right.set_title("Test errors in the end\nevery seed, and their mean", fontsize=10, loc="left")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(path, figure)


if __name__ == "__main__":
    sys.exit(main())
