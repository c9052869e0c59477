// Linear with wgmma (sm_90a), for many rows: 256 channels x 128 tokens a block, persistent.
//
// Warpgroup 0 is the producer: one thread keeps kStages stages of shared memory filled, weights by
// bulk copies, tokens by TMA with the 128-byte swizzle. Warpgroups 1 and 2 are consumers: each turns
// its 128 channels of int4 (or int8) weights into register fragments, the A operand, and multiplies
// them with the tokens of the stage, the B operand. Per stage one `full` barrier (the producer's
// arrival plus the bytes) and one `empty` barrier (one arrival a consumer warp).
#pragma once

#include "mqc/linear.cuh"

namespace mqc {

constexpr int kMaxSharedBytes = 232448;  // a block of sm_90

template <class Format> struct WgmmaShape {
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kM = 2;  // tiles of 64 channels a consumer
  static constexpr int kTiles = kConsumers * kM;
  static constexpr int kChannels = kTiles * kTileChannels;
  static constexpr int kTokens = 128;
  static constexpr int kTokenBytes = kTokens * kTileInputs;
  static constexpr int kStageBytes = kTokenBytes + kTiles * Format::kTileBytes;
  static constexpr int kOutputTokens = 64;  // rows of y staged at a time
  static constexpr int kPitch = kStagePitch<kTileChannels>;
  static constexpr int kOutputBytes = kOutputTokens * kPitch * 4;
  static constexpr int kOtherBytes = 1024 + kConsumers * (kOutputBytes + kTokens * 4) + 128;  // alignment, barriers
  static constexpr int kFit = (kMaxSharedBytes - kOtherBytes) / kStageBytes;
  static constexpr int kStages = kFit < 5 ? kFit : 5;
  static constexpr int kSharedBytes = kStages * kStageBytes + kOtherBytes;
  static_assert(kStageBytes % 1024 == 0, "stages keep the swizzle's alignment");
  static_assert(kStages >= 3 && 16 * kStages <= 128, "stages to overlap, barriers in 128 bytes");
};

// The fragments of 64 channels x 64 inputs, pair 0 or 1 of the tile: a[step] for its two k32 steps.
// `thread` 0..127.
template <class Format> MQC_D void wgmma_load_pair(uint32_t (*a)[4], uint32_t tile, int pair, int thread) {
  if constexpr (Format::kBits == 4) {
    const gpu::Vector16 packed = gpu::load_shared16(tile + packed_vector(pair, thread));
    MQC_UNROLL
    for (int word = 0; word < 4; ++word)
      unpack_int4(packed.word[word], a[word / 2][word % 2 * 2], a[word / 2][word % 2 * 2 + 1]);
  } else {
    MQC_UNROLL
    for (int step = 0; step < 2; ++step) {
      const gpu::Vector16 loaded = gpu::load_shared16(tile + packed_vector(2 * pair + step, thread));
      MQC_UNROLL
      for (int r = 0; r < 4; ++r) a[step][r] = loaded.word[r];
    }
  }
}

#if MQC_SM90A
// Adds the product of 64 channels and the stage's 128 tokens to the float sums: by groups, and by half
// of the tokens, in int32; each is scaled before the next takes its registers. While a consumer
// scales, the other one multiplies.
template <class Format>
MQC_D void wgmma_add_groups(float (&sums)[64], int32_t (&group)[32], uint64_t tokens, uint32_t tile, int thread) {
  constexpr int kPerGroup = Format::kStepsPerGroup;
  constexpr uint64_t kHalf = 64 * 128 >> 4;  // of a descriptor: 64 tokens on
  uint32_t a[kStepsPerTile][4];
  MQC_UNROLL
  for (int first = 0; first < kStepsPerTile; first += kPerGroup) {
    MQC_UNROLL
    for (int step = first; step < first + kPerGroup; ++step)
      if (step % 2 == 0) wgmma_load_pair<Format>(a + step, tile, step / 2, thread);
    MQC_UNROLL
    for (int half = 0; half < 2; ++half) {
      gpu::wgmma_fence();
      gpu::wgmma_s8<kPerGroup>(group, a + first, tokens + half * kHalf + 2 * first);
      gpu::wgmma_commit();
      float scales[2];
      load_scales<Format>(scales, tile, first / kPerGroup, thread / 32 * 16, thread % 32);
      gpu::wgmma_wait<0>();
      gpu::wgmma_hold(group);
      MQC_UNROLL
      for (int i = 0; i < 32; ++i) {
        float& sum = sums[32 * half + i];
        sum = add_group(sum, group[i], scales[i / 2 % 2]);
      }
    }
  }
}
#endif

// Grid: as many blocks as multiprocessors; dynamic shared memory Shape::kSharedBytes.
template <class Format>
MQC_KERNEL(WgmmaShape<Format>::kThreads, 1)
linear_wgmma_kernel(MQC_GRID_CONSTANT LinearParams p, MQC_GRID_CONSTANT gpu::TensorMap x_map) {
#if MQC_SM90A
  using Shape = WgmmaShape<Format>;
  using Sum = SumOf<Format>;
  const int thread = gpu::thread_index(), group = thread / 128;
  uint8_t* shared = gpu::shared_memory();
  const uint32_t unaligned = gpu::shared_address(shared);
  const uint32_t stages = (unaligned + 1023u) & ~1023u;
  uint8_t* behind = shared + (stages - unaligned) + Shape::kStages * Shape::kStageBytes;
  const uint32_t full = gpu::shared_address(behind), empty = full + 8 * Shape::kStages;
  behind += 128;

  if (thread == 0) {
    for (int s = 0; s < Shape::kStages; ++s) {
      gpu::barrier_init(full + 8 * s, 1);
      gpu::barrier_init(empty + 8 * s, 4 * Shape::kConsumers);
    }
    gpu::barrier_init_fence();
  }
  gpu::sync_block();

  const int channel_blocks = static_cast<int>(ceil_div(p.channel_tiles, Shape::kTiles));
  const int token_blocks = static_cast<int>(ceil_div(p.rows, Shape::kTokens));
  const int tiles = channel_blocks * token_blocks;

  if (group == 0) {
    gpu::registers_release<Format::kGrouped ? 24 : 40>();
    if (thread == 0) {
      gpu::prefetch_tensor_map(&x_map);
      int stage = 0;
      uint32_t parity = 1;  // the first pass over the stages finds them empty
      for (int tile = gpu::block_x(); tile < tiles; tile += gpu::blocks_x()) {
        const TileIndex at = tile_order(tile, channel_blocks, token_blocks, p.band);
        const int first = at.channel * Shape::kTiles;
        const int present = p.channel_tiles - first < Shape::kTiles ? p.channel_tiles - first : Shape::kTiles;
        for (int input = 0; input < p.input_tiles; ++input) {
          gpu::barrier_wait(empty + 8 * stage, parity);
          const uint32_t barrier = full + 8 * stage, to = stages + stage * Shape::kStageBytes;
          gpu::barrier_expect(barrier, Shape::kTokenBytes + present * Format::kTileBytes);
          gpu::copy_tensor(to, &x_map, input * kTileInputs, at.token * Shape::kTokens, barrier);
          for (int t = 0; t < present; ++t)
            gpu::copy_bulk(to + Shape::kTokenBytes + t * Format::kTileBytes,
                           p.w + packed_tile<Format>(first + t, input, p.input_tiles), Format::kTileBytes, barrier);
          if (++stage == Shape::kStages) {
            stage = 0;
            parity ^= 1;
          }
        }
      }
    }
  } else {
    gpu::registers_claim<Format::kGrouped ? 240 : 232>();
    const int consumer = group - 1, local = thread % 128, lane = thread % 32, warp = local / 32;
    auto* output = reinterpret_cast<Sum*>(behind + consumer * Shape::kOutputBytes);
    auto* scales = reinterpret_cast<float*>(behind + Shape::kConsumers * Shape::kOutputBytes) + consumer * Shape::kTokens;
    int stage = 0;
    uint32_t parity = 0;
    int32_t group_sums[32] = {};  // with a scale a group
    for (int tile = gpu::block_x(); tile < tiles; tile += gpu::blocks_x()) {
      const TileIndex at = tile_order(tile, channel_blocks, token_blocks, p.band);
      Sum sums[Shape::kM][64];
      MQC_UNROLL
      for (int m = 0; m < Shape::kM; ++m) {
        MQC_UNROLL
        for (int i = 0; i < 64; ++i) sums[m][i] = 0;
      }
      for (int input = 0; input < p.input_tiles; ++input) {
        gpu::barrier_wait(full + 8 * stage, parity);
        const uint32_t from = stages + stage * Shape::kStageBytes;
        const uint64_t tokens = swizzle128_descriptor(from);
        MQC_UNROLL
        for (int m = 0; m < Shape::kM; ++m) {
          const uint32_t weights = from + Shape::kTokenBytes + (consumer * Shape::kM + m) * Format::kTileBytes;
          if constexpr (Format::kGrouped) {
            wgmma_add_groups<Format>(sums[m], group_sums, tokens, weights, local);
          } else {
            uint32_t a[kStepsPerTile][4];
            MQC_UNROLL
            for (int pair = 0; pair < 2; ++pair) wgmma_load_pair<Format>(a + 2 * pair, weights, pair, local);
            gpu::wgmma_fence();
            MQC_UNROLL
            for (int step = 0; step < kStepsPerTile; ++step) gpu::wgmma_s8(sums[m], a[step], tokens + 2 * step);
            gpu::wgmma_commit();
          }
        }
        gpu::wgmma_wait<0>();
        gpu::sync_warp();
        if (lane == 0) gpu::barrier_arrive(empty + 8 * stage);
        if (++stage == Shape::kStages) {
          stage = 0;
          parity ^= 1;
        }
      }
      MQC_UNROLL
      for (int m = 0; m < Shape::kM; ++m)
        if constexpr (!Format::kGrouped) gpu::wgmma_hold(sums[m]);

      const int token = at.token * Shape::kTokens;
      gpu::sync_named(1 + consumer, 128);  // nobody reads the scales of the previous tile any more
      scales[local] = token_scale(p, token + local);
      // The sums leave in parts of 64 channels x 64 tokens, by one copy of the code that writes them.
      constexpr int kHalf = Shape::kOutputTokens, kParts = Shape::kM * Shape::kTokens / kHalf;
      MQC_NO_UNROLL
      for (int part = 0; part < kParts; ++part) {
        gpu::sync_named(1 + consumer, 128);  // the buffer is free, the scales are complete
        MQC_UNROLL
        for (int each = 0; each < kParts; ++each) {
          if (each != part) continue;  // registers are named at compile time
          MQC_UNROLL
          for (int j = 0; j < kHalf / 8; ++j)
            stage_fragment<Shape::kPitch>(sums[each / 2] + (kHalf / 8 * (each % 2) + j) * 4, output, 16 * warp, 8 * j,
                                          lane);
        }
        gpu::sync_named(1 + consumer, 128);
        const int channel = (at.channel * Shape::kTiles + consumer * Shape::kM + part / 2) * kTileChannels;
        const int first = kHalf * (part % 2);
        write_rows<Shape::kPitch, kTileChannels, kHalf, 128>(p, output, scales + first, Format::kUnit, channel,
                                                            token + first, local);
      }
    }
  }
#endif
}

}  // namespace mqc
