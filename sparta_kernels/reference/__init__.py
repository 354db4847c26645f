"""The equations in plain PyTorch: the specification that every backend is tested against.

Nothing here is fast and nothing is checked. Equation numbers are those of "SPARTA: Spatially Attentive and
Adversarially Robust Activation" (Guo et al.). Shapes are ``(N, C, H, W)`` and ``P = H * W``. Every function
works on any device and in any floating dtype. Outside the attention network, whose convolutions compute in
their own dtype, float64 is computed in float64 and everything else in float32, and a result is rounded once,
at the end, to the dtype of the tensor that it belongs to.
"""

from sparta_kernels.reference.activations import (
    add_relu,
    dyrelu,
    dyrelu_backward,
    smooth_relu,
    smooth_relu_backward,
    swish_relu,
    swish_relu_backward,
)
from sparta_kernels.reference.attack import pgd_start, pgd_step, pgd_targets
from sparta_kernels.reference.attention_network import attention, folded_attention, sparta
from sparta_kernels.reference.gating import dynamic_conv, gate, gate_backward
from sparta_kernels.reference.philox import PURPOSE_AUGMENT, PURPOSE_START, PURPOSE_TARGET, philox4x32, uniform

__all__ = [
    "PURPOSE_AUGMENT",
    "PURPOSE_START",
    "PURPOSE_TARGET",
    "add_relu",
    "attention",
    "dynamic_conv",
    "dyrelu",
    "dyrelu_backward",
    "folded_attention",
    "gate",
    "gate_backward",
    "pgd_start",
    "pgd_step",
    "pgd_targets",
    "philox4x32",
    "smooth_relu",
    "smooth_relu_backward",
    "sparta",
    "swish_relu",
    "swish_relu_backward",
    "uniform",
]
