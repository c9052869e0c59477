"""How far a long call is: what it tells to whoever wants to know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Reporter(Protocol):
    """Where long calls say how far they are."""

    def stage(self, name: str, index: int, count: int) -> None:
        """Stage ``name``, the ``index``-th of ``count``, begins."""

    def step(self, what: str, done: int, total: int) -> None:
        """Inside the stage, ``done`` of ``total`` steps of ``what`` are finished."""

    def note(self, text: str) -> None:
        """Something the user should know, though the call goes on; one line."""


class Silent:
    """The default reporter."""

    def stage(self, name: str, index: int, count: int) -> None:
        return None

    def step(self, what: str, done: int, total: int) -> None:
        return None

    def note(self, text: str) -> None:
        return None


class Stages:
    """Numbers the stages of a call for its reporter."""

    def __init__(self, reporter: Reporter, names: Sequence[str]) -> None:
        self.reporter = reporter
        self.names = list(names)
        self._next = 0

    def enter(self, name: str) -> None:
        if name in self.names[self._next :]:
            self._next = self.names.index(name, self._next)
        elif name == "done":
            self._next = len(self.names)
        else:
            return
        self.reporter.stage(name, self._next, len(self.names))
