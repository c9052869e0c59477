// Attention over a buffered cache, with an online softmax (Milakov & Gimelshein, 2018) over blocks
// of 64 keys, so that no row of scores is longer than a block (Dao et al., 2022).
//
// The query heads that share a key head are rows of one product. Several tokens: keys are packed
// once into [block, dim, 64], and both products run in register tiles. One or few tokens: every
// key is read once, and long caches are split between tasks.
#include <math.h>

#include "attention_layout.h"
#include "mqc_layers.h"
#include "simd/table.h"
#include "simd/vec.h"

namespace mqc::MQC_ISA {
namespace {

// A register tile: kRows rows of kNv vectors, fitting 32 registers of AVX-512 or else 16.
constexpr int64_t kNv = kLanes == 16 ? 4 : 2;
constexpr int64_t kRows = kLanes == 4 ? 4 : 6;

void rotate(const mqc_attention* a, const float* x, int64_t row, float scale, float* y) {
    const int64_t n = a->rotary == MQC_ROTARY_NONE ? 0 : a->rotary_dim;
    const int64_t angle = (a->angle_batch == 1 ? row % a->tokens : row) * n;
    const float* c = a->cosine + angle;
    const float* s = a->sine + angle;
    if (a->rotary == MQC_ROTARY_HALF) {
        const int64_t h = n / 2;
        for (int64_t i = 0; i < h; i++) {
            const float low = x[i], high = x[i + h];
            y[i] = (low * c[i] - high * s[i]) * scale;
            y[i + h] = (high * c[i + h] + low * s[i + h]) * scale;
        }
    } else {
        for (int64_t i = 0; i < n; i += 2) {
            const float low = x[i], high = x[i + 1];
            y[i] = (low * c[i] - high * s[i]) * scale;
            y[i + 1] = (high * c[i + 1] + low * s[i + 1]) * scale;
        }
    }
    for (int64_t i = n; i < a->dim; i++) y[i] = x[i] * scale;
}

// C [R, N * kLanes] (+)= A [R, depth] B [depth, ...], rows of C at ldc, of A at lda, of B at ldb.
template <int64_t R, int64_t N, bool Add>
inline void tile(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c,
                 int64_t ldc) {
    vf total[R][N];
    for (int64_t r = 0; r < R; r++)
        for (int64_t j = 0; j < N; j++) total[r][j] = Add ? load(c + r * ldc + j * kLanes) : vf{};
    for (int64_t k = 0; k < depth; k++) {
        vf line[N];
        for (int64_t j = 0; j < N; j++) line[j] = load(b + k * ldb + j * kLanes);
        for (int64_t r = 0; r < R; r++) {
            const vf x = splat(a[r * lda + k]);
            for (int64_t j = 0; j < N; j++) total[r][j] += x * line[j];
        }
    }
    for (int64_t r = 0; r < R; r++)
        for (int64_t j = 0; j < N; j++) store(c + r * ldc + j * kLanes, total[r][j]);
}

template <int64_t N, bool Add>
inline void panel(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t rows,
                  int64_t depth, float* c, int64_t ldc) {
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows)
        tile<kRows, N, Add>(a + r * lda, lda, b, ldb, depth, c + r * ldc, ldc);
    for (; r + 2 <= rows; r += 2)
        tile<2, N, Add>(a + r * lda, lda, b, ldb, depth, c + r * ldc, ldc);
    if (r < rows) tile<1, N, Add>(a + r * lda, lda, b, ldb, depth, c + r * ldc, ldc);
}

// C [rows, columns] (+)= A [rows, depth] B [depth, columns].
template <bool Add>
void product(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t rows, int64_t depth,
             int64_t columns, float* c, int64_t ldc) {
    int64_t j = 0;
    for (; j + kNv * kLanes <= columns; j += kNv * kLanes)
        panel<kNv, Add>(a, lda, b + j, ldb, rows, depth, c + j, ldc);
    for (; j + kLanes <= columns; j += kLanes)
        panel<1, Add>(a, lda, b + j, ldb, rows, depth, c + j, ldc);
    for (; j < columns; j++)
        for (int64_t r = 0; r < rows; r++) {
            float total = Add ? c[r * ldc + j] : 0.0f;
            for (int64_t k = 0; k < depth; k++) total += a[r * lda + k] * b[k * ldb + j];
            c[r * ldc + j] = total;
        }
}

inline float dot(const float* a, const float* b, int64_t n) {
    vf total = {}, second = {};
    int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
        total += load(a + i) * load(b + i);
        second += load(a + i + kLanes) * load(b + i + kLanes);
    }
    for (; i + kLanes <= n; i += kLanes) total += load(a + i) * load(b + i);
    if (i < n) second += load_part(a + i, n - i) * load_part(b + i, n - i);
    return sum(total + second);
}

