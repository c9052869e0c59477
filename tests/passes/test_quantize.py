"""Weights and activations to integers: what is quantized, with which scales, how well."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from tiny import NAMES, conversations, program, runnable

from mqc.calib.samples import component_samples
from mqc.calib.walk import walk
from mqc.errors import CalibrationError, MqcError, PassPreconditionError
from mqc.host import ProgramEngine, build_prompt, prefill
from mqc.host.prompt import Prompt
from mqc.ir import Program
from mqc.passes.aifs_reorder import AifsReorder
from mqc.passes.cleanup import Cleanup
from mqc.passes.modality_split import ModalitySplit
from mqc.passes.quantize_weights import QuantizeWeights
from mqc.passes.rms_suppress import RmsSuppress
from mqc.passes.static_scales import StaticScales
from mqc.pipeline import default_passes
from mqc.spec import ActivationSpec, ComponentScheme, Scheme, WeightSpec, named_scheme
from mqc.testing import vqa
from mqc.transform import PassContext, PassManager

_mqc = torch.ops.mqc


@cache
def prompts(name: str, count: int = 6) -> tuple[Prompt, ...]:
    model = runnable(name)
    rows = [vqa.messages(vqa.sample("calibration", index)) for index in range(count)]
    return tuple(build_prompt(row, model.processor, model.adapter) for row in rows)


@cache
def quantized(name: str, scheme: str, aifs: bool = True) -> Program:
    chosen = named_scheme(scheme).replace(aifs=aifs)
    return PassManager(default_passes(chosen)).run(
        program(name), PassContext(scheme=chosen, calibration=prompts(name))
    )


def ops_of(program: Program, component: str) -> list[Any]:
    return [node.target for node in program.components[component].graph.nodes]


def rtn(bits: int, activations: ActivationSpec | None = None, **more: Any) -> Scheme:
    weights = WeightSpec(bits=bits)  # type: ignore[arg-type]
    part = ComponentScheme(weights, activations or ActivationSpec())
    return Scheme("test", {"vision": part, "decoder": part}, **more)


@pytest.mark.parametrize("name", NAMES)
def test_w4a8_is_integer_all_through(name: str) -> None:
    result = quantized(name, "w4a8")
    assert result.dialect == "quantized"
    vision, decoder = ops_of(result, "vision"), ops_of(result, "decoder")
    assert decoder.count(_mqc.linear_w4a8.default) == 28
    assert decoder.count(torch.ops.aten.linear.default) == 1, "the head stays in float"
    assert _mqc.linear_w8a8.default in vision and _mqc.linear_w4a8.default not in vision
    assert torch.ops.aten.linear.default not in vision
    assert _mqc.rank_update.default not in vision + decoder, "fused into the linears"
    assert result.facts["kv_order"] == "aifs"


@pytest.mark.parametrize("name", NAMES)
def test_scales_differ_by_modality_and_are_shared(name: str) -> None:
    result = quantized(name, "w4a8")
    graph = result.components["decoder"].graph
    quantizers = list(graph.find_nodes(op="call_function", target=_mqc.quantize_static.default))
    assert len(quantizers) == 4 * 4  # per layer: attention input, o_proj, feed-forward, down
    for node in quantizers:
        scale = result.params[str(node.args[1].target)]
        assert scale.shape == (2,) and bool((scale > 0).all())
        assert len(node.users) in (1, 2, 3)
    scales = torch.stack([result.params[str(n.args[1].target)] for n in quantizers])
    assert not torch.allclose(scales[:, 0], scales[:, 1])


@pytest.mark.parametrize("name", NAMES)
def test_aifs_on_and_off_agree(name: str) -> None:
    """The same quantized program, rows reordered or not, for every form of prompt.

    In float64, where no rounding difference of the reordered attention sums is large enough to
    tip a value over to the next int8 step: then logits are equal, for any padding and chunking.
    """
    model = runnable(name)
    items = [
        build_prompt(messages, model.processor, model.adapter)
        for messages in conversations().values()
    ]
    natural = ProgramEngine(quantized(name, "w4a8", aifs=False).to(torch.float64))
    reordered = ProgramEngine(quantized(name, "w4a8").to(torch.float64))
    expected = prefill(natural, items).logits
    for other in (prefill(reordered, items, padding="left"), prefill(reordered, items, chunk=7)):
        torch.testing.assert_close(other.logits, expected, rtol=1e-5, atol=1e-5)


def test_rtn_needs_no_calibration_data() -> None:
    passes = default_passes(rtn(4))
    result = PassManager(passes).run(program("tiny-llava"), PassContext())
    assert ops_of(result, "decoder").count(_mqc.linear_w4a16.default) == 28


def test_gptq_without_data_says_what_to_do() -> None:
    with pytest.raises(CalibrationError, match="no calibration samples") as caught:
        PassManager(default_passes(named_scheme("w4a8"))).run(program("tiny-llava"), PassContext())
    assert "--calibration" in str(caught.value)


def test_gptq_is_better_than_rtn_on_the_layers_it_saw() -> None:
    def quality(method: str) -> list[float]:
        weights = WeightSpec(bits=3, method=method)  # type: ignore[arg-type]
        scheme = Scheme("test", {"decoder": ComponentScheme(weights)})
        manager = PassManager(default_passes(scheme))
        context = PassContext(calibration=prompts("tiny-llava"))
        quantized = manager.run(program("tiny-llava"), context)
        record = next(r for r in manager.records if r.name == "quantize-weights")
        assert len(record.details) == 28
        return [logit_error(program("tiny-llava"), quantized)]

    assert quality("gptq")[0] < quality("rtn")[0]


def logit_error(exact: Program, other: Program) -> float:
    items = list(prompts("tiny-llava"))
    a, b = prefill(ProgramEngine(exact), items).logits, prefill(ProgramEngine(other), items).logits
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_all_widths_and_fewer_bits_lose_more(bits: int) -> None:
    result = PassManager(default_passes(rtn(bits))).run(program("tiny-llava"), PassContext())
    target = _mqc.linear_w8a16.default if bits == 8 else _mqc.linear_w4a16.default
    assert ops_of(result, "decoder").count(target) == 28
    error = logit_error(program("tiny-llava"), result)
    assert {8: 0.0, 4: 0.01, 3: 0.02, 2: 0.05}[bits] < error < {8: 0.2, 4: 2, 3: 3, 2: 9}[bits]


def test_groups_that_do_not_divide_fall_back_with_a_skip() -> None:
    weights = WeightSpec(bits=4, group_size=64)
    scheme = Scheme("test", {"decoder": ComponentScheme(weights)})
    manager = PassManager(default_passes(scheme))
    manager.run(program("tiny-llava"), PassContext())
    record = next(r for r in manager.records if r.name == "quantize-weights")
    assert {d["group_size"] for d in record.details} == {64, None}
    assert any("do not divide 560" in skip.reason for skip in record.skips)


def test_head_and_embeddings_are_options() -> None:
    scheme = Scheme(
        "test",
        {
            "decoder": ComponentScheme(WeightSpec(bits=4), head=WeightSpec(bits=8)),
            "embed": ComponentScheme(WeightSpec(bits=8)),
        },
    )
    result = PassManager(default_passes(scheme)).run(program("tiny-llava"), PassContext())
    assert ops_of(result, "embed").count(_mqc.embedding_w8.default) == 1
    assert torch.ops.aten.linear.default not in ops_of(result, "decoder")
    assert logit_error(program("tiny-llava"), result) < 0.5


def test_nan_weight_is_named() -> None:
    broken = program("tiny-llava").copy()
    name = next(n for n in broken.components["decoder"].param_names() if "layers.2.mlp.up" in n)
    weight = broken.params[name].clone()
    weight[0, 0] = float("nan")
    broken.params[name] = weight
    with pytest.raises(MqcError, match="NaN") as caught:
        PassManager(default_passes(rtn(4))).run(broken, PassContext())
    assert any(name in note for note in caught.value.__notes__)


def test_split_channels_do_not_widen_the_range() -> None:
    """A channel that meets only zero weights is left out of the activation's range."""
    base = PassManager(default_passes(rtn(8))[:1]).run(program("tiny-llava"), PassContext())

    def scale_with(split: bool) -> float:
        one = base.copy()
        graph = one.components["decoder"].graph
        linear = next(n for n in graph.nodes if "o_proj" in str(n.args[1:2]))
        if split:
            weight = one.params[str(linear.args[1].target)].clone()
            weight[:, 5] *= 1000
            one.params[str(linear.args[1].target)] = weight
        passes = [RmsSuppress(), QuantizeWeights(rtn(8, ActivationSpec(8)))]
        passes += [StaticScales(rtn(8, ActivationSpec(8)))]
        manager = PassManager(passes)
        manager.run(one, PassContext(calibration=prompts("tiny-llava")))
        details = manager.records[-1].details
        return next(d for d in details if "o_proj" in d["layers"][0])["scales"]["all"]

    assert scale_with(split=True) <= scale_with(split=False)


