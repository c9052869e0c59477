// One call of a kernel: its inputs by name, checked; its outputs; the session's threads.
#pragma once

#include <atomic>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "mqc_layers.h"
#include "variants.h"

namespace mqc_onnx {

struct Tensor {
    const void* data = nullptr;
    std::vector<int64_t> shape;
    int64_t count = 0;  // elements

    int64_t rank() const { return static_cast<int64_t>(shape.size()); }
    int64_t last() const { return shape.empty() ? 1 : shape.back(); }
    // Rows of a tensor [..., last]; 0 where it has no elements in them.
    int64_t rows() const {
        int64_t product = 1;
        for (size_t i = 0; i + 1 < shape.size(); i++) product *= shape[i];
        return product;
    }
    template <class T>
    const T* as() const {
        return static_cast<const T*>(data);
    }
};

std::string text_of(const std::vector<int64_t>& shape);

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

// An input that has to be an initializer, read when the session is made.
struct Constant {
    const char* name;
    std::vector<int64_t> shape;
    const void* data = nullptr;

    Constant(const Variant& variant, const Ort::ConstKernelInfo& info, const char* input);
    void require(bool good, const char* wanted) const;
    template <class T>
    const T* as() const {
        return static_cast<const T*>(data);
    }

  private:
    std::string op_;
};

// Thread-local memory of at least `floats` floats, or null where there is none.
float* scratch(int64_t floats);

class Call {
  public:
    Call(const Variant& variant, OrtKernelContext* context)
        : variant_(variant), ort_(context) {}

    const Variant& variant() const { return variant_; }
    Tensor input(const char* name) const;

    // An output of this shape; its position is that of its name in the variant.
    template <class T>
    T* output(size_t index, const std::vector<int64_t>& shape) {
        return static_cast<T*>(
            ort_.GetOutput(index, shape.data(), shape.size()).GetTensorMutableRawData());
    }

    [[noreturn]] void fail(const std::string& message) const {
        throw std::runtime_error("ai.mqc::" + variant_.op_type() + ": " + message);
    }
    void require(bool good, const char* name, const Tensor& tensor, const char* wanted) const {
        if (!good)
            fail(std::string(name) + " has shape " + text_of(tensor.shape) + ", wanted " + wanted);
    }

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

    const Variant& variant_;
    Ort::KernelContext ort_;
};

class Kernel {
  public:
    virtual ~Kernel() = default;
    virtual void compute(Call& call) const = 0;
};

// Makes the kernel of a variant; throws where the node's constants or attributes are wrong.
Kernel* make_layer(const Variant& variant, const Ort::ConstKernelInfo& info);
// threads: of the session, as far as known.
Kernel* make_linear(const Variant& variant, const Ort::ConstKernelInfo& info, int threads);

}  // namespace mqc_onnx
