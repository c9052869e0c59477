// Attention of a few tokens over a cache: keys and values are read once for all query heads that
// share them, and long caches are split between tasks. Rows here are rows of query heads.
#include "simd/attention_few.h"

#include <math.h>

#include "simd/attention_tile.h"
#include "simd/table.h"

namespace mqc::MQC_ISA {
namespace {

// scores [R, 64] of kLanes / R keys from `first` on; beyond the `width` keys of the block they are
// those of the last one.
template <int64_t R>
inline void dots(const float* query, const float* keys, int64_t dim, int64_t first, int64_t width,
                 float* scores) {
    constexpr int64_t kKeys = kLanes / R;
    const float* key[kKeys];
    for (int64_t i = 0; i < kKeys; i++)
        key[i] = keys + (first + i < width ? first + i : width - 1) * dim;
    vf total[kLanes];
    for (int64_t i = 0; i < kLanes; i++) total[i] = vf{};
    const auto add = [&](const auto& get, int64_t d) {
        vf q[R];
        for (int64_t r = 0; r < R; r++) q[r] = get(query + r * dim + d);
        for (int64_t i = 0; i < kKeys; i++) {
            const vf k = get(key[i] + d);
            for (int64_t r = 0; r < R; r++) total[r * kKeys + i] += q[r] * k;
        }
    };
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) add([](const float* p) { return load(p); }, d);
    if (d < dim) add([&](const float* p) { return load_part(p, dim - d); }, d);
    const vf made = sums_of(total);
    float sums[kLanes];
    store(sums, made);
    for (int64_t r = 0; r < R; r++)
        memcpy(scores + r * kKeyBlock + first, sums + r * kKeys, kKeys * sizeof(float));
}

template <int64_t R>
void score(const float* query, const float* keys, int64_t dim, int64_t width, float* scores) {
    for (int64_t i = 0; i < width; i += kLanes / R) dots<R>(query, keys, dim, i, width, scores);
}

// Scores of one row become probabilities relative to the new maximum; its sum and output are
// rescaled. `width` keys count, the others of the block get 0.
void soften(float* score, int64_t width, const uint8_t* mask, float* maximum, float* denominator,
            float* out, int64_t dim) {
    for (int64_t i = width; i < kKeyBlock; i++) score[i] = -INFINITY;
    if (mask)
        for (int64_t i = 0; i < width; i++) score[i] = mask[i] ? score[i] : -INFINITY;
    vf high = load(score);
    for (int64_t i = kLanes; i < kKeyBlock; i += kLanes) high = max(high, load(score + i));
    const float best = top(high);
    const float next = best > *maximum ? best : *maximum;
    if (next == -INFINITY) {  // nothing to see in this block, nor before
        for (int64_t i = 0; i < kKeyBlock; i++) score[i] = 0;
        return;
    }
    vf total = {};
    for (int64_t i = 0; i < kKeyBlock; i += kLanes) {
        const vf p = power_of_two<true>(load(score + i) - next);
        total += p;
        store(score + i, p);
    }
    if (next > *maximum) {
        const float shrink = *maximum == -INFINITY ? 0.0f : exp2f(*maximum - next);
        for (int64_t d = 0; d < dim; d++) out[d] *= shrink;
        *denominator *= shrink;
        *maximum = next;
    }
    *denominator += sum(total);
}

// The rows of a task: all tokens of a sequence, all query heads of a key head.
struct Rows {
    int64_t b, group, rows;
    float *query, *out, *scores, *maxima, *sums, *wide;

