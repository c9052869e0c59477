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
    static Bytes low(Bytes v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
    static Bytes high(Bytes v) {
        return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15));
    }
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

}  // namespace
