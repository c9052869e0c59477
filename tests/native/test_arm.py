"""The kernels for 64-bit Arm, cross-built, run by qemu and compared with the portable ones of x86.

Their results on x86 are compared with the operators' definitions by the other tests here.
"""

from __future__ import annotations

import platform
import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import native_library as native
import numpy as np
import numpy.typing as npt
import pytest
import torch
from shared import locked

from mqc.numerics.packing import pack_int4

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "aarch64"
DRIVER = Path(__file__).with_name("run_cases.cpp")
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Case:
    """One call: see run_cases.cpp. Outputs are (type, shape)."""

    name: str
    integers: Sequence[int] = ()
    inputs: Sequence[Array | None] = ()
    outputs: Sequence[tuple[Any, tuple[int, ...]]] = ()


def encoded(case: Case) -> bytes:
    name = case.name.encode()
    sizes = (len(name), len(case.integers), len(case.inputs), len(case.outputs))
    parts = [struct.pack("<4q", *sizes), name, np.array(case.integers, "<i8").tobytes()]
    for array in case.inputs:
        data = b"" if array is None else np.ascontiguousarray(array).tobytes()
        parts.append(struct.pack("<q", -1 if array is None else len(data)) + data)
    for dtype, shape in case.outputs:
        parts.append(struct.pack("<q", np.dtype(dtype).itemsize * int(np.prod(shape))))
    return b"".join(parts)


