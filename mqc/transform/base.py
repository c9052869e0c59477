"""What a pass is: a named rewrite with a contract that is checked before and after."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from mqc.ir import Program

if TYPE_CHECKING:
    from mqc.spec import Scheme

Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)``: called often, must be cheap."""


def no_progress(what: str, done: int, total: int) -> None:
    """The default progress callback: silence."""


@dataclass(frozen=True)
class Skip:
    """Something a pass would have liked to rewrite and could not, and why (shown to the user)."""

    where: str
    reason: str


class Journal:
    """Finished parts of a long pass, for a compile that goes on after it was killed. This one
    keeps nothing.

    A pass that asks :meth:`recall` before each part, and tells :meth:`keep` after it, loses one
    part and not all. What is recalled was computed from equal inputs: a compile goes on only where
    model, data, passes and scheme are the same.
    """

    def recall(self, name: str) -> tuple[dict[str, torch.Tensor], Any] | None:
        """What :meth:`keep` was told of part ``name``, or None."""
        return None

    def keep(self, name: str, tensors: Mapping[str, torch.Tensor], data: Any) -> None:
        """Keep the result of part ``name``: tensors, which nobody changes later, and JSON data."""
        return None


@dataclass
class PassContext:
    """What passes may use besides the program.

    ``calibration`` holds prepared prompts (:class:`mqc.host.prompt.Prompt`). ``limit`` bounds the
    number of rewrites over all passes, to bisect for the one that breaks
    numerics: every rewrite first asks :meth:`take`.
    """

    scheme: Scheme | None = None
    calibration: Sequence[Any] | None = None
    seed: int = 0
    progress: Progress = no_progress
    limit: int | None = None
    taken: int = 0
    journal: Journal = field(default_factory=Journal)

    def take(self) -> bool:
        """Whether one more rewrite may be done (and count it)."""
        if self.limit is not None and self.taken >= self.limit:
            return False
        self.taken += 1
        return True


@dataclass
class PassResult:
    """A rewritten program with counts per kind of rewrite, skips, and per-layer details (JSON)."""

    program: Program
    counts: Counter[str] = field(default_factory=Counter)
    skips: list[Skip] = field(default_factory=list)
    details: list[dict[str, Any]] = field(default_factory=list)

    @property
    def modified(self) -> bool:
        return any(self.counts.values())


class Pass(ABC):
    """Base of all passes.

    Subclasses set ``name``, ``after`` (passes that must come earlier where both are in a
    pipeline) and ``preserves`` (True: the program computes the same function, and
    ``--verify-each`` proves it in float64). :meth:`run` gets its own copy of the program and may
    change it in place.
    """

    name: ClassVar[str]
    after: ClassVar[tuple[str, ...]] = ()
    preserves: ClassVar[bool] = False

    @classmethod
    def from_scheme(cls, scheme: Scheme) -> Self:
        """The pass as a scheme configures it; the default ignores the scheme."""
        return cls()

    def requires(self, program: Program) -> None:
        """Raise :class:`~mqc.errors.PassPreconditionError` if the pass cannot run on this."""
        return None

    @abstractmethod
    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Rewrite ``program``."""

    def ensures(self, result: PassResult) -> None:
        """Raise :class:`~mqc.errors.PassPostconditionError` unless the postcondition holds."""
        return None

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring, for listings."""
        return (cls.__doc__ or "").strip().splitlines()[0]


def check_order(passes: Sequence[Pass]) -> None:
    """Raise :class:`~mqc.errors.UsageError` if a pass stands before one it must follow."""
    from mqc.errors import UsageError

    names = [item.name for item in passes]
    for index, item in enumerate(passes):
        late = [name for name in item.after if name in names[index + 1 :]]
        if late:
            raise UsageError(
                f"pass {item.name!r} must come after {', '.join(map(repr, late))}",
                hint="reorder the pass list",
            )
