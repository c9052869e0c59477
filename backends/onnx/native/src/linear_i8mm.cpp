// Linear tiles with smmla, which multiplies two rows of eight bytes by two others: Arm v8.6, and
// earlier processors that have it.
#include "linear_neon.h"

namespace {

constexpr int kRows = 6, kPanel = 1;
constexpr int kPairs = kBlock / 2;  // of channels in a block

// R rows. `x` is [rows, groups, group_k].
template <int R, Form form>
void tile_of_pairs(const Tile& t) {
    constexpr int P = (R + 1) / 2, N = kBlock / Neon::lanes;
    float memory[R * kBlock];
    const int64_t row_bytes = t.groups * t.group_k;
    for (int64_t g = 0; g < t.groups; g++) {
        int32x4_t sum[P][kPairs];  // [2 rows][2 channels]
#pragma GCC unroll 8
        for (int p = 0; p < P; p++)
#pragma GCC unroll 8
            for (int c = 0; c < kPairs; c++) sum[p][c] = vdupq_n_s32(0);
        const uint8_t* w = t.w + g * t.w_group;
        const int8_t* x = t.x + g * t.group_k;
        for (int64_t i = 0; i < t.group_k; i += 8, w += form == kNibbles ? 64 : 128) {
            int8x16_t rows[P];
#pragma GCC unroll 8
            for (int p = 0; p < P; p++) {
                const int8_t* first = x + 2 * p * row_bytes + i;
                // An odd last row stands for its missing neighbour; that result is not used.
                const int8_t* second = 2 * p + 1 < R ? first + row_bytes : first;
                rows[p] = vcombine_s8(vld1_s8(first), vld1_s8(second));
            }
#pragma GCC unroll 4
            for (int v = 0; v < N; v++) {
                const uint8x16_t bytes = vld1q_u8(w + 16 * v);
                uint8x16_t low = form == kNibbles ? Neon::low(bytes) : bytes;
                uint8x16_t high = form == kNibbles ? Neon::high(bytes) : vld1q_u8(w + 64 + 16 * v);
                if (form == kBytes) {
                    low = veorq_u8(low, vdupq_n_u8(0x80));
                    high = veorq_u8(high, vdupq_n_u8(0x80));
                }
                const uint32x4_t first = vreinterpretq_u32_u8(low);
                const uint32x4_t last = vreinterpretq_u32_u8(high);
                const int8x16_t pair0 = vreinterpretq_s8_u32(vzip1q_u32(first, last));
                const int8x16_t pair1 = vreinterpretq_s8_u32(vzip2q_u32(first, last));
#pragma GCC unroll 8
                for (int p = 0; p < P; p++) {
                    sum[p][2 * v] = vmmlaq_s32(sum[p][2 * v], rows[p], pair0);
                    sum[p][2 * v + 1] = vmmlaq_s32(sum[p][2 * v + 1], rows[p], pair1);
                }
            }
        }
        float32x4_t y[R][N];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int v = 0; v < N; v++) {
                const int64x2_t left = vreinterpretq_s64_s32(sum[r / 2][2 * v]);
                const int64x2_t right = vreinterpretq_s64_s32(sum[r / 2][2 * v + 1]);
                const int32x4_t row = vreinterpretq_s32_s64(
                    r % 2 ? vuzp2q_s64(left, right) : vuzp1q_s64(left, right));
                const int32x4_t whole = vaddq_s32(row, vdupq_n_s32(t.correction[g * R + r]));
                const float32x4_t scale = vld1q_f32(t.w_scale + g * kBlock + v * Neon::lanes);
                y[r][v] = vmulq_f32(vcvtq_f32_s32(whole), scale);
                float* before = memory + (r * N + v) * Neon::lanes;
                if (g > 0) y[r][v] = vaddq_f32(vld1q_f32(before), y[r][v]);
                if (g < t.groups - 1) vst1q_f32(before, y[r][v]);
            }
        if (g < t.groups - 1) continue;
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int v = 0; v < N; v++)
                y[r][v] = vmulq_f32(y[r][v], vdupq_n_f32(t.x_scale[r]));
        finish<Neon, R, N>(t, y);
    }
}

template <Form form, int R>
void tile_rows_of_pairs(const Tile& t) {
    if (t.rows == R) return tile_of_pairs<R, form>(t);
    if constexpr (R > 1) tile_rows_of_pairs<form, R - 1>(t);
}

// Rows as they are, their groups padded.
void pack_rows(const uint8_t* x, int64_t rows, const Sizes& s, int64_t padded, uint8_t flip,
               int8_t* packed, int32_t* correction) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0; g < s.groups; g++) {
            int8_t* out = packed + (r * s.groups + g) * padded;
            int32_t sum = 0;
            for (int64_t i = 0; i < s.group; i++) {
                out[i] = static_cast<int8_t>(x[r * s.k + g * s.group + i] ^ flip);
                sum += out[i];
            }
            memset(out + s.group, 0, static_cast<size_t>(padded - s.group));
            correction[g * rows + r] = s.bits == 4 ? -8 * sum : 0;
        }
}

void tile(Form form, const Tile& t) {
    if (form == kNibbles && t.keep)
        tile(kSmall, unpack<Neon, kPanel>(t));
    else if (form == kNibbles)
        tile_rows_of_pairs<kNibbles, kRows>(t);
    else if (form == kSmall)
        tile_rows_of_pairs<kSmall, kRows>(t);
    else
        tile_rows_of_pairs<kBytes, kRows>(t);
}

}  // namespace

namespace mqc {
const LinearIsa linear_i8mm = {"i8mm", kRows, kPanel, 8, false, pack_rows,
                               tile, nullptr, 0, nullptr, nullptr};
}
