// The 256-bit vector type; with MQC_DOT_VNNI the dot product is one instruction.
#pragma once

#include <immintrin.h>

#include "linear_tile.h"

namespace {

struct Avx2 {
    using Int = __m256i;
    using Float = __m256;
    using Bytes = __m256i;
    using Input = __m256i;
    static constexpr int lanes = 8;
    static constexpr int latency = 8;

    static Bytes load(const uint8_t* p) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    }
    static void store(uint8_t* p, Bytes v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
    }
    static Bytes low(Bytes v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
    static Bytes high(Bytes v) {
        return _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15));
    }
    static Input spread(const int8_t* p) {
        int32_t four;
        memcpy(&four, p, 4);
        return _mm256_set1_epi32(four);
    }
    template <Form form>
    static Int dot(Int sum, Bytes w, Input x) {
#ifdef MQC_DOT_VNNI
        // Not the intrinsic: GCC 12 then copies and spills sums, at half the speed.
        __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(w), "x"(x));
        return sum;
#else
        if (form != kBytes) {
            // At most 2 * 15 * 128 in 16 bits: no saturation.
            const Int pairs = _mm256_maddubs_epi16(w, x);
            return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        }
        // Bytes up to 255 would saturate there: widen even and odd places to 16 bits instead.
        const Int even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
        const Int odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8));
        return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
#endif
    }
    static Int spread_int(int32_t v) { return _mm256_set1_epi32(v); }
    static Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
    static Float to_float(Int v) { return _mm256_cvtepi32_ps(v); }
    static Float load_float(const float* p) { return _mm256_loadu_ps(p); }
    static void store_float(float* p, Float v) { _mm256_storeu_ps(p, v); }
    static Float spread_float(float v) { return _mm256_set1_ps(v); }
    static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
    static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
};

// 6 rows x 1 block: 12 sums, 2 weights and one spread input, of 16 registers.
constexpr int kRows = 6, kPanel = 1;

void tile(Form form, const Tile& t) {
    if (form == kNibbles && t.keep)
        tile(kSmall, unpack<Avx2, kPanel>(t));
    else if (form == kNibbles)
        tile_rows<Avx2, kPanel, kNibbles, kRows>(t);
#ifndef MQC_DOT_VNNI
    else if (form == kSmall)
        tile_rows<Avx2, kPanel, kSmall, kRows>(t);
#endif
    else
        tile_rows<Avx2, kPanel, kBytes, kRows>(t);
}

}  // namespace
