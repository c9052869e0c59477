// See emulator.h. References are to the PTX manual's sections on the instruction named.
#include "mqc/gpu.cuh"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <vector>

namespace mqc::emulator {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr uint32_t kSharedBase = 0x10;  // shared memory need not start at a multiple of 1024

struct Lane {  // what a lane brings to an operation of its warp
  const void* in = nullptr;
  void* out = nullptr;
  uint64_t number = 0;
};

struct Warp {
  int size = 0;     // lanes that exist and have not exited
  int arrived = 0;
  uint64_t generation = 0;
  const char* operation = nullptr;
  Lane lanes[32];
  std::deque<std::vector<std::function<void()>>> groups;  // committed wgmma groups
  std::vector<std::function<void()>> open;                // not committed yet
  bool fenced = false;  // wgmma.fence since the last group was committed
};

struct Fiber {
  ucontext_t context;  // where it begins
  jmp_buf place;       // where it goes on
  bool begun = false;
  int index = 0;
  bool done = false;
  std::function<bool()> ready;  // empty: may run
  std::deque<std::vector<std::function<void()>>> copies;  // committed cp.async groups
  std::vector<std::function<void()>> open;
};

struct Rendezvous {
  int arrived = 0;
  uint64_t generation = 0;
};

struct MBarrier {
  int expected = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;
  bool fenced = false;  // its initialisation is visible to the copy engine
};

struct Block {
  int x, y, z, threads;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  Rendezvous all;
  int alive = 0;
  std::map<int, Rendezvous> named;
  std::map<uint32_t, MBarrier> barriers;
  std::vector<std::function<void()>> bulk;  // bulk copies in flight
};

Grid grid_size;
Block* block = nullptr;
Fiber* current = nullptr;
jmp_buf scheduler;
const std::function<void()>* body = nullptr;
alignas(1024) uint8_t shared[256 * 1024];
size_t shared_limit = 0;
uint64_t state = 0x9E3779B97F4A7C15ull;
int asynchrony = 2;

uint64_t random_number() {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

bool act_now() { return asynchrony == 0 || (asynchrony == 2 && random_number() % 2 == 0); }

[[noreturn]] void fail(const char* what) {
  fprintf(stderr, "emulator: %s (block %d %d %d, thread %d)\n", what, block ? block->x : -1,
          block ? block->y : -1, block ? block->z : -1, current ? current->index : -1);
  abort();
}

// Between fiber and scheduler. swapcontext would ask the system for the signal mask each time.
void leave(Fiber& fiber) {
  if (!_setjmp(fiber.place)) _longjmp(scheduler, 1);
}

void resume(Fiber& fiber) {
  if (_setjmp(scheduler)) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  setcontext(&fiber.context);
}

void wait_until(std::function<bool()> ready) {
  if (ready()) return;
  current->ready = std::move(ready);
  leave(*current);
}

void enter() {
  (*body)();
  Fiber* self = current;
  self->done = true;
  if (!self->copies.empty() || !self->open.empty())
    for (auto* list : {&self->open}) for (auto& copy : *list) copy();
  Warp& warp = block->warps[self->index / 32];
  if (warp.arrived) fail("a thread exits while its warp waits for it");
  --warp.size;
  --block->alive;
  if (block->all.arrived) fail("a thread exits while its block waits in a barrier");
  leave(*self);
}

uint8_t* at(uint32_t address, size_t bytes) {
  if (address < kSharedBase || address - kSharedBase + bytes > shared_limit)
    fail("shared memory access out of bounds");
  return shared + address;
}

// All lanes of the warp meet; the last one runs `act`.
void collective(const char* operation, Lane lane, const std::function<void(Warp&)>& act) {
  Warp& warp = block->warps[current->index / 32];
  if (warp.arrived == 0) {
    warp.operation = operation;
  } else if (warp.operation != operation) {
    fprintf(stderr, "emulator: %s meets %s\n", operation, warp.operation);
    fail("lanes of a warp run different collective operations");
  }
  warp.lanes[current->index % 32] = lane;
  const uint64_t generation = warp.generation;
  if (++warp.arrived == 32) {
    act(warp);
    warp.arrived = 0;
    ++warp.generation;
  } else {
    wait_until([&warp, generation] { return warp.generation != generation; });
  }
}

void meet(Rendezvous& point, int count) {
  const uint64_t generation = point.generation;
  if (++point.arrived == count) {
    point.arrived = 0;
    ++point.generation;
  } else {
    wait_until([&point, generation] { return point.generation != generation; });
  }
}

MBarrier& barrier_at(uint32_t address) {
  at(address, 8);
  if (address % 8) fail("an mbarrier is not 8-byte aligned");
  auto found = block->barriers.find(address);
  if (found == block->barriers.end()) fail("an mbarrier is used before its initialisation");
  return found->second;
}

void settle(MBarrier& b) {
  if (b.pending < 0) fail("more arrivals at an mbarrier than a phase expects");
  if (b.pending == 0 && b.bytes == 0) {
    b.phase ^= 1;
    b.pending = b.expected;
  }
}

void run_bulk(size_t index) {
  auto copy = std::move(block->bulk[index]);
  block->bulk.erase(block->bulk.begin() + static_cast<ptrdiff_t>(index));
  copy();
}

void start_bulk(uint32_t barrier, std::function<void()> copy) {
  if (!barrier_at(barrier).fenced) fail("a bulk copy gets an mbarrier without fence.mbarrier_init");
  block->bulk.push_back(std::move(copy));
  if (asynchrony == 0) run_bulk(block->bulk.size() - 1);
}

void run_block() {
  std::vector<size_t> live(block->fibers.size());
  for (size_t i = 0; i < live.size(); ++i) live[i] = i;
  size_t focus = random_number() % live.size();
  while (!live.empty()) {
    // Late mode finishes a bulk copy only where nothing else can go on.
    if (asynchrony == 2 && !block->bulk.empty() && random_number() % 4 == 0)
      run_bulk(random_number() % block->bulk.size());
    // Mostly one warp runs ahead as far as it can, which is where missing barriers show; the others
    // come at random.
    if (random_number() % 1024 == 0) focus = random_number() % block->fibers.size();
    size_t start = random_number() % live.size();
    if (random_number() % 16) {
      start = std::lower_bound(live.begin(), live.end(), focus) - live.begin();
      if (start == live.size()) start = 0;
    }
    bool ran = false;
    for (size_t step = 0; step < live.size() && !ran; ++step) {
      const size_t slot = (start + step) % live.size();
      Fiber& fiber = *block->fibers[live[slot]];
      if (fiber.ready) {
        if (!fiber.ready()) continue;
        fiber.ready = nullptr;
      }
      current = &fiber;
      resume(fiber);
      current = nullptr;
      ran = true;
      if (fiber.done) live.erase(live.begin() + static_cast<ptrdiff_t>(slot));
    }
    if (ran) continue;
    if (block->bulk.empty()) fail("deadlock: every thread waits");
    run_bulk(random_number() % block->bulk.size());
  }
  if (!block->bulk.empty()) fail("a block ends with bulk copies in flight");
}

__attribute__((noinline)) void prepare(ucontext_t& context, char* stack) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
}

}  // namespace

