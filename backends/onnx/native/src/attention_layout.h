// Where the parts of an attention call's workspace are.
#pragma once

#include "mqc_layers.h"

namespace {

constexpr int64_t kKeyBlock = 64;  // keys of a block
constexpr uint8_t kNone = 0, kSome = 1, kAll = 2;

// In floats: mask states (bytes), one for every token and key block; then packed keys
// [batch * kv_heads, blocks, dim, 64] or partial results [tasks, rows, value_dim + 2] of split tasks.
struct AttentionLayout {
    int64_t length, blocks, states;

    explicit AttentionLayout(const mqc_attention* a)
        : length(a->past + a->tokens),
          blocks((length + kKeyBlock - 1) / kKeyBlock),
          states((a->batch * a->tokens * blocks + 63) / 64 * 16) {}

    uint8_t* state_of(float* workspace, int64_t row) const {
        return reinterpret_cast<uint8_t*>(workspace) + row * blocks;
    }
    float* keys(const mqc_attention* a, float* workspace, int64_t head, int64_t block) const {
        return workspace + states + (head * blocks + block) * a->dim * kKeyBlock;
    }
    template <class F>
    F* partial(const mqc_attention* a, F* workspace, int64_t task) const {
        const int64_t rows = a->heads / a->kv_heads * a->tokens;
        return workspace + states + task * rows * (a->value_dim + 2);
    }
};

}  // namespace
