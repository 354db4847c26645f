"""What the benchmarks read out of compiled kernels."""

import math
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

RESOURCES = """
Fatbin elf code:
================
arch = sm_90
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function copy:
  REG:30 STACK:0 SHARED:2048 LOCAL:0 CONSTANT[0]:552 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function spilling:
  REG:255 STACK:16 SHARED:0 LOCAL:8 CONSTANT[0]:552 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
# An outer loop (0x10 to 0xb0) that reads a factor, around an inner one (0x30 to 0x90) that reads 32 bytes, and 2 more,
# and writes 16; then a store after all loops.
SASS = """
	code for sm_90
		Function : copy
        /*0000*/                   LDC R1, c[0x0][0x28] ;                        /* 0x00000a00ff017b82 */
                                                                                 /* 0x000fe20000000800 */
        /*0010*/                   LDG.E R11, desc[UR8][R2.64] ;                 /* 0x00000000000b7919 */
        /*0020*/                   IMAD.MOV.U32 R5, RZ, RZ, R11 ;                /* 0x000000ffff057224 */
        /*0030*/                   LDG.E.128.CONSTANT R4, desc[UR8][R2.64] ;     /* 0x000000ffff057224 */
        /*0040*/              @!P0 LDGSTS.E.BYPASS.128 [R8], desc[UR8][R2.64] ;  /* 0x000000ffff057224 */
        /*0050*/                   LDG.E.U16 R12, desc[UR8][R2.64] ;             /* 0x000000ffff057224 */
        /*0060*/                   FMUL R4, R4, R8 ;                             /* 0x000000ffff057224 */
        /*0070*/               @P1 STG.E.128 desc[UR8][R2.64], R4 ;              /* 0x000000ffff057224 */
        /*0080*/                   ISETP.GE.AND P2, PT, R5, R6, PT ;             /* 0x000000ffff057224 */
        /*0090*/              @!P2 BRA 0x30 ;                                    /* 0x000000ffff057224 */
        /*00a0*/               @P3 BRA P4, 0xc0 ;                                /* 0x000000ffff057224 */
        /*00b0*/                   BRA 0x10 ;                                    /* 0x000000ffff057224 */
        /*00c0*/                   STG.E.64 desc[UR8][R2.64], R4 ;               /* 0x000000ffff057224 */
        /*00d0*/                   EXIT ;                                        /* 0x000000ffff057224 */
		Function : spilling
        /*0000*/                   STL.128 [R1], R4 ;                            /* 0x00000a00ff017b82 */
        /*0010*/                   LDL R4, [R1] ;                                /* 0x00000a00ff017b82 */
        /*0020*/                   LDG.E.128 R4, desc[UR8][R2.64] ;              /* 0x00000a00ff017b82 */
        /*0030*/                   STG.E.128 desc[UR8][R2.64], R4 ;              /* 0x00000a00ff017b82 */
        /*0040*/                   BRA 0x40 ;                                    /* 0x00000a00ff017b82 */
"""


@pytest.fixture
def machine_code(modules):
    return modules["machine_code"]


@pytest.fixture
def tool(machine_code, tmp_path, monkeypatch) -> Path:
    """A cuobjdump that says the above of whatever file."""
    path = tmp_path / "cuobjdump"
    path.write_text(
        f"#!/bin/sh\nif [ $1 = -sass ]; then cat <<'END'\n{SASS}\nEND\nelse cat <<'END'\n{RESOURCES}\nEND\nfi\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(machine_code, "disassembler", lambda: str(path))
    return path


@pytest.mark.usefixtures("tool")
def test_resources_and_spills(machine_code):
    copy, spilling = machine_code.read(Path("any"))
    assert (copy.name, copy.arch, copy.registers, copy.stack, copy.shared, copy.local) == ("copy", 90, 30, 0, 2048, 0)
    assert (spilling.registers, spilling.stack, spilling.local, spilling.spills) == (255, 16, 8, 2)
    assert copy.spills == 0
    assert len(copy.instructions) == 14


@pytest.mark.usefixtures("tool")
def test_the_bytes_of_the_innermost_loop(machine_code):
    copy, spilling = machine_code.read(Path("any"))
    assert [hex(i.address) for i in (copy.main_loop[0], copy.main_loop[-1])] == ["0x30", "0x90"]
    traffic = copy.traffic(itemsize=2)
    assert traffic.elements == 8
    assert (traffic.loaded, traffic.stored, traffic.narrow) == (4.0, 2.0, 2 / 8)
    assert traffic.instructions == 7 / 8
    # A loop that stores nothing (a kernel ends in a branch to itself) is not the main one: then it is all of it.
    assert len(spilling.main_loop) == 5
    assert spilling.traffic(itemsize=4).loaded == 4.0
    assert math.isnan(machine_code.Code("", 90, 1, 0, 0, 0).traffic(4).loaded)


def test_without_a_disassembler(machine_code, monkeypatch):
    monkeypatch.setattr(machine_code, "disassembler", lambda: None)
    with pytest.raises(RuntimeError, match="cuobjdump was not found: install"):
        machine_code.read(Path("any"))
    with pytest.raises(RuntimeError, match="cuobjdump was not found: install"):
        machine_code.read_cubins([b""], 90)


def test_a_file_that_is_no_binary(machine_code, tmp_path):
    if machine_code.disassembler() is None:
        pytest.skip("no cuobjdump")
    (tmp_path / "x.cubin").write_text("none")
    with pytest.raises(RuntimeError, match="cuobjdump"):
        machine_code.read(tmp_path / "x.cubin")


def test_what_nvcc_makes_of_a_copy(machine_code, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None or machine_code.disassembler() is None:
        pytest.skip("no nvcc, or no cuobjdump")
    (tmp_path / "copy.cu").write_text("""
        __global__ void copy(const uint4* __restrict__ x, uint4* __restrict__ y, int n) {
        #pragma unroll 1
          for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = x[i];
        }""")
    for arch in (80, 90, 100):
        cubin = tmp_path / f"{arch}.cubin"
        subprocess.run([nvcc, f"-arch=sm_{arch}", "-cubin", "-o", cubin, tmp_path / "copy.cu"], check=True)
        (code,) = machine_code.read(cubin)
        assert code.arch == arch
        assert code.name.startswith("copy(")
        assert (code.spills, code.stack, code.local) == (0, 0, 0)
        traffic = code.traffic(itemsize=4)
        assert (traffic.elements, traffic.loaded, traffic.stored, traffic.narrow) == (4, 4.0, 4.0, 0)
        for alike in machine_code.read_cubins([cubin.read_bytes()] * 2, arch):
            assert [i.opcode for i in alike.instructions] == [i.opcode for i in code.instructions]
            assert (alike.name, alike.arch, alike.registers) == (code.name, arch, code.registers)
            assert alike.traffic(itemsize=4) == traffic
            assert len(alike.main_loop) == len(code.main_loop)
