#include "pack.h"

#include <algorithm>
#include <cstring>

#include "mqc/layout.cuh"

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

}  // namespace

std::vector<uint8_t> pack(const Weight& weight) {
    const int64_t channel_tiles = mqc::ceil_div(weight.n, kChannels);
    const int64_t input_tiles = mqc::ceil_div(weight.k, kInputs);
    std::vector<uint8_t> packed(
        static_cast<size_t>(mqc::packed_bytes(weight.bits, weight.n, weight.k)));
    Tile tile;
    for (int64_t c = 0; c < channel_tiles; c++)
        for (int64_t i = 0; i < input_tiles; i++) {
            std::memset(tile, 0, sizeof tile);
            (weight.tiled ? read_tiles : read_rows)(weight, c * kChannels, i * kInputs, tile);
            if (weight.bits == 8)
                write_tile8(tile, packed.data() + mqc::packed_tile<8>(c, i, input_tiles));
            else
                write_tile4(tile, packed.data() + mqc::packed_tile<4>(c, i, input_tiles));
        }
    return packed;
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
