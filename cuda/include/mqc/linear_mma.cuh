// Linear with mma.sync (sm_80 on): weights are the left operand, tokens the columns.
//
// A block computes kChannels x kTokens outputs from a range of input tiles. Stages of shared memory
// are filled by cp.async; each warp multiplies its fragments. kWarpsK warps share a fragment, each
// taking every kWarpsK-th input tile. Blocks that share a tile of the product (split K) leave their
// sums in the workspace; the last to arrive adds them up, in the order of the blocks, and writes the
// rows. With a scale a group, products of one group are summed in int32 and join float sums. Rows of
// int8, or of a half type: what differs for these is in linear_half.cuh.
#pragma once

#include "mqc/linear.cuh"
#include "mqc/linear_half.cuh"

namespace mqc {

// Stages of a block: as many as wanted, or as fit the 99 KB of sm_89.
constexpr int stages_that_fit(int wanted, int stage_bytes, int other_bytes) {
  const int fit = (99 * 1024 - other_bytes) / stage_bytes;
  return fit < wanted ? fit : wanted;
}

template <class Format_, int kWarpsChannel_, int kWarpsToken_, int kWarpsK_, int kI_, int kJ_, int kStages_>
struct MmaShape {
  using Format = Format_;
  using Sum = SumOf<Format>;
  static constexpr int kWarpsChannel = kWarpsChannel_, kWarpsToken = kWarpsToken_, kWarpsK = kWarpsK_;
  static constexpr int kI = kI_;  // fragments of 16 channels a warp
  static constexpr int kJ = kJ_;  // fragments of 8 tokens a warp
  static constexpr int kChannels = kWarpsChannel * kI * 16;
  static constexpr int kTokens = kWarpsToken * kJ * 8;
  static constexpr int kWarpsOutput = kWarpsChannel * kWarpsToken;
  static constexpr int kThreads = 32 * kWarpsOutput * kWarpsK;
  static constexpr int kTiles = kChannels / kTileChannels;  // weight tiles side by side
  static constexpr int kWeightBytes = kTiles * Format::kTileBytes;
  static constexpr int kTokenBytes = kTokens * kTileInputs * Format::kInputBytes;
  static constexpr int kStageBytes = kWarpsK * (kWeightBytes + kTokenBytes);
  static constexpr int kOtherBytes = kTokens * 4 + 16;  // activation scales by token, the flag of the last block
  static constexpr int kStages = stages_that_fit(kStages_, kStageBytes, kOtherBytes);
  static constexpr int kSums = kI * kJ * 4;  // accumulators of a thread
  static constexpr int kBlocks = kTokens <= 64 && kThreads <= 256 ? 2 : 1;  // blocks a multiprocessor should hold
  static_assert(kChannels % kTileChannels == 0, "a block takes whole weight tiles");