// Scores of one row become probabilities relative to the new maximum; sums and the running output
// are rescaled. `width` keys count, the others of the block get 0.
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
        vf p = exponential(load(score + i) - next);
        total += p;
        store(score + i, p);
    }
    if (next > *maximum) {
        const float shrink = *maximum == -INFINITY ? 0.0f : expf(*maximum - next);
        for (int64_t d = 0; d < dim; d++) out[d] *= shrink;
        *denominator *= shrink;
        *maximum = next;
    }
    *denominator += sum(total);
}

// The rows of a task: tokens [first, first + count) of sequence b, all heads of key head `head`;
// row = token * group + head in the group.
struct Rows {
    int64_t b, head, first, count, group, rows;
    float *query, *out, *scores, *maxima, *sums;

    Rows(const mqc_attention* a, int64_t pair, int64_t from, int64_t tokens, float* scratch)
        : b(pair / a->kv_heads),
          head(pair % a->kv_heads),
          first(from),
          count(tokens),
          group(a->heads / a->kv_heads),
          rows(count * group),
          query(scratch),
          out(query + rows * a->dim),
          scores(out + rows * a->value_dim),
          maxima(scores + rows * kKeyBlock),
          sums(maxima + rows) {
        for (int64_t t = 0; t < count; t++) {
            const int64_t row = b * a->tokens + first + t;
            for (int64_t g = 0; g < group; g++)
                rotate(a, a->q + row * a->q_stride + (head * group + g) * a->dim, row, a->scale,
                       query + (t * group + g) * a->dim);
        }
        for (int64_t i = 0; i < rows * a->value_dim; i++) out[i] = 0;
        for (int64_t r = 0; r < rows; r++) {
            maxima[r] = -INFINITY;
            sums[r] = 0;
        }
    }
};

// Whether no row of the task may see any key of a block.
bool hidden(const mqc_attention* a, const AttentionLayout& layout, float* workspace, const Rows& w,
            int64_t block) {
    for (int64_t t = 0; t < w.count; t++)
        if (layout.state_of(workspace, w.b * a->tokens + w.first + t)[block] != kNone) return false;
    return true;
}

// Scores of a block are there: soften them and add the block's values.
void absorb(const mqc_attention* a, const AttentionLayout& layout, float* workspace, Rows& w,
            int64_t block) {
    const int64_t start = block * kKeyBlock;
    const int64_t width = layout.length - start < kKeyBlock ? layout.length - start : kKeyBlock;
    for (int64_t t = 0; t < w.count; t++) {
        const int64_t row = w.b * a->tokens + w.first + t;
        const bool all = layout.state_of(workspace, row)[block] == kAll;
        const uint8_t* mask = all ? nullptr : a->mask + row * a->mask_columns + start;
        for (int64_t r = t * w.group; r < (t + 1) * w.group; r++)
            soften(w.scores + r * kKeyBlock, width, mask, w.maxima + r, w.sums + r,
                   w.out + r * a->value_dim, a->value_dim);
    }
    const int64_t pair = w.b * a->kv_heads + w.head;
    const int64_t size = a->value_dim;
    const float* values = a->value_cache + (pair * a->capacity + start) * size;
    product<true>(w.scores, kKeyBlock, values, size, w.rows, width, size, w.out, size);
}

void finish(const mqc_attention* a, const Rows& w) {
    for (int64_t r = 0; r < w.rows; r++) {
        const int64_t row = w.b * a->tokens + w.first + r / w.group;
        const int64_t size = a->value_dim;
        float* to = a->out + (row * a->heads + w.head * w.group + r % w.group) * size;
        const float inverse = w.sums[r] > 0 ? 1.0f / w.sums[r] : 0.0f;
        for (int64_t d = 0; d < size; d++) to[d] = w.out[r * size + d] * inverse;
    }
}

}  // namespace

