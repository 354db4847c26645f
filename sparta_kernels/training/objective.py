"""The loss that an update minimises."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .settings import Settings


class Objective(nn.Module):
    """A network together with its loss, as one module: DistributedDataParallel then sees one forward pass.

    ``forward(x, labels, adversarial)`` takes images (N, C, H, W), labels (N,) and, for TRADES, adversarial images of
    the shape of x. It returns the loss, a mean over the N images, and the logits (N, classes), those of the
    adversarial images where there are any.

    TRADES (Zhang et al. 2019) is ``CE(f(x), y) + beta * KL(f(x) || f(x'))``, with gradients through f(x) and f(x').
    Here the network is run on x once. The authors' code runs it twice, which only updates BatchNorm's statistics once
    more.
    """

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        super().__init__()
        self.model = model
        self._smoothing, self._beta = settings.label_smoothing, settings.trades_beta

    def forward(self, x: Tensor, labels: Tensor, adversarial: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits = self.model(x).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=self._smoothing)
        if adversarial is None:
            return loss, logits
        clean, logits = logits, self.model(adversarial).float()
        divergence = F.kl_div(F.log_softmax(logits, 1), F.log_softmax(clean, 1), reduction="batchmean", log_target=True)
        return loss + self._beta * divergence, logits
