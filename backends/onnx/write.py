"""A traced ONNX model as two files: ``NAME.onnx`` and ``NAME.onnx.data``, the same on every run.

Everything that depends on the machine or the run (stack traces, source paths, version strings) is
removed. Weights go into the data file one at a time, in the order of their names.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch

from mqc.ir.params import ParamStore
from mqc.ops.onnx_functions import attach_functions

INLINE_BYTES = 64
"""A parameter of at most this size is kept in the ``.onnx`` file itself (shapes, scales)."""
ALIGNMENT = 64
PAGE = 4096
LARGE_BYTES = 1 << 20
"""Tensors of at least this size start at a page, so that they can be mapped into memory."""


def clean(model: ir.Model, name: str) -> None:
    """Remove from ``model`` what is not part of the computation; give it ``name``."""
    model.producer_name, model.producer_version = "mqc", None
    model.domain, model.model_version, model.doc_string = None, None, None
    model.metadata_props.clear()
    model.graph.name, model.graph.doc_string = name, None
    model.graph.metadata_props.clear()
    kept = {*model.graph.inputs, *model.graph.outputs}
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            value.doc_string = None
            if value not in kept:
                # Types of values that custom operators made may contradict what a checker infers.
                value.shape, value.type = None, None


def write(
    model: ir.Model,
    path: Path,
    params: ParamStore,
    inputs: int,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write ``model`` to ``path`` and its parameters to ``path`` + ``.data``.

    Args:
        model: as :func:`~mqc.backends.onnx.trace.trace_component` gives it; it is changed.
        path: the ``.onnx`` file to write.
        params: the values of the parameters, each read once and then removed from the store.
        inputs: how many of the graph's inputs are inputs; the others are parameters.
        progress: called with the number of bytes of each parameter written.

    Returns:
        The files written. There is no data file where no parameter is large enough for one.

    Raises:
        onnx.checker.ValidationError: the model is malformed (an error in mqc).
    """
    data = path.with_name(path.name + ".data")
    values = list(model.graph.inputs[inputs:])
    del model.graph.inputs[inputs:]
    with data.open("wb") as file:
        for value in values:
            tensor = params[str(value.name)].detach().contiguous()
            del params[str(value.name)]
            size = tensor.numel() * tensor.element_size()
            if size <= INLINE_BYTES:
                value.const_value = ir.tensor(tensor.numpy().copy(), name=value.name)
            else:
                offset = _pad(file.tell(), PAGE if size >= LARGE_BYTES else ALIGNMENT)
                file.write(bytes(offset - file.tell()))
                file.write(_bytes(tensor))
                value.const_value = _external(tensor, data, offset, size, str(value.name))
            model.graph.register_initializer(value)
            if progress is not None:
                progress(size)
        empty = file.tell() == 0
    if empty:
        data.unlink()
    clean(model, path.stem)
    proto = ir.to_proto(model)
    attach_functions(proto)
    path.write_bytes(proto.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(path))
    return [path] if empty else [path, data]


def _bytes(tensor: torch.Tensor) -> Any:
    """The elements in row-major order, little-endian, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _external(
    tensor: torch.Tensor, data: Path, offset: int, size: int, name: str
) -> ir.ExternalTensor:
    dtype = ir.tensor(torch.empty(0, dtype=tensor.dtype).numpy()).dtype
    shape = ir.Shape(tuple(tensor.shape))
    return ir.ExternalTensor(
        data.name, offset, size, dtype, shape=shape, name=name, base_dir=str(data.parent)
    )


def _pad(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
