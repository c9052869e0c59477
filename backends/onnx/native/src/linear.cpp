// The linear of integers: its scratch memory, and the loops over rows, channels and threads.
#include <string.h>
#include <unistd.h>

#include <atomic>
#include <new>
#include <thread>

#include "linear_entry.h"

namespace mqc {
namespace {

// Row tiles that share an unpacked panel, at least, where there are as many.
constexpr int64_t kShare = 8;

// Of the second-level cache of a core; a common size where the system does not tell.
int64_t cache_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
    static const int64_t told = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (told >= 256 << 10) return told;
#endif
    return 1 << 20;
}

struct Plan : Cut {
    const LinearIsa* isa;
    int64_t padded;  // inputs of a group in x and in panels
    bool panel;      // weights go through an unpacked panel
    int64_t x_bytes, correction_bytes, scale_bytes, left_bytes, panel_bytes, thread_bytes;
};

using Count = std::atomic<int64_t>;

struct Job {
    const mqc_linear_call* call;
    Plan plan;
    int8_t* x;
    int32_t* correction;
    float* x_scale;
    Count* left;       // of each span: row tiles that are not packed yet
    uint8_t* scratch;  // thread_bytes for every task
    Count next;        // the ticket to take

    static bool fits(const mqc_linear_call& c);
    static bool complete(const mqc_linear_call& c);
    static Plan plan_of(const mqc_linear_call& c, const Sizes& s, int64_t threads);
    static int64_t bytes_of(const Plan& p);
    void run(uint8_t* at, const mqc_threads* threads);
};

bool Job::fits(const mqc_linear_call& c) {
    if (c.modality_form < MQC_MODALITY_NONE || c.modality_form > MQC_MODALITY_COUNT) return false;
    const bool counts = c.modality_form == MQC_MODALITY_COUNT && c.m > 0;
    return !counts || (c.sequence >= 1 && c.m % c.sequence == 0);
}

bool Job::complete(const mqc_linear_call& c) {
    return c.x_scale && c.xq && (c.modality_form == MQC_MODALITY_NONE || c.modality);
}

Plan Job::plan_of(const mqc_linear_call& c, const Sizes& s, int64_t threads) {
    Plan p;
    p.isa = &linear_isa();
    if (p.isa->few && c.m <= p.isa->few_rows) p.isa = p.isa->few;
    p.s = s;
    p.padded = round_up(s.group_k, p.isa->k_step);
    p.set_rows(c.m, p.isa->rows);
    // Tiles that read packed 4-bit weights unpack them in registers; in memory pays from the third on.
    p.panel = s.bits == 4 ? p.isa->panel || p.row_tiles > 2 : p.padded != s.group_k;
    const int64_t row = s.groups * p.padded;
    // A span's packed rows stay in the cache while weights and outputs pass by.
    int64_t tiles = cache_bytes() * 3 / 8 / (row * p.isa->rows);
    if (tiles < kShare) tiles = kShare;
    p.spans = (p.row_tiles + tiles - 1) / tiles;
    p.set_strips(p.isa->blocks, threads);
    // A tile may read, and ignore, rows past the last one.
    p.x_bytes = round_up(c.m * row + kMaxRows * kLine, kLine);
    p.correction_bytes = round_up(c.m * s.groups * 4, kLine);
    p.scale_bytes = round_up(c.m * 4, kLine);
    p.left_bytes = round_up(p.spans * static_cast<int64_t>(sizeof(Count)), kLine);
    p.panel_bytes = p.panel ? p.isa->blocks * row * kBlock : 0;
    // The last strip's tile: y, residual, bias.
    const int64_t edge = (2 * kMaxRows + 1) * kMaxBlocks * kBlock * 4;
    p.thread_bytes = round_up(p.panel_bytes + edge, kLine);
    return p;
}

int64_t Job::bytes_of(const Plan& p) {
    return p.x_bytes + p.correction_bytes + p.scale_bytes + p.left_bytes +
           p.threads * p.thread_bytes;
}

void fill_scales(const mqc_linear_call& c, float* scale) {
    const uint8_t* mask = static_cast<const uint8_t*>(c.modality);
    const int64_t* count = static_cast<const int64_t*>(c.modality);
    for (int64_t row = 0; row < c.m; row++) {
        bool visual = false;
        if (c.modality_form == MQC_MODALITY_MASK) visual = mask[row] != 0;
        if (c.modality_form == MQC_MODALITY_COUNT)
            visual = row % c.sequence < count[row / c.sequence];
        scale[row] = c.x_scale[visual ? 1 : 0];
    }
}

void pack_tile(const Job& job, int64_t i) {
    const Plan& p = job.plan;
    const int64_t row = p.first_row(i), rows = p.first_row(i + 1) - row;
    p.isa->pack_rows(static_cast<const uint8_t*>(job.call->xq) + row * p.s.k, rows, p.s, p.padded,
                     job.call->x_unsigned ? 0x80 : 0, job.x + row * p.s.groups * p.padded,
                     job.correction + row * p.s.groups);
}

// Copies a strip's 8-bit weights to the panel with more padding.
void pad_panel(const Plan& p, const uint8_t* packed, int64_t blocks, uint8_t* panel) {
    const int64_t group = p.padded * kBlock;
    for (int64_t i = 0; i < blocks * p.s.groups; i++) {
        uint8_t* out = panel + i * group;
        memcpy(out, packed + i * p.s.group_bytes, static_cast<size_t>(p.s.group_bytes));
        memset(out + p.s.group_bytes, 0, static_cast<size_t>(group - p.s.group_bytes));
    }
}

// Runs a tile whose channels reach past N on padded copies of what it reads and writes.
void edge_tile(const Job& job, Form form, Tile t, int64_t channels, float* edge) {
    const mqc_linear_call& c = *job.call;
    const int64_t width = kMaxBlocks * kBlock;
    float* y = edge;
    float* residual = y + kMaxRows * width;
    float* bias = residual + kMaxRows * width;
    memset(residual, 0, static_cast<size_t>((kMaxRows + 1) * width) * sizeof(float));
    const size_t bytes = static_cast<size_t>(channels) * sizeof(float);
    if (t.bias) memcpy(bias, t.bias, bytes);
    if (t.residual)
        for (int64_t r = 0; r < t.rows; r++)
            memcpy(residual + r * width, t.residual + r * c.shape.n, bytes);
    float* target = t.y;
    t.y = y;
    t.y_row = t.residual_row = width;
    if (t.bias) t.bias = bias;
    if (t.residual) t.residual = residual;
    if (channels <= kBlock)  // one block, twice
        t.w_block = t.keep_block = t.scale_block = t.split_block = 0;
    job.plan.isa->tile(form, t);
    for (int64_t r = 0; r < t.rows; r++) memcpy(target + r * c.shape.n, y + r * width, bytes);
}

void strip(const Job& job, int64_t index, int64_t tile_from, int64_t tile_to, uint8_t* scratch) {
    const mqc_linear_call& c = *job.call;
    const Plan& p = job.plan;
    const int64_t block = index * p.isa->blocks, column = block * kBlock;
    const int64_t blocks = p.s.blocks - block < p.isa->blocks ? p.s.blocks - block : p.isa->blocks;
    const int64_t channels = c.shape.n - column;
    const uint8_t* packed = static_cast<const uint8_t*>(c.packed) + block * p.s.block_bytes;
    Tile t;
    t.group_k = p.padded;
    t.keep = nullptr;
    t.keep_group = p.padded * kBlock;
    t.keep_block = t.keep_group * p.s.groups;
    Form form = p.s.bits == 8 ? kBytes : kNibbles;
    t.packed_k = p.s.group_k;
    t.w = packed;
    t.w_block = p.s.block_bytes;
    t.w_group = p.s.group_bytes;
    if (p.panel && form == kNibbles) {
        t.keep = scratch;  // the first row tile unpacks for the others
    } else if (p.panel) {
        pad_panel(p, packed, blocks, scratch);
        t.w = scratch;
        t.w_block = t.keep_block;
        t.w_group = t.keep_group;
    }
    t.groups = p.s.groups;
    t.scale_block = p.s.groups * kBlock;
    t.w_scale = c.w_scale + block * t.scale_block;
    t.bias = c.bias ? c.bias + column : nullptr;
    t.split = c.split;
    t.split_block = c.split * kBlock;
    t.w_split = c.split ? c.w_split + block * t.split_block : nullptr;
    t.residual_row = t.y_row = c.shape.n;
    // The next strip's packed weights come to the cache meanwhile, a part with each row tile.
    const bool more = index + 1 < p.strips;
    const int64_t strip_bytes = p.isa->blocks * p.s.block_bytes, tiles = tile_to - tile_from;
    const int64_t part = more ? round_up((strip_bytes + tiles - 1) / tiles, kLine) : 0;
    t.ahead = packed + (more ? strip_bytes : 0);
    t.ahead_end = t.ahead + part;
    const int64_t steps = p.s.groups * p.padded / 8;
    for (int64_t i = tile_from; i < tile_to; i++) {
        const int64_t row = p.first_row(i);
        t.rows = p.first_row(i + 1) - row;
        t.x = job.x + row * p.s.groups * p.padded;
        t.correction = job.correction + row * p.s.groups;
        t.x_scale = job.x_scale + row;
        t.x_split = c.split ? c.x_split + row * c.split : nullptr;
        t.residual = c.residual ? c.residual + row * c.shape.n + column : nullptr;
        t.y = c.y + row * c.shape.n + column;
        const int64_t lines = t.rows * p.isa->blocks * (t.residual ? 2 : 1) + part / kLine;
        t.ask_every = steps > lines ? steps / lines : 1;
        t.ask_lines = steps > lines ? 1 : (lines + steps / 2) / steps;  // not all of them too early
        if (channels < p.isa->blocks * kBlock)
            edge_tile(job, form, t, channels, reinterpret_cast<float*>(scratch + p.panel_bytes));
        else
            p.isa->tile(form, t);
        t.ahead = t.ahead_end;
        t.ahead_end += part;
        if (t.keep) {
            form = kSmall;
            t.w = t.keep;
            t.w_block = t.keep_block;
            t.w_group = t.keep_group;
            t.keep = nullptr;
        }
    }
}

// Takes tickets until none is left. Those of a span of rows: one to pack each of its row tiles, then
// one for each chunk of strips, multiplied by the whole span. A span is packed just before it is
// used, so that it is in a cache then. Whoever waits for its last tiles waits for tasks that run,
// never for one that has not begun.
void linear_task(void* context, size_t index) {
    Job& job = *static_cast<Job*>(context);
    const Plan& p = job.plan;
    uint8_t* scratch = job.scratch + static_cast<int64_t>(index) * p.thread_bytes;
    if (p.isa->begin) p.isa->begin();
    int64_t ticket = job.next.fetch_add(1, std::memory_order_relaxed);
    int64_t first = 0;  // ticket of the span
    for (int64_t span = 0; span < p.spans; span++) {
        const int64_t tile_from = p.first_tile(span), tile_to = p.first_tile(span + 1);
        const int64_t packing = first + tile_to - tile_from, end = packing + p.chunks;
        for (; ticket < end; ticket = job.next.fetch_add(1, std::memory_order_relaxed)) {
            if (ticket < packing) {
                pack_tile(job, tile_from + ticket - first);
                job.left[span].fetch_sub(1, std::memory_order_release);
                continue;
            }
            while (job.left[span].load(std::memory_order_acquire) > 0) std::this_thread::yield();
            const int64_t unit = ticket - packing;
            for (int64_t i = unit * p.chunk; i < p.end_strip(unit); i++)
                strip(job, i, tile_from, tile_to, scratch);
        }
        first = end;
    }
    if (p.isa->end) p.isa->end();
}

void Job::run(uint8_t* at, const mqc_threads* threads) {
    x = reinterpret_cast<int8_t*>(at);
    correction = reinterpret_cast<int32_t*>(at += plan.x_bytes);
    x_scale = reinterpret_cast<float*>(at += plan.correction_bytes);
    left = reinterpret_cast<Count*>(at += plan.scale_bytes);
    scratch = at + plan.left_bytes;
    next.store(0, std::memory_order_relaxed);
    for (int64_t i = 0; i < plan.spans; i++)
        new (left + i) Count(plan.first_tile(i + 1) - plan.first_tile(i));
    fill_scales(*call, x_scale);
    run_tasks(plan, threads, linear_task, this);
}

}  // namespace
}  // namespace mqc

int64_t mqc_linear_workspace_bytes(const mqc_linear_call* call, int32_t threads) {
    return mqc::workspace_bytes<mqc::Job>(call, threads);
}

mqc_status mqc_linear(const mqc_linear_call* call, const mqc_threads* threads) {
    return mqc::run_linear<mqc::Job>(call, threads);
}
