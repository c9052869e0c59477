// What the kernels of a linear share: parameters, and the epilogue from accumulators to rows of y.
#pragma once

#include "mqc/gpu.cuh"
#include "mqc/layout.cuh"
#include "mqc/rows.cuh"
#include "mqc/vectors.cuh"

#include <type_traits>

namespace mqc {

struct LinearParams {
  const int8_t* x;       // or rows of a half type
  const uint8_t* w;
  const float* w_scale;
  const float* bias;     // or null
  const void* x_split;   // or null
  const float* w_split;
  const void* residual;  // or null
  void* y;
  void* partial;         // [tile][split][register][thread] sums of blocks that share a tile
  uint32_t* counters;    // [tile], zero between launches
  RowScale rows_scale;
  int64_t x_stride, y_stride, residual_stride, x_split_stride;  // x_stride in bytes
  int32_t rows, n, k;
  int32_t dtype;          // mqc_dtype of y, residual and x_split
  int32_t channel_tiles;  // ceil(n / 64)
  int32_t input_tiles;    // ceil(k / 128)
  int32_t split_k;
  int32_t split_columns;
  int32_t vector_io;      // rows of y and residual can be accessed 16 bytes at a time
  int32_t band;           // of tile_order, persistent kernel
  int32_t scale_bytes;    // of a tile's group scales; rows of half types
  int32_t group_log2;     // of the steps of 32 inputs that share a scale; rows of half types
};

// The sums of a thread: of the integers themselves, of groups times their scales, or of floats.
template <class Format> using SumOf = std::conditional_t<Format::kFloatSums, float, int32_t>;

// The packed weights of a tile.
template <class Format> MQC_D const uint8_t* weight_tile(const LinearParams& p, int64_t channel_tile, int64_t input_tile) {
  if constexpr (!Format::kFloatRows) return p.w + packed_tile<Format>(channel_tile, input_tile, p.input_tiles);
  return p.w + (channel_tile * p.input_tiles + input_tile) * (Format::kTileBytes + p.scale_bytes);
}

// Group sums join the float sums with one rounding each.
MQC_HD float add_group(float sum, int32_t group, float scale) { return fma_rn(static_cast<float>(group), scale, sum); }

// Scales of a group at `tile` (in shared memory) for the rows of an accumulator fragment: its registers
// 0, 1 belong to the first channel, 2, 3 to the one eight further.
template <class Format> MQC_D void load_scales(float (&scales)[2], uint32_t tile, int group, int first, int lane) {
  MQC_UNROLL
  for (int half = 0; half < 2; ++half)
    scales[half] = gpu::load_shared_float(tile + packed_scale<Format>(group, first + accumulator_row(lane, 2 * half)));
}

// Sums of a tile wait in shared memory as [tokens][kStagePitch] words: four more a row, so that the
// writes of a fragment (rows two apart) fall into different banks.
template <int kChannels> constexpr int kStagePitch = kChannels + 4;

// Activation scale of a row of the product; 0 past its end.
MQC_D float token_scale(const LinearParams& p, int row) {
  return row < p.rows ? row_scale(p.rows_scale, row) : 0.0f;
}

// Writes a 16 x 8 fragment to the staging buffer; channel, token: of its first value in the buffer.
template <int kPitch, class Sum>
MQC_D void stage_fragment(const Sum* sums, Sum* stage, int channel, int token, int lane) {
  MQC_UNROLL
  for (int r = 0; r < 4; ++r)
    stage[(token + accumulator_column(lane, r)) * kPitch + channel + accumulator_row(lane, r)] = sums[r];
}

// What the epilogue needs of one channel.
struct ChannelTerms {
  float w_scale, bias;
};
MQC_D ChannelTerms channel_terms(const LinearParams& p, int channel) {
  return ChannelTerms{p.w_scale[channel], p.bias != nullptr ? p.bias[channel] : 0.0f};
}

// y of one row and channel, in float32 and the order of the reference. x_first: of the row's split.
template <class T, class Sum>
MQC_D float finished_value(const LinearParams& p, Sum sum, float unit, const ChannelTerms& terms, float x_scale,
                           float x_first, int64_t row, int64_t channel) {
  float y = scaled_sum(sum, unit, terms.w_scale, x_scale);
  if (p.bias != nullptr) y = add_rn(y, terms.bias);
  if (p.x_split != nullptr)
    y = add_rn(y, split_term(x_first, static_cast<const T*>(p.x_split) + row * p.x_split_stride,
                             p.w_split + channel * p.split_columns, p.split_columns));
  return y;
}

// y + residual: y is rounded first, the sum once more, as the unfused add does.
template <class T> MQC_D T finished(float y, bool add, T residual) {
  const T rounded = from_float<T>(y);
  return add ? from_float<T>(add_rn(to_float(rounded), to_float(residual))) : rounded;
}

// A thread writes the same channels of every kRows-th row. What it needs from memory for kBatch rows
// is read before the first of them is written: y may be the residual, so nothing else may be assumed.
template <class T, int kPitch, int kChannels, int kTokens, int kThreads, int kVector, class Sum>
MQC_D void write_rows_of(const LinearParams& p, const Sum* stage, const float* scales, float unit, int channel,
                         int token, int thread) {
  constexpr int kPerRow = kChannels / kVector, kRows = kThreads / kPerRow;
  constexpr int kBatch = kVector == 1 || kTokens < 2 * kRows ? 1 : 2;
  static_assert(kThreads % kPerRow == 0, "a thread keeps its channels");
  const bool add = p.residual != nullptr;
  const int local = thread % kPerRow * kVector, c = channel + local;
  if (c >= p.n) return;
  ChannelTerms terms[kVector];
  MQC_UNROLL
  for (int v = 0; v < kVector; ++v) terms[v] = channel_terms(p, c + v);
  union Values {
    gpu::Vector16 vector;
    T value[16 / sizeof(T)];
  };
  for (int first = thread / kPerRow; first < kTokens; first += kRows * kBatch) {
    Values other[kBatch];
    float x_first[kBatch] = {};
    MQC_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      const int t = first + b * kRows;
      const int64_t row = token + t;
      if (t >= kTokens || row >= p.rows) continue;
      const T* from = static_cast<const T*>(p.residual) + row * p.residual_stride + c;
      if (add && kVector == 1) other[b].value[0] = *from;
      if (add && kVector > 1) other[b].vector = gpu::load16(from);
      if (p.x_split != nullptr) x_first[b] = to_float(static_cast<const T*>(p.x_split)[row * p.x_split_stride]);
    }
    MQC_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      const int t = first + b * kRows;
      const int64_t row = token + t;
      if (t >= kTokens || row >= p.rows) continue;
      Values out;
      MQC_UNROLL
      for (int v = 0; v < kVector; ++v) {
        const float value = finished_value<T>(p, stage[t * kPitch + local + v], unit, terms[v], scales[t], x_first[b],
                                              row, c + v);
        out.value[v] = finished(value, add, other[b].value[v]);
      }
      T* to = static_cast<T*>(p.y) + row * p.y_stride + c;
      if (kVector == 1) *to = out.value[0];
      else gpu::store16(to, out.vector);
    }
  }
}

