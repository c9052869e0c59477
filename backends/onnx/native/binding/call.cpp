#include "call.h"

namespace mqc_onnx {
namespace {

struct Memory {
    void* data = nullptr;
    size_t size = 0;
    ~Memory() { std::free(data); }
};

}  // namespace

float* scratch(int64_t floats) {
    thread_local Memory memory;
    const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 4095) / 4096 * 4096;
    if (bytes > memory.size) {
        std::free(memory.data);
        memory.data = std::aligned_alloc(64, bytes);
        memory.size = memory.data ? bytes : 0;
    }
    return static_cast<float*>(memory.data);
}

mqc_row_scales Call::row_scales(const char* name, const Tensor& x) const {
    const Scales found = this->scales(name, x);
    mqc_row_scales scales = {found.scale.as<float>(), nullptr, nullptr, 1};
    if (found.mask) scales.mask = found.modality.as<uint8_t>();
    if (!found.count) return scales;
    scales.count = found.modality.as<int64_t>();
    scales.tokens = x.shape[1];
    for (int64_t i = 0; i < found.modality.count; i++)
        if (scales.count[i] < 0 || scales.count[i] > scales.tokens)
            fail("modality counts " + std::to_string(scales.count[i]) + " visual rows of " +
                 std::to_string(scales.tokens));
    return scales;
}

}  // namespace mqc_onnx
