"""Passes that targets lower with: fused operators in, not a bit out of place."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from programs import captured
from tiny import NAMES, conversations, program, runnable
from torch import fx

from mqc.host import ProgramEngine, build_prompt, decode_step, prefill
from mqc.host.prompt import Prompt
from mqc.ir import Component, ParamStore, Port, Program, TensorType
from mqc.ir.edit import aten, call, tensor_type
from mqc.passes.aifs_reorder import AifsReorder
from mqc.passes.canonicalize import Canonicalize
from mqc.passes.cleanup import Cleanup
from mqc.passes.fuse_angles import FuseAngles
from mqc.passes.fuse_attention import FuseAttention
from mqc.passes.fuse_order import FuseOrder
from mqc.passes.fuse_quantize import FuseQuantize
from mqc.passes.fuse_residual import FuseResidual
from mqc.passes.fuse_tower_attention import FuseTowerAttention
from mqc.passes.merge_linears import MergeLinears
from mqc.passes.modality_split import ModalitySplit
from mqc.passes.select_rows import SelectRows
from mqc.pipeline import default_passes
from mqc.spec import named_scheme
from mqc.testing import vqa
from mqc.testing.families import FAMILIES
from mqc.transform import Pass, PassContext, PassManager, PassRecord
from mqc.transform.equivalence import end_to_end_error, example_run

_mqc = torch.ops.mqc
LOWERING = (
    MergeLinears,
    FuseQuantize,
    FuseAttention,
    FuseResidual,
    FuseTowerAttention,
    FuseOrder,
    FuseAngles,
    SelectRows,
)


@cache
def prompts(name: str, count: int = 3) -> tuple[Prompt, ...]:
    model = runnable(name)
    rows = [vqa.messages(vqa.sample("calibration", index)) for index in range(count)]
    return tuple(build_prompt(row, model.processor, model.adapter) for row in rows)


@cache
def quantized(name: str, scheme: str = "w4a8-all") -> Program:
    chosen = named_scheme(scheme)
    return PassManager(default_passes(chosen)).run(
        program(name), PassContext(scheme=chosen, calibration=prompts(name))
    )


@cache
def stages(name: str, scheme: str = "w4a8-all") -> list[tuple[Program, PassRecord | None]]:
    """The quantized program, then after each lowering pass, with the pass's record."""
    result: list[tuple[Program, PassRecord | None]] = [(quantized(name, scheme), None)]
    for make in LOWERING:
        manager = PassManager([make()])
        result.append((manager.run(result[-1][0], PassContext()), manager.records[0]))
    return result


def run(item: Pass, program: Program) -> tuple[Program, PassRecord]:
    manager = PassManager([item])
    return manager.run(program, PassContext()), manager.records[0]


def targets(program: Program, component: str) -> list[Any]:
    return [node.target for node in program.components[component].graph.nodes]


def decoder_calls(program: Program, target: Any) -> list[fx.Node]:
    graph = program.components["decoder"].graph
    return list(graph.find_nodes(op="call_function", target=target))


@pytest.mark.parametrize("name", NAMES)
def test_every_pass_leaves_every_bit(name: str) -> None:
    """Logits of a prefill over text and visual rows and of a step on its cache are equal."""
    with torch.inference_mode():
        runs = [example_run(program, seed=4) for program, _ in stages(name)]
    for later in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], later, strict=True))
    counts = [record.counts for _, record in stages(name) if record is not None]
    separate = name != "tiny-qwen2-vl"  # its tower has one linear for q, k and v
    assert counts[0] == {"merged": 12 if separate else 8, "linears": 32 if separate else 20}
    assert counts[1]["gated"] == 4 and counts[1]["activations"] == 5
    assert counts[2] == {"layers": 4, "rotary": 4, "packed": 4}
    assert counts[3] == {"residuals": 16}
    turned = {} if separate else {"rotary": 4}
    assert counts[4] == {"attentions": 4, "packed": 4, "masked": 0} | turned
    assert counts[5] == {"inputs": 3}, "embeddings, positions, mask"
    assert counts[6] == {"angles": 1}
    # The last layer's output projection, norm, MLP, and the last norm; getitems count too.
    assert counts[7] == {"gathers": 1, "operators": 9}
    assert not any(record.skips for _, record in stages(name) if record is not None)


