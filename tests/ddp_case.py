"""What each process of tests/test_training_ddp.py does: python -m torch.distributed.run ... ddp_case.py FOLDER."""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sparta_kernels import data
from sparta_kernels.training import Settings, load_checkpoint, step, testing, train
from sparta_kernels.training import run as run_module

# 50 images in 4 batches of 12 or 13, of which one process gets an image more.
TINY = {"width": 2, "epochs": 2, "batch_size": 16, "attack": "xie2019", "attack_steps": 2, "learning_rate": 0.02}


def few_images() -> None:
    load = data.load
    data.load = lambda *arguments: tuple(part[:50] for part in load(*arguments))


def statistics_in_eval_mode(model: nn.Module) -> None:
    """Nothing then depends on how a batch is split, but for rounding."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def losses(settings: Settings, path: Path, **options) -> list[list[float]]:
    """Loss and error of every step."""
    found: list[list[float]] = []
    train(settings, path, on_batch=lambda batch: found.append([batch.loss, batch.error]), **options)
    return found


def main(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    torch.set_num_threads(1)
    few_images()
    rank, found = dist.get_rank(), {}
    runs: list[run_module.Run] = []
    begin = run_module.Run.__init__
    run_module.Run.__init__ = lambda self, *arguments: (runs.append(self), begin(self, *arguments))[1]

    # The same curve as one process, where statistics do not depend on the split.
    keep, step.keep_frozen_in_eval = step.keep_frozen_in_eval, statistics_in_eval_mode
    found["exact"] = losses(Settings(**TINY), folder / "exact.safetensors")
    step.keep_frozen_in_eval = keep
    found["usual"] = losses(Settings(**TINY, ema=0.9), folder / "usual.safetensors", robust_images=20)

    # Ctrl-C that reaches one process first, in its attack: all leave after that step.
    perturb, calls = step.attack.perturb, []

    def interrupted(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if rank == 1 and len(calls) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return perturb(*arguments, **keywords)

    step.attack.perturb = interrupted
    try:
        train(Settings(**TINY, ema=0.9), folder / "resumed.safetensors")
    except KeyboardInterrupt:
        found["stopped"] = len(calls)
        dist.barrier()  # process 0 has written
    step.attack.perturb = perturb
    found["stored"] = load_checkpoint(folder / "resumed.safetensors")[1]["position"]["step"]
    dist.barrier()  # and all have read it
    train(Settings(**TINY, ema=0.9), folder / "resumed.safetensors", resume=True, robust_images=20)

    # And one in the test after an epoch, where they have different batches to do.
    pgd = testing.attack.pgd

    def tested(*arguments: Any, **keywords: Any) -> Any:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return pgd(*arguments, **keywords)

    testing.attack.pgd = tested
    try:
        train(Settings(**TINY, ema=0.9), folder / "tested.safetensors", robust_images=40)
    except KeyboardInterrupt:
        dist.barrier()
    testing.attack.pgd = pgd
    metadata = load_checkpoint(folder / "tested.safetensors")[1]
    found["tested"] = [metadata["epoch"], metadata["position"]["step"]]

    # Parameters that want no gradient, one that nothing depends on, and TRADES, where the network is called twice.
    build = run_module.build_model

    def with_an_unused_one(**description: Any) -> nn.Module:
        model = build(**description)
        model.unused = nn.Parameter(torch.ones(3))
        return model

    run_module.build_model = with_an_unused_one
    frozen = {"sparta_from": str(folder / "usual.safetensors"), "freeze_sparta": True}
    found["frozen"] = losses(Settings(**TINY | frozen | {"loss": "trades", "epochs": 1}), folder / "frozen.safetensors")

    found["weights"] = [
        [value.detach().double().abs().sum().item() for value in run.model.parameters()] for run in runs
    ]
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
