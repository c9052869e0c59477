// Plan of a linear, and the launch functions of its translation units. Internal.
#pragma once

#include "mqc/linear_mma.cuh"
#include "mqc/linear_wgmma.cuh"
#include "runtime.h"

namespace mqc {

struct LinearPlan {
  int kernel = 0;            // mqc_linear_kernel, not AUTO
  int split_k = 1;
  int64_t blocks = 0;        // tiles of the product
  int64_t partial_bytes = 0; // 0 without split
};

// What a plan needs to know of a kernel.
struct KernelShape {
  int channels, tokens, warps_k, blocks_per_multiprocessor;
};
KernelShape kernel_shape(int kernel);
int plan_linear(const mqc_linear_args& args, const Device& device, LinearPlan& plan);

int launch_linear_mma_w4(const LinearParams& params, const LinearPlan& plan, void* stream);
int launch_linear_mma_w8(const LinearParams& params, const LinearPlan& plan, void* stream);
int launch_linear_wgmma(const LinearParams& params, const Device& device, int bits, void* stream);

template <int kBits> int launch_linear_mma(const LinearParams& params, const LinearPlan& plan, void* stream) {
  const auto run = [&](auto shape) {
    using Shape = decltype(shape);
    const Grid grid{ceil_div(params.n, Shape::kChannels), ceil_div(params.rows, Shape::kTokens), plan.split_k};
    return launch("linear_mma", linear_mma_kernel<Shape>, grid, Shape::kThreads, Shape::kSharedBytes, stream, params);
  };
  switch (plan.kernel) {
    case MQC_LINEAR_MMA_8: return run(Mma8<kBits>{});
    case MQC_LINEAR_MMA_16: return run(Mma16<kBits>{});
    case MQC_LINEAR_MMA_32: return run(Mma32<kBits>{});
    case MQC_LINEAR_MMA_64: return run(Mma64<kBits>{});
    default: return run(Mma128<kBits>{});
  }
}

}  // namespace mqc
