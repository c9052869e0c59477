"""The three exports of a model: ``vision``, ``embed`` and ``decoder``, each one graph.

The decoder serves prefill (no past), chunked prefill and decoding (one token): the cache comes in
and goes out as flat tensors, the mask is explicit and boolean, the head is computed only for the
rows asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from mqc.capture.adapters import LINEAR_ATTENTION, Adapter, DynamicSize, Features
from mqc.capture.recurrent import Memory, memory_shapes
from mqc.capture.skeleton import Skeleton
from mqc.errors import CaptureError

MAX_BATCH = 1 << 16
MAX_LENGTH = 1 << 24


@dataclass
class Exported:
    """An exported program with the names and axis roles of its inputs and outputs."""

    name: str
    program: ExportedProgram
    inputs: list[tuple[str, tuple[str | None, ...]]]
    outputs: list[tuple[str, tuple[str | None, ...]]]
    symbols: dict[tuple[int, int], str] = field(default_factory=dict)
    """(input, axis) -> name of the symbol that this size defines."""


class _Wrapper(nn.Module):
    """Holds the model as ``m``, so that every name in the graph is ``m.`` + its name in it."""

    def __init__(self, model: PreTrainedModel, adapter: Adapter) -> None:
        super().__init__()
        self.m = model
        self.adapter = adapter


class _Vision(_Wrapper):
    def forward(self, *inputs: torch.Tensor) -> Features:
        return self.adapter.image_embeds(self.m, *inputs)


class _Embed(_Wrapper):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.adapter.embed(self.m, input_ids)


class _Decoder(_Wrapper):
    def __init__(self, model: PreTrainedModel, adapter: Adapter) -> None:
        super().__init__(model, adapter)
        self.specs = cache_specs(adapter)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        mask: torch.Tensor,
        logit_index: torch.Tensor,
        modality: list[torch.Tensor],
        side: list[torch.Tensor],
        past: list[torch.Tensor],
    ) -> list[torch.Tensor]:
        cache = DynamicCache()
        for spec, one, two in zip(self.specs[0::2], past[0::2], past[1::2], strict=True):
            cache.layers.append(Memory(one, two) if spec.memory else _filled(one, two))
        kinds = list(self.adapter.attention_kinds())
        masks = {kind: mask[:, place : place + 1] for place, kind in enumerate(kinds)}
        if self.adapter.recurrent:  # padding has positions below zero
            rows = position_ids[0] if position_ids.ndim == 3 else position_ids
            masks[LINEAR_ATTENTION] = rows >= 0
        output = _language_model(self.m)(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            attention_mask=masks if len(masks) > 1 else mask,
            past_key_values=cache,
            use_cache=True,
            **self.adapter.decoder_arguments(side, modality[0] if modality else None),
        )
        hidden = output.last_hidden_state
        index = logit_index[..., None].expand(-1, -1, hidden.shape[-1])
        logits = self.m.get_output_embeddings()(hidden.gather(1, index))
        return [logits, *(tensor for layer in cache.layers for tensor in _tensors(layer))]


def _tensors(layer: DynamicLayer | Memory) -> tuple[torch.Tensor, torch.Tensor]:
    """What a cache layer holds after a call."""
    return layer.tensors if isinstance(layer, Memory) else (layer.keys, layer.values)


def _language_model(model: PreTrainedModel) -> Any:
    """The language model without its head, which some families' ``get_decoder`` returns with it."""
    decoder = model.get_decoder()
    return decoder if decoder.get_output_embeddings() is None else decoder.get_decoder()


def _filled(key: torch.Tensor, value: torch.Tensor) -> DynamicLayer:
    """A cache layer that starts with ``key`` and ``value``."""
    layer = DynamicLayer()
    layer.lazy_initialization(key, value)
    layer.keys, layer.values = key, value
    return layer


def export_vision(skeleton: Skeleton, adapter: Adapter, dtype: torch.dtype) -> Exported:
    """Tower and connector: the family's inputs -> ``image_embeds`` [visual_tokens, hidden]."""
    dims: dict[str, Any] = {}
    args, shapes, inputs = [], [], []
    symbols: dict[tuple[int, int], str] = {}
    for position, spec in enumerate(adapter.vision_inputs()):
        sizes, dynamic = [], {}
        for axis, size in enumerate(spec.shape):
            if isinstance(size, DynamicSize):
                most = size.most or MAX_LENGTH
                dim = dims.setdefault(size.symbol, Dim(size.symbol, min=size.least, max=most))
                dynamic[axis] = size.factor * dim if size.factor > 1 else dim
                symbols[position, axis] = size.symbol
                size = size.factor * size.example
            sizes.append(size)
        args.append(skeleton.empty(*sizes, dtype=spec.dtype or dtype))
        shapes.append(dynamic)
        inputs.append((spec.name, spec.axes))
    program = _export("vision", _Vision(skeleton.model, adapter), tuple(args), (tuple(shapes),))
    names = ["image_embeds", *side_names(adapter)]
    return Exported("vision", program, inputs, [(n, ("token", None)) for n in names], symbols)


def side_names(adapter: Adapter) -> list[str]:
    """Names of the visual rows that the decoder takes besides its embeddings."""
    return [f"deepstack_{index}" for index in range(adapter.side_inputs)]


