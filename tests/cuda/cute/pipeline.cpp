// The Hopper kernel's pipeline: what its threads do with barriers, written down while the emulator runs
// it, beside the stages and phases of CUTLASS's PipelineTmaAsync.
#include <vector_types.h>
// What device code of CUTLASS names; none of it is called here.
static const dim3 threadIdx;
static inline void __syncthreads() {}

#include <cutlass/pipeline/sm90_pipeline.hpp>

#include "mqc/gpu.cuh"
#include "mqc/linear.cuh"
#include "witness.h"

#include <map>
#include <vector>

namespace {

enum class Kind { kStart, kWait, kExpect, kCopy, kMultiply, kDrain, kArrive };
struct Event {
  Kind kind;
  uint32_t barrier, number;  // number: arrivals, parity, bytes or groups that may be pending
  uint32_t to = 0;           // of a copy
};
std::map<std::pair<int, int>, std::vector<Event>> events;  // by block and thread

void note(Event event) { events[{mqc::gpu::block_x(), mqc::gpu::thread_index()}].push_back(event); }

}  // namespace

// The kernel calls these instead of the emulator's functions, which they call.
namespace mqc::gpu {
inline void noted_init(uint32_t barrier, uint32_t arrivals) {
  note({Kind::kStart, barrier, arrivals});
  barrier_init(barrier, arrivals);
}
inline void noted_wait(uint32_t barrier, uint32_t parity) {
  note({Kind::kWait, barrier, parity});
  barrier_wait(barrier, parity);
}
inline void noted_expect(uint32_t barrier, uint32_t bytes) {
  note({Kind::kExpect, barrier, bytes});
  barrier_expect(barrier, bytes);
}
inline void noted_arrive(uint32_t barrier) {
  note({Kind::kArrive, barrier, 1});
  barrier_arrive(barrier);
}
inline void noted_tensor(uint32_t to, const TensorMap* map, int x, int y, uint32_t barrier) {
  note({Kind::kCopy, barrier, map->box_columns * map->box_rows, to});
  copy_tensor(to, map, x, y, barrier);
}
inline void noted_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  note({Kind::kCopy, barrier, bytes, to});
  copy_bulk(to, from, bytes, barrier);
}
template <class... A> void noted_multiply(A&&... arguments) {
  note({Kind::kMultiply, 0, 0});
  wgmma_s8(arguments...);
}
template <int kSteps, class... A> void noted_multiply(A&&... arguments) {
  note({Kind::kMultiply, 0, 0});
  wgmma_s8<kSteps>(arguments...);
}
template <int kPending> void noted_drain() {
  note({Kind::kDrain, 0, kPending});
  wgmma_wait<kPending>();
}
}  // namespace mqc::gpu
#define barrier_init noted_init
#define barrier_wait noted_wait
#define barrier_expect noted_expect
#define barrier_arrive noted_arrive
#define copy_tensor noted_tensor
#define copy_bulk noted_bulk
#define wgmma_s8 noted_multiply
#define wgmma_wait noted_drain
// Names of their own: other files here have the same templates with the emulator's functions.
#define wgmma_add_groups noted_add_groups
#define linear_wgmma_kernel noted_wgmma_kernel
#include "mqc/linear_wgmma.cuh"

// Events of one thread, taken in order.
namespace {
class Log {
 public:
  Log(int block, int thread) : events_(events[{block, thread}]) {}
  bool done() const { return at_ == events_.size(); }
  Kind kind() const { return done() ? Kind::kStart : events_[at_].kind; }
  Event take(Kind kind, const char* what) {
    SAME(!done() && this->kind() == kind, true, what);
    return done() ? Event{} : events_[at_++];
  }

 private:
  const std::vector<Event>& events_;
  size_t at_ = 0;
};
}  // namespace