def run(command: list[str], cases: Sequence[Case], folder: Path) -> list[list[Array]]:
    """The outputs of every case."""
    given, made = folder / "cases", folder / "results"
    given.write_bytes(b"".join(map(encoded, cases)))
    result = subprocess.run([*command, str(given), str(made)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    data, at, found = made.read_bytes(), 0, []
    for case in cases:
        assert struct.unpack_from("<q", data, at) == (0,), case.name
        at += 8
        found.append([])
        for dtype, shape in case.outputs:
            count = int(np.prod(shape))
            found[-1].append(np.frombuffer(data, dtype, count, at).reshape(shape))
            at += count * np.dtype(dtype).itemsize
    assert at == len(data)
    return found


@pytest.fixture(scope="module")
def arm() -> list[str]:
    """The command that runs the cross-built driver."""
    if platform.machine() != "x86_64":
        pytest.skip("the other side of the comparison is x86-64")
    qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    cmake, compiler = shutil.which("cmake"), shutil.which("aarch64-linux-gnu-g++")
    if qemu is None or cmake is None or compiler is None:
        pytest.skip(
            "needs cmake, a cross compiler and qemu: "
            "apt-get install cmake g++-aarch64-linux-gnu qemu-user"
        )
    configure = [cmake, "-S", str(ROOT), "-B", str(BUILD), "-DMQC_CUDA=OFF", "-Wno-dev"]
    configure.append(f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'tools' / 'aarch64-linux-gnu.cmake'}")
    # Intrinsics are the same at every level; this one takes a third of the time.
    configure.append("-DCMAKE_CXX_FLAGS_RELEASE=-O1")
    headers = ROOT / "build" / "native" / "onnxruntime-dev" / "usr" / "include"
    if headers.is_dir():
        configure.append(f"-DMQC_ORT_INCLUDE={headers}")
    build = [cmake, "--build", str(BUILD), "--parallel", "2", "--target", "mqc_run_cases"]
    BUILD.parent.mkdir(exist_ok=True)
    with locked(BUILD.with_suffix(".lock")):  # test processes share the folder
        for command in (configure, build):
            made = subprocess.run(command, capture_output=True, text=True)
            assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
            assert "warning:" not in made.stdout
    return [qemu, str(BUILD / "backends" / "onnx" / "native" / "mqc_run_cases")]


@pytest.fixture(scope="module")
def x86(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that runs the driver with the library in use."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if native.LIBRARY is None or compiler is None:
        pytest.skip("needs the operator library and a C++ compiler")
    made = tmp_path_factory.mktemp("x86") / "run_cases"
    include = ROOT / "backends" / "onnx" / "native" / "include"
    command = [compiler, "-std=c++17", "-O1", "-I", str(include), str(DRIVER), "-o", str(made)]
    library = native.LIBRARY.resolve()
    command += [str(library), f"-Wl,-rpath,{library.parent}", "-pthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [str(made)]


def both(arm: list[str], x86: list[str], cases: list[Case], folder: Path, isa: str) -> Any:
    """Outputs of all cases, by instruction set ``isa`` on Arm and by "portable" here."""
    left = run(arm, [Case(f"isa {isa}"), *cases], folder)[1:]
    return zip(cases, left, run(x86, [Case("isa portable"), *cases], folder)[1:], strict=True)


# ---- cases -------------------------------------------------------------------------------------


def floats(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def bits_of(value: float) -> int:
    return int(np.float32(value).view(np.int32))


def linear(
    rng: np.random.Generator,
    bits: int,
    m: int,
    shape: tuple[int, int, int],
    terms: bool,
    floating: bool,
) -> Case:
    n, k, groups = shape
    q = rng.integers(*((-8, 8) if bits == 4 else (-128, 128)), (n, k)).astype(np.int8)
    if k > 4000:  # the largest sums
        q[:] = -8 if bits == 4 else -128
    stored = pack_int4(torch.from_numpy(q)).numpy() if bits == 4 else q
    rank, unsigned, form = (2 if terms else 0), int(rng.integers(2)), int(rng.integers(3))
    common = [n, k, groups, bits, m, rank, 1 + m % 2]
    inputs: list[Array | None] = [stored, floats(rng, n, groups), None, None, None, None]
    if terms:
        inputs[2:] = [floats(rng, n), floats(rng, m, rank), floats(rng, n, rank), floats(rng, m, n)]
    out = [(np.float32, (m, n))]
    if floating:
        return Case("float_linear", common, [*inputs, floats(rng, m, k)], out)
    x = rng.integers(-128, 128, (m, k)).astype(np.int8)
    if k > 4000:
        x[:], x[0] = 127, -128
    xq = (x.astype(np.int16) + 128).astype(np.uint8) if unsigned else x
    rows = {1: rng.integers(0, 2, m).astype(bool), 2: np.array([m // 2])}.get(form)
    scale = floats(rng, 2 if form else 1)
    return Case("linear", [*common, unsigned, form, m], [*inputs, xq, rows, scale], out)


def linears(floating: bool) -> list[Case]:
    rng = np.random.default_rng(3)
    shapes = [(83, 416, 13), (16, 8, 1), (33, 77, 7), (17, 1176, 1), (1, 5, 1)]
    cases = [
        linear(rng, bits, m, shape, terms, floating)
        for bits in (4, 8)
        for m in (1, 2, 3, 5, 6, 7, 16, 17, 40, 128)
        for shape in shapes[: 2 if m > 40 else 5]
        for terms in (False, True)
    ]
    if not floating:
        cases += [
            linear(rng, bits, m, (5, 8960, 1), False, False) for bits in (4, 8) for m in (1, 7)
        ]
    return cases


def norm(rng: np.random.Generator, n: int) -> Case:
    rows = 3
    split = np.array([n - 1, 0])
    inputs = [np.array([0.05, 0.02], np.float32), np.array([1, 0, 1], bool), floats(rng, rows, n)]
    outputs = [(np.uint8, (rows, n)), (np.uint8, (rows, n)), (np.float32, (rows, 2))]
    return Case("norm", [rows, n, 2, bits_of(1e-5)], [*inputs, split], outputs)


def activation(rng: np.random.Generator, function: int, gated: bool, base: int, log2: int) -> Case:
    rows, block = 2, base << log2
    n = 2 * block if block > 1 else 37
    matrix = rng.choice(np.array([-1, 1], np.int8), (base, base)) if base > 1 else None
    x = floats(rng, rows, n * (1 + gated))
    inputs = [np.array([0.05], np.float32), None, x, np.array([0, n - 1]), matrix]
    outputs = [(np.uint8, (rows, n)), (np.float32, (rows, 2)), (np.float32, (rows, n))]
    return Case("activation", [rows, n, base, log2, function, gated, 2], inputs, outputs)


def lookup(rng: np.random.Generator) -> Case:
    rows, n, rank = 5, 43, 3
    weight = rng.integers(-127, 128, (10, n)).astype(np.int8)
    inputs = [rng.integers(0, 10, rows), weight, floats(rng, 10)]
    inputs += [floats(rng, rows, rank), floats(rng, n, rank)]
    return Case("lookup", [rows, n, rank], inputs, [(np.float32, (rows, n))] * 2)


def attention(
    rng: np.random.Generator, tokens: int, past: int, dim: int, rotary: int, small: bool = False
) -> Case:
    """With a cache where ``past`` is not negative; ``small``: of int8."""
    batch, heads, groups, value_dim = 2, 4, 2, 20
    cached = past >= 0
    keys = past + tokens if cached else tokens
    capacity = keys + 3
    mask = rng.integers(0, 2, (batch, tokens, keys)).astype(bool)
    mask[..., 0] = True
    angles = [floats(rng, batch, tokens, dim) if rotary else None for _ in range(2)]
    integers = [batch, tokens, heads, groups, dim, value_dim, max(past, 0), capacity, keys]
    integers += [dim, batch, batch, keys, rotary, bits_of(0.3)]
    inputs = [floats(rng, batch, tokens, heads, dim), floats(rng, batch, tokens, groups, dim)]
    inputs += [floats(rng, batch, tokens, groups, value_dim), *angles, mask]
    outputs: list[tuple[Any, tuple[int, ...]]] = [(np.float32, (batch, tokens, heads * value_dim))]
    if cached:
        shapes = [(batch, groups, capacity, width) for width in (dim, value_dim)]
        inputs += [floats(rng, *shape) for shape in shapes]
        outputs += [(np.float32, shape) for shape in shapes]
        if small:
            inputs[-2:] = [rng.integers(-127, 128, shape).astype(np.int8) for shape in shapes]
            inputs += [rng.uniform(0.001, 0.02, shapes[0][:3]).astype(np.float32) for _ in "kv"]
            outputs[1:] = [(np.int8, shape) for shape in shapes]
            outputs += [(np.float32, shapes[0][:3])] * 2
    return Case("attention", integers, inputs, outputs)


# ---- tests -------------------------------------------------------------------------------------


def test_instruction_sets_are_found(arm: list[str], tmp_path: Path) -> None:
    """By what the processor says of itself; the layers use NEON."""
    names = Case("names", outputs=[("S16", (1,))] * 2)
    for cpu, wanted in (("max", b"i8mm"), ("neoverse-n1", b"dotprod"), ("cortex-a53", b"portable")):
        emulator, driver = arm
        found = run([emulator, "-cpu", cpu, driver], [names], tmp_path)[0]
        assert [str(value[0], "ascii") for value in found] == [wanted.decode(), "neon"], cpu


@pytest.mark.parametrize("isa", ["portable", "dotprod", "i8mm"])
def test_linears(arm: list[str], x86: list[str], isa: str, tmp_path: Path) -> None:
    """Bit for bit."""
    for case, left, right in both(arm, x86, linears(floating=False), tmp_path, isa):
        assert np.array_equal(left[0], right[0]), case.integers


def test_float_linears(arm: list[str], x86: list[str], tmp_path: Path) -> None:
    for case, left, right in both(arm, x86, linears(floating=True), tmp_path, "portable"):
        scale = max(1.0, float(np.abs(right[0]).max()))
        assert np.abs(left[0] - right[0]).max() <= 1e-5 * scale, case.integers


def test_layers(arm: list[str], x86: list[str], tmp_path: Path) -> None:
    """Norms, quantization, Hadamard transforms and look-ups bit for bit; what has fused
    multiply-add on Arm within rounding, which at times is a step of an integer."""
    rng = np.random.default_rng(4)
    cases = [norm(rng, n) for n in (3, 64, 257, 1000)]
    cases += [lookup(rng)]
    cases += [
        activation(rng, function, gated, base, log2)
        for function in range(6)
        for gated, base, log2 in [(False, 1, 0), (True, 12, 3), (False, 1, 7), (True, 28, 1)]
    ]
    for case, left, right in both(arm, x86, cases, tmp_path, "portable"):
        exact = range(len(left)) if case.name != "activation" else [2]
        for i in exact:
            assert np.array_equal(left[i], right[i]), (case.name, case.integers, i)
        if case.name == "activation":
            assert native.steps_apart(left[0], right[0]) <= 1
            assert (left[0] != right[0]).mean() <= 0.01
            assert native.relative(left[1], right[1]) <= 2e-6


def test_attention(arm: list[str], x86: list[str], tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    cases = [
        attention(rng, tokens, past, dim, rotary)
        for tokens, past in [(1, 0), (1, 70), (3, 9), (40, 5), (33, -1)]
        for dim, rotary in [(8, 0), (64, 1), (20, 2)]
    ]
    cases += [attention(rng, tokens, past, 64, 1, small=True) for tokens, past in [(1, 70), (9, 5)]]
    for case, left, right in both(arm, x86, cases, tmp_path, "portable"):
        for found, wanted in zip(left, right, strict=True):
            if found.dtype == np.int8:  # turned keys are within rounding: at times a step
                assert native.steps_apart(found, wanted) <= 1
                assert (found != wanted).mean() <= 0.01
            else:
                step = 1e-3 if len(left) == 5 else 2e-6
                assert native.relative(found, wanted) <= step, case.integers
