#include "call.h"

namespace mqc_onnx {

std::string text_of(const std::vector<int64_t>& shape) {
    std::string text = "[";
    for (size_t i = 0; i < shape.size(); i++)
        text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
}

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

Constant::Constant(const Variant& variant, const Ort::ConstKernelInfo& info, const char* input)
    : name(input), op_(variant.op_type()) {
    const int index = variant.find(input);
    int constant = 0;
    Ort::ConstValue value;
    if (index >= 0) value = info.GetTensorConstantInput(static_cast<size_t>(index), &constant);
    if (!constant || !value) require(false, "an initializer");
    const auto tensor = value.GetTensorTypeAndShapeInfo();
    shape = tensor.GetShape();
    if (tensor.GetElementType() != variant.inputs[static_cast<size_t>(index)].type)
        require(false, "the element type of the operator");
    data = value.GetTensorRawData();
}

void Constant::require(bool good, const char* wanted) const {
    if (!good)
        throw std::runtime_error("ai.mqc::" + op_ + ": " + name + " " + text_of(shape) +
                                 " has to be " + wanted);
}

Tensor Call::input(const char* name) const {
    const int index = variant_.find(name);
    if (index < 0) fail(std::string("no input ") + name);
    const Ort::ConstValue value = ort_.GetInput(static_cast<size_t>(index));
    if (!value || !value.IsTensor()) fail(std::string(name) + " is not a tensor");
    const auto info = value.GetTensorTypeAndShapeInfo();
    if (info.GetElementType() != variant_.inputs[static_cast<size_t>(index)].type)
        fail(std::string(name) + " has the wrong element type");
    Tensor tensor;
    tensor.shape = info.GetShape();
    tensor.count = static_cast<int64_t>(info.GetElementCount());
    tensor.data = value.GetTensorRawData();
    return tensor;
}

mqc_row_scales Call::row_scales(const char* name, const Tensor& x) const {
    const Tensor scale = input(name);
    mqc_row_scales scales = {scale.as<float>(), nullptr, nullptr, 1};
    const bool mask = variant_.has("mask"), count = variant_.has("count");
    if (!mask && !count) {
        require(scale.rank() == 1 && scale.count == 1, name, scale, "[1]");
        return scales;
    }
    require(scale.rank() == 1 && scale.count == 2, name, scale, "[2]: text, visual");
    const Tensor modality = input("modality");
    if (mask) {
        require(modality.count == x.rows() && modality.rank() == x.rank() - 1, "modality", modality,
                "one value for every row of x");
        scales.mask = modality.as<uint8_t>();
        return scales;
    }
    require(x.rank() == 3 && modality.rank() == 1 && modality.count == x.shape[0], "modality",
            modality, "[batch] of x [batch, tokens, channels]");
    scales.count = modality.as<int64_t>();
    scales.tokens = x.shape[1];
    for (int64_t i = 0; i < modality.count; i++)
        if (scales.count[i] < 0 || scales.count[i] > scales.tokens)
            fail("modality counts " + std::to_string(scales.count[i]) + " visual rows of " +
                 std::to_string(scales.tokens));
    return scales;
}

}  // namespace mqc_onnx
