// ldmatrix, mma.sync, wgmma: fragments as chapter "Warp-level matrix instructions" and "Asynchronous warpgroup
// level matrix instructions" of the PTX manual draw them.
#include "operations.h"

namespace ptx {
namespace {

// ---- ldmatrix.x4 -------------------------------------------------------------------------------
// Lanes 8 m .. 8 m + 7 give the addresses of the eight rows (16 bytes) of matrix m.
template <bool kTranspose> void load_matrices(Block& b, Warp& w, const Instruction& i, uint32_t active) {
  if (!gather(w, active, ~0u, i)) return;
  Lanes at;
  addresses(w, i.operands[1], active, at);
  for (size_t m = 0; m < 4; ++m) {
    uint16_t matrix[8][8];
    bool known[8][8];
    for (size_t row = 0; row < 8; ++row) {
      const size_t lane = 8 * m + row;
      const auto address = static_cast<uint32_t>(at[lane]);
      const uint8_t* from = shared_at(b, address, 16);
      for (uint32_t byte = 0; byte < 16; ++byte) {
        const Byte state = b.bytes[address - kSharedBase + byte];
        if (state == Byte::pending || state == Byte::barrier)
          fault("ldmatrix of shared memory that a copy is writing, or of an mbarrier, at " +
                hex(address - kSharedBase + byte));
        known[row][byte / 2] = (byte % 2 == 0 || known[row][byte / 2]) && state != Byte::uninitialised;
      }
      note_read(b, w, static_cast<int>(lane), address, 16);
      memcpy(matrix[row], from, 16);
    }
    Lanes result;
    uint32_t ok = 0;
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const size_t row = lane / 4, column = 2 * (lane % 4);
      const bool both =
          kTranspose ? known[column][row] && known[column + 1][row] : known[row][column] && known[row][column + 1];
      ok |= static_cast<uint32_t>(both) << lane;
      const uint32_t low = kTranspose ? matrix[column][row] : matrix[row][column];
      const uint32_t high = kTranspose ? matrix[column + 1][row] : matrix[row][column + 1];
      result[lane] = low | high << 16;
    }
    store(w, i.operands[0].parts[m].slot, result, active, ok);
  }
}

// ---- mma.sync ----------------------------------------------------------------------------------
uint32_t word(const Warp& w, const Operand& o, size_t lane) { return static_cast<uint32_t>(w.lanes(o)[lane]); }
int32_t byte_of(uint32_t value, size_t byte) { return static_cast<int8_t>(value >> (8 * byte)); }

// Rows of A (columns of B) whose values are all known: a value that nothing was written to spoils its row of the
// product alone, and a kernel may compute rows that it throws away.
struct Known {
  bool row[16], column[8];
};
bool group_known(const Warp& w, const Operand& vector, size_t first, size_t step, size_t group) {
  const uint32_t lanes = 15u << (4 * group);
  bool known = true;
  for (size_t r = first; r < vector.parts.size(); r += step) known &= (w.validity(vector.parts[r]) & lanes) == lanes;
  return known;
}
Known known_values(const Warp& w, const Operand& a, const Operand* b) {
  Known known;
  for (size_t g = 0; g < 8; ++g) {
    for (size_t half = 0; half < 2; ++half) known.row[g + 8 * half] = group_known(w, a, half, 2, g);
    known.column[g] = b == nullptr || group_known(w, *b, 0, 1, g);
  }
  return known;
}
// Lanes in which register r of the sums is known.
uint32_t known_sums(const Known& known, size_t r, uint32_t before) {
  uint32_t ok = 0;
  for (size_t lane = 0; lane < kLanes; ++lane) {
    const bool one = known.row[lane / 4 + 8 * (r >> 1 & 1)] && known.column[2 * (lane % 4) + (r & 1)];
    ok |= static_cast<uint32_t>(one) << lane;
  }
  return ok & before;
}

// m16n8k32: with g = lane / 4, t = lane % 4, A register r holds row g + 8 (r odd), columns 4 t + 16 (r > 1) ..;
// B register r holds column g, rows 4 t + 16 r ..
void mma_s8(Block&, Warp& w, const Instruction& i, uint32_t active) {
  if (!gather(w, active, ~0u, i)) return;
  const Known known = known_values(w, i.operands[1], &i.operands[2]);
  int32_t a[16][32], bm[32][8];
  for (size_t lane = 0; lane < kLanes; ++lane) {
    const size_t g = lane / 4, t = lane % 4;
    for (size_t r = 0; r < 4; ++r)
      for (size_t byte = 0; byte < 4; ++byte)
        a[g + (r == 1 || r == 3 ? 8 : 0)][4 * t + byte + (r >= 2 ? 16 : 0)] =
            byte_of(word(w, i.operands[1].parts[r], lane), byte);
    for (size_t r = 0; r < 2; ++r)
      for (size_t byte = 0; byte < 4; ++byte)
        bm[4 * t + byte + 16 * r][g] = byte_of(word(w, i.operands[2].parts[r], lane), byte);
  }
  Lanes results[4];
  for (size_t lane = 0; lane < kLanes; ++lane) {
    for (size_t r = 0; r < 4; ++r) {
      const size_t row = lane / 4 + (r >= 2 ? 8 : 0), column = 2 * (lane % 4) + (r & 1);
      uint32_t sum = word(w, i.operands[3].parts[r], lane);
      for (size_t k = 0; k < 32; ++k) sum += static_cast<uint32_t>(a[row][k] * bm[k][column]);
      results[r][lane] = sum;
    }
  }
  uint32_t ok[4];
  for (size_t r = 0; r < 4; ++r) ok[r] = known_sums(known, r, w.validity(i.operands[3].parts[r]));
  for (size_t r = 0; r < 4; ++r) store(w, i.operands[0].parts[r].slot, results[r], active, ok[r]);
}

float bf16_value(uint16_t bits) { return from_bits<float>(static_cast<uint64_t>(bits) << 16); }
float f16_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float magnitude = exponent == 31 ? (mantissa ? __builtin_nanf("") : __builtin_inff())
                          : exponent     ? __builtin_ldexpf(static_cast<float>(1024 + mantissa), exponent - 25)
                                         : __builtin_ldexpf(static_cast<float>(mantissa), -24);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// m16n8k16: as above with two values of 16 bits a register: A columns 2 t + 8 (r > 1), B rows 2 t + 8 r. The
// manual leaves the order of the sum and its roundings open: here it is rounded once.
template <float (*kValue)(uint16_t)> void mma_half(Block&, Warp& w, const Instruction& i, uint32_t active) {
  if (!gather(w, active, ~0u, i)) return;
  const Known known = known_values(w, i.operands[1], &i.operands[2]);
  double a[16][16], bm[16][8];
  for (size_t lane = 0; lane < kLanes; ++lane) {
    const size_t g = lane / 4, t = lane % 4;
    for (size_t half = 0; half < 2; ++half) {
      for (size_t r = 0; r < 4; ++r)
        a[g + (r == 1 || r == 3 ? 8 : 0)][2 * t + half + (r >= 2 ? 8 : 0)] =
            kValue(static_cast<uint16_t>(word(w, i.operands[1].parts[r], lane) >> (16 * half)));
      for (size_t r = 0; r < 2; ++r)
        bm[2 * t + half + 8 * r][g] =
            kValue(static_cast<uint16_t>(word(w, i.operands[2].parts[r], lane) >> (16 * half)));
    }
  }
  Lanes results[4];
  for (size_t lane = 0; lane < kLanes; ++lane) {
    for (size_t r = 0; r < 4; ++r) {
      const size_t row = lane / 4 + (r >= 2 ? 8 : 0), column = 2 * (lane % 4) + (r & 1);
      double sum = from_bits<float>(w.lanes(i.operands[3].parts[r])[lane]);
      for (size_t k = 0; k < 16; ++k) sum += a[row][k] * bm[k][column];
      results[r][lane] = to_bits(static_cast<float>(sum));
    }
  }
  uint32_t ok[4];
  for (size_t r = 0; r < 4; ++r) ok[r] = known_sums(known, r, w.validity(i.operands[3].parts[r]));
  for (size_t r = 0; r < 4; ++r) store(w, i.operands[0].parts[r].slot, results[r], active, ok[r]);
}

// ---- wgmma -------------------------------------------------------------------------------------
void follow(Warp& w, const Instruction& i) {
  ++w.wgmma_count;
  w.wgmma_path = w.wgmma_path * 1000003 + static_cast<uint64_t>(i.line);
}

void wgmma_fence(Block&, Warp& w, const Instruction& i, uint32_t active) {
  if (!gather(w, active, ~0u, i)) return;
  follow(w, i);
  w.fence = ++w.time;
}

template <int kColumns> void wgmma_s8(Block&, Warp& w, const Instruction& i, uint32_t active) {
  if (!gather(w, active, ~0u, i)) return;
  follow(w, i);
  const Operand &d = i.operands[0], &a = i.operands[1];
  if (w.fence == 0) fault("wgmma without wgmma.fence before it");
  require_value(w, i.operands[2], active, "a descriptor");
  require_value(w, i.operands[3], active, "scale-d");
  const Lanes& descriptors = w.lanes(i.operands[2]);
  const Lanes& adds = w.lanes(i.operands[3]);
  for (size_t lane = 1; lane < kLanes; ++lane)
    if (descriptors[lane] != descriptors[0] || adds[lane] != adds[0])
      fault("a descriptor or scale-d that differs between lanes");
  for (const Operand& part : a.parts) {
    const auto slot = static_cast<size_t>(part.slot);
    if (w.busy[slot] == 2) fault("an operand that is the sum of a wgmma in flight");
    if (w.accessed[slot] > w.fence) fault("no wgmma.fence since a register of the operand was accessed");
  }
  for (const std::vector<Wgmma>& group : w.products)
    for (const Wgmma& other : group) {
      const Operand& sums = other.instruction->operands[0];
      bool same = other.columns == kColumns, shared = false;
      for (const Operand& mine : d.parts)
        for (const Operand& theirs : sums.parts) shared |= mine.slot == theirs.slot;
      for (size_t r = 0; same && r < d.parts.size(); ++r) same = d.parts[r].slot == sums.parts[r].slot;
      if (shared && !same) fault("sums that overlap those of a wgmma of another shape in flight");
    }
  for (const Operand& part : d.parts) {
    const auto slot = static_cast<size_t>(part.slot);
    if (w.busy[slot] == 1) fault("sums that are an operand of a wgmma in flight");
    if (w.busy[slot] == 0 && w.accessed[slot] > w.fence)
      fault("no wgmma.fence since a register of the sums was accessed");
    w.busy[slot] = 2;
  }
  for (const Operand& part : a.parts) w.busy[static_cast<size_t>(part.slot)] = 1;
  w.products.back().push_back({&i, descriptors[0], kColumns, adds[0] != 0});
}

// Row n, byte k of a K-major operand with 128-byte swizzle: rows of 128 bytes, eight rows "stride" apart; bits 4-6
// of the address are exchanged by bits 7-9.
int8_t swizzled(Block& b, Warp& w, uint64_t descriptor, uint32_t row, uint32_t k) {
  const auto start = static_cast<uint32_t>(descriptor & 0x3FFF) << 4,
             stride = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4;
  uint32_t address = start + row / 8 * stride + row % 8 * 128 + k;
  address ^= (address >> 7 & 7) << 4;
  const int8_t value = static_cast<int8_t>(*shared_at(b, address, 1));
  if (b.bytes[address - kSharedBase] != Byte::async)
    fault(
        "wgmma reads shared memory that no asynchronous copy completed (or was written by st without "
        "fence.proxy.async), at " +
        hex(address - kSharedBase));
  if (k % 4 == 0) note_read(b, w, 32, address, 4);
  return value;
}

void multiply(Block& b, Warp& w, const Wgmma& product) {
  const uint64_t descriptor = product.descriptor;
  if (descriptor >> 62 != 1) fault("a descriptor of another swizzle than 128 bytes");
  if (descriptor >> 49 & 7) fault("a descriptor with a base offset");
  if ((descriptor >> 14 & 3) || (descriptor >> 30 & 3) || (descriptor >> 46 & 7) || (descriptor >> 52 & 0x3FF))
    fault("a descriptor with bits that mean nothing");
  const auto columns = static_cast<uint32_t>(product.columns);
  std::vector<int8_t> bm(columns * 32u);
  for (uint32_t n = 0; n < columns; ++n)
    for (uint32_t k = 0; k < 32; ++k) bm[n * 32 + k] = swizzled(b, w, descriptor, n, k);
  int8_t a[16][32];  // the warp's rows: 16 (warp % 4) ..
  const std::vector<Operand>& registers = product.instruction->operands[1].parts;
  for (size_t lane = 0; lane < kLanes; ++lane)
    for (size_t r = 0; r < 4; ++r)
      for (size_t byte = 0; byte < 4; ++byte)
        a[lane / 4 + 8 * (r & 1)][4 * (lane % 4) + byte + 16 * (r >> 1)] =
            static_cast<int8_t>(byte_of(word(w, registers[r], lane), byte));
  const Known known = known_values(w, product.instruction->operands[1], nullptr);
  const std::vector<Operand>& sums = product.instruction->operands[0].parts;
  for (size_t r = 0; r < sums.size(); ++r) {
    Lanes& to = w.registers[static_cast<size_t>(sums[r].slot)];
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const size_t row = lane / 4 + 8 * (r >> 1 & 1), n = 8 * (r >> 2) + 2 * (lane % 4) + (r & 1);
      uint32_t sum = product.add ? static_cast<uint32_t>(to[lane]) : 0;
      for (size_t k = 0; k < 32; ++k) sum += static_cast<uint32_t>(int32_t{a[row][k]} * bm[n * 32 + k]);
      to[lane] = sum;
    }
    uint32_t& valid = w.valid[static_cast<size_t>(sums[r].slot)];
    valid = known_sums(known, r, product.add ? valid : ~0u);
  }
}

