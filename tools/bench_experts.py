"""Time a mixture of experts on this CPU: every expert for every token, or for its own rows.

    python tools/bench_experts.py --prepare       # make the models, once (minutes)
    python tools/bench_experts.py                 # time them, taking turns

A decoder of four layers with random weights, scheme w4a8 (weights rounded to nearest), lowered for
target onnx without the pass route-experts and with it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import Qwen3VLMoeConfig

from mqc.backends.onnx.emit import emit
from mqc.backends.onnx.lower import lower
from mqc.backends.onnx.session import OnnxEngine
from mqc.capture import adapter_for, capture
from mqc.host import Engine, Prompt, make_batch, merge
from mqc.host.engine import read
from mqc.passes.lowering import fuse
from mqc.pipeline import default_passes
from mqc.spec import ComponentScheme, WeightSpec, named_scheme
from mqc.testing.families import FAMILIES
from mqc.testing.families.frame import Family, build
from mqc.testing.families.run import family_prompt, family_samples
from mqc.transform import PassContext, PassManager

FAMILY = "qwen3_vl_moe"
FORMS = {"dense": ("route-experts",), "routed": ()}


def model_config(args: argparse.Namespace) -> Qwen3VLMoeConfig:
    config = FAMILIES[FAMILY].config()
    text = config.text_config
    text.hidden_size, text.moe_intermediate_size = args.hidden, args.intermediate
    text.num_experts, text.num_experts_per_tok = args.experts, args.choices
    text.num_hidden_layers, text.mlp_only_layers = args.layers, []
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = args.hidden // 64, 4, 64
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [12, 10, 10]}
    text.max_position_embeddings = 4096
    config.vision_config.out_hidden_size = args.hidden
    return config


def prepare(folder: Path, args: argparse.Namespace) -> None:
    config = model_config(args)
    known = FAMILIES[FAMILY]
    family = Family(lambda: config, known.sizes, known.image, known.extras)
    model, _ = build(family)
    adapter = adapter_for(config)
    samples = family_samples(family, config, torch.float32, 4)
    prompts = [family_prompt(adapter, sample) for sample in samples]
    scheme = named_scheme("w4a8")
    decoder = scheme.component("decoder")
    rounded = ComponentScheme(WeightSpec(bits=4), decoder.activations)
    scheme = scheme.replace(components={**scheme.components, "decoder": rounded})
    program = capture(model)
    program = PassManager(default_passes(scheme)).run(program, PassContext(scheme, prompts))
    for name, left_out in FORMS.items():
        lowered = lower(fuse(program, left_out))[0]
        (folder / name).mkdir(parents=True, exist_ok=True)
        emit(lowered, folder / name)
        (folder / name / "facts.json").write_text(json.dumps(lowered.facts))


def prompt_of(tokens: int) -> Prompt:
    ids = torch.arange(tokens) % 40 + 20
    positions = torch.arange(tokens).expand(3, -1)
    return Prompt(ids, torch.zeros(tokens, dtype=torch.bool), positions, tokens, [])


@torch.inference_mode()
def run_once(engine: Engine, tokens: int, steps: int) -> tuple[float, float]:
    """Seconds to read a prompt, and seconds a token written behind it."""
    prompt = prompt_of(tokens)
    batch = make_batch([prompt], "right")
    last = torch.tensor([[tokens - 1]])
    start = time.perf_counter()
    _, cache, _ = read(engine, merge(engine, [prompt], batch), batch, last)
    reading = time.perf_counter() - start
    times = []
    for step in range(steps):
        place = tokens + step
        embedded = engine.embed(torch.tensor([[20 + step]]))
        mask = torch.ones(1, 1, 1, place + 1, dtype=torch.bool)
        positions = torch.full((3, 1, 1), place)
        text, only = torch.zeros(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.int64)
        start = time.perf_counter()
        _, cache = engine.decoder(embedded, positions, mask, only, text, cache)
        times.append(time.perf_counter() - start)
    return reading, statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prepare", action="store_true", help="make the models")
    parser.add_argument("--folder", type=Path, default=Path("out/bench-experts"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=16, help="tokens written a round")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of the prompt")
    sizes = (("hidden", 1024), ("intermediate", 512), ("experts", 32), ("choices", 4))
    for name, value in (*sizes, ("layers", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    if args.prepare:
        prepare(args.folder, args)
        return
    engines = {}
    for name in FORMS:
        folder = args.folder / name
        start = time.perf_counter()
        engines[name] = OnnxEngine(folder, json.loads((folder / "facts.json").read_text()))
        opened = time.perf_counter() - start
        size = (folder / "decoder.onnx").stat().st_size
        print(f"{name}: decoder opened in {opened:.2f} s, graph {size / 1e6:.2f} MB")
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in FORMS}
    for _ in range(args.rounds + 1):
        for name, engine in engines.items():
            results[name].append(run_once(engine, args.tokens, args.steps))
    medians = {
        name: [statistics.median(part) * 1e3 for part in zip(*rows[1:], strict=True)]
        for name, rows in results.items()
    }
    for place, what in enumerate((f"prompt of {args.tokens} tokens", "one token")):
        dense, routed = medians["dense"][place], medians["routed"][place]
        print(f"{what}: dense {dense:.2f} ms, routed {routed:.2f} ms, {dense / routed:.2f}x")


if __name__ == "__main__":
    main()
