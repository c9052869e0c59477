// Rows and scales: which modality a row has, quantization of a value, the epilogue of a linear.
#pragma once

#include "mqc/base.cuh"

namespace mqc {

// How rows find their scale; `kind` as mqc_modality of mqc_cuda.h.
struct RowScale {
  const float* scale;          // [1], or [2]: text, visual
  const void* modality;        // by kind
  int32_t rows_per_sequence;   // kind 1
  int32_t kind;                // 0 none, 1 int64 counts, 2 byte mask
};

MQC_HD int row_modality(const RowScale& rows, int32_t row) {
  if (rows.kind == 1) {
    const int32_t sequence = row / rows.rows_per_sequence;
    const int64_t visual = static_cast<const int64_t*>(rows.modality)[sequence];
    return row - sequence * rows.rows_per_sequence < visual ? 1 : 0;
  }
  if (rows.kind == 2) return static_cast<const uint8_t*>(rows.modality)[row] ? 1 : 0;
  return 0;
}

MQC_HD float row_scale(const RowScale& rows, int32_t row) { return rows.scale[row_modality(rows, row)]; }

// clamp(round_half_even(x / scale), -127, 127); NaN gives 0.
MQC_HD int quantize_value(float x, float scale) {
  const float steps = rintf(div_rn(x, scale));
  if (!(steps >= -127.0f)) return steps != steps ? 0 : -127;
  return steps > 127.0f ? 127 : static_cast<int>(steps);
}

// Sum over split columns of one row and one channel: the first product is rounded by itself, as a
// product of one column is in the reference. x_first is x_split[0].
template <class T> MQC_HD float split_term(float x_first, const T* x_split, const float* w_split, int columns) {
  float sum = mul_rn(x_first, w_split[0]);
  MQC_NO_UNROLL
  for (int j = 1; j < columns; ++j) sum = fma_rn(to_float(x_split[j]), w_split[j], sum);
  return sum;
}

// Integer sum, or the sum of scaled groups -> float, in the order of the reference. `unit` undoes
// what unpacking multiplied.
template <class Sum> MQC_HD float scaled_sum(Sum sum, float unit, float w_scale, float x_scale) {
  return mul_rn(mul_rn(mul_rn(static_cast<float>(sum), unit), w_scale), x_scale);
}

}  // namespace mqc
