"""An ONNX model as two files: ``NAME.onnx`` and ``NAME.onnx.data``, the same on every run.

Weights are streamed into the data file one at a time, in the order of their names.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import onnx
import torch
from onnx import TensorProto, helper

from mqc.backends.onnx.builder import ONNX_DTYPE
from mqc.ir.params import ParamStore
from mqc.ops.onnx_functions import attach_functions

INLINE_BYTES = 64
"""A tensor of at most this size is kept in the ``.onnx`` file itself (shapes, scales)."""
ALIGNMENT = 64
PAGE = 4096
LARGE_BYTES = 1 << 20
"""Tensors of at least this size start at a page, so that they can be mapped into memory."""


def write(
    model: onnx.ModelProto,
    path: Path,
    params: ParamStore,
    inputs: int,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write ``model`` to ``path`` and its large tensors to ``path`` + ``.data``.

    Args:
        model: a model whose parameters are its last inputs; they become initializers here.
        path: the ``.onnx`` file to write.
        params: the values of the parameters, each read once and then removed from the store.
        inputs: how many of the graph's inputs are inputs; the others are parameters.
        progress: called with the number of bytes of each parameter written.

    Returns:
        The files written. There is no data file where no tensor is large enough for one.

    Raises:
        onnx.checker.ValidationError: the model is malformed (an error in mqc).
    """
    graph, data = model.graph, path.with_name(path.name + ".data")
    names = [value.name for value in graph.input[inputs:]]
    del graph.input[inputs:]
    constants = list(graph.initializer)
    del graph.initializer[:]
    with data.open("wb") as file:
        for name in names:
            value = params[name].detach().contiguous()
            del params[name]
            flat = value.reshape(-1).view(torch.uint8)
            dtype, shape = ONNX_DTYPE[value.dtype], list(value.shape)
            graph.initializer.append(_store(file, name, dtype, shape, flat.numpy().data))
            if progress is not None:
                progress(len(flat))
        for constant in constants:
            content = memoryview(constant.raw_data)
            dims = list(constant.dims)
            graph.initializer.append(
                _store(file, constant.name, constant.data_type, dims, content)
                if len(content) > INLINE_BYTES
                else constant
            )
        empty = file.tell() == 0
    if empty:
        data.unlink()
    model.producer_name, model.producer_version = "mqc", ""
    attach_functions(model)
    path.write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(path))
    return [path] if empty else [path, data]


def _store(
    file: BinaryIO, name: str, dtype: int, shape: list[int], content: Any
) -> onnx.TensorProto:
    """A tensor whose bytes (row-major, little-endian) are in ``file``, or inside it if few."""
    size = len(content)
    if size <= INLINE_BYTES:
        return helper.make_tensor(name, dtype, shape, bytes(content), raw=True)
    alignment = PAGE if size >= LARGE_BYTES else ALIGNMENT
    offset = -(-file.tell() // alignment) * alignment
    file.write(bytes(offset - file.tell()))
    file.write(content)
    tensor = TensorProto(name=name, data_type=dtype, dims=shape)
    tensor.data_location = TensorProto.EXTERNAL
    location = Path(file.name).name
    for key, value in (("location", location), ("offset", offset), ("length", size)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
