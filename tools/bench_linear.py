"""Time the native CPU linears against the processor's ceilings and other kernels, in one run.

    .venv/bin/python tools/bench_linear.py [--isa avx512vnni] [--rows 1,16,128] [--json FILE]
    .venv/bin/python tools/bench_linear.py --floats --group 128 --peers --rows 1,128

Kernels take turns (interleaved rounds), medians are reported. Weights are cold (copies in turn),
except beside other kernels (``--peers``), which have one copy: then all are warm. Ceilings are
measured in the same run: the dot product instruction out of registers, and a read of memory.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mqc.backends.onnx.kernels import Array, Call, FloatCall, Kernels, PackedLinear

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "build" / "native" / "backends" / "onnx" / "native" / "libmqc_cpu.so"
COLD_BYTES = 256 << 20
"""Weights of a memory-bound case together: copies of one linear, so that none is in a cache."""

_VOID, _INT64 = ctypes.c_void_p, ctypes.c_int64
PAUSE = 0.02
"""Seconds between the turns of different kernels: idle threads of onnxruntime spin for a while."""

Run = Callable[[int], None]


def huge(size: int) -> Array:
    """Memory in huge pages, as far as the system gives them."""
    memory = mmap.mmap(-1, size + (2 << 20))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    raw: Array = np.frombuffer(memory, np.uint8)
    start = -raw.ctypes.data % (2 << 20)
    return raw[start : start + size]


class Case:
    """One linear: packed weights in copies enough to be cold, activations for some rows."""

    def __init__(self, kernels: Kernels, n: int, k: int, options: argparse.Namespace) -> None:
        bits, group = options.bits, options.group
        rng = np.random.default_rng(0)
        self.kernels, self.n, self.k = kernels, n, k
        width = k if bits == 8 else (k + 1) // 2
        weight = rng.integers(-127 if bits == 8 else 0, 128, (n, width))
        stored = weight.astype(np.int8 if bits == 8 else np.uint8)
        scale = rng.random((n, k // group if group else 1)).astype(np.float32)
        first = kernels.pack(stored, scale, k)
        size = (first.weight.size + 63) // 64 * 64
        # Another kernel has one copy of its weights: then ours are as warm as its.
        self.copies = 1 if options.peers else max(1, COLD_BYTES // size)
        arena = huge(size * self.copies)
        self.linears = []
        for i in range(self.copies):
            target = arena[i * size : i * size + first.weight.size]
            target[:] = first.weight
            self.linears.append(PackedLinear(first.shape, target, first.w_scale))
        self.bytes = first.weight.size + first.w_scale.nbytes
        self.stored, self.scale = stored, scale

    def run(self, m: int, threads: int, floats: bool = False) -> Run:
        """A function of the round: y of m rows, on the next copy of the weights."""
        xq = np.random.default_rng(1).integers(1, 256, (m, self.k)).astype(np.uint8)
        y = huge(m * self.n * 4).view(np.float32)
        x_scale = np.ones(1, np.float32)
        calls: list[Call | FloatCall]
        if floats:
            x = xq.astype(np.float32) - np.float32(128)
            calls = [self.kernels.float_call(p, x, y) for p in self.linears]
        else:
            calls = [self.kernels.call(p, xq, y, x_scale=x_scale) for p in self.linears]
        workspace = huge(self.kernels.workspace_bytes(calls[0], threads))
        for call in calls:
            call.workspace = workspace.ctypes.data
        pool = self.kernels.threads(threads)
        keep = (xq, y, x_scale, workspace)

        def run(index: int, _: object = keep) -> None:
            self.kernels.run(calls[index % len(calls)], pool)

        return run


def matmul_nbits(case: Case, m: int, threads: int, group: int, level: int) -> Run | None:
    """onnxruntime's int4 product; None where not there.

    Level 4: int8 activations made on the fly; 1: float32.
    """
    try:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        return None
    if case.k % group or case.stored.dtype != np.uint8:
        return None
    blocks = case.k // group
    weight = case.stored.reshape(case.n, blocks, group // 2)
    scale = np.repeat(case.scale[:, :1], blocks, axis=1).reshape(-1)
    attributes = {"K": case.k, "N": case.n, "bits": 4, "block_size": group}
    attributes["accuracy_level"] = level
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **attributes
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [m, case.k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [m, case.n])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(scale, "s")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x = np.random.default_rng(1).standard_normal((m, case.k)).astype(np.float32)

    def run(_: int) -> None:
        session.run(None, {"x": x})

    return run


def interleaved(runs: dict[str, Run], seconds: float) -> dict[str, float]:
    """Median seconds of each; rounds go on until all took ``seconds``."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(0)
    start, index = time.perf_counter(), 1
    while time.perf_counter() - start < seconds * len(runs) or index < 6:
        for name, run in runs.items():
            before = time.perf_counter()
            run(index)
            times[name].append(time.perf_counter() - before)
            if len(runs) > 1:
                time.sleep(PAUSE)
        index += 1
    return {name: statistics.median(values) for name, values in times.items()}


