"""Every inline assembly statement of the kernels beside NVIDIA's own: the same mnemonic, qualifiers
and operands, in the same order, bound to the same things."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
from asm_text import Instruction, Leaf, instructions
from cuda_vendor import Vendor

ROOT = Path(__file__).resolve().parents[3]
CUDA = ROOT / "cuda"
CUTLASS_FILES = [
    *(f"cute/arch/{name}.hpp" for name in "mma_sm80 mma_sm90_gmma copy_sm75 copy_sm80".split()),
    *(f"cute/arch/{name}.hpp" for name in "copy_sm90_tma copy_sm90_desc".split()),
    *(f"cutlass/arch/{name}.h" for name in "barrier reg_reconfig memory memory_sm80".split()),
]
TOOLKIT_FILES = ["cuda/__ptx/instructions/generated/*.h", "cuda_fp16.hpp", "cuda_bf16.hpp"]

# Instructions that NVIDIA's headers do not have, and what they were checked by.
WITHOUT_COUNTERPART = {
    "ld.shared.f32": "one register instead of the four of ld.shared.v4.u32, which has one",
}
# What an operand of ours is bound to -> names that NVIDIA's headers bind to its place.
SAME_THING = {
    # registers of matrix instructions; sums are read where they are written
    **{f"d{i}": {f"d{i}", f"c{i}"} for i in range(64)},
    **{name: {name} for name in ("a0", "a1", "a2", "a3", "b0", "b1")},
    "b": {"desc_b", "b"},  # a descriptor; the factor of a product
    # values in registers
    **{f"word{i}": {f"word{i}"} for i in range(4)},
    "wide": {"val"},
    "d": {"val"},
    **{name: {name} for name in "ac"},
    "value.bits": {"__HALF_TO_CUS(a)"},
    "half.bits": {"__HALF_TO_US(val)", "__BFLOAT16_TO_US(val)"},
    "value": {"a"},
    "done": {"waitComplete"},
    # addresses
    "global": {"ptr", "global_ptr", "gmem_ptr"},
    "shared": {"smem_int_ptr", "dstMem"},
    "address": {"smem_int_ptr", "ptr"},
    "barrier": {"smem_addr", "smem_int_mbar", "smem_bar"},
    "map": {"gmem_int_desc", "tensorMap"},
    # numbers
    "x": {"tensorCoords0"},
    "y": {"tensorCoords1"},
    "16": {"SizeInBytes"},
    "valid?16:0": {"src_in_bytes"},
    "bytes": {"transaction_bytes", "load_bytes", "src_in_bytes"},
    "arrivals": {"arrive_count"},
    "parity": {"phase"},
    "id": {"barrier_id"},
    "threads": {"num_threads"},
    "kPending": {"N"},
    "kRegisters": {"RegCount"},
    "0": {"0", "scale_D"},
    "1": {"1", "scale_D"},
}
# Functions of ours -> CUTLASS's for the same purpose, where no operand of an instruction tells it.
SAME_PURPOSE = {
    "barrier_init_fence": {"fence_barrier_init", "fence_view_async_shared"},
    "barrier_arrive": {"arrive"},
    "copy_async_commit": {"cp_async_fence"},
    "copy_async_wait": {"cp_async_wait"},
    "registers_release": {"warpgroup_reg_dealloc"},
    "registers_claim": {"warpgroup_reg_alloc"},
    "wgmma_fence": {"warpgroup_arrive"},
    "wgmma_commit": {"warpgroup_commit_batch"},
    "wgmma_wait": {"warpgroup_wait"},
}
PREDICATES = re.compile(r"p\d*|P\d?")  # local to a statement


def canonical(leaf: Leaf) -> str:
    """What an operand is bound to, without casts, spaces, and the ways to number things."""
    text = re.sub(r"\s+", "", leaf.bound)
    text = re.sub(r"^(__cvta_generic_to_global|__as_ptr_\w+|int32_t)\((.*)\)$", r"\2", text)
    text = re.sub(r"^__(?=[a-z])", "", text)
    text = re.sub(r"^__(?:BFLOAT162|HALF2)_TO_C?UI\((\w+)\)$", r"\1", text)
    if match := re.fullmatch(r"(?:data|data\[0\]|dst_u128|dst_u64)(?:\.|->)([xyzw])", text):
        return f"word{'xyzw'.index(match[1])}"
    if match := re.fullmatch(r"(?:v\.word|r|dst)\[?(\d)\]?", text):
        return f"word{match[1]}"
    if match := re.fullmatch(r"a\[\d\]\[(\d)\]", text):  # a step's fragment
        return f"a{match[1]}"
    if match := re.fullmatch(r"([abcd]|tensorCoords)\[?0*(\d+)\]?", text):
        return f"{match[1]}{match[2]}"
    return re.sub(r"^b\+2\*\(\d\)$", "b", text)  # a step's descriptor


def shape(form: str) -> str:
    """The form for comparing. CUTLASS writes .x4.m8n8 in ldmatrix, the manual has .m8n8.x4.
    A predicate's value may be a number or a register."""
    mnemonic, _, operands = form.partition(" ")
    if mnemonic.startswith("ldmatrix."):
        mnemonic = re.sub(r"\.(x4(?:\.trans)?)\.m8n8\.", r".m8n8.\1.", mnemonic)
    if mnemonic == "setp.ne.b32":
        operands = re.sub(r"^p,[rn],n$", "p,*,n", operands)
    return f"{mnemonic} {operands}"


