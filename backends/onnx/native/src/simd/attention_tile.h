// Register tiles, transposition and rotary embedding of attention.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#include <math.h>

#include "attention_layout.h"
#include "mqc_layers.h"
#include "simd/vec.h"

// Written out before the compiler looks at the sums: else it keeps a copy of them in memory.
#define MQC_UNROLL _Pragma("GCC unroll 16")

namespace {

// A register tile: kSteps scalars of A times kNv vectors of B, fitting 32 registers of AVX-512 or
// else 16 of which products and sums take one more without fused multiply-add.
constexpr int64_t kSteps = kLanes == 16 ? 8 : 4;
constexpr int64_t kNv = kLanes == 4 ? 2 : 3;

// Below, a probability is as good as none; products with it are no denormal numbers yet, which
// processors take a hundred times longer for.
constexpr float kFloor = -64.0f;

// 2^x for x <= 0, within 8e-8 relative; for x < kFloor that of kFloor, or 0 where Flush.
template <bool Flush>
inline vf power_of_two(vf x) {
    const float magic = 12582912.0f + 127.0f;  // 1.5 * 2^23: low bits then hold round(x) + 127
    const vf t = max(splat(kFloor), x);
    const vf z = t + magic;
    const vf r = t - (z - magic);
    vf p = splat(1.5345811584749426e-4f);
    p = p * r + 1.3399931215649834e-3f;
    p = p * r + 9.618488958660416e-3f;
    p = p * r + 5.550328776975999e-2f;
    p = p * r + 2.4022646890619798e-1f;
    p = p * r + 6.931472057372619e-1f;
    p = p * r + 1.0f;
    const vf y = p * reinterpret_cast<vf>(reinterpret_cast<vi>(z) << 23);
    if (Flush) return x < kFloor ? vf{} : y;
    return y;
}

// x as it is, not taken into a fused multiply-add: what caches keep does not depend on the copy.
template <class T>
inline T rounded(T x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#endif
    return x;
}

// y = rotated x, times scale; y is not x.
inline void rotate(const mqc_attention* a, const float* x, int64_t row, float scale, float* y) {
    const int64_t n = a->rotary == MQC_ROTARY_NONE ? 0 : a->rotary_dim;
    const int64_t angle = (a->angle_batch == 1 ? row % a->tokens : row) * n;
    const float* __restrict c = a->cosine + angle;
    const float* __restrict s = a->sine + angle;
    const float* __restrict from = x;
    float* __restrict to = y;
    if (a->rotary == MQC_ROTARY_HALF) {
        const int64_t h = n / 2;
        const auto pair = [&](int64_t i) {
            const vf low = load(from + i), high = load(from + i + h);
            const vf first = rounded(low * load(c + i)) - rounded(high * load(s + i));
            const vf second =
                rounded(high * load(c + i + h)) + rounded(low * load(s + i + h));
            store(to + i, first * scale);
            store(to + i + h, second * scale);
        };
        int64_t i = 0;
        for (; i + kLanes <= h; i += kLanes) pair(i);
        if (i < h && h >= kLanes) pair(h - kLanes);  // again some, with the same results
        for (; i < h && h < kLanes; i++) {
            const float low = from[i], high = from[i + h];
            to[i] = (rounded(low * c[i]) - rounded(high * s[i])) * scale;
            to[i + h] = (rounded(high * c[i + h]) + rounded(low * s[i + h])) * scale;
        }
    } else {
        vf sign;
        for (int64_t i = 0; i < kLanes; i++) sign[i] = i % 2 ? 1.0f : -1.0f;
        int64_t i = 0;
        for (; i + kLanes <= n; i += kLanes) {
            const vf t = load(from + i), other = swapped<1>(t) * sign;
            const vf y = rounded(t * load(c + i)) + rounded(other * load(s + i));
            store(to + i, y * scale);
        }
        for (; i < n; i += 2) {
            const float low = from[i], high = from[i + 1];
            to[i] = (rounded(low * c[i]) - rounded(high * s[i])) * scale;
            to[i + 1] = (rounded(high * c[i + 1]) + rounded(low * s[i + 1])) * scale;
        }
    }
    for (int64_t i = n; i < a->dim; i++) to[i] = from[i] * scale;
}

// kLanes bytes as integers; compilers make this conversion lane by lane.
inline vi bytes_at(const int8_t* from) {
#if MQC_LANES == 16
    const __m128i line = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return reinterpret_cast<vi>(_mm512_maskz_cvtepi8_epi32(0xffff, line));
#elif MQC_LANES == 8
    return reinterpret_cast<vi>(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
    vb line;
    memcpy(&line, from, sizeof line);
    return __builtin_convertvector(line, vi);
#endif
}

// Rows of int8, each times its scale.
inline void widen(const int8_t* from, const float* scale, int64_t rows, int64_t size, float* to) {
    for (int64_t r = 0; r < rows; r++, from += size, to += size) {
        int64_t i = 0;
        for (; i + kLanes <= size; i += kLanes)
            store(to + i, __builtin_convertvector(bytes_at(from + i), vf) * scale[r]);
        for (; i < size; i++) to[i] = static_cast<float>(from[i]) * scale[r];
    }
}

// `width` rows of a key head's keys from `start` on, in `room` where they have to be made.
inline const float* keys_of(const mqc_attention* a, const AttentionLayout& layout,
                            float* workspace, int64_t head, int64_t start, int64_t width,
                            float* room) {
    if (!a->key_bytes) return layout.keys(a, workspace, head, start);
    const int64_t row = head * a->capacity + start;
    widen(a->key_bytes + row * a->dim, a->key_scale + row, width, a->dim, room);
    return room;
}

inline const float* values_of(const mqc_attention* a, const AttentionLayout& layout,
                              float* workspace, int64_t head, int64_t start, int64_t width,
                              float* room) {
    if (!a->value_bytes) return layout.values(a, workspace, head, start);
    const int64_t row = head * a->capacity + start, size = a->value_dim;
    widen(a->value_bytes + row * size, a->value_scale + row, width, size, room);
    return room;
}

// What becomes of C: A B, C + A B, or C * factor + A B with a factor for every column.
enum Into { kSet, kAdd, kScaled };

// C [R, N * kLanes]. A [R, depth] has rows at lda, or where Across is transposed: [depth, R] with
// rows at lda. B [depth, ...] has rows at ldb.
template <int64_t R, int64_t N, bool Across, Into Form>
inline void tile(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c,
                 int64_t ldc, const float* factor) {
    vf total[R][N];
    MQC_UNROLL
    for (int64_t r = 0; r < R; r++)
        MQC_UNROLL
        for (int64_t j = 0; j < N; j++) total[r][j] = vf{};
    for (int64_t k = 0; k < depth; k++) {
        vf line[N];
        MQC_UNROLL
        for (int64_t j = 0; j < N; j++) line[j] = load(b + k * ldb + j * kLanes);
        MQC_UNROLL
        for (int64_t r = 0; r < R; r++) {
            const vf x = splat(Across ? a[k * lda + r] : a[r * lda + k]);
            MQC_UNROLL
            for (int64_t j = 0; j < N; j++) total[r][j] += x * line[j];
        }
    }
    // The sums of a block are added as one: errors grow with the blocks, not with the keys.
    MQC_UNROLL
    for (int64_t j = 0; j < N; j++) {
        const vf f = Form == kScaled ? load(factor + j * kLanes) : vf{};
        MQC_UNROLL
        for (int64_t r = 0; r < R; r++) {
            float* to = c + r * ldc + j * kLanes;
            if (Form == kScaled) total[r][j] += load(to) * f;
            if (Form == kAdd) total[r][j] += load(to);
            store(to, total[r][j]);
        }
    }
}

template <int64_t N, bool Across, Into Form>
inline void panel(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t rows,
                  int64_t depth, float* c, int64_t ldc, const float* factor) {
    const int64_t step = Across ? 1 : lda;
    int64_t r = 0;
    for (; r + kSteps <= rows; r += kSteps)
        tile<kSteps, N, Across, Form>(a + r * step, lda, b, ldb, depth, c + r * ldc, ldc, factor);
    if (kSteps > 6 && r + 6 <= rows) {  // groups of six query heads, without a second tile
        tile<6, N, Across, Form>(a + r * step, lda, b, ldb, depth, c + r * ldc, ldc, factor);
        r += 6;
    }
    for (; r + 2 <= rows; r += 2)
        tile<2, N, Across, Form>(a + r * step, lda, b, ldb, depth, c + r * ldc, ldc, factor);
    if (r < rows) tile<1, N, Across, Form>(a + r * step, lda, b, ldb, depth, c + r * ldc, ldc, factor);
}

// C [rows, columns]; of the columns those in whole vectors. Returns how many these are.
template <bool Across, Into Form>
int64_t product(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t rows,
                int64_t depth, int64_t columns, float* c, int64_t ldc, const float* factor) {
    int64_t j = 0;
    const auto from = [&] { return Form == kScaled ? factor + j : nullptr; };
    for (; j + kNv * kLanes <= columns; j += kNv * kLanes)
        panel<kNv, Across, Form>(a, lda, b + j, ldb, rows, depth, c + j, ldc, from());
    if (kNv > 2 && j + 2 * kLanes <= columns) {
        panel<2, Across, Form>(a, lda, b + j, ldb, rows, depth, c + j, ldc, from());
        j += 2 * kLanes;
    }
    if (j + kLanes <= columns) {
        panel<1, Across, Form>(a, lda, b + j, ldb, rows, depth, c + j, ldc, from());
        j += kLanes;
    }
    return j;
}

// Lanes of a and b in turn, those of a where the bit Step of the lane's number is clear: of both
// the lanes with a clear bit (low), or with a set one (high).
template <int64_t Step>
inline vf low_of(vf a, vf b) {
    vi index;
    for (int64_t i = 0; i < kLanes; i++)
        index[i] = static_cast<int32_t>(i & Step ? kLanes + i - Step : i);
    return __builtin_shuffle(a, b, index);
}

template <int64_t Step>
inline vf high_of(vf a, vf b) {
    vi index;
    for (int64_t i = 0; i < kLanes; i++)
        index[i] = static_cast<int32_t>(i & Step ? kLanes + i : i + Step);
    return __builtin_shuffle(a, b, index);
}

// x[j][i] and x[i][j] change places.
template <int64_t Step = 1>
inline void turn(vf (&x)[kLanes]) {
    if constexpr (Step < kLanes) {
        for (int64_t i = 0; i < kLanes; i++) {
            if (i & Step) continue;
            const vf low = low_of<Step>(x[i], x[i + Step]);
            x[i + Step] = high_of<Step>(x[i], x[i + Step]);
            x[i] = low;
        }
        turn<2 * Step>(x);
    }
}

// Lane i is the sum of x[i].
template <int64_t Step = 1>
inline vf sums_of(vf (&x)[kLanes]) {
    if constexpr (Step == kLanes) {
        return x[0];
    } else {
        for (int64_t i = 0; i < kLanes / Step / 2; i++)
            x[i] = low_of<Step>(x[2 * i], x[2 * i + 1]) + high_of<Step>(x[2 * i], x[2 * i + 1]);
        return sums_of<2 * Step>(x);
    }
}

}  // namespace
