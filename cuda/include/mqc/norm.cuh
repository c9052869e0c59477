// RMSNorm without gain, then static quantization: a block a row.
#pragma once

#include "mqc/rows.cuh"
#include "mqc/vectors.cuh"

namespace mqc {

struct NormParams {
  const void* x;
  int8_t* xq;  // or null
  void* h;     // or null
  RowScale rows_scale;
  int64_t x_stride, xq_stride, h_stride;
  float eps;
  int32_t columns;
  int32_t vector_io;  // all rows can be accessed 16 bytes (xq: 4 bytes) at a time
};

constexpr int kNormThreads = 256;

// h of one value: rounded to T, as the norm's result is before it is quantized.
template <class T> MQC_HD float normalised(float x, float inverse) { return round_to<T>(mul_rn(x, inverse)); }

// Grid: rows. Shared memory: columns + 8 floats.
template <class T> MQC_KERNEL(kNormThreads, 2) norm_kernel(MQC_GRID_CONSTANT NormParams p) {
  constexpr int kWarps = kNormThreads / 32, kVector = kVectorOf<T>;
  const int thread = gpu::thread_index();
  const int64_t row = gpu::block_x();
  auto* partial = reinterpret_cast<float*>(gpu::shared_memory());
  float* values = partial + kWarps;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;

  float sum = 0.0f;
  if (p.vector_io) {
    for (int c = thread * kVector; c < p.columns; c += kNormThreads * kVector) {
      float v[kVector];
      load_vector(x + c, v);
      store_floats(values + c, v);
      MQC_UNROLL
      for (int i = 0; i < kVector; ++i) sum = fma_rn(v[i], v[i], sum);
    }
  } else {
    for (int c = thread; c < p.columns; c += kNormThreads) {
      const float v = to_float(x[c]);
      values[c] = v;
      sum = fma_rn(v, v, sum);
    }
  }
  sum = warp_sum(sum);
  if (thread % 32 == 0) partial[thread / 32] = sum;
  gpu::sync_block();
  float total = 0.0f;
  MQC_UNROLL
  for (int warp = 0; warp < kWarps; ++warp) total += partial[warp];
  const float inverse = 1.0f / sqrtf(total / static_cast<float>(p.columns) + p.eps);

  const float scale = p.xq != nullptr ? row_scale(p.rows_scale, static_cast<int32_t>(row)) : 1.0f;
  int8_t* xq = p.xq + row * p.xq_stride;
  T* h = static_cast<T*>(p.h) + row * p.h_stride;
  if (p.vector_io) {
    for (int c = thread * 4; c < p.columns; c += kNormThreads * 4) {
      float v[4];
      load_floats(values + c, v);
      MQC_UNROLL
      for (int i = 0; i < 4; ++i) v[i] = normalised<T>(v[i], inverse);
      if (p.xq != nullptr)
        *reinterpret_cast<uint32_t*>(xq + c) = pack_bytes(quantize_value(v[0], scale), quantize_value(v[1], scale),
                                                          quantize_value(v[2], scale), quantize_value(v[3], scale));
      if (p.h != nullptr) {
        MQC_UNROLL
        for (int i = 0; i < 4; ++i) h[c + i] = from_float<T>(v[i]);
      }
    }
  } else {
    for (int c = thread; c < p.columns; c += kNormThreads) {
      const float v = normalised<T>(values[c], inverse);
      if (p.xq != nullptr) xq[c] = static_cast<int8_t>(quantize_value(v, scale));
      if (p.h != nullptr) h[c] = from_float<T>(v);
    }
  }
}

}  // namespace mqc
