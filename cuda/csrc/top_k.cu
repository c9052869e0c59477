// mqc_top_k.
#include "mqc/top_k.cuh"
#include "runtime.h"

using namespace mqc;

namespace {

constexpr int kMaxK = 64;
constexpr int kMaxChunks = 64;
constexpr int kColumnsOfChunk = 2048;  // at least

int check(const mqc_top_k_args* args) {
  MQC_REQUIRE(args != nullptr, "mqc_top_k: args is NULL");
  MQC_CHECK(check_size(args->size, sizeof(mqc_top_k_args), "mqc_top_k_args"));
  MQC_REQUIRE(args->rows >= 0 && args->rows <= 65535, "mqc_top_k: %lld rows, at most 65535",
              static_cast<long long>(args->rows));
  MQC_REQUIRE(args->columns > 0 && args->columns < int64_t{1} << 31, "mqc_top_k: %lld columns",
              static_cast<long long>(args->columns));
  MQC_REQUIRE(args->k >= 1 && args->k <= kMaxK && args->k <= args->columns, "mqc_top_k: k is %d of %lld, 1..%d",
              args->k, static_cast<long long>(args->columns), kMaxK);
  return MQC_OK;
}

// Blocks a row: enough to fill the device, each with columns to look at.
int choose_chunks(const mqc_top_k_args& args, const Device& device) {
  if (args.rows == 0 || args.rows > kCounters) return 1;
  int64_t chunks = ceil_div(2 * device.multiprocessors, args.rows);
  const int64_t most = ceil_div(args.columns, kColumnsOfChunk);
  if (chunks > most) chunks = most;
  if (chunks > kMaxChunks) chunks = kMaxChunks;
  return static_cast<int>(chunks);
}

int64_t bytes_of(const mqc_top_k_args& args, int chunks) {
  return chunks > 1 ? kCounterBytes + args.rows * chunks * args.k * 8 : 0;
}

}  // namespace

extern "C" int mqc_top_k_workspace(const mqc_top_k_args* args, int64_t* bytes) {
  MQC_REQUIRE(bytes != nullptr, "mqc_top_k_workspace: bytes is NULL");
  MQC_CHECK(check(args));
  Device device;
  MQC_CHECK(current_device(device));
  *bytes = bytes_of(*args, choose_chunks(*args, device));
  return MQC_OK;
}

extern "C" int mqc_top_k(const mqc_top_k_args* args, void* stream) {
  MQC_CHECK(check(args));
  if (args->rows == 0) return MQC_OK;
  MQC_REQUIRE(args->x != nullptr && args->indices != nullptr, "mqc_top_k: x or indices is NULL");
  MQC_REQUIRE(args->x_stride >= args->columns, "mqc_top_k: x_stride is below the columns");
  Device device;
  MQC_CHECK(current_device(device));
  TopKParams p{args->x, args->values, args->indices, nullptr, nullptr, args->x_stride,
               static_cast<int32_t>(args->columns), args->k, choose_chunks(*args, device)};
  const int64_t bytes = bytes_of(*args, p.chunks);
  if (bytes > 0) {
    MQC_CHECK(check_workspace(args->workspace, args->workspace_bytes, bytes));
    p.counters = static_cast<uint32_t*>(args->workspace);
    p.partial = reinterpret_cast<uint64_t*>(static_cast<uint8_t*>(args->workspace) + kCounterBytes);
  }
  return by_float_type(args->dtype, "mqc_top_k", [&](auto zero) {
    using T = decltype(zero);
    return launch("top_k", top_k_kernel<T>, Grid{p.chunks, args->rows}, kTopKThreads, kTopKThreads / 32 * 8 + 16,
                  stream, p);
  });
}
