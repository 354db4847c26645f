"""Read what a compiler made of a kernel: registers, shared memory, spills, and the bytes that its main loop moves.

`cuobjdump` (of the CUDA toolkit, or of Triton, which brings its own) disassembles; this module only counts.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

_RESOURCES = re.compile(r"REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+) LOCAL:(?P<local>\d+)")
_INSTRUCTION = re.compile(
    r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*(?P<opcode>[A-Z][\w.]*)(?P<rest>[^;]*);"
)
_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str
    operands: str

    @property
    def global_bytes(self) -> int:
        """Bytes that a thread moves from or to global memory by it; 0 for every other instruction."""
        if self.opcode.split(".")[0] not in ("LDG", "LDGSTS", "STG"):  # the second: on into shared memory
            return 0
        return next((size for part, size in _BYTES.items() if part in self.opcode.split(".")), 4)

    @property
    def target(self) -> int | None:
        """Where a branch goes to."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.opcode.startswith("BRA") else None
        return int(found[1], 16) if found else None


@dataclass
class Code:
    """One compiled kernel for one architecture. Sizes in bytes; shared without what a launch adds."""

    name: str
    arch: int
    registers: int
    stack: int
    shared: int
    local: int
    instructions: list[Instruction] = field(repr=False, default_factory=list)

    @property
    def spills(self) -> int:
        """Instructions that move registers to or from local memory."""
        return sum(i.opcode.split(".")[0] in ("LDL", "STL") for i in self.instructions)

    @cached_property
    def _storing_loops(self) -> list[list[Instruction]]:
        """The innermost loops that store to global memory."""
        loops = [
            [j for j in self.instructions if i.target <= j.address <= i.address]
            for i in self.instructions
            if i.target is not None and i.target < i.address
        ]
        storing = [loop for loop in loops if any(i.opcode.startswith("STG") for i in loop)]
        return [loop for loop in storing if not any(_inside(other, loop) for other in storing)]

    @cached_property
    def main_loop(self) -> list[Instruction]:
        """The innermost loop that moves most global memory; all of the kernel where no loop stores any."""
        return max(self._storing_loops, key=lambda loop: sum(i.global_bytes for i in loop), default=self.instructions)

    @property
    def straight(self) -> list[Instruction]:
        """What is in none of those loops."""
        in_loops = {i.address for loop in self._storing_loops for i in loop}
        return [i for i in self.instructions if i.address not in in_loops]

    def traffic(self, itemsize: int, part: list[Instruction] | None = None) -> Traffic:
        """Counted in a part, by default the main loop; its 16-byte accesses are taken to be those of the images."""
        part = self.main_loop if part is None else part
        wide = [i for i in part if i.global_bytes == 16]
        elements = sum(16 for i in wide if i.opcode.startswith("STG")) / itemsize
        loaded = sum(16 for i in wide if i.opcode.startswith("LDG"))
        narrow = sum(i.global_bytes for i in part if i.global_bytes < 16)
        return Traffic(
            elements,
            loaded / elements if elements else float("nan"),
            float(itemsize),
            narrow / elements if elements else float("nan"),
            len(part) / elements if elements else float("nan"),
        )


@dataclass(frozen=True)
class Traffic:
    """What a thread does in one round of the main loop."""

    elements: float  # written, by 16-byte stores
    loaded: float  # bytes an element, by 16-byte loads
    stored: float
    narrow: float  # bytes an element by narrower accesses: the small tensors, which come from a cache
    instructions: float  # an element


def _inside(one: list[Instruction], other: list[Instruction]) -> bool:
    return other[0].address <= one[0].address and one[-1].address <= other[-1].address and len(one) < len(other)


def disassembler() -> str | None:
    """`cuobjdump`, of a CUDA toolkit or of Triton."""
    triton = find_spec("triton")
    places = [Path(p) / "backends/nvidia/bin" for p in (triton.submodule_search_locations or [])] if triton else []
    return shutil.which("cuobjdump") or next((str(p / "cuobjdump") for p in places if (p / "cuobjdump").exists()), None)


