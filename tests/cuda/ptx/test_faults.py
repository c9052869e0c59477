"""Kernels with one line of their PTX changed: the interpreter or the reference must notice each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from ptx_interpreter import Interpreted, borrowed

from mqc.cuda.library import DType, KernelError, LinearKernel

LINEAR, CACHE = borrowed("test_linear"), borrowed("test_cache")
WRONG = "not close|not equal|Equalities|^$"  # the result differs from the reference


def wgmma(library: Any) -> None:
    for seed in range(3):
        library.configure(seed, sms=1)
        case = LINEAR.Case(140, 328, 300, bias=True)
        case.run(library, LinearKernel.WGMMA)


def wgmma_groups(library: Any) -> None:
    library.configure(1, sms=1)
    LINEAR.Case(140, 328, 256 + 64, group=64).run(library, LinearKernel.WGMMA)


def mma(library: Any) -> None:
    for seed in range(3):
        library.configure(seed, arch=80)
        LINEAR.Case(7, 72, 300, bias=True).run(library, LinearKernel.MMA_8, split_k=2)


def attention(library: Any) -> None:
    for seed in range(2):
        library.configure(seed)
        CACHE.run_attention(library, DType.BF16, splits=2, past=300, capacity=400)


# By name: file, part of the kernel's name, and the case that runs it.
KERNELS: dict[str, tuple[str, str, Any]] = {
    "wgmma": ("linear_wgmma", "WeightFormatILi4ELi0E", wgmma),
    "wgmma_groups": ("linear_wgmma", "WeightFormatILi4ELi64E", wgmma_groups),
    "mma": ("linear_mma_w4", "Li4ELi1ELi2ELi1ELi1ELi4E", mma),
    "attention": ("attention", "attention_kernelINS_4bf16ES1_Li64E", attention),
}

BOX = r"(tensor\.2d\S* \[%r\d+\], \[%rd\d+, )\{(%r\d+), (%r\d+)\}"
FOUR = r"\{(%r\d+), (%r\d+), (%r\d+), (%r\d+)\}"
# Kernel, pattern, which of its places (None: all), what it becomes, and what must be said.
CHANGES = [
    ("wgmma", r"wgmma\.fence[^;]*;", 0, "", "without wgmma.fence"),
    ("wgmma", r"wgmma\.fence[^;]*;", 1, "", "no wgmma.fence since a register of the operand"),
    ("wgmma_groups", r"wgmma\.fence[^;]*;", 1, "", "no wgmma.fence since a register of the sums"),
    ("wgmma", r"wgmma\.commit_group[^;]*;", 1, "", "of a wgmma in flight"),
    ("wgmma_groups", r"(wgmma\.wait_group\S*) 0", 1, r"\1 1", "a sum of a wgmma in flight is read"),
    ("wgmma", r"fence\.mbarrier_init[^;]*;", 0, "", "without fence.mbarrier_init"),
    ("wgmma", r"bar\.sync\s+0;", 0, "", "race|no mbarrier was initialised"),
    ("wgmma", r"bar\.sync\s+%r[^;]*;", 1, "", "race"),
    ("wgmma", r"bar\.warp\.sync[^;]*;", 0, "", "other lanes of the warp are not ordered before"),
    ("wgmma", r"mbarrier\.arrive\.shared[^;]*;", 0, "", "deadlock"),
    (
        "wgmma",
        r"(tensor\.2d\S* \[%r\d+\], \[%rd\d+, )\{(%r\d+), (%r\d+)\}",
        0,
        r"\1{\3, \2}",
        WRONG,
    ),
    ("wgmma", rf"(wgmma\.mma\S+ \{{[^}}]*\}}, ){FOUR}", 2, r"\1{\2, \4, \3, \5}", WRONG),
    (
        "wgmma",
        r"4611686293305360384",
        0,
        "4611686293305360400",
        "base offset|mean nothing|" + WRONG,
    ),
    ("wgmma", r"setmaxnreg\.dec\S* 40", 0, "setmaxnreg.dec.sync.aligned.u32 48", "deadlock"),
    ("mma", r"cp\.async\.wait_group 2", 0, "cp.async.wait_group 3", "asynchronous copy is writing"),
    ("mma", r"bar\.sync\s+0;", 0, "", "race"),
    ("mma", r"membar\.gl;", 0, "", "without a fence behind it"),
    ("mma", r"ld\.global\.cg\.s32", None, "ld.global.u32", "through the first-level cache"),
    ("mma", rf"(mma\.sync\S+ \{{[^}}]*\}}, ){FOUR}", 0, r"\1{\2, \4, \3, \5}", WRONG),
    ("mma", r"(ldmatrix\S+) \{(%r\d+), (%r\d+), ", 0, r"\1 {\3, \2, ", WRONG),
    ("attention", r"cp\.async\.wait_group 1", 0, "cp.async.wait_group 2", "copy is writing"),
    ("attention", r"\.x4\.trans", 0, ".x4", WRONG),
    ("attention", r"ld\.global\.cg\.f32", None, "ld.global.f32", "through the first-level cache"),
    ("attention", r"bar\.sync\s+0;", 1, "", "race"),
]


def kernel_alone(folder: Path, name: str) -> str:
    """The module of a kernel with nothing but that kernel."""
    file, part, _ = KERNELS[name]
    head, *kernels = re.split(r"(?m)^(?=\.visible)", (folder / f"{file}.ptx").read_text())
    (found,) = [kernel for kernel in kernels if part in kernel[:200]]
    return head + found


@pytest.mark.parametrize("name", list(KERNELS))
def test_unchanged(changed: Interpreted, ptx: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / "kernel.ptx"
    file.write_text(kernel_alone(ptx, name))
    changed.load(file, alone=True)
    KERNELS[name][2](changed)


@pytest.mark.parametrize(
    ("name", "pattern", "place", "instead", "says"),
    CHANGES,
    ids=[f"{name}-{re.sub(r'[^a-z0-9]+', '_', pattern)}-{at}" for name, pattern, at, *_ in CHANGES],
)
def test_changed(
    changed: Interpreted,
    ptx: Path,
    tmp_path: Path,
    name: str,
    pattern: str,
    place: int | None,
    instead: str,
    says: str,
) -> None:
    text = kernel_alone(ptx, name)
    places = list(re.finditer(pattern, text))
    for match in reversed(places if place is None else [places[place]]):
        text = text[: match.start()] + match.expand(instead) + text[match.end() :]
    file = tmp_path / "kernel.ptx"
    file.write_text(text)
    changed.load(file, alone=True)
    with pytest.raises((KernelError, AssertionError), match=says):
        KERNELS[name][2](changed)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("add.sat.s32 %r1, %r1, %r1;", "the opcode is unknown"),
        ("ld.volatile.global.u32 %r1, [%rd1];", "the opcode is unknown"),
        ("add.s32 %r1, %r1, %f1;", "operands do not fit"),
        ("mov.b32 %r1, %rd1;", "operands do not fit"),
        ("cp.async.wait_group %r1;", "operands do not fit"),
        ("@%p1 add.s32 %r1, %r1, %r1;", "a guard on something else"),
        ("mov.u32 %r9, 1;", "operands do not fit"),
        ("bra $L__nowhere;", "no label"),
        (".local .b8 stack[16];", "a directive is unknown"),
    ],
)
def test_unknown_forms_are_refused(
    changed: Interpreted, tmp_path: Path, line: str, says: str
) -> None:
    registers = ".reg .pred %p<2>; .reg .b32 %r<2>; .reg .f32 %f<2>; .reg .b64 %rd<2>;"
    head = ".version 9.0\n.target sm_90a\n.address_size 64\n"
    entry = ".visible .entry k(\n.param .align 8 .b8 k_param_0[8]\n)\n.maxntid 32, 1, 1\n"
    file = tmp_path / "unknown.ptx"
    file.write_text(f"{head}{entry}{{\n{registers}\n{line}\nret;\n}}\n")
    with pytest.raises(KernelError, match=says):
        changed.load(file, alone=True)


def test_memory_outside_of_operands(
    changed: Interpreted, ptx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that exists, and is not the kernel's."""
    file = tmp_path / "kernel.ptx"
    file.write_text(kernel_alone(ptx, "mma"))
    changed.load(file, alone=True)
    changed.configure(1, arch=80)
    case = LINEAR.Case(4, 64, 128)
    y = torch.zeros(8, 64, dtype=torch.bfloat16)
    arguments = case.arguments(y, kernel=LinearKernel.MMA_8, split_k=1)
    name_memory = changed.name_memory

    def less(rows: list[tuple[int, int, bool]]) -> None:
        name_memory([(at, size - 16 if written else size, written) for at, size, written in rows])

    def unwritten(rows: list[tuple[int, int, bool]]) -> None:
        name_memory([(at, size, False) for at, size, _ in rows])

    for change, says in ((less, "outside of all operands"), (unwritten, "that is only read")):
        monkeypatch.setattr(changed, "name_memory", change)
        with pytest.raises(KernelError, match=says):
            changed.launch("linear", arguments)
