// Embeddings stored in int8, and the rank-k update of a linear.
#include "mqc_layers.h"
#include "simd/table.h"
#include "simd/vec.h"

namespace mqc::MQC_ISA {

void embedding(const int64_t* ids, int64_t begin, int64_t end, int64_t n, const int8_t* weight,
               const float* scale, float* y) {
    for (int64_t row = begin; row < end; row++) {
        const int8_t* from = weight + ids[row] * n;
        const float s = scale[ids[row]];
        float* to = y + row * n;
        for (int64_t i = 0; i < n; i++) to[i] = static_cast<float>(from[i]) * s;
    }
}

void rank_update(const float* y, const float* x_split, const float* w_split, int64_t begin,
                 int64_t end, int64_t n, int64_t k, float* out) {
    for (int64_t row = begin; row < end; row++)
        for (int64_t i = 0; i < n; i++) {
            float total = 0;
            for (int64_t j = 0; j < k; j++) total += x_split[row * k + j] * w_split[i * k + j];
            out[row * n + i] = y[row * n + i] + total;
        }
}

}  // namespace mqc::MQC_ISA
