// Where the parts of an attention call's memory are.
#pragma once

#include "mqc_layers.h"

namespace {

constexpr int64_t kKeyBlock = 64;  // keys of a block
constexpr int64_t kWidest = 16;    // values of the widest vector
constexpr uint8_t kNone = 0, kSome = 1, kAll = 2;

inline int64_t whole(int64_t n) { return (n + kWidest - 1) / kWidest * kWidest; }

// The workspace in floats: mask states (bytes), one for every row of the mask and key block; then,
// without a cache, turned keys [batch * kv_heads, keys, dim] and values [..., value_dim]; with one,
// a line [dim] for every token where it holds int8, and partial results [tasks, rows, value_dim + 2]
// of split tasks.
struct AttentionLayout {
    bool cached;
    int64_t length, blocks, states, lines;

    explicit AttentionLayout(const mqc_attention* a)
        : cached(a->key_cache || a->key_bytes),
          length(cached ? a->past + a->tokens : a->keys),
          blocks((length + kKeyBlock - 1) / kKeyBlock),
          states(a->mask ? (a->mask_batch * a->tokens * blocks + 63) / 64 * 16 : 0),
          lines(a->key_bytes ? a->batch * a->tokens * a->dim : 0) {}

    // Row of the mask, and of its states, for a token of a sequence.
    static int64_t mask_row(const mqc_attention* a, int64_t b, int64_t token) {
        return (a->mask_batch == 1 ? 0 : b * a->tokens) + token;
    }
    // What a row of a mask allows of each block, or null where there is no mask.
    uint8_t* state_of(const mqc_attention* a, float* workspace, int64_t mask_row) const {
        return a->mask ? reinterpret_cast<uint8_t*>(workspace) + mask_row * blocks : nullptr;
    }
    int64_t packed(const mqc_attention* a) const {
        return cached ? 0 : a->batch * a->kv_heads * length * (a->dim + a->value_dim);
    }
    // Where rows of a key head are packed.
    float* own_keys(const mqc_attention* a, float* workspace, int64_t head) const {
        return workspace + states + head * length * (a->dim + a->value_dim);
    }
    float* own_values(const mqc_attention* a, float* workspace, int64_t head) const {
        return own_keys(a, workspace, head) + length * a->dim;
    }
    // Rows of a key head from `row` on.
    const float* keys(const mqc_attention* a, float* workspace, int64_t head, int64_t row) const {
        if (!cached) return own_keys(a, workspace, head) + row * a->dim;
        return a->key_cache + (head * a->capacity + row) * a->dim;
    }
    const float* values(const mqc_attention* a, float* workspace, int64_t head,
                        int64_t row) const {
        if (!cached) return own_values(a, workspace, head) + row * a->value_dim;
        return a->value_cache + (head * a->capacity + row) * a->value_dim;
    }
    template <class F>
    F* partial(const mqc_attention* a, F* workspace, int64_t task) const {
        const int64_t rows = a->heads / a->kv_heads * a->tokens;
        return workspace + states + lines + task * rows * (a->value_dim + 2);
    }
    // Floats of scratch of a task of so many rows that reads them as lanes, or one by one.
    static int64_t lanes_scratch(const mqc_attention* a, int64_t rows) {
        const int64_t blocks = (a->mask ? 2 : 1) * kKeyBlock;
        return whole(rows) * (a->dim + a->value_dim + blocks + 3) + kWidest * a->dim + wide(a);
    }
    static int64_t rows_scratch(const mqc_attention* a, int64_t rows) {
        return rows * (a->dim + a->value_dim + kKeyBlock + 2) + wide(a);
    }
    // Of these, a block of int8 rows as floats.
    static int64_t wide(const mqc_attention* a) {
        return a->key_bytes ? kKeyBlock * (a->dim > a->value_dim ? a->dim : a->value_dim) : 0;
    }
};

}  // namespace
