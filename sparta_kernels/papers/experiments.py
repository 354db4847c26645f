"""Which networks each table and figure needs, and how they are trained and attacked."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import training
from ..attack import checks
from .published import Network, published

QUICK_LABEL = "quick: digits, not the paper's data; the numbers are not comparable"
_SEED_OF_STAND_IN = {"cifar10": 0, "svhn": 1000, "tiny-imagenet": 2000}  # digits in the place of each


def experiments() -> tuple[str, ...]:
    """The names of all tables and figures: "table2" ... "table9", "figure1", "figure3"."""
    return (*published().tables, *published().figures)


class Need(IntEnum):
    """What a table or figure needs of a network; each includes those before."""

    TRAINED = 0
    CLEAN = 1  # its error on clean test images
    ATTACKED = 2  # and under attack


@dataclass(frozen=True)
class Plan:
    """How all networks are trained and attacked: by default as in the papers, and as usual where they are silent.

    Attributes:
        quick: digits instead of every data set, for a trial of minutes.
        width: channels of the first group.
        epochs, batch_size, precision: of training, see `training.Settings`; `precision` is also that of the
            attack's gradients in the evaluation.
        schedule: "milestones" (30 and 60, or one third and two thirds of fewer than 61 epochs), or "one-cycle".
        attack: preset of adversarial training.
        eps: radius of the attack in training and evaluation; pixel units.
        attack_steps: in training.
        step_size, report_at: of the evaluation's attack; the last of `report_at` is its number of steps. Its errors are
            in the columns "pgd10", "pgd30" and "pgd50".
        images: how many of the first test images are evaluated; None for all.
        seed, seeds: networks are trained with the seeds `seed` ... `seed + seeds - 1`.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """

    quick: bool = False
    width: int = 64
    epochs: int = 90
    batch_size: int = 128
    precision: str = "fp32"
    schedule: str = "milestones"
    attack: str = "sparta"
    eps: float = published().protocol.eps
    attack_steps: int = published().protocol.training_attack_steps
    step_size: float = published().protocol.step_size
    report_at: tuple[int, int, int] = published().protocol.reported_iterates  # type: ignore[assignment]
    images: int | None = None
    seed: int = 0
    seeds: int = 1

    def __post_init__(self) -> None:
        checks.integer("plan", "seeds", self.seeds, low=1, high=1000)
        checks.integer("plan", "seed", self.seed, low=0, high=2**63 - 1 - 10_000)
        checks.choice("plan", "attack", self.attack, training.ATTACKS[1:])
        self.run(Network("relu"), self.seed)  # the settings' own checks

    @property
    def milestones(self) -> tuple[int, ...]:
        if self.epochs > max(published().protocol.milestones):
            return published().protocol.milestones
        return tuple(dict.fromkeys(max(1, round(self.epochs * part / 3)) for part in (1, 2)))

    @property
    def headings(self) -> dict[str, str]:
        """The headings of all columns that a table may have."""
        reported = {f"pgd{k}": f"PGD-{own}" for k, own in zip((10, 30, 50), self.report_at, strict=True)}
        return reported | {"clean": "clean", "standard_clean": "clean, std.", "size": "size"}

    def runs(self, network: Network) -> list[Run]:
        """The network with each seed."""
        return [self.run(network, self.seed + number) for number in range(self.seeds)]

    def run(self, network: Network, seed: int) -> Run:
        """The network with this seed."""
        protocol = published().protocol
        arguments: dict[str, Any] = {
            "data": "digits" if self.quick else network.data,
            "model": network.model,
            "activation": network.activation,
            "sites": network.sites,
            "width": self.width,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "learning_rate": protocol.learning_rate,
            "schedule": self.schedule,
            "milestones": self.milestones,
            "momentum": 0.9,
            "weight_decay": protocol.weight_decay,
            "attack": "none",
            "seed": seed + (_SEED_OF_STAND_IN[network.data] if self.quick else 0),
        }
        if network.training == "adversarial":
            arguments |= {"attack": self.attack, "eps": self.eps, "attack_steps": self.attack_steps}
        if self.precision != "fp32":
            arguments["precision"] = self.precision
        source = None
        if network.source:
            source = self.run(replace(network, source=(), **dict(network.source)), seed)
        training.Settings(**arguments)
        return Run(network, seed, json.dumps(arguments, sort_keys=True), source)

    def readings(self) -> list[str]:
        """What the papers leave open, or what differs from them, in lines to be printed with every result."""
        protocol = published().protocol
        attack = (
            f"adversarial training by targeted PGD-{self.attack_steps}, eps {self.eps * 255:g}/255, "
            + {"sparta": "step 1/255 (preset sparta)", "xie2019": "preset xie2019"}[self.attack]
        )
        if not self.quick:
            attack += (
                ": the step that the papers state, for training and testing alike"
                if self.attack == "sparta"
                else ": a longer step and clean starts, as in Xie et al. 2019; the papers state step 1/255"
            )
        lines = [] if not self.quick else [
            QUICK_LABEL,
            "digits (8x8 pixels) stands for every data set, each with a seed of its own; its grey levels lie 16/255 "
            f"apart, hence eps {self.eps * 255:g}/255 and step {self.step_size * 255:g}/255; sizes are those of the "
            "papers' networks",
        ]  # fmt: skip
        given = f"SGD {protocol.learning_rate:g}, weight decay {protocol.weight_decay:g}"
        if self.schedule == "milestones":
            given += f", a tenth after epochs {' and '.join(map(str, self.milestones))}"
            if self.milestones != protocol.milestones:
                given += f" (the papers: {' and '.join(map(str, protocol.milestones))})"
        else:
            given += f", schedule {self.schedule}"
        lines.append(
            f"width {self.width}, {given}; the papers do not give epochs, batch size, momentum, augmentation: here "
            f"{self.epochs}, {self.batch_size}, 0.9, {'none' if self.quick else 'crops and flips as usual'}"
        )
        lines.append(attack)
        tested = f"tested with step {self.step_size * 255:g}/255 and eps {self.eps * 255:g}/255"
        tested += "" if self.images is None else f", on {self.images} test images"
        tested += "" if self.precision == "fp32" else f"; training and the attack's gradients in {self.precision}"
        lines.append(f"{tested}; {_seeds(self.seed, self.seeds)}")
        return lines


READINGS = {
    "table6": [
        "every activation stands at the four sites G1234.B2 and ReLU elsewhere: the sizes of FD, DyReLU and SPARTA "
        "say so; of ELU, GELU and SmReLU the papers do not say where they stand"
    ],
    "table7": ["every activation stands at the four sites G1234.B2 and ReLU elsewhere, as in Table 6"],
    "table5": ["Swish and Swish-ReLU stand at the four sites G1234.B2, ReLU elsewhere: the papers do not say"],
}
READINGS_OF_QUICK = {
    "table3": [
        "8x8 digits are a single pixel in the fourth group, where N makes no difference: all lines are the same"
    ],
}


@dataclass(frozen=True)
class Run:
    """One network to be trained; tables that need the same network share it.

    Attributes:
        network: of the papers.
        seed: of the plan; the settings' own may differ, see `Plan.run`.
        arguments: of its `training.Settings`, as JSON.
        source: the run whose SPARTA it copies and freezes.
    """

    network: Network
    seed: int
    arguments: str
    source: Run | None = None

    @cached_property
    def name(self) -> str:
        """A readable name, such as "cifar10-resnet18-sparta-adversarial", or "digits-for-cifar10-resnet18-..."."""
        network = self.network
        data = network.data if self.data == network.data else f"{self.data}-for-{network.data}"
        parts = [data, network.model, network.activation]
        parts += [network.sites] if network.sites != "G1234.B2" else []
        parts += ["from", *(value for _, value in network.source)] if network.source else []
        parts += [network.training, *([f"seed{self.seed}"] if self.seed else [])]
        return re.sub(r"[^\w.]+", "-", "-".join(parts))

    @cached_property
    def folder(self) -> str:
        """Its name, and a digest of everything that decides its weights."""
        known = [self.arguments, self.network.data, self.source.folder if self.source else None]
        return f"{self.name}-{hashlib.sha256(json.dumps(known).encode()).hexdigest()[:8]}"

    @property
    def epochs(self) -> int:
        return int(json.loads(self.arguments)["epochs"])

    @property
    def data(self) -> str:
        """The data set that it is trained on."""
        return str(json.loads(self.arguments)["data"])

    def settings(self, checkpoint_of_source: Path | None = None) -> training.Settings:
        """The settings to train it with; a transfer needs the source's checkpoint."""
        arguments = json.loads(self.arguments)
        if self.source is not None and checkpoint_of_source is not None:
            arguments |= {"sparta_from": str(checkpoint_of_source), "freeze_sparta": True}
        return training.Settings(**arguments)