  static constexpr int kOutputBytes = kTokens * kStagePitch<kChannels> * 4;
  static constexpr int kSumBytes = (kWarpsK - 1) * kWarpsOutput * kSums * 32 * 4;
  static constexpr int kLarger = kOutputBytes > kSumBytes ? kOutputBytes : kSumBytes;
  static constexpr int kArea = kStages * kStageBytes > kLarger ? kStages * kStageBytes : kLarger;
  static constexpr int kSharedBytes = kArea + kOtherBytes;  // and scales of groups, see half_scales
  static_assert(kStages >= 2 && kSharedBytes <= 99 * 1024, "a stage is filled while another is multiplied");
};

// Starts the copies of input tiles `tile`, tile + 1, .. (kWarpsK of them) to a stage.
template <class Shape>
MQC_D void mma_load_stage(const LinearParams& p, uint32_t stage, int tile, int tile_end, int first_channel_tile,
                          int first_token, int thread) {
  using Format = typename Shape::Format;
  constexpr int kChunks = Shape::kWarpsK * Shape::kWeightBytes / 16;
  MQC_UNROLL
  for (int base = 0; base < kChunks; base += Shape::kThreads) {
    const int index = base + thread;
    if (kChunks % Shape::kThreads != 0 && index >= kChunks) break;
    constexpr int kPerTile = Format::kTileBytes / 16;
    const int chunk = index % kPerTile, column = index / kPerTile;
    const int channel_tile = first_channel_tile + column % Shape::kTiles, input_tile = tile + column / Shape::kTiles;
    const bool valid = input_tile < tile_end && channel_tile < p.channel_tiles;
    const uint8_t* from = weight_tile<Format>(p, valid ? channel_tile : 0, valid ? input_tile : 0);
    gpu::copy_async16(stage + index * 16, from + chunk * 16, valid);
  }
  constexpr int kRowChunks = Shape::kWarpsK * Shape::kTokenBytes / 16;
  const uint32_t tokens = stage + Shape::kWarpsK * Shape::kWeightBytes;
  MQC_UNROLL
  for (int base = 0; base < kRowChunks; base += Shape::kThreads) {
    const int index = base + thread;
    if (kRowChunks % Shape::kThreads != 0 && index >= kRowChunks) break;
    constexpr int kPerRow = kTileInputs * Format::kInputBytes / 16, kInChunk = 16 / Format::kInputBytes;
    const int chunk = index % kPerRow, token = index / kPerRow % Shape::kTokens;
    const int part = index / (kPerRow * Shape::kTokens);
    const int input = (tile + part) * kTileInputs + chunk * kInChunk, row = first_token + token;
    const bool valid = tile + part < tile_end && row < p.rows && input < p.k;
    const int8_t* from = p.x + (valid ? row * p.x_stride + input * Format::kInputBytes : 0);
    const uint32_t to = tokens + part * Shape::kTokenBytes;
    if constexpr (Format::kFloatRows) {
      // What lies behind a row may be no number, and a weight of zero would not undo it.
      const int present = p.k - input < kInChunk ? p.k - input : kInChunk;
      gpu::copy_async_part(to + swizzled_half_chunk(token, chunk), from, valid ? present * Format::kInputBytes : 0);
    } else {
      gpu::copy_async16(to + swizzled_chunk(token, chunk), from, valid);
    }
  }
}

// Multiplies one input tile: `weights` and `tokens` are shared-memory addresses of its parts.
template <class Shape>
MQC_D void mma_multiply(typename Shape::Sum (&sums)[Shape::kI][Shape::kJ][4], uint32_t weights, uint32_t tokens,
                        int warp_channel, int warp_token, int lane) {
  using Format = typename Shape::Format;
  constexpr int kPerGroup = Format::kStepsPerGroup;
  int32_t group[Shape::kI][Shape::kJ][4];  // sums of the group at hand
#pragma unroll(kPerGroup < 4 ? 1 : 2)  // registers are scarce where nothing is kept between pairs
  for (int pair = 0; pair < 2; ++pair) {
    uint32_t a[Shape::kI][2][4];
    float scales[Shape::kI][2][2];  // of the groups that end at step 0 and 1 of the pair
    MQC_UNROLL
    for (int i = 0; i < Shape::kI; ++i) {
      const int fragment = warp_channel * Shape::kI + i;  // of 16 channels, in the block
      const uint32_t tile = weights + fragment / 4 * Format::kTileBytes;
      const int thread = fragment % 4 * 32 + lane;
      if constexpr (Format::kGrouped) {
        MQC_UNROLL
        for (int step = 0; step < 2; ++step)
          if ((2 * pair + step) % kPerGroup == kPerGroup - 1)
            load_scales<Format>(scales[i][step], tile, (2 * pair + step) / kPerGroup, fragment % 4 * 16, lane);
      }
      if constexpr (Format::kBits == 4) {
        const gpu::Vector16 packed = gpu::load_shared16(tile + packed_vector(pair, thread));
        MQC_UNROLL
        for (int word = 0; word < 4; ++word)
          unpack_int4(packed.word[word], a[i][word / 2][word % 2 * 2], a[i][word / 2][word % 2 * 2 + 1]);
      } else {
        MQC_UNROLL
        for (int step = 0; step < 2; ++step) {
          const gpu::Vector16 loaded = gpu::load_shared16(tile + packed_vector(2 * pair + step, thread));
          MQC_UNROLL
          for (int r = 0; r < 4; ++r) a[i][step][r] = loaded.word[r];
        }
      }
    }
    MQC_UNROLL
    for (int j = 0; j < Shape::kJ; ++j) {
      uint32_t b[4];
      const int token = (warp_token * Shape::kJ + j) * 8 + lane % 8;
      gpu::load_matrix4(b, tokens + swizzled_chunk(token, pair * 4 + lane / 8));
      MQC_UNROLL
      for (int i = 0; i < Shape::kI; ++i) {
        if constexpr (Format::kGrouped) {
          MQC_UNROLL
          for (int step = 0; step < 2; ++step) {
            const int number = 2 * pair + step;
            if (number % kPerGroup == 0) gpu::mma_s8_first(group[i][j], a[i][step], b[2 * step], b[2 * step + 1]);
            else gpu::mma_s8(group[i][j], a[i][step], b[2 * step], b[2 * step + 1]);
            if (number % kPerGroup != kPerGroup - 1) continue;
            MQC_UNROLL
            for (int r = 0; r < 4; ++r) sums[i][j][r] = add_group(sums[i][j][r], group[i][j][r], scales[i][step][r / 2]);
          }
        } else {
          gpu::mma_s8(sums[i][j], a[i][0], b[0], b[1]);
          gpu::mma_s8(sums[i][j], a[i][1], b[2], b[3]);
        }
      }
    }
  }
}

// Adds the sums of all blocks of a tile. True in the threads of the block that came last, which then
// holds the totals; `flag` is 4 bytes of shared memory.
template <class Shape>
MQC_D bool mma_reduce_blocks(const LinearParams& p, typename Shape::Sum (&sums)[Shape::kI][Shape::kJ][4], int tile,
                             int split, bool holds_sums, int thread, uint32_t* flag) {
  using Sum = typename Shape::Sum;
  constexpr int kHolders = 32 * Shape::kWarpsOutput;
  Sum* partial = static_cast<Sum*>(p.partial) + static_cast<int64_t>(tile) * p.split_k * Shape::kSums * kHolders;
  if (holds_sums) {
    Sum* mine = partial + static_cast<int64_t>(split) * Shape::kSums * kHolders + thread;
    MQC_UNROLL
    for (int s = 0; s < Shape::kSums; ++s)
      gpu::store_l2(mine + s * kHolders, sums[s / (4 * Shape::kJ)][s / 4 % Shape::kJ][s % 4]);
  }
  gpu::fence_device();  // the sums before the count
  gpu::sync_block();
  if (thread == 0) {
    const uint32_t before = gpu::atomic_add(p.counters + tile, 1u);
    *flag = before + 1 == static_cast<uint32_t>(p.split_k) ? 1u : 0u;
    if (*flag) p.counters[tile] = 0;  // for the next launch: nobody else counts here any more
  }
  gpu::sync_block();
  if (*flag == 0) return false;
  gpu::fence_device();  // the count before the others' sums
  if (holds_sums) {
    // Its own sums too are read back: float sums must not depend on which block came last.
    for (int other = 0; other < p.split_k; ++other) {
      const Sum* theirs = partial + static_cast<int64_t>(other) * Shape::kSums * kHolders + thread;
      MQC_UNROLL
      for (int s = 0; s < Shape::kSums; ++s) {
        Sum& sum = sums[s / (4 * Shape::kJ)][s / 4 % Shape::kJ][s % 4];
        const Sum read = gpu::load_l2(theirs + s * kHolders);
        sum = other == 0 ? read : sum + read;
      }
    }
  }
  return true;
}

// Grid: (channel blocks, token blocks, split_k).
template <class Shape>
MQC_KERNEL(Shape::kThreads, Shape::kBlocks) linear_mma_kernel(MQC_GRID_CONSTANT LinearParams p) {
  const int thread = gpu::thread_index(), lane = thread % 32, warp = thread / 32;
  const int warp_k = warp / Shape::kWarpsOutput, warp_output = warp % Shape::kWarpsOutput;
  const int warp_channel = warp_output % Shape::kWarpsChannel, warp_token = warp_output / Shape::kWarpsChannel;
  const int first_channel_tile = gpu::block_x() * Shape::kTiles, first_token = gpu::block_y() * Shape::kTokens;
  const int split = gpu::block_z();
  const int tile_begin = static_cast<int>(static_cast<int64_t>(p.input_tiles) * split / p.split_k);
  const int tile_end = static_cast<int>(static_cast<int64_t>(p.input_tiles) * (split + 1) / p.split_k);
  const int steps = static_cast<int>(ceil_div(tile_end - tile_begin, Shape::kWarpsK));

  uint8_t* shared = gpu::shared_memory();
  const uint32_t stages = gpu::shared_address(shared);
  using Sum = typename Shape::Sum;
  Sum sums[Shape::kI][Shape::kJ][4];
  MQC_UNROLL
  for (int s = 0; s < Shape::kSums; ++s) sums[s / (4 * Shape::kJ)][s / 4 % Shape::kJ][s % 4] = 0;

  const auto load_stage = [&](int step) {
    const int tile = tile_begin + step * Shape::kWarpsK, stage = step % Shape::kStages;
    mma_load_stage<Shape>(p, stages + stage * Shape::kStageBytes, tile, tile_end, first_channel_tile, first_token,
                          thread);
    if constexpr (Shape::Format::kFloatRows)
      half_load_scales<Shape>(p, half_scales<Shape>(p, stages, stage), tile, tile_end, first_channel_tile, thread);
  };
  MQC_UNROLL
  for (int s = 0; s < Shape::kStages - 1; ++s) {
    if (s < steps) load_stage(s);
    gpu::copy_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    gpu::copy_async_wait<Shape::kStages - 2>();
    gpu::sync_block();  // the stage is complete for all, and nobody reads the one filled next
    const int next = step + Shape::kStages - 1;
    if (next < steps) load_stage(next);
    gpu::copy_async_commit();
    const uint32_t stage = stages + step % Shape::kStages * Shape::kStageBytes;
    const uint32_t weights = stage + warp_k * Shape::kWeightBytes;
    const uint32_t tokens = stage + Shape::kWarpsK * Shape::kWeightBytes + warp_k * Shape::kTokenBytes;
    if constexpr (Shape::Format::kFloatRows) {
      const uint32_t tile_scales =
          half_scales<Shape>(p, stages, step % Shape::kStages) + warp_k * Shape::kTiles * p.scale_bytes;
      half_multiply<Shape>(p, sums, weights, tokens, tile_scales, warp_channel, warp_token, lane);
    } else {
      mma_multiply<Shape>(sums, weights, tokens, warp_channel, warp_token, lane);
    }
  }
  auto* scales = reinterpret_cast<float*>(shared + Shape::kArea);
  static_assert(Shape::kTokens <= Shape::kThreads, "a thread a token");
  if (thread < Shape::kTokens)
    scales[thread] = Shape::Format::kFloatRows ? 1.0f : token_scale(p, first_token + thread);
  gpu::copy_async_wait<0>();
  gpu::sync_block();  // the stages are free for other uses, the scales complete

  if constexpr (Shape::kWarpsK > 1) {
    auto* others = reinterpret_cast<Sum*>(shared);
    const int slot = warp_output * 32 + lane;
    constexpr int kHolders = 32 * Shape::kWarpsOutput;
    if (warp_k > 0) {
      MQC_UNROLL
      for (int s = 0; s < Shape::kSums; ++s)
        others[((warp_k - 1) * Shape::kSums + s) * kHolders + slot] =
            sums[s / (4 * Shape::kJ)][s / 4 % Shape::kJ][s % 4];
    }
    gpu::sync_block();
    if (warp_k == 0) {
      MQC_UNROLL
      for (int k = 0; k < Shape::kWarpsK - 1; ++k) {
        MQC_UNROLL
        for (int s = 0; s < Shape::kSums; ++s)
          sums[s / (4 * Shape::kJ)][s / 4 % Shape::kJ][s % 4] += others[(k * Shape::kSums + s) * kHolders + slot];
      }
    }
    gpu::sync_block();
  }

  if (p.split_k > 1) {
    auto* flag = reinterpret_cast<uint32_t*>(scales + Shape::kTokens);
    const int tile = gpu::block_y() * gpu::blocks_x() + gpu::block_x();
    if (!mma_reduce_blocks<Shape>(p, sums, tile, split, warp_k == 0, thread, flag)) return;
  }

  constexpr int kPitch = kStagePitch<Shape::kChannels>;
  auto* output = reinterpret_cast<Sum*>(shared);
  if (warp_k == 0) {
    MQC_UNROLL
    for (int i = 0; i < Shape::kI; ++i) {
      MQC_UNROLL
      for (int j = 0; j < Shape::kJ; ++j)
        stage_fragment<kPitch>(sums[i][j], output, (warp_channel * Shape::kI + i) * 16,
                               (warp_token * Shape::kJ + j) * 8, lane);
    }
  }
  gpu::sync_block();
  write_rows<kPitch, Shape::kChannels, Shape::kTokens, Shape::kThreads, typename Shape::Format::Row>(
      p, output, scales, Shape::Format::kUnit, first_channel_tile * kTileChannels, first_token, thread);
}

// The shapes that are built, by mqc_linear_kernel 1..5. Decode shapes take 8 warps for 64 channels,
// each half of them every other input tile.
template <class Format> using Mma8 = MmaShape<Format, 4, 1, 2, 1, 1, 4>;
template <class Format> using Mma16 = MmaShape<Format, 4, 1, 2, 1, 2, 4>;
template <class Format> using Mma32 = MmaShape<Format, 4, 1, 2, 1, 4, 4>;
template <class Format> using Mma64 = MmaShape<Format, 4, Format::kGrouped ? 2 : 1, 2, 1, Format::kGrouped ? 4 : 8, 4>;
template <class Format> using Mma128 = MmaShape<Format, 2, 4, 1, 4, 4, 4>;

// The same for rows of half types, whose stages take twice the room. Many tokens: a warp holds more of
// them than of channels, since every warp that reads a weight widens it.
template <class Row, int kBits> using Half8 = MmaShape<HalfFormat<Row, kBits>, 4, 1, 2, 1, 1, kBits == 4 ? 4 : 3>;
template <class Row, int kBits> using Half16 = MmaShape<HalfFormat<Row, kBits>, 4, 1, 2, 1, 2, kBits == 4 ? 4 : 3>;
template <class Row, int kBits> using Half64 = MmaShape<HalfFormat<Row, kBits>, 8, 1, 1, 1, 8, kBits == 4 ? 3 : 2>;
template <class Row, int kBits> using Half128 = MmaShape<HalfFormat<Row, kBits>, 4, 2, 1, 2, 8, 2>;

}  // namespace mqc
