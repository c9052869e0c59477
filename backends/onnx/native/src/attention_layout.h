// Where the parts of an attention call's workspace are.
#pragma once

#include "mqc_layers.h"

namespace {

constexpr int64_t kKeyBlock = 64;  // keys of a block
constexpr int64_t kWidest = 16;    // values of the widest vector
constexpr uint8_t kNone = 0, kSome = 1, kAll = 2;

// In floats: mask states (bytes), one for every row of the mask and key block; then packed blocks
// [batch * kv_heads, blocks, dim, 64] of keys, or partial results [tasks, rows, value_dim + 2] of
// split tasks. Without a cache a packed block has its values, too: [64, width] after the keys.
struct AttentionLayout {
    int64_t length, blocks, states;
    int64_t width;       // of a row of values and of running outputs
    int64_t block_size;  // floats of a packed block

    explicit AttentionLayout(const mqc_attention* a)
        : length(a->key_cache ? a->past + a->tokens : a->keys),
          blocks((length + kKeyBlock - 1) / kKeyBlock),
          states(a->mask ? (a->mask_batch * a->tokens * blocks + 63) / 64 * 16 : 0),
          width(a->key_cache ? a->value_dim : (a->value_dim + kWidest - 1) / kWidest * kWidest),
          block_size(kKeyBlock * (a->dim + (a->key_cache ? 0 : width > a->dim ? width : a->dim))) {}

    // Row of the mask, and of its states, for a token of a sequence.
    static int64_t mask_row(const mqc_attention* a, int64_t b, int64_t token) {
        return (a->mask_batch == 1 ? 0 : b * a->tokens) + token;
    }
    // What the rows of a mask allow of each block, or null where there is no mask.
    uint8_t* state_of(const mqc_attention* a, float* workspace, int64_t mask_row) const {
        return a->mask ? reinterpret_cast<uint8_t*>(workspace) + mask_row * blocks : nullptr;
    }
    float* keys(float* workspace, int64_t head, int64_t block) const {
        return workspace + states + (head * blocks + block) * block_size;
    }
    // Values of a block, rows of `width`.
    const float* values(const mqc_attention* a, float* workspace, int64_t head,
                        int64_t block) const {
        if (!a->key_cache) return keys(workspace, head, block) + a->dim * kKeyBlock;
        return a->value_cache + (head * a->capacity + block * kKeyBlock) * width;
    }
    template <class F>
    F* partial(const mqc_attention* a, F* workspace, int64_t task) const {
        const int64_t rows = a->heads / a->kv_heads * a->tokens;
        return workspace + states + task * rows * (a->value_dim + 2);
    }
};

}  // namespace
