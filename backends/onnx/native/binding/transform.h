// The blockwise Hadamard transform that a node's constant factors are.
#pragma once

#include <vector>

#include "node.h"

namespace mqc_onnx {

// A matrix of signs of order `base` (1: none), then Sylvester's of order 2^log2.
struct Transform {
    int64_t base = 1;
    int log2 = 0;
    std::vector<int8_t> signs;  // +-1, [base, base]

    int64_t block() const { return base << log2; }
};

// From the constant inputs factor0, factor1, ..., with 1 / sqrt(block) in the last one.
Transform transform_of(const Variant& variant, const Ort::ConstKernelInfo& info);

}  // namespace mqc_onnx
