// Weights of a file in the order of the CUDA kernels' tiles.
#pragma once

#include <cstdint>
#include <vector>

namespace mqc_onnx_cuda {

struct Weight {
    int64_t n = 0, k = 0;
    int bits = 8;            // 4 or 8
    bool tiled = false;      // layout C16K4 in one group (mqc/numerics/packing.py), else rows
    const uint8_t* data = nullptr;
};

// Layout MQC_LAYOUT_W4_64X128 or W8_64X128: as mqc.cuda.pack.pack_linear makes it.
std::vector<uint8_t> pack(const Weight& weight);

// Signs [base, base] (+-1) as mqc.cuda.pack.hadamard_table makes them of a Hadamard matrix.
std::vector<uint32_t> pack_signs(const std::vector<int8_t>& signs, int64_t base);

}  // namespace mqc_onnx_cuda
