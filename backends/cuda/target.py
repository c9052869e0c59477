"""Target ``cuda``: its dialect is the quantized one; emission and runtime are not in this build."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from mqc.artifact import ArtifactWriter
from mqc.errors import TargetError
from mqc.host.runnable import Runnable
from mqc.ir import Program

HINT = "use --target onnx or --target reference"


class CudaTarget:
    """Lowers programs; raises :class:`~mqc.errors.TargetError` where a kernel would be needed."""

    name = "cuda"
    dialect = "quantized"
    description = "CUDA kernels for W4A8 (not available in this build)"

    def available(self) -> str | None:
        """Why nothing can be emitted or run."""
        return f"not available in this build; {HINT}"

    def lower(self, program: Program) -> Program:
        """A copy: every operator of the quantized dialect is an operator of this target."""
        return program.copy()

    def emit(self, program: Program, writer: ArtifactWriter) -> NoReturn:
        """Raises :class:`~mqc.errors.TargetError`."""
        raise _not_available("emit")

    def load(self, path: Path) -> Runnable:
        """Raises :class:`~mqc.errors.TargetError`."""
        raise _not_available("load")


def _not_available(action: str) -> TargetError:
    return TargetError(f"target 'cuda' cannot {action}: not available in this build", hint=HINT)
