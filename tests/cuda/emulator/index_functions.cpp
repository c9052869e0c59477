// The index maps of mqc/layout.cuh and number functions, callable from the tests.
#include "linear_launch.h"
#include "mqc/gpu.cuh"
#include "mqc/halves.cuh"
#include "mqc/layout.cuh"
#include "mqc/rows.cuh"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace mqc;

template <class Format> static void unpack(const uint8_t* packed, int n, int k, int8_t* out, float* scales) {
  const int64_t input_tiles = ceil_div(k, kTileInputs), columns = input_tiles * kTileInputs;
  for (int64_t ct = 0; ct < ceil_div(n, kTileChannels); ++ct)
    for (int64_t it = 0; it < input_tiles; ++it)
      for (int step = 0; step < kStepsPerTile; ++step)
        for (int thread = 0; thread < 128; ++thread) {
          const uint8_t* tile = packed + packed_tile<Format>(ct, it, input_tiles);
          uint32_t words[4], a[4];
          if (Format::kBits == 4) {
            memcpy(words, tile + packed_vector(step / 2, thread), 16);
            for (int half = 0; half < 2; ++half)
              unpack_int4(words[step % 2 * 2 + half], a[2 * half], a[2 * half + 1]);
          } else {
            memcpy(a, tile + packed_vector(step, thread), 16);
          }
          for (int reg = 0; reg < 4; ++reg)
            for (int byte = 0; byte < 4; ++byte) {
              const int64_t row = ct * kTileChannels + fragment_row(thread, reg);
              const int64_t column = it * kTileInputs + step * kStepInputs + fragment_input(thread, reg, byte);
              out[row * columns + column] = static_cast<int8_t>(a[reg] >> (8 * byte));
              if constexpr (Format::kGrouped) {
                const int group = step / Format::kStepsPerGroup;
                memcpy(scales + row * columns + column, tile + packed_scale<Format>(group, row % kTileChannels), 4);
              }
            }
        }
}

// out: int8 [ceil64(n), ceil128(k)], int4 values times 16; scales: of the same shape, where the layout
// (mqc_layout) has groups.
EXPORT void test_unpack(int layout, const uint8_t* packed, int n, int k, int8_t* out, float* scales) {
  by_format(layout, [&](auto format) { unpack<decltype(format)>(packed, n, k, out, scales); });
}

// The weights as mma.m16n8k16 gets them: float [ceil64(n), ceil128(k)].
template <class Row, int kBits> static void unpack_pairs(const uint8_t* packed, int tile_bytes, int n, int k, float* out) {
  const int64_t input_tiles = ceil_div(k, kTileInputs), columns = input_tiles * kTileInputs;
  for (int64_t tile = 0; tile < ceil_div(n, kTileChannels) * input_tiles; ++tile)
    for (int step = 0; step < kStepsPerTile; ++step)
      for (int thread = 0; thread < 128; ++thread)
        for (int half = 0; half < 2; ++half) {
          uint32_t words[4], a[4];
          if (kBits == 4) {
            memcpy(words, packed + tile * tile_bytes + packed_vector(step / 2, thread) + step % 2 * 8, 8);
            unpack_int4_pairs<Row>(words[half], a);
          } else {
            memcpy(words, packed + tile * tile_bytes + packed_vector(step, thread), 16);
            unpack_int8_pairs<Row>(words[2 * half], words[2 * half + 1], a);
          }
          for (int i = 0; i < 8; ++i) {  // fragment of mma.m16n8k16: registers of two values
            const int64_t row = tile / input_tiles * kTileChannels + fragment_row(thread, i / 2);
            const int index = thread % 4 * 2 + i % 2 + i / 4 * 8;
            const int64_t column = tile % input_tiles * kTileInputs + step * kStepInputs + 16 * half + half_input(index);
            Row value;
            value.bits = static_cast<uint16_t>(a[i / 2] >> (16 * (i % 2)));
            out[row * columns + column] = to_float(value);
          }
        }
}

EXPORT void test_unpack_pairs(int layout, int is_bf16, const uint8_t* packed, int n, int k, float* out) {
  by_format(layout, [&](auto format) {
    constexpr int kBits = decltype(format)::kBits;
    if (is_bf16) unpack_pairs<bf16, kBits>(packed, decltype(format)::kTileBytes, n, k, out);
    else unpack_pairs<f16, kBits>(packed, decltype(format)::kTileBytes, n, k, out);
  });
}

EXPORT int test_swizzled_half_chunk(int row, int chunk) { return swizzled_half_chunk(row, chunk); }

// signs: int8 [base, base] of +-1.
EXPORT void test_hadamard_signs(const uint32_t* table, int base, int8_t* signs) {
  for (int row = 0; row < base; ++row)
    for (int column = 0; column < base; ++column) {
      const int lane = row % 8 * 4 + column % 8 / 2, reg = column / 16 * 2 + column % 16 / 8;
      const uint32_t word = table[hadamard_word(row / 8, reg / 16, lane, base)];
      const uint32_t shifted = word << (reg % 16);
      signs[row * base + column] = (shifted & (column % 2 ? 0x80000000u : 0x8000u)) ? -1 : 1;
    }
}

EXPORT void test_tile_order(int index, int channel_tiles, int token_tiles, int band, int* out) {
  const TileIndex tile = tile_order(index, channel_tiles, token_tiles, band);
  out[0] = tile.channel;
  out[1] = tile.token;
}

EXPORT int test_swizzled_chunk(int row, int chunk) { return swizzled_chunk(row, chunk); }

EXPORT void test_quantize(const float* x, int count, float scale, int8_t* q) {
  for (int i = 0; i < count; ++i) q[i] = static_cast<int8_t>(quantize_value(x[i], scale));
}

// Rounds floats to a half type: bits out.
EXPORT void test_round(const float* x, int count, int is_bf16, uint16_t* bits, float* back) {
  for (int i = 0; i < count; ++i) {
    bits[i] = is_bf16 ? from_float<bf16>(x[i]).bits : from_float<f16>(x[i]).bits;
    back[i] = is_bf16 ? to_float(bf16{bits[i]}) : to_float(f16{bits[i]});
  }
}
