"""What `attack.py` measures: networks, the attacks that take turns at them, and what one turn costs."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from other_process import WrongResult
from torch import Tensor, nn

from sparta_kernels import attack, reference, use_backend
from sparta_kernels.evaluation.memory import PeakMemory
from sparta_kernels.nn import resnet18

EPS, STEP = 16 / 255, 1 / 255
CLASSES = 10
ROW = (10, 30, 50)
THEIRS = {
    "loop": "a plain loop around the reference in eager PyTorch, as a user writes it",
    "compiled": "the same loop around torch.compile of the reference (on a GPU: max-autotune)",
    "torchattacks": "torchattacks.PGD on the reference, as its users run it",
    "foolbox": "foolbox.attacks.LinfPGD on the reference",
    "art": "adversarial-robustness-toolbox's ProjectedGradientDescent on the reference",
}
OURS = {
    "ours-eager": "attack.pgd on a prepared model, engine eager",
    "ours-compile": "attack.pgd on a prepared model, engine compile",
    "ours-graph": "attack.pgd on a prepared model, engine graph",
}
COMPILED = ("compiled", "ours-compile")  # which take minutes before they can be timed
LIBRARIES = {"torchattacks": "torchattacks", "foolbox": "foolbox", "art": "art"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_TOLERANCE = 0.01  # of the norm: sums in another order differ, and a ReLU near 0 may then pass a gradient or not


class Entry(NamedTuple):
    """Who attacks what: a candidate (by a backend, if it is ours) a network with an activation, in a precision."""

    activation: str
    precision: str
    candidate: str
    backend: str = ""

    def __str__(self) -> str:
        backend = f"/{self.backend}" if self.backend not in ("", "auto") else ""
        return f"{self.activation} {self.precision} {self.candidate}{backend}"


@dataclass(frozen=True)
class Settings:
    """What all entries of a measurement have in common; `steps` is the iterations of a turn."""

    device: str
    width: int
    steps: int
    threads: int


class Clock:
    """Marks where an attack has got to, and tells time and page faults between two marks.

    The time is the host's, or that of a GPU's queue.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[Any] = []
        self.faults: list[int] = []

    def mark(self, *_: object) -> None:
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())
        self.faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)

    def iteration(self) -> tuple[float, float]:
        """Seconds and page faults of an iteration, but for the first and the last."""
        start, end = self.marks[1], self.marks[-2]
        if self.cuda:
            torch.cuda.synchronize()
        whole = 1e-3 * start.elapsed_time(end) if self.cuda else end - start
        between = len(self.marks) - 3
        return whole / between, (self.faults[-2] - self.faults[1]) / between