    Rows(const mqc_attention* a, int64_t pair, float* scratch)
        : b(pair / a->kv_heads),
          group(a->heads / a->kv_heads),
          rows(a->tokens * group),
          query(scratch),
          out(query + rows * a->dim),
          scores(out + rows * a->value_dim),
          maxima(scores + rows * kKeyBlock),
          sums(maxima + rows),
          wide(sums + rows) {
        for (int64_t r = 0; r < rows; r++) {
            const int64_t token = b * a->tokens + r / group;
            const int64_t h = pair % a->kv_heads * group + r % group;
            rotate(a, a->q + token * a->q_stride + h * a->dim, token,
                   a->scale * 1.44269504088896341f, query + r * a->dim);
            maxima[r] = -INFINITY;
            sums[r] = 0;
        }
        memset(out, 0, static_cast<size_t>(rows * a->value_dim) * sizeof(float));
    }
};

// Whether no token may see any key of a block.
bool hidden(const mqc_attention* a, const AttentionLayout& layout, float* workspace, int64_t b,
            int64_t block) {
    for (int64_t t = 0; t < a->tokens; t++)
        if (layout.state_of(a, workspace, layout.mask_row(a, b, t))[block] != kNone) return false;
    return true;
}

void attend_block(const mqc_attention* a, const AttentionLayout& layout, float* workspace,
                  const Rows& w, int64_t pair, int64_t block) {
    const int64_t start = block * kKeyBlock, left = layout.length - start;
    const int64_t width = left < kKeyBlock ? left : kKeyBlock, size = a->value_dim;
    const float* keys = keys_of(a, layout, workspace, pair, start, width, w.wide);
    int64_t r = 0;
    for (; r + 4 <= w.rows; r += 4)
        score<4>(w.query + r * a->dim, keys, a->dim, width, w.scores + r * kKeyBlock);
    if (r + 2 <= w.rows) {
        score<2>(w.query + r * a->dim, keys, a->dim, width, w.scores + r * kKeyBlock);
        r += 2;
    }
    if (r < w.rows) score<1>(w.query + r * a->dim, keys, a->dim, width, w.scores + r * kKeyBlock);
    for (r = 0; r < w.rows; r++) {
        const int64_t row = layout.mask_row(a, w.b, r / w.group);
        const bool all = layout.state_of(a, workspace, row)[block] == kAll;
        const uint8_t* mask = all ? nullptr : a->mask + row * a->mask_columns + start;
        soften(w.scores + r * kKeyBlock, width, mask, w.maxima + r, w.sums + r, w.out + r * size,
               size);
    }
    const float* values = values_of(a, layout, workspace, pair, start, width, w.wide);
    int64_t d = product<false, kAdd>(w.scores, kKeyBlock, values, size, w.rows, width, size, w.out,
                                     size, nullptr);
    for (; d < size; d++)
        for (r = 0; r < w.rows; r++) {
            float total = 0;
            for (int64_t i = 0; i < width; i++)
                total += w.scores[r * kKeyBlock + i] * values[i * size + d];
            w.out[r * size + d] += total;
        }
}

void finish(const mqc_attention* a, const Rows& w, int64_t pair) {
    const int64_t size = a->value_dim;
    for (int64_t r = 0; r < w.rows; r++) {
        const int64_t token = w.b * a->tokens + r / w.group;
        float* to = a->out + (token * a->heads + pair % a->kv_heads * w.group + r % w.group) * size;
        const float inverse = w.sums[r] > 0 ? 1.0f / w.sums[r] : 0.0f;
        for (int64_t d = 0; d < size; d++) to[d] = w.out[r * size + d] * inverse;
    }
}

}  // namespace

void attend_few(const mqc_attention* a, const mqc_attention_plan* plan, float* workspace,
                float* scratch, int64_t task) {
    const AttentionLayout layout(a);
    const int64_t pair = task / plan->split, part = task % plan->split;
    const Rows w(a, pair, scratch);
    const int64_t end = layout.blocks * (part + 1) / plan->split;
    for (int64_t block = layout.blocks * part / plan->split; block < end; block++) {
        if (hidden(a, layout, workspace, w.b, block)) continue;
        attend_block(a, layout, workspace, w, pair, block);
    }
    if (plan->split == 1) return finish(a, w, pair);
    float* to = layout.partial(a, workspace, task);
    for (int64_t r = 0; r < w.rows; r++, to += a->value_dim + 2) {
        to[0] = w.maxima[r];
        to[1] = w.sums[r];
        memcpy(to + 2, w.out + r * a->value_dim,
               static_cast<size_t>(a->value_dim) * sizeof(float));
    }
}

// The parts of one token and query head.
void attention_combine(const mqc_attention* a, const mqc_attention_plan* plan,
                       const float* workspace, int64_t task) {
    const AttentionLayout layout(a);
    const int64_t group = a->heads / a->kv_heads, row = task / a->heads, h = task % a->heads;
    const int64_t b = row / a->tokens, t = row % a->tokens, size = a->value_dim;
    const int64_t first = (b * a->kv_heads + h / group) * plan->split;
    const int64_t offset = (t * group + h % group) * (size + 2);
    float best = -INFINITY, total = 0;
    for (int64_t part = 0; part < plan->split; part++) {
        const float* from = layout.partial(a, workspace, first + part) + offset;
        best = from[0] > best ? from[0] : best;
    }
    float* to = a->out + task * size;
    for (int64_t d = 0; d < size; d++) to[d] = 0;
    for (int64_t part = 0; part < plan->split; part++) {
        const float* from = layout.partial(a, workspace, first + part) + offset;
        if (from[0] == -INFINITY) continue;
        const float weight = exp2f(from[0] - best);
        total += weight * from[1];
        for (int64_t d = 0; d < size; d++) to[d] += weight * from[2 + d];
    }
    const float inverse = total > 0 ? 1.0f / total : 0.0f;
    for (int64_t d = 0; d < size; d++) to[d] *= inverse;
}

}  // namespace mqc::MQC_ISA
