"""Targets by name: the built-in ones and those of installed packages.

A package adds a target by an entry point in the group ``mqc.targets``::

    [project.entry-points."mqc.targets"]
    mynpu = "my_package.target:MyTarget"      # a class without arguments, or an instance
"""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mqc.artifact import ArtifactWriter, read_manifest
from mqc.errors import TargetError, UsageError
from mqc.host.runnable import Runnable
from mqc.ir import Program
from mqc.spec.fields import nearest

GROUP = "mqc.targets"

BUILTIN = {
    "reference": "mqc.backends.reference:ReferenceTarget",
    "onnx": "mqc.backends.onnx:OnnxTarget",
    "cuda": "mqc.backends.cuda:CudaTarget",
}


@runtime_checkable
class Target(Protocol):
    """What a target does with a program whose passes have run.

    Attributes:
        name: as in ``--target name``.
        dialect: name of the legal-operator table that :meth:`lower` leaves
            (:mod:`mqc.ir.dialect`).
        description: one line for ``mqc targets``.
    """

    name: str
    dialect: str
    description: str

    def available(self) -> str | None:
        """None, or why nothing can be emitted or run here and what to do about it."""

    def lower(self, program: Program) -> Program:
        """The program in the target's dialect; the argument is left as it is."""

    def emit(self, program: Program, writer: ArtifactWriter) -> None:
        """Write the lowered program's files through ``writer.path``; not the manifest."""

    def load(self, path: Path) -> Runnable:
        """Open an artifact of this target."""


def target_names() -> list[str]:
    """Names of all known targets, built-in ones first."""
    return [*BUILTIN, *sorted(set(_plugins()) - set(BUILTIN))]


def get_target(name: str) -> Target:
    """The target called ``name``.

    Raises :class:`UsageError` for an unknown name and :class:`TargetError` where a plug-in's
    target cannot be imported or is no target.
    """
    if name in BUILTIN:
        module, _, attribute = BUILTIN[name].partition(":")
        return _instance(name, getattr(importlib.import_module(module), attribute))
    plugin = _plugins().get(name)
    if plugin is None:
        raise UsageError(
            f"unknown target {name!r}", hint=f"the known targets are: {', '.join(target_names())}"
        )
    try:
        found = plugin.load()
    except (ImportError, AttributeError) as error:
        raise TargetError(
            f"target {name!r} of {plugin.value!r} cannot be imported: {error}",
            hint="repair or uninstall the package that brings it",
        ) from error
    return _instance(name, found)


def load_artifact(path: str | Path, **options: Any) -> Runnable:
    """Open an artifact with the target that its manifest names, and options of that target.

    Raises :class:`UsageError` for an option that the target's ``load`` does not take.
    """
    manifest = read_manifest(path)
    target = get_target(manifest["target"])
    reason = target.available()
    if reason is not None:
        raise TargetError(f"artifact {path} is for target {target.name!r}: {reason}")
    known = list(inspect.signature(target.load).parameters)[1:]
    for name in options:
        if name not in known:
            raise UsageError(
                f"target {target.name!r} has no option {name!r}",
                hint=nearest(name, known) if known else "load it without options",
            )
    return target.load(Path(path), **options)


def _instance(name: str, found: Any) -> Target:
    target = found() if isinstance(found, type) else found
    if not isinstance(target, Target):
        raise TargetError(
            f"target {name!r} lacks a part of mqc.backends.registry.Target",
            hint="it needs name, dialect, description, available, lower, emit and load",
        )
    return target


def _plugins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}
