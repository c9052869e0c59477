"""Experts over their own rows: the same sums, and nothing computed for rows that chose others."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import Builder
from torch import fx

from mqc.analysis.mixtures import find_mixtures
from mqc.backends.onnx.emit import emit
from mqc.backends.onnx.session import open_session
from mqc.backends.onnx.target import OnnxTarget
from mqc.errors import PassPostconditionError
from mqc.ir import TUPLE, Component, ParamStore, Port, Program, TensorType, format_program
from mqc.ir.edit import get_param
from mqc.passes.route_experts import RouteExperts
from mqc.passes.select_rows import SelectRows
from mqc.transform import PassContext, PassManager

aten, _mqc = torch.ops.aten, torch.ops.mqc
GOLDEN = Path(__file__).parent.parent / "golden" / "route-experts.txt"
HIDDEN, INNER, EXPERTS, CHOICES = 8, 4, 4, 2


class Mixture(Builder):
    """A component: x + experts(x), of which rows are asked for. ``modality``: "mask" or "count"
    quantizes what experts read, by the rows' modality."""

    def __init__(self, dtype: torch.dtype, modality: str | None = None) -> None:
        super().__init__()
        self.dtype, self.modality = dtype, modality
        self.generator = torch.Generator().manual_seed(0)
        self.program = Program({}, ParamStore(), [], {})
        self.program.dtype = dtype
        rows = TensorType(("batch", "rows"), torch.int64)
        self.inputs = [
            Port("x", self._rows(HIDDEN), ("batch", "token", None)),
            Port("bias", TensorType((EXPERTS,), dtype), (None,)),
            Port("logit_index", rows, ("batch", "row")),
        ]
        if modality == "mask":
            mask = TensorType(("batch", "tokens"), torch.bool)
            self.inputs.append(Port("modality", mask, ("batch", "token")))
        if modality == "count":
            self.inputs.append(Port("modality", TensorType(("batch",), torch.int64), ("batch",)))
        self.ports = {port.name: self.input(port.name, port.type) for port in self.inputs}

    def _rows(self, width: int, dtype: torch.dtype | None = None) -> TensorType:
        return TensorType(("batch", "tokens", width), dtype or self.dtype)

    def weight(self, name: str, *shape: int, of: torch.Tensor | None = None) -> fx.Node:
        value = torch.randn(shape, generator=self.generator, dtype=self.dtype) if of is None else of
        return get_param(self.program, self.graph, name, value)

    def linear(self, x: fx.Node, name: str, width: int, inputs: int) -> fx.Node:
        if self.modality is None:
            weight = self.weight(name, width, inputs)
            return self.call(aten.linear.default, x, weight, kind=self._rows(width))
        scales, modality = torch.tensor([0.02, 0.05]), self.ports["modality"]
        factors = self.weight(f"{name}.x_scale", of=scales)
        made = self.call(
            _mqc.quantize_static.default, x, factors, modality, kind=self._rows(inputs, torch.int8)
        )
        weight = torch.randint(-127, 128, (width, inputs), generator=self.generator)
        stored = self.weight(f"{name}.q", of=weight.to(torch.int8))
        scale = self.weight(f"{name}.scale", of=torch.rand(width, generator=self.generator) / 99)
        args = (made, stored, scale, factors, modality, None, None, None)
        return self.call(_mqc.linear_w8a8.default, *args, kind=self._rows(width))

    def expert(self, number: int, x: fx.Node, chosen: fx.Node, weights: fx.Node) -> fx.Node:
        one, flag = self._rows(1), self._rows(1, torch.bool)
        match = self.call(aten.eq.Scalar, chosen, number, kind=self._rows(CHOICES, torch.bool))
        any_match = self.call(aten.any.dim, match, -1, True, kind=flag)
        routed = self.call(aten.to.dtype, any_match, self.dtype, kind=one)
        column = self.call(aten.mul.Tensor, weights, match, kind=self._rows(CHOICES))
        weight = self.call(aten.sum.dim_IntList, column, [-1], True, kind=one)
        own = self.call(aten.mul.Tensor, x, routed, kind=self._rows(HIDDEN))
        wide = self.linear(own, f"experts.{number}.up", 2 * INNER, HIDDEN)
        half = self._rows(INNER)
        gate = self.call(aten.slice.Tensor, wide, 2, 0, INNER, kind=half)
        up = self.call(aten.slice.Tensor, wide, 2, INNER, 2 * INNER, kind=half)
        inner = self.call(
            aten.mul.Tensor, self.call(aten.silu.default, gate, kind=half), up, kind=half
        )
        inner = self.call(_mqc.hadamard.default, inner, INNER, kind=half)
        output = self.linear(inner, f"experts.{number}.down", HIDDEN, INNER)
        return self.call(aten.mul.Tensor, output, weight, kind=self._rows(HIDDEN))

    def build(self, experts: int = EXPERTS) -> Program:
        x, many = self.ports["x"], self._rows(EXPERTS)
        gate = self.weight("router", EXPERTS, HIDDEN)
        scores = self.call(aten.linear.default, x, gate, self.ports["bias"], kind=many)
        scores = self.call(aten.softmax.int, scores, -1, kind=many)
        order = self.call(
            aten.argsort.default, scores, -1, True, kind=self._rows(EXPERTS, torch.int64)
        )
        chosen = self.call(
            aten.slice.Tensor, order, -1, 0, CHOICES, kind=self._rows(CHOICES, torch.int64)
        )
        weights = self.call(aten.gather.default, scores, -1, chosen, kind=self._rows(CHOICES))
        total = None
        for number in range(experts):
            made = self.expert(number, x, chosen, weights)
            if total is not None:
                made = self.call(aten.add.Tensor, total, made, kind=self._rows(HIDDEN))
            total = made
        assert total is not None
        total = self.call(aten.add.Tensor, x, total, kind=self._rows(HIDDEN))
        rows = self.ports["logit_index"]
        kind = TensorType(("batch", "rows", 1), torch.int64)
        index = self.call(aten.unsqueeze.default, rows, 2, kind=kind)
        wide = kind.with_shape("batch", "rows", HIDDEN)
        index = self.call(aten.expand.default, index, [-1, -1, HIDDEN], kind=wide)
        picked = TensorType(("batch", "rows", HIDDEN), self.dtype)
        result = self.call(aten.gather.default, total, 1, index, kind=picked)
        self.graph.output((result,))
        outputs = [Port("y", picked, ("batch", "row", None))]
        self.program.components["decoder"] = Component("decoder", self.graph, self.inputs, outputs)
        self.program.dialect = "quantized"
        return self.program