@pytest.mark.parametrize("name", NAMES)
def test_the_lowered_decoder_is_made_of_fused_operators(name: str) -> None:
    found = targets(stages(name)[-1][0], "decoder")
    assert found.count(_mqc.linear_w4a8.default) == 4 * 4
    assert found.count(_mqc.rms_norm_quantize.default) == 4 * 2
    assert found.count(_mqc.activation_quantize.default) == 4
    assert found.count(_mqc.attention.default) == 4
    assert found.count(_mqc.quantize_static.default) == 4, "the outputs of attention"
    assert aten.scaled_dot_product_attention.default not in found
    assert aten.silu.default not in found and _mqc.hadamard.default not in found
    ports = [port.name for port in stages(name)[-1][0].components["decoder"].inputs]
    assert ports[-9:-6] == ["past", "key_cache_0", "value_cache_0"]


@pytest.mark.parametrize("name", NAMES)
def test_the_last_layer_computes_rows_that_are_asked_for(name: str) -> None:
    decoder = stages(name)[-1][0].components["decoder"]
    rows = decoder.input("logit_index").type.shape[1]
    linears = list(decoder.graph.find_nodes(op="call_function", target=_mqc.linear_w4a8.default))
    computed = [tensor_type(node).shape[1] for node in linears]
    assert computed == ["tokens"] * 13 + [rows] * 3
    modalities = [node.args[4] for node in linears]
    assert len(set(modalities[:13])) == 1 and len(set(modalities[13:])) == 1
    assert tensor_type(modalities[-1]).shape == ("batch", rows)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("chunk", [None, 7])
def test_buffers_and_growing_caches_read_and_write_alike(chunk: int | None, padding: Any) -> None:
    """A batch of prompts of different lengths, with images and without, whole and in chunks."""
    name = "tiny-qwen2-vl"
    model = runnable(name)
    texts = [build_prompt(row, model.processor, model.adapter) for row in conversations().values()]
    batch = [prompts(name)[0], *texts[:2]]
    engines = [ProgramEngine(stages(name)[index][0]) for index in (0, -1)]
    states = [prefill(engine, batch, chunk, padding) for engine in engines]
    for _ in range(3):
        assert torch.equal(states[0].logits, states[1].logits)
        tokens = states[0].logits.argmax(-1)
        states = [decode_step(e, s, tokens) for e, s in zip(engines, states, strict=True)]
    past = states[0].cache[0].shape[2]
    capacities = {rows.shape[2] for rows in states[1].cache}
    assert len(capacities) == 1 and capacities.pop() in (64, 128, 256) and past <= 256
    for left, right in zip(states[0].cache, states[1].cache, strict=True):
        assert torch.equal(left, right[:, :, :past])


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("paper")])
def test_attention_of_every_family(name: str) -> None:
    """Float programs with AIFS, in float64."""
    wide = captured(name, torch.float64)
    passes = [Canonicalize(), ModalitySplit(), AifsReorder(), Cleanup()]
    before = PassManager(passes).run(wide, PassContext())
    after, record = run(FuseAttention(), before)
    if before.components["decoder"].has_input("past_conv_0"):  # layers with a recurrent state
        assert record.skips and "layers" not in record.counts
        assert after.facts.get("cache") != "buffer"
        after, record = run(FuseAttention(memory=True), before)
        assert record.counts["layers"] == 2 and not record.skips
        assert end_to_end_error(before, after, seed=3) <= 1e-12
        return
    assert record.counts["layers"] == 2 and not record.skips
    assert record.counts.get("rotary", 0) == (0 if name == "blip-2" else 2)
    assert end_to_end_error(before, after, seed=3) <= 1e-12
    assert after.facts["cache"] == "buffer"
    manager = PassManager([FuseOrder(), FuseAngles(), SelectRows()])
    last = manager.run(after, PassContext())
    order, angles, rows = manager.records
    assert order.counts["inputs"] >= 3 and rows.counts["gathers"] == 1
    turned = {n.args[7] for n in decoder_calls(last, _mqc.attention.default)} - {None}
    assert angles.counts.get("angles", 0) == len(turned) - len(angles.skips)
    assert not order.skips and not rows.skips
    assert end_to_end_error(before, last, seed=4) <= 1e-12


