// Attention over a buffered cache or without one, with an online softmax (Milakov & Gimelshein,
// 2018) over blocks of 64 keys, so that no row of scores is longer than a block (Dao et al., 2022).
//
// The query heads that share a key head are rows of one product. Several tokens: keys are packed
// once into [block, dim, 64], and both products run in register tiles. One or few tokens over a
// cache: every key is read once, and long caches are split between tasks. Without a cache values
// are packed beside their keys, in rows of whole vectors.
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
    for (int64_t left = columns / kLanes, n; left > 0; left -= n, j += n * kLanes) {
        // A tile of one vector waits for its sums: five vectors are three and two.
        n = left < kNv ? left : (left == kNv + 1 && kNv > 2 ? kNv - 1 : kNv);
        if (n == kNv)
            panel<kNv, Add>(a, lda, b + j, ldb, rows, depth, c + j, ldc);
        else if (kNv > 2 && n == 3)
            panel<3, Add>(a, lda, b + j, ldb, rows, depth, c + j, ldc);
        else if (kNv > 2 && n == 2)
            panel<2, Add>(a, lda, b + j, ldb, rows, depth, c + j, ldc);
        else
            panel<1, Add>(a, lda, b + j, ldb, rows, depth, c + j, ldc);
    }
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
    int64_t b, head, first, count, group, rows, width;
    float *query, *out, *scores, *maxima, *sums;

    Rows(const mqc_attention* a, const AttentionLayout& layout, int64_t pair, int64_t from,
         int64_t tokens, float* scratch)
        : b(pair / a->kv_heads),
          head(pair % a->kv_heads),
          first(from),
          count(tokens),
          group(a->heads / a->kv_heads),
          rows(count * group),
          width(layout.width),
          query(scratch),
          out(query + rows * a->dim),
          scores(out + rows * width),
          maxima(scores + rows * kKeyBlock),
          sums(maxima + rows) {
        for (int64_t t = 0; t < count; t++) {
            const int64_t row = b * a->tokens + first + t;
            for (int64_t g = 0; g < group; g++)
                rotate(a, a->q + row * a->q_stride + (head * group + g) * a->dim, row, a->scale,
                       query + (t * group + g) * a->dim);
        }
        for (int64_t i = 0; i < rows * width; i++) out[i] = 0;
        for (int64_t r = 0; r < rows; r++) {
            maxima[r] = -INFINITY;
            sums[r] = 0;
        }
    }
};

// Whether no row of the task may see any key of a block.
bool hidden(const mqc_attention* a, const AttentionLayout& layout, float* workspace, const Rows& w,
            int64_t block) {
    if (!a->mask) return false;
    for (int64_t t = 0; t < w.count; t++) {
        const int64_t row = layout.mask_row(a, w.b, w.first + t);
        if (layout.state_of(a, workspace, row)[block] != kNone) return false;
    }
    return true;
}

// Scores of a block are there: soften them and add the block's values.
void absorb(const mqc_attention* a, const AttentionLayout& layout, float* workspace, Rows& w,
            int64_t block) {
    const int64_t start = block * kKeyBlock;
    const int64_t width = layout.length - start < kKeyBlock ? layout.length - start : kKeyBlock;
    for (int64_t t = 0; t < w.count; t++) {
        const int64_t row = layout.mask_row(a, w.b, w.first + t);
        const uint8_t* states = layout.state_of(a, workspace, row);
        const bool all = !states || states[block] == kAll;
        const uint8_t* mask = all ? nullptr : a->mask + row * a->mask_columns + start;
        for (int64_t r = t * w.group; r < (t + 1) * w.group; r++)
            soften(w.scores + r * kKeyBlock, width, mask, w.maxima + r, w.sums + r,
                   w.out + r * w.width, w.width);
    }
    const float* values = layout.values(a, workspace, w.b * a->kv_heads + w.head, block);
    product<true>(w.scores, kKeyBlock, values, w.width, w.rows, width, w.width, w.out, w.width);
}

void finish(const mqc_attention* a, const Rows& w) {
    for (int64_t r = 0; r < w.rows; r++) {
        const int64_t row = w.b * a->tokens + w.first + r / w.group;
        const int64_t size = a->value_dim;
        float* to = a->out + (row * a->heads + w.head * w.group + r % w.group) * size;
        const float inverse = w.sums[r] > 0 ? 1.0f / w.sums[r] : 0.0f;
        for (int64_t d = 0; d < size; d++) to[d] = w.out[r * w.width + d] * inverse;
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
        uint8_t seen = 0;  // at most 64
        for (int64_t i = start; i < end; i++) seen = static_cast<uint8_t>(seen + (mask[i] != 0));
        state[block] = seen == 0 ? kNone : (seen == end - start ? kAll : kSome);
    }
}

