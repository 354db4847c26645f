"""torchvision's networks, also where its compiled operations do not load: beside a CPU build of torch.

`import torchvision` fails there at the first operation that it wants to describe. Its image classifiers use none of
them, so the two it stumbles over are declared, without anything that computes them, and it is imported again.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch

_DECLARED = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: list[torch.library.Library] = []  # what is declared lives as long as this


def import_torchvision() -> ModuleType:
    """torchvision, whose classifiers work; the test is skipped where it is not installed. timm needs it imported."""
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError:
        pytest.skip("needs torchvision (requirements-compare.txt)")
    except RuntimeError:  # operator torchvision::nms does not exist
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for schema in _DECLARED:
            library.define(schema)
        _library.append(library)
        return importlib.import_module("torchvision")
