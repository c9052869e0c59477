"""The parameters of a program: tensors by name, read from their checkpoint when first used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping

import torch

from mqc.ir.scratch import Scratch

Loader = Callable[[], torch.Tensor]


class ParamStore(MutableMapping[str, torch.Tensor]):
    """Name to tensor. A value may be a :data:`Loader`, called once, when the tensor is first read.

    Stored tensors are immutable by convention: a pass that changes a weight stores a new tensor
    under a new name (:meth:`add`), so tied weights untie by themselves and copies of a program
    share what they do not change. With a ``scratch``, large tensors that are read or added from
    then on are kept there; copies inherit it.
    """

    def __init__(self, scratch: Scratch | None = None) -> None:
        self.scratch = scratch
        self._values: dict[str, torch.Tensor | Loader] = {}
        self._marks: dict[str, object] = {}  # one a value, the same in all stores that share it

    def __getitem__(self, name: str) -> torch.Tensor:
        value = self._values[name]
        if not isinstance(value, torch.Tensor):
            with torch.inference_mode(False):  # whoever reads first, it is an ordinary tensor
                value = self._kept(value())
            self._values[name] = value
        return value

    def __setitem__(self, name: str, value: torch.Tensor | Loader) -> None:
        self._values[name] = value
        self._marks[name] = object()

    def __delitem__(self, name: str) -> None:
        del self._values[name]
        del self._marks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def is_loaded(self, name: str) -> bool:
        """Whether the tensor is in memory (reading it costs nothing)."""
        return isinstance(self._values[name], torch.Tensor)

    def add(self, hint: str, value: torch.Tensor) -> str:
        """Store ``value`` under a new name derived from ``hint``; return the name."""
        base, _, suffix = hint.rpartition("~")
        if not (base and suffix.isdigit()):
            base = hint
        index = 1
        while f"{base}~{index}" in self._values:
            index += 1
        name = f"{base}~{index}"
        self[name] = self._kept(value.detach().contiguous())
        return name

    def _kept(self, value: torch.Tensor) -> torch.Tensor:
        return value if self.scratch is None else self.scratch.keep(value, lasting=True)

    def shares(self, name: str, other: ParamStore) -> bool:
        """Whether ``other`` has the same value under ``name``, loaded or not."""
        return name in other and self._marks[name] is other._marks[name]

    def take(self, name: str, other: ParamStore) -> None:
        """Share the value that ``other`` has under ``name``."""
        self._values[name] = other._values[name]
        self._marks[name] = other._marks[name]

    def copy(self) -> ParamStore:
        """A store that shares the tensors (and the loaders) of this one."""
        other = ParamStore(self.scratch)
        other._values = dict(self._values)
        other._marks = dict(self._marks)
        return other

    def cast(self, dtype: torch.dtype) -> ParamStore:
        """A store whose floating-point tensors are cast to ``dtype``, lazily.

        What this store has not loaded by then, the other loads for itself: a compile that starts
        from the cast program does not hold the checkpoint beside it.
        """
        other = ParamStore(self.scratch)
        for name in self._values:
            other[name] = self._cast_loader(name, dtype)
        return other

    def _cast_loader(self, name: str, dtype: torch.dtype) -> Loader:
        def load() -> torch.Tensor:
            value = self._values[name]
            if not isinstance(value, torch.Tensor):
                value = value()
            return value.to(dtype) if value.is_floating_point() else value

        return load

    def prune(self, used: set[str]) -> int:
        """Forget every name not in ``used``; return how many were dropped."""
        unused = [name for name in self._values if name not in used]
        for name in unused:
            del self[name]
        return len(unused)
