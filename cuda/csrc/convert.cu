// mqc_rows_to_f16, mqc_rows_to_f32.
#include "mqc/convert.cuh"
#include "runtime.h"

using namespace mqc;

namespace {

template <class From, class To>
int convert(const char* name, To* to, int64_t to_stride, const From* from, int64_t from_stride, int64_t width,
            int64_t rows, void* stream) {
  MQC_REQUIRE(width >= 0 && rows >= 0, "%s: %lld rows of %lld values", name, static_cast<long long>(rows),
              static_cast<long long>(width));
  if (width == 0 || rows == 0) return MQC_OK;
  MQC_REQUIRE(to != nullptr && from != nullptr, "%s: a pointer is NULL", name);
  MQC_REQUIRE(to_stride >= width && from_stride >= width, "%s: a stride is below the width", name);
  const int64_t chunks = ceil_div(width, kConvertThreads * kConvertValues);
  MQC_REQUIRE(chunks < (int64_t{1} << 31) / rows, "%s: too many values", name);
  Device device;
  MQC_CHECK(current_device(device));
  const ConvertParams p{from, to, from_stride, to_stride, width, static_cast<int32_t>(chunks)};
  return launch(name, convert_kernel<From, To>, Grid{rows * chunks}, kConvertThreads, 0, stream, p);
}

}  // namespace

extern "C" {

int mqc_rows_to_f16(void* to, int64_t to_stride, const float* from, int64_t from_stride, int64_t width, int64_t rows,
                    void* stream) {
  return convert("mqc_rows_to_f16", static_cast<f16*>(to), to_stride, from, from_stride, width, rows, stream);
}

int mqc_rows_to_f32(float* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t width, int64_t rows,
                    void* stream) {
  return convert("mqc_rows_to_f32", to, to_stride, static_cast<const f16*>(from), from_stride, width, rows, stream);
}

}  // extern "C"