void mark(Warp& w, const std::vector<Wgmma>& group, bool busy) {
  for (const Wgmma& product : group) {
    for (const Operand& part : product.instruction->operands[1].parts)
      w.busy[static_cast<size_t>(part.slot)] = busy ? 1 : 0;
    for (const Operand& part : product.instruction->operands[0].parts)
      w.busy[static_cast<size_t>(part.slot)] = busy ? 2 : 0;
  }
}

void wgmma_commit(Block&, Warp& w, const Instruction& i, uint32_t active) {
  if (!gather(w, active, ~0u, i)) return;
  follow(w, i);
  w.products.emplace_back();
}

void wgmma_wait(Block& b, Warp& w, const Instruction& i, uint32_t active) {
  if (!gather(w, active, ~0u, i)) return;
  follow(w, i);
  const auto left = static_cast<size_t>(i.operands[0].value);
  while (w.products.size() - 1 > left) {
    complete_products(b, w, w.products.front());
    w.products.pop_front();
  }
}

template <bool kIncrease> void set_registers(Block& b, Warp& w, const Instruction& i, uint32_t active) {
  if (!gather(w, active, ~0u, i)) return;
  const auto count = static_cast<int>(i.operands[0].value);
  if (count < 24 || count > 256 || count % 8) fault("setmaxnreg of a count that is not allowed");
  if (kIncrease ? count < w.registers_each : count > w.registers_each)
    fault("setmaxnreg in the wrong direction: the warp has " + std::to_string(w.registers_each));
  const int more = (count - w.registers_each) * kLanes;
  if (more > b.register_pool) {
    w.blocked = Warp::at_registers;
    w.wanted_registers = more;
    w.advanced = true;
    return;
  }
  follow(w, i);
  b.register_pool -= more;
  w.registers_each = count;
}

