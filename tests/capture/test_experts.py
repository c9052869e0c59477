"""Experts as plain linears: what transformers computes, and how they are calibrated."""

from __future__ import annotations

import torch
from programs import captured
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextExperts

from mqc.analysis.routing import find_routers
from mqc.capture import adapter_for
from mqc.capture.experts import dense_experts
from mqc.ir.edit import tensor_type
from mqc.pipeline import make_passes
from mqc.spec import named_scheme
from mqc.testing.families import FAMILIES, build_family
from mqc.testing.families.run import family_prompt, family_samples
from mqc.transform import PassContext, PassManager


def test_dense_experts_are_the_models() -> None:
    generator = torch.Generator().manual_seed(0)
    config = FAMILIES["qwen3_vl_moe"].config().text_config
    config._experts_implementation = "eager"
    experts = Qwen3VLMoeTextExperts(config).double()
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    x = torch.randn(7, config.hidden_size, generator=generator, dtype=torch.float64)
    weights, index = torch.rand(7, 3, generator=generator, dtype=torch.float64).topk(2)
    with torch.no_grad():
        expected, found = experts(x, index, weights), dense_experts(experts, x, index, weights)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_router_is_found_and_its_linear_alone() -> None:
    program = PassManager(make_passes(["canonicalize"], named_scheme("w4a8"))).run(
        captured("qwen3_vl_moe"), PassContext()
    )
    (router,) = find_routers(program.components["decoder"])
    assert tensor_type(router).shape == ("batch", "tokens", 3)
    assert find_routers(program.components["vision"]) == []


def test_an_expert_that_no_row_reaches_is_quantized_all_the_same() -> None:
    """All probabilities are equal, so every row takes the same two experts of three."""
    name = "qwen3_vl_moe"
    model, _ = build_family(name)
    program = captured(name).copy()
    gate = next(key for key in program.params if key.endswith("mlp.gate.weight"))
    program.params[gate] = torch.zeros_like(program.params[gate])
    scheme = named_scheme("w4a8")
    adapter = adapter_for(model.config)
    samples = family_samples(FAMILIES[name], model.config, torch.float32, 3)
    context = PassContext(scheme, [family_prompt(adapter, sample) for sample in samples])
    names = ["canonicalize", "fuse-norm", "modality-split", "quantize-weights", "static-scales"]
    manager = PassManager(make_passes(names, scheme))
    result = manager.run(program, context)
    reasons = [skip.reason for skip in manager.records[-1].skips]
    assert reasons.count("no row of the calibration set reaches it: scale 1") == 2
    experts = [
        key for key in result.params if "experts" in key and key.partition("~")[0].endswith(".q")
    ]
    assert len(experts) == 6
    assert all(bool(torch.isfinite(result.params[key].float()).all()) for key in result.params)
