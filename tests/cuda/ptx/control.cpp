// Branches, barriers of warps and blocks, exchanges between lanes; the schedule of warps and blocks.
#include "operations.h"

#include <algorithm>

namespace ptx {

bool Block::done() const {
  for (const Warp& w : warps)
    if (w.alive) return false;
  return true;
}

bool gather(Warp& w, uint32_t active, uint32_t needed, const Instruction&) {
  if (needed & ~w.alive) fault("lanes that have ended are asked to take part");
  if ((active & needed) == needed) {
    if (active & ~needed) fault("lanes take part that are not asked to");
    w.waiting &= ~active;
    return true;
  }
  w.waiting |= active;
  w.advanced = true;
  return false;
}

namespace {

void set_place(Warp& w, uint32_t lanes, int at) {
  if (w.together && (lanes & w.alive) == w.alive) {
    w.at = at;
    return;
  }
  if (w.together) {
    w.place.fill(w.at);
    w.together = false;
  }
  for (int lane = 0; lane < kLanes; ++lane)
    if (lanes >> lane & 1) w.place[static_cast<size_t>(lane)] = at;
}

// Lanes that stand together again are one.
void meet(Warp& w) {
  if (w.together || !w.alive) return;
  const int first = w.place[static_cast<size_t>(__builtin_ctz(w.alive))];
  for (int lane = 0; lane < kLanes; ++lane)
    if ((w.alive >> lane & 1) && w.place[static_cast<size_t>(lane)] != first) return;
  w.together = true;
  w.at = first;
}

// The registers of a warp that ended are not counted on: the manual does not say that they come back.
void finish(Block& b, Warp& w) {
  bool copies = false, products = false;
  for (const auto& group : w.copies) copies |= !group.empty();
  for (const auto& group : w.products) products |= !group.empty();
  if (copies) fault("the warp ended while its cp.async were in flight");
  if (products) fault("the warp ended while its wgmma were in flight");
  const int first = w.number / 4 * 4;
  if (first + 4 > static_cast<int>(b.warps.size())) return;
  for (int other = first; other < first + 4; ++other) {
    const Warp& o = b.warps[static_cast<size_t>(other)];
    if (!o.alive && (o.wgmma_count != w.wgmma_count || o.wgmma_path != w.wgmma_path))
      fault("the warps of a warpgroup went through different wgmma");
  }
}

void watch(Warp& w, const Instruction& i) {
  if (i.opcode.compare(0, 15, "wgmma.mma_async") == 0) return;
  for (const int slot : i.reads) {
    if (w.busy[static_cast<size_t>(slot)] == 2) fault("a sum of a wgmma in flight is read");
    w.accessed[static_cast<size_t>(slot)] = ++w.time;
  }
  for (const int slot : i.writes) {
    if (w.busy[static_cast<size_t>(slot)]) fault("a register of a wgmma in flight is written");
    w.accessed[static_cast<size_t>(slot)] = ++w.time;
  }
}

void step(Block& b, Warp& w) {
  uint32_t active = w.alive;
  int at = w.at;
  if (!w.together) {
    at = INT32_MAX;
    for (int lane = 0; lane < kLanes; ++lane)
      if ((w.alive & ~w.waiting) >> lane & 1) at = std::min(at, w.place[static_cast<size_t>(lane)]);
    if (at == INT32_MAX) fault("the lanes of a warp stand before different instructions of the whole warp");
    active = 0;
    for (int lane = 0; lane < kLanes; ++lane)
      if ((w.alive >> lane & 1) && w.place[static_cast<size_t>(lane)] == at) active |= 1u << lane;
  }
  if (at >= static_cast<int>(b.launch.kernel.code.size())) fault("the end of the code without ret");
  auto& i = const_cast<Instruction&>(b.launch.kernel.code[static_cast<size_t>(at)]);
  try {
    uint32_t mask = active;
    if (i.guard >= 0) {
      const auto slot = static_cast<size_t>(i.guard);
      if ((w.valid[slot] & active) != active) fault("a branch on a predicate that nothing was written to");
      uint32_t on = 0;
      for (int lane = 0; lane < kLanes; ++lane)
        on |= static_cast<uint32_t>(w.registers[slot][static_cast<size_t>(lane)] & 1) << lane;
      mask = active & (i.guard_negated ? ~on : on);
    }
    ++i.executed;
    if (b.launch.kernel.warpgroups) watch(w, i);
    if (i.target >= 0) {
      if (i.opcode == "bra.uni" && mask != active) fault("bra.uni that only some lanes take");
      if (active & ~mask) set_place(w, active & ~mask, at + 1);
      if (mask) set_place(w, mask, i.target);
    } else {
      w.advanced = false;
      if (mask) i.run(b, w, i, mask);
      if (!w.advanced) set_place(w, active & w.alive, at + 1);
    }
    meet(w);
    if (!w.alive) finish(b, w);
  } catch (const Fault& error) {
    throw Fault(std::string(error.what()) + " [" + i.text.substr(0, 90) + ", line " + std::to_string(i.line) +
                ", warp " + std::to_string(w.number) + " of block " + std::to_string(b.index[0]) + "," +
                std::to_string(b.index[1]) + "," + std::to_string(b.index[2]) + "]");
  }
}

void leave(Block&, Warp& w, const Instruction&, uint32_t active) {
  if (w.together) {
    w.place.fill(w.at);
    w.together = false;
  }
  w.alive &= ~active;
  w.waiting &= w.alive;
  w.advanced = true;
}

// ---- barriers ----------------------------------------------------------------------------------
void barrier_sync(Block& b, Warp& w, const Instruction& i, uint32_t active) {
  if (!gather(w, active, ~0u, i)) return;
  const auto uniform = [&](const Operand& o) {
    require_value(w, o, active, "a barrier");
    const Lanes& lanes = w.lanes(o);
    for (size_t lane = 1; lane < kLanes; ++lane)
      if (lanes[lane] != lanes[0]) fault("a barrier that differs between lanes");
    return static_cast<int>(lanes[0]);
  };
  const int id = uniform(i.operands[0]);
  const int all = static_cast<int>(b.warps.size()) * kLanes;
  const int threads = i.operands.size() > 1 ? uniform(i.operands[1]) : all;
  if (id < 0 || id > 15) fault("barrier " + std::to_string(id));
  if (threads % kLanes || threads <= 0 || threads > all) fault("a barrier of " + std::to_string(threads) + " threads");
  Block::Named& named = b.barriers[static_cast<size_t>(id)];
  if (named.arrived > 0 && named.threads != threads) fault("a barrier of several counts of threads");
  named.threads = threads;
  named.arrived += kLanes;
  named.warps.push_back(w.number);
  w.blocked = Warp::at_barrier;
  w.barrier = id;
  if (named.arrived < threads) return;
  Clock seen(b.warps.size(), 0);
  std::map<uint64_t, Clock> foreign;
  for (const int warp : named.warps) {
    const Warp& other = b.warps[static_cast<size_t>(warp)];
    join(seen, other.clock);
    for (const auto& [serial, clock] : other.foreign)
      join(foreign.emplace(serial, Clock(clock.size(), 0)).first->second, clock);
  }
  for (const int warp : named.warps) {
    Warp& other = b.warps[static_cast<size_t>(warp)];
    other.clock = seen;
    tick(other);
    learn(other, foreign);
    other.blocked = Warp::no;
  }
  named = {};
}

uint32_t members(const Warp& w, const Operand& o, uint32_t active) {
  require_value(w, o, active, "a mask");
  return static_cast<uint32_t>(w.lanes(o)[static_cast<size_t>(__builtin_ctz(active))]);
}

void warp_sync(Block&, Warp& w, const Instruction& i, uint32_t active) {
  if (gather(w, active, members(w, i.operands[0], active), i)) tick(w);
}

void shuffle_xor(Block&, Warp& w, const Instruction& i, uint32_t active) {
  const uint32_t mask = members(w, i.operands[4], active);
  if (!gather(w, active, mask, i)) return;
  require_value(w, i.operands[2], active, "a lane");
  require_value(w, i.operands[3], active, "a lane");
  const Lanes& a = w.lanes(i.operands[1]);
  const uint32_t valid = w.validity(i.operands[1]);
  Lanes result{}, inside{};
  uint32_t ok = 0;
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    const auto by = static_cast<uint32_t>(w.lanes(i.operands[2])[lane]) & 31,
               c = static_cast<uint32_t>(w.lanes(i.operands[3])[lane]);
    const uint32_t segment = c >> 8 & 31, last = (lane & segment) | (c & 31 & ~segment);
    const uint32_t other = lane ^ by;
    inside[lane] = other <= last;
    const uint32_t from = inside[lane] ? other : lane;
    if ((active >> lane & 1) && !(active >> from & 1)) fault("a value of a lane that takes no part");
    result[lane] = a[from];
    ok |= (valid >> from & 1) << lane;
  }
  store(w, i.operands[0].parts[0].slot, result, active, ok);
  store(w, i.operands[0].parts[1].slot, inside, active, ~0u);
}

void vote_any(Block&, Warp& w, const Instruction& i, uint32_t active) {
  if (!gather(w, active, members(w, i.operands[2], active), i)) return;
  require_value(w, i.operands[1], active, "a vote");
  uint64_t any = 0;
  for (size_t lane = 0; lane < kLanes; ++lane)
    if (active >> lane & 1) any |= w.lanes(i.operands[1])[lane] & 1;
  Lanes result;
  result.fill(any);
  store(w, i.operands[0].slot, result, active, ~0u);
}

// ---- schedule ----------------------------------------------------------------------------------
bool runnable(const Block& b, const Warp& w) {
  if (!w.alive) return false;
  switch (w.blocked) {
    case Warp::no:
      return true;
    case Warp::at_barrier:
      return false;
    case Warp::at_mbarrier:
      return phase_done(b, w.wanted_address, w.wanted_parity);
    case Warp::at_registers:
      return w.wanted_registers <= b.register_pool;
  }
  return false;
}

std::unique_ptr<Block> make_block(Launch& l, uint64_t number) {
  auto b = std::make_unique<Block>(l);
  b->index = {static_cast<uint32_t>(number % l.grid[0]), static_cast<uint32_t>(number / l.grid[0] % l.grid[1]),
              static_cast<uint32_t>(number / l.grid[0] / l.grid[1])};
  const size_t warps = l.threads[0] / kLanes, granules = static_cast<size_t>(l.shared_bytes + 3) / 4;
  const auto bytes = static_cast<size_t>(l.shared_bytes);
  b->shared.resize(bytes);
  for (uint8_t& byte : b->shared) byte = static_cast<uint8_t>(l.random());
  b->bytes.assign(bytes, Byte::uninitialised);
  b->accesses.assign(granules, {});
  b->read_clock.assign(granules * warps, 0);
  b->read_lane.assign(granules * warps, 0);
  b->warps.resize(warps);
  const int each =
      std::min(static_cast<int>(65536 / (l.threads[0] * static_cast<uint32_t>(l.kernel.blocks_per_sm))) / 8 * 8, 248);
  const auto slots = static_cast<size_t>(l.kernel.slots);
  for (size_t n = 0; n < warps; ++n) {
    Warp& w = b->warps[n];
    w.number = static_cast<int>(n);
    w.registers.resize(slots);
    w.valid.assign(slots, 0);
    w.clock.assign(warps, 0);
    w.clock[n] = 1;
    w.registers_each = each;
    if (l.kernel.warpgroups) {
      w.busy.assign(slots, 0);
      w.accessed.assign(slots, 0);
    }
  }
  return b;
}

std::string deadlock(const Block& b) {
  std::string text = "a deadlock:";
  static const char* const kinds[] = {"runs", "bar.sync", "mbarrier", "setmaxnreg"};
  for (const Warp& w : b.warps) {
    if (!w.alive) continue;
    text += " warp " + std::to_string(w.number) + " at " + kinds[w.blocked];
    if (w.blocked == Warp::at_mbarrier)
      text += " " + hex(w.wanted_address - kSharedBase) + " parity " + std::to_string(w.wanted_parity);
    if (w.blocked == Warp::at_barrier) text += " " + std::to_string(w.barrier);
    text += ";";
  }
  return text;
}

// Some instructions of some warp, or the end of a bulk copy.
void turn(Block& b) {
  Launch& l = b.launch;
  std::vector<size_t> ready;
  for (size_t n = 0; n < b.warps.size(); ++n)
    if (runnable(b, b.warps[n])) ready.push_back(n);
  if (!b.copies.empty() && (ready.empty() || (l.asynchrony == 2 && l.pick(3) == 0))) {
    complete_bulk(b, l.pick(b.copies.size()));
    return;
  }
  if (ready.empty()) fault(deadlock(b));
  Warp& w = b.warps[ready[l.pick(ready.size())]];
  w.blocked = Warp::no;
  const uint64_t count = uint64_t{1} << l.pick(10);
  for (uint64_t n = 0; n < count && w.alive && w.blocked == Warp::no; ++n) step(b, w);
}

}  // namespace

