"""The kernels in Triton, for NVIDIA GPUs: the same functions as `sparta_kernels.backends.native`.

Every operation is first planned, as a list of launches, and then run. A plan can also be made with tensors on the
device "meta", to compile its kernels ahead of time. If TRITON_INTERPRET=1 is set before triton is imported, the kernels
are plain Python and run (slowly) on the CPU.

Tensors arrive checked (`sparta_kernels.ops`).
"""

from __future__ import annotations

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError(f"the backend 'triton' needs the package triton: pip install triton ({error})") from error

from sparta_kernels.backends.triton.attention_plan import (  # noqa: F401
    attention_backward_,
    attention_forward,
    attention_unfit,
    pack_attention,
    plan_attention_backward,
    plan_attention_forward,
)
from sparta_kernels.backends.triton.conv_plan import (  # noqa: F401
    conv_backward,
    conv_forward,
    plan_conv_backward,
    plan_conv_forward,
)
from sparta_kernels.backends.triton.dyrelu_plan import (  # noqa: F401
    dyrelu_backward,
    dyrelu_forward,
    plan_dyrelu_backward,
    plan_dyrelu_forward,
)
from sparta_kernels.backends.triton.gate_plan import (  # noqa: F401
    gate_backward,
    gate_forward,
    plan_gate_backward,
    plan_gate_forward,
)
from sparta_kernels.backends.triton.pgd_plan import pgd_start, pgd_step, plan_pgd_start, plan_pgd_step  # noqa: F401
from sparta_kernels.backends.triton.pointwise_plan import (  # noqa: F401
    plan_smooth_relu_backward,
    plan_smooth_relu_forward,
    plan_swish_relu_backward,
    plan_swish_relu_forward,
    smooth_relu_backward,
    smooth_relu_forward,
    swish_relu_backward,
    swish_relu_forward,
)
from sparta_kernels.backends.triton.relu_plan import (  # noqa: F401
    plan_relu_backward,
    plan_relu_forward,
    relu_backward,
    relu_forward,
    relu_forward_,
)
