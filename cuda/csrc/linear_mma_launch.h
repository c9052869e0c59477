// Launch of the mma.sync kernels of a format. Internal; instantiated in linear_mma_*.cu.
#pragma once

#include "linear_launch.h"

namespace mqc {

template <class Format> int launch_linear_mma(const LinearParams& params, const LinearPlan& plan, void* stream) {
  const auto run = [&](auto shape) {
    using Shape = decltype(shape);
    const Grid grid{ceil_div(params.n, Shape::kChannels), ceil_div(params.rows, Shape::kTokens), plan.split_k};
    return launch("linear_mma", linear_mma_kernel<Shape>, grid, Shape::kThreads, Shape::kSharedBytes, stream, params);
  };
  switch (plan.kernel) {
    case MQC_LINEAR_MMA_8: return run(Mma8<Format>{});
    case MQC_LINEAR_MMA_16: return run(Mma16<Format>{});
    case MQC_LINEAR_MMA_32: return run(Mma32<Format>{});
    case MQC_LINEAR_MMA_64: return run(Mma64<Format>{});
    default: return run(Mma128<Format>{});
  }
}

template <class Format> int launch_linear_half(const LinearParams& params, const LinearPlan& plan, void* stream) {
  using Row = typename Format::Row;
  constexpr int kBits = Format::kBits;
  const auto run = [&](auto shape) {
    using Shape = decltype(shape);
    const Grid grid{ceil_div(params.n, Shape::kChannels), ceil_div(params.rows, Shape::kTokens), plan.split_k};
    const int64_t shared = Shape::kSharedBytes + half_scale_bytes<Shape>(params.scale_bytes);
    return launch("linear_half", linear_mma_kernel<Shape>, grid, Shape::kThreads, shared, stream, params);
  };
  switch (plan.kernel) {
    case MQC_LINEAR_MMA_8: return run(Half8<Row, kBits>{});
    case MQC_LINEAR_MMA_16: return run(Half16<Row, kBits>{});
    case MQC_LINEAR_MMA_64: return run(Half64<Row, kBits>{});
    default: return run(Half128<Row, kBits>{});
  }
}

}  // namespace mqc
