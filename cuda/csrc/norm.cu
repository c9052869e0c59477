// mqc_rms_norm_quantize.
#include "mqc/norm.cuh"
#include "runtime.h"

using namespace mqc;

namespace {
constexpr int kMaxColumns = 16384;
}

extern "C" int mqc_rms_norm_quantize(const mqc_norm_args* args, void* stream) {
  MQC_REQUIRE(args != nullptr, "mqc_rms_norm_quantize: args is NULL");
  MQC_CHECK(check_size(args->size, sizeof(mqc_norm_args), "mqc_norm_args"));
  MQC_REQUIRE(args->columns > 0 && args->columns <= kMaxColumns, "mqc_rms_norm_quantize: %lld columns, at most %d",
              static_cast<long long>(args->columns), kMaxColumns);
  MQC_REQUIRE(args->rows >= 0 && args->rows < int64_t{1} << 31, "mqc_rms_norm_quantize: %lld rows",
              static_cast<long long>(args->rows));
  if (args->rows == 0) return MQC_OK;
  MQC_REQUIRE(args->x != nullptr && (args->xq != nullptr || args->h != nullptr),
              "mqc_rms_norm_quantize: x is NULL, or both xq and h are");
  MQC_REQUIRE(args->x_stride >= args->columns && (args->xq == nullptr || args->xq_stride >= args->columns) &&
                  (args->h == nullptr || args->h_stride >= args->columns),
              "mqc_rms_norm_quantize: a stride is below the columns");
  Device device;
  MQC_CHECK(current_device(device));
  NormParams p{};
  if (args->xq != nullptr)
    MQC_CHECK(check_modality(p.rows_scale, args->modality_kind, args->scale, args->modality, args->rows,
                             args->rows_per_sequence, "mqc_rms_norm_quantize"));
  p.x = args->x;
  p.xq = args->xq;
  p.h = args->h;
  p.x_stride = args->x_stride;
  p.xq_stride = args->xq_stride;
  p.h_stride = args->h_stride;
  p.eps = args->eps;
  p.columns = static_cast<int32_t>(args->columns);
  return by_float_type(args->dtype, "mqc_rms_norm_quantize", [&](auto zero) {
    using T = decltype(zero);
    constexpr int kVector = kVectorOf<T>;
    p.vector_io = args->columns % kVector == 0 && args->x_stride % kVector == 0 && aligned16(args->x) &&
                  args->xq_stride % 4 == 0 && reinterpret_cast<uintptr_t>(args->xq) % 4 == 0;
    return launch("rms_norm_quantize", norm_kernel<T>, Grid{args->rows}, kNormThreads,
                  (args->columns + kNormThreads / 32) * 4, stream, p);
  });
}
