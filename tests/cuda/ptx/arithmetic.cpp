// Integers, bits, predicates, conversions between integers, moves.
#include "operations.h"

namespace ptx {
namespace {

template <class T> T shift_left(T a, uint32_t by) { return by >= 8 * sizeof(T) ? T{0} : static_cast<T>(a << by); }
template <class T> T shift_right(T a, uint32_t by) {
  if (by >= 8 * sizeof(T))
    by = 8 * sizeof(T) - 1, a = std::is_signed_v<T> ? static_cast<T>(a >> by) : T{0};
  else
    a = static_cast<T>(a >> by);
  return a;
}

uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t control = selector >> (4 * i) & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (control & 7))) & 0xFF;
    if (control & 8) byte = byte & 0x80 ? 0xFF : 0;
    result |= byte << (8 * i);
  }
  return result;
}

template <class T, bool kRemainder> void divide(Block&, Warp& w, const Instruction& i, uint32_t active) {
  const Lanes& a = w.lanes(i.operands[1]);
  const Lanes& b = w.lanes(i.operands[2]);
  const uint32_t ok = w.validity(i.operands[1]) & w.validity(i.operands[2]);
  Lanes result{};
  for (size_t lane = 0; lane < kLanes; ++lane) {
    if (!(active & ok) || !((active & ok) >> lane & 1)) continue;
    const T n = from_bits<T>(a[lane]), d = from_bits<T>(b[lane]);
    if (d == 0) fault("a division by zero");
    if (std::is_signed_v<T> && d == static_cast<T>(-1))
      result[lane] = to_bits<T>(kRemainder ? T{0} : static_cast<T>(-static_cast<std::make_unsigned_t<T>>(n)));
    else
      result[lane] = to_bits<T>(static_cast<T>(kRemainder ? n % d : n / d));
  }
  store(w, i.operands[0].slot, result, active, ok);
}

// mov of a special register or the address of a symbol.
void move_special(Block& b, Warp& w, const Instruction& i, uint32_t active) {
  const Operand& from = i.operands[1];
  Lanes result{};
  if (from.kind == Operand::symbol) {
    result = *from.constant;
  } else {
    const std::string& name = from.name;
    const Launch& l = b.launch;
    for (size_t lane = 0; lane < kLanes; ++lane) {
      uint64_t value = 0;
      if (name == "%tid.x")
        value = static_cast<uint64_t>(w.number) * kLanes + lane;
      else if (name == "%ctaid.x")
        value = b.index[0];
      else if (name == "%ctaid.y")
        value = b.index[1];
      else if (name == "%ctaid.z")
        value = b.index[2];
      else if (name == "%nctaid.x")
        value = l.grid[0];
      else if (name == "%ntid.x")
        value = l.threads[0];
      else
        fault("the special register " + name + " is unknown");
      result[lane] = value;
    }
  }
  store(w, i.operands[0].slot, result, active, ~0u);
}
template <class T> void move(Block& b, Warp& w, const Instruction& i, uint32_t active) {
  const Operand& from = i.operands[1];
  if (from.kind == Operand::special || from.kind == Operand::symbol)
    move_special(b, w, i, active);
  else
    store(w, i.operands[0].slot, w.lanes(from), active, w.validity(from));
}

// Two registers of 16 bits as one of 32, the first in the low half; and back.
void move_halves(Block& b, Warp& w, const Instruction& i, uint32_t active) {
  const Operand &to = i.operands[0], &from = i.operands[1];
  if (to.kind == Operand::vector) {
    const Lanes& whole = w.lanes(from);
    Lanes low, high;
    for (size_t lane = 0; lane < kLanes; ++lane)
      low[lane] = whole[lane] & 0xFFFF, high[lane] = whole[lane] >> 16 & 0xFFFF;
    const uint32_t ok = w.validity(from);
    store(w, to.parts[0].slot, low, active, ok);
    store(w, to.parts[1].slot, high, active, ok);
  } else if (from.kind == Operand::vector) {
    Lanes result;
    const Lanes &low = w.lanes(from.parts[0]), &high = w.lanes(from.parts[1]);
    for (size_t lane = 0; lane < kLanes; ++lane) result[lane] = (low[lane] & 0xFFFF) | (high[lane] & 0xFFFF) << 16;
    store(w, to.slot, result, active, w.validity(from.parts[0]) & w.validity(from.parts[1]));
  } else {
    move<uint32_t>(b, w, i, active);
  }
}
// The same of 32 and 64 bits.
void move_words(Block& b, Warp& w, const Instruction& i, uint32_t active) {
  const Operand &to = i.operands[0], &from = i.operands[1];
  if (to.kind == Operand::vector) {
    const Lanes& whole = w.lanes(from);
    Lanes low, high;
    for (size_t lane = 0; lane < kLanes; ++lane) low[lane] = whole[lane] & 0xFFFFFFFF, high[lane] = whole[lane] >> 32;
    const uint32_t ok = w.validity(from);
    store(w, to.parts[0].slot, low, active, ok);
    store(w, to.parts[1].slot, high, active, ok);
  } else if (from.kind == Operand::vector) {
    Lanes result;
    const Lanes &low = w.lanes(from.parts[0]), &high = w.lanes(from.parts[1]);
    for (size_t lane = 0; lane < kLanes; ++lane) result[lane] = (low[lane] & 0xFFFFFFFF) | high[lane] << 32;
    store(w, to.slot, result, active, w.validity(from.parts[0]) & w.validity(from.parts[1]));
  } else {
    move<uint64_t>(b, w, i, active);
  }
}