@cache
def dense(modality: str | None = None) -> Program:
    return Mixture(torch.float64 if modality is None else torch.float32, modality).build()


@cache
def routed(modality: str | None, select: bool) -> Program:
    passes = [SelectRows(), RouteExperts()] if select else [RouteExperts()]
    manager = PassManager(passes)
    program = manager.run(dense(modality), PassContext())
    assert manager.records[-1].counts == {"mixtures": 1, "experts": EXPERTS}
    return program


def values(program: Program, batch: int, tokens: int, bias: list[float]) -> dict[str, Any]:
    """Inputs; ``bias`` of the router's scores decides who is chosen often, always or never."""
    generator = torch.Generator().manual_seed(tokens)
    made: dict[str, Any] = {
        "x": torch.randn(batch, tokens, HIDDEN, generator=generator, dtype=program.dtype),
        "bias": torch.tensor(bias, dtype=program.dtype),
        "logit_index": torch.arange(tokens).flip(0).expand(batch, -1),
    }
    kinds = {port.name: port.type.dtype for port in program.components["decoder"].inputs}
    if kinds.get("modality") == torch.bool:
        made["modality"] = torch.rand(batch, tokens, generator=generator) < 0.5
    elif "modality" in kinds:
        made["modality"] = torch.randint(0, tokens + 1, (batch,), generator=generator)
    return made


def run(program: Program, given: dict[str, Any]) -> torch.Tensor:
    ports = program.components["decoder"].inputs
    result: torch.Tensor = program.module("decoder")(*(given[port.name] for port in ports))[0]
    return result


BIASES = st.lists(st.sampled_from([-99.0, 0.0, 0.0, 99.0]), min_size=EXPERTS, max_size=EXPERTS)


@settings(max_examples=15, deadline=None)
@given(BIASES, st.integers(1, 2), st.integers(1, 5), st.booleans())
def test_float_sums_stay(bias: list[float], batch: int, tokens: int, select: bool) -> None:
    """In float64; a product of other matrix sizes may round otherwise."""
    given = values(dense(), batch, tokens, bias)
    found, wanted = run(routed(None, select), given), run(dense(), given)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)


@settings(max_examples=15, deadline=None)
@given(BIASES, st.integers(1, 2), st.integers(1, 5), st.sampled_from(["mask", "count"]))
def test_quantized_sums_are_the_same_bits(
    bias: list[float], batch: int, tokens: int, modality: str
) -> None:
    given = values(dense(modality), batch, tokens, bias)
    for select in (False, True):
        assert torch.equal(run(routed(modality, select), given), run(dense(modality), given))


