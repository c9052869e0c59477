// The weight-only linear: its scratch memory, and the loops over rows, channels and threads.
#include "mqc_float_linear.h"

#include <string.h>

#include <atomic>

#include "linear_entry.h"
#include "simd/float_linear.h"
#include "simd/table.h"

namespace mqc {
namespace {

constexpr int64_t kSpanBytes = 1 << 20;  // packed rows that stay in the second-level cache

struct FloatPlan : Cut {
    const FloatKernel* kernel;
    bool direct;
    int64_t blocks;  // weight blocks of a strip
    int64_t steps;   // of 8 inputs, of all groups
    int64_t x_bytes, panel_bytes, thread_bytes;
};

struct FloatJob {
    const mqc_float_linear_call* call;
    FloatPlan plan;
    float* x;  // row tiles, each [steps * 8, rows]
    uint8_t* scratch;
    std::atomic<int64_t> next;  // the unit of work to take

    static bool fits(const mqc_float_linear_call&) { return true; }
    static bool complete(const mqc_float_linear_call& c) { return c.x; }
    static FloatPlan plan_of(const mqc_float_linear_call& c, const Sizes& s, int64_t threads);
    static int64_t bytes_of(const FloatPlan& p) { return p.x_bytes + p.threads * p.thread_bytes; }
    void run(uint8_t* at, const mqc_threads* threads);
};

FloatPlan FloatJob::plan_of(const mqc_float_linear_call& c, const Sizes& s, int64_t threads) {
    FloatPlan p;
    p.kernel = &float_kernel();
    p.s = s;
    p.direct = c.m <= kDirectRows;
    p.blocks = p.direct ? 1 : p.kernel->blocks;
    p.steps = s.groups * s.group_k / 8;
    const int64_t rows = p.direct ? p.kernel->few_rows : p.kernel->rows, row = p.steps * 8 * 4;
    p.set_rows(c.m, rows);
    // Weights are made float once for a span of rows: it has more than a hundred of them.
    int64_t tiles = kSpanBytes / (row * rows);
    if (tiles * rows < 112) tiles = (111 + rows) / rows;
    p.spans = p.direct ? 1 : (p.row_tiles + tiles - 1) / tiles;
    p.set_strips(p.blocks, threads);
    p.x_bytes = round_up(c.m * row, kLine);
    p.panel_bytes = p.direct ? 0 : kPanelSteps * 8 * p.blocks * kBlock * 4;
    // Sums of the row tiles of a span.
    const int64_t span_tiles = p.spans ? (p.row_tiles + p.spans - 1) / p.spans : 0;
    p.thread_bytes = p.panel_bytes + round_up(span_tiles * rows * p.blocks * kBlock * 4, kLine);
    return p;
}

const float* tile_rows(const FloatJob& job, int64_t row) {
    return job.x + row * job.plan.steps * 8;
}

// Interleaves the rows of a tile; groups are padded to whole steps.
void pack_task(void* context, size_t index) {
    const FloatJob& job = *static_cast<FloatJob*>(context);
    const FloatPlan& p = job.plan;
    const Sizes& s = p.s;
    const int64_t i = static_cast<int64_t>(index);
    const int64_t row = p.first_row(i), rows = p.first_row(i + 1) - row;
    float* out = job.x + row * p.steps * 8;
    for (int64_t g = 0; g < s.groups; g++) {
        const float* in = job.call->x + row * s.k + g * s.group;
        if (rows == 1)
            memcpy(out, in, static_cast<size_t>(s.group) * sizeof(float));
        else
            for (int64_t k = 0; k < s.group; k++)
                for (int64_t r = 0; r < rows; r++) out[k * rows + r] = in[r * s.k + k];
        memset(out + s.group * rows, 0,
               static_cast<size_t>((s.group_k - s.group) * rows) * sizeof(float));
        out += s.group_k * rows;
    }
}

// y of some rows and channels from their sums, with the other terms.
void finish(const mqc_float_linear_call& c, int64_t row, int64_t rows, int64_t column,
            int64_t channels, const float* sums, int64_t stride) {
    for (int64_t r = row; r < row + rows; r++, sums += stride) {
        float* y = c.y + r * c.shape.n + column;
        const float* residual = c.residual ? c.residual + r * c.shape.n + column : nullptr;
        for (int64_t at = 0; at < channels; at += kBlock) {
            const int64_t width = channels - at < kBlock ? channels - at : kBlock;
            float value[kBlock];
            memcpy(value, sums + at, sizeof value);
            if (c.bias)
                for (int64_t i = 0; i < width; i++) value[i] += c.bias[column + at + i];
            if (c.split) {
                const float* x = c.x_split + r * c.split;
                const float* w = c.w_split + (column + at) * c.split;
                float term[kBlock] = {};
                for (int64_t j = 0; j < c.split; j++)
                    for (int64_t i = 0; i < kBlock; i++) term[i] += x[j] * w[j * kBlock + i];
                for (int64_t i = 0; i < kBlock; i++) value[i] += term[i];
            }
            if (residual)
                for (int64_t i = 0; i < width; i++) value[i] += residual[at + i];
            memcpy(y + at, value, static_cast<size_t>(width) * sizeof(float));
        }
    }
}

void direct_strip(const FloatJob& job, int64_t block) {
    const mqc_float_linear_call& c = *job.call;
    const FloatPlan& p = job.plan;
    const int64_t column = block * kBlock;
    const int64_t channels = c.shape.n - column < kBlock ? c.shape.n - column : kBlock;
    float sums[kDirectRows * kBlock];
    for (int64_t i = 0; i < p.row_tiles; i++) {
        const int64_t row = p.first_row(i), rows = p.first_row(i + 1) - row;
        p.kernel->direct(p.s.bits, rows, tile_rows(job, row),
                         static_cast<const uint8_t*>(c.packed) + block * p.s.block_bytes,
                         c.w_scale + block * p.s.groups * kBlock, p.s.groups, p.s.group_k / 8,
                         sums);
        finish(c, row, rows, column, channels, sums, kBlock);
    }
}

void panel_strip(const FloatJob& job, int64_t index, int64_t from, int64_t to, uint8_t* scratch) {
    const mqc_float_linear_call& c = *job.call;
    const FloatPlan& p = job.plan;
    const int64_t block = index * p.blocks, column = block * kBlock, width = p.blocks * kBlock;
    const int64_t channels = c.shape.n - column < width ? c.shape.n - column : width;
    const bool whole = p.s.blocks - block >= p.blocks;  // else its first block stands for the others
    float* panel = reinterpret_cast<float*>(scratch);
    float* sums = reinterpret_cast<float*>(scratch + p.panel_bytes);
    const int64_t first = p.first_row(from);
    for (int64_t step = 0; step < p.steps; step += kPanelSteps) {
        const int64_t steps = p.steps - step < kPanelSteps ? p.steps - step : kPanelSteps;
        p.kernel->unpack(p.s.bits,
                         static_cast<const uint8_t*>(c.packed) + block * p.s.block_bytes,
                         whole ? p.s.block_bytes : 0, c.w_scale + block * p.s.groups * kBlock,
                         whole ? p.s.groups * kBlock : 0, p.s.group_k / 8, step, steps, panel);
        for (int64_t i = from; i < to; i++) {
            const int64_t row = p.first_row(i), rows = p.first_row(i + 1) - row;
            p.kernel->multiply(rows, tile_rows(job, row) + step * 8 * rows, panel, steps, step > 0,
                               sums + (row - first) * width);
        }
    }
    finish(c, first, p.first_row(to) - first, column, channels, sums, width);
}

// Takes units of work (a chunk of strips times a span of rows) until none is left.
void multiply_task(void* context, size_t index) {
    FloatJob& job = *static_cast<FloatJob*>(context);
    const FloatPlan& p = job.plan;
    uint8_t* scratch = job.scratch + static_cast<int64_t>(index) * p.thread_bytes;
    for (;;) {
        const int64_t unit = job.next.fetch_add(1, std::memory_order_relaxed);
        if (unit >= p.chunks * p.spans) return;
        const int64_t span = unit / p.chunks, part = unit % p.chunks;
        for (int64_t i = part * p.chunk; i < p.end_strip(part); i++) {
            if (p.direct)
                direct_strip(job, i);
            else
                panel_strip(job, i, p.first_tile(span), p.first_tile(span + 1), scratch);
        }
    }
}

void FloatJob::run(uint8_t* at, const mqc_threads* threads) {
    x = reinterpret_cast<float*>(at);
    scratch = at + plan.x_bytes;
    next.store(0, std::memory_order_relaxed);
    if (plan.threads > 1 && plan.row_tiles > 1 && call->m * plan.s.k >= 1 << 15)
        threads->parallel_for(threads->pool, static_cast<size_t>(plan.row_tiles), pack_task, this);
    else
        for (int64_t i = 0; i < plan.row_tiles; i++) pack_task(this, static_cast<size_t>(i));
    run_tasks(plan, threads, multiply_task, this);
}

}  // namespace
}  // namespace mqc

int64_t mqc_float_linear_workspace_bytes(const mqc_float_linear_call* call, int32_t threads) {
    return mqc::workspace_bytes<mqc::FloatJob>(call, threads);
}

mqc_status mqc_float_linear(const mqc_float_linear_call* call, const mqc_threads* threads) {
    return mqc::run_linear<mqc::FloatJob>(call, threads);
}
