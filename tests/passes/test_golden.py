"""The text of a small program after every pass, compared with files under review.

After a wanted change: ``python -m pytest tests/passes/test_golden.py --update-golden``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from programs import tiny_program

from mqc.ir import Program, format_program
from mqc.passes.cleanup import Cleanup
from mqc.passes.fuse_norm import FuseNorm
from mqc.passes.hadamard_fuse import HadamardFuse
from mqc.passes.hadamard_online import HadamardOnline
from mqc.passes.modality_split import ModalitySplit
from mqc.passes.quantize_weights import QuantizeWeights
from mqc.passes.rms_suppress import RmsSuppress
from mqc.spec import ComponentScheme, Scheme, WeightSpec
from mqc.transform import PassContext, PassManager

GOLDEN = Path(__file__).parent.parent / "golden"


def program() -> Program:
    """The hand-made program with a feed-forward whose mean column dominates when rotated."""
    made = tiny_program()
    made.dialect = "canonical"
    made.params["down.weight"] = made.params["down.weight"] * 0.1 + 1.0
    return made


@pytest.mark.parametrize("count", range(8))
def test_text_after_each_pass(count: int, request: pytest.FixtureRequest) -> None:
    weights = Scheme(
        "golden",
        {
            "vision": ComponentScheme(WeightSpec(bits=8)),
            "decoder": ComponentScheme(WeightSpec(bits=4)),
        },
    )
    passes = [
        FuseNorm(),
        HadamardFuse(),
        HadamardOnline(),
        RmsSuppress(),
        ModalitySplit(),
        QuantizeWeights(weights),
        Cleanup(),
    ][:count]
    result = PassManager(passes).run(program(), PassContext())
    name = f"{count}-{passes[-1].name if passes else 'start'}.txt"
    text = format_program(result)
    path = GOLDEN / name
    if request.config.getoption("--update-golden"):
        path.write_text(text)
    assert text == path.read_text(), f"{name} differs; review, then run with --update-golden"


def test_golden_files_are_all_in_use() -> None:
    assert len(list(GOLDEN.glob("?-*.txt"))) == 8
