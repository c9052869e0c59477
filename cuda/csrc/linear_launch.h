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
KernelShape kernel_shape(int kernel, int layout);
int plan_linear(const mqc_linear_args& args, const Device& device, LinearPlan& plan);

// Calls `use` with a value of the format of a layout, which is known to be one.
template <class Use> auto by_format(int layout, Use use) {
  switch (layout) {
    case MQC_LAYOUT_W4_64X128: return use(W4{});
    case MQC_LAYOUT_W4_64X128_G32: return use(W4Grouped<32>{});
    case MQC_LAYOUT_W4_64X128_G64: return use(W4Grouped<64>{});
    case MQC_LAYOUT_W4_64X128_G128: return use(W4Grouped<128>{});
    default: return use(W8{});
  }
}

// Defined and instantiated in files of their own.
template <class Format> int launch_linear_wgmma(const LinearParams& params, const Device& device, void* stream);
template <class Format> int launch_linear_mma(const LinearParams& params, const LinearPlan& plan, void* stream);

}  // namespace mqc