def test_a_modality_that_calibration_never_saw_is_reported() -> None:
    model = runnable("tiny-llava")
    text = [build_prompt(conversations()["text"], model.processor, model.adapter)]
    scheme = Scheme(
        "test",
        {"decoder": ComponentScheme(WeightSpec(bits=4), ActivationSpec(8, per_modality=True))},
    )
    manager = PassManager(default_passes(scheme))
    manager.run(program("tiny-llava"), PassContext(calibration=text))
    record = next(r for r in manager.records if r.name == "static-scales")
    assert record.skips and all("no visual rows" in skip.reason for skip in record.skips)


def test_vision_needs_images_to_calibrate() -> None:
    model = runnable("tiny-llava")
    text = [build_prompt(conversations()["text"], model.processor, model.adapter)]
    with pytest.raises(CalibrationError, match="component 'vision'"):
        PassManager(default_passes(named_scheme("w4a8"))).run(
            program("tiny-llava"), PassContext(calibration=text)
        )


def test_preconditions() -> None:
    raw = program("tiny-llava")
    for item in (QuantizeWeights(), AifsReorder()):
        with pytest.raises(PassPreconditionError):
            PassManager([item]).run(raw, PassContext())
    done = quantized("tiny-llava", "w4a8")
    with pytest.raises(PassPreconditionError, match="before aifs-reorder"):
        PassManager([StaticScales()]).run(done, PassContext())
    with pytest.raises(PassPreconditionError, match="already reordered"):
        PassManager([AifsReorder()]).run(done, PassContext())
    assert PassManager([ModalitySplit(), Cleanup()]).run(done, PassContext()) is not done


def test_walk_frees_what_nobody_reads_and_gives_every_input() -> None:
    base = PassManager(default_passes(rtn(8))[:1]).run(program("tiny-llava"), PassContext())
    component = base.components["decoder"]
    samples = component_samples(base, list(prompts("tiny-llava")), "decoder")
    seen = []

    def visit(node: Any, values: Any) -> None:
        if node.target == torch.ops.aten.linear.default:
            inputs = values(node.args[0])
            assert len(inputs) == len(samples)
            seen.append(node)

    walk(base, component, samples, visit)
    assert len(seen) == 29
