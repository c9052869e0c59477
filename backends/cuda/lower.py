"""A quantized program as the CUDA target runs it: fused operators and weights packed for kernels.

What is computed stays the same in float32; in a half type only the places of rounding change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from mqc.backends.cuda.half import to_half
from mqc.backends.cuda.ops import LINEAR, LINEAR_A16
from mqc.cuda.pack import Layout, pack_linear, require_layout
from mqc.errors import TargetError
from mqc.ir import Component, Program, TensorType, verify
from mqc.ir.edit import (
    argument,
    aten,
    call,
    eliminate_dead_code,
    param_value,
    replace,
    tensor_type,
)
from mqc.ir.params import Loader
from mqc.passes.fuse_angles import FuseAngles
from mqc.passes.fuse_attention import FuseAttention
from mqc.passes.fuse_quantize import FuseQuantize
from mqc.passes.fuse_residual import FuseResidual
from mqc.passes.fuse_tower_attention import FuseTowerAttention
from mqc.passes.merge_linears import MergeLinears
from mqc.passes.select_rows import SelectRows
from mqc.transform import Pass, PassContext, PassManager

DIALECT = "cuda"
FUSIONS: tuple[Callable[[], Pass], ...] = (
    MergeLinears,
    FuseQuantize,
    lambda: FuseAttention(memory=True),
    FuseResidual,
    FuseTowerAttention,
    FuseAngles,
    SelectRows,
)
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}

_mqc = torch.ops.mqc
_INTEGER = {_mqc.linear_w4a8.default: 4, _mqc.linear_w8a8.default: 8}
_WEIGHT_ONLY = {_mqc.linear_w4a16.default: 4, _mqc.linear_w8a16.default: 8}


def lower(program: Program, dtype: str = "bf16") -> tuple[Program, dict[str, int]]:
    """A copy of ``program`` in dialect ``cuda``, and how many of each rewrite were done.

    Args:
        program: after the passes, in float32.
        dtype: of activations and the KV cache on the device: a key of ``DTYPES``. Scales, biases
            and the accumulators are float32 in any case.

    Raises:
        TargetError: an unknown dtype, or weights that no kernel takes.
    """
    if dtype not in DTYPES:
        raise TargetError(
            f"the cuda target cannot compute in {dtype!r}", hint=f"use {', '.join(DTYPES)}"
        )
    if program.dtype != torch.float32:
        program = program.to(torch.float32)
    counts: Counter[str] = Counter()
    result = program
    # The last norm meets its quantization once its rows are chosen before it.
    for passes in ([make() for make in FUSIONS], [FuseQuantize()]):
        manager = PassManager(passes)
        result = manager.run(result, PassContext())
        for record in manager.records:
            counts.update(record.counts)
    for component in result:
        _pack_linears(result, component, counts)
        _split_columns(result, component)
    if DTYPES[dtype] != torch.float32:
        to_half(result, DTYPES[dtype])
    _float_logits(result)
    eliminate_dead_code(result)
    result.prune()
    result.dialect = DIALECT
    result.facts["cuda"] = {
        "dtype": dtype,
        "layouts": {layout.name: int(layout) for layout in Layout},
        "rewrites": dict(sorted(counts.items())),
    }
    verify(result)
    return result, dict(counts)


def _pack_linears(program: Program, component: Component, counts: Counter[str]) -> None:
    """``linear_w4a8`` and ``linear_w8a8`` -> ``mqc_cuda::linear`` on packed weights; those of float
    activations -> ``mqc_cuda::linear_a16``."""
    for node in list(component.graph.nodes):
        if node.target not in _INTEGER and node.target not in _WEIGHT_ONLY:
            continue
        floats = node.target in _WEIGHT_ONLY
        weight, scale = node.args[1], node.args[2]
        k = tensor_type(node.args[0]).shape[-1]
        n = tensor_type(scale).shape[0]
        assert isinstance(k, int) and isinstance(n, int)
        name = str(node.meta.get("layer") or weight.target)
        bits = (_WEIGHT_ONLY if floats else _INTEGER)[node.target]
        groups = int(tensor_type(scale).shape[1]) if tensor_type(scale).rank == 2 else 1
        layout = require_layout(name, bits, k, groups)
        packed, factors = f"{weight.target}.packed", str(scale.target)
        if packed not in program.params:
            names = (str(weight.target), factors if layout.group else None)
            program.params[packed] = _packed(program, names, k, layout.nbytes(n, k))
        if tensor_type(scale).rank != 1:  # the scales of groups are packed too
            factors += ".channels"
            whole = None if layout.group else program.params[str(scale.target)].flatten()
            program.params[factors] = torch.ones(n) if whole is None else whole
        graph = component.graph
        with graph.inserting_before(node):
            stored = graph.create_node("get_attr", packed)
            stored.meta = {"type": TensorType((layout.nbytes(n, k),), torch.uint8)}
            channels = graph.create_node("get_attr", factors)
            channels.meta = {"type": TensorType((n,), torch.float32)}
            rest = (argument(node, index) for index in range(3, 7 if floats else 9))
            args = [node.args[0], stored, channels, *rest]
            args += [int(layout), torch.float32]
            target = LINEAR_A16 if floats else LINEAR
            new = call(graph, target, tuple(args), tensor_type(node), node)
        new.meta.update({key: node.meta[key] for key in ("bits", "layer") if key in node.meta})
        replace(node, new)
        counts["packed weights"] += 1


def _packed(program: Program, names: tuple[str, str | None], k: int, size: int) -> Loader:
    """The weight of the first name, packed with the groups' scales of the second."""
    source = program.params.copy()

    def load() -> torch.Tensor:
        weight = source[names[0]]
        if weight.is_meta:
            return torch.empty(size, dtype=torch.uint8, device="meta")
        return pack_linear(weight, k, None if names[1] is None else source[names[1]])[0]

    return load


def _split_columns(program: Program, component: Component) -> None:
    """Column indices as int32, as the kernels read them."""
    for node in component.graph.nodes:
        place = {_mqc.rms_norm_quantize.default: 4, _mqc.activation_quantize.default: 6}.get(
            node.target
        )
        split = argument(node, place) if place is not None else None
        if not isinstance(split, fx.Node) or tensor_type(split).dtype == torch.int32:
            continue
        value = param_value(program.params, split)
        assert value is not None and place is not None
        name = f"{split.target}.i32"
        program.params[name] = value.to(torch.int32)
        with component.graph.inserting_before(node):
            new = component.graph.create_node("get_attr", name)
        new.meta = {"type": tensor_type(split).with_dtype(torch.int32)}
        node.update_arg(place, new)


def _float_logits(program: Program) -> None:
    """The logits' linear gives float32: its sums are, and rounding them would only tie tokens.

    One that adds float columns or a residual keeps their type.
    """
    component = program.components["decoder"]
    node: Any = component.output_value("logits")
    chain = [node]
    while node.target in (aten.reshape.default, aten.squeeze.dim, aten.unsqueeze.default):
        node = node.args[0]
        chain.append(node)
    added = {LINEAR: (6, 8), LINEAR_A16: (4, 6)}.get(node.target)
    if added is None or any(node.args[index] is not None for index in added):
        return
    if any(len(item.users) != 1 for item in chain):
        return
    node.update_arg(len(node.args) - 1, torch.float32)
    for item in chain:
        item.meta["type"] = tensor_type(item).with_dtype(torch.float32)
    component.outputs = [
        type(port)(port.name, port.type.with_dtype(torch.float32), port.axes)
        if port.name == "logits"
        else port
        for port in component.outputs
    ]
