// A CUDA block on the CPU: every thread is a fiber, scheduled in random order, and the functions of
// mqc/gpu.cuh act as the PTX manual says the instructions do. Asynchronous operations (cp.async, bulk
// copies, wgmma) happen as early or as late as the manual allows, by the seed, so that a missing
// wait shows as a wrong result; waits that can never end are reported as a deadlock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#define MQC_KERNEL(threads, blocks) void
#define MQC_GRID_CONSTANT const
#define MQC_SM90A 1

namespace mqc::gpu {

// What cuTensorMapEncodeTiled describes, for two dimensions and 128-byte swizzle.
struct TensorMap {
  const uint8_t* base = nullptr;
  uint64_t columns = 0, rows = 0, stride = 0;
  uint32_t box_columns = 0, box_rows = 0;
};

int thread_index();
int block_x();
int block_y();
int block_z();
int blocks_x();

uint8_t* shared_memory();
uint32_t shared_address(const void* pointer);

void sync_block();
void sync_warp();
void sync_named(int id, int threads);
inline void fence_device() {}
inline void fence_compiler() {}
uint32_t atomic_add(uint32_t* address, uint32_t value);

// Exchanges up to 8 bytes between the lanes of a warp.
void shuffle_bytes(void* value, size_t bytes, int source);
int lane_index();
template <class T> T shuffle_xor(T value, int mask) {
  shuffle_bytes(&value, sizeof(T), lane_index() ^ mask);
  return value;
}
template <class T> T shuffle(T value, int lane) {
  shuffle_bytes(&value, sizeof(T), lane);
  return value;
}
bool any_lane(bool value);

[[noreturn]] void misaligned();
inline Vector16 load16(const void* global) {
  if (reinterpret_cast<uintptr_t>(global) % 16) misaligned();
  Vector16 v;
  memcpy(&v, global, 16);
  return v;
}
inline void store16(void* global, const Vector16& v) {
  if (reinterpret_cast<uintptr_t>(global) % 16) misaligned();
  memcpy(global, &v, 16);
}
template <class T> T load_l2(const T* global) { return *global; }
template <class T> void store_l2(T* global, T value) { *global = value; }
Vector16 load_shared16(uint32_t address);
void load_shared8(uint32_t (&r)[2], uint32_t address);
float load_shared_float(uint32_t address);

void copy_async_part(uint32_t shared, const void* global, int bytes);
inline void copy_async16(uint32_t shared, const void* global, bool valid) {
  copy_async_part(shared, global, valid ? 16 : 0);
}
void copy_async_commit();
void copy_async_wait_groups(int pending);
template <int kPending> void copy_async_wait() { copy_async_wait_groups(kPending); }

void load_matrix4(uint32_t (&r)[4], uint32_t address);
void load_matrix4_transposed(uint32_t (&r)[4], uint32_t address);
void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
inline void mma_s8_first(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  for (int32_t& value : d) value = 0;
  mma_s8(d, a, b0, b1);
}
void mma_half_any(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool is_bf16);
template <class T> void mma_half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_half_any(d, a, b0, b1, std::is_same_v<T, bf16>);
}

void barrier_init(uint32_t barrier, uint32_t arrivals);
void barrier_init_fence();
void barrier_arrive(uint32_t barrier);
void barrier_expect(uint32_t barrier, uint32_t bytes);
void barrier_wait(uint32_t barrier, uint32_t parity);
void copy_tensor(uint32_t shared, const TensorMap* map, int x, int y, uint32_t barrier);
void copy_bulk(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier);
inline void prefetch_tensor_map(const TensorMap*) {}
template <int kRegisters> void registers_release() {}
template <int kRegisters> void registers_claim() {}
void wgmma_fence();
void wgmma_commit();
void wgmma_wait_groups(int pending);
template <int kPending> void wgmma_wait() { wgmma_wait_groups(kPending); }
// d [tokens / 2]; tokens 64 or 128. Without `add` d is not read.
void wgmma_s8_any(int32_t* d, const uint32_t (&a)[4], uint64_t b, int tokens, bool add);
inline void wgmma_s8(int32_t (&d)[64], const uint32_t (&a)[4], uint64_t b) { wgmma_s8_any(d, a, b, 128, true); }
template <int kSteps> void wgmma_s8(int32_t (&d)[32], const uint32_t (*a)[4], uint64_t b) {
  for (int step = 0; step < kSteps; ++step) wgmma_s8_any(d, a[step], b + 2 * step, 64, step > 0);
}
template <int kCount> void wgmma_hold(int32_t (&)[kCount]) {}

}  // namespace mqc::gpu

namespace mqc::emulator {

struct Grid {
  int x, y, z;
};

// Runs `kernel` for every thread of every block, blocks one after another in random order. Grids that
// no device takes are refused.
void launch(Grid grid, int threads, size_t shared_bytes, const std::function<void()>& kernel);
// Seed of the schedule, and how asynchronous operations behave: 0 early, 1 late, 2 random. 3 runs no
// kernel: what launchers check and choose can be tested with addresses that lead nowhere.
void configure(uint64_t seed, int asynchrony);

}  // namespace mqc::emulator
