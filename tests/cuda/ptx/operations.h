// Handlers of operations that go lane by lane.
#pragma once

#include "machine.h"

#include <cstring>
#include <type_traits>

namespace ptx {

// A register holds its bits in the low end of 64, zeros above.
template <class T> T from_bits(uint64_t bits) {
  if constexpr (std::is_same_v<T, bool>) {
    return bits & 1;
  } else {
    T value;
    memcpy(&value, &bits, sizeof(T));
    return value;
  }
}
template <class T> uint64_t to_bits(T value) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T, class R, class F> void run_unary(Block&, Warp& w, const Instruction& i, uint32_t active) {
  const Lanes& a = w.lanes(i.operands[1]);
  Lanes result;
  for (size_t lane = 0; lane < kLanes; ++lane) result[lane] = to_bits<R>(F{}(from_bits<T>(a[lane])));
  store(w, i.operands[0].slot, result, active, w.validity(i.operands[1]));
}
template <class T, class S, class R, class F> void run_binary(Block&, Warp& w, const Instruction& i, uint32_t active) {
  const Lanes& a = w.lanes(i.operands[1]);
  const Lanes& b = w.lanes(i.operands[2]);
  Lanes result;
  for (size_t lane = 0; lane < kLanes; ++lane)
    result[lane] = to_bits<R>(F{}(from_bits<T>(a[lane]), from_bits<S>(b[lane])));
  store(w, i.operands[0].slot, result, active, w.validity(i.operands[1]) & w.validity(i.operands[2]));
}
template <class T, class F> void run_ternary(Block&, Warp& w, const Instruction& i, uint32_t active) {
  const Lanes& a = w.lanes(i.operands[1]);
  const Lanes& b = w.lanes(i.operands[2]);
  const Lanes& c = w.lanes(i.operands[3]);
  Lanes result;
  for (size_t lane = 0; lane < kLanes; ++lane)
    result[lane] = to_bits<T>(F{}(from_bits<T>(a[lane]), from_bits<T>(b[lane]), from_bits<T>(c[lane])));
  store(w, i.operands[0].slot, result, active,
        w.validity(i.operands[1]) & w.validity(i.operands[2]) & w.validity(i.operands[3]));
}

template <class T, class R = T, class F> Handler unary(F) { return run_unary<T, R, F>; }
template <class T, class R, class F> Handler convert(F) { return run_unary<T, R, F>; }
template <class T, class R = T, class F> Handler binary(F) { return run_binary<T, T, R, F>; }
template <class T, class F> Handler shift(F) { return run_binary<T, uint32_t, T, F>; }
template <class T, class F> Handler ternary(F) { return run_ternary<T, F>; }

}  // namespace ptx
