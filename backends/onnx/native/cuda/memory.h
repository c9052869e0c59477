// Device memory: of kernels (packed weights, tables) and of streams (workspaces).
#pragma once

#include <cstdint>
#include <utility>

namespace mqc_onnx_cuda {

// Throws the kernel library's own sentence unless status is MQC_OK.
void check(int status);

// Zeroed memory of the current device; onnxruntime makes its own current before it makes kernels.
class Memory {
  public:
    Memory() = default;
    explicit Memory(int64_t bytes);
    Memory(const void* host, int64_t bytes);  // a copy
    Memory(Memory&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
    Memory& operator=(Memory&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
        return *this;
    }
    ~Memory();

    void* data() const { return data_; }
    int64_t bytes() const { return bytes_; }

  private:
    void* data_ = nullptr;
    int64_t bytes_ = 0;
};

// What the kernels of one stream use in turn. onnxruntime gives every run that is under way a stream
// of its own, so one thread at a time enqueues on it. Memory that is too small is replaced by larger
// one; freeing the old waits for its readers.
class Workspace {
  public:
    // For kernels with counters: zeroed once, and left so that the next one can use it.
    void* counted(int64_t bytes) { return at_least(counted_, bytes); }
    // Anything, until the node's call ends.
    void* scratch(int64_t bytes) { return at_least(scratch_, bytes); }
    void* more(int64_t bytes) { return at_least(more_, bytes); }  // beside the scratch memory
    // A number on the device. It is sent where it changed: layers of a model share one.
    const int64_t* number(int64_t value, void* stream);

  private:
    static void* at_least(Memory& memory, int64_t bytes);

    Memory counted_, scratch_, more_, number_;
    int64_t value_ = 0;
};

// The workspace of a stream. Without one (null), each thread has its own.
Workspace& workspace_of(void* stream);

// Counts kernels: the last one frees the workspaces.
class Registered {
  public:
    Registered();
    ~Registered();
    Registered(const Registered&) = delete;
    Registered& operator=(const Registered&) = delete;
};

}  // namespace mqc_onnx_cuda
