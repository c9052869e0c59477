// The tile kernel, written once over a vector type V that the including file defines:
//
//   V::lanes                  int32 lanes; a block of 16 channels is 16 / lanes vectors
//   V::Int, V::Float, V::Bytes, V::Input
//   Bytes load(const uint8_t*)         4 * lanes weight bytes
//   Bytes low(Bytes), high(Bytes)      the nibbles of each byte, 0..15
//   Input spread(const int8_t*)        4 values of x, for every lane
//   Int dot<form>(Int, Bytes, Input)   + sum over 4 of unsigned weight * signed x, a lane
//   Int spread_int(int32_t), Int add(Int, Int), Float to_float(Int)
//   Float load_float, store_float, spread_float, mul, add
//
// Everything is in an unnamed namespace: copies for different instruction sets share no function.
#pragma once

#include <string.h>

#include "linear.h"

namespace {

using mqc::Form;
using mqc::kBlock;
using mqc::kBytes;
using mqc::kNibbles;
using mqc::kSmall;
using mqc::Sizes;
using mqc::Tile;

template <class V>
constexpr int64_t kVectors = kBlock / V::lanes;  // of a block

// Finished values of a tile from its scaled sums; the order of mqc_kernels.h. Each term is one pass
// over registers, so that a term that is not there costs one branch a tile.
template <class V, int R, int N>
inline __attribute__((always_inline)) void finish(const Tile& t, typename V::Float (&y)[R][N]) {
    constexpr int P = kVectors<V>;
    if (t.bias) {
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 16
            for (int v = 0; v < N; v++)
                y[r][v] = V::add(y[r][v], V::load_float(t.bias + v * V::lanes));
    }
    if (t.split) {
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const float* x = t.x_split + r * t.split;
#pragma GCC unroll 16
            for (int v = 0; v < N; v++) {
                const float* w = t.w_split + v / P * t.split_block + v % P * V::lanes;
                typename V::Float term = V::mul(V::spread_float(x[0]), V::load_float(w));
                for (int64_t j = 1; j < t.split; j++)
                    term = V::add(term, V::mul(V::spread_float(x[j]),
                                               V::load_float(w + j * kBlock)));
                y[r][v] = V::add(y[r][v], term);
            }
        }
    }
    if (t.residual) {
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 16
            for (int v = 0; v < N; v++)
                y[r][v] = V::add(y[r][v], V::load_float(t.residual + r * t.residual_row +
                                                        v * V::lanes));
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int v = 0; v < N; v++)
            V::store_float(t.y + r * t.y_row + v * V::lanes, y[r][v]);
}

// Makes the compiler forget what it knows of a pointer. (Of w: or it would keep both halves of a step
// in registers rather than load twice.)
template <class T>
inline void hide(T*& pointer) {
#if defined(__GNUC__)
    __asm__("" : "+r"(pointer));
#endif
}

// The first or the second half of a step of eight inputs, of vector v of a tile's channels.
template <class V, Form form, bool half>
inline __attribute__((always_inline)) typename V::Bytes weights_of(const uint8_t* w, int v,
                                                                   int64_t w_block) {
    const uint8_t* p = w + v / kVectors<V> * w_block + v % kVectors<V> * 4 * V::lanes;
    if (form != kNibbles) return V::load(p + (half ? 64 : 0));
    return half ? V::high(V::load(p)) : V::low(V::load(p));
}

// Adds the products of four inputs.
template <class V, int R, int N, Form form, bool half>
inline __attribute__((always_inline)) void multiply(const uint8_t* w, int64_t w_block,
                                                    const int8_t* x,
                                                    typename V::Int (&sum)[R][N]) {
    typename V::Bytes weights[N];
#pragma GCC unroll 16
    for (int v = 0; v < N; v++) weights[v] = weights_of<V, form, half>(w, v, w_block);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
        const typename V::Input value = V::spread(x + 4 * r);
#pragma GCC unroll 16
        for (int v = 0; v < N; v++)
            sum[r][v] = V::template dot<form>(sum[r][v], weights[v], value);
    }
}

// Unpacks the nibbles of a tile to t.keep; the tile that reads them there. (Tiles that unpack what
// they multiply, and store it too, spill registers: twice the time of the two one after the other.)
template <class V, int B>
Tile unpack(const Tile& t) {
    constexpr int N = B * kVectors<V>;
    for (int64_t g = 0; g < t.groups; g++) {
        const uint8_t* w = t.w + g * t.w_group;
        uint8_t* out = t.keep + g * t.keep_group;
        for (int64_t i = 0; i < t.packed_k; i += 8, w += 64, out += 128) {
#pragma GCC unroll 16
            for (int v = 0; v < N; v++) {
                uint8_t* p = out + v / kVectors<V> * t.keep_block + v % kVectors<V> * 4 * V::lanes;
                V::store(p, weights_of<V, kNibbles, false>(w, v, t.w_block));
                V::store(p + 64, weights_of<V, kNibbles, true>(w, v, t.w_block));
            }
        }
    }
    Tile bytes = t;
    bytes.w = t.keep;
    bytes.w_block = t.keep_block;
    bytes.w_group = t.keep_group;
    bytes.keep = nullptr;
    return bytes;
}