template <class T> void select(Block&, Warp& w, const Instruction& i, uint32_t active) {
  const Lanes& a = w.lanes(i.operands[1]);
  const Lanes& b = w.lanes(i.operands[2]);
  const Lanes& p = w.lanes(i.operands[3]);
  Lanes result;
  uint32_t first = 0;
  for (size_t lane = 0; lane < kLanes; ++lane) {
    const bool take = p[lane] & 1;
    first |= static_cast<uint32_t>(take) << lane;
    result[lane] = to_bits<T>(from_bits<T>(take ? a[lane] : b[lane]));
  }
  const uint32_t ok = (w.validity(i.operands[1]) & first) | (w.validity(i.operands[2]) & ~first);
  store(w, i.operands[0].slot, result, active, ok & w.validity(i.operands[3]));
}

template <class T> void compare_all(Table& t, const std::string& type, const char* signature) {
  const auto add = [&](const char* name, Handler run) {
    t["setp." + std::string(name) + "." + type] = {signature, run};
  };
  add("eq", binary<T, bool>([](T a, T b) { return a == b; }));
  add("ne", binary<T, bool>([](T a, T b) { return a != b; }));
  add("lt", binary<T, bool>([](T a, T b) { return a < b; }));
  add("le", binary<T, bool>([](T a, T b) { return a <= b; }));
  add("gt", binary<T, bool>([](T a, T b) { return a > b; }));
  add("ge", binary<T, bool>([](T a, T b) { return a >= b; }));
}

}  // namespace

