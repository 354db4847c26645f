"""What the compilers make of the GPU kernels, without a GPU: registers, shared memory, spills, bytes an element.

    python benchmarks/compiled.py                       # both backends, compute capability 8.0, 9.0 and 10.0
    python benchmarks/compiled.py --backend triton --arch 90 --json compiled.json

Native kernels are read out of the installed module; Triton's are compiled for what its launch table chooses at the
sites of ResNets. Ends with status 1 if any of them spills registers.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import machine_code
import torch
from machine_code import Code
from rich.console import Console
from rich.table import Table

from sparta_kernels import AttentionWeights, _native, backends
from sparta_kernels.data.files import check_writable
from sparta_kernels.report import save_json

ARCHS = (80, 90, 100)
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_C_TYPES = {"double": "float64", "float": "float32", "sparta::bfloat16": "bfloat16", "sparta::float16": "float16"}
SITES = ((64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4))
BATCH = 512
_ORDERS = {"planar": torch.contiguous_format, "channels_last": torch.channels_last}
# Of dyrelu: the usual three lines; and the most that there may be, in rows that are not of whole vectors.
DYRELU = {
    "float32": ((SITES[0], "planar", 3), (SITES[0], "channels_last", 3)),
    "bfloat16": (
        *((SITES[0], "planar", 3), (SITES[0], "channels_last", 3), (SITES[3], "planar", 3)),
        *(((512, 7, 7), "planar", 8), ((512, 7, 7), "channels_last", 8)),
    ),
}
# Of the attention network also where samples straddle tiles, with enough of them that tiles are the larger ones.
ATTENTION = {
    "bfloat16": (("planar", "channels_last"), (*SITES, (512, 7, 7))),
    "float16": (("planar",), (SITES[0], SITES[3])),
    "float32": (("planar", "channels_last"), (SITES[0], SITES[3])),  # tf32
}
MATRIX_INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA")  # of sm_80, sm_90 and sm_100
# Of the native kernels: those of whole vectors. The others read one element at a time, whatever the shape.
_WHOLE = "16-byte vectors"
_SINGLE = "single elements"
_STRAIGHT = ("relu", "swish_relu_forward", "smooth_relu_forward")
# What is counted: natively, the activations' backward passes have loops in a loop.
_COUNTED = {"native": ("gate", *_STRAIGHT), "triton": ("gate", "relu", "swish_relu", "smooth_relu")}
ONE, TWO = " of one", " of two"  # relu: of one tensor, or of the sum of two


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel: whose, what for, and its machine code."""

    backend: str
    name: str
    dtype: str
    case: str  # which kernel of that name
    code: Code

    def as_dict(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            **{key: getattr(self, key) for key in ("backend", "name", "dtype", "case")},
            **{key: getattr(self.code, key) for key in ("arch", "registers", "shared", "stack", "local", "spills")},
            "instructions": len(self.code.instructions),
        }
        if self.name.startswith(_COUNTED[self.backend]) and _SINGLE not in self.case and "finish" not in self.name:
            # Where there is one loop, it is for what is left over: a thread has its vectors outside.
            part = self.code.straight if self.name.startswith(_STRAIGHT) else self.code.main_loop
            traffic = self.code.traffic(DTYPES[self.dtype].itemsize, part)
            facts["main_loop"] = {
                "elements_per_thread": traffic.elements,
                "bytes_loaded_per_element": traffic.loaded,
                "bytes_stored_per_element": traffic.stored,
                "narrow_bytes_per_element": traffic.narrow,
                "instructions_per_element": traffic.instructions,
            }
        if self.name in ("attention_forward", "attention_backward"):
            opcodes = [instruction.opcode.split(".")[0] for instruction in self.code.instructions]
            facts["matrix_instructions"] = sum(opcode in MATRIX_INSTRUCTIONS for opcode in opcodes)
        return facts


# ---- the native kernels ------------------------------------------------------------------------------------


def native_kernels(archs: Sequence[int]) -> Iterator[Kernel]:
    """All that the installed module holds for these architectures."""
    for code in machine_code.read(Path(_native.__file__)):
        found = re.search(r"(\w+)_kernel<(.*?)>\(", code.name)
        if found is None or code.arch not in archs:
            continue
        name = found[1]
        of_what = {"correlate": "conv_", "grad_tap": "conv_", "step": "pgd_", "start": "pgd_"}.get(name, "gate_")
        of_what = "" if name.startswith(("relu", "smooth", "dyrelu")) else of_what
        dtype, *rest = (part.strip() for part in found[2].split(","))
        case = (_SINGLE if rest[0] == "1" else _WHOLE) if rest else ""
        if name.startswith("relu"):
            case += TWO if rest[1] == "true" else ONE
        elif name.startswith("dyrelu") and rest:
            case = case.replace("16-byte", "whole")  # of each channel's own: 16 bytes as they are computed
            case += " planar" if rest[1] == "true" else f" channels_last, {rest[2]} lines"
        elif name.startswith("pointwise"):
            name = name.replace("pointwise", "swish_relu" if "SwishRelu" in rest[1] else "smooth_relu")
            of_what = ""
        yield Kernel("native", of_what + name, _C_TYPES[dtype], case, code)


