#include "pack.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "mqc/layout.cuh"
#include "mqc_cuda.h"

namespace mqc_onnx_cuda {
namespace {

constexpr int64_t kChannels = mqc::kTileChannels, kInputs = mqc::kTileInputs;
constexpr int kThreads = 128;

// One byte a weight: int8, or the nibble of an int4. Zeros outside of the matrix.
typedef uint8_t Tile[kChannels][kInputs];

uint32_t word_at(const uint8_t* bytes) {
    uint32_t word;
    std::memcpy(&word, bytes, sizeof word);
    return word;
}

void put(uint8_t* to, uint32_t word) { std::memcpy(to, &word, sizeof word); }

void read_rows(const Weight& w, int64_t first, int64_t start, Tile& tile) {
    const int64_t rows = std::min(kChannels, w.n - first), columns = std::min(kInputs, w.k - start);
    const int64_t bytes = w.bits == 8 ? w.k : (w.k + 1) / 2;  // of a row; `start` is even
    for (int64_t row = 0; row < rows; row++) {
        const uint8_t* from = w.data + (first + row) * bytes;
        if (w.bits == 8)
            std::memcpy(tile[row], from + start, static_cast<size_t>(columns));
        else
            for (int64_t i = 0; i < columns; i++)
                tile[row][i] = (from[(start + i) / 2] >> (i % 2 * 4)) & 15;
    }
}

// Blocks of 16 channels x 4 inputs, value + 128; of 4 bits x 8 inputs, value + 8 in a nibble.
void read_tiles(const Weight& w, int64_t first, int64_t start, Tile& tile) {
    const int64_t blocks = mqc::ceil_div(w.n, 16), step = 32 / w.bits, steps = w.k / step;
    const int64_t columns = std::min(kInputs, w.k - start);
    for (int64_t block = 0; block < kChannels / 16 && first / 16 + block < blocks; block++) {
        const uint8_t* from = w.data + ((first / 16 + block) * steps + start / step) * 64;
        for (int64_t i = 0; i < columns; i += step, from += 64)
            for (int64_t c = 0; c < 16; c++) {
                uint8_t* to = tile[block * 16 + c] + i;
                const uint32_t word = word_at(from + 4 * c);
                if (w.bits == 8) {
                    put(to, word ^ 0x80808080u);
                } else {
                    put(to, (word & 0x0F0F0F0Fu) ^ 0x08080808u);
                    put(to + 4, ((word >> 4) & 0x0F0F0F0Fu) ^ 0x08080808u);
                }
            }
    }
}

// The four words of a thread, rows as fragments have them (mqc/layout.cuh).
void write_tile8(const Tile& tile, uint8_t* to) {
    for (int step = 0; step < mqc::kStepsPerTile; step++)
        for (int thread = 0; thread < kThreads; thread++)
            for (int reg = 0; reg < 4; reg++) {
                const int row = mqc::fragment_row(thread, reg);
                const int input = step * mqc::kStepInputs + mqc::fragment_input(thread, reg, 0);
                put(to + mqc::packed_vector(step, thread) + 4 * reg, word_at(&tile[row][input]));
            }
}

void write_tile4(const Tile& tile, uint8_t* to) {
    for (int step = 0; step < mqc::kStepsPerTile; step++)
        for (int thread = 0; thread < kThreads; thread++)
            for (int half = 0; half < 2; half++) {
                const int row = mqc::fragment_row(thread, 2 * half);
                const int input = step * mqc::kStepInputs + mqc::fragment_input(thread, 2 * half, 0);
                const uint32_t low = word_at(&tile[row][input]), high = word_at(&tile[row + 8][input]);
                put(to + mqc::packed_vector(step / 2, thread) + 4 * (step % 2 * 2 + half),
                    low | (high << 4));
            }
}

// Scales behind a tile's values; groups of the file in equal parts of those of the format.
template <class Format>
void write_scales(const Weight& w, int64_t first, int64_t start, uint8_t* tile) {
    if constexpr (Format::kGrouped) {
        const int64_t size = w.k / w.groups;
        for (int group = 0; group < kInputs / Format::kGroup; group++)
            for (int channel = 0; channel < kChannels; channel++) {
                const int64_t row = first + channel, input = start + group * Format::kGroup;
                if (row < w.n && input < w.k)
                    std::memcpy(tile + mqc::packed_scale<Format>(group, channel),
                                w.scales + row * w.groups + input / size, sizeof(float));
            }
    }
}

template <class Format>
std::vector<uint8_t> pack_as(const Weight& w) {
    const int64_t channel_tiles = mqc::ceil_div(w.n, kChannels);
    const int64_t input_tiles = mqc::ceil_div(w.k, kInputs);
    std::vector<uint8_t> packed(
        static_cast<size_t>(mqc::packed_tile<Format>(channel_tiles, 0, input_tiles)));
    Tile tile;
    for (int64_t c = 0; c < channel_tiles; c++)
        for (int64_t i = 0; i < input_tiles; i++) {
            uint8_t* to = packed.data() + mqc::packed_tile<Format>(c, i, input_tiles);
            std::memset(tile, 0, sizeof tile);
            (w.tiled ? read_tiles : read_rows)(w, c * kChannels, i * kInputs, tile);
            (Format::kBits == 8 ? write_tile8 : write_tile4)(tile, to);
            write_scales<Format>(w, c * kChannels, i * kInputs, to);
        }
    return packed;
}

}  // namespace

int layout_of(const Weight& w) {
    const bool eight = w.bits == 8;
    if (w.groups == 1) return eight ? MQC_LAYOUT_W8_64X128 : MQC_LAYOUT_W4_64X128;
    if (w.k % w.groups) return 0;
    switch (std::gcd(w.k / w.groups, kInputs)) {
        case 32: return eight ? MQC_LAYOUT_W8_64X128_G32 : MQC_LAYOUT_W4_64X128_G32;
        case 64: return eight ? MQC_LAYOUT_W8_64X128_G32 : MQC_LAYOUT_W4_64X128_G64;
        case 128: return eight ? MQC_LAYOUT_W8_64X128_G128 : MQC_LAYOUT_W4_64X128_G128;
        default: return 0;
    }
}

std::vector<uint8_t> pack(const Weight& w) {
    switch (layout_of(w)) {
        case MQC_LAYOUT_W8_64X128: return pack_as<mqc::W8>(w);
        case MQC_LAYOUT_W4_64X128: return pack_as<mqc::W4>(w);
        case MQC_LAYOUT_W4_64X128_G32: return pack_as<mqc::W4Grouped<32>>(w);
        case MQC_LAYOUT_W4_64X128_G64: return pack_as<mqc::W4Grouped<64>>(w);
        case MQC_LAYOUT_W4_64X128_G128: return pack_as<mqc::W4Grouped<128>>(w);
        case MQC_LAYOUT_W8_64X128_G32: return pack_as<mqc::W8Grouped<32>>(w);
        case MQC_LAYOUT_W8_64X128_G128: return pack_as<mqc::W8Grouped<128>>(w);
        default: throw std::runtime_error("no kernel takes weights of these groups");
    }
}

std::vector<uint32_t> pack_signs(const std::vector<int8_t>& signs, int64_t base) {
    const int order = static_cast<int>(base);
    std::vector<uint32_t> words(static_cast<size_t>(mqc::hadamard_words(order)));
    for (int row = 0; row < order; row++)
        for (int input = 0; input < order; input++) {
            if (signs[static_cast<size_t>(row * base + input)] > 0) continue;
            const int reg = input / 8;  // 2 * step + half
            const int lane = row % 8 * 4 + input % 8 / 2;
            const int64_t word = mqc::hadamard_word(row / 8, reg / 16, lane, order);
            words[static_cast<size_t>(word)] |= 1u << ((input % 2 ? 31 : 15) - reg % 16);
        }
    return words;
}

}  // namespace mqc_onnx_cuda
