"""Feature maps at the end of the first group for a clean and an adversarial image: the data of Figure 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import attack
from ..nn import ResNet
from .experiments import Plan

_LOOKED_AT = 100  # test images among which one is chosen
_CANDIDATES = 8  # of those that all networks know, so many are attacked


@dataclass(frozen=True)
class FeatureMaps:
    """One network's maps for one image.

    Attributes:
        label: of the network.
        image, true: the image's index in the test set, and its class.
        predicted: classes for the clean and the adversarial image.
        clean, adversarial: the images in [0, 1], (H, W, 3), or (H, W) of one channel.
        channel: the one shown, which the attack changes most before the activation.
        before, after: its maps at the activation's input and output, clean and adversarial, each (H, W).
        change: before and after, mean |adversarial - clean| over mean |clean|, all channels together.
    """

    label: str
    image: int
    true: int
    predicted: tuple[int, int]
    clean: np.ndarray
    adversarial: np.ndarray
    channel: int
    before: tuple[np.ndarray, np.ndarray]
    after: tuple[np.ndarray, np.ndarray]
    change: tuple[float, float]


def feature_maps(models: Mapping[str, ResNet], images: Tensor, labels: Tensor, plan: Plan) -> list[FeatureMaps]:
    """The maps of each network (by its label) for one test image, attacked separately for each.

    Of the first images that all networks classify correctly, it is the first on which the plan's attack fools most of
    them.

    Args:
        models: in eval mode, on the images' device.
        images: uint8 (N, C, H, W), the test images; labels: int64 (N,).
        plan: whose attack is used.
    """
    x, y = images[:_LOOKED_AT].float() / 255, labels[:_LOOKED_AT]
    with torch.no_grad():
        right = torch.stack([model(x).argmax(1) == y for model in models.values()]).all(0)
    rows = (right.nonzero()[:, 0] if bool(right.any()) else torch.arange(len(x), device=x.device))[:_CANDIDATES]
    attacked = {
        label: attack.pgd(
            model,
            x[rows],
            y[rows],
            eps=plan.eps,
            step_size=plan.step_size,
            steps=plan.report_at[-1],
            seed=plan.seed,
            indices=rows,
        )
        for label, model in models.items()
    }
    fooled = torch.stack([found.predictions[plan.report_at[-1]] != y[rows] for found in attacked.values()]).sum(0)
    best = int(fooled.argmax())
    place = int(rows[best])
    found = []
    for label, model in models.items():
        pair = torch.cat([x[place : place + 1], attacked[label].adversarial[best : best + 1]])
        before, after, logits = _around(model, pair)
        channel = int((before[1] - before[0]).abs().mean((1, 2)).argmax())
        found.append(
            FeatureMaps(
                label=label,
                image=place,
                true=int(y[place]),
                predicted=(int(logits[0].argmax()), int(logits[1].argmax())),
                clean=_picture(pair[0]),
                adversarial=_picture(pair[1]),
                channel=channel,
                before=(before[0, channel].cpu().numpy(), before[1, channel].cpu().numpy()),
                after=(after[0, channel].cpu().numpy(), after[1, channel].cpu().numpy()),
                change=(_change(before), _change(after)),
            )
        )
    return found


def _around(model: ResNet, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Input and output of the last activation of the first group's second block (G1.B2), and the logits."""
    seen: list[Tensor] = []
    site = model.get_submodule("layer1.1.act2")
    hook = site.register_forward_hook(lambda module, inputs, output: seen.extend([inputs[0].clone(), output.clone()]))
    try:
        with torch.no_grad():
            logits = model(x)
    finally:
        hook.remove()
    return seen[0], seen[1], logits


def _change(maps: Tensor) -> float:
    return float((maps[1] - maps[0]).abs().mean() / maps[0].abs().mean().clamp_min(1e-12))


def _picture(image: Tensor) -> np.ndarray:
    shown: np.ndarray = image.permute(1, 2, 0).cpu().numpy()
    return shown[..., 0] if shown.shape[2] == 1 else shown
