"""The OpenVINO peer's models: converted from torch, quantized by nncf. Timed by ``openvino.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bench_cpu import models


class Decoder(nn.Module):
    """Qwen2's layers, written as OpenVINO's exporters write them.

    Inputs: embeddings [B, T, H], positions [B, T], beam_idx [B], then keys and values of the past
    [B, KV, P, D]; outputs: logits [B, 1, vocabulary] of the last row, then keys and values.
    """

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterDict(
            {name.replace(".", "|"): nn.Parameter(w, False) for name, w in weights.items()}
        )
        exponent = torch.arange(0, models.HEAD_DIM, 2) / models.HEAD_DIM
        self.register_buffer("frequency", 1e6 ** -exponent.float())

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        bias = f"{name}.bias".replace(".", "|")
        weight = self.weights[f"{name}.weight".replace(".", "|")]
        return nn.functional.linear(x, weight, self.weights.get(bias, None))

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        mean = x.pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(mean + 1e-6) * self.weights[f"{name}.weight".replace(".", "|")]

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        beam_idx: torch.Tensor,
        *past: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        angles = positions[:, None, :, None].float() * self.frequency
        angles = torch.cat([angles, angles], -1)
        cos, sin = angles.cos(), angles.sin()
        keys = past[0].shape[2] + x.shape[1]
        # By index, which the fusion knows, and as floats: bool takes OpenVINO twice as long.
        seen = torch.arange(keys)[None, :] <= torch.arange(keys)[-x.shape[1] :, None]
        lowest = torch.finfo(torch.float32).min
        mask = torch.zeros(seen.shape).masked_fill(~seen, lowest)[None, None]
        present = []
        for layer in range(models.LAYERS):
            base = f"model.layers.{layer}."
            h = self.norm(x, base + "input_layernorm")
            heads = []
            for name, count in (
                ("q", models.HEADS),
                ("k", models.KV_HEADS),
                ("v", models.KV_HEADS),
            ):
                y = self.linear(h, f"{base}self_attn.{name}_proj")
                heads.append(y.view(*y.shape[:2], count, models.HEAD_DIM).transpose(1, 2))
            q, k, v = heads
            q, k = (t * cos + self.half(t) * sin for t in (q, k))
            k = torch.cat([past[2 * layer].index_select(0, beam_idx), k], 2)
            v = torch.cat([past[2 * layer + 1].index_select(0, beam_idx), v], 2)
            present += [k, v]
            y = nn.functional.scaled_dot_product_attention(q, self.repeat(k), self.repeat(v), mask)
            x = x + self.linear(y.transpose(1, 2).flatten(2), base + "self_attn.o_proj")
            h = self.norm(x, base + "post_attention_layernorm")
            gate = nn.functional.silu(self.linear(h, base + "mlp.gate_proj"))
            x = x + self.linear(gate * self.linear(h, base + "mlp.up_proj"), base + "mlp.down_proj")
        return (self.linear(self.norm(x[:, -1:], "model.norm"), "lm_head"), *present)

    @staticmethod
    def half(x: torch.Tensor) -> torch.Tensor:
        middle = x.shape[-1] // 2
        return torch.cat([-x[..., middle:], x[..., :middle]], -1)

    @staticmethod
    def repeat(x: torch.Tensor) -> torch.Tensor:
        b, h, s, d = x.shape
        return x[:, :, None].expand(b, h, models.HEADS // h, s, d).reshape(b, models.HEADS, s, d)


def decoder_inputs(tokens: int, past: int) -> list[torch.Tensor]:
    """Example values of the decoder's inputs."""
    shape = (1, models.KV_HEADS, past, models.HEAD_DIM)
    cache = [torch.randn(shape) for _ in range(2 * models.LAYERS)]
    positions = torch.arange(past, past + tokens)[None]
    x = torch.randn(1, tokens, models.HIDDEN) * 0.02
    return [x, positions, torch.zeros(1, dtype=torch.int32), *cache]


