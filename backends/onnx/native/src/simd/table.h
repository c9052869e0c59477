// The functions of one copy; see layers.cpp for the choice between copies.
#pragma once

#include "mqc_layers.h"

struct mqc_hadamard_plan {
    int64_t base, inner;  // block = base * inner, inner = 2^log2
    float factor;         // 1 / sqrt(block)
    int64_t groups;       // of four rows of the base matrix's columns, the last padded with zeros
    uint8_t* codes;       // [groups, base]: signs of four columns, bit i set = minus
};

namespace mqc {

struct FloatKernel;  // simd/float_linear.h

// Sizes of the Hadamard transform's scratch, the same for all copies.
constexpr int64_t kMaxTile = 64;
constexpr int64_t kTables = 7;  // look-up tables at a time: as many as the first cache holds

struct Table {
    void (*quantize_row)(const float*, int64_t, float, int, void*);
    void (*rms_norm_quantize)(const float*, int64_t, int64_t, int64_t, float, const mqc_row_scales*,
                              int, void*, const int64_t*, int64_t, float*);
    void (*quantize)(const float*, int64_t, int64_t, int64_t, const mqc_row_scales*, int, void*);
    void (*hadamard)(const mqc_hadamard_plan*, const float*, int64_t, float*, float*);
    void (*activation_quantize)(const mqc_activation*, const float*, int64_t, int64_t, int64_t,
                                const mqc_row_scales*, void*, float*, float*);
    void (*embedding)(const int64_t*, int64_t, int64_t, int64_t, const int8_t*, const float*,
                      float*);
    void (*rank_update)(const float*, const float*, const float*, int64_t, int64_t, int64_t,
                        int64_t, float*);
    void (*attention_append)(const mqc_attention*, const mqc_attention_plan*, float*, int64_t);
    void (*attention_pack)(const mqc_attention*, const mqc_attention_plan*, float*, int64_t);
    void (*attention_attend)(const mqc_attention*, const mqc_attention_plan*, float*, float*,
                             int64_t);
    void (*attention_combine)(const mqc_attention*, const mqc_attention_plan*, const float*,
                              int64_t);
    const FloatKernel* float_kernel;
};

const FloatKernel& float_kernel();  // of the copy in use

#define MQC_DECLARE_COPY(isa)                                                                     \
    namespace isa {                                                                               \
    void quantize_row(const float*, int64_t, float, int, void*);                                  \
    void rms_norm_quantize(const float*, int64_t, int64_t, int64_t, float, const mqc_row_scales*, \
                           int, void*, const int64_t*, int64_t, float*);                          \
    void quantize(const float*, int64_t, int64_t, int64_t, const mqc_row_scales*, int, void*);    \
    void hadamard(const mqc_hadamard_plan*, const float*, int64_t, float*, float*);               \
    void activation_quantize(const mqc_activation*, const float*, int64_t, int64_t, int64_t,      \
                             const mqc_row_scales*, void*, float*, float*);                       \
    void embedding(const int64_t*, int64_t, int64_t, int64_t, const int8_t*, const float*,        \
                   float*);                                                                       \
    void rank_update(const float*, const float*, const float*, int64_t, int64_t, int64_t,         \
                     int64_t, float*);                                                            \
    void attention_append(const mqc_attention*, const mqc_attention_plan*, float*, int64_t);      \
    void attention_pack(const mqc_attention*, const mqc_attention_plan*, float*, int64_t);        \
    void attention_attend(const mqc_attention*, const mqc_attention_plan*, float*, float*,        \
                          int64_t);                                                               \
    void attention_combine(const mqc_attention*, const mqc_attention_plan*, const float*,         \
                           int64_t);                                                              \
    extern const FloatKernel float_kernel;                                                        \
    extern const Table table;                                                                     \
    }

#ifdef MQC_ISA
MQC_DECLARE_COPY(MQC_ISA)
#endif

}  // namespace mqc