def test_more_mask_columns_than_keys_change_nothing() -> None:
    """Fixed shapes: a mask as wide as the buffers, under AIFS, gives what the exact one gives."""
    lowered = stages("tiny-llava")[-1][0]
    decoder, module = lowered.components["decoder"], lowered.module("decoder")
    generator = torch.Generator().manual_seed(0)
    tokens, past, capacity = 6, 5, 16
    values: dict[str, torch.Tensor] = {
        "inputs_embeds": torch.randn(1, tokens, 192, generator=generator),
        "modality": torch.tensor([[False, True, False, True, True, False]]),
        "position_ids": torch.arange(past, past + tokens)[None],
        "mask": torch.ones(1, 1, tokens, past + tokens).tril(past).bool(),
        "logit_index": torch.arange(tokens)[None],
        "past": torch.tensor([past]),
    }
    for port in decoder.inputs:
        if port.axis("capacity") is not None:
            _, heads, _, width = port.type.shape
            values[port.name] = torch.randn(1, int(heads), capacity, int(width))
    padded = torch.nn.functional.pad(values["mask"], (0, capacity - past - tokens))
    with torch.inference_mode():
        want = module(*(values[port.name] for port in decoder.inputs))
        values["mask"] = padded
        got = module(*(values[port.name] for port in decoder.inputs))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_linears_with_different_float_columns_are_merged() -> None:
    """The merged linear reads the union; a bias that one of them lacks is zero."""
    generator = torch.Generator().manual_seed(0)
    graph, store = fx.Graph(), ParamStore()
    kind = TensorType(("batch", "tokens", 8), torch.float32)
    x = graph.placeholder("x")
    x.meta = {"type": kind}

    def constant(name: str, value: torch.Tensor) -> fx.Node:
        store[name] = value
        node = graph.create_node("get_attr", name)
        node.meta = {"type": TensorType.of(value)}
        return node

    scale = constant("scale", torch.tensor([0.05]))
    args = (x, scale, None)
    xq = call(graph, _mqc.quantize_static.default, args, kind.with_dtype(torch.int8), x)
    results = []
    for name, rows, columns in (("a", 3, [0, 5]), ("b", 5, [5, 6]), ("c", 2, [])):
        weight = torch.randint(-127, 128, (rows, 8), generator=generator).to(torch.int8)
        terms: list[fx.Node | None] = [None, None, None]
        if columns:
            index = constant(f"{name}.columns", torch.tensor(columns))
            picked = kind.with_shape("batch", "tokens", len(columns))
            part = call(graph, aten.index_select.default, (x, 2, index), picked, x)
            split = torch.randn(rows, len(columns), generator=generator)
            bias = torch.randn(rows, generator=generator)
            terms = [constant(f"{name}.bias", bias), part, constant(f"{name}.split", split)]
        steps = constant(f"{name}.s", torch.rand(rows, generator=generator))
        full = (xq, constant(f"{name}.q", weight), steps, scale, None, *terms)
        wide = kind.with_shape("batch", "tokens", rows)
        results.append(call(graph, _mqc.linear_w8a8.default, full, wide, x))
    graph.output(tuple(results))
    roles = ("batch", "token", None)
    ports = [Port(f"y{i}", tensor_type(node), roles) for i, node in enumerate(results)]
    component = Component("layer", graph, [Port("x", kind, roles)], ports)
    before = Program({"layer": component}, store, [], {}, dialect="quantized")
    after, record = run(MergeLinears(), before)
    assert record.counts == {"merged": 1, "linears": 3}
    (linear,) = after.components["layer"].graph.find_nodes(
        op="call_function", target=_mqc.linear_w8a8.default
    )
    assert after.params[str(linear.args[6].args[2].target)].tolist() == [0, 5, 6]
    value = torch.randn(2, 4, 8, generator=generator)
    for left, right in zip(
        before.module("layer")(value), after.module("layer")(value), strict=True
    ):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


def test_what_does_not_match_is_left_with_a_reason() -> None:
    program = quantized("tiny-llava").copy()
    graph = program.components["decoder"].graph
    norm = graph.find_nodes(op="call_function", target=aten.rms_norm.default)[0]
    attention = graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    )[0]
    with graph.inserting_after(norm):
        other = graph.call_function(aten.mul.Tensor, (norm, 2.0))
    other.meta = dict(norm.meta)
    values = list(program.components["decoder"].output_node.args[0])  # type: ignore[arg-type]
    graph.output_node().args = ((*values, other),)
    program.components["decoder"].outputs.append(
        Port("extra", tensor_type(other), ("batch", "token", None))
    )
    attention.kwargs = {**attention.kwargs, "dropout_p": 0.5}
    merged, _ = run(MergeLinears(), program)
    fused, record = run(FuseQuantize(), merged)
    assert [skip.reason for skip in record.skips] == ["aten.mul.Tensor reads the value in float"]
    left, record = run(FuseAttention(), fused)
    assert [skip.reason for skip in record.skips] == ["it has dropout or an implicit causal mask"]
    assert "cache" not in left.facts and left.components["decoder"].has_input("past_key_0")


@pytest.mark.parametrize("limit", [1, 5, 9])
def test_bisecting_stops_at_a_valid_program(limit: int) -> None:
    before = quantized("tiny-internvl")
    context = PassContext(limit=limit)
    after = PassManager([make() for make in LOWERING]).run(before, context)
    assert context.taken == limit
    with torch.inference_mode():
        assert end_to_end_error(before, after) == 0.0
