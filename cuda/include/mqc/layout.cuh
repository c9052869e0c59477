// Index maps: packed weights, register fragments, shared-memory swizzles, tile order.
//
// Weights are the A operand of the matrix instructions (channels are the rows of the product), so
// one packed copy serves mma.m16n8k32 (sm_80 on) and wgmma.m64nNk32 (sm_90a): a warp of a
// warpgroup holds the fragment that mma.m16n8k32 holds for rows 16 * warp .. 16 * warp + 15.
//
// A tile is 64 channels x 128 inputs. "Thread" below is 0..127: 32 * (16-row block) + lane.
//   W4: 16 bytes at (pair, thread), pair 0..1: words of k32 steps 2 * pair and 2 * pair + 1, two
//       each. Word h of step j: byte b holds input 32 j + 16 h + 4 (lane % 4) + b of row
//       lane / 4 (low nibble) and of row lane / 4 + 8 (high nibble).
//   W8: 16 bytes at (step, thread), step 0..3: the four registers of the fragment.
//
// Rows of half types multiply the same tiles by mma.m16n8k16. A lane holds four consecutive inputs of
// each half of a step, and the instruction wants two pairs eight apart: so index k of a product of 16
// inputs stands for input half_input(k) of them, in weights and rows alike.
#pragma once

#include "mqc/base.cuh"

namespace mqc {

constexpr int kTileChannels = 64;
constexpr int kTileInputs = 128;
constexpr int kStepInputs = 32;  // inputs of one matrix instruction
constexpr int kStepsPerTile = kTileInputs / kStepInputs;

// How a weight is stored: bits of a value, and inputs that share a scale (0: all of a channel's).
// With groups a tile ends with their scales, float32 [kTileInputs / kGroup][kTileChannels].
template <int kBits_, int kGroup_ = 0> struct WeightFormat {
  static constexpr int kBits = kBits_, kGroup = kGroup_;
  static constexpr bool kGrouped = kGroup > 0;
  static constexpr bool kFloatRows = false;       // rows of int8
  static constexpr bool kFloatSums = kGrouped;    // of groups times their scales; else of integers
  static constexpr int kInputBytes = 1;           // of a value of a row
  using Row = void;                               // the type of its values, where they are floats
  static constexpr int kStepsPerGroup = kGrouped ? kGroup / kStepInputs : kStepsPerTile;
  static constexpr int kValueBytes = kTileChannels * kTileInputs * kBits / 8;
  static constexpr int kScaleBytes = kGrouped ? kTileInputs / kGroup * kTileChannels * 4 : 0;
  static constexpr int kTileBytes = kValueBytes + kScaleBytes;
  // The epilogue multiplies by it: undoes what unpacking multiplied (exact: a power of two).
  static constexpr float kUnit = kBits == 4 ? 0.0625f : 1.0f;
};
using W4 = WeightFormat<4>;
using W8 = WeightFormat<8>;
template <int kGroup> using W4Grouped = WeightFormat<4, kGroup>;
template <int kGroup> using W8Grouped = WeightFormat<8, kGroup>;

// Rows of T (bf16 or f16) and weights of kBits. Groups are known when a kernel runs: their scales lie
// behind a tile's values in memory, and apart from the tiles in shared memory.
template <class T, int kBits_> struct HalfFormat {
  using Row = T;
  static constexpr int kBits = kBits_;
  static constexpr bool kGrouped = false, kFloatRows = true, kFloatSums = true;
  static constexpr int kInputBytes = 2;
  static constexpr int kTileBytes = kTileChannels * kTileInputs * kBits / 8;  // values alone
  static constexpr float kUnit = 1.0f;
};

// A fragment, register 0..3, byte 0..3 -> row (0..63) and input (0..31) of a 64 x 32 step.
MQC_HD constexpr int fragment_row(int thread, int reg) {
  return (thread / 32) * 16 + (thread % 32) / 4 + (reg & 1) * 8;
}
MQC_HD constexpr int fragment_input(int thread, int reg, int byte) {
  return (thread % 4) * 4 + byte + (reg >> 1) * 16;
}

// Index k of a product of 16 inputs (mma.m16n8k16) -> the input it stands for.
MQC_HD constexpr int half_input(int k) { return k % 8 / 2 * 4 + k / 8 * 2 + k % 2; }

// Accumulator registers of a 16 x 8 product -> row (0..15) and column (0..7).
MQC_HD constexpr int accumulator_row(int lane, int reg) { return lane / 4 + (reg >> 1) * 8; }
MQC_HD constexpr int accumulator_column(int lane, int reg) { return (lane % 4) * 2 + (reg & 1); }

// Byte offset of the 16 bytes of a thread inside a tile.
MQC_HD constexpr int packed_vector(int index, int thread) { return (index * 128 + thread) * 16; }

// Byte offset of tile (channel tile, input tile) in the packed weight.
template <class Format>
MQC_HD constexpr int64_t packed_tile(int64_t channel_tile, int64_t input_tile, int64_t input_tiles) {
  return (channel_tile * input_tiles + input_tile) * Format::kTileBytes;
}

// Byte offset, in a tile, of the scale of a group of inputs and a channel (0..63).
template <class Format> MQC_HD constexpr int packed_scale(int group, int channel) {
  return Format::kValueBytes + (group * kTileChannels + channel) * 4;
}

// A word of packed int4 -> registers of rows g (low) and g + 8 (high), as int8 times 16: a nibble
// in the upper half of a byte is already the signed value times 16. Three instructions.
MQC_HD void unpack_int4(uint32_t word, uint32_t& low, uint32_t& high) {
  high = word & 0xF0F0F0F0u;
  low = (word << 4) & 0xF0F0F0F0u;
}

// Activation rows of 128 bytes in shared memory: 16-byte chunks exchanged by row, so that eight
// rows of one chunk lie in different banks. The same map as TMA's 128-byte swizzle at addresses
// that are a multiple of 1024.
MQC_HD constexpr int swizzled_chunk(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// The same for rows of 256 bytes, of which a lane reads 8 bytes: four rows of 32 bytes (two chunks)
// lie in different banks.
MQC_HD constexpr int swizzled_half_chunk(int row, int chunk) {
  return row * 256 + ((chunk ^ ((row & 3) << 1)) << 4);
}

// wgmma descriptor of a K-major operand with 128-byte swizzle: rows of 128 bytes, groups of eight
// rows 1024 bytes apart. Address and offsets are stored divided by 16. Steps along k add 32 bytes
// (2 units) to the address inside the swizzled row.
MQC_HD constexpr uint64_t swizzle128_descriptor(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3FFFFu) >> 4) | (uint64_t{1} << 16) |
         (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 62);
}

