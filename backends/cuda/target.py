"""Target ``cuda``: compiles anywhere, runs on an NVIDIA GPU, and by definition on a CPU."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mqc.artifact import ArtifactWriter
from mqc.errors import MqcError, TargetError, UsageError
from mqc.host.cache import KV_CACHE
from mqc.host.engine import Engine
from mqc.host.runnable import Runnable, load_runnable
from mqc.ir import Program

if TYPE_CHECKING:
    from mqc.spec import Scheme

REFERENCE = "reference"
HEAD_ROWS = {"bits": 8, "observer": "percentile"}
ELSEWHERE = "run it by definition on the CPU with device=reference, or compile for --target onnx"


class CudaTarget:
    """W4A8, W8A8, W4A16 and W8A16 by the kernels of ``libmqc_cuda.so``, decoding under CUDA graphs.

    Args:
        dtype: of activations and caches: "bf16", "f16" or "f32". bf16 has the range of the models'
            residual streams, which f16 has not.
    """

    name = "cuda"
    dialect = "cuda"
    description = "CUDA kernels for integer weights; compiles without a GPU, needs one to run"

    def __init__(self, dtype: str = "bf16") -> None:
        self.dtype = dtype

    def available(self) -> str | None:
        """None: an artifact can be made anywhere. :func:`missing` says what running needs."""
        return None

    def defaults(self, scheme: Scheme) -> dict[str, Any]:
        """What this target changes in a scheme where the user says nothing else.

        The head is W8A8: in half precision it would be a tenth of a decoding step's bytes. Rows
        keep their order: a scale looked up by row costs the kernels nothing, and attention stays
        causal, which the fast kernels for it need.
        """
        changes: dict[str, Any] = {}
        decoder = scheme.component("decoder")
        if decoder.activations.quantized:
            changes["decoder"] = {"head": {"bits": 8}, "head_activations": HEAD_ROWS}
        if scheme.aifs:
            changes["aifs"] = False
        return changes

    def lower(self, program: Program) -> Program:
        """A copy with fused operators and packed weights, computing in :attr:`dtype`."""
        from mqc.backends.cuda.lower import lower

        return lower(program, self.dtype)[0]

    def emit(self, program: Program, writer: ArtifactWriter) -> None:
        """Write ``program/`` and ``plan.json``."""
        from mqc.backends.cuda.emit import emit

        emit(program, writer)

    def load(
        self,
        path: Path,
        *,
        device: str = "cuda",
        kv_cache: str | None = None,
        graphs: bool = True,
        capacity: int = 1024,
        trust_remote_code: bool = False,
    ) -> Runnable:
        """Open an artifact that :meth:`emit` wrote.

        Args:
            path: its folder.
            device: "cuda" (the current one), "cuda:1" and so on, or "reference" to compute every
                operator by its definition on the CPU.
            kv_cache: "float", or "int8" with one scale a row; the scheme's where None.
            graphs: record decode steps as CUDA graphs.
            capacity: rows of the smallest KV buffer; larger ones are made when needed.
            trust_remote_code: run the code that the checkpoint brought.

        Raises:
            TargetError: no GPU, or no kernel library, with what to do about it.
            UsageError: an unknown option.
        """
        if re.fullmatch(r"reference|cuda(:\d+)?", device) is None:
            raise UsageError(
                f"unknown device {device!r} for target 'cuda'",
                hint="use cuda, cuda:1 (the second GPU) or reference",
            )
        if device != REFERENCE:
            require_device(path, device)

        def engine(folder: Path, manifest: Mapping[str, Any]) -> Engine:
            kind = kv_cache or manifest["facts"].get(KV_CACHE, "float")
            return open_engine(
                folder, device=device, kv_cache=kind, graphs=graphs, capacity=capacity
            )

        return load_runnable(path, engine, trust_remote_code=trust_remote_code)


def open_engine(folder: Path, *, device: str, kv_cache: str, graphs: bool, capacity: int) -> Engine:
    """The engine of an artifact; see :meth:`CudaTarget.load`."""
    from mqc.backends.cuda.emit import read_plan, read_program
    from mqc.backends.cuda.engine import CudaEngine
    from mqc.backends.cuda.graphs import call_again, record_graph
    from mqc.backends.cuda.kernels import Kernels, ReferenceKernels

    kernels: Kernels = ReferenceKernels() if device == REFERENCE else device_kernels(device)
    return CudaEngine(
        read_program(folder),
        kernels,
        plans=read_plan(folder),
        record=record_graph if graphs and device != REFERENCE else call_again,
        kv_cache=kv_cache,
        capacity=capacity,
    )


def device_kernels(device: str = "cuda") -> Any:
    """The library's kernels on a CUDA device, registered as torch's operators too."""
    from mqc.backends.cuda.native import NativeKernels
    from mqc.backends.cuda.register import register
    from mqc.cuda.library import load

    library = load()
    torch.cuda.init()
    index = _number(device)
    place = torch.device("cuda", torch.cuda.current_device() if index is None else index)
    with torch.cuda.device(place):
        library.check_device()
    kernels = NativeKernels(library, place)
    register(kernels)
    return kernels


def _number(device: str) -> int | None:
    """1 of "cuda:1"; None for the current device."""
    number = device.partition(":")[2]
    return int(number) if number else None


def missing(device: str = "cuda") -> list[tuple[str, str]]:
    """(what running on a GPU lacks here, what to do), in the order to do it."""
    from mqc.cuda.library import library_path, load

    found: list[tuple[str, str]] = []
    index = _number(device)
    if not torch.cuda.is_available():
        found.append(_no_gpu())
    elif index is not None and index >= torch.cuda.device_count():
        found.append(_no_such_gpu(device))
    try:
        library = load()
        if not found:
            torch.cuda.init()
            with torch.cuda.device(torch.cuda.current_device() if index is None else index):
                library.check_device()
    except MqcError as error:
        what = "the kernel library is missing" if library_path() is None else error.message
        found.append((what, error.hint or ""))
    return found


def _no_gpu() -> tuple[str, str]:
    if torch.version.cuda is None:
        return (
            f"this torch ({torch.__version__}) is built without CUDA",
            "install a CUDA build of torch on a machine with an NVIDIA GPU",
        )
    try:
        torch.cuda.init()  # says why: no driver, or one that is older than this torch
        why = ""
    except (RuntimeError, AssertionError) as error:
        why = f": {str(error).splitlines()[0].split('. ')[0]}"
    needs = f"torch {torch.__version__} needs a driver for CUDA {torch.version.cuda}"
    return f"torch finds no NVIDIA GPU{why}", f"check the machine's GPU with nvidia-smi; {needs}"


def _no_such_gpu(device: str) -> tuple[str, str]:
    count = torch.cuda.device_count()
    known = ", ".join(f"cuda:{index}" for index in range(count))
    return f"there is no device {device}, torch sees {known}", "use one of them"


def require_device(path: Path, device: str = "cuda") -> None:
    """Raise :class:`TargetError` where artifact ``path`` cannot run on a GPU here."""
    lacks = missing(device)
    if lacks:
        raise TargetError(
            f"artifact {path} needs an NVIDIA GPU: {'; '.join(what for what, _ in lacks)}",
            hint="; ".join([remedy for _, remedy in lacks if remedy] + [ELSEWHERE]),
        )
