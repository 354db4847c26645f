"""The outcome for every image, in a file that is intact at any moment and from which a run can resume."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.files import write_atomically

FORMAT = "sparta_kernels outcomes 1"


class OutcomesError(ValueError):
    """A file that a run cannot resume from; the message says what is wrong with it."""


class Outcomes:
    """The outcomes of an evaluation for N images, as far as they are known.

    Attributes:
        settings: everything that decides the outcomes, bit for bit; JSON-serialisable.
        arrays: plain numeric arrays by name, for K reported iterates:

            - `index`, int64 (N,): the image's place in its data set; `label`, int64 (N,);
            - `done`, bool (N,): whether the outcome is known. If not, the arrays below are zero;
            - `clean`, int64 (N,): the class predicted for the clean image;
            - `target`, int64 (N,): the class it was driven towards, -1 in an untargeted attack;
            - `report_at`, int64 (K,): the reported iterates; `prediction`, int64 (N, K): the class predicted
              there; `hit`, bool (N, K): whether the attack hit its target, in any of its restarts;
            - `loss`, float32 (N, steps + 1): cross-entropy to the target (untargeted: the label);
            - `parity_done`, bool (M,), `parity_prediction`, int64 (M, K): of an fp32 attack on the first M
              images. M is 0 if the attack itself is in fp32.
    """

    RESULTS = ("done", "clean", "target", "prediction", "hit", "loss")
    PARITY = ("parity_done", "parity_prediction")

    def __init__(self, settings: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> None:
        self.settings, self.arrays = dict(settings), arrays

    @classmethod
    def none_yet(
        cls,
        settings: Mapping[str, Any],
        *,
        index: np.ndarray,
        label: np.ndarray,
        report_at: Sequence[int],
        steps: int,
        parity: int,
    ) -> Outcomes:
        """Make outcomes of which none is known."""
        count, iterates = len(index), len(report_at)
        fixed = {
            "index": index.astype(np.int64),
            "label": label.astype(np.int64),
            "report_at": np.asarray(report_at, np.int64),
        }
        return cls(
            settings,
            fixed
            | {
                "done": np.zeros(count, bool),
                "clean": np.zeros(count, np.int64),
                "target": np.zeros(count, np.int64),
                "prediction": np.zeros((count, iterates), np.int64),
                "hit": np.zeros((count, iterates), bool),
                "loss": np.zeros((count, steps + 1), np.float32),
                "parity_done": np.zeros(parity, bool),
                "parity_prediction": np.zeros((parity, iterates), np.int64),
            },
        )

    def blank(self) -> Outcomes:
        """Outcomes of the same images, of which none is known."""
        results = {name: np.zeros_like(self.arrays[name]) for name in self.RESULTS + self.PARITY}
        return Outcomes(self.settings, self.arrays | results)

    def knows(self, parity: bool, rows: slice) -> bool:
        """Whether all outcomes of these images are known: of the attack, or of the fp32 attack beside it."""
        return bool(self.arrays["parity_done" if parity else "done"][rows].all())

    def put(self, rows: slice, **results: np.ndarray) -> None:
        """Set results of these images, each by the name of its array."""
        for name, values in results.items():
            self.arrays[name][rows] = values

    def fits(self, other: Outcomes) -> bool:
        """Whether `other` is about the same images and iterates."""
        fixed = all(np.array_equal(self.arrays[name], other.arrays[name]) for name in ("index", "label", "report_at"))
        return fixed and all(array.shape == other.arrays[name].shape for name, array in self.arrays.items())

    def take_over(self, other: Outcomes) -> None:
        """Add the outcomes known to `other`, which must fit."""
        for names in (self.RESULTS, self.PARITY):
            rows = other.arrays[names[0]]
            for name in names:
                self.arrays[name][rows] = other.arrays[name][rows]

    def save(self, path: Path) -> None:
        """Write them to `path` atomically; equal outcomes give equal bytes.

        Raises:
            OSError: it cannot be written; what was there before still is.
        """
        content = io.BytesIO()
        settings = json.dumps(self.settings, sort_keys=True, allow_nan=False)
        named: dict[str, Any] = {"format": np.str_(FORMAT), "settings": np.str_(settings)} | self.arrays
        # Without compression: losses hardly shrink, and this is done after every batch.
        np.savez(content, **named)
        write_atomically(path, content.getvalue())

    @classmethod
    def load(cls, path: Path) -> Outcomes:
        """What `save` wrote.

        Raises:
            OSError: it cannot be read.
            OutcomesError: it is damaged, or was not written by `sparta evaluate`.
        """
        damaged = (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, MemoryError)
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[name] for name in file.files}
        except (*damaged, AttributeError, TypeError) as error:  # the last two: a lone array, not a file of several
            raise OutcomesError(f"outcomes {path}: damaged, or not an .npz file of plain arrays ({error})") from error
        if str(found.pop("format", "")) != FORMAT:
            raise OutcomesError(f"outcomes {path}: an .npz file, but not written by `sparta evaluate`")
        try:
            settings = json.loads(str(found.pop("settings")))
            expected = cls.none_yet(
                settings,
                index=found["index"],
                label=found["label"],
                report_at=found["report_at"].tolist(),
                steps=settings["steps"],
                parity=len(found["parity_done"]),
            ).arrays
            for name in sorted(expected.keys() | found.keys()):
                if name not in found or name not in expected:
                    raise ValueError(f"{name} is {'missing' if name in expected else 'unknown'}")
                kind, wanted = (found[name].dtype, found[name].shape), (expected[name].dtype, expected[name].shape)
                if kind != wanted:
                    raise ValueError(f"{name} must be {wanted[0]} {wanted[1]}, got {kind[0]} {kind[1]}")
        except (*damaged, TypeError, RecursionError) as error:
            raise OutcomesError(f"outcomes {path}: its content is damaged ({error})") from error
        return cls(settings, found)
