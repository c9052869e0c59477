"""Does a rewritten program compute the same function? Asked end to end, in float64.

Inner values may differ (a rotated residual stream is another basis), so what is compared is what
the model is for: logits of a prefill over visual and text rows, then of a decode step on the
cache it left.
"""

from __future__ import annotations

import torch

from mqc.ir import Component, Port, Program
from mqc.ir.symbols import ExampleSizes, evaluate, evaluate_shape
from mqc.ir.types import is_cache
from mqc.numerics.stats import relative_error

SIZES = ExampleSizes(3, batch=1, past=0)
"""The sizes compared: one prompt, three blocks of patches or three tiles."""


def random_input(port: Port, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """A random tensor that fits ``port``: normal floats, small non-negative integers, True."""
    shape = evaluate_shape(port.type.shape, SIZES)
    if port.type.dtype.is_floating_point:
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
    if port.type.dtype == torch.bool:
        return torch.ones(shape, dtype=torch.bool)
    return torch.randint(0, 3, shape, dtype=port.type.dtype, generator=generator)


def example_run(program: Program, seed: int = 0, text: int = 5) -> list[torch.Tensor]:
    """Run all components once on random inputs made from ``seed``; return the logits.

    Rows of the decoder's input: ``text`` token rows, then the rows of each other source, then
    ``text`` token rows again, so that modalities interleave. Returns ``[prefill, decode]`` logits
    of shape [1, rows, vocab].
    """
    generator = torch.Generator().manual_seed(seed)
    decoder = program.components["decoder"]
    visual, side = _run_sources(program, generator)
    ids = torch.randint(0, int(program.facts["vocab_size"]), (1, 2 * text + 1), generator=generator)
    rows = program.module("embed")(ids)[0][0]
    embeds = torch.cat([rows[:text], *visual, rows[text : 2 * text]])[None]
    more = {
        name: torch.nn.functional.pad(value, (0, 0, text, text))[None]
        for name, value in side.items()
    }
    is_visual = torch.zeros(1, embeds.shape[1], dtype=torch.bool)
    is_visual[0, text : embeds.shape[1] - text] = True
    module = program.module("decoder")
    cache = [
        torch.zeros(evaluate_shape(port.type.shape, SIZES), dtype=port.type.dtype)
        for port in decoder.inputs
        if is_cache(port)
    ]
    prefill = _decode(decoder, module, embeds, 0, cache, is_visual, more)
    last, past = rows[None, -1:], embeds.shape[1]
    none = {name: torch.zeros_like(last) for name in more}
    step = _decode(decoder, module, last, past, list(prefill[1:]), is_visual[:, :1], none)
    return [prefill[0], step[0]]


def _run_sources(
    program: Program, generator: torch.Generator
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Visual rows [n, hidden]: those that stand for tokens, and those of the decoder's further
    inputs by name. Each component runs once."""
    values: dict[str, tuple[torch.Tensor, ...]] = {}
    rows, side = [], {}
    for link in program.links:
        if link.target[0] != "decoder" or link.source[0] == "embed":
            continue
        component = program.components[link.source[0]]
        if component.name not in values:
            inputs = [random_input(port, program.dtype, generator) for port in component.inputs]
            values[component.name] = program.module(component.name)(*inputs)
        index = [port.name for port in component.outputs].index(link.source[1])
        value = values[component.name][index]
        value = value.reshape(-1, value.shape[-1])
        if link.target[1] == "inputs_embeds":
            rows.append(value)
        else:
            side[link.target[1]] = value
    return rows, side


def _decode(
    decoder: Component,
    module: torch.nn.Module,
    embeds: torch.Tensor,
    past: int,
    cache: list[torch.Tensor],
    is_visual: torch.Tensor,
    more: dict[str, torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """One decoder call for ``embeds`` [1, tokens, hidden] after ``past`` cached tokens."""
    tokens = embeds.shape[1]
    positions = torch.arange(past, past + tokens)
    back = positions[:, None] - torch.arange(past + tokens)[None, :]
    # One mask a kind of layer, each with another window, as far back as 3, 5, ... tokens.
    kinds = decoder.input("mask").type.shape[1] if decoder.has_input("mask") else 1
    windows = [past + tokens, *range(3, 2 * int(kinds), 2)]
    masks = torch.stack([(back >= 0) & (back < window) for window in windows])
    if past == 0:  # visual rows see each other both ways, as some families have it
        masks = masks | (is_visual[0, :, None] & is_visual[0, None, :])
    values = {
        "inputs_embeds": embeds,
        "mask": masks[None],
        "logit_index": torch.arange(tokens)[None],
        "modality": is_visual,
        **more,
    }
    inputs = []
    remaining = iter(cache)
    for port in decoder.inputs:
        if is_cache(port):
            inputs.append(next(remaining))
        elif port.name == "past":
            inputs.append(torch.tensor([past]))
        elif port.name == "position_ids":
            shape = [tokens if role == "token" else 1 for role in port.axes]
            if port.axes[0] is None:
                shape[0] = evaluate(port.type.shape[0], SIZES)
            inputs.append(positions.expand(shape).contiguous())
        else:
            inputs.append(values[port.name])
    result: tuple[torch.Tensor, ...] = module(*inputs)
    return result


@torch.inference_mode()
def end_to_end_error(before: Program, after: Program, seed: int = 0) -> float:
    """Largest relative error (max abs difference over max abs) of the logits.

    Both programs compute in their own dtype; for a proof give float64 programs.
    """
    left = example_run(before, seed)
    right = example_run(after, seed)
    return max(relative_error(b, a) for a, b in zip(left, right, strict=True))
