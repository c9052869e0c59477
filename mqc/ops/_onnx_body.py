"""A small writer of FunctionProto bodies in standard ONNX ops (opset 21)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    def __init__(self, prefix: str = "v") -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._prefix = prefix

    def __call__(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Append a node with one output; returns the output's name."""
        output = f"{self._prefix}{len(self.nodes)}_{op_type.lower()}"
        self.nodes.append(helper.make_node(op_type, inputs, [output], **attributes))
        return output

    def constant(self, value: npt.NDArray[Any] | np.generic) -> str:
        """Append a Constant node."""
        return self("Constant", value=numpy_helper.from_array(np.asarray(value)))

    def attribute(self, name: str, *, integer: bool = False) -> str:
        """The value of the node's attribute ``name``: a float scalar, or int64 [1]."""
        value = onnx.AttributeProto(
            name="value_int" if integer else "value_float",
            ref_attr_name=name,
            type=onnx.AttributeProto.INT if integer else onnx.AttributeProto.FLOAT,
        )
        result = self("Constant")
        self.nodes[-1].attribute.append(value)
        return self("Unsqueeze", result, self.axes(0)) if integer else result

    def choose(
        self,
        condition: str,
        then: Callable[[Body], str],
        other: Callable[[Body], str],
        dtype: str = "FLOAT",
    ) -> str:
        """A value made in one of two ways; only the one chosen is computed.

        ``condition``: bool of one element. The writers may use all values made so far.
        """
        branches = {}
        for name, write in (("then_branch", then), ("else_branch", other)):
            inner = Body(f"{self._prefix}{len(self.nodes)}{name[0]}_")
            made = write(inner)
            kind = onnx.TensorProto.DataType.Value(dtype)
            info = helper.make_tensor_value_info(made, kind, None)
            branches[name] = helper.make_graph(inner.nodes, name, [], [info])
        return self("If", condition, **branches)

    def scan(
        self,
        state: str,
        values: Sequence[str],
        axis: int,
        step: Callable[[Body, str, Sequence[str]], tuple[str, str]],
        ranks: tuple[int, int],
    ) -> tuple[str, str]:
        """A recurrence along ``axis`` of float ``values``; returns (last state, all results).

        ``step`` writes one step: from the state and the values' slices to (state, result), which
        have ``ranks`` axes.
        """
        inner = Body(f"{self._prefix}{len(self.nodes)}s_")
        names = [f"{inner._prefix}in_{name}" for name in (state, *values)]
        made = step(inner, names[0], names[1:])

        def info(name: str, rank: int | None = None) -> onnx.ValueInfoProto:
            shape = None if rank is None else [f"{name}_{axis}" for axis in range(rank)]
            return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

        results = [info(name, rank) for name, rank in zip(made, ranks, strict=True)]
        graph = helper.make_graph(inner.nodes, "step", [info(name) for name in names], results)
        outputs = [f"{self._prefix}{len(self.nodes)}_{name}" for name in ("state", "scan")]
        node = helper.make_node(
            "Scan",
            [state, *values],
            outputs,
            num_scan_inputs=len(values),
            scan_input_axes=[axis] * len(values),
            scan_output_axes=[axis],
            body=graph,
        )
        self.nodes.append(node)
        return outputs[0], outputs[1]

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
        nodes = list(self.nodes)
        made = {name for node in nodes for name in node.output}
        for old, new in zip(results, outputs, strict=True):
            if old in made:  # an Identity would be a copy where a graph's output is read, too
                _rename(nodes, old, new)
            else:
                nodes.append(helper.make_node("Identity", [old], [new]))
        return helper.make_function(
            DOMAIN,
            op_type,
            list(inputs),
            list(outputs),
            nodes,
            [helper.make_opsetid("", OPSET)],
            list(attributes),
        )


def _rename(nodes: Sequence[onnx.NodeProto], old: str, new: str) -> None:
    """Call a value ``new`` wherever it is made or read, in branches too."""
    for node in nodes:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g.node, old, new)
