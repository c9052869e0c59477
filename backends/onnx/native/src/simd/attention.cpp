// Attention over a buffered cache or without one, with an online softmax (Milakov & Gimelshein,
// 2018) over blocks of 64 keys, so that no row of scores is longer than a block (Dao et al., 2022).
//
// The query heads that share a key head are rows of one product. Several rows stand in the lanes
// of vectors: scores [keys, rows] and outputs [value_dim, rows] are made of keys and values as they
// lie, one number at a time, maxima and sums need no step across lanes. attention_few.cpp is for a
// few tokens over a cache.
#include <math.h>

#include "simd/attention_few.h"
#include "simd/attention_tile.h"
#include "simd/table.h"

namespace mqc::MQC_ISA {
namespace {

constexpr float kLowest = -3e38f;  // no score yet; finite, so that differences are no NaN

// The rows of a task: tokens [first, first + count) of sequence b, all query heads of a key head;
// row = token * group + head in the group. All in columns: [.., size].
struct Lanes {
    int64_t b, head, first, count, group, rows, size;
    float *query, *out, *scores, *maxima, *sums, *factor, *line;
    int32_t* allowed;  // [64, size], all bits set where a row may attend
    float* wide;       // a block of int8 rows as floats

    Lanes(const mqc_attention* a, int64_t pair, int64_t from, int64_t tokens, float* scratch)
        : b(pair / a->kv_heads),
          head(pair % a->kv_heads),
          first(from),
          count(tokens),
          group(a->heads / a->kv_heads),
          rows(count * group),
          size(whole(rows)),
          query(scratch),
          out(query + size * a->dim),
          scores(out + size * a->value_dim),
          maxima(scores + size * kKeyBlock),
          sums(maxima + size),
          factor(sums + size),
          line(factor + size),
          allowed(reinterpret_cast<int32_t*>(line + kWidest * a->dim)),
          wide(line + kWidest * a->dim + (a->mask ? kKeyBlock * size : 0)) {
        for (int64_t r = 0; r < size; r += kLanes) turn_queries(a, r);
        memset(out, 0, static_cast<size_t>(size * a->value_dim) * sizeof(float));
        memset(sums, 0, static_cast<size_t>(size) * sizeof(float));
        for (int64_t r = 0; r < size; r++) maxima[r] = kLowest;
    }