void configure(uint64_t seed, int mode) {
  state = seed * 0x9E3779B97F4A7C15ull + 0x1234567ull;
  asynchrony = mode;
}

void launch(Grid grid, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
  if (threads % 32 || threads > 1024) fail("threads of a block are a multiple of 32 up to 1024");
  if (shared_bytes > 232448) fail("more shared memory than a block can have");
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.y > 65535 || grid.z > 65535)
    fail("a grid is empty, or more than 65535 blocks high or deep");
  if (asynchrony == 3) return;
  grid_size = grid;
  body = &kernel;
  shared_limit = shared_bytes;
  std::vector<int> order(static_cast<size_t>(grid.x) * grid.y * grid.z);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_number() % i]);
  // Kept from launch to launch: most of their pages are never touched, and the others only once.
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() < static_cast<size_t>(threads)) stacks.emplace_back(new char[kStackBytes]);
  for (const int number : order) {
    Block here{number % grid.x, number / grid.x % grid.y, number / (grid.x * grid.y), threads,
               {}, {}, {}, threads, {}, {}, {}};
    here.warps.resize(threads / 32);
    for (auto& warp : here.warps) warp.size = 32;
    memset(shared, 0xA5, sizeof shared);
    block = &here;
    for (int t = 0; t < threads; ++t) {
      here.fibers.push_back(std::make_unique<Fiber>());
      Fiber& fiber = *here.fibers.back();
      fiber.index = t;
      prepare(fiber.context, stacks[t].get());
    }
    run_block();
    block = nullptr;
  }
}

}  // namespace mqc::emulator

