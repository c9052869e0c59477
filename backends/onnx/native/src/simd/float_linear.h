// What a copy of the weight-only linear provides; see float_linear.cpp for the loops around it.
//
// A step is 8 inputs of a block of 16 channels: 64 bytes of 4-bit weights or 128 of 8-bit ones. The
// steps of all groups of a block follow one another.
#pragma once

#include <stdint.h>

namespace mqc {

// Up to this many rows weights are made float in registers, where they are used; above, in a panel
// in the first cache.
constexpr int64_t kDirectRows = 8;
constexpr int64_t kMaxFloatRows = 16;  // of a tile, at most, over all copies
constexpr int64_t kPanelSteps = 16;    // of a panel: 16 KiB at most

struct FloatKernel {
    int64_t few_rows;  // rows of a direct tile, at most
    int64_t rows;      // rows of a panel tile, at most
    int64_t blocks;    // weight blocks of a panel

    // sums [rows, 16] = x . w^T of one block. x is [steps * 8, rows]; scale [groups, 16].
    void (*direct)(int64_t bits, int64_t rows, const float* x, const uint8_t* w,
                   const float* scale, int64_t groups, int64_t group_steps, float* sums);
    // Steps [first, first + steps) of `blocks` blocks as floats times their scales:
    // panel [steps * 8, blocks * 16].
    void (*unpack)(int64_t bits, const uint8_t* w, int64_t w_block, const float* scale,
                   int64_t scale_block, int64_t group_steps, int64_t first, int64_t steps,
                   float* panel);
    // sums [rows, blocks * 16] = (add ? sums : 0) + x . panel; x [steps * 8, rows].
    void (*multiply)(int64_t rows, const float* x, const float* panel, int64_t steps, bool add,
                     float* sums);
};

}  // namespace mqc
