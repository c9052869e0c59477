// Integers as pairs of bf16 or f16, exactly: what weights become on their way to mma.m16n8k16.
//
// An integer in the low bits of a number whose last bit counts one (bf16: 128, f16: 1024) adds itself
// to it; one fused multiply-add takes the number away again. Two int4 take three instructions, two int8
// four as bf16 and 2.5 as f16.
#pragma once

#include "mqc/base.cuh"

#include <type_traits>

namespace mqc {

// Four bytes of eight (0..3 of `low`, 4..7 of `high`), byte i of the result by nibble i of `selector`.
MQC_HD uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(low, high, selector);
#else
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const int byte = static_cast<int>(selector >> (4 * i) & 7u);
    result |= ((byte < 4 ? low : high) >> (byte % 4 * 8) & 0xFFu) << (8 * i);
  }
  return result;
#endif
}

// a * b + c of pairs, rounded once. (The host rounds inexact bf16 results twice; here none is.)
template <class T> MQC_HD uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__)
  uint32_t d;
  if constexpr (std::is_same_v<T, bf16>) asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  else asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#else
  uint32_t d = 0;
  for (int i = 0; i < 32; i += 16) {
    const auto part = [i](uint32_t word) {
      T value;
      value.bits = static_cast<uint16_t>(word >> i);
      return to_float(value);
    };
    d |= static_cast<uint32_t>(from_float<T>(fma_rn(part(a), part(b), part(c))).bits) << i;
  }
  return d;
#endif
}

// Bytes 0 and 1, or 2 and 3, of a word in the low bytes of the two halves; above them byte 4 (0).
MQC_HD uint32_t spread_bytes(uint32_t word, int pair, uint32_t above = 0) {
  return permute_bytes(word, above, pair ? 0x4342u : 0x4140u);
}

// A word of packed int4 -> the A fragment of mma.m16n8k16 with its 16 inputs: rows g (registers 0, 2)
// and g + 8, inputs 0 and 1 of the lane's four (registers 0, 1), and 2 and 3. Turning the sign bit of a
// nibble q gives q + 8, which is added to 128 or 1024.
template <class T> MQC_HD void unpack_int4_pairs(uint32_t word, uint32_t (&a)[4]) {
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  constexpr uint32_t kOne = kBf16 ? 0x3F803F80u : 0x3C003C00u;
  constexpr uint32_t kMagic = kBf16 ? 0x43084308u : 0x64086408u, kMinus = kMagic | 0x80008000u;
  MQC_UNROLL
  for (int pair = 0; pair < 2; ++pair) {
    const uint32_t bytes = spread_bytes(word, pair);
    a[2 * pair] = fma_pair<T>((bytes & 0x000F000Fu) ^ kMagic, kOne, kMinus);
    a[2 * pair + 1] = fma_pair<T>((bytes >> 4 & 0x000F000Fu) ^ kMagic, kOne, kMinus);
  }
}

// Two words of int8, of rows g and g + 8, as above.
template <class T> MQC_HD void unpack_int8_pairs(uint32_t row, uint32_t row8, uint32_t (&a)[4]);
template <> MQC_HD void unpack_int8_pairs<bf16>(uint32_t row, uint32_t row8, uint32_t (&a)[4]) {
  constexpr uint32_t kOne = 0x3F803F80u;
  MQC_UNROLL
  for (int r = 0; r < 4; ++r) {
    const uint32_t bytes = spread_bytes(r % 2 ? row8 : row, r / 2);
    // 128 + its low seven bits, minus 128, or 256 where the sign bit is set.
    a[r] = fma_pair<bf16>((bytes & 0x007F007Fu) | 0x43004300u, kOne, (bytes & 0x00800080u) | 0xC300C300u);
  }
}
template <> MQC_HD void unpack_int8_pairs<f16>(uint32_t row, uint32_t row8, uint32_t (&a)[4]) {
  constexpr uint32_t kOne = 0x3C003C00u, kMinus1152 = 0xE480E480u;
  MQC_UNROLL
  for (int r = 0; r < 4; ++r) {
    const uint32_t biased = (r % 2 ? row8 : row) ^ 0x80808080u;  // q + 128
    a[r] = fma_pair<f16>(spread_bytes(biased, r / 2, 0x64646464u), kOne, kMinus1152);
  }
}

}  // namespace mqc
