"""A small writer of FunctionProto bodies in standard ONNX ops (opset 21)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

DOMAIN = "ai.mqc"
DOMAIN_VERSION = 1
OPSET = 21


class Body:
    """Collects the nodes of one function; values are named in order of creation."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []

    def __call__(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Append a node with one output; returns the output's name."""
        output = f"v{len(self.nodes)}_{op_type.lower()}"
        self.nodes.append(helper.make_node(op_type, inputs, [output], **attributes))
        return output

    def constant(self, value: npt.NDArray[Any] | np.generic) -> str:
        """Append a Constant node."""
        return self("Constant", value=numpy_helper.from_array(np.asarray(value)))

    def attribute(self, name: str) -> str:
        """The value of the node's float attribute ``name``, a scalar."""
        value = onnx.AttributeProto(
            name="value_float", ref_attr_name=name, type=onnx.AttributeProto.FLOAT
        )
        result = self("Constant")
        self.nodes[-1].attribute.append(value)
        return result

    def axes(self, *values: int) -> str:
        """An int64 list, as shapes and axes inputs take it."""
        return self.constant(np.array(values, dtype=np.int64))

    def dim(self, value: str, axis: int) -> str:
        """One dimension of a value, int64 [1]."""
        end = {"end": axis + 1} if axis != -1 else {}
        return self("Shape", value, start=axis, **end)

    def cast(self, value: str, dtype: str) -> str:
        """Cast to a dtype by its ONNX name, e.g. "INT32"."""
        return self("Cast", value, to=onnx.TensorProto.DataType.Value(dtype))

    def function(
        self,
        op_type: str,
        inputs: Sequence[str],
        results: Sequence[str],
        outputs: Sequence[str],
        attributes: Sequence[str],
    ) -> onnx.FunctionProto:
        """The finished function of domain `ai.mqc`: its ``outputs`` are the values ``results``."""
        pairs = zip(results, outputs, strict=True)
        nodes = [*self.nodes, *(helper.make_node("Identity", [old], [new]) for old, new in pairs)]
        return helper.make_function(
            DOMAIN,
            op_type,
            list(inputs),
            list(outputs),
            nodes,
            [helper.make_opsetid("", OPSET)],
            list(attributes),
        )
