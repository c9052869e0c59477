"""The walk over many samples: order, visitors, freed values, the scratch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from programs import tiny_program
from torch import fx

import mqc.calib.walk
from mqc.calib.walk import Values, walk
from mqc.ir import Scratch

aten = torch.ops.aten


def seen(scratch: Scratch | None, count: int = 3) -> dict[str, list[torch.Tensor]]:
    """What a visitor sees at every linear of the tiny decoder."""
    program = tiny_program()
    program.params.scratch = scratch
    component = program.components["decoder"]
    generator = torch.Generator().manual_seed(1)
    shape = [
        size if isinstance(size, int) else {"batch": 1, "tokens": 5}.get(str(size), 2)
        for size in component.input("inputs_embeds").type.shape
    ]
    samples = [
        {
            port.name: torch.randn(shape, generator=generator)
            if port.name == "inputs_embeds"
            else torch.zeros(1, 2, dtype=torch.int64)
            for port in component.inputs
        }
        for _ in range(count)
    ]
    found: dict[str, list[torch.Tensor]] = {}

    def visit(node: fx.Node, values: Values) -> None:
        if node.target == aten.linear.default:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            found[node.name] = values(source)

    walk(program, component, samples, visit)
    return found


def test_large_values_go_to_the_scratch_and_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = seen(None)
    roomy = seen(Scratch(tmp_path, smallest=1))
    monkeypatch.setattr(mqc.calib.walk, "_memory", lambda: 0)
    short = seen(Scratch(tmp_path, smallest=1))
    assert plain.keys() == short.keys() and len(plain) >= 3
    for name, values in plain.items():
        for a, b, c in zip(values, short[name], roomy[name], strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)
    kept = [v.untyped_storage().filename for values in short.values() for v in values]
    held = [v.untyped_storage().filename for values in roomy.values() for v in values]
    assert any(kept) and not any(held)
    assert not list(tmp_path.iterdir())
