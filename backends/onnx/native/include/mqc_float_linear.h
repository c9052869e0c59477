/* The linear of float activations and integer weights ("weight-only" quantization): the C ABI.
 *
 *   y = x . (w * w_scale)^T + bias + x_split . w_split^T + residual
 *
 * Activations are not quantized. Weights and per-channel parameters have the layouts of
 * mqc_kernels.h, whose conventions hold here too but for one: sums are of float32 products with
 * fused multiply-add in an order that depends on the instruction set, so results are equal bit by
 * bit for every number of threads, and between instruction sets within rounding.
 */
#ifndef MQC_FLOAT_LINEAR_H
#define MQC_FLOAT_LINEAR_H

#include "mqc_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  mqc_linear_shape shape;
  int64_t m;             /* rows, >= 0 */
  const void* packed;    /* mqc_linear_pack */
  const float* w_scale;  /* columns form, width = groups */
  const float* x;        /* [m, k] */
  const float* bias;     /* [n] or null */
  int64_t split;         /* rank of the split term, 0 = none */
  const float* x_split;  /* [m, split] */
  const float* w_split;  /* columns form, width = split */
  const float* residual; /* [m, n] or null; may be y itself */
  float* y;              /* [m, n] */
  void* workspace;       /* mqc_float_linear_workspace_bytes() bytes, or null: allocated inside */
} mqc_float_linear_call;

/* Bytes of scratch memory for a call on that many threads; negative status where it is not valid. */
MQC_API int64_t mqc_float_linear_workspace_bytes(const mqc_float_linear_call* call,
                                                 int32_t threads);

MQC_API mqc_status mqc_float_linear(const mqc_float_linear_call* call, const mqc_threads* threads);

#ifdef __cplusplus
}
#endif

#endif /* MQC_FLOAT_LINEAR_H */
