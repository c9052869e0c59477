// mqc_attention: checks, number of splits, launch.
#include "mqc/attention.cuh"
#include "runtime.h"

using namespace mqc;

namespace {

constexpr int kMaxSplits = 32;  // parts that one block merges
constexpr int kMaxHeadDim = 256;
constexpr double kLog2E = 1.4426950408889634;

struct Plan {
  bool tensor_cores = false;
  int64_t tiles = 0;  // of 16 rows, a key head
  int64_t blocks = 0; // without the split
  int splits = 1;
  int64_t bytes = 0;
};

int check(const mqc_attention_args* args) {
  MQC_REQUIRE(args != nullptr, "mqc_attention: args is NULL");
  MQC_CHECK(check_size(args->size, sizeof(mqc_attention_args), "mqc_attention_args"));
  MQC_REQUIRE(args->batch >= 0 && args->batch <= 65535 && args->tokens >= 0 && args->tokens <= 65535,
              "mqc_attention: batch %d, tokens %d, at most 65535 each", args->batch, args->tokens);
  MQC_REQUIRE(args->kv_heads > 0 && args->q_heads > 0 && args->q_heads % args->kv_heads == 0 && args->kv_heads <= 65535,
              "mqc_attention: %d query heads of %d key heads", args->q_heads, args->kv_heads);
  MQC_REQUIRE(args->head_dim > 0 && args->head_dim <= kMaxHeadDim, "mqc_attention: head_dim %d, at most %d",
              args->head_dim, kMaxHeadDim);
  MQC_REQUIRE(args->capacity > 0 && args->capacity < int64_t{1} << 30, "mqc_attention: capacity %lld",
              static_cast<long long>(args->capacity));
  MQC_REQUIRE(args->cache_dtype == args->dtype || args->cache_dtype == MQC_I8,
              "mqc_attention: the cache has the dtype of q or int8");
  MQC_REQUIRE(args->splits >= 0 && args->splits <= 1024, "mqc_attention: splits %d", args->splits);
  return MQC_OK;
}

bool half_head(int head_dim) { return head_dim == 64 || head_dim == 96 || head_dim == 128; }

int make_plan(const mqc_attention_args& args, const Device& device, Plan& plan) {
  const bool aligned = args.q_stride % 2 == 0 && reinterpret_cast<uintptr_t>(args.q) % 4 == 0 &&
                       aligned16(args.key_cache) && aligned16(args.value_cache);
  plan.tensor_cores = args.dtype != MQC_F32 && half_head(args.head_dim) && aligned;
  if (!plan.tensor_cores) return MQC_OK;
  plan.tiles = ceil_div(int64_t{args.tokens} * (args.q_heads / args.kv_heads), kAttentionRows);
  plan.blocks = plan.tiles * args.kv_heads * args.batch;
  if (plan.blocks == 0) return MQC_OK;
  plan.splits = args.splits;
  if (plan.splits == 0) {
    const int64_t fill = device.multiprocessors / plan.blocks, most = ceil_div(args.capacity, 2 * kAttentionKeys);
    int64_t splits = fill < most ? fill : most;
    if (splits > kMaxSplits) splits = kMaxSplits;
    plan.splits = splits < 1 ? 1 : static_cast<int>(splits);
  }
  if (plan.splits == 1) return MQC_OK;
  MQC_REQUIRE(plan.blocks <= kCounters, "mqc_attention: a split of %lld tiles, at most %d can share",
              static_cast<long long>(plan.blocks), kCounters);
  plan.bytes = kCounterBytes + plan.blocks * plan.splits * kAttentionRows * (args.head_dim + 2) * 4;
  return MQC_OK;
}

template <class T, class Cache> int launch_tensor_cores(const AttentionParams& p, const Plan& plan, int batch, void* stream) {
  const Grid grid{plan.tiles * plan.splits, p.kv_heads, batch};
  switch (p.head_dim) {
    case 64:
      return launch("attention", attention_kernel<T, Cache, 64>, grid, kAttentionThreads,
                    AttentionShape<T, Cache, 64>::kSharedBytes, stream, p);
    case 96:
      return launch("attention", attention_kernel<T, Cache, 96>, grid, kAttentionThreads,
                    AttentionShape<T, Cache, 96>::kSharedBytes, stream, p);
    default:
      return launch("attention", attention_kernel<T, Cache, 128>, grid, kAttentionThreads,
                    AttentionShape<T, Cache, 128>::kSharedBytes, stream, p);
  }
}

}  // namespace

extern "C" int mqc_attention_workspace(const mqc_attention_args* args, int64_t* bytes) {
  MQC_REQUIRE(bytes != nullptr, "mqc_attention_workspace: bytes is NULL");
  MQC_CHECK(check(args));
  Device device;
  MQC_CHECK(current_device(device));
  Plan plan;
  MQC_CHECK(make_plan(*args, device, plan));
  *bytes = plan.bytes;
  return MQC_OK;
}

extern "C" int mqc_attention(const mqc_attention_args* args, void* stream) {
  MQC_CHECK(check(args));
  if (args->batch == 0 || args->tokens == 0) return MQC_OK;
  MQC_REQUIRE(args->q != nullptr && args->key_cache != nullptr && args->value_cache != nullptr &&
                  args->past != nullptr && args->out != nullptr,
              "mqc_attention: q, a cache, past or out is NULL");
  MQC_REQUIRE(args->cache_dtype != MQC_I8 || (args->key_scale != nullptr && args->value_scale != nullptr),
              "mqc_attention: an int8 cache needs key_scale and value_scale");
  const int64_t width = int64_t{args->q_heads} * args->head_dim;
  MQC_REQUIRE(args->q_stride >= width && args->out_stride >= width, "mqc_attention: a stride is below the heads");
  Device device;
  MQC_CHECK(current_device(device));
  Plan plan;
  MQC_CHECK(make_plan(*args, device, plan));
  AttentionParams p{args->q, args->key_cache, args->value_cache, args->key_scale, args->value_scale, args->mask,
                    args->past, args->out, nullptr, nullptr, args->capacity, args->q_stride, args->out_stride,
                    args->mask_stride, static_cast<float>(args->scale * kLog2E), args->tokens, args->q_heads,
                    args->kv_heads, args->head_dim, plan.splits};
  if (plan.bytes > 0) {
    MQC_CHECK(check_workspace(args->workspace, args->workspace_bytes, plan.bytes));
    p.counters = static_cast<uint32_t*>(args->workspace);
    p.partial = reinterpret_cast<float*>(static_cast<uint8_t*>(args->workspace) + kCounterBytes);
  }
  const bool int8 = args->cache_dtype == MQC_I8;
  if (plan.tensor_cores) {
    if (args->dtype == MQC_BF16)
      return int8 ? launch_tensor_cores<bf16, int8_t>(p, plan, args->batch, stream)
                  : launch_tensor_cores<bf16, bf16>(p, plan, args->batch, stream);
    return int8 ? launch_tensor_cores<f16, int8_t>(p, plan, args->batch, stream)
                : launch_tensor_cores<f16, f16>(p, plan, args->batch, stream);
  }
  return by_float_type(args->dtype, "mqc_attention", [&](auto zero) {
    using T = decltype(zero);
    const Grid grid{args->q_heads, args->tokens, args->batch};
    const int64_t shared = int64_t{kAttentionWarps} * (args->head_dim + 2) * 4;
    if (int8)
      return launch("attention_plain", attention_plain_kernel<T, int8_t>, grid, kAttentionThreads, shared, stream, p);
    return launch("attention_plain", attention_plain_kernel<T, T>, grid, kAttentionThreads, shared, stream, p);
  });
}
