"""Runs a list of passes: contracts, verification, dumps, history."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from mqc.errors import PassPostconditionError, PassPreconditionError, VerificationError
from mqc.ir import Program, format_program, verify
from mqc.transform.base import Journal, Pass, PassContext, PassResult, Skip, check_order
from mqc.transform.equivalence import end_to_end_error

if TYPE_CHECKING:
    from mqc.transform.checkpoint import Checkpoints

TOLERANCE = 1e-10
"""Largest relative error (float64, end to end) a function-preserving pass may leave."""

Dump = Callable[[str, str], None]
"""``dump(pass name, text of the program)``."""


@dataclass(frozen=True)
class PassRecord:
    """What one pass did; kept for the report and, as JSON, in the program's history."""

    name: str
    counts: dict[str, int]
    skips: list[Skip]
    details: list[dict[str, Any]]
    seconds: float
    error: float | None

    def to_json(self) -> dict[str, Any]:
        """Without the time, so that equal compiles write equal bytes."""
        data: dict[str, Any] = {"pass": self.name, "counts": dict(sorted(self.counts.items()))}
        if self.skips:
            data["skips"] = [{"where": s.where, "reason": s.reason} for s in self.skips]
        if self.details:
            data["details"] = self.details
        if self.error is not None:
            data["verified"] = self.error <= TOLERANCE
        return data


@dataclass
class State:
    """Where a list of passes is: the program after the passes of ``records``."""

    program: Program
    records: list[PassRecord]
    taken: int


@dataclass
class PassManager:
    """Runs ``passes`` in order on a copy of a program.

    ``verify_each``: after every pass that declares ``preserves``, compare with the program before
    it, end to end. The comparison runs the pass on a float64 copy of the program, so that it sees
    the rewrite and not the rounding of stored weights. ``dump_after``: names of passes (or
    ``"all"``) after which ``dump`` gets the program's text. The structural verifier runs after
    every pass in any case. ``checkpoints`` is told after every pass.
    """

    passes: Sequence[Pass]
    verify_each: bool = False
    dump_after: Collection[str] = ()
    dump: Dump | None = None
    checkpoints: Checkpoints | None = None
    records: list[PassRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_order(self.passes)

    def run(self, program: Program, ctx: PassContext, start: State | None = None) -> Program:
        """The rewritten program. Errors of a pass name the pass.

        With ``start``, the state of an earlier run, it goes on there instead of at ``program``.
        """
        current, first = program.copy(), 0
        if start is not None:
            current, first, ctx.taken = start.program, len(start.records), start.taken
            self.records.extend(start.records)
        for index, item in enumerate(self.passes):
            if index < first:
                continue
            ctx.progress(item.name, index, len(self.passes))
            if self.checkpoints is not None:
                ctx.journal = self.checkpoints.journal(index)
            current = self._run_one(item, current, ctx)
            if self.checkpoints is not None:
                self.checkpoints.passed(State(current, self.records, ctx.taken))
        if self.checkpoints is not None:
            self.checkpoints.finish(State(current, self.records, ctx.taken))
        ctx.progress("done", len(self.passes), len(self.passes))
        return current

    def _run_one(self, item: Pass, current: Program, ctx: PassContext) -> Program:
        start = time.perf_counter()
        try:
            item.requires(current)
        except PassPreconditionError:
            if ctx.limit is None or ctx.taken < ctx.limit:
                raise
            # A bisected pipeline stopped before what this pass builds on: it has nothing to do.
            left = [Skip("program", "left out: the limit of rewrites was reached before")]
            self.records.append(PassRecord(item.name, {}, left, [], 0.0, None))
            return current
        error_size = self._verify(item, current, ctx)
        result = item.run(current.copy(), ctx)
        if not isinstance(result, PassResult):
            raise PassPostconditionError(
                f"pass {item.name!r} returned {type(result).__name__}, not a PassResult"
            )
        try:
            verify(result.program)
            if ctx.limit is None:  # a bisected pass stops half-way on purpose
                item.ensures(result)
        except VerificationError as error:
            raise PassPostconditionError(f"after pass {item.name!r}: {error}") from error
        record = PassRecord(
            item.name,
            dict(result.counts),
            result.skips,
            result.details,
            time.perf_counter() - start,
            error_size,
        )
        self.records.append(record)
        result.program.history.append(record.to_json())
        result.program.prune()
        if self.dump is not None and ("all" in self.dump_after or item.name in self.dump_after):
            self.dump(item.name, format_program(result.program))
        return result.program

    def _verify(self, item: Pass, before: Program, ctx: PassContext) -> float | None:
        if not (self.verify_each and item.preserves):
            return None
        wide = before.to(torch.float64)
        after = item.run(wide.copy(), dataclasses.replace(ctx, journal=Journal())).program
        error = end_to_end_error(wide, after, ctx.seed)
        if not error <= TOLERANCE:
            raise PassPostconditionError(
                f"pass {item.name!r} changed the function: relative error {error:.3g} "
                f"in float64, allowed {TOLERANCE:g}",
                hint="find the rewrite with --pass-limit, bisecting on its value",
            )
        return error
