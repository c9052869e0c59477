"""The kernel library as nvcc compiles it, with an interpreter of PTX in place of CUDA's runtime.

nvcc compiles the launchers to host code and the kernels to PTX; tests/cuda/ptx is linked instead of
libcudart and runs what is launched, instruction by instruction.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mqc.cuda.build import BuildError, find_nvcc, nvcc_version
from mqc.cuda.library import Arguments, DType, KernelError, Library, Modality

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "cuda"
INTERPRETER = ROOT / "tests" / "cuda" / "ptx"
ARCHITECTURE = "90a"  # the PTX for sm_80 and sm_89 has the same text (a test compares)
KERNEL_FLAGS = [
    *"-std=c++17 -O3".split(),
    *"-Xcompiler -fPIC,-fvisibility=hidden,-Wno-unknown-pragmas,-ffp-contract=off".split(),
]
INTERPRETER_FLAGS = (
    "-std=c++20 -O1 -fPIC -fvisibility=hidden -Wall -Wextra -Werror -frounding-math".split()
)
TILE_BYTES = {1: 4096, 2: 8192, 3: 5120, 4: 4608, 5: 4352, 6: 9216, 7: 8448}  # by layout


def _compiler() -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++: the interpreter of PTX cannot be built")
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc: the kernels' PTX cannot be made")
    try:
        version = nvcc_version(nvcc)
    except (BuildError, OSError) as error:
        pytest.skip(f"nvcc does not run: {error}")
    if version < (13, 0):
        pytest.skip(f"nvcc is {version}: the interpreter knows the PTX of 13.0")
    return nvcc


def _digest(flags: list[str], sources: list[Path]) -> str:
    digest = hashlib.sha256(" ".join(flags).encode())
    for path in sources:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _call(command: list[Any], name: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{name}:\n{(result.stdout + result.stderr)[:4000]}"


def _kept(folder: Path, fill: Callable[[Path], None]) -> Path:
    """`folder`, filled by `fill(part)` where it does not exist yet; by one process at a time."""
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent) as part:
                fill(Path(part))
                shutil.copytree(part, f"{folder}.part", dirs_exist_ok=True)
            Path(f"{folder}.part").rename(folder)
    return folder


def emit_ptx(source: str, architecture: str, out: Path) -> Path:
    """The PTX of csrc/`source`.cu alone, for an architecture."""
    include = [f"-I{CUDA / 'include'}", f"-I{CUDA / 'csrc'}"]
    target = f"-arch=compute_{architecture}"
    file = CUDA / "csrc" / f"{source}.cu"
    _call([_compiler(), *KERNEL_FLAGS, target, *include, "-ptx", file, "-o", out], source)
    return out


def make_ptx() -> Path:
    """A folder with host object and PTX of every source, kept by the hash of the sources."""
    nvcc = _compiler()
    sources = sorted((CUDA / "csrc").glob("*.cu"))
    headers = [path for kind in ("*.h", "*.cuh") for path in sorted(CUDA.rglob(kind))]
    name = _digest([*KERNEL_FLAGS, str(nvcc_version(nvcc))], [*sources, *headers])

    def fill(part: Path) -> None:
        target = f"-gencode=arch=compute_{ARCHITECTURE},code=compute_{ARCHITECTURE}"
        include = [f"-I{CUDA / 'include'}", f"-I{CUDA / 'csrc'}"]

        def compile_one(source: Path) -> None:
            keep = part / f"{source.stem}.work"
            keep.mkdir()
            out = part / f"{source.stem}.o"
            kept = ["--keep", "--keep-dir", keep]
            _call(
                [nvcc, *KERNEL_FLAGS, target, *include, *kept, "-c", source, "-o", out], source.name
            )
            (keep / f"{source.stem}.ptx").rename(part / f"{source.stem}.ptx")
            shutil.rmtree(keep)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(compile_one, sources))

    return _kept(Path(tempfile.gettempdir()) / f"mqc-ptx-{os.getuid()}-{name}", fill)


def make_interpreter() -> Path:
    """The interpreter's objects, kept likewise."""
    nvcc = _compiler()
    sources = sorted(INTERPRETER.glob("*.cpp"))
    name = _digest(INTERPRETER_FLAGS, [*sources, *sorted(INTERPRETER.glob("*.h"))])

    def fill(part: Path) -> None:
        def compile_one(source: Path) -> None:
            out = part / f"{source.stem}.o"
            command: list[Any] = ["g++", *INTERPRETER_FLAGS]
            if source.stem == "runtime":  # nvcc knows where CUDA's headers are
                command = [nvcc, "-std=c++20", "-Xcompiler", ",".join(INTERPRETER_FLAGS[1:])]
            _call([*command, "-c", source, "-o", out], source.name)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(compile_one, sources))

    return _kept(Path(tempfile.gettempdir()) / f"mqc-ptx-run-{os.getuid()}-{name}", fill)