def differences(ours: Instruction, theirs: Instruction) -> list[str]:
    """What is not the same in two instructions of one mnemonic."""
    if shape(ours.form) != shape(theirs.form):
        return [f"operands {theirs.form.partition(' ')[2]}"]
    found = []
    for mine, yours in zip(ours.leaves, theirs.leaves, strict=True):
        name, other = canonical(mine), canonical(yours)
        if mine.kind == "p" and yours.kind == "p":
            same = PREDICATES.fullmatch(name) and PREDICATES.fullmatch(other)
        else:
            same = other in SAME_THING.get(name, set())
        # The first product of a sum starts from a number instead of the sums.
        same = same or (ours.mnemonic.startswith("mma.") and name == "0" and other[0] == "c")
        if not same:
            found.append(f"{name} stands where NVIDIA has {other}")
        if yours.written > mine.written or (yours.read and yours.kind != "p" and not mine.read):
            found.append(f"{name} is not {'written' if yours.written else 'read'}")
    if theirs.function not in SAME_PURPOSE.get(ours.function, {theirs.function}):
        found.append(f"{ours.function} does what NVIDIA's {theirs.function} does")
    if theirs.volatile and not ours.volatile:
        found.append("not volatile")
    return found


@pytest.fixture(scope="module")
def ours(vendor: Vendor, tmp_path_factory: pytest.TempPathFactory) -> list[Instruction]:
    """Instructions of all headers of the kernels, macros expanded as for sm_90a."""
    empty = tmp_path_factory.mktemp("empty")  # CUDA's headers say nothing of interest here
    for name in ("cuda.h", "cuda_runtime.h"):
        (empty / name).touch()
    headers = sorted((CUDA / "include" / "mqc").glob("*.cuh"))
    define = ("__CUDACC__", "__CUDA_ARCH__=900", "__CUDA_ARCH_FEAT_SM90_ALL")
    command = [vendor.compiler, "-std=c++17", "-E", "-P", *(f"-D{name}" for name in define)]
    text = subprocess.run(
        [*command, f"-I{CUDA / 'include'}", f"-I{empty}", "-x", "c++", "-"],
        input="".join(f'#include "mqc/{path.name}"\n' for path in headers),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    # No statement hides from the preprocessor, nor in a source.
    statement = re.compile(r"\basm\b\s*(volatile)?\s*\(")
    written = sum(len(statement.findall(path.read_text())) for path in headers)
    assert len(statement.findall(text)) == written > 30
    for path in sorted((CUDA / "csrc").iterdir()):
        assert not statement.search(path.read_text()), path
    return instructions(text)


def expanded(text: str) -> str:
    """The text with the uses of its macro for functions of three pairs written out."""
    name = "__TERNARY_OP_HALF2_MACRO"
    macro = re.search(rf"#define {name}\(name\)(.*?)/\* while", text, re.DOTALL)
    if macro is None:
        return text
    body = macro[1].replace("\\\n", "\n")
    head, tail = text[: macro.start()], text[macro.end() :]

    def write(use: re.Match[str]) -> str:
        return body.replace("__CUDA_FP16_STRINGIFY(name)", f'"{use[1]}"')

    return head + re.sub(rf"{name}\(([\w.]+)\)", write, tail)


@pytest.fixture(scope="module")
def theirs(vendor: Vendor) -> dict[str, list[tuple[str, Instruction]]]:
    """(file, instruction) of NVIDIA's headers by mnemonic, with the qualifiers in order."""
    files = [vendor.cutlass / name for name in CUTLASS_FILES]
    files += [p for folder in vendor.cuda for name in TOOLKIT_FILES for p in folder.glob(name)]
    found = defaultdict(list)
    for path in files:
        for each in instructions(expanded(path.read_text(encoding="utf-8"))):
            found[shape(each.mnemonic)].append((path.name, each))
    return found


def test_every_instruction_is_as_nvidia_writes_it(
    ours: list[Instruction], theirs: dict[str, list[tuple[str, Instruction]]]
) -> None:
    alone, wrong = set(), []
    for each in ours:
        candidates = theirs.get(shape(each.mnemonic), [])
        if not candidates:
            alone.add(each.mnemonic)
            continue
        found = [(name, differences(each, other)) for name, other in candidates]
        if all(different for _, different in found):
            wrong.append((each.form, found))
    assert not wrong
    assert alone == set(WITHOUT_COUNTERPART)


def test_where_the_counterparts_are(
    ours: list[Instruction], theirs: dict[str, list[tuple[str, Instruction]]]
) -> None:
    """CUTLASS itself has all but six: those are in the toolkit alone."""
    toolkit = set()
    cutlass = {Path(name).name for name in CUTLASS_FILES}
    for each in ours:
        same = {
            name
            for name, other in theirs.get(shape(each.mnemonic), [])
            if not differences(each, other)
        }
        if same and not same & cutlass:
            toolkit.add(each.mnemonic)
    assert toolkit == {
        "cvt.f32.f16",
        "cvt.rn.f16.f32",
        "cvt.rn.bf16.f32",
        "fma.rn.f16x2",
        "fma.rn.bf16x2",
        # CUTLASS leaves out .tile, the default, and adds a cache hint.
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes",
    }


def test_steps_of_a_wgmma_statement(ours: list[Instruction]) -> None:
    """The n-th product takes the n-th fragment and descriptor; only the first of the 64-token ones
    starts from zero (a predicate made from 0, as CUTLASS's ScaleOut::Zero)."""
    statements = defaultdict(list)
    for each in ours:
        if each.mnemonic.startswith(("wgmma.mma_async", "setp.")):
            statements[each.statement].append(each)
    counts = []
    for parts in statements.values():
        value = {p.leaves[0].bound: p.leaves[1].bound for p in parts if p.mnemonic[:4] == "setp"}
        products = [p for p in parts if p.mnemonic[:5] == "wgmma"]
        adds = [value[p.leaves[-1].bound] for p in products]
        fragments = [tuple(leaf.bound for leaf in p.leaves[-6:-1]) for p in products]
        if "m64n128k32" in products[0].mnemonic:
            assert adds == ["1"] and fragments == [("a[0]", "a[1]", "a[2]", "a[3]", "b")]
        else:
            assert adds == ["0", *["1"] * (len(products) - 1)]
            assert fragments == [
                (*(f"a[{s}][{r}]" for r in range(4)), f"b + 2 * ({s})")
                for s in range(len(products))
            ]
        counts.append(len(products))
    assert sorted(counts) == [1, 1, 2, 4]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("[%0], [%1], %2, [%3]", "[%0], [%1], [%3], %2"),  # order of operands
        ("[%0], [%1], %2, [%3]", "[%1], [%0], %2, [%3]"),
        ("complete_tx::bytes [", "complete_tx [", ),  # a qualifier less
        ('"r"(bytes)', '"l"(bytes)'),  # another width
        ('"r"(barrier)', '"r"(bytes)'),  # another value
        ("volatile", ""),
    ],
)  # fmt: skip
def test_a_difference_is_found(
    theirs: dict[str, list[tuple[str, Instruction]]], right: str, wrong: str
) -> None:
    text = (
        'asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes '
        '[%0], [%1], %2, [%3];" ::"r"(shared), "l"(global), "r"(bytes), "r"(barrier) : "memory");'
    )

    def matches(source: str) -> bool:
        (each,) = instructions(source)
        found = [o for name, o in theirs.get(shape(each.mnemonic), []) if name.endswith(".hpp")]
        return any(not differences(each, other) for other in found)

    assert matches(text)
    assert right in text and not matches(text.replace(right, wrong))
