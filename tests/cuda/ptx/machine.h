// State of a launch: blocks, warps, shared memory and what watches over them.
#pragma once

#include "program.h"

#include <deque>
#include <functional>
#include <random>
#include <unordered_map>

namespace ptx {

using Clock = std::vector<uint32_t>;  // by warp of the block: what a warp has seen of the others

struct Wgmma {  // one in flight
  const Instruction* instruction;
  uint64_t descriptor;
  int columns;
  bool add;
};

struct Warp {
  int number = 0;
  uint32_t alive = ~0u;
  // Lanes that are together have one place, `at`; else each has its own.
  bool together = true;
  int at = 0;
  std::array<int, kLanes> place{};
  uint32_t waiting = 0;   // lanes that stand before an instruction of the whole warp
  bool advanced = false;  // the handler set the place itself

  std::vector<Lanes> registers;
  std::vector<uint32_t> valid;  // lanes in which a register was written

  // What keeps the warp from running.
  enum Blocked : uint8_t { no, at_barrier, at_mbarrier, at_registers } blocked = no;
  uint32_t wanted_address = 0, wanted_parity = 0;
  int wanted_registers = 0;
  int barrier = -1;

  Clock clock;
  uint32_t touched = 0;  // lanes that accessed shared memory since the warp's last barrier
  // By serial number of another block: what this warp knows of it through a counter. Lanes that have made no
  // fence since they learned it may not read that block's values yet.
  std::map<uint64_t, Clock> foreign;
  uint32_t unfenced = 0;

  // cp.async: groups not yet waited for, each a list of copies; the last is not yet committed.
  struct Copy {
    uint32_t shared;
    uint64_t global;
    int bytes, read;
    int lane;
  };
  std::deque<std::vector<Copy>> copies{1};

  // wgmma
  std::vector<uint8_t> busy;       // by slot: 1 an operand of a wgmma in flight, 2 its sums
  std::vector<uint64_t> accessed;  // by slot: when another instruction last read or wrote it
  uint64_t time = 1, fence = 0;
  std::deque<std::vector<Wgmma>> products{1};
  uint64_t wgmma_count = 0, wgmma_path = 0;  // the warps of a warpgroup must go through the same ones
  int registers_each = 0;

  std::array<uint64_t, kLanes> fences{};  // membar.gl so far

  const Lanes& lanes(const Operand& operand) const {
    return operand.kind == Operand::reg ? registers[static_cast<size_t>(operand.slot)] : *operand.constant;
  }
  uint32_t validity(const Operand& operand) const {
    return operand.kind == Operand::reg ? valid[static_cast<size_t>(operand.slot)] : ~0u;
  }
};

struct Mbarrier {
  uint32_t expected = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;
  bool fenced = false;
  Clock clock;  // of all who arrived in this phase and before
};

struct BulkCopy {
  bool tensor = false;
  uint32_t shared = 0, barrier = 0;
  uint64_t global = 0, map = 0;
  uint32_t bytes = 0;
  int64_t x = 0, y = 0;
  int warp = 0, lane = 0;
  uint32_t clock = 0;  // of the warp when it was issued
  Clock seen;
};

// What cuTensorMapEncodeTiled wrote: opaque 128 bytes to the kernel.
struct TensorMap {
  uint64_t magic = 0, base = 0, columns = 0, rows = 0, stride = 0;
  uint32_t box_columns = 0, box_rows = 0;
  uint64_t reserved[10] = {};
};
static_assert(sizeof(TensorMap) == 128, "a CUtensorMap");
constexpr uint64_t kTensorMapMagic = 0x6d71635f74656e73;

// State of a byte of shared memory.
enum class Byte : uint8_t { uninitialised, generic, async, pending, barrier };

// Last accesses to four bytes of shared memory.
struct Access {
  int16_t writer = -1, writer_lane = -1;
  uint32_t written = 0;
};

struct Launch;

struct Block {
  Launch& launch;
  std::array<uint32_t, 3> index{};
  std::vector<Warp> warps;
  std::vector<uint8_t> shared;
  std::vector<Byte> bytes;
  std::vector<Access> accesses;
  std::vector<uint32_t> read_clock;  // [granule][warp]
  std::vector<int8_t> read_lane;     // [granule][warp]; 32: several
  struct Named {
    int threads = 0, arrived = 0;
    std::vector<int> warps;
  };
  std::array<Named, 16> barriers;
  std::map<uint32_t, Mbarrier> mbarriers;
  std::vector<BulkCopy> copies;
  int register_pool = 0;