// Asks for lines of memory that a tile needs soon: those of y, of the residual, then whatever t.ahead
// names. A few at a time: all at once would take every fill buffer of the core, and the tile's own
// operands come through these too.
template <int R, int B>
struct Soon {
    const Tile& t;
    const uint8_t* ahead = t.ahead;
    int64_t line = 0;

    inline __attribute__((always_inline)) void ask() {
        for (int64_t i = 0; i < t.ask_lines; i++, line++) {
            if (line < R * B) {
                __builtin_prefetch(t.y + line / B * t.y_row + line % B * kBlock, 1);
            } else if (t.residual && line < 2 * R * B) {
                const int64_t at = line - R * B;
                __builtin_prefetch(t.residual + at / B * t.residual_row + at % B * kBlock);
            } else if (ahead < t.ahead_end) {
                __builtin_prefetch(ahead);
                ahead += 64;
            }
        }
    }
};

// R rows, B blocks. `x` is [groups, group_k / 4, R, 4].
template <class V, int R, int B, Form form>
void tile_of(const Tile& t) {
    constexpr int P = kVectors<V>, N = B * P;
    // Few sums: keep two of each, or the latency of the dot product would show.
    constexpr bool two = R * N <= V::latency;
    float memory[R * B * kBlock];
    // Sums of the groups before. Hidden, or the compiler would make registers of it.
    float* partial = t.groups > 1 ? memory : nullptr;
    hide(partial);
    const int8_t* x = t.x;
    Soon<R, B> soon{t};
    for (int64_t g = 0; g < t.groups; g++) {
        typename V::Int sum[R][N], second[R][N];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const typename V::Int start = V::spread_int(t.correction[g * R + r]);
#pragma GCC unroll 16
            for (int v = 0; v < N; v++) {
                sum[r][v] = start;
                if (two) second[r][v] = V::spread_int(0);
            }
        }
        const uint8_t* w = t.w + g * t.w_group;
        const int64_t w_block = t.w_block;
        const int64_t stride = form == kNibbles ? 64 : 128;
        const int8_t* const end = x + t.group_k * R;
        do {
            soon.ask();
            const int8_t* const next = x + t.ask_every * 8 * R;
            const int8_t* const stop = next < end ? next : end;
            do {
                multiply<V, R, N, form, false>(w, w_block, x, sum);
                hide(w);
                multiply<V, R, N, form, true>(w, w_block, x + 4 * R, two ? second : sum);
                w += stride;
                x += 8 * R;
            } while (x < stop);
        } while (x < end);
        typename V::Float y[R][N];
#pragma GCC unroll 16
        for (int v = 0; v < N; v++) {
            const float* at = t.w_scale + v / P * t.scale_block + g * kBlock + v % P * V::lanes;
            const typename V::Float scale = V::load_float(at);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                if (two) sum[r][v] = V::add(sum[r][v], second[r][v]);
                y[r][v] = V::mul(V::to_float(sum[r][v]), scale);
            }
        }
        if (partial) {
#pragma GCC unroll 16
            for (int r = 0; r < R; r++)
#pragma GCC unroll 16
                for (int v = 0; v < N; v++) {
                    float* before = partial + (r * N + v) * V::lanes;
                    if (g > 0) y[r][v] = V::add(V::load_float(before), y[r][v]);
                    V::store_float(before, y[r][v]);
                }
            if (g < t.groups - 1) continue;
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const typename V::Float scale = V::spread_float(t.x_scale[r]);
#pragma GCC unroll 16
            for (int v = 0; v < N; v++) y[r][v] = V::mul(y[r][v], scale);
        }
        finish<V, R, N>(t, y);
    }
}

template <class V, int B, Form form, int R>
inline void tile_rows(const Tile& t) {
    if (t.rows == R) return tile_of<V, R, B, form>(t);
    if constexpr (R > 1) tile_rows<V, B, form, R - 1>(t);
}

// Interleaves rows by fours of k: [groups, padded / 4, rows, 4].
inline void pack_rows_interleaved(const uint8_t* x, int64_t rows, const Sizes& s, int64_t padded,
                                  uint8_t flip, int8_t* packed, int32_t* correction) {
    const uint32_t flips = flip * 0x01010101u;
    const int32_t zero = s.bits == 4 ? 8 : 128;
    for (int64_t g = 0; g < s.groups; g++) {
        int8_t* out = packed + g * padded * rows;
        for (int64_t r = 0; r < rows; r++) {
            const uint8_t* in = x + r * s.k + g * s.group;
            int32_t sum = 0;
            for (int64_t i = 0; i < s.group; i++) sum += static_cast<int8_t>(in[i] ^ flip);
            correction[g * rows + r] = -zero * sum;
            const int64_t whole = s.group / 4;
            for (int64_t i = 0; i < whole; i++) {
                uint32_t four;
                memcpy(&four, in + 4 * i, 4);
                four ^= flips;
                memcpy(out + (i * rows + r) * 4, &four, 4);
            }
            for (int64_t i = 4 * whole; i < padded; i++)
                out[(i / 4 * rows + r) * 4 + i % 4] =
                    i < s.group ? static_cast<int8_t>(in[i] ^ flip) : 0;
        }
    }
}

}  // namespace
