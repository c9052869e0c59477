// wgmma: register fragments, shared-memory descriptors, and the swizzle they share with TMA.
#include "mqc/gpu.cuh"

// CuTe's device conversion of a pointer to an address of shared memory, here the emulator's.
static size_t __cvta_generic_to_shared(const void* pointer) { return mqc::gpu::shared_address(pointer); }
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1

#include <cute/arch/mma_sm90.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "mqc/layout.cuh"
#include "mqc/linear_wgmma.cuh"
#include "witness.h"

#include <cstring>
#include <type_traits>

namespace {

using namespace cute;

constexpr int kM = 64, kK = mqc::kStepInputs, kTileK = mqc::kTileInputs;

// The instruction that CUTLASS picks for A in registers and N columns.
template <int kN>
using Operation = decltype(SM90::GMMA::rs_op_selector<int8_t, int8_t, int32_t, Shape<Int<kM>, Int<kN>, Int<kK>>>());
template <int kN> using Traits = MMA_Traits<Operation<kN>>;
static_assert(std::is_same_v<Operation<128>, SM90::GMMA::MMA_64x128x32_S32S8S8_RS_TN>);
static_assert(std::is_same_v<Operation<64>, SM90::GMMA::MMA_64x64x32_S32S8S8_RS_TN>);

template <class Layout> int element(Layout, int thread, int value) {
  return static_cast<int>(Layout{}(make_coord(thread, value)));
}

// A stage's tokens in shared memory as CUTLASS lays them out: [tokens, 128] int8, K-major, 128-byte swizzle.
template <int kTokens> auto stage_layout() {
  return tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<int8_t>{}, Shape<Int<kTokens>, Int<kTileK>>{});
}
template <int kTokens> auto stage_tensor(uint8_t* at) {
  return make_tensor(make_smem_ptr(reinterpret_cast<int8_t*>(at)), stage_layout<kTokens>());
}

// CuTe's descriptor of columns kN * block .. and inputs 32 * step .. of a stage.
template <int kN, int kTokens> uint64_t descriptor(uint8_t* stage, int block, int step) {
  auto tensor = stage_tensor<kTokens>(stage);
  auto slice = make_tiled_mma(Operation<kN>{}).get_slice(0);
  auto fragment = slice.make_fragment_B(slice.partition_B(tensor));  // (1, blocks, steps)
  static_assert(decltype(size<1>(fragment))::value == kTokens / kN && decltype(size<2>(fragment))::value == 4);
  return fragment(_, block, step).data().desc_;
}

// First stage of a block, as the kernel aligns it.
uint8_t* first_stage() {
  uint8_t* shared = mqc::gpu::shared_memory();
  const uint32_t address = mqc::gpu::shared_address(shared);
  return shared + (((address + 1023u) & ~1023u) - address);
}

struct Operands {
  int8_t left[kM][kTileK], right[128][kTileK];
  explicit Operands(uint64_t seed, bool int4 = false) {
    for (auto& row : left)
      for (int8_t& v : row) v = static_cast<int8_t>(int4 ? (witness::random_bits(seed) & 15) - 8 : witness::random_int8(seed));
    for (auto& row : right)
      for (int8_t& v : row) v = witness::random_int8(seed);
  }
  int product(int m, int n, int begin, int end) const {
    int sum = 0;
    for (int k = begin; k < end; ++k) sum += left[m][k] * right[n][k];
    return sum;
  }
  void place(uint8_t* stage) const {
    auto tensor = stage_tensor<128>(stage);
    for (int n = 0; n < 128; ++n)
      for (int k = 0; k < kTileK; ++k) tensor(n, k) = right[n][k];
  }
  // Fragment of a step, by CuTe's layout.
  void fragment(uint32_t (&a)[4], int thread, int step) const {
    using Layout = typename Traits<128>::ALayout;
    static_assert(std::is_same_v<Layout, typename Traits<64>::ALayout>);
    for (uint32_t& word : a) word = 0;
    for (int v = 0; v < 16; ++v) {
      const int index = element(Layout{}, thread, v);
      const auto byte = static_cast<uint8_t>(left[index % kM][index / kM + step * kK]);
      a[v / 4] |= static_cast<uint32_t>(byte) << (8 * (v % 4));
    }
  }
};

template <int kN> void check_sums(const Operands& operands, const int32_t (&got)[128][kN / 2], int first, int end) {
  static_assert(decltype(size<1>(typename Traits<kN>::CLayout{}))::value == kN / 2);
  for (int thread = 0; thread < 128; ++thread)
    for (int v = 0; v < kN / 2; ++v) {
      const int index = element(typename Traits<kN>::CLayout{}, thread, v);
      SAME(got[thread][v], operands.product(index % kM, first + index / kM, 0, end), "sum of an emulated wgmma");
    }
}

}  // namespace