  explicit Block(Launch& launch) : launch(launch) {}
  bool done() const;
};

struct Launch {
  const Kernel& kernel;
  std::array<uint32_t, 3> grid{}, threads{};
  std::vector<uint8_t> parameters;
  int64_t shared_bytes = 0;
  std::mt19937_64 random;
  int asynchrony = 2;  // 0 early, 1 late, 2 random
  int arch = 90;

  // Global memory that the caller named; empty: everything.
  struct Extent {
    uint64_t begin, end;
    bool writable;
  };
  std::vector<Extent> extents;

  // Words of global memory that this launch wrote.
  struct Written {
    uint64_t serial;  // of the block
    int warp, lane;
    uint32_t clock;   // of the warp
    uint64_t fences;  // of the thread when it wrote
  };
  std::unordered_map<uint64_t, Written> written;
  // By thread of a block (its serial number times 1024 + thread): fences so far.
  std::unordered_map<uint64_t, uint64_t> fences;
  // By address of a counter: what the blocks that counted had seen of themselves.
  std::unordered_map<uint64_t, std::map<uint64_t, Clock>> counted;

  explicit Launch(const Kernel& kernel) : kernel(kernel) {}
  uint64_t pick(uint64_t count) { return random() % count; }
  uint64_t serial(const Block& b) const {
    return (static_cast<uint64_t>(b.index[2]) * grid[1] + b.index[1]) * grid[0] + b.index[0];
  }
};

void run(Launch& launch);

[[noreturn]] void fault(const std::string& what);
std::string hex(uint64_t value);

// ---- registers ---------------------------------------------------------------------------------
// Stores a result for the active lanes; `ok`: lanes in which all operands had a value.
inline void store(Warp& w, int slot, const Lanes& values, uint32_t active, uint32_t ok) {
  Lanes& to = w.registers[static_cast<size_t>(slot)];
  if (active == ~0u) {
    to = values;
  } else {
    for (int lane = 0; lane < kLanes; ++lane)
      if (active >> lane & 1) to[static_cast<size_t>(lane)] = values[static_cast<size_t>(lane)];
  }
  uint32_t& valid = w.valid[static_cast<size_t>(slot)];
  valid = (valid & ~active) | (ok & active);
}
// Faults unless the operand has a value in all active lanes.
void require_value(const Warp& w, const Operand& operand, uint32_t active, const char* use);
// Addresses of a memory operand.
void addresses(const Warp& w, const Operand& operand, uint32_t active, Lanes& to);
// Waits until all lanes of the warp that are alive stand here; false: not yet.
bool gather(Warp& w, uint32_t active, uint32_t needed, const Instruction& i);

// ---- memory ------------------------------------------------------------------------------------
void check_global(Block& b, uint64_t address, int64_t bytes, bool write);
uint8_t* shared_at(Block& b, uint32_t address, int bytes);  // checks bounds and alignment
// An access of a warp's lane to shared memory, for races; lane 32: all.
void note_read(Block& b, Warp& w, int lane, uint32_t address, int bytes);
void note_write(Block& b, Warp& w, int lane, uint32_t address, int bytes, Byte state);
void note_global_write(Block& b, const Warp& w, int lane, uint64_t address, int bytes);
void learn(Warp& w, const std::map<uint64_t, Clock>& foreign);
void set_state(Block& b, uint32_t address, int bytes, Byte state);
void membar(Block& b, Warp& w, const Instruction& i, uint32_t active);

// ---- order between warps -----------------------------------------------------------------------
void join(Clock& to, const Clock& from);
void tick(Warp& w);  // what the warp does from here on is not ordered before what was released

// ---- asynchronous work -------------------------------------------------------------------------
void complete_copies(Block& b, Warp& w, std::vector<Warp::Copy>& group);
void complete_bulk(Block& b, size_t index);
void complete_products(Block& b, Warp& w, std::vector<Wgmma>& group);
bool phase_done(const Block& b, uint32_t address, uint32_t parity);

// The table of opcodes: filled by each file.
struct Entry {
  const char* signature;
  Handler run;
};
using Table = std::unordered_map<std::string, Entry>;
void add_arithmetic(Table& table);
void add_float(Table& table);
void add_memory(Table& table);
void add_matrix(Table& table);
void add_control(Table& table);
void add_asynchronous(Table& table);

}  // namespace ptx
