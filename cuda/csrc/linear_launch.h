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
  int64_t shared_bytes;
};
KernelShape kernel_shape(int kernel, const mqc_linear_args& args);
int plan_linear(const mqc_linear_args& args, const Device& device, LinearPlan& plan);

// Calls `use` with a value of the format of a layout, which is known to be one.
template <class Use> auto by_format(int layout, Use use) {
  switch (layout) {
    case MQC_LAYOUT_W4_64X128: return use(W4{});
    case MQC_LAYOUT_W4_64X128_G32: return use(W4Grouped<32>{});
    case MQC_LAYOUT_W4_64X128_G64: return use(W4Grouped<64>{});
    case MQC_LAYOUT_W4_64X128_G128: return use(W4Grouped<128>{});
    case MQC_LAYOUT_W8_64X128_G32: return use(W8Grouped<32>{});
    case MQC_LAYOUT_W8_64X128_G128: return use(W8Grouped<128>{});
    default: return use(W8{});
  }
}

// Whether a linear's rows are floats of a half type, and its weights alone integers.
inline bool has_float_rows(const mqc_linear_args& args) { return args.x_dtype == MQC_BF16 || args.x_dtype == MQC_F16; }

// Calls `use` with a value of the format of such a linear.
template <class Use> auto by_half_format(const mqc_linear_args& args, Use use) {
  const bool four = by_format(args.layout, [](auto format) { return decltype(format)::kBits == 4; });
  if (args.x_dtype == MQC_BF16) return four ? use(HalfFormat<bf16, 4>{}) : use(HalfFormat<bf16, 8>{});
  return four ? use(HalfFormat<f16, 4>{}) : use(HalfFormat<f16, 8>{});
}

// Bytes of a layout's scales of groups that a stage of these kernels holds beside its tiles.
template <class Shape> int64_t half_scale_bytes(int scale_bytes) {
  return static_cast<int64_t>(Shape::kStages) * Shape::kWarpsK * Shape::kTiles * scale_bytes;
}

// Defined and instantiated in files of their own.
template <class Format> int launch_linear_wgmma(const LinearParams& params, const Device& device, void* stream);
template <class Format> int launch_linear_mma(const LinearParams& params, const LinearPlan& plan, void* stream);
template <class Format> int launch_linear_half(const LinearParams& params, const LinearPlan& plan, void* stream);

}  // namespace mqc
