"""Reading frozen dataclasses from plain data (JSON, YAML), strictly and with helpful errors."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

from mqc.errors import UsageError

T = TypeVar("T")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the known name most like ``name``, or all of them."""
    names = sorted(known)
    folded = {item.lower(): item for item in names}
    close = [folded[item] for item in difflib.get_close_matches(name.lower(), folded, n=1)]
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def read(cls: type[T], data: object, where: str) -> T:
    """``cls`` (a dataclass) from a mapping of its fields; ``where`` names the place in errors.

    Missing fields keep their defaults. Raises :class:`~mqc.errors.UsageError` for unknown fields
    and values of a wrong type.
    """
    if not isinstance(data, Mapping):
        raise UsageError(f"{where or 'the scheme'} must be a mapping of fields, not {data!r}")
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cast(Any, cls)) if field.init]
    values = {}
    for key, value in data.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in known:
            raise UsageError(f"unknown field {path!r}", hint=nearest(str(key), known))
        values[key] = convert(value, hints[key], path)
    return cls(**values)


def convert(value: object, hint: Any, where: str) -> Any:
    """``value`` as a field of type ``hint``; raises ``UsageError`` where it is none."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        (hint,) = (option for option in options if option is not type(None))
        return convert(value, hint, where)
    if origin is typing.Literal:
        options = typing.get_args(hint)
        if value in options and type(value) in {type(option) for option in options}:
            return value
        raise UsageError(
            f"{where} is {value!r}", hint=f"choose one of {', '.join(map(str, options))}"
        )
    if origin in (dict, Mapping) or getattr(origin, "__name__", "") == "Mapping":
        if not isinstance(value, Mapping):
            raise UsageError(f"{where} must be a mapping, not {value!r}")
        item = typing.get_args(hint)[1]
        return {str(key): convert(entry, item, f"{where}.{key}") for key, entry in value.items()}
    if dataclasses.is_dataclass(hint):
        return (
            value if isinstance(value, cast(type, hint)) else read(cast(type, hint), value, where)
        )
    return _scalar(value, hint, where)


def _scalar(value: object, hint: type, where: str) -> Any:
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    kind = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[hint]
    raise UsageError(f"{where} must be {kind}, not {value!r}")