// Order in which a persistent grid visits the tiles of a product: bands of up to `band` token tiles;
// inside a band, token tiles turn fastest. Blocks that run together then share weights and rows.
struct TileIndex {
  int channel;
  int token;
};
MQC_HD constexpr TileIndex tile_order(int index, int channel_tiles, int token_tiles, int band) {
  const int per_band = channel_tiles * band;
  const int first = (index / per_band) * band;
  const int height = token_tiles - first < band ? token_tiles - first : band;
  const int inside = index % per_band;
  return TileIndex{inside / height, first + inside % height};
}

// Sign table of the dense Hadamard factor: the B fragments of mma.m16n8k16 hold two values each in
// two registers; 16 registers share one word. Bit 15 - i and bit 31 - i of the word are the signs
// (1 = minus) of the low and the high half of register i of the group.
MQC_HD constexpr int hadamard_steps(int base) { return static_cast<int>(ceil_div(base, 16)); }
MQC_HD constexpr int hadamard_columns(int base) { return static_cast<int>(ceil_div(base, 8)); }
MQC_HD constexpr int hadamard_groups(int base) {  // words a lane holds for one block of 8 outputs
  return static_cast<int>(ceil_div(2 * hadamard_steps(base), 16));
}
MQC_HD constexpr int64_t hadamard_words(int base) {
  return int64_t{32} * hadamard_columns(base) * hadamard_groups(base);
}
// Word of (block of 8 outputs, group, lane); register 2 * step + half is number r % 16 of group
// r / 16, r = 2 * step + half.
MQC_HD constexpr int64_t hadamard_word(int column, int group, int lane, int base) {
  return (static_cast<int64_t>(column) * hadamard_groups(base) + group) * 32 + lane;
}

}  // namespace mqc
