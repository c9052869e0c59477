"""Fold the gains and biases of norms, and layer scales, into the linears around them."""

from __future__ import annotations

import torch
from torch import fx

from mqc.analysis.flow import NORMS, ChannelFlow, Group, is_linear
from mqc.errors import PassPreconditionError
from mqc.ir import Program
from mqc.ir.edit import (
    argument,
    aten,
    eliminate_dead_code,
    param_value,
    replace,
    set_param,
    tensor_type,
)
from mqc.passes.split_sums import split_sums
from mqc.transform import Pass, PassContext, PassResult, Skip


class FuseNorm(Pass):
    """Fold norm gains and biases into the linears that read them (MQuant section 3, SliceGPT).

    Postcondition: a norm has gain or bias only where a skip says why; a linear's output is not
    multiplied by a per-channel parameter. Where one norm feeds several linears, all take its gain.
    """

    name = "fuse-norm"
    after = ("canonicalize",)
    preserves = True

    def requires(self, program: Program) -> None:
        if program.dialect == "captured":
            raise PassPreconditionError(
                "fuse-norm needs a canonical program", hint="run the pass canonicalize first"
            )

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program)
        for component in program:
            for node in list(component.graph.nodes):
                if _fold_layer_scale(program, node, ctx):
                    result.counts["layer_scales"] += 1
            if sums := split_sums(program, component, ctx):
                result.counts["sums"] += sums
        eliminate_dead_code(program)  # sums that nobody reads any more
        flow = ChannelFlow(program, norms_open=True)
        for component in program:
            for node in list(component.graph.nodes):
                if node.target not in NORMS or not _has_affine(node):
                    continue
                reason = _obstacle(flow, node)
                if reason is not None:
                    result.skips.append(Skip(f"{component.name}.%{node.name}", reason))
                elif ctx.take():
                    group = flow.group_of(node)
                    assert group is not None
                    _fold_norm(program, node, group)
                    result.counts["norms"] += 1
        eliminate_dead_code(program)
        return result


def _has_affine(node: fx.Node) -> bool:
    return argument(node, 2) is not None or (
        node.target == aten.layer_norm.default and argument(node, 3) is not None
    )


def _fold_layer_scale(program: Program, node: fx.Node, ctx: PassContext) -> bool:
    """``linear(x) * scale`` with one scale a channel: into the rows of the weight."""
    if node.target != aten.mul.Tensor:
        return False
    for linear, scale in (node.args, node.args[::-1]):
        if not (isinstance(linear, fx.Node) and is_linear(linear) and len(linear.users) == 1):
            continue
        gain = param_value(program.params, scale)
        if gain is None or tuple(gain.shape) != tensor_type(linear).shape[-1:] or not ctx.take():
            continue
        weight = param_value(program.params, linear.args[1])
        bias = param_value(program.params, argument(linear, 2))
        assert weight is not None
        set_param(program, linear, 1, weight * gain[:, None])
        if bias is not None:
            set_param(program, linear, 2, bias * gain)
        replace(node, linear)
        return True
    return False


def _obstacle(flow: ChannelFlow, node: fx.Node) -> str | None:
    """Why the affine part of ``node`` cannot move into its readers, or None."""
    group = flow.group_of(node)
    if group is None:
        return "the normalised axis has a symbolic size"
    if len(group.writers) != 1 or group.adds or group.sources or group.constants:
        return "the output joins a residual stream"
    if group.barriers:
        site = group.barriers[0]
        return f"the output is read by {site.node.target} (%{site.node.name})"
    if not group.readers:
        return "no linear reads the output"
    shifted = node.target == aten.layer_norm.default and argument(node, 3) is not None
    if shifted and any(site.scaled for site in group.readers):
        return "its bias is scaled on the way to a linear"
    return None


def _fold_norm(program: Program, node: fx.Node, group: Group) -> None:
    gain = param_value(program.params, argument(node, 2))
    is_layer_norm = node.target == aten.layer_norm.default
    shift = param_value(program.params, argument(node, 3)) if is_layer_norm else None
    for site in group.readers:
        linear = site.node
        weight = param_value(program.params, linear.args[1])
        assert weight is not None
        exact = weight.to(torch.float64)
        if shift is not None:
            bias = param_value(program.params, argument(linear, 2))
            moved = exact @ shift.to(torch.float64).repeat(site.blocks)
            total = moved if bias is None else bias.to(torch.float64) + moved
            hint = str(linear.args[1].target).removesuffix(".weight") + ".bias"  # type: ignore[union-attr]
            set_param(program, linear, 2, total.to(weight.dtype), hint)
        if gain is not None:
            scaled = exact * gain.to(torch.float64).repeat(site.blocks)
            set_param(program, linear, 1, scaled.to(weight.dtype))
    args = list(node.args)
    for index in range(2, 4 if is_layer_norm else 3):
        if index < len(args):
            args[index] = None
    node.args = tuple(args)
