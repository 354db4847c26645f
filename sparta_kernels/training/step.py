"""One epoch of training, step by step: images, attack, update."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import attack, data
from ..attack import Prepared
from ..attack.prepare import DTYPES
from ..processes import Processes
from .history import Batch
from .objective import Objective
from .run import Run, TrainingDiverged
from .schedule import learning_rate
from .transfer import keep_frozen_in_eval

# They are taken from process 0 before the attack, not the forward pass. The setting has another name since torch 2.13.
_NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_STATISTICS_BY_US: dict[str, Any] = {"forward_sync_buffers" if _NEW_NAME else "broadcast_buffers": False}


class Trainer:
    """Trains the network of `run` on these images, alone or with the other processes of a group.

    With several processes a batch is global, and each process takes its share. Gradients are those of the whole batch's
    mean. BatchNorm's statistics are each process's own until the next step, which begins with those of process 0.

    Args:
        run: the run to train.
        images: uint8 (N, C, H, W), on the run's device.
        labels: int64 (N,), there too.
        processes: the processes that share the work.

    Raises:
        ValueError: a process would get fewer than two images of a batch.
    """

    def __init__(self, run: Run, images: Tensor, labels: Tensor, processes: Processes) -> None:
        settings = run.settings
        self.run, self.images, self.labels, self.processes = run, images, labels, processes
        self.batches = math.ceil(len(images) / settings.batch_size)
        if len(images) // self.batches // processes.count < 2:
            raise ValueError(
                f"training: batch_size must give each of the {processes.count} processes at least 2 images, "
                f"got {settings.batch_size}"
            )
        self._settings = settings
        self._dataset = data.describe(settings.data)
        self._preset = None
        if settings.attack != "none":
            self._preset = attack.preset(settings.attack, settings.eps, settings.attack_steps)
        self._prepared: Prepared = attack.prepare(run.model.eval(), precision=settings.precision)
        self._objective: nn.Module = Objective(run.model, settings)
        if processes.count > 1:
            # A static graph: what takes no part in the loss is not waited for.
            self._objective = DistributedDataParallel(self._objective, static_graph=True, **_STATISTICS_BY_US)

    def epoch(self, on_step: Callable[[Batch], None]) -> None:
        """Complete the run's current epoch. `on_step` is called after each step.

        Raises:
            TrainingDiverged: the loss or the network is not finite.
        """
        number, position = len(self.run.history) + 1, self.run.position
        batches, from_clean = self._order(number)
        self.run.model.train()
        keep_frozen_in_eval(self.run.model)
        for i in range(position.step, self.batches):
            start = time.perf_counter()
            with self._saying_where(number, i):
                mine = batches[i].tensor_split(self.processes.count)[self.processes.rank]
                self._share_statistics()
                x, labels, adversarial = self._attacked(mine, number, clean_start=from_clean[i])
                with self.run.change():
                    loss, wrong, rate = self._update(x, labels, adversarial, len(batches[i]), (number - 1, i))
                    position.step += 1
                    position.loss, position.wrong = position.loss + loss, position.wrong + wrong
                    position.rate, position.seconds = rate, position.seconds + time.perf_counter() - start
            count = len(batches[i])
            on_step(Batch(number, i + 1, self.batches, count, loss / count, wrong / count))
            self.processes.leave_if_interrupted()

    def _order(self, number: int) -> tuple[tuple[Tensor, ...], list[bool]]:
        """The images of each batch of the epoch, and whether its attack starts on the images themselves."""
        # A generator of its own for each epoch: nothing but the position need be stored to resume. The odd
        # constant keeps (seed, epoch) and (seed + 1, epoch - 1) apart.
        generator = torch.Generator().manual_seed((self._settings.seed + number * 0x9E3779B97F4A7C15) % 2**63)
        batches = torch.randperm(len(self.images), generator=generator).tensor_split(self.batches)
        clean_start = self._preset.clean_start if self._preset else 0
        return batches, (torch.rand(self.batches, generator=generator) < clean_start).tolist()

    def _share_statistics(self) -> None:
        """Copy process 0's statistics, so that all processes attack, and store, the same network."""
        self.processes.copy_from_first(self.run.statistics(self.run.model))

    def _attacked(self, indices: Tensor, number: int, *, clean_start: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """The images to train on, their labels, and for TRADES the adversarial images beside them."""
        settings, dataset = self._settings, self._dataset
        rows = indices.to(self.images.device)
        chosen, labels = self.images[rows], self.labels[rows]
        if settings.augment:
            chosen = data.augment(
                chosen, indices, seed=settings.seed, epoch=number, crop=dataset.crop, flip=dataset.flip
            )
        x = chosen.float() / 255
        if self._preset is None:
            return x, labels, None
        self._prepared.refresh()
        trades = settings.loss == "trades"
        away_from = None
        if trades:
            with torch.no_grad():
                away_from = self._prepared(x).softmax(1)
        adversarial = attack.perturb(
            self._prepared,
            x,
            labels,
            targets=away_from,
            targeted=not trades,
            eps=self._preset.eps,
            step_size=self._preset.step_size,
            steps=self._preset.steps,
            seed=settings.seed,
            indices=rows,
            # On the image itself the divergence from its own prediction has no gradient. TRADES's authors start at
            # 0.001 times normal noise, this at noise of the whole ball.
            random_start=trades or not clean_start,
            restart=number,
        )
        return (x, labels, adversarial) if trades else (adversarial, labels, None)

    def _update(
        self, x: Tensor, labels: Tensor, adversarial: Tensor | None, count: int, place: tuple[int, int]
    ) -> tuple[float, int, float]:
        """Take an optimiser step; returns the batch's summed loss, its number of errors, and the learning rate.

        Args:
            x, labels, adversarial: this process's part of the batch.
            count: images in the whole batch.
            place: completed epochs, and completed steps of the next one.
        """
        run = self.run
        rate = learning_rate(self._settings, place[0] * self.batches + place[1], self.batches)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        x = x.contiguous(memory_format=run.memory_format)
        if adversarial is not None:
            adversarial = adversarial.contiguous(memory_format=run.memory_format)
        dtype = DTYPES[self._settings.precision]
        with self._prepared.arithmetic():
            with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
                loss, logits = self._objective(x, labels, adversarial)
            # DistributedDataParallel takes the mean over processes, whose parts may differ by an image.
            share = len(x) * self.processes.count / count
            run.scaler.scale(loss if share == 1 else loss * share).backward()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad()
        if run.ema is not None:
            run.ema.update_parameters(run.model)
        wrong = (logits.detach().argmax(1) != labels).sum()
        # The host waits for the device here, and nowhere else in an update (but where fp16's scaler looks).
        total, errors = self.processes.sums(torch.stack([loss.detach().double() * len(x), wrong.double()]))
        if not math.isfinite(total):
            raise _NotFinite(f"the loss is {total / count}")
        return total, int(errors), rate

    @contextmanager
    def _saying_where(self, number: int, step: int) -> Iterator[None]:
        try:
            yield
        except (attack.NotFinite, _NotFinite) as error:
            raise TrainingDiverged(
                f"training: in epoch {number}, batch {step + 1} of {self.batches}: {error}"
            ) from error


class _NotFinite(ArithmeticError):
    """A loss is NaN or infinite."""
