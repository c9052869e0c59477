// Matrix instructions of a warp: fragments of mma.sync and the matrices of ldmatrix.
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/layout.hpp>

#include "mqc/gpu.cuh"
#include "mqc/layout.cuh"
#include "witness.h"

#include <cstring>
#include <vector>

namespace {

using namespace cute;

using S8 = MMA_Traits<SM80_16x8x32_S32S8S8S32_TN>;
using Bf16 = MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>;
using F16 = MMA_Traits<SM80_16x8x16_F32F16F16F32_TN>;

// Column-major index of a value of a fragment, as CuTe numbers the elements of an operand.
template <class Layout> int element(Layout, int thread, int value) {
  return static_cast<int>(Layout{}(make_coord(thread, value)));
}

template <class Layout> constexpr int values_of = decltype(size<1>(Layout{}))::value;

// Runs a product of the emulator with operands dealt out by CuTe's layouts, and compares its sums, found
// by CuTe's layout, with the product itself. bits: what an operand's element is stored as.
template <class Traits, class Element, class Sum, class Bits, class Multiply>
void check_product(uint64_t seed, bool adds, Bits bits, Multiply multiply) {
  constexpr int kM = 16, kN = 8, kK = decltype(size<2>(typename Traits::Shape_MNK{}))::value;
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(Element));
  static_assert(decltype(size(typename Traits::ThrID{}))::value == 32, "a warp");
  static_assert(values_of<typename Traits::ALayout> == 4 * kPerWord, "four registers of A");
  static_assert(values_of<typename Traits::BLayout> == 2 * kPerWord, "two registers of B");
  static_assert(values_of<typename Traits::CLayout> == 4, "four sums");
  int left[kM * kK], right[kN * kK], start[kM * kN];
  for (int& v : left) v = witness::random_int8(seed);
  for (int& v : right) v = witness::random_int8(seed);
  for (int& v : start) v = witness::random_int8(seed);
  Sum got[32][4];
  mqc::emulator::configure(seed, 2);
  mqc::emulator::launch({1, 1, 1}, 32, 0, [&] {
    const int lane = mqc::gpu::thread_index();
    uint32_t a[4] = {}, b[2] = {};
    for (int v = 0; v < 4 * kPerWord; ++v)
      a[v / kPerWord] |= static_cast<uint32_t>(bits(left[element(typename Traits::ALayout{}, lane, v)]))
                         << (32 / kPerWord * (v % kPerWord));
    for (int v = 0; v < 2 * kPerWord; ++v)
      b[v / kPerWord] |= static_cast<uint32_t>(bits(right[element(typename Traits::BLayout{}, lane, v)]))
                         << (32 / kPerWord * (v % kPerWord));
    Sum d[4];
    for (int v = 0; v < 4; ++v) d[v] = static_cast<Sum>(start[element(typename Traits::CLayout{}, lane, v)]);
    multiply(d, a, b[0], b[1]);
    for (int v = 0; v < 4; ++v) got[lane][v] = d[v];
  });
  for (int lane = 0; lane < 32; ++lane)
    for (int v = 0; v < 4; ++v) {
      const int index = element(typename Traits::CLayout{}, lane, v), m = index % kM, n = index / kM;
      int want = adds ? start[index] : 0;
      for (int k = 0; k < kK; ++k) want += left[m + k * kM] * right[n + k * kN];
      SAME(static_cast<int>(got[lane][v]), want, "sum of an emulated product");
    }
}

uint8_t byte_bits(int value) { return static_cast<uint8_t>(value); }
template <class T> uint16_t half_bits(int value) { return mqc::from_float<T>(static_cast<float>(value)).bits; }

