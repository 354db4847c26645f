"""Modules: SPARTA, activations by name, and the ResNets that they are tried in."""

from .activations import ACTIVATIONS, make_activation, parse_activation
from .resnet import ResNet, parse_sites, resnet18, resnet34
from .sparta import Sparta

__all__ = [
    "ACTIVATIONS",
    "ResNet",
    "Sparta",
    "make_activation",
    "parse_activation",
    "parse_sites",
    "resnet18",
    "resnet34",
]