// Descriptors of every stage of every kernel, all bits: the kernel's first one and its steps.
template <class Format> static void check_descriptors() {
  using Kernel = mqc::WgmmaShape<Format>;
  for (int stage = 0; stage < Kernel::kStages; ++stage) {
    uint8_t* at = first_stage() + stage * Kernel::kStageBytes;
    const uint64_t ours = mqc::swizzle128_descriptor(mqc::gpu::shared_address(at));
    for (int step = 0; step < mqc::kStepsPerTile; ++step) {
      SAME(ours + 2 * step, (descriptor<128, Kernel::kTokens>(at, 0, step)), "descriptor of 128 tokens");
      for (int half = 0; half < 2; ++half)
        SAME(ours + half * (64 * 128 >> 4) + 2 * step, (descriptor<64, Kernel::kTokens>(at, half, step)),
             "descriptor of 64 tokens");
    }
  }
  // Bytes that the producer announces for the tokens, as CUTLASS counts a stage.
  SAME(Kernel::kTokenBytes, (cosize(stage_layout<Kernel::kTokens>())), "bytes of a stage's tokens");
}

CASE(descriptors) {
  check_descriptors<mqc::W4>();
  check_descriptors<mqc::W8>();
  check_descriptors<mqc::W4Grouped<32>>();
  check_descriptors<mqc::W4Grouped<64>>();
  check_descriptors<mqc::W4Grouped<128>>();
}

CASE(layout_of_wgmma) {
  for (int thread = 0; thread < 128; ++thread) {
    for (int v = 0; v < 16; ++v) {
      const int index = element(typename Traits<128>::ALayout{}, thread, v);
      SAME(mqc::fragment_row(thread, v / 4), index % kM, "fragment_row");
      SAME(mqc::fragment_input(thread, v / 4, v % 4), index / kM, "fragment_input");
    }
    // The epilogue takes groups of four sums as accumulators of 16 x 8 products of the warp.
    for (int v = 0; v < 64; ++v) {
      const int index = element(typename Traits<128>::CLayout{}, thread, v);
      SAME(16 * (thread / 32) + mqc::accumulator_row(thread % 32, v % 4), index % kM, "row of a sum");
      SAME(8 * (v / 4) + mqc::accumulator_column(thread % 32, v % 4), index / kM, "column of a sum");
    }
  }
}

CASE(wgmma_128_tokens) {
  const Operands operands(11);
  static int32_t got[128][64];
  mqc::emulator::configure(11, 2);
  mqc::emulator::launch({1, 1, 1}, 128, 32768, [&] {
    const int thread = mqc::gpu::thread_index();
    uint8_t* stage = first_stage();
    if (thread == 0) operands.place(stage);
    mqc::gpu::sync_block();
    uint32_t a[4][4];
    int32_t sums[64] = {};
    for (int step = 0; step < 4; ++step) operands.fragment(a[step], thread, step);
    mqc::gpu::wgmma_fence();
    for (int step = 0; step < 4; ++step) mqc::gpu::wgmma_s8(sums, a[step], descriptor<128, 128>(stage, 0, step));
    mqc::gpu::wgmma_commit();
    mqc::gpu::wgmma_wait<0>();
    std::memcpy(got[thread], sums, sizeof sums);
  });
  check_sums<128>(operands, got, 0, kTileK);
}

// The one statement of several steps: it advances the descriptor itself.
template <int kSteps> static void check_steps(int half) {
  const Operands operands(20 + kSteps);
  static int32_t got[128][32];
  mqc::emulator::launch({1, 1, 1}, 128, 32768, [&] {
    const int thread = mqc::gpu::thread_index();
    uint8_t* stage = first_stage();
    if (thread == 0) operands.place(stage);
    mqc::gpu::sync_block();
    uint32_t a[kSteps][4];
    int32_t sums[32];
    for (int32_t& sum : sums) sum = 77;  // not read
    for (int step = 0; step < kSteps; ++step) operands.fragment(a[step], thread, step);
    mqc::gpu::wgmma_fence();
    mqc::gpu::wgmma_s8<kSteps>(sums, a, descriptor<64, 128>(stage, half, 0));
    mqc::gpu::wgmma_commit();
    mqc::gpu::wgmma_wait<0>();
    std::memcpy(got[thread], sums, sizeof sums);
  });
  check_sums<64>(operands, got, 64 * half, kSteps * kK);
}

CASE(wgmma_64_tokens) {
  for (int half = 0; half < 2; ++half) {
    check_steps<1>(half);
    check_steps<2>(half);
    check_steps<4>(half);
  }
}

