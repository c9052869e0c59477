"""The pass infrastructure: contracts are called with the right program, and are enforced."""

from __future__ import annotations

import pytest
import torch
from programs import tiny_program

from mqc.errors import PassPostconditionError, PassPreconditionError, UsageError
from mqc.ir import Program
from mqc.ir.edit import aten, set_param
from mqc.transform import Pass, PassContext, PassManager, PassResult, Skip


class Scale(Pass):
    """Multiply the head's weight."""

    name = "scale"
    preserves = True

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program, skips=[Skip("there", "because")])
        head = program.components["decoder"].output_value("logits")
        if ctx.take():
            weight = program.params[str(head.args[1].target)]  # type: ignore[union-attr]
            set_param(program, head, 1, weight * self.factor)
            result.counts["scaled"] += 1
        return result


class Later(Scale):
    """Must come after scale."""

    name = "later"
    after = ("scale",)


def test_input_program_is_never_changed() -> None:
    program = tiny_program()
    before = dict(program.params)
    PassManager([Scale(2.0)]).run(program, PassContext())
    assert dict(program.params) == before and not program.history


def test_ensures_sees_the_result() -> None:
    seen: list[Program] = []

    class Checked(Scale):
        """Checks."""

        def ensures(self, result: PassResult) -> None:
            seen.append(result.program)
            raise PassPostconditionError("no")

    program = tiny_program()
    with pytest.raises(PassPostconditionError, match="no"):
        PassManager([Checked(2.0)]).run(program, PassContext())
    assert seen[0] is not program and "head.weight~1" in seen[0].params


def test_requires_runs_first() -> None:
    class Picky(Scale):
        """Never fits."""

        def requires(self, program: Program) -> None:
            raise PassPreconditionError("not this one")

        def run(self, program: Program, ctx: PassContext) -> PassResult:
            raise AssertionError("ran")

    with pytest.raises(PassPreconditionError, match="not this one"):
        PassManager([Picky()]).run(tiny_program(), PassContext())


def test_order_is_checked_when_built() -> None:
    PassManager([Scale(), Later()])
    PassManager([Later()])
    with pytest.raises(UsageError, match="'later' must come after 'scale'"):
        PassManager([Later(), Scale()])


def test_verify_each_proves_or_refuses() -> None:
    manager = PassManager([Scale(1.0)], verify_each=True)
    result = manager.run(tiny_program(), PassContext())
    assert manager.records[0].error == 0.0 and result.history[0]["verified"] is True
    with pytest.raises(PassPostconditionError, match="changed the function"):
        PassManager([Scale(1.001)], verify_each=True).run(tiny_program(), PassContext())
    PassManager([Scale(1.001)]).run(tiny_program(), PassContext())


def test_a_broken_graph_is_refused() -> None:
    class Breaks(Scale):
        """Leaves an untyped node."""

        def run(self, program: Program, ctx: PassContext) -> PassResult:
            program.components["decoder"].output_value("logits").meta.clear()
            return PassResult(program)

    with pytest.raises(PassPostconditionError, match="after pass 'scale'.*no type"):
        PassManager([Breaks()]).run(tiny_program(), PassContext())


def test_limit_counts_rewrites_over_all_passes() -> None:
    manager = PassManager([Scale(2.0), Later(3.0)])
    manager.run(tiny_program(), PassContext(limit=1))
    assert [dict(r.counts) for r in manager.records] == [{"scaled": 1}, {}]


def test_a_pass_that_builds_on_what_the_limit_left_undone_is_left_out() -> None:
    class Builds(Later):
        """Needs what no pass made."""

        def requires(self, program: Program) -> None:
            raise PassPreconditionError("nothing to build on")

    manager = PassManager([Scale(2.0), Builds(3.0)])
    result = manager.run(tiny_program(), PassContext(limit=1))
    assert "limit" in manager.records[1].skips[0].reason and len(result.history) == 1
    for limit in (None, 2):
        with pytest.raises(PassPreconditionError, match="nothing to build on"):
            PassManager([Scale(2.0), Builds(3.0)]).run(tiny_program(), PassContext(limit=limit))


def test_history_dumps_and_skips() -> None:
    dumps: dict[str, str] = {}
    manager = PassManager([Scale(2.0), Later(1.0)], dump_after=["scale"], dump=dumps.__setitem__)
    result = manager.run(tiny_program(), PassContext())
    assert list(dumps) == ["scale"] and "component decoder(" in dumps["scale"]
    assert result.history[0] == {
        "pass": "scale",
        "counts": {"scaled": 1},
        "skips": [{"where": "there", "reason": "because"}],
    }
    assert "head.weight" not in result.params, "replaced parameters are forgotten"


def test_equal_seeds_give_equal_programs() -> None:
    from mqc.ir import format_program
    from mqc.passes.canonicalize import Canonicalize
    from mqc.passes.fuse_norm import FuseNorm
    from mqc.passes.hadamard_fuse import HadamardFuse

    def once(seed: int) -> tuple[str, torch.Tensor]:
        passes = [Canonicalize(), FuseNorm(), HadamardFuse()]
        program = PassManager(passes).run(tiny_program(), PassContext(seed=seed))
        head = program.components["decoder"].output_value("logits")
        assert head.target == aten.linear.default
        return format_program(program), program.params[str(head.args[1].target)]  # type: ignore[union-attr]

    text, weight = once(3)
    again, same = once(3)
    _, other = once(4)
    assert text == again and torch.equal(weight, same) and not torch.equal(weight, other)
