// Weights of a file in the order of the CUDA kernels' tiles.
#pragma once

#include <cstdint>
#include <vector>

namespace mqc_onnx_cuda {

struct Weight {
    int64_t n = 0, k = 0;
    int bits = 8;        // 4 or 8
    bool tiled = false;  // layout C16K4 (mqc/numerics/packing.py), else rows
    int64_t groups = 1;  // of inputs with a scale each; one: the scale is no part of the weight
    const uint8_t* data = nullptr;
    const float* scales = nullptr;  // [n, groups] where there are several
};

// The mqc_layout for a weight's bits and groups, or 0 where no kernel takes it.
int layout_of(const Weight& weight);
// As mqc.cuda.pack.pack_linear makes it.
std::vector<uint8_t> pack(const Weight& weight);

// Signs [base, base] (+-1) as mqc.cuda.pack.hadamard_table makes them of a Hadamard matrix.
std::vector<uint32_t> pack_signs(const std::vector<int8_t>& signs, int64_t base);

}  // namespace mqc_onnx_cuda