class Watched(nn.Module):
    """A network whose forward passes towards a gradient are marked: the iterations of whatever attacks it.

    It computes in `dtype`, whatever the images are in.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype
        self.clock: Clock | None = None
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        if self.clock is not None and images.requires_grad and torch.is_grad_enabled():
            self.clock.mark()
        return self.network(images) if self.dtype is None else self.network(images.to(self.dtype)).float()


class Bench:
    """The networks and the images of one batch size, and the turns at them. `theirs` and ours alike."""

    def __init__(self, settings: Settings, batch: int) -> None:
        self.settings, self.batch = settings, batch
        self.device = torch.device(settings.device)
        torch.set_num_threads(settings.threads)
        torch._dynamo.reset()  # else a ninth shape would not be compiled any more
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(batch, 3, 32, 32, generator=generator).to(self.device)
        self.labels = torch.randint(CLASSES, (batch,), generator=generator).to(self.device)
        self.targets = reference.pgd_targets(self.labels, CLASSES, torch.arange(batch))
        self._network = cache(self._make_network)
        self._watched = cache(self._make_watched)
        self._prepared = cache(self._make_prepared)

    def warm_up(self, entry: Entry) -> dict[str, Any]:
        """Check an entry and have it compile, tune and allocate; then see what one turn takes and what comes of it.

        Returns:
            peak_memory: bytes at most meanwhile, on a GPU of tensors, else resident; None if unknown.
            memory: how much of that is beyond what was held before.
            loss: mean cross-entropy to the target of what the attack made, by the reference in fp32.

        Raises:
            WrongResult: it says what is wrong and by how much.
        """
        if entry.candidate in OURS:
            self._check(entry)
        # A graph's memory is taken at its capture, and not seen in a replay.
        captures = entry.candidate == "ours-graph"
        if not captures:
            self._run(entry, None)
        peak = PeakMemory(self.device)
        before = torch.cuda.memory_allocated() if self.device.type == "cuda" else _resident()
        adversarial = self._run(entry, None)
        most = peak.bytes()
        return {
            "peak_memory": most,
            "memory": None if most is None or before is None else most - before,
            "loss": self._loss(entry.activation, adversarial),
        }

    def turn(self, entry: Entry) -> tuple[float, float]:
        """One attack; seconds and page faults of an iteration."""
        clock = Clock(self.device)
        self._run(entry, clock)
        return clock.iteration()

    def row(self, entry: Entry) -> float:
        """Seconds for the error on clean images and after 10, 30 and 50 steps, of the whole batch."""
        self._synchronize()
        start = time.perf_counter()
        if entry.candidate in OURS:
            with self._settings_of(entry):
                prepared = self._prepared(entry.activation, entry.precision, entry.backend)
                found = [prepared.exact(self.images).argmax(1)]
                result = self._pgd(entry, prepared, steps=ROW[-1], report_at=ROW)
                found += result.predictions.values()
        else:
            images = [self.images, *(self._run(entry, None, steps=steps) for steps in ROW)]
            with self._settings_of(entry), torch.no_grad():
                watched = self._watched(entry.activation, entry.precision, False)
                found = [watched(iterate).argmax(1) for iterate in images]
        assert len(found) == 1 + len(ROW)
        self._synchronize()
        return time.perf_counter() - start

    def prepared(self, entry: Entry) -> nn.Module:
        """The prepared model of one of our entries."""
        return self._prepared(entry.activation, entry.precision, entry.backend)

    def attack_once(self, entry: Entry, steps: int) -> None:
        """One attack, for whoever looks on."""
        self._run(entry, None, steps=steps)

    def start_loss(self, activation: str) -> float:
        """The loss of the images themselves."""
        return self._loss(activation, self.images)

    def _run(self, entry: Entry, clock: Clock | None, steps: int | None = None) -> Tensor:
        """Attack the batch from the images themselves; returns the adversarial images."""
        steps = self.settings.steps if steps is None else steps
        with self._settings_of(entry):
            if entry.candidate in OURS:
                prepared = self._prepared(entry.activation, entry.precision, entry.backend)
                progress = clock.mark if clock is not None else None
                return self._pgd(entry, prepared, steps=steps, progress=progress).adversarial
            watched = self._watched(entry.activation, entry.precision, entry.candidate == "compiled")
            watched.clock = clock
            try:
                found = _ATTACKS[entry.candidate](watched, self, steps)
                if clock is not None:
                    clock.mark()  # the end of the last iteration
                return found
            finally:
                watched.clock = None

    def _pgd(self, entry: Entry, prepared: nn.Module, **options: Any) -> attack.PGDResult:
        engine = entry.candidate.removeprefix("ours-")
        settings = {"eps": EPS, "step_size": STEP, "targets": self.targets, "random_start": False, "engine": engine}
        return attack.pgd(prepared, self.images, self.labels, **settings, **options)

    def _check(self, entry: Entry) -> None:
        """Compare logits and gradient of a prepared model with the reference's."""

        def computed(network: nn.Module) -> tuple[Tensor, Tensor]:
            leaf = self.images.clone().requires_grad_()
            logits = network(leaf)
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, self.labels, reduction="sum"), leaf)
            return logits.detach(), gradient

        with self._settings_of(entry):
            found = computed(self.prepared(entry))
        plain = []
        for precision in ("fp32", entry.precision):
            with self._settings_of(Entry(entry.activation, precision, "loop")):
                plain.append(computed(self._watched(entry.activation, precision, False)))
        for what, got, right, rounded in zip(("logits", "gradient"), found, *plain, strict=True):
            # Beyond the order of sums, twice what the precision's rounding does to the reference itself.
            allowed = _TOLERANCE + 2 * float((rounded - right).norm() / right.norm())
            wrong = float((got - right).norm() / right.norm())
            if not wrong <= allowed:  # NaN is wrong too
                raise WrongResult(
                    f"{entry} computes a wrong {what}: its distance from the reference's is {wrong:.2g} of "
                    f"that one's norm, allowed {allowed:.2g}"
                )

    @torch.no_grad()
    def _loss(self, activation: str, images: Tensor) -> float:
        with self._settings_of(Entry(activation, "fp32", "loop")):
            return float(F.cross_entropy(self._watched(activation, "fp32", False)(images), self.targets))

    @contextmanager
    def _settings_of(self, entry: Entry) -> Iterator[None]:
        """The entry's backend, and on a GPU the arithmetic of its float32 products."""
        with use_backend(entry.backend if entry.candidate in OURS else "reference"), _products(entry.precision):
            yield

    def _make_network(self, activation: str) -> nn.Module:
        torch.manual_seed(0)
        return resnet18(CLASSES, activation=activation, width=self.settings.width).eval().to(self.device)

    def _make_watched(self, activation: str, precision: str, compiled: bool) -> Watched:
        network, dtype = self._network(activation), DTYPES.get(precision)
        if dtype is not None:
            network = self._make_network(activation).to(dtype)
        if compiled:
            mode = "max-autotune" if self.device.type == "cuda" else None
            network = torch.compile(network, mode=mode, dynamic=False)
        return Watched(network, dtype)

    def _make_prepared(self, activation: str, precision: str, backend: str) -> nn.Module:
        return attack.prepare(self._network(activation), precision=precision)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _loop(network: Watched, bench: Bench, steps: int) -> Tensor:
    images, adversarial = bench.images, bench.images.clone()
    for _ in range(steps):
        torch.compiler.cudagraph_mark_step_begin()
        adversarial.requires_grad_()
        loss = F.cross_entropy(network(adversarial), bench.targets)
        (gradient,) = torch.autograd.grad(loss, adversarial)
        adversarial = adversarial.detach() - STEP * gradient.sign()
        adversarial = (images + (adversarial - images).clamp(-EPS, EPS)).clamp(0, 1)
    return adversarial


