"""Which passes run, in which order: the default list of a scheme, by name, and custom passes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from mqc.errors import UsageError
from mqc.spec import Scheme
from mqc.spec.fields import nearest

if TYPE_CHECKING:
    from mqc.transform import Pass

GROUP = "mqc.passes"
"""Entry-point group in which installed packages name pass classes."""


def pass_names(scheme: Scheme) -> list[str]:
    """The default passes of ``scheme``, in order; what it does not ask for is left out."""
    asked = {
        "canonicalize": True,
        "fuse-norm": scheme.rotate,
        "hadamard-fuse": scheme.rotate,
        "hadamard-online": scheme.online_hadamard,
        "rms-suppress": scheme.rms_suppress,
        "modality-split": scheme.msq,
        "quantize-weights": scheme.quantized,
        "static-scales": scheme.static_activations,
        "aifs-reorder": scheme.aifs,
        "expert-slices": scheme.aifs,
        "cleanup": True,
    }
    return [name for name, wanted in asked.items() if wanted]


def known_passes() -> dict[str, type[Pass]]:
    """Pass classes by name: the built-in ones, then those of installed packages."""
    from mqc.passes.registry import PASSES

    found = dict(PASSES)
    for point in entry_points(group=GROUP):
        if point.name not in found:
            found[point.name] = load_pass_class(point.value)
    return found


def load_pass_class(path: str) -> type[Pass]:
    """The class that ``module:Class`` names; the current directory is searched for the module.

    Raises:
        UsageError: it cannot be imported, or is no :class:`mqc.Pass`.
    """
    from mqc.transform import Pass

    module_name, colon, class_name = path.partition(":")
    if not (module_name and colon and class_name):
        raise UsageError(
            f"custom pass {path!r} is not of the form module:Class",
            hint="for example: my_pkg.my_mod:MyPass",
        )
    sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(
            f"custom pass {path!r} cannot be imported: {error}",
            hint="run mqc where Python finds the module, or install its package",
        ) from error
    finally:
        sys.path.remove("")
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, Pass)):
        public = [name for name, value in vars(module).items() if _is_pass(value)]
        raise UsageError(
            f"{class_name!r} of module {module_name!r} is not a pass class",
            hint=nearest(class_name, public) if public else "derive it from mqc.Pass",
        )
    return found


def _is_pass(value: object) -> bool:
    from mqc.transform import Pass

    return isinstance(value, type) and issubclass(value, Pass) and value is not Pass


def make_passes(names: Sequence[str], scheme: Scheme) -> list[Pass]:
    """Passes by name, as ``scheme`` configures them; a name may be ``module:Class``.

    Raises:
        UsageError: an unknown name, with the nearest known one.
    """
    known = known_passes()
    result = []
    for name in names:
        if ":" not in name and name not in known:
            raise UsageError(f"unknown pass {name!r}", hint=nearest(name, known))
        pass_class = load_pass_class(name) if ":" in name else known[name]
        result.append(pass_class.from_scheme(scheme))
    return result


def default_passes(scheme: Scheme, custom: Sequence[str] = ()) -> list[Pass]:
    """The passes of ``scheme`` with ``custom`` ones (names or ``module:Class``) put in.

    A custom pass stands right after the last pass that its ``after`` names; where it names none of
    the pipeline's, right after ``canonicalize``, in the form of graph that every pass expects.
    Several keep their order.
    """
    passes = make_passes(pass_names(scheme), scheme)
    for item in make_passes(custom, scheme):
        anchors = {"canonicalize", *item.after}
        place = max(index for index, other in enumerate(passes) if other.name in anchors) + 1
        while place < len(passes) and passes[place].name not in pass_names(scheme):
            place += 1
        passes.insert(place, item)
    return passes