def export_embed(skeleton: Skeleton, adapter: Adapter) -> Exported:
    """``input_ids`` [batch, tokens] -> ``embeddings`` [batch, tokens, hidden]."""
    args = (skeleton.empty(3, 5, dtype=torch.int64),)
    shapes = ({0: _dim("batch"), 1: _dim("tokens")},)
    program = _export("embed", _Embed(skeleton.model, adapter), args, shapes)
    axes = ("batch", "token")
    return Exported(
        "embed",
        program,
        [("input_ids", axes)],
        [("embeddings", (*axes, None))],
        {(0, 0): "batch", (0, 1): "tokens"},
    )


def export_decoder(skeleton: Skeleton, adapter: Adapter, dtype: torch.dtype) -> Exported:
    """The language model with its cache; interface: see :mod:`mqc.capture`."""
    caches = cache_specs(adapter)
    hidden = int(adapter.text_config.hidden_size)
    batch, tokens, past, rows = 3, 5, 7, 2
    b, s, p, r = _dim("batch"), _dim("tokens"), Dim("past", min=0, max=MAX_LENGTH), _dim("rows")
    masks, side = len(adapter.attention_kinds()), side_names(adapter)
    modality = ["modality"] if adapter.takes_modality else []
    three = adapter.rope_axes == 3
    position_shape = (3, batch, tokens) if three else (batch, tokens)
    args = (
        skeleton.empty(batch, tokens, hidden, dtype=dtype),
        skeleton.empty(*position_shape, dtype=torch.int64),
        skeleton.empty(batch, masks, tokens, past + tokens, dtype=torch.bool),
        skeleton.empty(batch, rows, dtype=torch.int64),
        [skeleton.empty(batch, tokens, dtype=torch.bool) for _ in modality],
        [skeleton.empty(batch, tokens, hidden, dtype=dtype) for _ in side],
        [skeleton.empty(*spec.sizes(batch, past), dtype=dtype) for spec in caches],
    )
    shapes = (
        {0: b, 1: s},
        {1: b, 2: s} if three else {0: b, 1: s},
        {0: b, 2: s, 3: Dim.AUTO},
        {0: b, 1: r},
        [{0: b, 1: s}] * len(modality),
        [{0: b, 1: s}] * len(side),
        [{0: b} if spec.memory else {0: b, 2: p} for spec in caches],
    )
    program = _export("decoder", _Decoder(skeleton.model, adapter), args, shapes)
    position_axes = (None, "batch", "token") if three else ("batch", "token")
    first = next(place for place, spec in enumerate(caches) if not spec.memory)
    return Exported(
        "decoder",
        program,
        [
            ("inputs_embeds", ("batch", "token", None)),
            ("position_ids", position_axes),
            ("mask", ("batch", None, "token", "key")),
            ("logit_index", ("batch", "row")),
            *((name, ("batch", "token")) for name in modality),
            *((name, ("batch", "token", None)) for name in side),
            *((f"past_{spec.name}", spec.axes("past")) for spec in caches),
        ],
        [
            ("logits", ("batch", "row", None)),
            *((f"present_{spec.name}", spec.axes("key")) for spec in caches),
        ],
        {
            (0, 0): "batch",
            (0, 1): "tokens",
            (3, 1): "rows",
            (4 + len(modality) + len(side) + first, 2): "past",
        },
    )


@dataclass(frozen=True)
class CacheSpec:
    """One tensor of the cache: ``shape`` without the batch, None for the tokens of the past.

    ``memory``: it does not grow, and a call rewrites it.
    """

    name: str
    shape: tuple[int | None, ...]
    memory: bool = False

    def sizes(self, batch: int, past: int) -> list[int]:
        return [batch, *(past if size is None else size for size in self.shape)]

    def axes(self, tokens: str) -> tuple[str | None, ...]:
        if self.memory:
            return ("batch", "memory", *[None] * (len(self.shape) - 1))
        return ("batch", *(tokens if size is None else None for size in self.shape))


def cache_specs(adapter: Adapter) -> list[CacheSpec]:
    """The decoder's cache: two tensors a layer, in order of the layers."""
    layers, heads, head_dim = cache_shape(adapter)
    kinds = getattr(adapter.text_config, "layer_types", None) or [""] * layers
    specs = []
    for layer, kind in enumerate(kinds):
        if kind == LINEAR_ATTENTION:
            conv, state = memory_shapes(adapter.text_config)
            specs += [
                CacheSpec(f"conv_{layer}", conv, True),
                CacheSpec(f"state_{layer}", state, True),
            ]
        else:
            shape = (heads, None, head_dim)
            specs += [CacheSpec(f"key_{layer}", shape), CacheSpec(f"value_{layer}", shape)]
    return specs


def cache_shape(adapter: Adapter) -> tuple[int, int, int]:
    """(layers, key/value heads, head dimension) of the language model."""
    config = adapter.text_config
    heads = int(config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return int(config.num_hidden_layers), int(kv_heads), int(head_dim)


def _dim(name: str) -> Any:
    return Dim(name, min=1, max=MAX_BATCH if name == "batch" else MAX_LENGTH)


def _export(name: str, module: _Wrapper, args: tuple[Any, ...], shapes: Any) -> ExportedProgram:
    export: Callable[..., ExportedProgram] = torch.export.export
    try:
        with torch.no_grad():
            return export(module, args, dynamic_shapes=shapes, strict=False)
    except CaptureError:
        raise
    except Exception as error:
        kind = module.m.config.model_type
        reason = str(error).strip().split("\n")[0]
        raise CaptureError(
            f"the {name} component of model type {kind!r} cannot be captured: "
            f"{type(error).__name__}: {reason}",
            hint="run `mqc probe` for the details; a family may need an adapter "
            "(see mqc/capture/adapters)",
        ) from error