def read(binary: Path) -> list[Code]:
    """The kernels in a cubin, or in a library that holds several.

    Raises:
        RuntimeError: there is no cuobjdump, or it cannot read the file.
    """
    tool = disassembler()
    if tool is None:
        raise RuntimeError("cuobjdump was not found: install a CUDA toolkit or triton")
    codes = list(_resources(_run(tool, "-res-usage", binary)))
    found = {(code.arch, code.name): code for code in codes}
    arch, name = 0, ""
    for line in _run(tool, "-sass", binary).splitlines():
        if match := re.search(r"code for sm_(\d+)", line):
            arch = int(match[1])
            found |= {(arch, code.name): code for code in codes if code.arch in (0, arch)}
            for code in codes:
                code.arch = code.arch or arch  # a cubin is for one alone, and does not say so among the resources
        elif match := re.search(r"Function : (\S+)", line):
            name = match[1]
        elif (match := _INSTRUCTION.match(line)) and (arch, name) in found:
            found[arch, name].instructions.append(Instruction(int(match[1], 16), match[2], match[3]))
    for code in codes:
        code.name = _demangled(code.name)
    return codes


def read_cubins(cubins: Sequence[bytes], arch: int) -> list[Code]:
    """The only kernel of each of several cubins, all for one architecture: as `read` finds it, but for the addresses.

    The disassembler takes longer to start than to read any kernel, so that it is given all their instructions at once.

    Raises:
        RuntimeError: there is no cuobjdump with an nvdisasm beside it, or one of them cannot read a file.
    """
    tool = disassembler()
    if tool is None or not Path(tool).with_name("nvdisasm").exists():
        raise RuntimeError("cuobjdump was not found: install a CUDA toolkit or triton")
    codes: list[Code] = []
    places: list[int] = []  # where each kernel begins
    image = b""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels"
        for cubin in cubins:
            file.write_bytes(cubin)
            (code,) = _resources(_run(tool, "-res-usage", file))
            code.arch = arch
            codes.append(code)
            places.append(len(image))
            image += _section(cubin, f".text.{code.name}")
            code.name = _demangled(code.name)
        file.write_bytes(image)
        # "a": with the instructions that are for one architecture alone.
        options = ("-ndf", "-hex", "-b", f"SM{arch}a" if arch >= 90 else f"SM{arch}")
        listing = _run(str(Path(tool).with_name("nvdisasm")), *options, file)
    found = (_INSTRUCTION.match(line) for line in listing.splitlines())
    for match in filter(None, found):
        address = int(match[1], 16)
        codes[bisect_right(places, address) - 1].instructions.append(Instruction(address, match[2], match[3]))
    return codes


def _section(elf: bytes, name: str) -> bytes:
    """The content of a section of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    count, names = struct.unpack_from("<HH", elf, 0x3C)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + 64 * i) for i in range(count)]
    for place, *_, offset, size in headers:
        begin = headers[names][4] + place
        if elf[begin : elf.index(b"\0", begin)] == name.encode():
            return elf[offset : offset + size]
    raise RuntimeError(f"the cubin has no section {name}")


def _resources(text: str) -> Iterator[Code]:
    arch, name = 0, ""
    for line in text.splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            arch = int(match[1])
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif match := _RESOURCES.search(line):
            yield Code(name, arch, **{key: int(value) for key, value in match.groupdict().items()})


def _run(tool: str, *arguments: str | Path) -> str:
    done = subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool} {' '.join(map(str, arguments))}: {done.stderr.strip()}")
    return done.stdout


def _demangled(name: str) -> str:
    tool = shutil.which("c++filt")
    return (
        name
        if tool is None
        else subprocess.run([tool, name], capture_output=True, text=True, check=True).stdout.strip()
    )