    // Columns [start, start + kLanes) of the turned queries; 0 where there is no row. The scores
    // are exponents of two.
    void turn_queries(const mqc_attention* a, int64_t start) {
        const int64_t there = rows - start < kLanes ? rows - start : kLanes;
        for (int64_t i = 0; i < there; i++) {
            const int64_t token = b * a->tokens + first + (start + i) / group;
            const int64_t h = head * group + (start + i) % group;
            rotate(a, a->q + token * a->q_stride + h * a->dim, token,
                   a->scale * 1.44269504088896341f, line + i * a->dim);
        }
        for (int64_t i = there < 0 ? 0 : there; i < kLanes; i++)
            memset(line + i * a->dim, 0, static_cast<size_t>(a->dim) * sizeof(float));
        int64_t d = 0;
        for (vf x[kLanes]; d + kLanes <= a->dim; d += kLanes) {
            for (int64_t i = 0; i < kLanes; i++) x[i] = load(line + i * a->dim + d);
            turn(x);
            for (int64_t i = 0; i < kLanes; i++) store(query + (d + i) * size + start, x[i]);
        }
        for (; d < a->dim; d++)
            for (int64_t i = 0; i < kLanes; i++)
                query[d * size + start + i] = line[i * a->dim + d];
    }
};

// What the task's rows may see of a block.
uint8_t state_of(const mqc_attention* a, const AttentionLayout& layout, float* workspace,
                 const Lanes& w, int64_t block) {
    if (!a->mask) return kAll;
    uint8_t least = kAll, most = kNone;
    for (int64_t t = 0; t < w.count; t++) {
        const int64_t row = layout.mask_row(a, w.b, w.first + t);
        const uint8_t state = layout.state_of(a, workspace, row)[block];
        least = state < least ? state : least;
        most = state > most ? state : most;
    }
    return most == kNone ? kNone : least == kAll ? kAll : kSome;
}

// Lets every row of the block's scores see what its mask allows.
void forbid(const mqc_attention* a, const AttentionLayout& layout, const Lanes& w, int64_t start,
            int64_t width) {
    for (int64_t t = 0; t < w.count; t++) {
        const uint8_t* mask =
            a->mask + layout.mask_row(a, w.b, w.first + t) * a->mask_columns + start;
        for (int64_t i = 0; i < width; i++)
            for (int64_t g = 0; g < w.group; g++)
                w.allowed[i * w.size + t * w.group + g] = -(mask[i] != 0);
    }
    for (int64_t r = 0; r < w.size; r += kLanes)
        for (int64_t i = 0; i < width; i++) {
            vi mask;
            memcpy(&mask, w.allowed + i * w.size + r, sizeof mask);
            float* score = w.scores + i * w.size + r;
            store(score, mask ? load(score) : splat(-INFINITY));
        }
}

// Scores of a block become probabilities relative to the new maxima; `factor` rescales what was
// there before.
template <bool Masked>
void soften(const Lanes& w, int64_t width) {
    for (int64_t r = 0; r < w.size; r += kLanes) {
        const vf before = load(w.maxima + r);
        vf high = before, second = before;
        float* score = w.scores + r;
        int64_t i = 0;
        for (; i + 2 <= width; i += 2) {
            high = max(high, load(score + i * w.size));
            second = max(second, load(score + (i + 1) * w.size));
        }
        if (i < width) second = max(second, load(score + i * w.size));
        high = max(high, second);
        vf total = {};
        for (i = 0; i < width; i++) {
            const vf p = power_of_two<Masked>(load(score + i * w.size) - high);
            store(score + i * w.size, p);
            total += p;
        }
        const vf shrink = power_of_two<false>(before - high);
        store(w.maxima + r, high);
        store(w.factor + r, shrink);
        store(w.sums + r, load(w.sums + r) * shrink + total);
    }
}

void finish(const mqc_attention* a, const Lanes& w) {
    const int64_t size = a->value_dim;
    for (int64_t r = 0; r < w.rows; r += kLanes) {
        const vf sum = load(w.sums + r);
        const vf inverse = sum > 0.0f ? 1.0f / sum : vf{};
        const int64_t there = w.rows - r < kLanes ? w.rows - r : kLanes;
        float* to[kLanes];
        for (int64_t i = 0; i < there; i++) {
            const int64_t token = w.b * a->tokens + w.first + (r + i) / w.group;
            to[i] = a->out + (token * a->heads + w.head * w.group + (r + i) % w.group) * size;
        }
        int64_t d = 0;
        for (vf x[kLanes]; d + kLanes <= size; d += kLanes) {
            for (int64_t i = 0; i < kLanes; i++)
                x[i] = load(w.out + (d + i) * w.size + r) * inverse;
            turn(x);
            for (int64_t i = 0; i < there; i++) store(to[i] + d, x[i]);
        }
        for (; d < size; d++) {
            const vf x = load(w.out + d * w.size + r) * inverse;
            for (int64_t i = 0; i < there; i++) to[i][d] = x[i];
        }
    }
}

// What a row of the mask allows of each block.
void note_states(const mqc_attention* a, const AttentionLayout& layout, float* workspace,
                 int64_t row) {
    uint8_t* state = layout.state_of(a, workspace, row);
    const uint8_t* mask = a->mask + row * a->mask_columns;
    for (int64_t block = 0; block < layout.blocks; block++) {
        const int64_t start = block * kKeyBlock;
        const int64_t end = start + kKeyBlock < layout.length ? start + kKeyBlock : layout.length;
        uint8_t any = 0, all = 1;  // a bool is 0 or 1
        for (int64_t i = start; i < end; i++) {
            any = static_cast<uint8_t>(any | mask[i]);
            all = static_cast<uint8_t>(all & mask[i]);
        }
        state[block] = any == 0 ? kNone : all == 1 ? kAll : kSome;
    }
}

// A row as int8 with its scale.
void narrow(const float* x, int64_t n, int8_t* to, float* scale) {
    vf most = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) most = max(most, abs(load(x + i)));
    float largest = top(most);
    for (; i < n; i++) largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
    *scale = largest > 0 ? largest / 127.0f : 1.0f;
    quantize_row(x, n, *scale, 0, to);
}

}  // namespace

