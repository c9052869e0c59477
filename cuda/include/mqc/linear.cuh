// What the kernels of a linear share: parameters, and the epilogue from accumulators to rows of y.
#pragma once

#include "mqc/gpu.cuh"
#include "mqc/layout.cuh"
#include "mqc/rows.cuh"
#include "mqc/vectors.cuh"

namespace mqc {

struct LinearParams {
  const int8_t* x;
  const uint8_t* w;
  const float* w_scale;
  const float* bias;     // or null
  const void* x_split;   // or null
  const float* w_split;
  const void* residual;  // or null
  void* y;
  int32_t* partial;      // [tile][split][register][thread] sums of blocks that share a tile
  uint32_t* counters;    // [tile], zero between launches
  RowScale rows_scale;
  int64_t x_stride, y_stride, residual_stride, x_split_stride;
  int32_t rows, n, k;
  int32_t dtype;          // mqc_dtype of y, residual and x_split
  int32_t channel_tiles;  // ceil(n / 64)
  int32_t input_tiles;    // ceil(k / 128)
  int32_t split_k;
  int32_t split_columns;
  int32_t vector_io;      // y, residual, w_scale and bias can be accessed 16 bytes at a time
  int32_t band;           // of tile_order, persistent kernel
};

// Sums of a tile wait in shared memory as int32 [tokens][kStagePitch]: four more words a row, so
// that the writes of a fragment (rows two apart) fall into different banks.
template <int kChannels> constexpr int kStagePitch = kChannels + 4;

// Activation scale of a row of the product; 0 past its end.
MQC_D float token_scale(const LinearParams& p, int row) {
  return row < p.rows ? row_scale(p.rows_scale, row) : 0.0f;
}

// Writes a 16 x 8 fragment to the staging buffer; channel, token: of its first value in the buffer.
template <int kPitch> MQC_D void stage_fragment(const int32_t* sums, int32_t* stage, int channel, int token, int lane) {
  MQC_UNROLL
  for (int r = 0; r < 4; ++r)
    stage[(token + accumulator_column(lane, r)) * kPitch + channel + accumulator_row(lane, r)] = sums[r];
}

// y of one row and channel, in float32 and the order of the reference.
template <class T>
MQC_D float finished_value(const LinearParams& p, int32_t sum, float unit, float w_scale, float x_scale, float bias,
                           int64_t row, int64_t channel) {
  float y = scaled_sum(sum, unit, w_scale, x_scale);
  if (p.bias != nullptr) y = add_rn(y, bias);
  if (p.x_split != nullptr) {
    const T* x_split = static_cast<const T*>(p.x_split) + row * p.x_split_stride;
    y = add_rn(y, split_term(x_split, p.w_split + channel * p.split_columns, p.split_columns));
  }
  return y;
}

// y + residual: y is rounded first, the sum once more, as the unfused add does.
template <class T> MQC_D T finished(float y, bool add, T residual) {
  const T rounded = from_float<T>(y);
  return add ? from_float<T>(add_rn(to_float(rounded), to_float(residual))) : rounded;
}

template <class T, int kPitch, int kChannels, int kTokens, int kThreads>
MQC_D void write_rows_of(const LinearParams& p, const int32_t* stage, const float* scales, float unit, int channel,
                         int token, int thread) {
  constexpr int kVector = kVectorOf<T>;
  const bool add = p.residual != nullptr;
  const T* residual = static_cast<const T*>(p.residual);
  T* y = static_cast<T*>(p.y);
  if (p.vector_io) {
    constexpr int kPerRow = kChannels / kVector;
    for (int index = thread; index < kPerRow * kTokens; index += kThreads) {
      const int t = index / kPerRow, c = channel + index % kPerRow * kVector;
      const int64_t row = token + t;
      if (row >= p.rows || c >= p.n) continue;
      union {
        gpu::Vector16 vector;
        T value[kVector];
      } out, other;
      if (add) other.vector = gpu::load16(residual + row * p.residual_stride + c);
      MQC_UNROLL
      for (int four = 0; four < kVector; four += 4) {
        float w_scale[4], bias[4] = {}, sums[4];
        load_vector(p.w_scale + c + four, w_scale);
        if (p.bias != nullptr) load_vector(p.bias + c + four, bias);
        load_floats(reinterpret_cast<const float*>(stage + t * kPitch + index % kPerRow * kVector + four), sums);
        MQC_UNROLL
        for (int v = 0; v < 4; ++v) {
          const auto sum = static_cast<int32_t>(float_bits(sums[v]));
          const float value = finished_value<T>(p, sum, unit, w_scale[v], scales[t], bias[v], row, c + four + v);
          out.value[four + v] = finished(value, add, other.value[four + v]);
        }
      }
      gpu::store16(y + row * p.y_stride + c, out.vector);
    }
  } else {
    for (int index = thread; index < kChannels * kTokens; index += kThreads) {
      const int t = index / kChannels, c = channel + index % kChannels;
      const int64_t row = token + t;
      if (row >= p.rows || c >= p.n) continue;
      const float bias = p.bias != nullptr ? p.bias[c] : 0.0f;
      const int32_t sum = stage[t * kPitch + index % kChannels];
      const float value = finished_value<T>(p, sum, unit, p.w_scale[c], scales[t], bias, row, c);
      y[row * p.y_stride + c] = finished(value, add, add ? residual[row * p.residual_stride + c] : T{});
    }
  }
}

// Turns kTokens x kChannels staged sums into rows of y. Called by kThreads threads (thread: 0 ..
// kThreads - 1) after a barrier.
//   scales: activation scales by token of the buffer, in shared memory
//   unit: what undoes the factor of unpacking; channel, token: first of the buffer in the product
template <int kPitch, int kChannels, int kTokens, int kThreads>
MQC_D void write_rows(const LinearParams& p, const int32_t* stage, const float* scales, float unit, int channel,
                      int token, int thread) {
  if (p.dtype == 1) {
    write_rows_of<bf16, kPitch, kChannels, kTokens, kThreads>(p, stage, scales, unit, channel, token, thread);
  } else if (p.dtype == 2) {
    write_rows_of<f16, kPitch, kChannels, kTokens, kThreads>(p, stage, scales, unit, channel, token, thread);
  } else {
    write_rows_of<float, kPitch, kChannels, kTokens, kThreads>(p, stage, scales, unit, channel, token, thread);
  }
}

}  // namespace mqc
