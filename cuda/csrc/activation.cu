// mqc_activation_quantize.
#include "mqc/activation.cuh"
#include "runtime.h"

#include <cmath>

using namespace mqc;

namespace {

constexpr int kMaxColumns = 32768;
// Steps of 16 inputs of the dense factor that a warp holds in registers: float32 takes three parts.
constexpr int kMaxSteps = 10, kMaxHalfSteps = 22;

// The kernel for the number of steps, rounded up to one that is built.
template <class T> auto kernel_of(int steps) {
  if (steps == 0) return activation_kernel<T, 0>;
  if (steps <= 2) return activation_kernel<T, 2>;
  if (steps <= 5) return activation_kernel<T, 5>;
  if constexpr (kParts<T> == 1)
    if (steps > kMaxSteps) return activation_kernel<T, kMaxHalfSteps>;
  return activation_kernel<T, kMaxSteps>;
}

int check(const mqc_activation_args* args) {
  MQC_REQUIRE(args != nullptr, "mqc_activation_quantize: args is NULL");
  MQC_CHECK(check_size(args->size, sizeof(mqc_activation_args), "mqc_activation_args"));
  MQC_REQUIRE(args->columns > 0 && args->columns <= kMaxColumns, "mqc_activation_quantize: %lld columns, at most %d",
              static_cast<long long>(args->columns), kMaxColumns);
  MQC_REQUIRE(args->rows >= 0 && args->rows < int64_t{1} << 31, "mqc_activation_quantize: %lld rows",
              static_cast<long long>(args->rows));
  MQC_REQUIRE(args->activation >= MQC_ACT_IDENTITY && args->activation <= MQC_ACT_QUICK_GELU,
              "mqc_activation_quantize: activation %d is unknown", args->activation);
  MQC_REQUIRE(args->hadamard_base >= 1 && args->hadamard_log2 >= 0 && args->hadamard_log2 <= 15 &&
                  args->columns % (static_cast<int64_t>(args->hadamard_base) << args->hadamard_log2) == 0,
              "mqc_activation_quantize: Hadamard blocks of %d << %d do not divide %lld columns", args->hadamard_base,
              args->hadamard_log2, static_cast<long long>(args->columns));
  MQC_REQUIRE((args->hadamard_base > 1) == (args->hadamard != nullptr),
              "mqc_activation_quantize: a dense factor comes with its sign table");
  if (args->rows == 0) return MQC_OK;
  MQC_REQUIRE(args->x != nullptr && (args->xq != nullptr || args->y != nullptr),
              "mqc_activation_quantize: x is NULL, or both xq and y are");
  MQC_REQUIRE(args->split_columns >= 0 && (args->split_columns == 0 || (args->split != nullptr && args->x_split != nullptr)),
              "mqc_activation_quantize: split columns need split and x_split");
  MQC_REQUIRE(args->x_stride >= args->columns * (args->gated ? 2 : 1) &&
                  (args->xq == nullptr || args->xq_stride >= args->columns) &&
                  (args->y == nullptr || args->y_stride >= args->columns) &&
                  args->x_split_stride >= args->split_columns,
              "mqc_activation_quantize: a stride is below the columns");
  return MQC_OK;
}

}  // namespace

extern "C" int mqc_activation_quantize(const mqc_activation_args* args, void* stream) {
  MQC_CHECK(check(args));
  if (args->rows == 0) return MQC_OK;
  const int steps = args->hadamard_base > 1 ? hadamard_steps(args->hadamard_base) : 0;
  const int most = args->dtype == MQC_F32 ? kMaxSteps : kMaxHalfSteps;
  if (steps > most)
    return fail(MQC_ERROR_UNSUPPORTED, "mqc_activation_quantize: a dense Hadamard factor of order %d, at most %d",
                args->hadamard_base, 16 * most);
  Device device;
  MQC_CHECK(current_device(device));
  ActivationParams p{};
  if (args->xq != nullptr)
    MQC_CHECK(check_modality(p.rows_scale, args->modality_kind, args->scale, args->modality, args->rows,
                             args->rows_per_sequence, "mqc_activation_quantize"));
  p.x = args->x;
  p.hadamard = static_cast<const uint32_t*>(args->hadamard);
  p.split = args->split;
  p.xq = args->xq;
  p.y = args->y;
  p.x_split = args->x_split;
  p.x_stride = args->x_stride;
  p.xq_stride = args->xq_stride;
  p.y_stride = args->y_stride;
  p.x_split_stride = args->x_split_stride;
  p.columns = static_cast<int32_t>(args->columns);
  p.base = args->hadamard_base;
  p.log2 = args->hadamard_log2;
  p.norm = static_cast<float>(1.0 / std::sqrt(std::ldexp(static_cast<double>(p.base), p.log2)));
  p.split_columns = args->split_columns;
  p.activation = args->activation;
  p.gated = args->gated;
  const int64_t shared = int64_t{4} * row_floats(p.columns, p.base, p.log2);
  if (shared > device.shared_bytes)
    return fail(MQC_ERROR_UNSUPPORTED, "mqc_activation_quantize: a row takes %lld bytes of shared memory, a block has %d",
                static_cast<long long>(shared), device.shared_bytes);
  return by_float_type(args->dtype, "mqc_activation_quantize", [&](auto zero) {
    using T = decltype(zero);
    constexpr int kVector = kVectorOf<T>;
    p.vector_in = args->columns % kVector == 0 && args->x_stride % kVector == 0 && aligned16(args->x);
    p.vector_out = args->columns % 4 == 0 && args->xq_stride % 4 == 0 && reinterpret_cast<uintptr_t>(args->xq) % 4 == 0;
    return launch("activation_quantize", kernel_of<T>(steps), Grid{args->rows}, kActivationThreads, shared, stream, p);
  });
}
