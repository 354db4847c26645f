"""Planted faults: each is a small mistake in a copy of the sources, and the tests must catch every one.

    python tests/mutants.py            all of them; make mutants does this
    python tests/mutants.py NAME ...   some
    python tests/mutants.py --list     what there is

The sources are copied to a temporary folder and built there, then one fault at a time is planted, what
depends on it is built again, and the tests named beside it run until one fails. Exits with 1 if a fault
survives, and with 2 if something else is wrong: a fault whose text is not found exactly once, sources that do
not build, tests that fail without any fault.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from planting import ROOT, Copy, Fault, stop

GATE, CONV, PGD = "tests/test_gate.py", "tests/test_dynamic_conv.py", "tests/test_pgd_ops.py"
RELU = "tests/test_relu.py"
OVERLAP = f"{RELU}::test_a_neighbour_is_not_overwritten"
TRAINING = "not processes and not little_more_memory and not compile and not gradcheck"  # what is quick there
BACKENDS, BAD, REFERENCE = "tests/test_backends.py", "tests/test_bad_input.py", "tests/test_reference.py"
OPCHECK = "tests/test_dispatch.py::test_opcheck_of_the_convolution"
ACTIVATION, PHILOX, KERNELS = "csrc/activation.h", "csrc/philox.h", "csrc/cpu/gate.cpp"
LIBRARY, LAYOUT, EXTENSION, OPS = (
    "sparta_kernels/ops/library.py",
    "sparta_kernels/backends/layout.py",
    "sparta_kernels/backends/extension.py",
    "sparta_kernels/ops",
)

EVALUATION, ATTACK = "sparta_kernels/evaluation", "sparta_kernels/attack"
PREPARE, SAME_FUNCTION = "tests/test_prepare.py", "tests/test_prepare_function.py"
READ = f"{PREPARE}::test_a_convolution_that_others_read_keeps_its_batchnorm"
REFRESHED = f"{PREPARE}::test_refresh_takes_over_what_was_learnt"
STALE, CLAIMS = f"{PREPARE}::test_an_attack_on_a_stale_view_warns", "tests/test_claims.py"
RESTARTS, ENGINES = "tests/test_restarts.py", "tests/test_engines.py"
LOOP, STEPS, SHARED = "sparta_kernels/training", "tests/test_training_features.py", "tests/test_training_ddp.py"
RESUMED = "tests/test_training_resume.py", "not killed"
KEPT, EVALUATED = "tests/test_outcomes.py", "tests/test_evaluation.py"
ORDERS, MEMORY = "tests/test_emulated_cuda.py", "tests/test_memory.py"
CUDA, TRITON = "csrc/cuda", "sparta_kernels/backends/triton"
ATTENTION, CALLS = "tests/test_attention.py", "tests/test_attention_calls.py"
WHOLE, FROZEN = "tests/test_whole_sparta.py", "tests/test_frozen_sparta.py"
TWO = "tests/test_gate_of_sum.py"
FUSED, PLANS = "tests/test_fused_activations.py", "tests/test_triton.py"
FINITE = f"{ATTENTION}::test_what_is_not_finite_stays_in_its_pixel_and_its_image"
SUMS = f"{CALLS}::test_of_a_sum_written_over_x"
EMULATED, INTERPRETED = "emulated", "triton"  # `only` the tests on the CUDA kernels, and on Triton's

FAULTS = [
    # Python, which needs no build.
    Fault("wanted-order", LIBRARY, "ctx.needs_input_grad[:count])", "ctx.needs_input_grad[:count])[::-1]", GATE),
    Fault(
        "second-order-gy",
        LIBRARY,
        "if need and tensor is not None",
        "if need and i and tensor is not None",
        GATE,
    ),
    Fault("row-stride", LAYOUT, "(sample_stride, channel_stride) if", "(sample_stride, height * width) if", GATE),
    Fault(
        "dtype-number",
        EXTENSION,
        "torch.bfloat16: 2, torch.float16: 3",
        "torch.bfloat16: 3, torch.float16: 2",
        GATE,
    ),
    Fault("nested-memory", "sparta_kernels/memory.py", "if _entered == 0:", "if True:", MEMORY),
    Fault("gapless", LAYOUT, "if tensor.stride() == model.stride():", "if True:", PGD),
    Fault("untargeted", f"{OPS}/pgd.py", "-step_size if targeted", "step_size if targeted", PGD),
    Fault("version-counter", f"{OPS}/pgd.py", "    increment_version(adv)  # so", "    # so", PGD),
    Fault("unchecked-shape", f"{OPS}/checks.py", "if tuple(value.shape) != shape:", "if False:", BAD),
    Fault(
        "sticky-backend",
        "sparta_kernels/backends/__init__.py",
        "_requested = self._previous",
        "pass",
        BACKENDS,
    ),
    Fault("fake-shape", f"{OPS}/conv.py", "if want else spatial.new_empty(0)", "if True else spatial", OPCHECK),
    # The specification itself: its own tests compare it with loops, NumPy and autograd.
    Fault(
        "reference-slope",
        "sparta_kernels/reference/gating.py",
        "relu(x_) * phi * (1 - phi)",
        "relu(x_) * phi",
        REFERENCE,
    ),
    Fault(
        "reference-word",
        "sparta_kernels/reference/philox.py",
        "quad = torch.arange(-",
        "quad = 1 + torch.arange(-",
        f"{REFERENCE}::test_uniform_is_keyed_by_seed_index_element_purpose_and_restart",
    ),
    # The attack's kernels.
    # With -O3, since the copy is built with -O1, where the compiler fuses nothing.
    Fault("fused-multiply-add", "CMakeLists.txt", "-ffp-contract=off", '"-ffp-contract=fast;-O3"', PGD),
    Fault(
        "pgd-tail",
        "csrc/cpu/pgd.cpp",
        "ceil_div(args.elements, Lanes::lanes)",
        "args.elements / Lanes::lanes",
        PGD,
    ),
    Fault("start-order", "csrc/cpu/pgd.cpp", "element % 4])", "3 - element % 4])", PGD),
    # relu(a + b).
    Fault("relu-word", "csrc/cpu/relu.cpp", "passing(sum) << place;", "passing(sum) << (place & 31);", RELU),
    Fault("relu-tail", "csrc/cpu/relu.cpp", "bits, ceil_div(count, 8));", "bits, count / 8);", RELU),
    Fault(
        "relu-second-gradient",
        f"{OPS}/relu.py",
        "found = _raw_backward(grad, grad2,",
        "found = _raw_backward(grad, None,",
        RELU,
    ),
    *(
        Fault(f"training-{name}", "sparta_kernels/nn/recomputed.py", old, new, f"tests/{file}.py", TRAINING)
        for file, name, old, new in (
            ("test_recomputed", "batches", "norm.num_batches_tracked.add_(1)", "norm.num_batches_tracked.add_(2)"),
            ("test_recomputed", "pixels", "gh1 = (found / pixels).expand", "gh1 = found.expand"),
            ("test_recomputed", "spatial", "gh3.addcmul_(gspatial, self.w.w4)", "gh3"),
            ("test_recomputed", "shift", "beta - mean * scale", "beta + mean * scale"),
            ("test_recomputed", "hooks", "if has_hooks(layer) or ", "if "),
            ("test_recomputed_costs", "kept", "z if keep else None", "z"),
            ("test_recomputed", "bits", "_relu_backward(grad, None, bits,", "_relu_backward(grad, None, bits | 1,"),
        )
    ),
    *(
        Fault(f"attention-{name}", f"csrc/cpu/{file}", old, new, tests)
        for tests, file, name, old, new in (
            (
                ATTENTION,
                "attention_tiles.h",
                "row",
                "row = sample * s.pixels + first_pixel;",
                "row = sample * s.pixels;",
            ),
            (
                ATTENTION,
                "attention_tiles.h",
                "gather",
                "load_partial(x + c * stride + p,",
                "load_partial(x + p * stride + c,",
            ),
            (ATTENTION, "attention_tiles.h", "scatter", "load_partial(to, count) + value, count", "value, count"),
            (ATTENTION, "attention.cpp", "bits", "passing(part[i]) << i * Lanes::lanes;", "passing(part[i]) << i;"),
            (ATTENTION, "attention.cpp", "selects", "masked(value, bits >> i * Lanes", "masked(value, bits * Lanes"),
            (FINITE, "attention.cpp", "padding", "if (real != kWhole) h = h.where(real);", ""),
            (ATTENTION, "attention.cpp", "parts", "part < tiles.per_sample; ++part", "part < 1; ++part"),
            (ATTENTION, "attention.cpp", "pixels", "return tiles.per_sample > 1 ? Acc{1} :", "return"),
            (ATTENTION, "attention.cpp", "samples", "args.mean6) + (first + n) * hidden", "args.mean6) + n * hidden"),
            (
                ATTENTION,
                "attention.cpp",
                "conv6",
                "if (args.shape.dynamic) value = value +",
                "if (false) value = value +",
            ),
            (ATTENTION, "attention.cpp", "learned", "kernel[n] = w7[hidden];", "kernel[n] = 0;"),
            (SUMS, "attention_tiles.h", "sum", "load_partial(x + k, count) + load_partial(skip", "load_partial(skip"),
            (CALLS, "products.cpp", "error", "if (error_) std::", "if (0) std::"),
        )
    ),
    *(
        Fault(f"attention-{name}", f"sparta_kernels/{file}", old, new, tests)
        for tests, file, name, old, new in (
            (ATTENTION, "ops/attention_gradients.py", "g6", "g3 += g6 @ w6", "pass"),
            (ATTENTION, "ops/attention_gradients.py", "w6", '"npi,npj->ij", g6, h3', '"npj,npi->ij", g6, h3'),
            (CALLS, "ops/attention_gradients.py", "few", "in range(0, samples, step)", "in range(0, step, step)"),
            (CALLS, "ops/library.py", "asked", "need and _will_run(node)", "need"),
            (CALLS, "ops/library.py", "behind", "iter(ctx.next_functions)", "iter(ctx.next_functions[1:] * 2)"),
            (SUMS, "ops/attention.py", "skip", "gx if needs_skip else None", "None"),
            (CALLS, "ops/attention_kernels.py", "version", "increment_version(x)  # so", "pass  # so"),
            (CALLS, "ops/attention.py", "twice", "backward_of_sum(gy, gy2,", "backward_of_sum(gy, gy,"),
            (
                ATTENTION,
                "backends/native_attention.py",
                "padded",
                "[i * padded : i * padded + part.numel()]",
                "[: part.numel()]",
            ),
            (WHOLE, "nn/frozen.py", "gamma", "scale = scale * norm.weight", "pass"),
            (WHOLE, "nn/whole.py", "hooks", " or any(has_hooks(layer) for layer in sparta.children())", ""),
            (WHOLE, "nn/whole.py", "stride", "conv.stride == (1, 1) and ", ""),
            (FROZEN, "nn/frozen_sparta.py", "refresh", "mine.copy_(other)", "pass"),
            (FROZEN, "nn/frozen_sparta.py", "stale", "        self._whole = self._folded()\n", ""),
        )
    ),
    Fault("gate-of-sum", KERNELS, "if (two) gradient += load_partial(gy2_row, count);", "", TWO),
    Fault("relu-order", LAYOUT, "if tensor.stride() == stride:", "if tensor.numel() > 0:", RELU),
    Fault("relu-overlap", f"{OPS}/relu.py", "if ahead != 0 and", "if False and", OVERLAP),
    # An evaluation's outcomes: padding, what a resume takes over and refuses, fp32 predictions, the parity check.
    Fault(
        "outcome-padding", f"{EVALUATION}/batches.py", "values[: batch.real].cpu()", "values[-batch.real :].cpu()", KEPT
    ),
    Fault("fold-shift", "sparta_kernels/nn/frozen.py", "    shift = shift * scale\n", "", SAME_FUNCTION),
    Fault("fold-read", f"{ATTACK}/rewrite.py", "if len(node.users) == 1 else None", "if node.users else None", READ),
    Fault("fork-writes", f"{ATTACK}/rewrite.py", "and not self._own(read)):", "and False):", SAME_FUNCTION),
    Fault(
        "sum-after-a-write",
        f"{ATTACK}/rewrite.py",
        "        return node is last\n",
        "        return True\n",
        f"{SAME_FUNCTION}::test_a_sum_is_not_made_after_its_parts_are_overwritten",
    ),
    Fault(
        "settings-restored",
        f"{ATTACK}/arithmetic.py",
        "                _restore(_before)",
        "                pass",
        "tests/test_arithmetic.py",
    ),
    Fault(
        "default-device",
        "sparta_kernels/backends/native_attention.py",
        "dtype=dtype, device=weights.w4.device)",
        "dtype=dtype)",
        "tests/test_attention_calls.py",
        "default_device",
    ),
    Fault(
        "stale-unseen", f"{ATTACK}/prepare.py", "return _versions(self.model) != self._versions", "return False", STALE
    ),
    Fault("refresh-constants", f"{ATTACK}/prepare.py", "        refresh_constants(self._constants)\n", "", REFRESHED),
    Fault(
        "restart-worst",
        f"{ATTACK}/trajectory.py",
        "torch.where(taken, other.losses,",
        "torch.where(~taken, other.losses,",
        RESTARTS,
    ),
    Fault(
        "graph-padding",
        f"{ATTACK}/engines.py",
        "captured[1].room < len(images)",
        "captured[1].room != len(images)",
        ENGINES,
    ),
    Fault("capture-failed", f"{ATTACK}/capture.py", "        _end_failed(here, stream, pool)\n", "", ENGINES),
    Fault(
        "exact-forgotten",
        f"{ATTACK}/trajectory.py",
        "if wanted and exact is not None:",
        "if wanted and False:",
        RESTARTS,
    ),
    Fault("outcome-index", f"{EVALUATION}/batches.py", "indices=self.indices[rows]", "indices=rows", KEPT),
    Fault("outcome-parity", f"{EVALUATION}/outcomes.py", "(self.RESULTS, self.PARITY):", "(self.RESULTS,):", KEPT),
    Fault("outcome-weights", f"{EVALUATION}/digest.py", "in model.state_dict().items()", "in ()", KEPT),
    Fault("outcome-engine", f"{EVALUATION}/store.py", "outcomes.settings |= late", "pass", KEPT),
    Fault("outcome-zeros", "sparta_kernels/processes.py", "np.dtype(np.float32): np.int32", "", KEPT),
    Fault(
        "clean-precision",
        f"{EVALUATION}/batches.py",
        "prepared.exact(self.images[rows]).arg",
        "prepared(self.images[rows]).arg",
        EVALUATED,
    ),
    Fault(
        "parity-precision",
        f"{EVALUATION}/batches.py",
        'attack.prepare(self.prepared.model, precision="fp32")',
        "self.prepared",
        EVALUATED,
    ),
    Fault("shared-claim", "sparta_kernels/claims.py", "fcntl.LOCK_EX |", "fcntl.LOCK_SH |", CLAIMS),
    Fault("parity-iterate", f"{EVALUATION}/result.py", "differences[max(self", "differences[min(self", EVALUATED),
    Fault("cuda-relu-lanes", f"{CUDA}/relu.cu", "packed, source + i)", "packed, source)", RELU, EMULATED),
    Fault(
        "cuda-relu-cut", f"{CUDA}/relu.cu", "unsigned{bits[at / 8]} >> i,", "unsigned{bits[at / 8]},", RELU, EMULATED
    ),
    Fault("triton-relu", f"{TRITON}/relu.py", "stops = value <= 0", "stops = value < 0", RELU, INTERPRETED),
    # Training.
    Fault("resume-step", f"{LOOP}/step.py", "range(position.step, self.batches)", "range(self.batches)", *RESUMED),
    Fault("resume-momentum", f"{LOOP}/run.py", "if name in previous.momentum:", "if False:", *RESUMED),
    Fault("resume-average", f"{LOOP}/run.py", "self.ema.n_averaged.fill_(1)", "pass", *RESUMED),
    Fault("half-an-update", f"{LOOP}/run.py", "        self._whole = None\n", "", *RESUMED),
    Fault(
        "interrupted-update",
        "sparta_kernels/interrupts.py",
        "self._signals.append((number, frame))",
        "self.handlers[number](number, frame)",
        *RESUMED,
    ),
    Fault("ruined-weights", f"{LOOP}/run.py", "        self.check_finite()\n", "", *RESUMED),
    Fault("tested-average", f"{LOOP}/loop.py", "Tester(run.tested,", "Tester(run.model,", STEPS, "is_tested"),
    Fault("trades-weight", f"{LOOP}/objective.py", "self._beta * divergence", "divergence", STEPS, "trades"),
    Fault("augment-epoch", f"{LOOP}/step.py", "epoch=number, crop", "epoch=1, crop", STEPS, "augmentation"),
    Fault("frozen-statistics", f"{LOOP}/step.py", "        keep_frozen_in_eval(self.run.model)\n", "", STEPS, "sparta"),
    Fault(
        "goal-of-a-graph",
        f"{ATTACK}/trajectory.py",
        "soft=self.targets is not None and not targeted",
        "soft=False",
        "tests/test_trades.py",
    ),
    Fault(
        "goal-of-a-caller", f"{ATTACK}/checks.py", "value.detach().clone()", "value.detach()", "tests/test_trades.py"
    ),
    Fault("trades-format", f"{LOOP}/step.py", "if adversarial is not None:", "if False:", STEPS, "images"),
    Fault("share-of-a-batch", f"{LOOP}/step.py", "loss if share == 1 else loss * share", "loss", SHARED, "process"),
    Fault("statistics-apart", f"{LOOP}/step.py", "self._share_statistics()\n", "pass\n", SHARED, "resumed"),
    # The CUDA kernels.
    Fault("cuda-stride", f"{CUDA}/gate.cuh", "sample * m.sample_stride", "sample * m.row_stride", GATE, EMULATED),
    Fault(
        "cuda-cell",
        f"{CUDA}/gate_backward.cu",
        "cell / tiles.cells_wide * tiles.share,",
        "cell / tiles.cells_wide,",
        GATE,
        EMULATED,
    ),
    Fault(
        "cuda-barrier",
        f"{CUDA}/gate_backward.cu",
        "__syncthreads();  // before sums are written over the factors",
        "",
        ORDERS,
        "order",
    ),
    Fault("cuda-lanes", f"{CUDA}/gate_backward.cu", "sum_lanes(col_sum, near, kWarp);", "", GATE, EMULATED),
    Fault("cuda-kernel", f"{CUDA}/gate_backward.cu", "kernel * sum[0]", "sum[0]", GATE, EMULATED),
    Fault("cuda-scratch", f"{CUDA}/gate_backward.cu", "int64_t{tiles.col_blocks} * tiles.rows;", "0;", GATE, EMULATED),
    Fault("cuda-wait", f"{CUDA}/gate_forward.cu", "wait<ring - 1>()", "wait<ring>()", ORDERS, "order"),
    # Triton's.
    Fault(
        "triton-slope", f"{TRITON}/gate.py", "grad * relu(value) * complement", "grad * relu(value)", GATE, INTERPRETED
    ),
    Fault("triton-weight", f"{TRITON}/gate.py", "row = level * weight", "row = level", GATE, INTERPRETED),
    Fault("triton-final", f"{TRITON}/gate.py", "row_sum * weight if FINAL else", "", GATE, INTERPRETED),
    Fault("triton-parts", f"{TRITON}/gate.py", "piece < kernel_parts,", "piece < 1,", GATE, INTERPRETED),
    Fault("triton-border", f"{TRITON}/conv.py", "(w + right < width)", "(w + right <= width)", CONV, INTERPRETED),
    # Conv5.
    Fault("conv-not-flipped", "csrc/cpu/conv.cpp", "= kernel[taps - 1 - i]", "= kernel[i]", CONV),
    Fault("conv-border", "csrc/cpu/conv.cpp", "input.row(h + i) + j;", "input.row(h + j) + i;", CONV),
    # The generator.
    Fault("philox-constant", PHILOX, "0xD2511F53u", "0xD2511F57u", PGD),
    Fault("restart-ignored", PHILOX, "(purpose) | restart << 8", "(purpose)", PGD),
    Fault("high-index", PHILOX, "(unsigned_index >> 32)", "(unsigned_index >> 31)", PGD),
    # The arithmetic.
    Fault("gx-sign", ACTIVATION, "zero : gy * phi;", "zero : -gy * phi;", GATE),
    Fault("gx-at-zero", ACTIVATION, "x <= zero ? zero : gy * phi;", "x < zero ? zero : gy * phi;", GATE),
    Fault("slope-dropped", ACTIVATION, "relu(x) * phi.complement", "relu(x)", GATE),
    Fault(
        "ball-order",
        ACTIVATION,
        "clamp(Real(moved - clean), Real(-eps), eps)",
        "Real(clamp(moved, Real(clean - eps), Real(clean + eps)) - clean)",
        PGD,
    ),
    # swish-relu, smooth-relu and dyrelu.
    *(
        Fault(f"activation-{name}", file, old, new, FUSED)
        for name, file, old, new in (
            ("swish", ACTIVATION, "(1.0f + x * phi.complement)", "(1.0f - x * phi.complement)"),
            ("near", ACTIVATION, "? x * t * log.curve :", "? x * log.curve :"),
            ("term", ACTIVATION, "(inverse - log.curve)", "(inverse + log.curve)"),
            ("far", ACTIVATION, "? t * inverse : 1.0f - inverse;", "? t * inverse : 1.0f + inverse;"),
            ("beta", ACTIVATION, "if (!(beta < smallest)) inverse", "if (true) inverse"),
            ("tie", ACTIVATION, "(other <= value) |", "(other < value) |"),
            ("nan", ACTIVATION, "(other <= value) | (value != value)", "(other <= value)"),
            ("lines", "csrc/cpu/dyrelu.cpp", "sums.slope[k] += own ? product", "sums.slope[k] += own ? gy"),
            ("missing", "csrc/cpu/dyrelu.cpp", "k < lines ? k : 0;", "k < lines ? k : lines;"),
            ("chunks", "csrc/cpu/dyrelu.cpp", "chunk = 1; chunk < chunks.count", "chunk = 1; chunk < 1"),
            ("start", "csrc/cpu/dyrelu.cpp", "(s.planar ? 1 : m.row_stride)", "1"),
            ("sums", "csrc/cpu/pointwise.cpp", "sum += sums[chunk];", "sum = sums[chunk];"),
            ("tail", "csrc/cpu/elements.h", "min(Lanes::lanes, count - k);", "Lanes::lanes;"),
            ("slice", LIBRARY, "value.select(dim, i)", "value.select(dim, 0)"),
            (
                "order",
                "sparta_kernels/backends/native_activations.py",
                "in_order_of(grad, gx), in_order_of(x, gx)\n    gb",
                "grad, x\n    gb",
            ),
            (
                "specification",
                "sparta_kernels/reference/activations.py",
                "torch.log1p(t) - slope)",
                "torch.log1p(t) + slope)",
            ),
        )
    ),
    *(
        Fault(f"{kernels}-{name}", f"{folder}/{file}", old, new, tests, f"{kernels} and {only}")
        for kernels, folder, tests, file, only, name, old, new in (
            (
                "emulated",
                CUDA,
                ORDERS,
                "pointwise.cu",
                "stretches",
                "stretch",
                "int64_t{gridDim.x} *",
                "int64_t{2} * gridDim.x *",
            ),
            ("emulated", CUDA, FUSED, "pointwise.cu", "many_chunks", "sum", "i < count; i +=", "i < 1; i +="),
            (
                "emulated",
                CUDA,
                FUSED,
                "dyrelu.cu",
                "every_output",
                "lanes",
                "(sums, 1, cut.lanes)",
                "(sums, 2, cut.lanes)",
            ),
            (
                "emulated",
                CUDA,
                FUSED,
                "dyrelu.cu",
                "many_chunks",
                "teams",
                "line < cut.teams; ++line",
                "line < 1; ++line",
            ),
            (
                "emulated",
                CUDA,
                FUSED,
                "dyrelu.cu",
                "many_chunks",
                "finish",
                "part < cut.parts; ++part",
                "part < 1; ++part",
            ),
            (
                "emulated",
                CUDA,
                FUSED,
                "dyrelu.cu",
                "many_chunks",
                "pixel",
                "cut.part_pixels + line;",
                "cut.teams + line;",
            ),
            ("triton", TRITON, PLANS, "pointwise.py", "stretches", "stretch", "stretch * BLOCK", "BLOCK"),
            ("triton", TRITON, FUSED, "pointwise.py", "limit_to", "curve", "(whole - curve)", "(whole + curve)"),
            ("triton", TRITON, FUSED, "dyrelu.py", "equals", "tie", "(other <= value) |", "(other < value) |"),
            (
                "triton",
                TRITON,
                FUSED,
                "dyrelu.py",
                "every_output",
                "own",
                "index == k, grad, 0.0",
                "index >= k, grad, 0.0",
            ),
            ("triton", TRITON, FUSED, "sums.py", "many_chunks", "sums", "(part < parts) &", "(part < 1) &"),
        )
    ),
    # The gate's kernels.
    Fault("gspatial-kernel", KERNELS, "gs[i] *= factors.kernel", "gs[i] *= 1", GATE),
    Fault("gkernel-missing", KERNELS, "grad_kernel += gs[i]", "grad_kernel += 0 * gs[i]", GATE),
    Fault("second-stage", KERNELS, "chunk = 1; chunk < chunks.count", "chunk = 1; chunk < 1", GATE),
    Fault("share-index", KERNELS, "row / s.share * s.cells_wide()", "row / s.share * s.width", GATE),
    Fault(
        "trimmed-heap", "csrc/cpu/memory.cpp", "mallopt(M_TRIM_THRESHOLD, -1)", "mallopt(M_TRIM_THRESHOLD, 1)", MEMORY
    ),
    Fault("memory-for-good", "csrc/cpu/memory.cpp", "mallopt(M_MMAP_MAX, kMmapMax)", "mallopt(M_MMAP_MAX, 0)", MEMORY),
    Fault("memory-not-returned", "csrc/cpu/memory.cpp", "  malloc_trim(0);", "", MEMORY),
    Fault("sample-stride", KERNELS, "sample * m.sample_stride", "sample * rows * cols", GATE),
    Fault("chunk-stride", KERNELS, "(planar ? 1 : m.row_stride)", "(planar ? 1 : cols)", GATE),
    Fault("tail-column", KERNELS, "planar ? pixels : s.channels;", "planar ? pixels : s.channels - 1;", GATE),
]


def check_texts(faults: list[Fault]) -> None:
    for fault in faults:
        count = (ROOT / fault.file).read_text().count(fault.old)
        if count != 1:
            stop(f"{fault.name}: {fault.old!r} stands {count} times in {fault.file}, and must once")


def parse(arguments: list[str] | None) -> list[Fault]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="plant these alone")
    parser.add_argument("--list", action="store_true", help="print the faults and end")
    given = parser.parse_args(arguments)
    known = {fault.name: fault for fault in FAULTS}
    if given.list:
        for fault in FAULTS:
            print(f"{fault.name:20} {fault.file}: {fault.old.strip()!r} -> {fault.new.strip()!r}")
        raise SystemExit(0)
    if unknown := [name for name in given.names if name not in known]:
        stop(f"no fault is called {', '.join(unknown)}; --list names them")
    return [known[name] for name in given.names] or FAULTS


def main(arguments: list[str] | None = None) -> int:
    faults = parse(arguments)
    check_texts(faults)
    started = time.monotonic()
    survivors = []
    with tempfile.TemporaryDirectory(prefix="sparta-mutants-") as folder:
        copy = Copy(Path(folder))
        for only in sorted({fault.only for fault in faults}):
            if failed := copy.first_failure(sorted({fault.tests for fault in faults if fault.only == only}), only):
                stop(f"{failed} fails without a fault")
        print(f"built and tested without a fault: {time.monotonic() - started:.0f} s", flush=True)
        for fault in faults:
            begun = time.monotonic()
            caught = copy.catches(fault)
            if caught is None:
                survivors.append(fault.name)
            took = time.monotonic() - begun
            print(f"{fault.name:20} {took:5.1f} s   {caught or 'SURVIVED ' + fault.tests}", flush=True)
    total = time.monotonic() - started
    print(f"{len(faults) - len(survivors)} of {len(faults)} faults caught in {total:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main())
