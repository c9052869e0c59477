// Macros and number formats shared by all device code. Compiles with nvcc and with any C++17
// compiler: the CPU tests run the same functions (MQC_EMULATE: whole kernels, see tests/cuda).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MQC_HD __host__ __device__ __forceinline__
#define MQC_D __device__ __forceinline__
#define MQC_UNROLL _Pragma("unroll")
#define MQC_NO_UNROLL _Pragma("unroll 1")
#else
#include <cmath>
#define MQC_HD inline
#define MQC_D inline
#define MQC_UNROLL
#define MQC_NO_UNROLL
#endif

namespace mqc {

template <class T> MQC_HD T bit_cast(uint32_t bits) {
  static_assert(sizeof(T) == 4, "a 32-bit type");
  T value;
  memcpy(&value, &bits, 4);
  return value;
}

MQC_HD uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

// Float32 operations that the compiler must not contract to a fused multiply-add: the reference
// rounds after each. The host build passes -ffp-contract=off.
MQC_HD float mul_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

MQC_HD float add_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

MQC_HD float div_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

MQC_HD float fma_rn(float a, float b, float c) { return fmaf(a, b, c); }

// bfloat16 and float16 as bits, so that no vendor header is needed where they are only moved.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
static_assert(sizeof(bf16) == 2 && sizeof(f16) == 2, "storage types");

MQC_HD float to_float(float value) { return value; }
MQC_HD float to_float(bf16 value) { return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

MQC_HD float to_float(f16 value) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) return bit_cast<float>(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  const float wide = bit_cast<float>(magnitude << 13) * 0x1p112f;  // exact, subnormals too
  return bit_cast<float>(sign | float_bits(wide));
#endif
}

template <class T> MQC_HD T from_float(float value);

template <> MQC_HD float from_float<float>(float value) { return value; }

// To nearest even; NaN gives the canonical NaN.
template <> MQC_HD bf16 from_float<bf16>(float value) {
#if defined(__CUDA_ARCH__)
  bf16 half;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half.bits) : "f"(value));
  return half;
#else
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return bf16{0x7FFFu};
  return bf16{static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

template <> MQC_HD f16 from_float<f16>(float value) {
#if defined(__CUDA_ARCH__)
  f16 half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half.bits) : "f"(value));
  return half;
#else
  const uint32_t bits = float_bits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return f16{0x7FFFu};
  if (magnitude >= 0x477FF000u) return f16{static_cast<uint16_t>(sign | 0x7C00u)};
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 lets the FPU round at the right place
    const uint32_t shifted = float_bits(bit_cast<float>(magnitude) + 0.5f);
    return f16{static_cast<uint16_t>(sign | (shifted - 0x3F000000u))};
  }
  const uint32_t odd = (magnitude >> 13) & 1u;
  return f16{static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xFFFu + odd) >> 13))};
#endif
}

// The value a tensor of type T would hold.
template <class T> MQC_HD float round_to(float value) { return to_float(from_float<T>(value)); }

MQC_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace mqc
