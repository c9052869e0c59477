// Device memory for callers without a framework.
#include "runtime.h"

#include <cstdlib>
#include <cstring>

using namespace mqc;

namespace {

int check_rows(const void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t width, int64_t rows) {
  MQC_REQUIRE(width >= 0 && rows >= 0, "mqc_memory_copy_rows: %lld rows of %lld bytes", static_cast<long long>(rows),
              static_cast<long long>(width));
  if (width == 0 || rows == 0) return MQC_OK;
  MQC_REQUIRE(to != nullptr && from != nullptr, "mqc_memory_copy_rows: a pointer is NULL");
  MQC_REQUIRE(to_stride >= width && from_stride >= width, "mqc_memory_copy_rows: a stride is below the width");
  return MQC_OK;
}

int check_upload(const void* to, const void* from, int64_t bytes) {
  MQC_REQUIRE(bytes >= 0, "mqc_memory_upload: %lld bytes", static_cast<long long>(bytes));
  MQC_REQUIRE(bytes == 0 || (to != nullptr && from != nullptr), "mqc_memory_upload: a pointer is NULL");
  return MQC_OK;
}

int check_allocate(int64_t bytes, void** memory) {
  MQC_REQUIRE(memory != nullptr && bytes >= 0, "mqc_memory_allocate: %lld bytes", static_cast<long long>(bytes));
  *memory = nullptr;
  return MQC_OK;
}

}  // namespace

extern "C" {

#if defined(MQC_EMULATE)

int mqc_memory_on_host(void) { return 1; }

int mqc_memory_allocate(int64_t bytes, void** memory) {
  MQC_CHECK(check_allocate(bytes, memory));
  if (bytes == 0) return MQC_OK;
  const size_t size = static_cast<size_t>(ceil_div(bytes, 256)) * 256;
  *memory = std::aligned_alloc(256, size);
  if (*memory == nullptr) return fail(MQC_ERROR_CUDA, "mqc_memory_allocate: no %zu bytes", size);
  memset(*memory, 0, size);
  return MQC_OK;
}

int mqc_memory_free(void* memory) {
  std::free(memory);
  return MQC_OK;
}

int mqc_memory_upload(void* to, const void* from, int64_t bytes, void*) {
  MQC_CHECK(check_upload(to, from, bytes));
  if (bytes > 0) memcpy(to, from, static_cast<size_t>(bytes));
  return MQC_OK;
}

int mqc_memory_copy_rows(void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t width,
                         int64_t rows, void*) {
  MQC_CHECK(check_rows(to, to_stride, from, from_stride, width, rows));
  if (width == 0) return MQC_OK;
  for (int64_t row = 0; row < rows; ++row)
    memcpy(static_cast<uint8_t*>(to) + row * to_stride, static_cast<const uint8_t*>(from) + row * from_stride,
           static_cast<size_t>(width));
  return MQC_OK;
}

#else

int mqc_memory_on_host(void) { return 0; }

int mqc_memory_allocate(int64_t bytes, void** memory) {
  MQC_CHECK(check_allocate(bytes, memory));
  if (bytes == 0) return MQC_OK;
  MQC_CHECK(check_launch("cudaMalloc", cudaMalloc(memory, static_cast<size_t>(bytes))));
  int status = check_launch("cudaMemset", cudaMemset(*memory, 0, static_cast<size_t>(bytes)));
  // Frameworks' streams do not wait for the default stream, which the memset runs on.
  if (status == MQC_OK) status = check_launch("cudaStreamSynchronize", cudaStreamSynchronize(nullptr));
  if (status != MQC_OK) {
    cudaFree(*memory);
    *memory = nullptr;
  }
  return status;
}

int mqc_memory_free(void* memory) { return check_launch("cudaFree", cudaFree(memory)); }

int mqc_memory_upload(void* to, const void* from, int64_t bytes, void* stream) {
  MQC_CHECK(check_upload(to, from, bytes));
  if (bytes == 0) return MQC_OK;
  const auto order = static_cast<cudaStream_t>(stream);
  MQC_CHECK(check_launch("cudaMemcpyAsync",
                         cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, order)));
  if (stream != nullptr) return MQC_OK;
  return check_launch("cudaStreamSynchronize", cudaStreamSynchronize(order));
}

int mqc_memory_copy_rows(void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t width,
                         int64_t rows, void* stream) {
  MQC_CHECK(check_rows(to, to_stride, from, from_stride, width, rows));
  if (width == 0 || rows == 0) return MQC_OK;
  if (rows == 1 || (to_stride == width && from_stride == width))  // one piece has no limit on the stride
    return check_launch("cudaMemcpyAsync", cudaMemcpyAsync(to, from, static_cast<size_t>(width * rows),
                                                           cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream)));
  return check_launch("cudaMemcpy2DAsync",
                      cudaMemcpy2DAsync(to, static_cast<size_t>(to_stride), from, static_cast<size_t>(from_stride),
                                        static_cast<size_t>(width), static_cast<size_t>(rows),
                                        cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream)));
}

#endif

}  // extern "C"
