"""The last rewrites before a program becomes ONNX, each for the sake of speed in onnxruntime.

None changes what is computed: activations are quantized to the unsigned form (onnxruntime has no
fast path for signed ones), integer linears have a batch axis (without one it computes them in
float), counts of visual rows become one shared mask, integer weights of linears are stored in the
layout of the native kernels, which then read them where the file is mapped into memory, weights of
float linears are stored transposed (``MatMul`` takes them as they are), and keys and values
repeated for grouped attention are not.

For a GPU activations stay signed, as the kernels of ``cuda/`` want them. Such files run on a CPU as
well, where signed activations are only slower.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import mqc.ops  # noqa: F401  (registers the operators)
from mqc.analysis.heads import unrepeated
from mqc.backends.onnx.library import LAYOUT, LAYOUT_FACT
from mqc.cuda.pack import require_layout
from mqc.errors import TargetError
from mqc.ir import TUPLE, Component, Port, Program, TensorType
from mqc.ir.edit import call, eliminate_dead_code, replace, tensor_type
from mqc.ir.params import Loader, ParamStore
from mqc.numerics.packing import fits_c16k4, pack_c16k4, unpack_int4
from mqc.passes.row_masks import row_mask

aten = torch.ops.aten

_BITS = {torch.ops.mqc.linear_w4a8.default: 4, torch.ops.mqc.linear_w8a8.default: 8}
_INTEGER_LINEARS = tuple(_BITS)
_STORED_BITS = _BITS | {
    torch.ops.mqc.linear_w4a16.default: 4,
    torch.ops.mqc.linear_w8a16.default: 8,
}
_QUANTIZERS: dict[Any, tuple[int, int]] = {
    torch.ops.mqc.quantize_static.default: (2, 3),
    torch.ops.mqc.rms_norm_quantize.default: (3, 5),
    torch.ops.mqc.activation_quantize.default: (5, 7),
}
"""Operators that quantize -> positions of their arguments ``modality`` and ``unsigned``."""
_MODALITY_READERS: dict[Any, int] = {
    **{target: place for target, (place, _) in _QUANTIZERS.items()},
    **dict.fromkeys(_INTEGER_LINEARS, 4),
}
"""Operator -> position of its argument ``modality``."""

DEVICES = ("cpu", "cuda")
DEVICE_FACT = "device"
"""The fact of a lowered program that names the device whose kernels its operators are for."""


def lower(program: Program, device: str | None = None) -> tuple[Program, dict[str, int]]:
    """A copy of ``program`` for this target, and how many of each rewrite were done.

    ``device``, one of ``DEVICES``, is by default what the program was lowered for, else "cpu".

    Raises:
        TargetError: the program computes in a type other than float32 that cannot be widened, or
            has weights that the kernels of ``device`` do not take.
    """
    if program.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TargetError(
            f"the onnx target computes in float32, and the program is {program.dtype}",
            hint="convert it: program.to(torch.float32)",
        )
    result = program.copy() if program.dtype == torch.float32 else program.to(torch.float32)
    names = ("unsigned", "batched", "masks", "packed", "transposed", "grouped")
    counts = dict.fromkeys(names, 0)
    device = device or str(program.facts.get(DEVICE_FACT, "cpu"))
    if device != "cpu":
        result.facts = {**result.facts, DEVICE_FACT: device}
    for component in result:
        if device == "cpu":
            counts["unsigned"] += _unsigned_activations(component)
        else:
            _require_kernels(component)
        counts["batched"] += _batch_products(component)
        counts["masks"] += _share_row_masks(component)
        counts["packed"] += _pack_weights(component, result.params)
        counts["transposed"] += _transpose_weights(component, result.params)
        counts["grouped"] += _group_attention(component)
    if counts["packed"]:
        result.facts = {**result.facts, LAYOUT_FACT: LAYOUT}
    eliminate_dead_code(result)
    return result, counts


def _unsigned_activations(component: Component) -> int:
    """Let every operator that quantizes give uint8 with zero point 128."""
    count = 0
    for node in component.graph.nodes:
        if node.op != "call_function" or node.target not in _QUANTIZERS:
            continue
        place = _QUANTIZERS[node.target][1]
        args = [*node.args, *[None] * (place - len(node.args))][:place]
        node.args = (*args, True)
        node.kwargs = {key: v for key, v in node.kwargs.items() if key != "unsigned"}
        several = node.meta["type"] == TUPLE
        for made in [user for user in node.users if user.args[1] == 0] if several else [node]:
            for value in [made, *_views_of(made)]:
                value.meta["type"] = tensor_type(value).with_dtype(torch.uint8)
        count += 1
    values = component.output_node.args[0]
    assert isinstance(values, (tuple, list))
    component.outputs = [
        Port(port.name, tensor_type(value), port.axes) if isinstance(value, fx.Node) else port
        for port, value in zip(component.outputs, values, strict=True)
    ]
    return count


def _require_kernels(component: Component) -> None:
    """Raise :class:`TargetError` where the CUDA kernels take no weight as a linear has it: once a
    kernel of an operator's name is registered, onnxruntime does not fall back to its body."""
    for node in component.graph.nodes:
        if node.op != "call_function" or node.target not in _STORED_BITS:
            continue
        k, scale = tensor_type(node.args[0]).shape[-1], tensor_type(node.args[2])
        if isinstance(k, int) and scale.rank == 2:
            name = str(node.meta.get("layer") or node.args[1].target)
            require_layout(name, _STORED_BITS[node.target], k, int(scale.shape[1]))


