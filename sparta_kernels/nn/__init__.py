"""Modules: SPARTA, other activations by name, and the ResNets that use them."""

from .activations import ACTIVATIONS, make_activation, parse_activation
from .dyrelu import DyReLU
from .feature_denoising import FeatureDenoising
from .maxout import MaxOut
from .pointwise import SmoothReLU, SwishReLU
from .replace import Replaced, Replacement, replace_relu
from .resnet import ResNet, parse_sites, resnet18, resnet34
from .sparta import Sparta
from .squeeze_excite import SqueezeExcite

__all__ = [
    "ACTIVATIONS",
    "DyReLU",
    "FeatureDenoising",
    "MaxOut",
    "Replaced",
    "Replacement",
    "ResNet",
    "SmoothReLU",
    "Sparta",
    "SqueezeExcite",
    "SwishReLU",
    "make_activation",
    "parse_activation",
    "parse_sites",
    "replace_relu",
    "resnet18",
    "resnet34",
]
