"""Spelled-out RMSNorms: ``x * rsqrt(mean(x^2) + eps) [* gain]`` as one ``aten.rms_norm``."""

from __future__ import annotations

from torch import fx

from mqc.ir.edit import aten, call, is_tensor, replace, tensor_type
from mqc.transform import PassContext


def match_rms_norm(rsqrt: fx.Node, ctx: PassContext) -> int:
    """Replace every ``x * rsqrt`` that is an RMSNorm of ``x``; how many there were."""
    add = rsqrt.args[0]
    if not (isinstance(add, fx.Node) and add.target == aten.add.Tensor):
        return 0
    mean, eps = add.args[0], add.args[1]
    if not (isinstance(mean, fx.Node) and mean.target == aten.mean.dim and not is_tensor(eps)):
        return 0
    square = mean.args[0]
    if mean.args[1] != [-1] or not isinstance(square, fx.Node):
        return 0
    source = _squared(square)
    width = None if source is None else tensor_type(source).shape[-1]
    if source is None or not isinstance(width, int):
        return 0
    count = 0
    for product in list(rsqrt.users):
        if product.target != aten.mul.Tensor or set(product.args) != {source, rsqrt}:
            continue
        if not ctx.take():
            continue
        last, gain = _with_gain(product, width)
        with last.graph.inserting_before(last):
            args = (source, [width], gain, eps)
            norm = call(last.graph, aten.rms_norm.default, args, tensor_type(last), last)
        replace(last, norm)
        count += 1
    return count


def _squared(node: fx.Node) -> fx.Node | None:
    value = node.args[0]
    if node.target == aten.pow.Tensor_Scalar and node.args[1] == 2:
        return value if isinstance(value, fx.Node) else None
    if node.target == aten.mul.Tensor and node.args[1] is value:
        return value if isinstance(value, fx.Node) else None
    return None


def _with_gain(product: fx.Node, width: int) -> tuple[fx.Node, fx.Node | None]:
    """The multiplication by a gain parameter that follows, if it is the only reader."""
    users = list(product.users)
    if len(users) == 1 and users[0].target == aten.mul.Tensor:
        for gain in users[0].args:
            if not (isinstance(gain, fx.Node) and gain.op == "get_attr"):
                continue
            if tensor_type(gain).shape == (width,):
                return users[0], gain
    return product, None
