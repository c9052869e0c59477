// The linear kernels inside: what an instruction set provides, and what a tile is.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "mqc_kernels.h"

namespace mqc {

constexpr int64_t kBlock = 16;        // output channels of a weight block
constexpr int64_t kMaxRows = 32;      // rows of a tile, at most, over all instruction sets
constexpr int64_t kMaxBlocks = 2;     // weight blocks of a tile, at most
constexpr int64_t kMaxK = 131071;     // int32 sums are exact up to there
constexpr int64_t kMaxSize = 1LL << 31;

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Sizes of a valid shape; a group of inputs is padded to group_k, a multiple of 8.
struct Sizes {
    int64_t n, k, groups, bits;
    int64_t group;        // inputs of a group, K / groups
    int64_t group_k;      // padded
    int64_t blocks;       // ceil(N / 16)
    int64_t group_bytes;  // packed bytes of a block's group
    int64_t block_bytes;  // packed bytes of a block
};

mqc_status sizes_of(const mqc_linear_shape* shape, Sizes* sizes);

// How the weight operand of a tile is stored.
enum Form {
    kNibbles = 0,  // packed 4-bit
    kSmall = 1,    // bytes 0..15: an unpacked panel of 4-bit weights
    kBytes = 2,    // bytes 0..255: 8-bit weights
};

// A tile: some rows times some blocks of 16 channels, over the whole of K, to finished floats.
struct Tile {
    const int8_t* x;  // rows as the instruction set's pack_rows made them
    const int32_t* correction;  // [groups, rows]: -zero * sum of the group's x
    const uint8_t* w;
    int64_t w_block, w_group;  // bytes between blocks, and between groups
    int64_t group_k;           // padded inputs of a group: a multiple of k_step
    int64_t packed_k;          // of packed 4-bit weights: a multiple of 8
    int64_t groups, rows;
    const float* w_scale;  // columns form
    int64_t scale_block;   // floats between blocks
    const float* x_scale;  // [rows]
    const float* bias;     // [blocks * 16] or null
    int64_t split;
    const float* x_split;  // [rows, split]
    const float* w_split;  // columns form
    int64_t split_block;   // floats between blocks
    const float* residual;
    int64_t residual_row;  // floats between rows
    float* y;
    int64_t y_row;
    // Memory wanted after this tile. Its lines, and before them those of y and residual, are asked
    // for along the way: ask_lines of them with every ask_every-th step of 8 inputs.
    const uint8_t *ahead, *ahead_end;
    int64_t ask_every, ask_lines;
    uint8_t* keep;  // where kNibbles leaves the weights unpacked, as kSmall reads them, or null
    int64_t keep_block, keep_group;  // bytes, as w_block and w_group
};

struct LinearIsa {
    const char* name;
    int64_t rows;    // rows of a tile, at most
    int64_t blocks;  // weight blocks of a tile
    int64_t k_step;  // a group of x, and of a panel, is padded to a multiple of this (8 or 64)
    bool panel;      // tiles need 4-bit weights unpacked in memory, however few rows there are
    // x [rows, k] int8 (flip 0) or uint8 + 128 (flip 0x80), to rows * groups * padded bytes, and
    // correction [groups, rows].
    void (*pack_rows)(const uint8_t* x, int64_t rows, const Sizes& sizes, int64_t padded,
                      uint8_t flip, int8_t* packed, int32_t* correction);
    void (*tile)(Form form, const Tile& tile);
    // Up to few_rows rows, another instruction set is faster; or null.
    const LinearIsa* few;
    int64_t few_rows;
    // Around all tiles of a task, in its thread; or null.
    void (*begin)();
    void (*end)();
};

const LinearIsa& linear_isa();  // the one in use

extern const LinearIsa linear_portable, linear_avx2, linear_avxvnni, linear_avx512vnni, linear_amx,
    linear_dotprod, linear_i8mm;

}  // namespace mqc