def make_library(out: Path) -> Path:
    """The library over the interpreter, at `out`."""
    ptx, interpreter = make_ptx(), make_interpreter()
    objects = [*sorted(ptx.glob("*.o")), *sorted(interpreter.glob("*.o"))]
    _call(["g++", "-shared", "-Wl,-Bsymbolic,-z,defs", *objects, "-o", out, "-lm"], "link")
    return out


def _sizes(name: str, a: Any) -> dict[str, int]:
    """Bytes behind each pointer of an argument struct, as mqc_cuda.h says."""
    item = {DType.BF16: 2, DType.F16: 2, DType.F32: 4, DType.I8: 1}
    rows = getattr(a, "rows", 0)

    def area(stride: int, width: int, size: int, count: int = rows) -> int:
        return ((count - 1) * stride + width) * size if count else 0

    if hasattr(a, "modality_kind"):
        modality = {Modality.NONE: 0, Modality.MASK: rows}.get(a.modality_kind, -1)
        if modality < 0:
            modality = rows // a.rows_per_sequence * 8
        scale = 4 if a.modality_kind == Modality.NONE else 8
    e = item[a.dtype]
    if name == "linear":
        tiles = -(-a.n // 64) * -(-a.k // 128)
        return {
            "x": rows * a.x_stride * item[a.x_dtype or DType.I8],
            "w": tiles * TILE_BYTES[a.layout],
            "w_scale": a.n * 4,
            "x_scale": scale,
            "modality": modality,
            "bias": a.n * 4,
            "x_split": area(a.x_split_stride, a.split_columns, e),
            "w_split": a.n * a.split_columns * 4,
            "residual": area(a.residual_stride, a.n, e),
            "y": area(a.y_stride, a.n, e),
            "workspace": a.workspace_bytes,
        }
    if name == "rms_norm_quantize":
        return {
            "x": area(a.x_stride, a.columns, e),
            "scale": scale,
            "modality": modality,
            "xq": area(a.xq_stride, a.columns, 1),
            "h": area(a.h_stride, a.columns, e),
        }
    if name == "activation_quantize":
        steps, blocks = -(-a.hadamard_base // 16), -(-a.hadamard_base // 8)
        return {
            "x": area(a.x_stride, a.columns * (2 if a.gated else 1), e),
            "scale": scale,
            "modality": modality,
            "hadamard": 4 * 32 * blocks * -(-2 * steps // 16),
            "split": 4 * a.split_columns,
            "xq": area(a.xq_stride, a.columns, 1),
            "y": area(a.y_stride, a.columns, e),
            "x_split": area(a.x_split_stride, a.split_columns, e),
        }
    if name == "rotate":
        angles = a.angle_rows * a.rotary_dim * item[a.table_dtype]
        width = a.heads * a.head_dim
        return {
            "x": area(a.x_stride, width, e),
            "cos": angles,
            "sin": angles,
            "y": area(a.y_stride, width, e),
        }
    if name == "embedding":
        table = a.vocabulary * a.columns * item[a.table_dtype]
        wide = a.vocabulary * 4 if a.table_dtype == DType.I8 else 0
        return {"ids": rows * 8, "table": table, "scale": wide, "y": rows * a.columns * e}
    if name == "top_k":
        results = {"values": rows * a.k * 4, "indices": rows * a.k * 8}
        x = area(a.x_stride, a.columns, e)
        return {"x": x, "workspace": a.workspace_bytes, **results}
    cache_rows = a.batch * a.kv_heads * a.capacity
    cache, int8 = cache_rows * a.head_dim * item[a.cache_dtype], a.cache_dtype == DType.I8
    scales = cache_rows * 4 if int8 else 0
    caches = {"key_cache": cache, "value_cache": cache, "key_scale": scales, "value_scale": scales}
    tokens = a.batch * a.tokens
    queries, keys = a.q_heads * a.head_dim, a.kv_heads * a.head_dim
    if name == "rotary_cache":
        angles = tokens * a.rotary_dim * item[a.table_dtype] if a.table_dtype else 0
        return caches | {
            "q": area(a.q_stride, queries, e, tokens),
            "k": area(a.k_stride, keys, e, tokens),
            "v": area(a.v_stride, keys, e, tokens),
            "cos": angles,
            "sin": angles,
            "past": 8,
        }
    assert name == "attention", name
    return caches | {
        "q": area(a.q_stride, queries, e, tokens),
        "mask": tokens * a.mask_stride,
        "past": 8,
        "out": area(a.out_stride, queries, e, tokens),
        "workspace": a.workspace_bytes,
    }


WRITTEN = {
    "linear": {"y", "workspace"},
    "rms_norm_quantize": {"xq", "h"},
    "activation_quantize": {"xq", "y", "x_split"},
    "rotary_cache": {"q", "key_cache", "value_cache", "key_scale", "value_scale"},
    "rotate": {"y"},
    "attention": {"out", "workspace"},
    "embedding": {"y"},
    "top_k": {"values", "indices", "workspace"},
}


class Interpreted(Library):
    """The library over the interpreter. Pointers are host pointers; a kernel may touch what
    mqc_cuda.h says of its arguments and nothing else."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.native.ptx_load.restype = ctypes.c_char_p

    def load(self, file: Path, *, alone: bool = False) -> None:
        """Read a file of PTX, `alone`: after forgetting all others.

        Raises:
            KernelError: where it holds anything that the interpreter does not know.
        """
        if alone:
            self.native.ptx_unload()
        error = self.native.ptx_load(os.fsencode(file))
        if error:
            raise KernelError(error.decode())

    def configure(self, seed: int, asynchrony: int = 2, arch: int = 90, sms: int = 4) -> None:
        """Choose a schedule (bulk copies: 0 early, 1 late, 2 random; 3 runs nothing), a device."""
        self.native.ptx_configure(ctypes.c_uint64(seed), asynchrony, arch, sms)

    def launch(self, name: str, arguments: Arguments, stream: int = 0) -> None:
        try:
            sizes = _sizes(name, arguments)
        except (KeyError, ZeroDivisionError):
            sizes = {}  # arguments that the library refuses
        rows = [
            (getattr(arguments, field), size, field in WRITTEN[name])
            for field, size in sizes.items()
            if getattr(arguments, field) and size > 0
        ]
        self.name_memory(rows)
        super().launch(name, arguments, stream)

    def name_memory(self, rows: list[tuple[int, int, bool]]) -> None:
        """What kernels may touch from now on: address, bytes, and whether it may be written."""
        flat = [value for row in rows for value in row]
        self.native.ptx_extents((ctypes.c_uint64 * len(flat))(*map(int, flat)), len(rows))

    def coverage(self, path: Path) -> list[tuple[str, int, int]]:
        """(kernel, line, times it was run) of every instruction, by way of a file."""
        self.native.ptx_coverage(os.fsencode(path))
        found = (line.split() for line in path.read_text().splitlines())
        return [(kernel, int(line), int(times)) for kernel, line, times in found]


def borrowed(name: str) -> Any:
    """The test module tests/cuda/`name`.py, to use its cases over another library."""
    path = ROOT / "tests" / "cuda" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"borrowed_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
