// What the processor can do at best, measured beside the kernels: see tools/bench_linear.py.
#include <string.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "linear.h"
#include "mqc_probe.h"

namespace {

#if defined(__x86_64__)

double seconds() {
    using clock = std::chrono::steady_clock;
    return std::chrono::duration<double>(clock::now().time_since_epoch()).count();
}

// Twelve independent sums hide the latency of the instruction; operands never leave registers.
#define MQC_TWELVE(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)

double dot512(int64_t rounds) {
    const double start = seconds();
    for (int64_t i = 0; i < rounds; i++) {
#define MQC_STEP(r) "vpdpbusd %%zmm30, %%zmm31, %%zmm" #r "\n"
        __asm__ volatile(MQC_TWELVE(MQC_STEP)::
                             : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",
                               "xmm8", "xmm9", "xmm10", "xmm11");
#undef MQC_STEP
    }
    return static_cast<double>(rounds) * 12 * 16 * 8 / (seconds() - start);
}

double dot256(int64_t rounds) {
    const double start = seconds();
    for (int64_t i = 0; i < rounds; i++) {
#define MQC_STEP(r) "%{vex%} vpdpbusd %%ymm14, %%ymm15, %%ymm" #r "\n"
        __asm__ volatile(MQC_TWELVE(MQC_STEP)::
                             : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",
                               "xmm8", "xmm9", "xmm10", "xmm11");
#undef MQC_STEP
    }
    return static_cast<double>(rounds) * 12 * 8 * 8 / (seconds() - start);
}

double dot_amx(int64_t rounds) {
    if (mqc::linear_isa().begin) mqc::linear_isa().begin();
    const double start = seconds();
    for (int64_t i = 0; i < rounds; i++)
        __asm__ volatile(
            "tdpbsud %%tmm6, %%tmm4, %%tmm0\n tdpbsud %%tmm7, %%tmm4, %%tmm1\n"
            "tdpbsud %%tmm6, %%tmm5, %%tmm2\n tdpbsud %%tmm7, %%tmm5, %%tmm3\n" ::);
    const double time = seconds() - start;
    if (mqc::linear_isa().end) mqc::linear_isa().end();
    return static_cast<double>(rounds) * 4 * 16 * 16 * 64 * 2 / time;
}

#endif

uint64_t read_words(const uint64_t* words, int64_t count) {
    uint64_t total = 0;
    // A word of each line is enough to bring the line in; more would measure the additions.
    for (int64_t i = 0; i + 64 <= count; i += 64)
        for (int64_t j = 0; j < 64; j += 8) total += words[i + j];
    return total;
}

}  // namespace

double mqc_probe_dot(int64_t rounds) {
#if defined(__x86_64__)
    const char* name = mqc_isa();
    if (strcmp(name, "amx") == 0) return dot_amx(rounds);
    if (strcmp(name, "avx512vnni") == 0) return dot512(rounds);
    if (strcmp(name, "avxvnni") == 0) return dot256(rounds);
#endif
    (void)rounds;
    return 0;
}

uint64_t mqc_probe_read(const void* memory, int64_t bytes, int32_t threads) {
    const uint64_t* words = static_cast<const uint64_t*>(memory);
    const int64_t part = bytes / 8 / (threads < 1 ? 1 : threads);
    std::atomic<uint64_t> total{0};
    auto work = [&](int64_t i) { total += read_words(words + i * part, part); };
    std::thread others[16];
    for (int32_t i = 1; i < threads && i < 16; i++) others[i] = std::thread(work, i);
    work(0);
    for (int32_t i = 1; i < threads && i < 16; i++) others[i].join();
    return total;
}