@pytest.mark.parametrize("library", [None, "none"])
@pytest.mark.parametrize("modality", ["mask", "count"])
def test_onnx_gives_the_same_bits(
    modality: str, library: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the operator library, where there is one, and without; by the target's own lowering."""
    if library is not None:
        monkeypatch.setenv("MQC_ONNX_OPS", library)
    sessions: list[ort.InferenceSession] = []
    for device in ("cpu", "cuda"):  # experts are routed for the CPU alone
        lowered = OnnxTarget(device=device).lower(dense(modality))
        kinds = {str(node.target) for node in lowered.components["decoder"].graph.nodes}
        assert ("mqc.join_rows.default" in kinds) == (device == "cpu")
        (tmp_path / device).mkdir()
        emit(lowered, tmp_path / device)
        sessions.append(open_session(tmp_path / device / "decoder.onnx", threads=1))
    for tokens, bias in ((1, [0.0] * 4), (5, [0.0] * 4), (4, [99.0, -99.0, 99.0, 0.0])):
        given = values(dense(modality), 2, tokens, bias)
        feeds = {name: np.ascontiguousarray(value.numpy()) for name, value in given.items()}
        one, two = (session.run(None, feeds)[0] for session in sessions)
        assert np.array_equal(one, two)
        np.testing.assert_allclose(one, run(dense(modality), given), rtol=1e-5, atol=1e-5)


def test_experts_see_their_own_rows_alone() -> None:
    """Each linear's rows, for a routing that leaves one expert out and sends all rows to one."""
    program, seen = routed(None, True), []

    class Watch(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target is aten.linear.default:
                seen.append(args[0].shape[:2].numel())
            return super().call_function(target, args, kwargs)

    given = values(program, 2, 3, [0.0, 99.0, -99.0, 0.0])
    inputs = [given[port.name] for port in program.components["decoder"].inputs]
    Watch(program.module("decoder")).run(*inputs)
    router, *experts = seen
    assert router == 6 and experts[2:4] == [6, 6] and experts[4:6] == [0, 0]
    assert sum(experts) == 2 * 6 * CHOICES


def test_text(request: pytest.FixtureRequest) -> None:
    text = format_program(routed("count", False))
    if request.config.getoption("--update-golden"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text(), "review, then run with --update-golden"


def test_other_sums_are_no_mixtures() -> None:
    """An expert is missing; the choice is no sorting order; partial sums are read elsewhere."""

    def count(program: Program) -> int:
        return len(find_mixtures(program.components["decoder"]))

    assert count(dense().copy()) == 1
    assert count(Mixture(torch.float64).build(experts=EXPERTS - 1)) == 0
    unsorted = dense().copy()
    graph = unsorted.components["decoder"].graph
    (order,) = graph.find_nodes(op="call_function", target=aten.argsort.default)
    order.target = aten.floor_divide.default
    assert count(unsorted) == 0
    partial = dense().copy()
    graph = partial.components["decoder"].graph
    first = next(iter(graph.find_nodes(op="call_function", target=aten.add.Tensor)))
    graph.output_node().args = ((first,),)
    assert count(partial) == 0


def test_an_expert_that_is_read_elsewhere_is_a_skip() -> None:
    program = dense().copy()
    graph = program.components["decoder"].graph
    mixture = find_mixtures(program.components["decoder"])[0]
    total = graph.output_node().args[0][0].args[0]  # type: ignore[index,union-attr]
    with graph.inserting_after(mixture.node):
        both = graph.call_function(aten.add.Tensor, (mixture.node, mixture.branches[1].value))
    both.meta = dict(mixture.node.meta)
    total.replace_input_with(mixture.node, both)
    manager = PassManager([RouteExperts()])
    manager.run(program, PassContext())
    assert [skip.reason for skip in manager.records[0].skips] == [
        "an expert's values are read elsewhere, or made before the choice"
    ]


def test_a_mixture_that_stays_is_noticed() -> None:
    result = RouteExperts().run(dense().copy(), PassContext(limit=0))
    with pytest.raises(PassPostconditionError, match="adds up whole experts"):
        RouteExperts().ensures(result)


def test_pieces_are_results_of_one_call() -> None:
    """One split for what all experts read, one for the rows' modality."""
    graph = routed("count", False).components["decoder"].graph
    splits = graph.find_nodes(op="call_function", target=_mqc.split_rows.default)
    assert len(splits) == 2 and all(node.meta["type"] == TUPLE for node in splits)
    assert all(len(node.users) == EXPERTS for node in splits)
