// Rows of bf16 or f16 times int4 or int8 weights, for the kernel of linear_mma.cuh.
//
// Weights become values of the rows' type in registers, exactly, so a product of a weight and a row's
// value is exact in float32. mma.m16n8k16 sums a group; the scale multiplies the group's sum, not the
// weights: these would have to be rounded to 8 bits (bf16), and a sum takes one fused multiply-add for
// every group where the weights take a multiplication for every two. Without groups the sums of a
// tile's 128 inputs join the others with scale one: short chains keep the tensor cores' rounding small.
#pragma once

#include "mqc/halves.cuh"
#include "mqc/linear.cuh"

namespace mqc {

// Shared memory behind Shape::kSharedBytes: scales of the groups, [stage][warp along k][weight tile].
template <class Shape> MQC_D uint32_t half_scales(const LinearParams& p, uint32_t shared, int stage) {
  return shared + Shape::kSharedBytes + stage * (Shape::kWarpsK * Shape::kTiles) * p.scale_bytes;
}

// Starts the copies of the scales that belong to the input tiles of a stage.
template <class Shape>
MQC_D void half_load_scales(const LinearParams& p, uint32_t to, int tile, int tile_end, int first_channel_tile,
                            int thread) {
  static_assert(Shape::kWarpsK * Shape::kTiles * 64 <= Shape::kThreads, "a thread copies at most 16 bytes");
  const int per_tile = p.scale_bytes / 16;  // 64 >> group_log2, or none
  if (thread >= Shape::kWarpsK * Shape::kTiles * per_tile) return;
  const int column = thread >> (6 - p.group_log2), chunk = thread & (per_tile - 1);
  const int channel_tile = first_channel_tile + column % Shape::kTiles, input_tile = tile + column / Shape::kTiles;
  const bool valid = input_tile < tile_end && channel_tile < p.channel_tiles;
  const uint8_t* from = weight_tile<typename Shape::Format>(p, valid ? channel_tile : 0, valid ? input_tile : 0);
  gpu::copy_async16(to + thread * 16, from + Shape::Format::kTileBytes + chunk * 16, valid);
}

// Multiplies one input tile: addresses in shared memory of its weights, its rows and its scales.
template <class Shape>
MQC_D void half_multiply(const LinearParams& p, float (&sums)[Shape::kI][Shape::kJ][4], uint32_t weights,
                         uint32_t tokens, uint32_t scales, int warp_channel, int warp_token, int lane) {
  using Format = typename Shape::Format;
  using Row = typename Format::Row;
  float group[Shape::kI][Shape::kJ][4] = {};
#pragma unroll(Shape::kSums == 32 ? 1 : Shape::kSums > 32 ? 2 : 4)  // two blocks leave no register for the next step's values
  for (int step = 0; step < kStepsPerTile; ++step) {
    uint32_t words[Shape::kI][Format::kBits / 2];  // one for 16 inputs of two rows, or of one
    MQC_UNROLL
    for (int i = 0; i < Shape::kI; ++i) {
      const int fragment = warp_channel * Shape::kI + i;  // of 16 channels, in the block
      const uint32_t tile = weights + fragment / 4 * Format::kTileBytes;
      const int thread = fragment % 4 * 32 + lane;
      if constexpr (Format::kBits == 4) {
        gpu::load_shared8(words[i], tile + packed_vector(step / 2, thread) + step % 2 * 8);
      } else {
        const gpu::Vector16 loaded = gpu::load_shared16(tile + packed_vector(step, thread));
        MQC_UNROLL
        for (int r = 0; r < 4; ++r) words[i][r] = loaded.word[r];
      }
    }
    MQC_UNROLL
    for (int half = 0; half < 2; ++half) {
      uint32_t a[Shape::kI][4];
      MQC_UNROLL
      for (int i = 0; i < Shape::kI; ++i) {
        if constexpr (Format::kBits == 4) unpack_int4_pairs<Row>(words[i][half], a[i]);
        else unpack_int8_pairs<Row>(words[i][2 * half], words[i][2 * half + 1], a[i]);
      }
      MQC_UNROLL
      for (int j = 0; j < Shape::kJ; ++j) {
        const int token = (warp_token * Shape::kJ + j) * 8 + lane / 4, chunk = 4 * step + 2 * half + lane % 4 / 2;
        uint32_t b[2];
        gpu::load_shared8(b, tokens + swizzled_half_chunk(token, chunk) + lane % 2 * 8);
        MQC_UNROLL
        for (int i = 0; i < Shape::kI; ++i) gpu::mma_half<Row>(group[i][j], a[i], b[0], b[1]);
      }
    }
    if (((step + 1) & ((1 << p.group_log2) - 1)) != 0) continue;
    MQC_UNROLL
    for (int i = 0; i < Shape::kI; ++i) {
      const int fragment = warp_channel * Shape::kI + i;
      float scale[2] = {1.0f, 1.0f};
      if (p.scale_bytes != 0) {
        MQC_UNROLL
        for (int upper = 0; upper < 2; ++upper) {
          const int channel = fragment % 4 * 16 + accumulator_row(lane, 2 * upper);
          const int index = (step >> p.group_log2) * kTileChannels + channel;
          scale[upper] = gpu::load_shared_float(scales + fragment / 4 * p.scale_bytes + index * 4);
        }
      }
      MQC_UNROLL
      for (int j = 0; j < Shape::kJ; ++j) {
        MQC_UNROLL
        for (int r = 0; r < 4; ++r) {
          sums[i][j][r] = fma_rn(group[i][j][r], scale[r / 2], sums[i][j][r]);
          group[i][j][r] = 0.0f;
        }
      }
    }
  }
}

}  // namespace mqc