namespace mqc::gpu {

using namespace mqc::emulator;

int thread_index() { return current->index; }
int block_x() { return block->x; }
int block_y() { return block->y; }
int block_z() { return block->z; }
int blocks_x() { return grid_size.x; }
int lane_index() { return current->index % 32; }

uint8_t* shared_memory() { return shared + kSharedBase; }
uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - shared);
}

void sync_block() { meet(block->all, block->threads); }
void sync_warp() {
  collective("sync_warp", {}, [](Warp&) {});
}
void sync_named(int id, int threads) { meet(block->named[id], threads); }

uint32_t atomic_add(uint32_t* address, uint32_t value) {
  const uint32_t old = *address;
  *address = old + value;
  return old;
}

void shuffle_bytes(void* value, size_t bytes, int source) {
  uint64_t copy = 0;
  memcpy(&copy, value, bytes);
  collective("shuffle", {&copy, value, static_cast<uint64_t>(source)}, [bytes](Warp& warp) {
    for (auto& lane : warp.lanes) memcpy(lane.out, warp.lanes[lane.number % 32].in, bytes);
  });
}

bool any_lane(bool value) {
  bool any = false;
  collective("any_lane", {nullptr, &any, value}, [](Warp& warp) {
    bool found = false;
    for (const auto& lane : warp.lanes) found = found || lane.number != 0;
    for (auto& lane : warp.lanes) *static_cast<bool*>(lane.out) = found;
  });
  return any;
}

void misaligned() { fail("a 16-byte access to global memory is misaligned"); }

Vector16 load_shared16(uint32_t address) {
  Vector16 v;
  if (address % 16) fail("a 16-byte load from shared memory is misaligned");
  memcpy(&v, at(address, 16), 16);
  return v;
}

void load_shared8(uint32_t (&r)[2], uint32_t address) {
  if (address % 8) fail("an 8-byte load from shared memory is misaligned");
  memcpy(r, at(address, 8), 8);
}

float load_shared_float(uint32_t address) {
  float value;
  if (address % 4) fail("a 4-byte load from shared memory is misaligned");
  memcpy(&value, at(address, 4), 4);
  return value;
}

// ---- cp.async: done at the latest when its group is waited for ---------------------------------
void copy_async_part(uint32_t to, const void* from, int bytes) {
  if (to % 16 || (bytes && reinterpret_cast<uintptr_t>(from) % 16)) fail("cp.async is misaligned");
  if (bytes < 0 || bytes > 16) fail("cp.async of more than 16 bytes");
  uint8_t* target = at(to, 16);
  auto copy = [target, from, bytes] {
    memset(target, 0, 16);
    if (bytes) memcpy(target, from, static_cast<size_t>(bytes));
  };
  if (act_now()) copy();
  else current->open.push_back(copy);
}
void copy_async_commit() { current->copies.push_back(std::move(current->open)); current->open.clear(); }
void copy_async_wait_groups(int pending) {
  while (static_cast<int>(current->copies.size()) > pending) {
    for (auto& copy : current->copies.front()) copy();
    current->copies.pop_front();
  }
}

