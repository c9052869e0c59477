"""Target ``onnx``: lower, emit, load."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mqc.artifact import ArtifactWriter
from mqc.errors import TargetError, UsageError
from mqc.host.cache import KV_CACHE
from mqc.host.engine import Engine
from mqc.host.runnable import Runnable, load_runnable
from mqc.ir import Program, TensorType

COMPONENTS = ("vision", "embed", "decoder")


class OnnxTarget:
    """One ONNX file a component, in standard operators and ``ai.mqc`` ones with their bodies.

    Args:
        threads: threads of an onnxruntime session; None takes torch's number.
        provider: "cpu", or "cuda" where onnxruntime-gpu and a device are present.
        buffers: let decoders take caches of fixed capacity (pass fuse-attention), which a native
            library fills in place. Without a library they grow as without this; the body of
            attention costs about 25 microseconds a layer and call more there.
        device: whose kernels the files are written for, "cpu" or "cuda". All files run on both.
    """

    name = "onnx"
    dialect = "quantized"
    description = "ONNX files for onnxruntime; integer results equal the reference's bit by bit"

    def __init__(
        self,
        threads: int | None = None,
        provider: str = "cpu",
        buffers: bool = True,
        device: str = "cpu",
    ) -> None:
        self.threads = threads
        self.provider = provider
        self.buffers = buffers
        self.device = device

    def for_device(self, device: str) -> OnnxTarget:
        """This target with another ``device``. Raises :class:`UsageError` on an unknown one."""
        from mqc.backends.onnx.lower import DEVICES

        if device not in DEVICES:
            raise UsageError(
                f"target 'onnx' knows no device {device!r}", hint=f"use {' or '.join(DEVICES)}"
            )
        return OnnxTarget(self.threads, self.provider, self.buffers, device)

    def available(self) -> str | None:
        """None, or what has to be installed. Emitting needs no onnxruntime; running does."""
        missing = [name for name in ("onnx", "onnxscript") if not _installed(name)]
        if missing:
            return f"{' and '.join(missing)} not installed: pip install {' '.join(missing)}"
        return None

    def lower(self, program: Program) -> Program:
        """A copy with fused operators, and activations and weights as the kernels want them."""
        from mqc.backends.onnx.lower import lower
        from mqc.passes.lowering import fuse, narrow_cache

        left_out = [] if self.buffers else ["fuse-attention"]
        if self.device == "cuda":  # pieces of rows would wait for the device to know their sizes
            left_out.append("route-experts")
        fused = fuse(program, tuple(left_out))
        return lower(narrow_cache(fused, program.facts.get(KV_CACHE, "float")), self.device)[0]

    def emit(
        self,
        program: Program,
        writer: ArtifactWriter,
        progress: Callable[[str, float], None] | None = None,
    ) -> None:
        """Write ``vision.onnx``, ``embed.onnx``, ``decoder.onnx`` and their ``.data`` files."""
        from mqc.backends.onnx.emit import emit

        writer.require_space(parameter_bytes(program))
        emit(program, writer.path("decoder.onnx").parent, progress)

    def load(
        self,
        path: Path,
        *,
        provider: str | None = None,
        threads: int | None = None,
        profile: str | Path | None = None,
        trust_remote_code: bool = False,
    ) -> Runnable:
        """Open an artifact that :meth:`emit` wrote.

        Args:
            path: its folder.
            provider: "cpu" or "cuda" (onnxruntime-gpu and a GPU); the target's where None.
            threads: of each session; the target's where None, torch's number where that is None.
            profile: folder for onnxruntime's traces of every node, written when sessions end;
                tools/profile_onnx.py sums them up.
            trust_remote_code: run the code that the checkpoint brought.

        Raises:
            TargetError: no onnxruntime, or not one with this provider.
            UsageError: a number of threads that is not possible.
        """
        if threads is not None and threads < 1:
            raise UsageError(f"threads {threads!r} are not possible", hint="use 1 or more")
        if not _installed("onnxruntime"):
            raise TargetError(
                f"artifact {path} needs onnxruntime, which is not installed",
                hint="pip install mqc[cpu]",
            )
        used, traces = provider or self.provider, None if profile is None else Path(profile)
        workers = self.threads if threads is None else threads

        def engine(folder: Path, manifest: Mapping[str, Any]) -> Engine:
            from mqc.backends.onnx.session import OnnxEngine

            return OnnxEngine(
                folder, manifest["facts"], threads=workers, provider=used, profile=traces
            )

        return load_runnable(path, engine, trust_remote_code=trust_remote_code)


def parameter_bytes(program: Program) -> int:
    """Bytes of the parameters of all components; what two components share counts twice."""
    total = 0
    for component in program:
        kinds = {str(n.target): n.meta["type"] for n in component.graph.find_nodes(op="get_attr")}
        for kind in kinds.values():
            assert isinstance(kind, TensorType)
            total += math.prod(int(size) for size in kind.shape) * kind.dtype.itemsize
    return total


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
