// What the kernels of a linear share: parameters, and the epilogue from accumulators to rows of y.
#pragma once

#include "mqc/gpu.cuh"
#include "mqc/layout.cuh"
#include "mqc/rows.cuh"

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
  int32_t channel_tiles;  // ceil(n / 64)
  int32_t input_tiles;    // ceil(k / 128)
  int32_t split_k;
  int32_t split_columns;
  int32_t vector_io;      // rows of y and residual can be accessed 16 bytes at a time
  int32_t band;           // of tile_order, persistent kernel
};

// Elements of a row of the staging buffer: 64 channels and 16 bytes, so that the two-byte writes of
// a fragment (rows two apart) fall into different banks.
template <class T, int kChannels> constexpr int kStagePitch = kChannels + 16 / static_cast<int>(sizeof(T));

// Activation scale of a row of the product; 0 past its end.
MQC_D float token_scale(const LinearParams& p, int row) {
  return row < p.rows ? row_scale(p.rows_scale, row) : 0.0f;
}

// Writes the 16 x 8 fragments of a warp to the staging buffer [tokens][kPitch], rounded to T.
//   sums[i][j]: fragment of channels 16 i.. and tokens 8 j.. of this warp
//   scales: activation scales by token of the buffer, in shared memory
//   channel, token: first channel and token of the warp in the product; *_local: in the buffer
template <class T, int kBits, int kPitch, int kI, int kJ>
MQC_D void stage_fragments(const LinearParams& p, const int32_t (&sums)[kI][kJ][4], T* stage,
                           const float* scales, int channel, int token, int channel_local, int token_local,
                           int lane) {
  MQC_UNROLL
  for (int i = 0; i < kI; ++i) {
    float w_scale[2], bias[2];
    MQC_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int c = channel + 16 * i + lane / 4 + 8 * half;
      w_scale[half] = c < p.n ? p.w_scale[c] : 0.0f;
      bias[half] = p.bias != nullptr && c < p.n ? p.bias[c] : 0.0f;
    }
    MQC_UNROLL
    for (int j = 0; j < kJ; ++j) {
      MQC_UNROLL
      for (int r = 0; r < 4; ++r) {
        const int c = 16 * i + accumulator_row(lane, r), t = 8 * j + accumulator_column(lane, r);
        const int row = token + t;
        float y = scaled_sum(sums[i][j][r], weight_unit<kBits>(), w_scale[r >> 1], scales[token_local + t]);
        if (p.bias != nullptr) y = add_rn(y, bias[r >> 1]);
        if (p.x_split != nullptr && row < p.rows && channel + c < p.n) {
          const T* x_split = static_cast<const T*>(p.x_split) + row * p.x_split_stride;
          y = add_rn(y, split_term(x_split, p.w_split + static_cast<int64_t>(channel + c) * p.split_columns,
                                   p.split_columns));
        }
        stage[(token_local + t) * kPitch + channel_local + c] = from_float<T>(y);
      }
    }
  }
}

// y + residual, rounded once more, as the unfused add does.
template <class T> MQC_D T add_residual(T y, T residual) {
  return from_float<T>(add_rn(to_float(y), to_float(residual)));
}

// Copies kTokens x kChannels values from the staging buffer to y, adding the residual. Called by
// kThreads threads (thread: 0 .. kThreads - 1) after a barrier.
template <class T, int kPitch, int kChannels, int kTokens, int kThreads>
MQC_D void write_rows(const LinearParams& p, const T* stage, int channel, int token, int thread) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  if (p.vector_io) {
    constexpr int kPerRow = kChannels / kVector;
    for (int index = thread; index < kPerRow * kTokens; index += kThreads) {
      const int t = index / kPerRow, c = index % kPerRow * kVector;
      const int64_t row = token + t;
      if (row >= p.rows || channel + c >= p.n) continue;
      union {
        gpu::Vector16 vector;
        T value[kVector];
      } out, add;
      out.vector = *reinterpret_cast<const gpu::Vector16*>(stage + t * kPitch + c);
      if (p.residual != nullptr) {
        add.vector = gpu::load16(static_cast<const T*>(p.residual) + row * p.residual_stride + channel + c);
        MQC_UNROLL
        for (int v = 0; v < kVector; ++v) out.value[v] = add_residual(out.value[v], add.value[v]);
      }
      gpu::store16(static_cast<T*>(p.y) + row * p.y_stride + channel + c, out.vector);
    }
  } else {
    for (int index = thread; index < kChannels * kTokens; index += kThreads) {
      const int t = index / kChannels, c = index % kChannels;
      const int64_t row = token + t;
      if (row >= p.rows || channel + c >= p.n) continue;
      T y = stage[t * kPitch + c];
      if (p.residual != nullptr)
        y = add_residual(y, static_cast<const T*>(p.residual)[row * p.residual_stride + channel + c]);
      static_cast<T*>(p.y)[row * p.y_stride + channel + c] = y;
    }
  }
}

}  // namespace mqc