// ---- ldmatrix: lanes 8 i .. 8 i + 7 hold the row addresses of matrix i -------------------------
static void load_matrix(uint32_t (&r)[4], uint32_t address, bool transposed) {
  if (address % 16) fail("an ldmatrix row is misaligned");
  at(address, 16);
  collective(transposed ? "ldmatrix.trans" : "ldmatrix", {nullptr, r, address}, [transposed](Warp& warp) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* out = static_cast<uint32_t*>(warp.lanes[lane].out);
      for (int i = 0; i < 4; ++i) {
        uint16_t half[2];
        for (int h = 0; h < 2; ++h) {
          const int major = lane / 4, minor = lane % 4 * 2 + h;
          const int row = transposed ? minor : major, column = transposed ? major : minor;
          memcpy(&half[h], at(static_cast<uint32_t>(warp.lanes[8 * i + row].number), 16) + 2 * column, 2);
        }
        out[i] = half[0] | static_cast<uint32_t>(half[1]) << 16;
      }
    }
  });
}
void load_matrix4(uint32_t (&r)[4], uint32_t address) { load_matrix(r, address, false); }
void load_matrix4_transposed(uint32_t (&r)[4], uint32_t address) { load_matrix(r, address, true); }

// ---- mma.m16n8k32 s8 and mma.m16n8k16 half: "Matrix Fragments for mma.m16n8k32 / .m16n8k16" -----
namespace {

struct MmaInput {
  uint32_t a[4];
  uint32_t b[2];
  uint64_t descriptor;
};

int8_t byte_of(uint32_t word, int index) { return static_cast<int8_t>(word >> (8 * index)); }

// A of 16 x 32 bytes: row = lane / 4 (+ 8 for registers 1, 3), column = (lane % 4) * 4 + byte
// (+ 16 for registers 2, 3).
void gather_a(const Warp& warp, int8_t (&a)[16][32]) {
  for (int lane = 0; lane < 32; ++lane) {
    const auto& in = *static_cast<const MmaInput*>(warp.lanes[lane].in);
    for (int i = 0; i < 16; ++i) {
      const int row = lane / 4 + ((i >= 4 && i < 8) || i >= 12 ? 8 : 0);
      const int column = lane % 4 * 4 + (i & 3) + (i >= 8 ? 16 : 0);
      a[row][column] = byte_of(in.a[i / 4], i % 4);
    }
  }
}

float half_of(uint32_t word, int index, bool is_bf16) {
  const auto bits = static_cast<uint16_t>(word >> (16 * index));
  return is_bf16 ? to_float(bf16{bits}) : to_float(f16{bits});
}

}  // namespace

void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const MmaInput in{{a[0], a[1], a[2], a[3]}, {b0, b1}, 0};
  collective("mma_s8", {&in, d, 0}, [](Warp& warp) {
    int8_t left[16][32], right[32][8];
    gather_a(warp, left);
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 8; ++i)
        right[lane % 4 * 4 + (i & 3) + (i >= 4 ? 16 : 0)][lane / 4] =
            byte_of(static_cast<const MmaInput*>(warp.lanes[lane].in)->b[i / 4], i % 4);
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + (i < 2 ? 0 : 8), column = lane % 4 * 2 + (i & 1);
        int32_t sum = 0;
        for (int k = 0; k < 32; ++k) sum += left[row][k] * right[k][column];
        static_cast<int32_t*>(warp.lanes[lane].out)[i] += sum;
      }
  });
}

