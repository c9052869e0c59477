// Rows of float32 as float16, and back.
#pragma once

#include "mqc/gpu.cuh"

namespace mqc {

struct ConvertParams {
  const void* from;
  void* to;
  int64_t from_stride, to_stride;  // in elements
  int64_t width;
  int32_t chunks;  // blocks a row
};

constexpr int kConvertThreads = 256;
constexpr int kConvertValues = 16;  // of a thread
constexpr float kLargestF16 = 65504.0f;

// Beyond the type's range: its largest value rather than infinity. NaN stays.
MQC_HD f16 narrow(float value) {
  const float inside = value > kLargestF16 ? kLargestF16 : value < -kLargestF16 ? -kLargestF16 : value;
  return from_float<f16>(inside);
}

MQC_D void convert_value(f16* to, float from) { *to = narrow(from); }
MQC_D void convert_value(float* to, f16 from) { *to = to_float(from); }

// Grid: rows * chunks.
template <class From, class To> MQC_KERNEL(kConvertThreads, 4) convert_kernel(MQC_GRID_CONSTANT ConvertParams p) {
  const int64_t row = gpu::block_x() / p.chunks, chunk = gpu::block_x() % p.chunks;
  const From* from = static_cast<const From*>(p.from) + row * p.from_stride;
  To* to = static_cast<To*>(p.to) + row * p.to_stride;
  const int64_t first = chunk * (kConvertThreads * kConvertValues) + gpu::thread_index();
  MQC_UNROLL
  for (int j = 0; j < kConvertValues; ++j) {
    const int64_t i = first + j * kConvertThreads;
    if (i < p.width) convert_value(to + i, from[i]);
  }
}

}  // namespace mqc
