// The instructions kernels are written with: one thin function each, nothing else. In the CPU tests
// the same names come from an emulator that runs a block's threads as fibers (tests/cuda/emulator).
#pragma once

#include "mqc/base.cuh"

namespace mqc::gpu {

struct alignas(16) Vector16 {
  uint32_t word[4];
};

}  // namespace mqc::gpu

#if defined(MQC_EMULATE)
#include "emulator.h"
#else

#include <cuda.h>
#include <cuda_runtime.h>

#define MQC_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define MQC_GRID_CONSTANT const __grid_constant__

namespace mqc::gpu {

using TensorMap = CUtensorMap;

MQC_D int thread_index() { return static_cast<int>(threadIdx.x); }
MQC_D int block_x() { return static_cast<int>(blockIdx.x); }
MQC_D int block_y() { return static_cast<int>(blockIdx.y); }
MQC_D int block_z() { return static_cast<int>(blockIdx.z); }
MQC_D int blocks_x() { return static_cast<int>(gridDim.x); }

MQC_D uint8_t* shared_memory() {
  extern __shared__ __align__(1024) uint8_t mqc_shared[];
  return mqc_shared;
}
MQC_D uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- barriers, fences, atomics, shuffles -------------------------------------------------------
MQC_D void sync_block() { __syncthreads(); }
MQC_D void sync_warp() { __syncwarp(); }
MQC_D void sync_named(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Keeps the compiler from moving memory accesses over this point (to hold fewer values at once).
MQC_D void fence_compiler() { asm volatile("" ::: "memory"); }
MQC_D void fence_device() { __threadfence(); }
MQC_D uint32_t atomic_add(uint32_t* address, uint32_t value) { return atomicAdd(address, value); }
template <class T> MQC_D T shuffle_xor(T value, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, value, mask); }
template <class T> MQC_D T shuffle(T value, int lane) { return __shfl_sync(0xFFFFFFFFu, value, lane); }
// Whether the value is true in any lane of the warp.
MQC_D bool any_lane(bool value) { return __any_sync(0xFFFFFFFFu, value) != 0; }

// ---- memory ------------------------------------------------------------------------------------
MQC_D Vector16 load16(const void* global) {
  Vector16 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(__cvta_generic_to_global(global))
               : "memory");
  return v;
}
MQC_D void store16(void* global, const Vector16& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(global)),
               "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}
// Past the first-level cache: for values other blocks of this launch wrote.
template <class T> MQC_D T load_l2(const T* global) { return __ldcg(global); }
template <class T> MQC_D void store_l2(T* global, T value) { __stcg(global, value); }

MQC_D Vector16 load_shared16(uint32_t address) {
  Vector16 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "r"(address)
               : "memory");
  return v;
}

MQC_D void load_shared8(uint32_t (&r)[2], uint32_t address) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
}

MQC_D float load_shared_float(uint32_t address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

// 16 bytes from global to shared memory; zeros where not valid (the source is then not read).
MQC_D void copy_async16(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared),
               "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
}
// The first `bytes` of 16, and zeros behind them (0: the source is not read). Both ends are 16-byte aligned.
MQC_D void copy_async_part(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared),
               "l"(__cvta_generic_to_global(global)), "r"(bytes)
               : "memory");
}
MQC_D void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending> MQC_D void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- matrix instructions of a warp -------------------------------------------------------------
MQC_D void load_matrix4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
MQC_D void load_matrix4_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
// d += a . b, 16 x 8 x 32, int8 to int32.
MQC_D void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// d = a . b, for the first product of a sum.
MQC_D void mma_s8_first(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(0));
}
// d += a . b, 16 x 8 x 16, T = bf16 or f16 to float32.
template <class T> MQC_D void mma_half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <> MQC_D void mma_half<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> MQC_D void mma_half<f16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace mqc::gpu

#include "mqc/hopper.cuh"

#endif