void add_arithmetic(Table& t) {
  using s8 = int8_t;
  using s16 = int16_t;
  using s32 = int32_t;
  using s64 = int64_t;
  using u16 = uint16_t;
  using u32 = uint32_t;
  using u64 = uint64_t;
  t["add.s32"] = {"w:ww", binary<u32>([](u32 a, u32 b) { return a + b; })};
  t["sub.s32"] = {"w:ww", binary<u32>([](u32 a, u32 b) { return a - b; })};
  t["mul.lo.s32"] = {"w:ww", binary<u32>([](u32 a, u32 b) { return a * b; })};
  t["mad.lo.s32"] = {"w:www", ternary<u32>([](u32 a, u32 b, u32 c) { return a * b + c; })};
  t["mul.hi.s32"] = {"w:ww", binary<s32>([](s32 a, s32 b) { return static_cast<s32>(static_cast<s64>(a) * b >> 32); })};
  t["mul.wide.s32"] = {"d:ww", binary<s32, s64>([](s32 a, s32 b) { return static_cast<s64>(a) * b; })};
  t["mul.wide.u32"] = {"d:ww", binary<u32, u64>([](u32 a, u32 b) { return static_cast<u64>(a) * b; })};
  t["add.s64"] = {"d:dd", binary<u64>([](u64 a, u64 b) { return a + b; })};
  t["sub.s64"] = {"d:dd", binary<u64>([](u64 a, u64 b) { return a - b; })};
  t["mul.lo.s64"] = {"d:dd", binary<u64>([](u64 a, u64 b) { return a * b; })};
  t["neg.s32"] = {"w:w", unary<u32>([](u32 a) { return 0u - a; })};
  t["neg.s64"] = {"d:d", unary<u64>([](u64 a) { return u64{0} - a; })};
  t["div.s32"] = {"w:ww", divide<s32, false>};
  t["div.u32"] = {"w:ww", divide<u32, false>};
  t["div.s64"] = {"d:dd", divide<s64, false>};
  t["rem.u32"] = {"w:ww", divide<u32, true>};
  t["rem.s32"] = {"w:ww", divide<s32, true>};
  t["rem.s64"] = {"d:dd", divide<s64, true>};
  t["min.s32"] = {"w:ww", binary<s32>([](s32 a, s32 b) { return a < b ? a : b; })};
  t["max.s32"] = {"w:ww", binary<s32>([](s32 a, s32 b) { return a > b ? a : b; })};
  t["min.s64"] = {"d:dd", binary<s64>([](s64 a, s64 b) { return a < b ? a : b; })};
  t["max.s64"] = {"d:dd", binary<s64>([](s64 a, s64 b) { return a > b ? a : b; })};
  t["max.u64"] = {"d:dd", binary<u64>([](u64 a, u64 b) { return a > b ? a : b; })};

  t["and.b32"] = {"w:ww", binary<u32>([](u32 a, u32 b) { return a & b; })};
  t["or.b32"] = {"w:ww", binary<u32>([](u32 a, u32 b) { return a | b; })};
  t["xor.b32"] = {"w:ww", binary<u32>([](u32 a, u32 b) { return a ^ b; })};
  t["not.b32"] = {"w:w", unary<u32>([](u32 a) { return ~a; })};
  t["and.b64"] = {"d:dd", binary<u64>([](u64 a, u64 b) { return a & b; })};
  t["or.b64"] = {"d:dd", binary<u64>([](u64 a, u64 b) { return a | b; })};
  t["not.b64"] = {"d:d", unary<u64>([](u64 a) { return ~a; })};
  t["and.pred"] = {"p:pp", binary<bool>([](bool a, bool b) { return a && b; })};
  t["or.pred"] = {"p:pp", binary<bool>([](bool a, bool b) { return a || b; })};
  t["xor.pred"] = {"p:pp", binary<bool>([](bool a, bool b) { return a != b; })};
  t["not.pred"] = {"p:p", unary<bool>([](bool a) { return !a; })};
  t["shl.b32"] = {"w:ww", binary<u32>([](u32 a, u32 by) { return shift_left(a, by); })};
  t["shr.u32"] = {"w:ww", binary<u32>([](u32 a, u32 by) { return shift_right(a, by); })};
  t["shr.s32"] = {"w:ww", binary<s32>([](s32 a, s32 by) { return shift_right(a, static_cast<u32>(by)); })};
  t["shr.s16"] = {"h:hw", shift<s16>([](s16 a, u32 by) { return shift_right(a, by); })};
  t["shl.b64"] = {"d:dw", shift<u64>([](u64 a, u32 by) { return shift_left(a, by); })};
  t["shr.u64"] = {"d:dw", shift<u64>([](u64 a, u32 by) { return shift_right(a, by); })};
  t["shr.s64"] = {"d:dw", shift<s64>([](s64 a, u32 by) { return shift_right(a, by); })};
  t["prmt.b32"] = {"w:www", ternary<u32>([](u32 a, u32 b, u32 c) { return permute(a, b, c); })};

  t["mov.u32"] = {"w:w|w:s", move<u32>};
  t["mov.b32"] = {"x:x|{hh}:w|w:{hh}", move_halves};
  t["mov.f32"] = {"f:f", move<u32>};
  t["mov.u64"] = {"d:d", move<u64>};
  t["mov.b64"] = {"d:d|d:s|{ww}:d|d:{ww}", move_words};
  t["mov.pred"] = {"p:p", move<bool>};
  t["mov.u16"] = {"h:h", move<u16>};
  t["mov.b16"] = {"h:h", move<u16>};
  t["selp.b32"] = {"w:wwp", select<u32>};
  t["selp.u32"] = {"w:wwp", select<u32>};
  t["selp.b64"] = {"d:ddp", select<u64>};
  t["selp.f32"] = {"f:ffp", select<u32>};
  t["selp.b16"] = {"h:hhp", select<u16>};

  compare_all<s32>(t, "s32", "p:ww");
  compare_all<u32>(t, "u32", "p:ww");
  compare_all<s64>(t, "s64", "p:dd");
  compare_all<u64>(t, "u64", "p:dd");
  compare_all<s16>(t, "s16", "p:hh");
  for (const char* order : {"eq", "ne"})
    t["setp." + std::string(order) + ".b32"] = t["setp." + std::string(order) + ".u32"];

  t["cvt.u16.u32"] = {"h:w", convert<u32, u16>([](u32 a) { return static_cast<u16>(a); })};
  t["cvt.u32.u16"] = {"w:h", convert<u16, u32>([](u16 a) { return u32{a}; })};
  t["cvt.s16.s8"] = {"h:h", convert<s8, s16>([](s8 a) { return s16{a}; })};
  t["cvt.s64.s32"] = {"d:w|d:d", convert<s32, s64>([](s32 a) { return s64{a}; })};
  t["cvt.u64.u32"] = {"d:w", convert<u32, u64>([](u32 a) { return u64{a}; })};
  t["cvt.u32.u64"] = {"w:d", convert<u64, u32>([](u64 a) { return static_cast<u32>(a); })};
  // Generic addresses of global memory are those of global memory; a parameter's keep their window.
  t["cvta.to.global.u64"] = {"d:d", unary<u64>([](u64 a) { return a; })};
  t["cvta.param.u64"] = {"d:d", unary<u64>([](u64 a) { return a; })};
}

}  // namespace ptx
