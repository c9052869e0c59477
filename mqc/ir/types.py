"""Types of the values in a component graph.

A graph carries plain data only: every tensor node has a :class:`TensorType` in
``node.meta["type"]``. There are no fake tensors and no shape environment, so a graph can be
printed, saved and compared as text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Dim = int | str
"""A size: a number, or a symbol or expression such as ``"tokens"`` or ``"past + tokens"``."""

SCALAR = "scalar"
"""``node.meta["type"]`` of a node that yields a Python number (a symbolic size)."""

TUPLE = "tuple"
"""``node.meta["type"]`` of a call with several results; ``operator.getitem`` nodes are typed."""

_DTYPE_SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
_SHORT_DTYPE = {short: dtype for dtype, short in _DTYPE_SHORT.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Short name of a dtype: ``torch.float32 -> "f32"``; other dtypes keep torch's name."""
    return _DTYPE_SHORT.get(dtype, str(dtype).removeprefix("torch."))


def dtype_from_name(name: str) -> torch.dtype:
    """Inverse of :func:`dtype_name`. Raises ``ValueError`` for an unknown name."""
    dtype = _SHORT_DTYPE.get(name) or getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown dtype name {name!r}")
    return dtype


@dataclass(frozen=True)
class TensorType:
    """Shape and dtype of a tensor value, e.g. ``f32[batch, tokens, 192]``."""

    shape: tuple[Dim, ...]
    dtype: torch.dtype

    @property
    def rank(self) -> int:
        return len(self.shape)

    def with_shape(self, *shape: Dim) -> TensorType:
        return TensorType(tuple(shape), self.dtype)

    def with_dtype(self, dtype: torch.dtype) -> TensorType:
        return TensorType(self.shape, dtype)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorType:
        return cls(tuple(int(size) for size in tensor.shape), tensor.dtype)

    def to_json(self) -> dict[str, object]:
        return {"dtype": dtype_name(self.dtype), "shape": list(self.shape)}

    @classmethod
    def from_json(cls, data: dict[str, object]) -> TensorType:
        shape = data["shape"]
        assert isinstance(shape, list)
        return cls(tuple(shape), dtype_from_name(str(data["dtype"])))

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Port:
    """An input or output of a component.

    ``axes`` names the role of each axis: ``"batch"``, ``"token"``, ``"key"`` (past and new
    tokens), ``"past"``, ``"capacity"`` (rows of a cache, past and free ones), ``"patch"``,
    ``"image"``, ``"row"`` (rows the head is asked for), or
    ``None``. This is the token layout that modality and reordering passes work from.
    """

    name: str
    type: TensorType
    axes: tuple[str | None, ...]

    def axis(self, role: str) -> int | None:
        """Index of the axis with ``role``, or None."""
        return self.axes.index(role) if role in self.axes else None

    def to_json(self) -> dict[str, object]:
        return {"name": self.name, "type": self.type.to_json(), "axes": list(self.axes)}

    @classmethod
    def from_json(cls, data: dict[str, object]) -> Port:
        kind, axes = data["type"], data["axes"]
        assert isinstance(kind, dict) and isinstance(axes, list)
        return cls(str(data["name"]), TensorType.from_json(kind), tuple(axes))


def is_cache(port: Port) -> bool:
    """Whether a port is part of the decoder's cache.

    Keys and values that grow (axis "past") or have room (axis "capacity"), or the memory of a
    recurrent layer (axis "memory").
    """
    return any(port.axis(role) is not None for role in ("past", "capacity", "memory"))