def _torchattacks(network: Watched, bench: Bench, steps: int) -> Tensor:
    import torchattacks

    found = torchattacks.PGD(network, eps=EPS, alpha=STEP, steps=steps, random_start=False)
    found.set_mode_targeted_by_function(lambda images, labels: bench.targets, quiet=True)
    return found(bench.images, bench.labels)


def _foolbox(network: Watched, bench: Bench, steps: int) -> Tensor:
    import foolbox

    model = foolbox.PyTorchModel(network, bounds=(0, 1), device=bench.device)
    found = foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=steps, random_start=False)
    criterion = foolbox.criteria.TargetedMisclassification(bench.targets)
    return found(model, bench.images, criterion, epsilons=EPS)[1]


def _art(network: Watched, bench: Bench, steps: int) -> Tensor:
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    device_type = "gpu" if bench.device.type == "cuda" else "cpu"
    classifier = PyTorchClassifier(
        network, nn.CrossEntropyLoss(), (3, 32, 32), CLASSES, clip_values=(0.0, 1.0), device_type=device_type
    )
    options = {"max_iter": steps, "targeted": True, "batch_size": bench.batch, "verbose": False}
    found = ProjectedGradientDescent(classifier, norm=np.inf, eps=EPS, eps_step=STEP, **options)
    one_hot = F.one_hot(bench.targets, CLASSES).cpu().numpy()
    return torch.from_numpy(found.generate(bench.images.cpu().numpy(), one_hot)).to(bench.device)


_ATTACKS: Mapping[str, Callable[[Watched, Bench, int], Tensor]] = {
    "loop": _loop,
    "compiled": _loop,
    "torchattacks": _torchattacks,
    "foolbox": _foolbox,
    "art": _art,
}


@contextmanager
def _products(precision: str) -> Iterator[None]:
    """On a GPU, products of float32 as `attack.prepare` has them in this precision."""
    if not torch.cuda.is_available():
        yield
        return
    # Not by their newer fp32_precision: once that is set, reading these raises, as torch.compile does.
    places = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    try:
        for place in places:
            place.allow_tf32 = precision == "tf32"
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.allow_tf32 = value


def missing(candidate: str, device: str) -> str | None:
    """Why a candidate cannot run here, or None."""
    if candidate == "ours-graph" and device != "cuda":
        return "CUDA graphs need a GPU"
    if candidate in LIBRARIES and find_spec(LIBRARIES[candidate]) is None:
        return "it is not installed (requirements-compare.txt)"
    return None


def _resident() -> int | None:
    """Bytes of memory that this process has now."""
    if sys.platform != "linux":
        return None
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
