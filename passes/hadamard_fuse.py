"""Offline rotation of the residual streams and of the value heads, folded into the weights."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from mqc.analysis.attention import Unpaired, ValueOutputPair, find_attention
from mqc.analysis.flow import NORMS, ChannelFlow, Site
from mqc.analysis.streams import Stream, find_free_groups, find_streams
from mqc.errors import PassPreconditionError
from mqc.ir import Program
from mqc.ir.edit import (
    argument,
    aten,
    call,
    eliminate_dead_code,
    param_value,
    set_param,
    tensor_type,
)
from mqc.numerics.rotation import rotation
from mqc.passes.rotate_group import GroupRotation, hadamard, has_fast
from mqc.transform import Pass, PassContext, PassResult, Skip


class HadamardFuse(Pass):
    """Rotate residual streams and value heads, offline (MQuant section 3.4, QuaRot).

    Every stream gets one random orthogonal R: writers take R on their output side, readers R^T on
    their input side, so the function is unchanged and outliers are spread over all channels.
    LayerNorm streams use an R whose first row is 1/sqrt(n): in that basis the mean is channel 0,
    so LayerNorm is RMSNorm once channel 0 is zero. Value heads get a rotation on the head axis.

    Postcondition: no LayerNorm is left on a rotated stream; what had to stay online is counted.
    """

    name = "hadamard-fuse"
    after = ("canonicalize", "fuse-norm")
    preserves = True

    def requires(self, program: Program) -> None:
        if program.dialect != "canonical":
            raise PassPreconditionError(
                f"hadamard-fuse needs a canonical float program, not {program.dialect!r}",
                hint="run canonicalize and fuse-norm first, quantizing passes later",
            )

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program)
        generator = torch.Generator().manual_seed(ctx.seed)
        for stream in find_streams(ChannelFlow(program)):
            norms = [site for site in stream.group.sources if site.node.target in NORMS]
            if has_fast(stream.width) and len(norms) > 1:
                continue  # a fast transform behind each is cheaper than a matrix
            for site in norms:
                if ctx.take():
                    _split_gain(program, site.node)
                    result.counts["gains_as_linears"] += 1
        flow = ChannelFlow(program)
        streams = find_streams(flow)
        for group in [*(stream.group for stream in streams), *find_free_groups(flow)]:
            if not ctx.take():
                continue
            keep_mean = any(site.node.target == aten.layer_norm.default for site in group.norms)
            if group.sources and keep_mean and has_fast(group.width):
                matrix = hadamard(group.width)
            else:
                matrix = rotation(group.width, generator, keep_mean_row=keep_mean)
            GroupRotation(program, flow, group, matrix, keep_mean).run()
            is_stream = any(stream.group is group for stream in streams)
            result.counts["streams" if is_stream else "free_groups"] += 1
            result.counts["online"] += len(group.sources) + len(group.barriers)
            result.details.append({"stream": Stream(group).describe()})
            for site in group.sources:
                result.skips.append(Skip(_where(site), f"rotated online: {_source_reason(site)}"))
            for site in group.barriers:
                reason = f"rotated back online for {site.node.target}"
                result.skips.append(Skip(_where(site), reason))
        for pair in find_attention(program):
            if isinstance(pair, Unpaired):
                result.skips.append(Skip(f"{pair.component}.%{pair.attention.name}", pair.reason))
            elif ctx.take():
                _rotate_heads(program, pair, rotation(pair.head_dim, generator))
                result.counts["value_heads"] += 1
        eliminate_dead_code(program)
        return result


def _where(site: Site) -> str:
    return f"{site.component}.%{site.node.name}"


def _source_reason(site: Site) -> str:
    if site.node.target in NORMS:
        return "the gain of a norm that writes the stream stands between two bases"
    return f"no weight writes what {site.node.target} gives"


def _split_gain(program: Program, norm: fx.Node) -> None:
    """``norm(x, gain, bias)`` that starts a stream: a plain norm and a linear diag(gain), bias.

    The gain stands between two bases, so it cannot be folded into either; as a linear it can take
    a rotation on both sides, which costs the same as rotating online.
    """
    gain = param_value(program.params, argument(norm, 2))
    shift = param_value(program.params, argument(norm, 3)) if len(norm.args) > 3 else None
    gain_node = argument(norm, 2)
    if gain is None:
        width = tensor_type(norm).shape[-1]
        assert isinstance(width, int)
        gain = torch.ones(width, dtype=tensor_type(norm).dtype)
    hint = str(gain_node.target) if isinstance(gain_node, fx.Node) else norm.name
    with norm.graph.inserting_after(norm):
        linear = call(norm.graph, aten.linear.default, (norm, None), tensor_type(norm), norm)
    norm.replace_all_uses_with(linear, delete_user_cb=lambda user: user is not linear)
    set_param(program, linear, 1, torch.diag(gain), hint)
    if norm.target == aten.layer_norm.default:
        if shift is not None:
            set_param(program, linear, 2, shift, hint.removesuffix("weight") + "bias")
        norm.args = (*norm.args[:2], None, None, *norm.args[4:])
    else:
        norm.args = (*norm.args[:2], None, *norm.args[3:])


def _rotate_heads(program: Program, pair: ValueOutputPair, matrix: Tensor) -> None:
    """W_v[head] = R W_v[head], W_o[:, head] = W_o[:, head] R^T for every head."""
    rows, columns = pair.value_rows, pair.output_columns
    for node in pair.values:
        weight = program.params[str(node.args[1].target)].to(torch.float64)  # type: ignore[union-attr]
        rotated = weight.clone()
        rotated[rows] = torch.einsum("ij,hjk->hik", matrix, weight[rows])
        bias = param_value(program.params, argument(node, 2))
        set_param(program, node, 1, rotated.to(program.dtype))
        if bias is not None:
            shifted = bias.to(torch.float64).clone()
            shifted[rows] = bias.to(torch.float64)[rows] @ matrix.T
            set_param(program, node, 2, shifted.to(program.dtype))
    for node in pair.outputs:
        out = program.params[str(node.args[1].target)].to(torch.float64)  # type: ignore[union-attr]
        turned = out.clone()
        turned[:, columns] = out[:, columns] @ matrix.T
        set_param(program, node, 1, turned.to(program.dtype))
