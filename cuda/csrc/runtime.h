// What launchers share: error reporting, device facts, checks, launching. Internal.
#pragma once

#define MQC_BUILDING
#include "mqc_cuda.h"

#include "mqc/gpu.cuh"
#include "mqc/rows.cuh"

#include <cstdint>

namespace mqc {

// Records the sentence for mqc_last_error and returns `status`.
int fail(int status, const char* format, ...) __attribute__((format(printf, 2, 3)));

struct Device {
  int arch = 0;  // 80, 86, 89, 90
  int multiprocessors = 0;
  int shared_bytes = 0;  // most a block can have
};
// Facts of the current device (cached); MQC_OK, MQC_ERROR_DEVICE or MQC_ERROR_CUDA.
int current_device(Device& device);

struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

// A workspace starts with the counters of blocks that wait for each other; they are zero between
// launches. Their area has one size for all functions, so that one workspace can serve them all.
constexpr int kCounters = 4096;
constexpr int64_t kCounterBytes = kCounters * 4;

int check_workspace(const void* workspace, int64_t given, int64_t needed);
int check_size(uint32_t given, size_t expected, const char* name);
// Fills `rows` from the fields of a struct; `who` names the function in errors.
int check_modality(RowScale& rows, int kind, const float* scale, const void* modality, int64_t count,
                   int64_t rows_per_sequence, const char* who);
inline bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }
int dtype_bytes(int dtype);  // 0 for an unknown dtype

#if defined(MQC_EMULATE)
template <class... P, class... A>
int launch(const char*, void (*kernel)(P...), Grid grid, int threads, int64_t shared, void*, const A&... arguments) {
  emulator::launch({static_cast<int>(grid.x), static_cast<int>(grid.y), static_cast<int>(grid.z)}, threads,
                   static_cast<size_t>(shared), [&] { kernel(arguments...); });
  return MQC_OK;
}
#else
int check_launch(const char* name, cudaError_t error);

template <class... P, class... A>
int launch(const char* name, void (*kernel)(P...), Grid grid, int threads, int64_t shared, void* stream,
           const A&... arguments) {
  if (shared > 48 * 1024) {
    // As much as a block may have: other launches of the kernel, recorded ones too, may need more.
    Device device;
    if (const int status = current_device(device)) return status;
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   device.shared_bytes);
    if (error != cudaSuccess) return check_launch(name, error);
  }
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  kernel<<<blocks, static_cast<unsigned>(threads), static_cast<size_t>(shared), static_cast<cudaStream_t>(stream)>>>(
      arguments...);
  return check_launch(name, cudaGetLastError());
}
#endif

// Calls `use` with a value of the float type of a dtype (bf16, f16 or float).
template <class Use> int by_float_type(int dtype, const char* who, Use use) {
  switch (dtype) {
    case MQC_BF16: return use(bf16{});
    case MQC_F16: return use(f16{});
    case MQC_F32: return use(float{});
    default: return fail(MQC_ERROR_ARGUMENT, "%s: dtype %d is not bf16, f16 or f32", who, dtype);
  }
}

}  // namespace mqc

#define MQC_CHECK(expression)                     \
  do {                                            \
    const int mqc_status_ = (expression);         \
    if (mqc_status_ != MQC_OK) return mqc_status_; \
  } while (0)

// Fails with MQC_ERROR_ARGUMENT and a sentence unless the condition holds.
#define MQC_REQUIRE(condition, ...) \
  do {                              \
    if (!(condition)) return ::mqc::fail(MQC_ERROR_ARGUMENT, __VA_ARGS__); \
  } while (0)
