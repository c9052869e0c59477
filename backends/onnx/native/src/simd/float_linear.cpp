// Tiles of the weight-only linear: weights become float in registers and meet float activations.
#include "simd/float_linear.h"

#include "mqc_layers.h"
#include "simd/table.h"
#include "simd/vec.h"

namespace mqc::MQC_ISA {
namespace {

constexpr int kVectors = 16 / kLanes;  // of a block

// Registers for sums: of 32, or of 16.
#if defined(__AVX512F__)
constexpr int kFew = 8, kRows = 14, kBlocks = 2;
#elif defined(__AVX2__)
constexpr int kFew = 4, kRows = 6, kBlocks = 1;
#elif defined(__aarch64__)
constexpr int kFew = 4, kRows = 6, kBlocks = 1;
#else
constexpr int kFew = 2, kRows = 2, kBlocks = 1;
#endif
static_assert(kRows <= kMaxFloatRows && kFew <= kDirectRows);

// The weights of a step in vectors of channels. A lane has four bytes, so eight nibbles: in memory
// byte i holds inputs i and i + 4, and `place` counts nibbles (or bytes) from the low end.
template <int Bits>
struct Weights;

template <>
struct Weights<4> {
    static constexpr int places = 8;
    static constexpr int input(int place) { return place % 2 * 4 + place / 2; }
#if defined(__AVX512F__)
    static constexpr float unit = 1;
    static vi load(const uint8_t* p) {
        vi v;
        memcpy(&v, p, sizeof v);
        return v;
    }
    static vf at(vi v, int place) {  // vpermps reads the low four bits of a lane and no more
        const vf values = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
        return __builtin_shuffle(values, v >> (4 * place));
    }
#else
    // The nibble alone, at the upper end: a signed integer 2^28 times the weight.
    static constexpr float unit = 1.0f / (1 << 28);
    static vi load(const uint8_t* p) {
        vi v;
        memcpy(&v, p, sizeof v);
        return v ^ static_cast<int32_t>(0x88888888u);
    }
    static vf at(vi v, int place) {
        return __builtin_convertvector((v << (28 - 4 * place)) & static_cast<int32_t>(0xf0000000u),
                                       vf);
    }
#endif
};

template <>
struct Weights<8> {
    static constexpr int places = 4;
    static constexpr int input(int place) { return place; }
    static constexpr float unit = 1.0f / (1 << 24);
    static vi load(const uint8_t* p) {
        vi v;
        memcpy(&v, p, sizeof v);
        return v ^ static_cast<int32_t>(0x80808080u);
    }
    static vf at(vi v, int place) {
        return __builtin_convertvector((v << (24 - 8 * place)) & static_cast<int32_t>(0xff000000u),
                                       vf);
    }
};

template <int Bits, int R>
void direct_tile(const float* x, const uint8_t* w, const float* scale, int64_t groups,
                 int64_t group_steps, float* sums) {
    using W = Weights<Bits>;
    // Several sums of each value where there are few, or the latency of the additions would show.
    constexpr int N = R * kVectors, S = N >= 8 ? 1 : N >= 4 ? 2 : N >= 2 ? 4 : 8;
    constexpr int kWords = W::places == 8 ? 1 : 2;  // groups of 64 bytes in a step
    constexpr int kSums = S < W::places * kWords ? S : W::places * kWords;
    vf total[R][kVectors] = {};
    for (int64_t g = 0; g < groups; g++) {
        vf sum[kSums][R][kVectors] = {};
        for (int64_t i = 0; i < group_steps; i++) {
#pragma GCC unroll 2
            for (int word = 0; word < kWords; word++) {
                // Far ahead to the second-level cache, which has more room for lines on their way.
                __builtin_prefetch(w + 6144, 0, 2);
                __builtin_prefetch(w + 768);
                vi packed[kVectors];
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; v++) packed[v] = W::load(w + v * 4 * kLanes);
#pragma GCC unroll 8
                for (int place = 0; place < W::places; place++) {
                    const float* input = x + (word * 4 + W::input(place)) * R;
                    constexpr int last = kSums - 1;
                    vf weight[kVectors];
#pragma GCC unroll 4
                    for (int v = 0; v < kVectors; v++) weight[v] = W::at(packed[v], place);
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                        for (int v = 0; v < kVectors; v++)
                            sum[(word * W::places + place) & last][r][v] += weight[v] * input[r];
                }
                w += 64;
            }
            x += 8 * R;
        }
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) {
            const vf factor = load(scale + g * 16 + v * kLanes) * W::unit;
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
                for (int half = kSums / 2; half > 0; half /= 2)
#pragma GCC unroll 8
                    for (int s = 0; s < half; s++) sum[s][r][v] += sum[s + half][r][v];
                total[r][v] += sum[0][r][v] * factor;
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < kVectors; v++) store(sums + r * 16 + v * kLanes, total[r][v]);
}

template <int Bits, int R>
void direct_rows(int64_t rows, const float* x, const uint8_t* w, const float* scale,
                 int64_t groups, int64_t group_steps, float* sums) {
    if (rows == R) return direct_tile<Bits, R>(x, w, scale, groups, group_steps, sums);
    if constexpr (R > 1) direct_rows<Bits, R - 1>(rows, x, w, scale, groups, group_steps, sums);
}

void direct(int64_t bits, int64_t rows, const float* x, const uint8_t* w, const float* scale,
            int64_t groups, int64_t group_steps, float* sums) {
    if (bits == 4)
        direct_rows<4, kFew>(rows, x, w, scale, groups, group_steps, sums);
    else
        direct_rows<8, kFew>(rows, x, w, scale, groups, group_steps, sums);
}

template <int Bits>
void unpack_block(const uint8_t* w, const float* scale, int64_t group_steps, int64_t first,
                  int64_t steps, float* panel) {
    using W = Weights<Bits>;
    constexpr int64_t stride = kBlocks * 16;
    w += first * 16 * Bits;
    for (int64_t step = first; step < first + steps;) {
        const int64_t group = step / group_steps, end = (group + 1) * group_steps;
        vf factor[kVectors];
        for (int v = 0; v < kVectors; v++)
            factor[v] = load(scale + group * 16 + v * kLanes) * W::unit;
        for (; step < end && step < first + steps; step++) {
            for (int word = 0; word < 8 / W::places; word++, w += 64)
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; v++) {
                    const vi packed = W::load(w + v * 4 * kLanes);
                    float* out = panel + word * 4 * stride + v * kLanes;
#pragma GCC unroll 8
                    for (int place = 0; place < W::places; place++)
                        store(out + W::input(place) * stride, W::at(packed, place) * factor[v]);
                }
            panel += 8 * stride;
        }
    }
}

