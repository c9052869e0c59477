#include "node.h"

namespace mqc_onnx {

std::string text_of(const std::vector<int64_t>& shape) {
    std::string text = "[";
    for (size_t i = 0; i < shape.size(); i++)
        text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
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

Tensor Node::input(const char* name) const {
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

Node::Scales Node::scales(const char* name, const Tensor& x) const {
    Scales found;
    found.scale = input(name);
    found.mask = variant_.has("mask");
    found.count = variant_.has("count");
    const Tensor& scale = found.scale;
    if (!found.mask && !found.count) {
        require(scale.rank() == 1 && scale.count == 1, name, scale, "[1]");
        return found;
    }
    require(scale.rank() == 1 && scale.count == 2, name, scale, "[2]: text, visual");
    found.modality = input("modality");
    const Tensor& modality = found.modality;
    if (found.mask)
        require(modality.count == x.rows() && modality.rank() == x.rank() - 1, "modality", modality,
                "one value for every row of x");
    else
        require(x.rank() == 3 && modality.rank() == 1 && modality.count == x.shape[0], "modality",
                modality, "[batch] of x [batch, tokens, channels]");
    return found;
}

}  // namespace mqc_onnx
