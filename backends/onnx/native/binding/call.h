// One call of a CPU kernel: the node's values, and the session's threads.
#pragma once

#include <atomic>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

#include "mqc_layers.h"
#include "node.h"

namespace mqc_onnx {

// Memory of a kernel that lives as long as its session.
struct Free {
    void operator()(void* data) const { std::free(data); }
};
template <class T>
using Block = std::unique_ptr<T[], Free>;

template <class T>
Block<T> allocate(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64 + 64;
    void* data = std::aligned_alloc(64, bytes);
    if (!data) throw std::runtime_error("out of memory for " + std::to_string(bytes) + " bytes");
    return Block<T>(static_cast<T*>(data));
}

// Thread-local memory of at least `floats` floats, or null where there is none.
float* scratch(int64_t floats);

class Call : public Node {
  public:
    using Node::Node;

    // Row scales from `scale` and the variant's modality for x [..., n].
    mqc_row_scales row_scales(const char* scale, const Tensor& x) const;

    // f(task) for every task, on the session's threads. f must not throw; it returns whether it
    // had the memory it needs.
    template <class F>
    void tasks(int64_t count, const F& f) {
        struct Shared {
            const F* f;
            std::atomic<bool> good;
        } shared{&f, {true}};
        const auto run = [](void* data, size_t task) {
            auto* s = static_cast<Shared*>(data);
            if (!(*s->f)(static_cast<int64_t>(task))) s->good = false;
        };
        if (count == 1)
            run(&shared, 0);
        else if (count > 1)
            ort_.ParallelFor(run, static_cast<size_t>(count), 0, &shared);
        if (!shared.good) fail("out of memory");
    }

    // f(begin, end) over rows of about `cost` operations each, in shares worth a thread's while.
    template <class F>
    void rows(int64_t count, int64_t cost, const F& f) {
        const int64_t share = std::max<int64_t>(1, kShare / std::max<int64_t>(cost, 1));
        tasks((count + share - 1) / share, [&](int64_t task) {
            return f(task * share, std::min(count, (task + 1) * share));
        });
    }

    // The signature that the linear kernels want; `pool` is a Call.
    static void parallel_for(void* pool, size_t tasks, void (*task)(void*, size_t), void* context) {
        static_cast<Call*>(pool)->ort_.ParallelFor(task, tasks, 0, context);
    }

  private:
    static constexpr int64_t kShare = 1 << 15;
};

class Kernel {
  public:
    virtual ~Kernel() = default;
    virtual void compute(Call& call) const = 0;
};

// Makes the kernel of a variant; throws where the node's constants or attributes are wrong.
Kernel* make_layer(const Variant& variant, const Ort::ConstKernelInfo& info);
// The same for the token order and rotary angles; null for all others.
Kernel* make_order(const Variant& variant);
// threads: of the session, as far as known.
Kernel* make_linear(const Variant& variant, const Ort::ConstKernelInfo& info, int threads);
Kernel* make_float_linear(const Variant& variant, const Ort::ConstKernelInfo& info, int threads);

}  // namespace mqc_onnx
