"""A program as ONNX files: one file a component, each with its data beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx

from mqc.backends.onnx.builder import Unsupported
from mqc.backends.onnx.lower import lower
from mqc.backends.onnx.translate import translate
from mqc.backends.onnx.write import write
from mqc.ir import Component, Program

Progress = Callable[[str, float], None]
"""Called with what is being done ("decoder: weights") and how much of the whole is done, 0 to 1."""

_TRACE_SHARE = 0.7


def emit(program: Program, folder: Path, progress: Progress | None = None) -> list[Path]:
    """Write every component of ``program`` into ``folder`` (it exists), in the program's order.

    The program may be float (canonical) or quantized; it is lowered for this target if it was not
    (:func:`~mqc.backends.onnx.lower.lower` is idempotent) and is not changed. The bytes written
    depend on the program alone.

    Returns:
        The files written.

    Raises:
        TargetError: an operator or a dtype cannot be written as ONNX.
    """
    lowered = lower(program)[0]
    files: list[Path] = []
    share = 1 / len(lowered.components)
    for index, component in enumerate(lowered):
        report = _reporter(progress, component.name, index * share, share)
        report("graph", 0.0)
        model = to_onnx(component)
        names = component.param_names()
        report("weights", _TRACE_SHARE)
        counter = _Counter(len(names), report)
        path = folder / f"{component.name}.onnx"
        files += write(model, path, lowered.params.copy(), len(component.inputs), counter)
    if progress is not None:
        progress("done", 1.0)
    return files


def to_onnx(component: Component) -> onnx.ModelProto:
    """The model of one component, parameters as its last inputs.

    Raises :class:`~mqc.errors.TargetError` where neither mqc nor torch.onnx knows an operator.
    """
    try:
        return translate(component)
    except Unsupported:
        from mqc.backends.onnx.trace import trace_component

        return trace_component(component)


class _Counter:
    """Progress of the weights of one component."""

    def __init__(self, total: int, report: Callable[[str, float], None]) -> None:
        self.total, self.done, self.report = max(total, 1), 0, report

    def __call__(self, size: int) -> None:
        self.done += 1
        self.report("weights", _TRACE_SHARE + (1 - _TRACE_SHARE) * self.done / self.total)


def _reporter(
    progress: Progress | None, name: str, start: float, share: float
) -> Callable[[str, float], None]:
    def report(what: str, part: float) -> None:
        if progress is not None:
            progress(f"{name}: {what}", start + share * part)

    return report