void unpack(int64_t bits, const uint8_t* w, int64_t w_block, const float* scale,
            int64_t scale_block, int64_t group_steps, int64_t first, int64_t steps, float* panel) {
    for (int64_t b = 0; b < kBlocks; b++)
        (bits == 4 ? unpack_block<4> : unpack_block<8>)(w + b * w_block, scale + b * scale_block,
                                                        group_steps, first, steps, panel + b * 16);
}

template <int R>
void panel_tile(const float* x, const float* panel, int64_t steps, bool add, float* sums) {
    constexpr int N = kBlocks * kVectors;
    vf sum[R][N];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < N; v++)
            sum[r][v] = add ? load(sums + (r * N + v) * kLanes) : vf{};
    for (int64_t i = 0; i < 8 * steps; i++, x += R, panel += N * kLanes) {
        vf weight[N];
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) weight[v] = load(panel + v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int v = 0; v < N; v++) sum[r][v] += weight[v] * x[r];
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) store(sums + (r * N + v) * kLanes, sum[r][v]);
}

template <int R>
void panel_rows(int64_t rows, const float* x, const float* panel, int64_t steps, bool add,
                float* sums) {
    if (rows == R) return panel_tile<R>(x, panel, steps, add, sums);
    if constexpr (R > 1) panel_rows<R - 1>(rows, x, panel, steps, add, sums);
}

}  // namespace

const FloatKernel float_kernel = {kFew, kRows, kBlocks, direct, unpack, panel_rows<kRows>};

}  // namespace mqc::MQC_ISA
