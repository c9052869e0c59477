"""Static int8 activations: one calibrated scale per tensor and modality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, fx

from mqc.analysis.modality import MIXED, Domain, Modality, find_domains
from mqc.calib.observers import Observer, make_observer
from mqc.calib.samples import component_samples
from mqc.calib.walk import Values, walk
from mqc.errors import PassPreconditionError
from mqc.ir import Component, Program, TensorType
from mqc.ir.edit import call, get_param, param_value, replace, tensor_type
from mqc.numerics.packing import unpack_int4
from mqc.passes.modality_split import INPUT
from mqc.spec import ActivationSpec, ComponentScheme, Scheme, named_scheme
from mqc.transform import Pass, PassContext, PassResult, Skip

if TYPE_CHECKING:
    from mqc.calib.walk import Sample

_mqc = torch.ops.mqc
_INTEGER: dict[Any, Any] = {
    _mqc.linear_w4a16.default: _mqc.linear_w4a8.default,
    _mqc.linear_w8a16.default: _mqc.linear_w8a8.default,
}


class StaticScales(Pass):
    """Quantize the inputs of weight-quantized linears to int8 with calibrated static scales.

    One scale per tensor, or per tensor and modality where rows are mixed and ``modality-split``
    ran (MSQ, MQuant section 3.2). Linears that read the same value share its integers. Channels
    that meet only zero weights (split off by ``rms-suppress``) do not count for the range.
    Calibration goes layer by layer through what is already quantized.

    Postcondition: in a component with activation bits every weight-quantized linear is
    ``mqc::linear_w4a8`` or ``linear_w8a8`` behind ``mqc::quantize_static``; the head only where
    the scheme says so, with one scale for the rows that it is asked for.
    """

    name = "static-scales"
    after = ("quantize-weights", "modality-split", "rms-suppress")

    def __init__(self, scheme: Scheme | None = None) -> None:
        self.scheme = scheme or named_scheme("w4a8")

    @classmethod
    def from_scheme(cls, scheme: Scheme) -> Self:
        return cls(scheme)

    def requires(self, program: Program) -> None:
        if program.facts.get("kv_order", "natural") != "natural":
            raise PassPreconditionError(
                "static-scales must run before aifs-reorder", hint="reorder the pass list"
            )

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program)
        for component in program:
            spec = self.scheme.component(component.name)
            found = any(n.target in _INTEGER for n in component.graph.nodes)
            if spec.activations.quantized and found:
                samples = component_samples(program, ctx.calibration, component.name)
                _Scaler(program, component, spec, result, ctx).run(samples)
        return result


def _observer(spec: ActivationSpec) -> Observer:
    options = {"percentile": spec.percentile} if spec.observer == "percentile" else {}
    return make_observer(spec.observer, spec.bits or 8, **options)


class _Scaler:
    def __init__(
        self,
        program: Program,
        component: Component,
        spec: ComponentScheme,
        result: PassResult,
        ctx: PassContext,
    ) -> None:
        self.program = program
        self.component = component
        self.spec = spec
        self.result = result
        self.ctx = ctx
        self.domains: dict[fx.Node, Domain] = find_domains(program)
        self.asked = [port for port in component.inputs if port.axis("row") is not None]
        self.placed: dict[fx.Node, fx.Node] = {}

    def run(self, samples: Sequence[Sample]) -> None:
        def visit(node: fx.Node, values: Values) -> Sequence[fx.Node] | None:
            if node in self.placed:
                return [self.placed[node]]
            if not self._wanted(node) or not self.ctx.take():
                return None
            value = node.args[0]
            assert isinstance(value, fx.Node)
            integers = self._quantize(node, value, values)
            return [integers, self.placed[node]]

        name = f"calibrate {self.component.name}"
        walk(
            self.program,
            self.component,
            samples,
            visit,
            lambda done, total: self.ctx.progress(name, done, total),
        )

    def _wanted(self, node: fx.Node) -> bool:
        """A weight-quantized linear, the head only where its activations are quantized."""
        return node.target in _INTEGER and (self.spec.static_head or not self._is_head(node))

    def _is_head(self, node: fx.Node) -> bool:
        """Whether a linear's rows are those that the host asks for."""
        rows = tensor_type(node).shape[:-1]
        return any(rows == port.type.shape for port in self.asked)

    def _quantize(self, first: fx.Node, value: fx.Node, values: Values) -> fx.Node:
        """Calibrate ``value``, quantize it before ``first``, and let all its linears read that."""
        head = self._is_head(first)
        mixed = self.domains.get(value) == MIXED and self.component.has_input(INPUT) and not head
        modality = self.component.placeholder(INPUT) if mixed else None
        spec = self.spec.head_activations if head else self.spec.activations
        scales = self._observe(value, values, modality, spec)
        graph = first.graph
        with graph.inserting_before(first):
            tensor = torch.tensor(scales, dtype=self.program.dtype)
            scale = get_param(self.program, graph, f"{value.name}.x_scale", tensor)
            kind = TensorType(tensor_type(value).shape, torch.int8)
            args: tuple[Any, ...] = (value, scale, modality)
            integers = call(graph, _mqc.quantize_static.default, args, kind, first)
        layers = []
        for node in [user for user in value.users if self._wanted(user)]:
            _, qweight, w_scale, bias, x_split, w_split = node.args
            args = (integers, qweight, w_scale, scale, modality, bias, x_split, w_split)
            with graph.inserting_before(node):
                new = call(graph, _INTEGER[node.target], args, tensor_type(node), node)
            new.meta.update({key: node.meta[key] for key in ("bits", "layer") if key in node.meta})
            replace(node, new)
            self.placed[node] = new
            layers.append(str(node.meta.get("layer", node.name)))
            self.result.counts["linears"] += 1
        self.result.counts["activations"] += 1
        names = ("text", "visual") if mixed else ("all",)
        self.result.details.append(
            {
                "component": self.component.name,
                "layers": layers,
                "scales": dict(zip(names, scales, strict=True)),
            }
        )
        return integers

    def _observe(
        self, value: fx.Node, values: Values, modality: fx.Node | None, spec: ActivationSpec
    ) -> list[float]:
        count = 1 if modality is None else len(Modality)
        observers = [_observer(spec) for _ in range(count)]
        rows = [0] * count
        keep = ~self._ignored(value)
        masks: list[Any] = [None] * len(values(value)) if modality is None else values(modality)
        for x, mask in zip(values(value), masks, strict=True):
            x = x[..., keep]
            parts = [x] if mask is None else [x[~mask], x[mask]]
            for index, part in enumerate(parts):
                # Rows of zeros are tokens that another expert takes: they say nothing.
                part = part[part.ne(0).any(dim=-1)]
                if part.numel():
                    observers[index].update(part)
                    rows[index] += part.numel()
        seen = [o.scale() for o, n in zip(observers, rows, strict=True) if n]
        if len(seen) < count:
            missing = [m.name.lower() for m in Modality if m.value < count and not rows[m.value]]
            reason = f"no {missing[0]} rows in the calibration set: the other modality's scale"
            if not seen:
                reason = "no row of the calibration set reaches it: scale 1"
            self.result.skips.append(Skip(f"{self.component.name}.%{value.name}", reason))
        if not seen and all(bool(x[..., keep].eq(0).all()) for x in values(value)):
            return [1.0] * count
        if not seen:
            return [observers[0].scale()]  # raises the observer's own error
        return [o.scale() if n else max(seen) for o, n in zip(observers, rows, strict=True)]

    def _ignored(self, value: fx.Node) -> Tensor:
        """Channels of ``value`` that only meet zero weights in the linears that read it."""
        width = tensor_type(value).shape[-1]
        assert isinstance(width, int)
        ignored = torch.ones(width, dtype=torch.bool)
        for user in value.users:
            if user.target in _INTEGER and user.args[0] is value:
                q = param_value(self.program.params, user.args[1])
                assert q is not None
                q = unpack_int4(q, width) if q.dtype == torch.uint8 else q
                ignored &= (q == 0).all(dim=0)
        return ignored if not bool(ignored.all()) else torch.zeros(width, dtype=torch.bool)