def read_rate(kernels: Kernels, threads: int, memory: Array) -> float:
    """Bytes a second of reading all of ``memory``: the best of five."""
    best = 0.0
    for _ in range(5):
        before = time.perf_counter()
        kernels.library.mqc_probe_read(memory.ctypes.data_as(_VOID), _INT64(memory.size), threads)
        best = max(best, memory.size / (time.perf_counter() - before))
    return best


def measure(kernels: Kernels, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of the table."""
    memory = huge(512 << 20)
    memory[:] = 1
    rows = []
    for k, n in options.shapes:
        case = Case(kernels, n, k, options)
        for m in options.rows:
            for threads in options.threads:
                runs = {
                    "mqc floats" if options.floats else "mqc": case.run(m, threads, options.floats)
                }
                levels = {"MatMulNBits": 4} | ({"MatMulNBits f32": 1} if options.floats else {})
                for name, level in levels.items() if options.peers and options.bits == 4 else ():
                    peer = matmul_nbits(case, m, threads, options.group or 128, level)
                    if peer is not None:
                        runs[name] = peer
                ceiling = kernels.library.mqc_probe_dot(_INT64(2_000_000)) * threads
                rate = read_rate(kernels, threads, memory) if m <= 16 else 0.0
                times = interleaved(runs, options.seconds)
                for name, value in times.items():
                    row = {
                        "kernel": name,
                        "isa": kernels.isa,
                        "bits": options.bits,
                        "group": options.group,
                        "k": k,
                        "n": n,
                        "m": m,
                        "threads": threads,
                        "microseconds": value * 1e6,
                        "gops": 2e-9 * m * k * n / value,
                        "ceiling_gops": ceiling / 1e9,
                        "weight_gb_per_s": case.bytes / value / 1e9,
                        "read_gb_per_s": rate / 1e9,
                    }
                    rows.append(row)
                    show(row)
    return rows


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    part = row["gops"] / row["ceiling_gops"] if row["ceiling_gops"] else 0.0
    read = row["weight_gb_per_s"] / row["read_gb_per_s"] if row["read_gb_per_s"] else 0.0
    print(
        f"{row['kernel']:15} {row['isa']:11} k={row['k']} n={row['n']} m={row['m']:<5} "
        f"{row['threads']}T {row['microseconds']:10.1f} us {row['gops']:7.1f} GOP/s "
        f"{part:5.1%} of {row['ceiling_gops']:.0f}"
        + (f", {row['weight_gb_per_s']:.1f} GB/s {read:.0%} of a read" if read else ""),
        flush=True,
    )


def pairs(text: str) -> list[tuple[int, int]]:
    """ "1536x8960,8960x1536" as (K, N)."""
    out = []
    for part in text.split(","):
        k, n = part.split("x")
        out.append((int(k), int(n)))
    return out


def numbers(text: str) -> list[int]:
    """ "1,16" as a list."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, default=LIBRARY)
    parser.add_argument("--isa", help="instruction set; the best one by default")
    parser.add_argument("--shapes", type=pairs, default=[(1536, 8960)], help="KxN,KxN,...")
    parser.add_argument("--rows", type=numbers, default=[1, 16, 128, 512, 1024])
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--bits", type=int, default=4, choices=[4, 8])
    parser.add_argument("--group", type=int, default=0, help="group size; 0 = per channel")
    parser.add_argument("--floats", action="store_true", help="float activations: weight-only")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each row and kernel")
    parser.add_argument("--peers", action="store_true", help="measure other kernels too")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    kernels = Kernels(options.library)
    if options.isa:
        kernels.isa = options.isa
    rows = measure(kernels, options)
    if options.json:
        report = {"machine": platform.processor() or platform.machine(), "rows": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
