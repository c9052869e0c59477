// What both linears, of integers and of floats, do around their tiles: checks of a call, its units
// of work, scratch memory.
#pragma once

#include <stdlib.h>

#include "linear.h"

namespace mqc {

constexpr int64_t kThreads = 256;
constexpr int64_t kLine = 64;

// How a call is cut up. Row tiles are of equal height, give or take one; a unit of work is a chunk
// of strips times a span of row tiles.
struct Cut {
    Sizes s;
    int64_t m;
    int64_t row_tiles;  // of all rows
    int64_t spans;      // of row tiles whose packed rows fit the cache
    int64_t strips;     // of some weight blocks
    int64_t chunk;      // strips of a unit of work
    int64_t chunks;
    int64_t threads;

    void set_rows(int64_t rows, int64_t tile_rows) {
        m = rows;
        row_tiles = (rows + tile_rows - 1) / tile_rows;
    }
    void set_strips(int64_t blocks, int64_t wanted_threads) {
        strips = (s.blocks + blocks - 1) / blocks;
        threads = wanted_threads < 1 ? 1 : wanted_threads > kThreads ? kThreads : wanted_threads;
        // Several chunks a thread, so that a thread that starts late takes fewer of them.
        const int64_t pieces = threads == 1 ? 1 : threads * 8;
        chunk = (strips + pieces - 1) / pieces;
        chunks = (strips + chunk - 1) / chunk;
    }
    // Rows of row tile i: [first_row(i), first_row(i + 1)).
    int64_t first_row(int64_t i) const { return i * m / row_tiles; }
    // Row tiles of span i: [first_tile(i), first_tile(i + 1)).
    int64_t first_tile(int64_t i) const { return i * row_tiles / spans; }
    // Strips of chunk i: [i * chunk, end_strip(i)).
    int64_t end_strip(int64_t i) const {
        const int64_t end = (i + 1) * chunk;
        return end < strips ? end : strips;
    }
};

// Runs task(job, index) in the threads of a call, or once in this one.
inline void run_tasks(const Cut& cut, const mqc_threads* threads, mqc_task task, void* job) {
    if (cut.threads > 1 && cut.chunks * cut.spans > 1)
        threads->parallel_for(threads->pool, static_cast<size_t>(cut.threads), task, job);
    else
        task(job, 0);
}

// A linear is a Job: one call with its Plan, which is a Cut. It has
//   static bool fits(const Call&)                  sizes, beyond those that all linears have
//   static bool complete(const Call&)              pointers, likewise
//   static Plan plan_of(const Call&, const Sizes&, int64_t threads)
//   static int64_t bytes_of(const Plan&)           of scratch memory
//   void run(uint8_t* memory, const mqc_threads*)  memory is at a multiple of kLine
template <class Job, class Call>
mqc_status check_sizes(const Call* c, Sizes* s) {
    if (!c) return MQC_BAD_POINTER;
    const mqc_status status = sizes_of(&c->shape, s);
    if (status != MQC_OK) return status;
    if (c->m < 0 || c->m > kMaxSize || c->split < 0 || c->split > kMaxK) return MQC_BAD_SHAPE;
    return Job::fits(*c) ? MQC_OK : MQC_BAD_SHAPE;
}

template <class Job, class Call>
int64_t workspace_bytes(const Call* c, int32_t threads) {
    Sizes s;
    const mqc_status status = check_sizes<Job>(c, &s);
    return status == MQC_OK ? kLine + Job::bytes_of(Job::plan_of(*c, s, threads)) : status;
}

template <class Job, class Call>
mqc_status run_linear(const Call* c, const mqc_threads* threads) {
    Sizes s;
    const mqc_status status = check_sizes<Job>(c, &s);
    if (status != MQC_OK || c->m == 0) return status;
    const bool split = c->split == 0 || (c->x_split && c->w_split);
    if (!c->packed || !c->w_scale || !c->y || !split || !Job::complete(*c)) return MQC_BAD_POINTER;
    const bool parallel = threads && threads->parallel_for && threads->threads > 1;
    Job job;
    job.call = c;
    job.plan = Job::plan_of(*c, s, parallel ? threads->threads : 1);
    void* own = nullptr;
    if (!c->workspace) {
        own = malloc(static_cast<size_t>(kLine + Job::bytes_of(job.plan)));
        if (!own) return MQC_NO_MEMORY;
    }
    const uintptr_t memory = reinterpret_cast<uintptr_t>(own ? own : c->workspace);
    job.run(reinterpret_cast<uint8_t*>((memory + kLine - 1) / kLine * kLine), threads);
    free(own);
    return MQC_OK;
}

}  // namespace mqc
