"""The library as nvcc builds it: no spills, no serialised wgmma, the instructions it is for.

Needs nvcc; the look into the machine code also needs cuobjdump and nvdisasm (in CUDA's toolkit, or
in triton's wheel under triton/backends/nvidia/bin; name their folder with MQC_CUDA_TOOLS).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from mqc.cuda import build as building
from mqc.cuda.library import ABI_VERSION, STRUCTS

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "cuda"
PERFORMANCE_WARNINGS = re.compile(r"C7508|C7510|C7511|C7512|C7514|warning", re.IGNORECASE)


@pytest.fixture(scope="module")
def library() -> Path:
    """The library, built where it is older than its sources."""
    if building.find_nvcc() is None:
        pytest.skip("no nvcc")
    return building.build(WORK / "libmqc_cuda.so", WORK)


@pytest.mark.slow
def test_all_kernels_are_built_for_three_architectures(library: Path) -> None:
    by_name = defaultdict(set)
    for report in building.reports(WORK):
        by_name[report.name].add(report.architecture)
    assert len(by_name) > 60
    for name, architectures in by_name.items():
        assert architectures == set(building.ARCHITECTURES), name


@pytest.mark.slow
def test_no_kernel_spills(library: Path) -> None:
    spilling = [r for r in building.reports(WORK) if r.spill_bytes or r.stack_bytes]
    assert not spilling
    for report in building.reports(WORK):
        if "linear_wgmma" in report.name and report.architecture == "90a":
            # setmaxnreg shares 168 registers a thread; another cap would let it be ignored.
            assert report.registers == 168


@pytest.mark.slow
def test_no_warning(library: Path) -> None:
    for log in WORK.glob("*.log"):
        found = [ln for ln in log.read_text().splitlines() if PERFORMANCE_WARNINGS.search(ln)]
        assert not found, f"{log.name}: {found[:5]}"


@pytest.mark.slow
def test_symbols(library: Path) -> None:
    """Exported: the C ABI alone. Needed: libc and what belongs to it."""
    if shutil.which("nm") is None or shutil.which("readelf") is None:
        pytest.skip("no binutils")

    def output(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    exported = {
        ln.split()[-1] for ln in output("nm", "-D", "--defined-only", str(library)).splitlines()
    }
    header = (ROOT / "cuda/include/mqc_cuda.h").read_text()
    assert exported == set(re.findall(r"^MQC_API [^(]*?(mqc_\w+)\(", header, re.MULTILINE))
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", output("readelf", "-d", str(library)))
    allowed = {"libc.so.6", "libm.so.6", "libdl.so.2", "librt.so.1", "libpthread.so.0"}
    assert set(needed) <= allowed | {"ld-linux-x86-64.so.2"}
    undefined = output("nm", "-D", "--undefined-only", str(library))
    assert not re.search(r"torch|c10|at::|Ort|Py_|cudnn|cublas", undefined)


@pytest.mark.slow
def test_the_library_loads_without_a_gpu(library: Path) -> None:
    from mqc.cuda.library import KernelError, Library, LinearArgs

    loaded = Library(library)
    assert loaded.native.mqc_abi_version() == ABI_VERSION and STRUCTS
    # Checks come before the device is looked at.
    with pytest.raises(KernelError, match="layout 8 is unknown"):
        loaded.launch("linear", LinearArgs(layout=8))


def cuda_tools() -> Path | None:
    """Folder with cuobjdump and nvdisasm."""
    folders = [
        os.environ.get("MQC_CUDA_TOOLS", ""),
        str(Path(shutil.which("cuobjdump") or "").parent),
    ]
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin:
        folders.append(str(Path(spec.origin).parent / "backends/nvidia/bin"))
    for folder in filter(None, folders):
        if all(os.access(f"{folder}/{tool}", os.X_OK) for tool in ("cuobjdump", "nvdisasm")):
            return Path(folder)
    return None


@pytest.fixture(scope="module")
def machine_code(library: Path) -> dict[tuple[str, str], str]:
    """SASS by (architecture, function)."""
    tools = cuda_tools()
    if tools is None:
        pytest.skip("no cuobjdump and nvdisasm: set MQC_CUDA_TOOLS")
    env = dict(os.environ, PATH=f"{tools}:{os.environ['PATH']}")
    command = [str(tools / "cuobjdump"), "--dump-sass", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    code: dict[tuple[str, str], str] = {}
    architecture = function = ""
    for part in re.split(r"(?=\n\tcode for sm_\w+|\n\t\tFunction : )", text):
        if found := re.match(r"\n\tcode for sm_(\w+)", part):
            # cuobjdump may leave the "a" out; nothing is built for plain sm_90.
            architecture = found[1].removesuffix("a") + "a" * found[1].startswith("90")
        elif found := re.match(r"\n\t\tFunction : (\S+)", part):
            function = found[1]
            code[architecture, function] = part
    assert code
    return code


@pytest.mark.slow
def test_instructions(machine_code: dict[tuple[str, str], str]) -> None:
    wanted = {
        "linear_mma_kernel": ["IMMA.16832.S8.S8", "LDGSTS", "LDSM.16.M88.4"],
        "HalfFormat": ["HMMA.16816.F32", "LDGSTS", "LDS.64", "LOP3", "PRMT"],
        "attention_kernel": ["HMMA.16816.F32", "LDGSTS", "LDSM.16.M88.4", "LDSM.16.MT88.4"],
    }
    for (architecture, function), text in machine_code.items():
        kind = "HalfFormat" if "HalfFormat" in function else function
        for part, instructions in wanted.items():
            if part in kind:
                for instruction in instructions:
                    assert instruction in text, f"{instruction} in {function} for sm_{architecture}"
        if "HalfFormat" in function:
            assert "IMMA" not in text, function
        if "linear_wgmma_kernel" in function and architecture == "90a":
            for instruction in ("UTMALDG.2D", "UBLKCP", "USETMAXREG"):
                assert instruction in text, f"{instruction} in {function}"
            # A stage: 2 tiles of channels, 4 steps, unrolled once; with groups two halves of tokens
            groups = re.search(r"WeightFormatILi\dELi[1-9]", function)
            product, count = ("64x64x32", 16) if groups else ("64x128x32", 8)
            assert text.count(f"IGMMA.{product}.S8.S8") == text.count("IGMMA.") == count
        if "activation_kernel" in function and not function.endswith(
            "Li0EEEvNS_16ActivationParamsE"
        ):
            assert "HMMA.16816.F32" in text, function
        assert "LDL" not in text and "STL" not in text, f"{function} uses local memory"


@pytest.mark.slow
def test_warpgroups_keep_within_the_registers_they_asked_for(
    machine_code: dict[tuple[str, str], str],
) -> None:
    """A register past setmaxnreg's number is undefined, and claims beyond what the block was given
    at its start (168 a thread) wait for ever."""
    checked = 0
    for (architecture, function), text in machine_code.items():
        if "linear_wgmma_kernel" not in function or architecture != "90a":
            continue
        consumers, producers = text.split("USETMAXREG.DEALLOC", 1)  # their code comes last
        claimed = int(re.findall(r"TRY_ALLOC\.\w+ \w+, (0x\w+)", consumers)[0], 16)
        released = int(re.findall(r"^\.\w+ (0x\w+)", producers)[0], 16)
        assert 128 * (2 * claimed + released) <= 384 * 168
        for part, limit in ((consumers, claimed), (producers, released)):
            assert max(int(n) for n in re.findall(r"\bR(\d+)\b", part)) < limit, function
        checked += 1
    assert checked >= 2


def in_flight(text: str) -> tuple[int, list[str]]:
    """Number of wgmma, and instructions between one and its wait that touch its registers: sums may
    not be touched, its left operand may be read."""
    sums: set[int] = set()
    operands: set[int] = set()
    products, wrong = 0, []
    for line in re.findall(r"/\*[0-9a-f]{4,5}\*/\s+([^;]*);", text):
        named = {int(n) for n in re.findall(r"\bR(\d+)\b", line)}
        if match := re.search(r"IGMMA\.64x(\d+)x32\S* R(\d+), R(\d+), gdesc", line):
            first, left = int(match[2]), int(match[3])
            products += 1
            sums |= set(range(first, first + int(match[1]) // 2))
            operands |= set(range(left, left + 4))
            found = sums & operands
        elif re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0", line):
            sums, operands, found = set(), set(), set()
        else:
            target = re.match(r"(?:@!?U?P\d+ )?(\S+) (?:U?P[T\d]+, )?R(\d+)\b", line)
            written = set()
            if target is not None:
                words = re.search(r"\.(128|64|WIDE)\b|^(CS2R)", target[1])
                count = 1 if words is None else 4 if words[1] == "128" else 2
                written = set(range(int(target[2]), int(target[2]) + count))
            found = (named | written) & sums | written & operands
            if sums and re.search(r"\b(BRA|BRX|CALL|RET|EXIT)\b", line):
                found = sums
        if found:
            wrong.append(line)
    return products, wrong


@pytest.mark.slow
def test_registers_of_a_wgmma_rest_until_its_wait(machine_code: dict[tuple[str, str], str]) -> None:
    """CUTLASS waits before it unpacks into fragments that are still being read; these kernels have
    other fragments by then."""
    for (architecture, function), text in machine_code.items():
        if "linear_wgmma_kernel" in function and architecture == "90a":
            products, wrong = in_flight(text)
            assert products >= 8 and not wrong, f"{function}: {wrong[:5]}"