void run(Launch& l) {
  uint64_t count = uint64_t{l.grid[0]} * l.grid[1] * l.grid[2];
  std::vector<uint64_t> order(count);
  for (uint64_t n = 0; n < count; ++n) order[n] = n;
  std::shuffle(order.begin(), order.end(), l.random);
  const size_t resident = 1 + l.pick(3);
  std::vector<std::unique_ptr<Block>> blocks;
  while (!order.empty() || !blocks.empty()) {
    while (blocks.size() < resident && !order.empty()) {
      blocks.push_back(make_block(l, order.back()));
      order.pop_back();
    }
    const size_t at = l.pick(blocks.size());
    turn(*blocks[at]);
    if (!blocks[at]->done()) continue;
    if (!blocks[at]->copies.empty()) fault("a block ended while its bulk copies were in flight");
    blocks.erase(blocks.begin() + static_cast<int64_t>(at));
  }
}

void add_control(Table& t) {
  t["bra"] = {":", nullptr};
  t["bra.uni"] = {":", nullptr};
  t["ret"] = {":", leave};
  t["bar.sync"] = {":w|:ww", barrier_sync};
  t["bar.warp.sync"] = {":w", warp_sync};
  t["shfl.sync.bfly.b32"] = {"{wp}:wwww", shuffle_xor};
  t["vote.sync.any.pred"] = {"p:pw", vote_any};
  t["membar.gl"] = {":", membar};
}

}  // namespace ptx
