"""What the measurements ran on: processor, its flags, versions, and its ceilings."""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench_cpu.peers import versions

_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def describe() -> dict[str, Any]:
    """Processor, cores, memory, system, versions."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = set(fields.get("flags", "").split())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": fields.get("model name", platform.processor()),
        "family": f"{fields.get('cpu family')}/{fields.get('model')}/{fields.get('stepping')}",
        "cores": os.cpu_count(),
        "memory_gb": round(pages / 1e9, 1),
        "flags": [name for name in _FLAGS if name in flags],
        "system": platform.release(),
        "python": platform.python_version(),
        "versions": versions(),
    }


def ceilings(library: Path, isa: str, threads: list[int]) -> list[dict[str, Any]]:
    """Dot products of ``isa`` out of registers (median of five), a read of 1 GB (best of five).

    Empty where the kernel library was not built, or not for this instruction set.
    """
    if not library.is_file():
        return []
    import numpy as np

    native = ctypes.CDLL(str(library))
    native.mqc_probe_dot.restype = ctypes.c_double
    native.mqc_probe_read.restype = ctypes.c_uint64
    if native.mqc_set_isa(isa.encode()) < 0:
        return []
    memory = np.ones(1 << 30, np.uint8)
    address = memory.ctypes.data_as(ctypes.c_void_p)
    rows: list[dict[str, Any]] = []
    for count in threads:
        with ThreadPoolExecutor(count) as pool:

            def dot(_: int) -> float:
                return float(native.mqc_probe_dot(ctypes.c_int64(20_000_000)))

            dots = [sum(pool.map(dot, range(count))) for _ in range(5)]
        reads = []
        for _ in range(5):
            start = time.perf_counter()
            native.mqc_probe_read(address, ctypes.c_int64(memory.size), count)
            reads.append(memory.size / (time.perf_counter() - start))
        rows.append(
            {
                "threads": count,
                "isa": isa,
                "gops": statistics.median(dots) / 1e9,
                "read_gb_per_s": max(reads) / 1e9,
            }
        )
    return rows