void attention_append(const mqc_attention* a, const mqc_attention_plan*, float* workspace,
                      int64_t row) {
    const AttentionLayout layout(a);
    const int64_t b = row / a->tokens, t = row % a->tokens;
    for (int64_t h = 0; h < a->kv_heads; h++) {
        const int64_t to = (b * a->kv_heads + h) * a->capacity + a->past + t;
        rotate(a, a->k + row * a->k_stride + h * a->dim, row, 1.0f, a->key_cache + to * a->dim);
        memcpy(a->value_cache + to * a->value_dim, a->v + row * a->v_stride + h * a->value_dim,
               static_cast<size_t>(a->value_dim) * sizeof(float));
    }
    uint8_t* state = layout.state_of(workspace, row);
    const uint8_t* mask = a->mask + row * a->mask_columns;
    for (int64_t block = 0; block < layout.blocks; block++) {
        const int64_t start = block * kKeyBlock;
        const int64_t end = start + kKeyBlock < layout.length ? start + kKeyBlock : layout.length;
        int64_t seen = 0;
        for (int64_t i = start; i < end; i++) seen += mask[i] != 0;
        state[block] = seen == 0 ? kNone : (seen == end - start ? kAll : kSome);
    }
}

void attention_pack(const mqc_attention* a, const mqc_attention_plan* plan, float* workspace,
                    int64_t task) {
    const AttentionLayout layout(a);
    const int64_t head = task / plan->key_blocks, block = task % plan->key_blocks;
    const int64_t start = block * kKeyBlock;
    const int64_t width = layout.length - start < kKeyBlock ? layout.length - start : kKeyBlock;
    const float* from = a->key_cache + (head * a->capacity + start) * a->dim;
    float* to = layout.keys(a, workspace, head, block);
    for (int64_t d = 0; d < a->dim; d++) {
        for (int64_t i = 0; i < width; i++) to[d * kKeyBlock + i] = from[i * a->dim + d];
        for (int64_t i = width; i < kKeyBlock; i++) to[d * kKeyBlock + i] = 0;
    }
}

namespace {

void attend_packed(const mqc_attention* a, const mqc_attention_plan* plan, float* workspace,
                   float* scratch, int64_t task) {
    const AttentionLayout layout(a);
    const int64_t pairs = a->batch * a->kv_heads, size = plan->query_block;
    // The last tokens see most keys: they go first, so that no long task is left for the end.
    const int64_t first = (plan->tasks - 1 - task) / pairs * size;
    const int64_t count = a->tokens - first < size ? a->tokens - first : size;
    const int64_t pair = (plan->tasks - 1 - task) % pairs;
    Rows w(a, pair, first, count, scratch);
    for (int64_t block = 0; block < layout.blocks; block++) {
        if (hidden(a, layout, workspace, w, block)) continue;
        product<false>(w.query, a->dim, layout.keys(a, workspace, pair, block), kKeyBlock, w.rows,
                       a->dim, kKeyBlock, w.scores, kKeyBlock);
        absorb(a, layout, workspace, w, block);
    }
    finish(a, w);
}

void attend_split(const mqc_attention* a, const mqc_attention_plan* plan, float* workspace,
                  float* scratch, int64_t task) {
    const AttentionLayout layout(a);
    const int64_t pair = task / plan->split, part = task % plan->split;
    Rows w(a, pair, 0, a->tokens, scratch);
    const int64_t begin = layout.blocks * part / plan->split;
    const int64_t end = layout.blocks * (part + 1) / plan->split;
    for (int64_t block = begin; block < end; block++) {
        if (hidden(a, layout, workspace, w, block)) continue;
        const int64_t start = block * kKeyBlock;
        const int64_t last = start + kKeyBlock < layout.length ? start + kKeyBlock : layout.length;
        for (int64_t i = start; i < last; i++) {
            const float* key = a->key_cache + (pair * a->capacity + i) * a->dim;
            for (int64_t r = 0; r < w.rows; r++)
                w.scores[r * kKeyBlock + i - start] = dot(w.query + r * a->dim, key, a->dim);
        }
        absorb(a, layout, workspace, w, block);
    }
    if (plan->split == 1) return finish(a, w);
    float* to = layout.partial(a, workspace, task);
    for (int64_t r = 0; r < w.rows; r++, to += a->value_dim + 2) {
        to[0] = w.maxima[r];
        to[1] = w.sums[r];
        memcpy(to + 2, w.out + r * a->value_dim,
               static_cast<size_t>(a->value_dim) * sizeof(float));
    }
}

}  // namespace

void attention_attend(const mqc_attention* a, const mqc_attention_plan* plan, float* workspace,
                      float* scratch, int64_t task) {
    if (plan->packs)
        attend_packed(a, plan, workspace, scratch, task);
    else
        attend_split(a, plan, workspace, scratch, task);
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
        const float weight = expf(from[0] - best);
        total += weight * from[1];
        for (int64_t d = 0; d < size; d++) to[d] += weight * from[2 + d];
    }
    const float inverse = total > 0 ? 1.0f / total : 0.0f;
    for (int64_t d = 0; d < size; d++) to[d] *= inverse;
}

}  // namespace mqc::MQC_ISA
