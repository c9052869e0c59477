"""Weights to integers: round to nearest, or GPTQ on calibrated inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, fx

import mqc.ops  # noqa: F401  (registers the operators that this pass puts in)
from mqc.analysis.experts import MASK, rows_of
from mqc.analysis.flow import is_linear
from mqc.analysis.head import find_head
from mqc.analysis.modality import Modality
from mqc.analysis.routing import find_routers
from mqc.calib.samples import component_samples
from mqc.calib.walk import Values, walk
from mqc.errors import PassPreconditionError
from mqc.ir import Component, Program
from mqc.ir.edit import (
    argument,
    aten,
    call,
    eliminate_dead_code,
    get_param,
    param_value,
    replace,
    tensor_type,
)
from mqc.numerics.gptq import HessianAccumulator, gptq_quantize, row_energy
from mqc.numerics.quantize import ClipSearch, QuantizedWeight, quantize_rtn
from mqc.numerics.stats import sqnr_db
from mqc.spec import ComponentScheme, Scheme, WeightSpec, named_scheme
from mqc.transform import Pass, PassContext, PassResult, Skip

if TYPE_CHECKING:
    from mqc.calib.walk import Sample


class QuantizeWeights(Pass):
    """Replace linears by weight-only quantized ones, one copy of the weights for all modalities.

    RTN or GPTQ (arXiv 2210.17323) per output channel or group, 8, 4, 3 or 2 bits, with clip search
    and act-order as the scheme says. GPTQ runs layer by layer: a layer's Hessian comes from inputs
    that passed the already quantized layers in front of it. Columns that are zero (split off)
    stay zero.

    Postcondition: every linear of a component with weight bits is ``mqc::linear_w4a16`` or
    ``linear_w8a16``, unless a skip says why; its error is in the details.
    """

    name = "quantize-weights"
    after = ("canonicalize", "fuse-norm", "hadamard-fuse", "hadamard-online", "rms-suppress")

    def __init__(self, scheme: Scheme | None = None) -> None:
        self.scheme = scheme or named_scheme("w4a16")

    @classmethod
    def from_scheme(cls, scheme: Scheme) -> Self:
        return cls(scheme)

    def requires(self, program: Program) -> None:
        if program.dialect != "canonical":
            raise PassPreconditionError(
                f"quantize-weights needs a canonical float program, not {program.dialect!r}",
                hint="run the pass canonicalize first; quantize once only",
            )

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program)
        for component in program:
            spec = self.scheme.component(component.name)
            if not (spec.weights.quantized or (spec.head and spec.head.quantized)):
                continue
            plan = _plan(component, spec, result)
            quantizer = _Quantizer(program, component, plan, result, ctx)
            if any(weights.method == "gptq" for weights in plan.values()):
                quantizer.run_calibrated(
                    component_samples(program, ctx.calibration, component.name)
                )
            else:
                quantizer.run()
        eliminate_dead_code(program)
        return result


def _plan(
    component: Component, spec: ComponentScheme, result: PassResult
) -> dict[fx.Node, WeightSpec]:
    """The weight spec of every linear and embedding that is to be quantized."""
    head = find_head(component)
    kept = dict.fromkeys(find_routers(component), "a router chooses experts by comparison")
    plan = {}
    for node in component.graph.nodes:
        weights = spec.head if node is head else spec.weights
        if weights is None or not weights.quantized:
            continue
        if is_linear(node):
            reason = node.meta.get("keep_float") or kept.get(node)
            if reason is not None:
                result.skips.append(Skip(f"{component.name}.%{node.name}", str(reason)))
            else:
                plan[node] = weights
        elif node.target == aten.embedding.default and component.name == "embed":
            plan[node] = weights
    return plan


class _Quantizer:
    def __init__(
        self,
        program: Program,
        component: Component,
        plan: dict[fx.Node, WeightSpec],
        result: PassResult,
        ctx: PassContext,
    ) -> None:
        self.program = program
        self.component = component
        self.plan = plan
        self.result = result
        self.ctx = ctx
        self.rows = rows_of(component)
        self.hessians: dict[tuple[fx.Node, Modality | None], Tensor] = {}
        self.without_rows: set[tuple[fx.Node, Modality]] = set()

    def run(self) -> None:
        """Round to nearest: no data needed."""
        for index, node in enumerate(self.plan):
            self.ctx.progress(f"quantize {self.component.name}", index, len(self.plan))
            if self.ctx.take():
                self._replace(node, self._integers(node))

    def run_calibrated(self, samples: Sequence[Sample]) -> None:
        def visit(node: fx.Node, values: Values) -> Sequence[fx.Node] | None:
            if node not in self.plan or not self.ctx.take():
                return None
            return self._replace(node, self._integers(node, values))

        name = f"quantize {self.component.name}"
        walk(
            self.program,
            self.component,
            samples,
            visit,
            lambda done, total: self.ctx.progress(name, done, total),
        )

    def _integers(self, node: fx.Node, values: Values | None = None) -> QuantizedWeight:
        """A layer's weight in integers, found or, where a killed compile goes on, recalled."""
        spec, source = self.plan[node], _source(node)
        group = self._group_size(source, spec)
        if spec.method != "gptq" or not is_linear(node):
            values = None
        if values is not None:
            self._check_rows(node, values)
        part = self.ctx.journal.recall(f"{self.component.name}.%{node.name}")
        if part is None:
            hessian = None if values is None else self._hessian(node, values)
            weight = param_value(self.program.params, source)
            assert weight is not None
            try:
                quantized = _quantize(weight.to(torch.float32), spec, group, hessian)
            except Exception as error:
                error.add_note(f"while quantizing {_layer(source)}")
                raise
            detail = self._detail(_layer(source), weight, quantized, hessian)
            part = {"q": quantized.q, "scale": quantized.scale}, detail
            self.ctx.journal.keep(f"{self.component.name}.%{node.name}", *part)
        tensors, detail = part
        self.result.counts[f"w{spec.bits}"] += 1
        self.result.details.append(detail)
        assert spec.bits is not None
        return QuantizedWeight(tensors["q"], tensors["scale"], spec.bits, group)

    def _group_size(self, source: fx.Node, spec: WeightSpec) -> int | None:
        group, width = spec.group_size, tensor_type(source).shape[1]
        assert isinstance(width, int)
        if group is not None and width % group:
            reason = f"groups of {group} do not divide {width}: one scale per channel"
            self.result.skips.append(Skip(_layer(source), reason))
            return None
        return group

    def _check_rows(self, node: fx.Node, values: Values) -> None:
        """Say where the weights of one modality's expert find no rows of their own."""
        wanted, value = self.rows.get(node), node.args[0]
        assert isinstance(value, fx.Node)
        if wanted is None or (value, wanted) in self.without_rows:
            return
        masks = values(self.component.placeholder(MASK))
        if not any(bool((m == (wanted is Modality.VISUAL)).any()) for m in masks):
            self.without_rows.add((value, wanted))
            where = f"{self.component.name}.%{node.name}"
            reason = f"no {wanted.name.lower()} rows in the calibration set: all rows are used"
            self.result.skips.append(Skip(where, reason))

    def _hessian(self, node: fx.Node, values: Values) -> Tensor:
        """Second moments of the inputs; shared by all linears that read the same value.

        The weights of one modality's expert see its rows alone, where calibration has any.
        """
        value = node.args[0]
        assert isinstance(value, fx.Node)
        key = (value, self.rows.get(node))
        if key not in self.hessians:
            if any(known is not value for known, _ in self.hessians):
                self.hessians.clear()  # readers of one value are neighbours
            width = tensor_type(value).shape[-1]
            assert isinstance(width, int)
            accumulator = HessianAccumulator(width)
            for x in self._inputs(node, value, values):
                accumulator.add(x)
            self.hessians[key] = accumulator.hessian()
        return self.hessians[key]

    def _inputs(self, node: fx.Node, value: fx.Node, values: Values) -> Sequence[Tensor]:
        wanted = self.rows.get(node)
        if wanted is None or (value, wanted) in self.without_rows:
            return values(value)
        masks = values(self.component.placeholder(MASK))
        visual = wanted is Modality.VISUAL
        parts = [x[m == visual] for x, m in zip(values(value), masks, strict=True)]
        return [part for part in parts if len(part)]

    def _replace(self, node: fx.Node, quantized: QuantizedWeight) -> list[fx.Node]:
        name = _layer(_source(node))
        graph, dtype = node.graph, self.program.dtype
        with graph.inserting_before(node):
            integers = quantized.q if quantized.bits == 8 else quantized.packed()
            q = get_param(self.program, graph, f"{name}.q", integers)
            scale = get_param(self.program, graph, f"{name}.scale", quantized.scale.to(dtype))
            args: tuple[Any, ...]
            if node.target == aten.embedding.default:
                target, args = torch.ops.mqc.embedding_w8.default, (node.args[1], q, scale)
            else:
                ops = torch.ops.mqc
                target = (ops.linear_w8a16 if quantized.bits == 8 else ops.linear_w4a16).default
                args = (node.args[0], q, scale, argument(node, 2), None, None)
            new = call(graph, target, args, tensor_type(node), node)
        new.meta["bits"] = quantized.bits
        new.meta["layer"] = name
        replace(node, new)
        return [new]

    def _detail(
        self, name: str, weight: Tensor, quantized: QuantizedWeight, hessian: Tensor | None
    ) -> dict[str, Any]:
        restored = quantized.dequantize()
        detail = {
            "layer": name,
            "component": self.component.name,
            "bits": quantized.bits,
            "group_size": quantized.group_size,
            "method": "gptq" if hessian is not None else "rtn",
            "shape": list(weight.shape),
            "weight_sqnr_db": round(float(sqnr_db(weight, restored)), 2),
        }
        if hessian is not None:
            exact = weight.to(hessian.dtype)
            signal = float(row_energy(exact, hessian).sum())
            noise = float(row_energy(exact - restored.to(hessian.dtype), hessian).sum())
            if signal > 0 and noise > 0:
                ratio = torch.tensor(signal / noise)
                detail["output_sqnr_db"] = round(float(10 * torch.log10(ratio)), 2)
        return detail


def _source(node: fx.Node) -> fx.Node:
    """The parameter that a linear or an embedding reads."""
    source = node.args[0] if node.target == aten.embedding.default else node.args[1]
    assert isinstance(source, fx.Node)
    return source


def _layer(source: fx.Node) -> str:
    """The checkpoint's name of a weight."""
    return str(source.target).partition("~")[0]


def _quantize(
    weight: Tensor, spec: WeightSpec, group: int | None, hessian: Tensor | None
) -> QuantizedWeight:
    assert spec.bits is not None
    clip = ClipSearch() if spec.clip else None
    if hessian is None:
        return quantize_rtn(weight, spec.bits, group_size=group, clip=clip)
    return gptq_quantize(
        weight,
        hessian,
        bits=spec.bits,
        group_size=group,
        clip=clip,
        damping=spec.damping,
        act_order=spec.act_order,
        block_size=spec.blocksize,
        frozen=(weight == 0).all(dim=0),
    )