# ---- Triton's ----------------------------------------------------------------------------------------------


class _Target:
    """What triton asks its driver while it compiles, answered without a GPU."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._arch, self._target = arch, GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self._arch  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention_launches(
    shape: tuple[int, int, int, int],
    hidden: int,
    dtype: torch.dtype,
    layout: str,
    arch: int,
    dynamic: bool = True,
    keep: bool = True,
) -> list[Any]:
    """Forward's, and where it keeps bits, backward's."""
    from sparta_kernels.backends import triton

    samples, channels, *_ = shape
    shapes = [(2 * hidden, channels), (2 * hidden,), (hidden,), (1,), (channels, hidden), (channels,), (1,)]
    common, more = (empty(*size) for size in shapes), (empty(hidden, hidden), empty(hidden), empty(hidden))
    weights = AttentionWeights(*common, *(more if dynamic else (None,) * 3))
    x = empty(*shape, dtype=dtype).contiguous(memory_format=_ORDERS[layout])
    packed = triton.pack_attention(weights, dtype)
    forward, found = triton.plan_attention_forward(x, packed, hidden, keep, arch)
    if not keep:
        return forward
    sizes = empty(samples, hidden), empty(samples, hidden) if dynamic else None
    backward, _ = triton.plan_attention_backward(x, found.a, *sizes, found.bits, packed, hidden, arch)
    return [*forward, *backward]


def triton_launches(arch: int) -> Iterator[tuple[str, str, str, Any]]:
    """Name, dtype, case and launch of every kernel that is chosen for the sites of ResNets, in the dtypes of x."""
    from sparta_kernels.backends import triton

    for dtype_name, (layouts, sites) in ATTENTION.items():
        for layout, site in itertools.product(layouts, sites):
            case = "x".join(map(str, site)) + f" {layout}"
            shape, hidden = (BATCH, *site), min(256, site[0])
            launches = attention_launches(shape, hidden, DTYPES[dtype_name], layout, arch)
            yield from ((launch.kernel.__name__, dtype_name, case, launch) for launch in launches)
    for dtype_name, dtype in DTYPES.items():
        for channels, height, width in SITES if dtype.itemsize in (4, 2) else SITES[:1]:
            for layout in ("planar", "channels_last"):
                x = empty(BATCH, channels, height, width, dtype=dtype).contiguous(memory_format=_ORDERS[layout])
                small = (
                    empty(BATCH, 1, height, width, dtype=dtype),
                    empty(BATCH, channels, dtype=dtype),
                    empty(BATCH, dtype=dtype),
                )
                case = f"{channels}x{height}x{width} {layout}"
                for launches, *_ in (
                    triton.plan_gate_forward(x, *small, 1),
                    triton.plan_gate_backward(x, x, *small, 1, [True] * 4),
                ):
                    yield from ((launch.kernel.__name__, dtype_name, case, launch) for launch in launches)
        x = empty(BATCH, *SITES[0], dtype=dtype)
        bits = empty(x.numel() // 8, dtype=torch.uint8)
        for number, other in {ONE: None, TWO: x}.items():
            for launches in (
                triton.plan_relu_forward(x, other, x, True)[0],
                triton.plan_relu_backward(x, other, bits, x.stride())[0],
            ):
                yield from ((launch.kernel.__name__, dtype_name, f"64x32x32{number}", launch) for launch in launches)
        b = empty(1)
        for launches in (
            triton.plan_swish_relu_forward(x)[0],
            triton.plan_swish_relu_backward(x, x)[0],
            triton.plan_smooth_relu_forward(x, b)[0],
            triton.plan_smooth_relu_backward(x, x, b, [True, True])[0],
        ):
            yield from ((launch.kernel.__name__, dtype_name, "64x32x32", launch) for launch in launches)
        for site, layout, lines in DYRELU.get(dtype_name, ()):
            x = empty(BATCH, *site, dtype=dtype).contiguous(memory_format=_ORDERS[layout])
            small = empty(BATCH, site[0], lines)
            case = f"{'x'.join(map(str, site))} {layout}, {lines} lines"
            for launches in (
                triton.plan_dyrelu_forward(x, small, small)[0],
                triton.plan_dyrelu_backward(x, x, small, small, [True] * 3)[0],
            ):
                yield from ((launch.kernel.__name__, dtype_name, case, launch) for launch in launches)
        images, indices = empty(BATCH, 3, 32, 32, dtype=dtype), empty(BATCH, dtype=torch.int64)
        spatial, kernel = empty(BATCH, 1, 32, 32, dtype=dtype), empty(BATCH, 3, 3, dtype=dtype)
        for case, launches in {
            "3x32x32": triton.plan_pgd_step(images, images, images, 0.1, 0.1, 0.0, 1.0),
            "3x32x32 ": triton.plan_pgd_start(images, images, indices, 0.1, 0, 0, 0.0, 1.0),
            "3x3": triton.plan_conv_forward(spatial, kernel)[0],
            "3x3 ": triton.plan_conv_backward(spatial, spatial, kernel, [True, True])[0],
        }.items():
            yield from ((launch.kernel.__name__, dtype_name, case.strip(), launch) for launch in launches)


def _compile(work: tuple[int, int, int]) -> list[Kernel]:
    """Compile every `step`-th of the launches for one architecture, in a process of its own."""
    arch, first, step = work
    from triton.runtime import driver

    driver.set_active(_Target(arch))
    launches = list(triton_launches(arch))[first::step]
    compiled = [
        launch.kernel.warmup(*launch.arguments, grid=(launch.programs,), **launch.options) for *_, launch in launches
    ]
    codes = machine_code.read_cubins([kernel.asm["cubin"] for kernel in compiled], arch)
    for code, kernel in zip(codes, compiled, strict=True):
        code.shared = kernel.metadata.shared  # what a launch asks for; the cubin does not know it
    return [
        Kernel("triton", name, dtype, case, code) for (name, dtype, case, _), code in zip(launches, codes, strict=True)
    ]


def triton_kernels(archs: Sequence[int], processes: int = 2) -> list[Kernel]:
    """What the launch table chooses, compiled for these architectures.

    Raises:
        RuntimeError: this is the interpreter.
    """
    if "cpu" in backends.DEVICES["triton"]:
        raise RuntimeError("TRITON_INTERPRET=1 is set: nothing would be compiled")
    work = [(arch, first, processes) for arch in archs for first in range(processes)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        found = [kernel for kernels in pool.map(_compile, work) for kernel in kernels]
    return sorted(found, key=lambda kernel: (kernel.code.arch, kernel.name, kernel.dtype, kernel.case))


# ---- the command -------------------------------------------------------------------------------------------


def spilling(kernels: Sequence[Kernel]) -> list[Kernel]:
    return [kernel for kernel in kernels if kernel.code.spills or kernel.code.stack or kernel.code.local]


def _table(kernels: Sequence[Kernel], arch: int) -> Table:
    table = Table(title=f"sm_{arch}", title_justify="left")
    for heading in ("backend", "kernel", "dtype", "case"):
        table.add_column(heading)
    for heading in ("registers", "shared", "spills", "B/element in", "out", "narrow", "instr./element"):
        table.add_column(heading, justify="right")
    for kernel in kernels:
        if kernel.code.arch == arch:
            loop = kernel.as_dict().get("main_loop")
            counted = [f"{loop[key]:.2f}" for key in list(loop)[1:]] if loop else []
            code = kernel.code
            table.add_row(
                *(kernel.backend, kernel.name, kernel.dtype, kernel.case),
                *map(str, (code.registers, code.shared, code.spills)),
                *counted,
            )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="compiled.py", description="Read what the compilers make of the GPU kernels.")
    parser.add_argument("--json", metavar="FILE", help="write the results here")
    parser.add_argument("--arch", nargs="+", type=int, choices=ARCHS, default=list(ARCHS))
    parser.add_argument("--backend", nargs="+", choices=("native", "triton"), default=["native", "triton"])
    options = parser.parse_args(arguments)
    if options.json is not None:
        try:
            check_writable(options.json)
        except OSError as error:
            parser.error(f"argument --json: {error}")
    kernels: list[Kernel] = []
    try:
        for name in options.backend:
            if "cuda" not in backends.DEVICES.get(name, ()):
                print(f"compiled.py: this installation has no GPU kernels of {name}", file=sys.stderr)
            else:
                kernels += (native_kernels if name == "native" else triton_kernels)(options.arch)
    except RuntimeError as error:
        print(f"compiled.py: {error}", file=sys.stderr)
        return 1
    console = Console(width=None if sys.stdout.isatty() else 170, highlight=False)
    for arch in options.arch:
        console.print(_table(kernels, arch))
    bad = spilling(kernels)
    for kernel in bad:
        console.print(f"sm_{kernel.code.arch} {kernel.backend} {kernel.name} {kernel.dtype} {kernel.case} spills")
    if options.json is not None:
        save_json(options.json, {"kernels": [kernel.as_dict() for kernel in kernels]})
    return 1 if bad or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
