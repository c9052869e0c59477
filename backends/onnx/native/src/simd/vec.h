// Vectors of the compiler (GCC, Clang), as wide as the instruction set that a copy is made for.
// Everything here is static: copies for different sets must never share a function.
#pragma once

#include <stdint.h>
#include <string.h>

#define MQC_JOIN2(a, b) a##b
#define MQC_JOIN(a, b) MQC_JOIN2(a, b)

#if defined(__AVX512F__)
#define MQC_LANES 16
#elif defined(__AVX2__)
#define MQC_LANES 8
#else
#define MQC_LANES 4
#endif

namespace {

constexpr int64_t kLanes = MQC_LANES;
typedef float vf __attribute__((vector_size(4 * MQC_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * MQC_LANES)));
typedef int8_t vb __attribute__((vector_size(MQC_LANES)));

inline vf load(const float* p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, vf v) { memcpy(p, &v, sizeof v); }

// The first n < kLanes values; the others are 0.
inline vf load_part(const float* p, int64_t n) {
    vf v = {};
    memcpy(&v, p, static_cast<size_t>(n) * sizeof(float));
    return v;
}

inline void store_part(float* p, vf v, int64_t n) {
    memcpy(p, &v, static_cast<size_t>(n) * sizeof(float));
}

inline vf splat(float x) { return x - vf{}; }
inline vf max(vf a, vf b) { return a > b ? a : b; }
inline vf min(vf a, vf b) { return a < b ? a : b; }
inline vf abs(vf a) { return reinterpret_cast<vf>(reinterpret_cast<vi>(a) & 0x7fffffff); }

// Lane i takes lane i ^ D.
template <int D>
inline vf swapped(vf v) {
    vi index;
    for (int i = 0; i < kLanes; i++) index[i] = i ^ D;
    return __builtin_shuffle(v, index);
}

inline float sum(vf v) {
#if MQC_LANES >= 16
    v += swapped<8>(v);
#endif
#if MQC_LANES >= 8
    v += swapped<4>(v);
#endif
    v += swapped<2>(v);
    v += swapped<1>(v);
    return v[0];
}

inline float top(vf v) {
#if MQC_LANES >= 16
    v = max(v, swapped<8>(v));
#endif
#if MQC_LANES >= 8
    v = max(v, swapped<4>(v));
#endif
    v = max(v, swapped<2>(v));
    v = max(v, swapped<1>(v));
    return v[0];
}

// To the nearest integer, ties to even, for |x| < 2^22.
inline vf nearest(vf x) {
    const float magic = 12582912.0f;  // 1.5 * 2^23
    return (x + magic) - magic;
}

// e^x within 2 units in the last place; 0 at -inf, largest finite above 88.
inline vf exponential(vf x) {
    vf t = min(max(x, splat(-87.3f)), splat(88.37f));
    vf n = nearest(t * 1.44269504f);
    vf r = t - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    vi power = (__builtin_convertvector(n, vi) + 127) << 23;
    vf y = p * reinterpret_cast<vf>(power);
    return x < -87.3f ? vf{} : y;
}

// Rational approximation on [-4, 4], as in Eigen; absolute error below 2e-7.
inline vf error_function(vf value) {
    vf x = min(max(value, splat(-4.0f)), splat(4.0f));
    vf s = x * x;
    vf p = splat(-2.72614225801306e-10f);
    p = p * s + 2.77068142495902e-08f;
    p = p * s + -2.10102402082508e-06f;
    p = p * s + -5.69250639462346e-05f;
    p = p * s + -7.34990630326855e-04f;
    p = p * s + -2.95459980854025e-03f;
    p = p * s + -1.60960333262415e-02f;
    vf q = splat(-1.45660718464996e-05f);
    q = q * s + -2.13374055278905e-04f;
    q = q * s + -1.68282697438203e-03f;
    q = q * s + -7.37332916720468e-03f;
    q = q * s + -1.42647390514189e-02f;
    return x * p / q;
}

inline float scale_of(const mqc_row_scales* s, int64_t row) {
    if (s->mask) return s->scale[s->mask[row] != 0];
    if (s->count) return s->scale[row % s->tokens < s->count[row / s->tokens]];
    return s->scale[0];
}

}  // namespace
