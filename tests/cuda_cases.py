"""Quantized tiny models lowered for target cuda, made once a test process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import tiny
import torch
from programs import captured

from mqc.backends.cuda.lower import lower
from mqc.capture import adapter_for
from mqc.config import make_recipe
from mqc.host import Prompt, decode_step, prefill
from mqc.host.engine import Engine
from mqc.ir import Program
from mqc.pipeline import make_passes, pass_names
from mqc.testing import vqa
from mqc.testing.families import FAMILIES, build_family
from mqc.testing.families.run import family_prompt, family_samples
from mqc.transform import PassContext, PassManager

QUICK = [
    f"{part}.weights.{what}"
    for part in ("vision", "decoder")
    for what in ("method=rtn", "clip=false")
]
"""Rounding weights to nearest takes a second; GPTQ is not what is tested here."""


WEIGHT_ONLY = (
    *(
        f"{part}.activations.{what}"
        for part in ("vision", "decoder")
        for what in ("bits=none", "per_modality=false")
    ),
    "quantize_head=true",
    "quantize_embeddings=true",
)
"""Integer weights with float activations everywhere, as in the shipped recipe weight-only."""


@cache
def quantized(name: str, overrides: tuple[str, ...] = (), target: str = "cuda") -> Program:
    """An embedded model after the passes of w4a8 as ``target`` wants them."""
    run = tiny.runnable(name)
    plan = make_recipe("w4a8", overrides=[*QUICK, *overrides], target=target).scheme
    rows = (vqa.messages(vqa.sample("calibration", index)) for index in range(4))
    context = PassContext(plan, [run.prompt(messages) for messages in rows], seed=0)
    passes = make_passes(pass_names(plan), plan)
    return PassManager(passes).run(tiny.program(name).copy(), context)


@cache
def quantized_family(name: str, overrides: tuple[str, ...] = ()) -> tuple[Program, list[Prompt]]:
    """A family's random model after the passes of w4a8 for cuda, and prompts for it."""
    family, (model, _) = FAMILIES[name], build_family(name)
    adapter = adapter_for(model.config)
    plan = make_recipe("w4a8", overrides=[*QUICK, *overrides], target="cuda").scheme
    data, prompts = (
        [family_prompt(adapter, sample) for sample in samples]
        for samples in (
            family_samples(family, model.config, torch.float32, 4, seed=seed) for seed in (1, 0)
        )
    )
    passes = make_passes(pass_names(plan), plan)
    program = captured(name, torch.float64).to(torch.float32)  # other tests have captured it, too
    return PassManager(passes).run(program, PassContext(plan, data, seed=0)), prompts


@cache
def lowered(name: str, dtype: str = "f32", overrides: tuple[str, ...] = ()) -> Program:
    return lower(quantized(name, overrides), dtype)[0]


def logits(
    engine: Engine,
    name: str,
    chunk: int | None = None,
    padding: str = "right",
    steps: Sequence[int] = (11, 12),
    kinds: Sequence[str] | None = None,
) -> torch.Tensor:
    """Logits [1 + steps, B, vocab] after a batch of all kinds of prompts, then of fixed tokens."""
    texts = tiny.conversations()
    prompts = [tiny.runnable(name).prompt(texts[kind]) for kind in kinds or texts]
    state = prefill(engine, prompts, chunk, padding)  # type: ignore[arg-type]
    found = [state.logits]
    for token in steps:
        state = decode_step(engine, state, torch.full((len(prompts),), token))
        found.append(state.logits)
    return torch.stack(found)
