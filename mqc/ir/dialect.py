"""Dialects: which operators a program may hold at a stage of its lowering.

``captured`` is what ``torch.export`` gives. ``canonical`` is what every analysis and pass expects:
no guards, no casts between float types, ``reshape`` instead of views, whole norms, patch
convolutions as linears. ``quantized``
is the lowered form that backends emit; each of its operators has an implementation in every
backend, so its table is explicit. ``cuda`` adds the linear on packed weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mqc.ops._library import ADDED

VIEW_OPS = frozenset(
    f"aten.{name}"
    for name in (
        "reshape.default permute.default transpose.int unsqueeze.default squeeze.dim "
        "squeeze.dims squeeze.default expand.default slice.Tensor select.int split.Tensor "
        "split_with_sizes.default unbind.int cat.default stack.default chunk.default "
        "flatten.using_ints unflatten.int repeat.default repeat_interleave.self_int t.default "
        "movedim.int roll.default pixel_shuffle.default pixel_unshuffle.default"
    ).split()
)
INDEX_OPS = frozenset(
    f"aten.{name}"
    for name in (
        "index.Tensor index_select.default gather.default embedding.default "
        "masked_scatter.default masked_fill.Scalar where.self where.ScalarOther "
        "where.ScalarSelf where.Scalar index_put.default scatter.src argsort.default "
        "argsort.stable sort.stable cumsum.default arange.default arange.start "
        "arange.start_step one_hot.default tril.default triu.default"
    ).split()
)
POINTWISE_OPS = frozenset(
    f"aten.{name}"
    for name in (
        "add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Scalar mul.Tensor mul.Scalar "
        "div.Tensor div.Scalar neg.default pow.Tensor_Scalar pow.Scalar sqrt.default "
        "rsqrt.default reciprocal.default exp.default log.default sin.default cos.default "
        "tanh.default sigmoid.default relu.default gelu.default silu.default erf.default "
        "softplus.default clamp.default minimum.default maximum.default abs.default "
        "floor.default round.default eq.Tensor eq.Scalar ne.Tensor ne.Scalar lt.Tensor "
        "lt.Scalar le.Tensor le.Scalar gt.Tensor gt.Scalar ge.Tensor ge.Scalar "
        "logical_and.default logical_or.default logical_not.default bitwise_and.Tensor "
        "bitwise_or.Tensor bitwise_not.default __and__.Tensor __or__.Tensor to.dtype "
        "floor_divide.default remainder.Scalar"
    ).split()
)
CREATE_OPS = frozenset(
    f"aten.{name}"
    for name in (
        "full.default full_like.default zeros.default zeros_like.default ones.default "
        "ones_like.default new_zeros.default new_ones.default new_full.default "
        "scalar_tensor.default"
    ).split()
)
COMPUTE_OPS = frozenset(
    f"aten.{name}"
    for name in (
        "linear.default matmul.default bmm.default mm.default addmm.default "
        "conv1d.default conv2d.default conv3d.default rms_norm.default layer_norm.default "
        "scaled_dot_product_attention.default softmax.int _softmax.default mean.dim "
        "sum.dim_IntList amax.default amin.default any.dim all.dim avg_pool2d.default "
        "adaptive_avg_pool2d.default "
        "upsample_bilinear2d.vec upsample_bicubic2d.vec group_norm.default einsum.default"
    ).split()
)
SIZE_OPS = frozenset(
    (
        "aten.sym_size.int aten.item.default "
        "operator.add operator.sub operator.mul operator.floordiv "
        "operator.mod operator.getitem operator.neg operator.truediv math.trunc math.floor "
        "torch.sym_max torch.sym_min torch.sym_int torch.sym_not operator.pow operator.eq "
        "operator.ge operator.le operator.gt operator.lt"
    ).split()
)
MQC_FLOAT_OPS = frozenset(
    ("mqc.hadamard.default", "mqc.rank_update.default", "mqc.gated_delta.default"),
)
MQC_QUANTIZED_OPS = MQC_FLOAT_OPS | frozenset(
    f"mqc.{name}.default"
    for name in (
        "quantize_static linear_w4a8 linear_w8a8 linear_w4a16 linear_w8a16 embedding_w8 "
        "rms_norm_quantize activation_quantize attention attention_int8 attention_full token_order "
        "take_tokens take_keys rotary_angles route_rows split_rows join_rows"
    ).split()
)
UNCANONICAL_OPS = frozenset(
    f"aten.{name}"
    for name in (
        "view.default _unsafe_view.default contiguous.default clone.default dropout.default "
        "detach.default alias.default flatten.using_ints unflatten.int _to_copy.default "
        "type_as.default _assert_tensor_metadata.default _assert_scalar.default "
        "_assert_async.msg sym_constrain_range_for_size.default"
    ).split()
)
_SHARED = VIEW_OPS | INDEX_OPS | POINTWISE_OPS | CREATE_OPS | COMPUTE_OPS | SIZE_OPS


@dataclass(frozen=True)
class Dialect:
    """A table: all operators, or only ``legal`` ones, may occur, but never ``banned`` ones.

    ``open``: those that packages added (:func:`mqc.ops.add_operator`) may occur as well.
    """

    name: str
    legal: frozenset[str] | None = None
    banned: frozenset[str] = frozenset()
    open: bool = False

    def illegal(self, targets: Iterable[str]) -> list[str]:
        """Those of ``targets`` that may not occur, sorted, without repeats."""
        found = set(targets)
        wrong = found & self.banned
        if self.legal is not None:
            added = {f"mqc.{name}.default" for name in ADDED} if self.open else set()
            wrong |= found - self.legal - added
        return sorted(wrong)


DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect("captured"),
        Dialect("canonical", banned=UNCANONICAL_OPS),
        Dialect("quantized", legal=_SHARED | MQC_QUANTIZED_OPS, open=True),
        Dialect(
            "cuda",
            legal=_SHARED
            | MQC_QUANTIZED_OPS
            | {"mqc_cuda.linear.default", "mqc_cuda.linear_a16.default"},
        ),
    )
}
