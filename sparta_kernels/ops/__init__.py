"""The operations: one file each, with its schema, checks, fake, autograd and documentation."""

from sparta_kernels.ops.attention import sparta_activation, sparta_attention
from sparta_kernels.ops.attention_kernels import AttentionWeights
from sparta_kernels.ops.conv import dynamic_conv
from sparta_kernels.ops.dyrelu import dyrelu
from sparta_kernels.ops.gate import sparta_gate
from sparta_kernels.ops.pgd import pgd_start_, pgd_step_
from sparta_kernels.ops.pointwise import smooth_relu, swish_relu
from sparta_kernels.ops.relu import add_relu, add_relu_fork

__all__ = [
    "AttentionWeights",
    "add_relu",
    "add_relu_fork",
    "dynamic_conv",
    "dyrelu",
    "pgd_start_",
    "pgd_step_",
    "smooth_relu",
    "sparta_activation",
    "sparta_attention",
    "sparta_gate",
    "swish_relu",
]