// to[d, i] = from[i, d]: `width` keys, the others of the block 0; eight at a time, so that their
// lines stay near.
void transpose(const float* from, int64_t width, int64_t dim, float* to) {
    constexpr int64_t step = 8;
    int64_t i = 0;
    for (; i + step <= width; i += step)
        for (int64_t d = 0; d < dim; d++) {
            float line[step];
            for (int64_t j = 0; j < step; j++) line[j] = from[(i + j) * dim + d];
            memcpy(to + d * kKeyBlock + i, line, sizeof line);
        }
    for (int64_t d = 0; i < kKeyBlock && d < dim; d++)
        for (int64_t j = i; j < kKeyBlock; j++)
            to[d * kKeyBlock + j] = j < width ? from[j * dim + d] : 0;
}

// Turned keys and values of a block where there is no cache. The room of the values holds the
// turned keys first.
void pack_rows(const mqc_attention* a, const AttentionLayout& layout, int64_t head, int64_t start,
               int64_t width, float* to) {
    const int64_t b = head / a->kv_heads, h = head % a->kv_heads;
    float* values = to + a->dim * kKeyBlock;
    for (int64_t i = 0; i < width; i++) {
        const int64_t row = b * a->keys + start + i;
        rotate(a, a->k + row * a->k_stride + h * a->dim, row, 1.0f, values + i * a->dim);
    }
    transpose(values, width, a->dim, to);
    for (int64_t i = 0; i < width; i++) {
        const int64_t row = b * a->keys + start + i;
        float* line = values + i * layout.width;
        memcpy(line, a->v + row * a->v_stride + h * a->value_dim,
               static_cast<size_t>(a->value_dim) * sizeof(float));
        for (int64_t d = a->value_dim; d < layout.width; d++) line[d] = 0;
    }
}

}  // namespace

void attention_append(const mqc_attention* a, const mqc_attention_plan*, float* workspace,
                      int64_t row) {
    const AttentionLayout layout(a);
    if (a->mask && row < a->mask_batch * a->tokens) note_states(a, layout, workspace, row);
    if (!a->key_cache) return;
    const int64_t b = row / a->tokens, t = row % a->tokens;
    for (int64_t h = 0; h < a->kv_heads; h++) {
        const int64_t to = (b * a->kv_heads + h) * a->capacity + a->past + t;
        rotate(a, a->k + row * a->k_stride + h * a->dim, row, 1.0f, a->key_cache + to * a->dim);
        memcpy(a->value_cache + to * a->value_dim, a->v + row * a->v_stride + h * a->value_dim,
               static_cast<size_t>(a->value_dim) * sizeof(float));
    }
}

void attention_pack(const mqc_attention* a, const mqc_attention_plan* plan, float* workspace,
                    int64_t task) {
    const AttentionLayout layout(a);
    const int64_t head = task / plan->key_blocks, block = task % plan->key_blocks;
    const int64_t start = block * kKeyBlock;
    const int64_t width = layout.length - start < kKeyBlock ? layout.length - start : kKeyBlock;
    float* to = layout.keys(workspace, head, block);
    if (a->key_cache)
        transpose(a->key_cache + (head * a->capacity + start) * a->dim, width, a->dim, to);
    else
        pack_rows(a, layout, head, start, width, to);
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
    Rows w(a, layout, pair, first, count, scratch);
    for (int64_t block = 0; block < layout.blocks; block++) {
        if (hidden(a, layout, workspace, w, block)) continue;
        product<false>(w.query, a->dim, layout.keys(workspace, pair, block), kKeyBlock, w.rows,
                       a->dim, kKeyBlock, w.scores, kKeyBlock);
        absorb(a, layout, workspace, w, block);
    }
    finish(a, w);
}

void attend_split(const mqc_attention* a, const mqc_attention_plan* plan, float* workspace,
                  float* scratch, int64_t task) {
    const AttentionLayout layout(a);
    const int64_t pair = task / plan->split, part = task % plan->split;
    Rows w(a, layout, pair, 0, a->tokens, scratch);
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
