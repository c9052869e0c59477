"""Steps of decoding with everything bound once: equal to calls that bind anew."""

from __future__ import annotations

import native_library as native
import pytest
import tiny
import torch

from mqc.backends.onnx import OnnxTarget
from mqc.backends.onnx.emit import emit
from mqc.backends.onnx.session import OnnxEngine
from mqc.host import KeyTable
from mqc.host.cache import SMALLEST

pytestmark = native.needs_library
MODEL, BATCH = "tiny-qwen2-vl", 2


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> OnnxEngine:
    lowered = OnnxTarget().lower(tiny.program(MODEL))
    folder = tmp_path_factory.mktemp("files")
    emit(lowered, folder)
    return OnnxEngine(folder, lowered.facts, threads=1)


def test_bound_steps_equal_calls(engine: OnnxEngine) -> None:
    """Over the end of a buffer, with a hole in the keys of one sequence.

    A call that asks for the row twice is none of the bound ones.
    """
    generator = torch.Generator().manual_seed(0)
    first = SMALLEST - 3
    ids = torch.randint(0, 50, (BATCH, first), generator=generator)
    valid = torch.ones(BATCH, first, dtype=torch.bool)
    valid[1, first - 4 :] = False
    none = torch.zeros(BATCH, first, dtype=torch.bool)
    results = []
    for rows in (1, 2):
        keys, cache = KeyTable(BATCH), engine.empty_cache(BATCH)
        index = torch.zeros(BATCH, rows, dtype=torch.int64)
        positions = torch.arange(first).expand(3, BATCH, -1).contiguous()
        mask = keys.mask(valid)
        _, cache = engine.decoder(engine.embed(ids), positions, mask, index, none, cache)
        keys.append(none, valid, engine.facts.get("kv_order"))
        found = []
        for step in range(6):
            token = torch.full((BATCH, 1), step + 7)
            one, visual = torch.ones(BATCH, 1).bool(), torch.zeros(BATCH, 1).bool()
            positions = torch.full((3, BATCH, 1), first + step)
            mask = keys.mask(one)
            logits, cache = engine.decoder(
                engine.embed(token), positions, mask, index, visual, cache
            )
            keys.append(visual, one, engine.facts.get("kv_order"))
            found.append(logits[:, 0])
        assert cache[0].shape()[2] == 2 * SMALLEST
        assert (cache.step is None) == (rows == 2)
        results.append(found)
    for bound, plain in zip(*results, strict=True):
        assert torch.equal(bound, plain)
    assert not torch.equal(results[0][0], results[0][1]), "a step's logits are its own"
