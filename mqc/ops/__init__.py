"""The `mqc::` operators: schema, shape function, reference implementation and ONNX body of each.

Importing this package registers them with torch (`torch.ops.mqc.*`). The reference
implementations are the oracle every backend is compared with.

Integer convention
------------------
- activations: symmetric int8, ``q = clamp(round_half_even(x / s), -127, 127)``. The unsigned form
  is uint8 ``u = q + 128`` (zero point 128) for engines that multiply u8 x s8; the linear
  operators read the form from the dtype of ``xq``.
- weights: symmetric signed; 8 bits in [-127, 127] (int8), 4 in [-8, 7], 3 in [-4, 3], 2 in
  [-2, 1]. One scale an output channel (``[N]``), or one a group of K / G inputs (``[N, G]``).
- packed int4 (also the container of 3 and 2 bits): uint8 ``[N, ceil(K/2)]``, low nibble = even k,
  high nibble = odd k, two's complement, an odd K padded with 0.
- layout C16K4: either kind of weight as the CPU kernels read it, uint8 with five axes
  (`mqc.numerics.packing`); the onnx target writes static linears so, and their variant is `c16k4`.
- activation scales: ``[1]`` for all rows, or ``[2]`` indexed by modality: 0 text, 1 visual.
- ``modality``: None; bool ``[B, S]``, True = visual (mask form); or int64 ``[B]``, the number of
  leading visual tokens of each sequence (count form, after AIFS). x is then ``[B, S, K]``.

Fused operators (`rms_norm_quantize`, `activation_quantize`, `attention` and `attention_int8` over a
cache, `attention_full` without one, `token_order`, `take_tokens`, `take_keys`, `rotary_angles`, the
linears' `residual`) are what lowering passes write for targets with kernels for them. Each is
defined as the composition of the operators it replaces, so a lowered program gives the same bits as
before. `route_rows`, `split_rows` and `join_rows` give each expert of a mixture its own rows.

:func:`add_operator` takes an operator of another package (docs/passes.md has an example).

In ONNX an operator is a node of domain "ai.mqc", version 1; its op type names the variant by the
inputs present, e.g. ``LinearW4A8_count_bias_split`` (see `mqc.ops.onnx_functions`).
"""

from mqc.ops import (
    activation_quantize,
    attention,
    attention_full,
    attention_int8,
    embedding,
    gated_delta,
    hadamard,
    linear_a8,
    linear_a16,
    quantize_static,
    rank_update,
    rms_norm_quantize,
    rotary_angles,
    routed_rows,
    token_order,
)
from mqc.ops._library import OPS, OnnxForm, OpDef, add_operator

__all__ = [
    "OPS",
    "OnnxForm",
    "OpDef",
    "add_operator",
    "activation_quantize",
    "attention",
    "attention_full",
    "attention_int8",
    "embedding",
    "gated_delta",
    "hadamard",
    "linear_a8",
    "linear_a16",
    "quantize_static",
    "rank_update",
    "rms_norm_quantize",
    "rotary_angles",
    "routed_rows",
    "token_order",
]
