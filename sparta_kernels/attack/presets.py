"""The two attack settings of the papers."""

from __future__ import annotations

from dataclasses import dataclass

from . import checks

PRESETS = ("sparta", "xie2019")


@dataclass(frozen=True)
class Preset:
    """Settings of an attack: `pgd(model, images, labels, eps=p.eps, step_size=p.step_size, steps=p.steps)`.

    Attributes:
        name: "sparta" or "xie2019".
        eps, step_size: in pixel units.
        steps: number of steps.
        clean_start: share of training batches whose attack starts on the image itself instead of at random.
    """

    name: str
    eps: float
    step_size: float
    steps: int
    clean_start: float


def preset(name: str, eps: float, steps: int) -> Preset:
    """The attack called `name` for a radius `eps` (pixel units, 0..1) and `steps` (>= 1) steps.

    The step of "sparta" is always 1/255, as the SPARTA papers state. That of "xie2019" is max(1/255, eps/steps), so
    that a short attack can reach the edge of the ball; 20% of its training batches start clean (Xie et al. 2019).

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    checks.choice("preset", "name", name, PRESETS)
    eps, steps = checks.pixels("preset", "eps", eps), checks.integer("preset", "steps", steps, low=1)
    if name == "sparta":
        return Preset(name, eps, 1 / 255, steps, clean_start=0.0)
    return Preset(name, eps, max(1 / 255, eps / steps), steps, clean_start=0.2)