void mma_half_any(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool is_bf16) {
  const MmaInput in{{a[0], a[1], a[2], a[3]}, {b0, b1}, 0};
  collective("mma_half", {&in, d, 0}, [is_bf16](Warp& warp) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto& from = *static_cast<const MmaInput*>(warp.lanes[lane].in);
      for (int i = 0; i < 8; ++i) {
        const int row = lane / 4 + ((i / 2) % 2 ? 8 : 0);
        const int column = lane % 4 * 2 + (i & 1) + (i >= 4 ? 8 : 0);
        left[row][column] = half_of(from.a[i / 2], i % 2, is_bf16);
      }
      for (int i = 0; i < 4; ++i)
        right[lane % 4 * 2 + (i & 1) + (i >= 2 ? 8 : 0)][lane / 4] = half_of(from.b[i / 2], i % 2, is_bf16);
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + (i < 2 ? 0 : 8), column = lane % 4 * 2 + (i & 1);
        double sum = 0;
        for (int k = 0; k < 16; ++k) sum += static_cast<double>(left[row][k]) * right[k][column];
        static_cast<float*>(warp.lanes[lane].out)[i] += static_cast<float>(sum);
      }
  });
}

// ---- mbarrier ----------------------------------------------------------------------------------
void barrier_init(uint32_t barrier, uint32_t arrivals) {
  at(barrier, 8);
  const int count = static_cast<int>(arrivals);
  block->barriers[barrier] = MBarrier{count, count, 0, 0, false};
}
void barrier_init_fence() {
  for (auto& [address, barrier] : block->barriers) barrier.fenced = true;
}
void barrier_arrive(uint32_t barrier) {
  MBarrier& b = barrier_at(barrier);
  --b.pending;
  settle(b);
}
void barrier_expect(uint32_t barrier, uint32_t bytes) {
  MBarrier& b = barrier_at(barrier);
  b.bytes += bytes;
  if (b.bytes >= 1 << 20) fail("an mbarrier counts up to 2^20 - 1 bytes");
  --b.pending;
  settle(b);
}
void barrier_wait(uint32_t barrier, uint32_t parity) {
  barrier_at(barrier);
  Block* here = block;
  wait_until([here, barrier, parity] { return here->barriers[barrier].phase != parity; });
}

// ---- bulk copies: at any time up to the completion of their barrier's phase --------------------
static void complete(uint32_t barrier, uint32_t bytes) {
  MBarrier& b = barrier_at(barrier);
  b.bytes -= bytes;
  settle(b);
}
void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  if (to % 16 || bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16) fail("a bulk copy is misaligned");
  uint8_t* target = at(to, bytes);
  start_bulk(barrier, [=] {
    memcpy(target, from, bytes);
    complete(barrier, bytes);
  });
}
// Boxes of 128-byte rows; elements outside the tensor are zeros; the 128-byte swizzle exchanges
// address bits 4..6 by bits 7..9.
void copy_tensor(uint32_t to, const TensorMap* map, int x, int y, uint32_t barrier) {
  if (map->box_columns != 128 || to % 1024) fail("a swizzled box has rows of 128 bytes at 1024-byte alignment");
  if (reinterpret_cast<uintptr_t>(map->base) % 16 || map->stride % 16 || map->box_rows > 256 || !map->rows || !map->columns)
    fail("cuTensorMapEncodeTiled refuses such a tensor");
  const uint32_t bytes = map->box_columns * map->box_rows;
  at(to, bytes);
  const TensorMap copy = *map;
  start_bulk(barrier, [=] {
    for (uint32_t row = 0; row < copy.box_rows; ++row)
      for (uint32_t column = 0; column < 128; ++column) {
        const uint64_t from_row = static_cast<uint64_t>(y) + row, from_column = static_cast<uint64_t>(x) + column;
        const bool inside = from_row < copy.rows && from_column < copy.columns;
        uint32_t address = to + row * 128 + column;
        address ^= (address >> 3) & 0x70;
        shared[address] = inside ? copy.base[from_row * copy.stride + from_column] : 0;
      }
    complete(barrier, bytes);
  });
}

