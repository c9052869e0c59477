// Quantization, and RMSNorm with it.
#include <math.h>

#include "mqc_layers.h"
#include "simd/table.h"
#include "simd/vec.h"

namespace mqc::MQC_ISA {
namespace {

constexpr int64_t kSpan = 256;

inline void put(vf q, int offset, int8_t* out) {
    vb bytes = __builtin_convertvector(__builtin_convertvector(q, vi) + offset, vb);
    memcpy(out, &bytes, sizeof bytes);
}

inline vf bounded(vf x) { return min(max(x, splat(-127.0f)), splat(127.0f)); }

// By division, as the definition says.
void divide(const float* x, int64_t n, float scale, int offset, int8_t* out) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        put(nearest(bounded(load(x + i) / scale)), offset, out + i);
    if (i < n) {
        int8_t last[kLanes];
        put(nearest(bounded(load_part(x + i, n - i) / scale)), offset, last);
        memcpy(out + i, last, static_cast<size_t>(n - i));
    }
}

}  // namespace

// A product with 1 / scale is within 3e-5 of the quotient (|quotient| <= 127, three roundings of
// 2^-24). So it rounds to the same integer unless it is that near to a tie, and only a span with
// such a value is divided.
void quantize_row(const float* x, int64_t n, float scale, int is_unsigned, void* to) {
    int8_t* out = static_cast<int8_t*>(to);
    const int offset = is_unsigned ? -128 : 0;  // the byte of q + 128
    const float inverse = 1.0f / scale;
    if (!(inverse > 1e-30f && inverse < 1e30f)) return divide(x, n, scale, offset, out);
    for (int64_t start = 0; start < n; start += kSpan) {
        const int64_t end = start + kSpan < n ? start + kSpan : n;
        vf worst = {};
        int64_t i = start;
        for (; i + kLanes <= end; i += kLanes) {
            vf t = bounded(load(x + i) * inverse);
            vf q = nearest(t);
            worst = max(worst, abs(t - q));
            put(q, offset, out + i);
        }
        if (i < end || top(worst) > 0.49996f)
            divide(x + start, end - start, scale, offset, out + start);
    }
}

void quantize(const float* x, int64_t begin, int64_t end, int64_t n, const mqc_row_scales* scales,
              int is_unsigned, void* out) {
    for (int64_t row = begin; row < end; row++)
        quantize_row(x + row * n, n, scale_of(scales, row), is_unsigned,
                     static_cast<int8_t*>(out) + row * n);
}

void rms_norm_quantize(const float* x, int64_t begin, int64_t end, int64_t n, float eps,
                       const mqc_row_scales* scales, int is_unsigned, void* out,
                       const int64_t* split, int64_t splits, float* x_split) {
    for (int64_t row = begin; row < end; row++) {
        const float* from = x + row * n;
        int8_t* to = static_cast<int8_t*>(out) + row * n;
        vf squares[4] = {};
        int64_t i = 0;
        for (; i + 4 * kLanes <= n; i += 4 * kLanes)
            for (int64_t j = 0; j < 4; j++) {
                vf v = load(from + i + j * kLanes);
                squares[j] += v * v;
            }
        double rest = 0;
        for (; i < n; i++) rest += static_cast<double>(from[i]) * from[i];
        rest += sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
        const float mean = static_cast<float>(rest / static_cast<double>(n));
        const float factor = 1.0f / sqrtf(mean + eps);
        const float scale = scale_of(scales, row);
        for (i = 0; i < splits; i++) x_split[row * splits + i] = from[split[i]] * factor;
        float span[kSpan];
        for (i = 0; i < n; i += kSpan) {
            const int64_t width = n - i < kSpan ? n - i : kSpan;
            for (int64_t j = 0; j < width; j++) span[j] = from[i + j] * factor;
            quantize_row(span, width, scale, is_unsigned, to + i);
        }
    }
}

}  // namespace mqc::MQC_ISA
