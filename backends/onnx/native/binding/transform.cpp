#include "transform.h"

#include <cmath>

namespace mqc_onnx {
namespace {

// The exponent where a +-1 matrix times a factor is Sylvester's of order 2^exponent, else -1.
int sylvester(const float* m, int64_t n) {
    if (n & (n - 1)) return -1;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n; j++)
            if (std::signbit(m[i * n + j]) != (__builtin_parityll(i & j) != 0)) return -1;
    return __builtin_ctzll(n);
}

}  // namespace

Transform transform_of(const Variant& variant, const Ort::ConstKernelInfo& info) {
    Transform t;
    float level = 1;
    for (int i = 0;; i++) {
        const std::string name = "factor" + std::to_string(i);
        if (variant.find(name.c_str()) < 0) break;
        const Constant factor(variant, info, name.c_str());
        factor.require(factor.shape.size() == 2 && factor.shape[0] == factor.shape[1] &&
                           factor.shape[0] > 0 && factor.shape[0] <= 4096,
                       "square");
        const int64_t n = factor.shape[0];
        const float* m = factor.as<float>();
        level = std::fabs(m[0]);
        for (int64_t j = 0; j < n * n; j++)
            factor.require(std::fabs(m[j]) == level, "of one magnitude");
        const int power = sylvester(m, n);
        factor.require(power >= 0 || i == 0, "a Sylvester matrix");
        if (power >= 0) {
            t.log2 += power;
        } else {
            t.base = n;
            for (int64_t j = 0; j < n * n; j++) t.signs.push_back(std::signbit(m[j]) ? -1 : 1);
        }
        factor.require(t.log2 <= 24 && t.block() <= (int64_t{1} << 24), "of an order up to 2^24");
    }
    if (t.block() > 1 && std::fabs(level * std::sqrt(static_cast<double>(t.block())) - 1) > 1e-5)
        throw std::runtime_error("ai.mqc::" + variant.op_type() +
                                 ": the last factor is not divided by the root of the order");
    return t;
}

}  // namespace mqc_onnx
