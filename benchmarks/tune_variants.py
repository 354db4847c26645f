"""What `tune.py` can try: constants of the kernels that follow from measuring, not from counting."""

from __future__ import annotations

from dataclasses import dataclass

FORWARD, BACKWARD, BOTH = "csrc/cuda/gate_forward.cu", "csrc/cuda/gate_backward.cu", "csrc/cuda/gate.cuh"
CHUNKS, SIMD, MEMORY = "csrc/cpu/gate.cpp", "csrc/cpu/simd.h", "csrc/cpu/common.h"
TILES = "sparta_kernels/backends/triton/launch.py"


@dataclass(frozen=True)
class Variant:
    """Other sources: in each `file`, `old`, found once, becomes `new`."""

    name: str
    device: str
    backend: str
    edits: tuple[tuple[str, str, str], ...]

    @property
    def compiled(self) -> bool:
        """Whether the module has to be built for it."""
        return any(file.startswith("csrc/") for file, _, _ in self.edits)


def _cpu(name: str, *edits: tuple[str, str, str]) -> Variant:
    return Variant(name, "cpu", "native", edits)


def _cuda(name: str, *edits: tuple[str, str, str]) -> Variant:
    return Variant(name, "cuda", "native", edits)


def _triton(name: str, *edits: tuple[str, str, str]) -> Variant:
    return Variant(name, "cuda", "triton", edits)


def _prefetch(distance: str) -> tuple[tuple[str, str, str], ...]:
    call = "__builtin_prefetch(at + {} / sizeof(T), {}, 3);"
    return tuple((SIMD, call.format("4096", write), call.format(distance, write)) for write in (0, 1))


VARIANTS = {
    variant.name: variant
    for variant in (
        _cpu("prefetch-1k", *_prefetch("1024")),
        _cpu("prefetch-2k", *_prefetch("2048")),
        _cpu("prefetch-8k", *_prefetch("8192")),
        _cpu("chunks-half", (CHUNKS, "65536 / max(1, s.channels)", "32768 / max(1, s.channels)")),
        _cpu("chunks-twice", (CHUNKS, "65536 / max(1, s.channels)", "131072 / max(1, s.channels)")),
        _cpu("stream-sooner", (MEMORY, "bytes >= last_level_cache()", "bytes >= last_level_cache() / 8")),
        _cpu("stream-later", (MEMORY, "bytes >= last_level_cache()", "bytes >= last_level_cache() * 8")),
        _cuda("ring-2", (BOTH, "(sizeof(T) == 8 ? 2 : 4)", "2")),
        _cuda("ring-3", (BOTH, "(sizeof(T) == 8 ? 2 : 4)", "(sizeof(T) == 8 ? 2 : 3)")),
        _cuda(
            "forward-ring-8",
            (FORWARD, "constexpr int ring = kRing<T, vector>;", "constexpr int ring = 2 * kRing<T, vector>;"),
            (FORWARD, "int64_t{kRing<T, vector>} * tiles.row_step", "int64_t{2 * kRing<T, vector>} * tiles.row_step"),
        ),
        _cuda("forward-blocks-4", (FORWARD, "vector == 1 ? 3 : 5", "vector == 1 ? 3 : 4")),
        _cuda("forward-blocks-6", (FORWARD, "vector == 1 ? 3 : 5", "vector == 1 ? 3 : 6")),
        _cuda("forward-rows-1", (FORWARD, "tiles.cut_rows(2 * ring_rows)", "tiles.cut_rows(ring_rows)")),
        _cuda("forward-rows-4", (FORWARD, "tiles.cut_rows(2 * ring_rows)", "tiles.cut_rows(4 * ring_rows)")),
        _cuda("backward-blocks-3", (BACKWARD, "(vector == 1 ? 3 : 4)", "3")),
        _cuda("backward-blocks-5", (BACKWARD, "(vector == 1 ? 3 : 4)", "(vector == 1 ? 3 : 5)")),
        _cuda("backward-smaller", (BACKWARD, "most_elements = 1 << 17", "most_elements = 1 << 15")),
        _cuda("backward-more-blocks", (BACKWARD, "enough_blocks = 255", "enough_blocks = 1023")),
        _triton("triton-forward-half", (TILES, "tile = 4 * WARP * 64 // itemsize", "tile = 4 * WARP * 32 // itemsize")),
        _triton(
            "triton-forward-twice", (TILES, "tile = 4 * WARP * 64 // itemsize", "tile = 4 * WARP * 128 // itemsize")
        ),
        _triton(
            "triton-forward-8-warps",
            (TILES, "tile = 4 * WARP * 64 // itemsize", "tile = 8 * WARP * 64 // itemsize"),
            (TILES, "cols: int\n    warps: int = 4", "cols: int\n    warps: int = 8"),
        ),
        _triton("triton-backward-half", (TILES, "for size in (64, 32))", "for size in (32, 32))")),
        _triton(
            "triton-backward-8-warps",
            (TILES, "warps = 4 if samples * row_parts * col_parts >= 512 or", "warps = 4 if"),
        ),
        _triton("triton-backward-parts", (TILES, "wanted = 1 if samples >= 128 or", "wanted = 4 if samples >= 128 or")),
    )
}