def quick_plan(**changes: Any) -> Plan:
    """Minutes on a CPU: digits, narrow networks, few epochs; with these fields of `Plan` changed."""
    return Plan(
        **{
            "quick": True,
            "width": 8,
            "epochs": 4,
            "batch_size": 128,
            "schedule": "one-cycle",
            "eps": 32 / 255,
            "attack_steps": 2,
            "attack": "xie2019",
            "images": 120,
            **changes,
        }
    )


def needs(names: Iterable[str], plan: Plan) -> dict[Run, Need]:
    """Every run that these tables and figures need; sources come before runs that copy from them."""
    found: dict[Run, Need] = {}

    def want(network: Network, need: Need) -> None:
        for run in plan.runs(network):
            if run.source is not None:
                found.setdefault(run.source, Need.TRAINED)
            found[run] = max(need, found.get(run, Need.TRAINED))

    for name in names:
        if name in published().figures:
            # Figure 3 is about the attack that is evaluated; Figure 1 makes its own, on one image.
            for _, network in published().figures[name].networks:
                want(network, Need.ATTACKED if name == "figure3" else Need.TRAINED)
            continue
        table = published().tables[name]
        for row in table.rows:
            want(row.network, Need.ATTACKED)
            if "standard_clean" in table.columns:
                want(replace(row.network, training="standard"), Need.CLEAN)
    return found


def _seeds(first: int, count: int) -> str:
    return f"seed {first}" if count == 1 else f"mean and standard deviation over seeds {first} to {first + count - 1}"
