"""Target ``reference``: the artifact holds the program, run by the operators' definitions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mqc.artifact import ArtifactWriter
from mqc.host.cache import KV_CACHE
from mqc.host.engine import Engine
from mqc.host.program_engine import ProgramEngine
from mqc.host.runnable import Runnable, load_runnable
from mqc.ir import Program, load_program, save_program

PROGRAM_FOLDER = "program"


class ReferenceTarget:
    """Runs float and lowered programs alike; slow, and right."""

    name = "reference"
    dialect = "quantized"
    description = "plain torch on the CPU, integer-exact: the oracle for the other targets"

    def available(self) -> str | None:
        """Always available."""
        return None

    def lower(self, program: Program) -> Program:
        """Nothing to do but for int8 caches: every legal operator has a reference."""
        from mqc.passes.lowering import narrow_cache

        return narrow_cache(program, program.facts.get(KV_CACHE, "float"))

    def emit(self, program: Program, writer: ArtifactWriter) -> None:
        """Save the program under ``program/``."""
        writer.require_space(parameter_bytes(program))
        save_program(program, writer.path(f"{PROGRAM_FOLDER}/program.json").parent)

    def load(self, path: Path, *, trust_remote_code: bool = False) -> Runnable:
        """Open an artifact that :meth:`emit` wrote."""
        return load_runnable(path, _engine, trust_remote_code=trust_remote_code)


def parameter_bytes(program: Program) -> int:
    """Size of the parameters that the program's graphs read."""
    names = set().union(*(component.param_names() for component in program))
    return sum(program.params[name].nbytes for name in names)


def _engine(folder: Path, manifest: Mapping[str, Any]) -> Engine:
    return ProgramEngine(load_program(folder / PROGRAM_FOLDER))
