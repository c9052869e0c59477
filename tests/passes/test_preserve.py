"""Every function-preserving pass, on every family: logits equal in float64, end to end."""

from __future__ import annotations

import pytest
import torch
from programs import NAMES, captured

from mqc.ir.edit import aten
from mqc.passes.aifs_reorder import AifsReorder
from mqc.passes.canonicalize import Canonicalize
from mqc.passes.cleanup import Cleanup
from mqc.passes.fuse_norm import FuseNorm
from mqc.passes.hadamard_fuse import HadamardFuse
from mqc.passes.hadamard_online import HadamardOnline
from mqc.passes.modality_split import ModalitySplit
from mqc.passes.rms_suppress import RmsSuppress
from mqc.transform import PassContext, PassManager
from mqc.transform.equivalence import end_to_end_error


@pytest.mark.parametrize("name", NAMES)
def test_float_passes_leave_the_logits_unchanged(name: str) -> None:
    """All of them in one pipeline; ``verify_each`` compares around each (relative 1e-10)."""
    passes = [
        Canonicalize(),
        FuseNorm(),
        HadamardFuse(),
        HadamardOnline(),
        RmsSuppress(threshold=1.0001),  # low, so that columns are split
        ModalitySplit(),
        AifsReorder(),
        Cleanup(),
    ]
    manager = PassManager(passes, verify_each=True)
    program = captured(name)
    result = manager.run(program, PassContext(seed=5))
    assert all(r.error is not None and r.error <= 1e-10 for r in manager.records)
    counts = {r.name: dict(r.counts) for r in manager.records}
    layers = {"qwen2_vl": 2, "llava": 2, "internvl": 2}[name]
    assert counts["canonicalize"]["rms_norms"] == 2 * layers + 1
    assert counts["canonicalize"]["patch_linears"] == 1
    assert counts["hadamard-fuse"]["streams"] == 2 and counts["hadamard-fuse"]["online"] == 0
    assert counts["hadamard-online"]["online"] == 2 + 3
    assert counts["rms-suppress"]["layers"] > 0
    assert counts["modality-split"] == {"inputs": 1, "mixed_linears": 7 * layers}
    assert counts["aifs-reorder"]["inputs"] == 4
    # From the captured program to the end, without the passes' own float64 copies.
    wide = manager.run(captured(name).to(torch.float64), PassContext(seed=5))
    assert end_to_end_error(captured(name).to(torch.float64), wide, seed=9) <= 1e-10
    assert result.dialect == "canonical"


@pytest.mark.parametrize("name", NAMES)
def test_no_gain_and_no_layer_norm_is_left_on_a_rotated_stream(name: str) -> None:
    passes = [Canonicalize(), FuseNorm(), HadamardFuse()]
    result = PassManager(passes).run(captured(name), PassContext())
    for component in result:
        for node in component.graph.nodes:
            assert node.target != aten.layer_norm.default
            if node.target == aten.rms_norm.default:
                assert node.args[2] is None


def test_rotation_really_mixes_channels() -> None:
    """An outlier channel of the embedding table is spread over all channels."""
    program = captured("llava").copy()
    name = next(iter(program.components["embed"].param_names()))
    table = program.params[name].clone()
    table[:, 7] *= 100.0
    program.params[name] = table
    result = PassManager([Canonicalize(), FuseNorm(), HadamardFuse()]).run(program, PassContext())
    (rotated,) = result.components["embed"].param_names()

    def peak(x: torch.Tensor) -> float:
        energy = x.square().mean(0)
        return float(energy.max() / energy.mean())

    assert peak(table) > 20 and peak(result.params[rotated]) < 2.5


def test_tied_embeddings_untie_themselves() -> None:
    program = captured("qwen2_vl")
    assert program.components["embed"].param_names() & program.components["decoder"].param_names()
    result = PassManager([Canonicalize(), FuseNorm(), HadamardFuse()]).run(program, PassContext())
    shared = result.components["embed"].param_names() & result.components["decoder"].param_names()
    assert not shared


@pytest.mark.parametrize("limit", [0, 1, 7, 40])
def test_a_limited_pipeline_still_computes_the_function(limit: int) -> None:
    """Bisecting works only if stopping after any rewrite leaves a valid program."""
    program = captured("internvl").to(torch.float64)
    passes = [Canonicalize(), FuseNorm(), HadamardFuse(), HadamardOnline()]
    result = PassManager(passes).run(program, PassContext(limit=limit))
    assert end_to_end_error(program, result) <= 1e-10
