// Linear tiles in the matrix registers of AMX-INT8: Sapphire Rapids and later.
//
// A tile is 32 rows x 32 channels: four registers of 16 x 16 sums, two of inputs (16 rows x 64
// inputs), two of weights (64 inputs x 16 channels, which is how blocks of a panel lie in memory).
#include "linear_zmm.h"

namespace {

constexpr int64_t kHalf = 16;    // rows of a register
constexpr int64_t kChunk = 64;   // inputs of a register
constexpr int64_t kBytesOf = 1024;

struct alignas(64) Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t column_bytes[16] = {};
    uint8_t rows[16] = {};
};

void begin() {
    Config config;
    for (int i = 0; i < 8; i++) {
        config.column_bytes[i] = 64;
        config.rows[i] = 16;
    }
    // Not the intrinsic: GCC 12's names only its first eight bytes as read.
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

void end() { _tile_release(); }

// Rows of 64 inputs, chunk by chunk: [groups, padded / 64, rows, 64]. A register's load may reach
// past the last row; the sums of such rows are left alone.
void pack_rows(const uint8_t* x, int64_t rows, const Sizes& s, int64_t padded, uint8_t flip,
               int8_t* packed, int32_t* correction) {
    const int32_t zero = s.bits == 4 ? 8 : 128;
    const __m512i flips = _mm512_set1_epi8(static_cast<char>(flip));
    const __m512i ones = _mm512_set1_epi8(1);
    for (int64_t g = 0; g < s.groups; g++)
        for (int64_t r = 0; r < rows; r++) {
            const uint8_t* in = x + r * s.k + g * s.group;
            int8_t* out = packed + g * padded * rows + r * kChunk;
            __m512i sum = _mm512_setzero_si512();
            for (int64_t i = 0; i < padded; i += kChunk, out += rows * kChunk) {
                const int64_t left = s.group - i;
                const __mmask64 mask = left >= kChunk ? ~0ULL : (1ULL << (left < 0 ? 0 : left)) - 1;
                const __m512i v = _mm512_maskz_loadu_epi8(mask, in + i);
                const __m512i value = _mm512_maskz_mov_epi8(mask, _mm512_xor_si512(v, flips));
                sum = Avx512::dot<kBytes>(sum, ones, value);
                _mm512_storeu_si512(out, value);
            }
            int32_t lanes[16], total = 0;
            memcpy(lanes, &sum, sizeof lanes);
            for (int lane = 0; lane < 16; lane++) total += lanes[lane];
            correction[g * rows + r] = -zero * total;
        }
}

// Unpacks `inputs` inputs (a multiple of 8) of one block from nibbles to a panel.
inline void unpack(const uint8_t* packed, int64_t inputs, uint8_t* panel) {
    for (int64_t i = 0; i < inputs; i += 8, packed += 64, panel += 128) {
        const __m512i both = Avx512::load(packed);
        Avx512::store(panel, Avx512::low(both));
        Avx512::store(panel + 64, Avx512::high(both));
    }
}

// Unpacks a whole group of both blocks, and pads it.
void unpack_group(const Tile& t, const uint8_t* packed, uint8_t* panel) {
    for (int64_t b = 0; b < 2; b++) {
        uint8_t* out = panel + b * t.keep_block;
        unpack(packed + b * t.w_block, t.packed_k, out);
        memset(out + t.packed_k * kBlock, 0, static_cast<size_t>(t.group_k - t.packed_k) * kBlock);
    }
}

// Sums of one group to memory, [32][32], from the panel w. With `packed`, each chunk of the panel
// is unpacked while the products of the one before it run: they are made in a unit of their own.
template <bool both>
void multiply_group(const int8_t* x, int64_t rows, uint8_t* w, int64_t w_block,
                    const uint8_t* packed, const Tile& t, const uint8_t*& ahead, int32_t* sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (packed) {
        unpack(packed, kChunk, w);
        unpack(packed + t.w_block, kChunk, w + w_block);
        __asm__ volatile("" ::: "memory");  // before the loads, whose intrinsics do not say so
    }
    for (int64_t i = 0; i < t.group_k; i += kChunk, x += rows * kChunk, w += kBytesOf) {
        _tile_loadd(4, x, 64);
        _tile_loadd(6, w, 64);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, w + w_block, 64);
        _tile_dpbsud(1, 4, 7);
        if (both) {
            _tile_loadd(5, x + kBytesOf, 64);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
        if (packed && i + kChunk < t.group_k) {
            packed += kChunk * kBlock / 2;
            unpack(packed, kChunk, w + kBytesOf);
            unpack(packed + t.w_block, kChunk, w + w_block + kBytesOf);
            __asm__ volatile("" ::: "memory");
        }
        for (int line = 0; line < 8 && ahead < t.ahead_end; line++, ahead += 64)
            __builtin_prefetch(ahead);
    }
    constexpr int stride = 2 * kBlock * 4;
    _tile_stored(0, sums, stride);
    _tile_stored(1, sums + kBlock, stride);
    if (both) {
        _tile_stored(2, sums + kHalf * 2 * kBlock, stride);
        _tile_stored(3, sums + kHalf * 2 * kBlock + kBlock, stride);
    }
}

void tile(Form form, const Tile& t) {
    alignas(64) int32_t sums[2 * kHalf * 2 * kBlock];
    alignas(64) float partial[2 * kHalf * 2 * kBlock];
    if (t.groups > 1) memset(partial, 0, sizeof partial);
    const uint8_t* ahead = t.ahead;
    for (int64_t g = 0; g < t.groups; g++) {
        const int8_t* x = t.x + g * t.group_k * t.rows;
        const uint8_t* packed = nullptr;
        uint8_t* w = const_cast<uint8_t*>(t.w) + g * t.w_group;  // written to only where packed
        int64_t w_block = t.w_block;
        if (form == kNibbles) {
            packed = w;
            w = t.keep + g * t.keep_group;
            w_block = t.keep_block;
            if (t.packed_k != t.group_k) {
                unpack_group(t, packed, w);
                packed = nullptr;
            }
        }
        if (t.rows > kHalf)
            multiply_group<true>(x, t.rows, w, w_block, packed, t, ahead, sums);
        else
            multiply_group<false>(x, t.rows, w, w_block, packed, t, ahead, sums);
        const bool last = g == t.groups - 1;
        Tile row = t;
        for (int64_t r = 0; r < t.rows; r++) {
            const __m512i start = _mm512_set1_epi32(t.correction[g * t.rows + r]);
            __m512 y[1][2];
#pragma GCC unroll 2
            for (int v = 0; v < 2; v++) {
                const int64_t at = (2 * r + v) * kBlock;
                const __m512i sum = _mm512_add_epi32(_mm512_load_si512(sums + at), start);
                const float* scale = t.w_scale + v * t.scale_block + g * kBlock;
                y[0][v] = _mm512_mul_ps(Avx512::to_float(sum), _mm512_loadu_ps(scale));
                if (t.groups > 1) {
                    y[0][v] = _mm512_add_ps(_mm512_load_ps(partial + at), y[0][v]);
                    _mm512_store_ps(partial + at, y[0][v]);
                }
                y[0][v] = _mm512_mul_ps(y[0][v], _mm512_set1_ps(t.x_scale[r]));
            }
            if (!last) continue;
            finish<Avx512, 1, 2>(row, y);
            row.y += t.y_row;
            row.residual += t.residual ? t.residual_row : 0;
            row.x_split += t.x_split ? t.split : 0;
        }
    }
}

}  // namespace

namespace mqc {
// A few rows would leave most of a register empty, and need 4-bit weights unpacked in memory.
const LinearIsa linear_amx = {"amx",     2 * kHalf, 2,    kChunk, true,
                              pack_rows, tile,      &linear_avx512vnni, 14, begin, end};
}
