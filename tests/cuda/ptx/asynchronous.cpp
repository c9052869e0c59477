// cp.async, mbarrier, bulk copies and their fences.
#include "operations.h"

namespace ptx {
namespace {

template <class F> void each_lane(uint32_t active, F use) {
  for (size_t lane = 0; lane < kLanes; ++lane)
    if (active >> lane & 1) use(lane);
}

// ---- cp.async ----------------------------------------------------------------------------------
// [shared], [global], 16, bytes that are read: the rest is zeros.
void copy_async(Block& b, Warp& w, const Instruction& i, uint32_t active) {
  Lanes to, from;
  addresses(w, i.operands[0], active, to);
  addresses(w, i.operands[1], active, from);
  require_value(w, i.operands[3], active, "a size");
  if (i.operands[2].value != 16) fault("cp.async.cg copies 16 bytes");
  const Lanes& sizes = w.lanes(i.operands[3]);
  each_lane(active, [&](size_t lane) {
    const auto shared = static_cast<uint32_t>(to[lane]);
    const auto read = static_cast<int>(sizes[lane]);
    shared_at(b, shared, 16);
    if (read < 0 || read > 16) fault("cp.async reads more than it copies");
    if (from[lane] % 16) fault("cp.async from " + hex(from[lane]) + ", which is not aligned to 16");
    if (read > 0) check_global(b, from[lane], read, false);
    for (uint32_t byte = 0; byte < 16; ++byte) {
      const Byte state = b.bytes[shared - kSharedBase + byte];
      if (state == Byte::pending || state == Byte::barrier)
        fault("cp.async to bytes of another copy or of an mbarrier, at " + hex(shared - kSharedBase));
    }
    note_write(b, w, static_cast<int>(lane), shared, 16, Byte::pending);
    w.copies.back().push_back({shared, from[lane], 16, read, static_cast<int>(lane)});
  });
}

void commit(Block&, Warp& w, const Instruction& i, uint32_t active) {
  if (!gather(w, active, w.alive, i)) return;  // threads have groups of their own; here those of a warp go together
  w.copies.emplace_back();
}

void wait_group(Block& b, Warp& w, const Instruction& i, uint32_t active) {
  if (!gather(w, active, w.alive, i)) return;
  const auto left = static_cast<size_t>(i.operands[0].value);
  while (w.copies.size() - 1 > left) {
    complete_copies(b, w, w.copies.front());
    w.copies.pop_front();
  }
}

// ---- mbarrier ----------------------------------------------------------------------------------
Mbarrier& mbarrier(Block& b, uint32_t address) {
  const auto found = b.mbarriers.find(address);
  if (found == b.mbarriers.end()) fault("no mbarrier was initialised at " + hex(address - kSharedBase));
  return found->second;
}

void advance(Mbarrier& m) {
  if (m.pending > 0 || m.bytes != 0) return;
  ++m.phase;
  m.pending = m.expected;
}

void barrier_init(Block& b, Warp& w, const Instruction& i, uint32_t active) {
  Lanes at;
  addresses(w, i.operands[0], active, at);
  require_value(w, i.operands[1], active, "a count");
  each_lane(active, [&](size_t lane) {
    const auto address = static_cast<uint32_t>(at[lane]);
    shared_at(b, address, 8);
    const auto count = static_cast<uint32_t>(w.lanes(i.operands[1])[lane]);
    if (count < 1 || count >= 1u << 20) fault("an mbarrier of " + std::to_string(count) + " arrivals");
    if (b.mbarriers.count(address)) fault("an mbarrier that was initialised already, at " + hex(address - kSharedBase));
    note_write(b, w, static_cast<int>(lane), address, 8, Byte::barrier);
    Mbarrier m;
    m.expected = m.pending = count;
    m.clock.assign(b.warps.size(), 0);
    b.mbarriers[address] = m;
  });
}

void arrive_at(Block& b, Warp& w, uint32_t active, size_t lane, uint32_t address, int64_t bytes) {
  shared_at(b, address, 8);
  // An arrival stands for what its own lane did, and for the other lanes' accesses up to the warp's last barrier.
  if (w.touched & ~active)
    fault("an arrival at an mbarrier that the accesses of other lanes of the warp are not ordered before");
  note_read(b, w, static_cast<int>(lane), address, 8);  // the initialisation came before
  Mbarrier& m = mbarrier(b, address);
  m.bytes += bytes;
  if (m.bytes >= 1 << 20 || bytes < 0) fault("an mbarrier that expects too many bytes");
  if (m.pending == 0) fault("more arrivals at an mbarrier than it expects, at " + hex(address - kSharedBase));
  --m.pending;
  join(m.clock, w.clock);
  tick(w);
  advance(m);
}

void arrive(Block& b, Warp& w, const Instruction& i, uint32_t active) {
  Lanes at;
  addresses(w, i.operands[1], active, at);
  each_lane(active, [&](size_t lane) { arrive_at(b, w, active, lane, static_cast<uint32_t>(at[lane]), 0); });
}
void arrive_expect(Block& b, Warp& w, const Instruction& i, uint32_t active) {
  Lanes at;
  addresses(w, i.operands[1], active, at);
  require_value(w, i.operands[2], active, "a count of bytes");
  each_lane(active, [&](size_t lane) {
    arrive_at(b, w, active, lane, static_cast<uint32_t>(at[lane]), static_cast<int64_t>(w.lanes(i.operands[2])[lane]));
  });
}

// May answer false before the phase is complete, or wait for it.
void try_wait(Block& b, Warp& w, const Instruction& i, uint32_t active) {
  Lanes at, result{};
  addresses(w, i.operands[1], active, at);
  require_value(w, i.operands[2], active, "a parity");
  bool all = true;
  each_lane(active, [&](size_t lane) {
    const auto address = static_cast<uint32_t>(at[lane]);
    const auto parity = static_cast<uint32_t>(w.lanes(i.operands[2])[lane]);
    if (parity > 1) fault("a parity of " + std::to_string(parity));
    shared_at(b, address, 8);
    const uint32_t touched = w.touched;
    note_read(b, w, static_cast<int>(lane), address, 8);
    w.touched = touched;  // no data
    mbarrier(b, address);
    result[lane] = phase_done(b, address, parity);
    if (!result[lane]) {
      all = false;
      w.wanted_address = address;
      w.wanted_parity = parity;
    }
  });
  if (!all && b.launch.pick(4) != 0) {
    w.blocked = Warp::at_mbarrier;
    w.advanced = true;
    return;
  }
  each_lane(active, [&](size_t lane) {
    if (result[lane]) join(w.clock, mbarrier(b, static_cast<uint32_t>(at[lane])).clock);
  });
  store(w, i.operands[0].slot, result, active, ~0u);
}

void fence_init(Block& b, Warp&, const Instruction&, uint32_t) {
  for (auto& [address, m] : b.mbarriers) m.fenced = true;
}
// What the thread wrote before becomes visible to asynchronous readers.
void fence_proxy(Block& b, Warp& w, const Instruction&, uint32_t) {
  for (size_t byte = 0; byte < b.bytes.size(); ++byte)
    if (b.bytes[byte] == Byte::generic && b.accesses[byte / 4].writer == w.number) b.bytes[byte] = Byte::async;
}

// ---- bulk copies -------------------------------------------------------------------------------
TensorMap& tensor_map(Block& b, uint64_t address) {
  const uint64_t offset = address - kParameterBase;
  if (address < kParameterBase || offset + sizeof(TensorMap) > b.launch.parameters.size())
    fault("a tensor map that is no parameter, at " + hex(address));
  if (offset % 64) fault("a tensor map that is not aligned to 64");
  auto* map = reinterpret_cast<TensorMap*>(b.launch.parameters.data() + offset);
  if (map->magic != kTensorMapMagic) fault("no tensor map at " + hex(address));
  return *map;
}

void start(Block& b, Warp& w, BulkCopy copy, size_t lane) {
  Mbarrier& m = mbarrier(b, copy.barrier);
  shared_at(b, copy.barrier, 8);
  note_read(b, w, static_cast<int>(lane), copy.barrier, 8);
  if (!m.fenced) fault("a bulk copy on an mbarrier without fence.mbarrier_init since its initialisation");
  shared_at(b, copy.shared, 16);
  shared_at(b, copy.shared + copy.bytes - 1, 1);
  for (uint32_t byte = 0; byte < copy.bytes; ++byte) {
    const Byte state = b.bytes[copy.shared - kSharedBase + byte];
    if (state == Byte::pending || state == Byte::barrier)
      fault("a bulk copy to bytes of another copy or of an mbarrier, at " + hex(copy.shared - kSharedBase + byte));
  }
  note_write(b, w, static_cast<int>(lane), copy.shared, static_cast<int>(copy.bytes), Byte::pending);
  copy.warp = w.number;
  copy.lane = static_cast<int>(lane);
  copy.seen = w.clock;
  b.copies.push_back(copy);
  tick(w);
  if (b.launch.asynchrony == 0) complete_bulk(b, b.copies.size() - 1);
}

void copy_bulk(Block& b, Warp& w, const Instruction& i, uint32_t active) {
  Lanes to, from, barrier;
  addresses(w, i.operands[0], active, to);
  addresses(w, i.operands[1], active, from);
  addresses(w, i.operands[3], active, barrier);
  require_value(w, i.operands[2], active, "a size");
  each_lane(active, [&](size_t lane) {
    BulkCopy copy;
    copy.shared = static_cast<uint32_t>(to[lane]);
    copy.global = from[lane];
    copy.bytes = static_cast<uint32_t>(w.lanes(i.operands[2])[lane]);
    copy.barrier = static_cast<uint32_t>(barrier[lane]);
    if (copy.bytes == 0 || copy.bytes % 16 || copy.global % 16 || copy.shared % 16)
      fault("a bulk copy that is not in units of 16 bytes");
    check_global(b, copy.global, copy.bytes, false);
    start(b, w, copy, lane);
  });
}

void copy_tensor(Block& b, Warp& w, const Instruction& i, uint32_t active) {
  Lanes to, map, barrier;
  addresses(w, i.operands[0], active, to);
  addresses(w, i.operands[1], active, map);
  addresses(w, i.operands[2], active, barrier);
  const std::vector<Operand>& coordinates = i.operands[1].parts;
  if (coordinates.size() != 2) fault("a box of a two-dimensional tensor has two coordinates");
  for (const Operand& coordinate : coordinates) require_value(w, coordinate, active, "a coordinate");
  each_lane(active, [&](size_t lane) {
    const TensorMap& m = tensor_map(b, map[lane]);
    BulkCopy copy;
    copy.tensor = true;
    copy.shared = static_cast<uint32_t>(to[lane]);
    copy.map = map[lane];
    copy.barrier = static_cast<uint32_t>(barrier[lane]);
    copy.bytes = m.box_columns * m.box_rows;
    copy.x = from_bits<int32_t>(w.lanes(coordinates[0])[lane]);
    copy.y = from_bits<int32_t>(w.lanes(coordinates[1])[lane]);
    // 128-byte aligned by the manual; the swizzle's pattern repeats every 1024 bytes and is read so by wgmma.
    if (copy.shared % 1024)
      fault("a swizzled box at shared address " + hex(copy.shared - kSharedBase) + ", which is not aligned to 1024");
    start(b, w, copy, lane);
  });
}

void prefetch_map(Block& b, Warp& w, const Instruction& i, uint32_t active) {
  Lanes at;
  addresses(w, i.operands[0], active, at);
  each_lane(active, [&](size_t lane) { tensor_map(b, at[lane]); });
}

}  // namespace

bool phase_done(const Block& b, uint32_t address, uint32_t parity) {
  return (b.mbarriers.at(address).phase & 1) != parity;
}

void complete_copies(Block& b, Warp& w, std::vector<Warp::Copy>& group) {
  for (const Warp::Copy& copy : group) {
    uint8_t* to = shared_at(b, copy.shared, 16);
    memset(to, 0, static_cast<size_t>(copy.bytes));
    memcpy(to, reinterpret_cast<const void*>(copy.global), static_cast<size_t>(copy.read));
    set_state(b, copy.shared, copy.bytes, Byte::generic);
    for (uint32_t at = 0; at < 4; ++at)  // the thread has it from now on, others by a barrier
      b.accesses[(copy.shared - kSharedBase) / 4 + at].written = w.clock[static_cast<size_t>(w.number)];
  }
}

void complete_bulk(Block& b, size_t index) {
  const BulkCopy copy = b.copies[index];
  b.copies.erase(b.copies.begin() + static_cast<int64_t>(index));
  uint8_t* base = b.shared.data();
  if (copy.tensor) {
    const TensorMap& m = tensor_map(b, copy.map);
    for (uint32_t row = 0; row < m.box_rows; ++row) {
      for (uint32_t column = 0; column < m.box_columns; ++column) {
        const int64_t x = copy.x + column, y = copy.y + row;
        uint8_t value = 0;  // outside of the tensor
        if (x >= 0 && y >= 0 && x < static_cast<int64_t>(m.columns) && y < static_cast<int64_t>(m.rows)) {
          const uint64_t from = m.base + static_cast<uint64_t>(y) * m.stride + static_cast<uint64_t>(x);
          if (column % 16 == 0) check_global(b, from, 1, false);
          value = *reinterpret_cast<const uint8_t*>(from);
        }
        uint32_t address = copy.shared + row * m.box_columns + column;
        address ^= (address >> 7 & 7) << 4;
        base[address - kSharedBase] = value;
      }
    }
  } else {
    memcpy(base + (copy.shared - kSharedBase), reinterpret_cast<const void*>(copy.global), copy.bytes);
  }
  set_state(b, copy.shared, static_cast<int>(copy.bytes), Byte::async);
  Mbarrier& m = b.mbarriers.at(copy.barrier);
  m.bytes -= copy.bytes;
  join(m.clock, copy.seen);
  advance(m);
}

void add_asynchronous(Table& t) {
  t["cp.async.cg.shared.global"] = {":aanw", copy_async};
  t["cp.async.commit_group"] = {":", commit};
  t["cp.async.wait_group"] = {":n", wait_group};
  t["mbarrier.init.shared::cta.b64"] = {":aw", barrier_init};
  t["mbarrier.arrive.shared::cta.b64"] = {"_:a", arrive};
  t["mbarrier.arrive.expect_tx.shared::cta.b64"] = {"_:aw", arrive_expect};
  t["mbarrier.try_wait.parity.shared::cta.b64"] = {"p:aw", try_wait};
  t["fence.mbarrier_init.release.cluster"] = {":", fence_init};
  t["fence.proxy.async.shared::cta"] = {":", fence_proxy};
  t["cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"] = {":aawa", copy_bulk};
  t["cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"] = {":aaa", copy_tensor};
  t["prefetch.tensormap"] = {":a", prefetch_map};
}

}  // namespace ptx
