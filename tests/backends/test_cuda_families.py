"""Families of the table on target cuda: each lowers, and gives what the reference gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cuda_cases
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from mqc.backends.cuda.engine import CudaEngine
from mqc.backends.cuda.graphs import call_again
from mqc.backends.cuda.kernels import ReferenceKernels
from mqc.backends.cuda.lower import lower
from mqc.host import ProgramEngine, generate_batch
from mqc.ir import Program
from mqc.testing.families import FAMILIES
from mqc.testing.families.run import engine_logits

QUICK = ("paper_slices", "gemma3", "minicpmv4_6")
"""Resamplers, masks of windows, recurrent layers; the others are marked slow."""


UNRECORDED = {"item", "_local_scalar_dense", "nonzero", "masked_select", "unique"}


class NoWaiting(TorchDispatchMode):
    """What a CUDA graph cannot record: numbers that the host reads, shapes that values decide."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in UNRECORDED, name
        return func(*args, **(kwargs or {}))


class Kernels(ReferenceKernels):
    """The definitions; that of attention reads ``past`` on the host, which no kernel does."""

    def attention(self, *args: Any) -> torch.Tensor:
        """Unwatched."""
        with _disable_current_modes():
            return super().attention(*args)


def recorded(step: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
    """Calls again, and refuses what could not be recorded."""

    def watched() -> Any:
        with NoWaiting():
            return step()

    return call_again(watched)


def compare(program: Program, prompts: list[Any]) -> CudaEngine:
    """All rows of a padded batch in chunks, then greedy tokens, from both targets."""
    reference = ProgramEngine(program)
    cuda = CudaEngine(lower(program, "f32")[0], Kernels(), capacity=64, record=recorded)
    how = {"padding": "left", "chunk": 9}
    for found, wanted in zip(
        engine_logits(cuda, prompts, **how), engine_logits(reference, prompts, **how), strict=True
    ):
        assert found.equal(wanted)
    ours, theirs = (
        generate_batch(engine, prompts, max_new_tokens=5, stop=()) for engine in (cuda, reference)
    )
    assert [item.tokens for item in ours] == [item.tokens for item in theirs]
    return cuda


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in sorted(FAMILIES)],
)
def test_family(name: str) -> None:
    program, prompts = cuda_cases.quantized_family(name)
    compare(program, prompts)
    assert lower(program, "bf16")[0].dtype == torch.bfloat16


def test_memory_of_recurrent_layers_follows_its_sequences() -> None:
    """Slots taken again, three sequences in a bucket of four, buffers that grow under way: steps
    that rewrite the memory in place give what steps without a slot give."""
    program, prompts = cuda_cases.quantized_family("minicpmv4_6")
    reference = ProgramEngine(program)
    cuda = CudaEngine(lower(program, "f32")[0], Kernels(), capacity=16, record=recorded)
    assert cuda.greedy
    # The memory starts and stays in float32 whatever the rows are.
    kinds = {p.name: p.type.dtype for p in lower(program, "bf16")[0].components["decoder"].inputs}
    assert kinds["past_state_0"] == torch.float32 and kinds["past_conv_0"] == torch.bfloat16
    for batch in (prompts[:1], prompts[:3], prompts[1:4], prompts[2:3]):
        count = 30 if len(batch) == 1 else 4
        ours, theirs = (
            generate_batch(engine, batch, max_new_tokens=count, stop=())
            for engine in (cuda, reference)
        )
        assert [item.tokens for item in ours] == [item.tokens for item in theirs]


def test_experts_compute_their_own_rows() -> None:
    """Slices by modality: linears without a row, in prompts of text and in recorded steps."""
    program, prompts = cuda_cases.quantized_family("paper_experts", ("aifs=true",))
    cuda = compare(program, prompts)
    assert cuda.facts["kv_order"] == "aifs" and cuda.greedy
    sliced = [
        port
        for node in cuda.program.components["decoder"].graph.nodes
        for port in getattr(node.meta.get("type"), "shape", ())
        if port == "visual_most"
    ]
    assert sliced
