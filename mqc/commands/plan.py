"""``mqc plan``: what a compile would do, and what would come out, without weights."""

from __future__ import annotations

from typing import Annotated

import typer

from mqc.commands import _common as common
from mqc.config import make_recipe

COLUMNS = (
    "component",
    "parameters>",
    "linears>",
    "quantized>",
    "two scales>",
    "online Hadamard",
    "float32>",
    "compiled>",
    "activations>",
)


def plan_command(
    model: common.Model,
    scheme: common.SchemeName = None,
    recipe: common.RecipeSource = None,
    sets: common.Sets = None,
    tokens: Annotated[int, typer.Option(min=1, help="Prompt length of the forecast.")] = 1024,
    image_tokens: Annotated[
        int, typer.Option(min=1, help="Visual tokens of the image of the forecast.")
    ] = 256,
    revision: common.Revision = None,
    trust_remote_code: common.Trust = False,
    as_json: common.Json = False,
) -> None:
    """Forecast a compile from config.json alone: rotations, scales, memory. Reads no weights.

    Example: mqc plan Qwen/Qwen2-VL-7B-Instruct --scheme w4a8 --tokens 4096
    """
    chosen = make_recipe(scheme, recipe, list(sets or [])).scheme
    from mqc import api
    from mqc.artifact import format_size

    found = api.plan(
        model,
        chosen,
        tokens=tokens,
        image_tokens=image_tokens,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        common.print_json(found.to_json())
        return
    console = common.stdout()
    console.print(f"[bold]{found.name}[/]  {chosen.name}: {chosen.describe()}")
    for stream in found.streams:
        console.print(
            f"  rotates a stream of {stream['width']} channels in "
            f"{', '.join(stream['components'])}: {stream['writers']} writers, "
            f"{stream['readers']} readers, {stream['online']} rotations online",
            markup=False,
        )
    if found.value_heads:
        console.print(f"  rotates the value heads of {found.value_heads} attentions", markup=False)
    rows = [
        [
            part.name,
            f"{part.parameters / 1e6:.1f} M",
            part.linears,
            part.quantized,
            part.mixed,
            ", ".join(f"{count} x {name}" for name, count in part.hadamards.items()) or "-",
            format_size(part.float_bytes),
            format_size(part.compiled_bytes),
            format_size(part.activation_bytes),
        ]
        for part in found.components
    ]
    title = f"a prompt of {found.tokens} tokens, images of {found.image_tokens}"
    console.print(common.table(title, COLUMNS, rows))
    cache = format_size(found.kv_bytes_per_token * found.tokens)
    console.print(
        f"  weights {format_size(found.compiled_bytes)} "
        f"(float32 {format_size(found.float_bytes)}), "
        f"KV cache {cache}; planned in {found.seconds:.1f} s",
        markup=False,
    )
    for skip in found.skips:
        console.print(f"  skipped {skip['where']}: {skip['reason']}", markup=False)
