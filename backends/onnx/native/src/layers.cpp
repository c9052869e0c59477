// The C interface: each call goes to the copy for the instruction set that mqc_isa() names.
#include "mqc_layers.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "mqc_kernels.h"
#include "simd/table.h"

namespace mqc {
namespace generic {
extern const Table table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Table table;
}
namespace avx512 {
extern const Table table;
}
#endif

namespace {

// The linear kernels know more sets than there are copies here: AVX-VNNI and AMX bring integer
// products alone.
struct Copy {
    const char* isa;
    const char* name;
    const Table* table;
};

const Copy kCopies[] = {
#if defined(__x86_64__)
    {"amx", "avx512", &avx512::table},    {"avx512vnni", "avx512", &avx512::table},
    {"avxvnni", "avx2", &avx2::table},    {"avx2", "avx2", &avx2::table},
#endif
#if defined(__aarch64__)
    {nullptr, "neon", &generic::table},  // 128-bit vectors are NEON's there
#else
    {nullptr, "generic", &generic::table},
#endif
};

const Copy& current() {
    const char* isa = mqc_isa();
    const Copy* copy = kCopies;
    while (copy->isa && strcmp(copy->isa, isa) != 0) copy++;
    return *copy;
}

const Table& table() { return *current().table; }

}  // namespace

const FloatKernel& float_kernel() { return *table().float_kernel; }

}  // namespace mqc

using mqc::table;

const char* mqc_layers_isa(void) { return mqc::current().name; }

void mqc_quantize(const float* x, int64_t begin, int64_t end, int64_t n,
                  const mqc_row_scales* scales, int is_unsigned, void* out) {
    table().quantize(x, begin, end, n, scales, is_unsigned, out);
}

void mqc_rms_norm_quantize(const float* x, int64_t begin, int64_t end, int64_t n, float eps,
                           const mqc_row_scales* scales, int is_unsigned, void* out,
                           const int64_t* split, int64_t splits, float* x_split) {
    table().rms_norm_quantize(x, begin, end, n, eps, scales, is_unsigned, out, split, splits,
                              x_split);
}

mqc_hadamard_plan* mqc_hadamard_create(int64_t base, int log2, const int8_t* matrix) {
    if (base < 1 || base > 65536 || log2 < 0 || log2 > 24 || (base > 1 && !matrix)) return nullptr;
    auto* plan = static_cast<mqc_hadamard_plan*>(calloc(1, sizeof(mqc_hadamard_plan)));
    if (!plan) return nullptr;
    plan->base = base;
    plan->inner = int64_t{1} << log2;
    plan->factor = static_cast<float>(1.0 / sqrt(static_cast<double>(base * plan->inner)));
    plan->groups = base > 1 ? (base + 3) / 4 : 0;
    if (base == 1) return plan;
    plan->codes = static_cast<uint8_t*>(calloc(static_cast<size_t>(plan->groups * base), 1));
    if (!plan->codes) {
        free(plan);
        return nullptr;
    }
    for (int64_t row = 0; row < base; row++)
        for (int64_t column = 0; column < base; column++)
            if (matrix[row * base + column] < 0)
                plan->codes[column / 4 * base + row] |= static_cast<uint8_t>(1 << (column % 4));
    return plan;
}

void mqc_hadamard_free(mqc_hadamard_plan* plan) {
    if (plan) free(plan->codes);
    free(plan);
}

int64_t mqc_hadamard_block(const mqc_hadamard_plan* plan) { return plan->base * plan->inner; }

int64_t mqc_hadamard_scratch(const mqc_hadamard_plan* plan) {
    if (plan->base == 1) return 0;
    return (16 * mqc::kTables + 2 * plan->base + 1) * mqc::kMaxTile;
}

void mqc_hadamard(const mqc_hadamard_plan* plan, const float* x, int64_t blocks, float* y,
                  float* scratch) {
    table().hadamard(plan, x, blocks, y, scratch);
}

int64_t mqc_activation_scratch(const mqc_activation* a, int64_t n) {
    return n + (a->plan ? mqc_hadamard_scratch(a->plan) : 0);
}

void mqc_activation_quantize(const mqc_activation* a, const float* x, int64_t begin, int64_t end,
                             int64_t n, const mqc_row_scales* scales, void* xq, float* x_split,
                             float* scratch) {
    table().activation_quantize(a, x, begin, end, n, scales, xq, x_split, scratch);
}

void mqc_embedding_w8(const int64_t* ids, int64_t begin, int64_t end, int64_t n,
                      const int8_t* weight, const float* scale, float* y) {
    table().embedding(ids, begin, end, n, weight, scale, y);
}

void mqc_rank_update(const float* y, const float* x_split, const float* w_split, int64_t begin,
                     int64_t end, int64_t n, int64_t k, float* out) {
    table().rank_update(y, x_split, w_split, begin, end, n, k, out);
}

void mqc_attention_append(const mqc_attention* a, const mqc_attention_plan* plan, float* workspace,
                          int64_t task) {
    table().attention_append(a, plan, workspace, task);
}

void mqc_attention_pack(const mqc_attention* a, const mqc_attention_plan* plan, float* workspace,
                        int64_t task) {
    table().attention_pack(a, plan, workspace, task);
}

void mqc_attention_attend(const mqc_attention* a, const mqc_attention_plan* plan, float* workspace,
                          float* scratch, int64_t task) {
    table().attention_attend(a, plan, workspace, scratch, task);
}

void mqc_attention_combine(const mqc_attention* a, const mqc_attention_plan* plan,
                           const float* workspace, int64_t task) {
    table().attention_combine(a, plan, workspace, task);
}