std::string wgmma_signature(int sums) { return "{" + std::string(static_cast<size_t>(sums), 'w') + "}:{wwww}dp"; }

}  // namespace

void complete_products(Block& b, Warp& w, std::vector<Wgmma>& group) {
  for (const Wgmma& product : group) multiply(b, w, product);
  mark(w, group, false);
  for (size_t other = 1; other < w.products.size(); ++other) mark(w, w.products[other], true);
}

void add_matrix(Table& t) {
  t["ldmatrix.sync.aligned.m8n8.x4.shared.b16"] = {"{wwww}:a", load_matrices<false>};
  t["ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"] = {"{wwww}:a", load_matrices<true>};
  t["mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"] = {"{wwww}:{wwww}{ww}{wwww}", mma_s8};
  t["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"] = {"{ffff}:{wwww}{ww}{ffff}", mma_half<bf16_value>};
  t["mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"] = {"{ffff}:{wwww}{ww}{ffff}", mma_half<f16_value>};
  static const std::string wide = wgmma_signature(64), narrow = wgmma_signature(32);
  t["wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8"] = {wide.c_str(), wgmma_s8<128>};
  t["wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8"] = {narrow.c_str(), wgmma_s8<64>};
  t["wgmma.fence.sync.aligned"] = {":", wgmma_fence};
  t["wgmma.commit_group.sync.aligned"] = {":", wgmma_commit};
  t["wgmma.wait_group.sync.aligned"] = {":n", wgmma_wait};
  t["setmaxnreg.inc.sync.aligned.u32"] = {":n", set_registers<true>};
  t["setmaxnreg.dec.sync.aligned.u32"] = {":n", set_registers<false>};
}

}  // namespace ptx
