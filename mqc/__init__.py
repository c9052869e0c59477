"""mqc: a compiler for quantized multimodal large language models.

Importing this package is cheap: torch and transformers load when the first of the names below is
used. ``mqc.compile`` turns a checkpoint into an artifact, ``mqc.load`` opens one; all errors that
are raised on purpose are ``mqc.MqcError``, with the remedy in ``hint``. In a shell: ``mqc --help``.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mqc.api import compile, evaluate, inspect, load, opt, plan, probe  # noqa: A004
    from mqc.backends.onnx.library import onnx_ops_library
    from mqc.capture import capture
    from mqc.errors import MqcError
    from mqc.transform import Pass, PassManager

__version__ = "0.1.0"
__all__ = [
    "MqcError",
    "Pass",
    "PassManager",
    "capture",
    "compile",
    "evaluate",
    "inspect",
    "load",
    "onnx_ops_library",
    "opt",
    "plan",
    "probe",
]

_HOME = {
    "MqcError": "mqc.errors",
    "Pass": "mqc.transform",
    "PassManager": "mqc.transform",
    "capture": "mqc.capture",
    "compile": "mqc.api",
    "evaluate": "mqc.api",
    "inspect": "mqc.api",
    "load": "mqc.api",
    "onnx_ops_library": "mqc.backends.onnx.library",
    "opt": "mqc.api",
    "plan": "mqc.api",
    "probe": "mqc.api",
}


class _CapturePackage(ModuleType):
    """``mqc.capture`` is a package and, called, the function of that name in it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.capture(*args, **kwargs)


class _Package(ModuleType):
    """Importing ``mqc.capture`` binds the package to the function's name: keep it callable."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "capture" and type(value) is ModuleType:
            value.__class__ = _CapturePackage
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    return getattr(sys.modules[__name__], name) if name == "capture" else value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


sys.modules[__name__].__class__ = _Package
