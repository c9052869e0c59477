// The 512-bit vector type, with vpdpbusd.
#pragma once

#include <immintrin.h>

#include "linear_tile.h"

namespace {

struct Avx512 {
    using Int = __m512i;
    using Float = __m512;
    using Bytes = __m512i;
    using Input = __m512i;
    static constexpr int lanes = 16;
    static constexpr int latency = 10;  // 5 cycles, 2 a cycle

    static Bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static void store(uint8_t* p, Bytes v) { _mm512_storeu_si512(p, v); }
    // The mask stays in memory: as a register it would be the 33rd of a tile of 14 rows.
    static Bytes low(Bytes v) {
        static const int32_t mask = 0x0f0f0f0f;
        __asm__("vpandd %1%{1to16%}, %0, %0" : "+v"(v) : "m"(mask));
        return v;
    }
    static Bytes high(Bytes v) { return low(_mm512_srli_epi16(v, 4)); }
    static Input spread(const int8_t* p) {
        int32_t four;
        memcpy(&four, p, 4);
        return _mm512_set1_epi32(four);
    }
    template <Form>
    static Int dot(Int sum, Bytes w, Input x) {
        // Not the intrinsic: GCC 12 then copies and spills sums, at half the speed.
        __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
        return sum;
    }
    static Int spread_int(int32_t v) { return _mm512_set1_epi32(v); }
    static Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
    static Float to_float(Int v) {
        typedef int Ints __attribute__((vector_size(64)));  // GCC 12 warns of its own intrinsic here
        return __builtin_convertvector(reinterpret_cast<Ints>(v), Float);
    }
    static Float load_float(const float* p) { return _mm512_loadu_ps(p); }
    static void store_float(float* p, Float v) { _mm512_storeu_ps(p, v); }
    static Float spread_float(float v) { return _mm512_set1_ps(v); }
    static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
    static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
};

typedef int Words __attribute__((vector_size(64)));  // GCC 12 warns of the intrinsics for these

// Two words of each quarter of a and b in turns: the low two, or the high two.
template <int from>
inline Words weave(Words a, Words b) {
    constexpr int q = from, p = from + 16;
    return __builtin_shufflevector(a, b, q, p, q + 1, p + 1, q + 4, p + 4, q + 5, p + 5, q + 8,
                                   p + 8, q + 9, p + 9, q + 12, p + 12, q + 13, p + 13);
}

// A pair of words of each quarter of a and then of b: the low pair, or the high one.
template <int from>
inline Words pairs(Words a, Words b) {
    constexpr int q = from, p = from + 16;
    return __builtin_shufflevector(a, b, q, q + 1, p, p + 1, q + 4, q + 5, p + 4, p + 5, q + 8,
                                   q + 9, p + 8, p + 9, q + 12, q + 13, p + 12, p + 13);
}

// Two quarters of a, then of b: the even ones (from 0), or the odd ones (from 4).
template <int from>
inline Words quarters(Words a, Words b) {
    constexpr int q = from, p = from + 16;
    return __builtin_shufflevector(a, b, q, q + 1, q + 2, q + 3, q + 8, q + 9, q + 10, q + 11, p,
                                   p + 1, p + 2, p + 3, p + 8, p + 9, p + 10, p + 11);
}

// 16 x 16 words turned: word c of r becomes word r of c.
inline __attribute__((always_inline)) void transpose(Words (&v)[16]) {
    Words t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = weave<0>(v[i], v[i + 1]);
        t[i + 1] = weave<2>(v[i], v[i + 1]);
    }
    // Quarter c of v[i + j], for i in 0, 4, 8, 12: words i..i + 3 of column 4 c + j.
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            v[i + 2 * j] = pairs<0>(t[i + j], t[i + j + 2]);
            v[i + 2 * j + 1] = pairs<2>(t[i + j], t[i + j + 2]);
        }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        t[j] = quarters<0>(v[j], v[j + 4]);
        t[j + 4] = quarters<4>(v[j], v[j + 4]);
        t[j + 8] = quarters<0>(v[j + 8], v[j + 12]);
        t[j + 12] = quarters<4>(v[j + 8], v[j + 12]);
    }
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
        v[j] = quarters<0>(t[j], t[j + 8]);
        v[j + 8] = quarters<4>(t[j], t[j + 8]);
    }
}

// pack_rows_interleaved for up to 16 rows, 64 inputs at a time.
inline void pack_rows_transposed(const uint8_t* x, int64_t rows, const Sizes& s, int64_t padded,
                                 uint8_t flip, int8_t* packed, int32_t* correction) {
    const __m512i flips = _mm512_set1_epi8(static_cast<char>(flip));
    const __m512i ones = _mm512_set1_epi8(1);
    const __m512i zero = _mm512_set1_epi32(s.bits == 4 ? -8 : -128);
    const __mmask16 there = static_cast<__mmask16>((1u << rows) - 1);
    for (int64_t g = 0; g < s.groups; g++, x += s.group) {
        __m512i sum = _mm512_setzero_si512();  // of each row
        for (int64_t i = 0; i < padded; i += 64) {
            const int64_t left = s.group - i;
            const __mmask64 mask = left >= 64 ? ~0ULL : (1ULL << left) - 1;
            Words v[16];
#pragma GCC unroll 16
            for (int r = 0; r < 16; r++) {
                v[r] = Words{};
                if (r >= rows) continue;
                const __m512i in = _mm512_maskz_loadu_epi8(mask, x + r * s.k + i);
                v[r] = reinterpret_cast<Words>(
                    _mm512_maskz_mov_epi8(mask, _mm512_xor_si512(in, flips)));
            }
            transpose(v);
            const int64_t fours = (padded - i) / 4;
#pragma GCC unroll 16
            for (int c = 0; c < 16; c++) {
                const __m512i four = reinterpret_cast<__m512i>(v[c]);
                sum = Avx512::dot<kBytes>(sum, ones, four);
                if (c < fours) _mm512_mask_storeu_epi32(packed + c * 4 * rows, there, four);
            }
            packed += (fours < 16 ? fours : 16) * 4 * rows;
        }
        _mm512_mask_storeu_epi32(correction + g * rows, there, _mm512_mullo_epi32(sum, zero));
    }
}

}  // namespace