template <class Format> static void check_pipeline(int n, int rows, int k, int blocks) {
  using Kernel = mqc::WgmmaShape<Format>;
  using Theirs = cutlass::PipelineTmaAsync<Kernel::kStages>;
  mqc::LinearParams p{};
  p.rows = rows, p.n = n, p.k = k;
  p.channel_tiles = static_cast<int32_t>(mqc::ceil_div(n, mqc::kTileChannels));
  p.input_tiles = static_cast<int32_t>(mqc::ceil_div(k, mqc::kTileInputs));
  p.split_k = 1, p.band = 8, p.dtype = 0;
  p.x_stride = (k + 15) / 16 * 16, p.y_stride = n;
  std::vector<int8_t> x(static_cast<size_t>(rows * p.x_stride) + 16, 1);
  std::vector<uint8_t> w(static_cast<size_t>(p.channel_tiles * p.input_tiles) * Format::kTileBytes + 16, 0);
  std::vector<float> w_scale(n, 1.0f), y(static_cast<size_t>(n) * rows);
  const float one = 1.0f;
  const auto aligned = [](auto* pointer) {
    return reinterpret_cast<decltype(pointer)>((reinterpret_cast<uintptr_t>(pointer) + 15) & ~uintptr_t{15});
  };
  p.x = aligned(x.data()), p.w = aligned(w.data()), p.w_scale = w_scale.data(), p.y = y.data();
  p.rows_scale = mqc::RowScale{&one, nullptr, 0, 0};
  const mqc::gpu::TensorMap map{reinterpret_cast<const uint8_t*>(p.x), static_cast<uint64_t>(k),
                                static_cast<uint64_t>(rows), static_cast<uint64_t>(p.x_stride), mqc::kTileInputs,
                                Kernel::kTokens};
  events.clear();
  mqc::emulator::configure(9, 2);
  mqc::emulator::launch({blocks, 1, 1}, Kernel::kThreads, Kernel::kSharedBytes,
                        [&] { mqc::linear_wgmma_kernel<Format>(p, map); });

  const int channel_blocks = static_cast<int>(mqc::ceil_div(p.channel_tiles, Kernel::kTiles));
  const int tiles = channel_blocks * static_cast<int>(mqc::ceil_div(rows, Kernel::kTokens));
  for (int block = 0; block < blocks; ++block) {
    const int steps = (tiles - block + blocks - 1) / blocks * p.input_tiles;
    SAME(steps > 2 * Kernel::kStages, true, "stages are used more than twice");
    // The thread that starts the barriers is the producer.
    Log producer(block, 0);
    uint32_t full = 0, empty = 0;
    for (int stage = 0; stage < Kernel::kStages; ++stage) {
      const Event first = producer.take(Kind::kStart, "start of a full barrier");
      const Event second = producer.take(Kind::kStart, "start of an empty barrier");
      if (stage == 0) full = first.barrier, empty = second.barrier;
      SAME(first.barrier, full + stage * sizeof(typename Theirs::FullBarrier), "address of a full barrier");
      SAME(second.barrier, empty + stage * sizeof(typename Theirs::EmptyBarrier), "address of an empty barrier");
      SAME(first.number, typename Theirs::Params{}.num_producers, "arrivals at a full barrier");
      SAME(second.number, Kernel::kConsumers * 4, "arrivals at an empty barrier: one a consumer warp");
    }
    auto write = cutlass::make_producer_start_state<Theirs>();
    uint32_t first_stage = 0;
    for (int step = 0; step < steps; ++step, ++write) {
      // producer_acquire: wait, then expect; then the copies.
      const Event wait = producer.take(Kind::kWait, "the producer waits");
      SAME(wait.barrier, empty + 8 * write.index(), "stage that the producer waits for");
      SAME(wait.number, write.phase(), "phase that the producer waits for");
      const Event expect = producer.take(Kind::kExpect, "the producer expects");
      SAME(expect.barrier, full + 8 * write.index(), "stage that the producer fills");
      uint32_t bytes = 0;
      for (int copy = 0; producer.kind() == Kind::kCopy; ++copy) {
        const Event part = producer.take(Kind::kCopy, "a copy");
        if (step == 0 && copy == 0) first_stage = part.to;
        SAME(part.barrier, expect.barrier, "barrier of a copy");
        SAME(part.to, first_stage + write.index() * Kernel::kStageBytes + bytes, "target of a copy");
        bytes += part.number;
      }
      SAME(expect.number, bytes, "bytes that are expected");
    }
    SAME(producer.done(), true, "end of the producer");
    for (int thread = 128; thread < Kernel::kThreads; ++thread) {
      Log consumer(block, thread);
      typename Theirs::PipelineState read;
      for (int step = 0; step < steps; ++step, ++read) {
        const Event wait = consumer.take(Kind::kWait, "a consumer waits");
        SAME(wait.barrier, full + 8 * read.index(), "stage that a consumer waits for");
        SAME(wait.number, read.phase(), "phase that a consumer waits for");
        int products = 0, pending = -1;
        while (consumer.kind() == Kind::kMultiply || consumer.kind() == Kind::kDrain) {
          const bool multiplies = consumer.kind() == Kind::kMultiply;
          const Event event = consumer.take(consumer.kind(), "products");
          products += multiplies;
          pending = multiplies ? -1 : static_cast<int>(event.number);
        }
        SAME(products > 0, true, "products of a stage");
        SAME(pending, 0, "groups in flight when a stage is released");
        if (thread % 32 != 0) continue;
        const Event release = consumer.take(Kind::kArrive, "a consumer releases");
        SAME(release.barrier, empty + 8 * read.index(), "stage that a consumer releases");
      }
      SAME(consumer.done(), true, "end of a consumer");
    }
  }
}

CASE(pipeline) {
  check_pipeline<mqc::W4>(300, 200, 900, 2);  // 4 tiles of 8 inputs
  check_pipeline<mqc::W4Grouped<64>>(256, 130, 900, 1);
  check_pipeline<mqc::W8>(64, 120, 1500, 1);
}
