// The k largest values of each row. A value and its column make one 64-bit key, so that all keys of
// a row differ and the next of the k is "the largest key below the last one".
#pragma once

#include "mqc/gpu.cuh"

namespace mqc {

struct TopKParams {
  const void* x;
  float* values;       // or null
  int64_t* indices;
  uint64_t* partial;   // [rows][chunks][k]
  uint32_t* counters;  // [rows]
  int64_t x_stride;
  int32_t columns, k, chunks;
};

constexpr int kTopKThreads = 256;

// Larger values, and among equals lower columns, give larger keys; NaN the largest; never 0.
MQC_HD uint64_t order_key(float value, int column) {
  uint32_t bits = float_bits(value == 0.0f ? 0.0f : value);
  bits = value != value ? 0xFFFFFFFFu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(bits) << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(column));
}
MQC_HD int key_column(uint64_t key) { return static_cast<int>(0xFFFFFFFFu - static_cast<uint32_t>(key)); }

// Largest of a block's keys, in every thread; `shared`: 8 keys.
MQC_D uint64_t block_largest(uint64_t key, uint64_t* shared, int thread) {
  MQC_UNROLL
  for (int mask = 16; mask > 0; mask >>= 1) {
    const uint64_t other = gpu::shuffle_xor(key, mask);
    if (other > key) key = other;
  }
  gpu::sync_block();  // the keys of the round before were read
  if (thread % 32 == 0) shared[thread / 32] = key;
  gpu::sync_block();
  key = shared[0];
  MQC_UNROLL
  for (int warp = 1; warp < kTopKThreads / 32; ++warp)
    if (shared[warp] > key) key = shared[warp];
  return key;
}

// Grid: (chunks, rows). Shared memory: 8 keys and a flag.
template <class T> MQC_KERNEL(kTopKThreads, 2) top_k_kernel(MQC_GRID_CONSTANT TopKParams p) {
  const int thread = gpu::thread_index(), chunk = gpu::block_x();
  const int64_t row = gpu::block_y();
  auto* shared = reinterpret_cast<uint64_t*>(gpu::shared_memory());
  auto* flag = reinterpret_cast<uint32_t*>(shared + kTopKThreads / 32);
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const auto finish = [&](int rank, uint64_t key) {
    const int column = key_column(key);
    p.indices[row * p.k + rank] = column;
    if (p.values != nullptr) p.values[row * p.k + rank] = to_float(x[column]);
  };
  const int begin = static_cast<int>(static_cast<int64_t>(p.columns) * chunk / p.chunks);
  const int end = static_cast<int>(static_cast<int64_t>(p.columns) * (chunk + 1) / p.chunks);
  uint64_t* candidates = p.partial + row * p.chunks * p.k;
  uint64_t last = ~uint64_t{0};  // above every key: columns are below 2^31
  for (int rank = 0; rank < p.k; ++rank) {
    uint64_t best = 0;
    for (int column = begin + thread; column < end; column += kTopKThreads) {
      const uint64_t key = order_key(to_float(x[column]), column);
      if (key < last && key > best) best = key;
    }
    last = block_largest(best, shared, thread);
    if (thread == 0) {
      if (p.chunks == 1) finish(rank, last);
      else gpu::store_l2(candidates + chunk * p.k + rank, last);
    }
  }
  if (p.chunks == 1) return;
  gpu::fence_device();  // the candidates before the count
  gpu::sync_block();
  if (thread == 0) {
    const uint32_t before = gpu::atomic_add(p.counters + row, 1u);
    *flag = before + 1 == static_cast<uint32_t>(p.chunks) ? 1u : 0u;
    if (*flag) p.counters[row] = 0;
  }
  gpu::sync_block();
  if (*flag == 0) return;
  gpu::fence_device();  // the count before the others' candidates
  last = ~uint64_t{0};
  for (int rank = 0; rank < p.k; ++rank) {
    uint64_t best = 0;
    for (int i = thread; i < p.chunks * p.k; i += kTopKThreads) {
      const uint64_t key = gpu::load_l2(candidates + i);
      if (key < last && key > best) best = key;
    }
    last = block_largest(best, shared, thread);
    if (thread == 0) finish(rank, last);
  }
}

}  // namespace mqc