template <class T, int kPitch, int kChannels, int kTokens, int kThreads, class Sum>
MQC_D void write_rows_as(const LinearParams& p, const Sum* stage, const float* scales, float unit, int channel,
                         int token, int thread) {
  if (p.vector_io) {
    write_rows_of<T, kPitch, kChannels, kTokens, kThreads, kVectorOf<T>>(p, stage, scales, unit, channel, token, thread);
  } else {
    write_rows_of<T, kPitch, kChannels, kTokens, kThreads, 1>(p, stage, scales, unit, channel, token, thread);
  }
}

// Turns kTokens x kChannels staged sums into rows of y. Called by kThreads threads (thread: 0 ..
// kThreads - 1) after a barrier.
//   scales: activation scales by token of the buffer, in shared memory
//   unit: what undoes the factor of unpacking; channel, token: first of the buffer in the product
//   Row: the type of x, where y has it too or is float32; void where y may have any
template <int kPitch, int kChannels, int kTokens, int kThreads, class Row = void, class Sum>
MQC_D void write_rows(const LinearParams& p, const Sum* stage, const float* scales, float unit, int channel,
                      int token, int thread) {
  if constexpr (!std::is_void_v<Row>) {
    if (p.dtype == 3) {
      write_rows_as<float, kPitch, kChannels, kTokens, kThreads>(p, stage, scales, unit, channel, token, thread);
    } else {
      write_rows_as<Row, kPitch, kChannels, kTokens, kThreads>(p, stage, scales, unit, channel, token, thread);
    }
  } else if (p.dtype == 1) {
    write_rows_as<bf16, kPitch, kChannels, kTokens, kThreads>(p, stage, scales, unit, channel, token, thread);
  } else if (p.dtype == 2) {
    write_rows_as<f16, kPitch, kChannels, kTokens, kThreads>(p, stage, scales, unit, channel, token, thread);
  } else {
    write_rows_as<float, kPitch, kChannels, kTokens, kThreads>(p, stage, scales, unit, channel, token, thread);
  }
}

}  // namespace mqc
