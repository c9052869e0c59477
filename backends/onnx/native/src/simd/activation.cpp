// What stands between up and down projection: activation, gate, Hadamard, split, quantization.
#include "mqc_layers.h"
#include "simd/table.h"
#include "simd/vec.h"

namespace mqc::MQC_ISA {
namespace {

struct Identity {
    static vf of(vf x) { return x; }
};
struct Silu {
    static vf of(vf x) { return x / (1.0f + exponential(-x)); }
};
struct Gelu {
    static vf of(vf x) { return 0.5f * x * (1.0f + error_function(x * 0.70710678f)); }
};
struct GeluTanh {  // 0.5 x (1 + tanh(u)) = x / (1 + e^(-2u))
    static vf of(vf x) {
        vf u = 0.7978845608f * (x + 0.044715f * (x * x * x));
        return x / (1.0f + exponential(-2.0f * u));
    }
};
struct QuickGelu {
    static vf of(vf x) { return x / (1.0f + exponential(x * -1.702f)); }
};
struct Relu {
    static vf of(vf x) { return x < 0.0f ? vf{} : x; }
};

template <class F, bool Gated>
void activate(const float* x, int64_t n, float* y) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        vf v = F::of(load(x + i));
        store(y + i, Gated ? v * load(x + n + i) : v);
    }
    if (i < n) {
        vf v = F::of(load_part(x + i, n - i));
        store_part(y + i, Gated ? v * load_part(x + n + i, n - i) : v, n - i);
    }
}

typedef void (*Row)(const float*, int64_t, float*);

Row row_function(const mqc_activation* a) {
    static const Row rows[6][2] = {
        {activate<Identity, false>, activate<Identity, true>},
        {activate<Silu, false>, activate<Silu, true>},
        {activate<Gelu, false>, activate<Gelu, true>},
        {activate<GeluTanh, false>, activate<GeluTanh, true>},
        {activate<QuickGelu, false>, activate<QuickGelu, true>},
        {activate<Relu, false>, activate<Relu, true>},
    };
    return rows[a->function][a->gated != 0];
}

}  // namespace

void activation_quantize(const mqc_activation* a, const float* x, int64_t begin, int64_t end,
                         int64_t n, const mqc_row_scales* scales, void* xq, float* x_split,
                         float* scratch) {
    const Row row_of = row_function(a);
    const int64_t width = a->gated ? 2 * n : n;
    float* y = scratch;
    for (int64_t row = begin; row < end; row++) {
        row_of(x + row * width, n, y);
        if (a->plan) hadamard(a->plan, y, n / mqc_hadamard_block(a->plan), y, scratch + n);
        for (int64_t i = 0; i < a->splits; i++) x_split[row * a->splits + i] = y[a->split[i]];
        quantize_row(y, n, scale_of(scales, row), a->is_unsigned,
                     static_cast<int8_t*>(xq) + row * n);
    }
}

}  // namespace mqc::MQC_ISA