// The emulator's matrix load against the map of bits from source to destination.
template <class Traits, class Load> void check_matrix_load(Load load) {
  using Source = typename Traits::SrcLayout;
  using Target = typename Traits::DstLayout;
  static_assert(values_of<Source> == 128 && values_of<Target> == 128, "a row of 16 bytes, four registers");
  uint64_t seed = 7;
  std::vector<int> bit(32 * 128, -1);  // bits of the instruction, as the lanes' rows give them
  uint8_t rows[32][16];
  for (auto& row : rows)
    for (uint8_t& byte : row) byte = static_cast<uint8_t>(witness::random_bits(seed));
  for (int lane = 0; lane < 32; ++lane)
    for (int v = 0; v < 128; ++v) bit.at(element(Source{}, lane, v)) = rows[lane][v / 8] >> (v % 8) & 1;
  int place[32];  // rows lie anywhere
  for (int lane = 0; lane < 32; ++lane) place[lane] = (lane * 13 + 5) % 32;
  uint32_t got[32][4];
  mqc::emulator::launch({1, 1, 1}, 32, 2048, [&] {
    const int lane = mqc::gpu::thread_index();
    uint8_t* shared = mqc::gpu::shared_memory();
    std::memcpy(shared + 16 * place[lane], rows[lane], 16);
    mqc::gpu::sync_warp();
    load(got[lane], mqc::gpu::shared_address(shared + 16 * place[lane]));
  });
  for (int lane = 0; lane < 32; ++lane)
    for (int v = 0; v < 128; ++v)
      SAME(got[lane][v / 32] >> (v % 32) & 1, bit.at(element(Target{}, lane, v)), "a bit that ldmatrix loads");
}

}  // namespace

CASE(mma_s8) {
  check_product<S8, int8_t, int32_t>(1, true, byte_bits, [](auto& d, auto& a, uint32_t b0, uint32_t b1) {
    mqc::gpu::mma_s8(d, a, b0, b1);
  });
}

CASE(mma_s8_first) {
  check_product<S8, int8_t, int32_t>(2, false, byte_bits, [](auto& d, auto& a, uint32_t b0, uint32_t b1) {
    mqc::gpu::mma_s8_first(d, a, b0, b1);
  });
}

CASE(mma_bf16) {
  check_product<Bf16, uint16_t, float>(3, true, half_bits<mqc::bf16>, [](auto& d, auto& a, uint32_t b0, uint32_t b1) {
    mqc::gpu::mma_half<mqc::bf16>(d, a, b0, b1);
  });
}

CASE(mma_f16) {
  check_product<F16, uint16_t, float>(4, true, half_bits<mqc::f16>, [](auto& d, auto& a, uint32_t b0, uint32_t b1) {
    mqc::gpu::mma_half<mqc::f16>(d, a, b0, b1);
  });
}

// layout.cuh: the packed weights' fragments and the accumulators of a warp.
CASE(layout_of_mma) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int v = 0; v < 16; ++v) {
      const int index = element(S8::ALayout{}, lane, v);
      SAME(mqc::fragment_row(lane, v / 4), index % 16, "fragment_row");
      SAME(mqc::fragment_input(lane, v / 4, v % 4), index / 16, "fragment_input");
    }
    for (int v = 0; v < 4; ++v)
      for (const int index : {element(S8::CLayout{}, lane, v), element(Bf16::CLayout{}, lane, v),
                              element(F16::CLayout{}, lane, v)}) {
        SAME(mqc::accumulator_row(lane, v), index % 16, "accumulator_row");
        SAME(mqc::accumulator_column(lane, v), index / 16, "accumulator_column");
      }
  }
}

// Attention uses the sums of one product as the left operand of the next: accumulators of two blocks of 8
// columns, pairs packed in order, are a fragment of A.
CASE(sums_as_left_operand) {
  for (int lane = 0; lane < 32; ++lane)
    for (int v = 0; v < 8; ++v) {
      const int reg = v / 2;  // pack_pair(scores[reg / 2][2 * (reg % 2)], scores[reg / 2][2 * (reg % 2) + 1])
      const int sum = element(Bf16::CLayout{}, lane, 2 * (reg % 2) + v % 2);
      SAME(sum % 16 + 16 * (sum / 16 + 8 * (reg / 2)), element(Bf16::ALayout{}, lane, v), "element of A");
    }
}

CASE(ldmatrix) {
  check_matrix_load<Copy_Traits<SM75_U32x4_LDSM_N>>(
      [](auto& r, uint32_t address) { mqc::gpu::load_matrix4(r, address); });
}

CASE(ldmatrix_transposed) {
  check_matrix_load<Copy_Traits<SM75_U16x8_LDSM_T>>(
      [](auto& r, uint32_t address) { mqc::gpu::load_matrix4_transposed(r, address); });
}
