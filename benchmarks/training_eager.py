"""The other side of `training.py`: adversarial training in plain PyTorch, as a user writes it."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from sparta_kernels import attack, training, use_backend

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def noise(count: int, classes: int) -> tuple[Tensor, Tensor]:
    """uint8 images of CIFAR's shape and labels, the same on both sides: speed does not depend on what is to be seen."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return images, torch.randint(classes, (count,), generator=generator)


class Eager:
    """Targeted PGD and SGD: the reference activation, NCHW, `torch.autograd.grad` for the images.

    In "bf16" and "fp16" attack and update run under autocast, in fp32 on a GPU without TF32. The loss is not scaled:
    its speed is what counts here.
    """

    def __init__(self, settings: training.Settings, threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        self.settings, self.device = settings, torch.device(device)
        self.preset = attack.preset(settings.attack, settings.eps, settings.attack_steps)
        arguments = training.model_arguments(settings)
        torch.manual_seed(0)
        self.model = training.build_model(settings.model, arguments).to(self.device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        self.classes: int = arguments["num_classes"]
        found = noise(settings.batch_size, self.classes)
        self.images, self.labels = (part.to(self.device) for part in found)

    def step(self, precision: str) -> float:
        """One training step; its seconds."""
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
        start = time.perf_counter()
        with use_backend("reference"):
            adversarial = self.attacked(self.images.float() / 255, precision)
            self.model.train()
            with self._autocast(precision):
                loss = F.cross_entropy(self.model(adversarial), self.labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss.item()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
        return seconds

    def attacked(self, images: Tensor, precision: str) -> Tensor:
        """Adversarial images for targets drawn by torch."""
        eps, step = self.preset.eps, self.preset.step_size
        self.model.eval()
        targets = (self.labels + torch.randint_like(self.labels, 1, self.classes)) % self.classes
        adversarial = (images + torch.empty_like(images).uniform_(-eps, eps)).clamp(0, 1)
        for _ in range(self.preset.steps):
            adversarial.requires_grad_()
            with self._autocast(precision):
                loss = F.cross_entropy(self.model(adversarial), targets, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, adversarial)
            adversarial = adversarial.detach() - step * gradient.sign()
            adversarial = (images + (adversarial - images).clamp(-eps, eps)).clamp(0, 1)
        return adversarial

    def _autocast(self, precision: str) -> torch.autocast:
        dtype = _DTYPES.get(precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)
