#include "memory.h"

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>

#include "kernels.h"

namespace mqc_onnx_cuda {

void check(int status) {
    if (status != MQC_OK) throw std::runtime_error(kernels().last_error());
}

Memory::Memory(int64_t bytes) : bytes_(bytes) { check(kernels().allocate(bytes, &data_)); }

Memory::Memory(const void* host, int64_t bytes) : Memory(bytes) {
    check(kernels().upload(data_, host, bytes, nullptr));
}

Memory::~Memory() {
    if (data_) kernels().free(data_);  // a failure here was another kernel's
}

void* Workspace::at_least(Memory& memory, int64_t bytes) {
    // At least double: a prompt that grows token by token would else allocate at every token.
    if (bytes > memory.bytes()) memory = Memory(std::max(bytes, 2 * memory.bytes()));
    return memory.data();
}

const int64_t* Workspace::number(int64_t value, void* stream) {
    if (!number_.data()) number_ = Memory(sizeof value);  // holds 0, as value_
    if (value != value_) check(kernels().upload(number_.data(), &value, sizeof value, stream));
    value_ = value;
    return static_cast<const int64_t*>(number_.data());
}

namespace {

struct Workspaces {
    std::mutex lock;
    std::map<std::pair<void*, std::thread::id>, std::unique_ptr<Workspace>> by_stream;
    int64_t kernels = 0;
};

// Never destroyed: at the end of the process the driver may be gone before.
Workspaces& workspaces() {
    static auto& all = *new Workspaces;
    return all;
}

}  // namespace

Workspace& workspace_of(void* stream) {
    Workspaces& all = workspaces();
    const auto thread = stream ? std::thread::id() : std::this_thread::get_id();
    const std::lock_guard<std::mutex> guard(all.lock);
    auto& workspace = all.by_stream[{stream, thread}];
    if (!workspace) workspace = std::make_unique<Workspace>();
    return *workspace;
}

Registered::Registered() {
    const std::lock_guard<std::mutex> guard(workspaces().lock);
    workspaces().kernels++;
}

Registered::~Registered() {
    const std::lock_guard<std::mutex> guard(workspaces().lock);
    if (--workspaces().kernels == 0) workspaces().by_stream.clear();
}

}  // namespace mqc_onnx_cuda
