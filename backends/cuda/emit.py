"""Artifacts of target ``cuda``: the lowered program with packed weights, and its memory plan.

::

    program/program.json, program/params.safetensors   graphs in dialect cuda; weights as the
                                                        kernels read them
    plan.json                                           what lives when, by component; launches
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mqc.backends.cuda.ops  # noqa: F401  (graphs of an artifact name this package's operator)
from mqc.artifact import ArtifactWriter
from mqc.backends.cuda.plan import Value, lifetimes, solve
from mqc.cuda.pack import Layout
from mqc.errors import ArtifactError
from mqc.ir import Program, load_program, save_program
from mqc.ir.symbols import ExampleSizes

PROGRAM = "program"
PLAN = "plan.json"
PLAN_VERSION = 2
EXAMPLE = {"tokens": 1024, "rows": 1, "batch": 1}
"""Sizes at which the plan's file states the arenas' bytes, for people."""


def emit(program: Program, writer: ArtifactWriter) -> None:
    """Write the files of a lowered program through ``writer``."""
    save_program(program, writer.path(f"{PROGRAM}/program.json").parent)
    text = json.dumps(plan_json(program), indent=1, sort_keys=True)
    writer.path(PLAN).write_text(text + "\n", encoding="utf-8")


def plan_json(program: Program) -> dict[str, Any]:
    """The memory plan of every component as JSON data, and the launches of each phase."""
    from mqc.backends.cuda.launches import count_launches

    components = {}
    for component in program:
        values = lifetimes(component)
        sizes = ExampleSizes(256, **EXAMPLE)
        planned = solve(values, sizes).nbytes
        components[component.name] = {
            "values": [value.to_json() for value in values],
            "example": {
                "sizes": {**EXAMPLE, "any other": 256},
                "arena_bytes": planned,
                "sum_bytes": sum(value.nbytes(sizes) for value in values),
            },
        }
    return {
        "format": PLAN_VERSION,
        "components": components,
        "launches": {
            phase: {"all": sum(kinds.values()), **kinds}
            for phase, kinds in count_launches(program).items()
        },
    }


def read_plan(folder: Path) -> dict[str, list[Value]]:
    """The plans of an artifact. Raises :class:`ArtifactError` for a missing or damaged file."""
    path = folder / PLAN
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != PLAN_VERSION:
            raise ValueError(f"format {data['format']}, this mqc reads {PLAN_VERSION}")
        return {
            name: [Value.from_json(item) for item in part["values"]]
            for name, part in data["components"].items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"memory plan {path} cannot be used: {error}", hint="compile the model again"
        ) from error


def read_program(folder: Path) -> Program:
    """The program of an artifact. Raises :class:`ArtifactError` for layouts that are not known."""
    program = load_program(folder / PROGRAM)
    stored = program.facts.get("cuda", {}).get("layouts", {})
    known = {layout.name: int(layout) for layout in Layout}
    if any(known.get(name) != number for name, number in stored.items()):
        raise ArtifactError(
            f"artifact {folder} has weights in the layouts {stored}, this mqc reads {known}",
            hint="compile the model again with this version",
        )
    return program