def float_decoder(cache: Path) -> Any:
    """The decoder in OpenVINO's form, cache as inputs and outputs."""
    import openvino as ov
    from safetensors.torch import load_file

    weights = load_file(models.text_only(cache) / "model.safetensors")
    weights.pop("model.embed_tokens.weight")
    module = Decoder({name: value.float() for name, value in weights.items()}).eval()
    ports = [f"past_{i}" for i in range(2 * models.LAYERS)]
    kv_shape = ov.PartialShape([-1, models.KV_HEADS, -1, models.HEAD_DIM])
    shapes = [([-1, -1, models.HIDDEN]), [-1, -1], [-1], *[kv_shape] * len(ports)]
    with torch.no_grad():
        converted = ov.convert_model(module, example_input=tuple(decoder_inputs(4, 3)))
    names = ["x", "positions", "beam_idx", *ports]
    sizes = {}
    for port, name, shape in zip(converted.inputs, names, shapes, strict=True):
        port.get_tensor().set_names({name})
        sizes[port] = ov.PartialShape(shape)
    for port, name in zip(
        converted.outputs, ["logits", *(p.replace("past", "present") for p in ports)], strict=True
    ):
        port.get_tensor().set_names({name})
    converted.reshape(sizes)
    return converted


def make_stateful(model: Any) -> None:
    """Keep the cache inside the model."""
    from openvino import opset13 as ops
    from openvino import passes

    pairs = {f"past_{i}": f"present_{i}" for i in range(2 * models.LAYERS)}
    manager = passes.Manager()
    manager.register_pass(passes.MakeStateful(pairs))
    manager.run_passes(model)
    # Without a first value of zero rows the plugin does not fuse attention with its cache.
    batch = ops.gather(ops.shape_of(model.input("x"), "i64"), [0], [0])
    rest = np.array([models.KV_HEADS, 0, models.HEAD_DIM], np.int64)
    zero = ops.constant(0.0, dtype=np.float32)
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            shape = ops.concat([batch, ops.constant(rest)], 0)
            node.set_arguments([ops.broadcast(zero, shape)])
    model.validate_nodes_and_infer_types()


def quantized(model: Any, name: str, samples: list[Any]) -> Any:
    """int4 weights, or W8A8 static by ``samples``."""
    import nncf

    if name == "openvino-int4":
        mode = nncf.CompressWeightsMode.INT4_SYM
        return nncf.compress_weights(model, mode=mode, group_size=128, ratio=1.0, all_layers=True)
    return nncf.quantize(
        model,
        nncf.Dataset(samples),
        subset_size=len(samples),
        model_type=nncf.ModelType.TRANSFORMER,
        # Quantized attention is not fused with its cache: decoding takes three times longer.
        ignored_scope=nncf.IgnoredScope(types=["ScaledDotProductAttention"], validate=False),
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1)
        ),
    )


def make_models(name: str, part: str, cache: Path) -> None:
    """Convert and quantize."""
    import openvino as ov

    def decoder(folder: Path) -> None:
        samples = [[v.numpy() for v in decoder_inputs(64, past)] for past in (0, 16)]
        model = quantized(float_decoder(cache), name, samples)
        make_stateful(model)
        ov.save_model(model, folder / "decoder.xml")

    def vision(folder: Path) -> None:
        inputs = models.processed_prompt(cache)["pixel_values"]
        model = quantized(float_vision(cache), "openvino-int8", [[inputs.numpy()]])
        ov.save_model(model, folder / "vision.xml")

    if part != "linears":
        models.made(cache / name, decoder)
    if part == "prompt":
        models.prompt_arrays(cache)
        models.made(cache / "openvino-vision-int8", vision)


def float_vision(cache: Path) -> Any:
    """The vision tower for one picture of this size, in OpenVINO's form."""
    import openvino as ov
    from transformers import Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration.from_pretrained(
        models.multimodal(cache), dtype=torch.float32
    )
    inputs = models.processed_prompt(cache)
    grid = inputs["image_grid_thw"]

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = model.model.visual

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.visual(pixels, grid_thw=grid).pooler_output

    with torch.no_grad():
        return ov.convert_model(Tower().eval(), example_input=(inputs["pixel_values"],))