def _views_of(node: fx.Node) -> list[fx.Node]:
    """Values that only move elements of the int8 tensor ``node``."""
    found: list[fx.Node] = []
    pending = [node]
    while pending:
        for user in pending.pop().users:
            kind = user.meta.get("type")
            if isinstance(kind, TensorType) and kind.dtype == torch.int8 and user not in found:
                found.append(user)
                pending.append(user)
    return found


def _batch_products(component: Component) -> int:
    """Integer linears of a matrix [M, K] as linears of [1, M, K].

    onnxruntime makes ``Gemm`` of a product of two matrices and a bias before it looks for integer
    products, and computes that in float.
    """
    graph, count = component.graph, 0
    for node in list(graph.nodes):
        if node.target not in _INTEGER_LINEARS or tensor_type(node).rank != 2:
            continue
        args = list(node.args)
        for index in (0, 6, 8):  # xq, x_split, residual
            value = args[index] if index < len(args) else None
            if value is not None:
                kind = tensor_type(value)
                with graph.inserting_before(node):
                    batched = kind.with_shape(1, *kind.shape)
                    args[index] = call(graph, aten.unsqueeze.default, (value, 0), batched, node)
        flat = tensor_type(node)
        with graph.inserting_before(node):
            wide = call(graph, node.target, tuple(args), flat.with_shape(1, *flat.shape), node)
            new = call(graph, aten.squeeze.dim, (wide, 0), flat, node)
        replace(node, new)
        count += 1
    return count


def _share_row_masks(component: Component) -> int:
    """Counts of leading visual rows [batch] as masks [batch, tokens], made once for all readers.

    onnxruntime looks scales up by row either way; a body that starts from a count makes the mask
    again in every operator.
    """
    graph = component.graph
    masks: dict[tuple[fx.Node, Any], fx.Node] = {}
    found = 0
    for node in list(graph.nodes):
        place = _MODALITY_READERS.get(node.target)
        count = node.args[place] if place is not None and place < len(node.args) else None
        if not isinstance(count, fx.Node) or tensor_type(count).dtype != torch.int64:
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        tokens = tensor_type(source).shape[1]
        if (count, tokens) not in masks:
            with graph.inserting_before(node):
                masks[count, tokens] = row_mask(graph, count, source, tokens)
        node.update_arg(place, masks[count, tokens])
        found += 1
    return found


def _pack_weights(component: Component, params: ParamStore) -> int:
    """Integer weights of linears to layout C16K4, where it holds their input channels."""
    graph, count = component.graph, 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _STORED_BITS:
            continue
        weight, scale = node.args[1], tensor_type(node.args[2])
        if weight.op != "get_attr" or tensor_type(weight).rank != 2:
            continue
        k, groups = tensor_type(node.args[0]).shape[-1], 1
        if scale.rank == 2:
            groups = int(scale.shape[1])
        if not isinstance(k, int) or not fits_c16k4(k, groups):
            continue
        bits = _STORED_BITS[node.target]
        name = f"{weight.target}.{LAYOUT}" + (f".{groups}" if groups > 1 else "")
        if name not in params:
            params[name] = _packed(params, str(weight.target), k, groups, bits)
        with graph.inserting_before(node):
            tiles = graph.create_node("get_attr", name)
        shape = (-(-int(scale.shape[0]) // 16), groups, k // groups // (32 // bits), 16, 4)
        tiles.meta = {"type": TensorType(shape, torch.uint8)}
        node.update_arg(1, tiles)
        count += 1
    return count


def _packed(params: ParamStore, name: str, k: int, groups: int, bits: int) -> Loader:
    def load() -> torch.Tensor:
        weight = params[name]
        return pack_c16k4(unpack_int4(weight, k) if bits == 4 else weight, groups, bits)

    return load


def _transpose_weights(component: Component, params: ParamStore) -> int:
    """``linear(x, W, b)`` -> ``matmul(x, W^T) + b`` where W is a parameter."""
    graph, count = component.graph, 0
    for node in graph.find_nodes(op="call_function", target=aten.linear.default):
        weight = node.args[1]
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            continue
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        columns, rows = tensor_type(weight).shape
        name = f"{weight.target}.transposed"
        if name not in params:
            params[name] = _transposed(params, str(weight.target))
        with graph.inserting_before(node):
            turned = graph.create_node("get_attr", name)
            turned.meta = {"type": tensor_type(weight).with_shape(rows, columns)}
            new = call(graph, aten.matmul.default, (node.args[0], turned), tensor_type(node), node)
            if bias is not None:
                new = call(graph, aten.add.Tensor, (new, bias), tensor_type(node), node)
        replace(node, new)
        count += 1
    return count


def _transposed(params: ParamStore, name: str) -> Loader:
    return lambda: params[name].t().contiguous()


def _group_attention(component: Component) -> int:
    """Attention over repeated keys and values -> attention with ``enable_gqa``."""
    count = 0
    target = aten.scaled_dot_product_attention.default
    for node in component.graph.find_nodes(op="call_function", target=target):
        key, value = unrepeated(node.args[1]), unrepeated(node.args[2])
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        if key is None or value is None or not _same_for_all_heads(mask):
            continue
        node.args = (node.args[0], key, value, *node.args[3:])
        node.kwargs = {**node.kwargs, "enable_gqa": True}
        count += 1
    return count


def _same_for_all_heads(mask: Any) -> bool:
    return mask is None or (tensor_type(mask).rank == 4 and tensor_type(mask).shape[1] == 1)