// ---- wgmma: executed when issued at the earliest, when its group is waited for at the latest ---
void wgmma_fence() {
  collective("wgmma_fence", {}, [](Warp& warp) { warp.fenced = true; });
}
void wgmma_commit() {
  collective("wgmma_commit", {}, [](Warp& warp) {
    warp.groups.push_back(std::move(warp.open));
    warp.open.clear();
    warp.fenced = false;
  });
}
void wgmma_wait_groups(int pending) {
  collective("wgmma_wait", {}, [pending](Warp& warp) {
    while (static_cast<int>(warp.groups.size()) > pending) {
      for (auto& product : warp.groups.front()) product();
      warp.groups.pop_front();
    }
  });
}
// A fragment as in mma.m16n8k32 for rows 16 * warp on; D register i of a lane: column
// 8 (i / 4) + 2 (lane % 4) + (i & 1), row lane / 4 + 8 ((i / 2) % 2). B by descriptor: rows of 128
// bytes, row groups of 8 at the stride offset, address bits 4..6 exchanged by bits 7..9.
void wgmma_s8_any(int32_t* d, const uint32_t (&a)[4], uint64_t b, int tokens, bool add) {
  const MmaInput in{{a[0], a[1], a[2], a[3]}, {static_cast<uint32_t>(tokens), add ? 1u : 0u}, b};
  collective("wgmma_s8", {&in, d, 0}, [](Warp& warp) {
    struct Product {
      int8_t left[16][32];
      int32_t* out[32];
      uint64_t descriptor;
      uint32_t tokens;
      bool add;
    };
    if (!warp.fenced) fail("registers change between wgmma without wgmma.fence");
    auto product = std::make_shared<Product>();
    gather_a(warp, product->left);
    for (int lane = 0; lane < 32; ++lane) {
      product->out[lane] = static_cast<int32_t*>(warp.lanes[lane].out);
      const uint64_t descriptor = static_cast<const MmaInput*>(warp.lanes[lane].in)->descriptor;
      if (lane && descriptor != product->descriptor) fail("a wgmma descriptor differs between lanes");
      product->descriptor = descriptor;
      product->tokens = static_cast<const MmaInput*>(warp.lanes[lane].in)->b[0];
      product->add = static_cast<const MmaInput*>(warp.lanes[lane].in)->b[1] != 0;
    }
    auto run = [product] {
      const uint64_t desc = product->descriptor;
      if (desc >> 62 != 1) fail("a wgmma descriptor is not of 128-byte swizzle");
      const auto start = static_cast<uint32_t>((desc & 0x3FFF) << 4);
      const auto stride = static_cast<uint32_t>(((desc >> 32) & 0x3FFF) << 4);
      std::vector<int8_t> right(product->tokens * 32);
      for (uint32_t n = 0; n < product->tokens; ++n)
        for (uint32_t k = 0; k < 32; ++k) {
          uint32_t address = start + n / 8 * stride + n % 8 * 128 + k;
          address ^= (address >> 3) & 0x70;
          right[n * 32 + k] = static_cast<int8_t>(*at(address, 1));
        }
      for (int lane = 0; lane < 32; ++lane)
        for (uint32_t i = 0; i < product->tokens / 2; ++i) {
          const uint32_t row = lane / 4 + ((i / 2) % 2) * 8, column = i / 4 * 8 + lane % 4 * 2 + (i & 1);
          int32_t sum = 0;
          for (int k = 0; k < 32; ++k) sum += product->left[row][k] * right[column * 32 + k];
          product->out[lane][i] = product->add ? product->out[lane][i] + sum : sum;
        }
    };
    // Products of one accumulator stay in order: act early only where none is waiting.
    if (warp.open.empty() && warp.groups.empty() && act_now()) run();
    else warp.open.push_back(run);
  });
}

}  // namespace mqc::gpu