// The kernel's own function for scales by group, on packed weights and tokens that CuTe's layouts place.
template <int kGroup> static void check_groups() {
  using Format = mqc::W4Grouped<kGroup>;
  const Operands operands(30 + kGroup, true);
  static float got[128][64];
  mqc::emulator::launch({1, 1, 1}, 128, 65536, [&] {
    const int thread = mqc::gpu::thread_index();
    uint8_t* stage = first_stage();
    uint8_t* tile = stage + mqc::WgmmaShape<Format>::kTokenBytes;
    if (thread == 0) operands.place(stage);
    for (int step = 0; step < 4; ++step) {
      uint32_t a[4];
      operands.fragment(a, thread, step);
      for (int word = 0; word < 2; ++word) {  // registers 2 word (low nibbles) and 2 word + 1 (high)
        const uint32_t packed = (a[2 * word] & 0x0F0F0F0Fu) | (a[2 * word + 1] & 0x0F0F0F0Fu) << 4;
        std::memcpy(tile + mqc::packed_vector(step / 2, thread) + (step % 2 * 2 + word) * 4, &packed, 4);
      }
    }
    for (int group = 0; group < kTileK / kGroup; ++group)
      for (int channel = thread; channel < 64; channel += 128) {
        const auto scale = static_cast<float>(1 << ((group + channel) % 3));  // sums stay exact
        std::memcpy(tile + mqc::packed_scale<Format>(group, channel), &scale, 4);
      }
    mqc::gpu::sync_block();
    float sums[64] = {};
    int32_t group_sums[32] = {};
    mqc::wgmma_add_groups<Format>(sums, group_sums, mqc::swizzle128_descriptor(mqc::gpu::shared_address(stage)),
                                  mqc::gpu::shared_address(tile), thread);
    std::memcpy(got[thread], sums, sizeof sums);
  });
  for (int thread = 0; thread < 128; ++thread)
    for (int v = 0; v < 64; ++v) {
      const int index = element(typename Traits<128>::CLayout{}, thread, v), m = index % kM;
      int64_t want = 0;
      for (int group = 0; group < kTileK / kGroup; ++group)
        want += int64_t{16 << ((group + m) % 3)} *
                operands.product(m, index / kM, group * kGroup, (group + 1) * kGroup);
      SAME(static_cast<int64_t>(got[thread][v]), want, "sum of groups");
    }
}

CASE(groups_of_a_tile) {
  check_groups<32>();
  check_groups<64>();
  check_groups<128>();
}

CASE(swizzle) {
  const Swizzle<3, 4, 3> theirs;
  const auto layout = stage_layout<128>();
  for (int row = 0; row < 128; ++row)
    for (int chunk = 0; chunk < 8; ++chunk) {
      SAME(mqc::swizzled_chunk(row, chunk), theirs(row * 128 + chunk * 16), "swizzled_chunk");
      SAME(mqc::swizzled_chunk(row, chunk), layout(row, chunk * 16), "place of a chunk in a stage");
    }
}

// The box that the emulator's TMA writes, at each stage of a kernel.
CASE(swizzled_box) {
  constexpr int kRows = 128;
  using Kernel = mqc::WgmmaShape<mqc::W4>;
  static int8_t rows[kRows][144];
  uint64_t seed = 5;
  for (auto& row : rows)
    for (int8_t& v : row) v = witness::random_int8(seed);
  mqc::gpu::TensorMap map{reinterpret_cast<const uint8_t*>(rows), 136, 100, 144, 128, kRows};  // 100 rows of 136
  mqc::emulator::launch({1, 1, 1}, 32, Kernel::kSharedBytes, [&] {
    uint8_t* stage = first_stage() + 3 * Kernel::kStageBytes;
    const uint32_t barrier = mqc::gpu::shared_address(first_stage());
    if (mqc::gpu::thread_index() == 0) {
      mqc::gpu::barrier_init(barrier, 1);
      mqc::gpu::barrier_init_fence();
      mqc::gpu::barrier_expect(barrier, Kernel::kTokenBytes);
      mqc::gpu::copy_tensor(mqc::gpu::shared_address(stage), &map, 16, 4, barrier);
    }
    mqc::gpu::sync_warp();
    mqc::gpu::barrier_wait(barrier, 0);
    if (mqc::gpu::thread_index() != 0) return;
    auto tensor = stage_tensor<kRows>(stage);
    for (int row = 0; row < kRows; ++row)
      for (int column = 0; column < 128; ++column) {
        const bool inside = row + 4 < 100 && column + 16 < 136;
        SAME(stage[mqc::swizzled_chunk(row, column / 16) + column % 16],
             static_cast<uint8_t>(inside ? rows[row + 4][column + 16] : 0), "our view of the box");
        SAME(static_cast<uint8_t>(tensor(row, column)), static_cast<uint8_t>(inside ? rows[row + 4][column + 16] : 0),
             "CuTe's view of the box");
      }
  });
}