void attention_append(const mqc_attention* a, const mqc_attention_plan*, float* workspace,
                      int64_t row) {
    const AttentionLayout layout(a);
    if (a->mask && row < a->mask_batch * a->tokens) note_states(a, layout, workspace, row);
    if (!layout.cached) return;
    const int64_t b = row / a->tokens, t = row % a->tokens;
    for (int64_t h = 0; h < a->kv_heads; h++) {
        const int64_t to = (b * a->kv_heads + h) * a->capacity + a->past + t;
        if (a->key_bytes) {
            float* line = workspace + layout.states + row * a->dim;
            rotate(a, a->k + row * a->k_stride + h * a->dim, row, 1.0f, line);
            narrow(line, a->dim, a->key_bytes + to * a->dim, a->key_scale + to);
            narrow(a->v + row * a->v_stride + h * a->value_dim, a->value_dim,
                   a->value_bytes + to * a->value_dim, a->value_scale + to);
            continue;
        }
        rotate(a, a->k + row * a->k_stride + h * a->dim, row, 1.0f, a->key_cache + to * a->dim);
        memcpy(a->value_cache + to * a->value_dim, a->v + row * a->v_stride + h * a->value_dim,
               static_cast<size_t>(a->value_dim) * sizeof(float));
    }
}

// Turned keys and values of a block where there is no cache: a head's rows side by side.
void attention_pack(const mqc_attention* a, const mqc_attention_plan* plan, float* workspace,
                    int64_t task) {
    const AttentionLayout layout(a);
    const int64_t head = task / plan->key_blocks, b = head / a->kv_heads, h = head % a->kv_heads;
    const int64_t start = task % plan->key_blocks * kKeyBlock;
    const int64_t end = start + kKeyBlock < layout.length ? start + kKeyBlock : layout.length;
    float* keys = layout.own_keys(a, workspace, head);
    float* values = layout.own_values(a, workspace, head);
    for (int64_t i = start; i < end; i++) {
        const int64_t row = b * a->keys + i;
        rotate(a, a->k + row * a->k_stride + h * a->dim, row, 1.0f, keys + i * a->dim);
        memcpy(values + i * a->value_dim, a->v + row * a->v_stride + h * a->value_dim,
               static_cast<size_t>(a->value_dim) * sizeof(float));
    }
}

void attention_attend(const mqc_attention* a, const mqc_attention_plan* plan, float* workspace,
                      float* scratch, int64_t task) {
    if (plan->split) return attend_few(a, plan, workspace, scratch, task);
    const AttentionLayout layout(a);
    const int64_t size = plan->query_block, shares = (a->tokens + size - 1) / size;
    // The keys of a head stay in the cache from task to task. Its last tokens, which see most
    // keys, go first: no long task is left for the end.
    const int64_t pair = task / shares, first = (shares - 1 - task % shares) * size;
    const int64_t count = a->tokens - first < size ? a->tokens - first : size;
    Lanes w(a, pair, first, count, scratch);
    for (int64_t block = 0; block < layout.blocks; block++) {
        const uint8_t state = state_of(a, layout, workspace, w, block);
        if (state == kNone) continue;
        const int64_t start = block * kKeyBlock;
        const int64_t left = layout.length - start, width = left < kKeyBlock ? left : kKeyBlock;
        const float* keys = keys_of(a, layout, workspace, pair, start, width, w.wide);
        product<false, kSet>(keys, a->dim, w.query, w.size, width, a->dim, w.size, w.scores, w.size,
                             nullptr);
        if (state == kSome) {
            forbid(a, layout, w, start, width);
            soften<true>(w, width);
        } else {
            soften<false>(w, width);
        }
        const float* values = values_of(a, layout, workspace, pair, start, width, w.wide);
        product<true, kScaled>(values, a->value_dim, w.scores, w.size, a->value_dim, width, w.size,
                               w.out, w.size, w.factor);
    }
    finish(a, w);
}

}  // namespace mqc::MQC_ISA
