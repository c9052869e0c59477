// Instructions of Hopper (sm_90a): mbarrier, bulk copies, wgmma. Included by gpu.cuh.
#pragma once

#include "mqc/base.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MQC_SM90A 1
#else
#define MQC_SM90A 0
#endif

#if MQC_SM90A

namespace mqc::gpu {

// ---- mbarrier ----------------------------------------------------------------------------------
MQC_D void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the bulk-copy engine; a block barrier must follow.
MQC_D void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
MQC_D void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives and adds `bytes` to what the phase waits for.
MQC_D void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits until the phase of this parity has completed. A new barrier counts as having completed a
// phase of parity 1.
MQC_D void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (done == 0);
}

// ---- bulk copies to shared memory, completing on an mbarrier -----------------------------------
// A box of a two-dimensional tensor; x is the coordinate of the contiguous axis.
MQC_D void copy_tensor(uint32_t shared, const TensorMap* map, int x, int y, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}
// Contiguous bytes, a multiple of 16, both ends 16-byte aligned.
MQC_D void copy_bulk(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(barrier)
      : "memory");
}
MQC_D void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// ---- warpgroup matrix instructions -------------------------------------------------------------
template <int kRegisters> MQC_D void registers_release() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters> MQC_D void registers_claim() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
// Orders register accesses before the wgmma instructions that follow.
MQC_D void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
MQC_D void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending> MQC_D void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accesses of an accumulator over a wait.
template <int kCount> MQC_D void wgmma_hold(int32_t (&d)[kCount]) {
  MQC_UNROLL
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// d += a . b, 64 x 128 x 32: a from registers, b [128, 32] in shared memory by descriptor.
MQC_D void wgmma_s8(int32_t (&d)[64], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "
      "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, {%64, %65, %66, %67}, %68, p;\n"
      "}"
      :
        "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]),
        "+r"(d[7]), "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]),
        "+r"(d[14]), "+r"(d[15]), "+r"(d[16]), "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]),
        "+r"(d[21]), "+r"(d[22]), "+r"(d[23]), "+r"(d[24]), "+r"(d[25]), "+r"(d[26]), "+r"(d[27]),
        "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31]), "+r"(d[32]), "+r"(d[33]), "+r"(d[34]),
        "+r"(d[35]), "+r"(d[36]), "+r"(d[37]), "+r"(d[38]), "+r"(d[39]), "+r"(d[40]), "+r"(d[41]),
        "+r"(d[42]), "+r"(d[43]), "+r"(d[44]), "+r"(d[45]), "+r"(d[46]), "+r"(d[47]), "+r"(d[48]),
        "+r"(d[49]), "+r"(d[50]), "+r"(d[51]), "+r"(d[52]), "+r"(d[53]), "+r"(d[54]), "+r"(d[55]),
        "+r"(d[56]), "+r"(d[57]), "+r"(d[58]), "+r"(d[59]), "+r"(d[60]), "+r"(d[61]), "+r"(d[62]),
        "+r"(d[63])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// d = the sum of a[s] . b of kSteps steps, 64 x 64 x 32 each; b advances by 32 bytes a step. One statement:
// nothing may come between products that share an accumulator.
#define MQC_WGMMA_64(a, b, add)                                                               \
  "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {"                                        \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "          \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {" a "}, " b ", p" add ";\n"
#define MQC_WGMMA_64_SUMS                                                                     \
  "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]),         \
  "+r"(d[7]), "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]),     \
  "+r"(d[14]), "+r"(d[15]), "+r"(d[16]), "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]),  \
  "+r"(d[21]), "+r"(d[22]), "+r"(d[23]), "+r"(d[24]), "+r"(d[25]), "+r"(d[26]), "+r"(d[27]),  \
  "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31])
#define MQC_WGMMA_64_STEP(s) "r"(a[s][0]), "r"(a[s][1]), "r"(a[s][2]), "r"(a[s][3]), "l"(b + 2 * (s))
template <int kSteps> MQC_D void wgmma_s8(int32_t (&d)[32], const uint32_t (*a)[4], uint64_t b) {
  static_assert(kSteps == 1 || kSteps == 2 || kSteps == 4, "steps of a group");
  if constexpr (kSteps == 1) {
    asm volatile(
        "{\n.reg .pred p0, p1;\nsetp.ne.b32 p0, 0, 0;\nsetp.ne.b32 p1, 1, 0;\n"
        MQC_WGMMA_64("%32, %33, %34, %35", "%36", "0")
        "}"
        : MQC_WGMMA_64_SUMS
        : MQC_WGMMA_64_STEP(0));
  } else if constexpr (kSteps == 2) {
    asm volatile(
        "{\n.reg .pred p0, p1;\nsetp.ne.b32 p0, 0, 0;\nsetp.ne.b32 p1, 1, 0;\n"
        MQC_WGMMA_64("%32, %33, %34, %35", "%36", "0")
        MQC_WGMMA_64("%37, %38, %39, %40", "%41", "1")
        "}"
        : MQC_WGMMA_64_SUMS
        : MQC_WGMMA_64_STEP(0), MQC_WGMMA_64_STEP(1));
  } else {
    asm volatile(
        "{\n.reg .pred p0, p1;\nsetp.ne.b32 p0, 0, 0;\nsetp.ne.b32 p1, 1, 0;\n"
        MQC_WGMMA_64("%32, %33, %34, %35", "%36", "0")
        MQC_WGMMA_64("%37, %38, %39, %40", "%41", "1")
        MQC_WGMMA_64("%42, %43, %44, %45", "%46", "1")
        MQC_WGMMA_64("%47, %48, %49, %50", "%51", "1")
        "}"
        : MQC_WGMMA_64_SUMS
        : MQC_WGMMA_64_STEP(0), MQC_WGMMA_64_STEP(1), MQC_WGMMA_64_STEP(2), MQC_WGMMA_64_STEP(3));
  }
}
#undef MQC_WGMMA_64
#undef MQC_WGMMA_64_SUMS
#undef MQC_WGMMA_64_STEP

}  // namespace mqc::gpu

#endif
