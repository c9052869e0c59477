// mqc_rotary_cache and mqc_rotate.
#include "mqc/rotary.cuh"
#include "runtime.h"

using namespace mqc;

namespace {

int check(const mqc_rotary_args* args) {
  MQC_REQUIRE(args != nullptr, "mqc_rotary_cache: args is NULL");
  MQC_CHECK(check_size(args->size, sizeof(mqc_rotary_args), "mqc_rotary_args"));
  MQC_REQUIRE(args->batch >= 0 && args->tokens >= 0 && args->kv_heads > 0 && args->q_heads > 0 && args->capacity > 0,
              "mqc_rotary_cache: batch %d, tokens %d, heads %d and %d, capacity %lld", args->batch, args->tokens,
              args->q_heads, args->kv_heads, static_cast<long long>(args->capacity));
  MQC_REQUIRE(args->head_dim > 0 && args->head_dim <= kMaxHeadDim, "mqc_rotary_cache: head_dim %d, at most %d",
              args->head_dim, kMaxHeadDim);
  MQC_REQUIRE(args->rotary >= MQC_ROTARY_NONE && args->rotary <= MQC_ROTARY_INTERLEAVED,
              "mqc_rotary_cache: rotary %d is unknown", args->rotary);
  const bool turns = args->rotary != MQC_ROTARY_NONE;
  MQC_REQUIRE(turns == (args->cos != nullptr) && turns == (args->sin != nullptr),
              "mqc_rotary_cache: cos and sin are given where rotary is not none");
  MQC_REQUIRE(!turns || (args->rotary_dim > 0 && args->rotary_dim % 2 == 0 && args->rotary_dim <= args->head_dim),
              "mqc_rotary_cache: rotary_dim %d of head_dim %d", args->rotary_dim, args->head_dim);
  MQC_REQUIRE(!turns || args->table_dtype == args->dtype || args->table_dtype == MQC_F32,
              "mqc_rotary_cache: cos and sin have the dtype of q or f32");
  MQC_REQUIRE(args->cache_dtype == args->dtype || args->cache_dtype == MQC_I8,
              "mqc_rotary_cache: the cache has the dtype of k or int8");
  MQC_REQUIRE(args->k != nullptr && args->v != nullptr && args->past != nullptr && args->key_cache != nullptr &&
                  args->value_cache != nullptr,
              "mqc_rotary_cache: k, v, past or a cache is NULL");
  MQC_REQUIRE(args->cache_dtype != MQC_I8 || (args->key_scale != nullptr && args->value_scale != nullptr),
              "mqc_rotary_cache: an int8 cache needs key_scale and value_scale");
  const int64_t kv = int64_t{args->kv_heads} * args->head_dim;
  MQC_REQUIRE(args->k_stride >= kv && args->v_stride >= kv &&
                  (args->q == nullptr || args->q_stride >= int64_t{args->q_heads} * args->head_dim),
              "mqc_rotary_cache: a stride is below the heads");
  return MQC_OK;
}

}  // namespace

extern "C" int mqc_rotary_cache(const mqc_rotary_args* args, void* stream) {
  MQC_CHECK(check(args));
  const int64_t rows = int64_t{args->batch} * args->tokens;
  if (rows == 0) return MQC_OK;
  Device device;
  MQC_CHECK(current_device(device));
  const bool turns = args->rotary != MQC_ROTARY_NONE;
  const RotaryParams p{turns ? args->q : nullptr,  // queries that do not turn stay as they are
                       args->k, args->v, args->cos, args->sin, args->past, args->key_cache, args->value_cache,
                       args->key_scale, args->value_scale, args->capacity, args->q_stride, args->k_stride,
                       args->v_stride, args->tokens, args->q_heads, args->kv_heads, args->head_dim, args->rotary_dim,
                       args->rotary == MQC_ROTARY_INTERLEAVED};
  return by_float_type(args->dtype, "mqc_rotary_cache", [&](auto zero) {
    using T = decltype(zero);
    const auto run = [&](auto kernel) {
      return launch("rotary_cache", kernel, Grid{rows}, kRotaryWarps * 32, kRotaryWarps * kMaxHeadDim * 4, stream, p);
    };
    const bool wide_table = turns && args->table_dtype == MQC_F32;
    if (args->cache_dtype == MQC_I8)
      return wide_table ? run(rotary_kernel<T, int8_t, float>) : run(rotary_kernel<T, int8_t, T>);
    return wide_table ? run(rotary_kernel<T, T, float>) : run(rotary_kernel<T, T, T>);
  });
}

extern "C" int mqc_rotate(const mqc_rotate_args* args, void* stream) {
  MQC_REQUIRE(args != nullptr, "mqc_rotate: args is NULL");
  MQC_CHECK(check_size(args->size, sizeof(mqc_rotate_args), "mqc_rotate_args"));
  MQC_REQUIRE(args->rows >= 0 && args->rows < int64_t{1} << 31 && args->heads > 0 && args->angle_rows > 0,
              "mqc_rotate: %lld rows, %d heads, %lld rows of angles", static_cast<long long>(args->rows), args->heads,
              static_cast<long long>(args->angle_rows));
  if (args->rows == 0) return MQC_OK;
  MQC_REQUIRE(args->rotary == MQC_ROTARY_HALF || args->rotary == MQC_ROTARY_INTERLEAVED,
              "mqc_rotate: rotary %d is not half or interleaved", args->rotary);
  MQC_REQUIRE(args->head_dim > 0 && args->head_dim <= kMaxHeadDim, "mqc_rotate: head_dim %d, at most %d",
              args->head_dim, kMaxHeadDim);
  MQC_REQUIRE(args->rotary_dim > 0 && args->rotary_dim % 2 == 0 && args->rotary_dim <= args->head_dim,
              "mqc_rotate: rotary_dim %d of head_dim %d", args->rotary_dim, args->head_dim);
  MQC_REQUIRE(args->table_dtype == args->dtype || args->table_dtype == MQC_F32,
              "mqc_rotate: cos and sin have the dtype of x or f32");
  MQC_REQUIRE(args->x != nullptr && args->y != nullptr && args->cos != nullptr && args->sin != nullptr,
              "mqc_rotate: x, y, cos or sin is NULL");
  const int64_t width = int64_t{args->heads} * args->head_dim;
  MQC_REQUIRE(args->x_stride >= width && args->y_stride >= width, "mqc_rotate: a stride is below the heads");
  Device device;
  MQC_CHECK(current_device(device));
  const RotateParams p{args->x, args->y, args->cos, args->sin, args->x_stride, args->y_stride, args->angle_rows,
                       args->heads, args->head_dim, args->rotary_dim, args->rotary == MQC_ROTARY_INTERLEAVED};
  return by_float_type(args->dtype, "mqc_rotate", [&](auto zero) {
    using T = decltype(zero);
    const auto run = [&](auto kernel) {
      return launch("rotate", kernel, Grid{args->rows}, kRotaryWarps * 32, kRotaryWarps * kMaxHeadDim * 4, stream, p);
    };
    return args->table_dtype == MQC_F32 ? run(rotate_kernel<T, float>) : run(rotate_kernel<T, T>);
  });
}
