// Rows of tensors: 16 bytes at a time, as floats.
#pragma once

#include "mqc/gpu.cuh"

namespace mqc {

template <class T> constexpr int kVectorOf = 16 / static_cast<int>(sizeof(T));

template <class T> MQC_D void unpack_vector(const gpu::Vector16& vector, float (&to)[kVectorOf<T>]) {
  union {
    gpu::Vector16 vector;
    T value[kVectorOf<T>];
  } in;
  in.vector = vector;
  MQC_UNROLL
  for (int i = 0; i < kVectorOf<T>; ++i) to[i] = to_float(in.value[i]);
}

template <class T> MQC_D void load_vector(const T* from, float (&to)[kVectorOf<T>]) {
  unpack_vector<T>(gpu::load16(from), to);
}

template <class T> MQC_D void store_vector(T* to, const float (&from)[kVectorOf<T>]) {
  union {
    gpu::Vector16 vector;
    T value[kVectorOf<T>];
  } out;
  MQC_UNROLL
  for (int i = 0; i < kVectorOf<T>; ++i) out.value[i] = from_float<T>(from[i]);
  gpu::store16(to, out.vector);
}

// kCount floats (a multiple of 4) between registers and 16-byte aligned shared memory.
template <int kCount> MQC_D void store_floats(float* to, const float (&v)[kCount]) {
  MQC_UNROLL
  for (int i = 0; i < kCount; i += 4) {
    gpu::Vector16 out;
    MQC_UNROLL
    for (int j = 0; j < 4; ++j) out.word[j] = float_bits(v[i + j]);
    *reinterpret_cast<gpu::Vector16*>(to + i) = out;
  }
}
MQC_D void load_floats(const float* from, float (&v)[4]) {
  const gpu::Vector16 in = *reinterpret_cast<const gpu::Vector16*>(from);
  MQC_UNROLL
  for (int j = 0; j < 4; ++j) v[j] = bit_cast<float>(in.word[j]);
}

// Four bytes of int8, the first in the lowest.
MQC_HD uint32_t pack_bytes(int a, int b, int c, int d) {
  return (a & 0xFF) | (b & 0xFF) << 8 | (c & 0xFF) << 16 | static_cast<uint32_t>(d & 0xFF) << 24;
}

MQC_D float warp_sum(float value) {
  MQC_UNROLL
  for (int mask = 16; mask > 0; mask >>= 1) value += gpu::shuffle_xor(value, mask);
  return value;
}

}  // namespace mqc
