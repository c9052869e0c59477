// ld, st, atom; what may be touched, what has been written, and races.
#include "operations.h"

#include <algorithm>
#include <cstdio>

namespace ptx {

void fault(const std::string& what) { throw Fault(what); }
std::string hex(uint64_t value) {
  char text[24];
  snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

void require_value(const Warp& w, const Operand& operand, uint32_t active, const char* use) {
  if ((w.validity(operand) & active) != active)
    fault(std::string(use) + " from a register that nothing was written to");
}

void addresses(const Warp& w, const Operand& operand, uint32_t active, Lanes& to) {
  if (operand.slot < 0) {
    to.fill(static_cast<uint64_t>(operand.value));
    return;
  }
  if ((w.valid[static_cast<size_t>(operand.slot)] & active) != active)
    fault("an address from a register that nothing was written to");
  const Lanes& base = w.registers[static_cast<size_t>(operand.slot)];
  for (size_t lane = 0; lane < kLanes; ++lane) to[lane] = base[lane] + static_cast<uint64_t>(operand.value);
}

void check_global(Block& b, uint64_t address, int64_t bytes, bool write) {
  const uint64_t end = address + static_cast<uint64_t>(bytes);
  bool inside = false;
  for (const Launch::Extent& e : b.launch.extents) {
    if (address < e.begin || end > e.end) continue;
    if (!write || e.writable) return;
    inside = true;
  }
  fault(inside ? "a write to an operand that is only read, at " + hex(address)
               : std::string(write ? "a write" : "a read") + " of " + std::to_string(bytes) +
                     " bytes of global memory outside of all operands, at " + hex(address));
}

uint8_t* shared_at(Block& b, uint32_t address, int bytes) {
  if (address % static_cast<uint32_t>(bytes) != 0)
    fault("shared address " + hex(address) + " is not aligned to " + std::to_string(bytes));
  if (address < kSharedBase || address - kSharedBase + static_cast<uint32_t>(bytes) > b.shared.size())
    fault("shared address " + hex(address) + " is outside of the block's " + std::to_string(b.shared.size()) +
          " bytes");
  return b.shared.data() + (address - kSharedBase);
}

// ---- races: accesses must be ordered by barriers -------------------------------------------------
namespace {

bool ordered(const Warp& w, int lane, int other_warp, int other_lane, uint32_t when) {
  if (other_warp != w.number) return w.clock[static_cast<size_t>(other_warp)] >= when;
  return other_lane == lane || w.clock[static_cast<size_t>(w.number)] > when;
}
std::string where(uint32_t address) { return "shared address " + hex(address - kSharedBase) + " of the block"; }

}  // namespace

void note_read(Block& b, Warp& w, int lane, uint32_t address, int bytes) {
  w.touched |= lane < kLanes ? 1u << lane : ~0u;
  for (uint32_t at = (address - kSharedBase) / 4; at <= (address - kSharedBase + static_cast<uint32_t>(bytes) - 1) / 4;
       ++at) {
    const Access& a = b.accesses[at];
    if (a.writer >= 0 && !ordered(w, lane, a.writer, a.writer_lane, a.written))
      fault("a race: " + where(kSharedBase + 4 * at) + " was written by warp " + std::to_string(a.writer) + " lane " +
            std::to_string(a.writer_lane) + ", nothing orders this read of warp " + std::to_string(w.number) +
            " after it");
    const size_t mine = at * b.warps.size() + static_cast<size_t>(w.number);
    const uint32_t now = w.clock[static_cast<size_t>(w.number)];
    b.read_lane[mine] = static_cast<int8_t>(b.read_clock[mine] == now && b.read_lane[mine] != lane ? 32 : lane);
    b.read_clock[mine] = now;
  }
}

void note_write(Block& b, Warp& w, int lane, uint32_t address, int bytes, Byte state) {
  w.touched |= lane < kLanes ? 1u << lane : ~0u;
  for (uint32_t at = (address - kSharedBase) / 4; at <= (address - kSharedBase + static_cast<uint32_t>(bytes) - 1) / 4;
       ++at) {
    Access& a = b.accesses[at];
    if (a.writer >= 0 && !ordered(w, lane, a.writer, a.writer_lane, a.written))
      fault("a race: " + where(kSharedBase + 4 * at) + " was written by warp " + std::to_string(a.writer) +
            ", nothing orders this write of warp " + std::to_string(w.number) + " after it");
    for (size_t other = 0; other < b.warps.size(); ++other) {
      const size_t index = at * b.warps.size() + other;
      if (b.read_clock[index] && !ordered(w, lane, static_cast<int>(other), b.read_lane[index], b.read_clock[index]))
        fault("a race: " + where(kSharedBase + 4 * at) + " was read by warp " + std::to_string(other) +
              ", nothing orders this write of warp " + std::to_string(w.number) + " after it");
    }
    a.writer = static_cast<int16_t>(w.number);
    a.writer_lane = static_cast<int16_t>(lane);
    a.written = w.clock[static_cast<size_t>(w.number)];
  }
  set_state(b, address, bytes, state);
}

void set_state(Block& b, uint32_t address, int bytes, Byte state) {
  std::fill_n(b.bytes.begin() + (address - kSharedBase), bytes, state);
}

void join(Clock& to, const Clock& from) {
  for (size_t i = 0; i < to.size(); ++i) to[i] = std::max(to[i], from[i]);
}
void tick(Warp& w) {
  ++w.clock[static_cast<size_t>(w.number)];
  w.touched = 0;
}

// ---- global memory between blocks ----------------------------------------------------------------
namespace {

// Reads of what another block wrote in this launch: past the first-level cache; after the writer's fence, a
// counter that both went through, and a fence of the reader.
void note_global_read(Block& b, const Warp& w, int lane, uint64_t address, int bytes, bool past_l1) {
  if (b.launch.written.empty()) return;
  for (uint64_t at = address / 4; at <= (address + static_cast<uint64_t>(bytes) - 1) / 4; ++at) {
    const auto found = b.launch.written.find(at);
    if (found == b.launch.written.end() || found->second.serial == b.launch.serial(b)) continue;
    const Launch::Written& word = found->second;
    if (!past_l1) fault("a read, through the first-level cache, of what another block wrote, at " + hex(4 * at));
    if (b.launch.fences[word.serial * 1024 + static_cast<uint64_t>(word.warp * kLanes + word.lane)] <= word.fences)
      fault("a read of what another block wrote without a fence behind it, at " + hex(4 * at));
    const auto known = w.foreign.find(word.serial);
    if (known == w.foreign.end() || known->second[static_cast<size_t>(word.warp)] < word.clock)
      fault("a read of what another block wrote, with nothing between them that orders it, at " + hex(4 * at));
    if (w.unfenced >> lane & 1)
      fault("a read of what another block wrote, without a fence before it, at " + hex(4 * at));
  }
}

}  // namespace

void note_global_write(Block& b, const Warp& w, int lane, uint64_t address, int bytes) {
  const uint64_t serial = b.launch.serial(b);
  for (uint64_t at = address / 4; at <= (address + static_cast<uint64_t>(bytes) - 1) / 4; ++at)
    b.launch.written[at] = {serial, w.number, lane, w.clock[static_cast<size_t>(w.number)],
                            w.fences[static_cast<size_t>(lane)]};
}

void membar(Block& b, Warp& w, const Instruction&, uint32_t active) {
  const uint64_t serial = b.launch.serial(b);
  for (int lane = 0; lane < kLanes; ++lane)
    if (active >> lane & 1)
      b.launch.fences[serial * 1024 + static_cast<uint64_t>(w.number * kLanes + lane)] =
          ++w.fences[static_cast<size_t>(lane)];
  w.unfenced &= ~active;
}

void learn(Warp& w, const std::map<uint64_t, Clock>& foreign) {
  for (const auto& [serial, clock] : foreign) {
    Clock& mine = w.foreign.emplace(serial, Clock(clock.size(), 0)).first->second;
    if (mine == clock) continue;
    join(mine, clock);
    w.unfenced = ~0u;
  }
}

// ---- ld and st -----------------------------------------------------------------------------------
namespace {

enum class Where { global, shared, parameter };

const std::vector<Operand>& values(const Operand& operand, std::vector<Operand>& one) {
  if (operand.kind == Operand::vector) return operand.parts;
  one.assign(1, operand);
  return one;
}

int width_bytes(char width) { return width == 'd' ? 8 : width == 'h' ? 2 : 4; }

// T: the type in memory; registers may be wider: loads extend, stores take the low bits.
template <class T, Where kWhere, bool kPastL1 = false, bool kExtend = false>
void load(Block& b, Warp& w, const Instruction& i, uint32_t active) {
  std::vector<Operand> one;
  const std::vector<Operand>& to = values(i.operands[0], one);
  const int bytes = static_cast<int>(sizeof(T) * to.size());
  Lanes at;
  addresses(w, i.operands[1], active, at);
  if ((i.operands[1].space == Space::shared) != (kWhere == Where::shared) && i.operands[1].space != Space::none)
    fault("a symbol of another space");
  std::vector<Lanes> results(to.size());
  std::vector<uint32_t> ok(to.size(), ~0u);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(active >> lane & 1)) continue;
    const uint64_t address = at[static_cast<size_t>(lane)];
    const uint8_t* from = nullptr;
    if (kWhere == Where::shared) {
      from = shared_at(b, static_cast<uint32_t>(address), bytes);
      for (int byte = 0; byte < bytes; ++byte) {
        const Byte state = b.bytes[address - kSharedBase + static_cast<uint64_t>(byte)];
        if (state == Byte::uninitialised) ok[static_cast<size_t>(byte) / sizeof(T)] &= ~(1u << lane);
        if (state == Byte::pending)
          fault("a read of shared memory that an asynchronous copy is writing, at " + hex(address - kSharedBase));
        if (state == Byte::barrier) fault("a read of an mbarrier, at " + hex(address - kSharedBase));
      }
      note_read(b, w, lane, static_cast<uint32_t>(address), bytes);
    } else if (kWhere == Where::parameter) {
      const uint64_t offset = address - kParameterBase;
      if (address < kParameterBase || offset + static_cast<uint64_t>(bytes) > b.launch.parameters.size())
        fault("a read outside of the parameters");
      if (offset % static_cast<uint64_t>(bytes)) fault("a parameter that is not aligned to " + std::to_string(bytes));
      from = b.launch.parameters.data() + offset;
    } else {
      if (address % static_cast<uint64_t>(bytes))
        fault("global address " + hex(address) + " is not aligned to " + std::to_string(bytes));
      check_global(b, address, bytes, false);
      note_global_read(b, w, lane, address, bytes, kPastL1);
      from = reinterpret_cast<const uint8_t*>(address);
    }
    for (size_t v = 0; v < to.size(); ++v) {
      T value;
      memcpy(&value, from + v * sizeof(T), sizeof(T));
      uint64_t bits = to_bits(value);
      if (kExtend) {  // a signed type in a wider register
        const int64_t wide = static_cast<int64_t>(value);
        bits = static_cast<uint64_t>(wide);
        if (to[v].width == 'h') bits &= 0xFFFF;
        if (to[v].width == 'w') bits &= 0xFFFFFFFF;
      }
      results[v][static_cast<size_t>(lane)] = bits;
    }
  }
  for (size_t v = 0; v < to.size(); ++v) {
    if (width_bytes(to[v].width) < static_cast<int>(sizeof(T))) fault("a register that is too narrow");
    store(w, to[v].slot, results[v], active, ok[v]);
  }
}

// What has no value may lie in shared memory, and nowhere else.
template <class T, Where kWhere> void write(Block& b, Warp& w, const Instruction& i, uint32_t active) {
  std::vector<Operand> one;
  const std::vector<Operand>& from = values(i.operands[1], one);
  const int bytes = static_cast<int>(sizeof(T) * from.size());
  Lanes at;
  addresses(w, i.operands[0], active, at);
  for (const Operand& operand : from) {
    if (kWhere != Where::shared) require_value(w, operand, active, "a store");
    if (operand.kind == Operand::reg && width_bytes(operand.width) < static_cast<int>(sizeof(T)))
      fault("a register that is too narrow");
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(active >> lane & 1)) continue;
    const uint64_t address = at[static_cast<size_t>(lane)];
    uint8_t* to = nullptr;
    if (kWhere == Where::shared) {
      to = shared_at(b, static_cast<uint32_t>(address), bytes);
      for (int byte = 0; byte < bytes; ++byte) {
        const Byte state = b.bytes[address - kSharedBase + static_cast<uint64_t>(byte)];
        if (state == Byte::pending)
          fault("a write of shared memory that an asynchronous copy is writing, at " + hex(address - kSharedBase));
        if (state == Byte::barrier) fault("a write of an mbarrier, at " + hex(address - kSharedBase));
      }
      note_write(b, w, lane, static_cast<uint32_t>(address), bytes, Byte::generic);
    } else {
      if (address % static_cast<uint64_t>(bytes))
        fault("global address " + hex(address) + " is not aligned to " + std::to_string(bytes));
      check_global(b, address, bytes, true);
      note_global_write(b, w, lane, address, bytes);
      to = reinterpret_cast<uint8_t*>(address);
    }
    for (size_t v = 0; v < from.size(); ++v) {
      const uint64_t bits = w.lanes(from[v])[static_cast<size_t>(lane)];
      memcpy(to + v * sizeof(T), &bits, sizeof(T));
      if (kWhere == Where::shared && !(w.validity(from[v]) >> lane & 1))
        set_state(b, static_cast<uint32_t>(address + v * sizeof(T)), sizeof(T), Byte::uninitialised);
    }
  }
}

