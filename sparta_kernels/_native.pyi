"""The compiled module (csrc/bindings.cpp). Internal: nothing is checked here, a wrong address is a crash."""

from typing import Any

_Rows = tuple[int, int, int]  # address, sample stride, row stride (in elements)
_Small = tuple[int, int]  # address (0: absent), dtype number
_Place = tuple[int, int, int]  # CPU threads, CUDA device (-1: the CPU), stream

compiler: str
with_cuda: bool  # whether the CUDA sources were built

def gate_forward(
    shape: tuple[int, int, int, int, int],  # N, C, H, W, share
    planar: bool,
    dtype: int,
    x: _Rows,
    y: _Rows,
    spatial: _Small,
    channel: _Small,
    kernel: _Small,
    place: _Place,
    /,
) -> None: ...
def gate_backward(
    shape: tuple[int, int, int, int, int],
    planar: bool,
    dtype: int,
    x: _Rows,
    gy: _Rows,
    gx: _Rows,
    gy2: _Rows,  # on the CPU: added to gy
    spatial: _Small,
    channel: _Small,
    kernel: _Small,
    grad_spatial: _Small,
    grad_channel: _Small,
    grad_kernel: _Small,
    scratch: int,  # on a CUDA device the address of gate_backward_scratch() bytes, 0 where those are 0
    place: _Place,
    /,
) -> None: ...
def conv_forward(
    shape: tuple[int, int, int, int],  # N, H, W, K
    spatial: _Small,
    kernel: _Small,
    output: _Small,
    place: _Place,
    /,
) -> None: ...
def conv_backward(
    shape: tuple[int, int, int, int],
    grad_output: _Small,
    spatial: _Small,
    kernel: _Small,
    grad_spatial: _Small,
    grad_kernel: _Small,
    place: _Place,
    /,
) -> None: ...
def pgd_step(
    elements: int,
    dtype: int,
    adv: int,
    grad: int,
    clean: int,
    signed_step: float,
    eps: float,
    lower: float,
    upper: float,
    place: _Place,
    /,
) -> None: ...
def pgd_start(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: int,
    adv: int,
    clean: int,
    index: int,
    seed: int,
    restart: int,
    eps: float,
    lower: float,
    upper: float,
    place: _Place,
    /,
) -> None: ...
def relu_forward(
    elements: int,
    dtype: int,
    a: int,
    b: int,  # 0: none
    y: int,
    bits: int,  # 0: not kept
    place: _Place,
    /,
) -> None: ...
def relu_backward(
    elements: int,
    dtype: int,
    grad: int,
    grad2: int,  # 0: none
    bits: int,
    gx: int,
    place: _Place,
    /,
) -> None: ...
def swish_relu_forward(elements: int, dtype: int, x: int, y: int, place: _Place, /) -> None: ...
def swish_relu_backward(elements: int, dtype: int, gy: int, x: int, gx: int, place: _Place, /) -> None: ...
def smooth_relu_forward(elements: int, dtype: int, x: int, y: int, b: _Small, place: _Place, /) -> None: ...
def smooth_relu_backward(
    elements: int,
    dtype: int,
    gy: int,
    x: int,
    gx: int,  # 0: not wanted
    b: _Small,
    grad_b: _Small,
    scratch: int,  # on a CUDA device the address of smooth_relu_backward_scratch() bytes, 0 where those are 0
    place: _Place,
    /,
) -> None: ...
def dyrelu_forward(
    shape: tuple[int, int, int, int],  # N, C, H * W, K
    planar: bool,
    dtype: int,
    x: _Rows,
    y: _Rows,
    slopes: _Small,
    intercepts: _Small,
    place: _Place,
    /,
) -> None: ...
def dyrelu_backward(
    shape: tuple[int, int, int, int],
    planar: bool,
    dtype: int,
    gy: _Rows,
    x: _Rows,
    gx: _Rows,
    slopes: _Small,
    intercepts: _Small,
    grad_slopes: _Small,
    grad_intercepts: _Small,
    scratch: int,  # on a CUDA device the address of dyrelu_backward_scratch() bytes, 0 where those are 0
    place: _Place,
    /,
) -> None: ...

# Bytes of scratch memory that the caller of a CUDA kernel has to allocate; in builds with CUDA only.
def gate_backward_scratch(
    shape: tuple[int, int, int, int, int], planar: bool, dtype: int, x: _Rows, gy: _Rows, gx: _Rows, /
) -> int: ...
def smooth_relu_backward_scratch(elements: int, dtype: int, /) -> int: ...
def dyrelu_backward_scratch(
    shape: tuple[int, int, int, int], planar: bool, dtype: int, gy: _Rows, x: _Rows, gx: _Rows, /
) -> int: ...
def attention_forward(
    shape: tuple[int, int, int, int, int],  # N, C, H * W, hidden padded to a multiple of 16, padding
    planar: bool,
    dynamic: bool,
    dtype: int,  # of x
    product: int,  # of the matrices
    x: _Rows,
    skip: _Rows,  # 0: none
    weights: tuple[int, ...],  # w13, w6, w2, b13, b6, b2, w4, w7: csrc/kernels.h
    written: tuple[int, ...],  # a, channel, kernel, mean1, mean6, bits (0: not kept)
    place: _Place,
    /,
) -> None: ...
def attention_backward(
    shape: tuple[int, int, int, int, int],
    planar: bool,
    dynamic: bool,
    dtype: int,
    product: int,
    gx: _Rows,
    weights: tuple[int, ...],  # w13, w6, w2, w4, w7
    gradients: tuple[int, ...],  # of a, channel and kernel
    bits: int,
    place: _Place,
    /,
) -> None: ...
def set_products(addresses: list[int], /) -> None: ...  # float32, bfloat16, release, float64
def multiply(dtype: int, m: int, n: int, k: int, a: int, b: int, c: int, /) -> None: ...
def philox4x32(counter: list[int], key: list[int], /) -> list[int]: ...
def isa() -> str: ...
def built_isas() -> list[str]: ...
def supported_isas() -> list[str]: ...
def set_isa(isa: str, /) -> None: ...
def cuda_info() -> dict[str, Any]: ...
def malloc_is_glibc() -> bool: ...
def keep_freed_memory() -> bool: ...
def return_freed_memory() -> None: ...