void atomic_add(Block& b, Warp& w, const Instruction& i, uint32_t active) {
  Lanes at, result{};
  addresses(w, i.operands[1], active, at);
  require_value(w, i.operands[2], active, "an atomic operation");
  for (size_t lane = 0; lane < kLanes; ++lane) {
    if (!(active >> lane & 1)) continue;
    if (at[lane] % 4) fault("global address " + hex(at[lane]) + " is not aligned to 4");
    check_global(b, at[lane], 4, true);
    auto* word = reinterpret_cast<uint32_t*>(at[lane]);
    result[lane] = *word;
    *word += static_cast<uint32_t>(w.lanes(i.operands[2])[lane]);
    std::map<uint64_t, Clock>& counted = b.launch.counted[at[lane]];
    Clock& mine = counted.emplace(b.launch.serial(b), Clock(w.clock.size(), 0)).first->second;
    join(mine, w.clock);
    learn(w, counted);
  }
  store(w, i.operands[0].slot, result, active, ~0u);
}

}  // namespace

void add_memory(Table& t) {
  using S8 = int8_t;
  using S32 = int32_t;
  t["ld.param.u32"] = {"w:a", load<uint32_t, Where::parameter>};
  t["ld.param.s32"] = {"w:a|d:a", load<S32, Where::parameter, false, true>};
  t["ld.param.u64"] = {"d:a", load<uint64_t, Where::parameter>};
  t["ld.param.f32"] = {"f:a", load<uint32_t, Where::parameter>};
  t["ld.param.v2.u32"] = {"{ww}:a", load<uint32_t, Where::parameter>};

  t["ld.global.f32"] = {"f:a", load<uint32_t, Where::global>};
  t["ld.global.u32"] = {"w:a", load<uint32_t, Where::global>};
  t["ld.global.u64"] = {"d:a", load<uint64_t, Where::global>};
  t["ld.global.u16"] = {"h:a|w:a", load<uint16_t, Where::global>};
  t["ld.global.u8"] = {"h:a|w:a", load<uint8_t, Where::global>};
  t["ld.global.s8"] = {"h:a|w:a", load<S8, Where::global, false, true>};
  t["ld.global.v4.u32"] = {"{wwww}:a", load<uint32_t, Where::global>};
  t["ld.global.cg.f32"] = {"f:a", load<uint32_t, Where::global, true>};
  t["ld.global.cg.s32"] = {"w:a", load<uint32_t, Where::global, true>};
  t["ld.global.cg.u64"] = {"d:a", load<uint64_t, Where::global, true>};

  t["ld.shared.f32"] = {"f:a", load<uint32_t, Where::shared>};
  t["ld.shared.u32"] = {"w:a", load<uint32_t, Where::shared>};
  t["ld.shared.v2.u32"] = {"{ww}:a", load<uint32_t, Where::shared>};
  t["ld.shared.v2.f32"] = {"{ff}:a", load<uint32_t, Where::shared>};
  t["ld.shared.v4.f32"] = {"{ffff}:a", load<uint32_t, Where::shared>};
  t["ld.shared.v4.u32"] = {"{wwww}:a", load<uint32_t, Where::shared>};
  t["ld.shared.v2.u64"] = {"{dd}:a", load<uint64_t, Where::shared>};

  t["st.global.f32"] = {":af", write<uint32_t, Where::global>};
  t["st.global.u32"] = {":aw", write<uint32_t, Where::global>};
  t["st.global.u64"] = {":ad", write<uint64_t, Where::global>};
  t["st.global.u16"] = {":ah|:aw", write<uint16_t, Where::global>};
  t["st.global.u8"] = {":ah|:aw", write<uint8_t, Where::global>};
  t["st.global.v4.u32"] = {":a{wwww}", write<uint32_t, Where::global>};
  t["st.global.cg.f32"] = {":af", write<uint32_t, Where::global>};
  t["st.global.cg.s32"] = {":aw", write<uint32_t, Where::global>};
  t["st.global.cg.u64"] = {":ad", write<uint64_t, Where::global>};

  t["st.shared.f32"] = {":af", write<uint32_t, Where::shared>};
  t["st.shared.u32"] = {":aw", write<uint32_t, Where::shared>};
  t["st.shared.u64"] = {":ad", write<uint64_t, Where::shared>};
  t["st.shared.v2.f32"] = {":a{ff}", write<uint32_t, Where::shared>};
  t["st.shared.v4.f32"] = {":a{ffff}", write<uint32_t, Where::shared>};
  t["st.shared.v4.u32"] = {":a{wwww}", write<uint32_t, Where::shared>};
  t["st.shared.v2.u16"] = {":a{hh}", write<uint16_t, Where::shared>};

  t["atom.global.add.u32"] = {"w:aw", atomic_add};
}

}  // namespace ptx
